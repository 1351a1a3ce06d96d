"""Prompts in, text out as it comes: what is shown is what was sampled."""

import dataclasses
import io
import itertools
import json
import re
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import test_sampler

from configs import sections
from klear_jax import checkpoint, generate, hf_weights, qwen3, sampler, tokens
from klear_jax.errors import InputError
from klear_jax.generate import DIM, PLAIN

SYMBOLS = ["<think>", "</think>", "user", "assistant", "system"]
CONFIG = qwen3.Config(
    vocab_size=320,
    width=32,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=48,
    rope_theta=1e4,
    norm_eps=1e-6,
    tied=False,
    qk_norm=True,
    max_positions=64,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokens.train_sentencepiece(["7+5-3=12é"], folder, symbols=SYMBOLS)
    params = test_sampler.make_params(CONFIG)
    [stop] = tokens.load(folder).stop_ids
    params["lm_head"] = params["lm_head"].at[stop].multiply(2)  # Some answers end.
    hf_weights.save(folder, params, CONFIG)
    return folder


@pytest.fixture
def two_devices(monkeypatch):
    """Which are quicker than eight."""
    devices = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return tokens.load(folder)


@pytest.fixture
def answers(monkeypatch):
    """The groups that were answered, call by call."""
    answers, answer = [], generate.answer

    def record(*args):
        answers.append(answer(*args))

    monkeypatch.setattr(generate, "answer", record)
    return answers


def say(folder, *flags):
    generate.main(["generate", f"--model={folder}", "--max_new_tokens=20", *flags])


def user(text):
    return [{"role": "user", "content": text}]


def test_a_prompt_is_answered(two_devices, folder, tokenizer, capsys):
    say(folder, "--prompt=7+5=")
    out, err = capsys.readouterr()
    params, config = hf_weights.load(folder, dtype=np.float32)
    [[sample]] = sampler.generate(
        params,
        config,
        [tokenizer.prompt(user("7+5="))],
        max_new_tokens=20,
        temperature=0.6,
        top_p=0.95,
        stop_ids=tokenizer.stop_ids,
    )
    assert out == tokenizer.decode(sample.tokens) + "\n"
    assert len(set(out)) > 5
    end = "finished" if sample.finished else "cut off by max_new_tokens=20"
    assert re.fullmatch(
        rf"{len(sample.tokens)} tokens, {end}; the first after \d+\.\d s, then "
        r"\d+\.\d tokens/s\n",
        err,
    )


def test_rows_are_answered_one_after_the_other(
    two_devices, answers, folder, tokenizer, tmp_path, capsys
):
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": "1+2=", "answer": "3"}, {"messages": user("7-5=")}]
    file.write_text("\n".join(map(json.dumps, rows)))
    say(folder, f"--file={file}", "--num_samples=2", "--temperature=1", "--seed=3")
    out, err = capsys.readouterr()
    [groups] = answers
    assert [group.prompt for group in groups] == [
        tokenizer.prompt(user(text)) for text in ("1+2=", "7-5=")
    ]
    assert out == "".join(
        f"--- {file} line {i + 1}, sample {j + 1} of 2 ---\n"
        f"{tokenizer.decode(sample.tokens)}\n"
        for i, group in enumerate(groups)
        for j, sample in enumerate(group.samples)
    )
    samples = [sample for group in groups for sample in group.samples]
    assert len({tuple(sample.tokens) for sample in samples}) == 4
    cut = sum(not sample.finished for sample in samples)
    assert 0 < cut < 4
    assert f" tokens, {cut} of 4 samples cut off by max_new_tokens=20; " in err


def test_standard_input_is_a_prompt(
    two_devices, answers, folder, tokenizer, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("é\n7\n".encode())))
    say(folder, "--raw")
    [[group]] = answers
    assert group.prompt == tokenizer.encode("é\n7")
    assert capsys.readouterr().out == tokenizer.decode(group.samples[0].tokens) + "\n"


