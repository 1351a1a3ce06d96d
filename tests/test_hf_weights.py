"""Hugging Face folders: every bit there and back, and one clear error for what is wrong."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import sections
from klear_jax import hf_weights, qwen3, sharding
from klear_jax.errors import InputError

ODD = pathlib.Path(__file__).parent / "golden" / "parity" / "odd"
QWEN3 = qwen3.Config(
    vocab_size=29,
    width=12,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_width=20,
    rope_theta=1e6,
    norm_eps=1e-6,
    tied=True,
    qk_norm=True,
    max_positions=160,
)
CONFIGS = {
    "qwen3": QWEN3,
    "qwen3-untied-yarn": dataclasses.replace(
        QWEN3, tied=False, yarn=qwen3.Yarn(factor=2.5, original_max_positions=64)
    ),
    "qwen3-yarn-options": dataclasses.replace(
        QWEN3,
        yarn=qwen3.Yarn(4.0, 40, beta_fast=16.0, beta_slow=2.0, attention_factor=1.5),
    ),
    "llama": dataclasses.replace(QWEN3, qk_norm=False, norm_eps=1e-5),
    "llama-untied": dataclasses.replace(QWEN3, qk_norm=False, tied=False),
}
DTYPES = [np.dtype("float32"), np.dtype(ml_dtypes.bfloat16)]
# What transformers 5 writes beside rope_parameters, and what it wrote before.
THETA, YARN = (
    {"rope_theta": 5e5},
    {"factor": 2.5, "original_max_position_embeddings": 64},
)
EXPECTED_YARN = qwen3.Yarn(factor=2.5, original_max_positions=64)


def random_params(config, dtype=np.float32):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda p: rng.normal(size=p.shape).astype(dtype), qwen3.param_table(config)
    )


def assert_same_bits(got, want):
    def one(a, b):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()

    jax.tree.map(one, got, want)


def edit_config(folder, remove=(), **changes):
    """Changes config.json in place."""
    config = json.loads((folder / "config.json").read_text())
    config = {k: v for k, v in config.items() if k not in remove} | changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def folder(tmp_path):
    """A small saved model."""
    hf_weights.save(tmp_path / "model", random_params(QWEN3), QWEN3)
    return tmp_path / "model"


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """The same in several files."""
    monkeypatch.setattr(hf_weights, "SHARD_BYTES", 3000)
    hf_weights.save(tmp_path / "shards", random_params(QWEN3), QWEN3)
    return tmp_path / "shards"


# ---- There and back.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_load_gives_what_save_got(tmp_path, name, dtype):
    config = CONFIGS[name]
    params = random_params(config, dtype)
    hf_weights.save(tmp_path, params, config)
    got, got_config = hf_weights.load(tmp_path, dtype=dtype)
    assert got_config == config
    assert_same_bits(got, params)
    assert (
        "lm_head.weight" in load_file(tmp_path / "model.safetensors")
    ) != config.tied


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_save_gives_what_load_got(tmp_path, dtype):
    """A folder that transformers wrote; tensor by tensor in their names and layout."""
    theirs = load_file(ODD / "model.safetensors")
    theirs = {name: tensor.astype(dtype) for name, tensor in theirs.items()}
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(ODD / "config.json", source)
    save_file(theirs, source / "model.safetensors")
    params, config = hf_weights.load(source, dtype=dtype)
    hf_weights.save(tmp_path, params, config)
    ours = load_file(tmp_path / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert_same_bits(ours, theirs)
    assert hf_weights.read_config(tmp_path) == config


def test_layout_of_a_matrix():
    """Ours is [.., in, out], theirs [out, in], the heads in order."""
    theirs = load_file(ODD / "model.safetensors")
    params, c = hf_weights.load(ODD, dtype=np.float32)
    layers = params["layers"]
    q = theirs["model.layers.2.self_attn.q_proj.weight"]
    o = theirs["model.layers.2.self_attn.o_proj.weight"]
    for head in range(c.num_heads):
        at = slice(head * c.head_dim, (head + 1) * c.head_dim)
        np.testing.assert_array_equal(layers["wq"][2, :, head], q[at].T)
        np.testing.assert_array_equal(layers["wo"][2, head], o[:, at].T)
    down = theirs["model.layers.0.mlp.down_proj.weight"]
    np.testing.assert_array_equal(layers["w_down"][0], down.T)


def test_load_casts(folder):
    got, _ = hf_weights.load(folder, dtype=ml_dtypes.bfloat16)
    want = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), random_params(QWEN3))
    assert_same_bits(got, want)


def test_shards(shards):
    files = sorted(file.name for file in shards.glob("*.safetensors"))
    n = len(files)
    assert n > 3
    assert files == [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    assert max((shards / file).stat().st_size for file in files) < 3000 + 2000
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    params = random_params(QWEN3)
    assert index["metadata"]["total_size"] == sum(
        x.nbytes for x in jax.tree.leaves(params)
    )
    for file in files:
        held = {name for name, at in index["weight_map"].items() if at == file}
        assert held == load_file(shards / file).keys()
    got, config = hf_weights.load(shards, dtype=np.float32)
    assert config == QWEN3
    assert_same_bits(got, params)


def test_save_replaces_an_older_model(shards, monkeypatch):
    """In one file or in several, nothing of the older one is read."""
    for limit in (10**9, 3000, 10**9):
        monkeypatch.setattr(hf_weights, "SHARD_BYTES", limit)
        params = jax.tree.map(lambda x, limit=limit: x + limit, random_params(QWEN3))
        hf_weights.save(shards, params, QWEN3)
        got, _ = hf_weights.load(shards, dtype=np.float32)
        assert_same_bits(got, params)
        assert (shards / "model.safetensors").exists() == (limit == 10**9)


# ---- config.json.


@pytest.mark.parametrize(
    "changes, yarn",
    [
        ({"rope_parameters": THETA | {"rope_type": "default"}}, None),
        ({"rope_parameters": THETA | YARN | {"rope_type": "yarn"}}, EXPECTED_YARN),
        (THETA, None),
        (THETA | {"rope_scaling": None}, None),
        (THETA | {"rope_scaling": YARN | {"rope_type": "yarn"}}, EXPECTED_YARN),
        (THETA | {"rope_scaling": YARN | {"type": "yarn"}}, EXPECTED_YARN),
        (
            # Without the original context, it is the whole one.
            THETA | {"rope_scaling": {"type": "yarn", "factor": 4, "beta_fast": None}},
            qwen3.Yarn(factor=4, original_max_positions=160),
        ),
    ],
)
def test_rope_forms(folder, changes, yarn):
    edit_config(folder, remove=("rope_theta", "rope_scaling"), **changes)
    config = hf_weights.read_config(folder)
    assert config == dataclasses.replace(QWEN3, rope_theta=5e5, yarn=yarn)


def test_defaults_of_older_configs(folder):
    edit_config(
        folder,
        remove=("num_key_value_heads", "head_dim", "tie_word_embeddings"),
        hidden_size=24,
        architectures=None,
        use_sliding_window=False,
        sliding_window=4096,
    )
    got = hf_weights.read_config(folder)
    want = dataclasses.replace(QWEN3, width=24, num_kv_heads=4, head_dim=6, tied=False)
    assert got == want


YARN_OF = {"rope_type": "yarn"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"mlp_bias": True}, "mlp_bias = True is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window = True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"model_type": "gpt2"}, "model_type = 'gpt2' is not supported"),
        ({"model_type": None}, "model_type = None is not supported"),
        ({"quantization_config": {}}, "quantization_config = {} is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 8.0}}, "'linear'"),
        ({"rope_scaling": YARN_OF}, "lacks 'factor'"),
        (
            {"rope_scaling": YARN_OF | {"factor": "2.5"}},
            "factor = '2.5' is no positive",
        ),
        ({"rope_scaling": YARN_OF | {"factor": 2.5, "mscale": 1}}, "'mscale'"),
        ({"rope_scaling": "yarn"}, "RoPE scaling 'yarn' is not a JSON object"),
        ({"rope_theta": None}, "lacks 'rope_theta'"),
        ({"rope_theta": "1e6"}, "rope_theta = '1e6' is no positive float"),
        ({"hidden_size": "12"}, "hidden_size = '12' is no positive int"),
        ({"hidden_size": 12.0}, r"hidden_size = 12\.0 is no positive int"),
        ({"hidden_size": True}, "hidden_size = True is no positive int"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0 is no positive int"),
        ({"vocab_size": None}, "lacks 'vocab_size'"),
        ({"rms_norm_eps": [1e-6]}, "rms_norm_eps = .* is no positive float"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no' is no bool"),
        ({"num_key_value_heads": 3}, r"model\.num_kv_heads \(3\)"),
        ({"head_dim": 7}, "head_dim must be even"),
    ],
)
def test_configs_that_we_cannot_run(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(InputError, match=message) as error:
        hf_weights.load(folder, dtype=np.float32)
    assert str(error.value).startswith(str(folder / "config.json"))


@pytest.mark.parametrize("text", [b"{", b"", b"\xff\xfe", b"[]", b"null"])
def test_config_that_is_no_config(folder, text):
    (folder / "config.json").write_bytes(text)
    with pytest.raises(InputError, match=r"config\.json is not"):
        hf_weights.load(folder, dtype=np.float32)


# ---- Tensors and files.


def edit_tensors(folder, remove=(), **changes):
    file = folder / "model.safetensors"
    tensors = {k: v for k, v in load_file(file).items() if k not in remove}
    save_file(tensors | changes, file)


def test_all_wrong_tensors_are_listed_at_once(folder):
    norm, up = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
    bias, q = (
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.2.mlp.gate_proj.weight",
    )
    # A transposed matrix has the right size, not the right shape.
    changes = {bias: np.zeros(24, np.float32), q: np.zeros((12, 20), np.float32)}
    edit_tensors(folder, remove=(norm, up), **changes)
    with pytest.raises(InputError) as error:
        hf_weights.load(folder, dtype=np.float32)
    message = str(error.value)
    assert message.startswith(str(folder))
    for problem in (
        f"{norm} is missing",
        f"{up} is missing",
        f"{bias} is unknown",
        f"{q} has shape (12, 20), not (20, 12)",
    ):
        assert message.count(problem) == 1
    assert message.count("model.") == 4


def test_layers_more_or_fewer_than_config(folder):
    for layers, message in (
        (2, r"layers\.2\..* is unknown"),
        (4, r"layers\.3\..* is miss"),
    ):
        edit_config(folder, num_hidden_layers=layers)
        with pytest.raises(InputError, match=message):
            hf_weights.load(folder, dtype=np.float32)


def test_head_of_a_tied_model(folder):
    head = random_params(QWEN3)["embed"]
    edit_tensors(folder, **{"lm_head.weight": head})
    got, _ = hf_weights.load(folder, dtype=np.float32)
    assert_same_bits(got, random_params(QWEN3))
    head[3, 4] += 1
    edit_tensors(folder, **{"lm_head.weight": head})
    with pytest.raises(InputError, match=r"ties lm_head\.weight .* but they differ"):
        hf_weights.load(folder, dtype=np.float32)


def test_rotary_buffers_are_ignored(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder, **{name: np.ones(3, np.float32)})
    got, _ = hf_weights.load(folder, dtype=np.float32)
    assert_same_bits(got, random_params(QWEN3))


def test_a_folder_on_an_object_store(shards, monkeypatch):
    """safetensors cannot open it; what is read by ourselves is the same, whole and in parts."""
    rules = sections.mesh(1, 1, 1).rules.to_dict() | {"vocab": ()}
    mesh = sharding.make_mesh(sharding.MeshConfig(1, 2, 2, rules), jax.devices()[:4])
    layout = sharding.Layout(mesh, rules)
    want, _ = hf_weights.load(shards, dtype=jnp.bfloat16)
    monkeypatch.setattr(hf_weights, "_is_remote", lambda file: True)
    monkeypatch.setattr(hf_weights, "safe_open", None)
    for where in (None, layout):
        got, _ = hf_weights.load(shards, dtype=jnp.bfloat16, layout=where)
        jax.tree.map(np.testing.assert_array_equal, got, want)
    file = min(shards.glob("*.safetensors"))
    whole = file.read_bytes()
    for broken in (
        b"",
        whole[:4],
        whole[:100],
        whole[:-1],
        b"\xff" * 64,
        b"\2" + whole[1:],
    ):
        file.write_bytes(broken)
        with pytest.raises(InputError, match=f"{file.name} is damaged or cut off"):
            hf_weights.load(shards, dtype=jnp.bfloat16)


@pytest.mark.parametrize("kept", [0, 4, 100, 3000, -1])
def test_files_cut_off(folder, shards, kept):
    for file in (folder / "model.safetensors", sorted(shards.glob("*.safetensors"))[1]):
        file.write_bytes(file.read_bytes()[:kept])
        with pytest.raises(InputError, match=f"{file} is damaged or cut off"):
            hf_weights.load(file.parent, dtype=np.float32)


def test_missing_files(folder, shards, tmp_path):
    missing = [
        folder / "model.safetensors",
        folder / "config.json",
        sorted(shards.glob("*.safetensors"))[2],
    ]
    for file in missing:
        file.unlink()
        with pytest.raises(InputError, match=f"{file} does not exist"):
            hf_weights.load(file.parent, dtype=np.float32)
    with pytest.raises(InputError, match=r"nowhere/config\.json does not exist"):
        hf_weights.load(tmp_path / "nowhere", dtype=np.float32)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "index.json is not valid JSON"),
        ("{}", "index.json has no 'weight_map'"),
        ("[]", "index.json has no 'weight_map'"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "files outside its folder"),
        ('{"weight_map": {"a": 1}}', "1 does not exist"),
    ],
)
def test_bad_index(shards, text, message):
    (shards / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match=message):
        hf_weights.load(shards, dtype=np.float32)
