"""Problems, TFDS data sets, examples and batches: nothing lost, twice, cut or misplaced."""

import collections
import dataclasses
import itertools
import json
import logging
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klear_jax import prepare_data, tokens
from klear_jax.data import arithmetic, batches, examples
from klear_jax.errors import InputError

SETTINGS = {
    "task": "chain_sum",
    "num_problems": 400,
    "seed": 0,
    "direct_share": 0.5,
    "generator": {},
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    output = tmp_path_factory.mktemp("prepared")
    [path] = prepare_data.make_problems(output, SETTINGS)
    return output, path


@pytest.fixture(scope="module")
def tokenizer(prepared):
    return tokens.load(prepared[0] / "tokenizer")


def make_examples(lengths):
    """Examples whose response has so many digits, each example's own."""
    return [
        examples.Example(
            origin=f"example {i}",
            prompt_id=i,
            messages=({"role": "user", "content": f"{i}="},),
            answer=str(i),
            response=str(i % 10) * length,
        )
        for i, length in enumerate(lengths)
    ]


def sft_of(data, tokenizer, *, row_tokens, too_long="error", **arguments):
    samples = batches.text_samples(
        data, tokenizer, row_tokens=row_tokens, too_long=too_long
    )
    return batches.sft_batches([samples], row_tokens=row_tokens, **arguments)


def segments(batch):
    """(tokens, mask, positions) of each segment of a batch."""
    for row in range(len(batch["tokens"])):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            where = batch["segment_ids"][row] == segment
            yield tuple(
                tuple(batch[key][row][where].tolist())
                for key in ("tokens", "mask", "positions")
            )


def expected_segment(tokenizer, example):
    prompt = tokenizer.prompt(example.messages)
    response = [*tokenizer.encode(example.response), tokenizer.stop_ids[0]]
    return (
        (*prompt, *response),
        (0,) * len(prompt) + (1,) * len(response),
        tuple(range(len(prompt) + len(response))),
    )


def assert_same(one, two):
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize(
    "task, problem, steps, answer",
    [
        ("chain_sum", "7+5-3=", ["7+5=12", "12-3=9"], 9),
        ("chain_sum", "3-7+4-0=", ["3-7=-4", "-4+4=0", "0-0=0"], 0),
        ("gcd", "gcd(48,18)=", ["48%18=12", "18%12=6", "12%6=0"], 6),
    ],
)
def test_chains_by_hand(task, problem, steps, answer):
    assert arithmetic.TASKS[task].chain(problem) == (steps, answer)


@pytest.mark.parametrize("task", arithmetic.TASKS)
def test_problems(task):
    made = arithmetic.make_problems(**{**SETTINGS, "task": task, "direct_share": 0.2})
    rows = list(itertools.chain(*made.splits.values()))
    for row in rows:
        steps = row.response.removeprefix("<think>").split("</think>")[0]
        for step in filter(None, steps.split(";")):
            left, right = step.split("=")
            assert eval(left) == int(right)
        assert row.response.endswith(f"</think>\\boxed{{{row.answer}}}")
    assert len({row.problem for row in rows}) == len(rows)
    assert len({row.prompt_id for row in rows}) == len(rows)
    assert min(row.prompt_id for row in rows) >= 0
    assert max(row.prompt_id for row in rows) < 2**31
    dropped = sum(sum(counts.values()) for counts in made.dropped.values())
    assert len(rows) + dropped == SETTINGS["num_problems"]
    direct = sum(row.response.startswith("<think></think>") for row in rows)
    assert 0.1 < direct / len(rows) < 0.3


def test_each_reason_to_drop_is_counted(monkeypatch):
    entry = {"metadata": {"expression": "1 + 1"}, "answer": "2"}
    wrong = {"metadata": {"expression": "1 + 2"}, "answer": "4"}
    other = {"metadata": {"expression": "2 + 2"}, "answer": "4"}
    monkeypatch.setattr(arithmetic, "_draw", lambda *_: [entry, entry, wrong, other])
    monkeypatch.setattr(arithmetic, "hash_of", lambda *_: 5)
    monkeypatch.setattr(arithmetic, "SPLIT_SHARES", {"sft": 100})
    made = arithmetic.make_problems(**SETTINGS)
    assert [row.problem for row in made.splits["sft"]] == ["1+1="]
    assert made.dropped == {"sft": dict.fromkeys(arithmetic.DROP_REASONS, 1)}


def test_splits_are_disjoint_whatever_the_seed():
    draws = [arithmetic.make_problems(**{**SETTINGS, "seed": seed}) for seed in (0, 1)]
    problems = [
        {split: {row.problem for row in rows} for split, rows in draw.splits.items()}
        for draw in draws
    ]
    for one, two in itertools.permutations(arithmetic.SPLIT_SHARES, 2):
        assert not problems[0][one] & problems[1][two]
    # Neighbouring seeds are draws of their own.
    assert len(problems[0]["sft"] & problems[1]["sft"]) < len(problems[0]["sft"]) / 3


@given(st.text())
def test_every_problem_has_a_split(problem):
    assert arithmetic.split_of(problem) in arithmetic.SPLIT_SHARES


def test_data_set_holds_the_problems(prepared):
    made = arithmetic.make_problems(**SETTINGS)
    for split, rows in made.splits.items():
        read = examples.read_examples(prepared[1], split)
        assert {(x.prompt_id, x.problem, x.response, x.answer) for x in read} == {
            (x.prompt_id, x.problem, x.response, x.answer) for x in rows
        }
        assert len(read) == len(rows)
        assert dict(read[0].messages[0]) == {"role": "user", "content": read[0].problem}
    table = prepare_data.counts_table(prepared[1])
    duplicates = str(made.dropped["rl"]["duplicate"])
    kept = str(len(made.splits["rl"]))
    assert table.splitlines()[2].split()[0::2][:2] == ["rl", kept]
    assert table.splitlines()[2].split()[3] == duplicates


def test_preparing_again_keeps_all_and_other_settings_are_refused(prepared, capsys):
    output, path = prepared
    before = {file: file.stat().st_mtime_ns for file in output.rglob("*")}
    assert prepare_data.make_problems(output, SETTINGS) == [path]
    assert "there already" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in output.rglob("*")} == before
    with pytest.raises(InputError, match=r"another seed \(0\): choose another folder"):
        prepare_data.make_problems(output, {**SETTINGS, "seed": 1})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"task": "alchemy"}, "no task 'alchemy'"),
        ({"generator": {"min_terms": 9}}, "max_terms"),
        ({"generator": {"terms": 9}}, "terms"),
        ({"num_problems": 1}, "empty"),
    ],
)
def test_bad_settings(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        prepare_data.make_problems(tmp_path, {**SETTINGS, **change})


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--generator=terms"], "--generator=terms is not KEY=INTEGER,..."),
        (["--sed=1"], "unknown flag --sed; did you mean 'seed'?"),
        (["--direct_share=2"], "direct_share"),
        (["--direct_share=x"], "--direct_share must be a number, not 'x'"),
        (["--num_problems=0"], "--num_problems must be at least 1"),
        (["more"], "['more']"),
    ],
)
def test_bad_flags(tmp_path, arguments, message):
    with pytest.raises(InputError) as error:
        prepare_data.main(["prepare_data", f"--output={tmp_path}", *arguments])
    assert message in str(error.value)


