"""Runs that are killed at random moments, and one that is left alone: their ends are compared.

    python -m tests.chaos --output=runs/chaos [--task=gppo] [--faults=50] [--seed=0]
        [--signal=KILL] [--processes=1]

Each start of a run is a process (or several, joined) of `klear_jax.train`, with one fault: a
signal that it gets at a moment drawn from the seed, when it begins to sample, score, update,
evaluate, save, read a checkpoint back or write metrics for the n-th time, a little later, or
just so many seconds after it was started. It is started again until it ends; then parameters,
metrics and samples must be those of the run left alone, bit for bit (but seconds, and, after
TERM, counts of the sampler: what was drawn is not drawn again). Prints a line a start, and a
summary.
"""

import argparse
import collections
import dataclasses
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import threading
import time

TESTS = pathlib.Path(__file__).parent
PHASES = {
    "sft": ("data", "evaluate", "save", "read back", "write"),
    "gppo": (
        "sample",
        "score",
        "update",
        "evaluate",
        "save",
        "read back",
        "write",
    ),
}
CONFIG = """
import pathlib
import test_runs
from configs import sft_tiny

def get_config():
    data = pathlib.Path({data!r})
    c = test_runs.small_gppo(data)
    if {task!r} == "sft":
        c = test_runs.small(sft_tiny.get_config(), data)
    c.checkpoint.every = 2
    c.checkpoint.grace_s = {grace_s}
    c.evaluation.every = 3
    return c
"""


@dataclasses.dataclass(frozen=True)
class Fault:
    signal: str  # KILL or TERM.
    phase: str  # '': any moment after the start.
    count: int  # The signal comes when the phase begins for this time,
    seconds: float  # or so much later.

    def text(self) -> str:
        return f"{self.signal},{self.phase},{self.count},{self.seconds}"


def draw(rng: random.Random, task: str, name: str) -> Fault:
    if rng.random() < 0.25:
        return Fault(name, "", 1, rng.uniform(0, 25))
    return Fault(
        name,
        rng.choice(PHASES[task]),
        rng.randint(1, 3),
        rng.choice([0, 0.3]) * rng.random(),
    )


def victim(text: str, argv: list[str]) -> None:
    """A process of the run, which sends itself the signal when it is time."""
    from klear_jax import config, train

    if text:
        arm(*text.split(","))
    sys.argv = argv
    config.run_main(train.main)


def arm(name: str, phase: str, count: str, seconds: str) -> None:
    from klear_jax import checkpoint, metrics, progress

    seen: collections.Counter[str] = collections.Counter()

    def strike():
        print("FAULT", file=sys.stderr, flush=True)
        os.kill(os.getpid(), getattr(signal, f"SIG{name}"))

    def begins(what):
        seen[what] += 1
        if what == phase and seen[what] == int(count):
            timer = threading.Timer(float(seconds), strike)
            timer.daemon = True
            timer.start()

    def watched(cls, method, what):
        ordinary = getattr(cls, method)

        def call(self, *args, **kwargs):
            begins(what or args[0])
            return ordinary(self, *args, **kwargs)

        setattr(cls, method, call)

    watched(progress.Progress, "phase", None)
    watched(metrics.Writer, "write", "write")
    watched(checkpoint.Checkpoints, "_save", "save")
    watched(checkpoint.Checkpoints, "_read_back", "read back")
    begins("")


def start(
    folder: pathlib.Path, workdir: pathlib.Path, fault: Fault | None, processes: int = 1
) -> tuple[list[int], float]:
    """Runs to its end or its fault, which the last process gets. Returns exit codes, and the
    seconds from the signal to the end of the last process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    running = []
    for i in range(processes):
        mine = fault.text() if fault and i == processes - 1 else ""
        argv = [f"--config={folder / 'config.py'}", f"--workdir={workdir}"]
        env = os.environ | {
            "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}",
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(4 // processes),
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        }
        if processes > 1:
            env |= {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(i),
            }
        log = (folder / f"process_{i}.log").open("a")
        running.append(
            subprocess.Popen(
                [sys.executable, str(TESTS / "chaos.py"), "victim", mine, *argv],
                env=env,
                stdout=log,
                stderr=log,
            )
        )
    begun = time.monotonic()
    struck, codes = None, []
    try:
        while any(process.poll() is None for process in running):
            if struck is None and _struck(folder, processes):
                struck = time.monotonic()
            if time.monotonic() - begun > 400:
                raise TimeoutError(f"{workdir} does not end; see {folder}")
            time.sleep(0.02)
    finally:
        for process in running:
            process.kill()
            codes.append(process.wait())
    took = time.monotonic() - struck if struck else 0.0
    for i in range(processes):
        log = folder / f"process_{i}.log"
        with (folder / "all.log").open("a") as all_logs:
            all_logs.write(f"---- {workdir} {fault}\n{log.read_text()}")
        log.unlink()
    return codes, took


def _struck(folder: pathlib.Path, processes: int) -> bool:
    return "FAULT" in (folder / f"process_{processes - 1}.log").read_text()


def disturbed(
    folder: pathlib.Path,
    workdir: pathlib.Path,
    task: str,
    rng: random.Random,
    name: str,
    processes: int,
    most: int,
) -> list[tuple[Fault, list[int], float]]:
    """A run with a fault at every start, until it ends: the faults that came, the exit codes
    and how long the end took."""
    came = []
    while True:
        fault = draw(rng, task, name) if len(came) < most else None
        codes, took = start(folder, workdir, fault, processes)
        if codes == [0] * processes:
            return came
        # Told while Python starts, it has nothing to save.
        assert fault, (workdir, codes)
        expected = {"KILL": [-9], "TERM": [75] if fault.phase else [75, -15]}[name]
        assert codes[-1] in expected, (workdir, fault, codes)
        print(f"{workdir.name} {fault.text()} {codes} {took:.1f} s", flush=True)
        came.append((fault, codes, took))


def prepare(folder: pathlib.Path, task: str, grace_s: float = 20.0) -> None:
    import test_runs

    folder.mkdir(parents=True)
    test_runs.make_data(folder / "data")
    text = CONFIG.format(data=str(folder / "data"), task=task, grace_s=grace_s)
    (folder / "config.py").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--task", choices=PHASES, default="gppo")
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=["KILL", "TERM"], default="KILL")
    parser.add_argument("--processes", type=int, default=1)
    flags = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    import test_runs

    folder = (
        flags.output / f"{flags.task}_{flags.signal}_{flags.processes}_{flags.seed}"
    )
    prepare(folder, flags.task)
    whole = folder / "whole"
    assert start(folder, whole, None, flags.processes)[0] == [0] * flags.processes
    besides = test_runs.NOT_DRAWN_AGAIN if flags.signal == "TERM" else ()
    rng, faults, runs = random.Random(flags.seed), [], 0
    while len(faults) < flags.faults:
        workdir = folder / f"run_{runs}"
        runs += 1
        faults += disturbed(
            folder,
            workdir,
            flags.task,
            rng,
            flags.signal,
            flags.processes,
            flags.faults - len(faults),
        )
        test_runs.assert_same_run(whole, workdir, besides)
    phases = collections.Counter(fault.phase or "any" for fault, _, _ in faults)
    slowest = max(took for _, _, took in faults)
    print(
        f"{len(faults)} faults in {runs} runs of {flags.task}: all ended as the run left "
        f"alone. {dict(phases)}; from signal to end {slowest:.1f} s at most"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["victim"]:
        victim(sys.argv[2], ["train", *sys.argv[3:]])
    else:
        main()
