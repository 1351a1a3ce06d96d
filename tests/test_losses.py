"""The losses against the authors' numbers, the paper's table and independent forms."""

import collections
import json
import math
import pathlib
import re

import hypothesis
import hypothesis.extra.numpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.test_util import check_grads

from klear_jax import losses
from klear_jax.errors import InputError

GOLDEN = pathlib.Path(__file__).parent / "golden"
# The authors' functions, and what they are called here.
FAMILIES = {
    "policy_loss": "clip_higher",
    "gppo": "gppo",
    "gppo_only_high": "gppo_only_high",
    "gppo_general": "gppo",
}
CONFIG_KEYS = ("clip_low", "clip_high", "beta_low", "beta_high", "dual_clip")
LOW, HIGH = 0.8, 1.28  # The bounds at the default clip_low and clip_high.
EAGER_AND_JIT = pytest.mark.parametrize(
    "wrap", [lambda f: f, jax.jit], ids=["eager", "jit"]
)


def golden(name):
    rows = json.loads((GOLDEN / f"{name}.json").read_text())
    return rows, dict(np.load(GOLDEN / f"{name}.npz"))


INPUTS = dict(np.load(GOLDEN / "loss_inputs.npz"))
ARRAYS = {family: golden(family)[1] for family in FAMILIES}


def by_config(rows):
    """Rows of one configuration run together; ties within an ulp have their own test."""
    grouped = collections.defaultdict(list)
    for row in rows:
        if "ulp_sensitive" not in row["flags"]:
            grouped[tuple((k, row[k]) for k in CONFIG_KEYS if k in row)].append(row)
    return grouped.items()


GROUPS = [
    pytest.param(family, rows, id=f"{family}-{'-'.join(str(v) for _, v in config)}")
    for family in FAMILIES
    for config, rows in by_config(golden(family)[0])
]


def token_losses(logp, old_logp, advantage, *, wrap=lambda f: f, **config):
    """The loss of each token by itself and its derivative in logp; all arrays [N].

    Padded to a multiple of 512, so that the tests share their compiled operations.
    """

    def token_loss(*token):
        arrays = (x[None, None] for x in token)
        return losses.policy_loss(*arrays, jnp.ones((1, 1)), **config)[0]

    tokens = len(logp)
    arrays = (
        np.pad(np.float32(x), (0, -tokens % 512)) for x in (logp, old_logp, advantage)
    )
    value_and_grad = wrap(jax.vmap(jax.value_and_grad(token_loss)))(*arrays)
    return tuple(np.asarray(x)[:tokens] for x in value_and_grad)


def random_batch(seed=0, shape=(4, 9), spread=1.0):
    """logp, old_logp, advantage and weight [B, T], an empty row and holes among them."""
    rng = np.random.default_rng(seed)
    old_logp = -rng.exponential(1.0, shape).astype(np.float32)
    old_logp[:, 1::5] = -0.01  # Almost certain: hardly movable.
    logp = (old_logp + spread * rng.standard_normal(shape)).astype(np.float32)
    advantage = rng.standard_normal((shape[0], 1)).astype(np.float32)
    advantage = np.repeat(advantage, shape[1], axis=1)
    advantage[:, ::4] = 0.0
    mask = rng.random(shape) < 0.8
    mask[1] = False
    return logp, old_logp, advantage, losses.token_weights(mask)


# The authors' numbers


def padded(array, shape):
    """Padded to one shape, so that every golden runs the same compiled operations."""
    return np.pad(array, [(0, n - m) for n, m in zip(shape, array.shape, strict=True)])


