"""The border between config files and the library: flags and ConfigDicts on one side,
frozen dataclasses on the other. What does not fit is one sentence that names the key.
"""

import dataclasses
import difflib
import json
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags, logging
from ml_collections import config_flags

from klear_jax.errors import InputError


def run_main(main: Callable[[list[str]], None]) -> None:
    """Runs a command; an InputError is one line on stderr and exit code 2."""
    logging.set_verbosity(logging.WARNING)
    logging.set_stderrthreshold("warning")
    try:
        main(sys.argv)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def parse_flags(
    argv: Sequence[str], doc: str, texts: Mapping[str, str], *, with_config: bool = True
) -> flags.FlagValues:
    """Parses a command line of --config=FILE, --config.KEY=VALUE and text flags.

    Args:
        argv: sys.argv.
        doc: what --help says.
        texts: name -> help of the other flags; each is text, and None if not given.
        with_config: whether the command takes --config, which is then required.
    """
    values = flags.FlagValues()
    if with_config:
        config_flags.DEFINE_config_file(
            "config", None, "Config file.", flag_values=values
        )
    for name, text in texts.items():
        flags.DEFINE_string(name, None, text, flag_values=values)
    flags.DEFINE_boolean("help", False, "Show this.", flag_values=values)
    try:
        rest = values(list(argv))[1:]
        if values.help:
            print(f"{doc}\nFlags:\n{values.main_module_help() or values.get_help()}")
            sys.exit(0)
        config = values.config if with_config else None
    except (
        flags.Error,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        OSError,
    ) as error:
        raise InputError(f"in the flags: {_first_line(error)}") from error
    except (SyntaxError, ImportError, NameError) as error:
        raise InputError(f"the config file cannot be run: {error}") from error
    if rest:
        raise InputError(f"unknown arguments {rest}: flags begin with --")
    if with_config and config is None:
        raise InputError(
            "--config=FILE is missing, for instance --config=configs/gppo_tiny.py"
        )
    return values


def _first_line(error: Exception) -> str:
    return (
        str(error).strip().splitlines()[0]
        if str(error).strip()
        else type(error).__name__
    )


def build(cls: type, values: Mapping[str, Any], where: str = "config") -> Any:
    """A nested mapping -> a frozen dataclass, every key checked.

    Raises:
        InputError: an unknown, missing or wrongly typed key, by its full name.
    """
    hints = typing.get_type_hints(cls)
    if unknown := sorted(set(values) - set(hints)):
        close = difflib.get_close_matches(unknown[0], hints, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; it has {sorted(hints)}"
        raise InputError(f"unknown key {where}.{unknown[0]}{hint}")
    required = {
        f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING
    }
    if missing := sorted(required - set(values)):
        raise InputError(f"{where}.{missing[0]} is not set")
    return cls(
        **{
            key: _convert(hints[key], value, f"{where}.{key}")
            for key, value in values.items()
        }
    )


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint`, or an InputError that names the key."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        inner = [h for h in typing.get_args(hint) if h is not type(None)]
        return _convert(inner[0], value, where)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise InputError(f"{where} must be a section of keys, not {value!r}")
        return build(hint, value, where)
    if origin is not None and issubclass(origin, Mapping):
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
    """The keys in which two configs differ, with both values."""
    found = []
    for key in sorted(set(old) | set(new)):
        name = f"{where}.{key}"
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, name)
        elif json.dumps(a) != json.dumps(b):
            found.append(f"{name} was {a!r}, is {b!r}")
    return found
