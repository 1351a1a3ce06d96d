"""Checkpoints of a run, and models from wherever they lie. The only file that knows orbax.

One checkpoint holds parameters, optimizer and step, the position in the data, and the
samples that the next step goes on with; all randomness is a function of the seed and the
step. It is named by the steps of the loop that are done. It can be read on another mesh,
and by another number of processes.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from etils import epath

from klear_jax import hf_weights, hosts, qwen3, steps, tokens
from klear_jax.config import differences
from klear_jax.errors import InputError
from klear_jax.sharding import Layout

# Of a config: what another start of the same run may have otherwise. Where it runs is among
# it: the run is the same up to rounding, and to the bit only on the same mesh.
MAY_CHANGE = tuple(
    f"config.{name}"
    for name in (
        "workdir",
        "mesh.",
        "sampler.",
        "micro_rows",
        "remat",
        "data.prefetch",
        "checkpoint.",
        "rewards.num_workers",
        "rewards.memory_mb",
    )
)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int  # Steps of the loop between checkpoints; the last step is always saved.
    keep: int  # Newest ones kept.

    def __post_init__(self):
        if self.every < 1 or self.keep < 1:
            raise InputError("checkpoint.every and checkpoint.keep must be at least 1")


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
                "give the same config to resume it, or another workdir"
            )


class Checkpoints:
    """The checkpoints of a workdir: written in the background, each whole or not there."""

    def __init__(self, workdir: str | epath.Path, config: CheckpointConfig):
        self._manager = ocp.CheckpointManager(
            _absolute(workdir) / "checkpoints",
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.keep, enable_async_checkpointing=True
            ),
        )
        self._every = config.every

    @property
    def steps_done(self) -> int:
        """Steps that the newest checkpoint holds; 0 without one."""
        return self._manager.latest_step() or 0

    def due(self, steps_done: int) -> bool:
        return steps_done % self._every == 0

    def save(
        self,
        steps_done: int,
        state: steps.TrainState,
        data: Data,
        pending: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Returns once the state is copied; writing goes on behind.

        Args:
            pending: samples under way, as JSON.
        """
        self._manager.save(
            steps_done,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                optimizer=ocp.args.StandardSave(_optimizer_tree(state)),
                data=ocp.args.JsonSave({"position": data.get_state()}),
                pending=ocp.args.JsonSave({"groups": list(pending)}),
            ),
        )

    def pending(self) -> list[dict[str, Any]]:
        """The samples under way of the newest checkpoint; none without one."""
        if not self.steps_done:
            return []
        args = ocp.args.Composite(pending=ocp.args.JsonRestore())
        return self._manager.restore(self.steps_done, args=args).pending["groups"]

    def restore(self, abstract: steps.TrainState, data: Data) -> steps.TrainState:
        """The newest state, placed as `abstract` says; moves `data` to its position."""
        restored = self._manager.restore(
            self.steps_done,
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

    def __exit__(self, *exc_info: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()


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
    if checkpoints.steps_done:
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
    for folder in (path, path / "model"):
        if (folder / "config.json").exists() and (
            folder != path or not is_workdir(path)
        ):
            return folder
    raise InputError(
        f"{path} is neither a Hugging Face folder nor the workdir of a run"
    )


def check_model(path: str | epath.Path, config: qwen3.Config) -> None:
    """Raises an InputError unless there is a model of this architecture to load."""
    found = hf_weights.read_config(model_folder(path))
    # How far positions reach is a label: RoPE has no table to outgrow.
    if dataclasses.replace(found, max_positions=config.max_positions) != config:
        raise InputError(
            f"init_from={path} holds {found}, but config.model says {config}"
        )
    # One that is being written has a longer name.
    if is_workdir(path) and not any(
        folder.name.isdigit() for folder in (epath.Path(path) / "checkpoints").iterdir()
    ):
        raise InputError(f"{path} has no finished checkpoint")


def is_workdir(path: str | epath.Path) -> bool:
    return (epath.Path(path) / "checkpoints").exists()


def load_model(
    path: str | epath.Path, layout: Layout | None = None
) -> tuple[qwen3.Params, qwen3.Config]:
    """float32 parameters and their architecture.

    Args:
        path: a Hugging Face folder, or a workdir, of which the newest checkpoint is read.
        layout: where to place them: each process reads only what lies on its devices. None:
            in host memory.
    """
    path = epath.Path(path)
    if not is_workdir(path):
        return hf_weights.load(model_folder(path), dtype=jnp.float32, layout=layout)
    config = hf_weights.read_config(model_folder(path))
    abstract = jax.eval_shape(lambda: qwen3.init_params(config, jax.random.key(0)))
    if layout is not None:
        abstract = _placed(abstract, qwen3.params_shardings(config, layout))
    with ocp.CheckpointManager(_absolute(path) / "checkpoints") as manager:
        if manager.latest_step() is None:
            raise InputError(f"{path} has no finished checkpoint")
        restored = manager.restore(
            manager.latest_step(),
            args=ocp.args.Composite(params=ocp.args.StandardRestore(abstract)),
        )
    params = restored.params if layout else jax.device_get(restored.params)
    return params, config


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
