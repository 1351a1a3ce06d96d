"""Runs Python programs that a model wrote, where they can do no harm.

A program gets standard input, and gives what it prints and how it ended. It has no network,
no files of the host but the interpreter and its libraries (read only), a /tmp of its own
that is gone afterwards, no environment, no privileges, and limits on time, memory (of all
its processes together), processes, files and output. When `run` returns, none of its
processes is left.

    run -> namespaces, limits -> supervisor.py -> a process a program

How well that is kept depends on the host. `choose` finds the best that works here:

    bubblewrap   all of the above. Debian and Ubuntu: apt-get install bubblewrap (0.7 or later)
    unshare      without a root of its own: a program can read, but not write, what its user
                 (nobody, if we are root) can read, and reach its services through sockets
                 that are files, where they are not in /run or /tmp. Memory that is no
                 process's own (System V, memfd, shared maps) is not counted.
    rlimits      only limits, no isolation. Never chosen, only asked for.

What this is not: a defence against bugs of the kernel. Memory is what is resident: pages
that forks share count for each of them, and buffers of sockets and pipes, some 350 MB at
most, for none.

References: bwrap(1), setpriv(1), unshare(1), prlimit(1), seccomp(2).
"""

import contextlib
import dataclasses
import functools
import logging
import marshal
import os
import pathlib
import platform
import re
import selectors
import shlex
import signal
import stat
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from klear_jax.errors import InputError

LADDER = ("bubblewrap", "unshare", "rlimits")  # The best first.

NOBODY = 65534  # Who runs the programs if we are root.
PROCESSES = 32  # And threads, of a program.
OPEN_FILES = 64
FILE_MB = 16  # Of a file, and of what is printed; /tmp and /dev/shm hold twice that.
CANNOT_START = 71  # How the supervisor ends when it could not start a program.
_TICK_S = 0.05  # Between looks at the memory in use.
_START_S = 20.0  # For all that is no program's time, on a busy host.

_SUPERVISOR = pathlib.Path(__file__).with_name("supervisor.py").read_bytes()


@dataclasses.dataclass(frozen=True)
class Result:
    """How a program ended.

    Attributes:
      stdout, stderr: what it printed, as UTF-8 with replacements.
      returncode: its exit status; 128 + signal if a signal ended it; 137 if we did, or if it
        was not begun because another of its `run_all` had brought all to an end.
      timed_out: it ran longer than it may.
    """

    stdout: str
    stderr: str
    returncode: int
    timed_out: bool


def run(
    code: str,
    *,
    stdin: str = "",
    timeout_s: float = 10.0,
    memory_mb: int = 1024,
    isolation: str = "auto",
) -> Result:
    """Runs a program to its end, or to ours; see `run_all`."""
    [result] = run_all(
        [(code, stdin)],
        timeout_s=timeout_s,
        memory_mb=memory_mb,
        isolation=isolation,
    )
    return result


def run_all(
    programs: Sequence[tuple[str, str]],
    *,
    timeout_s: float,
    memory_mb: int,
    isolation: str = "auto",
) -> list[Result]:
    """Runs programs one after the other in one sandbox: those of one response, which can
    disturb each other.

    Args:
      programs: code, for the interpreter that runs us and with its libraries, and what
        stands on its standard input, which is all that it gets to see.
      timeout_s: seconds a program may take.
      memory_mb: MiB of all processes together, and address space of each.
      isolation: 'auto' is the best that `choose` finds; or one of `LADDER`.

    Raises:
      InputError: the host cannot isolate programs so.
      OSError: this time it could not; nothing was run.
    """
    return _run_all(programs, timeout_s, memory_mb, choose(isolation))


