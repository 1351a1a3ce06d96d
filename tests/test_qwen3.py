"""The model against transformers' float64 numbers, and against itself."""

import dataclasses
import functools
import math
import pathlib

import hypothesis
import hypothesis.extra.numpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from klear_jax import hf_weights, logprobs, qwen3
from klear_jax.errors import InputError

PARITY = pathlib.Path(__file__).parent / "golden" / "parity"
ODD_MODELS = ("odd", "odd_mha_untied_yarn")
SMALL = qwen3.Config(
    vocab_size=67,
    width=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=40,
    rope_theta=1e4,
    norm_eps=1e-6,
    tied=True,
    qk_norm=True,
    max_positions=64,
)
LLAMA = dataclasses.replace(SMALL, qk_norm=False, tied=False)
B, T = 4, 16


def count(config):
    return sum(math.prod(p.shape) for p in jax.tree.leaves(qwen3.param_table(config)))


# ---- Parity with transformers.


@pytest.fixture(scope="module", params=ODD_MODELS)
def parity(request):
    """(golden arrays, params, config, logp, entropy, loss, gradients)."""
    golden = dict(np.load(PARITY / f"{request.param}.npz"))
    params, config = hf_weights.load(PARITY / request.param, dtype=np.float32)
    ids, mask, positions = (
        jnp.asarray(golden[k]) for k in ("input_ids", "attention_mask", "position_ids")
    )

    def loss(params):
        logp_BT, entropy_BT = logprobs.token_logprobs(
            params, config, ids, mask, positions_BT=positions, with_entropy=True
        )
        tokens = jnp.sum(mask[:, 1:] * mask[:, :-1])
        return -jnp.sum(logp_BT) / tokens, (logp_BT, entropy_BT)

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (loss, (logp_BT, entropy_BT)), grads = run(params)
    return golden, params, config, logp_BT, entropy_BT, loss, grads


def test_logprobs_are_those_of_transformers(parity):
    golden, _, _, logp_BT, entropy_BT, loss, _ = parity
    mask = golden["attention_mask"] != 0
    predicted = mask[:, 1:] & mask[:, :-1]
    assert predicted.sum() > 100
    for ours, name in ((logp_BT, "logprobs"), (entropy_BT, "entropy")):
        want = golden[f"{name}_f64"][:, : predicted.shape[1]]
        error = np.abs(np.asarray(ours)[:, 1:] - want)[predicted].max()
        assert error <= 3 * golden[f"{name}_f32_error"], (name, error)
        np.testing.assert_array_equal(ours[:, 0], 0)
        np.testing.assert_array_equal(np.asarray(ours)[:, 1:][~predicted], 0)
    np.testing.assert_allclose(loss, golden["loss_f64"], rtol=1e-6)


def test_gradients_are_those_of_transformers(parity, tmp_path):
    golden, _, config, *_, grads = parity
    hf_weights.save(tmp_path, grads, config)
    ours = load_file(tmp_path / "model.safetensors")
    assert {f"gradnorm/{name}" for name in ours} == {
        key for key in golden if key.startswith("gradnorm/")
    }
    full = 0
    for name, grad in ours.items():
        norm = np.linalg.norm(grad.astype(np.float64))
        np.testing.assert_allclose(norm, golden[f"gradnorm/{name}"], rtol=2e-5)
        if (want := golden.get(f"grad/{name}")) is not None:
            full += 1
            np.testing.assert_allclose(
                grad, want, rtol=0, atol=2e-5 * np.abs(want).max(), err_msg=name
            )
    assert full == (13 if config.tied else 14)  # Each kind of tensor once.


