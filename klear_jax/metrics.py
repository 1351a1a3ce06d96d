"""What a run writes down: metrics as JSON lines, TensorBoard and, on wish, Weights & Biases,
samples as JSON lines, what was compiled; and the metrics that sum up a step."""

import contextlib
import importlib.util
import itertools
import json
import logging
import math
import os
import pathlib
import re
import shutil
import tempfile
import time
import types
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.monitoring
import numpy as np
from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from klear_jax import hosts, losses
from klear_jax.errors import InputError

PUBLISH_S = 60


def check_wandb(project: str) -> None:
    """An InputError if Weights & Biases is asked for and not there."""
    if project and importlib.util.find_spec("wandb") is None:
        raise InputError(
            f"wandb={project!r} asks for Weights & Biases: pip install wandb, or set it to ''"
        )


class Writer:
    """Writes `metrics.jsonl`, `tensorboard/` and `rollouts/step_*.jsonl` of a workdir; of
    several processes, the first does.

    An object store cannot append: there, what grows is written beside, on this machine, and
    goes to the workdir whole, every PUBLISH_S and with every `publish`.
    """

    def __init__(
        self,
        workdir: str | epath.Path,
        *,
        next_step: int,
        wandb: str = "",
        about: Mapping[str, Any] = types.MappingProxyType({}),
    ):
        """Drops metrics and samples from `next_step` on: they will be written again.

        Args:
            workdir: must exist.
            next_step: the first step this process will write; 0 for a new run.
            wandb: a project of Weights & Biases that gets the metrics, too; '': none.
            about: the config, for it.
        """
        self._active = hosts.first()
        if not self._active:
            return
        self._workdir = epath.Path(workdir)
        self._beside = None if _appends(workdir) else tempfile.mkdtemp()
        self._published = time.monotonic()
        grows = pathlib.Path(self._beside or workdir)
        path = self._workdir / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        kept = itertools.takewhile(lambda line: _step_of(line) < next_step, lines)
        whole = b"".join(kept)
        if self._beside is not None:
            (grows / "metrics.jsonl").write_bytes(whole)
        elif lines:  # Never written anew: a full disk would then take it all.
            os.truncate(path, len(whole))
        for file in self._rollouts.glob("step_*.jsonl"):
            if int(file.stem.removeprefix("step_")) >= next_step:
                file.unlink()
        self._file = (grows / "metrics.jsonl").open("a")
        # Not SummaryWriter: it writes in a thread, whose end (a full disk) blocks this one.
        (grows / "tensorboard").mkdir(exist_ok=True)
        self._tensorboard = EventsWriter(
            str(grows / "tensorboard" / "events"), f".{time.time_ns()}"
        )
        # Hides what a killed run may have shown beyond its checkpoint.
        self._show(
            Event(step=next_step, session_log=SessionLog(status=SessionLog.START))
        )
        self._wandb = _open_wandb(wandb, self._workdir, grows, about) if wandb else None

    @property
    def _rollouts(self) -> epath.Path:
        return self._workdir / "rollouts"

    def publish(self) -> None:
        """Brings what has grown to the disk, or to a workdir that cannot append; before a
        checkpoint, so that what a kill takes is from beyond it, and will be written again."""
        if not self._active:
            return
        if self._beside is None:
            os.fsync(self._file.fileno())
            return
        self._published = time.monotonic()
        beside = pathlib.Path(self._beside)
        for file in beside.rglob("*"):
            if file.is_file():
                target = self._workdir / file.relative_to(beside)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line {'step': step, name: number, ...}; nan and inf become null."""
        if not self._active:
            return
        if self._beside is None and not os.path.exists(self._file.name):
            raise FileNotFoundError(
                f"{self._file.name} is gone: somebody has moved or deleted the workdir"
            )
        numbers = {name: float(value) for name, value in values.items()}
        finite = {name: x if math.isfinite(x) else None for name, x in numbers.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        # Without such as the length of right answers, where there are none.
        shown = {name: x for name, x in finite.items() if x is not None}
        scalars = [Summary.Value(tag=name, simple_value=x) for name, x in shown.items()]
        self._show(Event(step=step, summary=Summary(value=scalars)))
        if self._wandb is not None:
            self._wandb.log(shown, step=step)
        if time.monotonic() - self._published > PUBLISH_S:
            self.publish()

    def _show(self, event: Event) -> None:
        event.wall_time = time.time()
        self._tensorboard.write_event(event)
        self._tensorboard.flush()

    def write_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes the samples of one step as one file, a JSON line each."""
        if not self._active:
            return
        self._rollouts.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with (self._rollouts / f"step_{step:06d}.jsonl").open(
            "w", encoding="utf-8"
        ) as file:
            file.write(text)
            if self._beside is None:
                file.flush()
                os.fsync(file.fileno())

    def close(self) -> None:
        if not self._active:
            return
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
        self.publish()
        self._file.close()
        if self._beside is not None:
            shutil.rmtree(self._beside)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _open_wandb(
    project: str, workdir: epath.Path, folder: pathlib.Path, about: Mapping[str, Any]
) -> Any:
    """The workdir's run there, begun or gone on with. Steps that it has, it does not take again.

    Args:
        folder: for files of its own.
    """
    import wandb  # Not part of the installation, and slow.

    file = workdir / "wandb_id"
    if not file.exists():
        file.write_text(uuid.uuid4().hex)
    return wandb.init(
        project=project,
        id=file.read_text(),
        name=workdir.name,
        config=dict(about),
        dir=str(folder),
        resume="allow",
    )


