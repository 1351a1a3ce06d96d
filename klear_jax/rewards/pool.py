"""Rewards computed in processes that can be killed.

A response can make its scorer hang, crash or eat all memory. So rewards run in worker
processes, each with a deadline a task and a memory limit, and each driven by one thread:

  submit -> queue -> thread -> JSON lines over a socket -> worker's main thread -> reward

A worker is a fresh interpreter (`python -m klear_jax.rewards.pool`) that imports nothing but
the rewards it is asked for: never jax, nor the main module again, which is what fork and
spawn of `multiprocessing` would give it.

A worker starts with the first task its thread takes, so that a small evaluation pays for few
of them. That costs about a second, mostly of import, and is not on the task's deadline.
"""

import contextlib
import ctypes
import dataclasses
import functools
import importlib
import importlib.util
import json
import math
import os
import queue
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from concurrent import futures
from typing import Any

from klear_jax.errors import InputError

# Name -> module:function. A function is called as f(response, ground_truth, wrong=...,
# **options) with JSON values, and returns a finite number.
REWARDS = {
    "math": "klear_jax.rewards.math:score",
    "math_judge": "klear_jax.rewards.math:judge",
    "math_answer": "klear_jax.rewards.math:answer",
    "last_number": "klear_jax.rewards.math:last_number",
    "last_number_answer": "klear_jax.rewards.math:last_number_answer",
    "code": "klear_jax.rewards.code:score",
    "code_judge": "klear_jax.rewards.code:judge",
}

# How the detail of an outcome begins when no worker could take the task.
NO_WORKER = "no worker"
# Interpreter and import, on a busy host with a slow disk.
_START_TIMEOUT_S = 120.0


