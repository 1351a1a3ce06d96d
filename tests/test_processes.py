"""Two processes of four devices each, joined by jax.distributed, do what one would; and when
either of them dies, so does the other, and the next start goes on."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import test_runs
import test_sampler as shared
import test_steps

from klear_jax import hosts, sampler
from klear_jax.errors import InputError

TESTS = pathlib.Path(__file__).parent
# What pytest finds by itself (its own folder, and the root by `python -m`), a process is told.
PYTHONPATH = {"PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
pytestmark = test_runs.pytestmark


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def test_two_processes_do_what_one_does(tmp_path):
    command = [sys.executable, str(TESTS / "processes.py"), str(free_port()), "2"]
    workers = [
        subprocess.Popen(
            [*command, str(index), str(tmp_path)],
            env=os.environ | PYTHONPATH,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    results = []
    try:
        for worker in workers:
            out, err = worker.communicate(timeout=300)
            assert worker.returncode == 0, err[-3000:]
            results.append(json.loads(out.splitlines()[-1]))
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()  # And its pipes closed.
    # The same samples, bit for bit, in the same order: the same decisions.
    assert results[0] == results[1]
    assert results[0]["told"] == [[0, 0], [1, 100_000]]
    assert results[0]["under_way"] == {"so": "far"}
    params = test_steps.make_params()
    rows = test_steps.make_rows(params)
    alone = test_steps.make_layout(1, 1, 1)
    for name, losses in results[0]["losses"].items():
        expected = test_steps.five_updates(name, alone, params, rows)
        np.testing.assert_allclose(losses, expected, rtol=1e-4)
    want = sampler.generate(
        shared.make_params(), shared.CONFIG, shared.PROMPTS, **shared.SAMPLED
    )
    assert results[0]["tokens"] == [[s.tokens for s in group] for group in want]
    for group, other in zip(results[0]["logprobs"], want, strict=True):
        for logprobs, sample in zip(group, other, strict=True):
            np.testing.assert_allclose(logprobs, sample.logprobs, atol=1e-5)


CONFIG_FILE = """
import pathlib
import test_runs

def get_config():
    config = test_runs.small_gppo(pathlib.Path({data!r}))
    config.evaluation.every = 0
    return config
"""


class Run:
    """The processes of one start of a run, as launch/ starts them."""

    def __init__(self, folder, workdir):
        command = [sys.executable, "-m", "klear_jax.train"]
        command += [f"--config={folder / 'config.py'}", f"--workdir={workdir}"]
        port = free_port()
        self.logs = [folder / f"process_{i}.log" for i in range(2)]
        self.processes = []
        for i, log in enumerate(self.logs):
            environment = os.environ | {
                **PYTHONPATH,
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": "4",
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(i),
            }
            with log.open("w") as out:
                self.processes.append(
                    subprocess.Popen(command, env=environment, stdout=out, stderr=out)
                )

    def wait(self, seconds):
        return [process.wait(timeout=seconds) for process in self.processes]

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        for process in self.processes:
            process.kill()
            process.wait()


def steps_written(workdir):
    file = workdir / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def test_a_process_that_dies_ends_the_run_and_the_next_start_resumes(tmp_path):
    test_runs.make_data(tmp_path / "data")
    text = CONFIG_FILE.format(data=str(tmp_path / "data"))
    (tmp_path / "config.py").write_text(text)
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    with Run(tmp_path, whole) as run:
        assert run.wait(300) == [0, 0], run.logs[0].read_text()[-3000:]
        assert "GPPO" in run.logs[0].read_text()  # The first alone speaks.
        assert "GPPO" not in run.logs[1].read_text()
    # Whichever notices it first, the heartbeat or what the two were exchanging.
    noticed = r"tasks are unhealthy|another process of the run has ended"
    for victim, steps, cause in (
        (0, 2, rf"leader task was preempted/died|{noticed}"),  # No checkpoint yet.
        (1, 5, noticed),  # There is one of step 3.
    ):
        with Run(tmp_path, workdir) as run:
            deadline = time.monotonic() + 300
            while steps_written(workdir) < steps:
                assert run.processes[victim].poll() is None, run.logs[
                    victim
                ].read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            run.processes[victim].send_signal(signal.SIGKILL)
            assert run.processes[1 - victim].wait(60) != 0
            assert re.search(cause, run.logs[1 - victim].read_text())
    with Run(tmp_path, workdir) as run:
        assert run.wait(300) == [0, 0], run.logs[0].read_text()[-3000:]
    test_runs.assert_same_run(whole, workdir)


def test_what_says_who_is_one_of_several_goes_before_slurm(monkeypatch):
    """One task of Slurm may be one of several processes that were started by hand."""
    joined = []
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda **found: joined.append(found)
    )
    monkeypatch.setenv("SLURM_NTASKS", "1")
    hosts.join()
    assert not joined
    for name, value in (
        ("COORDINATOR_ADDRESS", "localhost:1"),
        ("NUM_PROCESSES", "2"),
        ("PROCESS_ID", "1"),
    ):
        monkeypatch.setenv(f"JAX_{name}", value)
    hosts.join()
    [found] = joined
    assert (found["num_processes"], found["process_id"]) == (2, 1)


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES must be"),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "localhost:1",
                "JAX_NUM_PROCESSES": "two",
                "JAX_PROCESS_ID": "0",
            },
            "JAX_NUM_PROCESSES must be a number, not 'two'",
        ),
    ],
)
def test_half_an_environment_is_one_sentence(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        hosts.join()
