"""The device programs of training: pure functions of a state and a batch.

A batch is a dict of arrays [M, B, ...]: M micro-batches of B rows, where B lies on the
batch axes of the mesh, so that every micro-batch spans all devices. How many of the M are
real is an argument, traced: one program serves every count, and rows or micro-batches of
weight 0 add nothing. jit, shardings and donation are applied once, by `compile_train_step`.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from klear_jax import logprobs, losses, qwen3
from klear_jax.errors import InputError
from klear_jax.sharding import Layout, like_params, my_shards, put

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
# (state, batch, num_micro, learning_rate) -> (state, metrics).
TrainStep = Callable[..., tuple["TrainState", Metrics]]
# (params, micro-batch of [B, ...]) -> (loss [], (additive metrics [], others [B, T])).
LossFn = Callable[[qwen3.Params, Batch], tuple[jax.Array, tuple[Metrics, Metrics]]]


@flax.struct.dataclass
class TrainState:
    """All that an update reads and writes."""

    step: jax.Array  # [] int32, optimizer updates done.
    params: qwen3.Params  # float32 master weights.
    opt_state: optax.OptState


def init_state(params: qwen3.Params, tx: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def state_shardings(
    state: TrainState, params_shardings: Any, layout: Layout
) -> TrainState:
    """Moments lie where their parameters lie, counters everywhere."""
    return like_params(state, params_shardings, layout)


def train_step(
    state: TrainState,
    batch: Batch,
    num_micro: jax.Array,
    learning_rate: jax.Array,
    *,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
) -> tuple[TrainState, Metrics]:
    """One optimizer update from the first `num_micro` micro-batches of `batch`.

    Gradients and metrics are float32 sums over micro-batches: the weights in the batch
    already say what a mean is, so any split gives the same update up to rounding. Where loss
    or gradient is no number, the state stays as it is.

    Returns:
        The new state, and the metrics of `loss_fn` (those of tokens [M, B, T]) with `loss`,
        `grad_norm` (before the clip), `update_norm` and `param_norm`.
    """
    grads, metrics = accumulate(loss_fn, state.params, batch, num_micro)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    updates = jax.tree.map(lambda update: -learning_rate * update, updates)
    params = optax.apply_updates(state.params, updates)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(metrics["loss"] + grad_norm)
    state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        TrainState(state.step + 1, params, opt_state),
        state,
    )
    metrics |= {
        "grad_norm": grad_norm,
        "update_norm": optax.tree.norm(updates),
        "param_norm": optax.tree.norm(state.params),
    }
    return state, metrics


def accumulate(
    loss_fn: LossFn, params: qwen3.Params, batch: Batch, num_micro: jax.Array
) -> tuple[qwen3.Params, Metrics]:
    """Gradients of the loss and metrics, summed over the first `num_micro` micro-batches;
    metrics of tokens side by side, [M, B, T]."""

    def one(i):
        micro = jax.tree.map(lambda x: x[i], batch)
        (loss, (metrics, per_token)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            params, micro
        )
        # Behind the barrier, or XLA sums whole matrices in the loop and splits them after it.
        grads = jax.lax.optimization_barrier(grads)
        return (grads, metrics | {"loss": loss}), per_token

    (grads, metrics), per_token = _over_micros(one, batch, num_micro)
    return grads, metrics | per_token


def loss_step(
    params: qwen3.Params, batch: Batch, num_micro: jax.Array, *, loss_fn: LossFn
) -> Metrics:
    """The additive metrics of `loss_fn` with `loss`, of the first `num_micro` micro-batches."""

    def one(i):
        loss, (metrics, _) = loss_fn(params, jax.tree.map(lambda x: x[i], batch))
        return metrics | {"loss": loss}, {}

    return _over_micros(one, batch, num_micro)[0]


def score_step(
    params: qwen3.Params,
    batch: Batch,
    num_micro: jax.Array,
    **model: Any,
) -> jax.Array:
    """Log-probs of every token of the first `num_micro` micro-batches, [M, B, T] float32.

    Args:
        model: config, temperature, layout, dtype of `logprobs.token_logprobs`.
    """

    def one(i):
        logp_BT = logprobs.token_logprobs(
            params,
            tokens_BT=batch["tokens"][i],
            positions_BT=batch["positions"][i],
            segment_ids_BT=batch["segment_ids"][i],
            **model,
        )
        return {}, logp_BT

    return _over_micros(one, batch, num_micro)[1]


def _over_micros(
    one: Callable[[jax.Array], tuple[Any, Any]], batch: Batch, num_micro: jax.Array
) -> tuple[Any, Any]:
    """one(0) .. one(num_micro - 1): the sums of what it returns first, and side by side,
    [M, ...], what it returns second; zeros behind them."""

    def zeros(x, *room):
        return jnp.zeros((*room, *x.shape), x.dtype)

    def add(i, found):
        total, rows = found
        more, row = one(i)
        return (
            jax.tree.map(jnp.add, total, more),
            jax.tree.map(lambda x, new: x.at[i].set(new), rows, row),
        )

    total, rows = jax.eval_shape(one, 0)
    num_room = len(next(iter(batch.values())))
    return jax.lax.fori_loop(
        0,
        num_micro,
        add,
        (
            jax.tree.map(zeros, total),
            jax.tree.map(lambda x: zeros(x, num_room), rows),
        ),
    )


def lm_loss(
    params: qwen3.Params, micro: Batch, **model: Any
) -> tuple[jax.Array, tuple[Metrics, Metrics]]:
    """The SFT loss of one micro-batch (a `LossFn`, once `model` is bound).

    Args:
        micro: tokens, positions, segment_ids, weight: each [B, T].
        model: config, layout, dtype, remat of `logprobs.token_logprobs`.

    Returns:
        The loss, how many `tokens` were trained, how many of them are `tokens_likely`: of
        probability over one half, so what greedy decoding would choose; how many were
        read, `tokens_real`, and of how many `samples`.
    """
    logp_BT = logprobs.token_logprobs(
        params,
        tokens_BT=micro["tokens"],
        positions_BT=micro["positions"],
        segment_ids_BT=micro["segment_ids"],
        **model,
    )
    real_BT = micro["weight"] != 0
    metrics = {
        "tokens": jnp.sum(real_BT, dtype=jnp.float32),
        "tokens_likely": jnp.sum(real_BT & (logp_BT > jnp.log(0.5)), dtype=jnp.float32),
        "tokens_real": jnp.sum(micro["segment_ids"] != 0, dtype=jnp.float32),
        "samples": jnp.sum(jnp.max(micro["segment_ids"], axis=1), dtype=jnp.float32),
    }
    return losses.positive_lm_loss(logp_BT, micro["weight"]), (metrics, {})


def gppo_loss(
    params: qwen3.Params,
    micro: Batch,
    *,
    positive_coef: float,
    clip: dict[str, Any],
    **model: Any,
) -> tuple[jax.Array, tuple[Metrics, Metrics]]:
    """The policy loss plus `positive_coef` x the positive-LM loss (Eq. 14), of one
    micro-batch.

    Args:
        micro: tokens, positions, segment_ids, old_logp, advantage, weight,
            positive_weight: each [B, T].
        positive_coef: alpha.
        clip: the keyword arguments of `losses.policy_loss`.
        model: config, temperature, layout, dtype, remat of `logprobs.token_logprobs`.

    Returns:
        The loss, and the metrics of `losses.policy_loss` with `policy_loss`,
        `positive_loss`, `entropy` (sum of weight x entropy, nats) and `ratios_below`
        (`losses.ratios_below`); of the tokens, their `log_ratio` [B, T] float16, 0 under
        weight 0.
    """
    logp_BT, entropy_BT = logprobs.token_logprobs(
        params,
        tokens_BT=micro["tokens"],
        positions_BT=micro["positions"],
        segment_ids_BT=micro["segment_ids"],
        with_entropy=True,
        **model,
    )
    policy_loss, metrics = losses.policy_loss(
        logp_BT, micro["old_logp"], micro["advantage"], micro["weight"], **clip
    )
    positive_loss = losses.positive_lm_loss(logp_BT, micro["positive_weight"])
    metrics |= {
        "policy_loss": policy_loss,
        "positive_loss": positive_loss,
        "entropy": jnp.sum(micro["weight"] * entropy_BT),
        "ratios_below": losses.ratios_below(
            logp_BT, micro["old_logp"], micro["weight"]
        ),
    }
    log_ratio_BT = jnp.where(micro["weight"] != 0, logp_BT - micro["old_logp"], 0)
    per_token = {"log_ratio": log_ratio_BT.astype(jnp.float16)}
    return policy_loss + positive_coef * positive_loss, (metrics, per_token)


def micro_batches(
    rows: dict[str, np.ndarray], micro_rows: int, num_micro: int, layout: Layout
) -> Batch:
    """Host rows [R, T] -> device arrays [num_micro, micro_rows, T].

    Filled up with empty rows: all zeros, so segment 0 and weight 0. Of several processes,
    each needs to have only the rows of `my_rows`.
    """

    def split(x):
        room = num_micro * micro_rows - len(x)
        x = np.concatenate([x, np.zeros((room, *x.shape[1:]), x.dtype)])
        return x.reshape(num_micro, micro_rows, *x.shape[1:])

    return put({name: split(x) for name, x in rows.items()}, batch_sharding(layout))


def batch_sharding(layout: Layout) -> jax.sharding.NamedSharding:
    """Of every array of a batch: [M, B, T] with B on the batch axes."""
    return layout.sharding(None, "batch", None)


def my_rows(num_rows: int, micro_rows: int, layout: Layout) -> list[int]:
    """The rows of a batch that lie on devices of this process."""
    mine = set(my_shards(layout, "batch", micro_rows))
    return [row for row in range(num_rows) if row % micro_rows in mine]


def check_micro_rows(micro_rows: int, layout: Layout) -> None:
    """Every device of the batch axes gets the same number of rows, or an InputError."""
    if micro_rows % layout.shards("batch"):
        raise InputError(
            f"micro_rows={micro_rows} must be a multiple of the {layout.shards('batch')} "
            f"shards of a batch (mesh axes {layout.rules['batch']})"
        )


def compile_score_step(
    step: Callable[..., Any], layout: Layout, params_shardings: Any
) -> jax.stages.Wrapped:
    """`score_step` or `loss_step` with all bound -> the program, whose result every host
    can read."""
    return jax.jit(
        step,
        in_shardings=(params_shardings, batch_sharding(layout), None),
        out_shardings=layout.sharding(),
    )


def compile_train_step(
    step: TrainStep, layout: Layout, shardings: TrainState
) -> jax.stages.Wrapped:
    """`train_step` with loss and optimizer bound -> the program: jit with explicit
    shardings (what pjit was), the old state donated."""
    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(layout), None, None),
        out_shardings=(shardings, layout.sharding()),
        donate_argnums=0,
    )
