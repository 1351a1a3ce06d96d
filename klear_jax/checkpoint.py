"""Checkpoints of a run, and models from wherever they lie. The only file that knows orbax.

One checkpoint holds the run: parameters, optimizer and step, the position in the data, how
far the next step has come (its samples, rewards and updates), config and versions; all
randomness is a function of the seed and the step. It can be read on another mesh, and by
another number of processes.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import math
import pathlib
import platform
import re
import time
import types
import zlib
from collections.abc import Iterator, Mapping
from concurrent import futures
from typing import Any, Protocol

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from etils import epath

from klear_jax import hf_weights, hosts, preemption, qwen3, steps, tokens
from klear_jax.config import differences
from klear_jax.errors import InputError, let_pass
from klear_jax.sharding import Layout

# Of a config: what another start of the same run may have otherwise. Where it runs is among
# it: the run is the same up to rounding, and to the bit only on the same mesh.
MAY_CHANGE = tuple(
    f"config.{name}"
    for name in (
        "workdir",
        "wandb",
        "mesh.",
        "sampler.",
        "micro_rows",
        "remat",
        "data.prefetch",
        "checkpoint.",
        "guards.",
        "rewards.num_workers",
        "rewards.memory_mb",
    )
)

# What another process writes must be seen.
fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False

BETWEEN, WITHIN = "checkpoints", "preempted"  # Steps of the loop; folders of a workdir.
# A file in a checkpoint, by the process that has read its share back.
DIGESTS = "digests.{}.json"


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int  # Steps of the loop between checkpoints; the last step is always saved.
    keep: int  # Newest ones kept.
    keep_best: str  # A metric; where it was highest is kept as well. '': none.
    grace_s: float  # Seconds that a preempted run takes at most, to save and end.

    def __post_init__(self):
        if self.every < 1 or self.keep < 1:
            raise InputError("checkpoint.every and checkpoint.keep must be at least 1")
        if not self.grace_s > 0:
            raise InputError("checkpoint.grace_s must be positive")


class Data(Protocol):
    """An iterator over data, whose position is a JSON value, the same on all processes."""

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


def open_workdir(config: Any, tokenizer: tokens.Tokenizer) -> None:
    """Makes the workdir of a run, or checks that the one to resume has the same config. Of
    several processes, the first makes it and all check it.

    Called when all other input has been read, so that bad input leaves nothing behind.

    Args:
        config: of the loop, a dataclass with workdir, init_from and model.
        tokenizer: saved beside the architecture in model/, for evaluation and export.
    """
    workdir = epath.Path(config.workdir)
    file = workdir / "config.json"
    text = json.dumps(dataclasses.asdict(config), indent=2)
    # Told by the first: a network disk would remember for all who look that nothing is there.
    new = hosts.gather(hosts.first() and not file.exists())[0]
    if new and config.init_from:
        check_model(config.init_from, config.model)
    if new and hosts.first():
        (workdir / "model").mkdir(parents=True, exist_ok=True)
        hf_weights.write_config(workdir / "model", config.model, "float32")
        tokenizer.save(workdir / "model")
        file.write_text(text + "\n")  # Last: where it lies, the folder is complete.
    hosts.gather(None)
    if not file.exists():
        raise InputError(
            f"{workdir} is not where the first process wrote it: a workdir must be on storage "
            "that all hosts share"
        )
    if not new:
        changed = [
            line
            for line in differences(hf_weights.read_json(file), json.loads(text))
            if not line.startswith(MAY_CHANGE)
        ]
        if changed:
            raise InputError(
                f"{workdir} belongs to a run with another config ({'; '.join(changed)}); "
                "give the same config to resume it, or another workdir; "
                f"with config.init_from={workdir} it begins with these weights"
            )


@contextlib.contextmanager
def only_run(workdir: str | epath.Path) -> Iterator[None]:
    """Holds the workdir: two runs would write over each other's files. Of the processes of one
    run, the first does; what is no disk, or one that knows no locks, is not held."""
    if not hosts.first() or "://" in str(workdir):
        yield
        return
    with (pathlib.Path(workdir) / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{workdir} is in use: another process is training there"
            ) from None
        except OSError:
            pass
        yield


class Checkpoints:
    """The checkpoints of a workdir: written in the background, each whole or not there, and
    read back. Opened, it holds the newest that is not damaged.

    `checkpoints/` has those between steps of the loop, by the number of steps done;
    `preempted/` has at most one, from within a step.
    """

    def __init__(self, workdir: str | epath.Path, config: CheckpointConfig, run: Any):
        """
        Args:
            run: the config of the loop, a dataclass, to be kept with each checkpoint.
        """
        self._workdir = _absolute(workdir)
        self._config = config
        self._about = _about(run)
        set_aside_damaged(self._workdir)
        keep_best = ocp.checkpoint_managers.BestN(
            # One of another start may have been saved for another metric.
            get_metric_fn=lambda metrics: metrics.get(config.keep_best, -math.inf),
            n=1 if config.keep_best else 0,
            keep_checkpoints_without_metrics=False,
        )
        self._between = ocp.CheckpointManager(
            self._workdir / BETWEEN,
            options=ocp.CheckpointManagerOptions(
                cleanup_tmp_directories=True,
                best_fn=keep_best.get_metric_fn if config.keep_best else None,
                preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(
                    [ocp.checkpoint_managers.LatestN(config.keep), keep_best]
                ),
                multiprocessing_options=_barriers(BETWEEN),
            ),
        )
        self._within = ocp.CheckpointManager(
            self._workdir / WITHIN,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=1,
                cleanup_tmp_directories=True,
                multiprocessing_options=_barriers(WITHIN),
            ),
        )
        self._behind = futures.ThreadPoolExecutor(1)
        self._reading_back: futures.Future[None] | None = None

    @property
    def empty(self) -> bool:
        return not self._between.all_steps() and not self._within.all_steps()

    @property
    def steps_done(self) -> int:
        """Whole steps that the newest checkpoint holds; 0 without one."""
        _, _, steps_done = self._newest()
        return steps_done

    def _newest(self) -> tuple[ocp.CheckpointManager, int, int]:
        """Where the newest checkpoint is, its number there, and the steps it holds."""
        between = self._between.latest_step() or 0
        number = self._within.latest_step()
        if number is not None:
            steps_done = self._read(self._within, number, "about")["steps_done"]
            if steps_done >= between:
                return self._within, number, steps_done
        return self._between, between, between

    def due(self, steps_done: int) -> bool:
        return steps_done % self._config.every == 0

    def save(
        self,
        steps_done: int,
        state: steps.TrainState,
        data: Data,
        under_way: Any,
        metrics: Mapping[str, float] = types.MappingProxyType({}),
    ) -> None:
        """Returns once the state is copied; writing and reading back go on behind.

        Args:
            under_way: what the next step goes on with, as JSON.
            metrics: of the last step, in which `keep_best` may be.
        """
        self._wait()
        self._delete_within()
        name = self._config.keep_best
        value = metrics.get(name, math.nan)
        best = {name: -math.inf if math.isnan(value) else value} if name else None
        self._save(self._between, steps_done, steps_done, state, data, under_way, best)

    def save_preempted(
        self,
        steps_done: int,
        state: steps.TrainState,
        data: Data,
        under_way: Any,
        *,
        begun: bool,
    ) -> None:
        """Saves within a step, and returns when it is written.

        Args:
            steps_done: whole steps.
            under_way: how far the next one has come, as JSON.
            begun: whether it has: if not, a checkpoint between steps may hold all that.
        """
        if begun or steps_done != (self._between.latest_step() or 0):
            number = (self._within.latest_step() or 0) + 1
            self._save(self._within, number, steps_done, state, data, under_way)
        self._between.wait_until_finished()
        self._within.wait_until_finished()
        preemption.saved()

    def _delete_within(self) -> None:
        """What was saved within a step, when a later step is whole."""
        if self._newest()[0] is self._between:
            for number in self._within.all_steps():
                self._within.delete(number)

    def _save(
        self,
        manager: ocp.CheckpointManager,
        number: int,
        steps_done: int,
        state: steps.TrainState,
        data: Data,
        under_way: Any,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        start = time.monotonic()
        done = manager.save(
            number,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                optimizer=ocp.args.StandardSave(_optimizer_tree(state)),
                data=ocp.args.JsonSave({"position": data.get_state()}),
                under_way=ocp.args.JsonSave({"step": under_way}),
                about=ocp.args.JsonSave(self._about | {"steps_done": steps_done}),
            ),
            metrics=metrics,
        )
        assert done, f"{manager.directory} has a checkpoint after {number}"
        taken = time.monotonic() - start
        self._reading_back = self._behind.submit(
            self._read_back, manager, number, steps_done, start, taken
        )

    def _wait(self) -> None:
        """Until the last save is written and read back; raises what went wrong with it."""
        if self._reading_back is not None:
            self._reading_back.result()

    def _read_back(
        self,
        manager: ocp.CheckpointManager,
        number: int,
        steps_done: int,
        start: float,
        taken: float,
    ) -> None:
        manager.wait_until_finished()
        num_bytes = write_digests(epath.Path(manager.directory) / str(number))
        logging.getLogger(__name__).info(
            "checkpoint of %d steps: %.3g MB by this process, %.2f s of the loop, written "
            "and read back after %.1f s",
            steps_done,
            num_bytes / 1e6,
            taken,
            time.monotonic() - start,
        )

    def _read(self, manager: ocp.CheckpointManager, number: int, item: str) -> Any:
        args = ocp.args.Composite(**{item: ocp.args.JsonRestore()})
        return manager.restore(number, args=args)[item]

    def under_way(self) -> Any:
        """What the step after the newest checkpoint goes on with; None without one."""
        if self.empty:
            return None
        manager, number, _ = self._newest()
        return self._read(manager, number, "under_way")["step"]

    def restore(self, abstract: steps.TrainState, data: Data) -> steps.TrainState:
        """The newest state, placed as `abstract` says; moves `data` to its position."""
        manager, number, _ = self._newest()
        about = self._read(manager, number, "about")
        changed = differences(about["versions"], self._about["versions"], "version of")
        if changed:
            logging.getLogger(__name__).warning(
                "the checkpoint is from other software (%s): the run is the same up to "
                "rounding",
                "; ".join(changed),
            )
        restored = manager.restore(
            number,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract.params),
                optimizer=ocp.args.StandardRestore(_optimizer_tree(abstract)),
                data=ocp.args.JsonRestore(),
            ),
        )
        data.set_state(restored.data["position"])
        return steps.TrainState(params=restored.params, **restored.optimizer)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *exc_info: object) -> None:
        try:
            self._wait()
            if kind is None:
                self._delete_within()
            self._behind.shutdown()
            for manager in (self._between, self._within):
                manager.close()
        except Exception as error:
            if kind is None:
                raise
            logging.getLogger(__name__).error("the last checkpoint failed: %s", error)


def _barriers(name: str) -> ocp.options.MultiprocessingOptions:
    """Of a manager's own: one may save while the other still deletes what is old, and processes
    that meet in both at once must not take the one for the other."""
    return ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=name)


def _about(run: Any) -> dict[str, Any]:
    """What a checkpoint says of where it comes from."""
    config = dataclasses.asdict(run)
    text = json.dumps(config, sort_keys=True)
    packages = ("jax", "jaxlib", "optax", "orbax-checkpoint", "numpy")
    return {
        "config": config,
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
    }


def write_digests(folder: epath.Path) -> int:
    """Reads a checkpoint, and records size and CRC-32 of its files in it; each process those
    of its share. Returns the bytes read."""
    names = _files(folder)[hosts.index() :: hosts.count()]
    digests = {name: _digest(folder / name) for name in names}
    file = folder / DIGESTS.format(hosts.index())
    unfinished = folder / f"{file.name}.unfinished"
    unfinished.write_text(json.dumps(digests))
    unfinished.rename(file)
    return sum(size for size, _ in digests.values())


def damage(folder: epath.Path) -> str:
    """What of a checkpoint is not as it was written; '' if all is. Each process looks at its
    share, and all say the same. One that was not read back is only looked at."""
    try:
        recorded: dict[str, Any] = {}
        for file in sorted(folder.glob(DIGESTS.format("*"))):
            recorded |= json.loads(file.read_text())
        if not recorded:
            for item in ("data", "under_way", "about"):
                json.loads((folder / item / "metadata").read_text())
        there = set(_files(folder))
        found = [
            f"{name} is damaged"
            for name in sorted(recorded)[hosts.index() :: hosts.count()]
            if name not in there or list(_digest(folder / name)) != recorded[name]
        ]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        let_pass(error)
        found = [str(error)]
    return "; ".join(text for texts in hosts.gather(found) for text in texts)


def set_aside_damaged(workdir: epath.Path) -> None:
    """Moves checkpoints that are damaged to `damaged/`, from the newest back to the first
    that is not.

    Raises:
        InputError: none is left: the run would begin anew.
    """
    aside, left = workdir / "damaged", False
    for name in (BETWEEN, WITHIN):
        for folder in reversed(hosts.gather(_numbered(workdir / name))[0]):
            what = damage(workdir / name / folder)
            if not what:
                left = True
                break
            logging.getLogger(__name__).error(
                "DAMAGED CHECKPOINT %s: %s. It is set aside in %s; the newest that is whole "
                "is used",
                workdir / name / folder,
                what,
                aside,
            )
            if hosts.first():
                aside.mkdir(parents=True, exist_ok=True)
                tries = sum(1 for _ in aside.glob(f"{name}_{folder}_*.txt"))
                target = aside / f"{name}_{folder}_{tries}"
                # An object store has no empty folder to move something to.
                (aside / f"{target.name}.txt").write_text(what + "\n")
                (workdir / name / folder).rename(target)
            hosts.gather(None)
    if not left and hosts.gather(aside.exists())[0]:
        raise InputError(
            f"all checkpoints of {workdir} are damaged, see {aside}; to begin anew, give "
            "another workdir"
        )


def _numbered(folder: epath.Path) -> list[str]:
    """Names of the finished checkpoints there, the oldest first. One that is being written has
    a longer name; on an object store, its own, but not yet orbax's mark."""
    if not folder.exists():
        return []
    names = [
        path.name
        for path in folder.iterdir()
        if re.fullmatch("0|[1-9][0-9]*", path.name)
        and ("://" not in str(path) or (path / "commit_success.txt").exists())
    ]
    return sorted(names, key=int)


