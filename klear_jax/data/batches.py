"""Batches for the loops: packed rows for SFT, prompts for RL and evaluation.

Iterators have `get_state` and `set_state`, of JSON values: they carry on with exactly the
batches that were to come, also on another number of processes.
"""

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import grain
import numpy as np
import tqdm
from etils import epath

from klear_jax import hosts
from klear_jax.data import shards
from klear_jax.data.examples import read_examples
from klear_jax.data.rows import Example
from klear_jax.data.samples import tokenize
from klear_jax.errors import InputError, let_pass
from klear_jax.tokens import Tokenizer

# In the caller's thread, or in that of `prefetch`: more would compete with the loop.
IN_PROCESS = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
# Rows filled side by side. With lengths like those of long chains of thought, 128 rows
# are 98% full (8 rows: 93%), for 128 x row_tokens x 24 bytes of host memory.
PACKING_POOL = 128
# Whose lengths tell how full rows will be.
FILL_SAMPLES = 1_000


class Streams:
    """An iterator over batches whose row i comes from stream i modulo their number.

    A stream is an iterator over parts of batches, made from examples of its own; so what is
    in a batch does not depend on who reads which stream. Rows of streams that this process
    does not read are empty here.

    Attributes:
      num_samples: how many have come, of the streams that this process reads.
    """

    def __init__(
        self,
        mine: Mapping[int, grain.DatasetIterator],
        count: int,
        made_of: Sequence[Sequence[Any]],
    ):
        """`made_of` are JSON values that tell the data from others."""
        self._mine, self._count, self._made_of = dict(mine), count, list(made_of)
        self._seen = dict.fromkeys(mine, 0)

    @property
    def num_samples(self) -> int:
        return sum(self._seen.values())

    def __iter__(self) -> "Streams":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        parts = {stream: next(it, None) for stream, it in self._mine.items()}
        parts = {stream: part for stream, part in parts.items() if part is not None}
        if not parts:
            raise StopIteration
        like = next(iter(parts.values()))
        batch = {
            name: np.zeros((len(x) * self._count, *x.shape[1:]), x.dtype)
            for name, x in like.items()
        }
        for stream, part in parts.items():
            self._seen[stream] += int(part["segment_ids"].max(axis=1).sum())
            for name, x in part.items():
                batch[name][stream :: self._count] = x
        return batch

    def get_state(self) -> dict[str, Any]:
        """Of all streams, whoever reads them; all processes must ask."""
        mine = {
            str(stream): {"position": it.get_state(), "seen": self._seen[stream]}
            for stream, it in self._mine.items()
        }
        streams = {
            stream: s for part in hosts.gather(mine) for stream, s in part.items()
        }
        return streams | {"made_of": self._made_of}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from `get_state`; an InputError where that was of other data."""
        if state["made_of"] != self._made_of:
            raise InputError(
                f"the checkpoint is of other data, whose sources (name, samples, tokens) were "
                f"{state['made_of']}, not {self._made_of}"
            )
        for stream, it in self._mine.items():
            it.set_state(state[str(stream)]["position"])
            self._seen[stream] = state[str(stream)]["seen"]


class Rows(Protocol):
    """A list of them, or what reads them when they are asked for."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Mapping[str, np.ndarray]: ...


@dataclasses.dataclass(frozen=True)
class Samples:
    """Demonstrations of one source, by index: in memory, or read from a data set.

    Attributes:
      name: of the source.
      weight: how often an epoch goes through them.
      rows: a sequence of dicts of int32 [n]: tokens, and mask (1 = trained: the response
        and its stop token).
      num_tokens: of all, prompts included.
      num_dropped: samples left out because they are longer than a row.
    """

    name: str
    weight: float
    rows: Rows
    num_tokens: int
    num_dropped: int = 0


def text_samples(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    row_tokens: int,
    too_long: Literal["error", "drop"],
) -> Samples:
    """Examples, tokenised now and kept in memory.

    Args:
      examples: with responses.
      tokenizer: its chat template makes the prompt, its first stop id ends the response.
      row_tokens: the most tokens that a sample may have.
      too_long: what becomes of a longer one.

    Raises:
      InputError: an example without response or too long; nothing left.
    """
    rows = []
    for example in _progress(examples):
        if example.response is None:
            raise InputError(f"{example.origin} has no response to learn from")
        prompt, response = tokenize(example.messages, example.response, tokenizer)
        length = len(prompt) + len(response)
        if length <= row_tokens:
            rows.append(_sample(np.array(prompt + response, np.int32), len(prompt)))
        elif too_long == "error":
            raise InputError(
                f"{example.origin} has {length} tokens, but a row has {row_tokens}: raise "
                "data.row_tokens, or set data.too_long='drop'"
            )
    if not rows:
        raise InputError(f"none of {len(examples)} samples fits a row of {row_tokens}")
    num_tokens = sum(len(row["tokens"]) for row in rows)
    return Samples("", 1.0, rows, num_tokens, len(examples) - len(rows))


