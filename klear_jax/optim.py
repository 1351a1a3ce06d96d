"""AdamW and its learning rate; the configs say where each number is from."""

import dataclasses
import logging
import math

import optax

from klear_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with decoupled weight decay on all parameters, after a global-norm clip.

    The schedule counts steps of the loop: optimizer updates in SFT, rollout batches in
    GPPO (all mini-batches of a rollout batch have one rate).
    """

    peak_lr: float
    end_lr: float  # Reached at the last step; equal to peak_lr: constant.
    decay: str  # 'cosine' or 'linear', from decay_start to the last step.
    decay_start: float  # Share of the steps after which the decay begins, 0 to 1.
    warmup_steps: int  # Linear, from warmup_from x peak_lr.
    warmup_from: float
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float  # Of the whole gradient.

    def __post_init__(self):
        if self.decay not in ("cosine", "linear"):
            raise InputError(
                f"optim.decay must be 'cosine' or 'linear', not {self.decay!r}"
            )
        for name in ("peak_lr", "eps", "clip_norm"):
            if not getattr(self, name) > 0:
                raise InputError(
                    f"optim.{name} must be positive, not {getattr(self, name)}"
                )
        for name in ("end_lr", "warmup_steps", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise InputError(
                    f"optim.{name} must not be negative: {getattr(self, name)}"
                )
        for name in ("warmup_from", "decay_start"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(
                    f"optim.{name} must be in [0, 1], not {getattr(self, name)}"
                )
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(
                    f"optim.{name} must be in [0, 1), not {getattr(self, name)}"
                )


def optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Gradients -> updates for a learning rate of 1: the step multiplies by -lr."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay),
    )


def check_warm_up(config: OptimConfig, num_steps: int) -> None:
    """Warns of a run that ends before its learning rate has risen."""
    if config.warmup_steps >= num_steps:
        logging.getLogger(__name__).warning(
            "optim.warmup_steps=%d of a run of %d steps: the learning rate rises to its end, and "
            "never reaches optim.peak_lr",
            config.warmup_steps,
            num_steps,
        )


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """The rate of step 0 .. num_steps - 1; it reaches end_lr at the last one, unless no
    step is left after warm-up and decay_start."""
    if step < config.warmup_steps:
        share = (
            config.warmup_from + (1 - config.warmup_from) * step / config.warmup_steps
        )
        return config.peak_lr * share
    start = max(config.warmup_steps, config.decay_start * num_steps)
    span = num_steps - 1 - start
    done = min(max((step - start) / span, 0.0), 1.0) if span > 0 else 0.0
    if config.decay == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return config.peak_lr + (config.end_lr - config.peak_lr) * done