@functools.cache
def choose(isolation: str = "auto") -> str:
    """What of `LADDER` will isolate programs, tried with one that does nothing.

    Raises:
      InputError: that does not work here, with what to do about it.
    """
    if isolation not in ("auto", *LADDER):
        raise InputError(
            f"isolation must be 'auto' or one of {LADDER}, not {isolation!r}"
        )
    failures: list[str] = []
    for name in LADDER[:2] if isolation == "auto" else [isolation]:
        try:
            _check(*_run_all([("", "")], 20, 1024, name))
        except OSError as error:
            failures.append(f"{name}: {str(error).splitlines()[-1]}")
            continue
        said = f"programs of the model run under {name}"
        if failures:
            said += f", for others do not work here: {'; '.join(failures)}"
        level = logging.INFO if name == LADDER[0] else logging.WARNING
        logging.getLogger(__name__).log(level, said)
        return name
    raise InputError(
        f"this host cannot isolate programs of the model ({'; '.join(failures)}): install "
        "bubblewrap 0.7 or later and allow user namespaces; or, if nothing here is worth "
        "protecting, ask for the isolation 'rlimits'"
    )


def _check(result: Result) -> None:
    """Raises an OSError unless a program that does nothing has ended well."""
    if result.returncode or result.timed_out:
        raise OSError(f"a program that does nothing ends so: {result}")


def _run_all(
    programs: Sequence[tuple[str, str]],
    timeout_s: float,
    memory_mb: int,
    isolation: str,
) -> list[Result]:
    if sys.platform != "linux":
        raise OSError(f"namespaces and limits are Linux's, and this is {sys.platform}")
    stdins = [stdin.encode(errors="replace") for _, stdin in programs]
    file_mb = FILE_MB + (max(map(len, stdins)) >> 20)
    limits = [
        "prlimit",
        f"--as={memory_mb << 20}",
        f"--fsize={file_mb << 20}",
        f"--nofile={OPEN_FILES}",
        f"--nproc={PROCESSES}",
        "--core=0",
    ]
    order = (
        [(code, stdin) for (code, _), stdin in zip(programs, stdins, strict=True)],
        timeout_s,
        isolation != "rlimits",  # Whether it is alone in its namespace.
    )
    with contextlib.ExitStack() as stack:
        cwd = "/"
        if isolation == "rlimits":
            cwd = stack.enter_context(tempfile.TemporaryDirectory())
        fds = [
            stack.enter_context(_file(data))
            for data in (_SUPERVISOR, _forbidden_calls(), b"")
        ]
        process = subprocess.Popen(
            _COMMANDS[isolation](limits, file_mb, *fds),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=cwd,
            env=_environment(isolation),
            pass_fds=fds,
            start_new_session=True,
        )
        stack.enter_context(process)
        stack.callback(_end, process, status_fd=fds[2])
        out, err = _follow(
            process,
            marshal.dumps(order),
            deadline=time.monotonic() + _START_S + timeout_s * len(programs),
            memory_mb=memory_mb,
            room=len(programs) * 2 * file_mb << 20,
        )
    ready, _, answers = out.partition(b"\n")
    if ready != b"ready":
        raise OSError(
            err.decode(errors="replace").strip() or "the sandbox did not start"
        )
    if process.returncode == CANNOT_START:
        raise OSError("the sandbox could not start a process for a program")
    results = list(_read(answers))[: len(programs)]
    missing = len(programs) - len(results)
    return results + [Result("", "", 128 + signal.SIGKILL, False)] * missing


def _read(answers: bytes) -> Iterator[Result]:
    """The results, as far as they have come whole: a program can spoil what follows."""
    at = 0
    with contextlib.suppress(ValueError):
        while at < len(answers):
            end = answers.index(b"\n", at)
            returncode, timed_out, out, err = map(int, answers[at:end].split())
            middle, at = end + 1 + out, end + 1 + out + err
            yield Result(
                answers[end + 1 : middle].decode(errors="replace"),
                answers[middle:at].decode(errors="replace"),
                returncode,
                bool(timed_out),
            )


@contextlib.contextmanager
def _file(data: bytes) -> Iterator[int]:
    """A file without a name, for whoever inherits its number."""
    fd = os.memfd_create("sandbox")
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)


# --- the walls ------------------------------------------------------------------------


