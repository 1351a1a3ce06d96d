"""Config files and flags become dataclasses; what does not fit is one sentence."""

import dataclasses
import json
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klear_jax import config, train
from klear_jax.errors import InputError

TINY = "--config=configs/gppo_tiny.py"


@dataclasses.dataclass(frozen=True)
class Inner:
    number: int
    share: float
    cap: float | None

    def __post_init__(self):
        if self.share < 0:
            raise InputError(f"share must not be negative: {self.share}")


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    flag: bool
    sizes: tuple[int, ...]
    rules: Mapping[str, tuple[str, ...]]
    options: Mapping[str, float]
    inner: Inner
    extra: Inner | None = None
    kind: Literal["one", "two"] = "one"


def values(**changes):
    """What builds an Outer, with keys such as inner__cap changed."""
    result = {
        "name": "a",
        "flag": True,
        "sizes": (1, 2),
        "rules": {"batch": ("data", "fsdp"), "seq": ()},
        "options": {"right": 1.0},
        "inner": {"number": 3, "share": 0.5, "cap": None},
    }
    for key, value in changes.items():
        *path, name = key.split("__")
        node = result
        for part in path:
            node = node[part]
        node[name] = value
    return result


def test_build():
    inner = Inner(number=3, share=0.5, cap=None)
    rules = {"batch": ("data", "fsdp"), "seq": ()}
    outer = Outer("a", True, (1, 2), rules, {"right": 1.0}, inner)
    assert config.build(Outer, values()) == outer
    given_extra = config.build(Outer, values(extra=values()["inner"]))
    assert given_extra == dataclasses.replace(outer, extra=inner)


@pytest.mark.parametrize(
    "key, value, made",
    [
        ("inner__share", 2, 2.0),  # An integer is a float;
        ("inner__cap", 3, 3.0),
        ("options__right", 1, 1.0),
        ("sizes", [], ()),  # and a list, as JSON gives it, a tuple.
        ("rules__seq", ["tensor"], ("tensor",)),
        ("inner__cap", None, None),
        ("flag", False, False),
    ],
)
def test_build_converts(key, value, made):
    got = config.build(Outer, values(**{key: value}))
    for name in key.split("__"):
        got = got[name] if isinstance(got, Mapping) else getattr(got, name)
    assert got == made
    assert type(got) is type(made)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"nmae": "b"}, r"unknown key config\.nmae; did you mean 'name'\?"),
        ({"inner__caps": 1.0}, r"unknown key config\.inner\.caps; did you mean 'cap'"),
        ({"zzz": 1}, r"unknown key config\.zzz; there are \['extra', 'flag', .*"),
        ({"inner": {"number": 3, "share": 0.5}}, r"config\.inner\.cap is not set"),
        ({"name": 3}, r"config\.name must be of type str, not 3"),
        ({"kind": "on"}, r"config\.kind must be one of \('one', 'two'\), not 'on'"),
        ({"name": None}, r"config\.name must be of type str, not None"),
        ({"flag": 1}, r"config\.flag must be of type bool, not 1"),
        ({"inner__number": True}, r"config\.inner\.number must be .* int, not True"),
        ({"inner__number": 3.0}, r"config\.inner\.number must be .* int, not 3\.0"),
        ({"inner__share": True}, r"config\.inner\.share must be .* float, not True"),
        ({"inner__share": "1"}, r"config\.inner\.share must be .* float, not '1'"),
        ({"inner__cap": "no"}, r"config\.inner\.cap must be of type float, not 'no'"),
        ({"sizes": 3}, r"config\.sizes must be of type tuple, not 3"),
        ({"sizes": (1, "b")}, r"config\.sizes must be of type int, not 'b'"),
        ({"rules__seq": "tensor"}, r"config\.rules\.seq must be of type tuple, .*"),
        ({"rules": 3}, r"config\.rules must be a section of keys, not 3"),
        ({"options__right": None}, r"config\.options\.right must be of type float, .*"),
        ({"inner": 3}, r"config\.inner must be a section of keys, not 3"),
        (
            {"inner__share": -1.0},
            r"in config\.inner: share must not be negative: -1\.0",
        ),
    ],
)
def test_build_refuses(changes, says):
    with pytest.raises(InputError) as raised:
        config.build(Outer, values(**changes))
    assert_one_sentence(raised.value, says)


