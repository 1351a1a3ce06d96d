"""Programs that try to get out, to stay, or to take all there is."""

import ctypes
import logging
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import pytest

from klear_jax.errors import InputError
from klear_jax.rewards import sandbox


def works(isolation):
    try:
        return bool(sandbox.choose(isolation))
    except InputError:
        return False


pytestmark = pytest.mark.skipif(
    not works("bubblewrap"), reason="no bubblewrap: apt-get install bubblewrap"
)
WALLS = [
    pytest.param(name, marks=pytest.mark.skipif(not works(name), reason=f"no {name}"))
    for name in ("bubblewrap", "unshare")
]


MARK = f"mark-{os.getpid()}"  # Others may run sandboxes at the same time.


def ours():
    """Processes of this file's sandboxes that are alive."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            marked = MARK.encode() in (path / "environ").read_bytes()
            state = (path / "stat").read_text().rpartition(")")[2].split()[0]
            words = (path / "cmdline").read_bytes()
        except OSError:
            continue
        if marked and state not in "ZX" and int(path.name) != os.getpid():
            found.append(words)
    return found


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left():
    before = {
        folder: set(os.listdir(folder)) for folder in ("/tmp", "/dev/shm", "/mnt")
    }
    environment = sandbox._environment
    sandbox._environment = lambda isolation: environment(isolation) | {"MARK": MARK}
    yield
    sandbox._environment = environment
    assert ours() == []
    for folder, names in before.items():
        new = set(os.listdir(folder)) - names
        assert not [name for name in new if "escaped" in name or name == "stream"]


def run(code, isolation="bubblewrap", timeout_s=10.0, **other):
    return sandbox.run(code, isolation=isolation, timeout_s=timeout_s, **other)


@pytest.mark.parametrize("isolation", WALLS)
def test_a_program_runs_as_in_a_terminal(isolation):
    result = run(
        """
import atexit, sys, threading
atexit.register(print, "bye")
threading.Timer(0.1, print, ["thread"]).start()
print(input(), sys.argv[1:], __name__)
sys.stderr.write("warning")
exit(3)
""",
        isolation,
        stdin="héllo\nmore",
    )
    assert result == sandbox.Result(
        "héllo [] __main__\nthread\nbye\n", "warning", 3, False
    )
    assert run("1/0", isolation).returncode == 1
    assert "ZeroDivisionError" in run("1/0", isolation).stderr
    assert run("x = 'open", isolation).returncode == 1
    assert run("raise SystemExit('no')", isolation).stderr == "no\n"
    assert run("import os; os.kill(os.getpid(), 11)", isolation).returncode == 128 + 11
    assert (
        run("import pickle\nclass A: pass\npickle.dumps(A())", isolation).returncode
        == 0
    )


@pytest.mark.parametrize("isolation", WALLS)
def test_what_python_does_at_the_end_is_done(isolation):
    result = run(
        """
import concurrent.futures, io, sys
pool = concurrent.futures.ThreadPoolExecutor(2)
print(pool.submit(lambda: 1).result())
sys.stdout.flush()
out = open(1, "w", closefd=False)
out.write("left open\\n")
print("and put aside")
sys.stdout = io.StringIO()
with open("/dev/stdout", "a") as more:
    more.write("opened once more\\n")
""",
        isolation,
    )
    lines = result.stdout.splitlines()
    assert (lines[0], result.stderr, result.returncode) == ("1", "", 0)
    assert sorted(lines[1:]) == ["and put aside", "left open", "opened once more"]


@pytest.mark.parametrize("isolation", WALLS)
def test_what_lies_in_the_folders_is_gone_for_the_next(isolation):
    leaves = """
import os
os.makedirs("a/b/c")
os.symlink("/usr", "a/link")
for path in ("a/b/c/file", "/dev/shm/file"):
    open(path, "w").write("x")
