"""GPPO of the model that sft_tiny made, on sums it has never seen: minutes on a laptop.

    python -m klear_jax.train --config=configs/gppo_tiny.py

The model answers half of the sums without thinking, and mostly wrong. GPPO lets it find
out that thinking pays: accuracy rises, and answers grow longer. The recipe is that of
gppo_8b; numbers that differ are our own, found on this task.
"""

import ml_collections

from configs import sft_tiny


def get_config() -> ml_collections.ConfigDict:
    sft = sft_tiny.get_config()
    c = ml_collections.ConfigDict()
    c.task = "gppo"
    c.seed = 0
    c.workdir = "runs/gppo_tiny"
    c.init_from = "runs/sft_tiny"
    c.tokenizer = sft.tokenizer
    c.model = sft.model
    c.dtype = "float32"
    c.remat = False
    c.mesh = sft.mesh

    c.data = ml_collections.ConfigDict()
    c.data.path = "runs/data/arithmetic/1.0.0"
    c.data.split = "rl"
    c.data.too_long = "error"

    c.rollout = ml_collections.ConfigDict()
    c.rollout.prompts = 32  # Generated a step.
    c.rollout.max_groups = 32  # Used a step at most, after the filter.
    c.rollout.samples_per_prompt = 8
    c.rollout.max_prompt_tokens = 24
    c.rollout.max_new_tokens = 40
    c.rollout.temperature = 1.0
    c.rollout.top_p = 1.0
    c.rollout.top_k = 0
    c.rollout.num_slots = 256
    c.rollout.filter = "reward"
    c.rollout.normalize_std = True

    c.rewards = sft.rewards

    c.loss = ml_collections.ConfigDict()
    c.loss.kind = "gppo"
    c.loss.clip_low = 0.2
    c.loss.clip_high = 0.28
    c.loss.beta_low = 1.0
    c.loss.beta_high = 1.0
    c.loss.dual_clip = 10.0
    c.loss.aggregation = "token_mean"
    c.loss.positive_coef = 0.1
    c.minibatch_prompts = 8  # Groups of one optimizer update.
    c.micro_rows = 64
    c.num_steps = 60

    c.optim = ml_collections.ConfigDict()
    c.optim.peak_lr = 3e-4
    c.optim.end_lr = 3e-4  # Constant after the warm-up.
    c.optim.decay = "linear"
    c.optim.decay_start = 1.0
    c.optim.warmup_steps = 5  # Rollout batches.
    c.optim.warmup_from = 0.1
    c.optim.b1 = 0.9
    c.optim.b2 = 0.999
    c.optim.eps = 1e-8
    c.optim.weight_decay = 0.0
    c.optim.clip_norm = 1.0

    c.evaluation = sft.evaluation
    c.checkpoint = ml_collections.ConfigDict()
    c.checkpoint.every = 20
    c.checkpoint.keep = 2
    return c
