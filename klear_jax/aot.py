"""Compile programs for a TPU pod that is not there, with the compiler of the real one.

The package libtpu describes topologies and compiles for them on any machine; nothing runs.
What fits into a chip's memory, what is copied and what the devices tell each other is then
known before a pod is rented:

    mesh = sharding.make_mesh(config.mesh, aot.devices("v5p:4x4x4"))
    # Arguments are abstract, with shardings on the mesh.
    compiled, buffers = aot.compile_and_look(traced.lower())
    aot.memory(compiled).temp
    aot.collectives(compiled.as_text())
"""

import dataclasses
import importlib.util
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.experimental import topologies

from klear_jax.errors import InputError


def devices(topology: str, num_slices: int = 1) -> list[jax.Device]:
    """The chips of a TPU topology, such as 'v5p:4x4x4' or 'v6e:8x8', to make a mesh of; of
    several slices of it.

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
    # Nor is there a chip that two who only compile would fight for.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, num_slices=num_slices
        )
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
    found: Any = compiled.memory_analysis()
    return Memory(
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes,
        aliased=found.alias_size_in_bytes,
        temp=found.temp_size_in_bytes,
        peak=found.peak_memory_in_bytes,
    )


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An array of a compiled program, on each chip, where most memory is in use."""

    name: str  # Of an argument, or of the operation that made it, as JAX says.
    array: str  # As 'f32[36,256,3072]'.
    bytes: int


def compile_and_look(
    lowered: jax.stages.Lowered,
) -> tuple[jax.stages.Compiled, list[Buffer]]:
    """The compiled program, and what is alive at its peak, the largest first (empty if the
    compiler does not tell, as that of CPUs)."""
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(
            compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        )
        reports = list(pathlib.Path(folder).glob("*-live-range.txt"))
        text = reports[0].read_text() if reports else ""
    _, _, at_peak = text.partition(" (peak):\n")
    sizes = re.findall(r"^ +([\w.-]+)\{[\d,]*\}: (\d+) bytes \(cum", at_peak, re.M)
    made = {
        name: (array, op_name)
        for name, array, op_name in re.findall(
            r'%?([\w.-]+) = \(?([a-z]+\d*\[[\d,]*\]).*?op_name="([^"]*)"',
            compiled.as_text() or "",
        )
    }
    buffers = []
    for name, size in sizes:
        array, op_name = made.get(name, ("", name))
        buffers.append(Buffer(op_name.replace("\\'", "'"), array, int(size)))
    return compiled, buffers


DTYPE_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4}
DTYPE_BYTES |= {"f32": 4, "s64": 8, "u64": 8, "f64": 8}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array that devices tell each other in a compiled program."""

    kind: str  # One of `COLLECTIVES`.
    dtype: str  # As 'f32', 'bf16'.
    shape: tuple[int, ...]  # Of the whole: once gathered, or before it was scattered.
    devices: int  # That share it.
    times: int  # In a run of the program; loops of unknown length are counted once.
    op_name: str  # Where it comes from, as JAX says.

    @property
    def sent_bytes(self) -> float:
        """Of each chip, in a run: what the best algorithm on a ring sends."""
        size = math.prod(self.shape) * DTYPE_BYTES[self.dtype]
        if self.kind == "collective-permute":
            return self.times * size
        both_ways = 2 if self.kind == "all-reduce" else 1
        return self.times * size * both_ways * (self.devices - 1) / self.devices


COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf" = (.+?) ({'|'.join(COLLECTIVES)})(-start)?\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.-]+)")
_GOES_ON = re.compile(r"calls=%?async_collective_fusion|%?async-collective-done\S* = ")
_LOOP = re.compile(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)")
_ARRAY = re.compile(r"([a-z]+[0-9]*)\[([0-9,]*)\]")


def collectives(hlo: str) -> list[Collective]:
    """Those of a compiled program's text, in the order of the text, loops taken into account.

    TPUs fuse an all-reduce with the slice that each chip keeps into what is in truth a
    reduce-scatter, and it is listed as that. What travels while other fusions compute stands
    in the text of each of them, and is listed once, where it starts.
    """
    computations: dict[str, list[str]] = {}
    entry = ""
    for line in hlo.splitlines():
        if found := _COMPUTATION.match(line):
            name = found[2]
            computations[name] = []
            entry = name if found[1] else entry
        elif line.startswith(" "):
            computations[name].append(line)
    return [one for one in _walk(computations, entry, times=1) if one.devices > 1]


def _walk(
    computations: Mapping[str, list[str]], name: str, times: int
) -> Iterator[Collective]:
    for line in computations[name]:
        if found := _COLLECTIVE.search(line):
            types, kind, start = found.groups()
            yield from _read(line, types, kind, start, name, times)
        if loop := _LOOP.search(line):
            trips = _trips(computations[loop[1]])
            yield from _walk(computations, loop[2], times * trips)
            continue
        if _GOES_ON.search(line):
            continue
        for called in _CALLED.findall(line):
            yield from _walk(computations, called, times)


def _trips(condition: list[str]) -> int:
    """Of a loop: XLA's condition compares the counter with a constant, if it is known."""
    constants = re.findall(r" = s32\[\]\S* constant\((\d+)\)", "\n".join(condition))
    return int(constants[0]) if len(constants) == 1 else 1


def _read(
    line: str, types: str, kind: str, start: str | None, computation: str, times: int
) -> Iterator[Collective]:
    arrays = [
        (dtype, tuple(map(int, dims.split(","))) if dims else ())
        for dtype, dims in _ARRAY.findall(types)
    ]
    if start and kind != "all-reduce":  # (what goes in, what comes out, flags).
        arrays = arrays[1:2]
    devices = _devices(line)
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    elif kind == "reduce-scatter":
        dim = int(re.findall(r"dimensions=\{(\d+)\}", line)[0])
        arrays = [
            (dtype, (*shape[:dim], shape[dim] * devices, *shape[dim + 1 :]))
            for dtype, shape in arrays
        ]
    op_name = re.search(r'op_name="([^"]*)"', line)
    for dtype, shape in arrays:
        yield Collective(
            kind, dtype, shape, devices, times, op_name[1] if op_name else ""
        )


def _devices(line: str) -> int:
    """How many share: of groups listed, given as [groups, size], or by axes of a mesh."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[(.*?)\].*? \{('.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    return 2  # A permutation sends from one to another.