os.chmod("a/b", 0)
os.chmod("a", 0)
"""
    look = "import os; print(os.listdir('.'), os.listdir('/dev/shm'))"
    _, second = sandbox.run_all(
        [(leaves, ""), (look, "")], timeout_s=5, memory_mb=512, isolation=isolation
    )
    assert second == sandbox.Result("[] []\n", "", 0, False)


@pytest.mark.parametrize("isolation", WALLS)
def test_numpy_is_there(isolation):
    assert run("import numpy; print(numpy.arange(3).sum())", isolation).stdout == "3\n"


def test_programs_of_one_response_do_not_take_each_other_along():
    programs = [
        ("print(input())", "1"),
        ("import time; open('mark', 'w'); time.sleep(60)", ""),
        ("import os; print(os.listdir('.')); os._exit(5)", ""),
        ("print(input())", "4"),
    ]
    start = time.monotonic()
    got = sandbox.run_all(programs, timeout_s=1, memory_mb=512)
    assert time.monotonic() - start < 5
    assert [(r.stdout, r.returncode, r.timed_out) for r in got] == [
        ("1\n", 0, False),
        ("", 137, True),
        ("", 5, False),  # Printed into a buffer that nobody emptied.
        ("4\n", 0, False),
    ]


STOPS_THE_CLOCK = """
import os, signal, sys, time
above, me = os.getppid(), os.getpid()
if os.fork() == 0:
    os.setsid()
    os.kill(above, signal.SIGSTOP)
    time.sleep(3)
    os.kill(me, signal.SIGKILL)
    os.kill(above, signal.SIGCONT)
    os._exit(0)
time.sleep(60)
"""


@pytest.mark.parametrize("isolation", WALLS)
def test_packages_may_lie_in_tmp(isolation, monkeypatch):
    """Which is covered by the program's own."""
    if isolation == "unshare" and os.geteuid() != 0:
        pytest.skip("only root can show it elsewhere there")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        pathlib.Path(folder, "only_there.py").write_text("print(1)")
        monkeypatch.setattr(sandbox, "_PACKAGES", folder)
        sandbox._libraries.cache_clear()
        try:
            result = run("import only_there, os; print(os.listdir('/tmp'))", isolation)
        finally:
            sandbox._libraries.cache_clear()
    assert result == sandbox.Result("1\n[]\n", "", 0, False)


@pytest.mark.parametrize("isolation", WALLS)
def test_a_process_that_the_host_does_not_give_is_no_fault_of_the_program(
    isolation, monkeypatch
):
    assert b"pid = os.fork()" in sandbox._SUPERVISOR
    broken = sandbox._SUPERVISOR.replace(b"pid = os.fork()", b"raise OSError")
    monkeypatch.setattr(sandbox, "_SUPERVISOR", broken)
    with pytest.raises(OSError, match="could not start a process"):
        run("print(1)", isolation)


def test_a_host_on_which_no_program_ends_well_is_not_chosen(monkeypatch):
    end = b"start(supervise(), globals())"
    assert end in sandbox._SUPERVISOR
    broken = sandbox._SUPERVISOR.replace(end, b"supervise(); os._exit(9)")
    monkeypatch.setattr(sandbox, "_SUPERVISOR", broken)
    sandbox.choose.cache_clear()
    try:
        with pytest.raises(InputError, match="a program that does nothing ends so"):
            sandbox.choose()
    finally:
        sandbox.choose.cache_clear()


@pytest.mark.parametrize("isolation", WALLS)
def test_nobody_ends_or_stops_the_supervisor(isolation):
    """It is the first process of its namespace: signals from within do not reach it, nor do
    its memory and its files."""
    kill = ("import os; os.kill(os.getppid(), 9); print(2)", "")
    look = """
import os
for name in ("mem", "environ", "fd/0", "fd/1"):
    for mode in ("rb", "r+b"):
        try:
            open(f"/proc/{os.getppid()}/{name}", mode)
            print("can open", name)
        except OSError:
            pass
"""
    got = sandbox.run_all(
        [kill, (STOPS_THE_CLOCK, ""), (look, ""), ("print(4)", "")],
        timeout_s=2,
        memory_mb=512,
        isolation=isolation,
    )
    assert [r.stdout for r in got] == ["2\n", "", "", "4\n"]
    assert [r.timed_out for r in got] == [False, True, False, False]
    first = run("import os; print(os.getppid(), os.getpid())", isolation).stdout
    assert first.split()[0] == "1"


@pytest.mark.parametrize("isolation", WALLS)
def test_no_files_of_the_host_and_no_environment(isolation, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "in the environment")
    secret = tmp_path / "secret"
    secret.write_text("in a file")
    secret.chmod(0o600)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and folder != folder.parent:
            folder.chmod(folder.stat().st_mode | 0o011)
    result = run(
        f"""
import os
print(dict(os.environ))
for path in ({str(secret)!r}, "/etc/shadow", "/var/log", "/proc/1/environ", "/proc/kcore"):
    try:
        print(open(path).read())
    except OSError as error:
        print(type(error).__name__)
print(os.listdir("/"))
""",
        isolation,
    )
    assert "in the environment" not in result.stdout
    if os.geteuid() == 0:
        assert "in a file" not in result.stdout
    if isolation == "bubblewrap":
        lines = result.stdout.splitlines()
        assert lines[1] == lines[2] == "FileNotFoundError"
        assert not {"etc", "var", "srv", "boot", "sys"} & set(eval(lines[-1]))


