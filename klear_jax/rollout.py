"""Prompts -> samples -> rewards: one rollout batch, in groups that may outlive a step.

Shape letters: B samples of a step.
"""

import base64
import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from klear_jax import hosts, preemption, qwen3, sampler
from klear_jax.errors import InputError
from klear_jax.rewards import routing
from klear_jax.rewards.pool import Outcome, Pool
from klear_jax.rewards.routing import RewardConfig
from klear_jax.sampling import Sampling
from klear_jax.sharding import Layout
from klear_jax.tokens import Tokenizer, cut_at_stop

# Told what is under way, many times a second.
Tell = Callable[[str], None]
# (group, index in it, sample, its reward).
OnScored = Callable[[int, int, sampler.Sample, Outcome], None]

FILTERS = ("reward", "accuracy", "none")
# 'carry' keeps them for one more step, with the old log-probs of the one that drew them.
SURPLUS = ("discard", "carry")
# Calls of decoding between two questions of whether the run is to end.
PREEMPTION_CALLS = 8
# Seconds of waiting for rewards between two such questions.
PREEMPTION_S = 0.2


class Interrupted(preemption.Preempted):
    """A phase was cut off.

    Attributes:
        groups: those it was given, with the samples that have ended since and their rewards.
    """

    def __init__(self, groups: "Sequence[OpenGroup]"):
        super().__init__()
        self.groups = list(groups)


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """One rollout batch."""

    prompts: int  # Generated a step.
    max_groups: int  # Used a step at most, after the filter.
    samples_per_prompt: int
    max_prompt_tokens: int
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    # A phase ends when so large a share of its groups is complete; the others go on in
    # the next one, which then waits for them. 1: wait for all.
    finish_fraction: float
    stop_strings: tuple[str, ...]  # End a response, beside the tokenizer's stop ids.
    max_batches: int  # Of prompts, generated until the filter has left max_groups.
    surplus: str  # What becomes of good groups beyond max_groups, one of `SURPLUS`.
    # Drop groups of equal 'reward' (paper), of equal 'accuracy' (code), or 'none'.
    filter: str
    max_accuracy: float  # Drop groups in which a larger share is right; 1: none.
    normalize_std: bool  # Divide advantages by the group's standard deviation.
    drop_unfinished: (
        bool  # Samples cut off at the limit are not trained on, nor compared.
    )
    # A response's reward falls over its last so many tokens, down to overlong_penalty at
    # the limit. 0 tokens: never.
    overlong_tokens: int
    overlong_penalty: float
    token_groups: int  # Groups of a step that are written down token by token.

    def __post_init__(self):
        for name in (
            "prompts",
            "max_groups",
            "samples_per_prompt",
            "max_prompt_tokens",
            "max_new_tokens",
            "max_batches",
        ):
            if getattr(self, name) < 1:
                raise InputError(
                    f"rollout.{name} must be at least 1, not {getattr(self, name)}"
                )
        if "" in self.stop_strings:
            raise InputError("rollout.stop_strings holds an empty string")
        if self.filter not in FILTERS:
            raise InputError(
                f"rollout.filter must be one of {FILTERS}, not {self.filter!r}"
            )
        if self.surplus not in SURPLUS:
            raise InputError(
                f"rollout.surplus must be one of {SURPLUS}, not {self.surplus!r}"
            )
        if not 0 < self.max_accuracy <= 1:
            raise InputError(
                f"rollout.max_accuracy must be in (0, 1], not {self.max_accuracy}"
            )
        if not 0 <= self.overlong_tokens <= self.max_new_tokens:
            raise InputError(
                "rollout.overlong_tokens must be from 0 to max_new_tokens, not "
                f"{self.overlong_tokens}"
            )
        if self.token_groups < 0:
            raise InputError(
                f"rollout.token_groups must not be negative: {self.token_groups}"
            )
        if not 0 < self.finish_fraction <= 1:
            raise InputError(
                f"rollout.finish_fraction must be in (0, 1], not {self.finish_fraction}"
            )
        self.sampling()
        if self.temperature == 0:
            raise InputError(
                "rollout.temperature must be above 0: the samples of a group must differ"
            )

    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.top_k)

    @property
    def row_tokens(self) -> int:
        return self.max_prompt_tokens + self.max_new_tokens


