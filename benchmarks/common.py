"""Timing, and JSON with the machine, for the scripts beside this file."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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


class Pair(NamedTuple):
    """The same work done by us and by a rival, and what it costs each."""

    ours: str
    rival: str
    our_cost: float
    rival_cost: float


def report(question: str, pairs: list[Pair], unit: str) -> None:
    """Print ratios first, then the figures behind them; write JSON where asked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(question)
    for pair in pairs:
        ratio = pair.rival_cost / pair.our_cost
        print(
            f"  {ratio:6.2f} times as fast: {pair.ours} ({pair.our_cost:.1f} {unit}) as {pair.rival} ({pair.rival_cost:.1f} {unit})"
        )
    if options.json:
        rows = [{**pair._asdict(), "ratio": pair.rival_cost / pair.our_cost} for pair in pairs]
        found = {"question": question, "unit": unit, "rows": rows, "machine": machine()}
        options.json.write_text(json.dumps(found, indent=2) + "\n")