def ours_on(family, rows):
    """Of each row: token losses and gradients, weights, loss, its gradient, metrics."""
    config = {k: rows[0][k] for k in CONFIG_KEYS if k in rows[0]} | {
        "kind": FAMILIES[family]
    }
    masks = [INPUTS[f"{row['input']}/mask"] for row in rows]
    weights = [
        losses.token_weights(mask, row["aggregation"])
        for mask, row in zip(masks, rows, strict=True)
    ]
    inputs = [
        [INPUTS[f"{row['input']}/{name}"] for row in rows]
        for name in ("logp", "old_logp", "advantage")
    ]
    batch = [
        padded(np.stack([padded(x, (8, 40)) for x in arrays]), (64, 8, 40))
        for arrays in (*inputs, weights)
    ]
    token_loss, token_grad = (
        x.reshape(64, 8, 40)
        for x in token_losses(*(x.ravel() for x in batch[:3]), **config)
    )

    def loss_and_metrics(*arrays):
        return losses.policy_loss(*arrays, **config)

    (loss, metrics), grad = jax.vmap(
        jax.value_and_grad(loss_and_metrics, has_aux=True)
    )(*batch)
    for i, weight in enumerate(weights):
        here = (i, *map(slice, weight.shape))
        yield (
            *(x[here] for x in (token_loss, token_grad)),
            weight,
            float(loss[i]),
            np.asarray(grad)[here],
            {name: float(x[i]) for name, x in metrics.items()},
        )


