"""How a GPPO step of the 8B model scales from 8 to 1,024 chips, on paper: `klear_jax.roofline`.

    JAX_NUM_CPU_DEVICES=1024 python -m tests.bench.scaling [--chip=v5p] [--svg=FILE]

Nothing is compiled or run: the least times of arithmetic, memory and links, as if they
overlapped, at the maker's rates; responses of half the limit. The mesh is fsdp x tensor, with
tensor 4 until every shard of the batch has one row of the update's, then 8.
"""

import argparse
import dataclasses
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from configs import gppo_8b
from klear_jax import plan, roofline
from klear_jax.sharding import Layout, make_mesh
from klear_jax.train import parse

PHASES = {"sample": "#4c72b0", "score": "#dd8452", "update": "#55a868"}


def step(chips, chip):
    """(mesh, {phase: (least seconds, share of sending)}) of a step."""
    task, c = parse(gppo_8b.get_config().to_dict())
    tensor = 4 if chips // 4 <= 128 else 8
    fsdp = chips // tensor
    c = dataclasses.replace(
        c,
        mesh=dataclasses.replace(c.mesh, data=1, fsdp=fsdp, tensor=tensor),
        micro_rows=fsdp,
        sampler=dataclasses.replace(c.sampler, num_slots=max(512, 8 * fsdp)),
    )
    layout = Layout(make_mesh(c.mesh, jax.devices()[:chips]), c.mesh.rules)
    found = {}
    for name, work in plan.step_work(task, c, layout).items():
        seconds = work.seconds(chip)
        found[name] = max(seconds.values()), seconds["send"] / sum(seconds.values())
    return (fsdp, tensor), found


def svg(rows, title):
    """Chip-seconds of each phase, stacked, one bar a number of chips; flat is perfect."""
    width, height, left, top = 670, 300, 90, 50
    most = max(chips * sum(s for s, _ in found.values()) for chips, _, found in rows)
    bar = (width - left) / len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width + 20} '
        f'{height + 110}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width + 20}" height="{height + 110}" fill="white"/>',
        f'<text x="{left}" y="20" font-size="14">{title}</text>',
    ]
    for i, (chips, mesh, found) in enumerate(rows):
        y = top + height
        x = left + i * bar
        for name, color in PHASES.items():
            seconds, _ = found[name]
            size = height * chips * seconds / most
            y -= size
            parts.append(
                f'<rect x="{x + 6:.1f}" y="{y:.1f}" width="{bar - 12:.1f}" '
                f'height="{size:.1f}" fill="{color}"/>'
            )
        total = sum(s for s, _ in found.values())
        share = sum(s * sent for s, sent in found.values()) / total
        middle = f'x="{x + bar / 2:.1f}" text-anchor="middle"'
        parts += [
            f'<text {middle} y="{y - 5:.1f}">{total:,.0f} s</text>',
            f'<text {middle} y="{top + height + 16}">{chips:,}</text>',
            f'<text {middle} y="{top + height + 31}" fill="#666">'
            f"{mesh[0]} x {mesh[1]}</text>",
            f'<text {middle} y="{top + height + 46}" fill="#666">{share:.0%}</text>',
        ]
    for i, (name, color) in enumerate(PHASES.items()):
        x = left + 90 * i
        parts.append(f'<rect x="{x}" y="26" width="10" height="10" fill="{color}"/>')
        parts.append(f'<text x="{x + 14}" y="35">{name}</text>')
    for row, text in enumerate(["chips", "fsdp x tensor", "sending"]):
        parts.append(f'<text x="8" y="{top + height + 16 + 15 * row}">{text}</text>')
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chip", default="v5p")
    parser.add_argument("--svg")
    args = parser.parse_args()
    chip = roofline.CHIPS[args.chip]
    rows = []
    print("chips  fsdp x tensor  sample  score  update  step, s  share of sending")
    for chips in (8, 16, 32, 64, 128, 256, 512, 1024):
        mesh, found = step(chips, chip)
        rows.append((chips, mesh, found))
        seconds = [found[name][0] for name in PHASES]
        share = sum(s * sent for s, sent in found.values()) / sum(seconds)
        print(
            f"{chips:5}  {mesh[0]:4} x {mesh[1]:<6}  "
            + " ".join(f"{s:7,.0f}" for s in seconds)
            + f" {sum(seconds):8,.0f} {share:8.0%}"
        )
    if args.svg:
        title = f"chip-seconds of a GPPO step of gppo_8b on {args.chip}, at least"
        with open(args.svg, "w") as file:
            file.write(svg(rows, title))


if __name__ == "__main__":
    main()
