"""Programs compiled for chips that are not there; all but the first test need libtpu."""

import collections
import dataclasses
import functools
import importlib.util
import math

import jax
import jax.numpy as jnp
import pytest
from test_configs import parse

from klear_jax import aot, decoding, plan, qwen3, sampler
from klear_jax.errors import InputError
from klear_jax.sampling import Sampling
from klear_jax.sharding import (
    Layout,
    MeshConfig,
    constrain,
    make_mesh,
    map_shards,
)

SMALL = dataclasses.replace(
    qwen3.PRESETS["qwen3_8b"],
    vocab_size=8192,
    width=1024,  # 8 parts of 128, which TPUs do not split: they would sum the whole.
    num_layers=3,
    num_heads=8,
    num_kv_heads=4,
    mlp_width=1024,
)

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


def test_without_the_compiler_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs the package libtpu: pip install"):
        aot.devices("v5p:4x4x4")


@needs_libtpu
def test_an_unknown_topology_is_named():
    with pytest.raises(InputError, match="unknown TPU topology 'v5q:4x4'") as error:
        aot.devices("v5q:4x4")
    assert "\n" not in str(error.value)


@needs_libtpu
def test_the_sampler_of_a_pod_copies_neither_cache_nor_weights():
    """A small model with the 8B's heads and axes: what is donated is updated in place, and
    attention is the kernel."""
    _, c = parse("gppo_8b")
    devices = aot.devices("v5e:4x4")
    layout = Layout(make_mesh(c.mesh, devices), c.mesh.rules)
    engine = sampler.Engine(
        num_slots=64,
        page_tokens=128,
        pool_tokens=1 << 19,
        prefill_tokens=256,
        decode_steps=4,
    )
    shape = sampler.program_shape(engine, layout, 4096, kernel="tpu")
    programs = decoding.trace_programs(
        shape,
        Sampling(),
        config=SMALL,
        layout=layout,
        dtype=jnp.bfloat16,
        kernel="tpu",
        platform="tpu",
    )
    compiled = {name: traced.lower().compile() for name, traced in programs.items()}
    pool = jax.tree.leaves(programs["copy_pages"].out_info)
    pool_bytes = sum(x.size * x.dtype.itemsize for x in pool) / len(devices)
    for name in ("prefill", "decode", "copy_pages"):
        memory = aot.memory(compiled[name])
        assert memory.aliased >= pool_bytes, name
        assert memory.temp < 0.1 * pool_bytes, name
    for name in ("prefill", "decode"):
        assert "ragged_paged_attention_kernel" in compiled[name].as_text(), name


def test_collectives_are_read_with_their_loops():
    """Of a program for the CPU: five rounds of a gather and of a sum that is split."""
    rules = {"batch": ("fsdp",), "rows": ("fsdp",), "heads": ("tensor",)}
    layout = Layout(make_mesh(MeshConfig(1, 4, 2, rules)), rules)

    def local(x_BD, w_RD):
        def body(_, x_BD):
            whole_RD = jax.lax.all_gather(w_RD * x_BD[:1], "fsdp", tiled=True)
            total_RD = jax.lax.psum_scatter(whole_RD, "fsdp", tiled=True)
            return x_BD + jax.lax.psum(total_RD.sum(), ("fsdp", "tensor"))

        return jax.lax.fori_loop(0, 5, body, x_BD)

    fn = map_shards(local, layout, [("batch", None), ("rows", None)], ("batch", None))
    x, w = jnp.ones((8, 16)), jnp.ones((32, 16))
    found = aot.collectives(jax.jit(fn).lower(x, w).compile().as_text())
    by_kind = {one.kind: one for one in found}
    assert {kind: one.shape for kind, one in by_kind.items()} == {
        "all-gather": (32, 16),
        "reduce-scatter": (32, 16),
        "all-reduce": (),
    }
    assert {one.times for one in found} == {5}
    assert {one.dtype for one in found} == {"f32"}
    assert [by_kind[k].devices for k in ("all-gather", "reduce-scatter")] == [4, 4]
    assert by_kind["all-reduce"].devices == 8
    assert by_kind["all-gather"].sent_bytes == 5 * 32 * 16 * 4 * 3 / 4
    assert by_kind["all-reduce"].sent_bytes == 5 * 4 * 2 * 7 / 8


