"""What one rank does with a bank that is there; run as a script, once a rank, by `ranked.launch` or by torchrun."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import bnn
from bnn import distributed
from bnn.errors import BnnError
from bnn.evaluation import Report
from bnn.layout import Entry, layout_of
from bnn.likelihoods import SCALE, Categorical, Gaussian, Likelihood, Poisson
from bnn.types import make_block

S, N, D, C, M = 43, 29, 3, 4, 13  # M rows outside
BATCH = 8  # four batches, of which the last is short


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def net(likelihood: Likelihood, outputs: int = C) -> bnn.FunctionalModel:
    """Under a bank of two chains, whose samples have weights of their own."""
    module = nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, outputs)).double()
    scales = [Entry(SCALE, (), torch.float64)] if isinstance(likelihood, Gaussian) else []
    layout = layout_of(module, extra=scales)
    params = {e.name: 0.7 * random(S, *e.shape, seed=place) for place, e in enumerate(layout.entries)}
    if scales:
        params[SCALE] = 0.3 + 0.1 * torch.arange(S, dtype=torch.float64) / S
    number = torch.arange(S)
    block = make_block(params, chain=number % 2, draw=number // 2, log_weight=0.5 * random(S, seed=99))
    info = {"likelihood": likelihood.to_config(), "method": {"name": "hmc", "options": {}}}
    return bnn.FunctionalModel(module, bnn.Bank.from_blocks([block], layout=layout, info=info)).settled()


class Pairs(Dataset[Any]):
    """Rows that are drawn anew whenever they are asked for, by the global stream."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.x[row] + 0.01 * torch.randn(D), self.y[row]


def classes() -> tuple[Tensor, Tensor]:
    return random(N, D, seed=1), torch.arange(N) * 7 % C


def numbers() -> tuple[Tensor, Tensor]:
    return random(N, D, seed=2), random(N, 2, seed=3)


def of_classes(**options: Any) -> Report:
    x, y = classes()
    shifts = {"moved": {1: (x + 0.5, y), 3: (x - 1.0, y)}}
    ood = 3.0 * random(M, D, seed=4), torch.zeros(M)
    return bnn.evaluate(net(Categorical()), (x, y), ood=ood, shifts=shifts, num_bins=6, batch_size=BATCH, **options)


def of_data_set(**options: Any) -> Report:
    return bnn.evaluate(net(Categorical()), Pairs(*classes()), num_bins=6, batch_size=BATCH, **options)


def of_loader(**options: Any) -> Report:
    loader = DataLoader(TensorDataset(*classes()), batch_size=12)
    return bnn.evaluate(net(Categorical()), loader, num_bins=6, figures="basic", **options)


def of_targets(**options: Any) -> Report:
    return bnn.evaluate(net(Gaussian(), 2), numbers(), loc=1.5, scale=2.0, batch_size=BATCH, **options)


def of_counts(**options: Any) -> Report:
    x, y = numbers()
    return bnn.evaluate(net(Poisson(), 2), (x, y.abs().round()), batch_size=5, **options)


def of_few(**options: Any) -> Report:
    """Two rows in one batch: most ranks have none."""
    x, y = classes()
    return bnn.evaluate(net(Categorical()), (x[:2], y[:2]), num_bins=6, **options)


REPORTS: dict[str, Callable[..., Report]] = {
    "classes": of_classes,
    "data set": of_data_set,
    "loader": of_loader,
    "targets": of_targets,
    "counts": of_counts,
    "few": of_few,
}


def told(report: Report) -> dict[str, Any]:
    """Everything that a report says but for the time it took."""
    return {
        "metrics": {name: figure._asdict() for name, figure in report.metrics.items()},
        "curves": json.loads(json.dumps(report.curves, default=lambda value: value.tolist())),
        "rows": {name: values.tolist() for name, values in report.rows.items()},
        "outside": {name: values.tolist() for name, values in report.outside.items()},
        "diagnosis": None if report.diagnosis is None else report.diagnosis.text,
        "shape": [report.num_rows, report.num_samples, report.num_chains],
    }


