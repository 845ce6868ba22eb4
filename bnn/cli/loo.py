"""bnn bank loo, bnn bank stack: how banks would predict rows that they have not seen, and the best mixture of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bnn.cli import common, reading

if TYPE_CHECKING:
    from bnn.bank import Bank
    from bnn.data import DataSet
    from bnn.evaluation import Pointwise
    from bnn.types import Batch

Data = Annotated[
    str | None, typer.Option(help="The data that the bank was fitted to. [default: the bank's]", show_default=False)
]


def loo(
    bank: reading.BankArgument,
    data: Data = None,
    model: reading.Model = None,
    out: Annotated[
        Path | None,
        typer.Option(help="File for the log likelihood [S, N], safetensors.", metavar="FILE", show_default=False),
    ] = None,
    overwrite: common.Overwrite = False,
    device: reading.Device = "cpu",
    residency: reading.Residency = "mapped",
    host_budget: reading.HostBudget = None,
    device_budget: reading.DeviceBudget = None,
    cache: reading.Cache = None,
    data_root: common.DataRoot = None,
    trust: common.Trust = False,
    allow_other_device: reading.AllowOtherDevice = False,
    debug: common.Debug = False,
) -> None:
    """Leave-one-out cross-validation and WAIC of a bank, on the rows that it was fitted to."""
    del debug
    from bnn import evaluation

    common.check_device(device)
    opened = reading.open_bank(
        bank,
        residency=residency,
        device=device,
        host_budget=host_budget,
        device_budget=device_budget,
        cache=cache,
        allow_other_device=allow_other_device,
    )
    dataset = common.data_of(opened, data=data, root=data_root, split=None, trust=trust)
    rows = _seen(opened, dataset)
    values = _values(opened, dataset, rows, model=model, trust=trust, device=device, out=out, overwrite=overwrite)
    typer.echo(str(evaluation.loo(values)))
    typer.echo(str(evaluation.waic(values)))


def stack(
    bank: Annotated[
        list[str], typer.Argument(help="Folders of two banks or more, or their addresses.", metavar="BANK BANK...")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the new bank.")],
    data: Data = None,
    model: reading.Models = None,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Weigh by the test rows, not by leaving out training rows.")
    ] = False,
    overwrite: common.Overwrite = False,
    device: reading.Device = "cpu",
    residency: reading.Residency = "mapped",
    host_budget: reading.HostBudget = None,
    device_budget: reading.DeviceBudget = None,
    cache: reading.Cache = None,
    data_root: common.DataRoot = None,
    trust: common.Trust = False,
    allow_other_device: reading.AllowOtherDevice = False,
    debug: common.Debug = False,
) -> None:
    """Weigh banks so that together they predict unseen rows best, and put their samples into a new one."""
    del debug
    import torch

    from bnn import evaluation
    from bnn.cli.show import plain, show_bank
    from bnn.errors import BankExists, ConfigError

    if len(bank) < 2:
        raise ConfigError("banks", want="at least two", got=str(len(bank)), fix="name the banks to be stacked")
    if (out / "bank.json").exists() and not overwrite:  # before long work
        raise BankExists(str(out), want="a new folder", got="a bank, which is kept", fix="say --overwrite")
    common.check_device(device)
    opened = reading.open_banks(
        bank,
        residency=residency,
        device=device,
        host_budget=host_budget,
        device_budget=device_budget,
        cache=cache,
        allow_other_device=allow_other_device,
    )
    common.check_same_data(opened)
    said = common.models_of(opened, model)
    densities, told = [], []
    for each, spec in zip(opened, said, strict=True):
        dataset = common.data_of(each, data=data, root=data_root, split=None, trust=trust)
        rows = dataset.test if held_out else _seen(each, dataset)
        values = _values(each, dataset, rows, model=spec, trust=trust, device=device)
        if held_out:
            densities.append(values.log_predictive())
            told.append(f"elpd {float(densities[-1].sum()):.2f} on {values.num_rows} test rows")
        else:
            found = evaluation.loo(values)
            densities.append(found.rows)
            told.append(str(found))
    stacked = evaluation.stacking_weights(torch.stack(densities))
    with common.bar("stack", "sample") as progress:
        made = evaluation.stack(opened, stacked.weights, out, overwrite=overwrite, progress=progress)
    for path, weight, line in zip(bank, stacked.weights.tolist(), told, strict=True):
        typer.echo(plain(f"weight {weight:.4f}  {path}: {line}"))
    typer.echo(f"together elpd {stacked.elpd:.2f} ± {stacked.error:.2f}, {stacked.gain:.2f} above the best of them")
    show_bank(made)


def _seen(bank: Bank, dataset: DataSet) -> Batch:
    """The rows that a bank was fitted to.

    Raises:
        DataError: other data; or BankMismatch, where rows counted for more or less than once each.
    """
    from bnn.errors import BankMismatch, DataError

    if not len(dataset.train.y):
        raise DataError("--data", want="the data that the bank was fitted to", got="other data", fix="leave --data out")
    if (bank.info.get("sampling") or {}).get("posterior") == "balanced":
        raise BankMismatch(
            str(bank.path),
            want="a posterior of the rows as they are",
            got="one of balanced classes",
            fix="judge it by held-out rows: bnn evaluate --prior-shift",
        )
    return dataset.train


def _values(
    bank: Bank,
    dataset: DataSet,
    rows: Batch,
    *,
    model: str | None,
    trust: bool,
    device: str,
    out: Path | None = None,
    overwrite: bool = False,
) -> Pointwise:
    """The log likelihood of rows under all samples, in units of the target."""
    from bnn import evaluation
    from bnn.functional import FunctionalModel

    net = FunctionalModel(common.module_of(bank, model=model, trust=trust), bank, device=device).settled()
    units = dataset.units
    return evaluation.log_likelihoods(net, rows, out=out, loc=units.loc, scale=units.scale, overwrite=overwrite)
