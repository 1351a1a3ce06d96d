"""GPPO of the model that sft_tiny made, on sums it has never seen: minutes on a laptop.

    python -m klear_jax.train --config=configs/gppo_tiny.py

The model answers half of the sums without thinking, and mostly wrong. GPPO lets it find
out that thinking pays: accuracy rises, and answers grow longer. The recipe is that of
gppo_8b, but for the gradient of the low side, which hurts here: configs/study/README.md.
Numbers that differ are our own, found on this task.
"""

import ml_collections

from configs import sections, sft_tiny


def get_config() -> ml_collections.ConfigDict:
    sft = sft_tiny.get_config()  # Keys that are taken from it are explained there.
    c = ml_collections.ConfigDict()
    c.task = "gppo"
    c.seed = 0  # Of the order of the data and of the samples.
    c.workdir = "runs/gppo_tiny"
    c.wandb = ""  # A project of Weights & Biases, for the metrics; '': none.
    c.init_from = "runs/sft_tiny"  # A Hugging Face folder or a workdir.
    c.tokenizer = sft.tokenizer
    c.model = sft.model
    c.dtype = sft.dtype
    c.remat = sft.remat
    c.mesh = sft.mesh

    c.data = ml_collections.ConfigDict()
    c.data.path = "runs/data/arithmetic/1.0.0"  # A TFDS version folder or JSON lines.
    c.data.split = "rl"  # '' for JSON lines, which have none.
    c.data.too_long = "error"  # A longer prompt: 'error' or 'truncate_left'.

    c.rollout = ml_collections.ConfigDict()
    c.rollout.prompts = 64  # Generated a step: twice what is used, as in the recipe.
    c.rollout.max_groups = 32  # Used a step at most, after the filter.
    c.rollout.samples_per_prompt = 8
    c.rollout.max_prompt_tokens = 24
    c.rollout.max_new_tokens = 48
    c.rollout.temperature = 1.0
    c.rollout.top_p = 1.0  # 1: all tokens.
    c.rollout.top_k = 0  # 0: all tokens.
    # Share of the groups that ends a phase; the others go on in the next. 1: wait for all.
    c.rollout.finish_fraction = 1.0
    c.rollout.stop_strings = ()  # Text that ends a response, beside the stop ids.
    c.rollout.max_batches = 1  # Of prompts, generated until there are max_groups.
    c.rollout.surplus = "discard"  # Groups beyond max_groups; or 'carry' them on.
    c.rollout.filter = "reward"  # Drop groups of equal 'reward', 'accuracy'; or 'none'.
    c.rollout.max_accuracy = 1.0  # Drop groups of which a larger share is right.
    c.rollout.normalize_std = True  # Advantages over the group's standard deviation.
    c.rollout.drop_unfinished = False  # Leave out samples that were cut off.
    c.rollout.overlong_tokens = (
        0  # Before the limit, where the reward falls; 0: it never
    )
    c.rollout.overlong_penalty = 1.0  # does, else by up to so much.
    # Groups of a step whose tokens are in rollouts/ with log-prob and log-ratio.
    c.rollout.token_groups = 8

    c.sampler = sft.sampler
    c.rewards = sft.rewards
    c.loss = sections.gppo_loss()
    # The paper and gppo_8b have 'gppo'. Here, the less of the low side is kept the better.
    c.loss.kind = "gppo_only_high"
    c.minibatch_prompts = 8  # Groups of one optimizer update.
    c.micro_rows = 64  # Rows of one forward and backward pass, over all devices.
    c.num_steps = 60  # Rollout batches.

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
    c.checkpoint = sections.checkpoint(every=20, keep=2)
    c.guards = sections.gppo_guards()
    return c
