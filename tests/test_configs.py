"""Every config of configs/: its keys, its numbers, and its programs on abstract arrays.

The programs are lowered for 8 devices, those of the 8B configs for fsdp 2 x tensor 4: all
shapes and shardings are checked, and no array is made.
"""

import ast
import dataclasses
import functools
import importlib
import itertools
import math
import pathlib
import typing
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from klear_jax import (
    batch,
    config,
    decoding,
    evaluate,
    gppo,
    optim,
    qwen3,
    sampler,
    sampling,
    sft,
    steps,
    train,
)
from klear_jax.data import prepare
from klear_jax.errors import InputError
from klear_jax.rewards import routing
from klear_jax.sharding import Layout, make_mesh

FOLDER = pathlib.Path(__file__).parent.parent / "configs"
NAMES = sorted(file.stem for file in FOLDER.glob("*_*.py"))
GPPO = [name for name in NAMES if name.startswith("gppo")]
SFT = [name for name in NAMES if name.startswith("sft")]
ROW = {"tokens": jnp.int32, "positions": jnp.int32, "segment_ids": jnp.int32}
SFT_ROW = ROW | {"weight": jnp.float32}
GPPO_ROW = SFT_ROW | dict.fromkeys(
    ("positive_weight", "old_logp", "advantage"), jnp.float32
)
SOURCES = ("[P]", "[R]", "[V]", "[ours]")
UPDATE = {"loss", "grad_norm", "update_norm", "param_norm"}


def get(name):
    return importlib.import_module(f"configs.{name}").get_config()


def parse(name, changes=()):
    """The task and dataclass of a config, with {key: value} in place of its values."""
    c = get(name)
    c.update_from_flattened_dict(dict(changes))
    return train.parse(c.to_dict())


def make_layout(c):
    return Layout(make_mesh(c.mesh), c.mesh.rules)


def test_the_config_for_any_model_is_one_of_evaluate():
    c = get("evaluate").to_dict()
    names = {field.name for field in dataclasses.fields(evaluate.CommandConfig)}
    parsed = config.build(evaluate.CommandConfig, {name: c[name] for name in names})
    assert parsed.evaluation.samplings() == [sampling.Sampling(0.6, 0.95)]
    layout = make_layout(parsed)
    sampler.check_engine(parsed.sampler, layout, parsed.evaluation.row_tokens)


def test_all_are_here():
    assert {name.removeprefix("sft_").removeprefix("gppo_") for name in NAMES} == {
        *("8b", "code_8b", "tiny", "code_tiny", "smollm2")
    }


def fields(cls, where=""):
    """The full names of the leaves of a dataclass; a mapping's keys are free."""
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from fields(hint, f"{where}{name}.")
        else:
            yield where + name


def leaves(tree, known, where=""):
    for name, value in tree.items():
        if isinstance(value, Mapping) and where + name not in known:
            yield from leaves(value, known, f"{where}{name}.")
        else:
            yield where + name


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_a_field_and_every_field_is_set(name):
    values = get(name).to_dict()
    cls, _ = train.TASKS[values.pop("task")]
    known = set(fields(cls))
    assert set(leaves(values, known)) == known


@pytest.mark.parametrize("name", ["sections", "sft_8b", "gppo_8b", "gppo_code_8b"])
def test_every_number_has_a_source(name):
    text = (FOLDER / f"{name}.py").read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Assign) and any(
            isinstance(part, ast.Constant) and isinstance(part.value, int | float)
            for part in ast.walk(node.value)
        ):
            lines = text.splitlines()[node.lineno - 1 : node.end_lineno]
            assert any(tag in " ".join(lines) for tag in SOURCES), lines


@pytest.mark.parametrize("name", NAMES)
def test_get_config_gives_a_new_one(name):
    before, one = get(name).to_dict(), get(name)
    one.model.width += 1
    one.optim.peak_lr *= 2
    one.evaluation.every += 1
    assert get(name).to_dict() == before


@pytest.mark.parametrize("name", NAMES)
def test_tasks_and_workdirs(name):
    task, c = parse(name)
    assert task == name.split("_")[0]
    workdirs = {
        "gppo_smollm2": "runs/smollm2/gppo",
        "sft_smollm2": "runs/gsm_symbolic/run",
    }
    assert c.workdir == workdirs.get(name, f"runs/{name}")
    follows = {
        "gppo_smollm2": "runs/smollm2/model",
        "sft_smollm2": "runs/smollm2/model",
        "gppo_code_tiny": "runs/sft_code_tiny",
        "gppo_tiny": "runs/sft_tiny",
        "gppo_8b": "runs/sft_8b",
        "gppo_code_8b": "runs/gppo_8b",
    }
    if name in follows:
        assert c.init_from == follows[name]


