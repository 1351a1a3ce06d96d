"""Raw files to data sets: every row is counted, what is planted is found, nothing depends on
workers, parts or kills."""

import collections
import contextlib
import dataclasses
import errno
import fcntl
import gzip
import hashlib
import json
import os
import pathlib
import random
import shutil
import string
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import reasoning_gym
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import sections
from configs.data import sft as sft_config
from klear_jax import config, prepare_data, tokens
from klear_jax.data import (
    batches,
    benchmarks,
    choosing,
    cleaning,
    examples,
    files,
    prepare,
    rows,
    samples,
    shards,
)
from klear_jax.errors import InputError

BENCHMARKS = sorted((pathlib.Path(__file__).parent / "golden/benchmarks").glob("*"))
PROBLEMS = [one.problem for path in BENCHMARKS for one in examples.read_examples(path)]
CHAIN = "<think>\nfirst, then\n</think>\n\n\\boxed{4}"
USER = {"role": "user", "content": "2+2?"}

SHAPES = [
    ("any", {"prompt": "2+2?", "response": CHAIN}),
    ("any", {"messages": [USER, {"role": "assistant", "content": CHAIN}]}),
    ("prompt_response", {"question": "2+2?", "output": CHAIN}),
    ("prompt_response", {"prompt": [USER], "completion": CHAIN}),
    ("messages", {"messages": [USER, {"role": "assistant", "content": CHAIN}]}),
    (
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "2+2?"},
                {"from": "gpt", "value": CHAIN},
            ]
        },
    ),
    (
        "openthoughts",
        {
            "system": "Your role as an assistant involves ...",
            "conversations": [
                {"from": "user", "value": "2+2?"},
                {
                    "from": "assistant",
                    "value": "<|begin_of_thought|>\nfirst, then\n<|end_of_thought|>\n\n"
                    "<|begin_of_solution|>\\boxed{4}<|end_of_solution|>",
                },
            ],
        },
    ),
    (
        "openthoughts_metadata",
        {
            "problem": "2+2?",
            "deepseek_reasoning": "first, then\n",
            "deepseek_solution": "\\boxed{4}",
        },
    ),
]


@pytest.mark.parametrize("shape, row", SHAPES)
def test_shapes(shape, row):
    fields = rows.SHAPES[shape]
    example = rows.to_example(row, fields, origin="here", prompt_id=7)
    assert example == rows.Example("here", 7, (USER,), None, CHAIN)


def test_shapes_with_answers():
    row = {
        "data_source": "math_longcot_math_verify",
        "prompt": [USER],
        "reward_model": {"ground_truth": "4", "style": "rule"},
    }
    found = rows.to_example(row, rows.SHAPES["klear_rl"], origin="", prompt_id=1)
    assert (found.answer, found.source) == ("4", "math_longcot_math_verify")
    system = rows.Fields(prompt="p", response="r", system="s")
    row = {"p": "2+2?", "r": CHAIN, "s": "Short."}
    found = rows.to_example(row, system, origin="", prompt_id=1)
    assert found.messages == ({"role": "system", "content": "Short."}, USER)
    answers = [examples.read_examples(path)[0].answer for path in BENCHMARKS]
    assert answers == ["103", "73", "70"]


def test_a_conversation_must_ask():
    for messages in (
        [{"role": "assistant", "content": "4"}],
        [USER, *[{"role": "assistant", "content": "4"}] * 2],
    ):
        with pytest.raises(rows.BadRow, match="does not end with a message to the"):
            rows.to_example(
                {"messages": messages}, rows.SHAPES["messages"], origin="", prompt_id=0
            )


def lines_of(path, part_bytes):
    return [row for part in files.parts(str(path), part_bytes) for row in part.rows()]


