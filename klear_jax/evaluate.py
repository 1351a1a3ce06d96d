"""Accuracy of a model on problems with answers: avg@n, pass@k, maj@k, with intervals.

    python -m klear_jax.evaluate --config=configs/gppo_tiny.py --workdir=runs/gppo_tiny

evaluates the newest checkpoint of the workdir (or --model=FOLDER, a Hugging Face folder or
another workdir; or, with neither, what the config starts from) as the config's section
`evaluation` says, with the config's YaRN if it has one. Prints the result as JSON, and
writes it to --output, by default evaluation.json in the workdir, or evaluation_MODEL.json
here, with tables beside it
(.md), and all answers (.samples.jsonl, or --samples=FILE): prompt, response, answer (of tests a
digest), reward, correct. `prepare_data` reads these: for the pass rate of each prompt, or to learn from.
The same command goes on where it was cut off.
"""

import dataclasses
import datetime
import hashlib
import itertools
import json
import logging
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from klear_jax import (
    checkpoint,
    config,
    estimates,
    hosts,
    preemption,
    progress,
    qwen3,
    rollout,
    sampler,
    tokens,
)
from klear_jax.answers import Answers, Key, Row, finite, key_of
from klear_jax.data import files
from klear_jax.data.batches import all_prompts
from klear_jax.data.examples import read_examples
from klear_jax.data.rows import Example
from klear_jax.errors import InputError
from klear_jax.rewards import routing
from klear_jax.rewards.pool import Outcome, Pool
from klear_jax.rewards.routing import RewardConfig
from klear_jax.sampling import Sampling
from klear_jax.sharding import Layout, MeshConfig, make_mesh, put

GRACE_S = 25.0  # From a signal to the end: a spot TPU goes 30 s after it is told.
EXCERPT = 60  # Characters of a problem in a table.
LONG_ANSWER = 1_000  # Characters; of longer ones a digest is kept with each sample.
# Reward -> what stands for an answer in a vote. Programs have no vote.
VOTES = {
    "math": "math_answer",
    "math_judge": "math_answer",
    "last_number": "last_number_answer",
}


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """On what, and how, a model is evaluated."""

    data: str  # A TFDS version folder, parquet or JSON lines; several with commas.
    split: str
    since: (
        str  # Of problems with a date: the first day, and the last, such as 2025-02-01;
    )
    until: str  # '': any.
    num_problems: int  # The first ones of each data set; 0: all.
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
        for name in ("since", "until"):
            _check_day(name, getattr(self, name))
        if "" in self.stop_strings:
            raise InputError("evaluation.stop_strings holds an empty string")
        if not self.num_samples and not self.greedy:
            raise InputError(
                "evaluation asks for nothing: num_samples is 0 and greedy is False"
            )
        self.sampling()
        if self.num_samples and self.temperature == 0:
            raise InputError(
                "evaluation.temperature is 0, so all samples would be the same: set "
                "evaluation.num_samples to 0 and evaluation.greedy to True"
            )

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


def _check_day(name: str, day: str) -> None:
    try:
        datetime.date.fromisoformat(day or "2000-01-01")
    except ValueError:
        raise InputError(
            f"evaluation.{name} must be a day such as 2025-02-01, or '', not {day!r}"
        ) from None


def load_problems(
    config: EvaluationConfig,
    tokenizer: tokens.Tokenizer,
    rewards: RewardConfig,
    pool: Pool,
) -> dict[str, list[Any]]:
    """Prompts and answers of the problems to evaluate on, as `data.batches.all_prompts`, and
    `data`, the data set of each, by its name.

    Args:
        rewards: those of training.
        pool: to try the rewards out.

    Raises:
        InputError: what cannot be read or scored, and a window without problems.
    """
    examples, names = [], []
    paths = config.data.split(",")
    for path, name in zip(paths, data_names(paths), strict=True):
        found = [
            one for one in read_examples(path, config.split) if _in_window(one, config)
        ]
        if not found:
            raise InputError(
                f"{path} has no problem from {config.since} to {config.until}"
            )
        found = found[: config.num_problems or None]
        examples += found
        names += [name] * len(found)
    if len(paths) > 1:  # Each file counts its own from 0.
        examples = [
            dataclasses.replace(one, prompt_id=i) for i, one in enumerate(examples)
        ]
    rewards = config.rewards(rewards)
    routing.check(rewards, examples)
    routing.try_out(pool, rewards, examples)
    problems = all_prompts(
        examples, tokenizer, max_prompt_tokens=config.max_prompt_tokens
    )
    return problems | {"data": names}