def _appends(workdir: str | epath.Path) -> bool:
    """Whether files there can grow: it is a folder, and no object store (gs://...)."""
    return "://" not in str(workdir)


def _step_of(line: bytes) -> float:
    """The step of a metrics line; one cut off by a kill, or that is zeros after a power cut, counts
    as beyond the end."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


class Compilations:
    """Watches what JAX compiles; a context manager.

    A run declares its programs and compiles them at its start. What is compiled after
    `close` is a surprise that costs every host minutes: a warning says its name and shapes.
    """

    def __init__(self):
        self.planned: dict[str, float] = {}  # Seconds by program, up to `close`.
        self.unplanned = 0
        self._closed = False
        self._shapes = _LastShapes()

    def close(self) -> None:
        """Everything that will be needed has been compiled."""
        self._closed = True

    @contextlib.contextmanager
    def open_again(self) -> Iterator[None]:
        """For what compiles small programs of its own, when it first has something to do."""
        closed, self._closed = self._closed, False
        try:
            yield
        finally:
            self._closed = closed

    def __enter__(self) -> "Compilations":
        jax.monitoring.register_event_duration_secs_listener(self._heard)
        self._shapes.attach()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._shapes.detach()
        jax.monitoring.unregister_event_duration_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **about: Any) -> None:
        if event != "/jax/core/compile/backend_compile_duration":
            return
        name = about.get("fun_name", "a program")
        if not self._closed:
            self.planned[name] = self.planned.get(name, 0.0) + duration_secs
            return
        self.unplanned += 1
        warnings.warn(
            f"unplanned compilation of {name} for {self._shapes.last}, {duration_secs:.1f} s: "
            "its shapes were not among those compiled at the start",
            stacklevel=2,
        )


class _LastShapes(logging.Handler):
    """What JAX's log says of the argument shapes of the program it compiles."""

    def __init__(self):
        super().__init__()
        self.last = "shapes unknown"
        self._logger = logging.getLogger("jax._src.interpreters.pxla")

    def attach(self) -> None:
        self._before = self._logger.level, self._logger.propagate
        self._logger.setLevel(logging.DEBUG)
        self._logger.propagate = False  # For us alone, not for the screen.
        self._logger.addHandler(self)

    def detach(self) -> None:
        self._logger.removeHandler(self)
        self._logger.level, self._logger.propagate = self._before

    def emit(self, record: logging.LogRecord) -> None:
        found = re.search(r"shapes and types \((.*?)\)\. ", record.getMessage())
        if found:
            shapes = re.sub(r"ShapedArray\(([^)]*)\)", r"\1", found[1])
            self.last = shapes.rstrip(",")[:300] or "no arguments"


