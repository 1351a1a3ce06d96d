"""What an accelerator computes, beside this machine's CPU, and how fast, beside transformers.

    python -m tests.bench.device parity
    python -m tests.bench.device attention
    python -m tests.bench.device speed [--preset=qwen3_0.6b] [--rows=4] [--tokens=4096]

parity: a small Qwen3 of random weights. Log-probs and the gradient of the GPPO loss in float32
on the device against the CPU's, and in bfloat16 against float32; greedy samples against the
CPU's; the gap between the sampler's log-probs and the trainer's.

attention: the kernels of training beside XLA's, by the size of their tiles.

speed: random weights of a published size, bfloat16 over float32 masters, packed rows without
padding. SFT updates (full remat, AdamW), scoring, sampling; then the same work by
transformers (autocast, sdpa, gradient checkpointing, fused AdamW), each in a process of its
own. The median of several calls, after two that compile.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

os.environ |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "HF_HUB_OFFLINE": "1"}
PROMPT, NEW, SLOTS = 256, 256, 64  # Of sampling.
CLIP = {"kind": "gppo", "clip_low": 0.2, "clip_high": 0.28, "dual_clip": 10.0}
CLIP |= {"beta_low": 1.0, "beta_high": 1.0}


def parity(args) -> None:
    """Compares the numbers of a process a line: the CPU's in float32 are the exact ones."""
    import numpy as np

    def numbers(platform, dtype):
        environment = os.environ | (
            {"JAX_PLATFORMS": "cpu"} if platform == "cpu" else {}
        )
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/numbers.npz"
            command = [sys.executable, "-m", "tests.bench.device", "_numbers"]
            command += [f"--dtype={dtype}", f"--output={path}"]
            subprocess.run(command, check=True, env=environment)
            return dict(np.load(path))

    exact = numbers("cpu", "float32")
    for dtype in ("float32", "bfloat16"):
        found = numbers("device", dtype)
        worst = max(
            float(
                np.linalg.norm(found[name] - exact[name]) / np.linalg.norm(exact[name])
            )
            for name in exact
            if name.startswith("grad")
        )
        line = {
            "device": str(found["device"]),
            "dtype": dtype,
            "logp_max_error": float(np.abs(found["logp"] - exact["logp"]).max()),
            "grad_worst_relative_error": worst,
            "greedy_tokens_equal": float((found["tokens"] == exact["tokens"]).mean()),
            "sampler_trainer_gap": float(found["gap"]),
        }
        print(json.dumps(line), flush=True)


def numbers(args) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from klear_jax import logprobs, qwen3, sampler, steps

    jax.config.update("jax_default_matmul_precision", "highest")  # Of float32.
    config = dataclasses.replace(
        qwen3.PRESETS["qwen3_0.6b"],
        vocab_size=1024,
        width=256,
        num_layers=4,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        mlp_width=512,
        tied=False,
    )
    dtype = jnp.dtype(args.dtype)
    params = qwen3.init_params(config, jax.random.key(0))
    model = {"config": config, "dtype": dtype}
    rng = np.random.default_rng(0)
    shape = 2, 1024
    micro = {
        "tokens": rng.integers(0, config.vocab_size, shape).astype(np.int32),
        "positions": np.tile(np.arange(512, dtype=np.int32), (2, 2)),
        "segment_ids": np.repeat(np.array([[1, 2], [1, 0]], np.int32), 512, axis=1),
        "advantage": rng.normal(size=shape).astype(np.float32),
        # About what random weights say, so that there are ratios in every region.
        "old_logp": rng.normal(-np.log(1024), 0.3, shape).astype(np.float32),
        "weight": np.full(shape, 1 / 1536, np.float32),
        "positive_weight": np.full(shape, 1 / 3072, np.float32),
    }

    @jax.jit
    def score(params, tokens, positions=None, segments=None):
        rows = {"positions_BT": positions, "segment_ids_BT": segments}
        return logprobs.token_logprobs(params, tokens_BT=tokens, **rows, **model)

    @jax.jit
    def gradient(params, micro):
        options = {"layout": None, "remat": "full", "positive_coef": 0.1, "clip": CLIP}
        return jax.grad(lambda p: steps.gppo_loss(p, micro, **options, **model)[0])(
            params
        )

    prompts = micro["tokens"][:, :64]
    samples = sampler.generate(
        params,
        config,
        prompts.tolist(),
        max_new_tokens=64,
        temperature=0.0,
        dtype=dtype,
    )
    drawn = np.array([one.tokens for (one,) in samples])
    logp = score(params, np.concatenate([prompts, drawn], axis=1))[:, 64:]
    grads = jax.tree.leaves(gradient(params, micro))
    np.savez(
        args.output,
        device=jax.devices()[0].device_kind,
        logp=score(params, *(micro[k] for k in ("tokens", "positions", "segment_ids"))),
        tokens=drawn,
        gap=np.abs(logp - np.array([one.logprobs for (one,) in samples])).max(),
        **{f"grad{i}": grad for i, grad in enumerate(grads)},
    )


