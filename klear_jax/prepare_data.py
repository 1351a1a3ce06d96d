"""Makes data sets.

    python -m klear_jax.prepare_data --config=configs/data/sft.py [--config.KEY=VALUE ...]

of raw files: parsed, cleaned, tokenised, as the config says; the same command goes on with
what was begun.

    python -m klear_jax.prepare_data --output=DIR

of small problems that we make ourselves, with a tokenizer for them.
"""

import json
import tempfile
import types
from collections.abc import Mapping
from typing import Any

from etils import epath

from klear_jax import config, tokens
from klear_jax.data import (
    arithmetic,
    builders,
    examples,
    prepare,
    programs,
    report,
    shards,
)
from klear_jax.errors import InputError

FLAGS = {
    "output": "Folder to write to; with --config, in place of config.output.",
    "task": "Small problems, a data set each, with commas: programs, and of reasoning-gym "
    f"{', '.join(arithmetic.TASKS)}; chain_sum by default.",
    "num_problems": "Small problems to draw, 60000 by default; repeated ones are dropped.",
    "seed": "Of the draw, 0 by default.",
    "direct_share": "Share of responses without a chain of thought, 0.5 by default.",
    "generator": "Settings of reasoning-gym's task, such as min_terms=3,max_terms=4.",
}


def make_problems(
    output: epath.PathLike, *settings: Mapping[str, Any]
) -> list[epath.Path]:
    """Writes data sets under output and one tokenizer for all to output/tokenizer.

    What is already there is kept, if it was made with the same settings.

    Args:
      output: the folder.
      settings: of each data set: its `task`, and the arguments of
        `arithmetic.make_problems`.

    Returns:
      The folders of the data sets, such as <output>/arithmetic/<version>.

    Raises:
      InputError: bad settings, or others than those of a data set in the folder.
    """
    output = epath.Path(output)
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file, not a folder")
    paths = [_prepare_one(output, one) for one in settings]
    folder = output / "tokenizer"
    if (folder / "tokenizer_config.json").exists():  # Written last.
        print(f"{folder} is there already")
        return paths
    rows = [row for path in paths for row in examples.read_examples(path, "sft")]
    symbols = arithmetic.SYMBOLS
    if any(one["task"] == "programs" for one in settings):
        symbols += programs.SYMBOLS
    texts = [row.problem + (row.response or "") for row in rows]
    tokens.train_sentencepiece(texts, folder, symbols=symbols)
    return paths


def _prepare_one(output: epath.Path, settings: Mapping[str, Any]) -> epath.Path:
    make = builders.Arithmetic
    if settings["task"] == "programs":
        make = builders.Programs
    builder = make(data_dir=output, settings=settings)
    path = epath.Path(builder.data_dir)
    if path.exists():
        made_with = json.loads(shards.read_builder(path).info.metadata["settings"])
        if made_with != settings:
            other = [key for key in settings if made_with[key] != settings[key]]
            raise InputError(
                f"{path} was made with another"
                f" {', '.join(f'{key} ({made_with[key]})' for key in other)}:"
                " choose another folder"
            )
        print(f"{path} is there already")
        return path
    # Nothing is downloaded, but TFDS makes the folder for it.
    with tempfile.TemporaryDirectory() as scratch:
        builder.download_and_prepare(download_dir=scratch)
    return path


def counts_table(path: epath.PathLike) -> str:
    """A line a split of the data set in path: problems drawn, kept, dropped and why."""
    info = shards.read_builder(path).info
    dropped = json.loads(info.metadata["dropped"])
    head = ["split", "drawn", "kept", *arithmetic.DROP_REASONS]
    lines = [head]
    for split, counts in dropped.items():
        kept = info.splits[split].num_examples
        lines.append([split, kept + sum(counts.values()), kept, *counts.values()])
    return "\n".join(
        "  ".join(f"{cell:>{len(name)}}" for cell, name in zip(line, head, strict=True))
        for line in lines
    )


def _generator(assignments: list[str]) -> dict[str, int]:
    try:
        pairs = [assignment.split("=") for assignment in assignments if assignment]
        return {key: int(value) for key, value in pairs}
    except ValueError as error:
        raise InputError(
            f"--generator={','.join(assignments)} is not KEY=INTEGER,..."
        ) from error


def main(argv: list[str]) -> None:
    """The command, see above."""
    of_files = any(arg.lstrip("-").startswith("config") for arg in argv[1:])
    flags = config.parse_flags(argv, __doc__, FLAGS, with_config=of_files)
    if of_files:
        _prepare_files(flags)
    else:
        _make_problems(flags)


def _prepare_files(flags: types.SimpleNamespace) -> None:
    if other := [n for n in FLAGS if n != "output" and getattr(flags, n) is not None]:
        raise InputError(f"--{other[0]} is of small problems, not of a config")
    values = flags.config.to_dict()
    if flags.output:
        values["output"] = flags.output
    path = prepare.prepare(config.build(prepare.PrepareConfig, values))
    summary = json.loads((path / "report.json").read_text())
    print(report.as_markdown(summary))
    print(f"data set  {path}\nreport    {path / 'report.md'}")


def _make_problems(flags: types.SimpleNamespace) -> None:
    if not flags.output:
        raise InputError("--output=DIR is needed: the folder to write to")
    settings = {
        "num_problems": config.number(flags, "num_problems", int, 60_000),
        "seed": config.number(flags, "seed", int, 0),
        "direct_share": config.number(flags, "direct_share", float, 0.5),
        "generator": _generator((flags.generator or "").split(",")),
    }
    if settings["num_problems"] < 1 or settings["seed"] < 0:
        raise InputError("--num_problems must be at least 1, and --seed at least 0")
    if not 0 <= settings["direct_share"] <= 1:
        raise InputError(f"--direct_share={flags.direct_share} must be from 0 to 1")
    tasks = (flags.task or "chain_sum").split(",")
    for path in make_problems(flags.output, *({"task": t, **settings} for t in tasks)):
        print(counts_table(path))
        print(f"data set   {path}")
    print(f"tokenizer  {epath.Path(flags.output) / 'tokenizer'}")


if __name__ == "__main__":
    config.run_main(main)
