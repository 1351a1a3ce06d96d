"""Where arrays live: logical axis names -> mesh axes.

The model names the axes of every array; the rules of a `Layout` say on which axes of the
mesh they lie. A new layout is a new table in a config, never an edit to the model. No
other file says PartitionSpec.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from klear_jax.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor")
Rules = Mapping[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes, and on which of them each logical axis lies."""

    data: int  # Replicas of the train state; over DCN on several slices.
    fsdp: int  # Shards of batch and train state (ZeRO-3).
    tensor: int  # Shards of heads, MLP and vocabulary. One size may be -1: all that is left.
    rules: Rules  # Logical axis -> mesh axes, () for not split.

    def __post_init__(self):
        for axis, names in self.rules.items():
            if unknown := set(names) - set(MESH_AXES):
                raise InputError(
                    f"mesh.rules.{axis} names {sorted(unknown)}: the mesh axes are {MESH_AXES}"
                )
        heads = self.rules.get("heads")
        kv_heads = self.rules.get("kv_heads", heads)
        if heads != kv_heads:
            raise InputError(
                f"mesh.rules.kv_heads={kv_heads} must be mesh.rules.heads={heads}: query heads "
                "lie where their key heads are"
            )


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices (or of those given), axes (data, fsdp, tensor); on several
    slices, `data` lies over the network between them.

    The axes are Auto: the compiler propagates shardings from jit's in and out shardings
    and our constraints, which is what pjit did.
    """
    devices = jax.devices() if devices is None else devices
    # (On GPUs, JAX calls each node a slice; there the mesh may lie as it will.)
    tpus = [device for device in devices if device.platform == "tpu"]
    slices = len({getattr(device, "slice_index", 0) for device in tpus}) or 1
    sizes = [config.data, config.fsdp, config.tensor]
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = len(devices) // max(-math.prod(sizes), 1)
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        raise InputError(
            f"mesh.data x mesh.fsdp x mesh.tensor = {config.data} x {config.fsdp} x "
            f"{config.tensor} does not make the {len(devices)} devices there are "
            "(one of the three may be -1, for all that is left)"
        )
    if slices > 1 and sizes[0] % slices:
        raise InputError(
            f"mesh.data={sizes[0]} must be a multiple of the {slices} slices: only replicas "
            "of the train state lie on several, for what is between them is slow"
        )
    within = sizes[0] // slices, *sizes[1:]
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(
            within, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(
            within, devices, allow_split_physical_axes=True
        )
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the rules for it. Passed explicitly; there is no global mesh."""

    mesh: Mesh
    rules: Rules

    def __hash__(self) -> int:
        """Of what `==` compares, so that jit can take a layout as a static argument."""
        return hash((self.mesh, tuple(sorted(self.rules.items()))))

    def spec(self, *axes: str | None) -> PartitionSpec:
        """('batch', 'seq') -> PartitionSpec(('data', 'fsdp'), None)."""
        if unknown := {a for a in axes if a is not None} - set(self.rules):
            raise InputError(f"mesh.rules lacks the axes {sorted(unknown)} of {axes}")
        parts = [() if a is None else tuple(self.rules[a]) for a in axes]
        used = [name for part in parts for name in part]
        if len(used) != len(set(used)):
            raise InputError(
                f"mesh.rules puts two of the axes {axes} on one mesh axis: {parts}"
            )
        return PartitionSpec(*(part or None for part in parts))

    def sharding(self, *axes: str | None) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(*axes))

    def shards(self, axis: str) -> int:
        """Into how many parts a logical axis is split."""
        self.spec(axis)  # Raises where the table lacks it.
        return math.prod(self.mesh.shape[name] for name in self.rules[axis])


def constrain(x: jax.Array, layout: Layout | None, *axes: str | None) -> jax.Array:
    """Pins an activation inside jit; without a layout there is one device and no pin."""
    if layout is None:
        return x
    return jax.lax.with_sharding_constraint(x, layout.sharding(*axes))


def sampling_layout(layout: Layout) -> Layout:
    """The layout of the sampling copy of the weights, on the same mesh.

    Decoding reads every weight for every token: they are gathered over fsdp once a
    rollout instead, and the stream of one token is not worth splitting.
    """
    return Layout(layout.mesh, {**layout.rules, "embed": (), "residual": ()})


def platform(layout: Layout | None) -> str:
    """'cpu', 'gpu' or 'tpu': of the mesh, which need not be there, or of this process."""
    if layout is None:
        return jax.default_backend()
    return layout.mesh.devices.flat[0].platform


def map_shards(
    fn: Callable[..., Any],
    layout: Layout | None,
    in_axes: Sequence[tuple[str | None, ...]],
    out_axes: Any,
) -> Callable[..., Any]:
    """`fn` on each device by itself, on its part of every array.

    Args:
        layout: None on one device.
        in_axes: logical axes of each argument, leading ones for a tree of arrays.
        out_axes: logical axes of the result, or a tuple of them, one a result.
    """
    if layout is None:
        return fn
    several = any(isinstance(axes, tuple) for axes in out_axes)
    return jax.shard_map(
        fn,
        mesh=layout.mesh,
        in_specs=tuple(layout.spec(*axes) for axes in in_axes),
        out_specs=tuple(layout.spec(*axes) for axes in out_axes)
        if several
        else layout.spec(*out_axes),
        check_vma=False,
    )


