"""Qwen3-8B's sampler compiled for TPU pods that are not there: memory and traffic a chip.

    python -m tests.bench.decode_aot [--topology=v5p:4x4x4 --tensor=4 --slots=512 ...]

Needs libtpu (pip install 'klear_jax[tpu]'); without flags it does the two pods that
RESULTS.md records. Compiled, not run. Bytes accessed are the compiler's own count of the
layers' loop times the layers, plus the pages that the attention kernel reads, which the
compiler does not count; the weights and these pages are what must be read.
"""

import argparse
import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax

from configs import sections
from klear_jax import aot, decoding, qwen3, sampler, sharding
from klear_jax.sampling import Sampling

GIB = 2**30
ROW = 36_864  # Tokens of a prompt with its response.
RULES = sections.mesh(1, 1, 1).rules.to_dict()


def programs(config, engine, layout):
    return decoding.trace_programs(
        sampler.program_shape(engine, layout, ROW, kernel="tpu"),
        Sampling(),
        config=config,
        layout=layout,
        dtype="bfloat16",
        kernel="tpu",
        platform="tpu",
    )


def layer_bytes(config, engine, layout, once):
    """What the compiler counts for one layer: its loop with the body twice, less once."""
    loop = jax.lax.fori_loop

    def unrolled(low, high, body, carry):
        over_layers = isinstance(high, int) and high == config.num_layers
        return loop(low, high, body, carry, unroll=2 if over_layers else None)

    jax.lax.fori_loop = unrolled
    try:
        jax.clear_caches()
        compiled = programs(config, engine, layout)["decode"].lower().compile()
    finally:
        jax.lax.fori_loop = loop
    return compiled.cost_analysis()["bytes accessed"] - once


def study(topology, tensor, slots, pool_tokens, live_tokens):
    config = qwen3.PRESETS["qwen3_8b"]
    mesh = sharding.MeshConfig(1, -1, tensor, RULES)
    mesh = sharding.make_mesh(mesh, aot.devices(topology))
    layout = sharding.Layout(mesh, RULES)
    engine = sampler.Engine(
        num_slots=slots,
        page_tokens=128,
        pool_tokens=pool_tokens,
        prefill_tokens=1024,
        decode_steps=8,
    )
    print(f"{topology}, fsdp {mesh.shape['fsdp']} x tensor {tensor}, {slots} slots,")
    print(f"a cache of {pool_tokens:,} tokens; GiB a chip:")
    for name, traced in programs(config, engine, layout).items():
        compiled = traced.lower().compile()
        m = aot.memory(compiled)
        print(
            f"  {name:10}  arguments {m.arguments / GIB:6.2f}  temp {m.temp / GIB:6.3f}"
            f"  peak {m.peak / GIB:6.2f}"
        )
    kernels = compiled.as_text().count("ragged_paged_attention_kernel")
    once = compiled.cost_analysis()["bytes accessed"]
    body = layer_bytes(config, engine, layout, once)
    sizes = jax.tree.leaves(
        jax.tree.map(
            lambda p: jax.ShapeDtypeStruct(p.shape, "bfloat16"),
            {
                name: part
                for name, part in qwen3.param_table(config).items()
                if name != "embed"  # A row a slot is read of it.
            },
        )
    )
    weights = sum(x.size * 2 for x in sizes) / tensor
    token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 2 / tensor
    replica_slots = slots * tensor // mesh.size
    kv = replica_slots * live_tokens * token
    counted = once + (config.num_layers - 1) * body
    print(f"  decode: the kernel's custom call stands {kernels} times in the program")
    print(
        f"  a step reads weights {weights / GIB:.2f} + pages of {replica_slots} slots x "
        f"{live_tokens:,} tokens {kv / GIB:.2f} GiB; accessed {(counted + kv) / GIB:.2f}: "
        f"{(counted + kv) / (weights + kv):.3f} x"
    )


def main():
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--topology")
    flags.add_argument("--tensor", type=int, default=4)
    flags.add_argument("--slots", type=int, default=512)
    flags.add_argument("--pool_tokens", type=int, default=1 << 23)
    flags.add_argument("--live_tokens", type=int, default=8_192)
    args = flags.parse_args()
    if args.topology:
        study(**vars(args))
        return
    study("v5p:4x4x4", 4, 512, 1 << 23, args.live_tokens)
    study("v6e:8x8", 8, 512, 1 << 22, args.live_tokens)


if __name__ == "__main__":
    main()
