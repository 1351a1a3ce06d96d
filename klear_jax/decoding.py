"""The sampler's device side: its programs, and the weights and state they work on.

    prefill   blocks of prompts -> keys and values in the cache, states waiting to be drawn
    decode    a few tokens for every slot: draw, then one pass through the layers

The layers are the trainer's, the parameters a copy in the dtype and layout of sampling.
Every shape is fixed by a `scheduler.Shape`, so that all programs can be compiled at the
start of a run, or for a pod that is not there.

Shape letters: R replicas (shards of the slots over the batch axes of the mesh), B slots of
a replica, X blocks of Q tokens of a prefill, W waiting states, S steps, M pages of a slot,
P tokens of a page, N = R x B, V vocabulary, D width.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from klear_jax import kv_cache, qwen3, scheduler
from klear_jax.attention import page_pairs
from klear_jax.sampling import Sampling, choose, penalise
from klear_jax.sharding import Layout, constrain, sampling_layout


def kernel_for(config: qwen3.Config, platform: str) -> str:
    """The kernel for devices of that platform, see `kv_cache.KERNELS`: that of TPUs wants
    heads as wide as a vector register, which all Qwen3 models have."""
    return "tpu" if platform == "tpu" and config.head_dim % 128 == 0 else "xla"


@flax.struct.dataclass
class States:
    """Sequences whose next token is to be drawn; leading axes [R, B] or [R, W]."""

    hidden: jax.Array  # [.., D] of the last token, after the final norm.
    seen: jax.Array | None  # [.., V] bool, with a repetition penalty: tokens so far.


@flax.struct.dataclass
class Slots:
    """What decoding reads and writes, beside the cache."""

    states: States
    length_RB: jax.Array  # Tokens in the cache.
    count_RB: jax.Array  # Tokens of the response.
    stopped_RB: jax.Array


def pair_sizes(shape: scheduler.Shape) -> list[int]:
    """Sizes of XLA's list of (slot, page) pairs: a program each, from 64 up by 3/2, 4/3.

    Multiples of 32, for which results do not depend on the size: no vector is cut short.
    """
    most = -(-shape.slots * shape.slot_pages // 32) * 32
    steps = (size for n in range(6, 40) for size in (1 << n, 3 << (n - 1)))
    return [*itertools.takewhile(lambda size: size < most, steps), most]


def padded_stop_ids(stop_ids: Sequence[int]) -> np.ndarray:
    """Filled up with -1, so that their number changes no program."""
    padded = np.full(-(-max(len(stop_ids), 1) // 8) * 8, -1, np.int32)
    padded[: len(stop_ids)] = stop_ids
    return padded


def _arrays(batch: scheduler.Decode) -> dict[str, np.ndarray]:
    return {name: getattr(batch, name) for name in scheduler.DECODE_ARRAYS}


class Programs:
    """The sampler's programs bound to weights, and the state that they hand on."""

    def __init__(
        self,
        params: qwen3.Params,
        shape: scheduler.Shape,
        sampling: Sampling,
        stop_ids: Sequence[int],
        *,
        config: qwen3.Config,
        layout: Layout | None,
        dtype: jnp.dtype | None,
    ):
        """Makes the sampling copy of the parameters, which stay as they are, an empty
        cache and empty slots. All of it goes when this object does."""
        self._jitted = jitted(jax.default_backend())
        self._static = {
            "config": config,
            "layout": layout and sampling_layout(layout),
            "dtype": params["embed"].dtype if dtype is None else jnp.dtype(dtype),
        }
        self._shape, self._sampling = shape, sampling
        kernel = kernel_for(config, jax.default_backend())
        self._pair_sizes = pair_sizes(shape) if kernel == "xla" else [0]
        self._stop_ids = padded_stop_ids(stop_ids)
        self._weights = jax.block_until_ready(
            self._jitted.sampling_copy(params, kernel=kernel, **self._static)
        )
        self._pool, self._slots, self._waiting = self._jitted.init_state(
            shape=shape, kernel=kernel, sampling=sampling, **self._static
        )

    @property
    def weight_bytes(self) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(self._weights))

    def warm_up(self) -> None:
        """Runs every program once, on nothing."""
        self.prefill(scheduler.empty_prefill(self._shape))
        idle = scheduler.empty_decode(self._shape)
        self._copy_pages(idle.copies)
        for size in self._pair_sizes:
            self.decode(dataclasses.replace(idle, pairs=size))

    def prefill(self, batch: scheduler.Prefill) -> None:
        self._pool, self._waiting = self._jitted.prefill(
            self._weights, self._pool, self._waiting, vars(batch), **self._static
        )

    def decode(self, batch: scheduler.Decode) -> tuple[jax.Array, jax.Array]:
        """Copies pages, decodes; tokens and log-probs, [S, R, B] each, soon on the host."""
        if any(batch.copies):
            self._copy_pages(batch.copies)
        self._pool, self._slots, tokens_SRB, logprobs_SRB = self._jitted.decode(
            self._weights,
            self._pool,
            self._slots,
            self._waiting,
            _arrays(batch),
            np.int32(batch.steps),
            self._stop_ids,
            sampling=self._sampling,
            max_steps=self._shape.decode_steps,
            num_pairs=min(n for n in self._pair_sizes if n >= batch.pairs or n == 0),
            **self._static,
        )
        tokens_SRB.copy_to_host_async()
        logprobs_SRB.copy_to_host_async()
        return tokens_SRB, logprobs_SRB

    def _copy_pages(self, copies: list[list[tuple[int, int]]]) -> None:
        """The lists have room for as many as slots can begin at once."""
        source_RB = np.zeros((self._shape.replicas, self._shape.slots), np.int32)
        target_RB = np.zeros_like(source_RB)
        for r, pairs in enumerate(copies):
            for b, (source, target) in enumerate(pairs):
                source_RB[r, b], target_RB[r, b] = source, target
        count_R = np.array(list(map(len, copies)), np.int32)
        self._pool = self._jitted.copy_pages(
            self._pool, source_RB, target_RB, count_R, layout=self._static["layout"]
        )


