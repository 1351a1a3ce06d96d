"""The page of the studies, configs/study/README.md, with its figures, from the recorded runs.

    python -m tests.bench.study_page

Between `<!-- NAME -->` and `<!-- end -->` of the page stand the table and the figure of the study
NAME, and what the paper has; what is around them is written by hand, and stays.
"""

import itertools
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from scipy import stats

from configs.study import setting
from tests.bench import study

PAGE = pathlib.Path("configs/study/README.md")
MEASURE = "eval/avg@8"
BOOTSTRAP = 10_000
Runs = dict[str, dict[int, dict]]  # Variant -> seed -> what is recorded of the run.
COLORS = "#0969da #cf222e #8250df #1a7f37 #bf8700 #6e7781 #d4a72c #0a3069 #a40e26 #512a97".split()


def main() -> None:
    text = PAGE.read_text()
    for name in re.findall(r"<!-- (\w+) -->", text):
        if name == "end":
            continue
        one = study.load(name)
        found = study.recorded(one)
        runs = {
            variant: {
                seed: run for (v, seed), run in sorted(found.items()) if v == variant
            }
            for variant in one.variants
        }
        runs = {variant: mine for variant, mine in runs.items() if mine}
        if not runs:
            continue
        (study.RESULTS / f"{one.name}.svg").write_text(figure(one, runs))
        part = "\n\n".join(
            (
                outcomes(runs, study.starts(one.setting)),
                f"![{one.question}](results/{one.name}.svg)",
                f"The paper: {one.paper}.",
                courses(runs),
                kinds(runs),
                *places(runs),
                begin(runs, study.starts(one.setting)),
            )
        )
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)",
            lambda match, part=part: f"{match[1]}{part}\n{match[2]}",
            text,
            flags=re.DOTALL,
        )
    PAGE.write_text(text)


def by_rate(runs: Runs) -> dict[str, list[str]]:
    """The variants of each rate, which stands behind a comma; the first is the baseline."""
    found: dict[str, list[str]] = {}
    for variant in runs:
        found.setdefault(variant.partition(", ")[2], []).append(variant)
    return found


# ---- Tables


def outcomes(runs: Runs, starts: dict[int, dict]) -> str:
    """A line a variant: how good, and how much better than the first of its rate."""
    lines = [
        (
            "",
            "runs",
            "avg@8 at the end",
            "minus the first, paired",
            "of each checkpoint",
            "for other checkpoints",
            "would show",
            "ended below the start",
            "below half of it",
        )
    ]
    for variants in by_rate(runs).values():
        base = ends(runs[variants[0]])
        for variant in variants:
            mine = ends(runs[variant])
            pairs = {seed: mine[seed] - base[seed] for seed in mine if seed in base}
            less = ("", "", "", "") if variant == variants[0] else compared(pairs)
            begun = {seed: starts[study.sft_seed(seed)]["avg@8"] for seed in mine}
            lines.append(
                (
                    variant,
                    len(mine),
                    interval(mine, "{:.1f}"),
                    *less,
                    sum(mine[seed] < begun[seed] for seed in mine),
                    sum(mine[seed] < begun[seed] / 2 for seed in mine),
                )
            )
    return markdown(lines)


def ends(mine: dict[int, dict]) -> dict[int, float]:
    return {seed: run["metrics"][MEASURE][-1] for seed, run in mine.items()}


def compared(pairs: dict[int, float]) -> tuple[str, str, str, str]:
    """The difference with its interval for these checkpoints, of each of them, with its interval
    for others, and the least that so many pairs would show four times of five."""
    means = 100 * np.array([x.mean() for x in strata(pairs)])
    k = len(means)
    other = would_show = ""
    if k > 1:
        half = stats.t.ppf(0.975, k - 1) * means.std(ddof=1) / np.sqrt(k)
        other = f"{means.mean() - half:+.1f} to {means.mean() + half:+.1f}"
    freedom = len(pairs) - k
    if freedom > 0:
        squares = sum(((x - x.mean()) ** 2).sum() for x in strata(pairs))
        error = 100 * np.sqrt(squares / freedom / len(pairs))
        would_show = f"{stats.t.ppf([0.975, 0.8], freedom).sum() * error:.1f}"
    each = ", ".join(f"{x:+.1f}" for x in means)
    return interval(pairs, "{:+.1f}"), each, other, would_show


def strata(values: dict[int, float]) -> list[np.ndarray]:
    """The values of each SFT checkpoint's seeds."""
    found: dict[int, list[float]] = {}
    for seed, value in values.items():
        found.setdefault(study.sft_seed(seed), []).append(value)
    return [np.array(found[checkpoint]) for checkpoint in sorted(found)]


