"""SFT of a model of half a million parameters on written-out sums: minutes on a laptop.

    python -m klear_jax.prepare_data --output=runs/data
    python -m klear_jax.train --config=configs/sft_tiny.py

Half of the demonstrations work the sum out, half answer directly, which is mostly beyond
the model: it learns both, and has to choose. `configs/gppo_tiny.py` goes on from here.
All numbers are our own, found on this task; see README.md for what to expect.
"""

import ml_collections

from configs import layouts


def get_config() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.task = "sft"
    c.seed = 0  # Of the parameters and of the order of the data.
    c.workdir = "runs/sft_tiny"
    c.init_from = ""  # A Hugging Face folder or a workdir; '': random parameters.
    c.tokenizer = (
        "runs/data/tokenizer"  # A folder of tokenizer.json or tokenizer.model.
    )

    c.model = ml_collections.ConfigDict()  # The fields of klear_jax.qwen3.Config.
    c.model.vocab_size = 320  # 256 bytes, digits, signs, markers; and some room.
    c.model.width = 128
    c.model.num_layers = 3
    c.model.num_heads = 4
    c.model.num_kv_heads = 2
    c.model.head_dim = 32
    c.model.mlp_width = 256
    c.model.rope_theta = 10_000.0
    c.model.norm_eps = 1e-6
    c.model.tied = True
    c.model.qk_norm = True
    c.model.max_positions = 128
    c.dtype = "float32"  # Of activations; parameters and Adam are always float32.
    c.remat = False  # Recompute layers in the backward pass, to save memory.
    c.mesh = layouts.mesh(data=1, fsdp=-1, tensor=1)

    c.data = ml_collections.ConfigDict()
    c.data.path = "runs/data/arithmetic/1.0.0"
    c.data.split = "sft"
    c.data.row_tokens = 128
    c.data.pack = True  # Several samples a row, as segments.
    c.data.too_long = (
        "error"  # A sample longer than a row: 'error', or 'drop' (counted).
    )

    c.batch_rows = 24  # Rows of one optimizer update; about 64 samples.
    c.micro_rows = 24  # Rows of one forward and backward pass, over all devices.
    c.num_steps = 500

    c.optim = ml_collections.ConfigDict()
    c.optim.peak_lr = 3e-3
    c.optim.end_lr = 3e-3
    c.optim.decay = "linear"
    c.optim.decay_start = 0.6  # Share of the steps.
    c.optim.warmup_steps = 50
    c.optim.warmup_from = 0.02  # Share of peak_lr.
    c.optim.b1 = 0.9
    c.optim.b2 = 0.95
    c.optim.eps = 1e-8
    c.optim.weight_decay = 0.0
    c.optim.clip_norm = 1.0

    c.rewards = rewards()
    c.evaluation = evaluation()

    c.checkpoint = ml_collections.ConfigDict()
    c.checkpoint.every = 250  # Steps; the last step is always saved.
    c.checkpoint.keep = 2
    return c


def rewards() -> ml_collections.ConfigDict:
    """The math reward with the authors' values (paper or code: DESIGN of the rewards)."""
    c = ml_collections.ConfigDict()
    c.kind = "math"  # Or 'module:function', a reward of your own.
    c.options = ml_collections.ConfigDict()
    c.options.correct = 1.0
    c.options.wrong = -1.0
    c.options.no_think_end = -0.5  # No </think>.
    c.options.no_think_start = -2.0  # </think>, but no <think>.
    c.full_credit = (
        1.0  # The reward that counts as right, and as positive for the LM loss.
    )
    c.num_workers = 2  # Processes.
    c.task_timeout_s = 10.0  # Above math-verify's own 5 s for parsing and comparing.
    c.memory_mb = 4096  # Address space of a worker.
    return c


def evaluation() -> ml_collections.ConfigDict:
    """avg@8 at temperature 1, and greedy, on held-out problems."""
    c = ml_collections.ConfigDict()
    c.data = "runs/data/arithmetic/1.0.0"
    c.split = "test"
    c.num_problems = 512
    c.num_samples = 8
    c.temperature = 1.0
    c.top_p = 1.0
    c.top_k = 0
    c.greedy = True
    c.max_prompt_tokens = 24
    c.max_new_tokens = 40
    c.num_slots = 512
    c.seed = 1_000  # Of the samples; training uses others.
    c.every = 0  # Steps between evaluations during training; 0: none.
    return c