class Jitted(NamedTuple):
    """The device programs, compiled for a platform; their shapes are in `pair_sizes` and
    in `scheduler.Shape`."""

    sampling_copy: jax.stages.Wrapped
    init_state: jax.stages.Wrapped
    prefill: jax.stages.Wrapped
    copy_pages: jax.stages.Wrapped
    decode: jax.stages.Wrapped


def compiler_options(platform: str) -> dict[str, Any] | None:
    """On CPU, XLA may hand single dots to its library of kernels, but nothing around them:
    with more it splits the work by the size of the batch, and the bits of a sample depend
    on how many pages its mates have. It is no slower."""
    if platform != "cpu":
        return None
    return {
        "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
    }


@functools.cache
def jitted(platform: str) -> Jitted:
    """jit, applied once, with the cache and the slots donated."""
    jit = functools.partial(jax.jit, compiler_options=compiler_options(platform))
    model = ("config", "layout", "dtype")
    return Jitted(
        jit(sampling_copy, static_argnames=(*model, "kernel")),
        jit(init_state, static_argnames=(*model, "sampling", "shape", "kernel")),
        jit(prefill, static_argnames=model, donate_argnames=("pool", "waiting")),
        jit(kv_cache.copy_pages, static_argnames="layout", donate_argnames="pool"),
        jit(
            decode,
            static_argnames=(*model, "sampling", "max_steps", "num_pairs"),
            donate_argnames=("pool", "slots"),
        ),
    )


