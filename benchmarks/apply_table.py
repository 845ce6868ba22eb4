"""The committed run of apply.py as a table for a page: python benchmarks/apply_table.py benchmarks/results/apply.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROWS, SAMPLES = (1, 128, 1024), (1, 10, 100, 1000)


def table(found: dict[str, Any]) -> list[str]:
    """The grid for a page: microseconds a sample, times as fast as the best rival, share of the bare arithmetic."""
    cells = {(row["task"], row["rows"], row["samples"]): row for row in found["compared"]}
    chosen = {(row["task"], row["rows"], row["samples"]): row["chosen"] for row in found["rows"] if "chosen" in row}
    lines = [
        "| module | B | " + " | ".join(f"S = {samples:,}" for samples in SAMPLES) + " | chosen at S = 100 |",
        "|---|---|" + "---|" * (len(SAMPLES) + 1),
    ]
    for task in dict.fromkeys(row["task"] for row in found["compared"]):
        for rows in ROWS:
            shown = []
            for samples in SAMPLES:
                cell = cells.get((task, rows, samples))
                if cell is None:
                    shown.append("not run")
                    continue
                shown.append(
                    f"{cell['microseconds_a_sample']:,.0f} · {cell['times_as_fast_as_best_rival']:.2f} · {cell['share_of_ceiling']:.2f}"
                )
            lines.append(
                f"| {task} | {rows:,} | " + " | ".join(shown) + f" | {chosen.get((task, rows, 100), 'not run')} |"
            )
    return lines


if __name__ == "__main__":
    print("\n".join(table(json.loads(Path(sys.argv[1]).read_text()))))
