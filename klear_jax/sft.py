"""Supervised fine-tuning on written-out chains of thought.

data -> packed rows -> train step -> metrics, checkpoint. The loss is the token mean over
the whole global batch.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from klear_jax import (
    checkpoint,
    evaluate,
    hosts,
    losses,
    optim,
    qwen3,
    sampler,
    steps,
    tokens,
)
from klear_jax.data.batches import SftBatches, sft_batches
from klear_jax.data.examples import read_examples
from klear_jax.errors import InputError
from klear_jax.metrics import Stopwatch, Writer, require_finite
from klear_jax.rewards import routing
from klear_jax.rewards.pool import Pool
from klear_jax.sharding import Layout, MeshConfig, make_mesh


@dataclasses.dataclass(frozen=True)
class DataConfig:
    path: str  # A TFDS version folder, parquet or JSON lines; several with commas.
    split: str
    row_tokens: int
    pack: bool  # Several samples a row, as segments that do not see each other.
    too_long: str  # A sample longer than a row: 'error', or 'drop' (counted).
    streams: int  # The samples are dealt to so many, each packed by itself.


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """One SFT run. Every key is explained where it is set, in configs/."""

    seed: int
    workdir: str
    init_from: str
    tokenizer: str
    model: qwen3.Config
    dtype: str
    remat: str  # A key of `qwen3.REMAT`.
    mesh: MeshConfig
    data: DataConfig
    batch_rows: int
    micro_rows: int
    num_steps: int
    optim: optim.OptimConfig
    sampler: sampler.Engine
    rewards: routing.RewardConfig
    evaluation: evaluate.EvaluationConfig
    checkpoint: checkpoint.CheckpointConfig

    def __post_init__(self):
        qwen3.check_remat(self.remat)
        if self.num_steps < 1 or self.batch_rows < 1 or self.micro_rows < 1:
            raise InputError("num_steps, batch_rows and micro_rows must be at least 1")
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
    loss_fn = functools.partial(
        steps.lm_loss,
        config=config.model,
        layout=layout,
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
    )
    return functools.partial(
        steps.train_step, loss_fn=loss_fn, tx=optim.optimizer(config.optim)
    )


def run(config: SftConfig) -> None:
    """Trains to the last step, from where the workdir's newest checkpoint stands."""
    with routing.make_pool(config.rewards) as pool:
        inputs = read_inputs(config, pool)
        checkpoint.open_workdir(config, inputs.tokenizer)  # All input was found good.
        train(config, inputs, pool)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a run reads, found good before it does any work."""

    layout: Layout
    tokenizer: tokens.Tokenizer
    data: SftBatches
    problems: Mapping[str, Sequence[Any]]  # To evaluate on.


def read_inputs(config: SftConfig, pool: Pool) -> Inputs:
    """Reads all that the config names; an InputError for what cannot serve the run."""
    layout = Layout(make_mesh(config.mesh), config.mesh.rules)
    steps.check_micro_rows(config.micro_rows, layout)
    sampler.check_engine(config.sampler, layout, config.evaluation.row_tokens)
    tokenizer = tokens.load(config.tokenizer)
    tokens.check_fits(tokenizer, config.model.vocab_size)
    data = sft_batches(
        read_examples(config.data.path, config.data.split),
        tokenizer,
        row_tokens=config.data.row_tokens,
        rows_per_batch=config.batch_rows,
        seed=config.seed,
        pack=config.data.pack,
        too_long=config.data.too_long,
        num_streams=config.data.streams,
        my_rows=steps.my_rows(config.batch_rows, config.micro_rows, layout),
    )
    problems = evaluate.load_problems(
        config.evaluation,
        tokenizer,
        config.rewards,
        pool if config.evaluation.every else None,
    )
    return Inputs(layout, tokenizer, data, problems)


def train(config: SftConfig, inputs: Inputs, pool: Pool) -> None:
    """The loop."""
    layout, tokenizer, data = inputs.layout, inputs.tokenizer, inputs.data
    num_micro = config.batch_rows // config.micro_rows
    with (
        checkpoint.Checkpoints(config.workdir, config.checkpoint) as checkpoints,
        Writer(config.workdir, next_step=checkpoints.steps_done) as writer,
    ):
        first = checkpoints.steps_done
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
        weigh = jax.jit(
            losses.token_mean_weights, out_shardings=steps.batch_sharding(layout)
        )
        bar = tqdm.trange(
            first,
            config.num_steps,
            desc="SFT",
            initial=first,
            total=config.num_steps,
            disable=not hosts.first(),
        )
        watch, unread = Stopwatch(), []
        for step in bar:
            with watch.phase("data"):
                rows = next(data.iterator)
                batch = steps.micro_batches(rows, config.micro_rows, num_micro, layout)
                batch["weight"] = weigh(batch.pop("mask"))
            rate = optim.learning_rate(config.optim, step, config.num_steps)
            state, found = update(state, batch, num_micro, rate)
            unread.append((step, rows, rate, found))
            evaluates = config.evaluation.due(step + 1)
            saves = checkpoints.due(step + 1) or step + 1 == config.num_steps
            # Metrics are read one step late, so that the device never waits for the host.
            while len(unread) > (0 if saves or evaluates else 1):
                read_step, rows, rate, found = unread.pop(0)
                values = summarise(jax.device_get(found), rows["tokens"].size)
                values["learning_rate"] = rate
                require_finite(values, rows, config.workdir, read_step)
                if evaluates and read_step == step:
                    with watch.phase("evaluate"):
                        values |= evaluate.during_training(
                            state.params,
                            inputs.problems,
                            tokenizer,
                            pool,
                            config,
                            layout,
                        )
                values |= watch.lap()
                writer.write(read_step, values)
                bar.set_postfix(loss=f"{values['loss']:.3f}")
            if saves:
                checkpoints.save(step + 1, state, data.iterator)
                writer.publish()


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
        "row_fill": float(found["tokens_real"] / room),
    }
