"""A rollout batch -> advantages -> rows of the train step, and what is told of them.

Shape letters: B samples of a step, b of them chosen to train on, G groups, T tokens of a row
(prompt and response).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from klear_jax import advantages, losses, sampler
from klear_jax.rewards.routing import RewardConfig
from klear_jax.rollout import OpenGroup, Rollout, RolloutConfig

# Options of rewards that are values of a response, the best first.
VALUES = ("correct", "no_think_end", "wrong", "no_think_start")
RECORDED = ("behaviour_logp", "earlier_logp")  # Of rows: no update reads them.


def select(rollout: Rollout, config: RolloutConfig) -> tuple[np.ndarray, list[int]]:
    """Which samples to train on: the groups that teach something, up to `max_groups`, fresh
    ones before those that have waited.

    Samples that our own fault left without a reward are out before anything is compared,
    and so is a sample that this leaves without another to compare with. Then, if the config
    says so, those that were cut off at the limit; then whole groups, by the filters.

    Returns:
        The chosen samples [b] int, groups together; and the groups, as indices, that are as
        good but beyond `max_groups`.
    """
    use_B = np.isfinite(rollout.reward_B)
    if config.samples_per_prompt > 1:
        use_B &= np.bincount(rollout.group_B, use_B)[rollout.group_B] > 1
    if config.drop_unfinished:
        use_B &= np.array([sample.finished for sample in rollout.samples], bool)
    (use,) = np.nonzero(use_B)
    group_B, correct_B = rollout.group_B[use], rollout.correct_B[use]
    keep_B = np.ones(len(use), bool)
    if config.filter == "reward":
        keep_B = advantages.informative(rollout.reward_B[use], group_B)
    elif config.filter == "accuracy":
        keep_B = advantages.informative(correct_B, group_B)
    keep_B &= advantages.group_mean(correct_B, group_B) <= config.max_accuracy
    kept = use[keep_B]
    good = [kept[rows] for rows in advantages.groups(rollout.group_B[kept])]
    good.sort(key=lambda rows: rollout.group_of(rows[0]).waited)
    chosen, surplus = good[: config.max_groups], good[config.max_groups :]
    return (
        np.concatenate(chosen) if chosen else kept,
        [int(rollout.group_B[rows[0]]) for rows in surplus],
    )


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
        [rollout.group_of(b).group.prompt for b in chosen],
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


def score_groups(
    rollout: Rollout,
    chosen: np.ndarray,
    rows: dict[str, np.ndarray],
    waiting: Mapping[int, OpenGroup],
    going_on: Sequence[OpenGroup],
    score: Callable[[Mapping[str, np.ndarray]], np.ndarray],
    row_tokens: int,
) -> tuple[list[OpenGroup], list[OpenGroup]]:
    """Scores what a step has drawn, before its first update: the chosen `rows`, which get
    old_logp, and the groups that the next step will use.

    Args:
        waiting: groups of the rollout, by their index.
        score: rows (as `lay_out`) -> the policy's log-probs [B, T], `earlier_logp` kept.

    Returns:
        The groups of the rollout with the old log-probs of all that will be trained on, and
        those for the next step: waiting, then going on.
    """
    rows["old_logp"] = score(rows)
    old_logp = list(rollout.old_logp)
    for b, logp_T, mask_T in zip(chosen, rows["old_logp"], rows["mask"], strict=True):
        old_logp[b] = logp_T[mask_T != 0]
    later = score_open([*waiting.values(), *going_on], score, row_tokens)
    scored = dict(zip(waiting, later, strict=False))
    complete = []
    for g, open_ in enumerate(rollout.groups):
        mine = [old_logp[b] for b in np.flatnonzero(rollout.group_B == g)]
        mine = scored[g].old_logp if g in scored else mine
        complete.append(dataclasses.replace(open_, old_logp=mine))
    return complete, later


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


def logprob_gap(rows: dict[str, np.ndarray], temperature: float) -> dict[str, float]:
    """|trainer's - sampler's log-prob| of the sampled tokens: the two should be one. Nothing at
    a temperature other than 1, at which the sampler's are and the trainer's are not."""
    if temperature != 1:
        return {}
    gap = np.abs(rows["old_logp"] - rows["behaviour_logp"])[rows["mask"] != 0]
    return {
        "logprob_gap/mean": float(gap.mean()) if gap.size else 0.0,
        "logprob_gap/max": float(gap.max()) if gap.size else 0.0,
    }


def mini_batch_rows(groups_B: np.ndarray, prompts: int) -> list[np.ndarray]:
    """The rows of each mini-batch: whole groups, at most `prompts` of them, as equal in number
    as can be. A short step gives fewer updates, never one of a few stray groups.

    Args:
        groups_B: the group of each row.
    """
    groups = advantages.groups(groups_B)
    count = -(-len(groups) // prompts)
    parts = np.array_split(np.arange(len(groups)), count) if count else []
    return [np.concatenate([groups[g] for g in part]) for part in parts]


def mini_batches(
    rows: Mapping[str, np.ndarray],
    groups_B: np.ndarray,
    positive_B: np.ndarray,
    parts: Sequence[np.ndarray],
    *,
    aggregation: losses.Aggregation,
    norm_tokens: int,
) -> Iterator[dict[str, np.ndarray]]:
    """The mini-batches, their tokens weighed.

    Args:
        rows: [b, T] each, from `make_rows`, with old_logp.
        groups_B: the group of each row.
        positive_B: rows of full credit.
        parts: the rows of each, from `mini_batch_rows`.
        aggregation, norm_tokens: see `losses.token_weights`.

    Yields:
        What `steps.gppo_loss` reads: rows with weight and positive_weight.
    """
    for index in parts:
        mini = {name: x[index] for name, x in rows.items() if name not in RECORDED}
        mask_BT = mini.pop("mask")
        weigh = functools.partial(
            losses.token_weights,
            aggregation=aggregation,
            groups_B=groups_B[index],
            norm_tokens=norm_tokens,
        )
        mini["weight"] = weigh(mask_BT)
        mini["positive_weight"] = weigh(mask_BT * positive_B[index, None])
        yield mini


@dataclasses.dataclass(frozen=True)
class Places:
    """Where `pack` put each sample."""

    row_B: np.ndarray
    start_B: np.ndarray
    length_B: np.ndarray
    segment_B: np.ndarray  # Its number in its row, from 1.


def place(segment_ids_BT: np.ndarray) -> Places:
    """Where `pack` puts samples that stand a row each: the longest first, each into the first
    row that has room. Every device computes as many rows as the others, so full rows are all
    that there is to balance."""
    length_B = np.count_nonzero(segment_ids_BT, axis=1)
    row_B, start_B, segment_B = (np.zeros(len(length_B), int) for _ in range(3))
    used_R, count_R = (np.zeros(len(length_B), int) for _ in range(2))
    for b in np.argsort(-length_B, kind="stable"):
        row = np.argmax(used_R + length_B[b] <= segment_ids_BT.shape[1])
        row_B[b], start_B[b], segment_B[b] = row, used_R[row], count_R[row] + 1
        used_R[row] += length_B[b]
        count_R[row] += 1
    return Places(row_B, start_B, length_B, segment_B)


def pack(rows: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], Places]:
    """Moves samples together: several a row, as segments that do not see each other.

    Args:
        rows: a sample a row, from its left end, with segment_ids; [B, T] each.

    Returns:
        The same arrays [R, T], R at most B, and where the samples are, from `place`.
    """
    places = place(rows["segment_ids"])
    num_rows, T = places.row_B.max(initial=-1) + 1, rows["segment_ids"].shape[1]
    packed = {name: np.zeros((num_rows, T), x.dtype) for name, x in rows.items()}
    for name, x_BT in rows.items():
        if name == "segment_ids":
            x_BT = x_BT * places.segment_B[:, None]
        for b, (row, start, end) in enumerate(_spans(places)):
            packed[name][row, start:end] = x_BT[b, : end - start]
    return packed, places


def unpack(x_RT: np.ndarray, places: Places) -> np.ndarray:
    """Of packed rows, the samples one a row again, [B, T]; 0 where there is no token."""
    x_BT = np.zeros((len(places.row_B), x_RT.shape[1]), x_RT.dtype)
    for b, (row, start, end) in enumerate(_spans(places)):
        x_BT[b, : end - start] = x_RT[row, start:end]
    return x_BT


def log_ratios(
    segment_ids_BT: np.ndarray,
    parts: Sequence[np.ndarray],
    updates: Sequence[np.ndarray],
) -> np.ndarray:
    """The log-ratio of each token when it was learnt from, [b, T] float32; 0 elsewhere.

    Args:
        segment_ids_BT: of the rows, a sample each.
        parts: the rows of each mini-batch.
        updates: `log_ratio` of each update, [M, B, T], of those rows packed.
    """
    B, T = segment_ids_BT.shape
    x_BT = np.zeros((B, T), np.float32)
    for index, x_MBT in zip(parts, updates, strict=True):
        x_RT = x_MBT.reshape(-1, T)
        x_BT[index] = unpack(x_RT, place(segment_ids_BT[index]))
    return x_BT


def _spans(places: Places) -> Iterator[tuple[int, int, int]]:
    """Row, start and end of each sample."""
    ends = places.start_B + places.length_B
    return zip(places.row_B, places.start_B, ends, strict=True)


def sample_metrics(
    rollout: Rollout,
    chosen: np.ndarray,
    rewards: RewardConfig,
    step: int,
) -> dict[str, float]:
    """What the samples of a step look like, before and after the filters: of the groups
    that the step has completed, without those that waited from the last one."""
    new = [b for b in range(len(rollout)) if not rollout.group_of(b).waited]
    samples = [rollout.samples[b] for b in new]
    outcomes = [rollout.outcomes[b] for b in new]
    reward_B, correct_B = rollout.reward_B[new], rollout.correct_B[new]
    length_B = np.array([len(sample.tokens) for sample in samples])
    finished_B = np.array([sample.finished for sample in samples])
    status = [outcome.status for outcome in outcomes]
    scored_B = np.isfinite(reward_B)
    groups = advantages.groups(rollout.group_B[new])
    correct_G = np.array([correct_B[rows].sum() for rows in groups])
    histogram = np.bincount(correct_G, minlength=len(groups[0]) + 1) / len(groups)
    return {
        "reward/mean": _mean(reward_B[scored_B]),
        "reward/mean_used": _mean(rollout.reward_B[chosen]),
        "reward/correct": _mean(correct_B[scored_B]),
        "reward/any_correct": _mean(correct_G > 0),
        "reward/groups_equal": _mean(
            [len(set(reward_B[rows][scored_B[rows]])) <= 1 for rows in groups]
        ),
        # Shares of groups by how many of their samples are right.
        **{
            f"reward/groups_with_{n}_correct": float(x) for n, x in enumerate(histogram)
        },
        **_reward_parts(rollout, new, rewards),
        "reward/overlong_penalty": _mean(rollout.penalty_B[new]),
        "reward/timeouts": status.count("timeout"),
        "reward/deaths": status.count("died"),
        "reward/masked_errors": status.count("error"),
        "reward/masked_late": status.count("late"),
        "samples/generated": len(new),
        "samples/used": len(chosen),
        "samples/groups_used": len(np.unique(rollout.group_B[chosen])),
        "samples/tokens": int(length_B.sum()),
        # Drawn by the policy of an earlier step.
        "samples/tokens_carried": sum(
            int((rollout.policy_steps[b] != step).sum()) for b in new
        ),
        "samples/length": _mean(length_B),
        "samples/length_correct": _mean(length_B[correct_B]),
        "samples/length_wrong": _mean(length_B[~correct_B]),
        **{
            f"samples/length_p{p}": float(np.percentile(length_B, p))
            for p in (10, 50, 90)
        },
        "samples/length_max": int(length_B.max()),
        "samples/truncated": _mean(~finished_B),
    }


def _mean(x: np.ndarray | Sequence[bool]) -> float:
    return float(np.mean(x)) if len(x) else np.nan


def _reward_parts(
    rollout: Rollout, new: Sequence[int], rewards: RewardConfig
) -> dict[str, float]:
    """Which share of the new samples got which of the values that the config names, which
    lack a tag (and got the value for it), which got another value, as a program that passes
    some of its tests, and which none, by our fault ('masked')."""
    parts = dict.fromkeys((*VALUES, "other", "masked"), 0.0)
    for b in new:
        kind = rewards.kinds[rewards.kind_of(rollout.group_of(b).source)]
        score, text = rollout.outcomes[b].score, rollout.texts[b]
        has = {
            "correct": True,
            "wrong": True,
            "no_think_end": "</think>" not in text,
            "no_think_start": "</think>" in text and "<think>" not in text,
        }
        names = [n for n in VALUES if has[n] and kind.options.get(n) == score]
        name = [*names, "other"][0] if np.isfinite(score) else "masked"
        parts[name] += 1 / len(new)
    return {f"reward_part/{name}": share for name, share in parts.items()}


def sample_rows(
    rollout: Rollout,
    chosen: np.ndarray,
    rows: Mapping[str, np.ndarray],
    waiting: Container[int],
    token_groups: int,
) -> list[dict[str, Any]]:
    """The samples as they are written to rollouts/: one dict each.

    A sample that was not trained on has the advantage null; `rows` are those of the
    others, from `make_rows`, with old_logp and log_ratio. Those of `token_groups` groups among
    them have their tokens, too: from the first to the last, evenly, for in the first
    mini-batch nothing was learnt yet. Groups that wait for the next step are written then.
    """
    first_B = rows["mask"].argmax(axis=1)  # A row's advantage stands on its response.
    advantage_B = rows["advantage"][np.arange(len(chosen)), first_B]
    advantage = dict(zip(chosen.tolist(), advantage_B.tolist(), strict=True))
    used = list(dict.fromkeys(rollout.group_B[chosen].tolist()))
    places = np.linspace(0, len(used) - 1, min(token_groups, len(used)))
    with_tokens = {used[round(place)] for place in places}
    of_tokens = {
        int(b): _token_columns({name: x_BT[row] for name, x_BT in rows.items()})
        for row, b in enumerate(chosen)
        if rollout.group_B[b] in with_tokens
    }
    return [
        {
            "prompt_id": rollout.group_of(b).group.prompt_id,
            "prompt": rollout.group_of(b).problem,
            "source": rollout.group_of(b).source,
            "response": rollout.texts[b],
            "reward": float(reward) if np.isfinite(reward) else None,
            "reward_status": outcome.status,
            "reward_detail": outcome.detail,
            "advantage": advantage.get(b),
            "group": int(rollout.group_B[b]),
            "finished": rollout.samples[b].finished,
            "num_tokens": len(rollout.samples[b].tokens),
            "policy_steps": sorted(set(rollout.policy_steps[b].tolist())),
            "logprob": float(np.sum(rollout.samples[b].logprobs)),
            **of_tokens.get(b, {}),
        }
        for b, (outcome, reward) in enumerate(
            zip(rollout.outcomes, rollout.reward_B, strict=True)
        )
        if rollout.group_B[b] not in waiting
    ]


def _token_columns(row: Mapping[str, np.ndarray]) -> dict[str, list[Any]]:
    """Of one row: the response's tokens, their old log-probs, and their log-ratios when they
    were learnt from, nats to four digits, None for what is no number."""
    real_T = row["mask"] != 0
    return {
        "tokens": row["tokens"][real_T].tolist(),
        **{
            name: [
                round(x, 4) if math.isfinite(x) else None
                for x in row[name][real_T].tolist()
            ]
            for name in ("old_logp", "log_ratio")
        },
    }