@dataclasses.dataclass(frozen=True)
class OpenGroup:
    """A prompt whose samples are drawn, or still to be."""

    problem: str
    source: str  # The row's data_source, '' for none.
    answer: Any  # What its samples are scored against.
    group: sampler.Group  # Its key is that of the step that began it.
    # Of each sample, for each token so far: the step whose policy drew it, int32, and the
    # log-prob which the trainer gave it at the end of that step, float32.
    policy_steps: Sequence[np.ndarray]
    old_logp: Sequence[np.ndarray]
    outcomes: Sequence[Outcome | None]  # Of the samples that have ended.
    carried: bool  # It was begun in an earlier step, or an earlier batch of this one.
    waited: bool = False  # It was complete in the last step, which had groups enough.

    def ended(self, j: int) -> bool:
        return self.group.ended(self.group.samples[j])

    @property
    def left(self) -> int:
        """Samples that have not ended."""
        return sum(not self.ended(j) for j in range(len(self.outcomes)))


def open_groups(
    prompts: Mapping[str, Sequence[Any]],
    rewards: RewardConfig,
    *,
    num_samples: int,
    max_new_tokens: int,
    key: jax.Array,
    seed: str,
) -> list[OpenGroup]:
    """New groups, of prompts as `data.batches.all_prompts` has them.

    Args:
        key: of the samples.
        seed: of the choice of tests to score them with.
    """
    names = ("problems", "sources", "answers", "tokens", "prompt_ids")
    columns = (prompts[name] for name in names)
    return [
        OpenGroup(
            problem,
            source,
            routing.ground_truth(rewards, source, answer, f"{seed}/{name}"),
            sampler.Group(
                ids, int(name), key, max_new_tokens, [sampler.NOT_BEGUN] * num_samples
            ),
            policy_steps=[np.zeros(0, np.int32)] * num_samples,
            old_logp=[np.zeros(0, np.float32)] * num_samples,
            outcomes=[None] * num_samples,
            carried=False,
        )
        for problem, source, answer, ids, name in zip(*columns, strict=True)
    ]


def collect(
    params: qwen3.Params,
    model: qwen3.Config,
    groups: Sequence[OpenGroup],
    tokenizer: Tokenizer,
    pool: Pool,
    rewards: RewardConfig,
    *,
    sampling: Sampling,
    engine: sampler.Engine,
    slot_tokens: int,
    stop_strings: Sequence[str],
    tell: Tell,
    on_scored: OnScored | None = None,
    step: int = 0,
    finish_fraction: float = 1.0,
    dtype: jnp.dtype | None = None,
    layout: Layout | None = None,
) -> tuple[list[OpenGroup], list[OpenGroup], dict[str, float]]:
    """Samples responses and scores each while others are still being decoded. Of several
    processes, each scores groups of its own, and all hear of all.

    Args:
        groups: to draw, those carried first.
        stop_strings: text that ends a response, beside the tokenizer's stop ids. The sampler,
            which knows no text, goes on to a stop id or the limit; what is behind is cut off.
        tell: is told how many samples have ended, and what is waited for.
        on_scored: is called soon after a sample of this process has its reward.
        step: of the policy.
        finish_fraction: as in `RolloutConfig`.
        sampling, engine, slot_tokens, dtype, layout: see `sampler.sample_groups`.

    Returns:
        The complete groups, those that go on (both without `old_logp` for the new tokens),
        and the counts of the sampler.

    Raises:
        Interrupted: the run is to end. With a `finish_fraction` below 1 its groups are as they
            were given: which of them are complete when a phase ends depends on all of it.
    """
    phase = _Phase(groups, tokenizer, pool, rewards, stop_strings, tell, on_scored)
    least = [i for i, open_ in enumerate(groups) if open_.carried]
    # Less than a rounding error of the product is no group.
    enough_groups = math.ceil(finish_fraction * sum(map(bool, phase.left)) - 1e-9)
    enough_groups += phase.left.count(0)
    calls = itertools.count(1)

    def enough() -> bool:
        if next(calls) % PREEMPTION_CALLS == 0:
            preemption.check()
            phase.look()
        return (
            finish_fraction < 1
            and phase.left.count(0) >= enough_groups
            and not any(phase.left[i] for i in least)
        )

    try:
        phase.score_ended()
        found, counts = sampler.sample_groups(
            params,
            model,
            [open_.group for open_ in groups],
            sampling=sampling,
            engine=engine,
            slot_tokens=slot_tokens,
            stop_ids=tokenizer.stop_ids,
            dtype=dtype,
            layout=layout,
            on_finish=phase.finish,
            enough=enough,
        )
        phase.cut_unfinished(found)
        phase.wait(rewards.step_timeout_s)
    except preemption.Preempted:
        after = phase.after(phase.known(), step) if finish_fraction == 1 else groups
        raise Interrupted(after) from None
    late = phase.give_up(rewards.step_timeout_s)  # First: others may come meanwhile.
    after = phase.after(phase.known() | late, step)
    pairs = list(zip(after, phase.left, strict=True))
    return (
        [open_ for open_, n in pairs if not n],
        [open_ for open_, n in pairs if n],
        counts,
    )


