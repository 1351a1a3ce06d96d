"""What runs inside the sandbox: programs one after the other, each in its own process.

Not imported: `sandbox` sends this text in, and the programs on standard input. Answers on
standard output: a line when it is ready, then for each program a line of numbers and what
the program printed. A fork costs a tenth of a new interpreter, and so do few imports.

The programs are not protected from each other: all are one response's, and none knows what
is right.
"""

import atexit
import builtins
import ctypes
import marshal
import os
import resource
import select
import sys
import time

KILL = 9
CANNOT_START = 71  # As `sandbox` knows it.
SET_DUMPABLE = 4
prctl = ctypes.CDLL(None).prctl


def supervise() -> str:
    """Returns in each child process, with the program that it is to be."""
    prctl(SET_DUMPABLE, 0)  # Whoever has the same user cannot write to our memory.
    programs, timeout_s, alone = marshal.load(sys.stdin.buffer)
    answers = os.dup(1)
    os.write(answers, b"ready\n")
    for code, text in programs:
        # Files, for nobody need read them meanwhile, nor wait for who holds them open.
        streams = [unnamed_file(text), unnamed_file(b""), unnamed_file(b"")]
        try:
            pid = os.fork()
            pidfd = pid and os.pidfd_open(pid)
        except OSError:  # Not the program's fault.
            os._exit(CANNOT_START)
        if pid == 0:
            become_child(streams, timeout_s)
            return code
        status, timed_out = wait(pid, pidfd, timeout_s)
        end_others(pid, alone)
        printed = list(map(read_all, streams[1:]))
        for stream in streams:
            os.close(stream)
        ended = os.waitstatus_to_exitcode(status)
        numbers = 128 - ended if ended < 0 else ended, timed_out, *map(len, printed)
        os.write(answers, b"%d %d %d %d\n" % numbers + b"".join(printed))
        for folder in (".", "/dev/shm") if alone else (".",):
            empty(folder)
    os._exit(0)


def unnamed_file(content: bytes) -> int:
    """The number of a new file that holds the bytes, for one program to read or write."""
    # To append: a program that opens /dev/stdout once more writes behind what is there.
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND
    number = os.open("stream", flags, 0o600)
    os.remove("stream")
    with open(number, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(number, 0, os.SEEK_SET)
    return number


def read_all(number: int) -> bytes:
    os.lseek(number, 0, os.SEEK_SET)
    with open(number, "rb", closefd=False) as file:
        return file.read()


def become_child(streams: list[int], timeout_s: float) -> None:
    os.setsid()
    prctl(SET_DUMPABLE, 1)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.closerange(3, 1 << 10)
    # For when nobody is left to watch the clock.
    resource.setrlimit(resource.RLIMIT_CPU, (int(timeout_s) + 2,) * 2)


def wait(pid: int, pidfd: int, timeout_s: float) -> tuple[int, bool]:
    """The status of the child, and whether its time was over."""
    poll = select.poll()
    poll.register(pidfd)
    deadline = time.monotonic() + timeout_s
    timed_out = not poll.poll(timeout_s * 1000) or time.monotonic() > deadline
    os.close(pidfd)
    if timed_out:
        os.kill(pid, KILL)  # Not buried yet, so the number is still its own.
    _, status = os.waitpid(pid, 0)
    return status, timed_out


def end_others(pid: int, alone: bool) -> None:
    """Ends what a child has left behind: in a namespace, that is all but us. As its first
    process we bury them too, or their entries would count as processes."""
    try:
        os.kill(-1, KILL) if alone else os.killpg(pid, KILL)
    except OSError:
        pass
    try:
        while True:
            os.waitpid(-1, 0)
    except ChildProcessError:
        pass


def empty(folder: str) -> None:
    """Removes all that a program has left in a folder, also what it has locked."""
    found = []
    for path, folders, files in os.walk(folder):
        found += [(os.remove, os.path.join(path, name)) for name in files]
        for at in (os.path.join(path, name) for name in folders):
            link = os.path.islink(at)
            found.append((os.remove if link else os.rmdir, at))
            if not link:
                os.chmod(at, 0o700)  # Before os.walk looks into it.
    for remove, at in reversed(found):
        remove(at)


def start(code: str, names: dict[str, object]) -> None:
    """Runs the program as the main module, with nothing of ours in sight.

    Then ends as Python would, but for taking all objects apart: after a fork that costs
    more than anything else, for it copies the memory they lie in.
    """
    os_, sys_, atexit_, builtins_ = os, sys, atexit, builtins
    streams = sys.stdout, sys.stderr
    # As the site module has them.
    vars(builtins_).update(exit=sys_.exit, quit=sys_.exit)
    status = 0
    try:
        program = compile(code, "program.py", "exec", dont_inherit=True)
        names.clear()
        names.update(__name__="__main__", __file__="program.py", __doc__=None)
        names["__builtins__"] = builtins_
        exec(program, names)
    except SystemExit as error:
        status = 0 if error.code is None else error.code
        if not isinstance(status, int):
            print(status, file=sys_.stderr)
            status = 1
    except BaseException:
        status = 1
        sys_.excepthook(*sys_.exc_info())
    if threading := sys_.modules.get("threading"):
        threading._shutdown()
    atexit_._run_exitfuncs()
    names.clear()  # Files that it has left open are written out.
    for stream in (sys_.stdout, sys_.stderr, *streams):
        try:
            stream.flush()
        except Exception:
            pass
    os_._exit(status & 255)


start(supervise(), globals())