@pytest.mark.parametrize("family, rows", GROUPS)
def test_policy_loss_is_the_authors(family, rows):
    for row, ours in zip(rows, ours_on(family, rows), strict=True):
        token_loss, token_grad, weight, loss, grad, metrics = ours
        want_loss, want_grad = ARRAYS[family][row["case"]]
        for got, want, rtol in (
            (token_loss, want_loss, 2e-6),
            (token_grad, want_grad, 5e-6),
            (grad, weight * want_grad, 5e-6),
        ):
            np.testing.assert_allclose(
                got, want, rtol=rtol, atol=1e-8, err_msg=row["case"]
            )
        if "masked_row_token-sum" in row["case"] or "nan_expected" in row["flags"]:
            continue  # Different by design: test_an_empty_row_counts_nothing.
        # The terms of the sum cancel, so rounding is relative to the sum of their sizes.
        scale = np.abs(weight * want_loss).sum()
        np.testing.assert_allclose(
            loss, row["loss"], rtol=0, atol=2e-6 * scale + 1e-8, err_msg=row["case"]
        )
        tokens = max(metrics["tokens"], 1)
        if row.get("beta_low", 1) * (1 - row["clip_low"]) <= row["dual_clip"]:
            clipped = metrics["tokens_low"] + metrics["tokens_high"]
            assert clipped / tokens == pytest.approx(row["clipfrac"])
        assert metrics["tokens_dual"] / tokens == pytest.approx(row["clipfrac_lower"])
        if row["aggregation"] == "token_mean":
            assert metrics["kl_old"] == pytest.approx(row["ppo_kl"], rel=2e-6, abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_either_side_of_a_bound(family):
    """Within an ulp of a bound exp() decides the side: torch's gradient is that of one.

    At r == c exactly, torch's minimum splits the gradient between the two.
    """
    rows = [r for r in golden(family)[0] if "ulp_sensitive" in r["flags"]]
    assert rows
    for row in rows:
        config = {k: row[k] for k in CONFIG_KEYS if k in row}
        logp, old_logp, advantage = (
            INPUTS[f"{row['input']}/{k}"].ravel()
            for k in ("logp", "old_logp", "advantage")
        )
        below, above = (
            token_losses(
                logp + step, old_logp, advantage, kind=FAMILIES[family], **config
            )
            for step in (-1e-5, 1e-5)
        )
        for b, a, want in zip(below, above, ARRAYS[family][row["case"]], strict=True):
            sides = np.stack([b, a, (b + a) / 2])
            nearest = np.abs(sides - want.ravel()).min(0)
            np.testing.assert_array_less(nearest, 2e-5 * np.abs(want.ravel()) + 1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_row_counts_nothing(family):
    """By design not the authors': their means over rows count a row that trains nothing.

    Its sum is 0 but it stands in the denominator, so ours = theirs * B / (rows with
    tokens); its mean is 0 / 0, so theirs is nan and ours is the mean of the others.
    """
    rows = [r for r in golden(family)[0] if "masked_row_token" in r["case"]]
    seen = set()
    for row in rows:
        mask = INPUTS[f"{row['input']}/mask"]
        assert mask.any(1).tolist() == [True, False, True, True]
        ((_, _, _, loss, _, _),) = ours_on(family, [row])
        if row["aggregation"] == "seq_mean_token_sum":
            want = row["loss"] * 4 / 3
        elif row["aggregation"] == "seq_mean_token_mean":
            assert row["loss"] is None  # nan
            token_loss = ARRAYS[family][row["case"]][0]
            want = np.mean([token_loss[b][mask[b]].mean() for b in (0, 2, 3)])
        else:
            want = row["loss"]
        assert loss == pytest.approx(want, rel=2e-6)
        seen.add(row["aggregation"])
    assert seen == {"token_mean", "seq_mean_token_sum", "seq_mean_token_mean"}


# The authors have no mean over groups.
AUTHORS = [a for a in losses.AGGREGATIONS if a != "group_mean_token_mean"]


@pytest.mark.parametrize("aggregation", AUTHORS)
def test_token_weights_are_agg_loss(aggregation):
    rows, arrays = golden("agg_loss")
    empty = 0
    for row in rows:
        token_loss, mask = (
            arrays[f"{row['case']}/{k}"] for k in ("token_loss", "mask")
        )
        terms = losses.token_weights(mask, aggregation) * token_loss
        want = row[aggregation]
        if not mask.any(1).all():
            empty += 1  # As in test_an_empty_row_counts_nothing.
            if aggregation == "seq_mean_token_sum":
                want *= len(mask) / mask.any(1).sum()
            elif aggregation == "seq_mean_token_mean":
                assert want is None
                rows_with = mask.any(1)
                sums = np.sum(token_loss, axis=1, where=mask)[rows_with]
                want = np.mean(sums / mask.sum(1)[rows_with])
        np.testing.assert_allclose(
            terms.sum(dtype=np.float64), want, rtol=0, atol=2e-6 * np.abs(terms).sum()
        )
    assert empty == 1


@pytest.mark.parametrize("aggregation", AUTHORS)
def test_positive_lm_loss_is_the_authors(aggregation):
    rows, arrays = golden("positive_loss")
    without = 0
    for row in rows:
        logp, mask, score, want_grad = (
            arrays[f"{row['case']}/{k}"] for k in ("logp", "mask", "score", aggregation)
        )
        positive = mask & (score == 1.0)[:, None]
        without += not positive.any()
        weight = losses.token_weights(positive, aggregation)
        loss, grad = jax.value_and_grad(losses.positive_lm_loss)(
            *(padded(x, (8, 16)) for x in (logp, weight))
        )
        assert float(loss) == pytest.approx(row[aggregation], rel=2e-6)
        grad = np.asarray(grad)[tuple(map(slice, mask.shape))]
        np.testing.assert_allclose(grad, want_grad, rtol=5e-6, atol=1e-8)
    assert without == 2


# The table of regions

BETAS = {"beta_low": 0.25, "beta_high": 0.5}
COLUMNS = {
    "clip_higher": {"kind": "clip_higher"},
    "gppo": {"kind": "gppo"},
    "gppo_only_high": {"kind": "gppo_only_high"},
    "gppo_betas": {"kind": "gppo", **BETAS},
}
# With dual_clip = 10: ratio, A, then (F, G) of each column and CISPO's G. The loss is
# -A F and its derivative -A G; CISPO's F is G logp.
TABLE = [
    (2.0, +1.5, (1.28, 0.0), (1.28, 1.28), (1.28, 1.28), (0.64, 0.64), 1.28),
    (0.5, -1.5, (0.80, 0.0), (0.80, 0.80), (0.80, 0.00), (0.20, 0.20), 0.80),
    (0.5, +1.5, (0.50, 0.5), (0.50, 0.50), (0.50, 0.50), (0.50, 0.50), 0.80),
    (2.0, -1.5, (2.00, 2.0), (2.00, 2.00), (2.00, 2.00), (2.00, 2.00), 1.28),
    (9.9, -1.5, (9.90, 9.9), (9.90, 9.90), (9.90, 9.90), (9.90, 9.90), 1.28),
    (11., -1.5, (10.0, 0.0), (10.0, 0.00), (10.0, 0.00), (10.0, 0.00), 1.28),
    (11., +1.5, (1.28, 0.0), (1.28, 1.28), (1.28, 1.28), (0.64, 0.64), 1.28),
    (1.1, +1.5, (1.10, 1.1), (1.10, 1.10), (1.10, 1.10), (1.10, 1.10), 1.10),
    (1.1, -1.5, (1.10, 1.1), (1.10, 1.10), (1.10, 1.10), (1.10, 1.10), 1.10),
    (1.0, +1.5, (1.00, 1.0), (1.00, 1.00), (1.00, 1.00), (1.00, 1.00), 1.00),
]  # fmt: skip


@EAGER_AND_JIT
@pytest.mark.parametrize("column", range(4), ids=COLUMNS)
def test_table_of_value_and_slope(wrap, column):
    ratio, advantage, *columns, _ = zip(*TABLE, strict=True)
    value, slope = np.transpose(columns[column])
    config = list(COLUMNS.values())[column]
    logp = np.log(ratio) - 0.7
    got = token_losses(
        logp, np.full(len(TABLE), -0.7), advantage, wrap=wrap, dual_clip=10.0, **config
    )
    np.testing.assert_allclose(got[0], -np.array(advantage) * value, rtol=1e-6)
    np.testing.assert_allclose(got[1], -np.array(advantage) * slope, rtol=1e-6)


@EAGER_AND_JIT
@pytest.mark.parametrize("dual_clip", [None, 10.0])
def test_table_of_cispo(wrap, dual_clip):
    ratio, advantage, *_, slope = map(np.array, zip(*TABLE, strict=True))
    logp = np.log(ratio) - 0.7
    loss, grad = token_losses(
        logp,
        np.full(len(TABLE), -0.7),
        advantage,
        wrap=wrap,
        kind="cispo",
        dual_clip=dual_clip,
    )
    np.testing.assert_allclose(loss, -advantage * slope * logp, rtol=1e-6)
    np.testing.assert_allclose(grad, -advantage * slope, rtol=1e-6)


@pytest.mark.parametrize(
    "ratio, beta_low, dual_clip, beta_dual, value, slope, region",
    [
        (20.0, 1.0, None, 0.0, 20.0, 20.0, None),  # Nothing bounds A < 0.
        (20.0, 1.0, 10.0, 0.0, 10.0, 0.0, "dual"),
        (20.0, 1.0, 10.0, 1.0, 10.0, 10.0, "dual"),  # The gradient is kept.
        (1e30, 1.0, 10.0, 0.5, 10.0, 5.0, "dual"),
        (9.00, 1.0, 10.0, 0.5, 9.00, 9.00, None),
        (0.50, 20., None, 0.0, 16.0, 16.0, "low"),
        (0.50, 20., 10.0, 0.0, 10.0, 0.0, "dual"),  # It also caps beta_low (1 - clip_low).
        (0.50, 10., 10.0, 0.0, 8.00, 8.00, "low"),
    ],
)  # fmt: skip
def test_dual_clip(ratio, beta_low, dual_clip, beta_dual, value, slope, region):
    x, config = math.log(ratio), {"beta_low": beta_low, "dual_clip": dual_clip}
    config["beta_dual"] = beta_dual
    got = token_losses([x], [0.0], [-2.0], **config)
    np.testing.assert_allclose(np.ravel(got), [2 * value, 2 * slope], rtol=1e-6)
    one_token = (jnp.full((1, 1), a) for a in (x, 0.0, -2.0, 1.0))
    metrics = losses.policy_loss(*one_token, **config)[1]
    for name in ("low", "high", "dual"):
        assert metrics[f"tokens_{name}"] == (name == region)


@pytest.mark.parametrize(
    "bound, advantage, beyond", [(LOW, -1.0, 0), (HIGH, 1.0, 1), (3.0, -1.0, 1)]
)
def test_a_region_begins_at_its_bound(bound, advantage, beyond):
    x = math.log(bound) + np.array([-2e-6, 2e-6])
    _, grad = token_losses(
        x, [0.0] * 2, [advantage] * 2, kind="clip_higher", dual_clip=3.0
    )
    assert grad[beyond] == 0
    np.testing.assert_allclose(grad[1 - beyond], -advantage * bound, rtol=5e-6)


def printed_form(
    logp, old_logp, advantage, kind, dual_clip, beta_low=1.0, beta_high=1.0
):
    """The loss as the equations print it: stop_gradient, minimum, bounds with gradient."""
    constant = jax.lax.stop_gradient
    ratio = jnp.exp(logp - old_logp)
    one = ratio / constant(ratio)
    if kind == "cispo":  # Its Eq. 16.
        return -constant(jnp.clip(ratio, LOW, HIGH)) * advantage * logp
    if (beta_low, beta_high) != (1.0, 1.0):  # CE-GPPO, Eq. 17: masks, for it jumps.
        is_low, is_high = (
            (ratio < LOW) & (advantage < 0),
            (ratio > HIGH) & (advantage > 0),
        )
        factor = jnp.where(is_low, beta_low * LOW * one, ratio)
        loss = -advantage * jnp.where(is_high, beta_high * HIGH * one, factor)
    else:  # Eq. 11, and what it leaves of a bound whose gradient is dropped.
        low, high = {
            "gppo": (LOW * one, HIGH * one),
            "gppo_only_high": (LOW, HIGH * one),
            "clip_higher": (LOW, HIGH),
        }[kind]
        bounded = jnp.minimum(jnp.maximum(ratio, low), high)
        loss = -jnp.minimum(ratio * advantage, bounded * advantage)
    if dual_clip is not None:
        loss = jnp.where(advantage < 0, jnp.minimum(loss, -advantage * dual_clip), loss)
    return loss


@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize(
    "config",
    [*({"kind": kind} for kind in losses.KINDS), {"kind": "gppo", **BETAS}],
    ids=str,
)
def test_same_as_the_printed_form(config, dual_clip):
    rng = np.random.default_rng(0)
    logp, old_logp, advantage = rng.standard_normal((3, 500)).astype(np.float32)
    got = token_losses(logp, old_logp, advantage, dual_clip=dual_clip, **config)

    def oracle(*token):
        return printed_form(*token, dual_clip=dual_clip, **config)

    want = jax.vmap(jax.value_and_grad(oracle))(logp, old_logp, advantage)
    np.testing.assert_allclose(got[0], want[0], rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(got[1], want[1], rtol=2e-6, atol=1e-7)


# The clip by itself


def value_and_slope(x, wrap=lambda f: f, **config):
    def clip(x):
        return losses.gradient_preserving_clip(x, **config)

    return wrap(jax.vmap(jax.value_and_grad(clip)))(jnp.asarray(x, jnp.float32))


@EAGER_AND_JIT
@pytest.mark.parametrize(
    "clip_low, clip_high, beta_low, beta_high",
    [
        (0.2, 0.28, 1, 1),
        (0.2, 0.28, 0.25, 1),
        (0.5, 2, 0, 1.5),
        (0, 0, 1, 1),
        (1, 3, 2, 1),
    ],
)
def test_clip_is_its_own_derivative(wrap, clip_low, clip_high, beta_low, beta_high):
    x = np.linspace(-3, 3, 60)  # Without 0, a tie where both clips are 0.
    value, slope = value_and_slope(
        x,
        wrap,
        clip_low=clip_low,
        clip_high=clip_high,
        beta_low=beta_low,
        beta_high=beta_high,
    )
    want = np.clip(np.exp(x), 1 - clip_low, 1 + clip_high)
    want = np.where(np.exp(x) < 1 - clip_low, beta_low * want, want)
    want = np.where(np.exp(x) > 1 + clip_high, beta_high * want, want)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_array_equal(slope, value)
    assert value.dtype == jnp.float32


def test_clip_at_an_exact_tie_is_inside():
    got = value_and_slope(
        [0.0], clip_low=0.0, clip_high=0.0, beta_low=9.0, beta_high=9.0
    )
    np.testing.assert_array_equal(np.ravel(got), [1.0, 1.0])


def test_clip_keeps_shape_and_scales_the_cotangent():
    x_BT = jnp.array([[-1.0, 0.1, 1.0]] * 2)
    grad = jax.grad(lambda x: jnp.sum(-3.0 * losses.gradient_preserving_clip(x)))(x_BT)
    np.testing.assert_allclose(grad, [[-2.4, -3 * math.exp(0.1), -3.84]] * 2, rtol=1e-6)


@pytest.mark.parametrize(
    "x, inside", [(0.1, True), (-0.15, True), (1.0, False), (-1.0, False)]
)
def test_clip_has_a_true_derivative_inside_only(x, inside):
    def check():
        check_grads(
            losses.gradient_preserving_clip,
            (jnp.float32(x),),
            order=1,
            modes=["rev"],
            rtol=1e-2,
        )

    if inside:
        check()
    else:  # Outside, the declared derivative of a constant is the constant.
        with pytest.raises(AssertionError):
            check()


HUGE = [-1e4, -200.0, -104.0, -89.0, 89.0, 104.0, 200.0, 1e4]


@EAGER_AND_JIT
def test_clip_is_exact_at_any_log_ratio(wrap):
    for got in value_and_slope(HUGE, wrap):
        np.testing.assert_array_equal(got, np.float32([LOW] * 4 + [HIGH] * 4))
    for got in value_and_slope(HUGE, wrap, clip_low=1.0):  # No lower bound but 0.
        np.testing.assert_allclose(
            got, [0, 0, 0, math.exp(-89), *[HIGH] * 4], atol=1e-38
        )


@pytest.mark.parametrize("dtype", [float, np.float64, jnp.bfloat16])
def test_clip_is_float32_of_any_number(dtype):
    value = losses.gradient_preserving_clip(dtype(3.0))
    assert value.dtype == jnp.float32 and value == np.float32(HIGH)


# Hostile inputs


@pytest.mark.parametrize("dual_clip", [None, 10.0])
@pytest.mark.parametrize("kind", losses.KINDS)
def test_finite_at_any_log_ratio(kind, dual_clip):
    x, advantage = (np.ravel(a) for a in np.meshgrid(HUGE, [-2.0, 0.0, 2.0]))
    zeros = np.zeros_like(x)
    config = {"kind": kind, "dual_clip": dual_clip}
    # What grows where nothing clips stops at exp(30), and is counted.
    clips = kind == "cispo" or dual_clip is not None
    grows = (x > losses.MAX_LOG_RATIO) & (advantage < 0) & (not clips)
    for logp, old_logp in ((x, zeros), (zeros, -x), (x - 1e4, zeros - 1e4)):
        loss, grad = token_losses(logp, old_logp, advantage, **config)
        assert np.isfinite(loss).all()
        assert not loss[advantage == 0].any() and not grad[advantage == 0].any()
        np.testing.assert_allclose(grad[grows], 2 * math.exp(30), rtol=1e-6)
        assert np.abs(grad[~grows]).max() <= 2 * np.float32(HIGH)
    one_row = (jnp.float32([a]) for a in (x, zeros, advantage, zeros + 1))
    assert losses.policy_loss(*one_row, **config)[1]["ratio_capped"] == grows.sum()


def loss_grad_metrics(*arrays, **config):
    return jax.value_and_grad(losses.policy_loss, has_aux=True)(
        *arrays, dual_clip=3.0, **config
    )


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", losses.KINDS)
def test_what_stands_under_weight_0_changes_no_bit(kind, junk):
    *clean, weight = random_batch()
    assert (weight == 0).sum() > 9
    want = loss_grad_metrics(*clean, weight, kind=kind)
    for i in range(3):
        dirty = [
            np.where((weight == 0) & (i == j), junk, x) for j, x in enumerate(clean)
        ]
        got = loss_grad_metrics(*dirty, weight, kind=kind)
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_positive_lm_loss_never_reads_weight_0():
    logp, *_, weight = random_batch()
    want = jax.value_and_grad(losses.positive_lm_loss)(logp, weight)
    for junk in (np.nan, np.inf, -np.inf):
        dirty = np.where(weight == 0, junk, logp).astype(np.float32)
        got = jax.value_and_grad(losses.positive_lm_loss)(dirty, weight)
        jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("kind", losses.KINDS)
def test_nan_under_a_weight_is_not_hidden(kind):
    loss, grad = token_losses([np.nan], [-1.0], [1.0], kind=kind)
    assert np.isnan(loss).all() and np.isnan(grad).all()


# Sums


@pytest.mark.parametrize("kind", losses.KINDS)
def test_a_batch_is_the_sum_of_its_parts(kind):
    batch = random_batch(2)
    want = losses.policy_loss(*batch, kind=kind, dual_clip=2.0)
    for axis, cut in ((0, 2), (1, 4)):
        first, second = (
            losses.policy_loss(*part, kind=kind, dual_clip=2.0)
            for part in zip(*(np.split(x, [cut], axis) for x in batch), strict=True)
        )
        got = jax.tree.map(jnp.add, first, second)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6),
            got,
            want,
        )


@pytest.mark.parametrize("kind", losses.KINDS)
def test_only_logp_is_differentiated(kind):
    def loss(*arrays):
        return losses.policy_loss(*arrays, kind=kind)[0]

    logp_grad, *others = jax.grad(loss, argnums=(0, 1, 2, 3))(*random_batch())
    assert np.any(logp_grad)
    assert not any(np.any(grad) for grad in others)


@pytest.mark.parametrize("kind", losses.KINDS)
def test_metrics_are_a_plain_count(kind):
    batch = random_batch(3, (8, 60), spread=2.0)
    (_, metrics), grad = loss_grad_metrics(*batch, kind=kind)
    want = dict.fromkeys(metrics, 0.0)
    for logp, old_logp, a, weight, g in zip(
        *map(np.ravel, (*batch, grad)), strict=True
    ):
        if weight == 0:
            continue
        ratio = math.exp(logp - old_logp)
        region = ""
        if ratio < LOW and (a < 0 or (kind == "cispo" and a != 0)):
            region = "_low"
        elif ratio > HIGH and (a > 0 or (kind == "cispo" and a != 0)):
            region = "_high"
        elif ratio > 3.0 and a < 0:
            region = "_dual"
        want["kl_old"] += weight * (old_logp - logp)
        for suffix in {"", region}:
            want[f"tokens{suffix}"] += 1
            want[f"movable{suffix}"] += a != 0 and old_logp < -0.05
            want[f"grad_mass{suffix}"] += abs(g)
    regions = ["_low", "_high"] + ["_dual"] * (kind != "cispo")
    assert all(want[f"tokens{r}"] > want[f"movable{r}"] > 0 for r in regions)
    assert metrics.keys() == want.keys()
    for key in want:
        np.testing.assert_allclose(metrics[key], want[key], rtol=5e-6, err_msg=key)
        assert metrics[key].dtype == jnp.float32 and metrics[key].shape == ()


@pytest.mark.parametrize(
    "kind, low, high",
    [
        ("clip_higher", 0.0, 0.0),
        ("gppo_only_high", 0.0, 1.28),
        ("gppo", 1.6, 1.28),
        ("cispo", 1.6, 1.28),
    ],
)
def test_what_clipped_tokens_still_teach(kind, low, high):
    logp, advantage = jnp.array([[-1.0, 1.0]]), jnp.array([[-2.0, 1.0]])
    _, metrics = losses.policy_loss(
        logp, jnp.zeros((1, 2)), advantage, jnp.ones((1, 2)), kind=kind
    )
    assert (metrics["tokens_low"], metrics["tokens_high"]) == (1, 1)
    np.testing.assert_allclose(metrics["grad_mass_low"], low, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_mass_high"], high, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_mass"], low + high, rtol=1e-6)


