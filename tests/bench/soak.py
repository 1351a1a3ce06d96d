"""Thousands of requests through a cache a quarter as large as they want.

    python -m tests.bench.soak --model=FOLDER [--requests=5000]

Random prompts (1 to 64 tokens), group sizes (1 to 8) and limits (1 to 256 tokens); 64
slots; the cache holds a quarter of what 64 such samples fill at their ends. Checks that
every sample comes once, that all pages are returned, that nothing is compiled after the
start and that resident memory stays flat; prints what it saw.
"""

import argparse
import collections
import os
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax.numpy as jnp
import numpy as np

from klear_jax import decoding, hf_weights, sampler, scheduler
from klear_jax.metrics import Compilations
from klear_jax.sampling import Sampling

SLOTS, PAGE, PROMPT, LIMIT = 64, 16, 64, 256


def resident_mib():
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def make_prompts(vocab, count, seed):
    rng = np.random.default_rng(seed)
    prompts, made = [], 0
    while made < count:
        size = min(int(rng.integers(1, 9)), count - made)
        requests = [
            scheduler.Request(
                name=made + j,
                key=np.array([0, seed, len(prompts), j], np.uint32),
                limit=int(rng.integers(1, LIMIT + 1)),
            )
            for j in range(size)
        ]
        tokens = rng.integers(3, vocab, rng.integers(1, PROMPT + 1)).astype(np.int32)
        prompts.append(scheduler.Prompt(tokens, collections.deque(requests)))
        made += size
    return prompts


def main():
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--model", required=True)
    flags.add_argument("--requests", type=int, default=5000)
    args = flags.parse_args()
    params, config = hf_weights.load(args.model, dtype=jnp.float32)
    prompts = make_prompts(config.vocab_size, args.requests, seed=0)
    ends = [len(p.tokens) + r.limit for p in prompts for r in p.requests]
    wanted = SLOTS * float(np.mean(ends))
    shape = scheduler.Shape(
        replicas=1,
        slots=SLOTS,
        pages=int(wanted / 4) // PAGE,
        page_tokens=PAGE,
        slot_pages=-(-(PROMPT + LIMIT) // PAGE),
        prefill_blocks=16,
        block_tokens=PAGE,
        decode_steps=8,
    )
    seen, marks, start = set(), [], time.perf_counter()
    with Compilations() as compilations:
        programs = decoding.Programs(
            params, shape, Sampling(), (1, 2), config=config, layout=None, dtype=None
        )
        programs.warm_up()
        compilations.close()
        plan = scheduler.Scheduler(shape, prompts, (1, 2))
        for result in sampler.run(plan, programs):
            assert result.request.name not in seen
            assert len(result.tokens) == len(result.logprobs) <= result.request.limit
            assert result.stopped or len(result.tokens) == result.request.limit
            seen.add(result.request.name)
            if len(seen) in (args.requests // 10, args.requests // 2, args.requests):
                marks.append(f"{resident_mib():.0f}")
    assert seen == set(range(args.requests))
    assert plan.pages_in_use == [0]
    assert plan.unfinished() == []
    assert compilations.unplanned == 0
    print(f"{len(seen)} samples, each once, in {time.perf_counter() - start:.0f} s")
    print(
        f"cache {shape.pages * PAGE} tokens, {wanted:.0f} wanted at once; all returned"
    )
    print(f"resident memory at 10%, 50%, 100%: {', '.join(marks)} MiB")
    print("unplanned compilations: 0")
    print({name: value for name, value in plan.stats.items() if value})


if __name__ == "__main__":
    main()
