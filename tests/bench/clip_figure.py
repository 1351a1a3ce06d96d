"""What the clip does to a token's gradient, drawn from `losses.policy_loss` itself.

    python -m tests.bench.clip_figure [--svg=tests/bench/clip.svg]

By the ratio of new to old probability, for both signs of the advantage A: the value F of a
token's loss -A F, and the slope G of its gradient -A G, by autodiff. Light and dark.
"""

import argparse
import dataclasses
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from klear_jax import losses

FILE = pathlib.Path(__file__).parent / "clip.svg"
LOW, HIGH = 0.2, 0.28  # Of the paper, as in configs/sections.py.
OLD_LOGP = (
    -3.0
)  # Any, for values do not depend on it but for CISPO's, which is not drawn.
KINDS = {
    "clip": {"kind": "clip_higher"},
    "cispo": {"kind": "cispo"},
    "ce": {"kind": "gppo", "beta_low": 0.25},
    "gppo": {"kind": "gppo"},
}
RATIOS = np.sort(
    [*np.linspace(1e-3, 2, 201), *(b + e for b in (1 - LOW, 1 + HIGH) for e in (-1e-5, 1e-5))]
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Panel:
    """Where ratio and F or G lie on the page, pixels; both go from 0 to 2."""

    left: float
    top: float = 92.0
    width: float = 322.0
    height: float = 250.0

    def x(self, ratio: float) -> float:
        return self.left + self.width * ratio / 2

    def y(self, value: float) -> float:
        return self.top + self.height * (1 - value / 2)


def curves(advantage: float, **kind) -> tuple[np.ndarray, np.ndarray]:
    """F and G at each of RATIOS."""

    def loss(logp):
        one = jnp.ones((1, 1))
        found, _ = losses.policy_loss(
            logp[None, None],
            OLD_LOGP * one,
            advantage * one,
            one,
            clip_low=LOW,
            clip_high=HIGH,
            **kind,
        )
        return found

    logp = jnp.asarray(OLD_LOGP + np.log(RATIOS), jnp.float32)
    value, slope = jax.vmap(jax.value_and_grad(loss))(logp)
    return -np.asarray(value) / advantage, -np.asarray(slope) / advantage


def path(panel: Panel, y: np.ndarray, name: str) -> list[str]:
    """A line through the corners of a curve, and dots where it jumps."""
    parts, lines = [], [[(RATIOS[0], y[0])]]
    for i in range(1, len(RATIOS)):
        if abs(y[i] - y[i - 1]) > 0.05:  # Neighbours are 0.01 apart.
            lines.append([])
            x, ends = panel.x(RATIOS[i]), (panel.y(y[i - 1]), panel.y(y[i]))
            parts.append(
                f'<path class="{name} jump" d="M{x:.1f} {ends[0]:.1f}V{ends[1]:.1f}"/>'
            )
        lines[-1].append((RATIOS[i], y[i]))
    d = ""
    for line in lines:
        x, y = np.array(line).T
        turns = np.abs(np.diff(np.diff(y) / np.diff(x))) > 0.01
        keep = np.flatnonzero([True, *turns, True])
        d += "M" + "L".join(f"{panel.x(x[i]):.1f} {panel.y(y[i]):.1f}" for i in keep)
    return [*parts, f'<path class="{name}" d="{d}"/>']


def text(x: float, y: float, what: str, style: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}" text-anchor="{anchor}">{what}</text>'


def draw(panel: Panel, advantage: float, title: str, clipped: tuple[float, float]):
    """Axes, the region beyond the clip, the value as a band, and all slopes."""
    left, right = (panel.x(ratio) for ratio in clipped)
    bottom, end = panel.y(0), panel.x(2)
    parts = [
        text(panel.left, panel.top - 14, title, "head"),
        f'<rect class="beyond" x="{left:.1f}" y="{panel.top:.1f}" '
        f'width="{right - left:.1f}" height="{panel.height:.1f}"/>',
        text((left + right) / 2, panel.top + 17, "beyond the clip", "soft", "middle"),
        f'<path class="axis" d="M{panel.left:.1f} {panel.top:.1f}V{bottom:.1f}H{end:.1f}"/>',
    ]
    for tick in (0, 1 - LOW, 1, 1 + HIGH, 2):
        x, y = panel.x(tick), panel.y(tick)
        parts += [
            f'<path class="axis" d="M{x:.1f} {bottom:.1f}v5"/>',
            f'<path class="axis" d="M{panel.left:.1f} {y:.1f}h-5"/>',
            text(x, bottom + 18, f"{tick:g}", "soft", "middle"),
            text(panel.left - 9, y + 4, f"{tick:g}", "soft", "end"),
        ]
    values, _ = curves(advantage, **KINDS["gppo"])
    others, _ = curves(advantage, **KINDS["clip"])
    np.testing.assert_array_equal(values, others)  # One band for both.
    parts += path(panel, values, "value")
    for name, kind in KINDS.items():
        _, slope = curves(advantage, **kind)
        parts += path(panel, slope, name)
    return parts


STYLE = """
text { font: 12px -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #24292f }
.title { font-size: 17px; font-weight: 600 }
.head { font-size: 14px; font-weight: 600 }
.soft { fill: #6e7781 }
.page { fill: #ffffff }
.beyond { fill: #8c959f; opacity: .13 }
path { fill: none; stroke-linejoin: round }
.axis { stroke: #8c959f }
.value { stroke: #8c959f; stroke-width: 11; opacity: .35 }
.clip { stroke: #cf222e; stroke-width: 3 }
.gppo { stroke: #0969da; stroke-width: 3 }
.ce { stroke: #0969da; stroke-width: 1.5; stroke-dasharray: 6 4 }
.cispo { stroke: #8250df; stroke-width: 1.5; stroke-dasharray: 2 3 }
.jump { stroke-width: 1; stroke-dasharray: 2 3; opacity: .7 }
.of-clip { fill: #cf222e; font-weight: 600 }
.of-gppo { fill: #0969da; font-weight: 600 }
.of-ce { fill: #0969da }
.of-cispo { fill: #8250df }
"""
DARK = """
text { fill: #e6edf3 }
.soft { fill: #9198a1 }
.page { fill: #0d1117 }
.clip { stroke: #ff7b72 }
.gppo, .ce { stroke: #58a6ff }
.cispo { stroke: #d2a8ff }
.of-clip { fill: #ff7b72 }
.of-gppo, .of-ce { fill: #58a6ff }
.of-cispo { fill: #d2a8ff }
"""


def svg() -> str:
    up, down = Panel(56), Panel(454)
    width, height = 800, 424
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}">',
        f"<style>{STYLE}@media (prefers-color-scheme: dark) {{{DARK}}}\n</style>",
        f'<rect class="page" width="{width}" height="{height}" rx="6"/>',
        text(
            24,
            32,
            "Beyond the clip a token teaches PPO nothing, and GPPO by the amount of the bound",
            "title",
        ),
        text(
            24,
            53,
            "Value and slope of a token's loss, by the ratio r of its new to its old "
            "probability. Its gradient is \N{MINUS SIGN}A \N{DOT OPERATOR} slope "
            "\N{DOT OPERATOR} \N{NABLA} log p.",
            "soft",
        ),
        *draw(up, 1.0, "A &gt; 0: make it likelier", (1 + HIGH, 2)),
        text(up.x(1.32), up.y(1.28) - 11, "GPPO keeps 1.28", "of-gppo"),
        text(up.x(1.32), up.y(0) - 9, "clip-higher: none", "of-clip"),
        text(up.x(0.04), up.y(0.8) - 8, "CISPO", "of-cispo"),
        *draw(down, -1.0, "A &lt; 0: make it less likely", (0, 1 - LOW)),
        text(down.x(0.04), down.y(0.8) - 11, "GPPO keeps 0.8", "of-gppo"),
        text(down.x(0.04), down.y(0.2) - 7, "CE-GPPO (0.25, 1)", "of-ce"),
        text(down.x(0.04), down.y(0) - 9, "clip-higher: none", "of-clip"),
        text(down.x(1.98), down.y(1.28) + 16, "CISPO", "of-cispo", "end"),
    ]  # fmt: skip
    for panel in (up, down):
        parts.append(text(panel.x(1), panel.y(0) + 36, "r", "soft", "middle"))
    y = height - 15
    for x, name, what in (
        (56, "value", "value: the same for both"),
        (300, "gppo", "slope of GPPO"),
        (490, "clip", "slope of PPO with clip-higher"),
    ):
        parts.append(f'<path class="{name}" d="M{x} {y - 4}h26"/>')
        parts.append(text(x + 34, y, what))
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--svg", default=FILE, type=pathlib.Path)
    parser.parse_args().svg.write_text(svg())


if __name__ == "__main__":
    main()
