"""The page of the studies, configs/study/README.md, with its figures, from the recorded runs.

    python -m tests.bench.study_page

Between `<!-- NAME -->` and `<!-- end -->` of the page stand the table and the figure of the study
NAME, and what the paper has; what is around them is written by hand, and stays.
"""

import pathlib
import re

import numpy as np

from configs.study import setting
from tests.bench import study

PAGE = pathlib.Path("configs/study/README.md")
MEASURE = "eval/avg@8"
BOOTSTRAP = 10_000
COLORS = "#0969da #cf222e #8250df #1a7f37 #bf8700 #6e7781 #d4a72c #0a3069 #a40e26 #512a97".split()


def main() -> None:
    text = PAGE.read_text()
    for name in re.findall(r"<!-- (\w+) -->", text):
        if name == "end":
            continue
        one = study.load(name)
        runs = study.recorded(one)
        if not runs:
            continue
        (study.RESULTS / f"{one.name}.svg").write_text(figure(one, runs))
        picture = f"![{one.question}](results/{one.name}.svg)"
        paper = f"The paper: {one.paper}."
        part = "\n\n".join(
            [table(one, runs), begin(runs), picture, paper, kinds(one, runs)]
        )
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)",
            lambda found, part=part: f"{found[1]}{part}\n{found[2]}",
            text,
            flags=re.DOTALL,
        )
    PAGE.write_text(text)


def of_variant(runs: dict, variant: str) -> dict[int, dict]:
    """The metrics of its runs, by seed."""
    return {
        seed: run["metrics"] for (v, seed), run in sorted(runs.items()) if v == variant
    }


def columns(one: setting.Study, runs: dict) -> dict[str, list[str]]:
    """The variants that have run by their rate, which stands behind a comma."""
    found: dict[str, list[str]] = {}
    for variant in one.variants:
        if of_variant(runs, variant):
            found.setdefault(variant.partition(", ")[2], []).append(variant)
    return found


def starts(runs: dict, name: str = "reward/correct") -> dict[int, float]:
    """The accuracy of each SFT checkpoint: of the samples that all runs from it draw first."""
    first: dict[int, list[float]] = {}
    for (_, seed), run in runs.items():
        found = first.setdefault(study.sft_seed(seed), [])
        found.append(run["metrics"][name][0])
    return {checkpoint: float(np.mean(values)) for checkpoint, values in first.items()}


def begin(runs: dict) -> str:
    """A sentence: where the checkpoints began, on which machines, for how long."""
    correct, any_correct = starts(runs), starts(runs, "reward/any_correct")
    found = ", ".join(
        f"{100 * correct[i]:.0f}% ({100 * any_correct[i]:.0f}%)"
        for i in sorted(correct)
    )
    seconds = np.median([run["seconds"] for run in runs.values()])
    cpus = ", ".join(sorted({run["cpu"] for run in runs.values()}))
    return (
        f"The SFT checkpoints begin with {found} right, of a prompt's eight samples at least one "
        f"in brackets. A run takes {seconds:.0f} s (median) on one core. CPU: {cpus}."
    )


def table(one: setting.Study, runs: dict) -> str:
    """A line a variant: how good, how sure, how much better than the first of its rate, how it
    went."""
    head = (
        "",
        "runs",
        "avg@8 at the end",
        "sd within a checkpoint",
        "less the first, paired",
        "collapsed",
        "entropy",
        "largest gradient, ratio (median)",
        "clipped low, high",
        "gradient mass low, high",
    )
    begun = starts(runs)
    lines = [head, ("---",) * len(head)]
    for variants in columns(one, runs).values():
        base = of_variant(runs, variants[0])
        for variant in variants:
            mine = base if variant == variants[0] else of_variant(runs, variant)
            lines.append(row(variant, mine, base, begun))
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def row(variant: str, mine: dict, base: dict, begun: dict[int, float]) -> tuple:
    ends = {seed: metrics[MEASURE][-1] for seed, metrics in mine.items()}
    both = sorted(ends.keys() & base.keys())
    pairs = np.array([ends[seed] - base[seed][MEASURE][-1] for seed in both])
    collapsed = sum(end < begun[study.sft_seed(seed)] for seed, end in ends.items())
    less = "" if mine is base or not pairs.any() else interval(pairs)
    return (
        variant,
        len(mine),
        interval(np.array(list(ends.values())), signed=False),
        spread(ends),
        less,
        collapsed,
        f"{median(mine, 'entropy', lambda x: x[-1]):.3f}",
        f"{median(mine, 'grad_norm_max', max):.1f}, {median(mine, 'ratio/max', max):.1f}",
        shares(mine, "clip_movable"),
        shares(mine, "grad_mass"),
    )


def kinds(one: setting.Study, runs: dict) -> str:
    """A line a variant: of each kind of token that could move, which share was beyond the
    bound, and the mean ratio (geometric) of these."""
    head = [f"{side}: {kind}" for side in ("low", "high") for kind in study.KINDS]
    lines = [["", *head], ["---"] * (1 + len(head))]
    for variant in one.variants:
        mine = [run["clipped"] for (name, _), run in runs.items() if name == variant]
        if mine:
            cells = (
                beyond([run[side][kind] for run in mine])
                for side in ("low", "high")
                for kind in study.KINDS
            )
            lines.append([variant, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def beyond(found: list[list[float]]) -> str:
    """Of `study.clipped`, one of each run: the share, and the ratio."""
    moved, count, _, log_ratio = np.array(found).T
    if not count.sum():
        return "0%"
    ratio = np.exp(np.average(log_ratio, weights=count))
    return f"{100 * count.sum() / moved.sum():.1f}%, {ratio:.2f}"


def interval(values: np.ndarray, *, signed: bool = True) -> str:
    """The mean in percent, with its 95% bootstrap interval over runs."""
    rng = np.random.default_rng(0)
    means = rng.choice(values, (BOOTSTRAP, len(values))).mean(axis=1)
    sign = "+" if signed else ""
    low, high = np.percentile(100 * means, [2.5, 97.5])
    return f"{100 * values.mean():{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


def spread(ends: dict[int, float]) -> str:
    """The standard deviation in percent of runs from the same checkpoint."""
    of: dict[int, list[float]] = {}
    for seed, end in ends.items():
        of.setdefault(study.sft_seed(seed), []).append(end)
    squares = sum(np.var(found) * len(found) for found in of.values())
    freedom = len(ends) - len(of)
    return f"{100 * np.sqrt(squares / freedom):.1f}" if freedom else ""


def median(mine: dict, name: str, over_steps) -> float:
    """Over the runs, of a number each; what is no number counts as infinite."""
    found = []
    for metrics in mine.values():
        values = [np.inf if x is None else x for x in metrics[name]]
        found.append(over_steps(values))
    return float(np.median(found))


def shares(mine: dict, name: str) -> str:
    """Low and high, mean over steps and runs."""
    found = [
        np.nanmean(
            [
                np.nanmean([np.nan if x is None else x for x in m[f"{name}/{side}"]])
                for m in mine.values()
            ]
        )
        for side in ("low", "high")
    ]
    return ", ".join(f"{100 * x:.1f}%" for x in found)


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


def figure(one: setting.Study, runs: dict) -> str:
    """Means over the runs of each variant, step by step, with the middle half of the runs."""
    rates = columns(one, runs)
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
            variant: np.array([m[metric] for m in of_variant(runs, variant).values()])
            for variants in rates.values()
            for variant in variants
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
