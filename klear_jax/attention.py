"""Causal attention: within segments for training and scoring, over pages for sampling.

Shape letters: B rows (slots, blocks of queries), T query tokens, S key tokens,
N = K x G query heads, K key/value heads, H head width; A pages of the pool, P tokens of a
page, M pages of a sequence, Q queries of a block, X pairs of slot and page.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import (
    ragged_paged_attention,
)

from klear_jax.sharding import Layout, map_shards, platform

# Of XLA: a row of more tokens never holds all of its [T, S] scores at once; queries of a block
# in a short and in a long row.
LONG_ROW = 512
SHORT_BLOCK, LONG_BLOCK = 64, 512
MASKED = -1e30  # Finite, so that a fully masked row of scores stays a number.
# Of the TPU kernel of training: queries and keys of a tile. A tile of keys is read once for
# so many queries: 1,024 operations a byte, where v6e, the hungriest, needs 560.
SPLASH_BLOCKS = (1024, 512, 256, 128)
FLASH_BLOCK = 128  # Of the GPU kernel: queries and keys of a tile, forward.
FLASH_BACKWARD_BLOCK = 64
# Of the TPU kernel of sampling: keys held at once, slots that share a block of queries,
# bytes.
KERNEL_KEYS = 1024
KERNEL_DECODE_ROWS = 8
KERNEL_VMEM = 64 << 20


def attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    layout: Layout | None = None,
) -> jax.Array:
    """softmax(q k / sqrt(H)) v over the earlier tokens of the same segment.

    Causal by index in the row. Padding (segment 0) is a segment like another: it sees
    only padding, nobody sees it, and no row of scores is ever wholly masked. Scores and
    softmax are float32. Memory grows with a block of queries x T, not T x T: scores are
    computed anew in the backward pass. On TPUs and GPUs it is a Pallas kernel (cuDNN's
    know no segments), elsewhere XLA.

    Args:
        layout: of the arrays; None on one device.

    Returns:
        out_BTNH in the dtype of v; what a backward pass may keep of it is called
        'attention'.
    """
    where = platform(layout)
    if where == "cpu":
        out_BTNH = blockwise_attention(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
        return checkpoint_name(out_BTNH, "attention")
    query, key = (("batch", None, axis, None) for axis in ("heads", "kv_heads"))
    kernel = splash_attention if where == "tpu" else flash_attention
    kernel = map_shards(kernel, layout, [query, key, key, ("batch", None)], query)
    return kernel(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)


def splash_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`attention` on one TPU, as Pallas kernels: it walks the tiles on and below the diagonal.

    Args:
        interpret: on any device, slowly; for tests.
    """
    _, T, N, H = q_BTNH.shape
    pad = -T % SPLASH_BLOCKS[-1]
    size = next(size for size in SPLASH_BLOCKS if (T + pad) % size == 0)
    names = "q kv kv_compute q_dkv kv_dkv kv_dkv_compute q_dq kv_dq".split()
    sizes: dict[str, Any] = {f"block_{name}": size for name in names}
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([splash.CausalMask((T + pad, T + pad))] * N),
        block_sizes=splash.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )

    def heads_first(x_BTNH):
        x_BTNH = jnp.pad(x_BTNH, [(0, 0), (0, pad), (0, 0), (0, 0)])
        return x_BTNH.transpose(0, 2, 1, 3)

    q_BTNH = (q_BTNH.astype(jnp.float32) * H**-0.5).astype(q_BTNH.dtype)
    segment_ids_BT = jnp.pad(segment_ids_BT, [(0, 0), (0, pad)])
    out_BNTH = jax.vmap(kernel)(
        *map(heads_first, (q_BTNH, k_BTKH, v_BTKH)),
        splash.SegmentIds(segment_ids_BT, segment_ids_BT),
    )
    return out_BNTH.transpose(0, 2, 1, 3)[:, :T]


