"""Broken input, by the thousand: whatever reads it says what is wrong with it, in time.

    python -m tests.fuzz [--inputs=100000] [--rewards=3000] [--seed=0] [--only=NAME]

Inputs are good ones with a few bytes, keys or values changed: configs and their flags, rows of
data, headers of safetensors and config.json of a Hugging Face folder, files of a tokenizer,
and responses to math. Any error but InputError, and any input that takes longer than LIMIT_S,
is a failure, printed with the input. Prints how many inputs were refused and how many not.
"""

import argparse
import collections
import contextlib
import json
import pathlib
import random
import signal
import struct
import sys
import tempfile
import time

import jax
import numpy as np
import tokenizers

from configs import gppo_tiny, sft_tiny
from klear_jax import config, hf_weights, qwen3, tokens, train
from klear_jax.data import rows
from klear_jax.errors import InputError
from klear_jax.rewards import math

LIMIT_S = 5.0  # Of an input; math-verify has its own limit.
VALUES = (
    None, True, 0, -1, 1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", " ", "x", "\u0000", "\ud800", "../../etc/passwd", "/", "é" * 50, "9" * 5_000,
    [], [None], [[]], [1, "a"], {}, {"a": 1}, {"": {}}, [0] * 1_000,
)  # fmt: skip


def change_bytes(rng: random.Random, data: bytes) -> bytes:
    """A few bytes changed, cut out, doubled or put in."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        place = rng.randrange(len(out) + 1)
        end = min(len(out), place + rng.choice((1, 2, 8, 100)))
        what = rng.randrange(4)
        if what == 0:
            out[place:end] = rng.randbytes(end - place)
        elif what == 1:
            del out[place:end]
        elif what == 2:
            out[place:place] = out[place:end]
        else:
            out[place:place] = rng.choice(
                (
                    b"\x00",
                    b"{",
                    b"}",
                    b"[" * 2_000,
                    b'"',
                    b"\\",
                    b"-",
                    b"9" * 30,
                    b"\xff",
                )
            )
    return bytes(out)


def change_value(rng: random.Random, value):
    """The same with one value in it changed, or one key gone, or one too many."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        value = dict(value)
        key = rng.choice(list(value))
        what = rng.random()
        if what < 0.05:
            del value[key]
        elif what < 0.1:
            value[str(rng.choice(VALUES))] = rng.choice(VALUES)
        else:
            value[key] = change_value(rng, value[key])
        return value
    if isinstance(value, list) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        return [*value[:place], change_value(rng, value[place]), *value[place + 1 :]]
    return rng.choice(VALUES)


def configs(rng, folder):
    """Dicts that `train.parse` gets."""
    good = [c.get_config().to_dict() for c in (gppo_tiny, sft_tiny)]
    while True:
        values = dict(rng.choice(good))  # A ConfigDict always is one.
        for _ in range(rng.choice((1, 1, 3))):
            key = rng.choice(list(values))
            values[key] = change_value(rng, values[key])
        yield values, lambda values=values: train.parse(values)


def config_flags(rng, folder):
    """Command lines."""
    good = gppo_tiny.get_config().to_dict()
    texts = {"workdir": ""}
    while True:
        key, node = [], good
        while isinstance(node, dict) and node:
            name = rng.choice(list(node))
            key, node = [*key, name], node[name]
        argv = ["train", "--config=configs/gppo_tiny.py"]
        for _ in range(rng.choice((1, 1, 2))):
            text = f"--config.{'.'.join(key)}={rng.choice((*VALUES, node))}"
            if rng.random() < 0.5:
                text = change_bytes(rng, text.encode("utf-8", "replace")).decode(
                    "latin-1"
                )
            argv.append(text.replace("\x00", ""))
        if "help" in text:
            continue
        yield argv, lambda argv=argv: config.parse_flags(argv, "", texts)


