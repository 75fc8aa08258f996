"""The benchmarks' page, from the files of results."""

import json
import statistics
from pathlib import Path
from typing import Any

from tests.bench.contest import Row, ratio

FOLDER = Path(__file__).parents[2] / "docs" / "benchmarks"
HEAD = (
    "| | {unit} | ratio | wanted | memory | parameters | GFLOP/image | of the peak | precision |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|---|"
)


def lines(case: dict[str, Any], peak: dict[str, float]) -> list[str]:
    """A case as rows of a table. On a CPU speeds hold for that machine and day alone; the ratio is what counts."""
    rows = [Row(**row) for row in case["rows"]]
    ours = rows[0]
    found = []
    for row in rows:
        reached = f"{ratio(ours, row):.2f}" if row is not ours else ""
        wanted = f"{case['wanted'][row.contender]:g}" if row.contender in case["wanted"] else ""
        rate = row.flops / statistics.median(row.seconds)
        best = max((v for name, v in peak.items() if name.endswith(row.precision)), default=0.0)
        share = f"{rate / best:.0%}" if row.flops else ""
        cells = [
            row.contender,
            f"{row.speed:.3g}",
            reached,
            wanted,
            f"{row.memory / 1e6:,.0f} MB",
            f"{row.parameters / 1e6:.1f} M" if row.parameters else "",
            f"{row.flops / row.images / 1e9:.3g}" if row.flops else "",
            share,
            row.precision,
        ]
        found.append("| " + " | ".join(cells) + " |")
    return found


def load(name: str) -> dict[str, Any] | None:
    """A device's results."""
    path = FOLDER / f"{name}.json"
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
    return found
