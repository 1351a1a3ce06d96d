"""Checkpoints: what is kept, what a damaged one does, and what they say of themselves."""

import dataclasses
import errno
import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from klear_jax import checkpoint, steps
from klear_jax.errors import InputError

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*Sharding info not provided when restoring.*"
)


class Data:
    """A place in data that is a number."""

    def __init__(self, place=0):
        self.place = place

    def get_state(self):
        return self.place

    def set_state(self, place):
        self.place = place


@dataclasses.dataclass(frozen=True)
class Run:
    seed: int = 0


def make_state(value):
    params = {"w": jnp.full((4, 3), value), "b": jnp.arange(3.0) + value}
    return steps.init_state(params, optax.scale_by_adam())


def opened(workdir, **changes):
    values = {"every": 1, "keep": 2, "keep_best": "", "grace_s": 9.0} | changes
    return checkpoint.Checkpoints(workdir, checkpoint.CheckpointConfig(**values), Run())


def restored(checkpoints):
    data = Data()
    state = checkpoints.restore(jax.eval_shape(lambda: make_state(0.0)), data)
    return float(state.params["b"][0]), data.place


def saved(workdir, *numbers, **changes):
    with opened(workdir, **changes) as checkpoints:
        for number in numbers:
            checkpoints.save(number, make_state(number), Data(10 * number), [number])


def numbers(folder):
    return sorted(int(path.name) for path in folder.iterdir())


def test_a_workdir_is_of_one_run_at_a_time(tmp_path):
    in_use = pytest.raises(InputError, match="is in use: another process is training")
    with checkpoint.only_run(tmp_path), in_use, checkpoint.only_run(tmp_path):
        pass
    with checkpoint.only_run(tmp_path), checkpoint.only_run("gs://bucket/run"):
        pass


def test_the_newest_are_kept_and_say_where_they_come_from(tmp_path):
    saved(tmp_path, 1, 2, 3)
    assert numbers(tmp_path / "checkpoints") == [2, 3]
    with opened(tmp_path) as checkpoints:
        assert checkpoints.steps_done == 3
        assert restored(checkpoints) == (3.0, 30)
        assert checkpoints.under_way() == [3]
    about = json.loads((tmp_path / "checkpoints/3/about/metadata").read_text())
    assert about["config"] == {"seed": 0} and about["steps_done"] == 3
    assert len(about["config_sha256"]) == 64
    assert about["versions"]["jax"] == jax.__version__
    assert {"python", "jaxlib", "optax", "orbax-checkpoint"} < about["versions"].keys()


def test_the_best_is_kept_as_well(tmp_path):
    """Of the newest among equals; those without the metric are worse than any."""
    scores = {1: 0.2, 2: 0.7, 3: 0.7, 4: None, 5: 0.1, 6: 0.5}
    with opened(tmp_path, keep=1, keep_best="eval/accuracy") as checkpoints:
        for number, score in scores.items():
            values = {} if score is None else {"eval/accuracy": score}
            checkpoints.save(number, make_state(number), Data(), None, values)
    assert numbers(tmp_path / "checkpoints") == [3, 6]
    with opened(tmp_path, keep=1, keep_best="eval/accuracy") as checkpoints:
        checkpoints.save(7, make_state(7.0), Data(), None, {"eval/accuracy": 0.6})
    assert numbers(tmp_path / "checkpoints") == [3, 7]


def test_within_a_step_goes_before_the_step_and_after_a_later_one(tmp_path):
    saved(tmp_path, 3)
    with opened(tmp_path) as checkpoints:
        checkpoints.save_preempted(
            3, make_state(3.25), Data(31), "a quarter", begun=True
        )
        checkpoints.save_preempted(3, make_state(3.5), Data(32), "a half", begun=True)
    assert len(numbers(tmp_path / "preempted")) == 1
    with opened(tmp_path) as checkpoints:
        assert checkpoints.steps_done == 3
        assert restored(checkpoints) == (3.5, 32)
        assert checkpoints.under_way() == "a half"
        checkpoints.save(4, make_state(4.0), Data(40), None)
        checkpoints.save(5, make_state(5.0), Data(50), None)
    assert not numbers(tmp_path / "preempted")
    with opened(tmp_path) as checkpoints:
        assert restored(checkpoints) == (5.0, 50)


