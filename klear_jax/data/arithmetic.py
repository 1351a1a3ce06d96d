"""Arithmetic problems of reasoning-gym with chains of thought that we write out ourselves.

A problem is a bare expression such as `7+5-3=`; its response is either the written-out
`<think>7+5=12;12-3=9</think>\\boxed{9}` or the direct `<think></think>\\boxed{9}`.
What a problem is used for is a function of its text alone (and of the seed, for the form
of its response), so no problem of one split is in another, whatever was drawn.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import reasoning_gym
import tqdm

from klear_jax.errors import InputError

# Percent of the problems.
SPLIT_SHARES = {"sft": 60, "rl": 30, "test": 10}
DROP_REASONS = ("duplicate", "answers differ", "prompt id taken")
# Strings of prompts and responses that deserve to be one token.
SYMBOLS = ("<think>", "</think>", "\\boxed{", "}", "user", "assistant")


@dataclasses.dataclass(frozen=True)
class Task:
    """How a reasoning-gym task becomes prompts and chains.

    Attributes:
      generator: settings of reasoning-gym's generator.
      problem: from its entry to the bare problem.
      chain: from the bare problem to (steps, answer), worked out by ourselves.
    """

    generator: Mapping[str, int]
    problem: Callable[[Mapping[str, Any]], str]
    chain: Callable[[str], tuple[list[str], int]]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One row of the data set; prompt_id is unique in it."""

    prompt_id: int
    task: str
    problem: str
    response: str
    answer: str


@dataclasses.dataclass(frozen=True)
class Problems:
    """Problems per split, and how many were drawn but dropped, per split and reason."""

    splits: Mapping[str, list[Problem]]
    dropped: Mapping[str, Mapping[str, int]]


def _sum_chain(problem: str) -> tuple[list[str], int]:
    first, *rest = re.findall(r"[+-]?\d+", problem)
    steps, total = [], int(first)
    for term in rest:
        steps.append(f"{total}{term}={total + int(term)}")
        total += int(term)
    return steps, total


def _gcd_chain(problem: str) -> tuple[list[str], int]:
    a, b = map(int, re.findall(r"\d+", problem))
    steps = []
    while b:
        steps.append(f"{a}%{b}={a % b}")
        a, b = b, a % b
    return steps, a


TASKS = {
    "chain_sum": Task(
        generator={"min_terms": 3, "max_terms": 5, "min_digits": 1, "max_digits": 1},
        problem=lambda entry: entry["metadata"]["expression"].replace(" ", "") + "=",
        chain=_sum_chain,
    ),
    "gcd": Task(
        generator={"min_value": 1, "max_value": 99},
        problem=lambda entry: "gcd({},{})=".format(*entry["metadata"]["numbers"]),
        chain=_gcd_chain,
    ),
}


def make_problems(
    task: str,
    *,
    num_problems: int,
    seed: int,
    direct_share: float,
    generator: Mapping[str, int],
) -> Problems:
    """Draws num_problems problems and keeps each once, in the split its text falls into.

    Args:
      task: a key of TASKS.
      num_problems: how many to draw; what is kept is less, for short problems repeat.
      seed: of the draw and of the choice which responses are direct.
      direct_share: share of problems whose response gives the answer without a chain.
      generator: settings of reasoning-gym's generator that replace the task's own.

    Raises:
      InputError: unknown task, or settings that reasoning-gym refuses.
    """
    entries = _draw(task, num_problems, seed, generator)
    splits: dict[str, list[Problem]] = {split: [] for split in SPLIT_SHARES}
    dropped = {split: dict.fromkeys(DROP_REASONS, 0) for split in SPLIT_SHARES}
    seen, ids = set(), set()
    for entry in tqdm.tqdm(entries, desc=f"{task} problems", unit="", delay=1):
        problem = TASKS[task].problem(entry)
        split = split_of(problem)
        steps, answer = TASKS[task].chain(problem)
        prompt_id = hash_of("prompt_id", problem) % 2**31
        if problem in seen:
            dropped[split]["duplicate"] += 1
        elif str(answer) != entry["answer"]:
            dropped[split]["answers differ"] += 1
        elif prompt_id in ids:  # Expected once or twice in 100,000.
            dropped[split]["prompt id taken"] += 1
        else:
            is_direct = hash_of(f"direct {seed}", problem) < direct_share * 2**64
            chain = "" if is_direct else ";".join(steps)
            response = f"<think>{chain}</think>\\boxed{{{answer}}}"
            row = Problem(prompt_id, task, problem, response, str(answer))
            splits[split].append(row)
            ids.add(prompt_id)
        seen.add(problem)
    for split, rows in splits.items():
        if not rows:
            raise InputError(f"{num_problems} {task} problems leave {split} empty")
    return Problems(splits, dropped)


def split_of(problem: str) -> str:
    """The split a problem belongs to, by its text alone."""
    percent = hash_of("split", problem) % 100
    for split, share in SPLIT_SHARES.items():
        if percent < share:
            return split
        percent -= share
    raise AssertionError("the shares add up to 100")


def _draw(
    task: str, num_problems: int, seed: int, generator: Mapping[str, int]
) -> Iterable[Mapping[str, Any]]:
    if task not in TASKS:
        raise InputError(f"no task {task!r}; there are {', '.join(TASKS)}")
    settings = {**TASKS[task].generator, **generator}
    try:
        return reasoning_gym.create_dataset(
            task,
            # Its i-th problem depends on seed + i: neighbouring seeds would share most.
            seed=seed * 2**32,
            size=num_problems,
            **settings,
        )
    except (TypeError, AssertionError) as error:
        raise InputError(f"{task} with {settings}: {error}") from error


def hash_of(purpose: str, text: str) -> int:
    """64 bits, independent for each purpose."""
    digest = hashlib.blake2b(f"{purpose} {text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