def assert_one_sentence(error, says):
    assert re.match(says, str(error)), str(error)
    assert "\n" not in str(error)


names = st.text("abcxyz", min_size=1)
inners = st.builds(
    Inner,
    number=st.integers(),
    share=st.floats(0, allow_infinity=False),
    cap=st.none() | st.floats(allow_nan=False),
)
outers = st.builds(
    Outer,
    name=st.text(),
    flag=st.booleans(),
    sizes=st.lists(st.integers()).map(tuple),
    rules=st.dictionaries(names, st.lists(st.text()).map(tuple)),
    options=st.dictionaries(names, st.floats(allow_nan=False)),
    inner=inners,
    extra=st.none() | inners,
)


@given(outers)
def test_build_is_the_inverse_of_asdict_and_of_json(outer):
    found = dataclasses.asdict(outer)
    assert config.build(Outer, found) == outer
    assert config.build(Outer, json.loads(json.dumps(found))) == outer


trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
    lambda leaves: st.lists(leaves) | st.dictionaries(names, leaves),
    max_leaves=5,
)


@given(st.dictionaries(names, trees, max_size=3))
@settings(max_examples=30)
def test_no_differences_after_json(tree):
    assert config.differences(json.loads(json.dumps(tree)), tree) == []


@pytest.mark.parametrize(
    "key, value, says",
    [
        ("name", "b", "config.name was 'a', is 'b'"),
        ("inner__number", 4, "config.inner.number was 3, is 4"),
        ("inner__cap", 0.0, "config.inner.cap was None, is 0.0"),
        ("flag", 1, "config.flag was True, is 1"),
        ("sizes", (2, 1), "config.sizes was (1, 2), is (2, 1)"),
        ("rules__new", (), "config.rules.new was None, is ()"),
        ("inner", 3, f"config.inner was {values()['inner']!r}, is 3"),
    ],
)
def test_differences(key, value, says):
    assert config.differences(values(), values(**{key: value})) == [says]
    both = config.differences(values(flag=3), values(**{"flag": 4, key: value}))
    assert len(both) == 1 + (key != "flag")
    assert config.differences(values(**{key: value}), values(**{key: value})) == []


def parse(*args):
    """The config's dict and the other flags of a command line."""
    found = config.parse_flags(["train", *args], "What it does.", {"workdir": "Where."})
    return found.config.to_dict(), found.workdir


def changed(*args):
    """How a command line changes the config, {key: value}."""

    def leaves(tree, where=""):
        for key, value in tree.items():
            if isinstance(value, dict) and value:
                yield from leaves(value, f"{where}{key}.")
            else:
                yield where + key, value

    before, after = dict(leaves(parse(TINY)[0])), dict(leaves(parse(TINY, *args)[0]))
    return {key: value for key, value in after.items() if value != before.get(key)}


@pytest.mark.parametrize(
    "args, found",
    [
        ([], {}),
        (["--config.rollout.prompts=3"], {"rollout.prompts": 3}),
        (["--config.rollout.prompts", "3"], {"rollout.prompts": 3}),
        (["--config.optim.peak_lr=1e-6"], {"optim.peak_lr": 1e-6}),
        (["--config.optim.peak_lr=1"], {"optim.peak_lr": 1.0}),
        (["--config.loss.kind=clip_higher"], {"loss.kind": "clip_higher"}),
        (["--config.evaluation.greedy=false"], {"evaluation.greedy": False}),
        (
            ["--config.evaluation.greedy", "--noconfig.evaluation.greedy"],
            {"evaluation.greedy": False},
        ),
        (["--config.remat=full"], {"remat": "full"}),
        (["--config.loss.dual_clip=None"], {"loss.dual_clip": None}),
        (["--config.loss.dual_clip=3"], {"loss.dual_clip": 3.0}),
        (["--config.mesh.rules.seq=tensor"], {"mesh.rules.seq": ("tensor",)}),
        (
            ["--config.mesh.rules.seq=('data', 'fsdp')"],
            {"mesh.rules.seq": ("data", "fsdp")},
        ),
        (["--config.mesh.rules.batch=()"], {"mesh.rules.batch": ()}),
        (["--config.seed=1", "--config.seed=2"], {"seed": 2}),
        (
            ["--config.model.yarn={'factor': 2.5, 'original_max_positions': 64}"],
            {"model.yarn.factor": 2.5, "model.yarn.original_max_positions": 64},
        ),
    ],
)
def test_overrides(args, found):
    got = changed(*args)
    assert got == found
    assert [type(value) for value in got.values()] == [
        type(value) for value in found.values()
    ]
    train.parse(parse(TINY, *args)[0])


