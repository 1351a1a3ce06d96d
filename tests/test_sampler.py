"""The sampler against the trainer's forward pass, exact probabilities and its own other shapes."""

import dataclasses
import gc
import itertools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import sections
from klear_jax import decoding, logprobs, metrics, qwen3, sampler, scheduler, sharding
from klear_jax.errors import InputError
from klear_jax.sampling import Sampling

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
RULES = sections.mesh(1, 1, 1).rules.to_dict()
N = 12  # Tokens of a response.
# Lengths on both sides of a bucket's border.
PROMPTS = [
    np.random.default_rng(n).integers(0, V, n).tolist() for n in (1, 5, 16, 9, 17)
]


def make_params(config=CONFIG):
    rng = np.random.default_rng(0)

    def init(param):
        x = rng.normal(1 if param.init_std is None else 0, 0.25, param.shape)
        return jnp.asarray(x, jnp.float32)

    params = jax.tree.map(init, qwen3.param_table(config))
    params["lm_head"] *= 2  # Half the entropy of a flat distribution, about.
    return params


@pytest.fixture(scope="module")
def params():
    return make_params()


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


ENGINES = st.fixed_dictionaries(
    {
        "num_slots": st.sampled_from([1, 4]),
        "page_tokens": st.sampled_from([8, 16]),
        "prefill_tokens": st.sampled_from([16, 48]),
        # A sample needs 29 tokens at most: one or two at a time, or all.
        "pool_tokens": st.sampled_from([48, 64, None]),
        "decode_steps": st.just(3),
        "share_prompts": st.booleans(),
    }
)


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    order=st.sets(st.integers(0, 3), min_size=1).flatmap(
        lambda s: st.permutations([*s, 4])
    ),
    num_samples=st.integers(2, 3),
    limits=st.lists(st.integers(1, N), min_size=5, max_size=5),
    engine=ENGINES,
)
def test_a_sample_depends_on_its_own_request_only(
    params, sampled, order, num_samples, limits, engine
):
    """Not on slots, pages, arrival, batch mates, or on who was preempted."""
    got = sampler.generate(
        params,
        CONFIG,
        [PROMPTS[i] for i in order],
        **SAMPLED
        | engine
        | {
            "prompt_ids": order,
            "num_samples": num_samples,
            "max_new_tokens": [limits[i] for i in order],
        },
    )
    for i, group in zip(order, got, strict=True):
        for sample, whole in zip(group, sampled[i], strict=False):
            assert sample.tokens == whole.tokens[: limits[i]]
            cut = len(whole.tokens) > limits[i]
            assert sample.finished == (whole.finished and not cut)
        assert len(group) == num_samples


def groups_of(prompts, samples=1, limit=N):
    key = jax.random.key(7)
    return [
        sampler.Group(prompt, i, key, limit, [sampler.NOT_BEGUN] * samples)
        for i, prompt in prompts
    ]


def run(
    params, groups, *, share_prompts=True, on_tokens=None, on_finish=None, **engine
):
    sizes = {"num_slots": 4, "page_tokens": 8, "prefill_tokens": 16}
    return sampler.sample_groups(
        params,
        CONFIG,
        groups,
        sampling=Sampling(),
        engine=sampler.Engine(**sizes | engine),
        slot_tokens=32,
        share_prompts=share_prompts,
        on_tokens=on_tokens,
        on_finish=on_finish,
        stop_ids=(5, 50, 70, 71),
    )


def test_with_one_decode_shape_the_bits_are_those_of_the_request(params):
    """Log-probs too, to the last bit, whoever is in the other slots, and whoever had to
    start again for want of pages."""
    numbered = list(enumerate(PROMPTS))
    whole, _ = run(params, groups_of(numbered, samples=3))
    want = {group.prompt_id: group.samples for group in whole}
    for some, engine in (
        (numbered[::-1], {}),
        (numbered[:2], {"prefill_tokens": 48}),
        (numbered[3:], {"share_prompts": False, "decode_steps": 3}),
        (numbered, {"pool_tokens": 48}),
    ):
        got, stats = run(params, groups_of(some, samples=3), **engine)
        assert ("pool_tokens" in engine) == (stats["preempted_samples"] > 0)
        for group in got:
            for sample, other in zip(group.samples, want[group.prompt_id], strict=True):
                assert sample.tokens == other.tokens
                np.testing.assert_array_equal(sample.logprobs, other.logprobs)