@settings(max_examples=30)
@given(
    lines=st.lists(st.integers(0, 300), max_size=30),
    part_bytes=st.integers(1, 1000),
    codec=st.sampled_from(["", ".gz", ".zst"]),
    end=st.sampled_from([b"", b"\n"]),
)
def test_parts_hold_every_line_once(tmp_path_factory, lines, part_bytes, codec, end):
    path = tmp_path_factory.mktemp("lines") / f"rows.jsonl{codec}"
    written = [b"x" * n for n in lines]
    text = b"\n".join(written) + end
    with (
        pyarrow.OSFile(str(path), "wb") as file,
        pyarrow.output_stream(file, compression=files.COMPRESSED.get(codec)) as out,
    ):
        out.write(text)
    found = [(number, line) for _, number, line in lines_of(path, part_bytes)]
    assert found == [(i, line) for i, line in enumerate(written, 1) if line]


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.jsonl.zst", "rows.parquet"])
def test_a_cut_file_is_an_error(tmp_path, name):
    rng = random.Random(0)
    table = [{"prompt": f"{i}: {rng.random()}", "answer": "1"} for i in range(3000)]
    path = tmp_path / name
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)
    else:
        text = "".join(json.dumps(row) + "\n" for row in table).encode()
        codec = files.COMPRESSED[path.suffix]
        path.write_bytes(pyarrow.compress(text, codec, asbytes=True))
    assert len(lines_of(path, 1 << 14)) == 3000
    data = path.read_bytes()
    for keep in (len(data) - 1, len(data) // 2, 10):
        path.write_bytes(data[:keep])
        with pytest.raises(InputError, match=rf"{name} cannot be read to its end as"):
            lines_of(path, 1 << 14)


@pytest.mark.parametrize(
    "response, fault",
    [
        (CHAIN, None),
        ("  <think></think>4", None),
        ("4", "no <think>"),
        ("first</think>4", "no <think>"),
        ("<think>first", "<think> without </think>"),
        ("<think>a</think>b<think>c</think>4", "<think> or </think> more than once"),
        ("<think>a</think></think>4", "<think> or </think> more than once"),
        ("</think>4<think>", "</think> before <think>"),
        ("Well. <think>a</think>4", "text before <think>"),
        ("<think>a</think> \n", "nothing after </think>"),
    ],
)
def test_think_faults(response, fault):
    assert cleaning.think_fault(response) == fault


def test_words():
    said = cleaning.words("Let $\\frac{m}{n}=ﬁ_x^2$, ÉTÉ\u2014 don't; 第1问")
    assert said == "let frac m n fi x 2 été don t 第 1 问".split()


BOOK = "the quick brown fox jumps over a lazy dog while nine birds sing in old trees".split()


@settings(max_examples=50)
@given(
    start=st.integers(0, len(BOOK) - 9),
    length=st.integers(5, 12),
    marks=st.lists(
        st.sampled_from([" ", ", ", " - ", "\n", "$ ", " (", ") "]),
        min_size=16,
        max_size=16,
    ),
    upper=st.booleans(),
)
def test_nine_words_are_found_and_eight_stay(start, length, marks, upper):
    """Whatever stands between the words, and in any case."""
    known = cleaning.Benchmarks([("book", " ".join(BOOK))], n=9, allowed=())
    cut = ["before", *BOOK[start : start + length], "after"]
    text = "".join(w + m for w, m in zip(cut, marks, strict=False))
    hit = known.find(text.upper() if upper else text)
    inside = min(length, len(BOOK) - start)
    assert (hit is not None) == (inside >= 9)
    if hit:
        assert hit == (" ".join(BOOK[start : start + 9]), "book")


def test_short_problems_and_allowed_phrases():
    known = cleaning.Benchmarks(
        [("a", "Compute 7 + 5 + 9."), ("b", "1+1=")], n=9, allowed=()
    )
    assert known.find("Please compute 7+5+9, and box it.") == ("compute 7 5 9", "a")
    assert known.find("Please compute 7+5+8.") is None
    assert known.find("1 + 1") == ("1 1", "b") and known.find("1+1+1") is None
    phrase = "where m and n are relatively prime positive integers find m n"
    problem = f"The area of this large triangle with its circle is m/n, {phrase}."
    known = cleaning.Benchmarks([("c", problem)], n=9, allowed=(phrase,))
    assert known.find(f"Its volume with its circle is m/n, {phrase}.") is None
    assert known.find(f"{phrase} {phrase} with its circle is m/n") is None
    assert known.find(problem.upper()) is not None
    with pytest.raises(InputError, match="c has no word beside the allowed phrases"):
        cleaning.Benchmarks([("c", phrase)], n=9, allowed=(phrase,))
    with pytest.raises(InputError, match="the problem d has no word beside"):
        cleaning.Benchmarks([("d", "?!")], n=9, allowed=())


@pytest.mark.parametrize("allowed", [(), sections.STOCK_PHRASES])
def test_all_benchmark_problems_are_found(allowed):
    """90 of 90, each hidden in another text, with other marks and in capitals."""
    known = cleaning.Benchmarks(
        [(str(i), text) for i, text in enumerate(PROBLEMS)], n=9, allowed=allowed
    )
    rng = random.Random(0)
    for text in PROBLEMS:
        hidden = "".join(rng.choice(" \n;") if c.isspace() else c.upper() for c in text)
        passage, name = known.find(f"Solve this one. {hidden} Put it in a box.")
        assert passage in " ".join(cleaning.words(text))
        assert passage in " ".join(cleaning.words(PROBLEMS[int(name)]))
    assert len(PROBLEMS) == 90


def test_problems_of_livecodebench_are_known_as_they_are_published(tmp_path):
    """In their own words: what stands around all of them would meet every prompt."""
    said = "Given are N stones in a row, each of which weighs one to nine grams."
    file = tmp_path / "test6.jsonl"
    row = {
        "question_content": said,
        "public_test_cases": "[]",
        "private_test_cases": "x",
    }
    file.write_text(json.dumps(row))
    known = samples.load_benchmarks((str(file),), 9, ())
    assert known.find(f"Solve: {said}") is not None
    form = benchmarks.adapt(
        row | {"private_test_cases": '[{"input": "", "output": ""}]'}
    )
    assert said in form["prompt"]
    assert known.find(form["prompt"].replace(said, "")) is None


TABLES = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(-1, 1)), max_size=40
)


def make_table(listed):
    prompt, response, right = (
        np.array([one[i] for one in listed], np.int64) for i in range(3)
    )
    return choosing.Table(
        part=np.zeros(len(listed), np.int32),
        row=np.arange(len(listed), dtype=np.int32),
        source=np.zeros(len(listed), np.int32),
        prompt_hash=prompt,
        sample_hash=prompt * 10 + response,
        answer_hash=response,
        num_tokens=response,
        num_bytes=response + 1,
        right=right,
    )


