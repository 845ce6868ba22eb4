"""bnn bank: look at a bank, and check its files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bnn.cli import common

app = typer.Typer(help="Look at a bank, and check its files.", no_args_is_help=True, rich_markup_mode=None)

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
    from bnn.errors import BankCorrupt

    try:
        opened = Bank.open(bank, verify="never")
        problems = opened.check_headers() + (verify_files(bank) if full else [])
    except BankCorrupt as error:
        problems = [str(error)]
    for problem in dict.fromkeys(problems):
        typer.echo(f"bad: {problem}")
    if not problems:
        typer.echo(f"good: {len(opened)} samples" + ("" if full else "; --full compares every byte"))
    return 1 if problems else 0
