"""bnn evaluate: predictive uncertainty of banks on held-out data."""

from __future__ import annotations

import re
from collections.abc import Collection
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bnn.cli import common, reading

if TYPE_CHECKING:
    from bnn.bank import Bank
    from bnn.data import DataSet
    from bnn.types import Batch


def evaluate(
    bank: Annotated[list[str], typer.Option(help="Folder of a bank, or its address; repeatable.")],
    data: Annotated[
        str | None, typer.Option(help="Data; their test rows are used. [default: the bank's]", show_default=False)
    ] = None,
    ood: Annotated[
        str | None, typer.Option(help="Out-of-distribution data, such as digits-shuffled.", show_default=False)
    ] = None,
    shift: Annotated[
        list[str] | None,
        typer.Option(help="Corruption of digits, at severities 1 to 5; repeatable.", show_default=False),
    ] = None,
    rest: Annotated[
        bool, typer.Option("--rest", help="Take only the test rows that the calibration beside the bank did not use.")
    ] = False,
    model: reading.Model = None,
    split: reading.Split = None,
    base: reading.Base = None,
    prior_shift: reading.PriorShift = False,
    unit: Annotated[str, typer.Option(help="Show information in nats or bits.")] = "nats",
    num_bins: Annotated[int, typer.Option(help="Bins of the calibration errors.")] = 15,
    figures: Annotated[str, typer.Option(help="all, or basic: the main figures alone, without curves.")] = "all",
    report: Annotated[
        Path | None, typer.Option(help="Folder for report.json, report.html and pictures.", show_default=False)
    ] = None,
    mesh: reading.Mesh = None,
    device: reading.Device = "cpu",
    residency: reading.Residency = "mapped",
    host_budget: reading.HostBudget = None,
    device_budget: reading.DeviceBudget = None,
    cache: reading.Cache = None,
    data_root: common.DataRoot = None,
    trust: common.Trust = False,
    allow_other_device: reading.AllowOtherDevice = False,
    config: common.Config = None,
    debug: common.Debug = False,
) -> None:
    """Score the posterior predictive of one or more banks on the test rows of their data."""
    del config, debug
    from bnn import evaluation
    from bnn.cli.show import show_reports
    from bnn.data import load_outside
    from bnn.distributed import ranks
    from bnn.errors import choose
    from bnn.functional import FunctionalModel

    choose("--unit", unit, ("nats", "bits"))
    choose("--figures", figures, evaluation.FIGURES)
    common.check_device(device)
    common.check_folder("--report", report)
    shape = reading.mesh_of(mesh)
    bank = list(dict.fromkeys(bank))
    opened = reading.open_banks(
        bank,
        residency=residency,
        device=device,
        host_budget=host_budget,
        device_budget=device_budget,
        cache=cache,
        allow_other_device=allow_other_device,
    )
    reports: dict[str, evaluation.Report] = {}
    for path, found in zip(bank, opened, strict=True):
        module = common.module_of(found, model=model, base=base, trust=trust)
        dataset = common.data_of(found, data=data, root=data_root, split=split, trust=trust)
        outside = None if ood is None else load_outside(ood, dataset, root=data_root, split=dataset.record["split"])
        rows = _rows(found, dataset, rest)
        shifts = {
            kind: {
                severity: _rows(
                    found,
                    common.data_of(
                        found, data=_corrupted(dataset, kind, severity), root=data_root, split=split, trust=trust
                    ),
                    rest,
                )
                for severity in range(1, 6)
            }
            for kind in shift or ()
        }
        net = FunctionalModel(module, found, device=device).settled()  # a report that can be made again
        name = _name(path, reports)
        result = evaluation.evaluate(
            net,
            rows,
            ood=outside,
            shifts=shifts,
            prior_shift=common.class_shares(found) if prior_shift else None,
            num_bins=num_bins,
            figures=figures,  # type: ignore[arg-type]
            loc=dataset.units.loc,
            scale=dataset.units.scale,
            mesh=shape,
        )
        result.about = {"bank": path, "digest": found.digest, "data": dataset.record["spec"], "ood": ood}
        reports[name] = result
        found.release()  # its buffers, before those of the next one
    if ranks().rank:  # rank 0 speaks for all
        return
    show_reports(reports, unit=unit)
    if report is not None:
        evaluation.save_reports(reports, report)


def _name(path: str, taken: Collection[str]) -> str:
    """What a bank is called in the report: its folder's name, or more of its path where another one has that."""
    last = Path(path).name
    longer = re.sub(r"[^\w.]+", "-", path).strip("-.")
    return next(name for name in chain((last, longer), (f"{last}-{n}" for n in count(2))) if name not in taken)


def _rows(bank: Bank, dataset: DataSet, rest: bool) -> Batch:
    """The test rows, or those of them that a calibration left."""
    if not rest:
        return dataset.test
    from bnn.data import held_out
    from bnn.errors import ConfigError
    from bnn.posthoc import Calibration

    about = Calibration.open(bank).data
    if about.get("part") != "test" or about.get("of") != len(dataset.test.y):
        raise ConfigError(
            f"{bank.path} --rest",
            want="a calibration on a share of these test rows",
            got=f"one on {about.get('of', 'rows')} of {about.get('spec', 'other data')}",
            fix="calibrate it with 'bnn calibrate', or leave --rest out",
        )
    return held_out(dataset, share=about["share"], seed=about["seed"])[1]


def _corrupted(dataset: DataSet, kind: str, severity: int) -> str:
    """The spec of the same rows at a severity of a corruption."""
    from bnn.corruptions import KINDS
    from bnn.errors import ConfigError, choose

    choose("--shift", kind, KINDS)
    if dataset.record["spec"] != "digits":
        raise ConfigError(
            "--shift", want="the data 'digits'", got=repr(dataset.record["spec"]), fix="pass shifts= in Python"
        )
    return f"digits-{kind}-{severity}"
