"""The keys and values of the tokens seen so far: one pool of pages for all sequences.

A pool holds A pages of P tokens; a sequence is a row of page numbers. Which page is whose
is decided on the host, by the `scheduler`.

Two forms of pool, since two kernels read them: XLA wants each layer's keys and values in
the order its dots walk them; the TPU kernel wants one array with all layers in it, which a
loop over layers carries without a copy.

Shape letters: R replicas (shards of the slots), B slots or blocks, Q tokens of a block
(1 in decoding), T = B x Q, M pages of a sequence, W pages to copy, K key/value heads,
C = 2 x K, H head width, L layers.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from klear_jax.attention import (
    PagePairs,
    paged_attention,
    paged_attention_tpu,
    paged_decode_attention,
)
from klear_jax.qwen3 import Config
from klear_jax.sharding import Layout, map_replicas

KERNELS = ("xla", "tpu")


@dataclasses.dataclass(frozen=True)
class PoolShape:
    replicas: int  # Each has its own pages and slots, and shares none.
    pages: int  # Of a replica.
    page_tokens: int
    kernel: str  # 'xla' or 'tpu': who reads the pool.


@flax.struct.dataclass
class Pool:
    """XLA: k and v are L arrays each, [R, A, K, H, P] and [R, A, K, P, H].

    TPU: k is one array [R, L x A, P, C, H], key and value of each head in turn; v is empty.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    num_layers: int = flax.struct.field(pytree_node=False)

    @property
    def axes(self) -> tuple[str | None, ...]:
        """Logical axes of each array."""
        if self.v:
            return ("batch", None, "kv_heads", None, None)
        return ("batch", None, None, "kv_heads", None)


def empty_pool(config: Config, shape: PoolShape, dtype: jnp.dtype) -> Pool:
    """A pool of zeros."""
    R, A, P = shape.replicas, shape.pages, shape.page_tokens
    L, K, H = config.num_layers, config.num_kv_heads, config.head_dim
    if shape.kernel == "tpu":
        return Pool((jnp.zeros((R, L * A, P, 2 * K, H), dtype),), (), L)
    return Pool(
        k=tuple(jnp.zeros((R, A, K, H, P), dtype) for _ in range(L)),
        v=tuple(jnp.zeros((R, A, K, P, H), dtype) for _ in range(L)),
        num_layers=L,
    )


@flax.struct.dataclass
class Rows:
    """Where the tokens of one forward pass stand: B blocks of Q tokens in each replica.

    Blocks never cross the border of a page: Q divides P, and Q divides `start`.
    """

    table: jax.Array  # [R, B, M]: the pages of each block's sequence.
    start: jax.Array  # [R, B]: the position of a block's first token.
    active: jax.Array  # [R, B]: blocks that are real; the others write nothing.
    pairs: PagePairs | None  # Arrays [R, ..]: in XLA's decoding, the pages in use.


