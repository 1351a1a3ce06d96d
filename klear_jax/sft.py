"""Supervised fine-tuning on written-out chains of thought.

data -> packed rows -> train step -> metrics, checkpoint. The loss is the token mean over
the whole global batch.
"""

import dataclasses
import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from klear_jax import (
    checkpoint,
    evaluate,
    guards,
    hosts,
    losses,
    optim,
    preemption,
    progress,
    qwen3,
    roofline,
    sampler,
    speed,
    steps,
    tokens,
)
from klear_jax.data.batches import (
    Samples,
    SftBatches,
    packed_fill,
    read_samples,
    sft_batches,
)
from klear_jax.errors import InputError
from klear_jax.metrics import Writer, check_wandb
from klear_jax.rewards import routing
from klear_jax.rewards.pool import Pool
from klear_jax.sharding import Layout, MeshConfig, make_mesh


@dataclasses.dataclass(frozen=True)
class DataConfig:
    path: str  # A TFDS version folder, parquet or JSON lines; several with commas.
    split: str
    weights: Mapping[str, float]  # Source -> how often an epoch goes through it.
    row_tokens: int
    pack: bool  # Several samples a row, as segments that do not see each other.
    too_long: Literal["error", "drop"]  # A sample longer than a row; drops are counted.
    streams: int  # The samples are dealt to so many, each packed by itself.
    prefetch: int  # Batches that a thread makes ahead.

    def __post_init__(self):
        if not all(0 < weight < math.inf for weight in self.weights.values()):
            raise InputError("data.weights must be positive")
        if self.prefetch < 0:
            raise InputError("data.prefetch must not be negative")


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """The loss on samples that are not trained on, during training."""

    split: str  # Of data.path; '': none.
    every: int  # Steps.
    batches: int  # The first ones, as many rows each as those of training.

    def __post_init__(self):
        if self.split and (self.every < 1 or self.batches < 1):
            raise InputError(
                "validation.every and validation.batches must be at least 1"
            )

    def due(self, steps_done: int) -> bool:
        return bool(self.split) and steps_done % self.every == 0


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """One SFT run. Every key is explained where it is set, in configs/."""

    seed: int
    workdir: str
    wandb: str  # A project of Weights & Biases; '': none.
    init_from: str
    tokenizer: str
    model: qwen3.Config
    dtype: str
    remat: str  # A key of `qwen3.REMAT`.
    mesh: MeshConfig
    data: DataConfig
    batch_rows: int
    micro_rows: int
    num_steps: int  # 0: as many as num_epochs take.
    num_epochs: float
    optim: optim.OptimConfig
    sampler: sampler.Engine
    rewards: routing.RewardConfig
    validation: ValidationConfig
    evaluation: evaluate.EvaluationConfig
    checkpoint: checkpoint.CheckpointConfig
    guards: guards.GuardConfig

    def __post_init__(self):
        qwen3.check_remat(self.remat)
        check_wandb(self.wandb)
        if self.batch_rows < 1 or self.micro_rows < 1:
            raise InputError("batch_rows and micro_rows must be at least 1")
        low, high = sorted((self.num_steps, self.num_epochs))
        if not low == 0 < high:
            raise InputError("set one of num_steps and num_epochs, the other to 0")
        if self.batch_rows % self.micro_rows:
            raise InputError(
                f"batch_rows={self.batch_rows} must be a multiple of micro_rows={self.micro_rows}"
            )
        if self.data.streams < 1 or self.micro_rows % self.data.streams:
            raise InputError(
                f"micro_rows={self.micro_rows} must be a multiple of "
                f"data.streams={self.data.streams}"
            )


def train_step(config: SftConfig, layout: Layout) -> steps.TrainStep:
    """The update with loss and optimizer bound: pure, not yet compiled."""
    return functools.partial(
        steps.train_step,
        loss_fn=_loss(config, layout),
        tx=optim.optimizer(config.optim),
    )


def loss_step(config: SftConfig, layout: Layout) -> Callable[..., steps.Metrics]:
    """The loss alone, for validation: pure, not yet compiled."""
    return functools.partial(steps.loss_step, loss_fn=_loss(config, layout))


def _loss(config: SftConfig, layout: Layout) -> steps.LossFn:
    return functools.partial(
        steps.lm_loss,
        config=config.model,
        layout=layout,
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
    )