@functools.lru_cache
def find_reward(kind: str) -> str:
    """The module:function that a kind names; an InputError if there is no such module."""
    target = REWARDS.get(kind, kind)
    if not re.fullmatch(r"[\w.]+:\w+", target):
        raise InputError(
            f"unknown reward {kind!r}: use one of {', '.join(REWARDS)}, or 'module:function'"
        )
    module = target.partition(":")[0]
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # Of the package that it lies in.
        found = None
    if found is None:
        raise InputError(
            f"there is no module {module} for the reward {kind!r}, neither in this folder nor "
            "in PYTHONPATH"
        )
    return target


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one task.

    Attributes:
      score: the reward; `wrong` after a timeout or death; nan after an error.
      status: 'ok'; 'timeout' or 'died' (crash, kill, memory), which the response caused and
        is scored for; 'error', which is ours (an exception, a worker that cannot start): mask
        the sample out and count it.
      detail: the reason, empty for a task that went well at once.
    """

    score: float
    status: str
    detail: str


@dataclasses.dataclass(frozen=True)
class _Task:
    future: futures.Future[Outcome]
    request: bytes
    wrong: float


class Pool:
    """Workers that score responses; a context manager.

    A task that fails in any way ends its worker and is tried once more in a fresh one; what
    the second try shows is the outcome. Other tasks go on meanwhile. Scores do not depend on
    the number of workers.
    """

    def __init__(
        self, num_workers: int, *, task_timeout_s: float, memory_mb: int
    ) -> None:
        """Starts no process yet.

        Args:
          num_workers: how many tasks run at once.
          task_timeout_s: seconds a try may take, after the worker has started.
          memory_mb: address space of a worker in MiB (Linux).

        Raises:
          InputError: there would be no worker.
        """
        if num_workers < 1:
            raise InputError(f"num_workers must be at least 1, not {num_workers}")
        self._timeout_s = task_timeout_s
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # No task comes after the end.
        self._closed = False
        self._workers = [_Worker(memory_mb) for _ in range(num_workers)]
        # Daemons, so that an interpreter that exits with an open pool does not wait for them.
        self._threads = [
            threading.Thread(target=self._work, args=(worker,), daemon=True)
            for worker in self._workers
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def submit(
        self,
        kind: str,
        response: str,
        ground_truth: Any,
        *,
        wrong: float = -1.0,
        **options: Any,
    ) -> futures.Future[Outcome]:
        """Queues a response and returns at once.

        Args:
          kind: a key of `REWARDS`, or 'module:function' for a reward of your own. It names code
            to run: take it from the config, never from data.
          response: the decoded sample.
          ground_truth: what the reward compares with; anything JSON can carry.
          wrong: the score of a wrong response, given to the reward too.
          **options: further keyword arguments of the reward.

        Raises:
          InputError: the kind is unknown.
          RuntimeError: the pool is closed.
        """
        target = find_reward(kind)
        options["wrong"] = wrong
        request = json.dumps([target, response, ground_truth, options]).encode() + b"\n"
        task = _Task(futures.Future(), request, wrong)
        with self._lock:
            if self._closed:
                raise RuntimeError("the reward pool is closed")
            self._tasks.put(task)
        return task.future

    def close(self) -> None:
        """Kills the workers and waits for them; unfinished tasks raise CancelledError."""
        with self._lock:
            self._closed = True
            for _ in self._threads:
                self._tasks.put(None)
        for worker in self._workers:
            worker.retire()
        for thread in self._threads:
            thread.join()

    def _work(self, worker: "_Worker") -> None:
        while (task := self._tasks.get()) is not None:
            if not task.future.set_running_or_notify_cancel():
                continue
            try:
                task.future.set_result(self._score(worker, task))
            except BaseException as error:  # Or the caller would wait for ever.
                worker.stop()
                task.future.set_exception(error)
        worker.stop()

    def _score(self, worker: "_Worker", task: _Task) -> Outcome:
        outcome = worker.attempt(task.request, self._timeout_s)
        if outcome.status != "ok" and not self._closed:
            failure = outcome.detail
            outcome = worker.attempt(task.request, self._timeout_s)
            if outcome.status == "ok":
                return dataclasses.replace(
                    outcome, detail=f"at the second try: {failure}"
                )
        if outcome.status != "ok" and self._closed:
            raise futures.CancelledError("the reward pool was closed")
        if outcome.status in ("timeout", "died"):
            return dataclasses.replace(outcome, score=task.wrong)
        return outcome


class _Worker:
    """A process and the socket to it. One thread uses it; another may retire it."""

    def __init__(self, memory_mb: int) -> None:
        self._memory_mb = memory_mb
        self._lock = threading.Lock()  # No start once retired, no kill once reaped.
        self._retired = False
        self._process: subprocess.Popen[bytes] | None = None

    def attempt(self, request: bytes, timeout_s: float) -> Outcome:
        """One try, in a process started if need be and ended unless the try is 'ok'."""
        try:
            self._start()
            self._channel.settimeout(_START_TIMEOUT_S)
            self._channel.sendall(request)
            outcome = self._receive()
        except (OSError, EOFError) as error:
            # A worker killed while idle shows here too; the task has another try.
            return Outcome(math.nan, "error", f"{NO_WORKER}: {error}; {self.stop()}")
        if outcome.status == "started":
            try:
                self._channel.settimeout(timeout_s)
                outcome = self._receive()
            except TimeoutError:
                outcome = Outcome(math.nan, "timeout", f"not done in {timeout_s} s")
            except (OSError, EOFError):
                outcome = Outcome(math.nan, "died", self.stop())
        if outcome.status != "ok":
            self.stop()
        return outcome

    def stop(self) -> str:
        """Kills the process group, reaps the worker, and says how it ended."""
        with self._lock:
            if self._process is None:
                return "not started"
            # A process that is dying by itself keeps its own exit status.
            self._kill(self._process)
            returncode = self._process.wait()
            self._process = None
        self._replies.close()
        self._channel.close()
        return f"exit status {returncode}"

    def retire(self) -> None:
        """Kills the process and lets none follow; its thread then calls stop."""
        with self._lock:
            self._retired = True
            if self._process is not None:
                self._kill(self._process)

    def _start(self) -> None:
        with self._lock:
            if self._process is not None:
                return
            if self._retired:
                raise EOFError("retired")
            ours, theirs = socket.socketpair()
            with theirs:
                try:
                    self._process = subprocess.Popen(
                        # Its modules come from where ours do; -P adds no folder.
                        [sys.executable, "-P", "-m", __name__, str(self._memory_mb)],
                        stdin=theirs.fileno(),
                        stdout=subprocess.DEVNULL,
                        env=_environment(),
                        start_new_session=True,  # A group to kill; Ctrl-C stays ours.
                    )
                except BaseException:
                    ours.close()
                    raise
            self._channel, self._replies = ours, ours.makefile("rb")

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        # The leader is not reaped yet, so the number is still its own.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)

    def _receive(self) -> Outcome:
        line = self._replies.readline()
        if not line.endswith(b"\n"):
            raise EOFError("it closed its socket")
        return Outcome(*json.loads(line))


def _environment() -> dict[str, str]:
    # Some verdicts of sympy depend on the order of sets; threads would multiply memory.
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }


def die_with_parent() -> None:
    """This process gets SIGKILL when the one that started it dies (Linux)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _serve(memory_mb: int) -> None:
    """The worker: answers the requests of its socket until the parent is gone."""
    die_with_parent()
    if sys.platform == "linux":
        # The soft limit alone: a sandbox below may give its own child another.
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, hard))
    # A reward may print or read; none of it may reach the socket, which is fd 0 until here.
    with socket.socket(fileno=os.dup(0)) as channel, open(os.devnull, "r+b") as null:
        for fd in (0, 1, 2):
            os.dup2(null.fileno(), fd)
        for line in channel.makefile("rb"):
            for outcome in _answer(line):
                channel.sendall(
                    json.dumps(dataclasses.astuple(outcome)).encode() + b"\n"
                )


def _answer(line: bytes) -> Iterator[Outcome]:
    try:
        target, response, ground_truth, options = json.loads(line)
        module, function = target.split(":")
        reward = getattr(importlib.import_module(module), function)
    except Exception:
        yield Outcome(math.nan, "error", traceback.format_exc())
        return
    yield Outcome(math.nan, "started", "")  # The deadline runs from here.
    try:
        score = float(reward(response, ground_truth, **options))
        if not math.isfinite(score):
            raise ValueError(f"{target} returned {score}")
        yield Outcome(score, "ok", "")
    except MemoryError:
        yield Outcome(math.nan, "died", "MemoryError")
    except Exception:
        yield Outcome(math.nan, "error", traceback.format_exc())


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
