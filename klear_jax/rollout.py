"""Prompts -> samples -> rewards -> advantages -> rows of a batch.

Shape letters: B samples of a step, T tokens of a row (prompt and response).
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from klear_jax import advantages, losses, qwen3, sampler
from klear_jax.errors import InputError
from klear_jax.rewards.pool import Outcome, Pool, find_reward
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
    num_slots: int  # Sequences decoded at once.
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
            "num_slots",
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
        sampler.Sampling(self.temperature, self.top_p, self.top_k)

    def sampling(self) -> dict[str, Any]:
        """The keyword arguments of `collect`."""
        names = ("max_new_tokens", "temperature", "top_p", "top_k", "num_slots")
        arguments = {name: getattr(self, name) for name in (*names, "stop_strings")}
        return arguments | {"num_samples": self.samples_per_prompt}

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
class Rollout:
    """The samples of one step with their rewards; lists and arrays are B long."""

    problems: list[str]
    prompts: list[list[int]]  # Token ids.
    samples: list[sampler.Sample]
    texts: list[str]  # Responses, decoded.
    outcomes: list[Outcome]
    reward_B: np.ndarray  # float32; nan where scoring failed by our fault.
    group_B: np.ndarray  # The prompt of each sample, 0, 1, ...

    def __len__(self) -> int:
        return len(self.samples)


def collect(
    params: qwen3.Params,
    model: qwen3.Config,
    prompts: Mapping[str, Sequence[Any]],
    tokenizer: Tokenizer,
    pool: Pool,
    rewards: RewardConfig,
    *,
    num_samples: int,
    key: jax.Array,
    stop_strings: Sequence[str],
    **sampling: Any,
) -> Rollout:
    """Samples responses and scores each while later ones are still being decoded.

    Args:
        prompts: tokens, prompt_ids, answers, problems, one entry a prompt each.
        num_samples: responses to each prompt.
        key: of this step's randomness.
        stop_strings: text that ends a response, beside the tokenizer's stop ids.
        sampling: keyword arguments of `sampler.generate`.
    """
    n = num_samples
    count = len(prompts["tokens"]) * n
    samples, texts, futures = [None] * count, [""] * count, [None] * count

    def score(wave):
        for i, j, sample in wave:
            b = i * n + j
            samples[b] = cut(sample, tokenizer, stop_strings)
            texts[b] = tokenizer.decode(samples[b].tokens)
            futures[b] = pool.submit(
                rewards.kind, texts[b], prompts["answers"][i], **rewards.options
            )

    sampler.generate(
        params,
        model,
        prompts["tokens"],
        num_samples=n,
        stop_ids=tokenizer.stop_ids,
        seed=key,
        prompt_ids=prompts["prompt_ids"],
        on_wave=score,
        **sampling,
    )
    outcomes = [future.result() for future in futures]
    group_B = np.repeat(np.arange(len(prompts["tokens"])), n)
    return Rollout(
        problems=[prompts["problems"][g] for g in group_B],
        prompts=[prompts["tokens"][g] for g in group_B],
        samples=samples,
        texts=texts,
        outcomes=outcomes,
        reward_B=np.array([outcome.score for outcome in outcomes], np.float32),
        group_B=group_B,
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


def make_rows(
    rollout: Rollout, chosen: np.ndarray, config: RolloutConfig
) -> dict[str, np.ndarray]:
    """One row [T] a chosen sample: its prompt, its response, padding.

    Returns:
        tokens, positions, segment_ids, mask (1 on the response), advantage,
        behaviour_logp (the sampler's log-probs): each [b, T].
    """
    B, T = len(chosen), config.row_tokens
    tokens_BT, mask_BT = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    segment_ids_BT = np.zeros((B, T), np.int32)
    behaviour_logp_BT = np.zeros((B, T), np.float32)
    for row, b in enumerate(chosen):
        prompt, sample = rollout.prompts[b], rollout.samples[b]
        end = len(prompt) + len(sample.tokens)
        tokens_BT[row, :end] = prompt + sample.tokens
        segment_ids_BT[row, :end] = 1
        mask_BT[row, len(prompt) : end] = 1
        behaviour_logp_BT[row, len(prompt) : end] = sample.logprobs
    advantage_B = advantages.group_relative(
        rollout.reward_B[chosen],
        rollout.group_B[chosen],
        normalize_std=config.normalize_std,
    )
    return {
        "tokens": tokens_BT,
        "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
        "segment_ids": segment_ids_BT,
        "mask": mask_BT,
        "advantage": np.where(mask_BT, advantage_B[:, None], np.float32(0)),
        "behaviour_logp": behaviour_logp_BT,
    }


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
        mini = {name: x[index] for name, x in rows.items()}
        mask_BT = mini.pop("mask")
        mini["weight"] = losses.token_weights(mask_BT, aggregation)
        mini["positive_weight"] = losses.token_weights(
            mask_BT * positive_B[index, None], aggregation
        )
        del mini["behaviour_logp"]
        yield mini


def sample_metrics(
    rollout: Rollout, chosen: np.ndarray, full_credit: float
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
            "logprob": float(np.sum(rollout.samples[b].logprobs)),
        }
        for b, outcome in enumerate(rollout.outcomes)
    ]
