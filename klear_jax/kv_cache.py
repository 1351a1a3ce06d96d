"""The keys and values of the tokens seen so far, per slot of the sampler.

Shape letters: B slots, K key/value heads, H head width, S capacity in tokens, L layers.
"""

import flax.struct
import jax
import jax.numpy as jnp

from klear_jax.attention import decode_attention


@flax.struct.dataclass
class Cache:
    """One dense cache a layer, in the order in which decoding reads it."""

    k: tuple[jax.Array, ...]  # L x [B, K, H, S]
    v: tuple[jax.Array, ...]  # L x [B, K, S, H]


def from_prefill(k_LBTKH: jax.Array, v_LBTKH: jax.Array, capacity: int) -> Cache:
    """A cache of `capacity` tokens a slot that begins with those of the prefill.

    What lies behind a slot's length (padding of its prompt, zeros) is overwritten before
    it is ever seen.
    """
    room = capacity - k_LBTKH.shape[2]
    pad = [(0, 0), (0, 0), (0, room), (0, 0), (0, 0)]
    k_LBKHS = jnp.pad(k_LBTKH, pad).transpose(0, 1, 3, 4, 2)
    v_LBKSH = jnp.pad(v_LBTKH, pad).transpose(0, 1, 3, 2, 4)
    return Cache(k=tuple(k_LBKHS), v=tuple(v_LBKSH))


def append_and_attend(
    k_BKHS: jax.Array,
    v_BKSH: jax.Array,
    index_B: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Writes one token's k and v [B, 1, K, H] at each slot's index, then attends to it
    and all before it; with the first three bound, the `attend` of `qwen3.layer`."""
    slot_B = jnp.arange(len(index_B))
    k_BKHS = k_BKHS.at[slot_B, :, :, index_B].set(k[:, 0])
    v_BKSH = v_BKSH.at[slot_B, :, index_B].set(v[:, 0])
    out_BNH = decode_attention(q[:, 0], k_BKHS, v_BKSH, index_B + 1)
    return out_BNH[:, None], (k_BKHS, v_BKSH)
