"""Prompts -> samples -> rewards -> advantages -> rows of a batch.

Shape letters: B samples of a step, T tokens of a row (prompt and response).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from klear_jax import advantages, losses, qwen3, sampler
from klear_jax.errors import InputError
from klear_jax.rewards.pool import Outcome, Pool, find_reward
from klear_jax.sampling import Sampling
from klear_jax.sharding import Layout
from klear_jax.tokens import Tokenizer, cut_at_stop

FILTERS = ("reward", "accuracy", "none")


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """One rollout batch."""

    prompts: int  # Generated a step.
    max_groups: int  # Used a step at most, after the filter; the surplus is discarded.
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
    filter: str  # Drop groups of equal 'reward' (paper), of equal 'accuracy' (code), or 'none'.
    normalize_std: bool  # Divide advantages by the group's standard deviation.

    def __post_init__(self):
        for name in (
            "prompts",
            "max_groups",
            "samples_per_prompt",
            "max_prompt_tokens",
            "max_new_tokens",
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
        if not 0 < self.finish_fraction <= 1:
            raise InputError(
                f"rollout.finish_fraction must be in (0, 1], not {self.finish_fraction}"
            )
        self.sampling()

    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.top_k)

    @property
    def row_tokens(self) -> int:
        return self.max_prompt_tokens + self.max_new_tokens


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """How responses are scored."""

    kind: str  # A key of rewards.pool.REWARDS, or 'module:function'.
    options: Mapping[str, float]  # Keyword arguments of the reward: its values.
    full_credit: float  # The reward of a sample that counts as right, and as positive.
    num_workers: int
    task_timeout_s: float
    memory_mb: int  # Address space of a worker, MiB.


def make_pool(config: RewardConfig) -> Pool:
    """Workers for the reward; an InputError if it does not exist."""
    find_reward(config.kind)
    return Pool(
        config.num_workers,
        task_timeout_s=config.task_timeout_s,
        memory_mb=config.memory_mb,
    )


@dataclasses.dataclass(frozen=True)
class OpenGroup:
    """A prompt whose samples are still to be drawn, or to be drawn to their end."""

    problem: str
    answer: Any
    group: sampler.Group  # Its key is that of the step that began it.
    # Of each sample, for each token so far: the step whose policy drew it, int32, and the
    # log-prob which the trainer gave it at the end of that step, float32.
    policy_steps: Sequence[np.ndarray]
    old_logp: Sequence[np.ndarray]
    outcomes: Sequence[Outcome | None]  # Of the samples that have ended.
    carried: bool  # It was begun in an earlier step.


def open_groups(
    prompts: Mapping[str, Sequence[Any]],
    *,
    num_samples: int,
    max_new_tokens: int,
    key: jax.Array,
) -> list[OpenGroup]:
    """New groups, of prompts with tokens, prompt_ids, answers and problems."""
    columns = (
        prompts[name] for name in ("problems", "answers", "tokens", "prompt_ids")
    )
    return [
        OpenGroup(
            problem,
            answer,
            sampler.Group(
                ids, int(name), key, max_new_tokens, [sampler.NOT_BEGUN] * num_samples
            ),
            policy_steps=[np.zeros(0, np.int32)] * num_samples,
            old_logp=[np.zeros(0, np.float32)] * num_samples,
            outcomes=[None] * num_samples,
            carried=False,
        )
        for problem, answer, ids, name in zip(*columns, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class Rollout:
    """The complete groups of one step, sample by sample; lists and arrays are B long."""

    problems: list[str]
    prompts: list[Sequence[int]]  # Token ids.
    samples: list[sampler.Sample]
    policy_steps: list[np.ndarray]  # [n] int32 each, as `OpenGroup`.
    old_logp: list[np.ndarray]  # Of the tokens from earlier steps: up to [n] each.
    texts: list[str]  # Responses, decoded.
    outcomes: list[Outcome]
    reward_B: np.ndarray  # float32; nan where scoring failed by our fault.
    group_B: np.ndarray  # The prompt of each sample, 0, 1, ...

    def __len__(self) -> int:
        return len(self.samples)


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
    step: int = 0,
    finish_fraction: float = 1.0,
    dtype: jnp.dtype | None = None,
    layout: Layout | None = None,
) -> tuple[Rollout, list[OpenGroup], dict[str, float]]:
    """Samples responses and scores each while others are still being decoded.

    Args:
        groups: to draw, those carried from an earlier step first.
        stop_strings: text that ends a response, beside the tokenizer's stop ids. The sampler,
            which knows no text, goes on to a stop id or the limit; what is behind is cut off.
        step: of the policy.
        finish_fraction: as in `RolloutConfig`.
        sampling, engine, slot_tokens, dtype, layout: see `sampler.sample_groups`.

    Returns:
        The complete groups, those that go on (without `old_logp` for the new tokens), and
        the counts of the sampler.
    """
    samples = [list(open_.group.samples) for open_ in groups]
    left = [sum(not g.group.ended(s) for s in g.group.samples) for g in groups]
    futures: dict[tuple[int, int], Any] = {}

    def finish(i: int, j: int, sample: sampler.Sample) -> None:
        samples[i][j] = cut(sample, tokenizer, stop_strings)
        text = tokenizer.decode(samples[i][j].tokens)
        futures[i, j] = pool.submit(
            rewards.kind, text, groups[i].answer, **rewards.options
        )
        left[i] -= 1

    def enough() -> bool:
        if any(n for n, open_ in zip(left, groups, strict=True) if open_.carried):
            return False
        # Less than a rounding error of the product is no group.
        return left.count(0) >= math.ceil(finish_fraction * len(groups) - 1e-9)

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
        on_finish=finish,
        enough=enough if finish_fraction < 1 else None,
    )
    # A stop string may have ended what the sampler would go on with.
    for i, group in enumerate(found):
        for j, sample in enumerate(group.samples):
            if (i, j) not in futures and groups[i].outcomes[j] is None:
                samples[i][j] = cut(sample, tokenizer, stop_strings)
                if group.ended(samples[i][j]):
                    finish(i, j, samples[i][j])
    outcomes = [
        [
            futures[i, j].result() if (i, j) in futures else outcome
            for j, outcome in enumerate(open_.outcomes)
        ]
        for i, open_ in enumerate(groups)
    ]
    after = [
        dataclasses.replace(
            open_,
            group=dataclasses.replace(open_.group, samples=samples[i]),
            policy_steps=[
                np.append(old, np.full(len(s.tokens) - len(old), step, np.int32))
                for old, s in zip(open_.policy_steps, samples[i], strict=True)
            ],
            outcomes=outcomes[i],
            carried=True,
        )
        for i, open_ in enumerate(groups)
    ]
    complete = [open_ for open_, n in zip(after, left, strict=True) if not n]
    going_on = [open_ for open_, n in zip(after, left, strict=True) if n]
    return _rollout(complete, tokenizer), going_on, counts


def _rollout(groups: Sequence[OpenGroup], tokenizer: Tokenizer) -> Rollout:
    """Complete groups, flat."""
    pairs = [(g, j) for g, x in enumerate(groups) for j in range(len(x.outcomes))]
    samples = [groups[g].group.samples[j] for g, j in pairs]
    outcomes = [groups[g].outcomes[j] for g, j in pairs]
    return Rollout(
        problems=[groups[g].problem for g, _ in pairs],
        prompts=[groups[g].group.prompt for g, _ in pairs],
        samples=samples,
        policy_steps=[groups[g].policy_steps[j] for g, j in pairs],
        old_logp=[groups[g].old_logp[j] for g, j in pairs],
        texts=[tokenizer.decode(sample.tokens) for sample in samples],
        outcomes=outcomes,
        reward_B=np.array([outcome.score for outcome in outcomes], np.float32),
        group_B=np.array([g for g, _ in pairs], int),
    )


def cut(
    sample: sampler.Sample, tokenizer: Tokenizer, stop_strings: Sequence[str]
) -> sampler.Sample:
    """A sample that a stop string ends, up to the token that completes it."""
    kept, stopped = cut_at_stop(tokenizer, sample.tokens, stop_strings)
    if not stopped:
        return sample
    return sampler.Sample(list(kept), sample.logprobs[: len(kept)], finished=True)


def select(rollout: Rollout, config: RolloutConfig, full_credit: float) -> np.ndarray:
    """Indices of the samples to train on, groups whole and in order, [b] int.

    Samples that our own fault left without a reward are out before anything is compared,
    and so is a sample that this leaves without another to compare with. Then groups that
    teach nothing are dropped, and what exceeds `max_groups`.
    """
    scored_B = np.isfinite(rollout.reward_B)
    if config.samples_per_prompt > 1:
        scored_B &= np.bincount(rollout.group_B, scored_B)[rollout.group_B] > 1
    (scored,) = np.nonzero(scored_B)
    reward_B, group_B = rollout.reward_B[scored], rollout.group_B[scored]
    keep_B = np.ones(len(scored), bool)
    if config.filter == "reward":
        keep_B = advantages.informative(reward_B, group_B)
    elif config.filter == "accuracy":
        keep_B = advantages.informative(reward_B == full_credit, group_B)
    kept = scored[keep_B]
    groups = advantages.groups(rollout.group_B[kept])[: config.max_groups]
    return kept[np.concatenate(groups)] if groups else kept


def lay_out(
    prompts: Sequence[Sequence[int]],
    samples: Sequence[sampler.Sample],
    old_logp: Sequence[np.ndarray],
    row_tokens: int,
) -> dict[str, np.ndarray]:
    """One row [T] a sample: its prompt, its response, padding.

    Returns:
        tokens, positions, segment_ids, mask (1 on the response), behaviour_logp (the
        sampler's log-probs), earlier_logp (`OpenGroup.old_logp`; nan where it is still to
        be scored): each [B, T].
    """
    B, T = len(samples), row_tokens
    tokens_BT, mask_BT = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    segment_ids_BT = np.zeros((B, T), np.int32)
    behaviour_logp_BT = np.zeros((B, T), np.float32)
    earlier_logp_BT = np.full((B, T), np.nan, np.float32)
    for row, (prompt, sample, old) in enumerate(
        zip(prompts, samples, old_logp, strict=True)
    ):
        start, end = len(prompt), len(prompt) + len(sample.tokens)
        tokens_BT[row, :end] = [*prompt, *sample.tokens]
        segment_ids_BT[row, :end] = 1
        mask_BT[row, start:end] = 1
        behaviour_logp_BT[row, start:end] = sample.logprobs
        earlier_logp_BT[row, start : start + len(old)] = old
    return {
        "tokens": tokens_BT,
        "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
        "segment_ids": segment_ids_BT,
        "mask": mask_BT,
        "behaviour_logp": behaviour_logp_BT,
        "earlier_logp": earlier_logp_BT,
    }


def make_rows(
    rollout: Rollout, chosen: np.ndarray, config: RolloutConfig
) -> dict[str, np.ndarray]:
    """The rows of the chosen samples, as `lay_out`, with their advantage [b, T]."""
    rows = lay_out(
        [rollout.prompts[b] for b in chosen],
        [rollout.samples[b] for b in chosen],
        [rollout.old_logp[b] for b in chosen],
        config.row_tokens,
    )
    advantage_B = advantages.group_relative(
        rollout.reward_B[chosen],
        rollout.group_B[chosen],
        normalize_std=config.normalize_std,
    )
    return rows | {
        "advantage": np.where(rows["mask"], advantage_B[:, None], np.float32(0))
    }


def score_open(
    groups: Sequence[OpenGroup],
    score: Callable[[Mapping[str, np.ndarray]], np.ndarray],
    row_tokens: int,
) -> list[OpenGroup]:
    """Groups that go on, with the old log-probs of the tokens of this step.

    Args:
        score: rows (as `lay_out`) -> the trainer's log-probs [B, T], `earlier_logp` kept.
    """
    samples = [sample for open_ in groups for sample in open_.group.samples]
    rows = lay_out(
        [open_.group.prompt for open_ in groups for _ in open_.group.samples],
        samples,
        [old for open_ in groups for old in open_.old_logp],
        row_tokens,
    )
    logp_BT = score(rows)
    logp = iter(
        logp_T[mask_T != 0]
        for logp_T, mask_T in zip(logp_BT, rows["mask"], strict=True)
    )
    return [
        dataclasses.replace(open_, old_logp=[next(logp) for _ in open_.group.samples])
        for open_ in groups
    ]


def to_json(groups: Sequence[OpenGroup]) -> list[dict[str, Any]]:
    """Groups as a checkpoint keeps them; float32 survives exactly."""

    def one(open_: OpenGroup) -> dict[str, Any]:
        group = open_.group
        return {
            "problem": open_.problem,
            "answer": open_.answer,
            "prompt": list(map(int, group.prompt)),
            "prompt_id": group.prompt_id,
            "key": jax.random.key_data(group.key).tolist(),
            "limit": group.limit,
            "samples": [
                {
                    "tokens": sample.tokens,
                    "logprobs": sample.logprobs.tolist(),
                    "finished": sample.finished,
                    "policy_steps": steps.tolist(),
                    "old_logp": old.tolist(),
                    "outcome": outcome and dataclasses.astuple(outcome),
                }
                for sample, steps, old, outcome in zip(
                    group.samples,
                    open_.policy_steps,
                    open_.old_logp,
                    open_.outcomes,
                    strict=True,
                )
            ],
        }

    return [one(open_) for open_ in groups]


def from_json(rows: Sequence[Mapping[str, Any]]) -> list[OpenGroup]:
    """What `to_json` wrote."""

    def one(row: Mapping[str, Any]) -> OpenGroup:
        found = row["samples"]
        key = jax.random.wrap_key_data(np.array(row["key"], np.uint32))
        samples = [
            sampler.Sample(x["tokens"], np.float32(x["logprobs"]), x["finished"])
            for x in found
        ]
        return OpenGroup(
            row["problem"],
            row["answer"],
            sampler.Group(row["prompt"], row["prompt_id"], key, row["limit"], samples),
            policy_steps=[np.array(x["policy_steps"], np.int32) for x in found],
            old_logp=[np.array(x["old_logp"], np.float32) for x in found],
            outcomes=[x["outcome"] and Outcome(*x["outcome"]) for x in found],
            carried=True,
        )

    return [one(row) for row in rows]


RECORDED = ("behaviour_logp", "earlier_logp")  # Of rows: no update reads them.


def mini_batches(
    rows: Mapping[str, np.ndarray],
    groups_B: np.ndarray,
    positive_B: np.ndarray,
    *,
    prompts: int,
    aggregation: losses.Aggregation,
) -> Iterator[dict[str, np.ndarray]]:
    """Splits rows into mini-batches of whole groups, and weighs their tokens.

    At most `prompts` groups each, as equal as can be: a short step gives fewer updates,
    never one of a few stray groups.

    Args:
        rows: [b, T] each, from `make_rows`, with old_logp.
        groups_B: the group of each row.
        positive_B: rows of full credit.

    Yields:
        What `steps.gppo_loss` reads: rows with weight and positive_weight.
    """
    groups = advantages.groups(groups_B)
    count = -(-len(groups) // prompts)
    for part in np.array_split(np.arange(len(groups)), count) if count else []:
        index = np.concatenate([groups[g] for g in part])
        mini = {name: x[index] for name, x in rows.items() if name not in RECORDED}
        mask_BT = mini.pop("mask")
        mini["weight"] = losses.token_weights(mask_BT, aggregation)
        mini["positive_weight"] = losses.token_weights(
            mask_BT * positive_B[index, None], aggregation
        )
        yield mini


def sample_metrics(
    rollout: Rollout, chosen: np.ndarray, full_credit: float, step: int
) -> dict[str, float]:
    """What the samples of a step look like, before and after the filter."""
    length_B = np.array([len(sample.tokens) for sample in rollout.samples])
    scored_B = np.isfinite(rollout.reward_B)
    correct_B = rollout.reward_B == full_credit
    status = [outcome.status for outcome in rollout.outcomes]
    groups = advantages.groups(rollout.group_B)
    return {
        "reward/mean": float(rollout.reward_B[scored_B].mean())
        if scored_B.any()
        else np.nan,
        "reward/correct": float(correct_B.mean()),
        "reward/any_correct": float(np.mean([correct_B[g].any() for g in groups])),
        "reward/groups_all_correct": float(
            np.mean([correct_B[g].all() for g in groups])
        ),
        "reward/timeouts": status.count("timeout"),
        "reward/deaths": status.count("died"),
        "reward/masked_errors": status.count("error"),
        "samples/generated": len(rollout),
        "samples/used": len(chosen),
        "samples/groups_used": len(np.unique(rollout.group_B[chosen])),
        "samples/tokens": int(length_B.sum()),
        # Drawn by the policy of an earlier step.
        "samples/tokens_carried": sum(
            int((steps != step).sum()) for steps in rollout.policy_steps
        ),
        "samples/length": float(length_B.mean()),
        "samples/length_max": int(length_B.max()),
        "samples/finished": float(
            np.mean([sample.finished for sample in rollout.samples])
        ),
    }


def sample_rows(
    rollout: Rollout, chosen: np.ndarray, rows: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    """The samples as they are written to rollouts/: one dict each.

    A sample that was not trained on has the advantage null; `rows` are those of the
    others, from `make_rows`.
    """
    first_B = rows["mask"].argmax(axis=1)  # A row's advantage stands on its response.
    advantage_B = rows["advantage"][np.arange(len(chosen)), first_B]
    advantage = dict(zip(chosen.tolist(), advantage_B.tolist(), strict=True))
    return [
        {
            "prompt": rollout.problems[b],
            "response": rollout.texts[b],
            "reward": outcome.score if np.isfinite(outcome.score) else None,
            "reward_status": outcome.status,
            "advantage": advantage.get(b),
            "group": int(rollout.group_B[b]),
            "finished": rollout.samples[b].finished,
            "num_tokens": len(rollout.samples[b].tokens),
            "policy_steps": sorted(set(rollout.policy_steps[b].tolist())),
            "logprob": float(np.sum(rollout.samples[b].logprobs)),
        }
        for b, outcome in enumerate(rollout.outcomes)
    ]