@settings(max_examples=200)
@given(
    listed=TABLES,
    only_right=st.booleans(),
    above=st.sampled_from([None, 0.0, 0.5]),
    below=st.sampled_from([None, 0.7, 1.0]),
    most=st.integers(0, 2),
    known=st.dictionaries(st.integers(0, 4), st.sampled_from([0.0, 0.25, 0.75, 1.0])),
    rl=st.booleans(),
)
def test_choosing_follows_the_rules(listed, only_right, above, below, most, known, rl):
    rule = choosing.ChooseConfig(
        judge=True,
        only_right=only_right,
        pass_rates=(),
        pass_rate_above=above,
        pass_rate_below=below,
        easy_above=0.5,
        responses_per_prompt=most,
        validation_percent=0.0,
    )
    choice = choosing.choose(make_table(listed), rule, known, rl=rl)
    first, judged = {}, collections.defaultdict(list)
    fresh = []
    for i, (prompt, response, right) in enumerate(listed):
        key = prompt if rl else (prompt, response)
        fresh.append(key not in first)
        first.setdefault(key, i)
        if fresh[-1] and right >= 0:
            judged[prompt].append(right)
    rates = {p: np.float32(np.mean(found)) for p, found in judged.items()} | known
    taken = collections.Counter()
    for i, (prompt, response, right) in enumerate(listed):
        rate = rates.get(prompt)
        if not fresh[i]:
            same = listed[first[prompt]][1] == response if rl else True
            want = "duplicate" if same else "duplicate prompt with another answer"
        elif only_right and right != 1:
            want = "wrong" if right == 0 else "not judged"
        elif (above, below) != (None, None) and rate is None:
            want = "no pass rate"
        elif above is not None and rate <= above:
            want = "pass rate too low"
        elif below is not None and rate >= below:
            want = "pass rate too high"
        elif most and taken[prompt] >= most:
            want = "enough responses to this prompt"
        else:
            want = ""
            taken[prompt] += 1
        assert choosing.REASONS[choice.reason[i]] == want
        kind = "" if rate is None else "_easy" if rate > 0.5 else "_hard"
        assert choice.splits[choice.split[i]] == f"train{kind}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokens.train_sentencepiece(
        [string.printable], folder, symbols=("<think>", "</think>")
    )
    return folder


def settings_of(folder, tokenizer, **changes):
    """A config for raw files in a folder."""
    c = sft_config.get_config()
    c.output = str(folder / "out")
    c.tokenizer = str(tokenizer)
    c.num_workers = 1
    c.part_mb = c.shard_mb = 1
    c.clean.benchmarks = tuple(map(str, BENCHMARKS))
    c.clean.max_tokens = 400
    c.rewards.num_workers = 1
    sources = changes.pop("sources", {"raw": {"path": str(folder / "raw.jsonl")}})
    c.sources = {
        name: {"shape": "any", "fields": {}, "weight": 1.0} | source
        for name, source in sources.items()
    }
    values = c.to_dict()
    for key, value in changes.items():
        *sections, last = key.split("__")
        section = values
        for one in sections:
            section = section[one]
        section[last] = value
    return config.build(prepare.PrepareConfig, values)


def make_row(i, **changes):
    return {
        "prompt": f"How much is {i} and {i}?",
        "response": f"<think>twice {i}</think>\\boxed{{{2 * i}}}",
        "answer": str(2 * i),
    } | changes


def write(path, written):
    lines = (one if isinstance(one, str) else json.dumps(one) for one in written)
    path.write_text("\n".join(lines))


def read_report(folder):
    return json.loads((folder / "report.json").read_text())


