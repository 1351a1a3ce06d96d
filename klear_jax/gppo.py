"""GPPO: sample, score, learn; group-relative, with the clip that keeps its gradient.

dataset -> prompts -> sampler -> rewards -> advantages -> train steps -> metrics, checkpoint.
Source: Klear-Reasoner (arXiv 2508.07629); every number has its own in the config.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from klear_jax import (
    batch,
    checkpoint,
    evaluate,
    guards,
    hosts,
    losses,
    metrics,
    optim,
    preemption,
    progress,
    qwen3,
    rollout,
    roofline,
    sampler,
    speed,
    steps,
    tokens,
)
from klear_jax.data.batches import PromptBatches, prompt_batches
from klear_jax.data.examples import read_examples
from klear_jax.errors import InputError
from klear_jax.rewards import routing
from klear_jax.rewards.pool import Pool
from klear_jax.sampling import Sampling
from klear_jax.sharding import Layout, MeshConfig, make_mesh


@dataclasses.dataclass(frozen=True)
class DataConfig:
    path: str  # A TFDS version folder, parquet or JSON lines; several with commas.
    split: str
    # A prompt over rollout.max_prompt_tokens.
    too_long: Literal["error", "truncate_left"]


OLD_LOGP = ("trainer", "sampler")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """See `losses.policy_loss` and `steps.gppo_loss`."""

    kind: str
    clip_low: float
    clip_high: float
    beta_low: float
    beta_high: float
    dual_clip: float | None
    beta_dual: float
    aggregation: losses.Aggregation
    positive_coef: float
    old_logp: str  # Whose log-probs of the sampled tokens are the old ones: `OLD_LOGP`.

    def __post_init__(self):
        if self.kind not in losses.KINDS:
            raise InputError(
                f"loss.kind must be one of {losses.KINDS}, not {self.kind!r}"
            )
        if self.aggregation not in losses.AGGREGATIONS:
            raise InputError(
                f"loss.aggregation must be one of {losses.AGGREGATIONS}, not {self.aggregation!r}"
            )
        if self.kind != "gppo" and (self.beta_low, self.beta_high) != (1.0, 1.0):
            raise InputError(
                f"loss.beta_low and beta_high are for 'gppo', not for {self.kind!r}"
            )
        if self.kind == "cispo" and self.dual_clip is not None:
            raise InputError("loss.dual_clip must be None for 'cispo', which has none")
        if self.dual_clip is not None and not self.dual_clip >= 1:
            raise InputError(
                f"loss.dual_clip must be None or at least 1, not {self.dual_clip}"
            )
        for name in ("beta_low", "beta_high", "beta_dual"):
            if not getattr(self, name) >= 0:
                raise InputError(
                    f"loss.{name} must not be negative: {getattr(self, name)}"
                )
        if self.beta_dual and self.dual_clip is None:
            raise InputError("loss.beta_dual is of loss.dual_clip, which is None")
        if self.old_logp not in OLD_LOGP:
            raise InputError(
                f"loss.old_logp must be one of {OLD_LOGP}, not {self.old_logp!r}"
            )
        if not 0 <= self.clip_low < 1 or self.clip_high < 0 or self.positive_coef < 0:
            raise InputError(
                "loss.clip_low must be in [0, 1), loss.clip_high and loss.positive_coef not "
                f"negative: {self.clip_low}, {self.clip_high}, {self.positive_coef}"
            )

    def clip(self) -> dict[str, Any]:
        """The keyword arguments of `losses.policy_loss`."""
        names = "kind clip_low clip_high beta_low beta_high dual_clip beta_dual".split()
        return {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True)
class GppoConfig:
    """One GPPO run. Every key is explained where it is set, in configs/."""

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
    rollout: rollout.RolloutConfig
    sampler: sampler.Engine
    rewards: routing.RewardConfig
    loss: LossConfig
    minibatch_prompts: int
    micro_rows: int
    num_steps: int
    optim: optim.OptimConfig
    evaluation: evaluate.EvaluationConfig
    checkpoint: checkpoint.CheckpointConfig
    guards: guards.GuardConfig

    def __post_init__(self):
        qwen3.check_remat(self.remat)
        metrics.check_wandb(self.wandb)
        for name in ("minibatch_prompts", "micro_rows", "num_steps"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"{name} must be at least 1, not {getattr(self, name)}"
                )
        if self.loss.old_logp == "sampler" and self.rollout.temperature != 1:
            raise InputError(
                "loss.old_logp='sampler' is for rollout.temperature=1, at which the sampler's "
                f"log-probs are, not for {self.rollout.temperature}"
            )


def train_step(config: GppoConfig, layout: Layout) -> steps.TrainStep:
    """The update with loss and optimizer bound: pure, not yet compiled."""
    loss_fn = functools.partial(
        steps.gppo_loss,
        positive_coef=config.loss.positive_coef,
        clip=config.loss.clip(),
        config=config.model,
        temperature=config.rollout.temperature,  # The policy is what is drawn from.
        layout=layout,
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
    )
    return functools.partial(
        steps.train_step, loss_fn=loss_fn, tx=optim.optimizer(config.optim)
    )


def score_step(config: GppoConfig, layout: Layout) -> Any:
    """The old log-probs of a rollout batch: pure, not yet compiled."""
    return functools.partial(
        steps.score_step,
        config=config.model,
        temperature=config.rollout.temperature,
        layout=layout,
        dtype=jnp.dtype(config.dtype),
    )


def num_micro(config: GppoConfig, prompts: int) -> int:
    """Micro-batches that hold the samples of so many prompts."""
    return -(-prompts * config.rollout.samples_per_prompt // config.micro_rows)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a run reads, found good before it does any work."""

    layout: Layout
    tokenizer: tokens.Tokenizer
    prompts: PromptBatches
    problems: Mapping[str, Sequence[Any]]  # To evaluate on.