def test_one_advantage_a_row_is_one_a_token():
    logp, old_logp, _, weight = random_batch()
    advantage_B1 = np.float32([[1.0], [2.0], [-1.0], [0.5]])
    got = loss_grad_metrics(logp, old_logp, advantage_B1, weight)
    want = loss_grad_metrics(logp, old_logp, np.repeat(advantage_B1, 9, axis=1), weight)
    jax.tree.map(np.testing.assert_array_equal, got, want)


# Weights

MASKS = hypothesis.extra.numpy.arrays(
    bool, hypothesis.extra.numpy.array_shapes(min_dims=2, max_dims=2, max_side=7)
)


@pytest.mark.parametrize("aggregation", losses.AGGREGATIONS)
@hypothesis.given(mask=MASKS, empty_rows=st.integers(0, 3))
def test_token_weights(aggregation, mask, empty_rows):
    weight = losses.token_weights(mask, aggregation)
    assert weight.dtype == np.float32 and weight.shape == mask.shape
    np.testing.assert_array_equal(weight > 0, mask)

    tokens_B = mask.sum(1)
    rows = (tokens_B > 0).sum()
    # What each row weighs: its tokens, or 1 where it counts as one, over a denominator.
    row_weight, denominator = {
        "token_mean": (tokens_B, tokens_B.sum()),
        "group_mean_token_mean": (tokens_B > 0, rows),  # Each row is a group.
        "seq_mean_token_sum": (tokens_B, rows),
        "seq_mean_token_mean": (tokens_B > 0, rows),
        "seq_mean_token_sum_norm": (tokens_B, mask.shape[1]),
    }[aggregation]
    np.testing.assert_allclose(
        weight.sum(1), row_weight / max(denominator, 1), rtol=1e-6
    )
    np.testing.assert_array_equal(
        weight, np.where(mask, weight.max(1, keepdims=True), 0)
    )

    longer = np.pad(mask, [(0, empty_rows), (0, 0)])
    np.testing.assert_array_equal(
        losses.token_weights(longer, aggregation),
        np.pad(weight, [(0, empty_rows), (0, 0)]),
    )


