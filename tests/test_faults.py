"""Faults, caused for real in runs that are processes: each ends, or goes on, as documented,
with one clear cause. (Killed and dead processes: test_processes. Rewards that hang or kill
their workers: test_rewards, test_sandbox. Checkpoints that are damaged: test_checkpoint.)
"""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
import test_runs

from klear_jax import preemption

TESTS = pathlib.Path(__file__).parent
CONFIG = """
import pathlib
import test_runs

def get_config():
    c = test_runs.small_gppo(pathlib.Path({data!r}))
    c.evaluation.every = 0
    c.checkpoint.every = 2
    {change}
    return c
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data that the runs share."""
    folder = tmp_path_factory.mktemp("faults")
    test_runs.make_data(folder / "data")
    return folder


def start(folder, workdir, change="", within=()):
    """The process of a run, its output in workdir.log."""
    config = folder / f"{workdir.name}.py"
    config.write_text(CONFIG.format(data=str(folder / "data"), change=change))
    env = os.environ | {
        "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
    }
    command = [sys.executable, "-m", "klear_jax.train"]
    command += [f"--config={config}", f"--workdir={workdir}"]
    with open(f"{workdir}.log", "a") as log:
        return subprocess.Popen([*within, *command], env=env, stdout=log, stderr=log)


def log_of(workdir):
    return pathlib.Path(f"{workdir}.log").read_text()


def wait_for_steps(process, workdir, steps):
    file, deadline = workdir / "metrics.jsonl", time.monotonic() + 300
    while not file.exists() or file.read_text().count("\n") < steps:
        assert process.poll() is None and time.monotonic() < deadline, log_of(workdir)
        time.sleep(0.02)


def test_sigterm_saves_and_the_same_command_goes_on(folder, tmp_path):
    workdir = tmp_path / "run"
    process = start(folder, workdir)
    wait_for_steps(process, workdir, 1)
    process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    assert process.wait(300) == preemption.EXIT_CODE, log_of(workdir)
    assert (
        time.monotonic() - begun < 25 + 5
    )  # checkpoint.grace_s, and Python's own end.
    assert "SIGTERM: saving within 25 s" in log_of(workdir)
    assert "preempted, and saved: the same command goes on" in log_of(workdir)
    assert list((workdir / "preempted").iterdir())
    assert start(folder, workdir).wait(300) == 0, log_of(workdir)
    lines = test_runs.read_lines(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(6))
    assert len(list((workdir / "rollouts").iterdir())) == 6


def test_out_of_memory_is_said(folder, tmp_path):
    workdir = tmp_path / "run"
    # 128 GiB a matrix, which no machine gives it, whatever it has.
    process = start(
        folder,
        workdir,
        "c.model.mlp_width = 2**29",
        within=["prlimit", f"--as={64 * 2**30}"],
    )
    assert process.wait(300) == 1
    assert "error: out of memory; python -m klear_jax.plan shows" in log_of(workdir)


IN_TMPFS = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c"]


def can_mount():
    probe = [*IN_TMPFS, "mount -t tmpfs tmpfs /mnt"]
    return shutil.which("unshare") and subprocess.run(probe).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="no namespace to mount a small disk in")
@pytest.mark.parametrize(
    "spoil, said",
    [
        (
            "dd if=/dev/zero of=$dir/filler bs=1k 2>/dev/null || true",
            "error: a disk is full; with room on it, the same command goes on",
        ),
        (
            "mount --bind $dir $dir && mount -o remount,bind,ro $dir",
            "error: a disk cannot be written to",
        ),
        ("mv $dir/run $dir/elsewhere", "somebody has moved or deleted the workdir"),
    ],
    ids=["full", "read-only", "gone"],
)
def test_a_disk_that_fails_ends_the_run_with_its_cause(folder, tmp_path, spoil, said):
    """The disk is spoiled in the middle of the run; the last checkpoint stays good."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f"""
        dir={disk}
        mount -t tmpfs -o size=20m tmpfs $dir
        "$@" &
        while ! [ $(cat $dir/run/metrics.jsonl 2>/dev/null | wc -l) -ge 3 ]; do
            sleep 0.02
            kill -0 $! || break
        done
        {spoil}
        code=0
        wait $! || code=$?
        cp -r $dir {tmp_path}/copy
        exit $code
    """
    process = start(folder, disk / "run", within=[*IN_TMPFS, script, "bash"])
    assert process.wait(300) == 1, log_of(disk / "run")
    assert said in log_of(disk / "run"), log_of(disk / "run")