def test_a_phase_ended_early_goes_on_from_where_it_was(params):
    groups = groups_of(list(enumerate(PROMPTS)), samples=2)
    whole, _ = run(params, groups)
    ended = []
    part, _ = sampler.sample_groups(
        params,
        CONFIG,
        groups,
        sampling=Sampling(),
        engine=sampler.Engine(num_slots=4, page_tokens=8, decode_steps=2),
        stop_ids=(5, 50, 70, 71),
        on_finish=lambda i, j, sample: ended.append((i, j)),
        enough=lambda: len(ended) >= 3,
    )
    assert 3 <= len(ended) < 10
    lengths = [len(s.tokens) for group in part for s in group.samples]
    assert 0 in lengths
    rest = [
        (i, j)
        for i, group in enumerate(part)
        for j, s in enumerate(group.samples)
        if not group.ended(s)
    ]
    assert sorted(ended + rest) == [(i, j) for i in range(5) for j in range(2)]
    assert any(0 < len(part[i].samples[j].tokens) < N for i, j in rest)
    again, stats = run(params, part)
    for group, want in zip(again, whole, strict=True):
        assert all(map(group.ended, group.samples))
        for sample, other in zip(group.samples, want.samples, strict=True):
            assert sample.tokens == other.tokens
            assert sample.finished == other.finished
            np.testing.assert_allclose(sample.logprobs, other.logprobs, atol=1e-5)
    # What had ended was not drawn again.
    assert stats["slot_steps"] <= len(rest) * N
    assert run(params, again)[1]["decode_calls"] == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_repetition_penalty_is_that_of_hugging_face(params, temperature):
    """Against the same rule applied to whole forward passes, greedily; and the log-probs
    returned are those without it."""
    penalty, prompt = 1.3, PROMPTS[2]
    sampling = {"temperature": temperature, "repetition_penalty": penalty}
    (plain, group) = (
        sampler.generate(params, CONFIG, [prompt], max_new_tokens=N, **kind)[0]
        for kind in ({"temperature": temperature}, sampling)
    )
    ids = list(prompt)
    for n in range(N):
        row = np.zeros((1, 32), np.int32)
        row[0, : len(ids)] = ids
        hidden = np.asarray(jitted_forward(params, row))[0, len(ids) - 1]
        logits = hidden @ np.asarray(params["lm_head"]).T
        seen = np.unique(ids)
        shown = logits.copy()
        shown[seen] = np.where(
            logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty
        )
        token = group[0].tokens[n]
        if temperature == 0:
            assert token == shown.argmax()
        logp = logits - logits.max()
        logp -= np.log(np.exp(logp).sum())
        assert abs(group[0].logprobs[n] - logp[token]) < 1e-4
        ids.append(token)
    assert plain[0].tokens != group[0].tokens


@jax.jit
def jitted_forward(params, row):
    return qwen3.forward(params, CONFIG, row)


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
def test_samples_are_handed_out_once_as_they_end(params, num_slots):
    found, order = {}, []

    def on_finish(i, j, sample):
        assert (i, j) not in found
        found[i, j] = sample
        order.append((i, j))

    limits = [12, 1, 12, 1, 1]
    got = sampler.generate(
        params,
        CONFIG,
        PROMPTS,
        **SAMPLED | {"max_new_tokens": limits},
        num_slots=num_slots,
        decode_steps=2,
        on_finish=on_finish,
    )
    assert len(found) == 10
    assert all(sample is got[i][j] for (i, j), sample in found.items())
    if num_slots == 256:  # Short ones first: nobody waits for the slowest.
        assert {i for i, _ in order[:6]} == {1, 3, 4}


def test_tokens_are_told_as_they_come(params):
    """Each once, in order, before the end of their sample; also where the cache is full."""
    told, ended = {}, {}

    def on_tokens(i, j, tokens):
        assert (i, j) not in ended
        told.setdefault((i, j), []).append(tokens)

    groups, stats = run(
        params,
        groups_of(list(enumerate(PROMPTS)), samples=3),
        pool_tokens=48,
        on_tokens=on_tokens,
        on_finish=lambda i, j, sample: ended.update({(i, j): sample.tokens}),
    )
    assert stats["preempted_tokens"] > 0
    whole = {name: [*itertools.chain(*parts)] for name, parts in told.items()}
    assert whole == ended
    assert max(len(part) for parts in told.values() for part in parts) == 8
    assert [[ended[i, j] for j in range(3)] for i in range(5)] == tokens_of(
        group.samples for group in groups
    )


