"""Timing, and JSON with the machine, for the scripts beside this file."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bnn.cli.bench import machine


def seconds(run: Callable[[], Any], *, repeats: int = 7) -> float:
    """Median seconds of a function, after one run to warm up."""
    run()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def report(question: str, ours: dict[str, float], rivals: dict[str, float], unit: str, **facts: Any) -> None:
    """Print ratios first, then the figures behind them; write JSON where asked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(question)
    for mine, cost in ours.items():
        for rival, other in rivals.items():
            print(f"  {other / cost:6.2f} times faster: {mine} ({cost:.1f} {unit}) than {rival} ({other:.1f} {unit})")
    if options.json:
        found = {"question": question, "unit": unit, "ours": ours, "rivals": rivals, **facts, "machine": machine()}
        options.json.write_text(json.dumps(found, indent=2) + "\n")