def test_a_key_set_to_none_in_the_file_keeps_its_type(tmp_path):
    file = tmp_path / "none.py"
    file.write_text(
        "from configs import gppo_tiny\n"
        "def get_config():\n"
        "    c = gppo_tiny.get_config()\n"
        "    c.loss.dual_clip = None\n"
        "    return c\n"
    )
    assert parse(f"--config={file}")[0]["loss"]["dual_clip"] is None
    found, _ = parse(f"--config={file}", "--config.loss.dual_clip=3.0")
    assert found["loss"]["dual_clip"] == 3.0


def test_text_flags():
    assert parse(TINY)[1] is None
    assert parse(TINY, "--workdir=a=b")[1] == "a=b"
    assert parse("--workdir", "a", TINY, "--config.seed", "3")[1] == "a"
    assert parse("--config.seed", "3", TINY, "--workdir=a")[1] == "a"
    found = config.parse_flags(
        ["export", "--output=b"], "", {"output": ""}, with_config=False
    )
    assert vars(found) == {"output": "b"}
    with pytest.raises(InputError, match=r"unknown flag --config\.seed"):
        config.parse_flags(["export", "--config.seed=3"], "", {}, with_config=False)


def test_switches():
    def found(*argv):
        return config.parse_flags(
            ["generate", *argv],
            "",
            {"seed": ""},
            switches={"raw": "Raw."},
            with_config=False,
        )

    assert vars(found("--raw", "--seed=3")) == {"seed": "3", "raw": True}
    assert vars(found()) == {"seed": None, "raw": False}
    with pytest.raises(InputError, match=r"unknown flag --ra; did you mean 'raw'\?"):
        found("--ra")
    with pytest.raises(InputError, match=r"in the flags: flag --raw=3: .*boolean"):
        found("--raw=3")


def test_config_is_locked_and_fresh():
    found = config.parse_flags(["train", TINY, "--config.seed=3"], "", {}).config
    with pytest.raises((KeyError, AttributeError)):
        found.new = 1
    again = config.parse_flags(["train", TINY], "", {}).config
    assert (found.seed, again.seed) == (3, 0)


FLAGS_REFUSED = [
    ([], r"--config=FILE is missing, for instance --config=configs/gppo_tiny\.py"),
    (["--config="], r"--config=FILE is missing"),
    (["--config"], r"in the flags: Missing value for flag --config"),
    (["--config=no.py"], r"there is no config file no\.py"),
    (["--config=configs"], r"there is no config file configs"),
    ([TINY, "--workdr=a"], r"unknown flag --workdr; did you mean 'workdir'\?"),
    (
        [TINY, "--zzz"],
        r"unknown flag --zzz; there are \['config', 'profile', 'workdir'\]",
    ),
    ([TINY, "extra"], r"unknown arguments \['extra'\]: flags begin with --"),
    (
        [TINY, "--config.rollout.prompts=abc"],
        r".*flag --config\.rollout\.prompts=abc: must be of type int",
    ),
    ([TINY, "--config.rollout.prompts=3.0"], r".*prompts=3\.0: must be of type int"),
    ([TINY, "--config.optim.b1=x"], r".*--config\.optim\.b1=x: must be of type float"),
    (
        [TINY, "--config.evaluation.greedy=maybe"],
        r".*--config\.evaluation\.greedy=maybe: must be of type bool",
    ),
    (
        [TINY, "--config.remat=True"],
        r"in config: remat must be one of none, full, .*, not 'True'",
    ),
    (
        [TINY, "--config.rollout.promts=3"],
        r"unknown key config\.rollout\.promts; did you mean 'prompts'\?",
    ),
    ([TINY, "--config.rolout.prompts=3"], r"unknown key config\.rolout; .* 'rollout'"),
    (
        [TINY, "--config.zzz=3"],
        r"unknown key config\.zzz; there are \['checkpoint', .*",
    ),
    ([TINY, "--config.seed.x=3"], r"config\.seed is no section, so .* config\.seed\.x"),
    ([TINY, "--config.loss=3"], r"in the flags: .*--config\.loss=3: Failed to parse"),
    ([TINY, "--config.seed"], r"in the flags: Missing value for flag --config\.seed"),
    ([TINY, "--config.model.yarn.factor=2"], r"config\.model\.yarn is no section"),
    # What the dataclasses refuse.
    ([TINY, "--config.seed=None"], r"config\.seed must be of type int, not None"),
    ([TINY, "--config.task=ppo"], r"config\.task must be one of \['gppo', 'sft'\]"),
    ([TINY, "--config.workdir="], r"name where to write the run: --workdir=DIR"),
    ([TINY, "--config.model.yarn={}"], r"config\.model\.yarn\.factor is not set"),
    ([TINY, "--config.tokenizer=nowhere"], r"nowhere"),
]