def _sample(tokens: np.ndarray, prompt_tokens: int) -> dict[str, np.ndarray]:
    mask = (np.arange(len(tokens)) >= prompt_tokens).astype(np.int32)
    return {"tokens": tokens, "mask": mask}


def read_samples(
    path: epath.PathLike,
    split: str,
    tokenizer: Tokenizer,
    *,
    row_tokens: int,
    too_long: Literal["error", "drop"],
    weights: Mapping[str, float],
) -> list[Samples]:
    """What SFT learns from: `prepared_samples` where prepare_data made them, or the
    `text_samples` of any other data set or file.

    Args:
      weights: name of a source -> how often an epoch goes through it, in place of what
        the data set says.
    """
    first = epath.Path(str(path).split(",")[0].strip())
    if first.is_dir() and shards.read_metadata(first):
        found = prepared_samples(path, split, tokenizer, row_tokens=row_tokens)
    else:
        found = [
            text_samples(
                read_examples(path, split),
                tokenizer,
                row_tokens=row_tokens,
                too_long=too_long,
            )
        ]
    names = {one.name for one in found}
    if unknown := sorted(set(weights) - names):
        raise InputError(
            f"data.weights names {unknown}; the sources are {sorted(names)}"
        )
    return [
        dataclasses.replace(one, weight=weights.get(one.name, one.weight))
        for one in found
    ]


def prepared_samples(
    path: epath.PathLike, split: str, tokenizer: Tokenizer, *, row_tokens: int
) -> list[Samples]:
    """The sources of data sets that `prepare_data` made, read when they are needed.

    Args:
      path: folders of their versions, with commas between.
      split: such as 'train', or 'train_easy+train_hard'.
      tokenizer: must be the one that they were made with.
      row_tokens: no sample may have more.

    Raises:
      InputError: a folder that is no such data set, or none for this tokenizer and rows.
    """
    found: list[Samples] = []
    for folder in map(str.strip, str(path).split(",")):
        metadata = shards.read_metadata(folder)
        if metadata is None or metadata["made_with"]["kind"] != "sft":
            raise InputError(f"{folder} holds no SFT data that prepare_data made")
        if metadata["tokenizer"] != tokenizer.fingerprint:
            raise InputError(
                f"{folder} was made with another tokenizer or chat template than "
                f"{tokenizer.path.parent}: prepare it anew"
            )
        if metadata["max_tokens"] > row_tokens:
            raise InputError(
                f"{folder} has samples of up to {metadata['max_tokens']} tokens, a row has "
                f"{row_tokens}: prepare it with clean.max_tokens={row_tokens}"
            )
        for part in split.split("+"):
            found += _prepared_sources(folder, part, metadata)
    return found