def read_inputs(config: GppoConfig, pool: Pool) -> Inputs:
    """Reads all that the config names; an InputError for what cannot serve the run."""
    layout = Layout(make_mesh(config.mesh), config.mesh.rules)
    steps.check_micro_rows(config.micro_rows, layout)
    optim.check_warm_up(config.optim, config.num_steps)
    for _, row_tokens in sampler_uses(config):
        sampler.check_engine(config.sampler, layout, row_tokens)
    tokenizer = tokens.load(config.tokenizer)
    tokens.check_fits(tokenizer, config.model.vocab_size)
    examples = read_examples(config.data.path, config.data.split)
    routing.check(config.rewards, examples)
    routing.try_out(pool, config.rewards, examples)
    prompts = prompt_batches(
        examples,
        tokenizer,
        prompts_per_step=config.rollout.prompts,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        seed=config.seed,
        too_long=config.data.too_long,
    )
    problems = evaluate.problems_of_training(config, tokenizer, pool)
    return Inputs(layout, tokenizer, prompts, problems)


@dataclasses.dataclass
class UnderWay:
    """How far a step has come, as a checkpoint holds it. Between steps, it is what the next
    one goes on with."""

    going_on: list[rollout.OpenGroup]  # Of earlier steps, and of a batch being drawn.
    complete: list[rollout.OpenGroup]
    batches: int  # Of prompts, begun.
    drawing: bool  # The last of them is not complete.
    counts: list[dict[str, float]]  # Of the sampler, for each batch.
    updates: list[dict[str, np.ndarray]]  # The metrics of those done, float32.
    log_ratios: list[np.ndarray]  # Of their tokens, [M, B, T] float16.

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(
            dataclasses.replace(
                self, going_on=[], complete=[], updates=[], log_ratios=[]
            )
        ) | {
            "going_on": rollout.to_json(self.going_on),
            "complete": rollout.to_json(self.complete),
            "updates": [
                {name: np.float32(x).tolist() for name, x in update.items()}
                for update in jax.device_get(self.updates)
            ],
            "log_ratios": [
                (x.shape, rollout.to_text(x, np.float16))
                for x in jax.device_get(self.log_ratios)
            ],
        }


def begin_step(going_on: list[rollout.OpenGroup]) -> UnderWay:
    return UnderWay(going_on, [], 0, False, [], [], [])