def flash_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`attention` on one GPU, as Pallas kernels.

    Args:
        interpret: on any device, slowly; for tests.
    """
    # Here, since jax 0.12 warns that it will go, in favour of the package tokamax.
    from jax.experimental.pallas.ops.gpu import attention as flash

    _, T, N, H = q_BTNH.shape
    pad = -T % FLASH_BLOCK

    def fill(x_BTH):
        return jnp.pad(x_BTH, [(0, 0), (0, pad)] + [(0, 0)] * (x_BTH.ndim - 2))

    # The kernel has as many keys as queries; their gradients are summed by repeat's own.
    k_BTNH, v_BTNH = (
        jnp.repeat(fill(x_BTKH), N // x_BTKH.shape[2], axis=2)
        for x_BTKH in (k_BTKH, v_BTKH)
    )
    out_BTNH = flash.mha(
        fill(q_BTNH),
        k_BTNH,
        v_BTNH,
        fill(segment_ids_BT),
        sm_scale=H**-0.5,
        causal=True,
        block_sizes=flash.BlockSizes(
            FLASH_BLOCK, FLASH_BLOCK, *[FLASH_BACKWARD_BLOCK] * 4
        ),
        interpret=interpret,
    )
    return checkpoint_name(out_BTNH[:, :T], "attention")


def blockwise_attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array
) -> jax.Array:
    """`attention` in XLA, a block of queries at a time: in a short row against the keys that it
    can see, in a long one against all.

    Heads come first, and the queries that share a key head form one matrix: as einsum would
    lay them out, XLA's CPU backend takes twice as long.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BKHT, v_BKTH = k_BTKH.transpose(0, 2, 3, 1), v_BTKH.transpose(0, 2, 1, 3)
    index_T = jnp.arange(T)

    def attend(q_BKGtH, index_t, segment_ids_Bt, end):
        sees_BtS = (index_T[None, None, :end] <= index_t[None, :, None]) & (
            segment_ids_BT[:, None, :end] == segment_ids_Bt[:, :, None]
        )
        return _attend(q_BKGtH, k_BKHT[..., :end], v_BKTH[:, :, :end], sees_BtS)

    if T <= LONG_ROW:
        cuts = [slice(start, start + SHORT_BLOCK) for start in range(0, T, SHORT_BLOCK)]
        outs = [
            attend(
                q_BKGTH[:, :, :, cut], index_T[cut], segment_ids_BT[:, cut], cut.stop
            )
            for cut in cuts
        ]
        out_BKGTH = jnp.concatenate(outs, axis=3)
    else:

        def blocks(x, axis):
            pads = [(0, 0)] * x.ndim
            pads[axis] = (0, -T % LONG_BLOCK)
            x = jnp.pad(x, pads)
            x = x.reshape(*x.shape[:axis], -1, LONG_BLOCK, *x.shape[axis + 1 :])
            return jnp.moveaxis(x, axis, 0)

        queries = (blocks(q_BKGTH, 3), blocks(index_T, 0), blocks(segment_ids_BT, 1))
        # Scores are computed anew in the backward pass.
        attend_all = jax.checkpoint(
            lambda block: attend(block[0], block[1], block[2], T)
        )
        out_XBKGtH = jax.lax.map(attend_all, queries)
        out_BKGTH = jnp.moveaxis(out_XBKGtH, 0, 3)
        out_BKGTH = out_BKGTH.reshape(*q_BKGTH.shape[:3], -1, H)[:, :, :, :T]
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)


def _attend(q_BKGTH, k_BKHS, v_BKSH, sees_BTS):
    """Attention of some queries to the first S keys."""
    B, K, G, T, H = q_BKGTH.shape
    scores_BKCS = jnp.einsum(
        "BKCH,BKHS->BKCS",
        q_BKGTH.reshape(B, K, G * T, H),
        k_BKHS,
        preferred_element_type=jnp.float32,
    )
    scores_BKGTS = _scale(scores_BKCS, H).reshape(B, K, G, T, -1)
    scores_BKGTS = jnp.where(sees_BTS[:, None, None], scores_BKGTS, MASKED)
    probs_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BKSH.dtype)
    out_BKCH = probs_BKGTS.reshape(B, K, G * T, -1) @ v_BKSH
    return out_BKCH.reshape(q_BKGTH.shape)