def _prepared_sources(
    folder: str, split: str, metadata: Mapping[str, Any]
) -> Iterator[Samples]:
    if split not in metadata["sources"]:
        raise InputError(
            f"{folder} has no split {split!r}; there are {sorted(metadata['sources'])}"
        )
    source = shards.read_source(folder, split)
    start = 0
    for one in metadata["sources"][split]:
        rows = _Rows(f"{folder}, split {split!r}", source, start, one["samples"])
        yield Samples(one["name"], one["weight"], rows, one["tokens"])
        start += one["samples"]


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Samples `start` to `start + count` of a data set, read and decoded one by one."""

    name: str  # For messages.
    source: Sequence[Mapping[str, Any]]
    start: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        try:
            row = self.source[self.start + index]
            return _sample(row["tokens"], row["prompt_tokens"])
        except Exception as error:  # protobuf and array_record raise a class each.
            let_pass(error)
            raise InputError(
                f"{self.name}: sample {self.start + index} cannot be read, is its file "
                f"damaged? {error}"
            ) from error


@dataclasses.dataclass(frozen=True)
class SftBatches:
    """An iterator of batches and what one epoch of it holds (as far as it is read here).

    Attributes:
      iterator: of dicts of int32 arrays [B, T]: tokens; mask (1 = trained); segment_ids
        (1.. in each row, 0 = padding); positions (from 0 in each segment).
      num_samples: samples of an epoch.
    """

    iterator: Streams
    num_samples: float


def sft_batches(
    sources: Sequence[Samples],
    *,
    row_tokens: int,
    rows_per_batch: int,
    seed: int,
    shuffle: bool = True,
    num_epochs: int | None = None,
    pack: bool = True,
    num_streams: int = 1,
    my_rows: Sequence[int] | None = None,
    prefetch: int = 0,
) -> SftBatches:
    """Shuffles (anew in each epoch), mixes and packs samples into rows.

    Args:
      sources: go evenly through an epoch, each as often as its weight says.
      row_tokens: tokens of a row (T).
      rows_per_batch: rows of a batch (B).
      seed: of the order.
      shuffle: or in order.
      num_epochs: then the iterator ends, its last batch filled up with empty rows, and each
        sample has come so often, whatever its source's weight; None: never.
      pack: several samples a row, or one.
      num_streams: the samples are dealt to so many `Streams`, each packed by itself; where
        one has a sample more than another, these come a little less often.
      my_rows: of a batch, those that this process needs; None: all.
      prefetch: batches that a thread makes ahead.

    Raises:
      InputError: rows that cannot be dealt to the streams, or a stream without samples.
    """
    if rows_per_batch % num_streams:
        raise InputError(
            f"{rows_per_batch} rows of a batch cannot come from {num_streams} streams equally"
        )
    if my_rows is None:
        my_rows = range(rows_per_batch)
    stack = functools.partial(_stack, num_rows=rows_per_batch // num_streams)
    streams, num_samples = {}, 0.0
    for stream in sorted({row % num_streams for row in my_rows}):
        mine = _deal(sources, stream, num_streams)
        if not mine:
            raise InputError(
                f"{sum(len(one.rows) for one in sources)} samples are too few for "
                f"data.streams={num_streams}"
            )
        num_samples += sum(weight * len(dealt) for weight, dealt in mine)
        mixed = _mix(mine, seed if shuffle else None, num_epochs)
        dataset = grain.experimental.BestFitPackIterDataset(
            mixed.to_iter_dataset(IN_PROCESS),
            length_struct={"tokens": row_tokens, "mask": row_tokens},
            num_packing_bins=PACKING_POOL,
            seed=seed,
            max_sequences_per_bin=None if pack else 1,
        ).batch(rows_per_batch // num_streams, batch_fn=stack)
        if prefetch:
            dataset = grain.experimental.ThreadPrefetchIterDataset(
                dataset, prefetch_buffer_size=prefetch
            )
        streams[stream] = iter(dataset)
    made_of = [[one.name, len(one.rows), one.num_tokens] for one in sources]
    return SftBatches(Streams(streams, num_streams, made_of), num_samples)


def packed_fill(sources: Sequence[Samples], row_tokens: int, *, pack: bool) -> float:
    """The share of positions of rows that tokens fill, as FILL_SAMPLES of all show it."""
    count = sum(len(one.rows) for one in sources)
    step = max(1, count // FILL_SAMPLES)
    lengths = [
        len(one.rows[i]["tokens"])
        for one in sources
        for i in range(0, len(one.rows), step)
    ]
    zeros = np.zeros(row_tokens, np.int32)
    rows = [{"tokens": zeros[:length], "mask": zeros[:length]} for length in lengths]
    stand_in = Samples("", 1.0, rows, sum(lengths))
    found = sft_batches(
        [stand_in],
        row_tokens=row_tokens,
        rows_per_batch=PACKING_POOL,
        seed=0,
        pack=pack,
    )
    return float((next(found.iterator)["segment_ids"] > 0).mean())


def _deal(
    sources: Sequence[Samples], stream: int, num_streams: int
) -> list[tuple[float, grain.MapDataset]]:
    """Weight and samples of each source that a stream has: every num_streams-th of all."""
    dealt, before = [], 0
    for one in sources:
        first = (stream - before) % num_streams
        if first < len(one.rows):
            rows = grain.MapDataset.source(one.rows)[first::num_streams]
            dealt.append((one.weight, rows))
        before += len(one.rows)
    return dealt


def _mix(
    parts: Sequence[tuple[float, grain.MapDataset]],
    seed: int | None,
    num_epochs: int | None,
) -> grain.MapDataset:
    """Of each (weight, data set) so much that all come to their ends together; of a number
    of epochs, all."""
    datasets = [one if seed is None else one.shuffle(seed) for _, one in parts]
    if num_epochs:
        whole = grain.MapDataset.concatenate(datasets)
        return (whole if seed is None else whole.shuffle(seed)).repeat(num_epochs)
    weights = [weight * len(one) for weight, one in parts]
    return grain.MapDataset.mix([one.repeat() for one in datasets], weights)


def prompt_batches(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    prompts_per_step: int,
    max_prompt_tokens: int,
    seed: int,
    too_long: Literal["error", "truncate_left"] = "error",
) -> "PromptBatches":
    """An endless iterator of prompts, shuffled anew in each epoch.

    An epoch's last prompts that do not fill a step wait for another epoch, so no step has
    a prompt twice. Every process has all of them: each decides for itself, as all do, which
    sample is drawn where.

    Args:
      examples: with answers.
      tokenizer: its chat template makes the prompt.
      prompts_per_step: of a batch.
      max_prompt_tokens: the limit.
      seed: of the order.
      too_long: 'truncate_left' keeps the last max_prompt_tokens tokens of a longer prompt.

    Returns:
      Of dicts as `all_prompts` returns.

    Raises:
      InputError: an example without answer or with too long a prompt; fewer prompts than
        a step needs.
    """
    prompts = _prompts(examples, tokenizer, max_prompt_tokens, too_long)
    if len(prompts) < prompts_per_step:
        raise InputError(
            f"the data set has {len(prompts)} prompts, a step needs {prompts_per_step}"
        )
    dataset = (
        grain.MapDataset.source(prompts)
        .shuffle(seed)
        .batch(
            prompts_per_step,
            drop_remainder=True,
            batch_fn=_columns,
        )
        .repeat()
        .to_iter_dataset(IN_PROCESS)
    )
    return PromptBatches(iter(dataset), _digest(prompts))


class PromptBatches:
    """An iterator over prompts, which knows them from others."""

    def __init__(self, batches: grain.DatasetIterator, made_of: str):
        """`made_of` is a digest of all prompts, with their answers."""
        self._batches, self._made_of = batches, made_of

    def __iter__(self) -> "PromptBatches":
        return self

    def __next__(self) -> dict[str, list[Any]]:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        return {"position": self._batches.get_state(), "made_of": self._made_of}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from `get_state`; an InputError where that was of other data."""
        if state["made_of"] != self._made_of:
            raise InputError(
                "the checkpoint is of other data: prompts, answers, their order, or the "
                "tokenizer have changed since it was written"
            )
        self._batches.set_state(state["position"])