def test_one_bucket_is_compiled_once(params):
    def compiled():
        return [program._cache_size() for program in decoding.jitted("cpu")]

    def go(prompts, **other):
        return sampler.generate(params, CONFIG, prompts, **SAMPLED | other)

    go([PROMPTS[0], PROMPTS[2]])  # 4 slots of one page.
    before = compiled()
    go([[1, 2, 3], [4]], seed=1, max_new_tokens=[14, 1], stop_ids=(1, 2, 3, 4))
    go([[1, 2, 3]], num_samples=3, max_new_tokens=16)
    go([[1, 2, 3]], num_samples=9, max_new_tokens=16, num_slots=4)
    assert compiled() == before


def layout_of(data, fsdp, tensor):
    config = sharding.MeshConfig(data, fsdp, tensor, RULES)
    devices = jax.devices()[: data * fsdp * tensor]
    return sharding.Layout(sharding.make_mesh(config, devices), RULES)


FOUR_HEADS = dataclasses.replace(CONFIG, num_kv_heads=4)  # One a shard of tensor 4.


@pytest.mark.parametrize(
    "mesh, told",
    [((2, 1, 4), True), ((2, 2, 2), True), ((2, 2, 2), False)],
    ids=["2x1x4", "2x2x2", "2x2x2, parameters only"],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_eight_devices_give_the_same_samples(temperature, mesh, told):
    params, layout = make_params(FOUR_HEADS), layout_of(*mesh)
    spread = sharding.put(params, qwen3.params_shardings(FOUR_HEADS, layout))
    parts = {str(s.index) for s in spread["lm_head"].addressable_shards}
    assert len(parts) == mesh[1] * mesh[2]
    arguments = SAMPLED | {"temperature": temperature}
    got = sampler.generate(
        spread, FOUR_HEADS, PROMPTS, **arguments, layout=layout if told else None
    )
    want = sampler.generate(params, FOUR_HEADS, PROMPTS, **arguments)
    assert tokens_of(got) == tokens_of(want)
    for group, other in zip(got, want, strict=True):
        for a, b in zip(group, other, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-5)


def test_in_bfloat16_the_gap_to_the_trainer_is_rounding(params):
    """Both compute in bfloat16, from the same float32 parameters: they are no farther from
    each other than from float32."""
    groups = sampler.generate(
        params, CONFIG, PROMPTS, **SAMPLED | {"num_samples": 8}, dtype=jnp.bfloat16
    )
    rows = np.zeros((40, 32), np.int32)
    mask, want = np.zeros(rows.shape, np.int32), np.zeros(rows.shape, np.float32)
    pairs = [(p, s) for p, g in zip(PROMPTS, groups, strict=True) for s in g]
    for row, (prompt, sample) in enumerate(pairs):
        start, end = len(prompt), len(prompt) + len(sample.tokens)
        rows[row, :end] = prompt + sample.tokens
        mask[row, :end] = 1
        want[row, start:end] = sample.logprobs
    score = jax.jit(logprobs.token_logprobs, static_argnums=1, static_argnames="dtype")
    got, exact = (
        np.asarray(score(params, CONFIG, rows, mask, dtype=dtype))[want != 0]
        for dtype in (jnp.bfloat16, jnp.float32)
    )
    want = want[want != 0]
    rounding = max(np.abs(ours - exact).mean() for ours in (got, want))
    gap = np.abs(got - want).mean()
    assert 1e-3 < gap < 1.2 * rounding < 0.05


def test_what_was_made_for_a_phase_goes_with_it(params):
    """No copy of the weights, no cache: the update needs the room."""

    def held():
        return sum(x.nbytes for x in jax.live_arrays())

    groups = groups_of(list(enumerate(PROMPTS)))
    run(params, groups)
    before = held()
    gc.disable()  # Freed as the call returns, and not some time after it.
    try:
        run(params, groups)
        assert held() == before
    finally:
        gc.enable()


def test_a_run_compiles_nothing_after_its_start(params):
    """Whatever is asked for, in whatever numbers; and another shape is found out."""
    engine = sampler.Engine(num_slots=4, page_tokens=8, prefill_tokens=16)
    fixed = {"sampling": Sampling(top_p=0.9), "engine": engine, "stop_ids": (5, 50)}

    def go(groups, slot_tokens):
        sampler.sample_groups(params, CONFIG, groups, slot_tokens=slot_tokens, **fixed)

    with metrics.Compilations() as compilations:
        sampler.warm_up(params, CONFIG, slot_tokens=40, **fixed)
        assert any("decode" in name for name in compilations.planned)
        compilations.close()
        numbered = list(enumerate(PROMPTS))
        go(groups_of(numbered, samples=3), 40)
        go(groups_of(numbered[:1], limit=1), 40)
        go(groups_of(numbered[4:], limit=23), 40)
        assert compilations.unplanned == 0
        with pytest.warns(UserWarning) as warned:
            go(groups_of(numbered), 48)
        about = " ".join(str(warning.message) for warning in warned)
        assert re.search(r"unplanned compilation of \S*decode\S* for float32", about)


def test_a_call_ends_when_its_last_slot_does(params):
    """Nothing is computed for nobody: after the last stop token no step is taken."""
    first = sampler.generate(params, CONFIG, PROMPTS, max_new_tokens=2, seed=7)
    stop_ids = {sample.tokens[1] for [sample] in first}
    shape = scheduler.Shape(1, 8, 41, 8, 5, 8, 8, decode_steps=6)
    programs = decoding.Programs(
        params, shape, Sampling(), [*stop_ids], config=CONFIG, layout=None, dtype=None
    )
    prompts = sampler._requests(groups_of(list(enumerate(PROMPTS))), True)
    plan = scheduler.Scheduler(shape, prompts, [*stop_ids])
    while (batch := plan.next_prefill()) is not None:
        programs.prefill(batch)
    batch = plan.next_decode()
    assert batch.steps == 6
    tokens_SRB, logprobs_SRB = map(np.asarray, programs.decode(batch))
    taken = (logprobs_SRB != 0).any(axis=(1, 2)).sum()
    finished = plan.read(batch, tokens_SRB, logprobs_SRB)
    assert len(finished) == len(PROMPTS)
    assert taken == max(len(result.tokens) for result in finished) <= 2


def test_on_a_mesh_cache_and_slots_are_split(params):
    layout = sharding.sampling_layout(layout_of(2, 2, 2))
    shape = scheduler.Shape(4, 2, 5, 8, 4, 2, 8, 3)
    pool, slots, _ = decoding.jitted("cpu").init_state(
        config=CONFIG,
        sampling=Sampling(),
        shape=shape,
        kernel="xla",
        layout=layout,
        dtype=jnp.dtype("float32"),
    )
    for part in (*pool.k, *pool.v):
        assert part.addressable_shards[0].data.shape[:3] == (1, 5, 1)  # Of 4, 5, 2.
    assert slots.length_RB.addressable_shards[0].data.shape == (1, 2)


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
        ({"page_tokens": 0}, "page_tokens must be at least 1, not 0"),
        ({"decode_steps": -1}, "decode_steps must be at least 1, not -1"),
        ({"pool_tokens": 3}, r"pool_tokens \(3\) must hold at least one page"),
        (
            {"pool_tokens": 64, "page_tokens": 16, "max_new_tokens": [4, 60]},
            "prompt 1 of 2 tokens with a response of 60 needs 5 pages of 16 tokens, and "
            r"the cache has 4 on each of 1 replica\(s\): raise pool_tokens to 80",
        ),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"stop_ids": [3, 200]}, "stop id 200 is not in the vocabulary"),
        ({"stop_ids": [1.5]}, "stop ids must be integers, not such as 1.5"),
        ({"prompts": [[1], [2.5]]}, "prompt tokens must be integers"),
        ({"seed": jax.random.key(0, impl="rbg")}, "integer or a threefry2x32 key"),
        (
            {"temperature": -0.1},
            "temperature must be 0 .greedy. or at least .* not -0.1",
        ),
        ({"temperature": 1e-40}, "temperature .* not 1e-40"),
        ({"temperature": float("nan")}, "temperature .* not nan"),
        ({"temperature": float("inf")}, "temperature .* not inf"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], not 0.0"),
        ({"top_p": 1.01}, "top_p .* not 1.01"),
        ({"top_k": -1}, "top_k must be 0 .off. or a whole number above, not -1"),
        ({"top_k": 1.5}, "top_k .* not 1.5"),
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
