"""The clip that keeps a bounded gradient, and the losses built on it.

Arrays in, a scalar and additive metrics out: no model, no mesh, no config. A loss is
`sum(weight * token_loss)`; what a mean is was decided once, by `token_weights`, so
micro-batches, packed rows and devices simply add up.

Sources: Klear-Reasoner, arXiv 2508.07629 (Eq. 11-14); dual clip and the aggregation
modes as in the authors' code; CE-GPPO's two betas as in Eq. 17; CISPO as in its Eq. 16.
Shape letters: B sequences, T tokens. Log-probabilities and log-ratios are in nats.
"""

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from klear_jax.errors import InputError

Kind = Literal["gppo", "gppo_only_high", "clip_higher", "cispo"]
Aggregation = Literal[
    "token_mean",
    "group_mean_token_mean",
    "seq_mean_token_sum",
    "seq_mean_token_mean",
    "seq_mean_token_sum_norm",
]
KINDS = get_args(Kind)
AGGREGATIONS = get_args(Aggregation)

# Where nothing clips (A < 0, no dual clip), the ratio and its slope stop growing here.
MAX_LOG_RATIO = 30.0
# A token moves a policy noticeably when it was not almost certain: its old log-prob.
MOVABLE_LOGP = -0.05
# Of the histogram of log-ratios, nats: 2.5% wide where ratios are as a rule, 0 in the middle
# of a bin.
LOG_RATIO_EDGES = np.array(
    [*(-30, -10, -5, -3, -2), *np.linspace(-1.5125, 1.5125, 122), *(2, 3, 5, 10, 30)],
    np.float32,
)


@jax.custom_vjp
def _with_slope(x: jax.Array, value: jax.Array, slope: jax.Array) -> jax.Array:
    """`value`, whose derivative in `x` is declared to be `slope`."""
    del x, slope
    return value


def _with_slope_fwd(x, value, slope):
    return _with_slope(x, value, slope), slope


def _with_slope_bwd(slope, grad):
    return grad * slope, None, None


_with_slope.defvjp(_with_slope_fwd, _with_slope_bwd)


def _bounds(clip_low: float, clip_high: float) -> tuple[float, float, float, float]:
    """The lower and upper bound of the ratio, and their logarithms."""
    if not 0 <= clip_low <= 1 or not clip_high >= 0:
        raise InputError(
            f"the ratio is clipped to [1 - clip_low, 1 + clip_high]: clip_low must be in "
            f"[0, 1] and clip_high at least 0, not {clip_low} and {clip_high}"
        )
    low, high = 1.0 - clip_low, 1.0 + clip_high
    return low, high, math.log(low) if low > 0 else -math.inf, math.log(high)


def gradient_preserving_clip(
    log_ratio: jax.Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    beta_low: float = 1.0,
    beta_high: float = 1.0,
) -> jax.Array:
    """The clipped ratio whose derivative in the log-ratio is its own value.

    v = beta_low (1 - clip_low) below, beta_high (1 + clip_high) above, exp(x) between;
    dv/dx = v everywhere. Nothing is divided by the ratio, so value and slope are exact
    and finite at any x. Source: Eq. 11 and 12, with the betas of Eq. 17.

    Args:
        log_ratio: x = logp - old_logp, any shape, nats.
        clip_low, clip_high: epsilon_l and epsilon_h.
        beta_low, beta_high: what is kept of the gradient beyond each bound.

    Returns:
        v, shaped as `log_ratio`, float32.
    """
    low, high, log_low, log_high = _bounds(clip_low, clip_high)
    x = jnp.asarray(log_ratio, jnp.float32)
    ratio = jnp.exp(jnp.minimum(x, log_high))
    value = jnp.where(x < log_low, beta_low * low, ratio)
    value = jnp.where(x > log_high, beta_high * high, value)
    value = jax.lax.stop_gradient(value)
    return _with_slope(x, value, value)


