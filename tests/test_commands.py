"""Every command: what --help says, and one sentence for what it cannot do."""

import importlib

import pytest

from klear_jax.errors import InputError

TINY = "--config=configs/gppo_tiny.py"
NAMES = "train evaluate generate prepare_data export plan report".split()


def run(name, *args):
    module = importlib.import_module(f"klear_jax.{name}")
    module.main([name, *args])


@pytest.mark.parametrize("name", NAMES)
def test_help_has_the_command_and_every_flag(name, capsys):
    with pytest.raises(SystemExit) as exit_:
        run(name, "--help")
    assert not exit_.value.code
    text = capsys.readouterr().out
    assert f"python -m klear_jax.{name}" in text
    flags = [line for line in text.splitlines() if line.startswith("  --")]
    assert len(flags) >= 2 and all(": " in line for line in flags)
    assert max(map(len, text.splitlines())) <= 130


@pytest.mark.parametrize(
    "command, sentence",
    [
        *((f"{name} --zzz=1", "unknown flag --zzz; there are ") for name in NAMES),
        ("train", r"--config=FILE is missing, for instance --config=configs/gppo_tiny"),
        ("train --config=none.py", "there is no config file none.py"),
        (f"train {TINY} --workdr=x", "unknown flag --workdr; did you mean 'workdir'?"),
        (f"train {TINY} extra", r"unknown arguments \['extra'\]: flags begin with --"),
        (
            f"train {TINY} --config.seeed=1",
            "unknown key config.seeed; did you mean 'see",
        ),
        (
            f"train {TINY} --profile=x",
            "--profile=x must be a step or the first and last",
        ),
        (
            f"train {TINY} --config.tokenizer=none --workdir=w",
            "none is no tokenizer.json",
        ),
        ("evaluate", "--config=FILE is missing"),
        (
            f"evaluate {TINY} --model=none",
            "none is neither a Hugging Face folder nor the",
        ),
        (f"evaluate {TINY} --output=x.md", r"--output=x.md must end in .json"),
        ("generate", "name the model by one of --workdir=DIR and --model=FOLDER"),
        (
            "generate --model=none --prompt=x",
            "none is neither a Hugging Face folder nor",
        ),
        (
            "generate --model=a --num_samples=0",
            "--num_samples must be at least 1, not 0",
        ),
        ("prepare_data --task=gcd", "--output=DIR is needed"),
        (
            "prepare_data --config=configs/data/sft.py --task=gcd",
            "--task is of small problems, not of a config",
        ),
        ("prepare_data --config=none.py", "there is no config file none.py"),
        ("export --workdir=none --output=out", "none is neither a Hugging Face folder"),
        ("export --workdir=none", "both are needed: --workdir=DIR and --output=DIR"),
        (
            "export --workdir=a --output=b --dtype=int8",
            "--dtype must be float32 or bfloa",
        ),
        (f"plan {TINY}", "name the chips to plan for: --topology=v5p:4x4x4"),
        (f"plan {TINY} --topology=v5q:2x2", "no chip is called 'v5q'; there are v4, v"),
        (f"plan {TINY} --topology=cpu:x", "--topology=cpu:x: say cpu:8 for 8 devices"),
        ("report", "--workdir=DIR is missing: which run is to be shown?"),
        ("report --workdir=none", "none holds no run: there is no config.json"),
        ("report --workdir=none --steps=a", "--steps must be numbers such as 10,20"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(command, sentence, tmp_path, monkeypatch):
    for name in ("configs", "klear_jax"):
        (tmp_path / name).symlink_to(__file__.replace("tests/test_commands.py", name))
    monkeypatch.chdir(tmp_path)
    name, *args = command.split()
    with pytest.raises(InputError, match=sentence) as error:
        run(name, *args)
    assert "\n" not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"configs", "klear_jax"}
