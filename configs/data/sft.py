"""Raw chains of thought -> the data set of configs/sft_8b.py.

    python -m klear_jax.prepare_data --config=configs/data/sft.py

Name your own files under `sources`. What becomes of their rows is in report.md of the data
set; a run that was killed goes on where it stood. With choose.judge=True and
choose.only_right=True it makes the paper's "only true" data, of all sources with answers;
the paper found that hard problems gain from wrong ones, too (Table 2).

Sources: [P] the paper, arXiv 2508.07629; [ours].
"""

import ml_collections

from configs import sections


def get_config() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    # The data set is <output>/<name>/<version>.
    c.output = "data"
    c.name = "klear_sft"
    c.version = "1.0.0"
    c.kind = "sft"  # 'sft': rows need a response; 'rl': an answer.
    c.tokenizer = "models/Qwen3-8B-Base"  # [P] Samples are tokenised here, once.

    # [P] Few sources, of high quality; math and code.
    c.sources = ml_collections.ConfigDict()
    c.sources.math = sections.source("raw/math-*.jsonl.zst", "prompt_response")
    c.sources.code = sections.source("raw/code-*.jsonl.zst", "prompt_response")
    c.limit = 0  # Rows of each source, the first ones; 0: all.

    c.clean = sections.clean()
    c.clean.max_tokens = 32_768  # [P] Maximum length 32K.
    c.choose = sections.choose()
    c.choose.responses_per_prompt = 16  # [P] Up to 16.
    c.choose.validation_percent = 0.1  # [ours] Of the prompts.
    c.rewards = sections.rewards(num_workers=8)  # [ours] Where choose.judge is set.

    c.num_workers = 0  # Processes; 0: one for each core. Each takes about 0.5 GB.
    c.part_mb = 16  # [ours] MiB of raw rows that are read, and done, at once.
    c.shard_mb = 256  # [ours] MiB of a file of the data set, before compression.
    return c
