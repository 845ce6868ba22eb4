"""What `bnn demo` finds and how long it takes, as JSON with the machine: python benchmarks/demo.py FILE."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from bnn.cli import run
from bnn.cli.bench import machine


def main() -> None:
    target = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        if run(["demo", "--out", f"{folder}/demo"]) != 0:
            sys.exit("the demo failed")
        seconds = time.perf_counter() - start
        reports = json.loads(Path(folder, "demo", "report.json").read_text())["reports"]
    figures = {
        bank: {name: figure["value"] for name, figure in report["metrics"].items()} for bank, report in reports.items()
    }
    target.write_text(json.dumps({"seconds": seconds, "banks": figures, "machine": machine()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
