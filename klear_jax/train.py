"""Trains a model as a config says.

    python -m klear_jax.train --config=configs/gppo_tiny.py [--workdir=DIR] [--config.KEY=VALUE ...]
        [--profile=10-12]

The same command, given again, resumes from the newest checkpoint of the workdir. On a pod it
is given on every host, see launch/; the workdir is then on storage that all of them share.
"""

from collections.abc import Callable
from typing import Any

from klear_jax import config, gppo, hosts, progress, sft
from klear_jax.errors import InputError

TASKS: dict[str, tuple[type, Callable[..., None]]] = {
    "sft": (sft.SftConfig, sft.run),
    "gppo": (gppo.GppoConfig, gppo.run),
}


def main(argv: list[str]) -> None:
    """The command, see above."""
    texts = {
        "workdir": "Where all of the run is written, and resumed from.",
        "profile": "A step, or first-last: JAX's profile of them goes to WORKDIR/profile.",
    }
    flags = config.parse_flags(argv, __doc__, texts)
    profile = progress.parse_steps(flags.profile)
    values = flags.config.to_dict()
    if flags.workdir:
        values["workdir"] = flags.workdir
    task, parsed = parse(values)
    hosts.join()
    _, run = TASKS[task]
    run(parsed, profile)


def parse(values: dict[str, Any]) -> tuple[str, Any]:
    """A config's dict -> its task, and the frozen dataclass that the task runs on."""
    values = dict(values)
    task = values.pop("task", None)
    if not isinstance(task, str) or task not in TASKS:
        raise InputError(f"config.task must be one of {sorted(TASKS)}, not {task!r}")
    if not values.get("workdir"):
        raise InputError("name where to write the run: --workdir=DIR or config.workdir")
    cls, _ = TASKS[task]
    return task, config.build(cls, values)


if __name__ == "__main__":
    config.run_main(main)
