"""Hugging Face folders (config.json + safetensors) in and out.

The parameter table of `qwen3` says which tensor is which of ours; what a folder has too
much, too little or in another shape is one error that lists it. A tensor at a time is in
memory beside the parameters themselves.
"""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from klear_jax import qwen3
from klear_jax.errors import InputError
from klear_jax.sharding import Layout

SHARD_BYTES = 5_000_000_000  # The most a file of a saved model holds.
INDEX = "model.safetensors.index.json"
TIED_ROWS = 1 << 14  # Compared at once.
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
NUMPY_DTYPES = {theirs: ours for ours, theirs in DTYPES.items()}
HEADER_BYTES = 100_000_000  # The most that safetensors allows, too.


def load(
    path: str | epath.Path, *, dtype: jnp.dtype, layout: Layout | None = None
) -> tuple[qwen3.Params, qwen3.Config]:
    """Reads a model folder.

    Args:
        path: a folder with config.json and model.safetensors, or its shards and index.
        dtype: of the parameters returned, whatever the file's.
        layout: where to place them: each process reads only what lies on its devices. None:
            in host memory.

    Returns:
        (params, config): numpy arrays, or placed ones, and the architecture.

    Raises:
        InputError: a file is missing or damaged, the architecture is not supported, or
            tensors are missing, unknown or misshapen (all of them listed).
    """
    path = epath.Path(path)
    config = read_config(path)
    table = qwen3.param_table(config)
    files = _find_tensors(path)
    _check_names(path, files, config)
    if config.tied and "lm_head.weight" in files:
        _check_tied(path, files, table["embed"])

    def read(param: qwen3.Param, index: Sequence[slice]) -> np.ndarray:
        return _read_part(param, files, index, dtype)

    if layout is None:
        return jax.tree.map(
            lambda p: read(p, [slice(None)] * len(p.shape)), table
        ), config
    shardings = qwen3.params_shardings(config, layout)
    return jax.tree.map(
        lambda param, at: jax.make_array_from_callback(
            param.shape, at, functools.partial(read, param)
        ),
        table,
        shardings,
    ), config


def save(
    path: str | epath.Path,
    params: qwen3.Params,
    config: qwen3.Config,
    *,
    dtype: jnp.dtype | None = None,
) -> None:
    """Writes a model folder that `load` and transformers read.

    Args:
        params: numpy arrays, or such on the devices of this process.
        dtype: of the file; None: that of the parameters.
    """
    path = epath.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    for old in path.glob("model*.safetensors*"):
        old.unlink()  # An index or shard of another model would be read with this one.
    dtype = jnp.dtype(dtype or params["embed"].dtype)
    shards: list[list[_Tensor]] = [[]]
    size = total = 0
    for tensor in _hf_tensors(params, config):
        nbytes = math.prod(tensor.shape) * dtype.itemsize
        if size and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size, total = size + nbytes, total + nbytes
    write_config(path, config, dtype.name)
    if len(shards) == 1:
        _write_tensors(path / "model.safetensors", shards[0], dtype)
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        _write_tensors(path / file, shard, dtype)
        weight_map |= dict.fromkeys((tensor.name for tensor in shard), file)
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
    except (ValueError, RecursionError) as error:  # Not UTF-8 is a ValueError, too.
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
    if not fits or (kind in (int, float) and not 0 < value < 2**53):
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


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A tensor of a file; for one that we read ourselves, its dtype and first byte."""

    file: epath.Path
    shape: tuple[int, ...]
    dtype: jnp.dtype | None = None
    start: int = 0


def _find_tensors(path: epath.Path) -> dict[str, _Stored]:
    """The tensors of a folder by name."""
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
    found: dict[str, _Stored] = {}
    for file in files:
        # To epath, a device is a file.
        if not (_is_remote(path) or os.path.isfile(path / file)):
            raise InputError(f"{path / file} does not exist, or is no file")
        found |= _stored_in(path / file)
    return found


def _stored_in(file: epath.Path) -> dict[str, _Stored]:
    """The tensors of a file by name."""
    if _is_remote(file):
        return _read_header(file)
    with _open(file) as opened:
        return {
            name: _Stored(file, tuple(opened.get_slice(name).get_shape()))
            for name in opened.keys()  # noqa: SIM118 (it is no dict)
        }


def _is_remote(file: epath.Path) -> bool:
    """Whether it lies on gs://, where safetensors, which maps files, cannot open it."""
    return "://" in str(file)