def test_token_weights_by_hand():
    mask = [[1, 1, 1, 0], [0, 0, 0, 0], [0, 7, 0, 0]]  # Nonzero is trained.
    for aggregation, first, last in (
        ("token_mean", 1 / 4, 1 / 4),
        ("seq_mean_token_sum", 1 / 2, 1 / 2),
        ("seq_mean_token_mean", 1 / 6, 1 / 2),
        ("seq_mean_token_sum_norm", 1 / 4, 1 / 4),
        ("group_mean_token_mean", 1 / 6, 1 / 2),
    ):
        want = np.float32([[first] * 3 + [0], [0] * 4, [0, last, 0, 0]])
        np.testing.assert_array_equal(losses.token_weights(mask, aggregation), want)
    np.testing.assert_array_equal(
        losses.token_weights(mask), losses.token_weights(mask, "token_mean")
    )


# Bad arguments


@pytest.mark.parametrize(
    "config, sentence",
    [
        ({"kind": "ppo"}, "kind must be one of"),
        ({"clip_low": -0.1}, "clip_low must be in [0, 1]"),
        ({"clip_low": 1.1}, "clip_low must be in [0, 1]"),
        ({"clip_low": math.nan}, "clip_low must be in [0, 1]"),
        ({"clip_high": -0.1}, "clip_high at least 0"),
        ({"clip_high": math.nan}, "clip_high at least 0"),
        ({"dual_clip": 0.9}, "dual_clip must be at least 1"),
        ({"dual_clip": math.nan}, "dual_clip must be at least 1"),
        ({"aggregation": "mean"}, "aggregation must be one of"),
    ],
    ids=str,
)
def test_bad_arguments_are_one_sentence_with_the_key(config, sentence):
    ((key, value),) = config.items()
    one = jnp.ones((1, 1))
    calls = [lambda: losses.policy_loss(one, one, one, one, **config)]
    if key.startswith("clip"):
        calls.append(lambda: losses.gradient_preserving_clip(one, **config))
    if key == "aggregation":
        calls = [lambda: losses.token_weights(one, **config)]
    for call in calls:
        with pytest.raises(InputError, match=re.escape(sentence)) as error:
            call()
        assert str(value) in str(error.value) and "\n" not in str(error.value)


def test_ratios_below_counts_weighed_tokens():
    edges = losses.LOG_RATIO_EDGES
    assert (np.diff(edges) > 0).all()
    rng = np.random.default_rng(0)
    logp, old = rng.normal(-1, 1, (2, 3, 40)).astype(np.float32)
    weight = rng.integers(0, 2, (3, 40)).astype(np.float32)
    got = losses.ratios_below(logp, old, weight)
    x = (logp - old)[weight != 0]
    assert got.tolist() == [(x < edge).sum() for edge in edges]


def test_token_weights_by_group_and_by_a_given_length():
    mask = [[1, 1, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    groups = [7, 7, 3, 5]  # The last holds no token.
    got = losses.token_weights(mask, "group_mean_token_mean", groups_B=groups)
    want = np.where(mask, [[1 / 8], [1 / 8], [1 / 2], [0]], 0)
    np.testing.assert_allclose(got, want, rtol=1e-7)
    got = losses.token_weights(mask, "seq_mean_token_sum_norm", norm_tokens=2)
    np.testing.assert_array_equal(got, np.float32(mask) / 2)
