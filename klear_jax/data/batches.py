"""Batches for the loops: packed rows for SFT, prompts for RL and evaluation.

Iterators have `get_state` and `set_state`, of JSON values: they carry on with exactly the
batches that were to come, also on another number of processes.
"""

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import grain
import numpy as np
import tqdm

from klear_jax import hosts
from klear_jax.data.examples import Example
from klear_jax.errors import InputError
from klear_jax.tokens import Tokenizer

# All is in memory: threads would only compete with the loop.
IN_PROCESS = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
# Rows filled side by side. With lengths like those of long chains of thought, 128 rows
# are 98% full (8 rows: 93%), for 128 x row_tokens x 24 bytes of host memory.
PACKING_POOL = 128


class Streams:
    """An iterator over batches whose row i comes from stream i modulo their number.

    A stream is an iterator over parts of batches, made from examples of its own; so what is
    in a batch does not depend on who reads which stream. Rows of streams that this process
    does not read are empty here.
    """

    def __init__(self, mine: Mapping[int, grain.DatasetIterator], count: int):
        self._mine, self._count = dict(mine), count

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
            for name, x in part.items():
                batch[name][stream :: self._count] = x
        return batch

    def get_state(self) -> dict[str, Any]:
        """Of all streams, whoever reads them; all processes must ask."""
        mine = {str(stream): it.get_state() for stream, it in self._mine.items()}
        return {stream: s for part in hosts.gather(mine) for stream, s in part.items()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        for stream, it in self._mine.items():
            it.set_state(state[str(stream)])


@dataclasses.dataclass(frozen=True)
class SftBatches:
    """An iterator of batches and what one epoch of it holds (as far as it is read here).

    Attributes:
      iterator: of dicts of int32 arrays [B, T]: tokens; mask (1 = trained: the response
        and its stop token); segment_ids (1.. in each row, 0 = padding); positions (from
        0 in each segment).
      num_samples: samples of an epoch.
      num_tokens: their tokens, prompts included.
      num_dropped: samples left out because they are longer than a row.
    """

    iterator: Streams
    num_samples: int
    num_tokens: int
    num_dropped: int


def sft_batches(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    row_tokens: int,
    rows_per_batch: int,
    seed: int,
    num_epochs: int | None = None,
    pack: bool = True,
    too_long: Literal["error", "drop"] = "error",
    num_streams: int = 1,
    my_rows: Sequence[int] | None = None,
) -> SftBatches:
    """Shuffles (anew in each epoch), tokenises and packs samples into rows.

    Args:
      examples: with responses.
      tokenizer: its chat template makes the prompt, its first stop id ends the response.
      row_tokens: tokens of a row (T).
      rows_per_batch: rows of a batch (B).
      seed: of the order.
      num_epochs: then the iterator ends, its last batch filled up with empty rows; None:
        never.
      pack: several samples a row, or one.
      too_long: what becomes of a sample longer than a row.
      num_streams: the examples are dealt to so many `Streams`, each packed by itself.
      my_rows: of a batch, those that this process needs; None: all.

    Raises:
      InputError: an example without response or longer than a row; nothing left.
    """
    if rows_per_batch % num_streams:
        raise InputError(
            f"{rows_per_batch} rows of a batch cannot come from {num_streams} streams equally"
        )
    if my_rows is None:
        my_rows = range(rows_per_batch)
    rows = rows_per_batch // num_streams
    streams, counts = {}, np.zeros(3, int)
    for stream in sorted({row % num_streams for row in my_rows}):
        mine = examples[stream::num_streams]
        samples = _sft_samples(mine, tokenizer, row_tokens, too_long)
        lengths = [len(sample["tokens"]) for sample in samples]
        counts += len(samples), sum(lengths), len(mine) - len(samples)
        dataset = (
            grain.MapDataset.source(samples)
            .shuffle(seed)
            .repeat(num_epochs)
            .to_iter_dataset(IN_PROCESS)
        )
        dataset = grain.experimental.BestFitPackIterDataset(
            dataset,
            length_struct={"tokens": row_tokens, "mask": row_tokens},
            num_packing_bins=PACKING_POOL,
            seed=seed,
            max_sequences_per_bin=None if pack else 1,
        )
        stack = functools.partial(_stack, num_rows=rows)
        streams[stream] = iter(dataset.batch(rows, batch_fn=stack))
    return SftBatches(Streams(streams, num_streams), *map(int, counts))


def prompt_batches(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    prompts_per_step: int,
    max_prompt_tokens: int,
    seed: int,
    too_long: Literal["error", "truncate_left"] = "error",
) -> grain.DatasetIterator:
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
    return iter(dataset)


def all_prompts(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    max_prompt_tokens: int,
    too_long: Literal["error", "truncate_left"] = "error",
) -> dict[str, list[Any]]:
    """All prompts in order: lists prompt_ids, tokens (a list each), answers, problems,
    sources."""
    return _columns(_prompts(examples, tokenizer, max_prompt_tokens, too_long))


def _sft_samples(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    row_tokens: int,
    too_long: Literal["error", "drop"],
) -> list[dict[str, np.ndarray]]:
    samples = []
    for example in _progress(examples):
        sample = _sft_sample(example, tokenizer)
        length = len(sample["tokens"])
        if length <= row_tokens:
            samples.append(sample)
        elif too_long == "error":
            raise InputError(
                f"{example.origin} has {length} tokens, but a row has {row_tokens}"
            )
    if not samples:
        raise InputError(f"none of {len(examples)} samples fits a row of {row_tokens}")
    return samples


def _progress(examples: Sequence[Example]) -> "tqdm.tqdm[Example]":
    quiet = not hosts.first()
    return tqdm.tqdm(examples, desc="tokenising", unit="", delay=1, disable=quiet)


def _sft_sample(example: Example, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    if example.response is None:
        raise InputError(f"{example.origin} has no response to learn from")
    prompt = tokenizer.prompt(example.messages)
    response = [*tokenizer.encode(example.response), tokenizer.stop_ids[0]]
    return {
        "tokens": np.array(prompt + response, np.int32),
        "mask": np.repeat(np.array([0, 1], np.int32), [len(prompt), len(response)]),
    }


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
                f" {max_prompt_tokens}"
            )
        cut += len(tokens) > max_prompt_tokens
        prompts.append(
            {
                "prompt_ids": example.prompt_id,
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