def trace_programs(
    shape: scheduler.Shape,
    sampling: Sampling,
    *,
    config: qwen3.Config,
    layout: Layout | None,
    dtype: jnp.dtype,
    kernel: str,
    platform: str,
) -> dict[str, jax.stages.Traced]:
    """The programs of a run from shapes alone, ready to be lowered and compiled for devices
    that need not be there.

    Args:
        layout: of training, on the mesh to compile for.
        kernel: see `kv_cache.KERNELS`.
        platform: 'cpu', 'gpu' or 'tpu'.

    Returns:
        'reshard' (of float32 weights), 'prefill', 'copy_pages' and 'decode' (of the most
        pairs of slot and page).
    """
    train_layout, layout = layout, layout and sampling_layout(layout)
    model: dict[str, Any] = {
        "config": config,
        "layout": layout,
        "dtype": jnp.dtype(dtype),
    }
    programs = jitted(platform)

    def place(x, axes, layout=layout):
        axes = (*axes, *[None] * (len(x.shape) - len(axes)))
        sharding = layout and layout.sharding(*axes)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def replicated(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)

    table = qwen3.param_table(config)
    params = jax.tree.map(
        lambda param: place(
            jax.ShapeDtypeStruct(param.shape, jnp.float32), param.axes, train_layout
        ),
        table,
    )
    weights = jax.eval_shape(
        functools.partial(sampling_copy, kernel=kernel, **model), params
    )
    if kernel == "xla":
        layer = jax.tree.map(
            lambda p: dataclasses.replace(p, axes=p.axes[1:]), table["layers"]
        )
        table = table | {"layers": (layer,) * config.num_layers}
    weights = jax.tree.map(lambda p, x: place(x, p.axes), table, weights)
    init = functools.partial(
        init_state, shape=shape, kernel=kernel, sampling=sampling, **model
    )
    pool, slots, waiting = jax.eval_shape(init)
    pool = jax.tree.map(lambda x: place(x, pool.axes), pool)
    slots, waiting = jax.tree.map(lambda x: place(x, ("batch",)), (slots, waiting))
    blocks, steps, stop_ids = replicated(
        (
            vars(scheduler.empty_prefill(shape)),
            _arrays(scheduler.empty_decode(shape)),
            padded_stop_ids(()),
        )
    )
    pages_RB = steps["source"]
    count_R = jax.ShapeDtypeStruct(pages_RB.shape[:1], jnp.int32)
    return {
        "reshard": programs.sampling_copy.trace(params, kernel=kernel, **model),
        "prefill": programs.prefill.trace(weights, pool, waiting, blocks, **model),
        "copy_pages": programs.copy_pages.trace(
            pool, pages_RB, pages_RB, count_R, layout=layout
        ),
        "decode": programs.decode.trace(
            weights,
            pool,
            slots,
            waiting,
            steps,
            jax.ShapeDtypeStruct((), jnp.int32),
            stop_ids,
            sampling=sampling,
            max_steps=shape.decode_steps,
            num_pairs=pair_sizes(shape)[-1] if kernel == "xla" else 0,
            **model,
        ),
    }


def sampling_copy(
    params: qwen3.Params,
    *,
    config: qwen3.Config,
    layout: Layout | None,
    dtype: jnp.dtype,
    kernel: str,
) -> qwen3.Params:
    """The weights in the dtype and layout of sampling: cast and moved in one program."""

    def one(param, x):
        return constrain(x.astype(dtype), layout, *param.axes)

    copy = jax.tree.map(one, qwen3.param_table(config), params)
    return qwen3.unstack_layers(copy) if kernel == "xla" else copy


def init_state(
    *,
    config: qwen3.Config,
    sampling: Sampling,
    shape: scheduler.Shape,
    kernel: str,
    layout: Layout | None,
    dtype: jnp.dtype,
) -> tuple[kv_cache.Pool, Slots, States]:
    """An empty cache, empty slots, and no waiting prompts."""

    def states(rows):
        lead = shape.replicas, rows
        seen = jnp.zeros((*lead, config.vocab_size), bool)
        return States(
            hidden=jnp.zeros((*lead, config.width), dtype),
            seen=seen if sampling.penalises else None,
        )

    pool = kv_cache.empty_pool(
        config,
        kv_cache.PoolShape(shape.replicas, shape.pages, shape.page_tokens, kernel),
        dtype,
    )
    zeros_RB = jnp.zeros((shape.replicas, shape.slots), jnp.int32)
    slots = Slots(states(shape.slots), zeros_RB, zeros_RB, zeros_RB != 0)
    waiting = states(shape.waiting)
    return _place(pool, layout), _batch(slots, layout), _batch(waiting, layout)


def _place(pool, layout):
    return jax.tree.map(lambda x: constrain(x, layout, *pool.axes), pool)


def _batch(tree, layout):
    """Pins arrays whose first axis is the replica."""
    return jax.tree.map(
        lambda x: constrain(x, layout, "batch", *[None] * (x.ndim - 1)), tree
    )


