"""Watching over a run for what goes wrong in silence: thresholds on the metrics of a step."""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from klear_jax import hosts
from klear_jax.errors import InputError, Stopped

ON_NOT_FINITE = ("stop", "skip")


@dataclasses.dataclass(frozen=True)
class Guard:
    metric: str
    above: bool  # Whether it is too much that is bad, or too little.
    advice: str

    def broken(self, value: float, limit: float) -> bool:
        """Whether the metric is beyond its limit; nan is not."""
        return value > limit if self.above else value < limit


GUARDS = {
    "logprob_gap": Guard(
        "logprob_gap/mean",
        True,
        "sampler and trainer do not compute the same; compare dtype, temperature and the "
        "weights of both, and try loss.old_logp='trainer'",
    ),
    "first_ratio": Guard(
        "ratio_first/spread",
        True,
        "the policy is not the old one when a step begins, though nothing was learnt since; "
        "look at logprob_gap and whether old log-probs are those of the same weights",
    ),
    "entropy": Guard(
        "entropy",
        False,
        "the policy hardly explores any more; look at clip/high and grad_mass/low, at "
        "loss.kind, loss.clip_high, loss.beta_low of 'gppo', and optim.peak_lr",
    ),
    "equal_rewards": Guard(
        "reward/groups_equal",
        True,
        "hardly a group teaches anything; look at samples in rollouts/, reward_part/* and "
        "reward/groups_with_*: the reward fails, or prompts are too easy or too hard",
    ),
    "truncated": Guard(
        "samples/truncated",
        True,
        "responses are cut off before they end; raise rollout.max_new_tokens, or look at "
        "samples in rollouts/: they may repeat themselves, or never say a stop token",
    ),
    "grad_norm": Guard(
        "grad_norm",
        True,
        "lower optim.peak_lr, or look at the samples of this step",
    ),
}


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    not_finite: (
        str  # What an update of nan or infinite loss or gradient does: 'stop', 'skip'.
    )
    limits: Mapping[str, float]  # Of `GUARDS`; what is not named is not watched.
    stop: tuple[str, ...]  # Those of them that end the run; the others warn.

    def __post_init__(self):
        if self.not_finite not in ON_NOT_FINITE:
            raise InputError(
                f"guards.not_finite must be one of {ON_NOT_FINITE}, not {self.not_finite!r}"
            )
        for name in self.limits:
            if name not in GUARDS:
                raise InputError(
                    f"guards.limits.{name} is no guard; there are {sorted(GUARDS)}"
                )
        for name in self.stop:
            if name not in self.limits:
                raise InputError(f"guards.stop names {name!r}, which has no limit")


def check(config: GuardConfig, values: Mapping[str, float], step: int) -> None:
    """Warns of each metric of the step that is beyond its limit.

    Raises:
        Stopped: `config.stop` names one of them.
    """
    for name, limit in config.limits.items():
        guard = GUARDS[name]
        value = values.get(guard.metric, math.nan)
        if not guard.broken(value, limit):
            continue
        sentence = (
            f"step {step}: {guard.metric} is {value:.4g}, "
            f"{'above' if guard.above else 'below'} guards.limits.{name}={limit:g}: "
            f"{guard.advice}"
        )
        if name in config.stop:
            raise Stopped(sentence)
        logging.getLogger(__name__).warning(sentence)


def finite(
    config: GuardConfig,
    updates: Sequence[Mapping[str, Any]],
    batch: Mapping[str, Any],
    workdir: str | epath.Path,
    step: int,
) -> list[Mapping[str, Any]]:
    """The updates whose loss and gradient are numbers; the others have changed nothing. The
    batch is saved, unless one is already.

    Args:
        updates: metrics of each, with `loss` and `grad_norm`.
        batch: the rows that this process saves.

    Raises:
        Stopped: there are others, and `config.not_finite` is 'stop'.
    """
    bad = [x for x in updates if not np.isfinite(x["loss"] + x["grad_norm"])]
    if not bad:
        return list(updates)
    process = f"_process_{hosts.index()}" if hosts.count() > 1 else ""
    path = epath.Path(workdir) / f"not_finite_step_{step:06d}{process}.npz"
    saved = sorted(path.parent.glob(f"not_finite_step_*{process}.npz"))
    if not saved:
        with path.open("wb") as file:
            np.savez(file, **batch)
    where = f"is in {path}" if saved in ([], [path]) else f"is not saved: {saved[0]} is"
    sentence = (
        f"step {step}: loss {bad[0]['loss']}, gradient norm {bad[0]['grad_norm']}; the batch "
        f"{where}"
    )
    if config.not_finite == "stop":
        raise Stopped(f"{sentence}; the last checkpoint is from before it")
    logging.getLogger(__name__).warning("%s; the update is skipped", sentence)
    return [x for x in updates if np.isfinite(x["loss"] + x["grad_norm"])]
