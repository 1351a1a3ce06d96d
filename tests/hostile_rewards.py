"""Rewards that misbehave, for the workers of the pool tests.

Each takes what every reward takes; `response` is often a path by which it tells of itself.
"""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time


def hang(response, ground_truth, *, wrong):
    """Hangs, and so does the child whose id it leaves."""
    child = subprocess.Popen(["sleep", "600"])
    with open(response, "a") as file:
        file.write(f"{os.getpid()} {child.pid}\n")
    while True:
        pass


def hang_once(response, ground_truth, *, wrong):
    path = pathlib.Path(response)
    if path.exists():
        return 1.0
    path.write_text(str(os.getpid()))
    time.sleep(600)


def die(response, ground_truth, *, wrong):
    os.kill(os.getpid(), signal.SIGKILL)


def eat_memory(response, ground_truth, *, wrong):
    eaten = []
    while True:
        eaten.append(bytearray(1 << 24))


def eat_memory_for_good(response, ground_truth, *, wrong):
    """As a library does that swallows MemoryError and tries again."""
    while True:
        with contextlib.suppress(MemoryError):
            eat_memory(response, ground_truth, wrong=wrong)


def fail(response, ground_truth, *, wrong):
    raise KeyError("our own mistake")


def not_a_number(response, ground_truth, *, wrong):
    return float("nan")


def chatter(response, ground_truth, *, wrong):
    """Prints and reads where the pool talks."""
    print("[1.0, 'ok', '']", flush=True)
    os.write(1, b"noise\n")
    os.write(2, b"noise\n")
    return float(len(sys.stdin.read()))


def process_id(response, ground_truth, *, wrong):
    return float(os.getpid())


def string_hash(response, ground_truth, *, wrong):
    return float(hash("order of sets"))


def imported(response, ground_truth, *, wrong):
    return float(response in sys.modules)


def options(response, ground_truth, *, wrong, bonus):
    return wrong + bonus + len(ground_truth)
