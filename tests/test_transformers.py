"""Optional: transformers reads what we write, and computes and continues the same.

pip install torch transformers && python -m pytest tests/test_transformers.py
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_sampler
import test_tokens

from klear_jax import hf_weights, qwen3, sampler, tokens

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # Theirs.

QWEN3 = qwen3.Config(
    vocab_size=211,
    width=48,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    mlp_width=80,
    rope_theta=1e6,
    norm_eps=1e-6,
    tied=True,
    qk_norm=True,
    max_positions=160,
)
YARN = qwen3.Yarn(factor=2.5, original_max_positions=64)
CONFIGS = {
    "qwen3": QWEN3,
    "qwen3-untied-yarn": dataclasses.replace(QWEN3, tied=False, yarn=YARN),
    "qwen3-yarn-options": dataclasses.replace(
        QWEN3,
        yarn=dataclasses.replace(
            YARN, beta_fast=8.0, beta_slow=2.0, attention_factor=1.3
        ),
    ),
    "llama-untied": dataclasses.replace(
        QWEN3, qk_norm=False, tied=False, rope_theta=1e4
    ),
    "llama-mha-yarn": dataclasses.replace(
        QWEN3, qk_norm=False, num_kv_heads=6, yarn=YARN
    ),
}
PROMPT, NEW = 30, 60  # Beyond the original context of YARN.


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_agrees(tmp_path, name, monkeypatch):
    config = CONFIGS[name]
    rng = np.random.default_rng(0)
    # 1.5 times the usual scale and norms away from 1: logits that are not flat.
    params = jax.tree.map(
        lambda p: (
            1.5 * p.init_std * rng.normal(size=p.shape)
            if p.init_std
            else 1 + 0.2 * rng.normal(size=p.shape)
        ).astype(np.float32),
        qwen3.param_table(config),
    )
    # In one file and in several.
    monkeypatch.setattr(hf_weights, "SHARD_BYTES", 10**9 if config.tied else 100_000)
    hf_weights.save(tmp_path, params, config)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info

    prompt = rng.integers(3, config.vocab_size, (2, PROMPT))
    with torch.no_grad():
        tokens = theirs.generate(
            torch.tensor(prompt),
            attention_mask=torch.ones(2, PROMPT, dtype=torch.long),
            do_sample=False,
            max_new_tokens=NEW,
            eos_token_id=None,
            pad_token_id=0,
        )
        want = theirs(tokens).logits.numpy()
    assert tokens.shape == (2, PROMPT + NEW)

    @jax.jit
    def logits(params, tokens):
        return qwen3.forward(params, config, tokens) @ qwen3.head_weight(params).T

    got = np.asarray(logits(params, jnp.asarray(tokens.numpy())))
    error = np.abs(got - want).max()
    print(f"{name}: logits up to {np.abs(want).max():.1f} differ by {error:.1e}")
    assert want.std() > 1
    assert error <= 1e-4
    greedy = got[:, PROMPT - 1 : -1].argmax(-1)
    np.testing.assert_array_equal(greedy, tokens[:, PROMPT:].numpy())


@pytest.mark.parametrize("kind", ["hugging face", "characters"])
def test_an_exported_folder_answers_alike(tmp_path, kind):
    """From a chat to the text of the answer, ended by the same tokens."""
    if kind == "hugging face":
        test_tokens.make_hugging_face(tmp_path / "made")
        # The fixture's short form of a token, theirs does not know.
        test_tokens.change_config(tmp_path / "made", eos_token="<|im_end|>")
    else:
        test_tokens.make_sentencepiece(tmp_path / "made")
    ours = tokens.load(tmp_path / "made")
    ours.export(tmp_path / "out")
    config = dataclasses.replace(QWEN3, vocab_size=300, tied=False)
    params = test_sampler.make_params(config)
    # The end comes now and then; bytes that are no text, of which decoders differ, never.
    no_text = [
        i for i in range(ours.vocab_size) if tokens.NO_CHARACTER in ours.decode([i])
    ]
    head = params["lm_head"].at[ours.stop_ids[0]].multiply(3)
    params["lm_head"] = head.at[np.array(no_text)].set(0)
    hf_weights.save(tmp_path / "out", params, config)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    chats = [[{"role": "user", "content": f"{n}+\u00e9 {n}="}] for n in range(20)]
    found = sampler.generate(
        params,
        config,
        [ours.prompt(chat) for chat in chats],
        max_new_tokens=NEW,
        temperature=0.0,
        stop_ids=ours.stop_ids,
    )
    for chat, [sample] in zip(chats, found, strict=True):
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        assert inputs["input_ids"][0].tolist() == ours.prompt(chat)
        with torch.no_grad():
            output = theirs.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        answer = output[0, inputs["input_ids"].shape[1] :]
        assert answer.tolist() == sample.tokens
        text = tokenizer.decode(answer, skip_special_tokens=True)
        assert text == ours.decode(sample.tokens)
    assert any(sample.finished for [sample] in found)
