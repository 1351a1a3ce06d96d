"""Which reward scores which row, and with what values.

A row of a data set may say where it comes from (`data_source`). The config's table `sources`
says which kind of reward that is, and its table `kinds` what a kind is: a function and its
keyword arguments. A new reward is an entry in each.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from klear_jax.errors import InputError
from klear_jax.rewards import code, sandbox
from klear_jax.rewards.pool import NO_WORKER, REWARDS, Pool, find_reward


@dataclasses.dataclass(frozen=True)
class Kind:
    """A reward function, with its values."""

    function: str  # A key of rewards.pool.REWARDS, or 'module:function'.
    options: Mapping[str, Any]  # Its keyword arguments.

    @property
    def runs_code(self) -> bool:
        return find_reward(self.function) in (REWARDS["code"], REWARDS["code_judge"])

    def resolved(self) -> dict[str, Any]:
        """The options as workers get them: all of a run have one isolation, the one that
        was chosen and logged at its start."""
        if not self.runs_code:
            return dict(self.options)
        chosen = sandbox.choose(self.options["isolation"])
        return {**self.options, "isolation": chosen}


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """How responses are scored."""

    kinds: Mapping[str, Kind]
    # What a row's data_source contains -> its kind; the longest that fits.
    sources: Mapping[str, str]
    kind: str  # Of rows without a data_source.
    full_credit: float  # The reward of a sample that counts as right, and as positive.
    num_workers: int
    task_timeout_s: float  # For a response.
    step_timeout_s: (
        float  # For all responses of a step that are left when decoding ends.
    )
    memory_mb: int  # Address space of a worker, MiB.

    def __post_init__(self):
        for name, kind in (*self.sources.items(), ("kind", self.kind)):
            if kind not in self.kinds:
                raise InputError(
                    f"{name} is scored by {kind!r}, which is none of kinds: "
                    f"{sorted(self.kinds)}"
                )
        for name, kind in self.kinds.items():
            if kind.runs_code:
                for option in ("max_tests", "isolation"):  # Read before any response.
                    if option not in kind.options:
                        raise InputError(f"kinds.{name}.options.{option} is not set")
            if kind.options.get("correct", self.full_credit) != self.full_credit:
                raise InputError(
                    f"kinds.{name}.options.correct is {kind.options['correct']}, but "
                    f"full_credit is {self.full_credit}: no sample would count as right"
                )

    def kind_of(self, source: str) -> str:
        """The kind for a data_source, '' for none; a KeyError if there is none."""
        if not source:
            return self.kind
        fitting = [part for part in self.sources if part in source]
        if not fitting:
            raise KeyError(source)
        return self.sources[max(fitting, key=len)]


def make_pool(config: RewardConfig) -> Pool:
    return Pool(
        config.num_workers,
        task_timeout_s=config.task_timeout_s,
        memory_mb=config.memory_mb,
    )


class Row(Protocol):
    """An example of a data set, as far as rewards go."""

    @property
    def origin(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def answer(self) -> Any: ...


def check(config: RewardConfig, rows: Iterable[Row]) -> None:
    """Raises an InputError for what cannot be scored: rows of an unknown source, tests that
    are none, and code on a host that cannot isolate it."""
    unknown: dict[str, list[str]] = {}
    for row in rows:
        try:
            kind = config.kinds[config.kind_of(row.source)]
        except KeyError:
            unknown.setdefault(row.source, []).append(row.origin)
            continue
        of_text = kind.function in ("math", "math_judge", "last_number")
        if of_text and isinstance(row.answer, Mapping):
            raise InputError(
                f"{row.origin}: an answer for {kind.function!r} is text or a list of texts, "
                f"not an object with {sorted(row.answer)[:3]}"
            )
        if kind.runs_code:
            sandbox.choose(kind.options["isolation"])
            try:
                tests = code.parse(ground_truth(config, row.source, row.answer, ""))
            except InputError as error:
                raise InputError(f"{row.origin}: {error}") from None
            together = len(tests.cases)
            if not kind.options.get("soft", True):
                together = min(together, code.TOGETHER)
            if together * tests.timeout_s > config.task_timeout_s:
                raise InputError(
                    f"{row.origin}: {together} tests of up to {tests.timeout_s} s do not fit "
                    f"into rewards.task_timeout_s={config.task_timeout_s}"
                )
    if unknown:
        names = ", ".join(
            f"{name!r} ({len(origins)} rows, the first {origins[0]})"
            for name, origins in sorted(unknown.items())
        )
        raise InputError(
            f"no reward for the data_source {names}: name it in rewards.sources, which has "
            f"{sorted(config.sources)}"
        )


def try_out(pool: Pool, config: RewardConfig, rows: Iterable[Row]) -> None:
    """Scores an empty response to the first row of each kind; an InputError if that fails.

    A function that is not there, or does not take the options that the config gives it,
    would fail on every sample, after hours.
    """
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(config.kind_of(row.source), row)
    for name, row in first.items():
        kind = config.kinds[name]
        answer = ground_truth(config, row.source, row.answer, seed="")
        outcome = pool.submit(kind.function, "", answer, **kind.resolved()).result()
        # Not the config's fault, and may pass.
        if outcome.detail.startswith(NO_WORKER):
            raise RuntimeError(outcome.detail)
        if outcome.status == "error":
            raise InputError(
                f"the reward rewards.kinds.{name} ({kind.function}, with options "
                f"{sorted(kind.options)}) fails on an empty response to {row.origin}: "
                f"{outcome.detail.strip().splitlines()[-1]}"
            )


def ground_truth(config: RewardConfig, source: str, answer: Any, seed: str) -> Any:
    """What the samples of one group are scored against: for code, the tests that are run,
    chosen by the seed."""
    kind = config.kinds[config.kind_of(source)]
    if not kind.runs_code:
        return answer
    return code.choose_tests(answer, seed, kind.options["max_tests"])