def _files(folder: epath.Path, prefix: str = "") -> list[str]:
    """Paths of the files in a checkpoint, from its folder, but for the digests."""
    found = []
    for path in folder.iterdir():
        if path.is_dir():
            found += _files(path, f"{prefix}{path.name}/")
        elif not path.name.startswith("digests."):
            found.append(prefix + path.name)
    return sorted(found)


def _digest(path: epath.Path) -> tuple[int, int]:
    """Bytes and CRC-32 of a file."""
    size = crc = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return size, crc


def _optimizer_tree(state: steps.TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state}


def train_state(
    checkpoints: Checkpoints,
    data: Data,
    *,
    init_from: str,
    config: qwen3.Config,
    key: jax.Array,
    tx: optax.GradientTransformation,
    layout: Layout,
) -> tuple[steps.TrainState, steps.TrainState]:
    """Where a run begins: its newest checkpoint, or a given model, or random parameters.

    Args:
        data: moved to where the checkpoint was.
        init_from: see `load_model`; '' for random parameters from `key`.

    Returns:
        The state and the tree of its shardings.
    """
    params_shardings = qwen3.params_shardings(config, layout)
    abstract = jax.eval_shape(
        lambda: steps.init_state(qwen3.init_params(config, jax.random.key(0)), tx)
    )
    shardings = steps.state_shardings(abstract, params_shardings, layout)
    if not checkpoints.empty:
        return checkpoints.restore(_placed(abstract, shardings), data), shardings
    if init_from:
        params, _ = load_model(init_from, layout)
    else:
        params = jax.jit(
            lambda key: qwen3.init_params(config, key), out_shardings=params_shardings
        )(key)
    init = jax.jit(lambda params: steps.init_state(params, tx), out_shardings=shardings)
    return init(params), shardings


