"""Two ranks against one, with one thread each: what chains, a guide and an evaluation gain.

    python benchmarks/scaling.py --json benchmarks/results/scaling.json

efficiency = T_1 / (2 T_2) of the same work, timed inside the processes: start-up does not count. The rival is the ceiling: two
processes that know nothing of each other do the whole work each, at once; two cores that share a memory or a clock are
slower then than one alone, and T_1 / T_both is what a split could reach whose parts need as much memory as the whole. The three
ways follow each other turn by turn in the same processes, for a machine that is shared changes its speed from minute to minute; medians over turns count, of ratios too. Beside
them stands what `bnn bank plan --ranks 2` foresees from two short trials in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from bnn.cli.bench import machine

WORK = Path(__file__).parent / "peers" / "scaling_rank.py"


def told_by_ranks(turns: int) -> list[dict[str, Any]]:
    """What each of two ranks told."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    with tempfile.TemporaryDirectory() as folder:
        command = [*launch, "--rdzv-endpoint", "127.0.0.1:0", str(WORK), folder, str(turns)]
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
        return [json.loads((Path(folder) / f"told-{rank}.json").read_text()) for rank in range(2)]


def foreseen() -> dict[str, float]:
    """Efficiencies of two ranks that a plan foresees, by work."""
    command, environment = [sys.executable, str(WORK), "plan"], {**os.environ, "OMP_NUM_THREADS": "1"}
    found: dict[str, float] = json.loads(
        subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout
    )
    return found


def check(name: str, alone: dict[str, float], split: dict[str, float]) -> None:
    """The same work was done: figures to rounding, draws of chains within four standard errors of their last mean."""
    for figure, value in alone.items():
        if figure == "spread":
            continue
        error = 4.0 * alone["spread"] * (2.0 / 8.0) ** 0.5 if figure == "log_joint" else 1e-3 * max(1.0, abs(value))
        if not abs(split[figure] - value) <= error:
            raise SystemExit(f"{name}: two ranks give {figure} {split[figure]}, one gives {value}")


def table(run: dict[str, Any]) -> list[str]:
    """Rows of the page on ranks."""
    lines = [
        "| work | one process | two ranks | efficiency | turn by turn | ceiling | planned | bytes of a rank a step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in run["rows"]:
        sent = "" if row["sent_a_step"] is None else f"{row['sent_a_step']:,.1f}"
        planned = "" if row["planned"] is None else f"{row['planned']:.0%}"
        each = [took["one"] / (2 * took["two"]) for took in row["turns"]]
        times = (
            f"{row['one']:.2f} s | {row['two']:.2f} s | {row['efficiency']:.0%} | {min(each):.0%} to {max(each):.0%}"
        )
        lines.append(f"| {row['work']} | {times} | {row['ceiling']:.0%} | {planned} | {sent} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--turns",
        type=int,
        default=5,
        help="of each long work and way, after one that warms up; of short ones three times as many",
    )
    options = parser.parse_args()
    plan = foreseen()
    ours, other = told_by_ranks(options.turns)
    rows = []
    for name in [name for name in ours if name != "sent"]:
        check(name, *ours[name]["figures"])
        turns = [
            {**took, **{way: max(took[way], beside[way]) for way in ("two", "beside")}}
            for took, beside in zip(ours[name]["turns"], other[name]["turns"], strict=True)
        ]
        counts = ours["sent"].get(name)
        row = {
            "work": name,
            **{way: median(took[way] for took in turns) for way in ("one", "two", "beside")},
            "efficiency": median(took["one"] / (2 * took["two"]) for took in turns),
            "ceiling": median(took["one"] / took["beside"] for took in turns),
            "planned": plan.get(name),
            "sent_a_step": counts[0] if counts else None,
            "model_a_step": counts[1] if counts else None,
            "turns": turns,
        }
        rows.append(row)
        planned = f", {row['planned']:.0%} planned" if row["planned"] else ""
        sent = f"; {counts[0]:,.1f} bytes of a rank a step, the model says {counts[1]:,.1f}" if counts else ""
        each = ", ".join(f"{took['one'] / (2 * took['two']):.0%}" for took in turns)
        print(
            f"{row['efficiency']:.0%} efficiency ({each}), {row['ceiling']:.0%} the ceiling{planned}: {name}, {row['one']:.2f} s in one "
            f"process, {row['two']:.2f} s on two ranks, {row['beside']:.2f} s beside another{sent}"
        )
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "machine": machine()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
