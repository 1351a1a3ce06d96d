"""A GPPO run of hundreds of steps, watched from outside: what grows, what stays behind.

    python -m tests.bench.soak_run --init_from=runs/local_0/sft --output=runs/soak [--steps=500]

Starts `klear_jax.train` of gppo_tiny with checkpoints every 25 steps and an evaluation every
100, and reads every two seconds what it and its workers hold: memory, threads, open files,
processes. Prints slopes by least squares over all but the first fifth of the run, and what is
left when it has ended: processes, files of its temporary folder, of /dev/shm. The learning
rate is so small that the last step has the work of the first: a model that learns answers at
greater length, and leaves ever fewer groups to learn from.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np

PERIOD_S = 2.0
RATE = 1e-7
MEMORY_FS = pathlib.Path("/dev/shm")


def family(root: int) -> list[int]:
    """The process and all that descend from it."""
    parents = {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:  # It has ended meanwhile.
            continue
        parents[int(folder.name)] = int(fields[1])
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def status(pid: int, name: str) -> int:
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    return 0  # A process that ends has no memory any more.


def look(root: int) -> dict[str, float]:
    """What the run holds now."""
    found = family(root)
    workers = 0
    for pid in found[1:]:
        try:
            workers += status(pid, "RssAnon")
        except OSError:
            continue
    return {
        "memory, MiB": status(root, "RssAnon") / 1024,
        "memory of workers, MiB": workers / 1024,
        "threads": status(root, "Threads"),
        "open files": len(os.listdir(f"/proc/{root}/fd")),
        "processes": len(found),
    }


def steps_done(workdir: pathlib.Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def watch(flags: argparse.Namespace, workdir: pathlib.Path, scratch: pathlib.Path):
    """Runs to the end: [(steps done, what it held)], and the processes seen."""
    command = [
        *(sys.executable, "-m", "klear_jax.train", "--config=configs/gppo_tiny.py"),
        *(f"--workdir={workdir}", f"--config.init_from={flags.init_from}"),
        *(f"--config.num_steps={flags.steps}", "--config.checkpoint.every=25"),
        *("--config.evaluation.every=100", f"--config.optim.peak_lr={RATE}"),
        f"--config.optim.end_lr={RATE}",
    ]
    looks, seen = [], set()
    with (flags.output / "log").open("w") as log:
        run = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | {"TMPDIR": str(scratch)}
        )
        while run.poll() is None:
            try:
                looks.append((steps_done(workdir), look(run.pid)))
                seen.update(family(run.pid))
            except OSError:  # Just now.
                break
            time.sleep(PERIOD_S)
    if code := run.wait():
        sys.exit(f"the run ended with {code}: see {flags.output}/log")
    return looks, seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--init_from", required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    flags = parser.parse_args()
    workdir, scratch = flags.output / "run", (flags.output / "tmp").resolve()
    scratch.mkdir(parents=True)
    before = set(os.listdir(MEMORY_FS))
    looks, seen = watch(flags, workdir, scratch)
    looks = [(step, held) for step, held in looks if step > flags.steps / 5]
    steps = [step for step, _ in looks]
    print(f"{flags.steps} steps, {len(looks)} looks after the first fifth of them")
    for name in looks[0][1]:
        values = np.array([held[name] for _, held in looks])
        slope = np.polyfit(steps, values, 1)[0] * 100
        print(
            f"{name}: {values.min():.0f} to {values.max():.0f}, median "
            f"{np.median(values):.0f}; {slope:+.2f} in 100 steps"
        )
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    took = np.array([line["seconds/step"] for line in lines])
    fifths = [np.median(part) for part in np.array_split(took, 5)]
    print("median seconds of a step, by fifths:", *(f"{s:.2f}" for s in fifths))
    left = [pid for pid in seen if pathlib.Path(f"/proc/{pid}").exists()]
    print(f"left: {len(left)} of {len(seen)} processes,", end=" ")
    print(f"{len(list(scratch.rglob('*')))} files of its temporary folder,", end=" ")
    print(f"{len(set(os.listdir(MEMORY_FS)) - before)} of {MEMORY_FS}")


if __name__ == "__main__":
    main()