@functools.cache
def compile_update(fsdp, tensor):
    task, c = parse("gppo_8b")
    mesh = dataclasses.replace(c.mesh, data=1, fsdp=fsdp, tensor=tensor)
    short = dataclasses.replace(c.rollout, max_prompt_tokens=512, max_new_tokens=512)
    sizes = {"model": SMALL, "mesh": mesh, "micro_rows": fsdp, "rollout": short}
    c = dataclasses.replace(c, **sizes)
    layout = Layout(make_mesh(c.mesh, aot.devices("v5e:4x4")), c.mesh.rules)
    return plan.trace(task, c, layout)["update"].lower().compile()


@needs_libtpu
def test_replicas_lie_over_the_network_between_slices():
    rules = parse("gppo_8b")[1].mesh.rules
    devices = aot.devices("v5e:4x4", num_slices=2)
    mesh = make_mesh(MeshConfig(2, -1, 2, rules), devices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 8, "tensor": 2}
    for replica in (0, 1):
        slices = {device.slice_index for device in mesh.devices[replica].flat}
        assert len(slices) == 1
    with pytest.raises(InputError, match=r"mesh.data=1 must be a multiple of the 2"):
        make_mesh(MeshConfig(1, -1, 2, rules), devices)


@needs_libtpu
def test_what_is_largest_in_memory_has_its_name():
    """A matrix gathered in bfloat16, beside its shard in float32."""
    devices = aot.devices("v5e:4x4")
    layout = Layout(
        make_mesh(MeshConfig(1, 16, 1, parse("gppo_8b")[1].mesh.rules), devices),
        parse("gppo_8b")[1].mesh.rules,
    )

    def gathered(weights):
        whole = constrain(weights.astype(jnp.bfloat16), layout, None, None)
        with jax.named_scope("wide"):
            return jnp.sin(whole) @ whole.T

    weights = jax.ShapeDtypeStruct(
        (8192, 16384), jnp.float32, sharding=layout.sharding("embed", None)
    )
    compiled, buffers = aot.compile_and_look(jax.jit(gathered).trace(weights).lower())
    assert [one.bytes for one in buffers] == sorted(
        (one.bytes for one in buffers), reverse=True
    )
    assert buffers[0].bytes == 2 * 8192 * 16384
    assert buffers[0].array == "bf16[8192,16384]"
    assert {"weights"} <= {one.name for one in buffers}
    assert sum(one.bytes for one in buffers) <= 1.5 * aot.memory(compiled).peak


@needs_libtpu
def test_the_update_moves_weights_in_bfloat16_and_their_gradients_in_float32():
    """Each gradient is summed straight to the shard that a chip keeps, never as a whole, and
    no matrix is gathered in float32."""
    fsdp, tensor = 8, 2
    found = aot.collectives(compile_update(fsdp, tensor).as_text())
    matrices = collections.Counter()
    for param in jax.tree.leaves(qwen3.param_table(SMALL)):
        if "embed" in param.axes:
            size = math.prod(param.shape) // tensor
            matrices[size // (SMALL.num_layers if "layers" in param.axes else 1)] += 1
    smallest = min(matrices)
    over_fsdp = [
        one for one in found if one.devices == fsdp and math.prod(one.shape) >= smallest
    ]
    for one in over_fsdp:
        if one.kind == "all-gather":
            assert one.dtype == "bf16", one
        else:
            assert (one.kind, one.dtype) in {
                ("reduce-scatter", "f32"),
                ("all-to-all", "bf16"),  # The stream's gradient, for the embedding's.
            }, one
    # Of a layer: wq, wk, wv, wo, and three of the MLP; gathered forward and backward.
    in_layers = collections.Counter(
        one.kind for one in over_fsdp if one.times == SMALL.num_layers
    )
    assert in_layers == {"all-gather": 14, "reduce-scatter": 7}
    assert "splash" in compile_update(fsdp, tensor).as_text()
