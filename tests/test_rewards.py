"""The math reward against the authors' scorer, and a pool nobody can hang."""

import json
import logging
import math
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from concurrent.futures import CancelledError

import math_verify
import math_verify.parser
import pytest
import sympy.core.random
from hypothesis import given, settings
from hypothesis import strategies as st

from klear_jax.errors import InputError
from klear_jax.rewards import math as math_reward
from klear_jax.rewards.pool import Outcome, Pool

GOLDEN = pathlib.Path(__file__).parent / "golden" / "math_reward.jsonl"
PATIENCE_S = 60  # For a result that must come; a loaded machine is slow.


def alive(pid):
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    except FileNotFoundError:
        return False
    return state.split()[0] != "Z"


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def open_pool(num_workers=1, task_timeout_s=60.0):
    return Pool(num_workers, task_timeout_s=task_timeout_s, memory_mb=256)


# The math reward.


def judge(pool, row):
    judged = row["data_source"] == "benchmarks/judge_math.py"
    kind = "math_judge" if judged else "math"
    return pool.submit(kind, row["response"], row["ground_truth"])


def test_goldens():
    rows = [json.loads(line) for line in GOLDEN.read_text().splitlines()]
    # The rows that wait for alarms first, so that they wait side by side.
    rows.sort(key=lambda row: -row["elapsed_s_mv090"])
    with open_pool(2) as pool:
        futures = [judge(pool, row) for row in rows]
        outcomes = [future.result(timeout=PATIENCE_S) for future in futures]
    mismatches = [
        f"{row['id']} {row['category']}: {outcome}, not {row['score_mv090']}"
        for row, outcome in zip(rows, outcomes, strict=True)
        if outcome != Outcome(row["score_mv090"], "ok", "")
    ]
    assert not mismatches, "\n".join(mismatches)
    assert len(rows) == 157


PIECES = [
    "<think>",
    "</think>",
    "\\boxed{",
    "}",
    "$",
    "\\frac",
    "{",
    "7",
    "x",
    "=",
    " ",
]
texts = st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join))


@settings(max_examples=100, deadline=None)
@given(response=texts, ground_truth=st.one_of(texts, st.lists(texts, min_size=1)))
def test_any_text_has_one_of_four_scores(response, ground_truth):
    score = math_reward.score(response, ground_truth)
    if "</think>" not in response:
        assert score == -0.5
    elif "<think>" not in response:
        assert score == -2.0
    else:
        answer = response.split("</think>")[-1]
        assert score in (1.0, -1.0)
        assert score == math_reward.judge(answer, ground_truth)


@settings(max_examples=50, deadline=None)
@given(thought=texts, number=st.integers(-(10**9), 10**9))
def test_a_right_answer_is_right_after_any_thought(thought, number):
    response = f"<think>{thought}</think>\\boxed{{{number}}}"
    assert math_reward.score(response, str(number)) == 1.0
    assert math_reward.score(response, str(number + 1)) == -1.0
    assert math_reward.score(response, [str(number + 1), str(number)]) == 1.0


@pytest.mark.parametrize(
    "response, name",
    [
        ("<think></think>\\boxed{5}", "correct"),
        ("<think></think>\\boxed{6}", "wrong"),
        ("<think>\\boxed{5}", "no_think_end"),
        ("</think>\\boxed{5}", "no_think_start"),
    ],
)
def test_values_come_from_the_caller(response, name):
    assert math_reward.score(response, "5", **{name: 0.25}) == 0.25


@pytest.mark.parametrize("ground_truth", [None, 5, [], [5], ["5", None], {"a": "5"}])
@pytest.mark.parametrize("response", ["<think></think>\\boxed{5}", "no tags"])
def test_bad_ground_truth(response, ground_truth):
    with pytest.raises(InputError, match="must be a string or a non-empty list"):
        math_reward.score(response, ground_truth)


def test_an_empty_ground_truth_matches_nothing():
    assert math_reward.score("<think></think>\\boxed{}", "") == -1.0
    assert math_reward.judge("", "") == -1.0


def test_a_failing_verifier_makes_the_answer_wrong(monkeypatch):
    def fail(*args, **kwargs):
        raise TypeError("from the depths of sympy")

    monkeypatch.setattr(math_reward.math_verify, "parse", fail)
    assert math_reward.judge("\\boxed{5} of a failing parse", "5") == -1.0
    monkeypatch.undo()
    monkeypatch.setattr(math_reward.math_verify, "verify", fail)
    assert math_reward.judge("\\boxed{5.0} of a failing comparison", "5") == -1.0