def prefill(
    params: qwen3.Params,
    pool: kv_cache.Pool,
    waiting: States,
    batch: dict[str, jax.Array],
    *,
    config: qwen3.Config,
    layout: Layout | None,
    dtype: jnp.dtype,
) -> tuple[kv_cache.Pool, States]:
    """Computes blocks of prompts; the states of prompts that end among them.

    Args:
        batch: the arrays of a `scheduler.Prefill`.
    """
    batch = _batch(batch, layout)
    tokens_RXQ, row_RX, last_RX = batch["tokens"], batch["row"], batch["last"]
    R, X, Q = tokens_RXQ.shape
    rows = kv_cache.Rows(batch["table"], batch["start"], batch["active"], pairs=None)
    position_RXQ = batch["start"][..., None] + jnp.arange(Q)[None, None]
    rope = _rope_table(config, rows.table, pool)
    hidden_RTD, pool = qwen3.decode(
        params,
        config,
        tokens_RXQ.reshape(R, X * Q),
        [part[position_RXQ.reshape(R, X * Q)] for part in rope],
        functools.partial(_attend, rows, layout),
        pool,
        layout=layout,
        dtype=dtype,
    )
    hidden_RXQD = hidden_RTD.reshape(R, X, Q, -1)
    last_RXD = jnp.take_along_axis(
        hidden_RXQD, jnp.maximum(last_RX, 0)[..., None, None], axis=2
    )[:, :, 0]
    replica_R1 = jnp.arange(R)[:, None]
    nowhere = waiting.hidden.shape[1]
    ends_RX = jnp.where(last_RX >= 0, row_RX, nowhere)
    hidden = waiting.hidden.at[replica_R1, ends_RX].set(last_RXD, mode="drop")
    seen = waiting.seen
    if seen is not None:
        begins_RX = jnp.where(batch["start"] == 0, row_RX, nowhere)
        seen = seen.at[replica_R1, begins_RX].set(False, mode="drop")
        seen = seen.at[
            replica_R1[..., None],
            jnp.broadcast_to(row_RX[..., None], tokens_RXQ.shape),
            tokens_RXQ,
        ].set(True, mode="drop")
    return _place(pool, layout), _batch(States(hidden, seen), layout)


def _rope_table(config, table_RBM, pool):
    """cos and sin at every position of a slot, [M x P, H/2] each, to be looked up: XLA on
    CPU would compute them within every use, in every layer."""
    page_tokens = pool.k[0].shape[-1 if pool.v else 2]
    positions_1T = jnp.arange(table_RBM.shape[-1] * page_tokens)[None]
    return [part_1TH[0] for part_1TH in qwen3.rope_angles(config, positions_1T)]


def _attend(rows, layout, layer, pool, q, k, v):
    return kv_cache.append_and_attend(layer, pool, rows, q, k, v, layout=layout)