ROWS = (
    {"prompt": "7+5=", "response": "<think>\na</think>\n\n12", "answer": "12"},
    {"messages": [{"role": "user", "content": "7+5="}, {"role": "assistant", "content": "12"}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {
        "prompt": [{"role": "user", "content": "7+5="}],
        "data_source": "math_longcot_math_verify",
        "reward_model": {"ground_truth": "12", "style": "rule"},
    },
    {"prompt": "add", "answer": {"inputs": ["1 2\n"], "outputs": ["3\n"]}, "meta": {"answer": 3}},
)  # fmt: skip


def data_rows(rng, folder):
    """Lines of JSON, in every declared shape."""
    while True:
        line = json.dumps(change_value(rng, rng.choice(ROWS))).encode()
        if rng.random() < 0.7:
            line = change_bytes(rng, line)
        fields = rng.choice(list(rows.SHAPES.values()))
        yield (
            line,
            lambda line=line, fields=fields: rows.to_example(
                line, fields, origin="x line 1", prompt_id=1
            ),
        )


HF_CONFIG = {
    "model_type": "qwen3", "vocab_size": 8, "hidden_size": 4, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2, "intermediate_size": 4,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "max_position_embeddings": 64,
    "rope_theta": 1e4, "torch_dtype": "float32",
}  # fmt: skip


def hugging_face(rng, folder):
    """Headers of model.safetensors, whole files, config.json, the index of shards."""
    good = folder / "good"
    good.mkdir()
    (good / "config.json").write_text(json.dumps(HF_CONFIG))
    model = hf_weights.read_config(good)
    hf_weights.save(good, qwen3.init_params(model, jax.random.key(0)), model)
    data = (good / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    made = json.loads((good / "config.json").read_text())
    target = folder / "changed"
    target.mkdir()
    index = target / "model.safetensors.index.json"
    while True:
        what, text, whole, about = rng.randrange(5), None, data, made
        if what < 2:
            text = json.dumps(change_value(rng, header)).encode()
            if what:
                text = change_bytes(rng, json.dumps(header).encode())
            length = rng.choice((len(text),) * 8 + (0, 1, 2**40, 2**63))
            whole = struct.pack("<Q", length) + text + body
        elif what == 2:
            whole = change_bytes(rng, data[: rng.choice((8, 100, len(data)))])
        elif what == 3:
            about = change_value(rng, made)
        index.unlink(missing_ok=True)
        if what == 4:
            weight_map = dict.fromkeys(header, "model.safetensors")
            index.write_bytes(
                json.dumps(change_value(rng, {"weight_map": weight_map})).encode()
            )
        (target / "model.safetensors").write_bytes(whole)
        (target / "config.json").write_text(json.dumps(about))
        yield (what, text, about), lambda: hf_weights.load(target, dtype=np.float32)


def tokenizer_files(rng, folder):
    """tokenizer.model or tokenizer.json, tokenizer_config.json, a chat template."""
    good = []
    tokens.train_sentencepiece(["7+5=12", "1-2"], folder / "sp", symbols=())
    good.append({f.name: f.read_bytes() for f in (folder / "sp").iterdir()})
    model = tokenizers.Tokenizer(
        tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])
    )
    model.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    about = json.loads(good[0]["tokenizer_config.json"])
    good.append(
        {
            "tokenizer.json": model.to_str().encode(),
            "tokenizer_config.json": json.dumps(about).encode(),
        }
    )
    target = folder / "changed"
    target.mkdir()
    while True:
        files = dict(rng.choice(good))
        name = rng.choice(list(files))
        if name.endswith(".json") and rng.random() < 0.5:
            changed = change_value(rng, json.loads(files[name]))
            files[name] = json.dumps(changed).encode()
        else:
            files[name] = change_bytes(rng, files[name])
        for old in target.iterdir():
            old.unlink()
        for file, content in files.items():
            (target / file).write_bytes(content)

        def use():
            found = tokens.load(target)
            found.prompt([{"role": "user", "content": "7+5= <|im_end|> é"}])
            found.decode([0, 1, 2])

        yield files[name][:2_000], use


PIECES = (
    "\\boxed{", "}", "\\frac{1}{2}", "\\sqrt[3]{", "x^{", "2", "^", "10**", "9" * 40, "(", ")",
    "\\left[", "\\cup", "\\infty", "</think>", "<think>", "\\text{", "$", "$$", "\\int_0^1",
    "factorial", "!", "\\begin{matrix}", "&", "\\\\", ",", "=", "\\pi", "e^", "\\sum_{i=1}^{9999999}",
)  # fmt: skip


def responses(rng, folder):
    """Responses to math, of pieces that its parser takes for something."""
    while True:
        text = "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 40)))
        text = rng.choice(("", "<think>a</think>")) + text
        if rng.random() < 0.7:
            text += f"\\boxed{{{''.join(rng.choice(PIECES) for _ in range(5))}}}"

        truth = rng.choice(("12", "\\frac{1}{2}", "x^2"))

        def use(text=text, truth=truth):
            reward = math.score(text, truth)
            assert reward in (1.0, -1.0, -0.5, -2.0), reward

        yield text, use


TARGETS = {
    "configs": configs,
    "flags": config_flags,
    "data": data_rows,
    "hugging_face": hugging_face,
    "tokenizers": tokenizer_files,
    "rewards": responses,
}


class TooSlow(BaseException):
    pass


@contextlib.contextmanager
def limit():
    def late(*_):
        raise TooSlow

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fuzz(name: str, inputs: int, seed: int) -> collections.Counter:
    """How many inputs were 'refused' and 'taken'; the others by what they raised."""
    found: collections.Counter = collections.Counter()
    # math-verify has an alarm of its own.
    clock = contextlib.nullcontext if name == "rewards" else limit
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        made = TARGETS[name](random.Random(f"{name} {seed}"), pathlib.Path(folder))
        slowest = 0.0
        for _ in range(inputs):
            about, use = next(made)
            begun = time.perf_counter()
            try:
                with clock():
                    use()
                found["taken"] += 1
            except InputError as error:
                found["refused"] += 1
                if "\n" in str(error):
                    found["of several lines"] += 1
                    print(f"{name}: {error!r}", file=sys.stderr)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                found[type(error).__name__] += 1
                if found[type(error).__name__] <= 3:
                    print(f"{name}: {error!r} for {about!r}"[:1_500], file=sys.stderr)
            taken = time.perf_counter() - begun
            slowest = max(slowest, taken)
    found["slowest, ms"] = round(1_000 * slowest)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--rewards", type=int, default=3_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=TARGETS)
    flags = parser.parse_args()
    for name in [flags.only] if flags.only else TARGETS:
        begun = time.monotonic()
        inputs = flags.rewards if name == "rewards" else flags.inputs
        found = fuzz(name, inputs, flags.seed)
        print(f"{name}: {dict(found)}, {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