def model_folder(path: str | epath.Path) -> epath.Path:
    """Where config.json and the tokenizer of a Hugging Face folder or a workdir lie."""
    path = epath.Path(path)
    workdir = path.parent.parent if _is_checkpoint(path) else path
    for folder in (workdir, workdir / "model"):
        if (folder / "config.json").exists() and (
            folder != workdir or not is_workdir(workdir)
        ):
            return folder
    raise InputError(
        f"{path} is neither a Hugging Face folder nor the workdir of a run, nor one of its "
        "checkpoints"
    )


def check_model(path: str | epath.Path, config: qwen3.Config) -> None:
    """Raises an InputError unless there is a model of this architecture to load."""
    found = hf_weights.read_config(model_folder(path))
    # How far positions reach is a label: RoPE has no table to outgrow.
    if dataclasses.replace(found, max_positions=config.max_positions) != config:
        raise InputError(
            f"init_from={path} holds {found}, but config.model says {config}"
        )
    if is_workdir(path) and not _numbered(epath.Path(path) / BETWEEN):
        raise InputError(f"{path} has no finished checkpoint")


def is_workdir(path: str | epath.Path) -> bool:
    return (epath.Path(path) / BETWEEN).exists()


def _is_checkpoint(path: epath.Path) -> bool:
    return path.parent.name == BETWEEN and path.name in _numbered(path.parent)


