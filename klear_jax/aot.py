"""Compile programs for a TPU pod that is not there, with the compiler of the real one.

The package libtpu describes topologies and compiles for them on any machine; nothing runs.
What fits into a chip's memory, what is copied and what the devices tell each other is then
known before a pod is rented:

    mesh = sharding.make_mesh(config.mesh, aot.devices("v5p:4x4x4"))
    compiled = traced.lower().compile()      # arguments: abstract, with shardings on mesh
    aot.memory(compiled).temp
"""

import dataclasses
import importlib.util
import os

import jax
from jax.experimental import topologies

from klear_jax.errors import InputError


def devices(topology: str) -> list[jax.Device]:
    """The chips of a TPU topology, such as 'v5p:4x4x4' or 'v6e:8x8', to make a mesh of.

    Raises:
        InputError: there is no libtpu, or it does not know the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "compiling for a TPU needs the package libtpu: pip install 'klear_jax[tpu]'"
        )
    # Without these libtpu looks for the machine that it is meant to run on.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"unknown TPU topology {topology!r} (known are such as v5p:4x4x4, v6e:8x8, "
            f"v5e:16x16): {reason}"
        ) from error
    return list(found.devices)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each chip."""

    arguments: int
    outputs: int
    aliased: int  # Outputs that lie where donated arguments lay.
    temp: int  # Beyond arguments and outputs.
    peak: int  # All that is alive at once, at most: what must fit.


def memory(compiled: jax.stages.Compiled) -> Memory:
    """What a compiled program needs on each chip."""
    found = compiled.memory_analysis()
    return Memory(
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes,
        aliased=found.alias_size_in_bytes,
        temp=found.temp_size_in_bytes,
        peak=found.peak_memory_in_bytes,
    )
