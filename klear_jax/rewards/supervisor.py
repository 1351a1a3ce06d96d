"""What runs inside the sandbox: programs one after the other, each in its own process.

Not imported: `sandbox` sends this text in, then the programs as JSON on standard input.
Answers on standard output: a line when it is ready, then for each program a line of JSON
and what the program printed. A fork costs a tenth of a new interpreter. The programs are
not protected from each other: all are one response's, and none knows what is right.
"""

import contextlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time


def supervise() -> str:
    """Returns in each child process, with the program that it is to be."""
    told = json.load(sys.stdin.buffer)
    answers = os.dup(1)
    os.write(answers, b"ready\n")
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    for code, text in told["programs"]:
        # Files, for nobody need read them meanwhile, nor wait for who holds them open.
        streams = [_unnamed_file(text.encode(errors="replace"))]
        streams += [_unnamed_file(), _unnamed_file()]
        pid = os.fork()
        if pid == 0:
            _become_child(streams, told["timeout_s"])
            return code
        status, timed_out = _wait(pid, told["timeout_s"])
        _kill_all(pid, told["alone"])
        printed = list(map(_read_all, streams[1:]))
        for stream in streams:
            os.close(stream)
        ended = os.waitstatus_to_exitcode(status)
        answer = [128 - ended if ended < 0 else ended, timed_out, *map(len, printed)]
        os.write(answers, json.dumps(answer).encode() + b"\n" + b"".join(printed))
        _empty(".")
    os._exit(0)


def _unnamed_file(content=b""):
    number, name = tempfile.mkstemp(dir=".")
    os.remove(name)
    with open(number, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(number, 0, os.SEEK_SET)
    return number


def _read_all(number):
    os.lseek(number, 0, os.SEEK_SET)
    with open(number, "rb", closefd=False) as file:
        return file.read()


def _become_child(streams, timeout_s):
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.closerange(3, 1 << 10)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    # For when nobody is left to watch the clock.
    resource.setrlimit(resource.RLIMIT_CPU, (int(timeout_s) + 2,) * 2)


def _wait(pid, timeout_s):
    """The status of the child, and whether its time was over."""
    deadline = time.monotonic() + timeout_s
    while True:
        found, status = os.waitpid(-1, os.WNOHANG)  # Orphans too, should we be init.
        if found == pid:
            return status, False
        left = deadline - time.monotonic()
        if left <= 0:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            return status, True
        if not found:
            signal.sigtimedwait({signal.SIGCHLD}, left)


def _kill_all(pid, alone):
    """What the child has left behind. In a namespace, that is all but us."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if alone:
            os.kill(-1, signal.SIGKILL)
        else:
            os.killpg(pid, signal.SIGKILL)


def _empty(folder):
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry, ignore_errors=True)
        else:
            os.remove(entry)


def start(code, names):
    """Runs the program as the main module, with nothing of ours in sight."""
    program = compile(code, "program.py", "exec", dont_inherit=True)
    builtins = names["__builtins__"]
    names.clear()
    names.update(
        __name__="__main__", __builtins__=builtins, __file__="program.py", __doc__=None
    )
    exec(program, names)


start(supervise(), globals())