def interval(values: dict[int, float], form: str) -> str:
    """The mean over checkpoints in percent, with its 95% bootstrap interval over the runs of
    each of them."""
    rng = np.random.default_rng(0)
    means = np.zeros(BOOTSTRAP)
    for x in strata(values):
        drawn = rng.choice(x, (BOOTSTRAP, len(x))).mean(axis=1)
        # Drawn from n runs, a mean spreads too little, by (n - 1) / n.
        wider = np.sqrt(len(x) / max(len(x) - 1, 1))
        means += x.mean() + wider * (drawn - x.mean())
    means *= 100 / len(strata(values))
    mean = 100 * np.mean([x.mean() for x in strata(values)])
    low, high = np.percentile(means, [2.5, 97.5])
    return f"{form.format(mean)} ({form.format(low)} to {form.format(high)})"


def courses(runs: Runs) -> str:
    """A line a variant: how its runs went."""
    head = (
        "",
        "sd of runs from one checkpoint",
        "entropy in the last step",
        "largest gradient norm",
        "largest ratio, at most",
        "steps without an update",
        "clipped: low, high, dual",
        "gradient mass: low, high, dual",
    )
    lines = [head]
    for variant, mine in runs.items():
        metrics = [run["metrics"] for run in mine.values()]
        spread = np.sqrt(
            np.mean([x.var(ddof=min(1, len(x) - 1)) for x in strata(ends(mine))])
        )
        lines.append(
            (
                variant,
                f"{100 * spread:.1f}",
                f"{np.median([numbers(m, 'entropy')[-1] for m in metrics]):.3f}",
                f"{np.median([numbers(m, 'grad_norm_max').max() for m in metrics]):.1f}",
                f"{np.median([numbers(m, 'ratio/max').max() for m in metrics]):.0f}",
                sum(m["entropy"].count(None) for m in metrics),
                clipped(mine, metrics),
                percents(
                    np.mean([numbers(m, f"grad_mass/{side}").mean() for m in metrics])
                    for side in ("low", "high", "dual")
                ),
            )
        )
    return markdown(lines)


def numbers(metrics: dict, name: str) -> np.ndarray:
    """Of all steps that had an update."""
    return np.array([x for x in metrics[name] if x is not None])


def clipped(mine: dict[int, dict], metrics: list[dict]) -> str:
    """Shares of the tokens that could move, the same way for all losses: low of A < 0, high of
    A > 0 (CISPO clips both at both bounds)."""
    found = [
        np.array(
            [
                run["clipped"][side][kind]
                for run in mine.values()
                for kind in study.KINDS
            ]
        )
        for side in ("low", "high")
    ]
    movable = sum(x[:, 0].sum() for x in found)
    dual = np.mean([numbers(m, "clip_movable/dual").mean() for m in metrics])
    return percents([*(x[:, 1].sum() / movable for x in found), dual])


def percents(shares: Iterable[float]) -> str:
    return ", ".join(f"{100 * x:.2g}%" for x in shares)


def kinds(runs: Runs) -> str:
    """A line a variant: of each kind of token that could move, which share was beyond the
    bound, and the mean ratio (geometric) of these."""
    lines = [
        ["", *(f"{side}: {kind}" for side in ("low", "high") for kind in study.KINDS)]
    ]
    for variant, mine in runs.items():
        cells = (
            beyond([run["clipped"][side][kind] for run in mine.values()])
            for side in ("low", "high")
            for kind in study.KINDS
        )
        lines.append([variant, *cells])
    return markdown(lines)


def places(runs: Runs) -> Iterator[str]:
    """The table, of the variants of which it is recorded, if there are any: as `kinds`, by where
    in a chain the tokens stand, with the share of all beyond that bound in chains."""
    lines = [["", *(f"{side}: {x}" for side in ("low", "high") for x in study.PLACES)]]
    for variant, mine in runs.items():
        if not all("clipped_places" in run for run in mine.values()):
            continue
        cells = []
        for side in ("low", "high"):
            found = [run["clipped_places"][side] for run in mine.values()]
            counts = {x: sum(one[x][1] for one in found) for x in study.PLACES}
            for x, count in counts.items():
                share = 100 * count / max(sum(counts.values()), 1)
                cells.append(f"{beyond([one[x] for one in found])}, {share:.0f}%")
        lines.append([variant, *cells])
    if len(lines) > 1:
        yield markdown(lines)


def beyond(found: list[list[float]]) -> str:
    """Of `study.clipped`, one of each run: the share, and the ratio."""
    moved, count, _, log_ratio = np.array(found).T
    if not count.sum():
        return "0%"
    ratio = np.exp(np.average(log_ratio, weights=count))
    return f"{100 * count.sum() / moved.sum():.1f}%, {ratio:.2f}"


def begin(runs: Runs, starts: dict[int, dict]) -> str:
    """How many runs, where they began, on which machines, for how long."""
    every = [run for mine in runs.values() for run in mine.values()]
    cpus = ", ".join(sorted({run["cpu"] for run in every}))
    seconds = np.median([run["seconds"] for run in every])
    used = sorted({study.sft_seed(seed) for mine in runs.values() for seed in mine})
    found = ", ".join(
        f"{100 * starts[i]['avg@8']:.0f} ({100 * starts[i]['pass@8']:.0f})"
        for i in used
    )
    return (
        f"{len(every)} runs of {seconds:.0f} s (median) on one core, from checkpoints whose avg@8 "
        f"(pass@8) is {found}. CPU: {cpus}."
    )