def test_greedy_tokens_are_those_of_transformers(parity):
    """Each must be the likeliest after those before it, EOS (1) apart."""
    golden, params, config, *_ = parity
    new = golden["greedy_tokens"]
    ids = np.concatenate([golden["input_ids"], new], axis=1)
    segments = np.concatenate([golden["attention_mask"], np.ones_like(new)], axis=1)
    hidden_BTD = jax.jit(functools.partial(qwen3.forward, config=config))(
        params, tokens_BT=ids, segment_ids_BT=segments
    )
    logits_BTV = np.array(hidden_BTD @ qwen3.head_weight(params).T)
    logits_BTV[..., 1] = -np.inf
    start = golden["input_ids"].shape[1] - 1
    np.testing.assert_array_equal(logits_BTV.argmax(-1)[:, start:-1], new)


# ---- Rows, padding and segments.


@pytest.fixture(scope="module")
def small():
    return qwen3.init_params(SMALL, jax.random.key(0))


@pytest.fixture(scope="module")
def llama():
    return qwen3.init_params(LLAMA, jax.random.key(0))


@functools.partial(jax.jit, static_argnames=("remat", "dtype"))
def run(params, tokens_BT, segments_BT, weight_BTD, remat="none", dtype=None):
    """Hidden states, and the gradients of their weighted sum."""

    def loss(params):
        hidden_BTD = qwen3.forward(
            params,
            SMALL,
            tokens_BT,
            segment_ids_BT=segments_BT,
            remat=remat,
            dtype=dtype,
        )
        return jnp.sum(hidden_BTD * weight_BTD), hidden_BTD

    (_, hidden_BTD), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return hidden_BTD, grads


@functools.partial(jax.jit, static_argnames="config")
def run_at(params, tokens_BT, positions_BT, config):
    return qwen3.forward(params, config, tokens_BT, positions_BT=positions_BT)


