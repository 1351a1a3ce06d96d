"""Which clean samples a data set takes, and into which split: rules that look at all."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from klear_jax.errors import InputError

TAKEN = ""
DUPLICATE, OTHER_ANSWER = "duplicate", "duplicate prompt with another answer"
WRONG, NOT_JUDGED = "wrong", "not judged"
NO_RATE, TOO_HARD, TOO_EASY = "no pass rate", "pass rate too low", "pass rate too high"
TOO_MANY = "enough responses to this prompt"
# In this order: a sample is counted under the first that holds.
REASONS = (
    *(TAKEN, DUPLICATE, OTHER_ANSWER, WRONG, NOT_JUDGED),
    *(NO_RATE, TOO_HARD, TOO_EASY, TOO_MANY),
)
SPLITS = ("train", "validation")
HUNDREDTHS = 10_000  # Of a percent: a prompt's hash falls into one.


@dataclasses.dataclass(frozen=True)
class ChooseConfig:
    """The rules."""

    judge: bool
    only_right: bool
    pass_rates: tuple[str, ...]
    pass_rate_above: float | None
    pass_rate_below: float | None
    easy_above: float | None
    responses_per_prompt: int
    validation_percent: float

    def __post_init__(self):
        if self.responses_per_prompt < 0:
            raise InputError("responses_per_prompt must not be negative; 0: all")
        hundredths = self.validation_percent * 100
        if (
            not 0 <= hundredths < HUNDREDTHS
            or abs(hundredths - round(hundredths)) > 1e-6
        ):
            raise InputError(
                "validation_percent must be from 0 to below 100, in hundredths, not "
                f"{self.validation_percent}"
            )
        if self.only_right and not self.judge:
            raise InputError("only_right needs judge=True")
        by_rate = (self.pass_rate_above, self.pass_rate_below, self.easy_above)
        if by_rate != (None, None, None) and not (self.judge or self.pass_rates):
            raise InputError("rules about pass rates need judge=True or pass_rates")


@dataclasses.dataclass(frozen=True)
class Table:
    """All clean samples, in the order of sources, files and rows; arrays [N].

    Attributes:
      part: index of the part that holds it.
      row: its number in the part's file, from 0.
      source: index of its source.
      prompt_hash, sample_hash, answer_hash: int64; a sample is prompt and response.
      num_tokens, num_bytes: of the sample.
      right: 1, 0 or -1: not judged.
    """

    part: np.ndarray
    row: np.ndarray
    source: np.ndarray
    prompt_hash: np.ndarray
    sample_hash: np.ndarray
    answer_hash: np.ndarray
    num_tokens: np.ndarray
    num_bytes: np.ndarray
    right: np.ndarray


@dataclasses.dataclass(frozen=True)
class Choice:
    """What becomes of each sample; arrays [N].

    Attributes:
      reason: index into REASONS; 0: taken.
      pass_rate: float32, share of right responses to its prompt; nan: unknown.
      split: index into `splits`.
      splits: names.
    """

    reason: np.ndarray
    pass_rate: np.ndarray
    split: np.ndarray
    splits: tuple[str, ...]


def choose(
    table: Table, config: ChooseConfig, pass_rates: Mapping[int, float], *, rl: bool
) -> Choice:
    """Applies the rules in the order of REASONS.

    Args:
      table: all clean samples.
      config: the rules.
      pass_rates: prompt_hash -> rate, measured elsewhere; where a prompt is not in it, the
        judged samples of the table make its rate.
      rl: a prompt is taken once, whatever its answer.
    """
    reason = np.zeros(len(table.part), np.int8)

    def drop(why: str, where: np.ndarray) -> None:
        reason[(reason == 0) & where] = REASONS.index(why)

    key = table.prompt_hash if rl else table.sample_hash
    _, first, group = np.unique(key, return_index=True, return_inverse=True)
    again = np.arange(len(key)) != first[group]
    other = table.answer_hash != table.answer_hash[first[group]]
    if rl:
        drop(OTHER_ANSWER, again & other)
    drop(DUPLICATE, again)
    rate = _pass_rate(table, pass_rates, reason == 0)
    if config.only_right:
        drop(WRONG, table.right == 0)
        drop(NOT_JUDGED, table.right < 0)
    above, below = config.pass_rate_above, config.pass_rate_below
    if above is not None or below is not None:
        drop(NO_RATE, np.isnan(rate))
    if above is not None:
        drop(TOO_HARD, rate <= above)
    if below is not None:
        drop(TOO_EASY, rate >= below)
    if config.responses_per_prompt:
        drop(
            TOO_MANY,
            _rank(table.prompt_hash, reason == 0) >= config.responses_per_prompt,
        )
    split, splits = _splits(table.prompt_hash, rate, config)
    return Choice(reason, rate, split, splits)


def _pass_rate(
    table: Table, known: Mapping[int, float], counted: np.ndarray
) -> np.ndarray:
    prompts, group = np.unique(table.prompt_hash, return_inverse=True)
    judged = counted & (table.right >= 0)
    total = np.bincount(group[judged], minlength=len(prompts))
    right = np.bincount(group[judged & (table.right == 1)], minlength=len(prompts))
    rate = np.full(len(prompts), np.nan, np.float32)
    np.divide(right, total, out=rate, where=total > 0, casting="unsafe")
    if known:
        given = np.array([known.get(int(p), np.nan) for p in prompts], np.float32)
        rate = np.where(np.isnan(given), rate, given)
    return rate[group]


def _rank(prompt_hash: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """How many counted samples of the same prompt stand before each counted one."""
    rank = np.zeros(len(prompt_hash), np.int64)
    [where] = np.nonzero(counted)
    order = np.argsort(prompt_hash[where], kind="stable")
    ordered = prompt_hash[where][order]
    starts = np.searchsorted(ordered, ordered, side="left")
    rank[where[order]] = np.arange(len(ordered)) - starts
    return rank


def _splits(
    prompt_hash: np.ndarray, rate: np.ndarray, config: ChooseConfig
) -> tuple[np.ndarray, tuple[str, ...]]:
    """By the prompt alone, so that no prompt is in two of them."""
    share = round(config.validation_percent * 100)
    held_out = (prompt_hash % HUNDREDTHS < share).astype(np.int8)
    if config.easy_above is None:
        return held_out, SPLITS
    names = tuple(f"{a}{b}" for a in SPLITS for b in ("", "_easy", "_hard"))
    kind = np.where(np.isnan(rate), 0, np.where(rate > config.easy_above, 1, 2))
    return (3 * held_out + kind).astype(np.int8), names
