"""Evaluates any model in a Hugging Face folder, or a run, on this machine.

    python -m klear_jax.evaluate --config=configs/evaluate.py --model=FOLDER \
        --config.evaluation.data=FILE --output=results/FOLDER.json

FILE: JSON lines or parquet with `prompt` (or `messages`, `question`, `problem`) and `answer`; the
authors' AIME and HMMT files, HumanEval's and LiveCodeBench's rows as they are published; several
with commas. The numbers are for a small model on a laptop; for 8B models on a pod there are
`variants/evaluate_paper.py` (the paper's settings) and `variants/evaluate_authors.py` (those of
their script).
"""

import ml_collections

from configs import sections, sft_8b


def get_config() -> ml_collections.ConfigDict:
    c = sft_8b.get_config()  # Sources, and keys that are not named here, stand there.
    c.dtype = "float32"  # Of activations; "bfloat16" on TPUs and GPUs.
    c.mesh = sections.mesh(data=1, fsdp=-1, tensor=1)
    c.sampler = sections.sampler(
        num_slots=16, page_tokens=64, pool_tokens=None, prefill_tokens=512
    )
    c.rewards = sections.rewards(num_workers=2)
    c.evaluation.num_samples = 8
    c.evaluation.max_prompt_tokens = 1_024
    c.evaluation.max_new_tokens = 1_024
    return c
