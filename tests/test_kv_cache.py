"""The paged cache: forward passes over pages are those over whole rows, in both its forms;
the TPU kernel, interpreted, is the XLA path."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import literals
from jax.experimental import pallas
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel as library

from klear_jax import attention, decoding, kv_cache, qwen3, scheduler

SMALL = qwen3.Config(
    vocab_size=67,
    width=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=40,
    rope_theta=1e4,
    norm_eps=1e-6,
    tied=True,
    qk_norm=True,
    max_positions=64,
)
LLAMA = dataclasses.replace(SMALL, qk_norm=False, tied=False)
WIDE = dataclasses.replace(SMALL, head_dim=128)  # What the TPU kernel asks for.
B, T, PAGE, BLOCK = 4, 16, 8, 4
LENGTHS = np.array([1, 4, 9, 3])  # Of the prompts.


@functools.cache
def params_of(config):
    rng = np.random.default_rng(0)

    def init(param):
        x = rng.normal(1 if param.init_std is None else 0, 0.25, param.shape)
        return jnp.asarray(x, jnp.float32)

    return jax.tree.map(init, qwen3.param_table(config))


@pytest.fixture
def interpreted(monkeypatch):
    """The library's kernel asks for no interpreter, and Pallas' own (jax 0.10, 0.12) trips
    over the shape of an index that is a constant."""

    class Pallas:
        pallas_call = staticmethod(
            functools.partial(pallas.pallas_call, interpret=True)
        )

        def __getattr__(self, name):
            return getattr(pallas, name)

    monkeypatch.setattr(library, "pl", Pallas())
    monkeypatch.setattr(literals.TypedInt, "shape", (), raising=False)


def pages(seed=0):
    """Scattered pages for B sequences of T tokens; the pool holds three more."""
    return np.random.default_rng(seed).permutation(B * T // PAGE + 3)[: B * T // PAGE]


def paged_hidden(config, kernel, tokens):
    """hidden [B, T, D] by prefill in blocks of prompts, then token by token."""
    params = params_of(config)
    if kernel == "xla":
        params = qwen3.unstack_layers(params)
    shape = kv_cache.PoolShape(1, B * T // PAGE + 3, PAGE, kernel)
    pool = kv_cache.empty_pool(config, shape, jnp.dtype("float32"))
    # Whatever an earlier sample left must not matter.
    pool = jax.tree.map(lambda x: x + 1e4, pool)
    table = pages().reshape(B, -1).astype(np.int32)
    hidden = np.zeros((B, T, config.width), np.float32)

    @jax.jit
    def run(pool, tokens_RT, positions_RT, rows):
        attend = functools.partial(decoding._attend, rows, None)
        rope = qwen3.rope_angles(config, positions_RT)
        return qwen3.decode(params, config, tokens_RT, rope, attend, pool)

    for start in range(0, LENGTHS.max(), BLOCK):
        block = start + np.arange(BLOCK)[None]
        rows = kv_cache.Rows(
            table=table[None],
            start=np.full((1, B), start, np.int32),
            active=start < LENGTHS[None],
            pairs=None,
        )
        found, pool = run(
            pool,
            tokens[:, start : start + BLOCK].reshape(1, -1),
            np.tile(block, (B, 1)).reshape(1, -1),
            rows,
        )
        found = np.asarray(found).reshape(B, BLOCK, -1)
        real = block < LENGTHS[:, None]
        hidden[:, start : start + BLOCK][real] = found[real]

    for ahead in range(T - LENGTHS.min()):
        at = np.minimum(LENGTHS + ahead, T - 1).astype(np.int32)
        pairs = attention.page_pairs(jnp.asarray(at // PAGE + 1), B * T // PAGE)
        rows = kv_cache.Rows(
            table=table[None],
            start=at[None],
            active=LENGTHS[None] + ahead < T,
            pairs=jax.tree.map(lambda x: x[None], pairs) if kernel == "xla" else None,
        )
        found, pool = run(pool, tokens[np.arange(B), at][None], at[None], rows)
        going = LENGTHS + ahead < T
        hidden[np.arange(B)[going], at[going]] = np.asarray(found)[0, going]
    return hidden


@pytest.mark.parametrize(
    "config, kernel",
    [(SMALL, "xla"), (LLAMA, "xla"), (WIDE, "xla"), (WIDE, "tpu")],
    ids=["qwen3", "llama", "wide", "tpu"],
)
def test_paged_is_forward(interpreted, config, kernel):
    """In XLA's form with the layers unrolled, in the TPU's with a loop over the layers."""
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (B, T))
    want = jax.jit(functools.partial(qwen3.forward, config=config))(
        params_of(config), tokens_BT=tokens
    )
    got = paged_hidden(config, kernel, tokens.astype(np.int32))
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("dtype, atol", [("float32", 2e-6), ("bfloat16", 0.02)])
@pytest.mark.parametrize("queries", [1, 16])
def test_the_tpu_kernel_is_the_xla_path(interpreted, queries, dtype, atol):
    """Interpreted: prefill blocks and decoding, bf16 as on the chip."""
    rng = np.random.default_rng(1)
    A, P, K, G, H, rows, M = 12, 16, 2, 2, 128, 3, 3
    k, v = (jnp.asarray(rng.normal(size=(A, P, K, H)), dtype) for _ in range(2))
    q = jnp.asarray(rng.normal(size=(rows, queries, K * G, H)), dtype)
    table = jnp.asarray(rng.permutation(A)[: rows * M].reshape(rows, M), jnp.int32)
    start = jnp.array([0, 16, 32], jnp.int32) + (jnp.array([3, 0, 15]) * (queries == 1))
    start = start.astype(jnp.int32)
    k_AKHP, v_AKPH = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    if queries == 1:
        pairs = attention.page_pairs(start // P + 1, rows * M)
        want = attention.paged_decode_attention(
            q[:, 0], k_AKHP, v_AKPH, table, start + 1, pairs
        )[:, None]
    else:
        want = attention.paged_attention(q, k_AKHP, v_AKPH, table, start)
    kv = jnp.stack([k, v], axis=3).reshape(A, P, 2 * K, H)
    got = attention.paged_attention_tpu(q, kv, table, start)
    assert got.dtype == want.dtype == dtype
    np.testing.assert_allclose(
        np.float32(got), np.float32(want), atol=atol, rtol=10 * atol
    )


@pytest.mark.parametrize("kernel", kv_cache.KERNELS)
def test_pages_are_copied_in_every_layer(kernel):
    shape = kv_cache.PoolShape(2, 5, PAGE, kernel)
    pool = kv_cache.empty_pool(SMALL, shape, jnp.dtype("float32"))
    pool = jax.tree.map(
        lambda x: jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), pool
    )
    one = jax.tree.map(lambda x: x[:1], pool)
    source, target = np.array([[3, 2, 0]]), np.array([[1, 4, 2]])
    got = jax.jit(functools.partial(kv_cache.copy_pages, layout=None))(
        one,
        source,
        target,
        np.array([2]),  # The third is none.
    )
    for before, after in zip(jax.tree.leaves(one), jax.tree.leaves(got), strict=True):
        before = np.array(before).reshape(-1, 5, *before.shape[2:])
        before[:, [1, 4]] = before[:, [3, 2]]
        np.testing.assert_array_equal(after.reshape(before.shape), before)


@hypothesis.settings(max_examples=15)
@hypothesis.given(data=st.data())
def test_a_slot_has_the_same_bits_whatever_the_others_hold(data):
    """As the sampler compiles it: for any load of the other slots, any size of the list of
    pairs, and any place."""
    slots, M, K, G, H, P = data.draw(
        st.sampled_from([(8, 30, 2, 2, 8, 8), (16, 20, 2, 4, 16, 16)])
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    lengths = rng.integers(1, M * P, slots).astype(np.int32)
    lengths[: data.draw(st.integers(0, slots - 1))] = 5
    A = slots * M + 1
    q = rng.normal(size=(slots, K * G, H)).astype(np.float32)
    k = rng.normal(size=(A, K, H, P)).astype(np.float32)
    v = rng.normal(size=(A, K, P, H)).astype(np.float32)
    table = rng.permutation(A)[: slots * M].reshape(slots, M).astype(np.int32)
    used = -(-lengths // P)
    sizes = decoding.pair_sizes(scheduler.Shape(1, slots, A, P, M, 1, 8, 8))

    def run(order, size):
        return np.asarray(
            decode_attention(
                q[order], k, v, table[order], lengths[order], used[order], size
            )
        )

    order = np.arange(slots)
    want = run(order, sizes[-1])
    fits = [size for size in sizes if size >= used.sum()]
    np.testing.assert_array_equal(run(order, fits[0]), want)
    order = rng.permutation(slots)
    np.testing.assert_array_equal(run(order, fits[0]), want[order])
    # The others grow to their ends; the last slot does not notice.
    lengths[:-1], used[:-1] = M * P, M
    np.testing.assert_array_equal(run(np.arange(slots), sizes[-1])[-1], want[-1])


@functools.partial(
    jax.jit, static_argnums=6, compiler_options=decoding.compiler_options("cpu")
)
def decode_attention(q, k, v, table, lengths, used, size):
    pairs = attention.page_pairs(used, size)
    return attention.paged_decode_attention(q, k, v, table, lengths, pairs)