def test_stages_share_what_they_must():
    for names in (
        ("sft_tiny", "gppo_tiny"),
        ("sft_code_tiny", "gppo_code_tiny"),
        ("sft_8b", "gppo_8b", "gppo_code_8b"),
    ):
        stages = [parse(name)[1] for name in names]
        for key in ("model", "tokenizer", "mesh", "dtype"):
            assert len({repr(getattr(c, key)) for c in stages}) == 1, key


VALUES = {"correct": 1.0, "wrong": -1.0, "no_think_end": -0.5, "no_think_start": -2.0}

# Paper and recipe: what must not change by accident.
NUMBERS = {
    "sft_8b": {
        "model.num_layers": 36,
        "model.num_kv_heads": 8,
        "dtype": "bfloat16",
        "data.row_tokens": 32768,
        "optim.peak_lr": 8e-5,
        "optim.end_lr": 4e-5,
        "optim.decay": "cosine",
        "num_epochs": 4.0,
        "evaluation.num_samples": 64,
        "evaluation.temperature": 0.6,
        "evaluation.top_p": 0.95,
        "evaluation.max_new_tokens": 32768,
    },
    "gppo_8b": {
        "rollout.prompts": 256,
        "rollout.max_groups": 128,
        "rollout.samples_per_prompt": 8,
        "rollout.max_prompt_tokens": 4096,
        "rollout.max_new_tokens": 32768,
        "rollout.row_tokens": 36864,
        "rollout.temperature": 1.0,
        "rollout.top_p": 1.0,
        "rollout.top_k": 0,
        "rollout.filter": "reward",
        "rollout.normalize_std": True,
        "data.too_long": "truncate_left",
        "rollout.max_batches": 1,
        "rollout.surplus": "discard",
        "rollout.max_accuracy": 1.0,
        "rollout.drop_unfinished": False,
        "rollout.overlong_tokens": 0,
        "rewards.kind": "math",
        "rewards.kinds": {
            "math": routing.Kind("math", VALUES),
            "code": routing.Kind(
                "code",
                VALUES
                | {
                    "soft": True,
                    "max_tests": 16,
                    "memory_mb": 1024,
                    "isolation": "auto",
                },
            ),
        },
        "rewards.sources": {
            "math_longcot_math_verify": "math",
            "coder1_longcot": "code",
            "livecodebench": "code",
            "humaneval": "code",
        },
        "rewards.full_credit": 1.0,
        "loss.kind": "gppo",
        "loss.clip_low": 0.2,
        "loss.clip_high": 0.28,
        "loss.beta_low": 1.0,
        "loss.beta_high": 1.0,
        "loss.dual_clip": 10.0,
        "loss.aggregation": "token_mean",
        "loss.positive_coef": 0.1,
        "minibatch_prompts": 16,
        "optim.peak_lr": 1e-6,
        "optim.end_lr": 1e-6,
        "optim.warmup_steps": 10,
        "optim.warmup_from": 0.1,
        "optim.b1": 0.9,
        "optim.b2": 0.999,
        "optim.eps": 1e-8,
        "optim.weight_decay": 0.1,
        "optim.clip_norm": 1.0,
        "evaluation.temperature": 0.6,
        "evaluation.top_p": 0.95,
        "evaluation.top_k": 0,
        "evaluation.num_samples": 32,
        "evaluation.every": 5,
        "checkpoint.every": 5,
    },
    "gppo_code_8b": {
        "rewards.kind": "code",
        "minibatch_prompts": 32,
        "optim.peak_lr": 5e-7,
        "optim.end_lr": 5e-7,
        "evaluation.num_samples": 4,
    },
}


