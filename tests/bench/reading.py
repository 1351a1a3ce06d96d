"""How fast SFT reads what prepare_data made, and how full its rows are.

    python -m tests.bench.reading --data=FOLDER [--row_tokens=32768] [--batches=64]

FOLDER is a data set, such as data/klear_sft/1.0.0. Prints packed tokens per second of CPU
time on one core; and for lengths with a heavy tail (log-normal, median 8,000 tokens, cut at a
row), the share of positions that tokens fill, without reading anything.
"""

import argparse
import json
import time

import numpy as np

from klear_jax.data import batches, shards

ROWS, STREAMS = 16, 2


class Tokenizer:
    """Stands for the one that the data were made with."""

    def __init__(self, fingerprint: str):
        self.fingerprint = fingerprint


def rate(folder: str, row_tokens: int, count: int) -> dict[str, float]:
    fingerprint = shards.read_metadata(folder)["tokenizer"]
    found = batches.prepared_samples(
        folder, "train", Tokenizer(fingerprint), row_tokens=row_tokens
    )
    sft = batches.sft_batches(
        found,
        row_tokens=row_tokens,
        rows_per_batch=ROWS,
        seed=0,
        num_streams=STREAMS,
    )
    wall, cpu, tokens, slowest = time.perf_counter(), time.process_time(), 0, 0.0
    for _ in range(count):
        began = time.perf_counter()
        batch = next(sft.iterator)
        slowest = max(slowest, time.perf_counter() - began)
        tokens += int((batch["segment_ids"] > 0).sum())
    return {
        "tokens": tokens,
        "tokens_per_cpu_s": tokens / (time.process_time() - cpu),
        "tokens_per_s": tokens / (time.perf_counter() - wall),
        "slowest_batch_s": slowest,
        "row_fill": tokens / (count * ROWS * row_tokens),
    }


def heavy_tailed_fill(row_tokens: int, num_samples: int = 20_000) -> dict[str, float]:
    lengths = np.random.default_rng(0).lognormal(np.log(8_000), 0.8, num_samples)
    lengths = np.minimum(lengths.astype(int), row_tokens)
    zeros = np.zeros(row_tokens, np.int32)
    rows = [{"tokens": zeros[:n], "mask": zeros[:n]} for n in lengths]
    made = batches.Samples("lengths", 1.0, rows, int(lengths.sum()))
    sft = batches.sft_batches(
        [made], row_tokens=row_tokens, rows_per_batch=ROWS, seed=0
    )
    fills = [(next(sft.iterator)["segment_ids"] > 0).mean() for _ in range(160)]
    return {
        "mean_length": float(lengths.mean()),
        "longest_share": float((lengths == row_tokens).mean()),
        "row_fill": float(np.mean(fills)),
        "emptiest_batch": float(np.min(fills)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--row_tokens", type=int, default=32_768)
    parser.add_argument("--batches", type=int, default=64)
    args = parser.parse_args()
    print(json.dumps(rate(args.data, args.row_tokens, args.batches)), flush=True)
    print(json.dumps(heavy_tailed_fill(args.row_tokens)), flush=True)


if __name__ == "__main__":
    main()
