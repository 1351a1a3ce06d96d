"""How fast a run is and how full its devices are: tokens a second, shares of what the chips
could do at most, memory."""

import pathlib
from collections.abc import Mapping

import jax

from klear_jax.roofline import Chip, Model, chip_of

GIB = 2**30


def of_update(
    model: Model, tokens: int, samples: int, seconds: float
) -> dict[str, float]:
    """tokens/s of forward and backward, and MFU: the operations that they need, nothing counted
    twice, over those that all chips could do in that time in bfloat16.

    Args:
        tokens: computed, prompts included, padding not.
        samples: that they belong to.
    """
    speeds = {"speed/update_tokens": tokens / seconds}
    if (chip := _chip()) and tokens:
        could = chip.flops * jax.device_count() * seconds
        speeds["speed/mfu"] = model.useful_flops(tokens, tokens / samples) / could
    return speeds


def of_sampling(
    model: Model,
    counts: Mapping[str, float],
    tokens: float,
    length: float,
    seconds: float,
) -> dict[str, float]:
    """tokens/s drawn, and the share of the memory's bandwidth: bytes that decoding must read,
    over those that a chip could read in the time of the whole phase.

    Args:
        counts: of the sampler, `metrics.of_sampler`.
        tokens: drawn.
        length: what a token has before it, in the mean.
        seconds: of the phase, with prefill and what is waited for.
    """
    speeds = {"speed/sample_tokens": tokens / seconds}
    steps = counts["sampler/decode_steps"]
    if (chip := _chip()) and steps:
        slots = counts["sampler/slot_steps"] / steps / model.layout.shards("batch")
        read = steps * model.decode(slots, length).read_bytes
        speeds["speed/decode_bandwidth"] = read / (chip.hbm_bytes * seconds)
    return speeds


def _chip() -> Chip | None:
    return chip_of(jax.devices()[0].device_kind)


def memory() -> dict[str, float]:
    """GiB in use: by this process on its host, where the system tells it, and of the fullest of
    its devices, now and at most, where they do."""
    found = {}
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        [resident] = [
            line for line in status.read_text().splitlines() if "VmRSS" in line
        ]
        found["memory/host_gib"] = int(resident.split()[1]) * 1024 / GIB
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    for ours, theirs in (
        ("device", "bytes_in_use"),
        ("device_peak", "peak_bytes_in_use"),
    ):
        values = [one[theirs] for one in stats if theirs in one]
        if values:
            found[f"memory/{ours}_gib"] = max(values) / GIB
    return found