VARIANTS = {
    "clip_higher": {"loss.kind": "clip_higher"},
    "cispo": {"loss.kind": "cispo", "loss.dual_clip": None},
    "ce_gppo": {"loss.beta_low": 0.25},
    "only_high": {"loss.kind": "gppo_only_high"},
    "hard_reward": {
        "rewards.kinds.code.options.soft": False,
        "rollout.max_new_tokens": 16_384,
        "rollout.drop_unfinished": True,
        "num_steps": 100,
    },
    "alpha_0": {"loss.positive_coef": 0.0, "num_steps": 100},
    "alpha_0_05": {"loss.positive_coef": 0.05, "num_steps": 100},
    "alpha_0_2": {"loss.positive_coef": 0.2, "num_steps": 100},
    "no_filter": {
        "rollout.filter": "none",
        "rollout.max_groups": 256,
        "num_steps": 100,
    },
}
BENCHMARKS = "data/aime24.qs.jsonl,data/aime25.qs.jsonl,data/HMMT-202502.jsonl"
PAPER = {
    "workdir": "runs/gppo_8b",
    "evaluation.data": BENCHMARKS,
    "evaluation.num_samples": 64,
}
LONG = PAPER | {
    "model.yarn": ml_collections.ConfigDict(
        {
            "factor": 2.5,
            "original_max_positions": 32_768,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "attention_factor": None,
        }
    ),
    "model.max_positions": 81_920,
    "evaluation.max_new_tokens": 65_536,
}
VARIANTS |= {
    "evaluate_paper": PAPER,
    "evaluate_64k": LONG,
    "evaluate_authors": LONG
    | {
        "evaluation.top_k": 20,
        "evaluation.repetition_penalty": 1.05,
        "evaluation.seed": 0,
    },
}


def test_variants_differ_only_in_what_they_are_named_for():
    found = {file.stem for file in (FOLDER / "variants").glob("*.py")}
    assert found == set(VARIANTS)
    for name, changes in VARIANTS.items():
        base = get("gppo_code_8b" if name == "hard_reward" else "gppo_8b")
        base.update_from_flattened_dict({"workdir": f"runs/{name}"} | changes)
        values = get(f"variants.{name}").to_dict()
        assert values == base.to_dict(), name
        assert train.parse(values)[0] == "gppo"


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name):
    _, c = parse(name)
    got = {key: functools.reduce(getattr, key.split("."), c) for key in NUMBERS[name]}
    assert got == NUMBERS[name]


def test_code_differs_from_math_only_where_it_says():
    one, other = (get(name).to_dict() for name in ("gppo_8b", "gppo_code_8b"))
    changed = {line.split()[0] for line in config.differences(one, other)}
    assert changed == {
        f"config.{key}"
        for key in (
            *("workdir", "init_from", "data.path", "minibatch_prompts"),
            *("rewards.kind", "optim.peak_lr", "optim.end_lr"),
            *("evaluation.data", "evaluation.num_samples"),
        )
    }


@pytest.mark.parametrize(
    "name, groups, sizes",
    [
        ("gppo_8b", 128, [16] * 8),
        ("gppo_code_8b", 128, [32] * 4),
        ("gppo_8b", 17, [9, 8]),
        ("gppo_8b", 0, []),
    ],
)
def test_updates_of_a_rollout_batch(name, groups, sizes):
    _, c = parse(name)
    n = c.rollout.samples_per_prompt
    ones = np.ones((groups * n, 2), np.float32)
    groups_B = np.arange(groups).repeat(n)
    minis = batch.mini_batches(
        {"mask": ones, "behaviour_logp": ones},
        groups_B,
        ones[:, 0],
        batch.mini_batch_rows(groups_B, c.minibatch_prompts),
        aggregation=c.loss.aggregation,
        norm_tokens=c.rollout.max_new_tokens,
    )
    rows = [len(mini["weight"]) for mini in minis]
    assert rows == [n * size for size in sizes]
    # All samples of a mini-batch have room in the program's micro-batches.
    room = gppo.num_micro(c, c.minibatch_prompts) * c.micro_rows
    assert all(count <= room for count in rows)


@pytest.mark.parametrize(
    "name, step, rate",
    [
        ("gppo_8b", 0, 1e-7),
        ("gppo_8b", 5, 5.5e-7),
        ("gppo_8b", 10, 1e-6),
        ("gppo_8b", 239, 1e-6),
        ("gppo_code_8b", 0, 5e-8),
        ("gppo_code_8b", 239, 5e-7),
        ("sft_8b", 1_460, 8e-5),
        ("sft_8b", 14_599, 4e-5),
    ],
)
def test_learning_rates(name, step, rate):
    _, c = parse(name)
    num_steps = c.num_steps or 14_600  # Of sft_8b: num_epochs decide.
    assert optim.learning_rate(c.optim, step, num_steps) == pytest.approx(rate)


def test_parameters_of_8b():
    _, c = parse("gppo_8b")
    table = jax.tree.leaves(qwen3.param_table(c.model))
    assert sum(math.prod(param.shape) for param in table) == 8_190_735_360


