"""Broken input is refused in one sentence; `python -m tests.fuzz` says it a hundred thousand
times, this some hundred."""

import pytest

import tests.fuzz

INPUTS = {"flags": 30, "rewards": 40}  # These take long each; others 400.


@pytest.mark.parametrize("name", tests.fuzz.TARGETS)
def test_broken_input_is_refused(name):
    found = tests.fuzz.fuzz(name, INPUTS.get(name, 400), seed=1)
    assert found.keys() <= {"refused", "taken", "slowest, ms"}, found
    assert name == "rewards" or found["refused"] > 0.3 * INPUTS.get(name, 400)
