"""Causal attention within segments: one function for training, scoring and prefill, and
one step of decoding over a cache.

Shape letters: B rows, T query tokens, S key tokens, N = K x G query heads, K key/value
heads, H head width.
"""

import functools

import jax
import jax.numpy as jnp

QUERY_BLOCK = (
    512  # Rows longer than this never hold all of their [T, S] scores at once.
)
MASKED = -1e30  # Finite, so that a fully masked row of scores stays a number.


def attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array
) -> jax.Array:
    """softmax(q k / sqrt(H)) v over the earlier tokens of the same segment.

    Causal by index in the row. Padding (segment 0) is a segment like another: it sees
    only padding, nobody sees it, and no row of scores is ever wholly masked. Scores and
    softmax are float32. Memory grows with QUERY_BLOCK x T, not T x T: the scores of one
    block of queries are recomputed in the backward pass.

    Returns:
        out_BTNH in the dtype of v.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    index_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    attend = functools.partial(_attend, k_BTKH, v_BTKH, index_BT, segment_ids_BT)
    if T <= QUERY_BLOCK:
        return attend(q_BTKGH, index_BT, segment_ids_BT).reshape(q_BTNH.shape)

    def blocks(x_BT):
        pad = -T % QUERY_BLOCK
        x_BT = jnp.pad(x_BT, [(0, 0), (0, pad)] + [(0, 0)] * (x_BT.ndim - 2))
        x_BXT = x_BT.reshape(B, -1, QUERY_BLOCK, *x_BT.shape[2:])
        return jnp.moveaxis(x_BXT, 1, 0)

    queries = (blocks(q_BTKGH), blocks(index_BT), blocks(segment_ids_BT))
    out_XBTKGH = jax.lax.map(lambda block: jax.checkpoint(attend)(*block), queries)
    return jnp.moveaxis(out_XBTKGH, 0, 1).reshape(B, -1, N, H)[:, :T]


def _attend(k_BSKH, v_BSKH, index_BS, segment_BS, q_BTKGH, index_BT, segment_BT):
    """Attention of some queries to all keys; both know their index and segment."""
    sees_BTS = (index_BS[:, None, :] <= index_BT[:, :, None]) & (
        segment_BS[:, None, :] == segment_BT[:, :, None]
    )
    scores_BKGTS = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    scores_BKGTS *= q_BTKGH.shape[-1] ** -0.5
    scores_BKGTS = jnp.where(sees_BTS[:, None, None], scores_BKGTS, MASKED)
    probs_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", probs_BKGTS, v_BSKH)


def decode_attention(
    q_BNH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, length_B: jax.Array
) -> jax.Array:
    """One query a row against the first `length` entries of its cache; out_BNH.

    The cache keeps K as [.., H, S] and V as [.., S, H]: both dots then read it in the
    order it lies in memory, which on CPU is worth a factor of 1.6.
    """
    B, N, H = q_BNH.shape
    K = k_BKHS.shape[1]
    q_BKGH = q_BNH.reshape(B, K, N // K, H)
    scores_BKGS = jnp.einsum(
        "BKGH,BKHS->BKGS", q_BKGH, k_BKHS, preferred_element_type=jnp.float32
    )
    sees_BS = jnp.arange(k_BKHS.shape[-1])[None] < length_B[:, None]
    scores_BKGS = jnp.where(sees_BS[:, None, None], scores_BKGS * H**-0.5, MASKED)
    probs_BKGS = jax.nn.softmax(scores_BKGS, axis=-1).astype(v_BKSH.dtype)
    return jnp.einsum("BKGS,BKSH->BKGH", probs_BKGS, v_BKSH).reshape(B, N, H)