def from_json(found: dict[str, Any] | None) -> UnderWay:
    """What `UnderWay.to_json` returned; None: the run begins."""
    if found is None:
        return begin_step([])
    groups = {name: rollout.from_json(found[name]) for name in ("going_on", "complete")}
    updates = [
        {name: np.float32(x) for name, x in update.items()}
        for update in found["updates"]
    ]
    log_ratios = [
        rollout.from_text(text, np.float16).reshape(shape)
        for shape, text in found["log_ratios"]
    ]
    return UnderWay(**found | groups | {"updates": updates, "log_ratios": log_ratios})


def run(config: GppoConfig, profile: tuple[int, int] | None = None) -> None:
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


def train(
    config: GppoConfig, inputs: Inputs, pool: Pool, trace: progress.Trace
) -> None:
    """The loop."""
    layout, tokenizer = inputs.layout, inputs.tokenizer
    with (
        checkpoint.only_run(config.workdir),
        checkpoint.Checkpoints(
            config.workdir, config.checkpoint, config
        ) as checkpoints,
        metrics.Writer(
            config.workdir,
            next_step=checkpoints.steps_done,
            wandb=config.wandb,
            about=dataclasses.asdict(config),
        ) as writer,
        metrics.Compilations() as compilations,
        progress.Progress(
            "GPPO", checkpoints.steps_done, config.num_steps, trace
        ) as shown,
    ):
        shown.tell("loading, and compiling")
        state, shardings = checkpoint.train_state(
            checkpoints,
            inputs.prompts,
            init_from=config.init_from,
            config=config.model,
            key=jax.random.key(config.seed),
            tx=optim.optimizer(config.optim),
            layout=layout,
        )
        update = steps.compile_train_step(train_step(config, layout), layout, shardings)
        score = steps.compile_score_step(
            score_step(config, layout), layout, shardings.params
        )
        under_way = from_json(checkpoints.under_way())
        warm_up(state.params, config, tokenizer, layout)
        try:
            for step in shown.steps():
                preemption.check()
                whole = not under_way.batches
                with shown.phase("sample"):
                    samples, (chosen, surplus) = sample(
                        state.params, under_way, step, pool, config, inputs, shown.tell
                    )
                    rows = batch.make_rows(samples, chosen, config.rollout)
                    waiting = rollout.waiting(samples, surplus, config.rollout)
                with shown.phase("score"):
                    under_way.complete, later = batch.score_groups(
                        samples,
                        chosen,
                        rows,
                        waiting,
                        under_way.going_on,
                        functools.partial(
                            old_logprobs, score, config, layout, state.params
                        ),
                        config.rollout.row_tokens,
                    )
                    under_way.going_on = later[len(waiting) :]
                with shown.phase("update"):
                    rate = optim.learning_rate(config.optim, step, config.num_steps)
                    group_B = samples.group_B[chosen]
                    parts = batch.mini_batch_rows(group_B, config.minibatch_prompts)
                    left = batch.mini_batches(
                        rows,
                        group_B,
                        samples.reward_B[chosen] == config.rewards.full_credit,
                        parts[len(under_way.updates) :],
                        aggregation=config.loss.aggregation,
                        norm_tokens=config.rollout.max_new_tokens,
                    )
                    for after, one in learn(update, state, left, rate, config, layout):
                        state = after
                        under_way.log_ratios.append(one.pop("log_ratio"))
                        under_way.updates.append(one)
                    # The host reads none before all are under way.
                    found = jax.device_get(under_way.updates)
                    rows["log_ratio"] = batch.log_ratios(
                        rows["segment_ids"], parts, jax.device_get(under_way.log_ratios)
                    )
                share = {  # All processes have all rows.
                    name: x[hosts.index() :: hosts.count()] for name, x in rows.items()
                }
                good = guards.finite(config.guards, found, share, config.workdir, step)
                values = {
                    **batch.sample_metrics(samples, chosen, config.rewards, step),
                    **batch.logprob_gap(rows, config.rollout.temperature),
                    **metrics.of_updates(
                        good, all_new=bool(np.isnan(rows["earlier_logp"]).all())
                    ),
                    "updates_skipped": len(found) - len(good),
                    **metrics.of_sampler(under_way.counts),
                    "samples/groups_surplus": len(surplus),
                    "samples/groups_dropped": len(surplus) - len(waiting),
                    "samples/groups_going_on": len(later),
                    "learning_rate": rate,
                }
                if config.evaluation.due(step + 1):
                    with shown.phase("evaluate"):
                        values |= evaluate.during_training(
                            state.params,
                            inputs.problems,
                            tokenizer,
                            pool,
                            config,
                            layout,
                            shown.tell,
                        )
                # A whole step with an update has needed all programs that there are.
                if whole and found:
                    compilations.close()
                values["compilations/unplanned"] = compilations.unplanned
                values |= shown.lap()
                values |= of_speed(values, rows, config, layout) | speed.memory()
                writer.write(step, values)
                writer.write_samples(
                    step,
                    batch.sample_rows(
                        samples, chosen, rows, waiting, config.rollout.token_groups
                    ),
                )
                guards.check(config.guards, values, step)
                shown.result(correct=values["reward/correct"])
                under_way = begin_step(later)
                if checkpoints.due(step + 1) or step + 1 == config.num_steps:
                    writer.publish()  # First: what a checkpoint holds is not written again.
                    with compilations.open_again():  # orbax cuts what is replicated.
                        checkpoints.save(
                            step + 1,
                            state,
                            inputs.prompts,
                            under_way.to_json(),
                            values,
                        )
        except preemption.Preempted:
            writer.publish()
            with compilations.open_again():
                checkpoints.save_preempted(
                    step,
                    state,
                    inputs.prompts,
                    under_way.to_json(),
                    begun=under_way.batches > 0,
                )
            raise