def run(config: SftConfig, profile: tuple[int, int] | None = None) -> None:
    """Trains to the last step, from where the workdir's newest checkpoint stands.

    Args:
        profile: the first and the last of the steps to write a profile of.

    Raises:
        preemption.Preempted: the run was told to end, and has saved how far it came.
    """
    with (
        preemption.watch(config.checkpoint.grace_s),
        routing.make_pool(config.rewards) as pool,
    ):
        inputs = read_inputs(config, pool)
        checkpoint.open_workdir(config, inputs.tokenizer)  # All input was found good.
        train(config, inputs, pool, progress.Trace(config.workdir, profile))


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a run reads, found good before it does any work."""

    layout: Layout
    tokenizer: tokens.Tokenizer
    data: SftBatches
    num_steps: int
    validation: list[dict[str, np.ndarray]]  # Batches.
    problems: Mapping[str, Sequence[Any]]  # To evaluate on.


def read_inputs(config: SftConfig, pool: Pool) -> Inputs:
    """Reads all that the config names; an InputError for what cannot serve the run."""
    layout = Layout(make_mesh(config.mesh), config.mesh.rules)
    steps.check_micro_rows(config.micro_rows, layout)
    sampler.check_engine(config.sampler, layout, config.evaluation.row_tokens)
    tokenizer = tokens.load(config.tokenizer)
    tokens.check_fits(tokenizer, config.model.vocab_size)
    sources = _read(config.data, config.data.split, tokenizer)
    epoch_steps = steps_of_epoch(config, sources)
    num_steps = config.num_steps or max(1, round(config.num_epochs * epoch_steps))
    optim.check_warm_up(config.optim, num_steps)
    data = sft_batches(
        sources,
        row_tokens=config.data.row_tokens,
        rows_per_batch=config.batch_rows,
        seed=config.seed,
        pack=config.data.pack,
        num_streams=config.data.streams,
        my_rows=steps.my_rows(config.batch_rows, config.micro_rows, layout),
        prefetch=config.data.prefetch,
    )
    if hosts.first():
        _log_data(sources, num_steps, epoch_steps)
    problems = evaluate.problems_of_training(config, tokenizer, pool)
    validation = _validation_batches(config, tokenizer)
    return Inputs(layout, tokenizer, data, num_steps, validation, problems)


def _read(data: DataConfig, split: str, tokenizer: tokens.Tokenizer) -> list[Samples]:
    return read_samples(
        data.path,
        split,
        tokenizer,
        row_tokens=data.row_tokens,
        too_long=data.too_long,
        weights=data.weights,
    )


def steps_of_epoch(config: SftConfig, sources: Sequence[Samples]) -> float:
    """Updates of a pass through the data, where rows are as full as `packed_fill` says."""
    tokens = sum(one.weight * one.num_tokens for one in sources)
    fill = packed_fill(sources, config.data.row_tokens, pack=config.data.pack)
    return tokens / (config.batch_rows * config.data.row_tokens * fill)


def _log_data(sources: Sequence[Samples], num_steps: int, epoch_steps: float) -> None:
    logger = logging.getLogger(__name__)
    for one in sources:
        logger.info(
            "source %s: %d samples, %d tokens, %s times an epoch; %d samples are longer than"
            " a row and left out",
            one.name or "(without name)",
            len(one.rows),
            one.num_tokens,
            one.weight,
            one.num_dropped,
        )
    logger.info("%d steps are %.2f epochs", num_steps, num_steps / epoch_steps)


def _validation_batches(
    config: SftConfig, tokenizer: tokens.Tokenizer
) -> list[dict[str, np.ndarray]]:
    """All processes have all of them: they are few."""
    if not config.validation.split:
        return []
    held_out = sft_batches(
        _read(config.data, config.validation.split, tokenizer),
        row_tokens=config.data.row_tokens,
        rows_per_batch=config.batch_rows,
        seed=config.seed,
        shuffle=False,
        num_epochs=1,
        pack=config.data.pack,
    )
    return list(itertools.islice(held_out.iterator, config.validation.batches))


def train(config: SftConfig, inputs: Inputs, pool: Pool, trace: progress.Trace) -> None:
    """The loop."""
    layout, data = inputs.layout, inputs.data
    num_micro = config.batch_rows // config.micro_rows
    with (
        checkpoint.only_run(config.workdir),
        checkpoint.Checkpoints(
            config.workdir, config.checkpoint, config
        ) as checkpoints,
        Writer(
            config.workdir,
            next_step=checkpoints.steps_done,
            wandb=config.wandb,
            about=dataclasses.asdict(config),
        ) as writer,
        progress.Progress(
            "SFT", checkpoints.steps_done, inputs.num_steps, trace
        ) as shown,
    ):
        shown.tell("loading, and compiling")
        state, shardings = checkpoint.train_state(
            checkpoints,
            data.iterator,
            init_from=config.init_from,
            config=config.model,
            key=jax.random.key(config.seed),
            tx=optim.optimizer(config.optim),
            layout=layout,
        )
        update = steps.compile_train_step(train_step(config, layout), layout, shardings)
        validate = steps.compile_score_step(
            loss_step(config, layout), layout, shardings.params
        )
        weigh = jax.jit(
            losses.token_mean_weights, out_shardings=steps.batch_sharding(layout)
        )
        unread: list[tuple[int, Any, dict[str, float], steps.Metrics]] = []
        # What is known of the step under way, once its update is done. A checkpoint has it
        # if the run was cut off in an evaluation.
        values: dict[str, float] | None = checkpoints.under_way()

        def on_device(rows):
            batch = steps.micro_batches(rows, config.micro_rows, num_micro, layout)
            batch["weight"] = weigh(batch.pop("mask"))
            return batch

        def read_oldest():
            read_step, rows, about, found = unread.pop(0)
            values = summarise(jax.device_get(found), rows["tokens"].size) | about
            good = guards.finite(
                config.guards, [values], rows, config.workdir, read_step
            )
            return read_step, values | {"updates_skipped": 1 - len(good)}

        def write(step, values):
            values = values | shown.lap() | speed.memory()
            values |= speed.of_update(
                roofline.model_of(config, layout),
                values["tokens"],
                values["samples"],
                values["seconds/step"],
            )
            writer.write(step, values)
            guards.check(config.guards, values, step)
            shown.result(loss=values["loss"])

        try:
            for step in shown.steps():
                if values is None:
                    preemption.check()
                    with shown.phase("data"):
                        rows = next(data.iterator)
                        batch = on_device(rows)
                    rate = optim.learning_rate(config.optim, step, inputs.num_steps)
                    epoch = data.iterator.num_samples / data.num_samples
                    state, found = update(state, batch, num_micro, rate)
                    about = {"learning_rate": rate, "epoch": epoch}
                    unread.append((step, rows, about, found))
                validates = config.validation.due(step + 1)
                evaluates = config.evaluation.due(step + 1)
                saves = checkpoints.due(step + 1) or step + 1 == inputs.num_steps
                # Metrics are read one step late, so that the device never waits for the host.
                while len(unread) > 1:
                    write(*read_oldest())
                if unread and (validates or evaluates or saves):
                    _, values = read_oldest()
                if validates:
                    with shown.phase("validate"):
                        values = (values or {}) | mean_loss(
                            validate(state.params, on_device(rows), num_micro)
                            for rows in inputs.validation
                        )
                if evaluates:
                    with shown.phase("evaluate"):
                        values = (values or {}) | evaluate.during_training(
                            state.params,
                            inputs.problems,
                            inputs.tokenizer,
                            pool,
                            config,
                            layout,
                            shown.tell,
                        )
                if values is not None:
                    write(step, values)
                    writer.publish()  # First: what a checkpoint holds is not written again.
                if saves:
                    checkpoints.save(
                        step + 1,
                        state,
                        data.iterator,
                        under_way=None,
                        metrics=values or {},
                    )
                values = None
        except preemption.Preempted:
            while unread:
                write(*read_oldest())
            writer.publish()
            checkpoints.save_preempted(
                step, state, data.iterator, values, begun=values is not None
            )
            raise


def mean_loss(batches: Iterable[steps.Metrics]) -> dict[str, float]:
    """The token means over validation batches, ready to be written."""
    found = jax.device_get(list(batches))
    tokens = sum(one["tokens"] for one in found)
    return {
        "validation/loss": float(
            sum(one["loss"] * one["tokens"] for one in found) / tokens
        ),
        "validation/likely": float(sum(one["tokens_likely"] for one in found) / tokens),
        "validation/tokens": int(tokens),
    }


def summarise(found: dict[str, np.ndarray], room: int) -> dict[str, float]:
    """The metrics of one update, with room for so many tokens, ready to be written."""
    return {
        **{
            name: float(found[name])
            for name in ("loss", "grad_norm", "update_norm", "param_norm")
        },
        "likely": float(found["tokens_likely"] / found["tokens"]),
        "tokens": int(found["tokens_real"]),
        "tokens_trained": int(found["tokens"]),
        "samples": int(found["samples"]),
        "row_fill": float(found["tokens_real"] / room),
    }
