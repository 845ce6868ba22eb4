"""Two ranks against one, with one thread each: what chains, a guide and an evaluation gain.

    python benchmarks/scaling.py --json benchmarks/results/scaling.json

efficiency = T_1 / (2 T_2) of the same work, timed inside the processes: start-up does not count. The rival is the ceiling: two
processes that know nothing of each other do the whole work each, at once; two cores that share a memory or a clock are
slower then than one alone, and T_1 / T_both is what any way of splitting could reach. Of several rounds the least seconds of each way
count: what else the machine does only adds to them. Seconds of the processor, of rank 0, tell how much
of what is lost is work done twice, and what else runs does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bnn.cli.bench import machine

WORK = Path(__file__).parent / "peers" / "scaling_rank.py"


def processes(folder: Path, *commands: list[str]) -> list[dict[str, Any]]:
    """Run commands side by side; what each told."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen(command, env=environment) for command in commands]
    if any(process.wait(timeout=900) for process in started):
        raise SystemExit("a process failed")
    return [json.loads((folder / f"told-{number}.json").read_text()) for number in range(len(commands))]


def one(folder: Path) -> list[dict[str, Any]]:
    return processes(folder, [sys.executable, str(WORK), str(folder)])


def two(folder: Path) -> list[dict[str, Any]]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    return processes(folder, [*launch, "--rdzv-endpoint", "127.0.0.1:0", str(WORK), str(folder)])


def beside(folder: Path) -> list[dict[str, Any]]:
    return processes(folder, *([sys.executable, str(WORK), str(folder), str(number), "2"] for number in range(2)))


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
        "| work | one process | two ranks | efficiency | ceiling | bytes of a rank a step |",
        "|---|---|---|---|---|---|",
    ]
    for row in run["rows"]:
        sent = "" if row["sent_a_step"] is None else f"{row['sent_a_step']:,.1f}"
        times = f"{row['one']:.2f} s | {row['two']:.2f} s | {row['efficiency']:.0%} | {row['ceiling']:.0%}"
        lines.append(f"| {row['work']} | {times} | {sent} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=1, help="of one process, two ranks, and two processes")
    options = parser.parse_args()
    told: dict[str, list[list[dict[str, Any]]]] = {"one": [], "two": [], "beside": []}
    for _ in range(options.rounds):
        for name, way in (("one", one), ("two", two), ("beside", beside)):
            with tempfile.TemporaryDirectory() as folder:
                told[name].append(way(Path(folder)))
    rows = []
    for name in [name for name in told["one"][0][0] if name != "sent"]:
        took, processor = (
            {way: min(max(t for each in run for t in each[name][kind]) for run in runs) for way, runs in told.items()}
            for kind in ("seconds", "processor")
        )
        check(name, told["one"][0][0][name]["figures"], told["two"][0][0][name]["figures"])
        counts = told["two"][0][0]["sent"].get(name)
        row = {
            "work": name,
            "one": took["one"],
            "two": took["two"],
            "beside": took["beside"],
            "efficiency": took["one"] / (2 * took["two"]),
            "ceiling": took["one"] / took["beside"],
            "processor_efficiency": processor["one"] / (2 * processor["two"]),
            "sent_a_step": counts[0] if counts else None,
            "model_a_step": counts[1] if counts else None,
        }
        rows.append(row)
        sent = f"; {counts[0]:,.1f} bytes of a rank a step, the model says {counts[1]:,.1f}" if counts else ""
        print(
            f"{row['efficiency']:.0%} efficiency, {row['ceiling']:.0%} the ceiling, {row['processor_efficiency']:.0%} by seconds "
            f"of the processor: {name}, {took['one']:.2f} s in one process, "
            f"{took['two']:.2f} s on two ranks, {took['beside']:.2f} s beside another{sent}"
        )
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "machine": machine()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