def test_command_says_one_line():
    command = [sys.executable, "-m", "klear_jax.prepare_data"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"error: --output=DIR is needed.*\n", done.stderr)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    rows=st.integers(1, 4),
    pack=st.booleans(),
    pool=st.sampled_from([1, 3, 128]),
    num_epochs=st.integers(1, 2),
)
def test_packing_loses_nothing(tokenizer, lengths, rows, pack, pool, num_epochs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "PACKING_POOL", pool)
        data = make_examples(lengths)
        sft = sft_of(
            data,
            tokenizer,
            row_tokens=50,
            rows_per_batch=rows,
            seed=0,
            num_epochs=num_epochs,
            pack=pack,
        )
        found = list(sft.iterator)
    expected = [expected_segment(tokenizer, x) for x in data] * num_epochs
    counted = collections.Counter(s for batch in found for s in segments(batch))
    assert counted == collections.Counter(expected)
    assert sft.num_samples == len(data)
    assert sft.iterator.num_samples == len(data) * num_epochs
    for batch in found:
        padding = batch["segment_ids"] == 0
        for name, values in batch.items():
            assert values.shape == (rows, 50) and values.dtype == np.int32, name
            assert not values[padding].any(), name
        # Segments follow each other; padding stands at the end.
        steps = np.diff(batch["segment_ids"], axis=1)
        assert (np.isin(steps, (0, 1)) | padding[:, 1:]).all()
        assert not (padding[:, :-1] & ~padding[:, 1:]).any()
        assert pack or batch["segment_ids"].max() == 1


