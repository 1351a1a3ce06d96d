r"""Math GPPO of Klear-Reasoner-8B: the second stage, after sft_8b.

    python -m klear_jax.train --config=configs/gppo_8b.py \
        --workdir=gs://BUCKET/gppo_8b --config.init_from=gs://BUCKET/sft_8b
    python -m klear_jax.evaluate --config=configs/gppo_8b.py \
        --workdir=gs://BUCKET/gppo_8b --config.evaluation.num_samples=64
    python -m klear_jax.export --workdir=gs://BUCKET/gppo_8b --output=DIR --dtype=bfloat16

To compare with, all of the paper, in 32K tokens: AIME 2024 avg@32 rises from 75.3 at step
10 to 81.3, the mean of steps 200 to 240 (Fig. 2a; clip-higher 79.1, CISPO 80.0); gradient
norms of 0.05 to 0.12 (Fig. 2c). After `gppo_code_8b`: Klear-Reasoner-8B, Table 1, avg@64 of
AIME 2024 83.2, AIME 2025 75.6, HMMT 2025 60.3 (with 64K and YaRN: 90.5, 83.2, 70.8).

Data: Kwai-Klear/KlearReasoner-MathSub-30K, the published part of the authors' 88K problems,
as parquet or JSON lines; or JSON lines of your own, with `prompt` (text, or {role, content}
messages: the bare problem) and `answer`. A row's data_source decides on its reward. Or what
`prepare_data --config=configs/data/rl_math.py` makes of them: its folder, split 'train'.

Sources: [P] the paper, arXiv 2508.07629; [R] the authors' recipe, in their repository
Kwai-Klear/KlearReasoner recipe/dapo/perf_run_dapo_ours_math.sh and what it calls; [ours].

Its programs were compiled for v5p:4x4x4, v6e:8x8 and v5e:16x16, there with micro_rows=64, and
fit (tests/bench/RESULTS.md); it was never run on a pod.
"""

import ml_collections

from configs import sections, sft_8b


def get_config() -> ml_collections.ConfigDict:
    sft = sft_8b.get_config()  # Keys that are taken from it are explained there.
    c = ml_collections.ConfigDict()
    c.task = "gppo"
    c.seed = 0  # [ours] Of the order of the data and of the samples.
    c.workdir = "runs/gppo_8b"  # Where all of the run is written, or --workdir.
    # A project of Weights & Biases that gets the metrics, too; '': none.
    c.wandb = ""  # [ours]
    c.init_from = "runs/sft_8b"  # [P] A Hugging Face folder or a workdir.
    c.tokenizer = sft.tokenizer
    c.model = sft.model
    c.dtype = sft.dtype  # [R] bfloat16, with float32 master weights.
    c.remat = sft.remat  # [R]
    c.mesh = sft.mesh

    c.data = ml_collections.ConfigDict()
    c.data.path = (
        "data/klear_math_rl.parquet"  # A TFDS version folder, parquet or JSON lines.
    )
    c.data.split = ""  # Of a TFDS data set.
    # A longer prompt: 'error' or 'truncate_left'.
    c.data.too_long = "truncate_left"  # [R]

    c.rollout = ml_collections.ConfigDict()
    c.rollout.prompts = 256  # [R] Generated a step.
    c.rollout.max_groups = 128  # [P] [R] Used a step at most, after the filter.
    c.rollout.samples_per_prompt = 8  # [P] [R]
    c.rollout.max_prompt_tokens = 4_096  # [R]
    c.rollout.max_new_tokens = 32_768  # [P] [R] A row is both: 36,864 tokens.
    c.rollout.temperature = 1.0  # [R]
    c.rollout.top_p = 1.0  # [R] 1: all tokens.
    c.rollout.top_k = 0  # [R] 0: all tokens.
    # Share of the groups that ends a phase; the others go on in the next step, with the
    # old log-probs of the step that drew each token. 1: wait for the slowest.
    c.rollout.finish_fraction = 1.0  # [R]
    c.rollout.stop_strings = ()  # [ours] Text that ends a response, beside the stop ids.
    # Batches of prompts, generated until the filter has left max_groups.
    c.rollout.max_batches = 1  # [R] A short step has fewer updates.
    # Good groups beyond max_groups: 'discard', or 'carry' to the next step.
    c.rollout.surplus = "discard"  # [R]
    # Drop groups of equal 'reward' or of equal 'accuracy' [R]; 'none' drops none.
    c.rollout.filter = "reward"  # [P] 5.2.5.
    c.rollout.max_accuracy = 1.0  # [R] Drop groups of which a larger share is right.
    c.rollout.normalize_std = True  # [P] Eq. 4, unbiased and + 1e-6 as in [R].
    # Leave out samples that were cut off. With limits below 32K: True [R].
    c.rollout.drop_unfinished = False  # [R]
    # Over its last so many tokens up to the limit, a response's reward falls by up to
    # overlong_penalty. 0 tokens: it does not. [R] sets 4,096, and switches it off.
    c.rollout.overlong_tokens = 0  # [R]
    c.rollout.overlong_penalty = 1.0  # [R]
    # Groups of a step whose tokens are written to rollouts/ with log-prob and log-ratio, for
    # `klear_jax.report`: some 2 MB each. The others are there as text.
    c.rollout.token_groups = 4  # [ours]

    c.sampler = sft.sampler
    c.rewards = sections.rewards(num_workers=32)  # [ours] Processes.
    c.loss = sections.gppo_loss()
    c.minibatch_prompts = 16  # [P] [R] Groups of one update: at most 8 updates a step.
    # Rows of one forward and backward pass, over all devices: a multiple of data x fsdp.
    c.micro_rows = 16  # [ours] Memory only; on 64 chips, a row for each 4 [R].
    c.num_steps = 240  # [P] Fig. 2. Rollout batches; [R] 5 epochs.

    c.optim = ml_collections.ConfigDict()  # AdamW; a rollout batch has one rate.
    c.optim.peak_lr = 1e-6  # [P] [R]
    c.optim.end_lr = 1e-6  # [P] [R] As peak_lr: constant after the warm-up.
    c.optim.decay = "linear"  # [ours] No matter: there is none.
    c.optim.decay_start = 1.0  # [ours] No matter.
    c.optim.warmup_steps = 10  # [R] Rollout batches, linear.
    c.optim.warmup_from = 0.1  # [ours] Share of peak_lr; [R] 0: a batch for nothing.
    c.optim.b1 = 0.9  # [R]
    c.optim.b2 = 0.999  # [R]
    c.optim.eps = 1e-8  # [R]
    c.optim.weight_decay = 0.1  # [R] Times the learning rate, on all parameters.
    c.optim.clip_norm = 1.0  # [R] Global norm of the gradient.

    c.evaluation = sft.evaluation.copy_and_resolve_references()
    c.evaluation.num_samples = 32  # [P] Fig. 2a; Table 1 has 64.
    c.evaluation.every = 5  # [R] Rollout batches.

    c.checkpoint = sections.checkpoint(every=5, keep=2)  # [R], [ours] of 98 GB.
    c.guards = sections.gppo_guards()
    return c