def _bubblewrap(
    limits: list[str], file_mb: int, code_fd: int, filter_fd: int, status_fd: int
) -> list[str]:
    stage, places = _libraries()
    interpreter, *options = _INTERPRETER
    size = ["--size", str(2 * file_mb << 20)]
    return [
        *_show(stage),
        # The user goes first: limits on processes do not hold for root, whatever a
        # namespace calls it.
        *_drop_user(),
        # The supervisor is the first process: programs cannot signal it, nor, as with
        # bwrap's own, find one that has no limits.
        *["bwrap", "--unshare-all", "--as-pid-1", "--die-with-parent", "--new-session"],
        *["--cap-drop", "ALL", "--json-status-fd", str(status_fd)],
        *(["--seccomp", str(filter_fd)] * bool(_forbidden_calls())),
        *["--ro-bind", "/usr", "/usr"],
        *[part for name in ("bin", "lib", "lib64") for part in _as_on_host(f"/{name}")],
        *[
            part
            for path, at in places.items()
            for part in ("--ro-bind", at, _inside(path))
        ],
        *["--proc", "/proc", "--dev", "/dev"],
        *["--dev-bind", "/dev/null", "/dev/zero"],  # Which is shared memory, if mapped.
        *[*size, "--tmpfs", "/dev/shm", *size, "--tmpfs", "/tmp", "--chdir", "/tmp"],
        *["--file", str(code_fd), "/supervisor.py"],
        # All these lie in memory, and what may be written must have a limit.
        *["--remount-ro", "/dev", "--remount-ro", "/"],
        # Last, so that the namespace's processes are counted alone.
        *limits,
        *[_inside(interpreter), *options, "/supervisor.py"],
    ]


def _unshare(limits: list[str], file_mb: int, code_fd: int, *_: int) -> list[str]:
    stage, places = _libraries()
    if os.geteuid() != 0 and (covered := list(filter(_is_below_tmp, places))):
        raise OSError(f"{covered[0]} lies in /tmp, which programs have for themselves")
    interpreter, *options = _INTERPRETER
    for path, at in places.items():
        interpreter = interpreter.replace(f"{path}/", f"{at}/")
    script = f"""
        while read -r _ at _; do
          case $at in *\\\\*) at=$(printf %b "$at") ;; esac  # A space is written as its number.
          mount -o remount,bind,ro "$at" 2> /dev/null || :  # Else it is not ours to write.
        done < /proc/mounts
        [ ! -d /run ] || mount -t tmpfs -o size=64k,ro none /run  # Where services listen.
        mount -t tmpfs -o size={2 * file_mb}m none /dev/shm
        mount -t tmpfs -o size={2 * file_mb}m none /tmp
        cd /tmp
        exec "$@" """
    return [
        *_show(stage),
        *_drop_user(),
        *["setpriv", "--pdeathsig", "KILL"],  # A new user would clear it.
        *["unshare", "--map-root-user", "-m", "-n", "-p", "-f", "-i", "-u"],
        *["--mount-proc", "--kill-child", "sh", "-ec", script, "sh"],
        *[*_DROP_PRIVILEGES, *limits, interpreter, *options, f"/dev/fd/{code_fd}"],
    ]


def _rlimits(limits: list[str], _: int, code_fd: int, *__: int) -> list[str]:
    # Without a namespace, all processes of the user would count.
    limits = [limit for limit in limits if not limit.startswith("--nproc")]
    return [*limits, *_INTERPRETER, f"/dev/fd/{code_fd}"]


_COMMANDS: dict[str, Callable[..., list[str]]] = {
    "bubblewrap": _bubblewrap,
    "unshare": _unshare,
    "rlimits": _rlimits,
}

# The site module would take longer to import than all else; PYTHONPATH does its work.
_INTERPRETER = [os.path.realpath(sys.executable), "-S"]
_PREFIX = os.path.realpath(sys.base_prefix)
_PACKAGES = os.path.realpath(sysconfig.get_path("purelib"))

