"""bnn evaluate: predictive uncertainty of banks on held-out data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bnn.cli import common


def evaluate(
    bank: Annotated[list[str], typer.Option(help="Folder of a bank, or its address; repeatable.")],
    data: Annotated[
        str | None, typer.Option(help="Data; their test rows are used. [default: the bank's]", show_default=False)
    ] = None,
    ood: Annotated[
        str | None, typer.Option(help="Out-of-distribution data, such as digits-shuffled.", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Repeats a package.module:function that the bank names.", show_default=False)
    ] = None,
    split: Annotated[
        int | None,
        typer.Option(
            help="Split of a UCI folder, or seed of the 20 % test split. [default: the bank's]", show_default=False
        ),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            help="Values of parameters outside the bank: free.safetensors of 'bnn train --free', or its folder. "
            "[default: the bank's]",
            show_default=False,
        ),
    ] = None,
    prior_shift: Annotated[
        bool, typer.Option("--prior-shift", help="Correct a bank of balanced classes for their natural shares.")
    ] = False,
    unit: Annotated[str, typer.Option(help="Show information in nats or bits.")] = "nats",
    num_bins: Annotated[int, typer.Option(help="Bins of the calibration error.")] = 15,
    report: Annotated[
        Path | None, typer.Option(help="Folder for report.json, report.html and pictures.", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda.")] = "cpu",
    cache: common.Cache = None,
    data_root: common.DataRoot = None,
    trust: common.Trust = False,
    config: common.Config = None,
    debug: common.Debug = False,
) -> None:
    """Score the posterior predictive of one or more banks on the test rows of their data."""
    del config, debug
    from bnn import evaluation
    from bnn.bank import Bank
    from bnn.bank.address import is_address
    from bnn.cli.show import show_reports
    from bnn.data import load_outside
    from bnn.errors import choose
    from bnn.functional import FunctionalModel

    choose("--unit", unit, ("nats", "bits"))
    common.check_device(device)
    common.check_folder("--report", report)
    opened = {path: Bank.open(path, cache=cache if is_address(path) else None) for path in bank}
    reports: dict[str, evaluation.Report] = {}
    for path, found in opened.items():
        module = common.module_of(found, model=model, base=base, trust=trust)
        dataset = common.data_of(found, data=data, root=data_root, split=split, trust=trust)
        outside = None if ood is None else load_outside(ood, dataset, root=data_root, split=dataset.record["split"])
        net = FunctionalModel(module, found, device=device).settled()  # a report that can be made again
        last = Path(path).name
        name = last if last not in reports else path.strip("/").replace("/", "-")
        result = evaluation.evaluate(
            net,
            dataset.test,
            ood=outside,
            prior_shift=common.class_shares(found) if prior_shift else None,
            num_bins=num_bins,
            loc=dataset.units.loc,
            scale=dataset.units.scale,
        )
        result.about = {"bank": path, "digest": found.digest, "data": dataset.record["spec"], "ood": ood}
        reports[name] = result
    show_reports(reports, unit=unit)
    if report is not None:
        evaluation.save_reports(reports, report)
