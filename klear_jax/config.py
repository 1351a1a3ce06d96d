"""The border between config files and the library: flags and ConfigDicts on one side,
frozen dataclasses on the other. What does not fit is one sentence that names the key.
"""

import ctypes
import dataclasses
import difflib
import functools
import importlib.machinery
import json
import logging
import pathlib
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
from absl import flags
from absl import logging as absl_logging
from ml_collections import config_flags

from klear_jax import hosts, preemption
from klear_jax.errors import InputError

CONFIG_FILE = (
    "A file whose get_config() returns the config, such as configs/gppo_tiny.py."
)


def run_main(main: Callable[[list[str]], None]) -> None:
    """Runs a command; an error says its cause (`hosts.cause`) on stderr."""
    keep_programs()
    trim_after_compilations()
    absl_logging.set_verbosity(absl_logging.WARNING)
    absl_logging.set_stderrthreshold("warning")
    ours = logging.getLogger("klear_jax")  # As what programs of the model run under.
    ours.setLevel(logging.INFO)
    ours.handlers = [logging.StreamHandler()]  # One, also if called again.
    ours.propagate = False
    try:
        main(sys.argv)
    except preemption.Preempted:
        if hosts.first():
            print("preempted, and saved: the same command goes on", file=sys.stderr)
        sys.exit(preemption.EXIT_CODE)
    except Exception as error:
        if jax.distributed.is_initialized():
            hosts.fail(error)
        print(f"error: {hosts.cause(error)}", file=sys.stderr)
        sys.exit(hosts.exit_code(error))


def keep_programs() -> None:
    """A second run of the same program skips its compilation."""
    if not jax.config.values["jax_compilation_cache_dir"]:  # JAX_COMPILATION_CACHE_DIR
        cache = pathlib.Path("~/.cache/klear_jax").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache))


def stay_on_cpu() -> None:
    """For a command that computes little: an accelerator has one user at a time, who may be a
    run. Before JAX's first work."""
    jax.config.update("jax_platforms", "cpu")


@functools.cache
def trim_after_compilations() -> None:
    """What the compiler has freed, hundreds of MiB in pieces, goes back to the system each
    time: glibc would keep it. Other C libraries have no such call, and need none."""
    trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None)

    def heard(event: str, duration_secs: float, **about: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            trim(0)

    if trim:
        jax.monitoring.register_event_duration_secs_listener(heard)


def number(
    flags: types.SimpleNamespace, name: str, kind: type[int | float], default: Any
) -> Any:
    """The number that a text flag of `parse_flags` is.

    Raises:
        InputError: it is none.
    """
    text = getattr(flags, name)
    try:
        return default if text is None else kind(text)
    except ValueError:
        what = "whole number" if kind is int else "number"
        raise InputError(f"--{name} must be a {what}, not {text!r}") from None


def parse_flags(
    argv: Sequence[str],
    doc: str,
    texts: Mapping[str, str],
    *,
    switches: Mapping[str, str] = types.MappingProxyType({}),
    with_config: bool = True,
) -> types.SimpleNamespace:
    """Parses a command line of --config=FILE, --config.KEY=VALUE, text flags and switches.

    --help prints `doc` and the flags, and exits.

    Args:
        argv: sys.argv.
        doc: what --help says.
        texts: name -> help of the other flags; each is text, and None if not given.
        switches: name -> help of flags without a value; each is False if not given.
        with_config: whether the command takes --config, which is then required.

    Returns:
        The text flags and switches by name, and `config`: a locked ConfigDict.

    Raises:
        InputError: whatever does not fit, the config file included.
    """
    if with_config:
        texts = {"config": CONFIG_FILE} | dict(texts)
    named = flags.FlagValues()
    for name, text in texts.items():
        flags.DEFINE_string(name, None, text, flag_values=named)
    for name, text in switches.items():
        flags.DEFINE_boolean(name, False, text, flag_values=named)
    texts = dict(texts) | dict(switches)
    flags.DEFINE_boolean("help", False, "Show this.", flag_values=named)
    named.set_gnu_getopt(True)  # Flags may follow a value that stands alone.
    try:
        rest = named(list(argv), known_only=True)
    except flags.Error as error:
        raise InputError(f"in the flags: {_first_line(error)}") from None
    if named.help:
        lines = [f"  --{name}: {text}" for name, text in texts.items()]
        if with_config:
            lines.insert(
                1, "  --config.KEY=VALUE: a value of it, in place of the file's."
            )
        print("\n".join([doc, "Flags:", *lines]))
        sys.exit(0)
    found = types.SimpleNamespace(**{name: named[name].value for name in texts})
    for arg in rest[1:]:
        name = re.sub(r"^--?|=.*", "", arg)
        if arg.startswith("-") and not (with_config and _override_key(arg)):
            raise InputError(f"unknown flag --{name}{_did_you_mean(name, texts)}")
    if with_config:
        if not found.config:
            raise InputError(
                "--config=FILE is missing, for instance --config=configs/gppo_tiny.py"
            )
        found.config, rest = _override(_load_config(found.config), rest)
    if rest[1:]:
        raise InputError(f"unknown arguments {rest[1:]}: flags begin with --")
    return found


def _load_config(path: str) -> ml_collections.ConfigDict:
    """What the file's get_config() returns; whatever goes wrong in it names the line."""
    if not pathlib.Path(path).is_file():
        raise InputError(f"there is no config file {path}")
    module = types.ModuleType("config_file")
    try:
        importlib.machinery.SourceFileLoader("config_file", path).exec_module(module)
        if not hasattr(module, "get_config"):
            raise InputError("it has no function get_config")
        config = module.get_config()
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        if isinstance(error, SyntaxError) and error.filename == path:
            lines = [error.lineno]
        where = f"{path}, line {lines[-1]}," if lines else path
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        raise InputError(
            f"the config file {where} fails: {kind}{_first_line(error)}"
        ) from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise InputError(
            f"get_config() of {path} must return a ConfigDict, not {config!r}"
        )
    return config


def _override_key(arg: str) -> str | None:
    """'--config.rollout.prompts=3' -> 'rollout.prompts'; None for other arguments."""
    match = re.match(r"--?(?:no)?config\.([^=]+)", arg)
    return match and match[1]


def _override(
    config: ml_collections.ConfigDict, argv: Sequence[str]
) -> tuple[ml_collections.ConfigDict, list[str]]:
    """The config with the overrides of a command line, and the arguments that are left."""
    for key in filter(None, map(_override_key, argv[1:])):
        _check_key(config, key)
    for kind, parser in (
        (int, flags.IntegerParser()),
        (float, flags.FloatParser()),
        (bool, flags.BooleanParser()),
    ):
        config_flags.register_flag_parser_for_type(kind, _ValueParser(kind, parser))
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, sys_argv=list(argv)
        )
        rest = values(list(argv))
    except (flags.Error, TypeError, ValueError) as error:
        raise InputError(f"in the flags: {_first_line(error)}") from None
    return values.config, rest


