"""The head: log-probabilities and entropy of tokens, without ever holding [tokens, V].

Logits exist for one block of the vocabulary at a time, forward and backward. The backward
pass makes each row of the head's gradient once, from all tokens, so that nothing of that
size is added up. Shape letters: N tokens (B x T), V vocabulary, D width, R shards of the
vocabulary, C columns of one block in each shard.
"""

import functools
from typing import Literal, overload

import jax
import jax.numpy as jnp

from klear_jax import qwen3
from klear_jax.sharding import Layout, constrain, sum_over_tokens

VOCAB_BLOCK = 2048  # Columns of logits held at once, per shard of the vocabulary.


@overload
def token_logprobs(
    params: qwen3.Params,
    config: qwen3.Config,
    tokens_BT: jax.Array,
    mask_BT: jax.Array | None = None,
    *,
    positions_BT: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    temperature: float = 1.0,
    layout: Layout | None = None,
    dtype: jnp.dtype | None = None,
    remat: str = "none",
    with_entropy: Literal[False] = False,
) -> jax.Array: ...
@overload
def token_logprobs(
    params: qwen3.Params,
    config: qwen3.Config,
    tokens_BT: jax.Array,
    mask_BT: jax.Array | None = None,
    *,
    positions_BT: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    temperature: float = 1.0,
    layout: Layout | None = None,
    dtype: jnp.dtype | None = None,
    remat: str = "none",
    with_entropy: Literal[True],
) -> tuple[jax.Array, jax.Array]: ...
def token_logprobs(
    params: qwen3.Params,
    config: qwen3.Config,
    tokens_BT: jax.Array,
    mask_BT: jax.Array | None = None,
    *,
    positions_BT: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    temperature: float = 1.0,
    layout: Layout | None = None,
    dtype: jnp.dtype | None = None,
    remat: str = "none",
    with_entropy: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Entry t is log p(token t | the earlier tokens of its segment), in nats.

    Args:
        tokens_BT: token ids.
        mask_BT: 0 on padding; default: nothing is.
        positions_BT, segment_ids_BT, layout, dtype, remat: as `qwen3.forward`.
        temperature: logits are divided by it.
        with_entropy: also return the entropy of the same distribution, as a metric: no
            gradient passes through it.

    Returns:
        logp_BT (and entropy_BT), float32; 0 unless tokens t and t - 1 are both real and
        of one segment.
    """
    if segment_ids_BT is None:
        segment_ids_BT = jnp.ones_like(tokens_BT)
    if mask_BT is not None:
        segment_ids_BT = jnp.where(mask_BT != 0, segment_ids_BT, 0)
    hidden_BTD = qwen3.forward(
        params,
        config,
        tokens_BT,
        positions_BT=positions_BT,
        segment_ids_BT=segment_ids_BT,
        layout=layout,
        dtype=dtype,
        remat=remat,
    )
    # The hidden state at t - 1 predicts token t; the last one predicts nothing.
    next_BT = jnp.roll(tokens_BT, -1, axis=1)
    logp_BT, entropy_BT = head_logprobs(
        hidden_BTD,
        qwen3.head_weight(params),
        next_BT,
        temperature=temperature,
        layout=layout,
    )
    predicted_BT = (segment_ids_BT != 0) & (
        segment_ids_BT == jnp.roll(segment_ids_BT, 1, axis=1)
    )
    predicted_BT = predicted_BT.at[:, 0].set(False)
    logp_BT = jnp.where(predicted_BT, jnp.roll(logp_BT, 1, axis=1), 0.0)
    if not with_entropy:
        return logp_BT
    return logp_BT, jnp.where(predicted_BT, jnp.roll(entropy_BT, 1, axis=1), 0.0)


def head_logprobs(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    *,
    temperature: float = 1.0,
    layout: Layout | None = None,
    vocab_block: int = VOCAB_BLOCK,
) -> tuple[jax.Array, jax.Array]:
    """log softmax(hidden head^T / temperature) at the targets, and its entropy.

    Logits are float32, from operands in hidden's dtype; the gradients of `head_VD` are
    made in its own dtype (float32 for master weights).

    Returns:
        logp_BT and entropy_BT, float32 nats. The entropy is a metric: it has no gradient.
    """
    # Whole in D, where the residual stream may be split: the contraction is with a head
    # whose D lies on other devices.
    hidden_BTD = constrain(hidden_BTD, layout, "batch", "seq", None)
    logp_N, entropy_N = _head(
        hidden_BTD.reshape(-1, hidden_BTD.shape[-1]),
        head_VD,
        targets_BT.reshape(-1),
        float(temperature),
        layout,
        vocab_block,
    )
    return logp_N.reshape(targets_BT.shape), entropy_N.reshape(targets_BT.shape)


def _blocks(head_VD, layout, vocab_block):
    """How to walk the vocabulary: the head by shards, block width and block count.

    Every shard is walked at once, each through its own contiguous rows, so that a block
    of a vocabulary split over devices is split the same way.
    """
    shards = 1 if layout is None else layout.shards("vocab")
    head_RVD = head_VD.reshape(shards, -1, head_VD.shape[-1])
    width = min(vocab_block, head_RVD.shape[1])
    return head_RVD, width, -(-head_RVD.shape[1] // width)


def _block_logits(i, hidden_ND, head_RVD, width, temperature, layout):
    """Block i's first row, its weights, logits_NRC, vocabulary ids and which are new.

    The last block is moved back to end with the vocabulary; the columns that it shares
    with the block before are not new.
    """
    rows = head_RVD.shape[1]
    start = jnp.minimum(i * width, rows - width)
    block_RCD = jax.lax.dynamic_slice_in_dim(head_RVD, start, width, axis=1)
    block_RCD = constrain(
        block_RCD.astype(hidden_ND.dtype), layout, "vocab", None, None
    )
    logits_NRC = jnp.einsum(
        "ND,RCD->NRC", hidden_ND, block_RCD, preferred_element_type=jnp.float32
    )
    row_C = start + jnp.arange(width)
    ids_RC = jnp.arange(head_RVD.shape[0])[:, None] * rows + row_C[None]
    return (
        start,
        block_RCD,
        logits_NRC / temperature,
        ids_RC[None],
        (row_C >= i * width)[None, None],
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _head(hidden_ND, head_VD, targets_N, temperature, layout, vocab_block):
    return _head_fwd(hidden_ND, head_VD, targets_N, temperature, layout, vocab_block)[0]


def _head_fwd(hidden_ND, head_VD, targets_N, temperature, layout, vocab_block):
    head_RVD, width, count = _blocks(head_VD, layout, vocab_block)

    def add_block(i, carry):
        top_NR, sum_NR, dot_NR, target_NR = carry
        _, _, logits_NRC, ids_1RC, new_11C = _block_logits(
            i, hidden_ND, head_RVD, width, temperature, layout
        )
        logits_NRC = jnp.where(new_11C, logits_NRC, -jnp.inf)
        new_top_NR = jnp.maximum(top_NR, logits_NRC.max(axis=2))
        below_NRC = logits_NRC - new_top_NR[:, :, None]
        exp_NRC = jnp.exp(below_NRC)
        # dot is sum exp(l - top) (l - top), for the entropy.
        sum_NR, dot_NR = _lift(top_NR - new_top_NR, sum_NR, dot_NR)
        dot_NR += jnp.sum(jnp.where(new_11C, exp_NRC * below_NRC, 0.0), axis=2)
        sum_NR += jnp.sum(exp_NRC, axis=2)
        hit_NRC = (ids_1RC == targets_N[:, None, None]) & new_11C
        target_NR += jnp.sum(jnp.where(hit_NRC, logits_NRC, 0.0), axis=2)
        return new_top_NR, sum_NR, dot_NR, target_NR

    # A shard of the vocabulary has its own sums, so that devices tell each other once.
    shape = (len(targets_N), len(head_RVD))
    zeros_NR = constrain(jnp.zeros(shape, jnp.float32), layout, "batch", "vocab")
    carry = (zeros_NR - 1e30, zeros_NR, zeros_NR, zeros_NR)
    top_NR, sum_NR, dot_NR, target_NR = jax.lax.fori_loop(0, count, add_block, carry)
    top_N = top_NR.max(axis=1)
    sum_NR, dot_NR = _lift(top_NR - top_N[:, None], sum_NR, dot_NR)
    sum_N, dot_N, target_N = (x.sum(axis=1) for x in (sum_NR, dot_NR, target_NR))
    # A probability is at most 1; rounding may say otherwise.
    logp_N = jnp.minimum((target_N - top_N) - jnp.log(sum_N), 0.0)
    entropy_N = jnp.log(sum_N) - dot_N / sum_N
    return (logp_N, entropy_N), (hidden_ND, head_VD, targets_N, top_N, jnp.log(sum_N))


def _lift(drop, sum_, dot):
    """sum exp(l - top) and sum exp(l - top) (l - top) for a top that is higher by -drop."""
    scale = jnp.exp(drop)
    return sum_ * scale, (dot + sum_ * drop) * scale


def _head_bwd(temperature, layout, vocab_block, kept, grads):
    hidden_ND, head_VD, targets_N, top_N, log_sum_N = kept
    grad_N = grads[0] / temperature
    head_RVD, width, count = _blocks(head_VD, layout, vocab_block)

    def dblock(dlogits_NRC, hidden_ND):
        return jnp.einsum(
            "NRC,ND->RCD",
            dlogits_NRC,
            hidden_ND,
            preferred_element_type=head_VD.dtype,
        )

    split = ("vocab", None, "embed")
    dblock = sum_over_tokens(
        dblock, layout, [("batch", "vocab", None), ("batch", None)], split
    )

    def add_block(i, carry):
        dhidden_RND, dhead_RVD = carry
        start, block_RCD, logits_NRC, ids_1RC, new_11C = _block_logits(
            i, hidden_ND, head_RVD, width, temperature, layout
        )
        probs_NRC = jnp.exp(
            (logits_NRC - top_N[:, None, None]) - log_sum_N[:, None, None]
        )
        hit_NRC = ids_1RC == targets_N[:, None, None]
        dlogits_NRC = grad_N[:, None, None] * (hit_NRC - probs_NRC)
        dhead_RVD = jax.lax.dynamic_update_slice_in_dim(
            dhead_RVD,
            dblock(dlogits_NRC.astype(hidden_ND.dtype), hidden_ND),
            start,
            axis=1,
        )
        dlogits_NRC = jnp.where(new_11C, dlogits_NRC, 0.0).astype(hidden_ND.dtype)
        dhidden_RND += jnp.einsum(
            "NRC,RCD->RND", dlogits_NRC, block_RCD, preferred_element_type=jnp.float32
        )
        return dhidden_RND, dhead_RVD

    zeros_RND = jnp.zeros((len(head_RVD), *hidden_ND.shape), jnp.float32)
    carry = (
        constrain(zeros_RND, layout, "vocab", "batch", None),
        constrain(jnp.zeros_like(head_RVD), layout, *split),
    )
    dhidden_RND, dhead_RVD = jax.lax.fori_loop(0, count, add_block, carry)
    dhidden_ND = dhidden_RND.sum(axis=0).astype(hidden_ND.dtype)
    return dhidden_ND, dhead_RVD.reshape(head_VD.shape), None


_head.defvjp(_head_fwd, _head_bwd)
