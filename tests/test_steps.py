"""Gradients do not depend on how a batch is cut; the update is AdamW; its learning rate."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import sections
from klear_jax import batch, logprobs, optim, qwen3, sharding, steps
from klear_jax.errors import InputError

CONFIG = qwen3.Config(
    vocab_size=96,
    width=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=48,
    rope_theta=1e4,
    norm_eps=1e-6,
    tied=True,
    qk_norm=True,
    max_positions=64,
)
RULES = sections.mesh(1, 1, 1).rules.to_dict()
OPTIM = optim.OptimConfig(
    peak_lr=8e-5,
    end_lr=4e-5,
    decay="cosine",
    decay_start=0.0,
    warmup_steps=0,
    warmup_from=0.1,
    b1=0.9,
    b2=0.98,
    eps=1e-8,
    weight_decay=0.1,
    clip_norm=1.0,
)
CLIP = {"kind": "gppo", "clip_low": 0.2, "clip_high": 0.28, "dual_clip": 10.0}
T = 16  # Of a row; a sequence has at most half.


def make_layout(data, fsdp, tensor):
    devices = jax.devices()[: data * fsdp * tensor]
    mesh = sharding.make_mesh(sharding.MeshConfig(data, fsdp, tensor, RULES), devices)
    return sharding.Layout(mesh, RULES)


def loss(name, layout=None, **model):
    model = {"config": CONFIG, "layout": layout, "dtype": jnp.float32} | model
    if name == "lm":
        return functools.partial(steps.lm_loss, **model)
    return functools.partial(steps.gppo_loss, positive_coef=0.1, clip=CLIP, **model)


def make_params():
    rng = np.random.default_rng(0)

    def init(param):
        x = rng.normal(1 if param.init_std is None else 0, 0.2, param.shape)
        return x.astype(np.float32)

    return jax.tree.map(init, qwen3.param_table(CONFIG))


@pytest.fixture(scope="module")
def params():
    return make_params()


@pytest.fixture(scope="module")
def rows(params):
    return make_rows(params)


def make_rows(params):
    """Eight sequences of 4 to 8 tokens, one a row, with all that a loss reads."""
    rng = np.random.default_rng(1)
    length = np.array([8, 4, 7, 5, 8, 8, 6, 5])[:, None]
    real = np.arange(T)[None] < length
    trained = real & (np.arange(T)[None] >= 2)
    rows = {
        "tokens": rng.integers(0, CONFIG.vocab_size, real.shape) * real,
        "positions": np.arange(T)[None] * real,
        "segment_ids": real,
    }
    rows = {name: x.astype(np.int32) for name, x in rows.items()}
    logp = score(params, **{f"{name}_BT": x for name, x in rows.items()})
    positive = trained & (np.arange(8) % 3 == 0)[:, None]
    more = {
        # Ratios on both sides of the clip, for either sign of the advantage.
        "old_logp": np.asarray(logp) + rng.normal(0, 0.5, real.shape),
        "advantage": rng.normal(size=real.shape),
        "weight": rng.uniform(0.5, 1.5, real.shape) * trained / trained.sum(),
        "positive_weight": positive / positive.sum(),
    }
    return rows | {name: x.astype(np.float32) for name, x in more.items()}


@jax.jit
def score(params, **model):
    return logprobs.token_logprobs(params, CONFIG, **model)


@functools.cache
def accumulate(name, mesh, remat="none"):
    layout = make_layout(*mesh)
    loss_fn = loss(name, layout, remat=remat)
    program = jax.jit(functools.partial(steps.accumulate, loss_fn))
    return layout, program


@pytest.fixture(scope="module")
def whole(params, rows):
    """The gradients and metrics of each loss, those of tokens among them: one device, all
    rows at once."""

    def grads(name):
        run = jax.jit(jax.value_and_grad(loss(name), has_aux=True))
        (value, (metrics, per_token)), grads = run(params, rows)
        return grads, metrics | {"loss": value} | per_token

    return {name: jax.device_get(grads(name)) for name in ("lm", "gppo")}


ROOM = {8: 1, 4: 4, 2: 4}  # Micro-batches of so many rows: few shapes to compile.


@pytest.mark.parametrize(
    "name, mesh, remat, cuts",
    # A cut: rows of a micro-batch, packed or not.
    [
        ("lm", (1, 1, 1), "none", [(4, False), (4, True)]),
        ("gppo", (1, 1, 1), "none", [(8, False), (4, False), (2, False), (2, True)]),
        ("gppo", (2, 2, 2), "none", [(4, False), (4, True)]),
        ("gppo", (1, 8, 1), "full", [(8, True)]),  # Half of the rows are empty.
        ("lm", (4, 1, 2), "attention", [(4, False)]),
    ],
)
def test_any_cut_gives_the_same_gradients(params, rows, whole, name, mesh, remat, cuts):
    layout, program = accumulate(name, mesh, remat)
    spread = sharding.put(params, qwen3.params_shardings(CONFIG, layout))
    for micro_rows, packed in cuts:
        some, places = batch.pack(rows) if packed else (rows, None)
        count = -(-len(some["tokens"]) // micro_rows)
        micro = steps.micro_batches(some, micro_rows, ROOM[micro_rows], layout)
        grads, metrics = program(spread, micro, count)
        if name == "gppo":
            x_MBT = np.asarray(metrics["log_ratio"])
            x_RT = x_MBT.reshape(-1, x_MBT.shape[-1])
            metrics["log_ratio"] = (
                batch.unpack(x_RT, places) if packed else x_RT[: len(rows["tokens"])]
            )
            assert not x_MBT[count:].any()
        assert_same((grads, metrics), whole[name])


def assert_same(got, want):
    (grads, metrics), (want_grads, want_metrics) = got, want
    paths = jax.tree_util.tree_leaves_with_path(want_grads)
    for (path, want_leaf), leaf in zip(paths, jax.tree.leaves(grads), strict=True):
        assert leaf.dtype == jnp.float32
        gap = np.abs(np.asarray(leaf) - want_leaf).max() / np.abs(want_leaf).max()
        assert gap <= 1e-5, (jax.tree_util.keystr(path), gap)
    assert metrics.keys() == want_metrics.keys()
    for key, value in want_metrics.items():
        rtol = 2e-3 if value.dtype == np.float16 else 1e-5
        np.testing.assert_allclose(metrics[key], value, rtol=rtol, atol=1e-6)


assert_equal = functools.partial(jax.tree.map, np.testing.assert_array_equal)


def test_the_batch_reaches_every_region(whole):
    metrics = whole["gppo"][1]
    for name in ("tokens_low", "tokens_high", "grad_mass_low", "grad_mass_high"):
        assert metrics[name] > 0
    assert metrics["loss"] == pytest.approx(
        metrics["policy_loss"] + 0.1 * metrics["positive_loss"], rel=1e-6
    )
    assert whole["lm"][1]["tokens"] == metrics["tokens"] == (51 - 2 * 8)
    assert np.count_nonzero(metrics["log_ratio"]) == metrics["tokens"]


def test_what_is_empty_or_beyond_the_count_adds_nothing(params, rows, whole):
    layout, program = accumulate("lm", (1, 1, 1))
    params = sharding.put(params, qwen3.params_shardings(CONFIG, layout))
    batch = steps.micro_batches(rows, 4, ROOM[4], layout)
    want = program(params, batch, 2)
    before = program._cache_size()
    assert_same(want, whole["lm"])
    for count in (3, 4):
        assert_equal(program(params, batch, count), want)
    batch["weight"] = batch["weight"].at[2:].set(jnp.nan)
    assert_equal(program(params, batch, 2), want)
    nothing = program(params, batch, 0)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(nothing))
    assert program._cache_size() == before  # One program for any count.


def test_score_step_is_token_logprobs(params, rows):
    layout = make_layout(1, 1, 1)
    inputs = {name: rows[name] for name in ("tokens", "positions", "segment_ids")}
    program = jax.jit(
        functools.partial(
            steps.score_step,
            config=CONFIG,
            temperature=0.7,
            layout=layout,
            dtype=jnp.float32,
        )
    )
    batch = steps.micro_batches(inputs, 3, 4, layout)
    named = {f"{name}_BT": x for name, x in inputs.items()}
    want = logprobs.token_logprobs(params, CONFIG, **named, temperature=0.7)
    got = np.asarray(program(params, batch, 3)).reshape(12, T)
    np.testing.assert_allclose(got[:8], want, rtol=0, atol=2e-6)
    assert np.abs(got[:8]).max() > 1
    assert not got[8:].any()
    assert not np.asarray(program(params, batch, 2)).reshape(12, T)[6:].any()


# --- the update -----------------------------------------------------------------------


def adamw(params, grads, rates, c):
    """By hand, in float64: clip by global norm, Adam, decoupled weight decay."""
    m = v = np.zeros_like(params)
    for t, (g, lr) in enumerate(zip(grads, rates, strict=True), start=1):
        g = g * min(1, c.clip_norm / np.linalg.norm(g))
        m = c.b1 * m + (1 - c.b1) * g
        v = c.b2 * v + (1 - c.b2) * g * g
        m_hat, v_hat = m / (1 - c.b1**t), v / (1 - c.b2**t)
        params = params - lr * (
            m_hat / (np.sqrt(v_hat) + c.eps) + c.weight_decay * params
        )
    return params


@pytest.mark.parametrize("scale", [0.1, 10.0], ids=["unclipped", "clipped"])
def test_train_step_is_adamw(scale):
    rng = np.random.default_rng(0)
    start, rates = rng.normal(size=5), [0.1, 0.05, 0.2]
    grads = scale * rng.normal(size=(3, 5)) / np.sqrt(5)
    assert all((np.linalg.norm(grads, axis=1) > OPTIM.clip_norm) == (scale > 1))

    def loss_fn(params, micro):
        value = jnp.sum(params["w"] * micro["grad"])
        return value, ({"ones": jnp.float32(1)}, {})

    step = jax.jit(
        functools.partial(steps.train_step, loss_fn=loss_fn, tx=optim.optimizer(OPTIM))
    )
    params = {"w": jnp.float32(start)}
    state = steps.init_state(params, optim.optimizer(OPTIM))
    theirs = optax.chain(
        optax.clip_by_global_norm(OPTIM.clip_norm),
        optax.inject_hyperparams(optax.adamw)(
            0.0, b1=OPTIM.b1, b2=OPTIM.b2, eps=OPTIM.eps, weight_decay=0.1
        ),
    )
    their_params, their_state = params, theirs.init(params)
    for n, (grad, rate) in enumerate(zip(grads, rates, strict=True)):
        old = state.params["w"]
        # In two micro-batches: a gradient is the sum over them.
        batch = {"grad": jnp.float32([0.25 * grad, 0.75 * grad])}
        state, metrics = step(state, batch, 2, rate)
        want = adamw(start, grads[: n + 1], rates[: n + 1], OPTIM)
        np.testing.assert_allclose(state.params["w"], want, rtol=0, atol=1e-6)
        assert state.step == n + 1
        assert metrics["ones"] == 2
        assert metrics["grad_norm"] == pytest.approx(np.linalg.norm(grad), rel=1e-5)
        assert metrics["param_norm"] == pytest.approx(np.linalg.norm(want), rel=1e-5)
        moved = np.linalg.norm(state.params["w"] - old)
        assert metrics["update_norm"] == pytest.approx(moved, rel=1e-4)

        their_state[1].hyperparams["learning_rate"] = jnp.float32(rate)
        updates, their_state = theirs.update(
            {"w": jnp.float32(grad)}, their_state, their_params
        )
        their_params = optax.apply_updates(their_params, updates)
        np.testing.assert_allclose(state.params["w"], their_params["w"], atol=1e-6)


def compiled(name, layout, params, **model):
    """The state laid out, and the program for it."""
    tx = optim.optimizer(OPTIM)
    step = functools.partial(
        steps.train_step, loss_fn=loss(name, layout, **model), tx=tx
    )
    params_shardings = qwen3.params_shardings(CONFIG, layout)
    state = steps.init_state(params, tx)
    shardings = steps.state_shardings(state, params_shardings, layout)
    program = steps.compile_train_step(step, layout, shardings)
    return sharding.put(state, shardings), program, shardings


def five_updates(name, layout, params, rows):
    """The losses of five updates on the same rows, as on a recorded rollout."""
    state, program, _ = compiled(name, layout, params)
    micro = steps.micro_batches(rows, 8, 1, layout)
    losses = []
    for _ in range(5):
        state, metrics = program(state, micro, 1, 1e-2)
        losses.append(float(metrics["loss"]))
    return losses


@pytest.mark.parametrize(
    "name, meshes",
    [
        ("lm", [(8, 1, 1), (2, 2, 2)]),
        ("gppo", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2)]),
    ],
)
def test_five_updates_are_the_same_in_every_layout(params, rows, name, meshes):
    want = five_updates(name, make_layout(1, 1, 1), params, rows)
    assert max(want) - min(want) > 0.05  # They do something.
    for mesh in meshes:
        got = five_updates(name, make_layout(*mesh), params, rows)
        np.testing.assert_allclose(got, want, rtol=1e-4, err_msg=str(mesh))


GOLDEN = {"loss": 0.7919383, "grad_norm": 4.44613, "update_norm": 0.1364962}


def test_golden_step_is_donated_and_sharded(params, rows):
    layout = make_layout(2, 2, 2)
    state, program, shardings = compiled("gppo", layout, params)
    batch = steps.micro_batches(rows, 4, 3, layout)
    new, metrics = program(state, batch, 2, 1e-3)
    for name, value in GOLDEN.items():
        assert float(metrics[name]) == pytest.approx(value, rel=1e-4), (
            f"{name} of one step has changed from {value} to {metrics[name]:.7g}. If you "
            "meant it, update GOLDEN; if not, it is a bug."
        )
    assert new.step == 1
    assert new.params["layers"]["wq"].sharding.spec[1:3] == ("fsdp", "tensor")
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    jax.tree.map(assert_placed, new, shardings)
    jax.tree.map(assert_placed, new.opt_state[1].mu, shardings.params)
    jax.tree.map(assert_placed, new.opt_state[1].nu, shardings.params)
    assert all(value.sharding.is_fully_replicated for value in metrics.values())
    newer, _ = program(new, batch, 3, 2e-3)
    assert newer.step == 2
    # An update that is no number changes nothing: neither moments nor the count of steps.
    before = jax.device_get(newer)
    weight = np.array(batch["weight"])
    weight[1, 0, np.flatnonzero(weight[1, 0])[0]] = np.nan
    bad = batch | {"weight": jax.device_put(weight, batch["weight"].sharding)}
    after, metrics = program(newer, bad, 3, 2e-3)
    assert np.isnan(metrics["loss"]) and np.isfinite(metrics["param_norm"])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after), before)
    assert program._cache_size() == 1


def assert_placed(leaf, want):
    assert leaf.sharding.is_equivalent_to(want, leaf.ndim)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_state_is_float32_whatever_the_activations(params, rows, dtype):
    layout = make_layout(1, 1, 1)
    state, program, _ = compiled("gppo", layout, params, dtype=dtype)
    batch = steps.micro_batches(rows, 8, 1, layout)
    lowered = program.lower(state, batch, 1, 1e-3)
    assert ("bf16" in lowered.as_text()) == (dtype == jnp.bfloat16)
    new, metrics = lowered.out_info
    assert metrics.pop("log_ratio").dtype == jnp.float16
    assert {x.dtype for x in jax.tree.leaves((new.params, metrics))} == {
        jnp.dtype("float32")
    }
    assert {x.dtype for x in jax.tree.leaves(new.opt_state) if x.shape} == {
        jnp.dtype("float32")
    }
    grads, _ = jax.eval_shape(
        functools.partial(steps.accumulate, loss("gppo", dtype=dtype)),
        params,
        batch,
        1,
    )
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_micro_batches_are_filled_up_with_empty_rows():
    layout = make_layout(2, 2, 2)
    x = np.arange(1, 31, dtype=np.float32).reshape(10, 3)
    batch = steps.micro_batches({"x": x, "n": np.int32(x)}, 4, 4, layout)
    assert {name: (a.shape, a.dtype) for name, a in batch.items()} == {
        "x": ((4, 4, 3), jnp.float32),
        "n": ((4, 4, 3), jnp.int32),
    }
    flat = np.asarray(batch["x"]).reshape(16, 3)
    np.testing.assert_array_equal(flat, np.concatenate([x, np.zeros((6, 3))]))
    # Every micro-batch spans all shards of the batch.
    assert {s.data.shape for s in batch["x"].addressable_shards} == {(4, 1, 3)}
    steps.check_micro_rows(8, layout)
    with pytest.raises(InputError, match="micro_rows=6 must be a multiple of the 4"):
        steps.check_micro_rows(6, layout)


# --- the learning rate ----------------------------------------------------------------


def rates(num_steps, **other):
    config = optim.OptimConfig(**vars(OPTIM) | other)
    return [optim.learning_rate(config, step, num_steps) for step in range(num_steps)]


@pytest.mark.parametrize(
    "num_steps, other, want",
    [
        # The paper's RL: constant after a warm-up in which no step has a rate of 0.
        (
            6,
            {"peak_lr": 1.0, "end_lr": 1.0, "warmup_steps": 3},
            [0.1, 0.4, 0.7, 1, 1, 1],
        ),
        # Its SFT: cosine from 8e-5 to 4e-5.
        (
            5,
            {},
            [4e-5 + 4e-5 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(5)],
        ),
        (
            8,
            {"decay": "linear", "peak_lr": 1.0, "end_lr": 0.0, "decay_start": 0.5},
            [1, 1, 1, 1, 1, 2 / 3, 1 / 3, 0],
        ),
        (
            6,
            {"decay": "linear", "peak_lr": 1, "end_lr": 0.5, "warmup_steps": 2},
            [0.1, 0.55, 1, 5 / 6, 4 / 6, 0.5],
        ),
        # The decay begins within the last step, or after it.
        (10, {"peak_lr": 1.0, "end_lr": 0.5, "decay_start": 0.85}, [1] * 9 + [0.5]),
        (4, {"peak_lr": 1.0, "end_lr": 0.5, "decay_start": 1.0}, [1] * 4),
        (2, {"peak_lr": 1.0, "end_lr": 0.5, "warmup_steps": 4}, [0.1, 0.325]),
        (1, {"peak_lr": 1.0, "end_lr": 0.5}, [1]),
    ],
    ids=["warm-up", "cosine", "linear", "both", "late", "never", "short", "one"],
)
def test_learning_rate(num_steps, other, want):
    assert rates(num_steps, **other) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(
    "name, values",
    [
        ("decay", ["step", ""]),
        ("peak_lr", [0.0, -1e-5, math.nan]),
        ("end_lr", [-1e-5, math.nan]),
        ("decay_start", [-0.1, 1.1]),
        ("warmup_steps", [-1]),
        ("warmup_from", [-0.1, 1.5]),
        ("b1", [1.0, -0.1]),
        ("b2", [1.0, 2.0]),
        ("eps", [0.0]),
        ("weight_decay", [-0.1]),
        ("clip_norm", [0.0, -1.0]),
    ],
)
def test_bad_optimizer_settings_are_named(name, values):
    for value in values:
        with pytest.raises(InputError, match=rf"^optim\.{name} .*{value}"):
            optim.OptimConfig(**vars(OPTIM) | {name: value})
