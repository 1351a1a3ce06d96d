"""What checkpoints every 10 steps cost gppo_tiny, and a save the loop of sft_tiny.

    python -m tests.bench.checkpoint_cost --init_from=runs/local_0/sft --output=runs/cost
        [--rounds=4]

A round is the same 36 steps of GPPO twice, with checkpoints every 10 and with none but the
last, in turns as to which is first. A step does the same work in both, so steps are compared one
by one: how much longer those take that hold a save or stand up to two behind it, while it is
written and read back, than the others make expect. That is the cost; the speed of the machine,
which changes from run to run by more, falls out. Prints it, the plain ratio of the two runs from
step 5 on, and what the loop itself waited for each save.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys

import numpy as np

STEPS, FIRST = 36, 5  # Before that, programs are compiled or loaded.
EVERY, BEHIND = 10, 2


def train(config: str, workdir: pathlib.Path, every: int, steps: int, *more: str):
    """Seconds of all steps, and those that the loop waited for a save, of the run."""
    command = [
        *(sys.executable, "-m", "klear_jax.train", f"--config=configs/{config}.py"),
        *(f"--workdir={workdir}", f"--config.num_steps={steps}"),
        *(f"--config.checkpoint.every={every}", "--config.evaluation.every=0", *more),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["seconds/step"] for line in lines]
    waits = re.findall(r"([\d.]+) s of the loop, written", done.stderr)
    return np.array(seconds), [float(wait) for wait in waits]


def cost(with_saves: np.ndarray, without: np.ndarray) -> float:
    """The share of the time of all steps, from step FIRST on, that saves take."""
    step = np.arange(FIRST, STEPS)
    near = (step + 1) % EVERY <= BEHIND
    speed = np.median(with_saves[~near] / without[~near])
    return (with_saves - speed * without)[near].sum() / (speed * without.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--init_from", required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--rounds", type=int, default=4)
    flags = parser.parse_args()
    costs, ratios, waited = [], [], []
    for i in range(flags.rounds):
        took = {}
        for every in (EVERY, STEPS) if i % 2 else (STEPS, EVERY):
            seconds, waits = train(
                "gppo_tiny",
                flags.output / f"gppo_{i}_{every}",
                every,
                STEPS,
                f"--config.init_from={flags.init_from}",
            )
            took[every] = seconds[FIRST:]
            waited += waits[:-1]  # The last one has no step to hold up.
        costs.append(cost(took[EVERY], took[STEPS]))
        ratios.append(took[EVERY].sum() / took[STEPS].sum() - 1)
        print(f"round {i}: {costs[-1]:.2%}; plain ratio {ratios[-1]:+.1%}", flush=True)
    for name, found in (
        ("cost of a checkpoint every 10 steps", costs),
        ("plain ratio", ratios),
    ):
        error = np.std(found, ddof=1) / np.sqrt(len(found))
        print(f"{name}: {np.mean(found):.2%} +- {error:.2%}")
    print(f"the loop waited {1e3 * np.median(waited):.0f} ms a save")
    seconds, waits = train("sft_tiny", flags.output / "sft", 10, 60)
    print(
        f"SFT: {1e3 * np.median(waits):.0f} ms a save (at most {1e3 * max(waits):.0f}), "
        f"a step takes {1e3 * np.median(seconds):.0f} ms"
    )


if __name__ == "__main__":
    main()
