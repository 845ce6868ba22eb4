"""Where the time of a single call goes that is slower than assigning the same sample to the module.

    python benchmarks/apply_profile.py --json benchmarks/results/apply_profile.json

The parts of `net(x, index)` are timed one by one, on the modules and rows of `apply.py` where a call takes less than a
millisecond: the least of many runs each, so that they add up to about the whole. "module, assigned" is the rival, a loop
that sets `param.data` and calls the module.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from apply import deep, setting_of
from apply_tasks import tasks

import bnn
from bnn.cli.bench import machine
from bnn.functional.guarding import guarded

REPEATS = 2000


def least(run: Callable[[], Any]) -> float:
    """Microseconds of the quickest of many runs."""
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best * 1e6


def profile(module: torch.nn.Module, bank: bnn.Bank, x: torch.Tensor) -> dict[str, float]:
    """Microseconds of a call, of its parts, and of the rival."""
    net = bnn.FunctionalModel(module, bank, strategy="loop", compile=False)
    runner, own = net._whole, copy.deepcopy(module)
    net(x, 0)
    params = net.params(0)
    shell = runner.skeleton.shell()
    values = runner.skeleton.values(shell, params, net.device)

    def assigned() -> torch.Tensor:
        for name, parameter in own.named_parameters():
            parameter.data = params[name]
        return own(x)

    return {
        "net(x, 0)": least(lambda: net(x, 0)),
        "sample from the bank": least(lambda: bank[0]),
        "its dtypes and device": least(lambda: net._taken(params)),
        "modes, and whether it draws": least(runner.draws),
        "gradients and transforms": least(lambda: net._needs_python(x, params)),
        "versions before and after": least(lambda: guarded(params, x, lambda: None)),
        "a tensor for every slot": least(lambda: runner.skeleton.values(shell, params, net.device)),
        "slots filled, module, slots emptied": least(lambda: runner.skeleton.run(shell, values, x)),
        "module alone": least(lambda: own(x)),
        "module, assigned": least(assigned),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with torch.no_grad():
        for task in tasks():
            if task.name.startswith("ResNet"):
                continue
            setting = setting_of(task, "cpu")
            found = profile(
                setting.module, setting.bank, torch.randn(1, *task.shape, generator=torch.Generator().manual_seed(1))
            )
            rows.append({"task": task.name, "rows": 1, "microseconds": found})
            print(task.name + ": " + ", ".join(f"{name} {value:.1f}" for name, value in found.items()))
    layers = [deep() for _ in range(3)]
    print("sixty layers over plain:", layers)
    if options.json is not None:
        told = {"machine": machine(), "rows": rows, "sixty_layers_over_plain": layers}
        options.json.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
