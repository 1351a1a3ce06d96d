"""Long chain-of-thought SFT of Qwen3-8B-Base: the first stage of Klear-Reasoner.

    python -m klear_jax.train --config=configs/sft_8b.py --workdir=gs://BUCKET/sft_8b
    python -m klear_jax.evaluate --config=configs/sft_8b.py --workdir=gs://BUCKET/sft_8b

To compare with: Klear-Reasoner-8B-SFT, Table 1 of the paper: avg@64 of AIME 2024 75.6,
AIME 2025 70.1, HMMT 2025 57.6; avg@8 of LiveCodeBench v5 58.5, v6 49.6. `gppo_8b` goes on.

Data: what `python -m klear_jax.prepare_data --config=configs/data/sft.py` makes of raw
files. The paper's 1.5M samples, answers of DeepSeek-R1-0528 to math and code, up to 16 a
prompt, right or wrong, are not published. `evaluation` reads JSON lines with `prompt` and
`answer`, or the authors' benchmark files.

Sources: [P] the paper, arXiv 2508.07629, which is all there is: the authors published no
SFT recipe; [V] the defaults of verl's SFT trainer, which their repository contains, where
the paper is silent; [ours].

Its programs were compiled for v5p:4x4x4, v6e:8x8 and v5e:16x16, there with micro_rows=64, and
fit (tests/bench/RESULTS.md); it was never run on a pod.
"""

import ml_collections

from configs import sections
from klear_jax import qwen3


def get_config() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.task = "sft"  # 'sft' or 'gppo': which loop runs.
    c.seed = 0  # [ours] Of the order of the data.
    c.workdir = "runs/sft_8b"  # Where all of the run is written, or --workdir.
    # A project of Weights & Biases that gets the metrics, too; '': none.
    c.wandb = ""  # [ours]
    c.init_from = "models/Qwen3-8B-Base"  # [P] A Hugging Face folder or a workdir.
    c.tokenizer = "models/Qwen3-8B-Base"  # [P] A folder with tokenizer.json.

    c.model = sections.model(qwen3.PRESETS["qwen3_8b"])  # [P] 8.19e9 parameters.
    c.dtype = "bfloat16"  # [ours] Of activations; parameters and Adam are float32.
    # The backward pass keeps the stream between layers; others: sft_tiny. With the memory of
    # v5p, 'dots' takes a fifth less time on paper, and 32 GiB a chip.
    c.remat = "full"  # [ours]
    c.mesh = sections.mesh(
        data=1, fsdp=-1, tensor=4
    )  # [ours] Made for 64 chips of v5p.

    c.data = ml_collections.ConfigDict()
    c.data.path = "data/klear_sft/1.0.0"  # Folders of prepared data, with commas.
    c.data.split = "train"
    # Source -> how often an epoch goes through it, where it is not as the data set says.
    c.data.weights = ml_collections.ConfigDict()
    c.data.row_tokens = 32_768  # [P] Maximum length 32K.
    c.data.pack = True  # [ours] Several samples a row, as segments.
    # A sample longer than a row: 'error', or 'drop' (counted); prepared data have none.
    c.data.too_long = "error"  # [ours]
    # The samples are dealt to so many streams, each packed by itself. A host reads those of
    # its rows; the batches do not depend on who reads what. A divisor of micro_rows.
    c.data.streams = 16  # [ours]
    # Batches that a thread makes ahead: a stream packs 128 rows at once, 16 batches' worth.
    c.data.prefetch = 16  # [ours]

    # Rows of one update; 128 are 4.2M tokens. [P] does not say; [V] 256 samples.
    c.batch_rows = 128  # [ours]
    # Rows of one forward and backward pass, over all devices: a multiple of data x fsdp.
    c.micro_rows = 16  # [ours] Memory only; on 64 chips, a row for each 4.
    c.num_steps = 0  # [ours] Updates; 0: as many as num_epochs take.
    # Passes through the data: 14,600 updates for 1.5M samples of 10,000 tokens each.
    c.num_epochs = 4.0  # [P]

    c.optim = ml_collections.ConfigDict()  # AdamW.
    c.optim.peak_lr = 8e-5  # [P]
    c.optim.end_lr = 4e-5  # [P] At the last step.
    c.optim.decay = "cosine"  # [P] 'linear' or 'cosine', from peak_lr to end_lr.
    c.optim.decay_start = 0.0  # [V] Share of the steps: right after the warm-up.
    c.optim.warmup_steps = 1_460  # [V] A tenth of the steps, linear.
    c.optim.warmup_from = 0.1  # [ours] Share of peak_lr; [V] 0: a step for nothing.
    c.optim.b1 = 0.9  # [V]
    c.optim.b2 = 0.95  # [V]
    c.optim.eps = 1e-8  # [V]
    c.optim.weight_decay = 0.01  # [V] Times the learning rate, on all parameters.
    c.optim.clip_norm = 1.0  # [V] Global norm of the gradient.

    # Of the evaluation, and of gppo_8b: 32 slots on each of 16 replicas of 4 chips, and a
    # cache of 2^23 tokens: 18.0 GiB on each chip in bfloat16.
    c.sampler = sections.sampler(
        num_slots=512,  # [ours]
        page_tokens=128,  # [ours]
        pool_tokens=1 << 23,  # [ours]
        prefill_tokens=1_024,  # [ours]
    )
    c.rewards = sections.rewards(num_workers=32)  # [ours] Of the evaluation.

    c.validation = ml_collections.ConfigDict()  # The loss on held-out samples.
    c.validation.split = "validation"  # Of data.path; '': none.
    c.validation.every = 100  # [ours] Steps.
    c.validation.batches = 1  # [ours] The first ones, of batch_rows rows each.

    c.evaluation = ml_collections.ConfigDict()
    c.evaluation.data = "data/aime24.jsonl"  # [P] A TFDS version folder or JSON lines.
    c.evaluation.split = ""  # Of a TFDS data set.
    # Of problems with a date: the first day and the last, such as "2025-02-01"; "": any.
    c.evaluation.since, c.evaluation.until = "", ""  # [ours]
    c.evaluation.num_problems = 0  # [P] The first ones; 0: all, 30 of AIME.
    c.evaluation.num_samples = 64  # [P] Table 1: n of avg@n.
    c.evaluation.temperature = 0.6  # [P]
    c.evaluation.top_p = 0.95  # [P]
    c.evaluation.top_k = 0  # [P] None, 0: all tokens; the authors' script has 20.
    c.evaluation.repetition_penalty = 1.0  # [P] None, 1; the authors' script has 1.05.
    c.evaluation.greedy = False  # [P] One greedy answer a problem, too.
    c.evaluation.max_prompt_tokens = 4_096  # [ours] As in RL; a longer one is an error.
    c.evaluation.max_new_tokens = 32_768  # [P] Table 1 without 64K.
    c.evaluation.stop_strings = ()  # [ours] Text that ends a response, beside the stop ids.
    c.evaluation.seed = 1_000  # [ours] Of the samples; training uses others.
    c.evaluation.kinds = sections.benchmark_kinds()  # [R] [P]
    c.evaluation.every = 0  # [ours] Steps between evaluations during training; 0: none.

    c.checkpoint = sections.checkpoint(every=100, keep=2)  # [ours] Of 98 GB each.
    c.guards = sections.sft_guards()
    return c