@pytest.mark.parametrize("isolation", WALLS)
def test_nothing_can_be_written_outside_tmp(isolation, tmp_path):
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and folder != folder.parent:
            folder.chmod(folder.stat().st_mode | 0o077)
    result = run(
        f"""
import os, sys
for folder in ("/", "/usr", "/usr/lib", "/dev", "/var/tmp", "/home", {str(tmp_path)!r}, *sys.path):
    try:
        with open(os.path.join(folder, "escaped"), "w") as file:
            file.write("x")
        print(folder)
    except OSError:
        pass
open("/tmp/fine", "w").write("x")
print("end")
""",
        isolation,
    )
    assert set(result.stdout.split()) <= {"/tmp", "end"}
    assert result.returncode == 0
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("isolation", WALLS)
def test_no_network(isolation, tmp_path):
    heard = []

    def listen(server):
        try:
            server.settimeout(5)
            heard.append(
                server.accept() if server.type == socket.SOCK_STREAM else server.recv(9)
            )
        except OSError:
            pass

    tcp, udp = socket.socket(), socket.socket(type=socket.SOCK_DGRAM)
    named, abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    for server, address in (
        (tcp, ("127.0.0.1", 0)),
        (udp, ("127.0.0.1", 0)),
        (abstract, f"\0klear-{isolation}-{os.getpid()}"),
    ):
        server.bind(address)
    named.bind(str(tmp_path / "socket"))
    os.chmod(tmp_path / "socket", 0o777)
    for server in (tcp, named, abstract):
        server.listen()
    threads = [
        threading.Thread(target=listen, args=(server,), daemon=True)
        for server in (tcp, udp, named, abstract)
    ]
    for thread in threads:
        thread.start()
    result = run(
        f"""
import socket
def trying(what, *arguments):
    try:
        what(*arguments)
        print("reached", arguments)
    except OSError as error:
        print(error)
socket.setdefaulttimeout(2)
trying(socket.socket().connect, {tcp.getsockname()!r})
trying(socket.socket(type=socket.SOCK_DGRAM).sendto, b"x", {udp.getsockname()!r})
trying(socket.getaddrinfo, "example.com", 80)
trying(socket.socket(socket.AF_UNIX).connect, "\\0klear-{isolation}-{os.getpid()}")
trying(socket.socket(socket.AF_UNIX).connect, {str(tmp_path / "socket")!r})
import os
if os.path.isdir("/run") and os.listdir("/run"):
    print("reached what listens in /run")
""",
        isolation,
    )
    for server in (tcp, udp, named, abstract):
        server.close()
    assert result.returncode == 0
    assert "reached" not in result.stdout.replace("reached (b'x'", "")
    assert heard == []


FORK_BOMB = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"


@pytest.mark.parametrize("isolation", WALLS)
def test_fork_bomb(isolation):
    start = time.monotonic()
    result = run(FORK_BOMB, isolation, timeout_s=2)
    assert result.timed_out and result.returncode == 137
    assert time.monotonic() - start < 20
    assert ours() == []


def test_processes_are_counted():
    result = run(
        """
import os, time
n = 0
try:
    while True:
        if os.fork() == 0:
            time.sleep(30)
        n += 1
except OSError:
    print(n)
os.killpg(0, 9)
""".replace("os.killpg(0, 9)", "import sys; sys.stdout.flush(); os.killpg(0, 9)")
    )
    assert 5 < int(result.stdout) < sandbox.PROCESSES


def test_memory_of_one_process():
    result = run("x = bytearray(400 << 20)", memory_mb=256)
    assert (result.returncode, "MemoryError" in result.stderr) == (1, True)


def test_memory_of_many_processes():
    """Each below its own limit, all of them above."""
    start = time.monotonic()
    result = run(
        """
import os, time
for _ in range(12):
    if os.fork() == 0:
        x = bytearray(os.urandom(1 << 20)) * 150
        time.sleep(30)
time.sleep(30)
""",
        memory_mb=512,
        timeout_s=20,
    )
    assert result.returncode == 137
    assert time.monotonic() - start < 10


