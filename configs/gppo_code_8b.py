r"""Code GPPO of Klear-Reasoner-8B: the third stage, after gppo_8b, of which it differs little.

    python -m klear_jax.train --config=configs/gppo_code_8b.py \
        --workdir=gs://BUCKET/gppo_code_8b --config.init_from=gs://BUCKET/gppo_8b

To compare with: LiveCodeBench v5 avg@4 rises from 45.9 at step 10 to 58.9, the mean of
steps 200 to 240 (Fig. 2b; clip-higher 58.5, CISPO 58.0); Klear-Reasoner-8B, Table 1, avg@8
of LiveCodeBench v5 61.6 and v6 53.1.

Data: Kwai-Klear/KlearReasoner-CodeSub-15K, the published part of the authors' 18K problems.
Programs run in a sandbox: every host should have bubblewrap (klear_jax/rewards/sandbox.py). The
benchmark: JSON lines with `prompt` and `answer`, the tests as rewards/code.py has them.

Sources: [P] the paper, arXiv 2508.07629; [R] the authors' recipe, in their repository
Kwai-Klear/KlearReasoner recipe/dapo/perf_run_dapo_ours_code.sh and what it calls; [ours].
Its programs were compiled as those of gppo_8b; it was never run on a pod.
"""

import ml_collections

from configs import gppo_8b


def get_config() -> ml_collections.ConfigDict:
    c = gppo_8b.get_config()
    c.workdir = "runs/gppo_code_8b"
    c.init_from = "runs/gppo_8b"  # [P] Math first, then code.
    c.data.path = "data/klear_code_rl.parquet"
    c.rewards.kind = "code"
    c.minibatch_prompts = 32  # [P] [R] At most 4 updates a step.
    c.optim.peak_lr = c.optim.end_lr = 5e-7  # [P] [R]
    c.evaluation.data = "data/livecodebench_v5.jsonl"  # [P]
    c.evaluation.num_samples = 4  # [P] Fig. 2b; Table 1 has 8.
    return c
