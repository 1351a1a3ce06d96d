"""Whole runs of several versions of the trainer, a step of each in turn, phase by phase.

    git worktree add /tmp/before COMMIT
    python -m tests.bench.lockstep --steps=18 --trees=.,/tmp/before -- \
        --config=configs/gppo_tiny.py --config.init_from=$PWD/runs/sft_tiny ...

On a machine whose speed changes from minute to minute, runs one after the other show the
machine; in turn they share its weather. Prints, for each phase of a step, how much faster
each tree is than the last one: the median over steps, the first two left out, and in
brackets the quartiles. Paths among the flags must be absolute.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

# The trainer, with a progress bar that waits for a word before each step.
TRAINER = """
import os, sys
from klear_jax import progress, train
told = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
def steps(self):
    print("ready", file=told, flush=True)
    for step in range(self._first, self._total):
        sys.stdin.readline()
        yield step
        print("done", file=told, flush=True)
progress.Progress.steps = steps
train.main(["train", *sys.argv[1:]])
"""


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--trees", required=True, type=lambda text: text.split(","))
    parser.add_argument("--steps", required=True, type=int)
    args, flags = parser.parse_known_args()
    flags = [flag for flag in flags if flag != "--"]
    with tempfile.TemporaryDirectory() as folder:
        workdirs = [pathlib.Path(folder, str(i)) for i in range(len(args.trees))]
        run(args.trees, workdirs, args.steps, flags)
        seconds = [read(workdir) for workdir in workdirs]
    for tree, mine in zip(args.trees[:-1], seconds[:-1], strict=True):
        for phase, before in seconds[-1].items():
            low, middle, high = statistics.quantiles(
                [b / a for a, b in zip(mine[phase], before, strict=True)][2:], n=4
            )
            print(f"{tree}  {phase}  {middle:.2f} ({low:.2f} - {high:.2f}) times")


def run(trees, workdirs, steps, flags):
    trainers = []
    for tree, workdir in zip(trees, workdirs, strict=True):
        own = [f"--workdir={workdir}", f"--config.num_steps={steps}"]
        trainer = subprocess.Popen(
            [sys.executable, "-c", TRAINER, *flags, *own],
            cwd=tree,
            env=os.environ | {"PYTHONPATH": os.path.abspath(tree)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert trainer.stdout.readline() == "ready\n", f"{tree} does not start"
        trainers.append(trainer)
    for step in range(steps):
        for trainer in trainers[:: 1 if step % 2 else -1]:
            print("go", file=trainer.stdin, flush=True)
            assert trainer.stdout.readline() == "done\n"
    for trainer in trainers:
        assert trainer.wait() == 0


def read(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    return {
        name: [values[name] for values in steps]
        for name in ("seconds/sample", "seconds/update")
    }


if __name__ == "__main__":
    main()