def attention(args) -> None:
    """Milliseconds forward, and forward and backward, of each kernel, and its error against
    XLA's in float32."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from klear_jax import attention, qwen3, sharding

    c = qwen3.PRESETS[args.preset]
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [
        (args.rows, args.tokens, n, c.head_dim)
        for n in (c.num_heads, c.num_kv_heads, c.num_kv_heads, c.num_heads)
    ]
    q, k, v, weight = map(jax.random.normal, keys, shapes)
    segments = jnp.where(jnp.arange(args.tokens) < args.tokens // 2, 1, 2)
    segments = jnp.tile(segments[None], (args.rows, 1))

    def programs(fn):
        def loss(q, k, v):
            return jnp.sum(fn(q, k, v, segments).astype(jnp.float32) * weight)

        return jax.jit(lambda *x: fn(*x, segments)), jax.jit(jax.grad(loss, (0, 1, 2)))

    with jax.default_matmul_precision("highest"):
        exact = [fn(q, k, v) for fn in programs(attention.blockwise_attention)]
    exact = jax.tree.map(np.asarray, exact)
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    blocks = [(128, 128), (128, 64), (128, 32), (64, 64), (64, 32)]
    kernels = [("xla", attention.blockwise_attention, None)]
    if sharding.platform(None) == "gpu":
        kernels += [("flash", attention.flash_attention, sizes) for sizes in blocks]
    for name, kernel, sizes in kernels:
        if sizes:
            attention.FLASH_BLOCK, attention.FLASH_BACKWARD_BLOCK = sizes
        line = {"kernel": name, "blocks": sizes}
        try:
            for what, fn, want in zip(
                ("forward", "both"), programs(kernel), exact, strict=True
            ):
                got = fn(q, k, v)
                line[f"{what}_error"] = max(
                    float(np.linalg.norm(np.float32(a) - b) / np.linalg.norm(b))
                    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True)
                )
                line[f"{what}_ms"] = 1e3 * median_seconds(
                    lambda fn=fn: jax.block_until_ready(fn(q, k, v)), 10
                )
        except Exception as error:
            line["error"] = str(error)[:200]
        print(json.dumps(line), flush=True)


def klear(args) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from klear_jax import optim, qwen3, sampler, steps

    config = qwen3.PRESETS[args.preset]
    optimizer = optim.OptimConfig(
        peak_lr=1e-5,
        end_lr=1e-5,
        decay="linear",
        decay_start=1.0,
        warmup_steps=0,
        warmup_from=0.0,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.01,
        clip_norm=1.0,
    )
    tx = optim.optimizer(optimizer)
    params = jax.jit(lambda key: qwen3.init_params(config, key))(jax.random.key(0))
    rng = np.random.default_rng(0)
    shape = 1, args.rows, args.tokens
    batch = {
        "tokens": rng.integers(0, config.vocab_size, shape).astype(np.int32),
        "positions": np.broadcast_to(np.arange(args.tokens, dtype=np.int32), shape),
        "segment_ids": np.ones(shape, np.int32),
        "weight": np.full(shape, 1 / (args.rows * args.tokens), np.float32),
    }
    batch = jax.device_put(batch)
    model = {"config": config, "layout": None, "dtype": jnp.bfloat16}

    score = jax.jit(lambda p, b: steps.score_step(p, b, 1, **model))
    report("klear", "score", args, lambda: np.asarray(score(params, batch)))

    copy = jax.jit(lambda p: jax.tree.map(lambda x: x.astype(jnp.bfloat16), p))(params)
    prompts = [
        list(map(int, rng.integers(0, config.vocab_size, PROMPT))) for _ in range(SLOTS)
    ]

    def sample():
        sampler.generate(copy, config, prompts, max_new_tokens=NEW, num_slots=SLOTS)

    report("klear", "sample", args, sample, tokens=SLOTS * NEW)

    step = jax.jit(
        lambda s, b: steps.train_step(
            s,
            b,
            1,
            1e-5,
            tx=tx,
            loss_fn=lambda p, m: steps.lm_loss(p, m, remat="full", **model),
        ),
        donate_argnums=0,
    )
    state = steps.init_state(params, tx)

    def update():
        nonlocal state
        state, metrics = step(state, batch)
        return float(metrics["loss"])

    report("klear", "sft", args, update)
    stats = jax.devices()[0].memory_stats() or {}
    print(
        json.dumps(
            {"peer": "klear", "peak_gib": stats.get("peak_bytes_in_use", 0) / 2**30}
        )
    )


def hf(args) -> None:
    import torch
    import transformers

    from klear_jax import qwen3

    c = qwen3.PRESETS[args.preset]
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=c.vocab_size,
            hidden_size=c.width,
            num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads,
            num_key_value_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            intermediate_size=c.mlp_width,
            rope_theta=c.rope_theta,
            tie_word_embeddings=c.tied,
            attn_implementation="sdpa",
        )
    ).to(device)
    ids = torch.randint(0, c.vocab_size, (args.rows, args.tokens), device=device)
    cast = lambda: torch.autocast(device, torch.bfloat16)  # noqa: E731

    def score():
        with torch.inference_mode(), cast():
            logits = net(input_ids=ids, use_cache=False).logits[:, :-1].float()
            got = logits.gather(2, ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)
        return float(got.sum())

    report("hf", "score", args, score)
    net.bfloat16()
    prompts = torch.randint(0, c.vocab_size, (SLOTS, PROMPT), device=device)

    def sample():
        with torch.inference_mode():
            net.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                top_k=0,
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                pad_token_id=2,
                use_cache=True,
            )
        if device == "cuda":
            torch.cuda.synchronize()

    report("hf", "sample", args, sample, tokens=SLOTS * NEW, calls=1)
    net.float()
    net.train()
    net.gradient_checkpointing_enable()
    tx = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True)

    def update():
        tx.zero_grad(set_to_none=True)
        with cast():
            loss = net(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        tx.step()
        return float(loss)

    report("hf", "sft", args, update)
    if device == "cuda":
        print(
            json.dumps(
                {"peer": "hf", "peak_gib": torch.cuda.max_memory_allocated() / 2**30}
            )
        )


def report(peer, phase, args, fn, tokens=None, calls=5) -> None:
    start = time.perf_counter()
    fn()
    first = time.perf_counter() - start
    fn()
    median = median_seconds(fn, calls)
    tokens = tokens or args.rows * args.tokens
    print(
        json.dumps(
            {
                "peer": peer,
                "phase": phase,
                "tokens_per_s": round(tokens / median),
                "seconds": round(median, 4),
                "first_call_s": round(first, 1),
            }
        ),
        flush=True,
    )


def median_seconds(fn, calls):
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        fn()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def speed(args) -> None:
    for peer in args.peers.split(","):
        command = [
            sys.executable,
            "-m",
            "tests.bench.device",
            f"_{peer}",
            *sys.argv[2:],
        ]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    commands = {"parity": parity, "attention": attention, "speed": speed}
    commands |= {"_numbers": numbers, "_klear": klear, "_hf": hf}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=commands)
    parser.add_argument("--preset", default="qwen3_0.6b")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--peers", default="klear,hf")
    parser.add_argument("--dtype")
    parser.add_argument("--output")
    arguments = parser.parse_args()
    commands[arguments.command](arguments)