@settings(max_examples=10, deadline=None)
@given(
    done=st.integers(0, 30),
    rows=st.integers(1, 3),
    pool=st.sampled_from([2, 5]),
    pack=st.booleans(),
)
def test_sft_state_restores_the_rest(tokenizer, done, rows, pool, pack):
    """Also where the state is saved between rows that were packed together."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "PACKING_POOL", pool)

        def iterator():
            return sft_of(
                make_examples([1, 30, 7, 12, 3, 25, 18, 2, 9]),
                tokenizer,
                row_tokens=64,
                rows_per_batch=rows,
                seed=3,
                pack=pack,
            ).iterator

        undisturbed = iterator()
        for _ in range(done):
            next(undisturbed)
        state = json.dumps(undisturbed.get_state())
        restored = iterator()
        restored.set_state(json.loads(state))
        following = [list(itertools.islice(it, 8)) for it in (restored, undisturbed)]
        assert_same(*following)


def test_packed_rows_are_nearly_full(tokenizer):
    lengths = np.random.default_rng(0).integers(1, 50, 300)
    sft = sft_of(
        make_examples(lengths.tolist()),
        tokenizer,
        row_tokens=128,
        rows_per_batch=8,
        seed=0,
    )
    batch = next(sft.iterator)
    assert (batch["segment_ids"] > 0).mean() > 0.95


def test_sft_epochs_differ_and_seed_decides(tokenizer, monkeypatch):
    monkeypatch.setattr(batches, "PACKING_POOL", 1)  # Rows come as they are filled.

    def order(seed):
        data = make_examples([1] * 30)
        sft = sft_of(
            data, tokenizer, row_tokens=32, rows_per_batch=30, seed=seed, num_epochs=2
        )
        return [s[0] for batch in sft.iterator for s in segments(batch)]

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(0)[:30] != order(0)[30:]


@settings(max_examples=10, deadline=None)
@given(
    streams=st.sampled_from([1, 2, 3, 6]),
    owners=st.lists(st.integers(0, 2), min_size=6, max_size=6),
    done=st.integers(0, 4),
)
def test_who_reads_which_rows_changes_no_batch(tokenizer, streams, owners, done):
    """Three processes that need other rows each, and go on as two, as one would alone."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(batches, "PACKING_POOL", 2)
    data = make_examples(range(1, 19))

    def iterator(rows=None):
        return sft_of(
            data,
            tokenizer,
            row_tokens=64,
            rows_per_batch=6,
            seed=0,
            num_streams=streams,
            my_rows=rows,
        ).iterator

    def rows_of(process):
        return [row for row, owner in enumerate(owners) if owner == process]

    alone = iterator()
    several = [(rows, iterator(rows)) for rows in map(rows_of, range(3)) if rows]
    for _ in range(done):
        want = next(alone)
        for rows, it in several:
            got = next(it)
            for name, x in want.items():
                np.testing.assert_array_equal(got[name][rows], x[rows])
    state = {}
    for _, it in several:
        state |= it.get_state()
    assert state == alone.get_state()
    for rows in ([0, 2, 4], [1, 3, 5]):
        going_on = iterator(rows)
        going_on.set_state(json.loads(json.dumps(state)))
        alone.set_state(state)
        for _ in range(2):
            want, got = next(alone), next(going_on)
            np.testing.assert_array_equal(got["tokens"][rows], want["tokens"][rows])
    monkeypatch.undo()


def test_streams_share_the_samples(tokenizer):
    data = make_examples(range(1, 12))
    sft = sft_of(
        data,
        tokenizer,
        row_tokens=64,
        rows_per_batch=6,
        seed=0,
        num_epochs=1,
        num_streams=3,
    )
    found = [s for batch in sft.iterator for s in segments(batch)]
    assert sorted(found) == sorted(expected_segment(tokenizer, x) for x in data)
    assert sft.num_samples == sft.iterator.num_samples == 11


