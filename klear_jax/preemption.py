"""An end that comes from outside: SIGTERM, as preempted machines and schedulers send it.

The first signal asks the run to save and end. Its loops call `check` where both can be done,
and all processes hear of it at the same call. A second signal ends the process at once, as
does the end of the time that was promised; a thread sees to that, for the main one may be
deep in a compilation.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator

from klear_jax import hosts

# Between two signals that are one: a process and its parent, which tells it again.
SAME_S = 2.0
SIGNALS = (signal.SIGTERM, signal.SIGINT)
# EX_TEMPFAIL of sysexits.h: it has saved, and the same command goes on. Launch scripts know it.
EXIT_CODE = 75


class Preempted(Exception):
    """The run was told to end, and can go on later."""


class _Notice:
    """Whether this process was told, and the thread that hears of it."""

    def __init__(self, grace_s: float):
        self.told = threading.Event()
        self.saved = False
        self._grace_s = grace_s
        # Signal numbers, written by the interpreter's own handler, whatever runs.
        self._reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def close(self) -> None:
        os.write(self.writer, b"\0")
        self._thread.join()
        os.close(self._reader)
        os.close(self.writer)

    def _listen(self) -> None:
        deadline = None
        while True:
            left = deadline and max(0.0, deadline - time.monotonic())
            if not select.select([self._reader], [], [], left)[0]:
                what = "saved" if self.saved else "not saved; the last checkpoint stays"
                _end(f"{self._grace_s:g} s are over: {what}", self.saved)
            (number,) = os.read(self._reader, 1)
            if not number:
                return
            if number not in SIGNALS:
                continue
            name = signal.Signals(number).name
            if deadline and deadline - time.monotonic() > self._grace_s - SAME_S:
                continue
            if deadline:
                what = "saved" if self.saved else "ended without saving"
                _end(f"{name} again: {what}", self.saved)
            self.told.set()
            deadline = time.monotonic() + self._grace_s
            _say(
                f"{name}: saving within {self._grace_s:g} s; once more: ending at once"
            )


_notice: _Notice | None = None


@contextlib.contextmanager
def watch(grace_s: float) -> Iterator[None]:
    """Within it, `check` knows of signals. They go to the main thread of a process; without
    it, or elsewhere than there, they do what they did before.

    Args:
        grace_s: seconds from the first signal to the end of the process, at most.
    """
    global _notice
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _notice = _Notice(grace_s)
    wakeup = signal.set_wakeup_fd(_notice.writer, warn_on_full_buffer=False)
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            # What was told once is ending; who tells it again would cut that off.
            signal.signal(number, signal.SIG_IGN if _notice.told.is_set() else handler)
        signal.set_wakeup_fd(wakeup)
        _notice.close()
        _notice = None


def check() -> None:
    """Raises Preempted once any process was told to end. All call it as often as each other."""
    if _notice is not None and hosts.any_of(_notice.told.is_set()):
        raise Preempted


def saved() -> None:
    """The run has saved: what follows may be cut off."""
    if _notice is not None:
        _notice.saved = True


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _end(text: str, saved: bool) -> None:
    _say(text)
    # Without a save it is a failure like others: who starts it again counts them.
    os._exit(EXIT_CODE if saved else 1)
