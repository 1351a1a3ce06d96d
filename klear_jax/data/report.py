"""What became of all rows of a data set, for the report: numbers, and a table to read."""

import json
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.parquet

from klear_jax.data.choosing import REASONS, Choice, Table
from klear_jax.data.samples import EXAMPLES, EXCERPT, PartReport

QUANTILES = (0, 50, 90, 99, 100)


def summarise(
    parts: Mapping[pathlib.Path, PartReport],
    table: Table,
    choice: Choice,
    sources: Sequence[str],
) -> dict[str, Any]:
    """The report as JSON values.

    Args:
      parts: file of clean samples -> report, in order.
      table: the clean samples of all parts.
      choice: what becomes of them.
      sources: names.
    """
    taken = choice.reason == 0
    summary: dict[str, Any] = {"sources": {}, "splits": {}}
    for number, source in enumerate(sources):
        mine = [report for report in parts.values() if report.source == source]
        here = table.source == number
        dropped = sum((Counter(report.dropped) for report in mine), Counter())
        for i, count in enumerate(np.bincount(choice.reason[here])):
            if i and count:
                dropped[REASONS[i]] = int(count)
        examples = _examples(mine, list(parts), table, choice, here)
        summary["sources"][source] = {
            "rows": sum(report.rows for report in mine),
            "bad": dict(sum((Counter(report.bad) for report in mine), Counter())),
            "dropped": dict(dropped),
            "taken": int((here & taken).sum()),
            "tokens": int(table.num_tokens[here & taken].sum()),
            "judged": {
                name: int((here & (table.right == value)).sum())
                for name, value in (("right", 1), ("wrong", 0), ("not judged", -1))
            },
            "bad_rows": [line for report in mine for line in report.named],
            "examples": examples,
        }
    for number, split in enumerate(choice.splits):
        here = taken & (choice.split == number)
        if here.any():
            lengths = table.num_tokens[here]
            summary["splits"][split] = {
                "samples": int(here.sum()),
                "tokens": int(lengths.sum()),
                "lengths": {f"{q}%": int(np.percentile(lengths, q)) for q in QUANTILES},
            }
    return summary


def _examples(
    mine: Sequence[PartReport],
    files: Sequence[pathlib.Path],
    table: Table,
    choice: Choice,
    here: np.ndarray,
) -> dict[str, list[dict[str, str]]]:
    """The first rows that each reason kept out."""
    examples: dict[str, list[dict[str, str]]] = {}
    for report in mine:
        for reason, found in report.examples.items():
            seen = examples.setdefault(reason, [])
            seen += found[: EXAMPLES - len(seen)]
    for number, reason in enumerate(REASONS):
        for i in (
            np.nonzero(here & (choice.reason == number))[0][:EXAMPLES] if number else ()
        ):
            read = pyarrow.parquet.read_table(
                files[table.part[i]], columns=["origin", "messages"]
            )
            [row] = read.slice(int(table.row[i]), 1).to_pylist()
            detail = f"pass rate {choice.pass_rate[i]:.3f}" if "rate" in reason else ""
            text = json.loads(row["messages"])[-1]["content"][:EXCERPT]
            examples.setdefault(reason, []).append(
                {"origin": row["origin"], "detail": detail, "prompt": text}
            )
    return examples


def reasons(summary: Mapping[str, Any]) -> str:
    """Why rows were left out, in one line, the most frequent reason first."""
    counts: Counter[str] = Counter()
    for one in summary["sources"].values():
        counts += Counter(one["bad"]) + Counter(one["dropped"])
    return ", ".join(f"{reason} ({count})" for reason, count in counts.most_common())


def as_markdown(summary: Mapping[str, Any]) -> str:
    """Tables: reasons by source, and splits."""
    sources = summary["sources"]
    lines = [_row("", *sources), _row(*["---"] * (len(sources) + 1))]
    lines.append(_row("rows", *(one["rows"] for one in sources.values())))
    for kind in ("bad", "dropped"):
        for reason in dict.fromkeys(r for one in sources.values() for r in one[kind]):
            counts = (one[kind].get(reason, 0) for one in sources.values())
            lines.append(_row(f"{kind}: {reason}", *counts))
    lines.append(_row("**taken**", *(one["taken"] for one in sources.values())))
    lines.append(_row("their tokens", *(one["tokens"] for one in sources.values())))
    if any(one["judged"]["right"] + one["judged"]["wrong"] for one in sources.values()):
        for name in ("right", "wrong", "not judged"):
            counts = (one["judged"][name] for one in sources.values())
            lines.append(_row(f"clean, and {name}", *counts))
    splits = summary["splits"]
    lines += ["", _row("split", "samples", "tokens", *(f"{q}%" for q in QUANTILES))]
    lines.append(_row(*["---"] * (len(QUANTILES) + 3)))
    for split, one in splits.items():
        counts = (one["samples"], one["tokens"], *one["lengths"].values())
        lines.append(_row(split, *counts))
    return "\n".join(lines) + "\n"


def _row(*cells: Any) -> str:
    shown = (
        f"{cell:,}" if isinstance(cell, int) else cell.replace("|", "\\|")
        for cell in cells
    )
    return f"| {' | '.join(shown)} |"


def write(folder: pathlib.Path, summary: Mapping[str, Any]) -> None:
    """report.json, and report.md with examples."""
    text = json.dumps(summary, indent=2) + "\n"
    (folder / "report.json").write_text(text)
    lines = [as_markdown(summary)]
    for source, one in summary["sources"].items():
        for line in one["bad_rows"]:
            lines.append(f"- {source}, bad: {line}")
        for reason, found in one["examples"].items():
            for row in found:
                text = " ".join(row["prompt"].split())
                lines.append(
                    f"- {source}, {reason}: {row['origin']} {row['detail']} `{text}`"
                )
    (folder / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