def digest(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


PLANTED = [
    make_row(0),
    make_row(0),  # A duplicate.
    make_row(0, response="<think></think>0"),  # Another response.
    make_row(0, prompt="How much is 0 and 0 ?"),  # A near-miss, which stays.
    make_row(1, prompt=f"Solve: {PROBLEMS[3].upper()}"),
    make_row(2, response="4"),
    make_row(3, response="<think>three"),
    make_row(4, response="<think>" + "x" * 400 + "</think>8"),
    make_row(5, response=None),
    "{",
    "",
    make_row(6),
]


def test_planted_cases_are_found(tmp_path, tokenizer):
    write(tmp_path / "raw.jsonl", PLANTED)
    folder = prepare.prepare(settings_of(tmp_path, tokenizer, clean__max_bad_share=0.5))
    report = read_report(folder)["sources"]["raw"]
    assert report["rows"] == 11
    assert report["bad"] == {"no response to learn from": 1, "not JSON": 1}
    assert report["dropped"] == {
        "benchmark passage": 1,
        "no <think>": 1,
        "<think> without </think>": 1,
        "too long": 1,
        "duplicate": 1,
    }
    assert report["taken"] == 4
    raw = tmp_path / "raw.jsonl"
    assert report["bad_rows"][0] == f"{raw} line 9: no response to learn from"
    assert report["bad_rows"][1].startswith(f"{raw} line 10: not JSON: ")
    [hit] = report["examples"]["benchmark passage"]
    assert (
        hit["origin"] == f"{raw} line 5" and "HMMT-202502.jsonl line 4" in hit["detail"]
    )
    assert report["examples"]["duplicate"][0]["origin"] == f"{raw} line 2"
    text = (folder / "report.md").read_text()
    assert "| dropped: benchmark passage | 1 |" in text and "| **taken** | 4 |" in text

    # As others read it.
    source = tfds.builder_from_directory(folder).as_data_source("train")
    kept = [PLANTED[i] for i in (0, 2, 3, 11)]
    tokenizer = tokens.load(tokenizer)
    for row, want in zip(source, kept, strict=True):
        messages = [{"role": "user", "content": want["prompt"]}]
        assert json.loads(row["messages"]) == messages
        assert row["response"].decode() == want["response"]
        assert row["answer"].decode() == want["answer"] and not row["answer_is_json"]
        assert row["source"] == b"raw" and row["right"] == -1
        assert np.isnan(row["pass_rate"])
        prompt = tokenizer.prompt(messages)
        assert row["prompt_tokens"] == len(prompt)
        ids = [*prompt, *tokenizer.encode(want["response"]), tokenizer.stop_ids[0]]
        assert row["tokens"].tolist() == ids
    # And as examples, for an evaluation.
    found = examples.read_examples(folder, "train")
    assert [one.problem for one in found] == [one["prompt"] for one in kept]
    assert [one.response for one in found] == [one["response"] for one in kept]


def many_rows(folder, count):
    """Two sources, with duplicates within and between, in several parts."""
    rng = random.Random(0)
    letters = string.ascii_letters + " "
    for name, start in (("one", 0), ("two", count // 2)):
        written = []
        for i in range(start, start + count):
            chain = "".join(rng.choices(letters, k=rng.randint(300, 900)))
            written.append(make_row(i, response=f"<think>{chain}</think>{2 * i}"))
        written += rng.choices(written, k=count // 10)
        write(folder / f"{name}.jsonl", written)
    with (folder / "two.jsonl").open("rb") as plain:
        (folder / "two.jsonl.gz").write_bytes(gzip.compress(plain.read(), mtime=0))
    return {
        "one": {"path": str(folder / "one.jsonl")},
        "two": {"path": str(folder / "two.jsonl.gz"), "weight": 0.5},
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tokenizer):
    """A data set of several parts and shards, and its settings."""
    folder = tmp_path_factory.mktemp("undisturbed")
    sources = many_rows(folder, 1500)
    changes = {
        "sources": sources,
        "choose__responses_per_prompt": 1,
        "choose__validation_percent": 5.0,
        "clean__max_tokens": 1000,
    }
    return settings_of(folder, tokenizer, **changes)


def test_every_row_is_accounted_for(undisturbed):
    folder = prepare.prepare(undisturbed)
    report = read_report(folder)
    for name, source in report["sources"].items():
        assert source["rows"] == 1650
        assert source["taken"] + sum(source["dropped"].values()) == 1650, name
    counts = {name: one["samples"] for name, one in report["splits"].items()}
    assert sum(counts.values()) == 2250  # Prompts that are not the same.
    assert counts["validation"] == pytest.approx(112, abs=30)
    prompts = {}
    for split, count in counts.items():
        read = shards.read_source(folder, split)
        assert len(read) == count
        prompts[split] = {row["prompt_hash"] for row in read}
        assert len(prompts[split]) == count
    assert not prompts["train"] & prompts["validation"]
    assert len(list(folder.glob("*train*"))) > 1
    assert prepare.prepare(undisturbed) == folder  # It is there already.
    with pytest.raises(
        InputError, match=r"made with other settings: config.limit was 0"
    ):
        prepare.prepare(dataclasses.replace(undisturbed, limit=5))


def workers_of(config_file):
    """Whether any process of the command is left."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(config_file) in path.read_text() or (
                b"spawn_main" in path.read_bytes()
                and str(config_file.parent) in os.readlink(path.parent / "cwd")
            ):
                found.append(path.parent.name)
    return found


def run_killed(config_file, output, work, seconds):
    """Starts the command, and kills it so many seconds after it was found at work; whether
    that was too late."""
    command = [
        sys.executable,
        "-m",
        "klear_jax.prepare_data",
        f"--config={config_file}",
    ]
    process = subprocess.Popen(
        [*command, f"--output={output}"],
        stderr=subprocess.PIPE,
        cwd=config_file.parent,
        env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parent.parent)},
    )
    with process:
        while process.poll() is None and not work.exists():
            time.sleep(0.05)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            return False
    assert process.returncode == 0
    return True


def test_killed_and_with_more_workers_the_bytes_are_the_same(tmp_path, undisturbed):
    want = digest(prepare.prepare(undisturbed))
    values = dataclasses.asdict(undisturbed) | {"num_workers": 2}
    config_file = tmp_path / "config.py"
    config_file.write_text(
        f"import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict({values!r})\n"
    )
    output = tmp_path / "killed"
    work = output / "klear_sft" / "1.0.0.unfinished"
    seconds, at_work = 0.5, False
    while not run_killed(config_file, output, work, seconds):
        at_work |= work.exists()  # Or it was done, but had not ended.
        seconds *= 4
    assert at_work
    assert digest(output / "klear_sft" / "1.0.0") == want
    assert not work.exists()
    assert not workers_of(config_file)


def test_parquet_and_limits(tmp_path, tokenizer):
    written = [make_row(i) for i in range(40)]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(written), tmp_path / "rows.parquet", row_group_size=7
    )
    write(tmp_path / "rows.jsonl", written)
    found = []
    for name in ("rows.parquet", "rows.jsonl"):
        made = settings_of(
            tmp_path,
            tokenizer,
            sources={"raw": {"path": str(tmp_path / name)}},
            limit=33,
            name=name.replace(".", "_"),
        )
        folder = prepare.prepare(made)
        assert read_report(folder)["sources"]["raw"]["rows"] == 33
        found.append([one.response for one in examples.read_examples(folder, "train")])
    assert found[0] == found[1] == [row["response"] for row in written[:33]]


def test_judged_responses(tmp_path, tokenizer):
    """Four responses to each prompt: of prompt i, i are right."""
    written = [
        make_row(i, response=f"<think>{j}</think>\\boxed{{{2 * i if j < i else -1}}}")
        for i in range(5)
        for j in range(4)
    ] + [make_row(9, answer=None)]
    write(tmp_path / "raw.jsonl", written)
    made = {
        "choose__judge": True,
        "choose__easy_above": 0.5,
        "choose__validation_percent": 0.0,
    }
    folder = prepare.prepare(settings_of(tmp_path, tokenizer, name="all", **made))
    counts = {k: v["samples"] for k, v in read_report(folder)["splits"].items()}
    assert counts == {"train": 1, "train_easy": 8, "train_hard": 12}
    for row in shards.read_source(folder, "train_easy+train_hard"):
        i = int(row["answer"]) // 2
        assert row["pass_rate"] == i / 4
        assert row["right"] == (f"boxed{{{2 * i}}}" in row["response"].decode())
    made["choose__only_right"] = True
    folder = prepare.prepare(settings_of(tmp_path, tokenizer, name="right", **made))
    assert read_report(folder)["sources"]["raw"]["dropped"] == {
        "wrong": 10,
        "not judged": 1,
    }
    assert {k: v["samples"] for k, v in read_report(folder)["splits"].items()} == {
        "train_easy": 7,
        "train_hard": 3,
    }


def test_rl_data(tmp_path, tokenizer):
    """Tests are counted, prompts are unique, pass rates come from a file of samples."""
    tests = {"inputs": ["1"] * 16, "outputs": ["1"] * 16}
    few = {"inputs": ["1"] * 15, "outputs": ["1"] * 15}
    rl = [
        {
            "data_source": "coder1_longcot",
            "prompt": [{"role": "user", "content": f"Write {i}."}],
            "reward_model": {"ground_truth": json.dumps(truth), "style": "rule"},
        }
        for i, truth in enumerate([tests, few, tests, tests, {"inputs": []}, tests])
    ]
    rl.append(rl[0] | {"reward_model": {"ground_truth": json.dumps(few | tests)}})
    rl.append(
        rl[2] | {"reward_model": {"ground_truth": json.dumps(tests | {"timeout": 1})}}
    )
    write(tmp_path / "raw.jsonl", rl)
    samples = [
        {"prompt": rl[i]["prompt"], "response": "x", "correct": j < right}
        for i, right in ((0, 3), (2, 2), (3, 4))
        for j in range(4)
    ]
    write(tmp_path / "samples.jsonl", samples)
    made = settings_of(
        tmp_path,
        tokenizer,
        sources={"klear": {"path": str(tmp_path / "raw.jsonl"), "shape": "klear_rl"}},
        kind="rl",
        clean__min_tests=16,
        clean__max_bad_share=0.2,
        choose__pass_rates=(str(tmp_path / "samples.jsonl"),),
        choose__pass_rate_above=0.5,
        choose__pass_rate_below=1.0,
        choose__validation_percent=0.0,
    )
    folder = prepare.prepare(made)
    report = read_report(folder)["sources"]["klear"]
    assert report["bad"] == {"the answer is no tests": 1}
    assert report["dropped"] == {
        "too few tests": 1,
        "duplicate": 1,
        "duplicate prompt with another answer": 1,
        "no pass rate": 1,
        "pass rate too low": 1,
        "pass rate too high": 1,
    }
    [found] = examples.read_examples(folder, "train")
    assert found.messages == tuple(rl[0]["prompt"])
    assert (found.answer, found.source) == (json.dumps(tests), "coder1_longcot")


BAD = [
    (
        {"clean__max_bad_share": 0.1},
        r"raw: 2 of 11 rows are bad, more than clean.max_bad_sh",
    ),
    (
        {"sources": {"raw": {"path": "/absent/*.jsonl"}}},
        r"config.sources.\w+.path names no file: '/absent/\*.jsonl'",
    ),
    ({"sources": {}}, "sources names no source"),
    ({"choose__only_right": True}, "only_right needs judge=True"),
    (
        {"choose__easy_above": 0.5},
        "rules about pass rates need judge=True or pass_rates",
    ),
    ({"clean__think": "maybe"}, "think must be 'required' or 'any', not 'maybe'"),
    ({"kind": "dpo"}, "kind must be 'sft' or 'rl', not 'dpo'"),
    ({"kind": "rl", "choose__judge": True}, "choose.judge is for responses"),
    ({"name": "my-data"}, "name must be of a-z, 0-9 and _, not 'my-data'"),
    ({"version": "1"}, "version must be such as '1.0.0', not '1'"),
    ({"clean__allowed": ("the", "$")}, r"the allowed phrase '\$' has no word"),
    ({"choose__validation_percent": 0.001}, "to below 100, in hundredths, not 0.001"),
    ({"output": "gs://bucket/data"}, "must be a folder on a disk"),
    ({"part_mb": 0}, "part_mb and shard_mb must be at least 1"),
    ({"limit": -1}, "limit must not be negative"),
    (
        {"clean__benchmarks": ("/absent.jsonl",)},
        "config.clean.benchmarks names no file: '/absent.jsonl'",
    ),
    (
        {"clean__max_tokens": 10, "clean__max_bad_share": 1.0},
        r"no sample is left: too long \(6\), no r",
    ),
]


@pytest.mark.parametrize("changes, message", BAD)
def test_bad_settings(tmp_path, tokenizer, changes, message):
    write(tmp_path / "raw.jsonl", PLANTED)
    with pytest.raises(InputError, match=message):
        prepare.prepare(settings_of(tmp_path, tokenizer, **changes))
    assert not (tmp_path / "out" / "klear_sft" / "1.0.0").exists()


@pytest.mark.parametrize(
    "source, message",
    [
        ({"shape": "share"}, "shape must be one of .*'any'.*, not 'share'"),
        (
            {"fields": {"reply": "x"}},
            r"fields may name .*'response'.*, not \['reply'\]",
        ),
        ({"weight": 0.0}, "weight must be positive"),
        (
            {"shape": "sharegpt"},
            r"11 of its first 11 rows are bad \(is its shape 'sharegpt'",
        ),
        ({"fields": {"response": "reply"}}, "11 of its first 11 rows are bad"),
    ],
)
def test_bad_sources(tmp_path, tokenizer, source, message):
    write(tmp_path / "raw.jsonl", PLANTED)
    path = {"path": str(tmp_path / "raw.jsonl")}
    with pytest.raises(InputError, match=message):
        prepare.prepare(
            settings_of(tmp_path, tokenizer, sources={"raw": path | source})
        )


def test_settings_may_not_change_on_the_way(tmp_path, tokenizer):
    write(tmp_path / "raw.jsonl", PLANTED)
    with pytest.raises(InputError, match="rows are bad"):
        prepare.prepare(settings_of(tmp_path, tokenizer))
    with pytest.raises(
        InputError, match=r"begun with other settings: config.limit was 0, is 3"
    ):
        prepare.prepare(settings_of(tmp_path, tokenizer, limit=3))


def test_the_command(tmp_path, tokenizer, capsys):
    write(tmp_path / "raw.jsonl", [make_row(i) for i in range(3)])
    config_file = tmp_path / "config.py"
    values = dataclasses.asdict(settings_of(tmp_path, tokenizer))
    config_file.write_text(
        f"import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict({values!r})\n"
    )
    prepare_data.main(["prepare_data", f"--config={config_file}", "--config.limit=2"])
    said = capsys.readouterr().out
    assert "| **taken** | 2 |" in said
    assert f"data set  {tmp_path / 'out' / 'klear_sft' / '1.0.0'}" in said


@pytest.fixture(scope="module")
def read(undisturbed, tokenizer):
    """The data set's folder and tokenizer, and the reader of its samples."""
    folder = prepare.prepare(undisturbed)

    def samples(split="train", weights=(), row_tokens=1024):
        return batches.read_samples(
            folder,
            split,
            tokens.load(tokenizer),
            row_tokens=row_tokens,
            too_long="error",
            weights=dict(weights),
        )

    return samples


def test_prepared_data_are_what_text_would_be(undisturbed, tokenizer, read):
    folder = prepare.prepare(undisturbed)
    one, two = read()
    assert (one.name, one.weight, two.name, two.weight) == ("one", 1.0, "two", 0.5)
    text = batches.text_samples(
        examples.read_examples(folder, "train"),
        tokens.load(tokenizer),
        row_tokens=1024,
        too_long="error",
    )
    assert len(text.rows) == len(one.rows) + len(two.rows)
    assert text.num_tokens == one.num_tokens + two.num_tokens
    for i, want in enumerate(text.rows):
        got = one.rows[i] if i < len(one.rows) else two.rows[i - len(one.rows)]
        for name, x in want.items():
            np.testing.assert_array_equal(got[name], x)


def segments(batch):
    """The tokens of each segment."""
    for row, ids in zip(batch["tokens"], batch["segment_ids"], strict=True):
        yield from (row[ids == one].tobytes() for one in range(1, ids.max() + 1))


@pytest.mark.parametrize(
    "weights, share", [({}, 0.2), ({"two": 1.0}, 1 / 3), ({"one": 0.25}, 0.5)]
)
def test_weights_mix_sources(read, weights, share):
    """The first source has twice the samples of the second, whose own weight is 0.5."""
    found = read(weights=weights)
    sft = batches.sft_batches(found, row_tokens=1024, rows_per_batch=8, seed=0)
    assert sft.num_samples == sum(one.weight * len(one.rows) for one in found)
    first = {row["tokens"].tobytes() for row in found[0].rows}
    drawn = [s for _ in range(40) for s in segments(next(sft.iterator))]
    assert np.mean([s not in first for s in drawn]) == pytest.approx(share, abs=0.05)
    assert sft.iterator.num_samples == len(drawn)


def test_unknown_weights(read):
    with pytest.raises(
        InputError, match=r"data.weights names \['three'\]; the sources"
    ):
        read(weights={"three": 1.0})


@pytest.mark.parametrize("prefetch", [0, 5])
def test_prepared_data_go_on_where_they_stood(read, prefetch):
    def iterator(mine=None):
        return batches.sft_batches(
            read(),
            row_tokens=1024,
            rows_per_batch=8,
            seed=0,
            num_streams=2,
            my_rows=mine,
            prefetch=prefetch,
        ).iterator

    whole = iterator()
    for _ in range(70):  # Into the second pool of packed rows.
        next(whole)
    state = json.loads(json.dumps(whole.get_state()))
    hosts = [[0, 2, 4, 6], [1, 3, 5, 7]]
    others = [iterator(mine) for mine in hosts]
    for one in others:
        one.set_state(state)
    for _ in range(5):
        want = next(whole)
        for mine, one in zip(hosts, others, strict=True):
            got = next(one)
            for name, x in want.items():
                np.testing.assert_array_equal(got[name][mine], x[mine])
    assert sum(one.num_samples for one in others) == whole.num_samples


def test_prepared_data_that_do_not_serve(read, undisturbed, tokenizer, tmp_path):
    folder = prepare.prepare(undisturbed)
    with pytest.raises(
        InputError, match=r"samples of up to \d+ tokens, a row has 64: pre"
    ):
        read(row_tokens=64)
    for split in ("test", "train[:50%]"):
        with pytest.raises(
            InputError, match=r"no split .*; there are \['train', 'valid"
        ):
            read(split=split)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    damaged = sorted(copy.glob("*train*"))[0]
    data = bytearray(damaged.read_bytes())
    data[len(data) // 3 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 3)
    damaged.write_bytes(data)
    found = batches.read_samples(
        copy,
        "train",
        tokens.load(tokenizer),
        row_tokens=1024,
        too_long="error",
        weights={},
    )
    for prefetch in (0, 2):
        sft = batches.sft_batches(
            found, row_tokens=1024, rows_per_batch=64, seed=0, prefetch=prefetch
        )
        with pytest.raises(
            InputError, match=r"sample \d+ cannot be read, is its file d"
        ):
            for _ in range(40):
                next(sft.iterator)

    class Gone:
        def __getitem__(self, index):
            raise OSError(errno.ESTALE, "Stale file handle")

    # No fault of the data: the same command may go on.
    with pytest.raises(OSError, match="Stale file handle"):
        dataclasses.replace(found[0].rows, source=Gone())[0]
    other = tmp_path / "other"
    tokens.train_sentencepiece(["other"], other, symbols=())
    with pytest.raises(
        InputError, match="made with another tokenizer or chat template"
    ):
        batches.read_samples(
            folder,
            "train",
            tokens.load(other),
            row_tokens=1024,
            too_long="error",
            weights={},
        )


def test_clean_text_shares_nothing_with_benchmarks():
    """And how often one problem of a benchmark has nine words of another."""
    known = cleaning.Benchmarks(enumerate(PROBLEMS), n=9, allowed=())
    problems = reasoning_gym.create_dataset("gsm_symbolic", seed=0, size=500)
    assert not [row for row in problems if known.find(row["question"])]

    def hits(allowed):
        return sum(
            cleaning.Benchmarks(
                enumerate(PROBLEMS[:i] + PROBLEMS[i + 1 :]), n=9, allowed=allowed
            ).find(text)
            is not None
            for i, text in enumerate(PROBLEMS)
        )

    assert hits(()) == 24 and hits(sections.STOCK_PHRASES) == 2


ODD = [
    ({"data_source": "\ud800"}, "bad", "data_source must be text"),
    ({"answer": float("nan")}, "bad", "not JSON"),
    ({"answer": {"a": float("inf")}}, "bad", "not JSON"),
    (
        {"prompt": [{"role": "judge", "content": "x"}, 7]},
        "bad",
        "a message is not an object",
    ),
    ({"response": CHAIN + "<|im_end|>"}, "dropped", "control token in the text"),
    ({"prompt": "x <|im_start|>user"}, "dropped", "control token in the text"),
    ({"": "unlooked at", "answer": "", "extra": 10**400}, "taken", ""),
    ({"prompt": [{"role": "system", "content": ""}, USER]}, "taken", ""),
    ({"response": "<think>\u2028\x85</think>\r\n4"}, "taken", ""),
    ({"prompt": "x" * 9000}, "bad", "not JSON"),  # A line that is too long.
]


@pytest.mark.parametrize("changes, what, reason", ODD)
def test_odd_rows(tmp_path, tokenizer, monkeypatch, changes, what, reason):
    monkeypatch.setattr(files, "LONGEST_LINE", 8192)
    monkeypatch.setattr(files, "BLOCK", 100)
    written = [make_row(0), make_row(1, **changes), make_row(2)]
    write(tmp_path / "raw.jsonl", written)
    with (tmp_path / "raw.jsonl").open("ab") as file:
        file.write(b"\n" * 10)
    config = settings_of(tmp_path, tokenizer, clean__max_bad_share=1.0)
    report = read_report(prepare.prepare(config))["sources"]["raw"]
    assert (report["rows"], report["taken"]) == (3, 2 + (what == "taken"))
    if what != "taken":
        assert report[what] == {reason: 1}


def test_odd_parquet(tmp_path, tokenizer):
    """A column that is not looked at may hold anything; a row that cannot be held is bad."""
    dates = pyarrow.array([1, 2**60, 3], pyarrow.timestamp("us"))
    table = pyarrow.table(
        {
            "prompt": [f"{i}?" for i in range(3)],
            "response": [CHAIN] * 3,
            "when": dates,
            "meta": pyarrow.StructArray.from_arrays([dates], ["answer"]),
        }
    )
    pyarrow.parquet.write_table(table.drop(["meta"]), tmp_path / "unlooked.parquet")
    pyarrow.parquet.write_table(table, tmp_path / "looked.parquet")
    for name, taken, bad in (
        ("unlooked", 3, {}),
        (
            "looked",
            0,
            {
                "answer must be text that is not empty, a list of such, or an object": 2,
                "not JSON": 1,
            },
        ),
    ):
        source = {"path": str(tmp_path / f"{name}.parquet")}
        config = settings_of(
            tmp_path,
            tokenizer,
            sources={"raw": source},
            clean__max_bad_share=1.0,
            name=name,
        )
        if taken:
            report = read_report(prepare.prepare(config))["sources"]["raw"]
            assert (report["taken"], report["bad"]) == (taken, bad)
        else:
            with pytest.raises(InputError, match="3 of its first 3 rows are bad"):
                prepare.prepare(config)


def test_one_process_at_a_time(tmp_path, tokenizer):
    write(tmp_path / "raw.jsonl", [make_row(0)])
    config = settings_of(tmp_path, tokenizer)
    folder = tmp_path / "out" / "klear_sft"
    folder.mkdir(parents=True)
    with (folder / ".1.0.0.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=r"another process is making .*1\.0\.0"):
            prepare.prepare(config)
    assert prepare.prepare(config) == folder / "1.0.0"


def test_rewards_are_tried_out_first(tmp_path, tokenizer):
    write(tmp_path / "raw.jsonl", [make_row(0)])
    config = settings_of(tmp_path, tokenizer, choose__judge=True)
    kinds = dict(config.rewards.kinds)
    kinds["math"] = dataclasses.replace(kinds["math"], options={"corect": 1.0})
    rewards = dataclasses.replace(config.rewards, kinds=kinds)
    with pytest.raises(
        InputError, match=r"rewards.kinds.math .* fails on an empty response"
    ):
        prepare.prepare(dataclasses.replace(config, rewards=rewards))
    write(tmp_path / "raw.jsonl", [make_row(0, data_source="aime")] * 3)
    with pytest.raises(InputError, match="no reward for its data_source: 'aime'"):
        prepare.prepare(config)


def samples_of(name, count, length=5, weight=1.0, first=0):
    rows = [
        {
            "tokens": np.full(length, first + i, np.int32),
            "mask": np.ones(length, np.int32),
        }
        for i in range(count)
    ]
    return batches.Samples(name, weight, rows, count * length)


def test_streams_share_sources_of_one_sample():
    sources = [samples_of(str(i), 1, first=i) for i in range(100)]
    sft = batches.sft_batches(
        sources, row_tokens=64, rows_per_batch=4, seed=0, num_streams=4, num_epochs=1
    )
    drawn = collections.Counter(s for batch in sft.iterator for s in segments(batch))
    assert len(drawn) == sft.num_samples == 100 and set(drawn.values()) == {1}
    with pytest.raises(InputError, match=r"3 samples are too few for data.streams=4"):
        batches.sft_batches(
            sources[:3], row_tokens=64, rows_per_batch=4, seed=0, num_streams=4
        )


def test_a_checkpoint_of_other_data():
    def iterator(count):
        sources = [samples_of("one", count)]
        return batches.sft_batches(
            sources, row_tokens=64, rows_per_batch=4, seed=0
        ).iterator

    state = iterator(9).get_state()
    iterator(9).set_state(state)
    with pytest.raises(
        InputError, match=r"is of other data.* were \[\['one', 9, 45\]\], not"
    ):
        iterator(8).set_state(state)


@pytest.mark.parametrize(
    "lengths, pack, fill", [([60], True, 0.6), ([50], True, 1.0), ([10], False, 0.1)]
)
def test_how_full_rows_will_be(lengths, pack, fill):
    sources = [samples_of(str(n), 40, length=n) for n in lengths]
    assert batches.packed_fill(sources, 100, pack=pack) == pytest.approx(fill)
