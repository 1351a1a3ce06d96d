"""How the next token is drawn from the logits, without sorting the vocabulary.

Shape letters: B rows, V vocabulary, X blocks, C tokens of a block.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from klear_jax.errors import InputError

MIN_TEMPERATURE = 1e-30  # What float32 can divide by.
CDF_BLOCK = 128  # Tokens summed together in the two-level inverse of the distribution.


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Order: repetition penalty, temperature, top-k, top-p."""

    temperature: float = 1.0  # 0: the most probable token.
    top_p: float = 1.0  # The most probable tokens whose mass reaches it; 1: all.
    top_k: int = 0  # The k most probable tokens; 0: all. Ties with the last one stay.
    # Logits of tokens seen in prompt or response are divided (multiplied, where negative)
    # by it, as Hugging Face does; 1: off. The authors' evaluation has 1.05.
    repetition_penalty: float = 1.0

    def __post_init__(self):
        if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature < math.inf:
            raise InputError(
                f"temperature must be 0 (greedy) or at least {MIN_TEMPERATURE}, not "
                f"{self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be in (0, 1], not {self.top_p}")
        if not (self.top_k >= 0 and self.top_k == int(self.top_k)):
            raise InputError(
                f"top_k must be 0 (off) or a whole number above, not {self.top_k}"
            )
        if not 0 < self.repetition_penalty < math.inf:
            raise InputError(
                "repetition_penalty must be above 0 (1: off), not "
                f"{self.repetition_penalty}"
            )

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1.0


def penalise(logits_BV: jax.Array, seen_BV: jax.Array, penalty: float) -> jax.Array:
    """Logits with those of the tokens seen made less likely (arXiv 1909.05858)."""
    lower_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, lower_BV, logits_BV)


def choose(logits_BV: jax.Array, uniform_B: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws a token from each row of float32 logits, [B] int32, without sorting; uniform
    numbers in [0, 1) decide."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    # The maximum goes first, so that no temperature makes inf - inf. Unnormalised.
    below_BV = logits_BV - logits_BV.max(axis=-1, keepdims=True)
    prob_BV = jnp.exp(below_BV / sampling.temperature)
    if 0 < sampling.top_k < prob_BV.shape[-1]:
        prob_BV = _keep_largest(
            prob_BV, lambda keep_BV: keep_BV.sum(axis=-1) >= sampling.top_k
        )
    if sampling.top_p < 1:
        need_B = sampling.top_p * prob_BV.sum(axis=-1)
        prob_BV = _keep_largest(
            prob_BV, lambda keep_BV: jnp.sum(prob_BV, axis=-1, where=keep_BV) >= need_B
        )
    return _invert_cdf(prob_BV, uniform_B)


def _keep_largest(
    prob_BV: jax.Array, enough: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Zeroes all but the fewest largest entries that are `enough` (ties stay together).

    Floats of one sign order like their bits: the threshold is found bit by bit, exactly,
    in 31 passes over the row whatever its length.
    """
    bits_BV = jax.lax.bitcast_convert_type(prob_BV, jnp.int32)

    def try_bit(i, threshold_B):
        higher_B = threshold_B | (1 << (30 - i))
        return jnp.where(enough(bits_BV >= higher_B[:, None]), higher_B, threshold_B)

    threshold_B = jax.lax.fori_loop(0, 31, try_bit, jnp.zeros(len(prob_BV), jnp.int32))
    return jnp.where(bits_BV >= threshold_B[:, None], prob_BV, 0.0)


def _invert_cdf(prob_BV: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """The token at which the running sum of a row first exceeds uniform x total.

    Summed in two levels, so that a long row loses no precision. A token of probability
    zero is never drawn, whatever the rounding.
    """
    B, V = prob_BV.shape
    prob_BXC = jnp.pad(prob_BV, [(0, 0), (0, -V % CDF_BLOCK)]).reshape(B, -1, CDF_BLOCK)
    mass_BX = prob_BXC.sum(axis=-1)
    sum_BX = jnp.cumsum(mass_BX, axis=-1)
    need_B = uniform_B * sum_BX[:, -1]
    block_B = _first_above(sum_BX, mass_BX, need_B)
    before_B = jnp.take_along_axis(sum_BX - mass_BX, block_B[:, None], axis=1)[:, 0]
    prob_BC = jnp.take_along_axis(prob_BXC, block_B[:, None, None], axis=1)[:, 0]
    sum_BC = before_B[:, None] + jnp.cumsum(prob_BC, axis=-1)
    return (block_B * CDF_BLOCK + _first_above(sum_BC, prob_BC, need_B)).astype(
        jnp.int32
    )


def _first_above(sum_BC, prob_BC, need_B):
    """The first positive entry whose running sum exceeds `need`, else the last positive."""
    found_BC = (sum_BC > need_B[:, None]) & (prob_BC > 0)
    last_B = prob_BC.shape[-1] - 1 - jnp.argmax(prob_BC[:, ::-1] > 0, axis=-1)
    return jnp.where(found_BC.any(axis=-1), jnp.argmax(found_BC, axis=-1), last_B)
