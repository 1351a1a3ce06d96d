"""Attention against plain float64 numpy, whole, in blocks of queries, and one step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klear_jax import attention

B, T, N, K, H = 2, 37, 6, 2, 8
# Two sequences and padding within a row; a sequence split by padding and by another.
SEGMENTS = np.array(
    [[1] * 17 + [2] * 14 + [0] * 6, [0] * 3 + [5, 5, 0, 7, 5] * 6 + [7] * 4]
)


def inputs(dtype=jnp.float32, scale=2.0):
    rng = np.random.default_rng(0)
    shapes = [(B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H)]
    return [jnp.asarray(scale * rng.normal(size=s), dtype) for s in shapes]


def plain(q, k, v, segments):
    """One softmax at a time, in float64; query head n uses key head n // (N / K)."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = np.flatnonzero(segments[b, : t + 1] == segments[b, t])
        group = n // (q.shape[2] // k.shape[2])
        scores = k[b, seen, group] @ q[b, t, n] / np.sqrt(q.shape[3])
        probs = np.exp(scores - scores.max())
        out[b, t, n] = probs / probs.sum() @ v[b, seen, group]
    return out


@pytest.mark.parametrize("scale, atol", [(2.0, 5e-6), (60.0, 0.1)])
def test_same_as_plain_softmax(scale, atol):
    """Also where real scores are about -1e4, below many a stand-in for minus infinity."""
    q, k, v, _ = inputs(scale=scale)
    got = jax.jit(attention.attention)(q, k, v, SEGMENTS)
    np.testing.assert_allclose(got, plain(q, k, v, SEGMENTS), atol=atol)


def test_bf16_keeps_its_dtype_and_float32_scores():
    q, k, v, _ = inputs(jnp.bfloat16)
    got = jax.jit(attention.attention)(q, k, v, SEGMENTS)
    assert got.dtype == jnp.bfloat16
    # Rounded: probabilities (once) and the result, each to 8 bits, of |v| up to 8.
    np.testing.assert_allclose(got, plain(q, k, v, SEGMENTS), atol=0.03)


def test_grouped_heads_are_repeated_heads():
    q, k, v, _ = inputs()
    segments = jnp.asarray(SEGMENTS)
    repeated = [jnp.repeat(x, N // K, axis=2) for x in (k, v)]
    run = jax.jit(attention.attention)
    got, want = run(q, k, v, segments), run(q, *repeated, segments)
    # Not the same bits: heads that share a key are one matrix, and sums have another order.
    np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max())


def test_blocks_of_queries_change_nothing(monkeypatch):
    q, k, v, weight = inputs()

    def run():
        """A new function, so that jit does not remember the other block size."""

        def loss(q, k, v):
            out = attention.attention(q, k, v, jnp.asarray(SEGMENTS))
            return jnp.sum(out * weight), out

        (_, out), grads = jax.jit(
            jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
        )(q, k, v)
        return out, *grads

    want = run()

    def check():
        for got, one in zip(run(), want, strict=True):
            np.testing.assert_allclose(got, one, atol=2e-6 * np.abs(one).max())

    for block in (8, T - 1):  # The last block has 5 queries, 1 query.
        for longest in (0, T):
            monkeypatch.setattr(attention, "SHORT_BLOCK", block)
            monkeypatch.setattr(attention, "LONG_BLOCK", block)
            monkeypatch.setattr(attention, "LONG_ROW", longest)
            check()


def test_long_rows_never_hold_all_scores():
    tokens = 8192
    shape = jax.ShapeDtypeStruct((1, tokens, 4, 16), jnp.float32)
    segments = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

    def loss(q, k, v, segments):
        return jnp.sum(attention.attention(q, k, v, segments) ** 2)

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(
        shape, shape, shape, segments
    )
    temp = compiled.compile().memory_analysis().temp_size_in_bytes
    all_scores = 4 * tokens * tokens * 4
    # A few float32 [block, T] of the backward pass, and the inputs in other orders.
    assert temp < 0.3 * all_scores, (temp, all_scores)


def test_padding_is_harmless():
    """What stands under padding reaches neither the output nor the gradients."""
    q, k, v, weight = inputs()
    real = SEGMENTS[..., None, None] != 0
    segments = jnp.asarray(SEGMENTS)

    def loss(q, k, v):
        out = attention.attention(q, k, v, segments)
        return jnp.sum(jnp.where(real, out * weight, 0.0)), out

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, out), grads = run(q, k, v)
    junk = [jnp.where(real, x, 1e4) for x in (q, k, v)]
    (_, junk_out), junk_grads = run(*junk)
    np.testing.assert_array_equal(np.where(real, junk_out, 0), np.where(real, out, 0))
    assert np.isfinite(junk_out).all()
    for got, want in zip(junk_grads, grads, strict=True):
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(np.where(real, 0, got), 0)


@pytest.mark.filterwarnings("ignore:.*pallas.ops.gpu.attention is deprecated")
@pytest.mark.parametrize("kernel", ["splash_attention", "flash_attention"])
@pytest.mark.parametrize("T, head_dim", [(37, 8), (300, 128)])
def test_the_kernels_are_the_same_forward_and_backward(kernel, T, head_dim):
    """In interpret mode: their numbers, not their speed. 300 tokens are three tiles."""
    rng = np.random.default_rng(1)
    shapes = [(2, T, n, head_dim) for n in (N, K, K, N)]
    q, k, v, weight = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    segments = jnp.asarray(np.resize(SEGMENTS, (2, T)))

    def run(attend):
        def loss(q, k, v):
            return jnp.sum(attend(q, k, v, segments) * weight)

        out = attend(q, k, v, segments)
        return out, *jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    kernel = functools.partial(getattr(attention, kernel), interpret=True)
    for got, want in zip(run(kernel), run(attention.attention), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)