def decode(
    params: qwen3.Params,
    pool: kv_cache.Pool,
    slots: Slots,
    waiting: States,
    batch: dict[str, jax.Array],
    num_steps: jax.Array,
    stop_ids: jax.Array,
    *,
    config: qwen3.Config,
    sampling: Sampling,
    max_steps: int,
    num_pairs: int,
    layout: Layout | None,
    dtype: jnp.dtype,
) -> tuple[kv_cache.Pool, Slots, jax.Array, jax.Array]:
    """Draws `num_steps` tokens a slot, fewer if all end before; slots that are done compute
    along for nothing.

    Args:
        batch: arrays of a `scheduler.Decode`.
        num_pairs: of (slot, page) that XLA reads; 0 for the TPU kernel.

    Returns:
        Cache, slots, tokens_SRB, logprobs_SRB: S = max_steps, zeros for steps not taken.
    """
    batch = _batch(batch, layout)
    slots = _begin(slots, waiting, batch)
    limit_RB, table_RBM = batch["limit"], batch["table"]
    uniform_SRB = _uniform_numbers(batch["key"], slots.count_RB, max_steps)
    rope = _rope_table(config, table_RBM, pool)
    pairs = None
    if num_pairs:
        P = pool.k[0].shape[-1]
        left_RB = jnp.where(slots.stopped_RB, 0, limit_RB - slots.count_RB)
        end_RB = slots.length_RB + jnp.minimum(left_RB, num_steps)
        pages_RB = jnp.where(left_RB > 0, -(-end_RB // P), 0)
        pairs = jax.vmap(lambda pages_B: page_pairs(pages_B, num_pairs))(pages_RB)

    def active(slots):
        return ~slots.stopped_RB & (slots.count_RB < limit_RB)

    def goes_on(carry):
        i, _, slots, *_ = carry
        return (i < num_steps) & active(slots).any()

    def step(carry):
        i, pool, slots, tokens_SRB, logprobs_SRB = carry
        active_RB = active(slots)
        token_RB, logprob_RB = _draw(params, slots.states, uniform_SRB[i], sampling)
        rows = kv_cache.Rows(table_RBM, slots.length_RB, active_RB, pairs)
        hidden_RBD, pool = qwen3.decode(
            params,
            config,
            token_RB,
            [part[slots.length_RB] for part in rope],
            functools.partial(_attend, rows, layout),
            pool,
            layout=layout,
            dtype=dtype,
        )
        seen = slots.states.seen
        if seen is not None:
            R, B, _ = seen.shape
            seen = seen.at[jnp.arange(R)[:, None], jnp.arange(B)[None], token_RB].set(
                True
            )
        slots = Slots(
            states=States(hidden_RBD, seen),
            length_RB=slots.length_RB + active_RB,
            count_RB=slots.count_RB + active_RB,
            stopped_RB=slots.stopped_RB | (active_RB & jnp.isin(token_RB, stop_ids)),
        )
        return (
            i + 1,
            pool,
            slots,
            tokens_SRB.at[i].set(token_RB),
            logprobs_SRB.at[i].set(logprob_RB),
        )

    S_RB = (max_steps, *limit_RB.shape)
    drawn = jnp.zeros(S_RB, jnp.int32), jnp.zeros(S_RB, jnp.float32)
    _, pool, slots, *drawn = jax.lax.while_loop(
        goes_on, step, (jnp.int32(0), pool, slots, *drawn)
    )
    # Every process reads the whole of what was drawn.
    tokens_SRB, logprobs_SRB = (constrain(x, layout, None, None, None) for x in drawn)
    return _place(pool, layout), _batch(slots, layout), tokens_SRB, logprobs_SRB


def _begin(slots: Slots, waiting: States, batch: dict[str, jax.Array]) -> Slots:
    """The slots with new samples where `source` names a waiting state."""
    source_RB = batch["source"]
    new_RB = source_RB >= 0

    def take(old, waiting):
        row = jnp.take_along_axis(waiting, jnp.maximum(source_RB, 0)[..., None], axis=1)
        return jnp.where(new_RB[..., None], row, old)

    return Slots(
        states=jax.tree.map(take, slots.states, waiting),
        length_RB=jnp.where(new_RB, batch["start"], slots.length_RB),
        count_RB=jnp.where(new_RB, batch["drawn"], slots.count_RB),
        stopped_RB=slots.stopped_RB & ~new_RB,
    )


def _uniform_numbers(key_RB4: jax.Array, count_RB: jax.Array, steps: int) -> jax.Array:
    """What decides the next tokens of each slot, [S, R, B]: a function of the key of the
    run or the step, the prompt, the sample, and the place in the response."""

    def one(key_4, count):
        key = jax.random.wrap_key_data(key_4[:2], impl="threefry2x32")
        for part in (key_4[2], key_4[3], count):
            key = jax.random.fold_in(key, part)
        return jax.random.uniform(key)

    count_SRB = count_RB[None] + jnp.arange(steps)[:, None, None]
    of_slots = jax.vmap(jax.vmap(one))
    return jax.vmap(of_slots, in_axes=(None, 0))(key_RB4, count_SRB)


def _draw(params, states, uniform_RB, sampling):
    """The next token of each slot and its log-prob in the whole distribution."""
    head_VD = qwen3.head_weight(params)
    R, B, D = states.hidden.shape
    logits_NV = jnp.einsum(
        "ND,VD->NV",
        states.hidden.reshape(R * B, D),
        head_VD,
        preferred_element_type=jnp.float32,
    )
    shown_NV = logits_NV
    if sampling.penalises:
        seen_NV = states.seen.reshape(logits_NV.shape)
        shown_NV = penalise(logits_NV, seen_NV, sampling.repetition_penalty)
    token_N = choose(shown_NV, uniform_RB.reshape(-1), sampling)
    logit_N = jnp.take_along_axis(logits_NV, token_N[:, None], axis=1)[:, 0]
    logprob_N = logit_N - jax.nn.logsumexp(logits_NV, axis=-1)
    return token_N.reshape(R, B), logprob_N.reshape(R, B)
