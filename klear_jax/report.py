"""One HTML file that shows a run: whether it is healthy, its curves, its samples by token.

    python -m klear_jax.report --workdir=runs/gppo_tiny [--output=FILE.html]
    python -m klear_jax.report --workdir=RUN,RUN2,...

The file needs no network. Several runs are compared; those that differ only in seed,
workdir and init_from are one group, shown as its mean and range. The run may still be under
way. What is too much for a page is thinned out, and the page says how: --steps=10,20 chooses
the steps whose samples it holds.
"""

import base64
import bisect
import dataclasses
import functools
import gzip
import hashlib
import html
import importlib.resources
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import jax.numpy as jnp
import numpy as np
from etils import epath
from latex2mathml import converter

from klear_jax import config, guards, losses, tokens
from klear_jax.errors import InputError

# What a page holds at most, of all its runs together; [ours], for 20 to 30 MB.
POINTS = 2_000  # Of a curve; of more, the extremes of each stretch.
CURVE_POINTS = 10_000  # Of a metric, over all runs.
STEPS = 20  # With samples.
GROUPS = 32  # Of a step.
TOKENS = 2_000_000  # Of responses.
# Of a response; of a longer one, both ends.
RESPONSE_TOKENS = 3_000
RESPONSE_CHARACTERS = 12_000  # Where its tokens are not known.
PROMPT_CHARACTERS = 8_000
FORMULAS = 2_000  # Of a step, that are typeset.

SEEDS_DIFFER = ("seed", "workdir", "init_from")  # Runs that differ in these are alike.
PER_TOKEN = ("tokens", "old_logp", "log_ratio")
Spell = Callable[[Sequence[int]], list[tokens.Piece]]  # From `tokens.speller`.
# What a page says of each sample; the rest is made of `MADE_OF`.
SHOWN = (
    *("prompt_id", "source", "group", "reward", "reward_status", "advantage"),
    *("finished", "num_tokens", "policy_steps", "logprob"),
)
MADE_OF = ("prompt", "response", "reward_detail")
# Null where there is nothing to take a mean of.
MAY_BE_NULL = ("samples/length_correct", "samples/length_wrong", "reward/mean_used")
COUNTS = {
    "updates_skipped": "loss or gradient was no number, so the update changed nothing; look "
    "at not_finite_step_*.npz, and lower optim.peak_lr",
    "reward/masked_errors": "the reward itself failed; see the detail of samples without a "
    "reward",
    "reward/masked_late": "rewards came too late to be used; raise rewards.step_timeout_s or "
    "rewards.num_workers",
    "compilations/unplanned": "a program was compiled in the middle of the run; the log says "
    "which, and for what shapes",
}
# What of the config stands at the top of the page.
HIGHLIGHTS = """
    seed init_from dtype model.num_layers model.width model.vocab_size data.path data.split
    rollout.prompts rollout.max_groups rollout.samples_per_prompt rollout.max_new_tokens
    rollout.temperature loss.kind loss.clip_low loss.clip_high loss.beta_low loss.beta_high
    loss.dual_clip loss.positive_coef loss.old_logp minibatch_prompts batch_rows
    data.row_tokens micro_rows num_steps num_epochs optim.peak_lr optim.warmup_steps
    evaluation.data evaluation.every mesh.data mesh.fsdp mesh.tensor
""".split()


def main(argv: list[str]) -> None:
    """The command, see above."""
    texts = {
        "workdir": "The run to show; several with commas.",
        "output": "The file to write; default: report.html in the workdir, or of several "
        "runs comparison.html in the first.",
        "steps": "Whose samples the page holds, with commas; default: evenly spread ones.",
    }
    flags = config.parse_flags(argv, __doc__, texts, with_config=False)
    if not flags.workdir:
        raise InputError("--workdir=DIR is missing: which run is to be shown?")
    config.stay_on_cpu()
    workdirs = flags.workdir.split(",")
    page = make_page(workdirs, parse_steps(flags.steps))
    name = "report.html" if len(workdirs) == 1 else "comparison.html"
    output = epath.Path(flags.output or epath.Path(workdirs[0]) / name)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(page.encode())
    print(f"{output}: {len(page) / 1e6:.1f} MB")


