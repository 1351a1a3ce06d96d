"""Accuracy of a model on problems with answers: avg@n, pass@k, greedy, with intervals.

    python -m klear_jax.evaluate --config=configs/gppo_tiny.py --workdir=runs/gppo_tiny

evaluates the newest checkpoint of the workdir (or --model=FOLDER, a Hugging Face folder or
another workdir; or, with neither, what the config starts from) as the config's section
`evaluation` says, with the config's YaRN if it has one. Prints the result as JSON, and
writes it, with the share of right answers of each problem, to --output: by default
evaluation.json in the workdir. It says, too, after how many steps of the run.

With --samples=FILE it writes the samples instead, a line of JSON each: prompt, response,
answer, reward, correct. `prepare_data` reads them: for the pass rate of each prompt, or to
learn from. The same command goes on with a file that was begun.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from etils import epath

from klear_jax import checkpoint, config, hosts, qwen3, rollout, sampler, tokens
from klear_jax.data.batches import all_prompts
from klear_jax.data.examples import read_examples
from klear_jax.errors import InputError
from klear_jax.rewards import routing
from klear_jax.rewards.pool import Pool
from klear_jax.rewards.routing import RewardConfig
from klear_jax.sampling import Sampling
from klear_jax.sharding import Layout, MeshConfig, make_mesh, put

BOOTSTRAP = 10_000  # Resamples of the problems for an interval.
SAMPLED_AT_ONCE = 1024  # Problems between two writes of --samples.


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """On what, and how, a model is evaluated."""

    data: str  # A TFDS version folder, parquet or JSON lines; several with commas.
    split: str
    num_problems: int  # The first ones of the split; 0: all.
    num_samples: int  # n: samples a problem. 0: greedy only.
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    greedy: bool  # Also one greedy answer a problem.
    max_prompt_tokens: int
    max_new_tokens: int
    stop_strings: tuple[str, ...]
    seed: int
    every: int  # Steps of training between evaluations; 0: never.
    kinds: Mapping[str, routing.Kind]  # Of reward, in place of those of training.

    def __post_init__(self):
        for name in ("num_problems", "num_samples", "every"):
            if getattr(self, name) < 0:
                raise InputError(
                    f"evaluation.{name} must not be negative: {getattr(self, name)}"
                )
        for name in ("max_prompt_tokens", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"evaluation.{name} must be at least 1, not {getattr(self, name)}"
                )
        if "" in self.stop_strings:
            raise InputError("evaluation.stop_strings holds an empty string")
        if not self.num_samples and not self.greedy:
            raise InputError(
                "evaluation asks for nothing: num_samples is 0 and greedy is False"
            )
        self.sampling()

    def sampling(self) -> Sampling:
        return Sampling(
            self.temperature, self.top_p, self.top_k, self.repetition_penalty
        )

    def samplings(self) -> list[Sampling]:
        """All that an evaluation uses: of the n samples, and greedy."""
        greedy = dataclasses.replace(self.sampling(), temperature=0.0)
        return [self.sampling()] * bool(self.num_samples) + [greedy] * self.greedy

    @property
    def row_tokens(self) -> int:
        return self.max_prompt_tokens + self.max_new_tokens

    def rewards(self, training: RewardConfig) -> RewardConfig:
        """How answers are scored: as in training, but for `kinds`."""
        return dataclasses.replace(training, kinds={**training.kinds, **self.kinds})

    def due(self, steps_done: int) -> bool:
        return self.every > 0 and steps_done % self.every == 0


def load_problems(
    config: EvaluationConfig,
    tokenizer: tokens.Tokenizer,
    rewards: RewardConfig,
    pool: Pool | None,
) -> dict[str, list[Any]]:
    """Prompts and answers of the problems to evaluate on, as `data.batches.all_prompts`.

    Args:
        rewards: those of training.
        pool: to try the rewards out; None: they will not be needed.
    """
    examples = read_examples(config.data, config.split)[: config.num_problems or None]
    rewards = config.rewards(rewards)
    routing.check(rewards, examples)
    if pool:
        routing.try_out(pool, rewards, examples)
    return all_prompts(
        examples,
        tokenizer,
        max_prompt_tokens=config.max_prompt_tokens,
    )


def evaluate(
    params: qwen3.Params,
    model: qwen3.Config,
    problems: Mapping[str, Sequence[Any]],
    tokenizer: tokens.Tokenizer,
    pool: Pool,
    rewards: RewardConfig,
    config: EvaluationConfig,
    *,
    engine: sampler.Engine,
    dtype: jnp.dtype,
    layout: Layout | None = None,
) -> tuple[dict[str, float], list[rollout.Rollout]]:
    """Samples, scores and sums up.

    Args:
        rewards: those of training; `config.kinds` go before.

    Returns:
        Metrics, and the rollouts behind them (sampled, then greedy). With n samples:
        `avg@n` with `avg@n_low`, `avg@n_high` (95% bootstrap over problems), `pass@k` for
        k = 1, 2, 4 .. n (unbiased), `accuracy` (the same as avg@n), `length`, `finished`;
        `greedy` with its interval. A sample is right if its reward is full credit.
    """

    rewards = config.rewards(rewards)

    def correct(num_samples, sampling):
        groups, _, _ = rollout.collect(
            params,
            model,
            rollout.open_groups(
                problems,
                rewards,
                num_samples=num_samples,
                max_new_tokens=config.max_new_tokens,
                key=jax.random.key(config.seed),
                seed=f"evaluation/{config.seed}",
            ),
            tokenizer,
            pool,
            rewards,
            sampling=sampling,
            engine=engine,
            slot_tokens=config.row_tokens,
            stop_strings=config.stop_strings,
            dtype=dtype,
            layout=layout,
        )
        rollouts.append(rollout.flatten(groups, tokenizer, rewards.full_credit))
        return rollouts[-1].correct_B.reshape(-1, num_samples)

    metrics: dict[str, float] = {"problems": len(problems["tokens"])}
    rollouts: list[rollout.Rollout] = []
    if n := config.num_samples:
        correct_PN = correct(n, config.sampling())
        metrics |= interval(f"avg@{n}", correct_PN.mean(axis=1))
        ks = sorted({2**i for i in range(n.bit_length()) if 2**i <= n} | {n})
        metrics |= {f"pass@{k}": float(pass_at_k(correct_PN, k).mean()) for k in ks}
        metrics["length"] = float(np.mean([len(s.tokens) for s in rollouts[0].samples]))
        metrics["finished"] = float(np.mean([s.finished for s in rollouts[0].samples]))
    if config.greedy:
        metrics |= interval("greedy", correct(1, config.samplings()[-1])[:, 0])
    metrics["accuracy"] = metrics[f"avg@{n}" if n else "greedy"]
    metrics["scoring_errors"] = sum(
        not np.isfinite(outcome.score) for r in rollouts for outcome in r.outcomes
    )
    return metrics, rollouts


def during_training(
    params: qwen3.Params,
    problems: Mapping[str, Sequence[Any]],
    tokenizer: tokens.Tokenizer,
    pool: Pool,
    config: Any,
    layout: Layout,
) -> dict[str, float]:
    """`evaluate` as the section `evaluation` of an SFT or GPPO config says; names eval/..."""
    metrics, _ = evaluate(
        params,
        config.model,
        problems,
        tokenizer,
        pool,
        config.rewards,
        config.evaluation,
        engine=config.sampler,
        dtype=jnp.dtype(config.dtype),
        layout=layout,
    )
    return {f"eval/{name}": value for name, value in metrics.items()}


def pass_at_k(correct_PN: np.ndarray, k: int) -> np.ndarray:
    """The chance that k of a problem's n samples hold a right one, unbiased, [P].

    1 - C(n - c, k) / C(n, k) with c right ones (arXiv 2107.03374, Eq. 1).
    """
    n = correct_PN.shape[1]
    right_P = correct_PN.sum(axis=1)
    return np.array([1 - math.comb(n - int(c), k) / math.comb(n, k) for c in right_P])


def interval(name: str, value_P: np.ndarray) -> dict[str, float]:
    """The mean over problems and its 95% bootstrap interval: name, name_low, name_high."""
    rng = np.random.default_rng(0)
    num = len(value_P)
    means = [value_P[rng.integers(num, size=num)].mean() for _ in range(BOOTSTRAP)]
    low, high = np.percentile(means, [2.5, 97.5])
    return {
        name: float(value_P.mean()),
        f"{name}_low": float(low),
        f"{name}_high": float(high),
    }


@dataclasses.dataclass(frozen=True)
class CommandConfig:
    """The keys of a training config that this command reads."""

    seed: int
    init_from: str
    tokenizer: str
    model: qwen3.Config
    dtype: str
    mesh: MeshConfig
    sampler: sampler.Engine
    rewards: RewardConfig
    evaluation: EvaluationConfig


def main(argv: list[str]) -> None:
    """The command, see above."""
    texts = {
        "workdir": "Evaluate its newest checkpoint, and write evaluation.json there.",
        "model": "Evaluate this Hugging Face folder or workdir instead.",
        "output": "Write the result there instead.",
        "samples": "Only write samples there, as JSON lines, or go on with them.",
    }
    flags = config.parse_flags(argv, __doc__, texts)
    names = {field.name for field in dataclasses.fields(CommandConfig)}
    values = flags.config.to_dict()
    c = config.build(
        CommandConfig, {name: values[name] for name in names & set(values)}
    )
    output = flags.output or (
        flags.workdir and epath.Path(flags.workdir) / "evaluation.json"
    )

    path = flags.model or flags.workdir or c.init_from
    hosts.join()
    tokenizer = tokens.load(checkpoint.model_folder(path) if path else c.tokenizer)
    with routing.make_pool(c.rewards) as pool:
        problems = load_problems(c.evaluation, tokenizer, c.rewards, pool)
        layout = Layout(make_mesh(c.mesh), c.mesh.rules)
        about = None
        if path:
            found = checkpoint.resolve(path)
            about = checkpoint.read_about(found)
            params, model = checkpoint.load_model(found, layout)
            if c.model.yarn:  # It reaches further than it was trained.
                far = {"yarn": c.model.yarn, "max_positions": c.model.max_positions}
                model = dataclasses.replace(model, **far)
        else:
            model = c.model
            params = qwen3.init_params(model, jax.random.key(c.seed))
            params = put(params, qwen3.params_shardings(model, layout))

        def run(problems):
            return evaluate(
                params,
                model,
                problems,
                tokenizer,
                pool,
                c.rewards,
                c.evaluation,
                engine=c.sampler,
                dtype=jnp.dtype(c.dtype),
                layout=layout,
            )

        if flags.samples:
            made_with = repr(
                (path, tokenizer.fingerprint, c.evaluation, c.rewards.kinds)
            )
            write_samples(
                pathlib.Path(flags.samples),
                problems,
                c.evaluation,
                hashlib.sha256(made_with.encode()).hexdigest()[:16],
                run,
            )
            return
        metrics, rollouts = run(problems)
    if not hosts.first():
        return
    print(json.dumps(metrics, indent=2))
    if output:
        metrics |= {
            "steps_done": about and about["steps_done"],
            "evaluation": dataclasses.asdict(c.evaluation),
            "per_problem": per_problem(problems, rollouts),
        }
        epath.Path(output).write_text(json.dumps(metrics, indent=2) + "\n")


def write_samples(
    path: pathlib.Path,
    problems: Mapping[str, Sequence[Any]],
    config: EvaluationConfig,
    made_with: str,
    run: Callable[[Mapping[str, Sequence[Any]]], tuple[Any, list[rollout.Rollout]]],
) -> None:
    """Appends num_samples lines a problem to the file, some problems at a time.

    Args:
        path: of the file, on a disk that all hosts see. Problems that it has whole are not
            sampled again.
        problems: as `load_problems` returns them.
        config: num_samples and greedy say how many rollouts `run` makes.
        made_with: tells these samples from others; a file of others is an InputError.
        run: `evaluate` for some of the problems.
    """
    if config.greedy or not config.num_samples:
        raise InputError(
            "--samples needs evaluation.num_samples above 0 and evaluation.greedy=False"
        )
    kept: list[int] = []
    if hosts.first() and path.exists():
        kept = _cut_to_whole_problems(path, config.num_samples, made_with)
    done = set(hosts.gather(kept)[0])
    left = [i for i, one in enumerate(problems["prompt_ids"]) if one not in done]
    bar = tqdm.tqdm(
        total=len(done) + len(left),
        initial=len(done),
        unit="prompt",
        desc="sampling",
        disable=not hosts.first(),
    )
    for begin in range(0, len(left), SAMPLED_AT_ONCE):
        some = left[begin : begin + SAMPLED_AT_ONCE]
        _, [found] = run(
            {name: [column[i] for i in some] for name, column in problems.items()}
        )
        if hosts.first():
            with path.open("a", encoding="utf-8", newline="") as file:
                file.writelines(
                    _sample_line(problems, some[found.group_B[b]], found, b, made_with)
                    for b in range(len(found))
                )
        bar.update(len(some))


def _cut_to_whole_problems(
    path: pathlib.Path, num_samples: int, made_with: str
) -> list[int]:
    """The prompt_ids of the problems that have all their samples; what was written of
    another when the file was cut off is cut away."""
    whole: list[int] = []
    end, place, lines = 0, 0, 0
    with path.open("rb") as file:
        for line in file:
            place, lines = place + len(line), lines + 1
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
                other = row.get("made_with") != made_with
            except (ValueError, AttributeError):
                other = True
            if other:
                raise InputError(
                    f"{path} line {lines} is not of this model, data and evaluation: give "
                    "another file"
                )
            if lines % num_samples == 0:
                whole.append(row["prompt_id"])
                end = place
    os.truncate(path, end)
    return whole


def _sample_line(
    problems: Mapping[str, Sequence[Any]],
    i: int,
    found: rollout.Rollout,
    b: int,
    made_with: str,
) -> str:
    reward = float(found.reward_B[b])
    row = {
        "prompt_id": problems["prompt_ids"][i],
        "prompt": problems["messages"][i],
        "response": found.texts[b],
        "answer": problems["answers"][i],
        "data_source": problems["sources"][i],
        "reward": reward if math.isfinite(reward) else None,
        "correct": bool(found.correct_B[b]),
        "finished": found.samples[b].finished,
        "made_with": made_with,
    }
    return json.dumps(row) + "\n"


def per_problem(
    problems: Mapping[str, Sequence[Any]],
    rollouts: Sequence[rollout.Rollout],
) -> list[dict[str, Any]]:
    """A dict a problem: what it is, and the share of right answers of each rollout."""
    num = len(problems["tokens"])
    shares = [one.correct_B.reshape(num, -1).mean(axis=1) for one in rollouts]
    return [
        {
            "prompt_id": problems["prompt_ids"][i],
            "problem": problems["problems"][i],
            "correct": [float(share[i]) for share in shares],
        }
        for i in range(num)
    ]


if __name__ == "__main__":
    config.run_main(main)
