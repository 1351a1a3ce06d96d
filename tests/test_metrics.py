"""What a run writes, and what it says about compilations."""

import json
import math
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klear_jax import metrics
from klear_jax.errors import InputError
from klear_jax.metrics import Compilations, Writer


def lines(workdir):
    return (workdir / "metrics.jsonl").read_text().splitlines()


# As a kill leaves the end of the file, and as a power cut may.
@pytest.mark.parametrize("torn", ['{"step": 4, "lo', "\0" * 41])
def test_a_resumed_run_writes_its_steps_again(tmp_path, torn):
    with Writer(tmp_path, next_step=0) as writer:
        for step in range(4):
            writer.write(step, {"loss": 0.5 * step})
            writer.write_samples(step, [{"response": "é", "step": step}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    with Writer(tmp_path, next_step=2) as writer:
        writer.write(2, {"loss": np.float32(7), "gap": float("nan")})
    assert list(map(json.loads, lines(tmp_path))) == [
        {"step": 0, "loss": 0.0},
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 7.0, "gap": None},
    ]
    files = sorted((tmp_path / "rollouts").iterdir())
    assert [file.name for file in files] == ["step_000000.jsonl", "step_000001.jsonl"]
    assert files[1].read_text() == '{"response": "é", "step": 1}\n'


def test_where_files_cannot_grow_they_are_written_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "_appends", lambda workdir: False)
    monkeypatch.setattr(metrics, "PUBLISH_S", 1e9)
    with Writer(tmp_path, next_step=0) as writer:
        writer.write(0, {"loss": 0.5})
        writer.write_samples(0, [{"step": 0}])
        assert [file.name for file in tmp_path.iterdir()] == ["rollouts"]
        monkeypatch.setattr(metrics, "PUBLISH_S", 0)  # As when a minute is over.
        writer.write(1, {"loss": 0.25})
        assert len(lines(tmp_path)) == 2
        monkeypatch.setattr(metrics, "PUBLISH_S", 1e9)
        writer.write(2, {"loss": 0.125})
        assert len(lines(tmp_path)) == 2
        writer.publish()  # As a checkpoint is saved.
        assert len(lines(tmp_path)) == 3
    assert list((tmp_path / "tensorboard").iterdir())
    with Writer(tmp_path, next_step=2) as writer:
        writer.write(2, {"loss": 7.0})
    assert [json.loads(line)["loss"] for line in lines(tmp_path)] == [0.5, 0.25, 7.0]


def test_of_several_processes_the_first_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    with Writer(tmp_path, next_step=0) as writer:
        writer.write(0, {"loss": 0.5})
        writer.write_samples(0, [{"step": 0}])
        writer.publish()
    assert list(tmp_path.iterdir()) == []


def test_a_workdir_that_is_gone_is_said(tmp_path):
    (tmp_path / "run").mkdir()
    with Writer(tmp_path / "run", next_step=0) as writer:
        writer.write(0, {"loss": 0.5})
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        with pytest.raises(FileNotFoundError, match="is gone: somebody"):
            writer.write(1, {"loss": 0.5})


def test_weights_and_biases_get_the_same_numbers(tmp_path, monkeypatch):
    """Through a stand-in: their package is not installed for tests."""
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finish")

    def init(**about):
        calls.append(about)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for first in (0, 1):
        with Writer(tmp_path, next_step=first, wandb="project", about={"seed": 1}) as w:
            w.write(first, {"loss": 0.5, "none": math.nan})
    opened, *told = calls[:3]
    assert told == [(0, {"loss": 0.5}), "finish"]
    assert opened["project"] == "project" and opened["config"] == {"seed": 1}
    assert opened["name"] == tmp_path.name and opened["resume"] == "allow"
    assert calls[3] == opened  # The same run goes on.
    assert calls[4] == (1, {"loss": 0.5})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    metrics.check_wandb("")
    with pytest.raises(
        InputError, match="'p' asks for Weights & Biases: pip install wa"
    ):
        metrics.check_wandb("p")


def test_what_is_compiled_after_the_start_is_a_warning_with_its_shapes():
    @jax.jit
    def double(x):
        return 2 * x

    with Compilations() as compilations:
        double(np.ones((3, 5), np.float32))
        compilations.close()
        double(np.zeros((3, 5), np.float32))
        assert compilations.unplanned == 0
        assert any("double" in name for name in compilations.planned)
        with pytest.warns(UserWarning, match=r"double.* for float32\[3,7\], \d"):
            double(np.ones((3, 7), np.float32))
        with compilations.open_again():
            double(np.ones((3, 8), np.float32))
        assert compilations.unplanned == 1
    double(jnp.ones((3, 9)))  # Nobody watches any more.
    assert compilations.unplanned == 1