def parse_steps(text: str | None) -> list[int] | None:
    """'10,20' -> [10, 20]."""
    if text is None:
        return None
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise InputError(f"--steps must be numbers such as 10,20, not {text!r}")
    return sorted({int(step) for step in text.split(",")})


@dataclasses.dataclass(frozen=True)
class Run:
    """What a workdir holds; samples are read when they are needed."""

    workdir: epath.Path
    config: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]  # Of metrics.jsonl, by step.
    rollouts: Mapping[int, epath.Path]  # Step -> file.
    notes: Sequence[str]  # What a reader of the page should know.

    @property
    def task(self) -> str:
        return "gppo" if "rollout" in self.config else "sft"


def read_run(workdir: str) -> Run:
    """Raises InputError: there is no run, none of its steps is done, or a file is damaged."""
    folder = epath.Path(workdir)
    if not (folder / "config.json").exists():
        raise InputError(f"{folder} holds no run: there is no config.json")
    try:
        values = parse((folder / "config.json").read_bytes())
        check_keys(values, ())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{folder / 'config.json'} is damaged: {error}") from None
    file = folder / "metrics.jsonl"
    if not file.exists():
        raise InputError(
            f"{folder} holds no run, or none that has finished a step: there is no "
            "metrics.jsonl"
        )
    notes: list[str] = []
    lines = list(read_lines(file, check_metrics, notes))
    if not lines:
        raise InputError(
            f"{file} holds no step: the run has not finished its first one"
        )
    found = {
        int(path.stem.removeprefix("step_")): path
        for path in (folder / "rollouts").glob("step_*.jsonl")
        if path.stem.removeprefix("step_").isdigit()
    }
    return Run(folder, values, lines, dict(sorted(found.items())), notes)


def read_lines(
    file: epath.Path,
    check: Callable[[Any], None],
    notes: list[str],
    wanted: Callable[[int], bool] = lambda number: True,
) -> Iterator[dict[str, Any]]:
    """The objects of JSON lines, a line at a time.

    Args:
        file: a last line that is cut off is left out: a run may be writing it.
        check: raises a ValueError unless a line holds what it should.
        notes: gets a sentence if a line was left out.
        wanted: which lines to return, by their number from 0; the others are not parsed.

    Raises:
        InputError: another line is damaged.
    """
    with file.open("rb") as opened:
        for number, line in enumerate(opened):
            if not wanted(number):
                continue
            try:
                row = parse(line)
                check(row)
            except (ValueError, RecursionError) as error:
                if not line.endswith(b"\n"):
                    notes.append(
                        f"the last line of {file.name} is cut off and left out"
                    )
                    return
                raise InputError(
                    f"{file} line {number + 1} is damaged: {error}"
                ) from None
            yield row


def parse(text: bytes) -> Any:
    """JSON; what is no number, which JSON has no word for, is None."""
    return json.loads(text, parse_constant=lambda name: None)


def check_metrics(row: Any) -> None:
    check_keys(row, ("step",))
    if type(row["step"]) is not int:
        raise ValueError(f"step is {row['step']!r}")
    for name, value in row.items():
        if value is not None and type(value) not in (int, float):
            raise ValueError(f"{name} is {value!r}")


def check_sample(row: Any) -> None:
    check_keys(row, (*SHOWN, *MADE_OF))
    if has_tokens(row):
        for name in PER_TOKEN:
            if len(row[name]) != len(row["tokens"]):
                raise ValueError(f"{name} has another length than tokens")


def check_keys(row: Any, keys: Sequence[str]) -> None:
    if not isinstance(row, dict):
        raise ValueError("it is no object")
    if missing := sorted(set(keys) - set(row)):
        raise ValueError(f"it lacks {missing}")


