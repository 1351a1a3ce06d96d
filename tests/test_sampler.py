"""The sampler against the trainer's forward pass, exact probabilities and its own other shapes."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klear_jax import logprobs, qwen3, sampler, sharding
from klear_jax.errors import InputError
from klear_jax.sampler import Sampling

V = 96
CONFIG = qwen3.Config(
    vocab_size=V,
    width=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=48,
    rope_theta=1e4,
    norm_eps=1e-6,
    tied=False,
    qk_norm=True,
    max_positions=64,
)
RULES = {
    "batch": ("data", "fsdp"),
    "seq": (),
    "residual": ("tensor",),
    "layers": (),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "norm": (),
}
N = 12  # Tokens of a response.
# Lengths on both sides of a bucket's border.
PROMPTS = [
    np.random.default_rng(n).integers(0, V, n).tolist() for n in (1, 5, 16, 9, 17)
]


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)

    def init(param):
        x = rng.normal(1 if param.init_std is None else 0, 0.25, param.shape)
        return jnp.asarray(x, jnp.float32)

    params = jax.tree.map(init, qwen3.param_table(CONFIG))
    params["lm_head"] *= 2  # Half the entropy of a flat distribution, about.
    return params


def tokens_of(groups):
    return [[sample.tokens for sample in group] for group in groups]


@pytest.fixture(scope="module")
def greedy(params):
    """The most probable tokens by whole forward passes, a token a pass: [N] a prompt."""

    @jax.jit
    def best(rows):
        return jnp.argmax(qwen3.forward(params, CONFIG, rows) @ params["lm_head"].T, -1)

    rows = np.zeros((len(PROMPTS), 32), np.int32)
    lengths = np.array([len(prompt) for prompt in PROMPTS])
    for row, prompt in zip(rows, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    for n in range(N):
        place = np.arange(len(rows)), lengths + n - 1
        rows[place[0], place[1] + 1] = np.asarray(best(rows))[place]
    return [row[n:][:N].tolist() for row, n in zip(rows, lengths, strict=True)]


def test_greedy_is_the_argmax_and_a_stop_token_belongs_to_its_row(params, greedy):
    stop, limits = greedy[0][4], [5, N, 1, 7, N]
    groups = sampler.generate(
        params,
        CONFIG,
        PROMPTS,
        max_new_tokens=limits,
        temperature=0.0,
        stop_ids=(stop,),
    )
    for whole, limit, (sample,) in zip(greedy, limits, groups, strict=True):
        want = whole[:limit]
        if ends := stop in want:  # Also when it is the last token allowed.
            want = want[: want.index(stop) + 1]
        assert sample.tokens == want
        assert sample.finished == ends
        assert len(sample.logprobs) == len(want)
    assert groups[0][0].finished
    assert not all(group[0].finished for group in groups)


SAMPLED = {
    "max_new_tokens": N,
    "num_samples": 2,
    "stop_ids": (5, 50, 70, 71),
    "seed": 7,
}


@pytest.fixture(scope="module")
def sampled(params):
    """Every prompt twice, all at once: what any other way of asking must give again."""
    return sampler.generate(params, CONFIG, PROMPTS, **SAMPLED)


@pytest.mark.parametrize("padding", ["left", "right", "both", "middle"])
@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.7, "top_p": 0.9, "top_k": 10, "num_samples": 3}],
    ids=["plain", "truncated"],
)
def test_logprobs_are_those_of_the_trainer(params, sampling, padding):
    groups = sampler.generate(params, CONFIG, PROMPTS, **SAMPLED | sampling)
    T, gap = 48, []
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for sample in group:
            ids, n = prompt + sample.tokens, len(sample.tokens)
            places = {
                "left": np.arange(T - len(ids), T),
                "right": np.arange(len(ids)),
                "both": np.arange(len(ids)) + 7,
                # Three empty places before the last token of the prompt.
                "middle": np.arange(len(ids))
                + 3 * (np.arange(len(ids)) >= len(prompt)),
            }[padding]
            tokens, mask = np.full((1, T), 3, np.int32), np.zeros((1, T), np.int32)
            tokens[0, places], mask[0, places] = ids, 1
            logp = score(params, tokens, mask)[0, places]
            # After padding in the middle, the first token there has no predecessor.
            skip = padding == "middle"
            gap.append(np.abs(logp[-n:] - sample.logprobs)[skip:])
            assert sample.logprobs.shape == (n,)
            assert sample.logprobs.dtype == np.float32
    assert np.concatenate(gap).max() < 1e-5


@jax.jit
def score(params, tokens, mask):
    return logprobs.token_logprobs(params, CONFIG, tokens, mask)


@hypothesis.settings(max_examples=20)
@hypothesis.given(
    # With the longest prompt always, for few shapes to compile.
    order=st.sets(st.integers(0, 3), min_size=1).flatmap(
        lambda s: st.permutations([*s, 4])
    ),
    num_samples=st.integers(2, 3),
    num_slots=st.sampled_from([1, 4]),
    limits=st.lists(st.integers(1, N), min_size=5, max_size=5),
)
def test_a_sample_depends_on_its_own_request_only(
    params, sampled, order, num_samples, num_slots, limits
):
    got = sampler.generate(
        params,
        CONFIG,
        [PROMPTS[i] for i in order],
        **SAMPLED
        | {
            "prompt_ids": order,
            "num_samples": num_samples,
            "num_slots": num_slots,
            "max_new_tokens": [limits[i] for i in order],
        },
    )
    for i, group in zip(order, got, strict=True):
        for sample, whole in zip(group, sampled[i], strict=False):
            assert sample.tokens == whole.tokens[: limits[i]]
            cut = len(whole.tokens) > limits[i]
            assert sample.finished == (whole.finished and not cut)
        assert len(group) == num_samples


def test_seed_prompt_and_sample_make_the_difference(params):
    prompt = PROMPTS[4]

    def one(**other):
        groups = sampler.generate(params, CONFIG, [prompt, prompt], **SAMPLED | other)
        return [tuple(tokens) for group in tokens_of(groups) for tokens in group]

    base = one()
    assert len(set(base)) == 4  # Two equal prompts, two samples each.
    assert set(base).isdisjoint(one(seed=8))
    assert set(base).isdisjoint(one(prompt_ids=[-3, 2**31 - 1]))
    assert one(prompt_ids=[1, 0]) == base[2:] + base[:2]
    assert one(seed=jax.random.key(7)) == one(seed=np.int64(7)) == base


def test_nothing_to_do(params):
    assert sampler.generate(params, CONFIG, [], max_new_tokens=3) == []


@pytest.mark.parametrize("num_slots", [1, 4, 256])
def test_on_wave_hands_out_every_sample_once(params, num_slots):
    waves = []
    got = sampler.generate(
        params, CONFIG, PROMPTS, **SAMPLED, num_slots=num_slots, on_wave=waves.append
    )
    assert [len(wave) for wave in waves] == {
        1: [1] * 10,
        4: [4, 4, 2],
        256: [10],
    }[num_slots]
    found = {(i, j): sample for wave in waves for i, j, sample in wave}
    assert len(found) == 10
    assert all(sample is got[i][j] for (i, j), sample in found.items())


def test_one_bucket_is_compiled_once(params, sampled):
    def run(prompts, **other):
        return sampler.generate(params, CONFIG, prompts, **SAMPLED | other)

    size = sampler._run_wave._cache_size
    first = run([PROMPTS[0], PROMPTS[2]])  # 4 slots, prompts of 16, 32 tokens in all.
    before = size()
    run([[1, 2, 3], [4]], seed=1, max_new_tokens=[14, 1], stop_ids=(1, 2, 3, 4))
    run([[1, 2, 3]], num_samples=3, max_new_tokens=16)
    run([[1, 2, 3]], num_samples=9, max_new_tokens=16, num_slots=4)
    assert size() == before
    # Another bucket than that of `sampled`, and the same samples.
    assert tokens_of(first)[0] == tokens_of(sampled)[0]


def test_sharded_parameters_give_the_same_samples(params, sampled):
    mesh = sharding.make_mesh(sharding.MeshConfig(2, 2, 2, RULES))
    layout = sharding.Layout(mesh, RULES)
    spread = sharding.put(params, qwen3.params_shardings(CONFIG, layout))
    assert len({str(s.index) for s in spread["lm_head"].addressable_shards}) == 4
    got = sampler.generate(spread, CONFIG, PROMPTS, **SAMPLED)
    assert tokens_of(got) == tokens_of(sampled)
    for group, want in zip(got, sampled, strict=True):
        for a, b in zip(group, want, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-5)


# --- choose ---------------------------------------------------------------------------


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
            keys = jax.random.split(key, len(rows))
            return [sampler.choose(jnp.asarray(rows), keys, s) for s in samplings]

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
    keys = jax.random.split(jax.random.key(0), 3)
    got = sampler.choose(logits, keys, Sampling(temperature=0))
    assert got.dtype == jnp.int32
    assert got.tolist() == [1, 1, 0]


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24])
def test_no_uniform_number_draws_a_token_of_probability_0(uniform):
    probs = np.zeros((3, 700), np.float32)
    probs[0, [130, 260, 699]] = 1e-30, 1, 1e-30
    probs[1, 3:5] = 1, 1e-8  # The sum rounds the second away.
    probs[2, 128:640] = 1 / 3
    got = np.asarray(sampler._invert_cdf(jnp.asarray(probs), jnp.full(3, uniform)))
    assert (probs[np.arange(3), got] > 0).all()
    if uniform == 0.5:
        assert got.tolist() == [260, 3, 384]


@jax.jit
def keep_largest(x_BV, need_B, by_mass):
    def enough(keep_BV):
        mass_B = jnp.sum(x_BV, axis=-1, where=keep_BV)
        return jnp.where(by_mass, mass_B, keep_BV.sum(axis=-1)) >= need_B

    return sampler._keep_largest(x_BV, enough)


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


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        (
            {"prompts": [[1], [2, V]]},
            f"prompt token {V} is not in the vocabulary of {V}",
        ),
        ({"prompts": [[1], [-1]]}, "prompt token -1 is not"),
        ({"max_new_tokens": 0}, "max_new_tokens of prompt 0 must be at least 1, not 0"),
        ({"max_new_tokens": [3, -2]}, "prompt 1 must be at least 1, not -2"),
        ({"max_new_tokens": [3]}, "1 limits for 2 prompts"),
        ({"num_samples": 0}, "num_samples must be at least 1, not 0"),
        ({"num_slots": 0}, "num_slots must be at least 1, not 0"),
        ({"stop_ids": [3, 200]}, "stop id 200 is not in the vocabulary"),
        ({"temperature": -0.1}, "temperature must be 0 .greedy. or more, not -0.1"),
        ({"temperature": float("nan")}, "temperature .* not nan"),
        ({"temperature": float("inf")}, "temperature .* not inf"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], not 0.0"),
        ({"top_p": 1.01}, "top_p .* not 1.01"),
        ({"top_k": -1}, "top_k must be 0 .off. or more, not -1"),
        ({"prompt_ids": [4, 4]}, "prompt_ids repeat"),
        ({"prompt_ids": [4]}, "1 prompt_ids for 2 prompts"),
        ({"prompt_ids": [4, 2**32 + 5]}, f"prompt_ids are int32: {2**32 + 5} is not"),
    ],
    ids=str,
)
def test_bad_input_is_named(bad, message):
    arguments = {"prompts": [[1], [2, 3]], "max_new_tokens": 4} | bad
    with pytest.raises(InputError, match=message):
        sampler.generate({}, CONFIG, **arguments)
