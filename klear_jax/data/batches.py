"""Batches for the loops: packed rows for SFT, prompts for RL and evaluation.

The iterators are grain's: `get_state` and `set_state` (or orbax with
`grain.checkpoint.CheckpointSave`) carry on with exactly the batches that were to come.
"""

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import Any, Literal

import grain
import numpy as np
import tqdm

from klear_jax.data.examples import Example
from klear_jax.errors import InputError
from klear_jax.tokens import Tokenizer

# All is in memory: threads would only compete with the loop.
IN_PROCESS = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
# Rows filled side by side. With lengths like those of long chains of thought, 128 rows
# are 98% full (8 rows: 93%), for 128 x row_tokens x 24 bytes of host memory.
PACKING_POOL = 128


@dataclasses.dataclass(frozen=True)
class SftBatches:
    """An iterator of batches and what one epoch of it holds (on this shard).

    Attributes:
      iterator: of dicts of int32 arrays [B, T]: tokens; mask (1 = trained: the response
        and its stop token); segment_ids (1.. in each row, 0 = padding); positions (from
        0 in each segment).
      num_samples: samples of an epoch.
      num_tokens: their tokens, prompts included.
      num_dropped: samples left out because they are longer than a row.
    """

    iterator: grain.DatasetIterator
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
    shard_index: int = 0,
    shard_count: int = 1,
) -> SftBatches:
    """Shuffles (anew in each epoch), tokenises and packs samples into rows.

    Args:
      examples: with responses.
      tokenizer: its chat template makes the prompt, its first stop id ends the response.
      row_tokens: tokens of a row (T).
      rows_per_batch: rows of a batch over all shards; this shard's B is its equal part.
      seed: of the order.
      num_epochs: then the iterator ends, its last batch filled up with empty rows; None:
        never.
      pack: several samples a row, or one.
      too_long: what becomes of a sample longer than a row.
      shard_index: which of shard_count equal parts of the examples is read.
      shard_count: as a rule, the number of hosts.

    Raises:
      InputError: an example without response or longer than a row; nothing left.
    """
    rows = _share(rows_per_batch, "rows_per_batch", shard_count)
    mine = examples[shard_index::shard_count]
    samples = []
    for example in tqdm.tqdm(mine, desc="tokenising", unit="", delay=1):
        sample = _sft_sample(example, tokenizer)
        length = len(sample["tokens"])
        if length <= row_tokens:
            samples.append(sample)
        elif too_long == "error":
            raise InputError(
                f"{example.origin} has {length} tokens, but a row has {row_tokens}"
            )
    if not samples:
        raise InputError(f"none of {len(mine)} samples fits a row of {row_tokens}")
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
    dataset = dataset.batch(rows, batch_fn=functools.partial(_stack, num_rows=rows))
    return SftBatches(
        iterator=iter(dataset),
        num_samples=len(samples),
        num_tokens=sum(len(sample["tokens"]) for sample in samples),
        num_dropped=len(mine) - len(samples),
    )


def prompt_batches(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    *,
    prompts_per_step: int,
    max_prompt_tokens: int,
    seed: int,
    too_long: Literal["error", "truncate_left"] = "error",
    shard_index: int = 0,
    shard_count: int = 1,
) -> grain.DatasetIterator:
    """An endless iterator of prompts, shuffled anew in each epoch.

    An epoch's last prompts that do not fill a step wait for another epoch, so no step has
    a prompt twice. Which prompts a step has does not depend on the shards.

    Args:
      examples: with answers.
      tokenizer: its chat template makes the prompt.
      prompts_per_step: over all shards; a batch is this shard's equal part.
      max_prompt_tokens: the limit.
      seed: of the order.
      too_long: 'truncate_left' keeps the last max_prompt_tokens tokens of a longer prompt.
      shard_index: which of shard_count equal parts of each step is read.
      shard_count: as a rule, the number of hosts.

    Returns:
      Of dicts as `all_prompts` returns.

    Raises:
      InputError: an example without answer or with too long a prompt; fewer prompts than
        a step needs.
    """
    _share(prompts_per_step, "prompts_per_step", shard_count)
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
            batch_fn=lambda step: _columns(step[shard_index::shard_count]),
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


def _share(count: int, name: str, shard_count: int) -> int:
    if count % shard_count:
        raise InputError(f"{name}={count} is no multiple of {shard_count} shards")
    return count // shard_count


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
    for example in tqdm.tqdm(examples, desc="tokenising", unit="", delay=1):
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