def markdown(lines: Sequence[Sequence[Any]]) -> str:
    head, *rest = lines
    lines = [head, ["---"] * len(head), *rest]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


# ---- The figure: a panel for each learning rate, accuracy above and entropy below.

CURVES = {"reward/correct": "accuracy of the samples", "entropy": "entropy, nats"}
WIDTH, HEIGHT, LEFT, TOP = 380, 200, 50, 56
STYLE = """
text { font: 12px -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #24292f }
.head { font-weight: 600 }
.soft { fill: #6e7781 }
.page { fill: #ffffff }
path { fill: none; stroke-width: 2; stroke-linejoin: round }
.axis { stroke: #8c959f; stroke-width: 1; opacity: .3 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .soft { fill: #9198a1 } .page { fill: #0d1117 }
}
"""


def figure(one: setting.Study, runs: Runs) -> str:
    """Means over the runs of each variant, step by step, with the middle half of the runs."""
    rates = by_rate(runs)
    width = len(rates) * (LEFT + WIDTH + 20)
    bottom = TOP + len(CURVES) * (HEIGHT + TOP)
    height = bottom + 18 * max(map(len, rates.values()))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}">',
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{width}" height="{height}"/>',
    ]
    for row, (metric, label) in enumerate(CURVES.items()):
        found = {
            variant: np.array([filled(run["metrics"][metric]) for run in mine.values()])
            for variant, mine in runs.items()
        }
        # One scale for all columns, so that they can be compared.
        most = max(np.percentile(x, 75, axis=0).max() for x in found.values())
        top = 1.0 if metric == "reward/correct" else nice(most)
        for n, (rate, variants) in enumerate(rates.items()):
            place = (LEFT + n * (LEFT + WIDTH + 20), TOP + row * (HEIGHT + TOP))
            curves = {variant: found[variant] for variant in variants}
            parts += panel(*place, f"{rate or one.name}: {label}", curves, top)
    for n, variants in enumerate(rates.values()):
        names = [variant.partition(", ")[0] for variant in variants]
        parts += legend(LEFT + n * (LEFT + WIDTH + 20), bottom, names)
    return "\n".join([*parts, "</svg>"]) + "\n"


def filled(values: list[float | None]) -> list[float]:
    """A step without an update left the policy, and so its entropy, as it was."""
    return list(
        itertools.accumulate(values, lambda old, new: old if new is None else new)
    )


def nice(value: float) -> float:
    """The next of 1, 2, 4, 10, ... x a power of ten."""
    power = 10.0 ** np.floor(np.log10(value))
    return power * next(x for x in (1, 2, 4, 10) if x * power >= value)


def panel(
    left: float, top: float, title: str, curves: dict[str, np.ndarray], most: float
) -> list[str]:
    """`curves`: variant -> [runs, steps]; the axis goes from 0 to `most`."""
    steps = max(found.shape[1] for found in curves.values())

    def place(step: float, value: float) -> str:
        x = left + WIDTH * step / max(steps - 1, 1)
        return f"{x:.1f} {top + HEIGHT * (1 - min(value / most, 1)):.1f}"

    parts = [f'<text x="{left}" y="{top - 14}" class="head">{title}</text>']
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = top + HEIGHT * (1 - share)
        parts.append(f'<path class="axis" d="M{left} {y:.1f}h{WIDTH}"/>')
        parts.append(
            f'<text x="{left - 8}" y="{y + 4:.1f}" class="soft" text-anchor="end">'
            f"{share * most:.3g}</text>"
        )
    for n, found in enumerate(curves.values()):
        color = COLORS[n % len(COLORS)]
        low, high = np.percentile(found, [25, 75], axis=0)
        band = [place(t, x) for t, x in enumerate(low)]
        band += [place(t, x) for t, x in reversed(list(enumerate(high)))]
        middle = [place(t, x) for t, x in enumerate(found.mean(axis=0))]
        parts.append(
            f'<path d="M{"L".join(band)}Z" style="fill: {color}; opacity: .12"/>'
        )
        parts.append(f'<path d="M{"L".join(middle)}" stroke="{color}"/>')
    parts.append(
        f'<text x="{left + WIDTH / 2}" y="{top + HEIGHT + 18}" class="soft" '
        f'text-anchor="middle">{steps} rollout batches; mean, and the middle half of the '
        "runs</text>"
    )
    return parts


def legend(left: float, top: float, names: list[str]) -> list[str]:
    parts = []
    for n, name in enumerate(names):
        y = top + 18 * n
        color = COLORS[n % len(COLORS)]
        parts.append(f'<path d="M{left} {y - 4}h22" stroke="{color}"/>')
        parts.append(f'<text x="{left + 30}" y="{y}">{name}</text>')
    return parts


if __name__ == "__main__":
    main()
