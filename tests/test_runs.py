"""Whole runs: what is killed and resumed equals what ran through, and bad input stops early."""

import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import gppo_tiny, sft_tiny
from configs.data import sft as prepare_config
from klear_jax import (
    checkpoint,
    evaluate,
    export,
    hf_weights,
    metrics,
    preemption,
    prepare_data,
    rollout,
    tokens,
    train,
)
from klear_jax.config import build
from klear_jax.data import examples, prepare, shards
from klear_jax.errors import InputError

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*Sharding info not provided when restoring.*"
)


def make_data(folder):
    """A small data set and its tokenizer."""
    settings = {
        "task": "chain_sum",
        "num_problems": 400,
        "seed": 0,
        "direct_share": 0.5,
        "generator": {},
    }
    prepare_data.make_problems(folder, settings)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return folder


def small(config, data):
    """A tiny config, made smaller still: 6 steps in seconds."""
    c = config.unlock()
    c.tokenizer = str(data / "tokenizer")
    c.data.path = c.evaluation.data = str(data / "arithmetic" / "1.0.0")
    c.model.width, c.model.num_layers, c.model.mlp_width = 32, 2, 64
    c.model.num_heads, c.model.num_kv_heads, c.model.head_dim = 2, 1, 16
    c.mesh.fsdp = 2
    c.mesh.data, c.mesh.tensor = -1, 1
    c.num_steps = 6
    c.checkpoint.every = 3
    c.evaluation.num_problems, c.evaluation.num_samples = 4, 2
    c.rewards.num_workers = 1
    return c


def start(config, workdir):
    """What `python -m klear_jax.train` does after its flags."""
    task, parsed = train.parse(config.to_dict() | {"workdir": str(workdir)})
    train.TASKS[task][1](parsed)


class Killed(Exception):
    pass


def start_and_kill(config, workdir, monkeypatch, at_step):
    """Dies as the metrics of `at_step` are written, after the checkpoint before it."""
    write = metrics.Writer.write

    def write_or_die(self, step, values):
        if step == at_step:
            raise Killed
        write(self, step, values)

    with monkeypatch.context() as patch:
        patch.setattr(metrics.Writer, "write", write_or_die)
        with pytest.raises(Killed):
            start(config, workdir)


