"""A step of mean-field variational inference in `posteriors`, for guides.py, in an environment of its own.

Prints one JSON object, seconds a step by module. Knows nothing of bnn.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings

warnings.filterwarnings("ignore")

import posteriors  # noqa: E402
import torch  # noqa: E402
import torchopt  # noqa: E402
from torch import nn  # noqa: E402


def mlp(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)
    )  # fmt: skip


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def step_of(module: nn.Module, shape: list[int], rows: int, batch: int):
    """One update with one draw, batch included."""
    source = torch.Generator().manual_seed(0)
    x, y = torch.randn(rows, *shape, generator=source), torch.randint(10, (rows,), generator=source)

    def log_posterior(params, data):
        logits = torch.func.functional_call(module, params, (data[0],))
        prior = posteriors.diag_normal_log_prob(params, sd_diag=1.0)
        return -nn.functional.cross_entropy(logits, data[1]) + prior / rows, torch.tensor([])

    transform = posteriors.vi.diag.build(
        log_posterior, torchopt.adam(lr=0.01), temperature=1 / rows, n_samples=1, init_log_sds=-3.0
    )
    state = transform.init(dict(module.named_parameters()))

    def step() -> None:
        nonlocal state
        chosen = torch.randint(rows, (batch,), generator=source)
        state, _ = transform.update(state, (x[chosen], y[chosen]))

    return step


def main() -> None:
    rows, batch, steps, repeats = map(int, sys.argv[1:5])
    modules = {"mlp-9k": (mlp(64), [64]), "mlp-100k": (mlp(280), [64]), "cnn": (cnn(), [1, 8, 8])}
    found = {}
    for name, (module, shape) in modules.items():
        step, seconds = step_of(module, shape, rows, batch), []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            for _ in range(steps):
                step()
            seconds.append((time.perf_counter() - start) / steps)
        found[name] = statistics.median(seconds[1:])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