def test_samples_longer_than_a_row(tokenizer):
    data = make_examples([3, 90, 4])
    arguments = {"row_tokens": 40, "rows_per_batch": 2, "seed": 0, "num_epochs": 1}
    with pytest.raises(InputError, match=r"example 1 has .* tokens, but a row has 40"):
        sft_of(data, tokenizer, **arguments)
    sft = sft_of(data, tokenizer, **arguments, too_long="drop")
    assert sft.num_samples == 2
    found = [s for batch in sft.iterator for s in segments(batch)]
    kept = [data[0], data[2]]
    assert sorted(found) == sorted(expected_segment(tokenizer, x) for x in kept)
    longest = len(expected_segment(tokenizer, data[1])[0])
    sft_of(data, tokenizer, **{**arguments, "row_tokens": longest})
    with pytest.raises(InputError, match="none of 1 samples"):
        sft_of(data[1:2], tokenizer, **arguments, too_long="drop")


def test_prompts_in_order(prepared, tokenizer):
    data = examples.read_examples(prepared[1], "test")
    prompts = batches.all_prompts(data, tokenizer, max_prompt_tokens=32)
    assert prompts["problems"] == [x.problem for x in data]
    assert prompts["answers"] == [x.answer for x in data]
    assert prompts["prompt_ids"] == [x.prompt_id for x in data]
    assert prompts["tokens"] == [tokenizer.prompt(x.messages) for x in data]


@settings(max_examples=5, deadline=None)
@given(done=st.integers(0, 9))
def test_prompt_steps(tokenizer, done):
    """10 prompts, 4 a step: an epoch is 2 steps."""
    data = make_examples([1] * 10)

    def iterator():
        return batches.prompt_batches(
            data, tokenizer, prompts_per_step=4, max_prompt_tokens=32, seed=1
        )

    whole = list(itertools.islice(iterator(), done + 6))
    for first, second in zip(whole[0::2], whole[1::2], strict=False):
        assert len({*first["prompt_ids"], *second["prompt_ids"]}) == 8
    assert whole[0]["prompt_ids"] != whole[2]["prompt_ids"]  # Another epoch.
    saved = iterator()
    for _ in range(done):
        next(saved)
    restored = iterator()
    restored.set_state(json.loads(json.dumps(saved.get_state())))
    assert_same(list(itertools.islice(restored, 6)), whole[done:])
    changed = dataclasses.replace(data[3], answer="another")
    others = [[*data, *make_examples([1])], [*data[:3], changed, *data[4:]], data[::-1]]
    for other in others:
        iterator_of_others = batches.prompt_batches(
            other, tokenizer, prompts_per_step=4, max_prompt_tokens=32, seed=1
        )
        with pytest.raises(InputError, match="the checkpoint is of other data"):
            iterator_of_others.set_state(saved.get_state())


def test_long_prompts(tokenizer, monkeypatch, caplog):
    logger = logging.getLogger("klear_jax.data.batches")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    monkeypatch.setattr(logger, "propagate", False)
    data = make_examples([1, 1])
    with pytest.raises(InputError, match="example 0: the prompt has 10 tokens"):
        batches.all_prompts(data, tokenizer, max_prompt_tokens=9)
    cut = batches.all_prompts(
        data, tokenizer, max_prompt_tokens=9, too_long="truncate_left"
    )
    assert cut["tokens"] == [tokenizer.prompt(x.messages)[1:] for x in data]
    assert caplog.messages == [
        "2 of 2 prompts have more than 9 tokens: their beginning is cut off"
    ]


def test_batches_that_cannot_be(tokenizer):
    data = make_examples([1, 1])
    step = {"max_prompt_tokens": 32, "seed": 0}
    with pytest.raises(InputError, match="has 2 prompts, a step needs 3"):
        batches.prompt_batches(data, tokenizer, prompts_per_step=3, **step)
    with pytest.raises(InputError, match=r"3 rows of a batch .* from 2 streams"):
        sft_of(data, tokenizer, row_tokens=32, rows_per_batch=3, seed=0, num_streams=2)
    bare = examples.Example("row 7", 0, data[0].messages, None, None)
    with pytest.raises(InputError, match="row 7 has no answer"):
        batches.all_prompts([bare], tokenizer, max_prompt_tokens=32)
    with pytest.raises(InputError, match="row 7 has no response"):
        sft_of([bare], tokenizer, row_tokens=32, rows_per_batch=1, seed=0)