def test_memory_that_no_process_has():
    result = run(
        """
import ctypes, mmap, os
libc = ctypes.CDLL(None, use_errno=True)
print(libc.shmget(0, 1 << 20, 0o1600), ctypes.get_errno())
print(libc.semget(0, 1000, 0o1600), libc.msgget(0, 0o1600))
try:
    os.memfd_create("x")
except PermissionError:
    print("no memfd")
try:
    mmap.mmap(-1, 1 << 20)
except PermissionError:
    print("no shared map")
try:
    mmap.mmap(os.open("/dev/zero", os.O_RDWR), 1 << 20)
except OSError:
    print("no map of zeros")
len(mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
with open("/dev/shm/file", "w+b") as file:
    file.truncate(1 << 20)
    len(mmap.mmap(file.fileno(), 1 << 20))
"""
    )
    assert result == sandbox.Result(
        "-1 1\n-1 -1\nno memfd\nno shared map\nno map of zeros\n", "", 0, False
    )


def test_ten_gigabytes_of_output():
    start = time.monotonic()
    result = run("for _ in range(10_000): print('x' * 1_000_000)", timeout_s=30)
    assert result.returncode == 1
    assert len(result.stdout) <= sandbox.FILE_MB << 20
    assert time.monotonic() - start < 15


@pytest.mark.parametrize("folder", ["/tmp", "/dev/shm"])
def test_full_disk(folder):
    result = run(
        f"""
import itertools
written = 0
try:
    for n in itertools.count():
        with open(f"{folder}/{{n}}", "wb") as file:
            file.write(bytes(1 << 20))
        written += 1
except OSError as error:
    pass
for name in range(n): __import__("os").remove(f"{folder}/{{name}}")
print(written)
"""
    )
    assert 0 < int(result.stdout) <= 2 * sandbox.FILE_MB


@pytest.mark.parametrize("isolation", WALLS)
def test_who_ignores_sigterm_ends_in_time(isolation):
    start = time.monotonic()
    result = run(
        """
import signal, time
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
print("waiting", flush=True)
time.sleep(60)
""",
        isolation,
        timeout_s=1,
    )
    assert result == sandbox.Result("waiting\n", "", 137, True)
    assert 1 <= time.monotonic() - start < 5


@pytest.mark.parametrize("isolation", WALLS)
def test_a_daemon_does_not_outlive_its_program(isolation):
    start = time.monotonic()
    result = run(
        """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for n in range(3, 64):
            try: os.close(n)
            except OSError: pass
        time.sleep(100)
    os._exit(0)
print("ended")
""",
        isolation,
    )
    assert result.stdout == "ended\n"
    assert time.monotonic() - start < 5
    assert ours() == []


@pytest.mark.parametrize("isolation", WALLS)
def test_what_one_program_leaves_takes_no_room_from_the_next(isolation):
    leaves = """
import os, time
for _ in range(8):
    if os.fork() == 0:
        if os.fork() == 0:
            time.sleep(100)
        os._exit(0)
    os.wait()
print("ended")
"""
    got = sandbox.run_all(
        [(leaves, "")] * 8, timeout_s=5, memory_mb=1024, isolation=isolation
    )
    assert got == [sandbox.Result("ended\n", "", 0, False)] * 8