def problems_of_training(
    config: Any, tokenizer: tokens.Tokenizer, pool: Pool
) -> dict[str, list[Any]]:
    """`load_problems` of an SFT or GPPO config; none if it never evaluates."""
    if not config.evaluation.every:
        return {}
    return load_problems(config.evaluation, tokenizer, config.rewards, pool)


def _in_window(example: Example, config: EvaluationConfig) -> bool:
    if not config.since and not config.until:
        return True
    if not example.date:
        raise InputError(
            f"{example.origin} has no date, for evaluation.since and evaluation.until"
        )
    return config.since <= example.date <= (config.until or example.date)


def data_names(paths: Sequence[str]) -> list[str]:
    """What data sets are called in results: a file by its name up to the first dot, a folder by
    its own, without the version; by their whole paths where two were called the same."""
    folders = [epath.Path(path) for path in paths]
    names = [(f.parent if f.is_dir() else f).name.split(".")[0] for f in folders]
    return names if len(set(names)) == len(names) else list(paths)


def draw(
    params: qwen3.Params,
    model: qwen3.Config,
    problems: Mapping[str, Sequence[Any]],
    tokenizer: tokens.Tokenizer,
    pool: Pool,
    c: Any,
    layout: Layout | None,
    tell: rollout.Tell,
    *,
    found: Mapping[Key, Row] = types.MappingProxyType({}),
    add: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Samples and scores all that an evaluation asks for: num_samples answers a problem, then
    greedy ones.

    Args:
        c: of a loop or of the command: its `evaluation`, `rewards`, `sampler` and `dtype`.
        tell: see `rollout.collect`.
        found: answers that need not be drawn again.
        add: is called with the others that this process scores, as they come.

    Returns:
        All answers, problem by problem, on all processes.
    """
    rows: list[Row] = []
    rewards = c.evaluation.rewards(c.rewards)
    for sampling in c.evaluation.samplings():
        questions = Questions(problems, tokenizer, rewards, c.evaluation, sampling)
        groups, known = questions.open(found)
        done, _, _ = rollout.collect(
            params,
            model,
            groups,
            tokenizer,
            pool,
            rewards,
            sampling=sampling,
            engine=c.sampler,
            slot_tokens=c.evaluation.row_tokens,
            stop_strings=c.evaluation.stop_strings,
            tell=tell,
            on_scored=questions.on_scored(add),
            dtype=jnp.dtype(c.dtype),
            layout=layout,
        )
        rows += [
            known[i][j]
            or questions.row_of(i, j, open_.group.samples[j], open_.outcomes[j])
            for i, open_ in enumerate(done)
            for j in range(len(open_.outcomes))
        ]
    return rows


@dataclasses.dataclass(frozen=True)
class Questions:
    """Problems that are asked in one way: sampled, or greedily."""

    problems: Mapping[str, Sequence[Any]]
    tokenizer: tokens.Tokenizer
    rewards: RewardConfig
    config: EvaluationConfig
    sampling: Sampling

    @property
    def greedy(self) -> bool:
        return self.sampling.temperature == 0

    def open(
        self, found: Mapping[Key, Row]
    ) -> tuple[list[rollout.OpenGroup], list[list[Row | None]]]:
        """A group a problem, in which nothing is drawn or scored that is found; and the rows
        that are, None where there is none."""
        num_samples = 1 if self.greedy else self.config.num_samples
        groups = rollout.open_groups(
            self.problems,
            self.rewards,
            num_samples=num_samples,
            max_new_tokens=self.config.max_new_tokens,
            key=jax.random.key(self.config.seed),
            seed=f"evaluation/{self.config.seed}",
        )
        rows = [
            [found.get((one, self.greedy, j)) for j in range(num_samples)]
            for one in self.problems["prompt_ids"]
        ]
        return [_without(*pair) for pair in zip(groups, rows, strict=True)], rows

    def on_scored(self, add: Callable[[Row], None] | None) -> rollout.OnScored | None:
        """What hands the rows on, as rewards come."""
        if add is None:
            return None
        return lambda i, j, sample, outcome: add(self.row_of(i, j, sample, outcome))

    def row_of(
        self, i: int, j: int, sample: sampler.Sample, outcome: Outcome | None
    ) -> Row:
        """What is kept of sample j of problem i."""
        assert outcome is not None  # It is complete.
        return {
            "prompt_id": self.problems["prompt_ids"][i],
            "greedy": self.greedy,
            "sample": j,
            "data": self.problems["data"][i],
            "prompt": self.problems["messages"][i],
            "response": self.tokenizer.decode(sample.tokens),
            "answer": in_short(self.problems["answers"][i]),
            "data_source": self.problems["sources"][i],
            "reward": finite(outcome.score),
            "reward_status": outcome.status,
            "correct": outcome.score == self.rewards.full_credit,
            "finished": sample.finished,
            "num_tokens": len(sample.tokens),
        }


def in_short(answer: Any) -> Any:
    """A reference answer as rows keep it: of a long one, such as megabytes of tests, a digest."""
    text = answer if isinstance(answer, str) else json.dumps(answer, sort_keys=True)
    if len(text) <= LONG_ANSWER:
        return answer
    return f"sha256 {hashlib.sha256(text.encode()).hexdigest()}"


def _without(open_: rollout.OpenGroup, rows: Sequence[Row | None]) -> rollout.OpenGroup:
    """The group, its samples that have a row neither to be drawn nor to be scored."""
    had = sampler.Sample([], np.zeros(0, np.float32), finished=True)
    known = Outcome(np.nan, "ok", "")
    samples = [had if row else sampler.NOT_BEGUN for row in rows]
    return dataclasses.replace(
        open_,
        group=dataclasses.replace(open_.group, samples=samples),
        outcomes=[known if row else None for row in rows],
    )


def summary(
    rows: Sequence[Row], votes: Mapping[Key, float] | None = None
) -> dict[str, float]:
    """What the answers show of a model. A sample is right if its reward is full credit.

    Args:
        rows: from `draw`, of n samples a problem or greedy or both.
        votes: what stands for each answer, 0 for none; None: nothing is said of majorities.

    Returns:
        With n samples: `avg@n` with `avg@n_low`, `avg@n_high` (95% bootstrap over problems),
        `pass@k` for k = 1, 2, 4 .. n (unbiased), `maj@k` likewise, the tokens of an answer
        (`length`, its percentiles and most), `truncated`, the share that met the limit, and
        `accuracy`, which is avg@n; `greedy` with its interval, which is the accuracy if there
        is nothing else.
    """
    num_problems = len({row["prompt_id"] for row in rows})
    metrics: dict[str, float] = {"problems": num_problems}
    sampled = [row for row in rows if not row["greedy"]]
    greedy = [row for row in rows if row["greedy"]]
    n = len(sampled) // num_problems
    if sampled:
        correct_PN = np.array([row["correct"] for row in sampled]).reshape(-1, n)
        metrics |= estimates.interval(f"avg@{n}", correct_PN.mean(axis=1))
        ks = sorted({2**i for i in range(n.bit_length()) if 2**i <= n} | {n})
        metrics |= {
            f"pass@{k}": float(estimates.pass_at_k(correct_PN, k).mean()) for k in ks
        }
        if votes is not None:
            votes_PN = np.reshape([votes[key_of(row)] for row in sampled], (-1, n))
            metrics |= {
                f"maj@{k}": float(estimates.maj_at_k(votes_PN, correct_PN, k).mean())
                for k in ks
            }
    if greedy:
        right_P = np.array([row["correct"] for row in greedy], float)
        metrics |= estimates.interval("greedy", right_P)
    metrics["accuracy"] = metrics[f"avg@{n}" if n else "greedy"]
    length_B = [row["num_tokens"] for row in sampled or greedy]
    metrics |= {
        "length": float(np.mean(length_B)),
        **{f"length_p{p}": float(np.percentile(length_B, p)) for p in (50, 90)},
        "length_max": int(max(length_B)),
        "truncated": float(np.mean([not row["finished"] for row in sampled or greedy])),
        "scoring_errors": sum(row["reward"] is None for row in rows),
    }
    return metrics


def during_training(
    params: qwen3.Params,
    problems: Mapping[str, Sequence[Any]],
    tokenizer: tokens.Tokenizer,
    pool: Pool,
    config: Any,
    layout: Layout,
    tell: rollout.Tell,
) -> dict[str, float]:
    """`summary` as the section `evaluation` of an SFT or GPPO config says; names eval/..."""
    rows = draw(params, config.model, problems, tokenizer, pool, config, layout, tell)
    return {f"eval/{name}": value for name, value in summary(rows).items()}


def count_votes(
    rows: Sequence[Row], pool: Pool, rewards: RewardConfig
) -> dict[Key, float] | None:
    """What stands for the answer of each sampled row, 0 for none; None if a problem's kind of
    reward knows no answers to compare.

    Args:
        rewards: of the evaluation.
    """
    asked = {}
    for row in rows:
        kind = rewards.kinds[rewards.kind_of(row["data_source"])]
        if kind.function not in VOTES:
            return None
        if not row["greedy"]:
            vote = VOTES[kind.function]
            asked[key_of(row)] = pool.submit(vote, row["response"], "", wrong=0.0)
    scores = {key: future.result().score for key, future in asked.items()}
    return {key: float(np.nan_to_num(score)) for key, score in scores.items()}


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
        "workdir": "Evaluate its newest checkpoint, and write the results there.",
        "model": "Evaluate this Hugging Face folder or workdir instead.",
        "output": "The file of the result, such as results/base.json; others lie beside it.",
        "samples": "The file of the answers, JSON lines.",
    }
    flags = config.parse_flags(argv, __doc__, texts)
    names = {field.name for field in dataclasses.fields(CommandConfig)}
    values = flags.config.to_dict()
    c = config.build(
        CommandConfig, {name: values[name] for name in names & set(values)}
    )
    path = flags.model or flags.workdir or c.init_from
    output = flags.output or f"evaluation_{epath.Path(path).name or 'random'}.json"
    if flags.workdir and not flags.output:
        output = str(epath.Path(flags.workdir) / "evaluation.json")
    if not output.endswith(".json"):
        raise InputError(f"--output={output} must end in .json")
    hosts.join()  # First: it takes SIGTERM for itself.
    with preemption.watch(GRACE_S), routing.make_pool(c.rewards) as pool:
        run(c, path, output, flags.samples, pool)


def run(
    c: CommandConfig, path: str, output: str, samples: str | None, pool: Pool
) -> None:
    """Evaluates the model at `path`, or a random one for '', and says and writes what it
    found."""
    path = str(checkpoint.resolve(path)) if path else ""
    run_of = checkpoint.read_about(path) if path else None
    tokenizer = tokens.load(checkpoint.model_folder(path) if path else c.tokenizer)
    problems = load_problems(c.evaluation, tokenizer, c.rewards, pool)
    made_with = fingerprint(c, path, tokenizer)
    samples = samples or f"{output.removesuffix('.json')}_{made_with}.samples.jsonl"
    answers = Answers(samples, made_with)
    rows = draw_all(c, path, problems, tokenizer, pool, answers)
    if not hosts.first():
        return
    votes = count_votes(rows, pool, c.evaluation.rewards(c.rewards))
    result = results(rows, votes)
    print(json.dumps({k: v for k, v in result.items() if k != "per_problem"}, indent=2))
    if failed := result["scoring_errors"]:
        logging.getLogger(__name__).warning(
            "%d answers could not be scored, and count as wrong; given again, this command "
            "draws and scores them anew",
            failed,
        )
    about = {
        "model": path,
        "run": run_of and run_of["config_sha256"],
        "steps_done": run_of and run_of["steps_done"],
        "evaluation": dataclasses.asdict(c.evaluation),
        "samples": samples,
        "made_with": made_with,
    }
    text = json.dumps(result | about, indent=2) + "\n"
    epath.Path(output).parent.mkdir(parents=True, exist_ok=True)
    epath.Path(output).write_text(text)
    table = epath.Path(output).with_suffix(".md")
    table.write_text(f"# {path or 'A random model'}\n\n{markdown(result)}")
    print(f"written to {output}, {table} and {samples}", file=sys.stderr)


def fingerprint(c: CommandConfig, path: str, tokenizer: tokens.Tokenizer) -> str:
    """Of all that decides on an answer to a problem, and on which problem has which number; but
    for the problems themselves and what a reward of one's own does."""
    e, rewards = c.evaluation, c.evaluation.rewards(c.rewards)
    parts = (
        (path, weights_of(path) if path else (c.model, c.seed)),
        (c.model.yarn, c.dtype, tokenizer.fingerprint),
        (e.data, e.split, e.since, e.until, "," in e.data and e.num_problems),
        (e.sampling(), e.max_new_tokens, e.stop_strings, e.seed),
        (rewards.kinds, rewards.kind, rewards.sources, rewards.full_credit),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def weights_of(path: str) -> str:
    """Tells the weights that `checkpoint.load_model` reads there from others, at a glance."""
    about = checkpoint.read_about(path)
    if about is not None:
        return json.dumps(about, sort_keys=True)
    folder = checkpoint.model_folder(path)
    weights = map(str, sorted(folder.glob("*.safetensors")))
    return " ".join(
        [(folder / "config.json").read_text(), *map(files.fingerprint, weights)]
    )


def draw_all(
    c: CommandConfig,
    path: str,
    problems: Mapping[str, Sequence[Any]],
    tokenizer: tokens.Tokenizer,
    pool: Pool,
    answers: Answers,
) -> list[Row]:
    """All answers that the config asks for, drawn, or found among `answers`."""
    found = still_asked(answers.found, problems)
    wanted = [
        (one, greedy, j)
        for greedy, num in (
            (False, c.evaluation.num_samples),
            (True, c.evaluation.greedy),
        )
        for one in problems["prompt_ids"]
        for j in range(num)
    ]
    if all(key in found for key in wanted):
        rows = [found[key] for key in wanted]
        # All were there when it was cut off. The first says whether, for it will write it.
        if not hosts.gather(answers.path.exists())[0]:
            answers.finish(rows)
        return rows
    layout = Layout(make_mesh(c.mesh), c.mesh.rules)
    sampler.check_engine(c.sampler, layout, c.evaluation.row_tokens)
    params, model = load(c, path, layout)
    num_done = sum(key in found for key in wanted)
    with (
        answers,
        progress.Progress("evaluation", num_done, len(wanted), unit="sample") as shown,
    ):

        def add(row: Row) -> None:
            shown.advance()
            answers.add(row)

        rows = draw(
            params,
            model,
            problems,
            tokenizer,
            pool,
            c,
            layout,
            shown.tell,
            found=found,
            add=add,
        )
        answers.finish(rows)
    return rows


def still_asked(
    found: Mapping[Key, Row], problems: Mapping[str, Sequence[Any]]
) -> dict[Key, Row]:
    """The answers but for those that could not be scored, and those to problems that are others
    now, of which the data tells."""
    names = ("prompt_ids", "messages", "answers", "sources")
    columns = zip(*(problems[name] for name in names), strict=True)
    # As JSON has them, which is how rows were kept.
    asked = {
        one: json.loads(json.dumps([messages, in_short(answer), source]))
        for one, messages, answer, source in columns
    }
    same = {
        key: row
        for key, row in found.items()
        if [row["prompt"], row["answer"], row["data_source"]] == asked.get(key[0])
        and row["reward"] is not None
    }
    again = sum(key[0] in asked for key in found.keys() - same.keys())
    if again:
        logging.getLogger(__name__).info(
            "%d answers are drawn again: they could not be scored, or the problem has changed",
            again,
        )
    return same


def load(
    c: CommandConfig, path: str, layout: Layout
) -> tuple[qwen3.Params, qwen3.Config]:
    """The model at `path`, with the config's YaRN if it has one; a random one for ''."""
    if not path:
        params = qwen3.init_params(c.model, jax.random.key(c.seed))
        return put(params, qwen3.params_shardings(c.model, layout)), c.model
    params, model = checkpoint.load_model(path, layout)
    if c.evaluation.row_tokens > model.max_positions and not c.model.yarn:
        logging.getLogger(__name__).warning(
            "evaluation.max_prompt_tokens and max_new_tokens are %d together, but the model "
            "is made for %d positions",
            c.evaluation.row_tokens,
            model.max_positions,
        )
    if c.model.yarn:  # It reaches further than it was trained.
        model = dataclasses.replace(
            model, yarn=c.model.yarn, max_positions=c.model.max_positions
        )
    return params, model


def results(rows: Sequence[Row], votes: Mapping[Key, float] | None) -> dict[str, Any]:
    """`summary` of all, `by_data` of each data set if there are several, and `per_problem`."""
    result: dict[str, Any] = summary(rows, votes)
    names = list(dict.fromkeys(row["data"] for row in rows))
    if len(names) > 1:
        result["by_data"] = {
            name: summary([row for row in rows if row["data"] == name], votes)
            for name in names
        }
    by_problem: dict[int, list[Row]] = {}
    for row in rows:
        by_problem.setdefault(row["prompt_id"], []).append(row)
    result["per_problem"] = [_problem(mine, votes) for mine in by_problem.values()]
    return result


def _problem(rows: Sequence[Row], votes: Mapping[Key, float] | None) -> dict[str, Any]:
    """How one problem went."""
    sampled = [row for row in rows if not row["greedy"]]
    greedy = [float(row["correct"]) for row in rows if row["greedy"]]
    majority = None
    if sampled and votes is not None:
        votes_1N = [[votes[key_of(row)] for row in sampled]]
        correct_1N = np.array([[row["correct"] for row in sampled]])
        [majority] = estimates.maj_at_k(votes_1N, correct_1N, len(sampled)).tolist()
    shown = sampled or rows
    return {
        "prompt_id": rows[0]["prompt_id"],
        "data": rows[0]["data"],
        "problem": rows[0]["prompt"][-1]["content"],
        "samples": len(sampled),
        "right": sum(row["correct"] for row in sampled),
        "greedy": greedy[0] if greedy else None,
        "majority": majority,
        "truncated": float(np.mean([not row["finished"] for row in shown])),
        "length": float(np.mean([row["num_tokens"] for row in shown])),
    }


def markdown(result: Mapping[str, Any]) -> str:
    """Two tables: of the data sets, and of the problems."""
    parts = {"all": result} | result.get("by_data", {})
    n = result["per_problem"][0]["samples"]
    columns = [f"avg@{n}", f"pass@{n}", f"maj@{n}", "greedy"]
    columns = [name for name in columns if name in result]
    lines = [
        _line("", "problems", *columns, "truncated", "tokens"),
        _line(*["---"] * (len(columns) + 4)),
    ]
    for name, one in parts.items():
        shown = [_percent(one, column) for column in columns]
        tail = f"{100 * one['truncated']:.1f}%", f"{one['length']:,.0f}"
        lines.append(_line(name, one["problems"], *shown, *tail))
    lines += [
        "",
        "95% intervals by bootstrap over problems; tokens in the mean.",
        "",
        _line(
            "", "problem", "right", "of", "greedy", "majority", "truncated", "tokens"
        ),
        _line(*["---"] * 8),
    ]
    excerpts = _excerpts(result["per_problem"])
    for one, excerpt in zip(result["per_problem"], excerpts, strict=True):
        lines.append(
            _line(
                f"{one['data']} {one['prompt_id']}",
                excerpt.replace("|", "\\|"),
                one["right"],
                one["samples"],
                *(
                    "" if x is None else f"{x:g}"
                    for x in (one["greedy"], one["majority"])
                ),
                f"{100 * one['truncated']:.0f}%",
                f"{one['length']:,.0f}",
            )
        )
    return "\n".join(lines) + "\n"


def _excerpts(per_problem: Sequence[Mapping[str, Any]]) -> list[str]:
    """The first words of each problem, without those with which all of its data set begin."""
    words: dict[str, list[list[str]]] = {}
    for one in per_problem:
        words.setdefault(one["data"], []).append(one["problem"].split())
    shared = {
        data: sum(1 for _ in itertools.takewhile(_all_equal, zip(*found, strict=False)))
        for data, found in words.items()
    }
    excerpts = []
    for one in per_problem:
        found = one["problem"].split()
        excerpts.append(" ".join(found[shared[one["data"]] :] or found)[:EXCERPT])
    return excerpts


def _all_equal(words: tuple[str, ...]) -> bool:
    return len(set(words)) == 1


def _line(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _percent(values: Mapping[str, float], name: str) -> str:
    text = f"{100 * values[name]:.1f}%"
    if f"{name}_low" in values:
        low, high = 100 * values[f"{name}_low"], 100 * values[f"{name}_high"]
        text += f" ({low:.1f} - {high:.1f})"
    return text


if __name__ == "__main__":
    config.run_main(main)