@pytest.mark.parametrize("args, says", FLAGS_REFUSED)
def test_bad_command_line_is_one_sentence(args, says, monkeypatch, capsys):
    refused(monkeypatch, capsys, args, says)


def refused(monkeypatch, capsys, args, says):
    """Runs the command; it must end with code 2 and one line on stderr."""
    monkeypatch.setattr(sys, "argv", ["train", *args])
    with pytest.raises(SystemExit) as ended:
        config.run_main(train.main)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert_one_sentence(err.removeprefix("error: ").removesuffix("\n"), says)


@pytest.mark.parametrize(
    "text, says",
    [
        ("a = (\n", r"the config file FILE, line 1, fails: SyntaxError: .*"),
        (
            "\nimport nowhere\n",
            r"the config file FILE, line 2, fails: ModuleNotFound.*",
        ),
        ("x = 1\n", r"the config file FILE fails: it has no function get_config"),
        (
            "def get_config():\n    return None\n",
            r"get_config\(\) of FILE must return .*",
        ),
        (
            "def get_config():\n    return 1 / 0\n",
            r"the config file FILE, line 2, fails: ZeroDivisionError: division by zero",
        ),
        (
            "def get_config():\n    open('/no/such')\n",
            r"the config file FILE, line 2, fails: FileNotFoundError: .*/no/such.*",
        ),
        (
            "from configs import sft_tiny\n"
            "def get_config():\n"
            "    c = sft_tiny.get_config().lock()\n"
            "    c.sed = 3\n",
            r"the config file FILE, line 4, fails: AttributeError: .*sed.*",
        ),
        (
            "import ml_collections\n"
            "def get_config():\n"
            "    return ml_collections.ConfigDict({'a': None})\n",
            r"config\.a is None in the config file, which gives it no type: .*",
        ),
    ],
)
def test_bad_config_file_is_one_sentence(text, says, tmp_path, monkeypatch, capsys):
    file = tmp_path / "bad.py"
    file.write_text(text)
    args = [f"--config={file}", "--config.a=1"]
    refused(monkeypatch, capsys, args, says.replace("FILE", str(file)))


def run(*args):
    return subprocess.run(
        [sys.executable, "-m", "klear_jax.train", *args],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_command_refuses():
    done = run(TINY, "--config.rollout.promts=3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "error: unknown key config.rollout.promts; did you mean 'prompts'?\n"
    )


def test_command_helps():
    done = run("--help")
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.startswith(train.__doc__)
    for flag in ("--config: ", "--config.KEY=VALUE: ", "--workdir: "):
        assert done.stdout.count(f"\n  {flag}") == 1


FREES = """
import jax
from klear_jax.config import trim_after_compilations

def resident_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 >> 20

trim_after_compilations()
pieces = [bytes(10_000) for _ in range(20_000)]
last = pieces[-1]  # Behind what is free, which glibc therefore keeps.
del pieces
before = resident_mib()
jax.jit(lambda x: x + 1)(1)
assert before - resident_mib() > 100, (before, resident_mib())
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other C libraries keep nothing"
)
def test_what_is_free_after_a_compilation_goes_back_to_the_system():
    subprocess.run([sys.executable, "-c", FREES], check=True)