def sample(
    params: qwen3.Params,
    under_way: UnderWay,
    step: int,
    pool: Pool,
    config: GppoConfig,
    inputs: Inputs,
    tell: rollout.Tell,
) -> tuple[rollout.Rollout, tuple[np.ndarray, list[int]]]:
    """Draws and scores batches of prompts until enough groups teach something, or there
    have been `max_batches`; goes on with a step that was cut off.

    Args:
        under_way: the step so far; what is drawn goes there.
        tell: see `rollout.collect`.

    Returns:
        The complete groups, and what `batch.select` chose of them.

    Raises:
        InputError: the reward fails on every sample.
        preemption.Preempted: the run is to end.
    """
    c = config.rollout
    while True:
        if under_way.batches and not under_way.drawing:
            samples = rollout.flatten(
                under_way.complete,
                inputs.tokenizer,
                config.rewards.full_credit,
                overlong_tokens=c.overlong_tokens,
                overlong_penalty=c.overlong_penalty,
            )
            selected = batch.select(samples, c)
            enough = len(np.unique(samples.group_B[selected[0]])) == c.max_groups
            if enough or under_way.batches == c.max_batches:
                break
        draw(params, under_way, step, pool, config, inputs, tell)
    rollout.check_rewards(samples)
    return samples, selected


def draw(
    params: qwen3.Params,
    under_way: UnderWay,
    step: int,
    pool: Pool,
    config: GppoConfig,
    inputs: Inputs,
    tell: rollout.Tell,
) -> None:
    """Draws and scores the next batch of prompts, or what is left of one that was cut off."""
    c = config.rollout
    if not under_way.drawing:
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        number = under_way.batches
        under_way.going_on += rollout.open_groups(
            next(inputs.prompts),
            config.rewards,
            num_samples=c.samples_per_prompt,
            max_new_tokens=c.max_new_tokens,
            key=jax.random.fold_in(key, number) if number else key,
            seed=f"{config.seed}/{step}",
        )
        under_way.batches, under_way.drawing = number + 1, True
    try:
        done, under_way.going_on, count = rollout.collect(
            params,
            config.model,
            under_way.going_on,
            inputs.tokenizer,
            pool,
            config.rewards,
            sampling=c.sampling(),
            engine=config.sampler,
            slot_tokens=c.row_tokens,
            stop_strings=c.stop_strings,
            step=step,
            finish_fraction=c.finish_fraction,
            dtype=jnp.dtype(config.dtype),
            layout=inputs.layout,
            tell=tell,
        )
    except rollout.Interrupted as interrupted:
        under_way.going_on = interrupted.groups
        raise
    under_way.complete += done
    under_way.counts.append(count)
    under_way.drawing = False