def read_lines(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def start_and_preempt(config, workdir, monkeypatch, every):
    """Starts the run until it ends; each start is told to end at its `every`th look. Returns
    how many starts it took."""
    for starts in range(1, 30):
        looks = itertools.count(1)

        def check(looks=looks):
            if next(looks) == every:
                raise preemption.Preempted

        with monkeypatch.context() as patch:
            patch.setattr(preemption, "check", check)
            try:
                start(config, workdir)
                return starts
            except preemption.Preempted:
                pass
    raise AssertionError("it makes no progress")


def without_times(lines, besides=()):
    return [
        {
            key: value
            for key, value in line.items()
            if not key.startswith(("seconds", "speed", "memory", *besides))
        }
        for line in lines
    ]


def assert_same_run(one, other, besides=()):
    """Parameters, metrics and samples of two workdirs, bit for bit; but for the seconds, and
    metrics whose names begin with one of `besides`."""
    (params, model), (others, same_model) = map(checkpoint.load_model, (one, other))
    assert model == same_model
    jax.tree.map(np.testing.assert_array_equal, params, others)
    lines, other_lines = (
        without_times(read_lines(w / "metrics.jsonl"), besides) for w in (one, other)
    )
    assert [line["step"] for line in lines] == list(range(6))
    assert lines == other_lines
    files, other_files = (sorted((w / "rollouts").glob("*")) for w in (one, other))
    assert [f.name for f in files] == [f.name for f in other_files]
    assert [f.read_text() for f in files] == [f.read_text() for f in other_files]


@pytest.fixture(scope="module")
def sft_run(data, tmp_path_factory):
    """The workdir of an undisturbed SFT run of 6 steps, and its config."""
    workdir = tmp_path_factory.mktemp("sft") / "run"
    config = small(sft_tiny.get_config(), data)
    config.evaluation.every = 6
    start(config, workdir)
    return workdir, config


def small_gppo(data):
    config = small(gppo_tiny.get_config(), data)
    config.init_from = ""
    config.loss.kind = "gppo"  # The paper's, which gppo_tiny has not.
    config.rollout.prompts = config.rollout.max_groups = 8
    config.rollout.filter = "none"  # An untrained model is never right.
    config.minibatch_prompts, config.micro_rows = 4, 32
    config.rollout.max_new_tokens = config.evaluation.max_new_tokens = 12
    return config


@pytest.fixture(scope="module")
def gppo_run(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("gppo") / "run"
    config = small_gppo(data)
    start(config, workdir)
    return workdir, config


def test_sft_learns_and_writes(sft_run):
    workdir, _ = sft_run
    lines = read_lines(workdir / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"] < 7.0  # ln 320 = 5.77.
    assert 0 <= lines[-1]["eval/accuracy"] <= 1
    assert "eval/accuracy" not in lines[0]
    assert {p.name for p in workdir.iterdir()} >= {
        "config.json",
        "model",
        "checkpoints",
    }


def test_sft_killed_and_resumed_equals_undisturbed(sft_run, tmp_path, monkeypatch):
    workdir, config = sft_run
    start_and_kill(config, tmp_path / "run", monkeypatch, at_step=4)
    start(config, tmp_path / "run")
    assert_same_run(workdir, tmp_path / "run")


@pytest.fixture(scope="module")
def prepared(data):
    """The problems as prepare_data makes a data set of them, a twentieth for validation."""
    raw = data / "raw.jsonl"
    rows = examples.read_examples(data / "arithmetic" / "1.0.0", "sft")
    raw.write_text(
        "".join(
            json.dumps({"prompt": row.problem, "response": row.response}) + "\n"
            for row in rows
        )
    )
    c = prepare_config.get_config()
    c.output, c.tokenizer, c.num_workers = str(data), str(data / "tokenizer"), 1
    c.sources = {"raw": {"path": str(raw), "shape": "any", "fields": {}, "weight": 1.0}}
    c.clean.benchmarks, c.choose.validation_percent = (), 5.0
    return prepare.prepare(build(prepare.PrepareConfig, c.to_dict()))


def test_sft_of_prepared_data(prepared, data, tmp_path, monkeypatch):
    """Epochs say the number of steps, held-out samples are validated on, and a run that was
    killed goes on while batches are made ahead."""
    config = small(sft_tiny.get_config(), data)
    config.data.path, config.data.split = str(prepared), "train"
    config.data.prefetch, config.data.streams = 3, 2
    config.batch_rows = config.micro_rows = 16
    config.num_steps, config.num_epochs = 0, 0.75
    config.validation.split, config.validation.every = "validation", 2
    config.validation.batches = 1
    start(config, tmp_path / "whole")
    lines = read_lines(tmp_path / "whole" / "metrics.jsonl")
    assert len(lines) == 6
    assert lines[-1]["epoch"] == pytest.approx(0.75, rel=0.1)
    assert [line["step"] for line in lines if "validation/loss" in line] == [1, 3, 5]
    losses = [line["validation/loss"] for line in lines if "validation/loss" in line]
    assert losses == sorted(losses, reverse=True)
    held_out = shards.read_source(prepared, "validation")
    trained = sum(len(row["tokens"]) - row["prompt_tokens"] for row in held_out)
    assert lines[-1]["validation/tokens"] == trained
    start_and_kill(config, tmp_path / "run", monkeypatch, at_step=4)
    start(config, tmp_path / "run")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_gppo_killed_and_resumed_equals_undisturbed(gppo_run, tmp_path, monkeypatch):
    workdir, config = gppo_run
    start_and_kill(config, tmp_path / "run", monkeypatch, at_step=4)
    start(config, tmp_path / "run")
    assert_same_run(workdir, tmp_path / "run")


# What was drawn before the run was cut off is not drawn again.
NOT_DRAWN_AGAIN = ("sampler/",)


def test_sft_preempted_and_resumed_equals_undisturbed(sft_run, tmp_path, monkeypatch):
    """Looks are one a step, and many in the evaluation at the end."""
    workdir, config = sft_run
    assert start_and_preempt(config, tmp_path / "run", monkeypatch, every=5) > 1
    assert_same_run(workdir, tmp_path / "run")


def test_a_run_goes_on_with_fewer_devices(sft_run, tmp_path, monkeypatch):
    """Two steps on 8 devices, two on 4, two on one, with data streams that outlive it."""
    _, config = sft_run
    config = config.copy_and_resolve_references()
    config.evaluation.every = 0
    config.evaluation.data = "no/such/file"  # Nor is it needed.
    config.checkpoint.every = 2
    config.data.streams = 4
    start(config, tmp_path / "whole")
    devices = jax.devices()
    start_and_kill(config, tmp_path / "run", monkeypatch, at_step=2)
    for count, at_step in ((4, 4), (1, None)):
        config.mesh.fsdp = min(2, count)
        with monkeypatch.context() as patch:
            patch.setattr(jax, "devices", lambda *_, count=count: devices[:count])
            if at_step:
                start_and_kill(config, tmp_path / "run", monkeypatch, at_step)
            else:
                start(config, tmp_path / "run")
    whole, parts = (
        read_lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "run")
    )
    assert [line["step"] for line in parts] == list(range(6))
    for name in ("loss", "grad_norm", "tokens", "tokens_trained", "row_fill"):
        np.testing.assert_allclose(
            [line[name] for line in parts], [line[name] for line in whole], rtol=1e-4
        )


def test_groups_that_go_on_survive_a_kill(data, tmp_path, monkeypatch):
    """Phases end when half of their groups are complete; the others go on in the next,
    also when the process that began them was killed. A phase that is preempted begins
    again."""
    monkeypatch.setattr(rollout, "PREEMPTION_CALLS", 3)
    config = small_gppo(data)
    config.rollout.finish_fraction = 0.5
    config.rollout.prompts, config.rollout.max_groups = 16, 24
    # 3 slots on each of the 8 devices: a group of 8 ends beside a sample of the next.
    config.sampler.num_slots, config.sampler.decode_steps = 24, 4
    start(config, tmp_path / "whole")
    start_and_kill(config, tmp_path / "run", monkeypatch, at_step=4)
    start(config, tmp_path / "run")
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert start_and_preempt(config, tmp_path / "told", monkeypatch, every=14) > 3
    assert_same_run(tmp_path / "whole", tmp_path / "told", NOT_DRAWN_AGAIN)
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert lines[2]["samples/groups_going_on"] > 0  # In the checkpoint before the kill.
    assert all(line["samples/tokens_carried"] > 0 for line in lines[1:])
    # Of what an earlier policy drew, ratios differ from 1 before anything is learnt.
    assert ["ratio_first/spread" in line for line in lines] == [True] + [False] * 5
    groups = [line["samples/groups_used"] for line in lines]
    assert sum(groups) + lines[-1]["samples/groups_going_on"] == 6 * 16
    for line in lines[1:]:
        samples = read_lines(
            tmp_path / "run" / "rollouts" / f"step_{line['step']:06d}.jsonl"
        )
        steps = {step for sample in samples for step in sample["policy_steps"]}
        assert steps == {line["step"] - 1, line["step"]}


def test_surplus_and_refill_survive_a_kill(data, tmp_path, monkeypatch):
    """4 groups a batch, 6 a step: one step needs two batches and leaves two groups, with
    which the next step needs one batch. Preempted, it goes on where it stood: in a batch,
    waiting for rewards, between updates, in an evaluation."""
    monkeypatch.setattr(rollout, "PREEMPTION_CALLS", 5)
    config = small_gppo(data)
    config.rollout.prompts, config.rollout.max_groups = 4, 6
    config.rollout.max_batches, config.rollout.surplus = 2, "carry"
    config.sampler.num_slots, config.sampler.decode_steps = 24, 2
    config.evaluation.every = 4
    start(config, tmp_path / "whole")
    start_and_kill(config, tmp_path / "run", monkeypatch, at_step=4)
    start(config, tmp_path / "run")
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert start_and_preempt(config, tmp_path / "told", monkeypatch, every=11) > 3
    assert_same_run(tmp_path / "whole", tmp_path / "told", NOT_DRAWN_AGAIN)
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    batches = [line["sampler/batches"] for line in lines]
    assert batches == [2, 1] * 3
    assert [line["samples/groups_surplus"] for line in lines] == [2, 0] * 3
    assert [line["samples/groups_used"] for line in lines] == [6] * 6
    assert [line["samples/generated"] for line in lines] == [32 * n for n in batches]
    for step, line in enumerate(lines):
        samples = read_lines(
            tmp_path / "run" / "rollouts" / f"step_{line['step']:06d}.jsonl"
        )
        ages = [step - sample["policy_steps"][0] for sample in samples]
        waited = 16 * (step % 2)  # Written in the step that uses them, not before.
        assert ages == [1] * waited + [0] * (48 - waited)
        prompts = [sample["prompt"] for sample in samples]
        assert len(set(prompts)) == 6  # The second batch is another.


def test_gppo_samples_and_metrics_agree(gppo_run):
    workdir, _ = gppo_run
    for line in read_lines(workdir / "metrics.jsonl"):
        samples = read_lines(workdir / "rollouts" / f"step_{line['step']:06d}.jsonl")
        assert len(samples) == line["samples/generated"] == 64
        rewards = [sample["reward"] for sample in samples]
        np.testing.assert_allclose(np.mean(rewards), line["reward/mean"], rtol=1e-6)
        assert sum(s["num_tokens"] for s in samples) == line["samples/tokens"]
        assert line["updates"] == 2
        assert line["logprob_gap/max"] < 1e-4
        assert {"prompt", "response", "reward", "advantage"} <= samples[0].keys()


def test_finished_run_does_nothing_again(sft_run):
    workdir, config = sft_run
    before = (workdir / "metrics.jsonl").read_text()
    start(config, workdir)
    assert (workdir / "metrics.jsonl").read_text() == before


def test_a_model_is_read_where_there_are_fewer_devices(gppo_run):
    """As on a laptop, after a run on a pod."""
    workdir, _ = gppo_run
    code = (
        "import sys; from klear_jax import checkpoint; import jax; import numpy as np;"
        "params, _ = checkpoint.load_model(sys.argv[1]);"
        "print(len(jax.devices()), np.float64(params['embed'].sum()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(workdir)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    params, _ = checkpoint.load_model(workdir)
    count, total = done.stdout.split()
    assert count == "1" and float(total) == np.float64(params["embed"].sum())
    assert isinstance(params["embed"], np.ndarray)


def test_export_of_a_run(gppo_run, tmp_path):
    workdir, _ = gppo_run
    export.export(str(workdir), str(tmp_path / "out"), np.dtype("float32"))
    params, model = hf_weights.load(tmp_path / "out", dtype=np.float32)
    trained, trained_model = checkpoint.load_model(workdir)
    assert model == trained_model
    jax.tree.map(np.testing.assert_array_equal, params, trained)
    assert (tmp_path / "out" / "tokenizer.model").exists()
    with pytest.raises(Exception, match="already holds a model"):
        export.export(str(workdir), str(tmp_path / "out"), np.dtype("float32"))
    with pytest.raises(InputError, match="out is no run, whose model could be"):
        export.export(
            str(tmp_path / "out"), str(tmp_path / "other"), np.dtype("float32")
        )


@pytest.mark.parametrize("command", ["report", "export"])
def test_who_reads_a_run_leaves_the_accelerator_to_it(gppo_run, tmp_path, command):
    flags = [f"--workdir={gppo_run[0]}", f"--output={tmp_path / 'out'}"]
    subprocess.run(
        [sys.executable, "-m", f"klear_jax.{command}", *flags],
        env=os.environ | {"JAX_PLATFORMS": "tpu"},  # There is none.
        check=True,
    )


@pytest.mark.parametrize("steps_done", [3, 6])
def test_the_card_of_an_export_is_of_its_checkpoint(gppo_run, tmp_path, steps_done):
    workdir, config = gppo_run
    source = workdir / "checkpoints" / "3" if steps_done == 3 else workdir
    # Written for this checkpoint, and for another.
    evaluate.main(
        [
            "evaluate",
            f"--config={write_config(config, tmp_path)}",
            f"--model={source}",
            f"--output={workdir / 'evaluation.json'}",
        ]
    )
    out = tmp_path / "out"
    export.export(str(source), str(out), np.dtype("bfloat16"))
    card = (out / "README.md").read_text()
    assert f"{steps_done} of 6 steps" in card
    line = read_lines(workdir / "metrics.jsonl")[steps_done - 1]
    assert f"| `reward/mean` | {line['reward/mean']:.4g} |" in card
    assert f"| `entropy` | {line['entropy']:.4g} |" in card
    assert "On 4 problems of" in card
    about = json.loads((out / "klear_config.json").read_text())
    assert about["steps_done"] == steps_done
    assert about["config"] == json.loads((workdir / "config.json").read_text())
    export.export(
        str(workdir if steps_done == 3 else workdir / "checkpoints" / "3"),
        str(tmp_path / "other"),
        np.dtype("bfloat16"),
    )
    assert "On 4 problems of" not in (tmp_path / "other" / "README.md").read_text()


def write_config(config, folder):
    """A config file that returns the config."""
    file = folder / "config.py"
    file.write_text(
        "import json, ml_collections\n"
        "def get_config():\n"
        f"    return ml_collections.ConfigDict(json.loads({config.to_json()!r}))\n"
    )
    return file


def write_lines(path, *lines):
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def without_markers(folder, data):
    """A tokenizer whose model lacks the chat markers that its template uses."""
    tokens.train_sentencepiece(["7+5=12"], folder, symbols=())
    template = json.loads((folder / "tokenizer_config.json").read_text())
    template["chat_template"] = "{{ '<|other|>' }}"
    template["eos_token"] = "<|other|>"
    (folder / "tokenizer_config.json").write_text(json.dumps(template))
    return str(folder)


GOOD_ROW = '{"prompt": "7+5=", "answer": "12", "response": "<think></think>12"}'

# What is wrong -> (how a config gets there, what the sentence says).
BAD_INPUT = {
    "no data": (
        lambda c, d, t: c.data.update(path=str(t / "none")),
        "no data set at .*none",
    ),
    "bad line": (
        lambda c, d, t: c.data.update(
            path=write_lines(t / "rows.jsonl", GOOD_ROW, "{broken"), split=""
        ),
        "rows.jsonl line 2",
    ),
    "empty data": (
        lambda c, d, t: c.data.update(path=write_lines(t / "rows.jsonl"), split=""),
        "rows.jsonl holds no examples",
    ),
    "long prompt": (
        lambda c, d, t: c.evaluation.update(every=1, max_prompt_tokens=5),
        "the prompt has .* tokens, the limit is 5",
    ),
    "long sample": (lambda c, d, t: c.data.update(row_tokens=16), "but a row has 16"),
    "no tokenizer": (lambda c, d, t: c.update(tokenizer=str(t)), "tokenizer"),
    "no markers": (
        lambda c, d, t: c.update(tokenizer=without_markers(t / "tokenizer", d)),
        "<\\|",
    ),
    "small vocabulary": (lambda c, d, t: c.model.update(vocab_size=100), "vocab"),
    "no start": (
        lambda c, d, t: c.update(init_from=str(t)),
        "neither a Hugging Face folder",
    ),
    "another model": (
        lambda c, d, t: c.update(
            init_from=str(pathlib.Path(__file__).parent / "golden" / "parity" / "odd")
        ),
        "init_from=.*odd holds Config.* but config.model says",
    ),
    "no reward": (
        lambda c, d, t: c.rewards.kinds.math.update(function="none:f"),
        "there is no module none",
    ),
    "slots do not split": (
        lambda c, d, t: c.sampler.update(num_slots=9),
        "num_slots=9 must be a multiple of the 8 shards",
    ),
    "small cache": (
        lambda c, d, t: c.sampler.update(pool_tokens=640),
        "pool_tokens=640 cannot hold one row of 72 tokens on each of 8 .* make it 768",
    ),
    "rows do not split": (
        lambda c, d, t: c.update(batch_rows=9, micro_rows=9),
        "micro_rows=9 must be a multiple of the 8 shards",
    ),
}


@pytest.mark.parametrize("what", BAD_INPUT)
def test_bad_input_is_one_sentence_before_any_work(what, data, tmp_path):
    spoil, sentence = BAD_INPUT[what]
    config = small(sft_tiny.get_config(), data)
    spoil(config, data, tmp_path)
    with pytest.raises(InputError, match=sentence) as error:
        start(config, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_workdir_of_another_config_is_refused(sft_run):
    workdir, config = sft_run
    other = config.copy_and_resolve_references()
    other.optim.peak_lr = 1.0
    with pytest.raises(InputError, match=r"config.optim.peak_lr was 0.005, is 1.0"):
        start(other, workdir)


def test_another_start_may_have_other_workers_and_another_place(sft_run, tmp_path):
    workdir, config = sft_run
    moved = tmp_path / "moved"
    shutil.copytree(workdir, moved)
    other = config.copy_and_resolve_references()
    other.rewards.num_workers, other.checkpoint.keep = 2, 5
    start(other, moved)  # Finished, so that there is nothing to do.
    assert read_lines(moved / "metrics.jsonl") == read_lines(workdir / "metrics.jsonl")


def test_truncated_data_set_is_named(data, tmp_path):
    shutil.copytree(data / "arithmetic" / "1.0.0", tmp_path / "data")
    (file,) = (tmp_path / "data").glob("*-sft.array_record*")
    file.write_bytes(file.read_bytes()[:1000])
    config = small(sft_tiny.get_config(), data)
    config.data.path = str(tmp_path / "data")
    with pytest.raises(InputError, match="data"):
        start(config, tmp_path / "run")
