"""The authors' trainer around the loss: reward manager, schedule, update of the actor."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from klear_jax import losses, optim, rollout, sampler
from klear_jax.rewards import math
from klear_jax.rewards.pool import Outcome

GOLDEN = pathlib.Path(__file__).parent / "golden"


def read(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


class Characters:
    def decode(self, ids):
        return ""


@pytest.mark.parametrize("case", read("reward_manager"), ids=range(8))
def test_rewards_with_the_overlong_penalty(case):
    samples = [
        sampler.Sample(
            [0] * response["valid_len"],
            np.zeros(response["valid_len"], np.float32),
            finished=response["last_token"] != "other",
        )
        for response in case["responses"]
    ]
    outcomes = [
        Outcome(math.score(response["text"], case["ground_truth"]), "ok", "")
        for response in case["responses"]
    ]
    group = sampler.Group([1], 0, jax.random.key(0), case["max_resp_len"], samples)
    none = [np.zeros(0)] * len(samples)
    buffer = case["overlong_buffer"] or {"enable": False}
    got = rollout.flatten(
        [rollout.OpenGroup("", "", None, group, none, none, outcomes, carried=False)],
        Characters(),
        full_credit=1.0,
        overlong_tokens=buffer["len"] if buffer["enable"] else 0,
        overlong_penalty=buffer.get("penalty_factor", 0.0),
    )
    np.testing.assert_allclose(got.reward_B, case["reward_sum"], rtol=1e-6, atol=1e-7)
    assert got.correct_B.tolist() == [acc == 1 for acc in case["extra"]["acc"]]
    if case["overlong_filter"]:
        finished = [sample.finished for sample in got.samples]
        assert finished == [x == 1 for x in case["extra"]["is_finish"]]


@pytest.mark.parametrize("case", read("lr_schedule"), ids=range(6))
def test_learning_rate_of_each_step(case):
    """Theirs starts a warm-up at 0, so that a rollout trains nothing; ours can, but begins
    at a tenth by default. Their cosine goes on after its end, and rises again: ours has
    no step there. And it reaches its end a step later, after the last step."""
    warmup, steps = case["num_warmup_steps"], case["num_training_steps"]
    config = optim.OptimConfig(
        peak_lr=1.0,
        end_lr=1.0 if steps is None else case["min_lr_ratio"],
        decay="cosine",
        decay_start=0.0,
        warmup_steps=warmup,
        warmup_from=0.0,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.0,
        clip_norm=1.0,
    )
    want = case["lr_factor"][: steps and steps + 1]
    got = [optim.learning_rate(config, step, len(want)) for step in range(len(want))]
    if steps is None and not warmup:  # Theirs is 0 at first all the same.
        want[0] = 1.0
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)
    if warmup:
        ours = dataclasses.replace(config, warmup_from=0.1)
        assert optim.learning_rate(ours, 0, len(want)) == 0.1


ACTOR = {case["case"]: case for case in read("actor_update")}
WHOLE = [
    (name, number)
    for name, case in ACTOR.items()
    for number, micros in enumerate(case["micro_batches"])
    if len(micros) == 1
]


@pytest.mark.parametrize("name, number", WHOLE)
def test_gradient_of_a_mini_batch_in_one_piece(name, number):
    """Where they cut a mini-batch into micro-batches, theirs is a mean of means; ours is
    one mean however it is cut, by design, so only whole ones can be compared. The last,
    smaller mini-batch of theirs counts by its share of a full one; ours counts as one."""
    case = ACTOR[name]
    config, [[rows]] = case["config"], [case["micro_batches"][number]]
    with np.load(GOLDEN / "actor_update.npz") as file:
        data = {key: file[f"{name}/{key}"] for key in ("log_prob", "old_log_prob")}
        advantages, grads = file[f"{name}/advantages"], file[f"{name}/grads"][number]
        mask = file[f"{name}/attention_mask"][:, case["prompt_len"] :][rows]
        positive = file[f"{name}/token_level_rewards"].sum(1)[rows] == 1
    kind = {"grpo": "clip_higher", "gppo_general": "gppo"}.get(
        config["loss_func"], "gppo"
    )
    betas = {}
    if config["loss_func"] == "gppo_general":
        betas["beta_low"] = config["gppo_loss_beta1"]
        betas["beta_high"] = config["gppo_loss_beta2"]
    if config["only_high"]:
        kind = "gppo_only_high"
    aggregation = config["loss_agg_mode"].replace("-", "_")
    weight = losses.token_weights(mask, aggregation)
    positive_weight = losses.token_weights(mask * positive[:, None], aggregation)

    def loss(logp):
        policy, _ = losses.policy_loss(
            logp,
            data["old_log_prob"][rows],
            advantages[rows],
            weight,
            kind=kind,
            clip_low=config["clip_ratio_low"],
            clip_high=config["clip_ratio_high"],
            dual_clip=config["clip_ratio_c"],
            **betas,
        )
        lm = losses.positive_lm_loss(logp, positive_weight)
        return policy + config["positive_loss_coeff"] * lm

    got = jax.grad(loss)(jnp.asarray(data["log_prob"][rows]))
    share = 1.0
    if config["use_dynamic_bsz"]:
        share = len(rows) / config["ppo_mini_batch_size"]
    np.testing.assert_allclose(share * got, grads[rows], rtol=5e-6, atol=1e-8)
    # One of equal wrong rewards teaches nothing.
    assert grads[rows].any() == bool(
        (weight * advantages[rows]).any() or positive.any()
    )
