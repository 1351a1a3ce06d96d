"""Speeds against arithmetic by hand."""

import types

import jax
import pytest

from klear_jax import qwen3, roofline, speed
from klear_jax.sharding import Layout, MeshConfig, make_mesh

CONFIG = qwen3.Config(
    vocab_size=1_000,
    width=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    mlp_width=128,
    rope_theta=1e4,
    norm_eps=1e-6,
    tied=False,
    qk_norm=True,
    max_positions=64,
)
CHIP = roofline.Chip(hbm_gib=1, hbm_bytes=1e6, flops=1e9, link_bytes=1e6)
# Of a layer: q and o, k and v, the three of the MLP.
WEIGHTS = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)


def model(mesh):
    heads = ("tensor",)
    rules = {"batch": ("data", "fsdp"), "heads": heads, "kv_heads": heads}
    config = MeshConfig(data=1, fsdp=mesh[0], tensor=mesh[1], rules=rules)
    layout = Layout(make_mesh(config, jax.devices()[: mesh[0] * mesh[1]]), rules)
    return roofline.Model(CONFIG, layout, itemsize=2, remat="full")


def test_mfu_counts_what_is_needed_once(monkeypatch):
    monkeypatch.setattr(speed, "chip_of", lambda kind: CHIP)
    got = speed.of_update(model((4, 2)), tokens=600, samples=20, seconds=2.0)
    # Causal attention of 30 tokens: scores and values, half of the square; 4 heads of 16.
    attention = 2 * 2 * 2 * 600 * 30 / 2 * 4 * 16
    flops = 3 * (2 * 600 * (WEIGHTS + 1_000 * 64) + attention)
    assert got["speed/update_tokens"] == 300
    assert got["speed/mfu"] == pytest.approx(flops / (2.0 * 8 * 1e9), rel=1e-12)
    assert speed.of_update(model((1, 1)), 0, 0, 2.0) == {"speed/update_tokens": 0}


def test_bandwidth_counts_weights_and_cache(monkeypatch):
    monkeypatch.setattr(speed, "chip_of", lambda kind: CHIP)
    counts = {"sampler/decode_steps": 100, "sampler/slot_steps": 4_000}
    got = speed.of_sampling(model((4, 2)), counts, tokens=4_000, length=25, seconds=10)
    # 40 of all slots are in use, 10 of each of the 4 replicas; two chips have half of it each.
    cache = 10 * 25 * 2 * 2 * 2 * 16 * 2 / 2
    read = 100 * ((WEIGHTS + 1_000 * 64) * 2 / 2 + cache)
    assert got["speed/sample_tokens"] == 400
    assert got["speed/decode_bandwidth"] == pytest.approx(read / (10 * 1e6), rel=1e-12)


def test_where_the_chip_is_not_known_nothing_is_said_of_it():
    counts = {"sampler/decode_steps": 1, "sampler/slot_steps": 1}
    got = speed.of_update(model((1, 1)), 5, 1, 1.0)
    got |= speed.of_sampling(model((1, 1)), counts, 5, 1, 1.0)
    assert got == {"speed/update_tokens": 5, "speed/sample_tokens": 5}
    assert set(speed.memory()) <= {"memory/host_gib"}  # A CPU's is the host's.


def test_memory_of_the_fullest_device(monkeypatch):
    stats = [{"bytes_in_use": 1 << 30, "peak_bytes_in_use": 3 << 30}, None, {}]
    stats.append({"bytes_in_use": 2 << 30, "peak_bytes_in_use": 2 << 30})
    devices = [types.SimpleNamespace(memory_stats=lambda one=one: one) for one in stats]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    found = speed.memory()
    assert found["memory/device_gib"] == 2 and found["memory/device_peak_gib"] == 3
    assert 0.01 < found.get("memory/host_gib", 1) < 100


@pytest.mark.parametrize(
    "kind, name", [("TPU v5 lite", "v5e"), ("TPU v5p", "v5p"), ("TPU v6 lite", "v6e")]
)
def test_chips_by_what_jax_calls_them(kind, name):
    assert roofline.chip_of(kind) is roofline.CHIPS[name]
    assert roofline.chip_of("cpu") is None