def test_json_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    messages = [
        {"role": "system", "content": "Short."},
        {"role": "user", "content": "é?"},
    ]
    path.write_text(
        '{"problem": "1+1=", "answer": 2, "response": "\\\\boxed{2}", "level": 5}\n\n'
        + json.dumps({"prompt": messages, "answer": "y"})
        + "\n"
        + '{"prompt": "1+1=", "response": "2"}'
    )
    one, two, three = examples.read_examples(path)
    assert (one.problem, one.answer, one.response) == ("1+1=", "2", "\\boxed{2}")
    assert two.messages == tuple(messages) and two.problem == "é?"
    assert three.messages == one.messages and three.answer is None
    assert [x.prompt_id for x in (one, two, three)] == [1, 3, 4]


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"problem": "1', "line 2: not JSON"),
        (b'{"problem": "\xff", "answer": "1"}', "line 2: not JSON"),
        (b"[" * 100_000, "line 2: not JSON"),
        (b"[1]", "line 2: not a JSON object"),
        (
            b'{"answer": "1", "q": "7+5"}',
            "line 2: prompt or problem or question or messages or conversations must be text "
            "or messages: the row has 'answer', 'q'",
        ),
        (b'{"problem": "", "answer": "1"}', "line 2: prompt or problem or"),
        (b'{"problem": "\\ud800", "answer": "1"}', "line 2: prompt or problem"),
        (b'{"prompt": [], "answer": "1"}', "line 2: prompt or problem or"),
        (b'{"prompt": [{"role": "user"}], "answer": "1"}', "line 2: a message is not"),
        (b'{"problem": "1", "answer": [1]}', "line 2: answer must be text"),
        (b'{"problem": "1", "answer": true}', "line 2: answer must be text"),
        (b'{"problem": "1", "response": ""}', "line 2: response must be text"),
        (b'{"problem": "1"}', "line 2: neither answer nor response: the row has"),
    ],
)
def test_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"problem": "1", "answer": "1"}\n' + line + b"\n")
    with pytest.raises(InputError) as error:
        examples.read_examples(path)
    assert str(error.value).startswith(f"{path} {message}")


def test_missing_empty_and_broken_data(tmp_path, prepared):
    with pytest.raises(InputError, match=r"no data set at .*absent"):
        examples.read_examples(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match=r"empty\.jsonl holds no examples"):
        examples.read_examples(tmp_path / "empty.jsonl")
    with pytest.raises(InputError, match="no split 'rl'"):
        examples.read_examples(tmp_path / "empty.jsonl", "rl")
    with pytest.raises(InputError, match=r"'train', cannot be read.*\['sft', 'rl'"):
        examples.read_examples(prepared[1], "train")
    for file in prepared[1].iterdir():
        data = file.read_bytes()
        cut = len(data) // 2 if "test" in file.name else len(data)
        (tmp_path / file.name).write_bytes(data[:cut])
    assert examples.read_examples(tmp_path, "rl")
    with pytest.raises(InputError, match=r"test.*(cannot be read|truncated)"):
        examples.read_examples(tmp_path, "test")


def test_a_data_set_of_a_stranger_runs_no_code(tmp_path, monkeypatch):
    """TFDS would import the module that a features.json names, such as a file beside it."""
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "payload" / "1.0.0"
    folder.mkdir(parents=True)
    (tmp_path / "payload" / "__init__.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')"
    )
    (folder / "dataset_info.json").write_text('{"name": "x", "version": "1.0.0"}')
    for key in ("pythonClassName", "type"):
        content = {key: "payload.Feature", "jsonFeature": {"json": "{}"}, "content": {}}
        (folder / "features.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=r"is a broken data set|cannot be read"):
            examples.read_examples(folder, "train")
    assert not (tmp_path / "ran").exists()
