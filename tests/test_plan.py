"""What a run needs, on a mesh of this CPU; its chips of TPUs are in test_aot."""

import dataclasses
import json
import math

import jax
import pytest
from test_configs import parse

from klear_jax import decoding, plan, qwen3, roofline
from klear_jax.errors import InputError
from klear_jax.sharding import Layout, make_mesh

SMALL_CHIP = roofline.Chip(hbm_gib=0.001, hbm_bytes=1e9, flops=1e12, link_bytes=1e9)


@pytest.fixture(scope="module")
def compiled():
    task, c = parse("gppo_tiny")
    c = dataclasses.replace(c, mesh=dataclasses.replace(c.mesh, fsdp=4, tensor=2))
    layout = Layout(make_mesh(c.mesh, plan.find_devices("cpu:8")), c.mesh.rules)
    traced = plan.trace(task, c, layout)
    programs = {name: plan.compile_program(one) for name, one in traced.items()}
    return task, c, layout, programs


def test_a_run_is_planned_with_all_that_is_alive_beside_each_program(compiled):
    task, c, layout, programs = compiled
    assert list(programs) == [
        *("update", "score", "reshard", "prefill", "copy_pages", "decode"),
    ]
    found = plan.make_plan(task, c, layout, programs, None)
    state, needed = found["train_state_bytes"], found["needed_bytes"]
    batch = 7 * 4 * 64 // 4 * c.rollout.row_tokens  # 7 arrays of 64 rows, over 4.
    arguments = programs["update"].memory.arguments
    assert arguments == pytest.approx(state + batch, rel=0.02)
    assert needed["update"] == programs["update"].memory.peak
    assert needed["decode"] == programs["decode"].memory.peak + state
    assert needed["score"] == programs["score"].memory.peak + state * 2 / 3
    update = found["update"]
    assert update["must_send_bytes"] < update["sends_bytes"]
    parameters = 500_000
    assert update["flops"] * 8 == pytest.approx(
        6 * parameters * 64 * c.rollout.row_tokens, rel=0.5
    )
    assert found["does_not_fit"] == ""
    json.dumps(found)


def test_what_does_not_fit_is_said_with_what_would_help(compiled):
    found = plan.make_plan(*compiled, SMALL_CHIP)
    worst = max(found["needed_bytes"], key=found["needed_bytes"].get)
    assert found["does_not_fit"].startswith(f"{worst} needs 0.0 GiB a chip")
    assert "lower sampler.pool_tokens" in found["does_not_fit"]
    assert found["sampler"]["cache_tokens_that_fit"] == 0
    large = dataclasses.replace(SMALL_CHIP, hbm_gib=95)
    found = plan.make_plan(*compiled, large)
    fits = found["sampler"]
    assert found["does_not_fit"] == ""
    # With the cache made so large, all is used but the headroom.
    used = (
        found["needed_bytes"]["decode"]
        + (fits["cache_tokens_that_fit"] - fits["cache_tokens"])
        * fits["cache_bytes_a_token"]
        / 8
    )
    assert used == pytest.approx(0.9 * 95 * 2**30, rel=1e-3)


def test_a_step_takes_no_less_than_its_arithmetic(compiled):
    task, c, layout, _ = compiled
    chip = roofline.Chip(hbm_gib=95, hbm_bytes=1e12, flops=1e15, link_bytes=1e11)
    found = plan.make_plan(*compiled, chip)["step_seconds"]
    assert list(found) == ["sample", "score", "update"]
    work = plan.step_work(task, c, layout)
    model = roofline.model_of(c, layout)
    weights = c.model.num_layers * model.layer_weights + model.head_weights
    table = qwen3.param_table(c.model)
    matrices = sum(math.prod(p.shape) for p in jax.tree.leaves(table) if p.init_std)
    assert weights == matrices
    # Samples of half the limit: each of their tokens reads all weights, with its mates.
    r, slots = c.rollout, min(c.sampler.num_slots, 8 * c.rollout.prompts)
    calls = r.prompts * r.samples_per_prompt * r.max_new_tokens / 2 / slots
    assert work["sample"].read_bytes >= calls * weights * 4 / 2
    assert found["sample"]["read"] == work["sample"].read_bytes / 1e12
    # Forward, and forward twice as much backward.
    ratio = work["update"].flops / work["score"].flops
    assert 3.0 < ratio < 4.2, ratio
    longer = model.train(1, 4_096, 4_096).flops / model.train(1, 4_096, 2_048).flops
    assert longer > 1
    twice = model.train(2, 64, 64)
    assert twice.flops == pytest.approx(2 * model.train(1, 64, 64).flops)
    assert twice.sent_bytes < 2 * model.train(1, 64, 64).sent_bytes  # Weights go once.


def test_what_is_kept_is_neither_computed_nor_sent_anew(compiled):
    _, c, layout, _ = compiled
    models = [
        roofline.model_of(dataclasses.replace(c, remat=remat), layout)
        for remat in ("none", "dots", "attention", "full")
    ]
    none, dots, attention, full = (model.train(1, 64, 64) for model in models)
    assert none.flops == dots.flops < attention.flops < full.flops
    assert none.sent_bytes < dots.sent_bytes < attention.sent_bytes == full.sent_bytes


@pytest.mark.parametrize(
    "platform, head_dim, kernel",
    [("tpu", 128, "tpu"), ("tpu", 64, "xla"), ("cpu", 128, "xla"), ("gpu", 128, "xla")],
)
def test_the_kernel_of_a_plan_is_that_of_a_run(platform, head_dim, kernel):
    _, c = parse("gppo_tiny")
    model = dataclasses.replace(c.model, head_dim=head_dim)
    assert decoding.kernel_for(model, platform) == kernel


def test_replicas_on_several_slices_send_between_them():
    _, c = parse("gppo_tiny")
    mesh = make_mesh(dataclasses.replace(c.mesh, data=2, fsdp=4, tensor=1))
    model = roofline.model_of(c, Layout(mesh, c.mesh.rules))
    weights = c.model.num_layers * model.layer_weights + model.head_weights
    assert model.train(1, 64, 64).slice_bytes == 4 * weights / 4  # 2 x 1/2 of float32.
    chip = roofline.CHIPS["v5p"]
    seconds = roofline.Work(slice_bytes=roofline.SLICE_BYTES).seconds(chip)
    assert seconds == {"compute": 0, "read": 0, "send": 1}


@pytest.mark.parametrize(
    "topology, message",
    [
        ("cpu:many", "say cpu:8 for 8 devices"),
        ("cpu:64", "has 8 CPU devices: set JAX_NUM_CPU_DEVICES=64"),
    ],
)
def test_bad_topologies_are_one_sentence(topology, message):
    assert len(jax.devices()) == 8
    with pytest.raises(InputError, match=message):
        plan.find_devices(topology)
