"""The studies: every variant is a config, and the page's numbers are those of its runs."""

import json
import pathlib

import numpy as np
import pytest

from configs.study import setting
from klear_jax import train
from tests.bench import study, study_page

FOLDER = pathlib.Path(__file__).parent.parent / "configs" / "study"
NAMES = sorted({file.stem for file in FOLDER.glob("*.py")} - {"setting"})


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_is_a_config_of_its_own(name):
    one = study.load(name)
    assert one.name == name and len(one.seeds) >= 8
    found = []
    for variant in one.variants:
        task, parsed = train.parse(study.config_of(one, variant, seed=5).to_dict())
        assert task == "gppo"
        assert parsed.seed == 5 and parsed.init_from == "runs/study/sft_1"
        assert parsed not in found, variant
        found.append(parsed)


def test_what_the_setting_was_chosen_on_is_not_compared():
    assert not set(setting.SFT_SEEDS) & set(setting.EXPLORING_SFT_SEEDS)
    seeds = {study.sft_seed(seed) for seed in setting.EXPLORING_SEEDS}
    assert seeds == set(setting.EXPLORING_SFT_SEEDS)
    assert {study.sft_seed(seed) for seed in range(32)} == set(setting.SFT_SEEDS)


def made_up(end, first=0.5, ratio=1.5):
    none = {kind: [10, 0, 0.0, 0.0] for kind in study.KINDS}
    one, three = [10, 1, 0.5, np.log(0.5)], [10, 3, 0.5, np.log(0.5)]
    return {
        "cpu": "a 1 2",
        "seconds": 30.0 + 20 * end,
        "clipped": {
            "low": none | {"at once": one if end > 0.7 else three},
            "high": none,
        },
        "metrics": {
            "reward/correct": [first, 0.7],
            "reward/any_correct": [0.75, 1.0],
            "eval/avg@8": [None, end],
            "entropy": [0.3, 0.1],
            "grad_norm_max": [1.0, 2.0],
            "ratio/max": [ratio, None],
            **{
                f"{name}/{side}": [0.1, 0.3 if side == "low" else 0.1]
                for name in ("clip_movable", "grad_mass")
                for side in ("low", "high")
            },
        },
    }


def test_a_difference_is_to_the_first_of_the_same_rate():
    names = ("a, low", "b, low", "a, high", "b, high")
    one = setting.Study("x", "?", {key: {} for key in names}, seeds=range(1), paper="")
    ends = dict(zip(names, (0.8, 0.7, 0.5, 0.6), strict=True))
    runs = {(name, 0): made_up(end) for name, end in ends.items()}
    found = [line.split(" | ")[4] for line in study_page.table(one, runs).splitlines()]
    assert found[2:] == ["", "-10.0 (-10.0 to -10.0)", "", "+10.0 (+10.0 to +10.0)"]
    assert "low: accuracy" in study_page.figure(one, runs)


def test_a_table_by_hand():
    one = setting.Study("x", "?", {"a": {}, "b": {}}, seeds=range(2), paper="")
    runs = {
        ("a", 0): made_up(0.8),
        ("a", 4): made_up(0.6),  # From the same checkpoint.
        ("b", 0): made_up(0.9),
        ("b", 4): made_up(0.4),  # It began with 0.5.
    }
    *_, a, b = study_page.table(one, runs).splitlines()
    assert a.startswith(
        "| a | 2 | 70.0 (60.0 to 80.0) | 14.1 |  | 0 | 0.100 | 2.0, inf |"
    )
    assert a.endswith("| 20.0%, 10.0% | 20.0%, 10.0% |")
    assert b.startswith(
        "| b | 2 | 65.0 (40.0 to 90.0) | 35.4 | -5.0 (-20.0 to +10.0) | 1 |"
    )
    assert "<svg" in study_page.figure(one, runs)
    assert study_page.begin(runs) == (
        "The SFT checkpoints begin with 50% (75%) right, of a prompt's eight samples at least "
        "one in brackets. A run takes 44 s (median) on one core. CPU: a 1 2."
    )
    *_, a, b = study_page.kinds(one, runs).splitlines()
    assert a == "| a | 20.0%, 0.50 | 0% | 0% | 0% | 0% | 0% | 0% | 0% |"


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
        "clip": {("gppo, high", 3), ("gppo, high", 30), ("cispo, high", 3)},
        "dual": {("dual 10", 3), ("dual 3", 3)},
        "explore": set(),
        "filter": set(),
        "rates": {("gppo, 0.0005", 3)},
    }


def test_a_line_that_was_cut_off_is_not_a_run(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"variant": "a", "seed": 0}\n{"variant": "b", "se')
    assert list(study.read(file)) == [("a", 0)]
    assert file.read_text() == '{"variant": "a", "seed": 0}\n'
    assert study.read(tmp_path / "none") == {}
    assert (
        np.isclose(study.round_(0.123456789), 0.123457) and study.round_(None) is None
    )


def test_what_was_clipped_by_hand():
    loss = setting.get_config().loss
    half = float(np.log(0.5))
    thinks = {
        "advantage": -0.5,
        "tokens": [7, 1, 2, 9, 3],  # 9 ends the chain.
        "old_logp": [0.0, half, half, half, half],
        "log_ratio": [-1.0, -0.1, -0.3, None, -0.5],
    }
    answers = {
        "advantage": 2.0,
        "tokens": [7, 9, 3],
        "old_logp": [0.0, half, half],
        "log_ratio": [0.0, 0.5, 0.2],
    }
    not_used = {"advantage": None}
    got = study.clipped([thinks, answers, not_used], 9, loss)
    assert got["low"]["think"] == [1, 0, 0.0, 0.0]
    # The end of the chain had no ratio.
    assert got["low"]["chain"] == [1, 1, 0.5, -0.3]
    assert got["low"]["answer"] == [1, 1, 0.5, -0.5]
    assert got["high"]["at once"] == [1, 1, 0.5, 0.5]
    assert got["high"]["answer"] == [1, 0, 0.0, 0.0]
    assert got["low"]["at once"] == got["high"]["chain"] == [0, 0, 0.0, 0.0]