def _digest(prompts: Sequence[Mapping[str, Any]]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(np.asarray(prompt["tokens"], np.int32).tobytes())
        rest = [prompt[name] for name in ("prompt_ids", "answers", "sources")]
        digest.update(json.dumps(rest, default=str).encode())
    return digest.hexdigest()[:16]


def all_prompts(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    max_prompt_tokens: int,
    too_long: Literal["error", "truncate_left"] = "error",
) -> dict[str, list[Any]]:
    """All prompts in order: lists prompt_ids, messages, tokens (a list each), answers,
    problems, sources."""
    return _columns(_prompts(examples, tokenizer, max_prompt_tokens, too_long))


def _progress(examples: Sequence[Example]) -> "tqdm.tqdm[Example]":
    quiet = not hosts.first()
    return tqdm.tqdm(examples, desc="tokenising", unit="", delay=1, disable=quiet)


def _stack(rows: Sequence[dict[str, np.ndarray]], num_rows: int) -> dict[str, Any]:
    """The rows, and empty ones up to num_rows, under our names [B, T]."""
    names = {
        "tokens": "tokens",
        "mask": "mask",
        "segment_ids": "tokens_segment_ids",
        "positions": "tokens_positions",
    }
    padding = [(0, num_rows - len(rows)), (0, 0)]
    return {
        ours: np.pad(np.stack([row[grains] for row in rows]), padding)
        for ours, grains in names.items()
    }


def _prompts(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    max_prompt_tokens: int,
    too_long: Literal["error", "truncate_left"],
) -> list[dict[str, Any]]:
    prompts, cut = [], 0
    for example in _progress(examples):
        if example.answer is None:
            raise InputError(f"{example.origin} has no answer to compare with")
        tokens = tokenizer.prompt(example.messages)
        if len(tokens) > max_prompt_tokens and too_long == "error":
            raise InputError(
                f"{example.origin}: the prompt has {len(tokens)} tokens, the limit is"
                f" {max_prompt_tokens}: raise max_prompt_tokens"
            )
        cut += len(tokens) > max_prompt_tokens
        prompts.append(
            {
                "prompt_ids": example.prompt_id,
                "messages": example.messages,
                "tokens": tokens[-max_prompt_tokens:],
                "answers": example.answer,
                "problems": example.problem,
                "sources": example.source,
            }
        )
    if cut:
        logging.getLogger(__name__).warning(
            "%d of %d prompts have more than %d tokens: their beginning is cut off",
            cut,
            len(prompts),
            max_prompt_tokens,
        )
    return prompts


def _columns(prompts: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    return {key: [prompt[key] for prompt in prompts] for key in prompts[0]}