def test_what_is_saved_already_is_not_saved_again(tmp_path):
    with opened(tmp_path) as checkpoints:
        checkpoints.save_preempted(0, make_state(0.0), Data(), None, begun=False)
        checkpoints.save(1, make_state(1.0), Data(), None)
        checkpoints.save_preempted(1, make_state(1.0), Data(), None, begun=False)
        assert not numbers(tmp_path / "preempted")
        checkpoints.save_preempted(2, make_state(2.0), Data(), None, begun=False)
        assert numbers(tmp_path / "preempted") == [1]


def test_what_was_saved_within_a_step_goes_at_the_end_of_the_run(tmp_path):
    with opened(tmp_path) as checkpoints:
        checkpoints.save_preempted(0, make_state(0.5), Data(), None, begun=True)
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1.0), Data(), None)
    assert not numbers(tmp_path / "preempted")


def test_another_metric_may_say_what_is_best(tmp_path):
    for name, number in (("a", 1), ("b", 2), ("b", 3)):
        with opened(tmp_path, keep=1, keep_best=name) as checkpoints:
            score = {name: float("nan") if number == 3 else 0.5}
            checkpoints.save(number, make_state(1.0), Data(), None, score)
    assert numbers(tmp_path / "checkpoints") == [2, 3]


def test_a_run_preempted_in_its_first_step(tmp_path):
    with opened(tmp_path) as checkpoints:
        assert checkpoints.empty and checkpoints.under_way() is None
        checkpoints.save_preempted(0, make_state(0.5), Data(5), "begun", begun=True)
    with opened(tmp_path) as checkpoints:
        assert checkpoints.steps_done == 0 and not checkpoints.empty
        assert restored(checkpoints) == (0.5, 5)
        assert checkpoints.under_way() == "begun"


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("folder", ["checkpoints/2", "preempted/1"])
def test_whatever_file_is_damaged_it_is_seen(tmp_path, folder):
    saved(tmp_path, 1, 2)
    with opened(tmp_path) as checkpoints:
        checkpoints.save_preempted(2, make_state(2.5), Data(), None, begun=True)
    target = epath.Path(tmp_path / folder)
    assert checkpoint.damage(target) == ""
    files = [path for path in (tmp_path / folder).rglob("*") if path.is_file()]
    assert len(files) > 10
    for file in files:
        whole = file.read_bytes()
        for harm in (flip, truncate) if whole else ():
            harm(file)
            assert checkpoint.damage(target), (file, harm)
        file.unlink()
        # Without its digests, it is as if it had been killed before it was read back.
        assert checkpoint.damage(target) or file.name.startswith("digests"), file
        file.write_bytes(whole)
    assert checkpoint.damage(target) == ""


@pytest.mark.parametrize(
    "folder, before", [("checkpoints/2", 1.0), ("preempted/1", 2.0)]
)
def test_the_one_before_a_damaged_one_is_used(tmp_path, caplog, folder, before):
    saved(tmp_path, 1, 2)
    if folder == "preempted/1":
        with opened(tmp_path) as checkpoints:
            checkpoints.save_preempted(2, make_state(2.5), Data(), None, begun=True)
    flip(next((tmp_path / folder / "params/d").iterdir()))
    with caplog.at_level(logging.ERROR), opened(tmp_path) as checkpoints:
        assert restored(checkpoints)[0] == before
        # What the run would do next: the same number again.
        checkpoints.save(int(before) + 1, make_state(7.0), Data(), None)
    assert "DAMAGED CHECKPOINT" in caplog.text
    aside = tmp_path / "damaged" / f"{folder.replace('/', '_')}_0"
    assert aside.is_dir() and "params/d/" in aside.with_suffix(".txt").read_text()
    with opened(tmp_path) as checkpoints:
        assert restored(checkpoints)[0] == 7.0