def test_any_one_of_several_ground_truths_is_right():
    response = "<think></think>\\boxed{\\frac{2}{4}}"
    assert math_reward.score(response, ["3", "1/2"]) == 1.0
    assert math_reward.score(response, ["3", "1/3"]) == -1.0


def test_only_what_follows_the_last_end_tag_is_the_answer():
    response = "<think></think>\\boxed{5}</think>Done."
    assert math_reward.score(response, "5") == -1.0
    assert math_reward.judge(response, "5") == 1.0


def test_the_same_text_needs_no_comparison(monkeypatch):
    monkeypatch.setattr(math_reward.math_verify, "verify", pytest.fail)
    assert math_reward.judge("\\boxed{abc def}, literally", ["x", "abc def"]) == 1.0


def test_repeated_answers_are_judged_once(monkeypatch):
    response = "<think>{}</think>\\boxed{{5}} of a repeated answer"
    assert math_reward.score(response.format("one way"), "5") == 1.0
    monkeypatch.setattr(math_reward.math_verify, "parse", pytest.fail)
    assert math_reward.score(response.format("another way"), "5") == 1.0


def test_a_warning_inside_does_not_change_the_verdict(monkeypatch):
    parse = math_reward.math_verify.parse

    def warn(*args, **kwargs):
        warnings.warn("invalid syntax in the response", SyntaxWarning, stacklevel=1)
        return parse(*args, **kwargs)

    monkeypatch.setattr(math_reward.math_verify, "parse", warn)
    assert math_reward.judge("\\boxed{5} of a warning", "5") == 1.0


def test_sympy_draws_the_same_points_for_every_answer():
    def next_draw(text):
        math_reward.judge(text, "5")
        return sympy.core.random.random()

    assert next_draw("\\boxed{5} of a draw") == next_draw("\\boxed{5} of a second draw")


def test_alarms_count_the_seconds_of_the_process_and_not_of_the_clock(monkeypatch):
    monkeypatch.setattr(math_reward, "_ALARM_S", 0.3)
    parse = math_verify.parser.extract_target_from_pred

    def sleep(*args, **kwargs):
        time.sleep(0.5)
        return parse(*args, **kwargs)

    def work(*args, **kwargs):
        end = time.process_time() + 0.5
        while time.process_time() < end:
            sum(range(10_000))  # Not the clock alone, which is the kernel's work.
        return parse(*args, **kwargs)

    monkeypatch.setattr(math_verify.parser, "extract_target_from_pred", sleep)
    assert math_reward.judge("\\boxed{5} beside other work", "5") == 1.0
    monkeypatch.setattr(math_verify.parser, "extract_target_from_pred", work)
    assert math_reward.judge("\\boxed{5} after long work", "5") == -1.0


def test_without_a_limit_math_verify_is_as_it_was():
    five = math_verify.parse("\\boxed{5}", parsing_timeout=None)
    assert math_verify.verify(five, five, timeout_seconds=None)


def test_alarms_leave_the_timer_of_others():
    def heard(*_):
        pytest.fail("it was far away")

    before = signal.signal(signal.SIGVTALRM, heard)
    signal.setitimer(signal.ITIMER_VIRTUAL, 1_000)
    try:
        assert math_reward.judge("\\boxed{5} beside a profiler", "5") == 1.0
        assert signal.getsignal(signal.SIGVTALRM) is heard
    finally:
        left, _ = signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    assert left == pytest.approx(1_000, abs=5)


BESIDE_LIBTPU = """
import os, signal, threading
from klear_jax.rewards import math

heard, judged = [], threading.Event()

def send():
    while not judged.wait(0.001):
        os.kill(os.getpid(), signal.SIGPROF)

signal.signal(signal.SIGPROF, lambda *_: heard.append(True))
sender = threading.Thread(target=send)
sender.start()
scores = [math.judge(f"\\\\boxed{{{n}}} of many", str(n)) for n in range(50)]
judged.set()
sender.join()
assert scores == [1.0] * 50 and heard, scores
"""


def test_alarms_are_not_what_libtpu_sends():
    """SIGPROF, 100 times a second, once a process has compiled for a TPU. In a process of its own:
    who gives the signal back to Python, where libtpu had it, ends at the next one."""
    subprocess.run([sys.executable, "-c", BESIDE_LIBTPU], check=True)


def test_alarms_are_not_logged():
    assert not logging.getLogger("math_verify.parser").isEnabledFor(logging.WARNING)