class _Phase:
    """What a phase has drawn and scored so far; a sample's name is (group, index in it)."""

    def __init__(
        self,
        groups: Sequence[OpenGroup],
        tokenizer: Tokenizer,
        pool: Pool,
        rewards: RewardConfig,
        stop_strings: Sequence[str],
        tell: Tell,
        on_scored: OnScored | None,
    ):
        self._groups, self._tokenizer, self._pool = groups, tokenizer, pool
        self._rewards, self._stop_strings = rewards, stop_strings
        self._tell, self._on_scored = tell, on_scored
        self._samples = [list(open_.group.samples) for open_ in groups]
        self._ended: set[tuple[int, int]] = set()
        self._scores: dict[tuple[int, int], futures.Future[Outcome]] = {}  # Ours.
        self._heard: set[tuple[int, int]] = set()  # Whose rewards `on_scored` had.
        self.left = [open_.left for open_ in groups]  # Samples that have not ended.

    def score_ended(self) -> None:
        """Those that ended before an interruption, which did not wait for their rewards."""
        for i, open_ in enumerate(self._groups):
            for j, outcome in enumerate(open_.outcomes):
                if outcome is None and open_.ended(j):
                    self._ended.add((i, j))
                    self._score(i, j)

    def finish(self, i: int, j: int, sample: sampler.Sample) -> None:
        """A sample has ended."""
        self._samples[i][j] = cut(sample, self._tokenizer, self._stop_strings)
        self.left[i] -= 1
        self._ended.add((i, j))
        self._score(i, j)

    def _score(self, i: int, j: int) -> None:
        if i % hosts.count() != hosts.index():
            return
        open_ = self._groups[i]
        kind = self._rewards.kinds[self._rewards.kind_of(open_.source)]
        self._scores[i, j] = self._pool.submit(
            kind.function,
            self._tokenizer.decode(self._samples[i][j].tokens),
            open_.answer,
            **kind.resolved(),
        )

    def cut_unfinished(self, found: Sequence[sampler.Group]) -> None:
        """Takes over what was drawn of samples that have not ended; a stop string may have ended
        what the sampler would go on with."""
        for i, group in enumerate(found):
            for j, sample in enumerate(group.samples):
                if (i, j) in self._ended or self._groups[i].outcomes[j] is not None:
                    continue
                self._samples[i][j] = cut(sample, self._tokenizer, self._stop_strings)
                if group.ended(self._samples[i][j]):
                    self.finish(i, j, self._samples[i][j])

    def look(self) -> None:
        """Says how far it is, and hands on the rewards that have come."""
        total = sum(len(open_.outcomes) for open_ in self._groups)
        self._tell(
            f"sampling: {total - sum(self.left)} of {total} samples, {self._to_come()}"
        )
        self._hand_on()

    def _to_come(self) -> str:
        return f"{sum(not x.done() for x in self._scores.values())} rewards to come"

    def _hand_on(self) -> None:
        if self._on_scored is None:
            return
        for (i, j), outcome in self.known().items():
            if (i, j) not in self._heard:
                self._heard.add((i, j))
                self._on_scored(i, j, self._samples[i][j], outcome)

    def wait(self, timeout_s: float) -> None:
        """Until all processes have their rewards, or do not wait any longer."""
        deadline = time.monotonic() + timeout_s
        waits = True
        while hosts.any_of(waits):
            preemption.check()
            left_s = max(0.0, deadline - time.monotonic())
            self._tell(f"waiting: {self._to_come()}, {left_s:.0f} s at most")
            _, not_done = futures.wait(self._scores.values(), min(PREEMPTION_S, left_s))
            waits = bool(not_done) and time.monotonic() < deadline
        self._hand_on()

    def known(self) -> dict[tuple[int, int], Outcome]:
        """The rewards that have come."""
        return {
            name: one.result()
            for name, one in self._scores.items()
            if one.done() and not one.cancelled()
        }

    def give_up(self, waited_s: float) -> dict[tuple[int, int], Outcome]:
        """What the samples get whose rewards have not come."""
        late = Outcome(math.nan, "late", f"not scored within {waited_s} s of the step")
        # What could not be cancelled is done, or being done.
        return {
            name: late
            for name, one in self._scores.items()
            if one.cancel() or not one.done()
        }

    def after(
        self, scored: Mapping[tuple[int, int], Outcome], step: int
    ) -> list[OpenGroup]:
        """The groups after the phase, with what all processes have scored."""
        outcomes = _share(scored)
        return [
            _advance(
                open_,
                self._samples[i],
                [outcomes.get((i, j), old) for j, old in enumerate(open_.outcomes)],
                step,
            )
            for i, open_ in enumerate(self._groups)
        ]