def abstract_state(c, layout):
    """The train state as shapes, and its shardings."""
    state = jax.eval_shape(
        lambda: steps.init_state(
            qwen3.init_params(c.model, jax.random.key(0)), optim.optimizer(c.optim)
        )
    )
    params_shardings = qwen3.params_shardings(c.model, layout)
    return state, steps.state_shardings(state, params_shardings, layout)


def shapes(size, dtypes):
    return {name: jax.ShapeDtypeStruct(size, dtype) for name, dtype in dtypes.items()}


def lower_train_step(c, layout, size, row):
    """Lowers the update, checks its state, and returns its metrics as shapes."""
    module = sft if isinstance(c, sft.SftConfig) else gppo
    steps.check_micro_rows(c.micro_rows, layout)
    state, shardings = abstract_state(c, layout)
    update = steps.compile_train_step(module.train_step(c, layout), layout, shardings)
    lowered = update.lower(state, shapes(size, row), 1, 1e-6)
    new_state, metrics = lowered.out_info
    got, want = (
        [(x.shape, x.dtype) for x in jax.tree.leaves(s)] for s in (new_state, state)
    )
    assert got == want
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    for x in jax.tree.leaves((state.params, state.opt_state)):
        assert x.dtype == (jnp.float32 if x.ndim else jnp.int32)
    if "log_ratio" in metrics:
        log_ratio = metrics.pop("log_ratio")
        assert (log_ratio.shape, log_ratio.dtype) == (size, jnp.float16)
    assert {x.dtype for x in metrics.values()} == {jnp.dtype("float32")}
    assert {name for name, x in metrics.items() if x.shape} <= {"ratios_below"}
    return set(metrics)