def _check_key(config: ml_collections.ConfigDict, key: str) -> None:
    """Raises unless the config has this key, and a type for it."""
    where, node, names = "config", config, key.split(".")
    for name in names:
        if not isinstance(node, ml_collections.ConfigDict):
            raise InputError(f"{where} is no section, so there is no config.{key}")
        if name not in node:
            raise InputError(f"unknown key {where}.{name}{_did_you_mean(name, node)}")
        where, parent, node = f"{where}.{name}", node, node[name]
    if parent.get_type(names[-1]) is type(None):
        raise InputError(
            f"{where} is None in the config file, which gives it no type: change it there"
        )


class _ValueParser(flags.ArgumentParser[Any]):
    """A value of `kind`, or None: whether the key may be None, `build` says."""

    def __init__(self, kind: type, parser: flags.ArgumentParser[Any]):
        super().__init__()
        self._kind, self._parser = kind, parser

    def parse(self, argument: Any) -> Any:
        if argument in (None, "None"):
            return None
        try:
            return self._parser.parse(argument)
        except (TypeError, ValueError):
            raise ValueError(f"must be of type {self._kind.__name__}") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {sorted(known)}"


def build(cls: type, values: Mapping[str, Any], where: str = "config") -> Any:
    """A nested mapping -> a frozen dataclass, every key checked.

    Raises:
        InputError: an unknown, missing or wrongly typed key, by its full name, or what
            the dataclass itself refuses, by its section.
    """
    hints = typing.get_type_hints(cls)
    if unknown := sorted(set(values) - set(hints)):
        raise InputError(
            f"unknown key {where}.{unknown[0]}{_did_you_mean(unknown[0], hints)}"
        )
    required = {
        f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING
    }
    if missing := sorted(required - set(values)):
        raise InputError(f"{where}.{missing[0]} is not set")
    fields = {
        key: _convert(hints[key], value, f"{where}.{key}")
        for key, value in values.items()
    }
    try:
        return cls(**fields)
    except InputError as error:
        raise InputError(f"in {where}: {error}") from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint`, or an InputError that names the key."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        inner = [h for h in typing.get_args(hint) if h is not type(None)]
        return _convert(inner[0], value, where)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise InputError(f"{where} must be a section of keys, not {value!r}")
        return build(hint, value, where)
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            raise InputError(
                f"{where} must be one of {typing.get_args(hint)}, not {value!r}"
            )
        return value
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise InputError(f"{where} must be a section of keys, not {value!r}")
        inner = typing.get_args(hint)[1]
        return {
            key: _convert(inner, item, f"{where}.{key}") for key, item in value.items()
        }
    if origin is tuple and isinstance(value, list | tuple):
        inner = typing.get_args(hint)[0]
        return tuple(_convert(inner, item, where) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Any or (type(value) is hint):
        return value
    name = getattr(hint, "__name__", str(hint))
    raise InputError(f"{where} must be of type {name}, not {value!r}")


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], where: str = "config"
) -> list[str]:
    """The keys in which two configs differ, with both values, in words."""
    return [f"{where}.{key} was {a!r}, is {b!r}" for key, a, b in changes(old, new)]


def changes(
    old: Mapping[str, Any], new: Mapping[str, Any], section: str = ""
) -> list[tuple[str, Any, Any]]:
    """The keys in which two configs differ, such as 'loss.kind', with both values; None
    where there is no such key."""
    found = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += changes(a, b, f"{section}{key}.")
        elif json.dumps(a) != json.dumps(b):
            found.append((f"{section}{key}", a, b))
    return found
