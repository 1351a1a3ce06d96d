r"""Small programming tasks with tests, and programs that solve them, made up by ourselves.

A problem says in words what to print for the integers on standard input, such as
`sum of x plus 3 for x above 4`; its response plans and then writes the program,

    <think>x>4;x+3;sum</think>
    ```python
    a=map(int,input().split())
    print(sum(x+3 for x in a if x>4))
    ```

or writes it at once, mostly with one part wrong. What a problem is used for is a function of
its text, parameters included, so no problem of one split is in another.
"""

import dataclasses
import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from klear_jax.data.arithmetic import (
    DROP_REASONS,
    SPLIT_SHARES,
    Problem,
    Problems,
    hash_of,
    split_of,
)
from klear_jax.errors import InputError

NUM_TESTS = 16
WRONG_SHARE = 0.75  # Of the responses without a plan.
READ, LOOP = "a=map(int,input().split())\n", "for _ in range(int(input())):\n"
# Strings of prompts and responses that deserve to be one token.
SYMBOLS = (
    *("\n```python\n", "\n```", READ, LOOP, "print(", " for x in a if ", " for x in a"),
    *("sum", "max", "min", "sorted", ",default=0", "[::-1]", "x="),
    *(" of ", " for x ", "above ", "below ", "not ", "remainder ", " by "),
    *(
        "plus ",
        "minus ",
        "times ",
        "squared",
        "largest",
        "smallest",
        "list",
        "reversed",
    ),
    *("as many numbers from ", " each "),
)


@dataclasses.dataclass(frozen=True)
class Part:
    """A choice in a task: how it is said, how written, and what it does to x."""

    words: str
    code: str
    run: Callable[..., Any]


def _maps() -> list[Part]:
    parts = [Part("x", "x", lambda x: x), Part("x squared", "x*x", lambda x: x * x)]
    for k in range(1, 10):
        parts.append(Part(f"x plus {k}", f"x+{k}", lambda x, k=k: x + k))
        parts.append(Part(f"x minus {k}", f"x-{k}", lambda x, k=k: x - k))
        if k > 1:
            parts.append(Part(f"x times {k}", f"x*{k}", lambda x, k=k: x * k))
    return parts


def _filters() -> list[Part]:
    parts = [Part("", "", lambda x: True)]
    for k in range(-5, 16):
        parts.append(Part(f"above {k}", f"x>{k}", lambda x, k=k: x > k))
        parts.append(Part(f"below {k}", f"x<{k}", lambda x, k=k: x < k))
        parts.append(Part(f"not {k}", f"x!={k}", lambda x, k=k: x != k))
    for m in range(2, 6):
        for r in range(m):
            words = f"remainder {r} by {m}"
            parts.append(Part(words, f"x%{m}=={r}", lambda x, m=m, r=r: x % m == r))
    return parts


FOLDS = [
    Part("sum", "sum([{}])", sum),
    Part("largest", "max([{}],default=0)", lambda a: max(a, default=0)),
    Part("smallest", "min([{}],default=0)", lambda a: min(a, default=0)),
    Part("list", "*[{}]", list),
    Part("sorted list", "*sorted([{}])", sorted),
    Part("reversed list", "*[{}][::-1]", lambda a: a[::-1]),
]
MAPS, FILTERS = _maps(), _filters()


@dataclasses.dataclass(frozen=True)
class Task:
    """One problem, before it is written down: a fold over numbers, or a sequence."""

    fold: Part | None  # None: a sequence from `start`.
    map: Part
    filter: Part
    start: int = 0

    def words(self) -> str:
        if self.fold is None:
            return f"as many numbers from {self.start}, each {self.map.words}"
        where = f" for x {self.filter.words}" if self.filter.words else ""
        return f"{self.fold.words} of {self.map.words}{where}"

    def plan(self) -> str:
        if self.fold is None:
            return f"x={self.start};{self.map.code}"
        return f"{self.filter.code};{self.map.code};{self.fold.words}"

    def program(self) -> str:
        if self.fold is None:
            return f"x={self.start}\n{LOOP} print(x)\n x={self.map.code}"
        where = f" if {self.filter.code}" if self.filter.code else ""
        return f"{READ}print({self.fold.code.format(f'{self.map.code} for x in a{where}')})"

    def test(self, rng: random.Random) -> tuple[str, str]:
        """An input, and what must be printed for it."""
        if self.fold is None:
            count, x, lines = rng.randint(1, 6), self.start, []
            for _ in range(count):
                lines.append(str(x))
                x = self.map.run(x)
            return f"{count}\n", "\n".join(lines) + "\n"
        numbers = [rng.randint(-6, 16) for _ in range(rng.randint(4, 9))]
        found = self.fold.run([self.map.run(x) for x in numbers if self.filter.run(x)])
        printed = " ".join(map(str, found)) if isinstance(found, list) else str(found)
        return " ".join(map(str, numbers)) + "\n", printed + "\n"

    def spoiled(self, rng: random.Random) -> "Task":
        """The task with one part another, as somebody in a hurry would have it."""
        if self.fold is None:
            part, choices = rng.choice([("start", range(10)), ("map", MAPS)])
        else:
            part, choices = rng.choice(
                [("fold", FOLDS), ("map", MAPS), ("filter", FILTERS)]
            )
        choices = [choice for choice in choices if choice != getattr(self, part)]
        other: dict[str, Any] = {part: rng.choice(choices)}
        return dataclasses.replace(self, **other)


def all_tasks() -> Iterator[Task]:
    for fold, map_, filter_ in itertools.product(FOLDS, MAPS, FILTERS):
        yield Task(fold, map_, filter_)
    for start, map_ in itertools.product(range(10), MAPS):
        yield Task(None, map_, FILTERS[0], start)


def make_problems(
    task: str,
    *,
    num_problems: int,
    seed: int,
    direct_share: float,
    generator: Mapping[str, int],
) -> Problems:
    """Draws num_problems of all problems, each in the split its text falls into.

    Args:
      task: 'programs'.
      num_problems: how many to draw, at most all that there are, 13,384.
      seed: of the draw, of the tests and of the choice which responses are direct.
      direct_share: share of problems whose response has no plan.
      generator: of other tasks; there is nothing to set here.

    Raises:
      InputError: there are too few for every split, or settings for a generator.
    """
    if generator:
        raise InputError(f"{task} have no generator to set {', '.join(generator)}")
    tasks = list(all_tasks())
    num_problems = min(num_problems, len(tasks))
    splits: Mapping[str, list[Problem]] = {split: [] for split in SPLIT_SHARES}
    for number, one in enumerate(random.Random(seed).sample(tasks, num_problems)):
        problem = one.words()
        rng = random.Random(hash_of(f"program {seed}", problem))
        tests = [one.test(rng) for _ in range(NUM_TESTS)]
        inputs, outputs = zip(*tests, strict=True)
        plan, program = one.plan(), one.program()
        if rng.random() < direct_share:
            plan = ""
            if rng.random() < WRONG_SHARE:
                program = one.spoiled(rng).program()
        answer = {"inputs": list(inputs), "outputs": list(outputs), "timeout": 5}
        splits[split_of(problem)].append(
            Problem(
                prompt_id=number,
                task=task,
                problem=problem,
                response=f"<think>{plan}</think>\n```python\n{program}\n```",
                answer=json.dumps(answer),
            )
        )
    for split, rows in splits.items():
        if not rows:
            raise InputError(f"{num_problems} {task} problems leave {split} empty")
    return Problems(splits, {s: dict.fromkeys(DROP_REASONS, 0) for s in splits})
