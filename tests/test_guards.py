"""Guards: each speaks beyond its limit and not before it, and a bad update changes nothing."""

import logging

import numpy as np
import pytest

from configs import gppo_tiny
from klear_jax import guards
from klear_jax.config import build
from klear_jax.errors import InputError, Stopped


def config(**changes):
    values = {"not_finite": "stop", "limits": {}, "stop": ()} | changes
    return build(guards.GuardConfig, values, "config.guards")


@pytest.mark.parametrize("name", guards.GUARDS)
def test_a_guard_warns_beyond_its_limit_and_stops_if_told(name, caplog):
    guard = guards.GUARDS[name]
    for beyond, value in ((False, 0.5), (True, 0.6 if guard.above else 0.4)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            guards.check(config(limits={name: 0.5}), {guard.metric: value}, 7)
        assert len(caplog.records) == beyond
    (record,) = caplog.records
    assert f"step 7: {guard.metric} is {value}" in record.getMessage()
    assert f"guards.limits.{name}=0.5" in record.getMessage()
    with pytest.raises(Stopped, match=guard.metric):
        guards.check(config(limits={name: 0.5}, stop=(name,)), {guard.metric: value}, 7)


def test_what_is_not_measured_is_not_watched(caplog):
    limits = dict.fromkeys(guards.GUARDS, 0.5)
    guards.check(config(limits=limits), {"entropy": float("nan")}, 0)
    assert not caplog.records


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"not_finite": "go on"}, "guards.not_finite must be one of .*'go on'"),
        ({"limits": {"entropi": 1.0}}, "guards.limits.entropi is no guard; there are"),
        ({"stop": ("entropy",)}, "guards.stop names 'entropy', which has no limit"),
    ],
)
def test_bad_configs_are_one_sentence(changes, sentence):
    with pytest.raises(InputError, match=sentence):
        config(**changes)


def test_the_limits_of_gppo_are_all_that_there_are():
    assert set(gppo_tiny.get_config().guards.limits) == set(guards.GUARDS)


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_a_loss_that_is_no_number_stops_the_run_with_its_batch(tmp_path, name):
    good = {"loss": np.float32(1), "grad_norm": np.float32(2)}
    bad = good | {name: np.float32("inf")}
    batch = {"tokens": np.arange(6).reshape(2, 3)}
    assert guards.finite(config(), [good], batch, tmp_path, 3) == [good]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(Stopped, match=r"step 3: .*not_finite_step_000003"):
        guards.finite(config(), [good, bad], batch, tmp_path, 3)
    with np.load(tmp_path / "not_finite_step_000003.npz") as saved:
        np.testing.assert_array_equal(saved["tokens"], batch["tokens"])


def test_bad_updates_are_skipped_and_the_first_batch_alone_is_saved(tmp_path, caplog):
    good, bad = (
        {"loss": np.float32(x), "grad_norm": np.float32(2)} for x in (1, "nan")
    )
    skip = config(not_finite="skip")
    for step in (3, 4):
        left = guards.finite(skip, [bad, good], {"x": np.zeros(1)}, tmp_path, step)
        assert left == [good]
    assert [file.name for file in tmp_path.iterdir()] == ["not_finite_step_000003.npz"]
    assert "the update is skipped" in caplog.text
