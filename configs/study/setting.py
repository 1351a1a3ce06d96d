"""What the studies run: gppo_tiny with the paper's loss, fewer prompts and more updates, so that
the clip bites.

`python -m tests.bench.study` runs them; README.md has what they showed. The study of code rewards
runs what is in programs.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_collections

from configs import gppo_tiny, sft_tiny
from klear_jax.data import arithmetic

SEEDS = range(1_000)  # Of runs that are compared;
EXPLORING_SEEDS = range(1_000, 1_008)  # of those on which the settings were chosen;
OTHER_SEEDS = range(2_000, 2_024)  # and of those that ask whether it holds elsewhere.
# Of the SFT checkpoints that the runs of these seeds start from, in turn.
SFT_SEEDS = {
    SEEDS: (0, 1, 2, 3),
    EXPLORING_SEEDS: (100, 101),
    OTHER_SEEDS: tuple(range(200, 212)),
}
SAFE_LR, HIGH_LR = 3e-4, 5e-4  # Chosen on clip-higher alone: explore.py, and README.md.
# Of prepare_data: two of three demonstrations answer at once, so that SFT leaves a model that
# thinks seldom.
DATA_FLAGS = ("--output=runs/study/data", "--direct_share=0.65")


@dataclasses.dataclass(frozen=True)
class Study:
    """Variants that differ in a few values, each run on the same seeds.

    Attributes:
      name: of its results.
      question: what it asks, in a sentence.
      variants: name, or 'name, rate' -> the config's values; the first (of a rate) is the
        baseline.
      seeds: of the runs of each variant; see `study.sft_seed` for where each starts.
      paper: what the paper has beside it.
      setting: the module here whose configs its runs have, but for their variant's values.
    """

    name: str
    question: str
    variants: Mapping[str, Mapping[str, Any]]
    seeds: range
    paper: str
    setting: str = "setting"


def at(lr: float) -> dict[str, float]:
    """The values of a constant learning rate."""
    return {"optim.peak_lr": lr, "optim.end_lr": lr}


def at_rates(
    variants: Mapping[str, Mapping[str, Any]], rates: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """'name, rate' -> the values of the variant of that name, at each of the rates."""
    return {
        f"{name}, {rate}": {**values, **at(lr)}
        for rate, lr in rates.items()
        for name, values in variants.items()
    }


def get_sft_config(seed: int) -> ml_collections.ConfigDict:
    """Of a checkpoint that runs start from: as sft_tiny, on the studies' own data."""
    c = sft_tiny.get_config()
    _use_data(c)
    c.seed = seed
    c.workdir = f"runs/study/sft_{seed}"
    return c


def get_config() -> ml_collections.ConfigDict:
    """Of a run, but for its seed, its checkpoint, and what its variant says."""
    c = gppo_tiny.get_config()
    _use_data(c)
    study(c)
    c.rollout.prompts = 32
    c.rollout.max_groups = 32
    c.rollout.token_groups = 32  # All: which tokens are clipped is recorded.
    c.minibatch_prompts = 4  # 8 updates a rollout batch, as in the paper.
    c.micro_rows = 8
    c.rollout.max_prompt_tokens = c.evaluation.max_prompt_tokens = 20
    c.rollout.max_new_tokens = c.evaluation.max_new_tokens = 44
    c.num_steps = c.evaluation.every = 16
    c.optim.warmup_steps = 2
    c.optim.peak_lr = c.optim.end_lr = SAFE_LR
    c.sampler.num_slots = 256
    c.evaluation.num_problems = 256
    c.evaluation.num_samples = 8
    return c


def right_response(problem: str) -> str:
    """To a sum, with its chain, as demonstrations have it."""
    steps, answer = arithmetic.TASKS["chain_sum"].chain(problem)
    return f"<think>{';'.join(steps)}</think>\\boxed{{{answer}}}"


def study(c: ml_collections.ConfigDict) -> None:
    """What holds for the runs of all settings."""
    # What variants change, in full: GPPO as in the paper, whatever the tiny configs have.
    c.loss.kind, c.loss.dual_clip, c.loss.positive_coef = "gppo", 10.0, 0.1
    c.loss.beta_low, c.loss.beta_high, c.loss.beta_dual = 1.0, 1.0, 0.0
    c.rewards.num_workers = 1
    c.checkpoint.every = 1_000  # The end alone.
    # What guards watch is what is studied: a run that breaks goes on to its end, and counts.
    c.guards.limits = ml_collections.ConfigDict()
    c.guards.not_finite = "skip"


def _use_data(c: ml_collections.ConfigDict) -> None:
    c.data.path = c.evaluation.data = "runs/study/data/arithmetic/1.0.0"
    c.tokenizer = "runs/study/data/tokenizer"