def _share(
    mine: Mapping[tuple[int, int], Outcome],
) -> dict[tuple[int, int], Outcome]:
    """The outcomes of all processes."""
    rows = [(*name, *dataclasses.astuple(outcome)) for name, outcome in mine.items()]
    return {
        (i, j): Outcome(*parts) for rows in hosts.gather(rows) for i, j, *parts in rows
    }


def _advance(
    open_: OpenGroup,
    samples: Sequence[sampler.Sample],
    outcomes: Sequence[Outcome | None],
    step: int,
) -> OpenGroup:
    """The group after a phase, its new tokens drawn by the policy of `step`."""
    new = [
        len(sample.tokens) - len(old)
        for sample, old in zip(samples, open_.policy_steps, strict=True)
    ]
    return dataclasses.replace(
        open_,
        group=dataclasses.replace(open_.group, samples=samples),
        policy_steps=[
            np.append(old, np.full(n, step, np.int32))
            for old, n in zip(open_.policy_steps, new, strict=True)
        ],
        outcomes=outcomes,
        carried=True,
    )


@dataclasses.dataclass(frozen=True)
class Rollout:
    """The complete groups of a step, sample by sample; lists and arrays are B long."""

    groups: list[OpenGroup]
    group_B: np.ndarray  # The group of each sample, its index in `groups`.
    samples: list[sampler.Sample]
    policy_steps: list[np.ndarray]  # [n] int32 each, as `OpenGroup`.
    old_logp: list[np.ndarray]  # Of the tokens from earlier steps: up to [n] each.
    texts: list[str]  # Responses, decoded.
    outcomes: list[Outcome]
    penalty_B: np.ndarray  # float32, for the length: not above 0.
    reward_B: np.ndarray  # float32, score + penalty; nan where it failed by our fault.
    correct_B: np.ndarray  # Whether the score is full credit.

    def __len__(self) -> int:
        return len(self.samples)

    def group_of(self, b: int) -> OpenGroup:
        return self.groups[self.group_B[b]]


def flatten(
    groups: Sequence[OpenGroup],
    tokenizer: Tokenizer,
    full_credit: float,
    *,
    overlong_tokens: int = 0,
    overlong_penalty: float = 0.0,
) -> Rollout:
    """Complete groups, sample by sample.

    Args:
        full_credit: the score of a right answer.
        overlong_tokens, overlong_penalty: as in `RolloutConfig`.
    """
    pairs = [(g, j) for g, x in enumerate(groups) for j in range(len(x.outcomes))]
    samples = [groups[g].group.samples[j] for g, j in pairs]
    # Of complete groups, where each sample has one.
    outcomes = cast(list[Outcome], [groups[g].outcomes[j] for g, j in pairs])
    score_B = np.array([outcome.score for outcome in outcomes], np.float32)
    over_B = np.array(
        [
            len(sample.tokens) - groups[g].group.limit + overlong_tokens
            for sample, (g, _) in zip(samples, pairs, strict=True)
        ]
    )
    penalty_B = np.asarray(
        -overlong_penalty * np.maximum(over_B, 0) / max(overlong_tokens, 1), np.float32
    )
    return Rollout(
        groups=list(groups),
        group_B=np.array([g for g, _ in pairs], int),
        samples=samples,
        policy_steps=[groups[g].policy_steps[j] for g, j in pairs],
        old_logp=[groups[g].old_logp[j] for g, j in pairs],
        texts=[tokenizer.decode(sample.tokens) for sample in samples],
        outcomes=outcomes,
        penalty_B=penalty_B,
        reward_B=score_B + penalty_B,
        correct_B=score_B == full_credit,
    )