_DROP_PRIVILEGES = [
    *["setpriv", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
]


def _show(stage: str) -> list[str]:
    """What runs the script of `_libraries` before what follows."""
    return ["unshare", "--mount", "sh", "-ec", f'{stage}exec "$@"', "sh"] * bool(stage)


def _drop_user() -> list[str]:
    if os.geteuid() != 0:
        return []
    user = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    return [*_DROP_PRIVILEGES, *user]


def _as_on_host(path: str) -> list[str]:
    """/lib and the like: a link into /usr, or a folder of its own, or nothing."""
    if os.path.islink(path):
        return ["--symlink", os.readlink(path), path]
    return ["--ro-bind", path, path] if os.path.isdir(path) else []


def _inside(path: str) -> str:
    """Where bubblewrap shows a folder of the host: what lies in /tmp, elsewhere."""
    return f"/mnt{path}" if _is_below_tmp(path) else path


def _is_below_tmp(path: str) -> bool:
    """Whether it lies where programs have a folder of their own."""
    return pathlib.PurePath(path).is_relative_to("/tmp")


@functools.cache
def _libraries() -> tuple[str, dict[str, str]]:
    """The folders beside /usr that the interpreter needs, and where they can be read.

    Root's own interpreter may lie where nobody else can look, as under /root, or in /tmp, which
    is covered. Then a shell script, run in a mount namespace of its own, shows it below /mnt.

    Returns:
      The script, empty if there is no need; path -> place.
    """
    places = {}
    for path, known in ((_PREFIX, ["/usr"]), (_PACKAGES, ["/usr", _PREFIX])):
        if not any(pathlib.PurePath(path).is_relative_to(other) for other in known):
            places[path] = path
    hidden = [
        path
        for path in places
        if os.geteuid() == 0 and (_is_below_tmp(path) or not _is_public(path))
    ]
    script = "mount -t tmpfs -o size=1m,mode=755 none /mnt\n" * bool(hidden)
    for i, path in enumerate(hidden):
        places[path] = f"/mnt/{i}"
        script += f"mkdir /mnt/{i}\nmount --bind {shlex.quote(path)} /mnt/{i}\n"
    return script, places


def _is_public(path: str) -> bool:
    """Whether anybody may go into the folder."""
    folders = (pathlib.Path(path), *pathlib.Path(path).parents)
    return all(folder.stat().st_mode & stat.S_IXOTH for folder in folders)


def _environment(isolation: str) -> dict[str, str]:
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/tmp",
        "LANG": "C.UTF-8",
        "PYTHONPATH": _inside(_PACKAGES) if isolation == "bubblewrap" else _PACKAGES,
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",  # Sets have the order of every other run.
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    if isolation == "unshare":
        _, places = _libraries()
        prefix = places.get(_PREFIX, _PREFIX)
        environment |= {
            "PYTHONPATH": places.get(_PACKAGES, _PACKAGES).replace(_PREFIX, prefix),
            "LD_LIBRARY_PATH": f"{prefix}/lib",  # Of an interpreter that was moved.
        }
    return environment


# Memory that belongs to no process (as does a map that is shared and anonymous, see below:
# it may be larger than what its processes have of it), new file systems, and looking into other processes.
# The numbers on x86_64 and aarch64.
_FORBIDDEN = {
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mount": (165, 40),
    "fsopen": (430, 430),
    "io_uring_setup": (425, 425),
    "userfaultfd": (323, 282),
    "bpf": (321, 280),
    "add_key": (248, 217),
    "keyctl": (250, 219),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
}


@functools.cache
def _forbidden_calls() -> bytes:
    """The BPF program that answers what is forbidden with EPERM, see seccomp(2); empty on
    machines whose numbers we do not know."""
    machines = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
    if platform.machine() not in machines:
        return b""
    arch, column = machines[platform.machine()]
    numbers = [row[column] for row in _FORBIDDEN.values()]
    n = len(numbers)
    load, jump_equal, jump_at_least, and_, give = 0x20, 0x15, 0x35, 0x54, 0x06
    allow, deny, kill = 0x7FFF0000, 0x00050001, 0x80000000
    mmap, flags, both = (9, 222)[column], 16 + 3 * 8, 0x01 | 0x20  # Shared, anonymous.
    program = [  # (what, how many lines to skip if so, and if not, with what).
        (load, 0, 0, 4),  # Of which machine the call is: not of its 32-bit kin,
        (jump_equal, 0, n + 8, arch),
        (load, 0, 0, 0),  # Its number:
        (jump_at_least, n + 6, 0, 0x40000000),  # not of x32.
        *[(jump_equal, n + 4 - i, 0, number) for i, number in enumerate(numbers)],
        (jump_equal, 0, 3, mmap),
        (load, 0, 0, flags),
        (and_, 0, 0, both),
        (jump_equal, 1, 0, both),
        (give, 0, 0, allow),
        (give, 0, 0, deny),
        (give, 0, 0, kill),
    ]
    return b"".join(struct.pack("HBBI", *line) for line in program)


# --- while it runs --------------------------------------------------------------------


def _follow(
    process: subprocess.Popen[bytes],
    stdin: bytes,
    *,
    deadline: float,
    memory_mb: int,
    room: int,
) -> tuple[bytes, bytes]:
    """Feeds and reads the process until it has ended, or must; what it printed.

    Args:
      deadline: on the monotonic clock.
      room: bytes that it may print.
    """
    assert process.stdin and process.stdout and process.stderr  # Pipes, all three.
    out, err, unsent = bytearray(), bytearray(), memoryview(stdin)
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ, out)
        selector.register(process.stderr, selectors.EVENT_READ, err)
        selector.register(process.stdin, selectors.EVENT_WRITE)
        os.set_blocking(process.stdin.fileno(), False)
        while selector.get_map():
            for key, _ in selector.select(_TICK_S):
                if key.data is None:
                    unsent = unsent[_write(key.fd, unsent) :]
                    over = not unsent
                else:
                    data = os.read(key.fd, 1 << 16)
                    key.data.extend(data)
                    over = not data
                if over:
                    pipe: Any = selector.unregister(key.fileobj).fileobj
                    pipe.close()
            if (
                len(out) + len(err) > room
                or time.monotonic() > deadline
                or _resident_bytes(process.pid) > memory_mb << 20
            ):
                break
    return bytes(out), bytes(err)