def of_sampler(counts: list[dict[str, float]]) -> dict[str, float]:
    """The counts of `sampler.sample_groups` for each batch -> of the step, as metrics."""
    values = {name: sum(count[name] for count in counts) for name in counts[0]}
    values["peak_pages"] = max(count["peak_pages"] for count in counts)
    values["occupancy"] = sum(
        count["occupancy"] * count["decode_steps"] for count in counts
    ) / max(values["decode_steps"], 1)
    values["batches"] = len(counts)
    names = {"reshard_seconds": "seconds/reshard"}
    return {names.get(name, f"sampler/{name}"): x for name, x in values.items()}


def of_updates(found: Sequence[Mapping[str, Any]], all_new: bool) -> dict[str, float]:
    """The mini-batches' additive metrics -> means of a step and shares of its tokens.

    Args:
        found: of each.
        all_new: whether this step's policy drew all tokens; if not, their ratios to older ones
            are not 1 in the first mini-batch either, and ratio_first/spread is left out.

    clip/REGION: share of all tokens; clip_movable/REGION: of those that could move
    (advantage not 0, old log-prob below losses.MOVABLE_LOGP); grad_mass/REGION: of the
    sum of weight |dloss/dlogp|; REGION is low, high, dual or inside. ratio_first/spread: how
    far the ratio is from 1 in the first mini-batch, where nothing was learnt yet: the larger
    |log| of its first and 99th percentile. A step without a mini-batch has only updates = 0.
    """
    values: dict[str, float] = {"updates": len(found)}
    if not found:
        return values
    total = {name: sum(metrics[name] for metrics in found) for name in found[0]}
    for name in (
        "loss",
        "policy_loss",
        "positive_loss",
        "entropy",
        "kl_old",
        "grad_norm",
        "row_fill",
    ):
        values[name] = float(total[name] / len(found))
    values["grad_norm_max"] = float(max(metrics["grad_norm"] for metrics in found))
    values["update_norm"] = float(total["update_norm"] / len(found))
    values["param_norm"] = float(found[-1]["param_norm"])
    values["ratio_capped"] = float(total["ratio_capped"])
    values |= ratio_percentiles(total["ratios_below"], total["tokens"])
    if all_new:
        first = ratio_percentiles(found[0]["ratios_below"], found[0]["tokens"])
        values["ratio_first/spread"] = float(
            max(-np.log(first["ratio/p1"]), np.log(first["ratio/p99"]))
        )
    for title, name in (
        ("clip", "tokens"),
        ("clip_movable", "movable"),
        ("grad_mass", "grad_mass"),
    ):
        whole, inside = max(float(total[name]), 1e-30), 1.0
        for region in ("low", "high", "dual"):
            share = float(total[f"{name}_{region}"]) / whole
            values[f"{title}/{region}"] = share
            inside -= share
        values[f"{title}/inside"] = inside
    values["clip/movable_tokens"] = float(total["movable"])
    return values


def ratio_percentiles(below_E: np.ndarray, tokens: float) -> dict[str, float]:
    """Percentiles of policy over old policy, from counts below the edges of bins; exact
    to 2.5% between ratios of 0.22 and 4.5. The smallest and largest are those of their bin's
    outer edge."""
    edges_E = losses.LOG_RATIO_EDGES
    values = {
        f"ratio/p{p}": float(np.exp(np.interp(p / 100 * tokens, below_E, edges_E)))
        for p in (1, 5, 50, 95, 99)
    }
    lowest = edges_E[max(int(np.searchsorted(below_E, 0, "right")) - 1, 0)]
    highest = edges_E[min(int(np.searchsorted(below_E, tokens)), len(edges_E) - 1)]
    return values | {
        "ratio/min": float(np.exp(lowest)),
        "ratio/max": float(np.exp(highest)),
    }