def test_outside_the_main_thread_is_an_error_and_not_a_wrong_answer():
    errors = []

    def judge():
        try:
            math_reward.judge("\\boxed{5} of a thread", "5")
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=judge)
    thread.start()
    thread.join()
    assert len(errors) == 1 and "main thread" in errors[0]


# The pool.


def test_scores_do_not_depend_on_the_number_of_workers():
    answers = [f"<think></think>\\boxed{{{n % 3}}}" for n in range(12)]

    def outcomes(num_workers):
        with open_pool(num_workers) as pool:
            futures = [pool.submit("math", answer, "1") for answer in answers]
            return [future.result(PATIENCE_S) for future in futures]

    assert outcomes(1) == outcomes(3)


def test_workers_hash_alike():
    with open_pool() as one, open_pool() as other:
        futures = [
            pool.submit("hostile_rewards:string_hash", "", "") for pool in (one, other)
        ]
        assert len({future.result(PATIENCE_S) for future in futures}) == 1


def test_a_hang_is_killed_and_tried_again_while_others_finish(tmp_path):
    trace = tmp_path / "trace"
    with open_pool(2, task_timeout_s=2.0) as pool:
        hanging = pool.submit("hostile_rewards:hang", str(trace), "", wrong=-0.75)
        others = [pool.submit("hostile_rewards:process_id", "", "") for _ in range(20)]
        assert all(other.result(PATIENCE_S).status == "ok" for other in others)
        assert not hanging.done()
        outcome = hanging.result(PATIENCE_S)
        assert outcome == Outcome(-0.75, "timeout", "not done in 2.0 s")
        tries = trace.read_text().splitlines()
        assert len(tries) == 2
        for pid in " ".join(tries).split():  # Children too.
            wait_until(lambda pid=pid: not alive(pid))
        after = pool.submit("hostile_rewards:process_id", "", "").result(PATIENCE_S)
        assert after.status == "ok"


def test_a_killed_worker_costs_a_second_try_and_nothing_else(tmp_path):
    mark = tmp_path / "mark"
    with open_pool() as pool:
        first = pool.submit("hostile_rewards:hang_once", str(mark), "")
        second = pool.submit("hostile_rewards:process_id", "", "")
        wait_until(lambda: mark.exists() and mark.read_text())
        os.kill(int(mark.read_text()), signal.SIGKILL)
        outcome = first.result(PATIENCE_S)
        assert outcome == Outcome(1.0, "ok", "at the second try: exit status -9")
        assert second.result(PATIENCE_S).detail == ""


def test_a_worker_killed_while_idle_is_replaced():
    with open_pool() as pool:
        pid = pool.submit("hostile_rewards:process_id", "", "").result(PATIENCE_S).score
        os.kill(int(pid), signal.SIGKILL)
        outcome = pool.submit("hostile_rewards:process_id", "", "").result(PATIENCE_S)
        assert outcome.status == "ok" and outcome.score != pid


def test_dying_twice_is_wrong():
    with open_pool() as pool:
        outcome = pool.submit("hostile_rewards:die", "", "").result(PATIENCE_S)
    assert outcome == Outcome(-1.0, "died", "exit status -9")


def test_memory_is_limited():
    with open_pool() as pool:
        outcome = pool.submit("hostile_rewards:eat_memory", "", "").result(PATIENCE_S)
    assert outcome == Outcome(-1.0, "died", "MemoryError")
    with open_pool(task_timeout_s=1.0) as pool:
        future = pool.submit("hostile_rewards:eat_memory_for_good", "", "")
        outcome = future.result(PATIENCE_S)
    # It may also run out where nothing catches it.
    assert outcome.score == -1.0 and outcome.status in ("timeout", "died")


@pytest.mark.parametrize(
    "kind, why",
    [
        ("hostile_rewards:fail", "KeyError: 'our own mistake'"),
        ("hostile_rewards:not_a_number", "returned nan"),
        ("hostile_rewards:no_such_function", "no_such_function"),
        ("math", "must be a string"),
    ],
)
def test_our_own_error_is_not_a_wrong_answer(kind, why):
    with open_pool() as pool:
        outcome = pool.submit(kind, "", None).result(PATIENCE_S)
    assert math.isnan(outcome.score)
    assert outcome.status == "error"
    assert why in outcome.detail