def resolve(path: str | epath.Path) -> epath.Path:
    """What `load_model` reads: of a workdir, the newest checkpoint that is not damaged; all
    else is itself."""
    path = epath.Path(path)
    return _newest_undamaged(path) if is_workdir(path) else path


def read_about(path: str | epath.Path) -> dict[str, Any] | None:
    """What a checkpoint, as `resolve` gives it, says of itself: `steps_done`, `config` and
    `versions`. None: it is none."""
    path = epath.Path(path)
    if not _is_checkpoint(path):
        return None
    return hf_weights.read_json(path / "about" / "metadata")


def load_model(
    path: str | epath.Path, layout: Layout | None = None
) -> tuple[qwen3.Params, qwen3.Config]:
    """float32 parameters and their architecture.

    Args:
        path: a Hugging Face folder, a workdir, of which the newest checkpoint that is not
            damaged is read, or one of its checkpoints/NUMBER.
        layout: where to place them: each process reads only what lies on its devices. None:
            in host memory.
    """
    path = resolve(path)
    if not _is_checkpoint(path):
        return hf_weights.load(
            model_folder(path), dtype=jnp.dtype(jnp.float32), layout=layout
        )
    config = hf_weights.read_config(model_folder(path))
    abstract = jax.eval_shape(lambda: qwen3.init_params(config, jax.random.key(0)))
    if (
        layout is None
    ):  # An array of numpy is what orbax then reads; these take no memory.
        abstract = jax.tree.map(
            lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), abstract
        )
    else:
        abstract = _placed(abstract, qwen3.params_shardings(config, layout))
    try:
        with ocp.CheckpointManager(_absolute(path.parent)) as manager:
            params = manager.restore(
                int(path.name),
                args=ocp.args.Composite(params=ocp.args.StandardRestore(abstract)),
            ).params
        jax.tree.map(_check_shape, params, abstract)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path} holds no parameters of {model_folder(path) / 'config.json'}: {error}"
        ) from error
    return params, config


def _check_shape(found: Any, wanted: Any) -> None:
    if found.shape != wanted.shape:
        raise ValueError(f"an array is {found.shape}, not {wanted.shape}")


def _newest_undamaged(workdir: epath.Path) -> epath.Path:
    for name in reversed(hosts.gather(_numbered(workdir / BETWEEN))[0]):
        what = damage(workdir / BETWEEN / name)
        if not what:
            return workdir / BETWEEN / name
        logging.getLogger(__name__).error(
            "DAMAGED CHECKPOINT %s: %s. The one before it is used",
            workdir / BETWEEN / name,
            what,
        )
    raise InputError(f"{workdir} has no finished checkpoint that is whole")


def _placed(abstract: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
        abstract,
        shardings,
    )


def _absolute(path: str | epath.Path) -> epath.Path:
    """As orbax wants it; gs://... is."""
    path = epath.Path(path)
    return path if "://" in str(path) else path.absolute()