def token_mean_weights(mask: jax.Array) -> jax.Array:
    """`token_weights` of 'token_mean' on devices, for a mask (of any shape, 0 or 1) of which
    no host has all."""
    return mask.astype(jnp.float32) / jnp.maximum(jnp.sum(mask), 1).astype(jnp.float32)


def token_weights(
    mask_BT: np.ndarray,
    aggregation: Aggregation = "token_mean",
    *,
    groups_B: np.ndarray | None = None,
    norm_tokens: int | None = None,
) -> np.ndarray:
    """Each token's share in the loss of one whole update, made on the host.

    With N trained tokens, of which row b holds n_b, and R rows that hold any; G groups of
    rows that hold any, of which that of row b holds m_b tokens:
      token_mean               1 / N            (Eq. 7 and 11 over the whole mini-batch)
      group_mean_token_mean    1 / (G m_b)      (Eq. 7 and 11 as printed)
      seq_mean_token_sum       1 / R
      seq_mean_token_mean      1 / (R n_b)
      seq_mean_token_sum_norm  1 / norm_tokens
    A row without a trained token counts nothing, neither as a term nor in R: padding a
    batch with empty rows changes no weight. (In the authors' agg_loss it counts in R for
    the sum, and makes the mean nan.)

    Args:
        mask_BT: nonzero where a token is trained; one row a sequence, not packed.
        aggregation: one of `AGGREGATIONS`.
        groups_B: the group of each row; default: each is its own.
        norm_tokens: default T. The authors' is the longest response, without its prompt.

    Returns:
        weight_BT, float32, 0 where the mask is 0.
    """
    mask_BT = (np.asarray(mask_BT) != 0).astype(np.float32)
    tokens_B1 = mask_BT.sum(axis=1, keepdims=True, dtype=np.float64)
    rows = max((tokens_B1 > 0).sum(), 1)
    if aggregation == "token_mean":
        share_B1 = 1 / max(tokens_B1.sum(), 1)
    elif aggregation == "group_mean_token_mean":
        groups_B = np.arange(len(mask_BT)) if groups_B is None else groups_B
        _, group_B = np.unique(groups_B, return_inverse=True)
        tokens_G = np.bincount(group_B, tokens_B1[:, 0])
        share_G = 1 / (max((tokens_G > 0).sum(), 1) * np.maximum(tokens_G, 1))
        share_B1 = share_G[group_B][:, None]
    elif aggregation == "seq_mean_token_sum":
        share_B1 = 1 / rows
    elif aggregation == "seq_mean_token_mean":
        share_B1 = 1 / (rows * np.maximum(tokens_B1, 1))
    elif aggregation == "seq_mean_token_sum_norm":
        share_B1 = 1 / (norm_tokens or mask_BT.shape[1])
    else:
        raise InputError(
            f"aggregation must be one of {AGGREGATIONS}, not {aggregation!r}"
        )
    return mask_BT * np.asarray(share_B1, np.float32)


