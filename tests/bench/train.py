"""Training steps on CPU, for a paired comparison with other trainers on one machine.

    python -m tests.bench.train --model=FOLDER --phases=sft,score,grpo

times each phase a few times by itself. With --serve it reads one phase name a line, runs it
once and prints one JSON line: whoever compares lets every trainer do one repeat in turn, so
that a machine whose speed drifts is fair to all, and quotes the ratios of a round.

Phases, in float32, with token ids at random:
    sft     an update on 16 rows of 256 tokens: forward, backward, clip, AdamW
    score   log-probs of 16 rows of 256 tokens
    grpo    8 prompts of 32 tokens, 8 samples each of 128 new tokens, a reward (the share of
            even ids), and one update; old log-probs are the sampler's, for the one update is
            on the policy that drew them
"""

import argparse
import functools
import json
import os
import resource
import statistics
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from configs import sections
from klear_jax import (
    advantages,
    batch,
    hf_weights,
    losses,
    optim,
    qwen3,
    sampler,
    sharding,
    steps,
)
from klear_jax.config import trim_after_compilations

RULES = sections.mesh(1, 1, 1).rules.to_dict()
OPTIM = optim.OptimConfig(
    peak_lr=1e-5,
    end_lr=1e-5,
    decay="linear",
    decay_start=1.0,
    warmup_steps=0,
    warmup_from=1.0,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    weight_decay=0.01,
    clip_norm=1.0,
)
CLIP = {"kind": "gppo", "clip_low": 0.2, "clip_high": 0.28, "beta_low": 1.0}
CLIP |= {"beta_high": 1.0, "dual_clip": None}
TOKENS = {"sft": 16 * 256, "score": 16 * 256, "grpo": 64 * 128}


def phases(model, micro_rows):
    layout = sharding.Layout(
        sharding.make_mesh(sharding.MeshConfig(1, 1, 1, RULES), jax.devices()[:1]),
        RULES,
    )
    config = hf_weights.read_config(model)

    def load():
        return hf_weights.load(model, dtype=jnp.float32, layout=layout)[0]

    bound = {"config": config, "layout": layout, "dtype": jnp.dtype("float32")}
    tx = optim.optimizer(OPTIM)
    rng = np.random.default_rng(0)

    def update(loss_fn):
        state = steps.init_state(load(), tx)
        shardings = steps.state_shardings(
            state, qwen3.params_shardings(config, layout), layout
        )
        state = jax.device_put(state, shardings)
        step = functools.partial(steps.train_step, loss_fn=loss_fn, tx=tx)
        program = steps.compile_train_step(step, layout, shardings)
        kept = [state]

        def run(rows):
            count = -(-len(rows["tokens"]) // micro_rows)
            micro = steps.micro_batches(rows, micro_rows, count, layout)
            kept[0], metrics = program(kept[0], micro, count, 1e-5)
            return float(metrics["loss"])

        return run, kept

    ids = rng.integers(3, config.vocab_size, (16, 256)).astype(np.int32)
    ones = np.ones_like(ids)
    rows = {
        "tokens": ids,
        "positions": np.cumsum(ones, axis=1, dtype=np.int32) - 1,
        "segment_ids": ones,
    }

    def sft():
        mask = ones.copy()
        mask[:, 0] = 0
        run, _ = update(functools.partial(steps.lm_loss, remat="dots", **bound))
        return lambda: run(rows | {"weight": losses.token_weights(mask)})

    def score():
        program = steps.compile_score_step(
            functools.partial(steps.score_step, **bound),
            layout,
            qwen3.params_shardings(config, layout),
        )
        count = 16 // micro_rows
        params = load()

        def run():
            micro = steps.micro_batches(rows, micro_rows, count, layout)
            return float(np.asarray(program(params, micro, count)).sum())

        return run

    def grpo():
        loss_fn = functools.partial(
            steps.gppo_loss, positive_coef=0.0, clip=CLIP, remat="dots", **bound
        )
        run, kept = update(loss_fn)
        seeds = iter(range(10**9))

        def step():
            prompts = rng.integers(3, config.vocab_size, (8, 32)).tolist()
            groups = sampler.generate(
                kept[0].params,
                config,
                prompts,
                max_new_tokens=128,
                num_samples=8,
                seed=next(seeds),
                num_slots=64,
                layout=layout,
            )
            samples = [sample for group in groups for sample in group]
            reward_B = np.float32(
                [np.mean(np.array(sample.tokens) % 2 == 0) for sample in samples]
            )
            group_B = np.repeat(np.arange(8), 8)
            advantage_B = advantages.group_relative(reward_B, group_B)
            laid = batch.lay_out(
                [prompts[g] for g in group_B], samples, [np.zeros(0)] * 64, 160
            )
            mask = laid["mask"]
            weight = losses.token_weights(mask)
            names = ("tokens", "positions", "segment_ids")
            return run(
                {name: laid[name] for name in names}
                | {
                    "old_logp": laid["behaviour_logp"],
                    "advantage": np.where(mask, advantage_B[:, None], np.float32(0)),
                    "weight": weight,
                    "positive_weight": np.zeros_like(weight),
                }
            )

        return step

    return {"sft": sft, "score": score, "grpo": grpo}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--phases", default="sft,score,grpo")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--micro_rows", type=int, default=4)
    parser.add_argument("--serve", action="store_true")
    args, _ = parser.parse_known_args()
    trim_after_compilations()
    makers, made = phases(args.model, args.micro_rows), {}

    def timed(phase, repeats):
        if phase not in made:
            made[phase] = makers[phase]()
            made[phase]()
            made[phase]()
        seconds, cpu = [], []
        for _ in range(repeats):
            start, begun = time.perf_counter(), time.process_time()
            made[phase]()
            seconds.append(time.perf_counter() - start)
            cpu.append(time.process_time() - begun)
        median = statistics.median(seconds)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        found = {"peer": "klear", "phase": phase, "wall_s": round(median, 4)}
        found |= {"tokens_per_s": round(TOKENS[phase] / median, 1)}
        found |= {"cpu_s": round(min(cpu), 4), "peak_rss_mb": round(peak, 1)}
        print(json.dumps(found), flush=True)

    # Under the names that peers have for the same.
    names = {"logprob": "score"}
    if args.serve:
        for line in sys.stdin:
            if not line.strip():
                break
            timed(names.get(line.strip(), line.strip()), 1)
        return
    for phase in args.phases.split(","):
        timed(names.get(phase, phase), args.repeats)


if __name__ == "__main__":
    main()
