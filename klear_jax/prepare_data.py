"""Makes data sets.

    python -m klear_jax.prepare_data --config=configs/data/sft.py [--config.KEY=VALUE ...]

of raw files: parsed, cleaned, tokenised, as the config says; the same command goes on with
what was begun.

    python -m klear_jax.prepare_data --output=DIR

of small problems that we make ourselves, with a tokenizer for them.
"""

import json
import tempfile
from collections.abc import Mapping
from typing import Any

from absl import flags
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

# Our own set of flags, so that importing this file defines none for others.
_FLAGS = flags.FlagValues()
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write to.", _FLAGS)
_TASK = flags.DEFINE_list(
    "task",
    ["chain_sum"],
    "The problems, a data set each: programs, or one of reasoning-gym's "
    f"{', '.join(arithmetic.TASKS)}.",
    _FLAGS,
)
_NUM_PROBLEMS = flags.DEFINE_integer(
    "num_problems",
    60_000,
    "Problems to draw; repeated ones are dropped. Of programs, at most as many as there are.",
    lower_bound=1,
    flag_values=_FLAGS,
)
_SEED = flags.DEFINE_integer(
    "seed", 0, "Of the draw.", lower_bound=0, flag_values=_FLAGS
)
_DIRECT_SHARE = flags.DEFINE_float(
    "direct_share",
    0.5,
    "Share of responses without a chain of thought.",
    lower_bound=0,
    upper_bound=1,
    flag_values=_FLAGS,
)
_GENERATOR = flags.DEFINE_list(
    "generator",
    [],
    "Settings of reasoning-gym's task, such as min_terms=3,max_terms=4.",
    _FLAGS,
)
_HELP = flags.DEFINE_boolean("help", False, "Show this.", _FLAGS)


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
        pairs = [assignment.split("=") for assignment in assignments]
        return {key: int(value) for key, value in pairs}
    except ValueError as error:
        raise InputError(
            f"--generator={','.join(assignments)} is not KEY=INTEGER,..."
        ) from error


def main(argv: list[str]) -> None:
    """The command, see above."""
    if any(arg.lstrip("-").startswith("config") for arg in argv[1:]):
        _prepare_files(argv)
    else:
        _make_problems(argv)


def _prepare_files(argv: list[str]) -> None:
    given = config.parse_flags(argv, __doc__, {"output": "In place of config.output."})
    values = given.config.to_dict()
    if given.output:
        values["output"] = given.output
    path = prepare.prepare(config.build(prepare.PrepareConfig, values))
    summary = json.loads((path / "report.json").read_text())
    print(report.as_markdown(summary))
    print(f"data set  {path}\nreport    {path / 'report.md'}")


def _make_problems(argv: list[str]) -> None:
    try:
        rest = _FLAGS(argv)[1:]
    except flags.Error as error:
        raise InputError(f"in the flags: {error}") from error
    if _HELP.value:
        print(f"{__doc__}\n{_FLAGS.get_help()}")
        return
    if rest or not _OUTPUT.value:
        raise InputError(
            f"--output=DIR is needed, and no arguments beside flags: {rest}"
        )
    settings = [
        {
            "task": task,
            "num_problems": _NUM_PROBLEMS.value,
            "seed": _SEED.value,
            "direct_share": _DIRECT_SHARE.value,
            "generator": _generator(_GENERATOR.value),
        }
        for task in _TASK.value
    ]
    for path in make_problems(_OUTPUT.value, *settings):
        print(counts_table(path))
        print(f"data set   {path}")
    print(f"tokenizer  {epath.Path(_OUTPUT.value) / 'tokenizer'}")


if __name__ == "__main__":
    config.run_main(main)