def waiting(
    rollout: Rollout, surplus: Sequence[int], config: RolloutConfig
) -> dict[int, OpenGroup]:
    """The surplus groups that wait for the next step, by their index: none waits twice."""
    if config.surplus != "carry":
        return {}
    return {
        g: dataclasses.replace(rollout.groups[g], waited=True)
        for g in surplus
        if not rollout.groups[g].waited
    }


def check_rewards(rollout: Rollout) -> None:
    """Warns of samples on which the reward has failed, by no fault of theirs; an InputError if
    these are all."""
    failed = [outcome for outcome in rollout.outcomes if outcome.status == "error"]
    if not failed:
        return
    lines = [line.strip() for line in failed[0].detail.splitlines() if line.strip()]
    lines = lines or ["no word of why"]
    where = [line for line in lines if line.startswith("File ")][-1:]
    said = f"on the first with: {' '.join([*where, lines[-1]])}"
    if len(failed) == len(rollout.outcomes):
        raise InputError(
            f"the reward failed on all {len(failed)} samples of a step, {said}"
        )
    logging.getLogger(__name__).warning(
        "the reward failed on %d of %d samples of a step, %s; they are left out",
        len(failed),
        len(rollout.outcomes),
        said,
    )


def cut(
    sample: sampler.Sample, tokenizer: Tokenizer, stop_strings: Sequence[str]
) -> sampler.Sample:
    """A sample that a stop string ends, up to the token that completes it."""
    kept, stopped = cut_at_stop(tokenizer, sample.tokens, stop_strings)
    if not stopped:
        return sample
    return sampler.Sample(list(kept), sample.logprobs[: len(kept)], finished=True)


def to_json(groups: Sequence[OpenGroup]) -> list[dict[str, Any]]:
    """Groups as a checkpoint keeps them, to the bit; arrays as base64, for there may be tens
    of millions of tokens."""

    def one(open_: OpenGroup) -> dict[str, Any]:
        group = open_.group
        columns = zip(
            group.samples,
            open_.policy_steps,
            open_.old_logp,
            open_.outcomes,
            strict=True,
        )
        return {
            "problem": open_.problem,
            "source": open_.source,
            "answer": open_.answer,
            "prompt": list(map(int, group.prompt)),
            "prompt_id": group.prompt_id,
            "key": jax.random.key_data(group.key).tolist(),
            "limit": group.limit,
            "carried": open_.carried,
            "waited": open_.waited,
            "samples": [
                {
                    "tokens": to_text(sample.tokens, np.int32),
                    "logprobs": to_text(sample.logprobs, np.float32),
                    "finished": sample.finished,
                    "policy_steps": to_text(steps, np.int32),
                    "old_logp": to_text(old, np.float32),
                    "outcome": outcome and dataclasses.astuple(outcome),
                }
                for sample, steps, old, outcome in columns
            ],
        }

    return [one(open_) for open_ in groups]


def from_json(rows: Sequence[Mapping[str, Any]]) -> list[OpenGroup]:
    """What `to_json` wrote."""

    def one(row: Mapping[str, Any]) -> OpenGroup:
        found = row["samples"]
        key = jax.random.wrap_key_data(jnp.asarray(np.array(row["key"], np.uint32)))
        samples = [
            sampler.Sample(
                from_text(x["tokens"], np.int32).tolist(),
                from_text(x["logprobs"], np.float32),
                x["finished"],
            )
            for x in found
        ]
        return OpenGroup(
            row["problem"],
            row["source"],
            row["answer"],
            sampler.Group(row["prompt"], row["prompt_id"], key, row["limit"], samples),
            policy_steps=[from_text(x["policy_steps"], np.int32) for x in found],
            old_logp=[from_text(x["old_logp"], np.float32) for x in found],
            outcomes=[x["outcome"] and Outcome(*x["outcome"]) for x in found],
            carried=row["carried"],
            waited=row["waited"],
        )

    return [one(row) for row in rows]


def to_text(x: Any, dtype: type) -> str:
    """An array for `from_text`, to the bit."""
    return base64.b64encode(np.asarray(x, dtype).tobytes()).decode()


def from_text(text: str, dtype: type) -> np.ndarray:
    """The array [n] that `to_text` wrote."""
    return np.frombuffer(base64.b64decode(text), dtype)