def make_page(workdirs: Sequence[str], steps: Sequence[int] | None) -> str:
    """The whole HTML text.

    Args:
        steps: whose samples it holds; None: evenly spread ones.

    Raises:
        InputError: a workdir holds no run, or none of them has samples of such a step.
    """
    if len(set(workdirs)) < len(workdirs):
        raise InputError(f"--workdir names a run twice: {','.join(workdirs)}")
    runs = [read_run(workdir) for workdir in workdirs]
    check_steps(steps, runs)
    chosen = [choose_steps(run, steps, len(runs)) for run in runs]
    room = TOKENS // max(sum(map(len, chosen)), 1)
    shown: list[dict[str, Any]] = []
    blobs: dict[str, str] = {}
    for name, run, mine in zip(short_names(workdirs), runs, chosen, strict=True):
        notes = list(run.notes)
        samples = []
        for step, found in read_samples(run, mine, room, notes):
            samples.append({"step": step, "blob": f"samples-{len(blobs)}"})
            blobs[f"samples-{len(blobs)}"] = packed(found)
        about = about_run(run, name, min(POINTS, CURVE_POINTS // len(runs)))
        notes += left_out(run, mine)
        shown.append(about | {"samples": samples, "notes": notes})
    data = {
        "runs": shown,
        "groups": group_runs([run.config for run in runs]),
        "may_be_null": MAY_BE_NULL,
    }
    return fill_template(data, blobs)


def check_steps(steps: Sequence[int] | None, runs: Sequence[Run]) -> None:
    """Raises InputError for a step of which no run has samples."""
    written = sorted({step for run in runs for step in run.rollouts})
    for step in steps or ():
        if step not in written:
            there = ", ".join(str(run.workdir) for run in runs)
            raise InputError(
                f"--steps={step}: there are no samples of it in {there}, but of steps "
                f"{spans(written) or 'none'}"
            )


def short_names(workdirs: Sequence[str]) -> list[str]:
    """Paths without the folders that all are in."""
    parts = [[part for part in path.split("/") if part] for path in workdirs]
    common = 0
    while all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts):
        common += 1
    return ["/".join(p[common:]) for p in parts]


def choose_steps(run: Run, steps: Sequence[int] | None, num_runs: int) -> list[int]:
    """Those whose samples are shown: the given ones, or the first, the last, and evenly
    spread ones between."""
    if steps is not None:
        return [step for step in steps if step in run.rollouts]
    there = list(run.rollouts)
    limit = min(max(STEPS // num_runs, 2), len(there))
    return [there[i] for i in np.linspace(0, len(there) - 1, limit).round().astype(int)]


def left_out(run: Run, chosen: Sequence[int]) -> list[str]:
    """What of the samples is not on the page, in a sentence."""
    if len(chosen) == len(run.rollouts):
        return []
    return [
        f"samples of {len(chosen)} of {len(run.rollouts)} steps are here; "
        "--steps=10,20 chooses others"
    ]


# ---- Metrics


def about_run(run: Run, name: str, points: int) -> dict[str, Any]:
    """What the page says of a run, but for its samples.

    Args:
        points: of a curve, at most.
    """
    steps = [line["step"] for line in run.lines]
    values = dict(leaves(run.config))
    highlights = [(key, values.get(key)) for key in HIGHLIGHTS]
    return {
        "name": name,
        "workdir": str(run.workdir),
        "task": run.task,
        "config": run.config,
        "highlights": [pair for pair in highlights if pair[1] not in (None, "")],
        "done": steps[-1] + 1,
        "planned": run.config.get("num_steps") or None,
        "limits": {guards.GUARDS[n].metric: x for n, x in limits(run).items()},
        "checks": [dataclasses.asdict(check) for check in checks(run)],
        "series": {key: thinned(*found, points) for key, found in curves(run).items()},
        "lines": len(steps),
        "thinned": len(steps) > points,
    }


def curves(run: Run) -> dict[str, tuple[list[int], list[float | None]]]:
    """Each metric: the steps that have it, and its values; None where it was no number."""
    found: dict[str, tuple[list[int], list[float | None]]] = {}
    for line in run.lines:
        for name, value in line.items():
            if name != "step":
                steps, values = found.setdefault(name, ([], []))
                steps.append(line["step"])
                values.append(value)
    return found


def thinned(
    steps: Sequence[int], values: Sequence[float | None], limit: int
) -> dict[str, Any]:
    """A curve as the page reads it: `x`, `y`. Of more than `limit` points the first, the last,
    and of each stretch the lowest, the highest, and the first that is no number; with the
    `means` of the stretches, a curve of their own."""
    if len(values) <= limit:
        return {"x": list(steps), "y": [short(value) for value in values]}
    y = np.array([math.nan if v is None else v for v in values])
    keep = {0, len(y) - 1}
    means: dict[str, list[Any]] = {"x": [], "y": []}
    for part in np.array_split(np.arange(len(y)), max(limit // 2 - 1, 1)):
        numbers, others = part[~np.isnan(y[part])], part[np.isnan(y[part])]
        keep |= set(others[:1].tolist())
        if len(numbers):
            keep |= {
                int(numbers[choose(y[numbers])]) for choose in (np.argmin, np.argmax)
            }
            means["x"].append(steps[part[len(part) // 2]])
            means["y"].append(short(float(y[numbers].mean())))
    kept = sorted(keep)
    return {
        "x": [steps[i] for i in kept],
        "y": [short(values[i]) for i in kept],
        "means": means,
    }


def short(value: float | None) -> float | None:
    """A number with seven digits, a whole one with all of them."""
    if value is None or not math.isfinite(value):
        return None
    return int(value) if value == int(value) else float(f"{value:.7g}")


# ---- Health


@dataclasses.dataclass(frozen=True)
class Check:
    """Something that can go wrong in a run, and whether it has.

    Attributes:
        level: 'good'; 'unknown', it was not measured; 'past', it was broken once; 'bad', it
            is so at the newest step.
        says: what was seen, and at which steps.
    """

    name: str
    level: str
    says: str
    advice: str


def checks(run: Run) -> list[Check]:
    """All of them, the worst first."""
    found = not_finite(run)
    found += [check_limit(run, name, limit) for name, limit in limits(run).items()]
    found += [
        check_count(run, metric, advice)
        for metric, advice in COUNTS.items()
        if any(metric in line for line in run.lines)
    ]
    if run.task == "gppo":
        found.append(check_updates(run))
    order = ("bad", "past", "unknown", "good")
    return sorted(found, key=lambda check: order.index(check.level))


def check_limit(run: Run, name: str, limit: float) -> Check:
    """A guard of the config, over all steps."""
    guard = guards.GUARDS[name]
    seen = [
        (line["step"], line[guard.metric])
        for line in run.lines
        if line.get(guard.metric) is not None
    ]
    word = "above" if guard.above else "below"
    title = f"{guard.metric} {word} {limit:g}"
    if not seen:
        return Check(title, "unknown", "not measured", "")
    step, worst = (max if guard.above else min)(seen, key=lambda pair: pair[1])
    says = f"{'highest' if guard.above else 'lowest'} {worst:.3g}, step {step}"
    broken = [step for step, value in seen if guard.broken(value, limit)]
    return judge(title, broken, seen[-1][0], guard.advice, says)


def check_count(run: Run, metric: str, advice: str) -> Check:
    """A count that should stay 0; that of compilations goes on from step to step."""
    values = {line["step"]: line[metric] or 0 for line in run.lines if metric in line}
    if metric == "compilations/unplanned":
        before = [0, *values.values()]
        values = {
            step: value if value != last else 0
            for (step, value), last in zip(values.items(), before, strict=False)
        }
    broken = [step for step, value in values.items() if value]
    return judge(f"{metric} above 0", broken, max(values), advice)


def check_updates(run: Run) -> Check:
    """Steps without a single update: no group taught anything."""
    broken = [line["step"] for line in run.lines if line.get("updates") == 0]
    advice = guards.GUARDS["equal_rewards"].advice
    return judge("no update", broken, run.lines[-1]["step"], advice)


def judge(
    name: str, broken: Sequence[int], newest: int, advice: str, worst: str = ""
) -> Check:
    """The check that these steps have broken; `worst` says how far it went."""
    if not broken:
        return Check(name, "good", worst or "never", "")
    steps = f"{'step' if len(broken) == 1 else 'steps'} {spans(broken)}"
    level = "bad" if broken[-1] == newest else "past"
    return Check(name, level, "; ".join(filter(None, (steps, worst))), advice)


def not_finite(run: Run) -> list[Check]:
    """What was no number: metrics, and the batch that a run saved as it stopped."""
    advice = "look at the last samples before, and lower optim.peak_lr"
    steps: dict[str, list[int]] = {}
    for line in run.lines:
        for name, value in line.items():
            if value is None and name not in MAY_BE_NULL:
                steps.setdefault(name, []).append(line["step"])
    newest = run.lines[-1]["step"]
    found = [
        judge(f"{name} is no number", at, newest, advice) for name, at in steps.items()
    ]
    found = found or [judge("a metric is no number", [], newest, advice)]
    saved = sorted(path.name for path in run.workdir.glob("not_finite_step_*.npz"))
    if saved:
        # A run that has stopped did not write the step's metrics.
        level = "bad" if int(re.findall(r"\d+", saved[-1])[0]) > newest else "past"
        says = f"the batch is in {saved[0]}"
        found.append(Check("loss or gradient no number", level, says, advice))
    return found


def limits(run: Run) -> dict[str, float]:
    """The limits of the run's guards, of those that this version knows."""
    found = run.config.get("guards", {}).get("limits", {})
    return {name: limit for name, limit in found.items() if name in guards.GUARDS}


def spans(steps: Sequence[int], most: int = 6) -> str:
    """[3, 7, 8, 9] -> '3, 7 to 9'; of many the first ones, and how many there are."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and step == runs[-1][1] + 1:
            runs[-1][1] = step
        else:
            runs.append([step, step])
    text = ", ".join(f"{a} to {b}" if a < b else f"{a}" for a, b in runs[:most])
    return text if len(runs) <= most else f"{text} ... ({len(steps)} in all)"


# ---- Several runs


def group_runs(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Runs that are alike but for their seed: which they are, and what sets them apart.

    Returns:
        For each group `runs` (indices), `differs` ([key, value] pairs of all keys in which
        any two groups differ).
    """
    alike = [
        {key: value for key, value in leaves(one) if key not in SEEDS_DIFFER}
        for one in configs
    ]
    groups: list[list[int]] = []
    for i, one in enumerate(alike):
        for group in groups:
            if alike[group[0]] == one:
                group.append(i)
                break
        else:
            groups.append([i])
    first = alike[groups[0][0]]
    keys = {
        key for group in groups for key, _, _ in config.changes(first, alike[group[0]])
    }
    return [
        {
            "runs": group,
            "differs": [[key, alike[group[0]].get(key)] for key in sorted(keys)],
        }
        for group in groups
    ]


def leaves(values: Mapping[str, Any], section: str = "") -> Iterator[tuple[str, Any]]:
    """The full keys of a config, such as 'loss.kind', with their values."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{section}{key}.")
        else:
            yield f"{section}{key}", value


# ---- Samples


def read_samples(
    run: Run, steps: Sequence[int], room: int, notes: list[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The samples of each step as the page reads them.

    Args:
        room: tokens of a step, at most, unless its first group has more.
        notes: gets sentences on files that were cut off.
    """
    speller = functools.cache(
        lambda: tokens.speller(tokens.load(run.workdir / "model"))
    )
    for step in steps:
        file = run.rollouts[step]
        found = [summary(row) for row in read_lines(file, check_sample, notes)]
        chosen = choose_groups(found, room)
        numbers = {i for i, one in enumerate(found) if one.group in chosen}
        rows = list(read_lines(file, check_sample, [], numbers.__contains__))
        yield step, page_of_step(rows, found, run.config, speller)


@dataclasses.dataclass(frozen=True)
class Summary:
    """What decides on whether a sample is shown."""

    group: int
    reward: float | None
    has_tokens: bool
    trained: bool
    cost: int  # Tokens on the page.


def summary(row: Mapping[str, Any]) -> Summary:
    return Summary(
        row["group"],
        row["reward"],
        has_tokens(row),
        row["advantage"] is not None,
        min(row["num_tokens"], RESPONSE_TOKENS),
    )


def has_tokens(row: Mapping[str, Any]) -> bool:
    return all(name in row for name in PER_TOKEN)


def choose_groups(found: Sequence[Summary], room: int) -> set[int]:
    """Groups with per-token data before those that were trained on, before others; as many
    as there is room for, and one at least."""
    cost: dict[int, int] = {}
    rank: dict[int, tuple[bool, bool]] = {}
    for one in found:
        cost[one.group] = cost.get(one.group, 0) + one.cost
        mine = not one.has_tokens, not one.trained
        rank[one.group] = min(rank.get(one.group, mine), mine)
    order = sorted(cost, key=rank.__getitem__)  # Stable: as they stand in the file.
    used = itertools.accumulate(cost[group] for group in order)
    fits = [group for group, sum_ in zip(order, used, strict=True) if sum_ <= room]
    return set(fits[:GROUPS] or order[:1])


def page_of_step(
    rows: Sequence[Mapping[str, Any]],
    found: Sequence[Summary],
    values: Mapping[str, Any],
    speller: Callable[[], Spell],
) -> dict[str, Any]:
    """One step: `samples`, `formulas` (MathML as trees) and what there was in all.

    Args:
        rows: the chosen samples.
        found: of all samples.
        values: the config.
        speller: reads the tokenizer, which only samples with tokens need.
    """
    regions = find_regions(rows, values["loss"])
    typeset = Formulas()
    rewards = [one.reward for one in found if one.reward is not None]
    samples = [
        page_of_sample(row, values, speller, region, typeset)
        for row, region in zip(rows, regions, strict=True)
    ]
    return {
        "samples": samples,
        "formulas": typeset.trees,
        "math": typeset.note,
        "all_samples": len(found),
        "all_groups": len({one.group for one in found}),
        "mean_reward": float(np.mean(rewards)) if rewards else None,
    }


def page_of_sample(
    row: Mapping[str, Any],
    values: Mapping[str, Any],
    speller: Callable[[], Spell],
    regions: str | None,
    typeset: "Formulas",
) -> dict[str, Any]:
    """One sample: what is known of it, and its response in one part, or in two if its middle
    is left out."""
    prompt = middle_cut(str(row["prompt"]), PROMPT_CHARACTERS)
    if regions is None:
        parts, cut = parts_of_text(row["response"])
    else:
        parts, cut = parts_of_tokens(row, speller(), regions)
    for part in parts:
        part["formulas"] = typeset.find(part["text"])
        if "pieces" in part:
            del part["text"]  # The pieces are it.
    return {name: row[name] for name in SHOWN} | {
        "prompt": prompt,
        "prompt_formulas": typeset.find(prompt),
        "reward_detail": middle_cut(str(row["reward_detail"]), PROMPT_CHARACTERS),
        "correct": row["reward"] == values["rewards"]["full_credit"],
        "parts": parts,
        "left_out": cut,
    }


def middle_cut(text: str, most: int) -> str:
    half = most // 2
    if len(text) <= most:
        return text
    return (
        f"{text[:half]}\n[{len(text) - 2 * half} characters left out]\n{text[-half:]}"
    )


def parts_of_text(response: str) -> tuple[list[dict[str, Any]], str]:
    """A response without tokens: its parts, and what is left out between them."""
    if len(response) <= RESPONSE_CHARACTERS:
        return [part(response, response, "")], ""
    half = RESPONSE_CHARACTERS // 2
    ends = [
        part(response[:half], response, ""),
        part(response[-half:], response, response[:-half]),
    ]
    return ends, f"{len(response) - 2 * half:,} characters"


def part(text: str, response: str, before: str) -> dict[str, Any]:
    """A part of a response, and whether it begins within the thinking.

    Args:
        before: of the response, in front of the part.
    """
    opened, closed = before.rfind("<think>"), before.rfind("</think>")
    never_opened = "<think>" not in response and "</think>" in response
    return {"text": text, "thinking": opened > closed or (closed < 0 and never_opened)}


def parts_of_tokens(
    row: Mapping[str, Any],
    spell: Spell,
    regions: str,
) -> tuple[list[dict[str, Any]], str]:
    """A response by its tokens: its parts, and what is left out between them."""
    num, half = len(row["tokens"]), RESPONSE_TOKENS // 2
    cuts = [(0, num)] if num <= RESPONSE_TOKENS else [(0, half), (num - half, num)]
    parts = []
    for start, end in cuts:
        pieces = spell(row["tokens"][start:end])
        text = "".join(piece.text for piece in pieces)
        plain = "".join(piece.text for piece in pieces if piece.plain)
        before = row["response"][: len(row["response"]) - len(plain)] if start else ""
        parts.append(
            part(text, row["response"], before)
            | {
                "pieces": [
                    piece.text
                    if piece.count == 1 and piece.plain
                    else [piece.text, piece.count, piece.plain]
                    for piece in pieces
                ],
                "start": start,
                "ids": row["tokens"][start:end],
                "old_logp": rounded(row["old_logp"][start:end], 4),
                "log_ratio": rounded(row["log_ratio"][start:end], 5),
                "regions": regions[start:end],
            }
        )
    return parts, f"{num - 2 * half:,} tokens" if len(cuts) == 2 else ""


def rounded(values: Iterable[float | None], digits: int) -> list[float | None]:
    return [
        None if x is None or not math.isfinite(x) else round(x, digits) for x in values
    ]


def find_regions(
    rows: Sequence[Mapping[str, Any]], loss: Mapping[str, Any]
) -> list[str | None]:
    """The clip region of each token, a letter each: low, high, dual, inside; None for
    samples without tokens. One call for all, and few lengths: JAX compiles it for each."""
    if not any(map(has_tokens, rows)):
        return [None] * len(rows)
    lengths = [len(row["tokens"]) if has_tokens(row) else 0 for row in rows]
    log_ratio = [x for row in rows if has_tokens(row) for x in row["log_ratio"]]
    advantage = np.repeat([row["advantage"] or 0.0 for row in rows], lengths)
    x, a = np.zeros((2, 1 << len(log_ratio).bit_length()), np.float32)
    x[: len(log_ratio)] = [0.0 if value is None else value for value in log_ratio]
    a[: len(log_ratio)] = advantage
    names = ("kind", "clip_low", "clip_high", "beta_low", "dual_clip")
    found = losses.clip_regions(
        jnp.asarray(x), jnp.asarray(a), **{name: loss[name] for name in names}
    )
    letters = np.full(len(x), "i")
    for name, is_in in found.items():
        letters[np.asarray(is_in)] = name[0]
    ends = np.cumsum(lengths)
    return [
        "".join(letters[end - length : end]) if has_tokens(row) else None
        for row, length, end in zip(rows, lengths, ends, strict=True)
    ]


# ---- Formulas

_BRACED = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"
# What stands between the delimiters is at most 1,000 characters.
FORMULA = re.compile(
    r"\$\$(?P<dollars>.{1,1000}?)\$\$"
    r"|\\\[(?P<brackets>.{1,1000}?)\\\]"
    r"|\\\((?P<round>.{1,1000}?)\\\)"
    r"|\$(?P<inline>[^\s$](?:[^$\n]{0,998}[^\s$\\])?)\$"
    r"|(?P<environment>\\begin\{(?P<name>[a-z]+\*?)\}.{1,1000}?\\end\{(?P=name)\})"
    rf"|(?P<boxed>\\boxed{_BRACED})",
    re.DOTALL,
)
ON_A_LINE_OF_ITS_OWN = ("dollars", "brackets", "environment")
# Of MathML Core, what LaTeX becomes; nothing that could link, load or run.
TAGS = frozenset(
    """
    math mrow mi mn mo mtext mspace msup msub msubsup mfrac msqrt mroot mover munder
    munderover mtable mtr mtd menclose mstyle mpadded mphantom mmultiscripts mprescripts
""".split()
)
ATTRIBUTES = frozenset(
    """
    display mathvariant stretchy fence form separator linethickness accent accentunder
    columnalign rowspacing columnspacing displaystyle scriptlevel notation width height depth
    lspace rspace minsize maxsize movablelimits symmetric largeop
""".split()
)

CHILDREN = dict.fromkeys(("mfrac", "msub", "msup", "mroot", "mover", "munder"), 2) | {
    "msubsup": 3,
    "munderover": 3,
}
DEEPEST = 40


class Formulas:
    """Turns the formulas of a step into MathML, each once."""

    def __init__(self):
        self.trees: list[Any] = []
        self.note = ""
        self._known: dict[str, int | None] = {}

    def find(self, text: str) -> list[list[int]]:
        """[start, end, index in `trees`] of each formula that can be typeset; places are in
        UTF-16 units, as JavaScript counts."""
        found = []
        wide = [i for i, c in enumerate(text) if c > "\uffff"]  # Two units each.
        for match in FORMULA.finditer(text):
            index = self._index(match)
            if index is not None:
                places = [i + bisect.bisect_left(wide, i) for i in match.span()]
                found.append([*places, index])
        return found

    def _index(self, match: re.Match[str]) -> int | None:
        source = match[0]
        if source not in self._known and len(self._known) < FORMULAS:
            groups = {n: x for n, x in match.groupdict().items() if x and n != "name"}
            ((kind, latex),) = groups.items()
            tree = to_mathml(latex, block=kind in ON_A_LINE_OF_ITS_OWN)
            self._known[source] = None if tree is None else len(self.trees)
            self.trees += [] if tree is None else [tree]
        elif source not in self._known:
            self.note = f"only {FORMULAS:,} formulas of this step are typeset"
        return self._known.get(source)


def to_mathml(latex: str, *, block: bool) -> list[Any] | None:
    """[tag, attributes, text or children...] of a formula; None if it is broken."""
    display = "block" if block else "inline"
    try:
        check_braces(latex)
        return _tree(converter.convert_to_element(latex, display=display))
    except Exception:  # A model writes anything; what cannot be read stays as it is.
        return None


def check_braces(latex: str) -> None:
    """Raises unless each brace has its other: latex2mathml guesses where they should be."""
    depth = 0
    for brace in re.findall(r"\\.|[{}]", latex, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace, 0)
        if depth < 0:
            break
    if depth:
        raise ValueError("braces do not match")


def _tree(element: ElementTree.Element, depth: int = 0) -> list[Any]:
    """Raises for what is not to be shown: what LaTeX has no word for, and what is too deep
    for a stack."""
    tag = element.tag.rpartition("}")[2]
    text = html.unescape(element.text or "").strip(" \n")
    unread = tag == "mi" and text[:1] in ("\\", "&")
    if tag not in TAGS or unread or depth > DEEPEST:
        raise ValueError(f"<{tag}> {text}")
    if len(element) != CHILDREN.get(tag, len(element)):
        raise ValueError(f"<{tag}> has {len(element)} children")
    attributes = {k: v for k, v in element.attrib.items() if k in ATTRIBUTES}
    children = [_tree(child, depth + 1) for child in element]
    return [tag, attributes, *([text] if text else []), *children]


# ---- The page


def fill_template(data: Mapping[str, Any], blobs: Mapping[str, str]) -> str:
    """The page with what it shows. Its own script and style are allowed by their hashes,
    so that nothing else runs, whatever a model wrote."""
    template = (importlib.resources.files("klear_jax") / "report.html").read_text()
    style, script = (
        re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)[0]
        for tag in ("style", "script")
    )
    parts = {
        "STYLE_HASH": content_hash(style),
        "SCRIPT_HASH": content_hash(script),
        "DATA": embedded(data),
        "SAMPLES": "\n".join(
            f'<script type="text/plain" id="{name}">{blob}</script>'
            for name, blob in blobs.items()
        ),
    }
    return re.sub(r"\{\{([A-Z_]+)\}\}", lambda match: parts[match[1]], template)


def content_hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def embedded(data: Any) -> str:
    """JSON that no text in it can end: within <script>, '<' would begin markup."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def packed(data: Any) -> str:
    """JSON, gzip, base64; the same bytes for the same data."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # The chips may be busy with the run.
    config.run_main(main)
