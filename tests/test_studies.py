"""The studies: every variant is a config, and the page's numbers are those of its runs."""

import json
import pathlib
import re

import numpy as np
import pytest

from configs.study import setting
from klear_jax import train
from tests.bench import study, study_page

FOLDER = pathlib.Path(__file__).parent.parent / "configs" / "study"
SETTINGS = {"setting", "programs"}
NAMES = sorted({file.stem for file in FOLDER.glob("*.py")} - SETTINGS)


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_is_a_config_of_its_own(name):
    one = study.load(name)
    assert one.name == name and len(one.seeds) >= 4
    found = []
    for variant in one.variants:
        task, parsed = train.parse(study.config_of(one, variant, seed=5).to_dict())
        assert task == "gppo"
        sft = {"setting": "sft_1", "programs": "sft_code_1"}[one.setting]
        assert parsed.seed == 5 and parsed.init_from == f"runs/study/{sft}"
        assert parsed not in found, variant
        found.append(parsed)


def test_what_the_setting_was_chosen_on_is_not_compared():
    compared, exploring, others = (
        {study.sft_seed(seed) for seed in seeds}
        for seeds in (range(32), setting.EXPLORING_SEEDS, setting.OTHER_SEEDS)
    )
    assert compared == {0, 1, 2, 3} and exploring == {100, 101} and len(others) == 12
    assert not others & (compared | exploring)


def made_up(end):
    none = {kind: [10, 0, 0.0, 0.0] for kind in study.KINDS}
    one, three = [10, 1, 0.5, np.log(0.5)], [10, 3, 0.5, np.log(0.5)]
    masses = {f"grad_mass/{side}": [0.1, None, 0.3] for side in ("low", "high", "dual")}
    return {
        "cpu": "a 1 2",
        "seconds": 30.0 + 20 * end,
        "clipped": {
            "low": none | {"at once": one if end > 0.7 else three},
            "high": none,
        },
        "metrics": masses
        | {
            "reward/correct": [0.5, 0.7, 0.7],
            "eval/avg@8": [None, None, end],
            "entropy": [0.3, 0.1, None],  # The last step had no update.
            "grad_norm_max": [1.0, 2.0, None],
            "ratio/max": [1.5, 20.1, None],
            "clip_movable/dual": [0.0, 0.01, None],
        },
    }


def cells(table):
    """Variant -> what stands in its line."""
    _, _, *lines = (line.strip("| ").split(" | ") for line in table.splitlines())
    return {name: found for name, *found in lines}


STARTS = {seed: {"avg@8": 0.5, "pass@8": 0.9} for seed in (0, 1)}


def test_differences_are_paired_and_to_the_first_of_the_same_rate():
    ends = {
        "a, low": (0.8, 0.8, 0.8, 0.8),
        "b, low": (0.7, 0.6, 0.4, 0.2),
        "a, high": (0.5, 0.5, 0.5, 0.5),
        "b, high": (0.6, 0.6, 0.6, 0.6),
    }
    seeds = (0, 4, 1, 5)  # Two from each of two checkpoints.
    runs = {
        name: dict(zip(seeds, map(made_up, found), strict=True))
        for name, found in ends.items()
    }
    table = study_page.outcomes(runs, STARTS)
    one = setting.Study("x", "?", dict(zip(ends, [{}] * 4, strict=True)), range(6), "")
    assert "low: accuracy" in study_page.figure(one, runs)
    found = cells(table)
    assert found["a, low"][2:6] == found["a, high"][2:6] == [""] * 4
    # -10, -20 and -40, -60: means -15 and -50, and 12.7 = t(1 degree of freedom) x 17.5.
    mean, each, other, would_show = found["b, low"][2:6]
    # Both of a checkpoint the lower run, in 1 of 16 draws: sqrt(2) x (5 + 10) / 2 below.
    assert mean == "-32.5 (-43.1 to -21.9)"
    assert each == "-15.0, -50.0" and other == "-254.9 to +189.9"
    # Within: (2 x 5^2 + 2 x 10^2) / 2 = 125; sqrt(125 / 4) = 5.59; t: 4.303 + 1.061.
    assert would_show == "30.0"
    assert found["b, low"][6:] == ["2", "1"]
    assert found["b, high"][2:4] == ["+10.0 (+10.0 to +10.0)", "+10.0, +10.0"]


