"""The mesh, the rules from logical to mesh axes, and the shardings of a train state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from klear_jax import sharding
from klear_jax.errors import InputError

RULES = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "mlp": ("tensor",),
    "vocab": ("tensor", "fsdp"),
    "layers": (),
}


def mesh_config(data, fsdp, tensor, rules=RULES):
    return sharding.MeshConfig(data=data, fsdp=fsdp, tensor=tensor, rules=rules)


@pytest.fixture(scope="module")
def layout():
    return sharding.Layout(sharding.make_mesh(mesh_config(2, 2, 2)), RULES)


@pytest.mark.parametrize(
    "sizes, made",
    [
        ((2, 2, 2), (2, 2, 2)),
        ((1, 8, 1), (1, 8, 1)),
        ((-1, 1, 1), (8, 1, 1)),
        ((2, -1, 2), (2, 2, 2)),
        ((1, 4, -1), (1, 4, 2)),
    ],
)
def test_mesh_sizes(sizes, made):
    mesh = sharding.make_mesh(mesh_config(*sizes))
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == made
    assert {d.id for d in mesh.devices.flat} == set(range(8))


def test_mesh_of_some_devices():
    mesh = sharding.make_mesh(mesh_config(1, -1, 2), jax.devices()[4:])
    assert mesh.devices.shape == (1, 2, 2)
    assert {d.id for d in mesh.devices.flat} == {4, 5, 6, 7}


@pytest.mark.parametrize(
    "sizes",
    [(2, 2, 1), (3, -1, 1), (-1, -1, 8), (0, -1, 1), (-2, -1, 1), (16, 1, 1)],
)
def test_wrong_mesh_names_both_numbers(sizes):
    product = " x ".join(map(str, sizes))
    with pytest.raises(InputError, match=f"= {product} does not make the 8 devices"):
        sharding.make_mesh(mesh_config(*sizes))


def test_spec(layout):
    for axes, spec in (
        (("batch", None, "mlp"), P(("data", "fsdp"), None, ("tensor",))),
        (("layers", "embed"), P(None, ("fsdp",))),
        ((), P()),
    ):
        assert layout.spec(*axes) == spec
        assert layout.sharding(*axes).spec == spec
        assert layout.sharding(*axes).mesh == layout.mesh
    assert [layout.shards(a) for a in RULES] == [4, 2, 2, 4, 1]


def test_bad_axes_raise(layout):
    with pytest.raises(InputError, match=r"lacks the axes \['sequence'\]"):
        layout.spec("batch", "sequence")
    with pytest.raises(InputError, match=r"two of the axes.*'batch', 'embed'"):
        layout.spec("batch", "embed")
    with pytest.raises(InputError, match=r"mesh.rules.mlp names \['model'\]"):
        mesh_config(1, 1, 8, rules={"mlp": ("model",)})


def test_constrain(layout):
    x = jax.jit(lambda x: sharding.constrain(2 * x, layout, "batch", "mlp"))(
        jnp.ones((8, 4))
    )
    assert {s.data.shape for s in x.addressable_shards} == {(2, 2)}
    np.testing.assert_array_equal(x, np.full((8, 4), 2.0))
    assert sharding.constrain(x, None, "no", "such", "axes") is x


def test_train_state_is_sharded_like_its_parameters(layout):
    # Two leaves of one name and of different shardings: only the whole path tells.
    params = {
        "embed": jnp.ones((8, 4)),
        "layers": {"embed": jnp.ones((3, 4, 6)), "norm": jnp.ones((3, 4))},
    }
    shardings = {
        "embed": layout.sharding("vocab", None),
        "layers": {
            "embed": layout.sharding("layers", "embed", "mlp"),
            "norm": layout.sharding("layers", None),
        },
    }
    state = jax.eval_shape(
        lambda: {
            "params": params,
            "opt": optax.adamw(1e-3).init(params),
            "step": jnp.zeros((), jnp.int32),
            "losses": jnp.zeros((5,)),
        }
    )
    got = sharding.like_params(state, shardings, layout)
    assert got["params"] == shardings
    assert got["opt"][0].mu == shardings
    assert got["opt"][0].nu == shardings
    for counter in (got["opt"][0].count, got["step"], got["losses"]):
        assert counter.spec == P()
    assert jax.tree.structure(got) == jax.tree.structure(state)


def test_put(layout):
    tree = {"a": np.arange(32.0).reshape(8, 4), "b": [np.float32(3)]}
    shardings = {"a": layout.sharding("embed", "mlp"), "b": [layout.sharding()]}
    got = sharding.put(tree, shardings)
    assert got["a"].sharding == shardings["a"]
    assert {s.data.shape for s in got["a"].addressable_shards} == {(4, 2)}
    assert len(got["b"][0].addressable_shards) == 8
    jax.tree.map(np.testing.assert_array_equal, got, tree)
