"""Prints what launch/local.sh reached: start, SFT and GPPO side by side.

python launch/local_table.py RUNS    reads the evaluations and metrics below RUNS.
"""

import json
import pathlib
import sys

import numpy as np

BOOTSTRAP = 10_000


def main(runs: pathlib.Path) -> None:
    rows = [
        ["", "avg@8", "95% interval", "pass@8", "greedy", "length", "clipped", "time"]
    ]
    for name in ("start", "SFT", "GPPO"):
        folder = runs / name.lower()
        found = json.loads((folder / "evaluation.json").read_text())
        steps = read_metrics(folder)
        rows.append(
            [
                name,
                f"{found['avg@8']:.1%}",
                f"{found['avg@8_low']:.1%} - {found['avg@8_high']:.1%}",
                f"{found['pass@8']:.1%}",
                f"{found['greedy']:.1%}",
                f"{found['length']:.1f}",
                clipped(steps),
                f"{sum(step['seconds/step'] for step in steps):.0f} s" if steps else "",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)))
    gain, low, high = paired_gain(runs)
    print(
        f"\navg@8 gained by GPPO, paired by problem: {gain:.1%} ({low:.1%} - {high:.1%})"
    )
    print(
        "clipped: share of tokens that could move (advantage not 0, old log-prob < -0.05)"
    )


def read_metrics(folder: pathlib.Path) -> list[dict]:
    """Of a run; none of the start, which is none."""
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.open()] if file.exists() else []


def clipped(steps: list[dict]) -> str:
    """Low and high side, weighed by movable tokens, over the run."""
    movable = sum(step.get("clip/movable_tokens", 0) for step in steps)
    if not movable:
        return ""
    low, high = (
        sum(
            s.get(f"clip_movable/{side}", 0) * s.get("clip/movable_tokens", 0)
            for s in steps
        )
        for side in ("low", "high")
    )
    return f"low {low / movable:.1%}, high {high / movable:.1%}"


def paired_gain(runs: pathlib.Path) -> tuple[float, float, float]:
    """Mean gain over problems, and its 95% bootstrap interval."""
    sft, gppo = (
        [
            p["right"] / p["samples"]
            for p in json.loads((runs / name / "evaluation.json").read_text())[
                "per_problem"
            ]
        ]
        for name in ("sft", "gppo")
    )
    gain = np.array(gppo) - np.array(sft)
    rng = np.random.default_rng(0)
    means = [
        gain[rng.integers(len(gain), size=len(gain))].mean() for _ in range(BOOTSTRAP)
    ]
    return gain.mean(), *np.percentile(means, [2.5, 97.5])


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