def test_an_interval_holds_the_mean_as_often_as_it_says():
    """Of runs that differ by checkpoint: for these checkpoints, 95 of 100 times."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        values = {seed: seed % 4 + rng.normal() for seed in range(32)}
        low, high = (
            study_page.interval(values, "{:.4f}").split("(")[1][:-1].split(" to ")
        )
        held += float(low) < 150 < float(high)
    assert 182 <= held <= 198


def test_how_runs_went_by_hand():
    runs = {"a": {0: made_up(0.8), 4: made_up(0.6)}}
    assert cells(study_page.courses(runs))["a"] == [
        "14.1",
        "0.100",
        "2.0",
        "20",
        "2",  # One of each run.
        "2.5%, 0%, 0.5%",
        "20%, 20%, 20%",
    ]
    assert cells(study_page.kinds(runs))["a"] == ["20.0%, 0.50"] + ["0%"] * 7
    assert not list(study_page.places(runs))  # Of earlier runs it is not recorded.
    for run in runs["a"].values():
        none = [10, 0, 0.0, 0.0]
        low = {"right": [10, 1, 0.5, np.log(0.5)], "mistake": [4, 3, 0.5, np.log(0.25)]}
        run["clipped_places"] = {
            "low": low | {"after": none},
            "high": dict.fromkeys(study.PLACES, none),
        }
    [table] = study_page.places(runs)
    assert (
        cells(table)["a"] == ["10.0%, 0.50, 25%", "75.0%, 0.25, 75%"] + ["0%, 0%"] * 4
    )
    assert study_page.begin(runs, STARTS) == (
        "2 runs of 44 s (median) on one core, from checkpoints whose avg@8 (pass@8) is 50 (90). "
        "CPU: a 1 2."
    )


def test_what_two_studies_share_is_run_once(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    rows = [{"variant": "gppo, high", "seed": s} for s in (3, 30)]
    rows += [{"variant": "cispo, high", "seed": 3}]
    (tmp_path / "clip.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "dual.jsonl").write_text('{"variant": "dual 3", "seed": 3}\n')
    found = {name: set(study.recorded(study.load(name))) for name in NAMES}
    assert found == {
        "alpha": {("alpha 0.1, high", 3)},
        "beta_low": {("beta_low 1", 3), ("beta_low 1", 30)},
        "checkpoints": set(),
        "clip": {("gppo, high", 3), ("gppo, high", 30), ("cispo, high", 3)},
        "dual": {("dual 10", 3), ("dual 3", 3)},
        "explore": set(),
        "explore_soft": set(),
        "filter": set(),
        "rates": {("gppo, 0.0005", 3)},
        "soft": set(),
    }


def test_a_line_that_was_cut_off_is_not_a_run(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"variant": "a", "seed": 0}\n{"variant": "b", "se')
    assert list(study.read(file)) == [("a", 0)]
    assert file.read_text().endswith('"se')  # Another process may be writing it.
    study.cut_tail(file)
    assert file.read_text() == '{"variant": "a", "seed": 0}\n'
    assert (
        np.isclose(study.round_(0.123456789), 0.123457) and study.round_(None) is None
    )


class Words:
    """A tokenizer whose tokens are the signs, and the two marks."""

    def encode(self, text):
        return re.findall("<think>|</think>|.", text)


HALF = float(np.log(0.5))


def clipped(samples, sorts, sort):
    return study.clipped(samples, sorts, sort, setting.get_config().loss)


def test_which_kinds_were_clipped_by_hand():
    thinks = {
        "advantage": -0.5,
        "tokens": ["<think>", "1", "2", "</think>", "3"],
        "old_logp": [0.0, HALF, HALF, HALF, HALF],
        "log_ratio": [-1.0, -0.1, -0.3, None, -0.5],
    }
    answers = {
        "advantage": 2.0,
        "tokens": ["<think>", "</think>", "3"],
        "old_logp": [0.0, HALF, HALF],
        "log_ratio": [0.0, 0.5, 0.2],
    }
    not_used = {"advantage": None}
    samples = [thinks, answers, not_used]
    got = clipped(samples, study.KINDS, study.kinds_of(Words()))
    assert got["low"]["think"] == [1, 0, 0.0, 0.0]
    # The end of the chain had no ratio.
    assert got["low"]["chain"] == [1, 1, 0.5, -0.3]
    assert got["low"]["answer"] == [1, 1, 0.5, -0.5]
    assert got["high"]["at once"] == [1, 1, 0.5, 0.5]
    assert got["high"]["answer"] == [1, 0, 0.0, 0.0]
    assert got["low"]["at once"] == got["high"]["chain"] == [0, 0, 0.0, 0.0]


def test_where_a_chain_was_clipped_by_hand():
    def sample(response, advantage, log_ratios):
        mine = Words().encode(response)
        return {
            "prompt": "7+5-3=",
            "advantage": advantage,
            "tokens": mine,
            "old_logp": [HALF] * len(mine),
            "log_ratio": [0.0] * (len(mine) - len(log_ratios)) + log_ratios,
        }

    assert setting.right_response("7+5-3=") == r"<think>7+5=12;12-3=9</think>\boxed{9}"
    samples = [
        # Right up to the 1; the 3 is a mistake. The ratios are those of =, 1, 3, ; and 13-.
        sample("<think>7+5=13;13-", -1.0, [-1.0, -0.1, -0.5, -0.3, 0.0, 0.0, 0.0]),
        sample("<think></think>", -1.0, [-1.0, -1.0]),
        sample(r"<think>7+5=12;12-3=9</think>\boxed{9}E", 1.0, [0.5, 0.7]),
    ]
    got = clipped(samples, study.PLACES, study.places_of(Words()))
    assert got["low"] == {
        "right": [6, 1, 0.5, -1.0],
        "mistake": [1, 1, 0.5, -0.5],
        "after": [4, 1, 0.5, -0.3],
    }
    assert got["high"]["right"] == [25, 2, 0.5, 0.6]