def paged_attention(
    q_BQNH: jax.Array,
    k_AKHP: jax.Array,
    v_AKPH: jax.Array,
    table_BM: jax.Array,
    start_B: jax.Array,
) -> jax.Array:
    """Blocks of Q queries against the pages of their sequences: prefill, in XLA.

    A page after the other, with a running maximum. A query's result is the same to the
    bit whatever other blocks there are: pages behind its own add exactly nothing.

    Args:
        q_BQNH: query i of a block stands at position start + i.
        k_AKHP, v_AKPH: the pool. Both dots read it in the order it lies in memory.
        table_BM: the pages of each block's sequence, in order.
        start_B: the position of a block's first query.

    Returns:
        out_BQNH.
    """
    B, Q, N, H = q_BQNH.shape
    _, K, _, P = k_AKHP.shape
    q_BKCH = (
        q_BQNH.reshape(B, Q, K, N // K, H)
        .transpose(0, 2, 1, 3, 4)
        .reshape(B, K, Q * (N // K), H)
    )
    position_BC = start_B[:, None] + jnp.arange(Q * (N // K))[None] // (N // K)

    def add_page(m, carry):
        top_BKC, sum_BKC, out_BKCH = carry
        page_B = jax.lax.dynamic_index_in_dim(table_BM, m, axis=1, keepdims=False)
        scores_BKCP = _scale(
            jnp.einsum(
                "BKCH,BKHP->BKCP",
                q_BKCH,
                k_AKHP[page_B],
                preferred_element_type=jnp.float32,
            ),
            H,
        )
        sees_BCP = (m * P + jnp.arange(P))[None, None] <= position_BC[:, :, None]
        scores_BKCP = jnp.where(sees_BCP[:, None], scores_BKCP, MASKED)
        new_top_BKC = jnp.maximum(top_BKC, scores_BKCP.max(axis=-1))
        keep_BKC = jnp.exp(top_BKC - new_top_BKC)
        prob_BKCP = jnp.exp(scores_BKCP - new_top_BKC[..., None])
        sum_BKC = sum_BKC * keep_BKC + prob_BKCP.sum(axis=-1)
        out_BKCH = out_BKCH * keep_BKC[..., None] + jnp.einsum(
            "BKCP,BKPH->BKCH",
            prob_BKCP.astype(v_AKPH.dtype),
            v_AKPH[page_B],
            preferred_element_type=jnp.float32,
        )
        return new_top_BKC, sum_BKC, out_BKCH

    # Page 0 holds a key that every query sees: from then on the maximum is a score.
    zeros_BKC = jnp.zeros(q_BKCH.shape[:3], jnp.float32)
    carry = (zeros_BKC + MASKED, zeros_BKC, jnp.zeros(q_BKCH.shape, jnp.float32))
    num_pages = (start_B.max() + Q - 1) // P + 1
    _, sum_BKC, out_BKCH = jax.lax.fori_loop(0, num_pages, add_page, carry)
    out_BKCH = (out_BKCH / sum_BKC[..., None]).astype(v_AKPH.dtype)
    return (
        out_BKCH.reshape(B, K, Q, N // K, H)
        .transpose(0, 2, 1, 3, 4)
        .reshape(q_BQNH.shape)
    )


@flax.struct.dataclass
class PagePairs:
    """The pages in use, as (slot, page of the slot) pairs, slot by slot: what decoding in
    XLA reads, however unequal the slots are."""

    slot_X: jax.Array
    order_X: jax.Array  # The how-manieth page of its slot.
    first_B: jax.Array  # Where a slot's pairs begin.


def page_pairs(pages_B: jax.Array, size: int) -> PagePairs:
    """The pairs of slots that use so many pages; `size` at least their sum."""
    end_B = jnp.cumsum(pages_B)
    first_B = end_B - pages_B
    # Counted, which is a vector operation, and not searched, which is a loop.
    slot_X = jnp.sum(jnp.arange(size)[:, None] >= end_B[None], axis=1)
    # What is left over reads page 0 of the last slot, and nobody reads the result.
    slot_X = jnp.minimum(slot_X, len(pages_B) - 1).astype(jnp.int32)
    order_X = jnp.arange(size, dtype=jnp.int32) - first_B[slot_X]
    return PagePairs(slot_X, jnp.where(order_X < pages_B[slot_X], order_X, 0), first_B)


def paged_decode_attention(
    q_BNH: jax.Array,
    k_AKHP: jax.Array,
    v_AKPH: jax.Array,
    table_BM: jax.Array,
    length_B: jax.Array,
    pairs: PagePairs,
) -> jax.Array:
    """One query a slot against the first `length` tokens of its pages, in XLA; out_BNH.

    Work follows the pages in use, not slots x longest: every (slot, page) pair gets its
    own softmax, and a slot's pairs are then weighed against each other. A slot's result
    is the same to the bit whatever the others hold.
    """
    B, N, H = q_BNH.shape
    _, K, _, P = k_AKHP.shape
    page_X = table_BM[pairs.slot_X, pairs.order_X]
    # Through a scatter, which XLA fuses with nothing: on CPU it would compute RoPE within
    # the gather, for every pair anew (and drops an optimization_barrier before it fuses).
    q_BNH = jnp.zeros_like(q_BNH).at[jnp.arange(B)].set(q_BNH, unique_indices=True)
    q_XKGH = q_BNH.reshape(B, K, N // K, H)[pairs.slot_X]
    scores_XKGP = _scale(
        jnp.einsum(
            "XKGH,XKHP->XKGP",
            q_XKGH,
            k_AKHP[page_X],
            preferred_element_type=jnp.float32,
        ),
        H,
    )
    filled_X = length_B[pairs.slot_X] - pairs.order_X * P
    sees_XP = jnp.arange(P)[None] < filled_X[:, None]
    scores_XKGP = jnp.where(sees_XP[:, None, None], scores_XKGP, MASKED)
    top_XKG = scores_XKGP.max(axis=-1)
    prob_XKGP = jnp.exp(scores_XKGP - top_XKG[..., None])
    sum_XKG = prob_XKGP.sum(axis=-1)
    out_XKGH = jnp.einsum(
        "XKGP,XKPH->XKGH",
        prob_XKGP.astype(v_AKPH.dtype),
        v_AKPH[page_X],
        preferred_element_type=jnp.float32,
    )

    pair_BM = pairs.first_B[:, None] + jnp.arange(table_BM.shape[1])[None]
    own_BM = jnp.arange(table_BM.shape[1])[None] * P < length_B[:, None]
    pair_BM = jnp.minimum(pair_BM, len(page_X) - 1)
    top_BMKG = jnp.where(own_BM[:, :, None, None], top_XKG[pair_BM], MASKED)
    weight_BMKG = jnp.exp(top_BMKG - top_BMKG.max(axis=1, keepdims=True))
    weight_BMKG = jnp.where(own_BM[:, :, None, None], weight_BMKG, 0.0)
    sum_BKG = jnp.sum(weight_BMKG * sum_XKG[pair_BM], axis=1)
    out_BKGH = jnp.sum(weight_BMKG[..., None] * out_XKGH[pair_BM], axis=1)
    # A slot without a token has no weight at all; its result is never used.
    out_BKGH /= jnp.maximum(sum_BKG, 1e-30)[..., None]
    return out_BKGH.reshape(B, N, H).astype(v_AKPH.dtype)


def _scale(scores, head_dim):
    return scores * head_dim**-0.5


def paged_attention_tpu(
    q_BQNH: jax.Array,
    kv_APCH: jax.Array,
    table_BM: jax.Array,
    start_B: jax.Array,
) -> jax.Array:
    """`paged_attention`, and for Q = 1 `paged_decode_attention`, as one Pallas kernel.

    Args:
        kv_APCH: the pool; C = 2 x K heads, key and value of each in turn.
        start_B: the position of a block's first query; its last key is its last query.

    Returns:
        out_BQNH.
    """
    B, Q, N, H = q_BQNH.shape
    _, P, _, _ = kv_APCH.shape
    out_TNH = ragged_paged_attention(
        q_BQNH.reshape(B * Q, N, H),
        kv_APCH,
        start_B + Q,
        table_BM,
        jnp.arange(B + 1, dtype=jnp.int32) * Q,
        jnp.full((1,), B, jnp.int32),
        sm_scale=H**-0.5,
        # Told, since the kernel would ask a TPU that may not be there.
        num_kv_pages_per_block=min(max(KERNEL_KEYS // P, 1), table_BM.shape[1]),
        num_queries_per_block=min(B * Q, KERNEL_DECODE_ROWS if Q == 1 else Q),
        vmem_limit_bytes=KERNEL_VMEM,
    )
    return out_TNH.reshape(q_BQNH.shape)
