"""The least that a step can take on given chips, from arithmetic alone; nothing is compiled.

Each phase is so many operations, bytes read from a chip's memory and bytes sent, and takes at
least the longest of the three, as if they overlapped and every rate were the maker's.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from klear_jax import qwen3, sampler
from klear_jax.sharding import Layout


@dataclasses.dataclass(frozen=True)
class Chip:
    """As its maker says: cloud.google.com/tpu/docs."""

    hbm_gib: float
    hbm_bytes: float  # A second.
    flops: float  # bfloat16, a second.
    link_bytes: float  # A second, to all other chips of a slice together.


CHIPS = {
    "v4": Chip(32, 1.228e12, 275e12, 300e9),
    "v5e": Chip(16, 0.819e12, 197e12, 200e9),
    "v5p": Chip(95, 2.765e12, 459e12, 600e9),
    "v6e": Chip(32, 1.640e12, 918e12, 448e9),
}
# What JAX calls a device -> what it can do. GPUs: the maker's data sheets, dense.
KINDS = {
    "TPU v4": CHIPS["v4"],
    "TPU v5 lite": CHIPS["v5e"],
    "TPU v5e": CHIPS["v5e"],
    "TPU v5": CHIPS["v5p"],
    "TPU v5p": CHIPS["v5p"],
    "TPU v6 lite": CHIPS["v6e"],
    "TPU v6e": CHIPS["v6e"],
    "NVIDIA A100-SXM4-40GB": Chip(40, 1.555e12, 312e12, 300e9),
    "NVIDIA A100-SXM4-80GB": Chip(80, 2.039e12, 312e12, 300e9),
    "NVIDIA H100 80GB HBM3": Chip(80, 3.35e12, 989e12, 450e9),
    "NVIDIA H200": Chip(141, 4.8e12, 989e12, 450e9),
}
# A second of each chip, to other slices: a host of four has 100 Gbit/s.
SLICE_BYTES = 3.1e9


@dataclasses.dataclass(frozen=True)
class Work:
    """What one chip does at least."""

    flops: float = 0.0
    read_bytes: float = 0.0  # From its memory; counted where it decides.
    sent_bytes: float = 0.0  # To chips of its slice.
    slice_bytes: float = 0.0  # To other slices.

    def __mul__(self, times: float) -> "Work":
        return Work(*(times * value for value in dataclasses.astuple(self)))

    def seconds(self, chip: Chip) -> dict[str, float]:
        return {
            "compute": self.flops / chip.flops,
            "read": self.read_bytes / chip.hbm_bytes,
            "send": self.sent_bytes / chip.link_bytes + self.slice_bytes / SLICE_BYTES,
        }

    def least_seconds(self, chip: Chip) -> float:
        return max(self.seconds(chip).values())


@dataclasses.dataclass(frozen=True)
class Model:
    """What counts of a config on a layout."""

    config: qwen3.Config
    layout: Layout
    itemsize: int  # Bytes of a weight as it travels, and of an activation.
    remat: str  # A key of `qwen3.REMAT`.

    @property
    def layer_weights(self) -> float:
        """Numbers in the matrices of a layer."""
        return sum(
            math.prod(param.shape) / self.config.num_layers
            for param in qwen3.param_table(self.config)["layers"].values()
            if "embed" in param.axes
        )

    @property
    def head_weights(self) -> int:
        return self.config.vocab_size * self.config.width

    def train(self, rows: float, row_tokens: int, length: float) -> Work:
        """Forward and backward of `rows` rows on each shard of the batch.

        A layer's matrices are gathered over fsdp for each pass over it (two, or three with
        recomputation) in bfloat16, and their gradients scattered in float32, and reduced
        over data. Around attention and MLP, the stream is gathered over tensor before and
        scattered after, in each pass; what is recomputed last need not be scattered. Where the
        products are kept ('dots'), the stream alone is gathered anew.

        Args:
            length: tokens of a sample: what a token attends to grows with it.
        """
        products_anew = self.remat not in ("none", "dots")
        attention_anew = self.remat in ("full", "offload")
        passes, c = 2 + products_anew, self.config
        shards = self.layout.mesh.shape
        tokens = rows * row_tokens
        # 2 for each weight and token and pass; the head is recomputed too.
        dots = 2 * tokens * (c.num_layers * self.layer_weights * (passes + 1))
        dots += 2 * tokens * self.head_weights * 4
        scores = c.num_layers * self._scores(tokens, length)
        scores *= 3.5 + attention_anew  # Backward: 5 products.
        weights = c.num_layers * self.layer_weights
        sent = weights * (self.itemsize * passes + 4)
        sent += self.head_weights * (2 * self.itemsize + 4)
        fsdp, tensor, data = shards["fsdp"], shards["tensor"], shards["data"]
        stream = tokens * c.width * self.itemsize * (tensor - 1) / tensor
        stream *= c.num_layers * {"none": 8, "dots": 10}.get(self.remat, 11)
        reduced = 4 * (weights + self.head_weights) / (fsdp * tensor)
        return Work(
            flops=(dots + scores) / tensor,
            sent_bytes=sent * (fsdp - 1) / fsdp / tensor + stream,
            slice_bytes=reduced * 2 * (data - 1) / data,
        )

    def score(self, rows: float, row_tokens: int, length: float) -> Work:
        """Forward alone."""
        c, shards = self.config, self.layout.mesh.shape
        tokens, tensor = rows * row_tokens, shards["tensor"]
        weights = c.num_layers * self.layer_weights + self.head_weights
        scores = c.num_layers * self._scores(tokens, length)
        stream = tokens * c.width * self.itemsize * (tensor - 1) / tensor
        fsdp = shards["fsdp"]
        return Work(
            flops=(2 * tokens * weights + scores) / tensor,
            sent_bytes=weights * self.itemsize * (fsdp - 1) / fsdp / tensor
            + stream * c.num_layers * 4,
        )

    def useful_flops(self, tokens: float, length: float) -> float:
        """Operations of forward and backward over all chips, none of them done twice: MFU counts
        these. Backward takes twice those of forward."""
        c = self.config
        weights = c.num_layers * self.layer_weights + self.head_weights
        return 3 * (2 * tokens * weights + c.num_layers * self._scores(tokens, length))

    def decode(self, slots: float, length: float) -> Work:
        """A token of each of `slots` slots of a replica, behind `length` others."""
        c, tensor = self.config, self.layout.shards("kv_heads")
        weights = c.num_layers * self.layer_weights + self.head_weights
        stream = slots * c.width * self.itemsize * 2 * (tensor - 1) / tensor
        return Work(
            flops=2 * slots * weights / tensor,
            read_bytes=weights * self.itemsize / tensor
            + slots * length * self.cache_token_bytes,
            sent_bytes=stream * 2 * c.num_layers,
        )

    @property
    def cache_token_bytes(self) -> float:
        """Of each chip of a replica."""
        c = self.config
        numbers = 2 * c.num_layers * c.num_kv_heads * c.head_dim
        return numbers * self.itemsize / self.layout.shards("kv_heads")

    def _scores(self, tokens: float, length: float) -> float:
        """Operations of causal attention in one layer, forward."""
        return (
            2 * 2 * tokens * length / 2 * self.config.num_heads * self.config.head_dim
        )


def chip_of(device_kind: str) -> Chip | None:
    """What a device can do, by `jax.Device.device_kind`; None where nobody has said it, as of
    CPUs."""
    return KINDS.get(device_kind)


def model_of(c: Any, layout: Layout) -> Model:
    """Of the config of a loop."""
    itemsize = jnp.dtype(c.dtype).itemsize
    return Model(c.model, layout, itemsize, c.remat)


def gppo_step(
    model: Model,
    engine: sampler.Engine,
    *,
    drawn: int,
    used: int,
    prompt_tokens: float,
    response_tokens: float,
    micro_rows: int,
    row_tokens: int,
) -> dict[str, Work]:
    """The phases of a step: sample, score, update. Prefill is left out, and so is what the
    slots lose while few samples are left.

    Args:
        drawn, used: samples of a step.
        prompt_tokens, response_tokens: of a sample, in the mean.
    """
    replicas = model.layout.shards("batch")
    slots = min(engine.num_slots, drawn) / replicas
    length = prompt_tokens + response_tokens
    calls = drawn * response_tokens / (slots * replicas)
    rows = micro_rows / replicas
    micros = used * length / (micro_rows * row_tokens)
    return {
        "sample": model.decode(slots, prompt_tokens + response_tokens / 2) * calls,
        "score": model.score(rows, row_tokens, length) * micros,
        "update": model.train(rows, row_tokens, length) * micros,
    }