@pytest.mark.parametrize("isolation", WALLS)
def test_other_processes_are_out_of_reach(isolation):
    result = run(
        f"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
try:
    os.kill({os.getpid()}, 0)
except OSError as error:
    print(type(error).__name__)
print({isolation == "bubblewrap"} and libc.ptrace(16, os.getppid(), 0, 0))
print(max(int(name) for name in os.listdir("/proc") if name.isdigit()) < 50)
""",
        isolation,
    )
    first, traced, alone = result.stdout.split()
    assert first in ("ProcessLookupError", "PermissionError")
    assert traced in ("-1", "False")
    assert alone == "True"
    os.kill(os.getpid(), 0)


@pytest.mark.parametrize(
    "code",
    [
        "def f(): f()\nf()",
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
        "x = 10**10**9",
        "print(len(str(7 ** 10**8)))",
        "import json\njson.loads('[' * 10**6 + ']' * 10**6)",
        "eval('(' * 10**6)",
        "(" * 100_000,
        "x = 'a' * 10**12",
        "import re; re.match('(a+)+$', 'a' * 40 + 'b')",
    ],
    ids=[
        "recursion",
        "stack",
        "power",
        "digits",
        "json",
        "eval",
        "nested",
        "text",
        "regex",
    ],
)
def test_what_takes_for_ever_or_the_interpreter_down(code):
    start = time.monotonic()
    result = run(code, timeout_s=2, memory_mb=512)
    assert result.returncode != 0
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("isolation", WALLS)
def test_a_worker_that_is_killed_takes_its_program_along(isolation):
    program = f"""
import os, sys
sys.path[:0] = {[p for p in sys.path if p]!r}
from klear_jax.rewards import sandbox
environment = sandbox._environment
sandbox._environment = lambda isolation: environment(isolation) | {{"MARK": {MARK!r}}}
sandbox.choose({isolation!r})
print("ready", flush=True)
sandbox.run("import time; time.sleep(100)", timeout_s=100, isolation={isolation!r})
"""
    worker = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    worker.stdout.readline()
    deadline = time.monotonic() + 10
    while not ours() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ours()
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    worker.stdout.close()
    while ours() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ours() == []


def test_as_an_ordinary_user(tmp_path):
    """What matters most, once more, by somebody who is not root."""
    python = "/usr/bin/python3"
    if os.geteuid() != 0 or not os.path.exists(python):
        pytest.skip("needs to be root, to become somebody else, and Debian's Python")
    home = pathlib.Path("/tmp") / f"klear-user-{os.getpid()}"
    package = home / "klear_jax" / "rewards"
    package.mkdir(parents=True)
    source = pathlib.Path(sandbox.__file__).parent
    for name in ("sandbox.py", "supervisor.py"):
        shutil.copy(source / name, package / name)
    shutil.copy(source.parent / "errors.py", package.parent / "errors.py")
    for folder in (package.parent, package):
        (folder / "__init__.py").write_text("")
    (home / "secret").write_text("mine")
    subprocess.run(["chown", "-R", "12345:12345", home], check=True)
    script = f"""
from klear_jax.rewards import sandbox
assert sandbox.choose() in ("bubblewrap", "unshare"), sandbox.choose()
for isolation in ("bubblewrap", "unshare"):
    try:
        sandbox.choose(isolation)
    except sandbox.InputError:
        continue
    run = lambda code, **o: sandbox.run(code, isolation=isolation, **({{"timeout_s": 5}} | o))
    assert run("print(input())", stdin="7").stdout == "7\\n"
    assert run({FORK_BOMB!r}, timeout_s=1).timed_out
    assert run("open('{home}/escaped', 'w')").returncode == 1
    assert run("import socket; socket.create_connection(('127.0.0.1', 22), 1)").returncode == 1
    assert run("x = bytearray(400 << 20)", memory_mb=256).returncode == 1
    if isolation == "bubblewrap":
        assert run("open('{home}/secret')").returncode == 1
    print(isolation)
"""
    drop = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups"]
    try:
        done = subprocess.run(
            [*drop, python, "-B", "-c", script],
            cwd=home,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(home)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[0] in ("bubblewrap", "unshare")
        assert "escaped" not in os.listdir(home)
    finally:
        shutil.rmtree(home)


def test_without_walls_only_if_asked_for():
    result = sandbox.run("print(input())", stdin="1", isolation="rlimits")
    assert result.stdout == "1\n"
    with pytest.raises(InputError, match="isolation must be 'auto' or one of"):
        sandbox.run("", isolation="none")


def test_a_host_without_walls_is_refused(monkeypatch):
    for name in ("bubblewrap", "unshare"):
        monkeypatch.setitem(sandbox._COMMANDS, name, lambda *_: ["/no/such/program"])
    sandbox.choose.cache_clear()
    try:
        with pytest.raises(
            InputError, match=r"cannot isolate .*install bubblewrap 0.7"
        ):
            sandbox.choose()
    finally:
        sandbox.choose.cache_clear()


def test_what_was_chosen_is_logged(monkeypatch, caplog):
    logger = logging.getLogger("klear_jax.rewards.sandbox")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    monkeypatch.setattr(logger, "propagate", False)  # Whatever the loggers above do.
    caplog.set_level("INFO", logger=logger.name)
    sandbox.choose.cache_clear()
    sandbox.choose()
    assert caplog.messages == ["programs of the model run under bubblewrap"]
    caplog.clear()
    if works("unshare"):
        caplog.clear()
        monkeypatch.setitem(sandbox._COMMANDS, "bubblewrap", lambda *_: ["/no/bwrap"])
        sandbox.choose.cache_clear()
        assert sandbox.choose() == "unshare"
        [record] = caplog.records
        assert record.levelname == "WARNING" and "/no/bwrap" in record.message
        sandbox.choose.cache_clear()


def test_a_sandbox_that_fails_is_not_the_programs_fault(monkeypatch):
    sandbox.choose("bubblewrap")
    monkeypatch.setitem(sandbox._COMMANDS, "bubblewrap", lambda *_: ["false"])
    with pytest.raises(OSError):
        run("print(1)")


def test_the_filter_is_for_this_machine():
    assert len(sandbox._forbidden_calls()) == 8 * (len(sandbox._FORBIDDEN) + 11)
    assert ctypes.sizeof(ctypes.c_void_p) == 8
