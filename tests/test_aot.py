"""Programs compiled for chips that are not there; all but the first test need libtpu."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from test_configs import parse

from klear_jax import aot, decoding, qwen3, sampler
from klear_jax.errors import InputError
from klear_jax.sampling import Sampling
from klear_jax.sharding import Layout, make_mesh

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
    model = qwen3.Config(
        vocab_size=1024,
        width=512,
        num_layers=3,
        num_heads=8,
        num_kv_heads=4,
        head_dim=128,
        mlp_width=1024,
        rope_theta=1e6,
        norm_eps=1e-6,
        tied=False,
        qk_norm=True,
        max_positions=8192,
    )
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
        config=model,
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