def test_a_terminal_is_asked_again_and_again(
    two_devices, answers, folder, tokenizer, monkeypatch, capsys
):
    lines = iter(["7+5=", "7" * 99, "7+5=", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    say(folder)
    out, err = capsys.readouterr()
    [[first], [again]] = answers
    assert first.prompt == again.prompt == tokenizer.prompt(user("7+5="))
    assert first.samples[0].tokens != again.samples[0].tokens
    assert out == "".join(
        tokenizer.decode(group.samples[0].tokens) + "\n" for group in (first, again)
    )
    assert len(err.splitlines()) == 3
    assert err.splitlines()[1].startswith("error: the prompt has 10")


def test_a_system_message_stands_before_prompts_without_one(folder, tokenizer):
    def ids(messages, system):
        settings = generate.Settings(
            generate.Sampling(), None, num_samples=3, seed=0, system=system, raw=False
        )
        [group] = generate.make_groups([("x", messages)], tokenizer, CONFIG, settings)
        assert len(group.samples) == 3
        assert group.limit == CONFIG.max_positions - len(group.prompt)
        return group.prompt

    system = [{"role": "system", "content": "S"}]
    assert ids(user("7"), "") == tokenizer.prompt(user("7"))
    assert ids(user("7"), "S") == tokenizer.prompt(system + user("7"))
    assert ids(system + user("7"), "T") == tokenizer.prompt(system + user("7"))


def test_the_layout_is_that_of_the_configs():
    assert sections.mesh(1, 1, 1).rules.to_dict() == generate.RULES
    assert dict(generate.make_layout(CONFIG).mesh.shape) == {
        "data": 4,
        "fsdp": 1,
        "tensor": 2,
    }


def strip(text):
    return text.replace(DIM, "").replace(PLAIN, "")


@hypothesis.given(
    text=st.lists(
        st.sampled_from(["<think>", "</think>", "<", "th", "ink>", "é\n", "\x1b[2J"])
    ).map("".join),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=9),
    thinking=st.booleans(),
)
def test_looks_do_not_depend_on_how_the_text_comes(text, sizes, thinking):
    whole = generate.Look(terminal=True, thinking=thinking)
    want = whole.add(text) + whole.end()
    look, got, start = generate.Look(terminal=True, thinking=thinking), "", 0
    for size in itertools.cycle(sizes):
        got += look.add(text[start : start + size])
        start += size
        if start >= len(text):
            break
    assert got + look.end() == want
    assert strip(want) == text.replace("\x1b", "\\x1b")
    assert want.count(DIM) == want.count(PLAIN)


def test_thoughts_are_dimmed_on_a_terminal_alone():
    text = "a<think>b</think>c<think>d"
    look = generate.Look(terminal=True, thinking=False)
    assert look.add(text) + look.end() == (
        f"a{DIM}<think>b</think>{PLAIN}c{DIM}<think>d{PLAIN}"
    )
    look = generate.Look(terminal=True, thinking=True)
    assert look.add("b</think>c") + look.end() == f"{DIM}b</think>{PLAIN}c"
    look = generate.Look(terminal=False, thinking=True)
    assert look.add(text + "\x1b") + look.end() == text + "\x1b"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_sample_in_front_is_shown_and_the_others_wait(tokenizer):
    # A stop token that decoding would not leave out.
    tokenizer = dataclasses.replace(tokenizer, stop_ids=tuple(tokenizer.encode("-")))
    a, b, c = (tokenizer.encode(text) for text in ("7<think>é", "12", "=<"))
    key, out = jax.random.key(0), Terminal()
    group = sampler.Group([1], 0, key, 9, [sampler.NOT_BEGUN] * 3)
    printer = generate.Printer([("x", user("x"))], [group], tokenizer, out)

    def shown():
        text = out.getvalue()
        out.truncate(0)
        out.seek(0)
        return text

    def finish(j, ids):
        sample = sampler.Sample(ids, np.zeros(len(ids)), finished=True)
        printer.on_finish(0, j, sample)
        return sample

    printer.on_tokens(0, 1, b[:1])
    assert shown() == "--- sample 1 of 3 ---\n"
    printer.on_tokens(0, 0, a[:2])
    assert shown() == f"7{DIM}<think>"
    printer.on_tokens(0, 2, c)
    finish(2, c)
    printer.on_tokens(0, 0, [*a[2:], tokenizer.stop_ids[0]])
    assert shown() == "é"
    finish(0, a)
    assert shown() == f"{PLAIN}\n--- sample 2 of 3 ---\n1"
    printer.on_tokens(0, 1, b[1:])
    finish(1, b)
    assert shown() == "2\n--- sample 3 of 3 ---\n=<\n"


BAD = [
    ([], "name the model by one of --workdir=DIR and --model=FOLDER"),
    (["--workdir={d}", "--model={d}"], "one of --workdir=DIR and --model=FOLDER"),
    (["--model={t}"], "neither a Hugging Face folder nor the workdir of a run"),
    (["--model={no_tokenizer}"], "holds neither tokenizer.json nor tokenizer.model"),
    (["--model={no_weights}"], "model.safetensors does not exist"),
    (["--model={d}", "--dtype=int8"], "--dtype must be float32 or bfloat16"),
    (["--model={d}", "--num_samples=x"], "--num_samples must be a whole number, not"),
    (["--model={d}", "--num_samples=0"], "--num_samples must be at least 1, not 0"),
    (["--model={d}", "--max_new_tokens=-1"], "--max_new_tokens must be at least 1"),
    (["--model={d}", "--temperature=warm"], "--temperature must be a number, not"),
    (["--model={d}", "--temperature=-1"], "temperature must be 0 .greedy. or at least"),
    (["--model={d}", "--top_p=nan"], "top_p must be in"),
    (["--model={d}", "--top_k=-1"], "top_k must be 0 .off. or a whole number above"),
    (["--model={d}", "--seed=4294967296"], "--seed must be from 0 to 2147483647"),
    (["--model={d}", "--raw", "--system=x"], "--system is a message of the chat templ"),
    (["--model={d}", "--prompt="], "--prompt is empty"),
    (["--model={d}", "--prompt=\udcff"], "--prompt is no text in UTF-8"),
    (["--model={d}", "--prompt=7", "--file={d}"], "give one of --prompt=TEXT and --f"),
    (["--model={d}", "--file={t}/none"], "none cannot be read: .*No such file"),
    (["--model={d}", "--file={d}"], "cannot be read: .*directory"),
    (["--model={d}", "--file={t}/none.jsonl"], "none.jsonl cannot be read"),
    (["--model={d}", "--file={empty}"], "empty.jsonl holds no prompt"),
    (["--model={d}", "--raw", "--file={chat}"], "line 1 has 2 messages: --raw continu"),
    (
        ["--model={d}", "--prompt=" + "7" * 64],
        "--prompt has .* tokens, and the model 64",
    ),
    (
        ["--model={d}", "--prompt=7", "--max_new_tokens=64"],
        "--prompt has .* 64 positions: --max_new_tokens can be at most 5[0-9], not 64",
    ),
]


@pytest.mark.parametrize("flags, message", BAD, ids=str)
def test_what_does_not_fit_is_one_sentence_before_weights_are_read(
    flags, message, folder, tmp_path, monkeypatch
):
    if "{no_weights}" not in str(flags):
        monkeypatch.setattr(checkpoint, "load_model", None)
    for name in ("no_tokenizer", "no_weights"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(
            (folder / "config.json").read_text()
        )
    tokens.load(folder).save(tmp_path / "no_weights")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "chat.jsonl").write_text(
        json.dumps({"messages": [{"role": "system", "content": "S"}, *user("7")]})
    )
    places = {
        "{d}": folder,
        "{t}": tmp_path,
        "{no_tokenizer}": tmp_path / "no_tokenizer",
        "{no_weights}": tmp_path / "no_weights",
        "{empty}": tmp_path / "empty.jsonl",
        "{chat}": tmp_path / "chat.jsonl",
    }
    for name, path in places.items():
        flags = [flag.replace(name, str(path)) for flag in flags]
    if "--prompt" not in str(flags) and "--file" not in str(flags):
        flags = [*flags, "--prompt=7"]
    with pytest.raises(InputError, match=message) as error:
        generate.main(["generate", *flags])
    assert "\n" not in str(error.value)


def test_ctrl_c_ends_quietly(two_devices, folder, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate.Printer, "on_tokens", interrupt)
    with pytest.raises(SystemExit) as end:
        say(folder, "--prompt=7")
    assert end.value.code == 130
    assert capsys.readouterr() == ("", "")
