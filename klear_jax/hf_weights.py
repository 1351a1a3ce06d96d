"""Hugging Face folders (config.json + safetensors) in and out.

The parameter table of `qwen3` says which tensor is which of ours; what a folder has too
much, too little or in another shape is one error that lists it.
"""

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from klear_jax import qwen3
from klear_jax.errors import InputError

SHARD_BYTES = 5_000_000_000  # The most a file of a saved model holds.
INDEX = "model.safetensors.index.json"


def load(
    path: str | epath.Path, *, dtype: jnp.dtype
) -> tuple[qwen3.Params, qwen3.Config]:
    """Reads a model folder.

    Args:
        path: a folder with config.json and model.safetensors, or its shards and index.
        dtype: of the parameters returned, whatever the file's.

    Returns:
        (params, config): numpy arrays in host memory, and the architecture.

    Raises:
        InputError: a file is missing or damaged, the architecture is not supported, or
            tensors are missing, unknown or misshapen (all of them listed).
    """
    path = epath.Path(path)
    config = read_config(path)
    with contextlib.ExitStack() as stack:
        tensors = _open_tensors(path, stack)
        _check_names(path, tensors, config)
        params = jax.tree.map(
            lambda param: _stack(param, tensors, dtype), qwen3.param_table(config)
        )
        if config.tied and "lm_head.weight" in tensors:
            head = _read(tensors, "lm_head.weight").astype(dtype)
            if not np.array_equal(head, params["embed"]):
                raise InputError(
                    f"{path}: config.json ties lm_head.weight to the embedding, but they differ"
                )
    return params, config


def save(path: str | epath.Path, params: qwen3.Params, config: qwen3.Config) -> None:
    """Writes a model folder that `load` and transformers read, in the parameters' dtype."""
    path = epath.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    for old in path.glob("model*.safetensors*"):
        old.unlink()  # An index or shard of another model would be read with this one.
    shards: list[dict[str, np.ndarray]] = [{}]
    size = total = 0
    for name, tensor in _hf_tensors(params, config):
        if size and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    dtype = str(params["embed"].dtype)
    (path / "config.json").write_text(
        json.dumps(_hf_config(config, dtype), indent=2) + "\n"
    )
    if len(shards) == 1:
        save_file(shards[0], path / "model.safetensors", {"format": "pt"})
        return
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, path / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_config(path: epath.Path, config: qwen3.Config, dtype: str) -> None:
    """Writes config.json; `dtype` is what it says of the weights."""
    (path / "config.json").write_text(
        json.dumps(_hf_config(config, dtype), indent=2) + "\n"
    )


def read_json(file: epath.Path) -> Any:
    """A JSON file, or an InputError that names it."""
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        raise InputError(f"{file} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not valid JSON: {error}") from None


