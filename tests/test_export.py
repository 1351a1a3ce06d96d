"""Model cards: what they say of a run is what its config and checkpoint say."""

import dataclasses
import importlib
import json
import pathlib

import jax.numpy as jnp
import pytest
from etils import epath

from klear_jax import export, train

CONFIGS = sorted(
    file.relative_to(file.parents[1 + ("variants" in file.parts)])
    for file in (pathlib.Path(__file__).parent.parent / "configs").rglob("*.py")
    if file.parent.name in ("configs", "variants") and file.stem != "sections"
)


def make_about(file, **changes):
    """What a checkpoint of the config would say of itself."""
    module = importlib.import_module(".".join(file.with_suffix("").parts))
    _, c = train.parse(module.get_config().to_dict())
    config = json.loads(json.dumps(dataclasses.asdict(c) | changes))
    return c, {"steps_done": 7, "config": config, "versions": {"jax": "0.1"}}


@pytest.mark.parametrize("file", CONFIGS, ids=str)
def test_every_config_has_its_card(file, tmp_path):
    c, about = make_about(file)
    dtype = jnp.dtype("float32")
    text = export.card("name", c.model, 1_234, dtype, about, epath.Path(tmp_path))
    head, fields, body = text.split("---\n", 2)
    assert head == ""
    assert "library_name: transformers\n" in fields
    assert "base_model" not in fields
    assert "None" not in body and "{" not in body.replace('[{"role"', "").replace(
        '"..."}]', ""
    )
    assert "1,234 parameters (float32)" in body
    assert f"`{c.data.path}`" in body
    assert f"learning rate {c.optim.peak_lr:g}" in body
    assert "7 of" in body or not c.num_steps
    assert "## Results" not in body
    if "rollout" in about["config"]:
        assert "- gppo\n" in fields
        assert f"at temperature {c.rollout.temperature:g}" in body
    else:
        assert "- sft\n" in fields
        assert "Supervised fine-tuning" in body


LOSS = {
    "kind": "gppo",
    "clip_low": 0.2,
    "clip_high": 0.28,
    "beta_low": 1.0,
    "beta_high": 1.0,
    "dual_clip": None,
    "beta_dual": 0.0,
}


@pytest.mark.parametrize(
    "changes, said",
    [
        ({}, ["GPPO's: ", "[0.8, 1.28], and a token beyond keeps the gradient", "d."]),
        ({"beta_low": 0.25}, ["at the bound, times 0.25 below and 1 above."]),
        ({"kind": "gppo_only_high"}, ["on the high side alone", "one below has none."]),
        (
            {"kind": "clip_higher"},
            ["clip-higher's: ", "a token beyond has no gradient"],
        ),
        ({"kind": "cispo"}, ["CISPO's: ", "[0.8, 1.28], and weighs the gradient"]),
        (
            {"dual_clip": 10.0},
            ["a ratio counts 10 at most, without a gradient beyond."],
        ),
        (
            {"dual_clip": 3.0, "beta_dual": 0.5},
            ["a ratio counts 3 at most, with 0.5 times its gradient beyond."],
        ),
    ],
    ids=str,
)
def test_the_clip_in_words(changes, said):
    text = export.clip_in_words(LOSS | changes)
    assert all(part in text for part in said)
    assert ("counts" in text) == ("dual_clip" in changes)


def test_the_base_model_is_told_where_a_path_tells_it(tmp_path):
    hub = "/home/x/hub/models--Qwen--Qwen3-8B-Base/snapshots/49e3418f"
    assert export.base_model(hub) == "Qwen/Qwen3-8B-Base"
    assert export.base_model("models/Qwen3-8B-Base") == ""
    assert export.base_model("") == ""
    run = tmp_path / "sft"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"init_from": hub}))
    assert export.base_model(str(run)) == "Qwen/Qwen3-8B-Base"


def test_results_are_those_of_the_checkpoint(tmp_path):
    """Of a run that went on; of an evaluation of this checkpoint, not of another."""
    [file] = [file for file in CONFIGS if file.stem == "gppo_tiny"]
    _, about = make_about(file)
    lines = [
        {"step": step, "reward/mean": step / 10, "entropy": None} for step in range(9)
    ]
    lines[4] |= {"eval/avg@8": 0.5, "eval/avg@8_low": 0.4, "eval/avg@8_high": 0.625}
    for line in (lines[4], lines[8]):
        line |= {"eval/accuracy": 0.5, "eval/problems": 64.0, "eval/length": 20.25}
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 9, "rew')
    evaluation = about["config"]["evaluation"] | {"temperature": 0.125}
    found = {"greedy": 0.75, "greedy_low": 0.5, "greedy_high": 1.0, "problems": 12}
    found |= {"evaluation": evaluation, "steps_done": 7, "run": "a"}
    about |= {"config_sha256": "a", "steps_done": 7}

    def results():
        (tmp_path / "evaluation.json").write_text(json.dumps(found))
        return "\n".join(export.results(epath.Path(tmp_path), about))

    text = results()
    assert "| `reward/mean` | 0.6 |" in text
    assert "entropy" not in text
    assert "64 problems" in text and "During training, after 5 steps" in text
    assert "| avg@8 | 50.0% | 40.0% to 62.5% |" in text
    assert "| length | 20.2 tokens |  |" in text
    assert "12 problems" in text and "temperature 0.125" in text
    assert "| greedy | 75.0% | 50.0% to 100.0% |" in text
    found["run"] = "b"  # Of as many steps of another.
    assert "greedy" not in results()
    found |= {"steps_done": 8, "run": "a"}
    assert "greedy" not in results()
    del found["steps_done"]  # Of an older version.
    assert "greedy" not in results()
    del lines[6:]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    assert "The last step" not in results()