def test_a_worker_that_cannot_start_is_not_a_wrong_answer(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with open_pool() as pool:
        outcome = pool.submit("math", "", "5").result(PATIENCE_S)
    assert math.isnan(outcome.score)
    assert outcome.status == "error" and "/no/such/python" in outcome.detail


def test_a_reward_may_print_and_read():
    with open_pool() as pool:
        outcome = pool.submit("hostile_rewards:chatter", "", "").result(PATIENCE_S)
    assert outcome == Outcome(0.0, "ok", "")


def test_options_and_any_text_arrive():
    text = 'line\nbreak "\u2028\ud800' + "x" * 300_000  # More than a socket holds.
    with open_pool() as pool:
        outcome = pool.submit(
            "hostile_rewards:options", "", text, wrong=-3.0, bonus=0.5
        ).result(PATIENCE_S)
    assert outcome.score == len(text) - 2.5


def test_a_worker_imports_neither_jax_nor_numpy():
    with open_pool() as pool:
        assert pool.submit("math", "", "5").result(PATIENCE_S).score == -0.5
        for module, there in [("jax", 0.0), ("numpy", 0.0), ("math_verify", 1.0)]:
            future = pool.submit("hostile_rewards:imported", module, "")
            assert future.result(PATIENCE_S).score == there


@pytest.mark.parametrize("kind", ["maths", "", "math:", "math:score; more"])
def test_unknown_kind(kind):
    with (
        open_pool() as pool,
        pytest.raises(InputError, match=f"unknown reward '{kind}'"),
    ):
        pool.submit(kind, "", "5")


@pytest.mark.parametrize("module", ["no_such_module", "klear_jax.rewards.no_such"])
def test_reward_of_no_module(module):
    with (
        open_pool() as pool,
        pytest.raises(InputError, match=f"there is no module {module}"),
    ):
        pool.submit(f"{module}:score", "", "5")


def test_no_workers():
    with pytest.raises(InputError, match="num_workers must be at least 1"):
        open_pool(0)


def test_close_leaves_no_process_and_no_waiting_future(tmp_path):
    trace = tmp_path / "trace"
    threads = threading.active_count()
    with open_pool(2) as pool:
        idle = pool.submit("hostile_rewards:process_id", "", "").result(PATIENCE_S)
        busy = [pool.submit("hostile_rewards:hang", str(trace), "") for _ in range(2)]
        wait_until(lambda: trace.exists() and len(trace.read_text().split()) == 4)
        queued = [pool.submit("math", "", "5") for _ in range(3)]
    for future in busy + queued:
        with pytest.raises(CancelledError):
            future.result(timeout=0)
    for pid in [int(idle.score), *trace.read_text().split()]:
        wait_until(lambda pid=pid: not alive(pid))
    assert threading.active_count() == threads
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit("math", "", "5")


@pytest.mark.parametrize("end", ["pass", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_workers_end_with_an_interpreter_that_forgot_them(tmp_path, end):
    trace = tmp_path / "trace"
    script = f"""
        import os, pathlib, signal, time
        from klear_jax.rewards.pool import Pool

        pool = Pool(1, task_timeout_s=600.0, memory_mb=512)
        pool.submit("hostile_rewards:hang_once", {str(trace)!r}, "")
        while not (os.path.exists({str(trace)!r}) and os.path.getsize({str(trace)!r})):
            time.sleep(0.02)
        {end}
        """
    path = os.pathsep.join(sys.path)
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | {"PYTHONPATH": path},
        timeout=PATIENCE_S,
    )
    wait_until(lambda: not alive(trace.read_text()))


@pytest.mark.parametrize(
    "text, want",
    [
        ("12 + 19 - 11 = 20", 1),
        ("\\boxed{20}.", 1),
        ("It is 1,020, no, 20.0", 1),
        ("12 + 19 - 11 = \\surprise", -1),  # Right, to math-verify.
        ("20 - 0", -1),
        ("x = -20", -1),
        ("31-20", 1),  # No minus sign of its own.
        ("(31)-20", 1),
        ("20 + 0", -1),
        ("", -1),
        ("twenty", -1),
    ],
)
def test_the_last_number(text, want):
    assert math_reward.last_number(text, "20") == want
    assert math_reward.last_number(text, ["7", "20"], correct=2.0, wrong=0.0) == max(
        0, 2 * want
    )


def test_the_last_number_is_compared_with_numbers():
    assert math_reward.last_number("= -1,000", "-1000.0") == 1
    with pytest.raises(InputError, match="must be a number, not 'twenty'"):
        math_reward.last_number("20", "twenty")