def _write(fd: int, data: memoryview) -> int:
    """How much of the data there is no more need of."""
    try:
        return os.write(fd, data[: 1 << 16])
    except BrokenPipeError:
        return len(data)


def _tree(pid: int) -> list[int]:
    """A process and all that descend from it, as far as the kernel tells (proc(5))."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{parent}/task"):
                path = pathlib.Path(f"/proc/{parent}/task/{thread}/children")
                found += map(int, path.read_text().split())
    return found


def _resident_bytes(pid: int) -> int:
    pages = 0
    for each in _tree(pid):
        with contextlib.suppress(OSError):
            pages += int(pathlib.Path(f"/proc/{each}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _end(process: subprocess.Popen[bytes], status_fd: int) -> None:
    """Waits until the process is gone with all that descend from it, and sees to it if they
    still print. The first goes last and by itself: it is the one who buries the next, where
    the host's init may not, and who would be left would count as a process for ever."""
    assert process.stdout and process.stderr  # Pipes, both.
    first, *others = _tree(process.pid)
    if not (process.stdout.closed and process.stderr.closed):
        _signal(others)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(2.0)  # It takes milliseconds.
    _signal([first, *others] if process.poll() is None else [])
    process.wait()
    # bwrap ends a little before the first process of its namespace, which goes last there.
    os.lseek(status_fd, 0, os.SEEK_SET)
    found = re.search(rb'"child-pid": *(\d+)', os.read(status_fd, 1 << 12))
    others += [int(found[1])] if found else []
    patience = time.monotonic() + 2.0
    while any(map(_alive, others)) and time.monotonic() < patience:
        time.sleep(0.002)


def _signal(pids: Sequence[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _alive(pid: int) -> bool:
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    except OSError:
        return False
    return state.split()[0] not in "ZX"
