"""The house: imports go down the list only, and each library lives in its own room."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "klear_jax"

# A file imports only files that stand above it.
ORDER = """
    errors hosts preemption config losses advantages tokens rewards metrics progress guards optim sharding attention
    qwen3 logprobs kv_cache sampling scheduler decoding sampler roofline speed steps hf_weights checkpoint
    data rollout batch estimates answers evaluate sft gppo aot train plan prepare_data export generate report
""".split()

# What is imported (or said) only there.
ROOMS = {
    "ml_collections": {"config"},
    "PartitionSpec": {"sharding"},
    "orbax": {"checkpoint"},
    "safetensors": {"hf_weights"},
    "tokenizers": {"tokens"},
    "sentencepiece": {"tokens"},
    "subprocess": {"rewards"},
    "pickle": set(),
}

UNITS = {
    path: path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imported_names(path):
    """Full names of all that a file imports: modules, and names from them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_every_file_has_its_place():
    assert set(UNITS.values()) - {"__init__"} == set(ORDER)


def test_imports_go_down():
    against = [
        f"{path.name} imports {other}"
        for path, unit in UNITS.items()
        for name in imported_names(path)
        if name.startswith("klear_jax.")
        and (other := name.split(".")[1]) != unit
        and ORDER.index(other) >= ORDER.index(unit)
    ]
    assert not against


@pytest.mark.parametrize("library", ROOMS)
def test_libraries_live_in_one_room(library):
    found = {
        unit
        for path, unit in UNITS.items()
        if any(library in name.split(".") for name in imported_names(path))
    }
    assert found == ROOMS[library]


def test_the_core_knows_no_config():
    for path, unit in UNITS.items():
        if unit in ("losses", "rewards", "sampling", "scheduler", "sampler"):
            assert "klear_jax.config" not in set(imported_names(path)), path