def policy_loss(
    logp_BT: jax.Array,
    old_logp_BT: jax.Array,
    advantage_BT: jax.Array,
    weight_BT: jax.Array,
    *,
    kind: Kind = "gppo",
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    beta_low: float = 1.0,
    beta_high: float = 1.0,
    dual_clip: float | None = None,
    beta_dual: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The clipped policy loss, every variant, from one table of value and slope.

    With r = exp(logp - old_logp), a token's loss is -A F and its derivative in logp is
    -A G, where (F, G) depends on the region the token is in:

      region                      clip_higher  gppo            gppo_only_high  cispo
      low   A < 0, r < 1 - el     (1-el, 0)    b1 (1-el) both  (1-el, 0)       (1-el) logp, 1-el
      high  A > 0, r > 1 + eh     (1+eh, 0)    b2 (1+eh) both  (1+eh) both     (1+eh) logp, 1+eh
      dual  A < 0, F > c          (c, bd c)    (c, bd c)       (c, bd c)       no dual clip
      inside  all else            (r, r)       (r, r)          (r, r)          r logp, r

    CISPO's low and high hold for both signs of A. Regions are chosen by the log-ratio
    and the sign of A, never by a maximum, so ties and overflow cannot leak a branch's
    gradient. A = 0 gives exactly 0. Tokens of weight 0 are replaced before any
    arithmetic: nan or inf under them harms nothing.

    Args:
        logp_BT: log p of the sampled tokens under the policy; the only differentiated input.
        old_logp_BT: the same under the old policy.
        advantage_BT: A, [B, T] or [B, 1].
        weight_BT: the tokens' shares, from `token_weights`.
        kind: one of `KINDS`.
        clip_low, clip_high: epsilon_l and epsilon_h; ratios beyond 1 - el, 1 + eh clip.
        beta_low, beta_high: what 'gppo' keeps beyond each bound: (1, 1) is GPPO,
            (0.25, 1) CE-GPPO. The other kinds do not read them.
        dual_clip: c, the most a ratio counts for A < 0; None: off.
        beta_dual: bd, what is kept of the gradient beyond c: 0 as the authors' code, or 1,
            as GPPO does at its bounds.

    Returns:
        The loss [], and additive float32 metrics []: `tokens` and, with suffix _low,
        _high, _dual, how many are in a region; `movable` tokens (A != 0 and old log-prob
        below MOVABLE_LOGP) likewise; `grad_mass` (sum of weight |dloss/dlogp|) likewise;
        `kl_old` (sum of weight (old_logp - logp), nats); `ratio_capped` tokens whose
        log-ratio exceeded MAX_LOG_RATIO outside the clip.
    """
    if kind not in KINDS:
        raise InputError(f"kind must be one of {KINDS}, not {kind!r}")
    if dual_clip is not None and not dual_clip >= 1:
        raise InputError(
            f"dual_clip must be at least 1, or None for off, not {dual_clip}"
        )
    if jnp.ndim(advantage_BT) != jnp.ndim(logp_BT):
        raise InputError(
            f"advantage must be [B, T] or [B, 1] beside logp {jnp.shape(logp_BT)}, "
            f"not {jnp.shape(advantage_BT)}"
        )
    low, high, _, _ = _bounds(clip_low, clip_high)

    weight_BT = jax.lax.stop_gradient(weight_BT)
    real_BT = weight_BT != 0
    logp_BT, old_logp_BT, advantage_BT = (
        jnp.where(real_BT, x, 0.0).astype(jnp.float32)
        for x in (logp_BT, old_logp_BT, advantage_BT)
    )
    x_BT = jax.lax.stop_gradient(logp_BT - old_logp_BT)
    up_BT, down_BT = advantage_BT > 0, advantage_BT < 0

    ratio_BT = jnp.exp(jnp.minimum(x_BT, MAX_LOG_RATIO))
    region = clip_regions(
        x_BT,
        advantage_BT,
        kind=kind,
        clip_low=clip_low,
        clip_high=clip_high,
        beta_low=beta_low,
        dual_clip=dual_clip,
    )
    is_low_BT, is_high_BT, is_dual_BT = region["low"], region["high"], region["dual"]
    (value_low, slope_low), (value_high, slope_high) = {
        "gppo": ((beta_low * low,) * 2, (beta_high * high,) * 2),
        "gppo_only_high": ((low, 0.0), (high, high)),
        "clip_higher": ((low, 0.0), (high, 0.0)),
        "cispo": ((low, low), (high, high)),
    }[kind]

    value_BT = slope_BT = ratio_BT
    for region_BT, value, slope in (
        (is_low_BT, value_low, slope_low),
        (is_high_BT, value_high, slope_high),
        (is_dual_BT, dual_clip or 0.0, beta_dual * (dual_clip or 0.0)),
    ):
        value_BT = jnp.where(region_BT, value, value_BT)
        slope_BT = jnp.where(region_BT, slope, slope_BT)
    if kind == "cispo":
        value_BT *= jax.lax.stop_gradient(logp_BT)
    token_loss_BT = _with_slope(
        logp_BT, -advantage_BT * value_BT, -advantage_BT * slope_BT
    )

    mass_BT = jnp.abs(weight_BT * advantage_BT * slope_BT)
    movable_BT = real_BT & (up_BT | down_BT) & (old_logp_BT < MOVABLE_LOGP)
    capped_BT = (x_BT > MAX_LOG_RATIO) & down_BT & ~is_dual_BT & ~is_high_BT
    metrics = {"ratio_capped": _count(capped_BT), "kl_old": -jnp.sum(weight_BT * x_BT)}
    everywhere_BT = jnp.ones_like(real_BT)
    for suffix, region_BT in (
        ("", everywhere_BT),
        ("_low", is_low_BT),
        ("_high", is_high_BT),
        ("_dual", is_dual_BT),
    ):
        metrics[f"tokens{suffix}"] = _count(real_BT & region_BT)
        metrics[f"movable{suffix}"] = _count(movable_BT & region_BT)
        metrics[f"grad_mass{suffix}"] = jnp.sum(mass_BT, where=region_BT)
    return jnp.sum(weight_BT * token_loss_BT), metrics


def clip_regions(
    log_ratio: jax.Array,
    advantage: jax.Array,
    *,
    kind: Kind,
    clip_low: float,
    clip_high: float,
    beta_low: float,
    dual_clip: float | None,
) -> dict[str, jax.Array]:
    """Which tokens are 'low', 'high' and 'dual' in the table of `policy_loss`, whose arguments
    these are: bool, shaped as `log_ratio`. What is in none is inside."""
    low, _, log_low, log_high = _bounds(clip_low, clip_high)
    up, down = advantage > 0, advantage < 0
    is_low, is_high = log_ratio < log_low, log_ratio > log_high
    is_dual = jnp.zeros_like(is_low)
    if kind == "cispo":
        return {
            "low": is_low & (up | down),
            "high": is_high & (up | down),
            "dual": is_dual,
        }
    is_low, is_high = is_low & down, is_high & up
    if dual_clip is not None:
        value_low = beta_low * low if kind == "gppo" else low
        is_dual = down & jnp.where(
            is_low, value_low > dual_clip, log_ratio > math.log(dual_clip)
        )
    return {"low": is_low & ~is_dual, "high": is_high, "dual": is_dual}


def _count(condition_BT: jax.Array) -> jax.Array:
    return jnp.sum(condition_BT, dtype=jnp.float32)


def ratios_below(
    logp_BT: jax.Array, old_logp_BT: jax.Array, weight_BT: jax.Array
) -> jax.Array:
    """How many weighed tokens have a log-ratio below each of LOG_RATIO_EDGES, [E] float32."""
    x_BT1 = (logp_BT - old_logp_BT)[..., None]
    below_BTE = (weight_BT != 0)[..., None] & (x_BT1 < LOG_RATIO_EDGES[None, None])
    return jnp.sum(below_BTE, axis=(0, 1), dtype=jnp.float32)


def positive_lm_loss(logp_BT: jax.Array, weight_BT: jax.Array) -> jax.Array:
    """The negative log-likelihood, sum(-weight * logp) [], of the tokens weighed.

    With the weights of the samples of full credit it is the positive-LM loss of Eq. 13
    (normalised over all positive tokens of the mini-batch); with those of demonstrations
    it is the SFT loss. What stands under weight 0 is never read.
    """
    logp_BT = jnp.where(weight_BT != 0, logp_BT, 0.0).astype(jnp.float32)
    return -jnp.sum(weight_BT * logp_BT)
