"""bnn bank: look at a bank, check its files and its chains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bnn.cli import common

if TYPE_CHECKING:
    from torch import nn

    from bnn.bank import Bank
    from bnn.data import DataSet
    from bnn.evaluation.verdict import Diagnosis

app = typer.Typer(help="Look at a bank, check its files and its chains.", no_args_is_help=True, rich_markup_mode=None)

BankPath = Annotated[Path, typer.Argument(help="Folder of the bank.", metavar="BANK")]


@app.command()
def info(bank: BankPath, debug: common.Debug = False) -> None:
    """Say what a bank is: samples, method, model, data, diagnostics."""
    del debug
    from bnn.bank import Bank
    from bnn.cli.show import show_bank

    show_bank(Bank.open(bank))


@app.command()
def verify(
    bank: BankPath,
    full: Annotated[bool, typer.Option("--full", help="Read every byte and compare its sha256.")] = False,
    debug: common.Debug = False,
) -> int:
    """Check the files of a bank against its manifests: sizes and headers, with --full every byte."""
    del debug
    from bnn.bank import Bank, verify_files
    from bnn.errors import BankCorrupt, BankLimit, BankMismatch

    try:
        opened = Bank.open(bank, verify="never")
        problems = opened.check_headers()
        if full and not problems:
            problems = verify_files(bank) + opened.check_values()
    except (BankCorrupt, BankLimit, BankMismatch) as error:
        problems = [str(error)]
    for problem in dict.fromkeys(problems):
        typer.echo(f"bad: {problem}")
    if not problems:
        typer.echo(f"good: {len(opened)} samples" + ("" if full else "; --full compares every byte"))
    return 1 if problems else 0


@app.command()
def diagnose(
    bank: BankPath,
    data: Annotated[
        str | None, typer.Option(help="Data; test rows are probe inputs. [default: the bank's]", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Repeats a package.module:function that the bank names.", show_default=False)
    ] = None,
    data_root: common.DataRoot = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    trust: common.Trust = False,
    debug: common.Debug = False,
) -> int:
    """Say whether the chains of a bank can be trusted; exit 1 where they are bad, or too few to tell."""
    del debug
    from bnn.bank import Bank
    from bnn.cli.show import show_diagnosis
    from bnn.errors import BnnError

    opened = Bank.open(bank)
    rebuilt, missing = None, None
    try:
        module = common.module_of(opened, model=model, trust=trust)
        rebuilt = module, common.data_of(opened, data=data, root=data_root, split=None, trust=trust)
    except BnnError as error:
        if data is not None or model is not None:  # asked for: what is wrong with it has to be put right
            raise
        missing = str(error)
    found = diagnosis_of(opened, rebuilt)
    if as_json:
        told = {"bank": str(bank), "trusted": found.trusted, **found.to_dict(), "without_predictions": missing}
        typer.echo(json.dumps(told, indent=2))
    else:
        show_diagnosis(found)
        if missing is not None and found.verdict != "not a Markov chain":
            typer.echo(f"predictions were left out: {missing}")
    return 0 if found.trusted else 1


def diagnosis_of(bank: Bank, rebuilt: tuple[nn.Module, DataSet] | None) -> Diagnosis:
    """What the chains of a bank are worth: on test rows of its data, where its module and they are at hand."""
    from bnn.evaluation.convergence import diagnose, probe_rows
    from bnn.functional import FunctionalModel

    if rebuilt is None or not len(rebuilt[1].test.x):
        return diagnose(bank)
    module, dataset = rebuilt
    return diagnose(bank, net=FunctionalModel(module, bank), x=probe_rows(dataset.test.x))