def test_storage_that_does_not_answer_is_no_damage(tmp_path, monkeypatch):
    """It ends the run, which may be started again, and no checkpoint is set aside."""
    saved(tmp_path, 1, 2)
    digest = checkpoint._digest

    def fail(file):
        raise OSError(errno.EIO, "Input/output error", str(file))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_digest", fail)
        with pytest.raises(OSError, match="Input/output error"):
            opened(tmp_path)
    assert checkpoint._digest is digest and not (tmp_path / "damaged").exists()
    with opened(tmp_path) as checkpoints:
        assert restored(checkpoints)[0] == 2.0


def test_when_none_is_left_the_run_does_not_begin_anew(tmp_path):
    saved(tmp_path, 1, 2)
    for number in "12":
        flip(next((tmp_path / "checkpoints" / number / "params/d").iterdir()))
    for _ in range(2):  # And the next start says it, too.
        with pytest.raises(InputError, match=r"all checkpoints of .* are damaged, see"):
            opened(tmp_path)


def test_one_that_was_not_finished_is_not_seen(tmp_path):
    saved(tmp_path, 1, 2)
    shutil.copytree(
        tmp_path / "checkpoints/2", tmp_path / "checkpoints/3.orbax-checkpoint-tmp-17"
    )
    with opened(tmp_path) as checkpoints:
        assert checkpoints.steps_done == 2


def test_one_that_was_not_read_back_is_used(tmp_path):
    """The run was killed in between; it had been finished."""
    saved(tmp_path, 1, 2)
    (tmp_path / "checkpoints/2/digests.0.json").unlink()
    with opened(tmp_path) as checkpoints:
        assert restored(checkpoints) == (2.0, 20)


def test_one_that_was_neither_read_back_nor_written_whole(tmp_path, caplog):
    saved(tmp_path, 1, 2)
    (tmp_path / "checkpoints/2/digests.0.json").unlink()
    truncate(tmp_path / "checkpoints/2/data/metadata")
    with opened(tmp_path) as checkpoints:
        assert restored(checkpoints) == (1.0, 10)


@pytest.mark.parametrize(
    "text",
    ["[1]", "[" * 100_000, '{"/dev/zero": [1, 1]}', '{"../../x": [1, 1]}', "{}x"],
)
def test_digests_of_a_stranger(tmp_path, text):
    saved(tmp_path, 1)
    (tmp_path / "checkpoints/1/digests.0.json").write_text(text)
    assert checkpoint.damage(epath.Path(tmp_path / "checkpoints/1"))


def test_a_checkpoint_of_other_software_is_said(tmp_path, caplog, monkeypatch):
    saved(tmp_path, 1)
    monkeypatch.setattr(checkpoint.platform, "python_version", lambda: "3.99.0")
    with opened(tmp_path) as checkpoints, caplog.at_level(logging.WARNING):
        assert restored(checkpoints) == (1.0, 10)
    assert "version of.python was '3." in caplog.text


def test_what_goes_wrong_behind_is_said_by_the_next_save(tmp_path, monkeypatch):
    def full(folder):
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(checkpoint, "write_digests", full)
    with pytest.raises(OSError, match="No space left"), opened(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1.0), Data(), None)
        checkpoints.save(2, make_state(2.0), Data(), None)


def test_digests_see_each_byte(tmp_path):
    saved(tmp_path, 1)
    folder = epath.Path(tmp_path / "checkpoints/1")
    assert checkpoint.damage(folder) == ""
    file = tmp_path / "checkpoints/1/data/metadata"
    text = file.read_bytes()
    for place in range(len(text)):
        file.write_bytes(text[:place] + bytes([text[place] ^ 4]) + text[place + 1 :])
        assert checkpoint.damage(folder) == "data/metadata is damaged"
    file.write_bytes(text)
    assert checkpoint.damage(folder) == ""
    np.testing.assert_equal(checkpoint._digest(epath.Path(file))[0], len(text))
