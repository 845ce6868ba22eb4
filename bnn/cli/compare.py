"""bnn compare: how faithful one bank's predictive is to another's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bnn.cli import common, reading

if TYPE_CHECKING:
    from bnn.evaluation import Comparison


def compare(
    bank: Annotated[
        list[str], typer.Option(help="Folder of a bank, or its address; the reference first, two at least.")
    ],
    data: Annotated[
        str | None, typer.Option(help="Data; their test rows are used. [default: the banks']", show_default=False)
    ] = None,
    model: reading.Models = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File for the figures.", metavar="FILE", show_default=False)
    ] = None,
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
    """Say how close the predictives of banks are to that of the first, on the test rows of their data."""
    del config, debug
    from bnn import evaluation
    from bnn.bank.files import write_atomic
    from bnn.errors import ConfigError
    from bnn.functional import FunctionalModel

    if len(bank) < 2:
        raise ConfigError("--bank", want="two banks at least", got=str(len(bank)), fix="name the reference first")
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
    dataset = common.data_of(opened[0], data=data, root=data_root, split=None, trust=trust)
    said = common.models_of(opened, model)
    nets = [
        FunctionalModel(common.module_of(each, model=spec, trust=trust), each, device=device).settled()
        for each, spec in zip(opened, said, strict=True)
    ]
    found: dict[str, Comparison] = {}
    for path, each, net in zip(bank[1:], opened[1:], nets[1:], strict=True):
        result = evaluation.compare(nets[0], net, dataset.test, loc=dataset.units.loc, scale=dataset.units.scale)
        result.about.update(
            reference=bank[0],
            bank=path,
            digests=[opened[0].digest, each.digest],
            data=dataset.record["spec"],
        )
        found[path] = result
    _show(bank[0], found)
    if json_file is not None:
        told = {"format": "bnn-comparison", "version": 1, "comparisons": [each.to_dict() for each in found.values()]}
        write_atomic(json_file, [(json.dumps(told, indent=2) + "\n").encode()])


def _show(reference: str, found: dict[str, Comparison]) -> None:
    from rich.console import Console
    from rich.table import Table

    from bnn.cli.show import plain

    names = list(dict.fromkeys(name for each in found.values() for name in each.figures))
    table = Table(box=None, pad_edge=False)
    table.add_column(plain(f"from {reference}"))
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for bank, each in found.items():
        cells = []
        for name in names:
            figure = each.figures.get(name)
            error = "" if figure is None or figure.error is None else f" ± {figure.error:.2g}"
            cells.append("" if figure is None else f"{figure.value:.4g}{error}")
        table.add_row(plain(bank), *cells)
    console = Console(highlight=False, markup=False)
    Console(highlight=False, markup=False, width=None if console.is_terminal else 200).print(table)
    for note in dict.fromkeys(note for each in found.values() for note in each.notes):
        console.print(note, soft_wrap=True)
