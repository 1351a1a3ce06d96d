"""Qwen3, and Llama by config: a parameter table, one layer, and the ways to run it.

Parameters are nested dicts with the layers stacked on axis 0:
    {'embed': [V, D], 'layers': {'wq': [L, D, N, H], ...}, 'final_norm': [D], 'lm_head': [V, D]}
`param_table` describes each once (shape, logical axes, initialisation, Hugging Face
name), and serves initialisation, sharding, hf_weights and checkpoints.

Training, scoring and sampling call the same `layer`; only what `attend` does, and the
loop over layers, differ. Shape letters: WORKSPACE.md.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from klear_jax.attention import attention
from klear_jax.errors import InputError
from klear_jax.sharding import (
    Layout,
    constrain,
    exchange_tokens,
    shard_index,
    sum_over_tokens,
)

Params = dict[str, Any]

# What the backward pass keeps of every layer, as policies of jax.checkpoint.
_policies = jax.checkpoint_policies
REMAT = {
    "none": _policies.everything_saveable,
    # The stream between layers: layers x tokens x width numbers.
    "full": _policies.nothing_saveable,
    # And what attention gave, which costs most to compute anew when rows are long.
    "attention": _policies.save_only_these_names("attention"),
    # And what the matrix products gave: no more than what is cheap is computed anew.
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable,
        _policies.save_only_these_names("attention"),
    ),
    # The stream between layers, in the host's memory.
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["residual"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def check_remat(remat: str) -> None:
    if remat not in REMAT:
        raise InputError(f"remat must be one of {', '.join(REMAT)}, not {remat!r}")


@dataclasses.dataclass(frozen=True)
class Yarn:
    """RoPE scaling for contexts beyond the trained ones (arXiv 2309.00071, as HF's)."""

    factor: float
    original_max_positions: int
    beta_fast: float = 32.0  # Dimensions that turn more often over the context stay.
    beta_slow: float = 1.0  # Those that turn less often are interpolated fully.
    attention_factor: float | None = None  # On cos and sin; None: 0.1 ln(factor) + 1.


@dataclasses.dataclass(frozen=True)
class Config:
    """An architecture. Widths in units, positions in tokens."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    rope_theta: float
    norm_eps: float
    tied: bool  # The head is the embedding.
    qk_norm: bool  # True: Qwen3. False: Llama.
    max_positions: int
    yarn: Yarn | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if (
                isinstance(value, int | float)
                and not isinstance(value, bool)
                and value <= 0
            ):
                raise InputError(f"model.{field.name} must be positive, not {value}")
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"model.num_heads ({self.num_heads}) must be a multiple of "
                f"model.num_kv_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise InputError(
                f"model.head_dim must be even for RoPE, not {self.head_dim}"
            )


def _qwen3(width, num_layers, num_heads, mlp_width, tied):
    """Published sizes share all but these (their config.json files)."""
    return Config(
        vocab_size=151936,
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=8,
        head_dim=128,
        mlp_width=mlp_width,
        rope_theta=1e6,
        norm_eps=1e-6,
        tied=tied,
        qk_norm=True,
        max_positions=40960,
    )


PRESETS = {
    "qwen3_0.6b": _qwen3(1024, 28, 16, 3072, tied=True),
    "qwen3_1.7b": _qwen3(2048, 28, 16, 6144, tied=True),
    "qwen3_4b": _qwen3(2560, 36, 32, 9728, tied=True),
    "qwen3_8b": _qwen3(4096, 36, 32, 12288, tied=False),
    "qwen3_14b": _qwen3(5120, 40, 40, 17408, tied=False),
    "qwen3_32b": _qwen3(5120, 64, 64, 25600, tied=False),
}


@dataclasses.dataclass(frozen=True)
class Param:
    """What is to know of one parameter, before it exists.

    A Hugging Face tensor (of one layer) has shape `hf_shape`; linear weights lie there
    as [out, in]. Ours is `hf.reshape(hf_dims).transpose(hf_perm)`.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # Logical, for `sharding.Layout`.
    init_std: float | None  # Standard deviation of a normal; None: ones.
    hf_name: str  # With {} for the layer, where there is one.
    hf_shape: tuple[int, ...]
    hf_dims: tuple[int, ...]
    hf_perm: tuple[int, ...]


def param_table(config: Config) -> Params:
    """The tree of all parameters, as `Param`s.

    Matrices start with variance 1/fan-in, and those that write into the residual stream
    (wo, w_down) with 1/(2L) of it, as in GPT-2; the embedding as the head that it is in a
    tied model; norms with 1.
    """
    c = config
    L, D, V, F = c.num_layers, c.width, c.vocab_size, c.mlp_width
    N, K, H = c.num_heads, c.num_kv_heads, c.head_dim

    def top(name, shape, axes, init_std):
        return Param(
            shape, axes, init_std, name, shape, shape, tuple(range(len(shape)))
        )

    def norm(name, axis, size):
        name = f"model.layers.{{}}.{name}.weight"
        return Param((L, size), ("layers", axis), None, name, (size,), (size,), (0,))

    def matrix(name, ins, outs, gain=1.0):
        """`ins` and `outs` are {axis: size}; ours is [L, *ins, *outs], HF's [outs, ins]."""
        shape, axes = (*ins.values(), *outs.values()), (*ins, *outs)
        i, o = len(ins), len(outs)
        return Param(
            shape=(L, *shape),
            axes=("layers", *axes),
            init_std=gain * math.prod(ins.values()) ** -0.5,
            hf_name=f"model.layers.{{}}.{name}.weight",
            hf_shape=(math.prod(outs.values()), math.prod(ins.values())),
            hf_dims=(*outs.values(), *ins.values()),
            hf_perm=(*range(o, o + i), *range(o)),
        )

    residual_gain = (2 * L) ** -0.5
    layers = {
        "attn_norm": norm("input_layernorm", "norm", D),
        "wq": matrix("self_attn.q_proj", {"embed": D}, {"heads": N, "head_dim": H}),
        "wk": matrix("self_attn.k_proj", {"embed": D}, {"kv_heads": K, "head_dim": H}),
        "wv": matrix("self_attn.v_proj", {"embed": D}, {"kv_heads": K, "head_dim": H}),
        "wo": matrix(
            "self_attn.o_proj", {"heads": N, "head_dim": H}, {"embed": D}, residual_gain
        ),
        "mlp_norm": norm("post_attention_layernorm", "norm", D),
        "w_gate": matrix("mlp.gate_proj", {"embed": D}, {"mlp": F}),
        "w_up": matrix("mlp.up_proj", {"embed": D}, {"mlp": F}),
        "w_down": matrix("mlp.down_proj", {"mlp": F}, {"embed": D}, residual_gain),
    }
    if c.qk_norm:
        layers["q_norm"] = norm("self_attn.q_norm", "head_dim", H)
        layers["k_norm"] = norm("self_attn.k_norm", "head_dim", H)
    table = {
        "embed": top("model.embed_tokens.weight", (V, D), ("vocab", "embed"), D**-0.5),
        "layers": layers,
        "final_norm": top("model.norm.weight", (D,), ("norm",), None),
    }
    if not c.tied:
        table["lm_head"] = top("lm_head.weight", (V, D), ("vocab", "embed"), D**-0.5)
    return table


def init_params(config: Config, key: jax.Array) -> Params:
    """Random float32 parameters; each depends on its own name and `key` only."""

    def init(path, param):
        if param.init_std is None:
            return jnp.ones(param.shape, jnp.float32)
        name = jax.tree_util.keystr(path).encode()
        own_key = jax.random.fold_in(key, zlib.crc32(name) & 0x7FFFFFFF)
        return param.init_std * jax.random.normal(own_key, param.shape, jnp.float32)

    return jax.tree_util.tree_map_with_path(init, param_table(config))


def params_shardings(config: Config, layout: Layout) -> Params:
    """The parameters' tree of NamedShardings; a mesh that cannot split a size raises."""

    def sharding(param):
        for size, axis in zip(param.shape, param.axes, strict=True):
            if axis is not None and size % layout.shards(axis):
                raise InputError(
                    f"{param.hf_name}: its {axis!r} axis of {size} cannot be split into "
                    f"{layout.shards(axis)} equal parts; make mesh axes {layout.rules[axis]} "
                    f"a divisor of {size}"
                )
        return layout.sharding(*param.axes)

    shardings = jax.tree.map(sharding, param_table(config))
    beyond = {*layout.rules["embed"]} - {*layout.rules["batch"], *layout.rules["seq"]}
    if beyond:
        raise InputError(
            f"mesh.rules.embed names {sorted(beyond)}, which must be in mesh.rules.batch "
            "too: a gradient is split as it is summed over the batch"
        )
    return shardings


def head_weight(params: Params) -> jax.Array:
    """[V, D]: the output head, which in a tied model is the embedding."""
    return params["lm_head"] if "lm_head" in params else params["embed"]


def rope_table(config: Config) -> tuple[np.ndarray, float]:
    """The angle per position of each pair of dimensions, [H/2], and the factor on cos
    and sin. Computed in float64, as angles at 64K positions need it."""
    half = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    angle = config.rope_theta**-half
    yarn = config.yarn
    if yarn is None:
        return angle, 1.0

    def dim_of(turns):
        """The dimension that makes `turns` full turns over the original context."""
        wavelengths = yarn.original_max_positions / (turns * 2 * math.pi)
        return (
            config.head_dim * math.log(wavelengths) / (2 * math.log(config.rope_theta))
        )

    low = max(math.floor(dim_of(yarn.beta_fast)), 0)
    high = min(math.ceil(dim_of(yarn.beta_slow)), config.head_dim - 1)
    ramp = (np.arange(config.head_dim // 2) - low) / max(high - low, 0.001)
    interpolated = np.clip(ramp, 0, 1)
    angle = angle * (1 - interpolated) + angle / yarn.factor * interpolated
    default = 0.1 * math.log(yarn.factor) + 1 if yarn.factor > 1 else 1.0
    return angle, default if yarn.attention_factor is None else yarn.attention_factor


def rope_angles(config: Config, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of RoPE, each [B, T, H/2] float32."""
    angle, factor = rope_table(config)
    angle_BTH = (
        positions_BT[..., None].astype(jnp.float32)
        * angle.astype(np.float32)[None, None]
    )
    return jnp.cos(angle_BTH) * factor, jnp.sin(angle_BTH) * factor


def _rotate(x_BTNH, rope):
    """Turns dimension i together with i + H/2, in float32."""
    cos_BT1H, sin_BT1H = (part[:, :, None] for part in rope)
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate(
        [a * cos_BT1H - b * sin_BT1H, b * cos_BT1H + a * sin_BT1H], axis=-1
    )
    return turned.astype(x_BTNH.dtype)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) over the last axis, times scale; in float32, its gradients too."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
    return (normed * scale).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def project(
    x: jax.Array,
    weight: jax.Array,
    axes: tuple[str | None, ...],
    num_in: int = 1,
    layout: Layout | None = None,
) -> jax.Array:
    """Contracts the last `num_in` axes of x [B, T, ...] with the first of a weight.

    The weight is used in x's dtype, gathered over fsdp. Its gradient is summed in its own
    dtype (float32, of master weights) over all tokens of all devices, and each device gets
    the part that it has of the weight: left to the partitioner, whole matrices were
    reduced, in bfloat16.

    Args:
        axes: the logical axes of the weight.
    """
    return _project_fwd(x, weight, axes, num_in, layout)[0]


def _project_fwd(x, weight, axes, num_in, layout):
    matrix = _matrix(weight, x.dtype, axes, num_in, layout)
    # One plain matrix product: with more axes, XLA's CPU backend is a third slower.
    y = x.reshape(-1, len(matrix)) @ matrix
    y = y.reshape(*x.shape[: x.ndim - num_in], *weight.shape[num_in:])
    return y, (x, weight)


def _project_bwd(axes, num_in, layout, kept, dy):
    x, weight = kept
    matrix = _matrix(weight, x.dtype, axes, num_in, layout)
    dx = (dy.reshape(-1, matrix.shape[1]) @ matrix.T).reshape(x.shape)

    def local(x, dy):
        ins, outs = x.shape[2:], dy.shape[2:]
        return jnp.einsum(
            "NI,NO->IO",
            x.reshape(-1, math.prod(ins)),
            dy.reshape(-1, math.prod(outs)),
            preferred_element_type=weight.dtype,
        ).reshape(*ins, *outs)

    whole = whole_in_embed(axes)
    tokens = ("batch", "seq")
    in_axes = [(*tokens, *whole[:num_in]), (*tokens, *whole[num_in:])]
    return dx, sum_over_tokens(local, layout, in_axes, axes)(x, dy)


project.defvjp(_project_fwd, _project_bwd)


def _matrix(weight, dtype, axes, num_in, layout):
    """The weight as it is used: [in, out], cast before it is gathered over fsdp."""
    weight = constrain(weight.astype(dtype), layout, *whole_in_embed(axes))
    return weight.reshape(math.prod(weight.shape[:num_in]), -1)


def whole_in_embed(axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
    """The axes of a weight that was gathered over fsdp."""
    return tuple(None if axis == "embed" else axis for axis in axes)


# attend(q_BTNH, k_BTKH, v_BTKH) -> (out_BTNH, anything), after RoPE.
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


def layer(
    x_BTD: jax.Array,
    weights: Params,
    config: Config,
    rope: Sequence[jax.Array],
    attend: Attend,
    layout: Layout | None = None,
) -> tuple[jax.Array, Any]:
    """One transformer layer, for every use; `attend` decides what the queries see.

    Args:
        x_BTD: the residual stream; its dtype is the dtype of the computation.
        weights: this layer's slice of params['layers'], in any float dtype.
        rope: from `rope_angles`.
        attend: attention, and whatever cache it keeps.

    Returns:
        The residual stream, and the second result of `attend`.
    """

    table = param_table(config)["layers"]

    def apply(name, x, num_in=1):
        return project(x, weights[name], table[name].axes[1:], num_in, layout)

    # Between layers, where the backward pass keeps it, the stream is split further: said
    # here too, or the partitioner keeps what the next line makes of it.
    x_BTD = constrain(x_BTD, layout, "batch", "seq", "residual")
    x_BTD = constrain(x_BTD, layout, "batch", "seq", None)
    h_BTD = rms_norm(x_BTD, weights["attn_norm"], config.norm_eps)
    q_BTNH, k_BTKH, v_BTKH = (apply(name, h_BTD) for name in ("wq", "wk", "wv"))
    if config.qk_norm:
        q_BTNH = rms_norm(q_BTNH, weights["q_norm"], config.norm_eps)
        k_BTKH = rms_norm(k_BTKH, weights["k_norm"], config.norm_eps)
    out_BTNH, kept = attend(_rotate(q_BTNH, rope), _rotate(k_BTKH, rope), v_BTKH)
    x_BTD += apply("wo", out_BTNH, num_in=2)

    h_BTD = rms_norm(x_BTD, weights["mlp_norm"], config.norm_eps)
    gate_BTF = jax.nn.silu(apply("w_gate", h_BTD))
    x_BTD += apply("w_down", gate_BTF * apply("w_up", h_BTD))
    return constrain(x_BTD, layout, "batch", "seq", "residual"), kept


def forward(
    params: Params,
    config: Config,
    tokens_BT: jax.Array,
    *,
    positions_BT: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    layout: Layout | None = None,
    dtype: jnp.dtype | None = None,
    remat: str = "none",
) -> jax.Array:
    """All layers over whole rows: training and scoring.

    Args:
        tokens_BT: token ids.
        positions_BT: RoPE positions; default: a token's rank within its segment.
        segment_ids_BT: 0 is padding, other numbers are sequences that do not see each
            other; default: every row is one sequence.
        layout: how activations are split; None on one device.
        dtype: of the activations; None: the parameters' own.
        remat: what the backward pass keeps of a layer, one of `REMAT`; the rest it computes
            anew.

    Returns:
        hidden_BTD after the final norm, before the head.
    """
    if segment_ids_BT is None:
        segment_ids_BT = jnp.ones_like(tokens_BT)
    if positions_BT is None:
        positions_BT = ranks_in_segment(segment_ids_BT)
    x_BTD = embed(params, tokens_BT, dtype, layout)
    rope = rope_angles(config, positions_BT)

    def attend(q_BTNH, k_BTKH, v_BTKH):
        q_BTNH = constrain(q_BTNH, layout, "batch", "seq", "heads", None)
        k_BTKH = constrain(k_BTKH, layout, "batch", "seq", "kv_heads", None)
        v_BTKH = constrain(v_BTKH, layout, "batch", "seq", "kv_heads", None)
        return attention(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, layout), None

    def body(x_BTD, weights):
        x_BTD = checkpoint_name(x_BTD, "residual")
        return layer(x_BTD, weights, config, rope, attend, layout)

    if remat != "none":
        body = jax.checkpoint(body, policy=REMAT[remat])
    x_BTD, _ = jax.lax.scan(body, x_BTD, params["layers"])
    return rms_norm(x_BTD, params["final_norm"], config.norm_eps)


def embed(
    params: Params,
    tokens_BT: jax.Array,
    dtype: jnp.dtype | None = None,
    layout: Layout | None = None,
) -> jax.Array:
    """The embeddings of tokens, [B, T, D]: where the residual stream begins."""
    return _look_up(params["embed"], tokens_BT, dtype or params["embed"].dtype, layout)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _look_up(embed_VD, tokens_BT, dtype, layout):
    return _look_up_fwd(embed_VD, tokens_BT, dtype, layout)[0]


def _look_up_fwd(embed_VD, tokens_BT, dtype, layout):
    # Gathered over fsdp first: looked up by pieces of D, the stream would have to be
    # turned from split by D to split by row.
    whole_VD = constrain(embed_VD.astype(dtype), layout, "vocab", None)
    return whole_VD[tokens_BT], (embed_VD, tokens_BT)


def _look_up_bwd(dtype, layout, kept, dx_BTD):
    """The gradient is summed and split as that of `project`; here the devices tell each other
    their tokens, which are fewer than the vocabulary."""
    embed_VD, tokens_BT = kept

    def local(tokens_BT, dx_BTD):
        dx_BTD, tokens_BT = exchange_tokens(dx_BTD, tokens_BT, layout, "embed")
        rows = len(embed_VD) // (1 if layout is None else layout.shards("vocab"))
        row_BT = tokens_BT - shard_index(layout, "vocab") * rows
        row_BT = jnp.where((row_BT >= 0) & (row_BT < rows), row_BT, rows)
        zeros_VD = jnp.zeros((rows, dx_BTD.shape[-1]), embed_VD.dtype)
        return zeros_VD.at[row_BT].add(dx_BTD.astype(embed_VD.dtype), mode="drop")

    in_axes = [("batch", "seq"), ("batch", "seq", None)]
    add_up = sum_over_tokens(
        local, layout, in_axes, ("vocab", "embed"), summed_over=["embed"]
    )
    return add_up(tokens_BT, dx_BTD), None


_look_up.defvjp(_look_up_fwd, _look_up_bwd)


def decode(
    params: Params,
    config: Config,
    tokens_BT: jax.Array,
    rope: Sequence[jax.Array],
    attend: Callable[..., tuple[jax.Array, Any]],
    cache: Any,
    *,
    layout: Layout | None = None,
    dtype: jnp.dtype | None = None,
) -> tuple[jax.Array, Any]:
    """All layers over tokens whose past lies in a cache: sampling.

    Args:
        params: with the layers stacked, which are then walked by a loop that carries the
            cache; or unstacked by `unstack_layers`, then unrolled: on CPU a loop would
            copy the cache, and slice every weight, at every step.
        rope: from `rope_angles`, of the tokens' positions.
        attend: called with (layer index, cache, q_BTNH, k_BTKH, v_BTKH), returns out_BTNH
            and the cache.

    Returns:
        hidden_BTD after the final norm, and the cache.
    """
    x_BTD = embed(params, tokens_BT, dtype, layout)

    def one(i, carry, weights):
        x_BTD, cache = carry
        return layer(
            x_BTD, weights, config, rope, functools.partial(attend, i, cache), layout
        )

    carry, layers = (x_BTD, cache), params["layers"]
    if isinstance(layers, tuple):
        for i, weights in enumerate(layers):
            carry = one(i, carry, weights)
    else:
        carry = jax.lax.fori_loop(
            0,
            config.num_layers,
            lambda i, carry: one(i, carry, jax.tree.map(lambda w: w[i], layers)),
            carry,
        )
    x_BTD, cache = carry
    return rms_norm(x_BTD, params["final_norm"], config.norm_eps), cache


def unstack_layers(params: Params) -> Params:
    """Parameters with the layers as a tuple of trees, for `decode`."""
    num_layers = len(params["layers"]["attn_norm"])
    layers = tuple(
        jax.tree.map(lambda stacked, i=i: stacked[i], params["layers"])
        for i in range(num_layers)
    )
    return {**params, "layers": layers}


def ranks_in_segment(segment_ids_BT: jax.Array) -> jax.Array:
    """How many earlier tokens of the row share the segment, [B, T] int32.

    Segments may be split, by padding in the middle of a row for instance.
    """

    def ranks(segment_T):
        order_T = jnp.argsort(segment_T, stable=True)
        sorted_T = segment_T[order_T]
        rank_T = jnp.arange(len(sorted_T)) - jnp.searchsorted(
            sorted_T, sorted_T, side="left"
        )
        return jnp.zeros_like(rank_T).at[order_T].set(rank_T).astype(jnp.int32)

    return jax.vmap(ranks)(segment_ids_BT)