def read_config(path: str | epath.Path) -> qwen3.Config:
    """The architecture in a folder's config.json."""
    file = epath.Path(path) / "config.json"
    hf = read_json(file)
    if not isinstance(hf, dict):
        raise InputError(f"{file} is not a JSON object")
    need = functools.partial(_field, file, hf)

    def supported(key, *values):
        if hf.get(key, values[0]) not in values:
            raise InputError(
                f"{file}: {key} = {hf[key]!r} is not supported, only {values}"
            )

    supported("model_type", "qwen3", "llama")
    supported("hidden_act", "silu")
    for flag in ("attention_bias", "mlp_bias", "use_sliding_window"):
        supported(flag, False, None)
    supported("quantization_config", None)
    theta, yarn = _read_rope(hf, file)
    heads, width = need("num_attention_heads"), need("hidden_size")
    fields = {
        "vocab_size": need("vocab_size"),
        "width": width,
        "num_layers": need("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": need("num_key_value_heads", default=heads),
        "head_dim": need("head_dim", default=width // heads),
        "mlp_width": need("intermediate_size"),
        "rope_theta": theta,
        "norm_eps": need("rms_norm_eps", float),
        "tied": need("tie_word_embeddings", bool, default=False),
        "qk_norm": need("model_type", str) == "qwen3",
        "max_positions": need("max_position_embeddings"),
        "yarn": yarn,
    }
    try:
        return qwen3.Config(**fields)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def _field(
    file: epath.Path,
    hf: Mapping[str, Any],
    key: str,
    kind: type = int,
    default: Any = None,
) -> Any:
    """A value of a config: of this type, positive if a number, there unless defaulted."""
    value = default if hf.get(key) is None else hf[key]
    if value is None:
        raise InputError(f"{file} lacks {key!r}")
    fits = type(value) is kind or (kind is float and type(value) is int)
    if not fits or (kind in (int, float) and value <= 0):
        positive = "positive " if kind in (int, float) else ""
        raise InputError(f"{file}: {key} = {value!r} is no {positive}{kind.__name__}")
    return value


def _read_rope(
    hf: Mapping[str, Any], file: epath.Path
) -> tuple[float, qwen3.Yarn | None]:
    """From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{file}: RoPE scaling {rope!r} is not a JSON object")
    theta = _field(file, {**hf, **rope}, "rope_theta", float)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    known = {
        "rope_type",
        "type",
        "rope_theta",
        "factor",
        "original_max_position_embeddings",
    }
    known |= {"beta_fast", "beta_slow", "attention_factor"}
    if kind != "yarn" or not set(rope) <= known:
        raise InputError(
            f"{file}: RoPE scaling {rope} is not supported, only 'default' and 'yarn' of "
            f"{sorted(known)}"
        )
    need = functools.partial(_field, file, rope)
    scaled = rope.get("attention_factor") is not None
    return theta, qwen3.Yarn(
        factor=need("factor", float),
        original_max_positions=need(
            "original_max_position_embeddings",
            default=_field(file, hf, "max_position_embeddings"),
        ),
        beta_fast=need("beta_fast", float, 32.0),
        beta_slow=need("beta_slow", float, 1.0),
        attention_factor=need("attention_factor", float) if scaled else None,
    )


def _hf_config(config: qwen3.Config, dtype: str) -> dict[str, Any]:
    """config.json as every version of transformers reads it."""
    c = config
    scaling = c.yarn and {
        "rope_type": "yarn",
        "factor": c.yarn.factor,
        "original_max_position_embeddings": c.yarn.original_max_positions,
        "beta_fast": c.yarn.beta_fast,
        "beta_slow": c.yarn.beta_slow,
        "attention_factor": c.yarn.attention_factor,
    }
    if scaling:
        scaling = {key: value for key, value in scaling.items() if value is not None}
    return {
        "architectures": ["Qwen3ForCausalLM" if c.qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if c.qk_norm else "llama",
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.mlp_width,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": scaling,
        "max_position_embeddings": c.max_positions,
        "tie_word_embeddings": c.tied,
        "torch_dtype": dtype,
    }


def _open_tensors(path: epath.Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Tensor name -> the open file it lies in."""
    if (path / INDEX).exists():
        try:
            names = read_json(path / INDEX)["weight_map"].values()
            files = sorted({str(name) for name in names})
        except (KeyError, TypeError, AttributeError):
            raise InputError(f"{path / INDEX} has no 'weight_map' of names") from None
        if outside := [file for file in files if epath.Path(file).name != file]:
            raise InputError(
                f"{path / INDEX} names files outside its folder: {outside}"
            )
    else:
        files = ["model.safetensors"]
    tensors = {}
    for file in files:
        if not (path / file).exists():
            raise InputError(f"{path / file} does not exist")
        try:
            opened = stack.enter_context(safe_open(path / file, framework="numpy"))
        except SafetensorError as error:
            raise InputError(f"{path / file} is damaged or cut off: {error}") from None
        tensors |= dict.fromkeys(opened.keys(), opened)
    return tensors


def _layer_names(param: qwen3.Param) -> list[str]:
    """The tensors a parameter is stacked from: one, or one a layer."""
    if "{}" not in param.hf_name:
        return [param.hf_name]
    return [param.hf_name.format(i) for i in range(param.shape[0])]


def _check_names(path, tensors, config):
    """Lists every missing, unknown and misshapen tensor in one error."""
    expected = {}
    for param in jax.tree.leaves(qwen3.param_table(config)):
        expected |= dict.fromkeys(_layer_names(param), param.hf_shape)
    ignored = {name for name in tensors if name.endswith("rotary_emb.inv_freq")}
    if config.tied:
        ignored.add("lm_head.weight")
    problems = [f"{name} is missing" for name in sorted(set(expected) - set(tensors))]
    problems += [
        f"{name} is unknown" for name in sorted(set(tensors) - set(expected) - ignored)
    ]
    for name in sorted(set(expected) & set(tensors)):
        shape = tuple(tensors[name].get_slice(name).get_shape())
        if shape != expected[name]:
            problems.append(f"{name} has shape {shape}, not {expected[name]}")
    if problems:
        raise InputError(
            f"{path} does not hold the model of its config.json: {problems}"
        )


def _read(tensors, name):
    try:
        return tensors[name].get_tensor(name)
    except SafetensorError as error:
        raise InputError(f"tensor {name} cannot be read: {error}") from None


def _stack(
    param: qwen3.Param, tensors: Mapping[str, Any], dtype: jnp.dtype
) -> np.ndarray:
    """One parameter, from its tensor or from its layers' tensors."""
    ours = np.empty(param.shape, dtype)
    for i, name in enumerate(_layer_names(param)):
        target = ours[i] if "{}" in param.hf_name else ours
        target[...] = (
            _read(tensors, name).reshape(param.hf_dims).transpose(param.hf_perm)
        )
    return ours


def _hf_tensors(
    params: qwen3.Params, config: qwen3.Config
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor under its Hugging Face name, in the order of the table."""
    table = qwen3.param_table(config)
    for param, ours in zip(
        jax.tree.leaves(table), jax.tree.leaves(params), strict=True
    ):
        inverse = np.argsort(param.hf_perm)
        for i, name in enumerate(_layer_names(param)):
            one = np.asarray(ours[i] if "{}" in param.hf_name else ours)
            yield (
                name,
                np.ascontiguousarray(one.transpose(inverse)).reshape(param.hf_shape),
            )