def _read_header(file: epath.Path) -> dict[str, _Stored]:
    """`_stored_in`, read by ourselves: how long the header is, 8 bytes, and the header, JSON."""
    found = {}
    try:
        with file.open("rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            opened.seek(0)
            length = int.from_bytes(opened.read(8), "little")
            if not 0 < length <= min(size - 8, HEADER_BYTES):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(opened.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            dtype = jnp.dtype(NUMPY_DTYPES[entry["dtype"]])
            start, stop = entry["data_offsets"]
            wanted = math.prod(entry["shape"]) * dtype.itemsize
            if stop - start != wanted or not 0 <= start <= stop <= size - 8 - length:
                raise ValueError(f"{name} is not where the header says")
            found[name] = _Stored(
                file, tuple(entry["shape"]), dtype, 8 + length + start
            )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{file} is damaged or cut off: {error}") from None
    return found


def _open(file: epath.Path) -> Any:
    """Only for as long as it takes: what is open is mapped, and counts as memory."""
    try:
        return safe_open(file, framework="numpy")
    except SafetensorError as error:
        raise InputError(f"{file} is damaged or cut off: {error}") from None


def _layer_names(param: qwen3.Param) -> list[str]:
    """The tensors a parameter is stacked from: one, or one a layer."""
    if "{}" not in param.hf_name:
        return [param.hf_name]
    return [param.hf_name.format(i) for i in range(param.shape[0])]


def _check_names(path, files, config):
    """Lists every missing, unknown and misshapen tensor in one error."""
    if config.num_layers > len(files):
        raise InputError(
            f"{path / 'config.json'} says {config.num_layers} layers, but there are only "
            f"{len(files)} tensors"
        )
    expected: dict[str, tuple[int, ...]] = {}
    for param in jax.tree.leaves(qwen3.param_table(config)):
        expected |= dict.fromkeys(_layer_names(param), param.hf_shape)
    ignored = {name for name in files if name.endswith("rotary_emb.inv_freq")}
    if config.tied:
        ignored.add("lm_head.weight")
    problems = [f"{name} is missing" for name in sorted(set(expected) - set(files))]
    problems += [
        f"{name} is unknown" for name in sorted(set(files) - set(expected) - ignored)
    ]
    for name in sorted(set(expected) & set(files)):
        if (shape := files[name].shape) != expected[name]:
            problems.append(f"{name} has shape {shape}, not {expected[name]}")
    if problems:
        raise InputError(
            f"{path} does not hold the model of its config.json: {problems}"
        )


def _check_tied(
    path: epath.Path, files: Mapping[str, _Stored], embed: qwen3.Param
) -> None:
    """Raises an InputError if a head that is tied to the embedding has other numbers."""
    for start in range(0, embed.shape[0], TIED_ROWS):
        stop = min(start + TIED_ROWS, embed.shape[0])
        rows = [slice(start, stop), slice(None)]
        head = _read(files, "lm_head.weight", rows)
        if not np.array_equal(head, _read(files, embed.hf_name, rows)):
            raise InputError(
                f"{path}: config.json ties lm_head.weight to the embedding, but they differ"
            )


def _read(
    files: Mapping[str, _Stored], name: str, index: Sequence[slice]
) -> np.ndarray:
    """A part of a tensor."""
    stored = files[name]
    if _is_remote(stored.file):
        return _read_rows(stored, index)
    with _open(stored.file) as opened:
        try:
            return opened.get_slice(name)[tuple(index)]
        except SafetensorError as error:
            raise InputError(f"tensor {name} cannot be read: {error}") from None


def _read_rows(stored: _Stored, index: Sequence[slice]) -> np.ndarray:
    """A part of a tensor, of which whole rows are fetched."""
    assert stored.dtype is not None  # It is of a file that we read ourselves.
    first, stop, _ = index[0].indices(stored.shape[0])
    row_bytes = math.prod(stored.shape[1:]) * stored.dtype.itemsize
    with stored.file.open("rb") as opened:
        opened.seek(stored.start + first * row_bytes)
        data = opened.read((stop - first) * row_bytes)
    rows = np.frombuffer(data, stored.dtype).reshape(stop - first, *stored.shape[1:])
    return rows[(slice(None), *index[1:])]


def _read_part(
    param: qwen3.Param,
    files: Mapping[str, _Stored],
    index: Sequence[slice],
    dtype: jnp.dtype,
) -> np.ndarray:
    """A part of one of our parameters, of its tensor or of its layers' tensors."""
    whole = [part.indices(size) for part, size in zip(index, param.shape, strict=True)]
    ours = np.empty([stop - start for start, stop, _ in whole], dtype)
    names = _layer_names(param)
    if "{}" not in param.hf_name:
        ours[...] = _read_layer(param, files, names[0], whole)
        return ours
    for i, layer in enumerate(range(*whole[0])):
        ours[i] = _read_layer(param, files, names[layer], whole[1:])
    return ours


def _read_layer(
    param: qwen3.Param,
    files: Mapping[str, _Stored],
    name: str,
    index: Sequence[tuple[int, int, int]],
) -> np.ndarray:
    """A part of a tensor in our axes, given as (start, stop, step) of each of them.

    An axis of the file may hold several of ours. It is read where the first of these
    begins and ends, and cut in the others.
    """
    inverse = np.argsort(param.hf_perm)
    bounds = [index[i][:2] for i in inverse]  # Of `hf_dims`.
    sizes, read, left = list(param.hf_dims), [], list(bounds)
    dims = []
    for size in param.hf_shape:
        group = [sizes.pop(0)]
        while math.prod(group) < size:
            group.append(sizes.pop(0))
        (start, stop), inner = left[0], math.prod(group[1:])
        read.append(slice(start * inner, stop * inner))
        dims += [stop - start, *group[1:]]
        left = left[len(group) :]
    part = _read(files, name, read).reshape(dims)
    cut = [
        slice(None) if stop - start == size else slice(start, stop)
        for (start, stop), size in zip(bounds, dims, strict=True)
    ]
    return part[tuple(cut)].transpose(param.hf_perm)


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One to be written; its numbers are fetched when it is its turn."""

    name: str
    shape: tuple[int, ...]
    fetch: Callable[[], np.ndarray]


def _hf_tensors(params: qwen3.Params, config: qwen3.Config) -> Iterator[_Tensor]:
    """Every tensor under its Hugging Face name, in the order of the table."""

    def fetch(ours, layer, param):
        one = np.asarray(ours if layer is None else ours[layer])
        return one.transpose(np.argsort(param.hf_perm)).reshape(param.hf_shape)

    table = qwen3.param_table(config)
    for param, ours in zip(
        jax.tree.leaves(table), jax.tree.leaves(params), strict=True
    ):
        for i, name in enumerate(_layer_names(param)):
            layer = i if "{}" in param.hf_name else None
            yield _Tensor(
                name, param.hf_shape, functools.partial(fetch, ours, layer, param)
            )


def _write_tensors(
    file: epath.Path, tensors: Sequence[_Tensor], dtype: jnp.dtype
) -> None:
    """A safetensors file: the size of the header (8 bytes), the header (JSON), the numbers.
    The library's own writer wants all of them in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + math.prod(tensor.shape) * dtype.itemsize
        header[tensor.name] = {
            "dtype": DTYPES[dtype.name],
            "shape": tensor.shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # The numbers begin at a multiple of 8.
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            numbers = np.ascontiguousarray(tensor.fetch(), dtype)
            out.write(numbers.reshape(-1).view(np.uint8).data)
