"""What a run shows, where its time goes, and profiles of its steps."""

import re

import jax
import jax.numpy as jnp
import pytest

from klear_jax import progress
from klear_jax.errors import InputError
from klear_jax.progress import Progress, Trace


def test_seconds_add_up_by_phase(monkeypatch):
    now = iter([0, 1, 3, 4, 5, 7, 7, 9])
    with monkeypatch.context() as patch:
        patch.setattr("time.perf_counter", lambda: next(now))
        shown = Progress("GPPO", 0, 1)
        for name in ("sample", "sample"):
            with shown.phase(name):
                pass
        assert shown.lap() == {"seconds/sample": 3, "seconds/step": 7}
        assert shown.lap() == {"seconds/step": 0}


def test_a_log_has_a_line_a_minute(monkeypatch, capsys):
    """With how far it is, the time left, how it goes and what it waits for."""
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with Progress("GPPO", 20, 60) as shown:
        for step in shown.steps():
            shown.result(correct=0.51)
            for half in ("sampling: 3 of 8 samples", "waiting: 2 rewards to come"):
                clock[0] += 5
                shown.tell(half)
            if step == 37:
                break
    first, *lines = capsys.readouterr().err.splitlines()
    assert first.startswith("GPPO: 20 of 60, ? left,")
    # 180 s, 10 of them a step; and a line at the end.
    assert len(lines) == 3
    assert re.fullmatch(
        r"GPPO: 26 of 60, 06:08 left, .*step.*, correct 0.51 \| sampling: 3 of 8 samples",
        lines[0],
    ), lines[0]


def test_what_is_done_after_a_restart_does_not_count_for_the_time_left(
    monkeypatch, capsys
):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with Progress("evaluation", 900, 1_000, unit="sample") as shown:
        for _ in range(50):
            shown.advance()
        clock[0] = 100.0
        shown.tell("sampling")
    line, _ = capsys.readouterr().err.splitlines()
    assert line.startswith("evaluation: 950 of 1000, 01:40 left,")


def test_a_profile_of_the_steps_asked_for(tmp_path, monkeypatch):
    calls = []
    ordinary = jax.profiler.start_trace, jax.profiler.stop_trace
    monkeypatch.setattr(
        jax.profiler, "start_trace", lambda at: (calls.append("start"), ordinary[0](at))
    )
    monkeypatch.setattr(
        jax.profiler, "stop_trace", lambda: (calls.append("stop"), ordinary[1]())
    )
    with Progress("SFT", 0, 6, Trace(tmp_path, (2, 3))) as shown:
        for step in shown.steps():
            with shown.phase("update"):
                jnp.ones(3).block_until_ready()
            calls.append(step)
    assert calls == [0, 1, "start", 2, 3, "stop", 4, 5]
    [trace] = tmp_path.glob("profile/plugins/profile/*/*.xplane.pb")
    data = trace.read_bytes()
    assert b"update" in data and b"SFT" in data


def test_a_profile_of_the_last_steps_and_of_none(tmp_path):
    with Progress("SFT", 0, 2, Trace(tmp_path / "last", (1, 9))) as shown:
        list(shown.steps())
    assert list(tmp_path.glob("last/profile/plugins/profile/*/*.xplane.pb"))
    with Progress("SFT", 5, 6, Trace(tmp_path / "before", (1, 3))) as shown:
        list(shown.steps())
    assert not (tmp_path / "before").exists()


@pytest.mark.parametrize(
    "text, want", [(None, None), ("0", (0, 0)), ("12", (12, 12)), ("10-12", (10, 12))]
)
def test_steps_of_a_flag(text, want):
    assert progress.parse_steps(text) == want


@pytest.mark.parametrize("text", ["", "-1", "3-2", "a", "1,2", "1-2-3"])
def test_bad_steps_are_one_sentence(text):
    with pytest.raises(
        InputError, match=rf"--profile={text} must be a step or the first"
    ):
        progress.parse_steps(text)