def learn(
    update: steps.TrainStep,
    state: steps.TrainState,
    minis: Iterable[dict[str, np.ndarray]],
    rate: float,
    config: GppoConfig,
    layout: Layout,
) -> Iterator[tuple[steps.TrainState, dict[str, Any]]]:
    """An update a mini-batch: the new state and the metrics, with `row_fill`, the share of
    tokens in the computed rows that are real."""
    for mini in minis:
        packed, _ = batch.pack(mini)
        placed, count = place(packed, config.minibatch_prompts, config, layout)
        preemption.check()
        state, values = update(state, placed, count, rate)
        computed = count * config.micro_rows * config.rollout.row_tokens
        real = np.count_nonzero(packed["segment_ids"])
        yield state, values | {"row_fill": np.float32(real / max(computed, 1))}


def of_speed(
    values: Mapping[str, float],
    rows: Mapping[str, np.ndarray],
    config: GppoConfig,
    layout: Layout,
) -> dict[str, float]:
    """`speed` of the step with these metrics and rows."""
    model = roofline.model_of(config, layout)
    tokens = int(np.count_nonzero(rows["segment_ids"]))
    prompt = (tokens - int(np.count_nonzero(rows["mask"]))) / max(len(rows["mask"]), 1)
    return speed.of_update(
        model, tokens, len(rows["mask"]), values["seconds/update"]
    ) | speed.of_sampling(
        model,
        values,
        values["samples/tokens"],
        prompt + values["samples/length"] / 2,
        values["seconds/sample"],
    )


def sampler_uses(config: GppoConfig) -> list[tuple[Sampling, int]]:
    """How a run samples, and up to how many tokens a row: rollouts, and evaluations."""
    uses = [(config.rollout.sampling(), config.rollout.row_tokens)]
    evaluation = config.evaluation
    if evaluation.every:
        uses += [(how, evaluation.row_tokens) for how in evaluation.samplings()]
    return uses


def warm_up(
    params: qwen3.Params,
    config: GppoConfig,
    tokenizer: tokens.Tokenizer,
    layout: Layout,
) -> None:
    """Compiles all programs of the sampler."""
    for sampling, row_tokens in sampler_uses(config):
        sampler.warm_up(
            params,
            config.model,
            sampling=sampling,
            engine=config.sampler,
            slot_tokens=row_tokens,
            stop_ids=tokenizer.stop_ids,
            dtype=jnp.dtype(config.dtype),
            layout=layout,
        )


def place(
    rows: dict[str, np.ndarray], prompts: int, config: GppoConfig, layout: Layout
) -> tuple[steps.Batch, int]:
    """Rows as micro-batches on the devices, with room for the samples of so many prompts,
    and how many micro-batches are real."""
    placed = steps.micro_batches(
        rows, config.micro_rows, num_micro(config, prompts), layout
    )
    return placed, -(-len(rows["tokens"]) // config.micro_rows)


def old_logprobs(
    score: Any,
    config: GppoConfig,
    layout: Layout,
    params: qwen3.Params,
    rows: dict[str, np.ndarray],
) -> np.ndarray:
    """The log-probs of the rows before any update, [b, T]: the trainer's own, or the
    sampler's; where tokens were drawn in an earlier step, those of that step."""
    if config.loss.old_logp == "sampler":
        return rows["behaviour_logp"]
    inputs = {name: rows[name] for name in ("tokens", "positions", "segment_ids")}
    packed, places = batch.pack(inputs)
    room = num_micro(config, config.rollout.max_groups) * config.micro_rows
    logp_RT = np.zeros(packed["tokens"].shape, np.float32)
    for start in range(0, len(logp_RT), room):
        preemption.check()
        part = {name: x[start : start + room] for name, x in packed.items()}
        placed, count = place(part, config.rollout.max_groups, config, layout)
        logp_MBT = jax.device_get(score(params, placed, count))
        found_RT = logp_MBT.reshape(-1, logp_MBT.shape[-1])
        logp_RT[start : start + room] = found_RT[: len(part["tokens"])]
    earlier = rows["earlier_logp"]
    return np.where(np.isnan(earlier), batch.unpack(logp_RT, places), earlier)
