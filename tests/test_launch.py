"""launch/tpu_pod.sh and launch/gpu_slurm.sh against a cloud and a cluster of stubs.

The stubs write down how they were called and answer as a small state machine. What the
scripts send to a worker runs for real, in a home folder of that worker's own.
"""

import ast
import contextlib
import fcntl
import functools
import importlib.util
import marshal
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
SETTINGS = {"PROJECT": "p1", "ZONE": "z1", "ACCELERATOR": "v5p-16"}
ARGS = ["--config=configs/a.py", "--workdir=gs://bucket/runs/a"]
ARGS += ["--config.note=two  spaces, a 'quote' and $HOME", "--config.empty="]

# What every command of the stubs is: it goes by the name under which it is called.
STUB = r'''
import fcntl, os, sys  # The rest where it is needed: most calls are short.

HERE, name, args = os.environ["HERE"], os.environ["NAME"], sys.argv[1:]


def record(**more):
    entry = {"name": name, "args": args, "worker": os.environ.get("WORKER")} | more
    with open(f"{HERE}/log", "a") as log:
        log.write(repr(entry) + "\n")


def read():
    with open(f"{HERE}/state") as file:
        return eval(file.read())


def write(**changes):
    with open(f"{HERE}/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(f"{HERE}/state.part", "w") as file:
            file.write(repr(read() | changes))
        os.rename(f"{HERE}/state.part", f"{HERE}/state")


def take(key, otherwise):
    """The next of a list of answers; the last one stays."""
    answers = read().get(key) or [otherwise]
    if len(answers) > 1:
        write(**{key: answers[1:]})
    return answers[0]


def homes():
    state = read()
    for i in range(state["slices"]):
        for j in range(state["hosts"]):
            os.makedirs(f"{HERE}/homes/{i}.{j}", exist_ok=True)
            yield f"{i}.{j}", f"{HERE}/homes/{i}.{j}"


def end_pod():
    import glob, shutil
    for pid in glob.glob(f"{HERE}/homes/*/klear_jax_runs/*/pid"):
        try:
            os.killpg(int(open(pid).read()), 9)
        except ProcessLookupError:
            pass
    shutil.rmtree(f"{HERE}/homes", ignore_errors=True)


def gcloud():
    record()
    state, group = read(), " ".join(args[2:4])
    if group == "queued-resources describe":
        whole = take("describe", "ACTIVE") if state["exists"] else None
        if whole == "NO ANSWER":
            sys.exit("ERROR: no answer")
        if whole is None:
            sys.exit("ERROR: (gcloud) NOT_FOUND: Resource was not found")
        print(f"{whole},{state['accelerator']},")
    elif group == "queued-resources create":
        if state["exists"]:
            sys.exit("ERROR: ALREADY_EXISTS")
        write(exists=True)
    elif group == "queued-resources delete":
        end_pod()
        failed = state.get("describe") == ["FAILED"]
        write(exists=False, describe=["FAILED" if failed else "ACTIVE"], nodes=["READY"])
    elif group == "tpu-vm list":
        node = take("nodes", "READY")
        print("\n".join([f"{node},{state['hosts']}"] * state["slices"]))
    elif group == "queued-resources scp":
        import shutil
        for _, home in homes():
            shutil.copy(args[4], f"{home}/{args[5].partition(':')[2]}")
    elif group == "queued-resources ssh":
        ssh(dict(a[2:].partition("=")[::2] for a in args if a.startswith("--")))
    else:
        sys.exit(f"unknown: {args}")


def ssh(flags):
    command = flags["command"]
    verb = command.partition("bash klear_jax/launch/tpu_worker.sh ")[2].split()[0]
    fault = take(f"fault {verb.rstrip(';')}", None)
    chosen = [
        (where, home)
        for where, home in homes()
        if flags["worker"] in ("all", where.partition(".")[2])
    ]
    if fault == "preempted":
        end_pod()
        write(describe=["SUSPENDED"])
        chosen = []  # And a success, as gcloud says.
    if fault == "slice down":
        write(nodes=["PREEMPTED"])
        chosen = []
    if fault == "one left out":
        chosen.pop()
    code = 0
    for _ in range(2 if fault == "sent twice" else 1):
        pids = [os.posix_spawn(
            "/bin/bash", ["bash", "-c", f"exec 3>&- 4>&-; cd '{home}'; {command}"],
            os.environ | {"WORKER": where, "HOME": home},
            file_actions=[(os.POSIX_SPAWN_OPEN, 1, f"{home}.{os.getpid()}", 577, 0o600)],
        ) for where, home in chosen]
        for pid, (_, home) in zip(pids, chosen):
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) or code
            if fault != "no answer":
                sys.stdout.write(open(f"{home}.{os.getpid()}").read())
    sys.exit(255 if fault == "no answer" else code)


def python3():
    if args[:2] == ["-m", "pip"]:
        record()
        sys.exit(take("pip", 0))
    train()


def train():
    keys = ("JAX_COMPILATION_CACHE_DIR", "LIBTPU_INIT_ARGS", "XLA_FLAGS", "PWD")
    where = os.environ.get("WORKER") or os.environ["SLURM_PROCID"]
    with open(f"{HERE}/starts of {where}", "a+") as starts:
        before = starts.tell()
        starts.write("x")
    record(name="train", where=where, env={k: os.environ.get(k) for k in keys},
           note=open("note").read())
    print(f"start {before} of {where}", flush=True)
    plan = read()["train"]
    code = plan[min(before, len(plan) - 1)]
    if isinstance(code, dict):
        code = code.get(where, code["others"])
    if code == "leave":  # A process that outlives it, and keeps what it was given.
        if not os.fork():
            os.execvp("sleep", ["sleep", "50"])
        code = 1
    if code == "wait":
        import signal, time
        told = []
        signal.signal(signal.SIGTERM, lambda *_: told.append(75))
        open(f"{HERE}/shell of {where}", "w").write(str(os.getppid()))
        while not told and not os.path.exists(f"{HERE}/finish"):
            time.sleep(0.02)
        if told:
            time.sleep(0.3)  # As long as it takes to save.
        code = told[0] if told else 0
    if code == 2:
        print("error: no such key", file=sys.stderr)
    sys.exit(code)


def sbatch():
    import shutil, signal, subprocess, time
    record()
    end = args.index("launch/gpu_slurm.sh")
    spool = f"{HERE}/spool"
    shutil.copy("launch/gpu_slurm.sh", spool)
    for count in range(9):
        write(requeued=False)
        env = os.environ | {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(count)}
        job = subprocess.Popen(["bash", spool, *args[end + 1:]], env=env)
        if read().get("signal") and count == 0:
            while not os.path.exists(f"{HERE}/shell of 0"):
                time.sleep(0.02)
            job.send_signal(signal.SIGUSR1)
        write(code=job.wait())
        if not read()["requeued"]:
            return


def srun():
    import subprocess
    record()
    begin = args.index("bash")
    codes = []
    for i in range(2):
        env = os.environ | {"SLURM_PROCID": str(i)}
        log = next(a for a in args if a.startswith("--output=")).partition("=")[2]
        with open(log.replace("%t", str(i)), "a") as out:
            codes.append(subprocess.run(args[begin:], env=env, stdout=out, stderr=out).returncode)
    # The others are killed.
    sys.exit(75 if 75 in codes else 137 if any(codes) else 0)


def scancel():  # Tells the shells of the tasks alone, as Slurm may.
    import signal
    record()
    for name in os.listdir(HERE):
        if name.startswith("shell of "):
            os.kill(int(open(f"{HERE}/{name}").read()), signal.SIGTERM)


def scontrol():
    record()
    write(requeued=True)


def squeue():
    print(read().get("squeue", "RUNNING"))


def nothing():
    record()


known = {"gcloud": gcloud, "python": python3, "sbatch": sbatch, "srun": srun,
         "scontrol": scontrol, "scancel": scancel, "squeue": squeue}
known.get(name, nothing)()
'''
CALL = """#!/bin/sh
NAME=${0##*/} exec PYTHON -SEI "$HERE/stub.pyc" "$@"
"""
# Called too often to be slow: what the metadata of a machine say, and all of a Python but
# the installation and the training.
CURL = r"""#!/bin/sh
for url; do :; done
case $url in
  */tpu-env) echo "ZONE: 'z1'"; echo "MEGASCALE_SLICE_ID: '${WORKER%.*}'" ;;
  */agent-worker-number) echo "${WORKER#*.}" ;;
esac
"""
PYTHON = r"""#!/bin/sh
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && ln -s "$HERE/bin/python3" "$3/bin/python" ;;
  "-m uv "*) echo "$HERE/bin/python3" ;;
  *--editable* | "-m klear_jax"*) exec "$HERE/bin/python" "$@" ;;
esac
"""
REAL = """#!/bin/sh
echo '{"name": "NAME", "args": []}' >>"$HERE/log"
exec PATH "$@"
"""


