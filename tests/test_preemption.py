"""What a process does when it is told to end, in processes of their own."""

import signal
import subprocess
import sys
import time

import pytest

from klear_jax import preemption

# Says when it listens; then looks, as a loop does, or is deep in a call that heeds nobody.
PROGRAM = """
import sys, time
from klear_jax import preemption
with preemption.watch({grace_s}):
    print("ready", flush=True)
    while {looks}:
        preemption.check()
        time.sleep(0.01)
    sum(1 for _ in iter(int, 1)) if {busy} else time.sleep(60)
"""


def start(grace_s=30.0, looks=False, busy=False):
    text = PROGRAM.format(grace_s=grace_s, looks=looks, busy=busy)
    process = subprocess.Popen(
        [sys.executable, "-c", text],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_next_look_raises(number):
    process = start(looks=True)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert f"{number.name}: saving within 30 s; once more: ending at once" in err
    assert err.splitlines()[-1] == "klear_jax.preemption.Preempted"


@pytest.mark.parametrize("busy", [False, True], ids=["waits", "computes"])
def test_a_second_signal_ends_the_process_at_once(busy):
    process = start(busy=busy)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)  # As from a parent that was told, too.
    time.sleep(preemption.SAME_S)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 1
    assert "SIGTERM again: ended without saving" in err


def test_the_process_ends_when_its_time_is_over():
    process = start(grace_s=1.0)
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=10)
    assert 0.9 < time.monotonic() - begun < 5
    assert process.returncode == 1
    assert "1 s are over: not saved; the last checkpoint stays" in err


def test_handlers_are_as_before_afterwards():
    before = [signal.getsignal(number) for number in preemption.SIGNALS]
    with preemption.watch(5.0):
        assert [signal.getsignal(number) for number in preemption.SIGNALS] != before
        preemption.check()
    assert [signal.getsignal(number) for number in preemption.SIGNALS] == before
    preemption.check()