def sum_over_tokens(
    fn: Callable[..., jax.Array],
    layout: Layout | None,
    in_axes: Sequence[tuple[str | None, ...]],
    out_axes: tuple[str | None, ...],
    summed_over: Sequence[str] = (),
) -> Callable[..., jax.Array]:
    """The sum of `fn` over all devices that hold other tokens, of which each device keeps
    its part: a reduce-scatter over fsdp, and what is left is reduced over data.

    Args:
        fn: sees this device's part of its arguments; its result, a sum over tokens, is whole
            in the axes that lie on the batch's mesh axes.
        in_axes, out_axes: logical axes, as in `map_shards`.
        summed_over: logical axes in which `fn` has summed already, and returns a part.
    """
    if layout is None:
        return fn
    tokens = {"batch", "seq"} & {axis for axes in in_axes for axis in axes}
    over = {name for axis in tokens for name in layout.rules[axis]}
    over -= {name for axis in summed_over for name in layout.rules[axis]}

    def local(*args):
        x, left = fn(*args), set(over)
        for dim, axis in enumerate(out_axes):
            names = tuple(n for n in layout.rules.get(axis or "", ()) if n in over)
            if names:
                x = jax.lax.psum_scatter(x, names, scatter_dimension=dim, tiled=True)
                left -= set(names)
        return jax.lax.psum(x, tuple(sorted(left))) if left else x

    return map_shards(local, layout, in_axes, out_axes)


def exchange_tokens(
    x_BTD: jax.Array, ids_BT: jax.Array, layout: Layout | None, axis: str
) -> tuple[jax.Array, jax.Array]:
    """Inside `map_shards`: my tokens, whole in the last axis -> my part of the last axis, of
    all tokens of the devices that this logical axis lies on; and these tokens' ids."""
    if layout is None or not layout.rules[axis]:
        return x_BTD, ids_BT
    names = layout.rules[axis]
    # One part for each device, first in memory: left to TPUs, an all-to-all that splits the
    # last axis transposes all of the stream, four times, and takes a minute to compile.
    parts = jnp.stack(jnp.split(x_BTD, layout.shards(axis), axis=2))
    parts = jax.lax.all_to_all(parts, names, split_axis=0, concat_axis=0)
    return (
        parts.reshape(-1, *parts.shape[2:]),
        jax.lax.all_gather(ids_BT, names, tiled=True),
    )


def shard_index(layout: Layout | None, axis: str) -> jax.Array | int:
    """Inside `map_shards`: the how-manieth part of a logical axis this device has."""
    if layout is None or not layout.rules[axis]:
        return 0
    return jax.lax.axis_index(layout.rules[axis])


def map_replicas(
    fn: Callable[..., Any],
    layout: Layout | None,
    in_axes: Sequence[tuple[str | None, ...]],
    out_axes: Any,
) -> Callable[..., Any]:
    """`fn` on each shard of the batch axes by itself, on this device's part of the others.

    Args:
        fn: sees the arrays whose first logical axis is 'batch' without that axis.
        layout: None on one device, where that axis has length 1.
        in_axes, out_axes: as `map_shards`.
    """

    def strip(axes, tree):
        whole = not axes or axes[0] != "batch"
        return tree if whole else jax.tree.map(lambda x: x[0], tree)

    def local(*args):
        found = fn(*map(strip, in_axes, args))
        return jax.tree.map(lambda x: x[None], found)

    return map_shards(local, layout, in_axes, out_axes)


def like_params(tree: Any, params_shardings: Any, layout: Layout) -> Any:
    """Shardings for a tree that holds copies of the parameters (a train state).

    An optimizer's moments carry the path of their parameter as the end of their own
    path, and get its sharding; everything else (counters) is replicated.

    Args:
        tree: abstract or real arrays.
        params_shardings: the parameters' tree, of NamedShardings.
    """
    by_path = dict(jax.tree_util.tree_leaves_with_path(params_shardings))

    def find(path, leaf):
        for start in range(len(path)):
            if leaf.ndim and path[start:] in by_path:
                return by_path[path[start:]]
        return layout.sharding()

    return jax.tree_util.tree_map_with_path(find, tree)


def my_shards(layout: Layout, axis: str, size: int) -> list[int]:
    """The places along a logical axis of so many that lie on devices of this process."""
    places = layout.sharding(axis).addressable_devices_indices_map((size,))
    return sorted(
        {
            place
            for (part,) in filter(None, places.values())
            for place in range(size)[part]
        }
    )


def put(tree: Any, shardings: Any) -> Any:
    """Host arrays -> device arrays; of several processes, each needs to have only what lies
    on its devices.

    Args:
        tree: numpy arrays.
        shardings: a tree of NamedShardings like it, or one for all.
    """

    def put_one(sharding, x):
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(
        lambda sharding, part: jax.tree.map(
            lambda x: put_one(sharding, np.asarray(x)), part
        ),
        shardings,
        tree,
    )
