"""What a run writes down: metrics as JSON lines and TensorBoard, samples as JSON lines,
and where the time goes."""

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from tensorboardX import SummaryWriter


class Writer:
    """Writes `metrics.jsonl`, `tensorboard/` and `rollouts/step_*.jsonl` of a workdir."""

    def __init__(self, workdir: str | epath.Path, *, next_step: int):
        """Drops metrics and samples from `next_step` on: they will be written again.

        Args:
            workdir: must exist.
            next_step: the first step this process will write; 0 for a new run.
        """
        self._workdir = epath.Path(workdir)
        path = self._workdir / "metrics.jsonl"
        kept = []
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) < next_step]
        path.write_text("".join(kept))
        for file in self._rollouts.glob("step_*.jsonl"):
            if int(file.stem.removeprefix("step_")) >= next_step:
                file.unlink()
        self._file = path.open("a")
        # Purges what a killed run may have shown beyond its checkpoint.
        self._tensorboard = SummaryWriter(
            str(self._workdir / "tensorboard"), purge_step=next_step, write_to_disk=True
        )

    @property
    def _rollouts(self) -> epath.Path:
        return self._workdir / "rollouts"

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line {'step': step, name: number, ...}; nan and inf become null."""
        numbers = {name: float(value) for name, value in values.items()}
        finite = {name: x if math.isfinite(x) else None for name, x in numbers.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        for name, x in numbers.items():
            self._tensorboard.add_scalar(name, x, step)

    def write_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes the samples of one step as one file, a JSON line each."""
        self._rollouts.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (self._rollouts / f"step_{step:06d}.jsonl").write_text(text)

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def require_finite(
    values: Mapping[str, float],
    batch: Mapping[str, Any],
    workdir: str | epath.Path,
    step: int,
) -> None:
    """Stops the run on a loss or gradient that is not a number, its batch saved.

    Raises:
        FloatingPointError: `loss` or `grad_norm` is nan or infinite.
    """
    if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
        return
    path = epath.Path(workdir) / f"not_finite_step_{step:06d}.npz"
    with path.open("wb") as file:
        np.savez(file, **batch)
    raise FloatingPointError(
        f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}; the batch "
        f"is in {path}, the last checkpoint is from before it"
    )


def _step_of(line: str) -> float:
    """The step of a metrics line; a line cut off by a kill counts as beyond the end."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return math.inf


class Stopwatch:
    """Seconds by phase, since the last `lap`."""

    def __init__(self):
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def lap(self) -> dict[str, float]:
        """{'seconds/PHASE': ..., 'seconds/step': all since the last lap}."""
        now = time.perf_counter()
        seconds = {f"seconds/{name}": s for name, s in self._seconds.items()}
        seconds["seconds/step"] = now - self._start
        self._start, self._seconds = now, {}
        return seconds