def rows(layout, seed=0):
    """Lays sequences into [B, T] rows of random junk.

    Args:
        layout: {(row, segment id): (sequence, its indices in the row)}.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, SMALL.vocab_size, (B, T))
    segments = np.zeros((B, T), np.int32)
    weight = np.zeros((B, T, SMALL.width), np.float32)
    for (row, segment), (sequence, at) in layout.items():
        own = np.random.default_rng(sequence)
        tokens[row, at] = own.integers(0, SMALL.vocab_size, len(at))
        segments[row, at] = segment
        weight[row, at] = own.normal(size=(len(at), SMALL.width))
    return tokens, segments, weight


def assert_same(got, want, rtol=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=0, atol=rtol * np.abs(b).max()
        ),
        got,
        want,
    )


@pytest.mark.parametrize(
    "at",
    [range(5, 16), [*range(3), *range(6, 12), 14, 15], range(2, 13)],
    ids=["left", "middle", "both"],
)
def test_padding_changes_nothing(small, at):
    right, at = list(range(11)), list(at)
    want, want_grads = run(small, *rows({(0, 1): (7, right)}))
    got, got_grads = run(small, *rows({(2, 1): (7, at)}, seed=1))
    np.testing.assert_allclose(got[2, np.array(at)], want[0, :11], atol=1e-5)
    assert_same(got_grads, want_grads)
    assert np.isfinite(got).all()


def test_packed_sequences_are_as_in_rows_of_their_own(small):
    lengths = (5, 7, 2, 1)
    ends = np.cumsum(lengths)
    apart = {(i, 1): (i, list(range(n))) for i, n in enumerate(lengths)}
    packed = {
        (3, 9 - i): (i, list(range(end - n, end)))
        for i, (n, end) in enumerate(zip(lengths, ends, strict=True))
    }
    want, want_grads = run(small, *rows(apart))
    got, got_grads = run(small, *rows(packed, seed=1))
    for i, (n, end) in enumerate(zip(lengths, ends, strict=True)):
        np.testing.assert_allclose(got[3, end - n : end], want[i, :n], atol=1e-5)
    assert_same(got_grads, want_grads)


def test_who_sees_whom(small):
    """The derivative of hidden t in the embedding of token s, all distinct, is exactly 0
    unless s is t or an earlier token of its segment; otherwise it is not."""
    tokens = np.arange(B * T).reshape(B, T)
    segments = np.array(
        [
            [1] * T,
            [1] * 7 + [2] * 9,
            [0, 0] + [1] * 6 + [2] * 5 + [0] * 3,
            [3, 0, 4, 4] * 4,
        ]
    )
    for t in range(T):
        weight = np.zeros((B, T, SMALL.width), np.float32)
        weight[:, t] = np.random.default_rng(t).normal(size=SMALL.width)
        _, grads = run(small, tokens, segments, weight)
        touched = np.any(np.asarray(grads["embed"])[: B * T] != 0, axis=1).reshape(B, T)
        same = segments == segments[:, t : t + 1]
        np.testing.assert_array_equal(touched, same & (np.arange(T) <= t), f"t={t}")


def test_only_distances_count(small):
    """Positions are ranks by default, and a row moved as a whole stays the same."""
    tokens, segments, weight = rows({(i, 1): (i, list(range(T))) for i in range(B)})
    moved = np.arange(T) + np.array([[0], [1], [9], [30]])
    want, _ = run(small, tokens, segments, weight)
    got = run_at(small, tokens, moved, SMALL)
    np.testing.assert_allclose(got, want, atol=1e-5)
    stretched = run_at(small, tokens, 2 * moved, SMALL)
    assert np.abs(stretched - want).max() > 1e-3


@hypothesis.given(
    hypothesis.extra.numpy.arrays(
        np.int32, (2, 13), elements=hypothesis.strategies.integers(0, 4)
    )
)
def test_ranks_in_segment(segments):
    earlier = np.tri(13, 13, -1, dtype=bool)[None]
    want = ((segments[:, :, None] == segments[:, None]) & earlier).sum(-1)
    got = jax.jit(qwen3.ranks_in_segment)(segments)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, want)


# ---- The loops over layers, and precision.


@pytest.mark.parametrize("remat", ["full", "attention", "dots", "offload"])
def test_remat_changes_no_gradient(small, remat):
    batch = rows({(0, 1): (0, list(range(9))), (1, 1): (1, list(range(16)))})
    assert_same(run(small, *batch, remat=remat), run(small, *batch), rtol=1e-6)


def test_bf16_activations_and_float32_weights(small):
    batch = rows({(i, 1): (i, list(range(T))) for i in range(B)})
    want, want_grads = run(small, *batch)
    got, got_grads = run(small, *batch, dtype=jnp.bfloat16)
    assert (got.dtype, want.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(got, want, atol=0.1)
    for one, other in zip(*map(jax.tree.leaves, (got_grads, want_grads)), strict=True):
        assert one.dtype == jnp.float32
        assert np.linalg.norm(one - other) < 0.05 * np.linalg.norm(other)


# ---- The parameter table.


@pytest.mark.parametrize(
    "name, total",
    [
        ("qwen3_0.6b", 596_049_920),
        ("qwen3_1.7b", 1_720_574_976),
        ("qwen3_4b", 4_022_468_096),
        ("qwen3_8b", 8_190_735_360),
        ("qwen3_14b", 14_768_307_200),
        ("qwen3_32b", 32_762_123_264),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, total):
    assert count(qwen3.PRESETS[name]) == total


def test_init_depends_on_name_and_key(small, llama):
    other = qwen3.init_params(SMALL, jax.random.key(1))
    assert not np.array_equal(other["layers"]["wq"], small["layers"]["wq"])
    assert not np.array_equal(small["layers"]["w_gate"], small["layers"]["w_up"])
    # What else there is to initialise changes nothing.
    assert set(small["layers"]) - set(llama["layers"]) == {"q_norm", "k_norm"}
    assert set(llama) - set(small) == {"lm_head"}
    np.testing.assert_array_equal(llama["embed"], small["embed"])
    for name, value in llama["layers"].items():
        np.testing.assert_array_equal(value, small["layers"][name])


def test_init_scale(small, llama):
    # What writes into the residual stream is divided by sqrt(2 x layers) = 2.
    heads = SMALL.num_heads * SMALL.head_dim
    residual = {"wo": heads**-0.5 / 2, "w_down": SMALL.mlp_width**-0.5 / 2}
    for name, value in small["layers"].items():
        if "norm" in name:
            np.testing.assert_array_equal(value, 1)
            continue
        std = residual.get(name, SMALL.width**-0.5)
        np.testing.assert_allclose(value.std(), std, rtol=0.06, err_msg=name)
    np.testing.assert_array_equal(small["final_norm"], 1)
    for table in (small["embed"], llama["lm_head"]):
        np.testing.assert_allclose(table.std(), 24**-0.5, rtol=0.06)
    assert {x.dtype for x in jax.tree.leaves(llama)} == {np.dtype("float32")}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_kv_heads": 3}, r"model.num_heads \(4\).*model.num_kv_heads \(3\)"),
        ({"head_dim": 7}, "model.head_dim must be even for RoPE, not 7"),
        ({"width": -24}, "model.width must be positive, not -24"),
        ({"rope_theta": 0.0}, "model.rope_theta must be positive, not 0.0"),
    ],
)
def test_impossible_configs_name_their_key(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(SMALL, **changes)


# ---- RoPE.


def yarn(**changes):
    return qwen3.Yarn(factor=2.5, original_max_positions=32768, **changes)


def test_yarn_table():
    """Of the released long evaluation: Qwen3, factor 2.5 on 32,768 positions."""
    config = dataclasses.replace(qwen3.PRESETS["qwen3_8b"], yarn=yarn())
    plain, one = qwen3.rope_table(dataclasses.replace(config, yarn=None))
    angle, factor = qwen3.rope_table(config)
    assert one == 1.0
    np.testing.assert_allclose(plain, 1e6 ** (-np.arange(64) / 64), rtol=1e-14)
    np.testing.assert_allclose(factor, 0.1 * np.log(2.5) + 1, rtol=1e-15)
    # How often each pair turns over the original context falls with the pair's index.
    # The ramp runs between where it crosses 32 turns and 1, widened to whole indices.
    turns = 32768 * plain / (2 * np.pi)
    low, high = np.sum(turns > 32) - 1, np.sum(turns > 1)
    assert (low, high) == (23, 40)
    np.testing.assert_array_equal(angle[: low + 1], plain[: low + 1])
    np.testing.assert_allclose(angle[high:], plain[high:] / 2.5, rtol=1e-14)
    kept = (angle / plain - 1 / 2.5) / (1 - 1 / 2.5)
    np.testing.assert_allclose(
        kept[low : high + 1], np.linspace(1, 0, high - low + 1), atol=1e-14
    )


def test_yarn_options():
    config = dataclasses.replace(qwen3.PRESETS["qwen3_8b"], yarn=yarn())
    angle, _ = qwen3.rope_table(config)
    for changes, differs, factor in (
        ({"beta_fast": 16.0}, True, 0.1 * math.log(2.5) + 1),
        ({"beta_slow": 4.0}, True, 0.1 * math.log(2.5) + 1),
        ({"attention_factor": 1.25}, False, 1.25),
    ):
        got, got_factor = qwen3.rope_table(
            dataclasses.replace(config, yarn=yarn(**changes))
        )
        assert got_factor == factor
        assert np.array_equal(got, angle) != differs


def test_rope_turns_pairs_by_their_angle():
    """cos and sin at distant positions, against float64, with the factor on both."""
    config = dataclasses.replace(qwen3.PRESETS["qwen3_8b"], yarn=yarn())
    positions = np.array([[0, 1, 1000, 65535]])
    cos, sin = qwen3.rope_angles(config, jnp.asarray(positions))
    angle, factor = qwen3.rope_table(config)
    want = positions[..., None] * angle
    # The angle itself is float32: half a unit in its last place, at 65,535 radians 0.004.
    atol = np.maximum(1e-6, want * 2.0**-23)
    assert cos.dtype == sin.dtype == jnp.float32
    assert (np.abs(cos - factor * np.cos(want)) <= factor * atol).all()
    assert (np.abs(sin - factor * np.sin(want)) <= factor * atol).all()
