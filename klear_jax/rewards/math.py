"""The math rewards: does the final answer equal the reference, mostly by math-verify.

As the authors' `math_longcot_math_verify` scorer and their benchmark judge, which share one
verifier. Verdicts are those of math-verify 0.9.0.
"""

import decimal
import functools
import logging
import re
import signal
import threading
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import math_verify
import math_verify.errors
import math_verify.grader
import math_verify.parser
import sympy.core.random

from klear_jax.errors import InputError

# For each parse and for each comparison of math-verify, as in its own defaults.
_ALARM_S = 5


def _alarm(timeout_seconds: float | None) -> Callable[..., Any]:
    """Takes the place of math-verify's decorator: CPU seconds of this process (all its threads;
    the pool's workers have one), not of the clock, by which a busy machine makes a right answer
    wrong. What waits without computing is left to the pool's own limit. (Those of user code: the
    signal that counts the kernel's, too, SIGPROF, is what libtpu sends 100 times a second, once it is
    loaded.)
    """
    if not timeout_seconds or timeout_seconds <= 0:
        return lambda function: function

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            running = False

            def ring(*_: object) -> None:
                if running:
                    raise math_verify.errors.TimeoutException

            handler = signal.signal(signal.SIGVTALRM, ring)
            timer = signal.setitimer(signal.ITIMER_VIRTUAL, timeout_seconds)
            try:
                running = True
                return function(*args, **kwargs)
            finally:
                running = False
                signal.setitimer(signal.ITIMER_VIRTUAL, *timer)
                # Without one ours stays, which does nothing any more: by default an alarm that is
                # still on its way would end the process.
                if callable(handler):
                    signal.signal(signal.SIGVTALRM, handler)

        return call

    return decorate


math_verify.grader.timeout = math_verify.parser.timeout = _alarm

# It warns of every alarm with the whole text of the response.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def score(
    response: str,
    ground_truth: str | list[str],
    *,
    correct: float = 1.0,
    wrong: float = -1.0,
    no_think_end: float = -0.5,
    no_think_start: float = -2.0,
) -> float:
    """The reward of a response that thinks between tags and then answers.

    Tags are looked for, not matched: their order, count and position are free. The answer is
    read from what follows the last `</think>`; a box is not required. Whatever goes wrong
    inside math-verify, its alarms included, makes the answer wrong.

    Main thread only, because the alarms are signals; elsewhere there would be nothing to end
    a hang. `rewards.pool` calls it from the main thread of each worker.

    Args:
      response: the decoded sample, thinking included.
      ground_truth: the reference answer in LaTeX, or a list of which any one is right. An
        empty string matches nothing.
      correct: the value if the answer is right.
      wrong: the value if it is not, or if there is none.
      no_think_end: the value without `</think>`: the thinking did not end.
      no_think_start: the value with `</think>` but without `<think>`.

    Raises:
      InputError: the ground truth is neither a string nor a non-empty list of strings.
      RuntimeError: called outside the main thread.
    """
    golds = _golds(ground_truth)
    _, end, answer = response.rpartition("</think>")
    if not end:
        return no_think_end
    if "<think>" not in response:
        return no_think_start
    return correct if _verdict(answer, golds) else wrong


def judge(
    text: str,
    ground_truth: str | list[str],
    *,
    correct: float = 1.0,
    wrong: float = -1.0,
) -> float:
    """The benchmark's judgement: the answer anywhere in the text, no tags asked for.

    Source: the authors' `benchmarks/judge_math.py`, which passes the whole text.
    Arguments, errors and the main thread as in `score`.
    """
    return correct if _verdict(text, _golds(ground_truth)) else wrong


def last_number(
    text: str,
    ground_truth: str | list[str],
    *,
    correct: float = 1.0,
    wrong: float = -1.0,
) -> float:
    """Whether the last number in the text is the answer: for sums.

    math-verify takes an expression for its value, so that whoever repeats the problem is
    right: "12 + 19 - 11 = ..." equals 20. RL finds that out within twenty steps.

    Args:
      text: the decoded sample.
      ground_truth: a number, or a list of which any one is right.
      correct, wrong: the two values.

    Raises:
      InputError: the ground truth is not made of numbers.
    """
    golds = [re.fullmatch(_NUMBER, gold) for gold in _golds(ground_truth)]
    if not all(golds):
        raise InputError(f"the answer must be a number, not {ground_truth!r}")
    numbers = re.findall(_NUMBER, text)
    values = {_value(gold[0]) for gold in golds if gold}
    return correct if numbers and _value(numbers[-1]) in values else wrong


def answer(text: str, ground_truth: str, *, wrong: float) -> float:
    """A number that stands for the answer, to be counted: the same for the same answer, `wrong`
    for none. Of what follows the last `</think>`, if there is one; main thread, as `score`."""
    del ground_truth
    parsed = _parse(text.rpartition("</think>")[2])
    if len(parsed) < 2:
        return wrong
    return 1.0 + zlib.crc32(str(parsed[0]).encode())


def last_number_answer(text: str, ground_truth: str, *, wrong: float) -> float:
    """As `answer`, for `last_number`."""
    del ground_truth
    numbers = re.findall(_NUMBER, text)
    if not numbers:
        return wrong
    return 1.0 + zlib.crc32(str(_value(numbers[-1]).normalize()).encode())


# A minus sign is the number's own unless a number stands before it: 5-3 ends in 3.
_NUMBER = r"(?:(?<![\w.)])-)?\d[\d,]*(?:\.\d+)?"


def _value(number: str) -> decimal.Decimal:
    return decimal.Decimal(number.replace(",", ""))


def _golds(ground_truth: str | list[str]) -> tuple[str, ...]:
    golds = [ground_truth] if isinstance(ground_truth, str) else ground_truth
    if (
        not isinstance(golds, list)
        or not golds
        or not all(isinstance(gold, str) for gold in golds)
    ):
        raise InputError(
            "the ground truth of a math problem must be a string or a non-empty list of "
            f"strings, not {ground_truth!r}"
        )
    return tuple(golds)


# The samples of a group repeat answers, and a hostile one costs its alarms each time.
@functools.lru_cache(maxsize=1024)
def _verdict(text: str, golds: tuple[str, ...]) -> bool:
    parsed = _parse(text)
    if len(parsed) < 2:
        return False
    return parsed[1] in golds or any(_equal(gold, parsed) for gold in golds)


def _parse(text: str) -> list[object]:
    """[expression, its text], or fewer where there is no answer."""
    if threading.current_thread() is not threading.main_thread():
        # math-verify would raise ValueError, which must not read as a wrong answer.
        raise RuntimeError(
            "math rewards need the main thread, for their alarms: use klear_jax.rewards.pool"
        )
    # sympy tests identities at random points: the same points for every answer.
    sympy.core.random.seed(0)
    with warnings.catch_warnings():
        # The text of a response can make Python warn; where warnings are errors, that would
        # turn a parse into a failure and so change the verdict.
        warnings.simplefilter("ignore")
        try:
            return math_verify.parse(text, parsing_timeout=_ALARM_S)
        except Exception:
            return []


def _equal(gold: str, parsed: list[object]) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return math_verify.verify(
                math_verify.parse(f"\\boxed{{{gold}}}", parsing_timeout=_ALARM_S),
                parsed,
                timeout_seconds=_ALARM_S,
            )
        except Exception:
            return False
