"""The chunked head against a whole softmax, its memory, and the rules of the mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import sections
from klear_jax import logprobs, qwen3, sharding

N, D = 24, 12
CONFIG = qwen3.Config(
    vocab_size=202,  # 101 a shard of two.
    width=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_width=24,
    rope_theta=1e4,
    norm_eps=1e-6,
    tied=True,
    qk_norm=True,
    max_positions=64,
)
RULES = sections.mesh(1, 1, 1).rules.to_dict()


def inputs(vocab, scale=1.0, dtype=jnp.float32):
    rng = np.random.default_rng(vocab)
    hidden = jnp.asarray(scale * rng.normal(size=(2, N // 2, D)), dtype)
    head = jnp.asarray(rng.normal(size=(vocab, D)), jnp.float32)
    targets = rng.integers(0, vocab, (2, N // 2))
    targets[0, :2] = 0, vocab - 1  # Both ends of the vocabulary.
    weight = jnp.asarray(rng.normal(size=targets.shape), jnp.float32)
    return hidden, head, jnp.asarray(targets), weight


def whole(hidden, head, targets, weight, temperature):
    """In float64: log-probs, entropy and the gradients of sum(weight * logp)."""
    x, w, weight = (np.asarray(a, np.float64) for a in (hidden, head, weight))
    logits = x @ w.T / temperature
    logits -= logits.max(-1, keepdims=True)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    probs = np.exp(logp)
    hit = np.eye(len(w))[np.asarray(targets)]
    dlogits = weight[..., None] * (hit - probs) / temperature
    return (
        np.sum(hit * logp, -1),
        -np.sum(probs * logp, -1),
        dlogits @ w,
        np.einsum("btv,btd->vd", dlogits, x),
    )


def chunked(*args, **kwargs):
    """As `whole`, by the head."""

    def loss(hidden, head, targets, weight):
        logp, entropy = logprobs.head_logprobs(hidden, head, targets, **kwargs)
        # A gradient of the entropy, were there one, would be seen.
        return jnp.sum(weight * logp) + 10 * jnp.sum(entropy), (logp, entropy)

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, values), grads = run(*args)
    return *values, *grads


def assert_close(got, want, tolerance):
    for name, a, b in zip(
        ("logp", "entropy", "dhidden", "dhead"), got, want, strict=True
    ):
        a = np.asarray(a, np.float64)
        np.testing.assert_allclose(
            a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), 1), err_msg=name
        )


@pytest.mark.parametrize(
    "vocab, vocab_block, temperature",
    [
        (509, 128, 0.6),  # Four blocks, the last moved back by 3.
        (512, 128, 1.0),
        (22, 2048, 1.0),
    ],
)
def test_same_as_a_whole_softmax(vocab, vocab_block, temperature):
    args = inputs(vocab)
    got = chunked(*args, temperature=temperature, vocab_block=vocab_block)
    assert all(x.dtype == jnp.float32 for x in got)
    assert_close(got, whole(*args, temperature), 3e-6)


def test_same_as_jax_log_softmax():
    hidden, head, targets, weight = inputs(509)

    def loss(hidden, head):
        logp = jax.nn.log_softmax(hidden @ head.T)
        one = jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(one * weight)

    want = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, head)
    logp, _, *grads = chunked(hidden, head, targets, weight, vocab_block=128)
    np.testing.assert_allclose(jnp.sum(logp * weight), want[0], rtol=1e-5)
    for a, b in zip(grads, want[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_bf16_hidden_and_float32_head():
    hidden, head, targets, weight = inputs(509, dtype=jnp.bfloat16)
    got = chunked(hidden, head, targets, weight, vocab_block=128)
    assert [x.dtype.name for x in got] == ["float32", "float32", "bfloat16", "float32"]
    # The head is rounded to bf16 for the product, which is added up in float32.
    want = whole(hidden, head.astype(jnp.bfloat16), targets, weight, 1.0)
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)
    np.testing.assert_allclose(got[1], want[1], atol=1e-5)
    for a, b in zip(got[2:], want[2:], strict=True):
        a = np.asarray(a, np.float64)
        assert np.abs(a - b).max() < 0.01 * np.abs(b).max()


@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_sure_predictions_stay_in_range(scale):
    """Logits up to 1e5, the largest of them in later and later blocks."""
    hidden, head, targets, weight = inputs(509, scale)
    head = head * jnp.linspace(0.1, 2, 509)[:, None]
    targets = jnp.argmax(hidden @ head.T, axis=-1)
    logp, entropy, *grads = chunked(hidden, head, targets, weight, vocab_block=128)
    want = whole(hidden, head, targets, weight, 1.0)
    assert (logp <= 0).all()
    assert logp.max() > -1e-6
    assert (np.abs(entropy) < 10).all()
    np.testing.assert_allclose(logp, want[0], atol=1e-6 * scale)
    for grad in grads:
        assert np.isfinite(grad).all()


def test_never_tokens_by_vocabulary():
    """Compiled, not run: an 8,192-token batch of Qwen3-0.6B takes, besides the gradients
    it returns, less than a tenth of its float32 logits."""
    tokens, vocab, width = 8192, 151_936, 1024

    def loss(hidden_BTD, head_VD, targets_BT):
        logp_BT, entropy_BT = logprobs.head_logprobs(hidden_BTD, head_VD, targets_BT)
        return jnp.sum(logp_BT), entropy_BT

    for dtype in (jnp.bfloat16, jnp.float32):
        lowered = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)).lower(
            jax.ShapeDtypeStruct((1, tokens, width), dtype),
            jax.ShapeDtypeStruct((vocab, width), jnp.float32),
            jax.ShapeDtypeStruct((1, tokens), jnp.int32),
        )
        memory = lowered.compile().memory_analysis()
        assert memory.temp_size_in_bytes < 0.1 * 4 * tokens * vocab
        assert memory.output_size_in_bytes < 1.1 * 4 * vocab * width


# ---- token_logprobs.

SEGMENTS = np.array(
    [
        [1] * 12,
        [1, 1, 1, 2, 2, 2, 2, 3, 0, 0, 0, 0],
        [0, 0, 7, 7, 0, 7, 7, 7, 2, 2, 0, 0],  # Padding within a sequence.
        [0] * 12,
        [1, 2] * 6,
        [1] * 11 + [0],
        [0] + [1] * 11,
        [4] * 6 + [2] * 6,
    ]
)
WEIGHT = np.random.default_rng(1).normal(size=SEGMENTS.shape).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: (p.init_std or 1) * rng.normal(size=p.shape).astype(np.float32),
        qwen3.param_table(CONFIG),
    )
    params["embed"] *= 2  # Log-probs that differ from those of a flat distribution.
    return params, rng.integers(0, CONFIG.vocab_size, SEGMENTS.shape)


def loss_and_logp(params, tokens, segments, layout=None):
    logp_BT, entropy_BT = logprobs.token_logprobs(
        params,
        CONFIG,
        tokens,
        segment_ids_BT=segments,
        layout=layout,
        with_entropy=True,
    )
    return jnp.sum(logp_BT * WEIGHT), (logp_BT, entropy_BT)


run = jax.jit(jax.value_and_grad(loss_and_logp, has_aux=True))


def predicted(segments):
    """Entry t counts if t and t - 1 are real and of one segment."""
    now, before = segments[:, 1:], segments[:, :-1]
    return np.pad((now != 0) & (now == before), [(0, 0), (1, 0)])


@functools.partial(jax.jit, static_argnames="config")
def forward(params, tokens, segments, config=CONFIG):
    return qwen3.forward(params, config, tokens, segment_ids_BT=segments)


def plain(params, tokens, segments, temperature=1.0):
    """Log-probs and entropy from all logits, entry by entry in float64."""
    hidden_BTD = np.asarray(forward(params, tokens, segments), np.float64)
    logits_BTV = hidden_BTD @ np.asarray(params["embed"]).T / temperature
    logits_BTV -= logits_BTV.max(-1, keepdims=True)
    all_BTV = logits_BTV - np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
    logp, entropy = np.zeros((2, *tokens.shape))
    for b, t in np.argwhere(predicted(segments)):
        logp[b, t] = all_BTV[b, t - 1, tokens[b, t]]
        entropy[b, t] = -np.sum(np.exp(all_BTV[b, t - 1]) * all_BTV[b, t - 1])
    return logp, entropy


def test_which_entries_count(model):
    params, tokens = model
    (_, (logp_BT, entropy_BT)), _ = run(params, tokens, SEGMENTS)
    logp, entropy = plain(params, tokens, SEGMENTS)
    assert logp_BT.dtype == jnp.float32
    np.testing.assert_allclose(logp_BT, logp, atol=2e-5)
    np.testing.assert_allclose(entropy_BT, entropy, atol=2e-5)
    np.testing.assert_array_equal(np.asarray(logp_BT) != 0, predicted(SEGMENTS))
    assert np.ptp(logp[logp != 0]) > 5


def test_mask_segments_and_temperature(model):
    """A mask makes one segment of what is real; it cuts from segments that are given."""
    params, tokens = model
    mask = np.random.default_rng(2).integers(0, 2, SEGMENTS.shape)
    for segments, kwargs in (
        (np.ones_like(SEGMENTS), {}),
        (mask, {"mask_BT": mask}),
        (mask * SEGMENTS, {"mask_BT": 3 * mask, "segment_ids_BT": SEGMENTS}),
    ):
        temperature = 2.0 if len(kwargs) == 2 else 1.0
        got = jax.jit(
            functools.partial(
                logprobs.token_logprobs, config=CONFIG, temperature=temperature
            )
        )(params, tokens_BT=tokens, **kwargs)
        want, _ = plain(params, tokens, segments, temperature)
        np.testing.assert_allclose(got, want, atol=2e-5)
        np.testing.assert_array_equal(np.asarray(got) != 0, predicted(segments))


# ---- On a mesh.


@pytest.fixture(scope="module")
def layout():
    config = sharding.MeshConfig(data=2, fsdp=2, tensor=2, rules=RULES)
    return sharding.Layout(sharding.make_mesh(config), RULES)


def test_on_a_mesh_as_on_one_device(model, layout):
    params, tokens = model
    (loss, (logp_BT, entropy_BT)), grads = run(params, tokens, SEGMENTS)
    shardings = qwen3.params_shardings(CONFIG, layout)
    sharded = sharding.put(params, shardings)
    batch = sharding.put((tokens, SEGMENTS), (layout.sharding("batch", "seq"),) * 2)
    run_on_mesh = jax.jit(
        jax.value_and_grad(
            functools.partial(loss_and_logp, layout=layout), has_aux=True
        )
    )
    (got, (got_logp, got_entropy)), got_grads = run_on_mesh(sharded, *batch)
    np.testing.assert_allclose(got, loss, rtol=1e-5)
    np.testing.assert_allclose(got_logp, logp_BT, atol=2e-5)
    np.testing.assert_allclose(got_entropy, entropy_BT, atol=2e-5)
    for a, b in zip(jax.tree.leaves(got_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_blocks_within_shards_of_the_vocabulary(layout):
    hidden, head, targets, weight = (
        np.repeat(x, 2, axis=0) if i != 1 else x for i, x in enumerate(inputs(202))
    )
    args = sharding.put(
        (hidden, head, targets, weight),
        (
            layout.sharding("batch", None, None),
            layout.sharding("vocab", "embed"),
            layout.sharding("batch", None),
            layout.sharding("batch", None),
        ),
    )
    got = chunked(*args, vocab_block=32, layout=layout)
    assert_close(got, whole(hidden, head, targets, weight, 1.0), 3e-6)