@functools.cache
def compiled():
    """The stub as a .pyc: compiling takes longer than all else that it does."""
    code = marshal.dumps(compile(STUB, "stub", "exec"))
    return importlib.util.MAGIC_NUMBER + bytes(12) + code


class Cloud:
    """A tree with the scripts, and the stubs that they meet."""

    def __init__(self, folder):
        self.folder, self.tree, bin = folder, folder / "tree", folder / "bin"
        self.started = []
        bin.mkdir()
        (folder / "stub.pyc").write_bytes(compiled())
        for name in "python gcloud sbatch srun scontrol squeue scancel".split():
            (bin / name).write_text(CALL.replace("PYTHON", sys.executable))
        for name, text in {"curl": CURL, "python3": PYTHON}.items():
            (bin / name).write_text(text)
        for name in ("git", "tar"):
            real = REAL.replace("PATH", shutil.which(name)).replace("NAME", name)
            (bin / name).write_text(real)
        for file in bin.iterdir():
            file.chmod(0o755)
        for name in "python3.11 python3.12 python3.13".split():
            (bin / name).symlink_to("python3")
        for name in ("sudo", "bwrap"):
            (bin / name).symlink_to("/bin/true")
        (folder / "log").touch()
        state = {"exists": False, "accelerator": "v5p-16", "slices": 1, "hosts": 1}
        self.file = folder / "state"
        self.file.write_text(repr(state | {"train": [0]}))
        shutil.copytree(ROOT / "launch", self.tree / "launch")
        for name in ("pyproject.toml", "requirements.txt"):
            shutil.copy(ROOT / name, self.tree)
        (self.tree / ".gitignore").write_text("runs/\n.venv/\nignored\n")
        (self.tree / "klear_jax").mkdir()
        for name in ("train", "evaluate"):
            (self.tree / f"klear_jax/{name}.py").touch()
        for name in ("note", "gone", "ignored"):
            (self.tree / name).write_text("committed")
        subprocess.run(["git", "init", "-q"], cwd=self.tree, check=True)
        subprocess.run(["git", "add", "."], cwd=self.tree, check=True)
        (self.tree / "note").write_text("not committed")
        (self.tree / "gone").unlink()

    def plan(self, **changes):
        """How the stubs will answer; '_' stands for a space in a name."""
        changes = {key.replace("_", " "): value for key, value in changes.items()}
        with open(self.folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            part = self.folder / "state.part"
            part.write_text(repr(self.state() | changes))
            part.rename(self.file)

    def state(self):
        return ast.literal_eval(self.file.read_text())

    def start(self, script, *args, **settings):
        env = {"PATH": f"{self.folder / 'bin'}:/usr/bin:/bin", "HOME": str(self.folder)}
        env |= {"HERE": str(self.folder)}
        env |= {"POLL_SECONDS": "0.1", "REQUEUE_SECONDS": "0", "APT_SECONDS": "0"}
        process = subprocess.Popen(
            ["bash", f"launch/{script}", *args],
            cwd=self.tree,
            env=env | settings,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def end(self):
        """Whatever still runs."""
        pids = [process.pid for process in self.started if process.poll() is None]
        for file in self.folder.glob("homes/*/klear_jax_runs/*/pid"):
            pids.append(int(file.read_text() or 0))
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        for process in self.started:
            process.communicate()

    def run(self, script, *args, code=0, **settings):
        """Runs a script to its end; its stdout and stderr."""
        process = self.start(script, *args, **settings)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, (process.returncode, out, err)
        return out, err

    def pod(self, *args, **settings):
        return self.run("tpu_pod.sh", *args, **SETTINGS | settings)

    def log(self, name=None):
        lines = (self.folder / "log").read_text().split("\n")[:-1]  # The whole ones.
        found = list(map(ast.literal_eval, lines))
        return [entry for entry in found if name in (None, entry["name"])]

    def verbs(self):
        """What gcloud was told, one word each; of workers, the verb."""
        return [
            re.search(r"tpu_worker.sh (\w+)", " ".join(args))[1]
            if "ssh" in args
            else args[3]
            for args in (entry["args"] for entry in self.log("gcloud"))
        ]

    def trained(self):
        return [(entry["where"], entry["args"]) for entry in self.log("train")]

    def wait_for(self, name, count):
        until = time.monotonic() + 30
        while len(self.log(name)) < count:
            assert time.monotonic() < until, self.log()
            time.sleep(0.02)


@pytest.fixture
def cloud(tmp_path):
    found = Cloud(tmp_path)
    yield found
    found.end()


NEW = ["describe", "create", "describe", "list", "status", "scp", "setup", "start"]
COMMAND = ["-m", "klear_jax.train", *ARGS]
ONE = [("0.0", COMMAND)]
BOTH = [*ONE, ("0.1", COMMAND)]
# Which gives more time to save than a spot TPU has.
BY_SLURM = [(i, [*COMMAND, "--config.checkpoint.grace_s=200"]) for i in "01"]


def test_a_new_pod(cloud):
    cloud.plan(hosts=2)
    out, err = cloud.pod("pod", "run", *ARGS, SPOT="1")
    assert cloud.verbs() == [*NEW, "status", "log"]
    calls = [entry["args"] for entry in cloud.log("gcloud")]
    for args in calls:
        assert {"--project=p1", "--zone=z1", "--quiet"} < set(args)
        assert ("--worker=all" in args) == ("ssh" in args or "scp" in args) or (
            "--worker=0" in args and "tpu_worker.sh log" in " ".join(args)
        )
        assert ("--node=all" in args) == ("ssh" in args or "scp" in args)
    assert {
        *("pod", "--node-id=pod", "--accelerator-type=v5p-16", "--spot"),
        "--runtime-version=v2-alpha-tpuv5",
    } < set(calls[1])
    assert sorted(cloud.trained()) == BOTH
    for entry in cloud.log("train"):
        env = entry["env"]
        assert env["JAX_COMPILATION_CACHE_DIR"] == "gs://bucket/runs/compilation_cache"
        assert "--xla_enable_async_all_gather=true" in env["LIBTPU_INIT_ARGS"]
        assert entry["note"] == "not committed"
    assert out == "start 0 of 0.0\n"
    assert "done" in err
    home = cloud.folder / "homes/0.1/klear_jax"
    assert not (home / "ignored").exists() and not (home / "gone").exists()
    packages = [entry["args"][-1] for entry in cloud.log("python")]
    assert packages == [".[tpu,gcs]"] * 2


def test_dry_run_runs_nothing_and_prints_what_is_run(cloud):
    cloud.plan(hosts=2)
    printed, _ = cloud.pod("--dry_run", "pod", "run", *ARGS)
    assert cloud.log() == []
    cloud.pod("pod", "run", *ARGS)

    def normal(line):  # Without what is of one run: its id, the script's, a folder.
        line = [re.sub(r"\d{8}-\d{6}-\d+-\d+", "ID", word) for word in line]
        line = [re.sub(rf"{os.uname().nodename}-\d+", "OWNER", word) for word in line]
        return [re.sub(r"/tmp/tmp\.\w+|log 0 \d+", "X", word) for word in line]

    lines = [normal(shlex.split(line)) for line in printed.splitlines()]
    ran = [normal(["gcloud", *entry["args"]]) for entry in cloud.log("gcloud")]
    assert [line for line in lines if line[0] == "gcloud"] == ran
    (pack,) = [line for line in lines if line[0] != "gcloud"]
    assert pack[:2] == ["bash", "-c"] and "git ls-files" in pack[2]


def test_a_pod_that_is_there_is_reused(cloud):
    cloud.plan(exists=True)
    cloud.pod("pod", "run", "evaluate", "--config=configs/a.py")
    assert cloud.verbs() == ["describe", *NEW[3:], "status", "log"]
    command = ["-m", "klear_jax.evaluate", "--config=configs/a.py"]
    assert sorted(cloud.trained()) == [("0.0", command)]


def test_waits_in_the_queue_and_for_all_slices(cloud):
    cloud.plan(hosts=2, describe=["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    cloud.plan(nodes=["CREATING", "READY"], slices=2)
    out, err = cloud.pod("pod", "run", *ARGS, SLICES="2", RESERVED="1")
    waiting = ["describe"] * 3 + ["list", "describe", "list"]
    assert cloud.verbs() == ["describe", "create", *waiting, *NEW[4:], "status", "log"]
    create = cloud.log("gcloud")[1]["args"]
    assert {"--node-count=2", "--node-prefix=pod", "--reserved"} < set(create)
    assert not any(arg.startswith("--node-id") for arg in create)
    assert len(cloud.trained()) == 4
    assert out == "start 0 of 0.0\n"
    assert "installing on 4 workers" in err


def test_a_preempted_pod_is_made_again_and_the_command_is_the_same(cloud):
    cloud.plan(train=["wait", 0], fault_status=[None, None, "preempted", None])
    (cloud.tree / "note").write_text("of the first start")
    process = cloud.start("tpu_pod.sh", "pod", "run", *ARGS, **SETTINGS)
    cloud.wait_for("train", 1)
    (cloud.tree / "note").write_text("changed since")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    again = ["describe", "delete", *NEW[:4], "status", *NEW[5:], "status", "log"]
    verbs = cloud.verbs()
    assert verbs[: len(NEW)] == NEW
    assert verbs[verbs.index("delete") - 1 :] == again
    assert sorted(cloud.trained()) == sorted(ONE * 2)
    assert {entry["note"] for entry in cloud.log("train")} == {"of the first start"}
    assert "start 1 of 0.0\n" in out and "the pod is broken: starting again" in err


def test_a_slice_that_is_preempted_alone(cloud):
    cloud.plan(train=["wait", 0], fault_status=[None, "slice down", None])
    cloud.pod("pod", "run", *ARGS)
    assert cloud.verbs().count("create") == 2
    assert sorted(cloud.trained()) == sorted(ONE * 2)


def test_bad_input_is_said_once_and_not_tried_again(cloud):
    cloud.plan(hosts=2, train=[{"0.1": 2, "others": 1}])  # One alone has seen it.
    _out, err = cloud.run("tpu_pod.sh", "pod", "run", *ARGS, code=2, **SETTINGS)
    assert sorted(cloud.trained()) == BOTH
    assert err.count("error: no such key") == 1 and "bad input" in err


def test_failures_are_tried_again_a_bounded_number_of_times(cloud):
    cloud.plan(hosts=2, train=[{"0.1": 7, "others": "wait"}])
    settings = SETTINGS | {"RESTARTS": "1"}
    _out, err = cloud.run("tpu_pod.sh", "pod", "run", *ARGS, code=7, **settings)
    verbs = cloud.verbs()
    # The worker that lives on is stopped first; a healthy pod is not made anew.
    assert verbs.count("start") == 2 and verbs.count("stop") == 1
    assert verbs.count("create") == 1 and "delete" not in verbs
    assert sorted(cloud.trained()) == sorted(BOTH * 2)
    assert "start 1 of 0.1" in err and "given up after 1 restarts in 24 hours" in err


def test_a_run_that_was_told_to_end_is_not_counted_as_a_failure(cloud):
    cloud.plan(train=[75, 75, 75, 0])
    _, err = cloud.run("tpu_pod.sh", "pod", "run", *ARGS, **SETTINGS, RESTARTS="0")
    assert err.count(": starting again") == 3


def test_what_a_command_leaves_behind_is_ended(cloud):
    cloud.plan(train=["leave", 0])
    cloud.pod("pod", "run", *ARGS)
    assert sorted(cloud.trained()) == sorted(ONE * 2)
    locks = list(cloud.folder.glob("homes/*/klear_jax_runs/2*/lock"))
    assert len(locks) == 2
    for lock in locks:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_worker_that_was_killed_is_lost(cloud):
    cloud.plan(hosts=2, train=["wait", 0])
    process = cloud.start("tpu_pod.sh", "pod", "run", *ARGS, **SETTINGS)
    cloud.wait_for("train", 2)
    pid = cloud.folder / "homes/0.1/klear_jax_runs/current/pid"
    os.killpg(int(pid.read_text()), signal.SIGKILL)
    _out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "worker 0.1: lost" in err, err
    assert sorted(cloud.trained()) == sorted(BOTH * 2)


def test_broken_connections(cloud):
    """gcloud sends a command again whose connection broke, and may get no answer at all."""
    gone = [None, "no answer", "one left out", None]
    twice = {key: ["sent twice"] for key in ["fault_start", "fault_setup"]}
    cloud.plan(
        hosts=2,
        train=["wait"],
        fault_status=gone,
        fault_log=["no answer", None],
        **twice,
    )
    process = cloud.start("tpu_pod.sh", "pod", "run", *ARGS, **SETTINGS)
    cloud.wait_for("train", 2)
    cloud.plan(describe=["NO ANSWER", "ACTIVE"])
    while "log" not in cloud.verbs():
        time.sleep(0.02)
    (cloud.folder / "finish").touch()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert sorted(cloud.trained()) == BOTH
    assert "start 0 of 0.0\n" in out and cloud.verbs().count("log") > 1


def test_a_worker_that_was_left_out_of_the_installation(cloud):
    cloud.plan(hosts=2, fault_setup=["one left out", None])
    _, err = cloud.pod("pod", "run", *ARGS)
    assert cloud.verbs().count("setup") == 2
    assert sorted(cloud.trained()) == BOTH
    assert "the installation failed: starting again" in err


def test_workers_that_do_not_answer_for_long(cloud):
    """The pod calls itself healthy; it is made anew all the same."""
    gone = [None, "one left out", "one left out", None]
    cloud.plan(hosts=2, train=["wait", 0], fault_status=gone)
    settings = SETTINGS | {"PATIENCE_SECONDS": "0"}
    _, err = cloud.run("tpu_pod.sh", "pod", "run", *ARGS, **settings)
    assert cloud.verbs().count("create") == 2 and cloud.verbs().count("delete") == 1
    assert "not all workers answer: starting again" in err


def test_when_no_worker_answers_the_pod_is_left_alone(cloud):
    cloud.plan(train=["wait"], fault_status=[None, *["no answer"] * 3, None])
    settings = SETTINGS | {"PATIENCE_SECONDS": "0"}
    process = cloud.start("tpu_pod.sh", "pod", "run", *ARGS, **settings)
    cloud.wait_for("train", 1)
    (cloud.folder / "finish").touch()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "no worker answers" in err, err
    assert "delete" not in cloud.verbs() and sorted(cloud.trained()) == ONE


def test_installations_that_fail_for_a_while(cloud):
    cloud.plan(hosts=2, fault_setup=["one left out", "one left out", None])
    _, err = cloud.pod("pod", "run", *ARGS)
    assert cloud.verbs().count("setup") == 3, err
    assert "delete" not in cloud.verbs()


def test_a_machine_that_cannot_be_installed(cloud):
    cloud.plan(hosts=2, fault_setup=["one left out", None])
    settings = SETTINGS | {"PATIENCE_SECONDS": "0"}
    _, err = cloud.run("tpu_pod.sh", "pod", "run", *ARGS, **settings)
    assert cloud.verbs().count("setup") == 2, err
    assert cloud.verbs().count("delete") == 1


def test_a_loss_that_is_no_number_is_not_tried_again(cloud):
    cloud.plan(hosts=2, train=[3])
    _, err = cloud.run("tpu_pod.sh", "pod", "run", *ARGS, code=3, **SETTINGS)
    assert sorted(cloud.trained()) == BOTH
    assert "the run has stopped itself" in err


def test_a_restart_waits_for_a_service_that_does_not_answer(cloud):
    answers = ["ACTIVE", "NO ANSWER", "ACTIVE"]
    cloud.plan(exists=True, train=[1, 0], describe=answers)
    _, err = cloud.pod("pod", "run", *ARGS)
    assert sorted(cloud.trained()) == sorted(ONE * 2), err


def test_a_pod_that_cannot_be_made(cloud):
    cloud.plan(describe=["FAILED"])
    _, err = cloud.run("tpu_pod.sh", "pod", "create", code=1, **SETTINGS)
    assert cloud.verbs().count("create") == 5 and "pod cannot be made" in err


def test_a_machine_that_was_replaced(cloud):
    """By the service, with an empty one; the others go on, and wait."""
    cloud.plan(hosts=2, train=["wait", 0])
    process = cloud.start("tpu_pod.sh", "pod", "run", *ARGS, **SETTINGS)
    cloud.wait_for("train", 2)
    home = cloud.folder / "homes/0.1"
    pid = int((home / "klear_jax_runs/current/pid").read_text())
    home.rename(cloud.folder / "gone")
    os.killpg(pid, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "lost: starting again" in err, err
    assert "create" not in cloud.verbs()[2:] and cloud.verbs().count("stop") == 1
    assert sorted(cloud.trained()) == sorted(BOTH * 2)


def test_a_pod_that_was_deleted_stays_deleted(cloud):
    cloud.plan(train=["wait"])
    process = cloud.start("tpu_pod.sh", "pod", "run", *ARGS, **SETTINGS)
    cloud.wait_for("train", 1)
    cloud.pod("pod", "delete")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "error: pod was deleted" in err
    assert cloud.verbs().count("create") == 1
    cloud.plan(describe=["WAITING_FOR_RESOURCES"])
    process = cloud.start("tpu_pod.sh", "pod", "create", **SETTINGS)
    while cloud.verbs()[-3:] != ["create", "describe", "describe"]:
        time.sleep(0.02)
    cloud.plan(exists=False)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "error: pod was deleted" in err


def test_half_an_installation_is_thrown_away(cloud):
    cloud.plan(pip=[1, 0])
    cloud.pod("pod", "run", *ARGS)
    venv = cloud.folder / "homes/0.0/klear_jax/.venv"
    (venv / "left").touch()
    cloud.pod("pod", "setup")
    assert (venv / "whole").exists() and (venv / "left").exists()
    (venv / "whole").unlink()
    cloud.pod("pod", "setup")
    assert (venv / "whole").exists() and not (venv / "left").exists()


def test_an_installation_that_always_fails(cloud):
    cloud.pod("pod", "run", *ARGS)
    shutil.rmtree(cloud.folder / "homes/0.0/klear_jax/.venv")
    cloud.plan(pip=[1])
    settings = SETTINGS | {"RESTARTS": "0"}
    _, err = cloud.run("tpu_pod.sh", "pod", "run", *ARGS, code=1, **settings)
    assert "the installation failed; given up" in err
    assert cloud.trained() == ONE


def test_the_same_command_again_takes_over(cloud):
    cloud.plan(hosts=2, train=["wait"])
    first = cloud.start("tpu_pod.sh", "pod", "run", *ARGS, **SETTINGS)
    cloud.wait_for("train", 2)
    other = [*ARGS, "--config.steps=1"]
    _, err = cloud.run("tpu_pod.sh", "pod", "run", *other, code=2, **SETTINGS)
    assert "pod runs another command" in err
    second = cloud.start("tpu_pod.sh", "pod", "run", *ARGS, **SETTINGS)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 1 and "another script sees to the command" in err
    (cloud.folder / "finish").touch()
    out, err = second.communicate(timeout=60)
    assert second.returncode == 0 and out == "start 0 of 0.0\n", err
    assert sorted(cloud.trained()) == BOTH


def test_an_interrupt_leaves_the_command_alone(cloud):
    cloud.plan(train=["wait"])
    process = cloud.start("tpu_pod.sh", "pod", "run", *ARGS, **SETTINGS)
    cloud.wait_for("train", 1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "the command goes on" in err
    out, _ = cloud.pod("pod", "status")
    assert out.startswith("pod is ready\n") and out.count(" running ") == 1


def test_stop_status_logs_and_delete(cloud):
    cloud.plan(hosts=2, train=["wait"])
    process = cloud.start("tpu_pod.sh", "pod", "run", *ARGS, **SETTINGS)
    cloud.wait_for("train", 2)
    _, err = cloud.run("tpu_pod.sh", "pod", "setup", code=1, **SETTINGS)
    assert "a command is running here" in err
    out, _ = cloud.pod("pod", "stop")
    assert out.count(" stopped ") == 2
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and ": stopped" in err
    out, err = cloud.run("tpu_pod.sh", "pod", "logs", code=1, **SETTINGS)
    assert out.startswith("start 0 of 0.0\n") and "stopped" in err
    cloud.pod("pod", "delete")
    assert cloud.log("gcloud")[-1]["args"][:6] == [
        *("compute", "tpus", "queued-resources", "delete", "pod", "--force")
    ]
    assert cloud.pod("pod", "status") == ("pod is absent\n", "")
    _, err = cloud.run("tpu_pod.sh", "pod", "logs", code=1, **SETTINGS)
    assert err == "error: pod is absent\n"
    assert sorted(cloud.trained()) == BOTH


def test_a_pod_of_another_size_is_not_reused(cloud):
    cloud.plan(exists=True, accelerator="v5p-8")
    _, err = cloud.run("tpu_pod.sh", "pod", "run", *ARGS, code=2, **SETTINGS)
    assert "pod is there as v5p-8, not v5p-16" in err
    assert cloud.verbs() == ["describe"]


def test_what_gcloud_cannot_say_is_not_taken_for_absent(cloud):
    cloud.plan(exists=True, describe=["NO ANSWER"])
    _, err = cloud.run("tpu_pod.sh", "pod", "run", *ARGS, code=1, **SETTINGS)
    assert "ERROR: no answer" in err and cloud.verbs() == ["describe"]


@pytest.mark.parametrize(
    ("script", "args", "settings", "said"),
    [
        ("tpu", ["pod", "run", *ARGS], {"PROJECT": ""}, "set PROJECT in"),
        (
            "tpu",
            ["pod", "run", *ARGS],
            {"ZONE": "", "ACCELERATOR": ""},
            "set ZONE, ACC",
        ),
        ("tpu", ["pod", "stop"], {"PROJECT": ""}, "set PROJECT in"),
        ("tpu", ["pod", "create"], {"ACCELERATOR": "tpu7x-8"}, "set RUNTIME"),
        ("tpu", ["pod", "run", *ARGS], {"SLICES": "two"}, "SLICES must be"),
        ("tpu", ["pod", "run", ARGS[0]], {}, "name where all workers can write"),
        (
            "tpu",
            ["pod", "run", *ARGS, "--workdir=runs/a"],
            {},
            "name where all workers",
        ),
        ("tpu", ["pod", "run"], {}, "say what to run"),
        ("tpu", ["pod", "run", "tarin", *ARGS], {}, "no klear_jax.tarin"),
        ("tpu", ["pod", "walk"], {}, "unknown verb walk"),
        ("tpu", ["--dryrun", "pod", "run"], {}, "unknown flag --dryrun"),
        ("tpu", ["Pod", "run", *ARGS], {}, "NAME is of"),
        ("tpu", ["pod"], {}, "usage:"),
        ("gpu", ["job", "run", *ARGS], {}, "set NODES in"),
        ("gpu", ["job", "run"], {"NODES": "2"}, "say what to run"),
        ("gpu", ["a b", "run", *ARGS], {"NODES": "2"}, "NAME is of"),
    ],
)
def test_bad_settings_are_one_sentence(cloud, script, args, settings, said):
    script = {"tpu": "tpu_pod.sh", "gpu": "gpu_slurm.sh"}[script]
    out, err = cloud.run(script, *args, code=2, **SETTINGS | settings)
    assert (
        out == "" and err.count("\n") == 1 and err.startswith("error: ") and said in err
    )
    assert cloud.log() == []


def slurm(cloud, *args, **settings):
    return cloud.run("gpu_slurm.sh", *args, NODES="2", GPUS="4", **settings)


def names(cloud):
    return [entry["name"] for entry in cloud.log() if entry["name"] != "python"]


def test_slurm(cloud):
    slurm(cloud, "job", "run", *ARGS, SBATCH_FLAGS="--qos=low --mem=9G")
    assert names(cloud) == ["sbatch", "srun", "train", "train"]
    (submit,), (step,) = cloud.log("sbatch"), cloud.log("srun")
    assert {
        *("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--cpus-per-task=8"),
        *("--requeue", "--open-mode=append", "--signal=B:USR1@300", "--qos=low"),
        *("--dependency=singleton", "--job-name=job", f"--chdir={cloud.tree}"),
    } < set(submit["args"])
    assert submit["args"][-len(ARGS) :] == ARGS
    assert submit["args"].index("--mem=9G") > submit["args"].index("--mem=0")
    assert {"--kill-on-bad-exit=1", "--gpu-bind=none", "--cpus-per-task=8"} < set(
        step["args"]
    )
    assert cloud.trained() == BY_SLURM
    for entry in cloud.log("train"):
        env = entry["env"]
        assert env["JAX_COMPILATION_CACHE_DIR"] == "gs://bucket/runs/compilation_cache"
        assert "--xla_gpu_enable_latency_hiding_scheduler=true" in env["XLA_FLAGS"]
        assert env["PWD"] == str(cloud.tree)
    logs = cloud.tree / "runs/slurm/job"
    assert (logs / "task_1.log").read_text() == "start 0 of 1\n"
    assert cloud.log("python")[0]["args"][-1] == ".[cuda,gcs]"


def test_slurm_leaves_the_time_to_save_as_it_was_given(cloud):
    own = "--config.checkpoint.grace_s=60"
    slurm(cloud, "job", "run", *ARGS, own)
    slurm(cloud, "job", "run", "evaluate", *ARGS)  # Which has no such key.
    commands = [command[2:] for _, command in cloud.trained()]
    assert commands == [[*ARGS, own]] * 2 + [ARGS] * 2


@pytest.mark.parametrize(
    "workdir, cache",
    [
        ("gs://bucket/runs/a/", "gs://bucket/runs/compilation_cache"),
        ("gs://bucket", "gs://bucket/compilation_cache"),  # Not a stranger's bucket.
        ("/scratch/a", "/scratch/compilation_cache"),
        ("/scratch", "/scratch/compilation_cache"),
        ("runs/a", "runs/compilation_cache"),
        ("a", "compilation_cache"),
    ],
)
def test_compiled_programs_lie_beside_the_workdir(workdir, cache):
    script = f"source launch/pod.sh; cache_of {workdir}"
    found = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, capture_output=True, text=True
    )
    assert found.stdout == f"{cache}\n", found.stderr


def test_slurm_dry_run(cloud):
    printed, _ = slurm(cloud, "--dry_run", "job", "run", *ARGS)
    assert cloud.log() == [] and not (cloud.tree / "runs").exists()
    lines = [shlex.split(line) for line in printed.splitlines()]
    slurm(cloud, "job", "run", *ARGS)
    assert lines[0][0] == "flock" and "setup '.[cuda,gcs]'" in lines[0][-1]
    assert lines[1:] == [
        [name, *cloud.log(name)[0]["args"]] for name in ("sbatch", "srun")
    ]


def test_slurm_bad_input_is_not_tried_again(cloud):
    cloud.plan(train=[{"1": 2, "others": 0}])
    _, err = slurm(cloud, "job", "run", *ARGS)
    assert cloud.state()["code"] == 2
    assert names(cloud) == ["sbatch", "srun", "train", "train"]
    assert "error: no such key" in err


def test_slurm_a_loss_that_is_no_number_is_not_tried_again(cloud):
    cloud.plan(train=[3])
    _, err = slurm(cloud, "job", "run", *ARGS)
    assert cloud.state()["code"] == 3 and names(cloud).count("srun") == 1
    assert "the run has stopped itself" in err


def test_slurm_failures_are_tried_again_a_bounded_number_of_times(cloud):
    cloud.plan(train=[1])
    _, err = slurm(cloud, "job", "run", *ARGS, RESTARTS="2")
    assert names(cloud).count("srun") == 3 and names(cloud).count("scontrol") == 3
    assert cloud.trained() == BY_SLURM * 3
    assert cloud.state()["code"] == 1
    assert "given up after 2 restarts" in err


def test_slurm_at_the_end_of_its_time(cloud):
    """All processes are told to save, and their end is waited for."""
    cloud.plan(train=[{"0": "wait", "others": 0}, 0], signal=True)
    _, err = slurm(cloud, "job", "run", *ARGS, RESTARTS="0")
    assert "the time is almost over" in err
    assert cloud.log("scancel")[0]["args"] == ["--signal=TERM", "7"]
    assert names(cloud).index("scancel") < names(cloud).index("scontrol")
    assert cloud.state()["code"] == 0
    assert names(cloud).count("srun") == 2


def test_slurm_does_not_bring_back_a_job_that_was_cancelled(cloud):
    cloud.plan(train=[1], squeue="COMPLETING")
    slurm(cloud, "job", "run", *ARGS)
    assert names(cloud).count("srun") == 1 and "scontrol" not in names(cloud)


def flags_of(function, name, **env):
    done = subprocess.run(
        ["bash", "-euc", f"source launch/flags.sh; {function}; echo ${name}"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]} | env,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_flags_of_the_caller_win():
    mine = "--xla_enable_async_all_gather=false"
    assert flags_of("tpu_flags", "LIBTPU_INIT_ARGS", LIBTPU_INIT_ARGS=mine).endswith(
        mine
    )
    mine = "--xla_gpu_enable_latency_hiding_scheduler=false"
    assert flags_of("gpu_flags", "XLA_FLAGS", XLA_FLAGS=mine).endswith(mine)
    name = "XLA_CLIENT_MEM_FRACTION"
    assert flags_of("gpu_flags", name) == "0.9"
    assert flags_of("gpu_flags", name, XLA_PYTHON_CLIENT_MEM_FRACTION="0.5") == "0.5"


def test_xla_knows_its_flags():
    """XLA ends a process that is given a flag it does not know."""
    subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env=os.environ | {"XLA_FLAGS": flags_of("gpu_flags", "XLA_FLAGS")},
        check=True,
    )


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
def test_libtpu_knows_its_flags():
    flags = {"LIBTPU_INIT_ARGS": flags_of("tpu_flags", "LIBTPU_INIT_ARGS")}
    subprocess.run(
        [
            sys.executable,
            "-c",
            "from klear_jax import aot; aot.devices('v5p:2x2x1')",
        ],
        env=os.environ | flags,
        cwd=ROOT,
        check=True,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_bash_can_read(script):
    subprocess.run(["bash", "-n", script], check=True)


def test_shellcheck():
    found = shutil.which(
        "shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    if found is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run(
        [found, "--external-sources", "--severity=warning", *SCRIPTS],
        cwd=ROOT,
        check=True,
    )