def evaluations(out: str, *meshes: str) -> None:
    """All reports under each mesh, one file a rank."""
    warnings.simplefilter("ignore")
    with distributed.joined() as together:
        found = {}
        for mesh in meshes:
            shape = (int(mesh[0]), int(mesh[2]))
            found[mesh] = {name: told(make(mesh=shape)) for name, make in REPORTS.items()}
        (Path(out) / f"{together.rank}.json").write_text(json.dumps(found))


def of_rows(together: distributed.Ranks, mesh: tuple[int, int] | None = None) -> dict[str, Any]:
    """Predictives of one batch, of a data set and of two rows."""
    shared: dict[str, Any] = {"ranks": together, "mesh": mesh}
    tolerance = None if mesh else 0.2
    x, y = classes()
    own, of_numbers = net(Categorical()), net(Gaussian(), 2)
    data = TensorDataset(torch.cat([x] * 40), torch.cat([y] * 40))  # three batches of 512, of 1,160 rows
    levels = (0.25, 0.9)
    return {
        "batch": bnn.predict(own, x, **shared, quantiles=levels, outputs=True),
        "data set": bnn.predict(own, data, **shared, tolerance=tolerance),
        "targets": bnn.predict(of_numbers, x, **shared, loc=1.5, scale=2.0, quantiles=levels),
        "few": bnn.predict(own, x[:2], **shared),
    }


def predictions(out: str, *meshes: str) -> None:
    """Predictives, without a mesh and under each, one file a rank, and what is said of a tolerance."""
    with distributed.joined() as together:
        found: dict[str, Any] = {name: plain(predictive) for name, predictive in of_rows(together).items()}
        try:
            bnn.predict(net(Categorical()), classes()[0], ranks=together, tolerance=0.2)
        except BnnError as error:
            found["tolerance"] = str(error)
        for mesh in meshes:
            shape = (int(mesh[0]), int(mesh[2]))
            found[mesh] = {name: plain(predictive) for name, predictive in of_rows(together, shape).items()}
            try:
                bnn.predict(net(Categorical()), classes()[0], ranks=together, mesh=(shape[0], 2 * shape[1]))
            except BnnError as error:
                found[f"{mesh} refused"] = str(error)
        (Path(out) / f"{together.rank}.json").write_text(json.dumps(found))


def plain(predictive: Any) -> dict[str, Any]:
    tensors = {name: value.tolist() for name, value in predictive._asdict().items() if isinstance(value, Tensor)}
    return {**tensors, **{str(level): value.tolist() for level, value in predictive.quantiles.items()}}


def command_lines(*lines: str) -> None:
    """`python -m bnn` with each line, one after the other as one process of a rank."""
    from bnn import cli

    for line in lines[:-1]:
        code = cli.run(line.split())
        assert code == 0, line
    cli.main(lines[-1].split())


def refusals() -> None:
    """What is said where ranks differ, or a batch cannot be judged: one line a case, on every rank."""
    said: list[str] = []
    with distributed.joined() as together:
        odd = together.rank == 1
        x, y = classes()
        own = net(Categorical())
        one = torch.arange(N)[:, None] == 20  # in the batch of rank 0, the third
        cases: list[tuple[Any, Any, dict[str, Any]]] = [
            (own, (x + 1e-9 * odd, y), {}),
            (own, (x, y), {"num_bins": 5 + odd}),
            (net(Categorical(), C + odd), (x, y), {}),
            (own, (x, y), {"mesh": (2, 2)}),
            (own, DataLoader(TensorDataset(torch.where(one, torch.nan, x), y), batch_size=BATCH), {}),
            (own, (x, y), {"ood": (x[:, :2], y)}),
        ]
        for model, data, options in cases:
            try:
                bnn.evaluate(model, data, batch_size=BATCH, **options)
                said.append("nothing")
            except BnnError as error:
                said.append(f"{type(error).__name__}: {error}")
    say(json.dumps(said))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