def append_and_attend(
    layer: int | jax.Array,
    pool: Pool,
    rows: Rows,
    q_RTNH: jax.Array,
    k_RTKH: jax.Array,
    v_RTKH: jax.Array,
    *,
    layout: Layout | None,
) -> tuple[jax.Array, Pool]:
    """Writes the tokens' keys and values, then attends to them and all before them.

    Args:
        layer: which; traced in the TPU form, an int in XLA's.
        q_RTNH, k_RTKH, v_RTKH: after RoPE.
        layout: on a mesh, every device works on its own replica and heads.

    Returns:
        out_RTNH and the pool.
    """
    heads, kv_heads = (("batch", None, name, None) for name in ("heads", "kv_heads"))
    parts = (pool.k[layer], pool.v[layer]) if pool.v else pool.k
    one_replica = _xla_replica if pool.v else _tpu_replica
    # Pages of all layers lie behind one another in the TPU form.
    first_page = 0 if pool.v else layer * (pool.k[0].shape[1] // pool.num_layers)
    attend = map_replicas(
        one_replica,
        layout,
        ((), ("batch",), heads, kv_heads, kv_heads, *[pool.axes] * len(parts)),
        (heads, *[pool.axes] * len(parts)),
    )
    out_RTNH, *parts = attend(
        jnp.asarray(first_page, jnp.int32), rows, q_RTNH, k_RTKH, v_RTKH, *parts
    )
    if not pool.v:
        return out_RTNH, dataclasses.replace(pool, k=tuple(parts))
    k, v = list(pool.k), list(pool.v)
    k[layer], v[layer] = parts
    return out_RTNH, dataclasses.replace(pool, k=tuple(k), v=tuple(v))


def _pages_and_offsets(
    rows: Rows, page_tokens: int, nowhere: int
) -> tuple[jax.Array, jax.Array]:
    """Page [B] and offset [B] of each block's first token; inactive blocks lie nowhere."""
    order_B = rows.start // page_tokens
    page_B = jnp.take_along_axis(rows.table, order_B[:, None], axis=1)[:, 0]
    return jnp.where(rows.active, page_B, nowhere), rows.start % page_tokens


def _xla_replica(_, rows, q_TNH, k_TKH, v_TKH, k_AKHP, v_AKPH):
    A, P = k_AKHP.shape[0], k_AKHP.shape[-1]
    B = len(rows.start)
    q_BQNH, k_BQKH, v_BQKH = (
        x.reshape(B, -1, *x.shape[1:]) for x in (q_TNH, k_TKH, v_TKH)
    )
    page_B, offset_B = _pages_and_offsets(rows, P, nowhere=A)
    offset_BQ = offset_B[:, None] + jnp.arange(q_BQNH.shape[1])[None]
    page_BQ = jnp.broadcast_to(page_B[:, None], offset_BQ.shape)
    k_AKHP = k_AKHP.at[page_BQ, :, :, offset_BQ].set(k_BQKH, mode="drop")
    v_AKPH = v_AKPH.at[page_BQ, :, offset_BQ].set(v_BQKH, mode="drop")
    if rows.pairs is None:
        out = paged_attention(q_BQNH, k_AKHP, v_AKPH, rows.table, rows.start)
    else:
        out = paged_decode_attention(
            q_TNH, k_AKHP, v_AKPH, rows.table, rows.start + 1, rows.pairs
        )
    return out.reshape(q_TNH.shape), k_AKHP, v_AKPH


def _tpu_replica(first_page, rows, q_TNH, k_TKH, v_TKH, kv_APCH):
    A, P, C, H = kv_APCH.shape
    B = len(rows.start)
    q_BQNH = q_TNH.reshape(B, -1, *q_TNH.shape[1:])
    page_B, offset_B = _pages_and_offsets(rows, P, nowhere=A)
    # One row a token; past the end, where inactive blocks go, it is dropped.
    row_B = (page_B + first_page) * P + offset_B
    row_BQ = row_B[:, None] + jnp.arange(q_BQNH.shape[1])[None]
    kv_TCH = jnp.stack([k_TKH, v_TKH], axis=2).reshape(-1, C, H)
    kv_rows = kv_APCH.reshape(A * P, C, H)
    kv_rows = kv_rows.at[row_BQ.reshape(-1)].set(kv_TCH, mode="drop")
    kv_APCH = kv_rows.reshape(kv_APCH.shape)
    # What is inactive would read its whole past, for nothing.
    start_B = jnp.where(rows.active, rows.start, 0)
    out_BQNH = paged_attention_tpu(q_BQNH, kv_APCH, rows.table + first_page, start_B)
    return out_BQNH.reshape(q_TNH.shape), kv_APCH


def copy_pages(
    pool: Pool,
    source_RW: jax.Array,
    target_RW: jax.Array,
    count_R: jax.Array,
    *,
    layout: Layout | None,
) -> Pool:
    """Copies the first `count` pages of each list within its replica, in all layers.

    Page by page: a gather and a scatter would hold a second pool.
    """
    num_pages = pool.k[0].shape[1] // (1 if pool.v else pool.num_layers)

    def copy(source_W, target_W, count, part):
        part_LA = part.reshape(-1, num_pages, *part.shape[1:])

        def one(w, part_LA):
            page_L1 = jax.lax.dynamic_slice_in_dim(part_LA, source_W[w], 1, axis=1)
            return jax.lax.dynamic_update_slice_in_dim(
                part_LA, page_L1, target_W[w], axis=1
            )

        return jax.lax.fori_loop(0, count, one, part_LA).reshape(part.shape)

    batch = ("batch",)
    copy = map_replicas(copy, layout, (batch, batch, batch, pool.axes), pool.axes)
    return jax.tree.map(lambda part: copy(source_RW, target_RW, count_R, part), pool)
