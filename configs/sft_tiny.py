"""SFT of a model of half a million parameters on written-out sums: minutes on a laptop.

    python -m klear_jax.prepare_data --output=runs/data
    python -m klear_jax.train --config=configs/sft_tiny.py

Half of the demonstrations work the sum out, half answer directly, which is mostly beyond
the model: it learns both, and has to choose. `configs/gppo_tiny.py` goes on from here.
All numbers are our own, found on this task; see README.md for what to expect.
"""

import ml_collections

from configs import sections
from klear_jax import qwen3


def get_config() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.task = "sft"  # 'sft' or 'gppo': which loop runs.
    c.seed = 0  # Of the parameters and of the order of the data.
    c.workdir = "runs/sft_tiny"  # Where all of the run is written, or --workdir.
    c.wandb = ""  # A project of Weights & Biases, for the metrics; '': none.
    c.init_from = ""  # A Hugging Face folder or a workdir; '': random parameters.
    c.tokenizer = "runs/data/tokenizer"  # Folder of tokenizer.json or .model.

    c.model = sections.model(
        qwen3.Config(
            vocab_size=320,  # 256 bytes, digits, signs, markers; and some room.
            width=128,
            num_layers=3,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            mlp_width=256,
            rope_theta=10_000.0,
            norm_eps=1e-6,
            tied=True,
            qk_norm=True,
            max_positions=128,
        )
    )
    c.dtype = "float32"  # Of activations; parameters and Adam are always float32.
    # What the backward pass keeps of a layer: 'none' is computed anew, 'full': all but the
    # stream between layers, 'attention': that is kept too, 'dots': and what the matrix products
    # gave, 'offload': the stream is kept in the host's memory.
    c.remat = "none"
    c.mesh = sections.mesh(data=1, fsdp=-1, tensor=1)

    c.data = ml_collections.ConfigDict()
    c.data.path = "runs/data/arithmetic/1.0.0"  # A TFDS version folder or JSON lines.
    c.data.split = "sft"  # '' for JSON lines, which have none.
    # Source -> how often an epoch goes through it, where it is not as the data set says.
    c.data.weights = ml_collections.ConfigDict()
    c.data.row_tokens = 64
    c.data.pack = True  # Several samples a row, as segments.
    # A sample longer than a row: 'error', or 'drop' (counted).
    c.data.too_long = "error"
    # The samples are dealt to so many streams, each packed by itself. A host reads those of
    # its rows; the batches do not depend on who reads what. A divisor of micro_rows.
    c.data.streams = 1
    c.data.prefetch = 0  # Batches that a thread makes ahead; all is in memory here.

    c.batch_rows = 48  # Rows of one optimizer update; about 100 samples.
    c.micro_rows = 48  # Rows of one forward and backward pass, over all devices.
    c.num_steps = 400  # Optimizer updates; 0: as many as num_epochs take.
    c.num_epochs = 0.0  # Passes through the data; 0: num_steps says it.

    c.optim = ml_collections.ConfigDict()  # AdamW.
    c.optim.peak_lr = 5e-3
    c.optim.end_lr = 5e-4  # At the last step.
    c.optim.decay = "linear"  # 'linear' or 'cosine', from peak_lr to end_lr.
    c.optim.decay_start = 0.6  # Share of the steps.
    c.optim.warmup_steps = 50  # Linear.
    c.optim.warmup_from = 0.02  # Share of peak_lr.
    c.optim.b1 = 0.9
    c.optim.b2 = 0.95
    c.optim.eps = 1e-8
    c.optim.weight_decay = 0.0  # Times the learning rate, on all parameters.
    c.optim.clip_norm = 1.0  # Global norm of the gradient.

    c.sampler = sections.sampler(
        num_slots=512, page_tokens=16, pool_tokens=None, prefill_tokens=1_024
    )
    c.rewards = sections.rewards(num_workers=2)

    c.validation = (
        ml_collections.ConfigDict()
    )  # The loss on samples that are not trained on.
    c.validation.split = ""  # Of data.path; '': none.
    c.validation.every = 100  # Steps.
    c.validation.batches = 4  # The first ones, of batch_rows rows each.

    c.evaluation = ml_collections.ConfigDict()  # avg@8 at temperature 1, and greedy.
    c.evaluation.data = "runs/data/arithmetic/1.0.0"  # As data.path.
    c.evaluation.split = "test"
    # Of problems with a date: the first day and the last, such as "2025-02-01"; "": any.
    c.evaluation.since, c.evaluation.until = "", ""
    c.evaluation.num_problems = 512  # The first ones; 0: all.
    c.evaluation.num_samples = 8  # n of avg@n; 0: greedy only.
    c.evaluation.temperature = 1.0
    c.evaluation.top_p = 1.0  # 1: all tokens.
    c.evaluation.top_k = 0  # 0: all tokens.
    c.evaluation.repetition_penalty = 1.0  # 1: off.
    c.evaluation.greedy = True  # One greedy answer a problem, too.
    c.evaluation.max_prompt_tokens = 24  # A longer prompt is an error.
    c.evaluation.max_new_tokens = 48
    c.evaluation.stop_strings = ()  # Text that ends a response, beside the stop ids.
    c.evaluation.seed = 1_000  # Of the samples; training uses others.
    c.evaluation.kinds = ml_collections.ConfigDict()  # Scored as in training.
    c.evaluation.every = 0  # Steps between evaluations during training; 0: none.

    c.checkpoint = sections.checkpoint(every=200, keep=2)
    c.guards = sections.sft_guards()
    return c
