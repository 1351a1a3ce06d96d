"""The processes of a run, as a rule one a host: how they meet, agree and end together.

All of them go through the same steps in the same order, and decide the same from what all
know. What one alone knows (the rewards it has computed, its place in the data) goes round
with `gather`. The first writes what the run writes, and speaks for all.
"""

import json
import logging
import os
import sys
import traceback
import warnings
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from klear_jax.errors import InputError, Stopped

# A process that is not heard of for so long is dead, and the others end with it.
HEARTBEAT_S = 30
# At the end all wait for each other, and JAX kills those that wait for longer, and who works:
# the first may still count an evaluation's votes, each reads its last checkpoint back.
END_S = 3_600
# Of what `gather` sends at once: one size, so one program.
CHUNK_BYTES = 1 << 16


def join() -> None:
    """Becomes one of the processes of a run, where there are several; before any JAX work.

    They find each other by themselves on Cloud TPUs, under Slurm and Open MPI; elsewhere
    JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID
    say it.

    Raises:
        InputError: these variables are not all set, or not numbers.
    """
    found = _from_environment()
    if not found and os.environ.get("SLURM_NTASKS") == "1":
        return  # JAX would take one GPU of the node.
    try:
        jax.distributed.initialize(
            **found,
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=END_S,
        )
    except jax.errors.JaxRuntimeError:  # The others do not answer.
        raise
    except (ValueError, RuntimeError):
        # Nothing to find, or JAX is in use, for one process; if this is a worker of a pod,
        # which libtpu knows, it has not found the others.
        if found or count() > 1:
            raise
        return
    if not first():  # What all have to say, the first says. Errors come from any.
        logging.getLogger("klear_jax").setLevel(logging.ERROR)
        warnings.simplefilter("ignore")


def _from_environment() -> dict[str, Any]:
    names = {
        "coordinator_address": "JAX_COORDINATOR_ADDRESS",
        "num_processes": "JAX_NUM_PROCESSES",
        "process_id": "JAX_PROCESS_ID",
    }
    found: dict[str, Any] = {
        ours: os.environ[name] for ours, name in names.items() if name in os.environ
    }
    if not found.keys() & {"num_processes", "process_id"}:
        return found
    if missing := [name for ours, name in names.items() if ours not in found]:
        raise InputError(f"{', '.join(missing)} must be set too, in each process")
    for name in ("num_processes", "process_id"):
        if not found[name].isdecimal():
            raise InputError(f"{names[name]} must be a number, not {found[name]!r}")
        found[name] = int(found[name])
    return found


def index() -> int:
    return jax.process_index()


def count() -> int:
    return jax.process_count()


def first() -> bool:
    """Whether this is the process that writes and speaks."""
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """A JSON value of each process, in their order, on all of them; all wait for it."""
    if count() == 1:
        return [value]
    data = json.dumps(value).encode()
    sizes = [int(size) for (size,) in _exchange(np.array([len(data)], np.int64))]
    parts = [b""] * count()
    for start in range(0, max(sizes), CHUNK_BYTES):
        chunk = np.zeros(CHUNK_BYTES, np.uint8)
        mine = np.frombuffer(data[start : start + CHUNK_BYTES], np.uint8)
        chunk[: len(mine)] = mine
        for i, part in enumerate(_exchange(chunk)):
            parts[i] += part.tobytes()
    return [json.loads(part[:size]) for part, size in zip(parts, sizes, strict=True)]


def any_of(told: bool) -> bool:
    """Whether it is true on any process; all wait for it."""
    return told if count() == 1 else bool(_exchange(np.array([told], np.uint8)).any())


def _exchange(x: np.ndarray) -> np.ndarray:
    # As bytes: without 64-bit mode, JAX would cut an int64 in two.
    return multihost_utils.process_allgather(x.view(np.uint8)).view(x.dtype)


def exit_code(error: BaseException) -> int:
    """2 for bad input, 3 for a run that has ended itself (`guards`): started again, the
    command would end so again. 1 for all else."""
    codes = {InputError: 2, Stopped: 3}
    return next((code for kind, code in codes.items() if isinstance(error, kind)), 1)


# What an error of another library says -> what it means to the user.
MEANINGS = {
    "No space left on device": "a disk is full; with room on it, the same command goes on",
    "Disk quota exceeded": "a disk quota is used up; with more, the same command goes on",
    "Read-only file system": "a disk cannot be written to",
    "Permission denied": "this user may not read or write there",
    "Not a directory": "a file stands where a folder is needed",
    "ut of memory": "out of memory; python -m klear_jax.plan shows what a config needs, and "
    "micro_rows, sampler.num_slots, sampler.pool_tokens and remat change it",
    # Of what processes exchange on CPU; between other devices the heartbeat tells it.
    "Gloo": "another process of the run has ended or does not answer; its own log says why",
}


def cause(error: BaseException) -> str:
    """What ended the run: one sentence where that says all, or the traceback."""
    if exit_code(error) != 1:
        return str(error)
    chain: BaseException | None = error
    while chain is not None:
        for said, meaning in MEANINGS.items():
            if lines := [line for line in str(chain).splitlines() if said in line]:
                return f"{meaning} ({lines[0].strip()[:300]})"
        chain = chain.__cause__ or chain.__context__
    return "".join(traceback.format_exception(error))


def fail(error: Exception) -> NoReturn:
    """Ends this process with its cause. The others hear of it within HEARTBEAT_S; waiting
    for them, as an exit does, would be for what they wait for from here."""
    try:
        where = f"process {index()} of {count()}"
    except RuntimeError:  # That there are no devices may be the error.
        where = "this process"
    print(f"error in {where}: {cause(error)}", file=sys.stderr, flush=True)
    os._exit(exit_code(error))