@pytest.mark.parametrize("name", SFT)
def test_sft_programs(name):
    _, c = parse(name)
    layout = make_layout(c)
    size = (c.batch_rows // c.micro_rows, c.micro_rows, c.data.row_tokens)
    metrics = lower_train_step(c, layout, size, SFT_ROW)
    assert metrics == UPDATE | {"tokens", "tokens_likely", "tokens_real", "samples"}
    state, shardings = abstract_state(c, layout)
    validate = steps.compile_score_step(
        sft.loss_step(c, layout), layout, shardings.params
    )
    found = validate.lower(state.params, shapes(size, SFT_ROW), 1).out_info
    assert set(found) == {"loss", "tokens", "tokens_likely", "tokens_real", "samples"}


@pytest.mark.parametrize("name", GPPO)
def test_gppo_programs(name):
    _, c = parse(name)
    layout = make_layout(c)
    M, B, T = gppo.num_micro(c, c.minibatch_prompts), c.micro_rows, c.rollout.row_tokens
    regions = {
        f"{of}{region}"
        for of in ("tokens", "movable", "grad_mass")
        for region in ("", "_low", "_high", "_dual")
    }
    metrics = lower_train_step(c, layout, (M, B, T), GPPO_ROW)
    losses = {"policy_loss", "positive_loss", "entropy", "kl_old", "ratio_capped"}
    losses |= {"ratios_below"}
    assert metrics == UPDATE | losses | regions

    M = gppo.num_micro(c, c.rollout.max_groups)
    state, shardings = abstract_state(c, layout)
    score = jax.jit(
        gppo.score_step(c, layout), in_shardings=(shardings.params, None, None)
    )
    logp = score.lower(state.params, shapes((M, B, T), ROW), 1).out_info
    assert (logp.shape, logp.dtype) == ((M, B, T), jnp.float32)
    assert c.rollout.max_groups * c.rollout.samples_per_prompt <= M * B


@pytest.mark.parametrize(
    "name, kernel",
    [
        *itertools.product(["sft_tiny", "gppo_tiny", "sft_8b", "gppo_8b"], ["xla"]),
        *itertools.product(["sft_8b", "gppo_8b"], ["tpu"]),  # It wants heads of 128.
    ],
)
def test_sampler_programs(name, kernel):
    task, c = parse(name)
    if kernel == "xla" and "8b" in name:
        # Unrolled, all 36 layers would take long to trace.
        c = dataclasses.replace(c, model=dataclasses.replace(c.model, num_layers=2))
    s = c.rollout if task == "gppo" else c.evaluation
    layout = make_layout(c)
    slot_tokens = s.max_prompt_tokens + s.max_new_tokens
    shape = sampler.program_shape(c.sampler, layout, slot_tokens, kernel=kernel)
    assert shape.block_tokens == {"xla": 16, "tpu": c.sampler.page_tokens}[kernel]
    programs = decoding.trace_programs(
        shape,
        s.sampling(),
        config=c.model,
        layout=layout,
        dtype=c.dtype,
        kernel=kernel,
        platform="cpu",
    )
    assert shape.replicas * shape.slots == c.sampler.num_slots
    # The whole of the longest row, and a page to copy, fits into every replica.
    assert shape.pages > shape.slot_pages
    pool, _, *drawn = programs["decode"].out_info
    want = (shape.decode_steps, shape.replicas, shape.slots)
    assert [(x.shape, x.dtype) for x in drawn] == [
        (want, jnp.int32),
        (want, jnp.float32),
    ]
    model, tokens = c.model, shape.replicas * shape.pages * shape.page_tokens
    size = sum(math.prod(x.shape) for x in jax.tree.leaves(pool))
    heads = model.num_kv_heads * model.head_dim
    assert size == 2 * model.num_layers * heads * tokens


def test_state_is_split_over_the_mesh():
    """Every matrix and its moments lie on fsdp x tensor; nothing large is everywhere."""
    _, c = parse("gppo_8b")
    layout = make_layout(c)
    assert dict(layout.mesh.shape) == {"data": 1, "fsdp": 2, "tensor": 4}
    state, shardings = abstract_state(c, layout)
    held = jax.tree.map(
        lambda x, at: math.prod(at.shard_shape(x.shape)), state, shardings
    )
    whole = sum(x.size for x in jax.tree.leaves(state))
    assert sum(jax.tree.leaves(held)) == pytest.approx(whole / 8, rel=1e-3)


SFT_REFUSED = [
    ({"data.too_long": "dorp"}, "data.too_long must be one of ('error', 'drop')"),
    (
        {"batch_rows": 25, "micro_rows": 24},
        "in config: batch_rows=25 must be a multiple of micro_rows=24",
    ),
    ({"micro_rows": 0}, "in config: batch_rows and micro_rows must be at least 1"),
    (
        {"num_steps": 0},
        "in config: set one of num_steps and num_epochs, the other to 0",
    ),
    ({"num_epochs": 1.0}, "in config: set one of num_steps and num_epochs"),
    (
        {"num_epochs": 1.0, "num_steps": -5},
        "in config: set one of num_steps and num_epochs",
    ),
    (
        {"mesh.rules.kv_heads": ()},
        "in config.mesh: mesh.rules.kv_heads=() must be mesh.rules.heads=('tensor',)",
    ),
    ({"data.weights.math": 0.0}, "in config.data: data.weights must be positive"),
    (
        {"validation.split": "test", "validation.batches": 0},
        "validation.every and validation.batches must be at least 1",
    ),
    ({"model.head_dim": 3}, "in config.model: model.head_dim must be even"),
    ({"model.num_kv_heads": 3}, "must be a multiple of model.num_kv_heads (3)"),
    ({"optim.decay": "step"}, "optim.decay must be 'cosine' or 'linear', not 'step'"),
    ({"evaluation.top_p": 0.0}, "in config.evaluation: top_p must be in (0, 1], not 0"),
    (
        {"evaluation.num_samples": 0, "evaluation.greedy": False},
        "evaluation asks for nothing",
    ),
    (
        {"mesh.rules.batch": ("model",)},
        "mesh.rules.batch names ['model']: the mesh axes",
    ),
    (
        {"checkpoint.every": 0},
        "checkpoint.every and checkpoint.keep must be at least 1",
    ),
]
GPPO_REFUSED = [
    ({"loss.kind": "ppo"}, "in config.loss: loss.kind must be one of ('gppo',"),
    ({"loss.clip_low": 1.5}, "loss.clip_low must be in [0, 1)"),
    ({"loss.clip_high": -0.1}, "loss.clip_high and loss.positive_coef not negative"),
    (
        {"loss.positive_coef": -1.0},
        "loss.clip_high and loss.positive_coef not negative",
    ),
    ({"loss.aggregation": "mean"}, "loss.aggregation must be one of ('token_mean',"),
    (
        {"data.too_long": "drop"},
        "data.too_long must be one of ('error', 'truncate_left'), not 'drop'",
    ),
    (
        {"loss.kind": "clip_higher", "loss.beta_low": 0.25},
        "loss.beta_low and beta_high are for 'gppo', not for 'clip_higher'",
    ),
    ({"loss.kind": "cispo"}, "loss.dual_clip must be None for 'cispo'"),
    ({"loss.dual_clip": 0.5}, "loss.dual_clip must be None or at least 1, not 0.5"),
    (
        {"loss.dual_clip": None, "loss.beta_dual": 1.0},
        "loss.beta_dual is of loss.dual_clip, which is None",
    ),
    (
        {"loss.kind": "gppo", "loss.beta_low": -1.0},
        "loss.beta_low must not be negative: -1.0",
    ),
    ({"loss.old_logp": "both"}, "loss.old_logp must be one of"),
    ({"optim.peak_lr": -1e-6}, "optim.peak_lr must be positive, not -1e-06"),
    ({"optim.peak_lr": float("nan")}, "optim.peak_lr must be positive, not nan"),
    ({"optim.b2": 1.0}, "optim.b2 must be in [0, 1)"),
    ({"rollout.filter": "acc"}, "rollout.filter must be one of ('reward', 'accuracy',"),
    ({"rollout.top_p": 0.0}, "in config.rollout: top_p must be in (0, 1], not 0.0"),
    ({"rollout.temperature": -1.0}, "in config.rollout: temperature must be 0"),
    ({"rollout.temperature": 0.0}, "rollout.temperature must be above 0"),
    (
        {"rollout.temperature": 0.7, "loss.old_logp": "sampler"},
        "loss.old_logp='sampler' is for rollout.temperature=1",
    ),
    ({"rollout.prompts": 0}, "rollout.prompts must be at least 1, not 0"),
    ({"minibatch_prompts": 0}, "minibatch_prompts must be at least 1, not 0"),
]


def test_the_policy_that_is_trained_is_the_one_that_is_drawn_from():
    _, c = parse("gppo_tiny", {"rollout.temperature": 0.7})
    loss = gppo.train_step(c, None).keywords["loss_fn"]
    for step in (loss, gppo.score_step(c, None)):
        assert step.keywords["temperature"] == 0.7


@pytest.mark.parametrize(
    "name, changes, says",
    [("sft_tiny", *case) for case in SFT_REFUSED]
    + [("gppo_tiny", *case) for case in GPPO_REFUSED],
)
def test_values_out_of_range_are_refused(name, changes, says):
    with pytest.raises(InputError) as raised:
        parse(name, changes)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"mesh.data": 3}, "= 3 x -1 x 4 does not make the 8 devices there are"),
        ({"mesh.fsdp": 4}, "= 1 x 4 x 4 does not make the 8 devices there are"),
        ({"mesh.fsdp": 1, "mesh.tensor": 16}, "= 1 x 1 x 16 does not make the 8"),
        ({"micro_rows": 17}, "micro_rows=17 must be a multiple of the 2 shards"),
        (
            {"model.num_kv_heads": 2},
            "k_proj.weight: its 'kv_heads' axis of 2 cannot be",
        ),
        (
            {"mesh.rules.batch": ("data",)},
            "mesh.rules.embed names ['fsdp'], which must be in mesh.rules.batch too",
        ),
        (
            {"mesh.rules.embed": ("tensor",)},
            "mesh.rules puts two of the axes",
        ),
    ],
)
def test_meshes_that_do_not_fit_are_refused(changes, says):
    _, c = parse("gppo_8b", changes)
    with pytest.raises(InputError) as raised:
        layout = make_layout(c)
        steps.check_micro_rows(c.micro_rows, layout)
        qwen3.params_shardings(c.model, layout)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", sorted(f.stem for f in (FOLDER / "data").glob("*.py")))
def test_configs_of_data(name):
    """Their keys are those of PrepareConfig, and their values are allowed."""
    values = get(f"data.{name}").to_dict()
    known = set(fields(prepare.PrepareConfig))
    assert set(leaves(values, known)) == known
    c = config.build(prepare.PrepareConfig, values)
    reader = {"sft": "sft_8b", "gsm_symbolic": "sft_smollm2"}.get(name)
    if reader:  # The authors' RL data may be trained on as they are published.
        assert get(reader).data.path == f"{c.output}/{c.name}/{c.version}"


def test_numbers_of_data():
    c = config.build(prepare.PrepareConfig, get("data.sft").to_dict())
    assert (c.clean.ngram, c.clean.allowed, c.clean.max_tokens) == (9, (), 32_768)
    assert (c.choose.judge, c.choose.responses_per_prompt) == (False, 16)
    c = config.build(prepare.PrepareConfig, get("data.rl_code").to_dict())
    assert (c.clean.min_tests, c.clean.ngram) == (16, 9)
