"""Drawing a token: against exact distributions, and exact thresholds."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klear_jax import sampling as drawing
from klear_jax.sampling import Sampling


def exact(logits, sampling):
    """The distribution `choose` draws from, in float64, by sorting."""
    x = np.asarray(logits, np.float64) / sampling.temperature
    p = np.exp(x - x.max())
    if 0 < sampling.top_k < len(p):
        p[p < np.sort(p)[-sampling.top_k]] = 0
    if sampling.top_p < 1:
        down = np.sort(p)[::-1]
        enough = np.argmax(np.cumsum(down) >= sampling.top_p * p.sum())
        p[p < down[enough]] = 0
    return p / p.sum()


def rows_of_logits(size):
    """Rows [R, size] of float32 logits whose cumulative sums meet no top_p of the tests."""
    rng = np.random.default_rng(size)
    normal = rng.normal(size=size)
    certain = np.full(size, -np.inf)
    certain[size - 1] = 3
    return np.float32(
        [
            2 * normal,
            1000 + 8 * normal,  # Peaked, and far from 0.
            0.01 * normal,  # Flat.
            np.round(2 * normal),  # Ties.
            np.where(normal > 0.3, -np.inf, normal),
            certain,
        ]
    )


SAMPLINGS = (
    Sampling(),
    Sampling(temperature=0.6),
    Sampling(top_k=5),
    Sampling(top_p=0.77),
    Sampling(temperature=1.3, top_k=40, top_p=0.9),
    Sampling(top_k=1),
    Sampling(top_p=1e-6),
    Sampling(temperature=1e-30),
)


# A vocabulary of less than a block of the sum, and one of more than two blocks.
@pytest.mark.parametrize(
    "size, draws, samplings", [(7, 20_000, SAMPLINGS), (300, 200_000, SAMPLINGS[1:5])]
)
def test_choose_draws_from_the_exact_distribution(size, draws, samplings):
    rows = rows_of_logits(size)

    @jax.jit
    def draw(keys):
        def one(key):
            uniform = jax.random.uniform(key, len(rows))
            return [drawing.choose(jnp.asarray(rows), uniform, s) for s in samplings]

        return jax.lax.map(one, keys, batch_size=1000)

    drawn = draw(jax.random.split(jax.random.key(size), draws))
    for sampling, found in zip(samplings, map(np.asarray, drawn), strict=True):
        assert found.min() >= 0
        assert found.max() < size
        for row, column in zip(rows, found.T, strict=True):
            probs = exact(row, sampling)
            count = np.bincount(column, minlength=size)
            assert not count[probs == 0].any()
            assert deviation(count, draws * probs) < 4.5


def deviation(count, want):
    """Pearson's chi-square in standard deviations, after Wilson and Hilferty."""
    often = want >= 5  # The rare ones are one cell together.
    want = np.append(want[often], want[~often].sum())
    count = np.append(count[often], count[~often].sum())
    chi2 = np.sum((count - want) ** 2 / np.maximum(want, 1e-9))
    freedom = np.sum(want > 0) - 1
    if freedom == 0:
        assert chi2 == 0
        return 0.0
    spread = 2 / (9 * freedom)
    return ((chi2 / freedom) ** (1 / 3) - (1 - spread)) / np.sqrt(spread)


def test_choose_at_temperature_0_takes_the_first_of_the_most_probable():
    logits = jnp.float32([[1, 3, 3], [-jnp.inf, -5, -9], [0, 0, 0]])
    got = drawing.choose(logits, jnp.full(3, 0.9), Sampling(temperature=0))
    assert got.dtype == jnp.int32
    assert got.tolist() == [1, 1, 0]


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24])
def test_no_uniform_number_draws_a_token_of_probability_0(uniform):
    probs = np.zeros((3, 700), np.float32)
    probs[0, [130, 260, 699]] = 1e-30, 1, 1e-30
    probs[1, 3:5] = 1, 1e-8  # The sum rounds the second away.
    probs[2, 128:640] = 1 / 3
    got = np.asarray(drawing._invert_cdf(jnp.asarray(probs), jnp.full(3, uniform)))
    assert (probs[np.arange(3), got] > 0).all()
    if uniform == 0.5:
        assert got.tolist() == [260, 3, 384]


@jax.jit
def keep_largest(x_BV, need_B, by_mass):
    def enough(keep_BV):
        mass_B = jnp.sum(x_BV, axis=-1, where=keep_BV)
        return jnp.where(by_mass, mass_B, keep_BV.sum(axis=-1)) >= need_B

    return drawing._keep_largest(x_BV, enough)


@hypothesis.settings(max_examples=200)
@hypothesis.given(
    # Sums of multiples of 2^-12 are exact in any order.
    row=st.lists(
        st.integers(0, 3) | st.integers(0, 4096), min_size=37, max_size=37
    ).filter(any),
    scale=st.sampled_from([2.0**-12, 2.0**-80, 2.0**20]),
    need=st.floats(0, 1, exclude_min=True),
    by_mass=st.booleans(),
)
def test_keep_largest_is_exact(row, scale, need, by_mass):
    # Between 2^23 and 2^24, neighbours among integers are neighbours among floats.
    row = np.array(row) + (0 if by_mass else 2**23)
    down = np.sort(row)[::-1]
    total = np.cumsum(down) if by_mass else np.arange(1, 38)
    need = max(int(need * total[-1]), 1)
    smallest = down[np.argmax(total >= need)]
    want = np.where(row >= smallest, row, 0) * scale
    need = need * scale if by_mass else need
    got = keep_largest(np.float32([row * scale]), np.float32([need]), by_mass)
    np.testing.assert_array_equal(got[0], np.float32(want))
