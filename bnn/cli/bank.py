"""bnn bank: look at a bank, check its files and its chains, and make other banks of banks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bnn.cli import common, importing, loo, plan, reading, reduce
from bnn.cli.reduce import NewBank

if TYPE_CHECKING:
    from torch import nn

    from bnn.bank import Bank
    from bnn.data import DataSet
    from bnn.evaluation.verdict import Diagnosis

BankPath = Annotated[Path, typer.Argument(help="Folder of the bank.", metavar="BANK")]

app = typer.Typer(
    help="Look at a bank, check and judge it, make another one of it or of several, and plan one.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command()
def info(
    bank: reading.BankArgument,
    cache: reading.Cache = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Ask nothing of the address: all copies are here.")
    ] = False,
    debug: common.Debug = False,
) -> None:
    """Say what a bank is: samples, method, model, data, diagnostics."""
    del debug
    from bnn.bank import Bank
    from bnn.cli.show import show_bank

    # Nothing of a virtual bank is made.
    show_bank(Bank.open(bank, verify="never", allow_other_device=True, cache=cache, offline=offline))


@app.command()
def verify(
    bank: BankPath,
    full: Annotated[bool, typer.Option("--full", help="Read every byte and compare its sha256.")] = False,
    debug: common.Debug = False,
) -> int:
    """Check the files of a bank against its manifests: sizes and headers, with --full every byte."""
    del debug
    from bnn.bank import Bank, lost_shards, unnamed_shards, verify_files, wrong_sizes
    from bnn.cli.show import plain
    from bnn.errors import BankCorrupt, BankLimit, BankMismatch

    unnamed: list[str] = []
    try:
        opened = Bank.open(bank, verify="never", allow_other_device=True)
        problems = opened.check_headers() + wrong_sizes(bank)
        if full and not problems:
            with common.bar("verify", "B") as progress:
                problems = verify_files(bank, progress)
            with common.bar("values", "sample") as progress:
                problems += opened.check_values(progress)
        problems += lost_shards(bank)
        unnamed = unnamed_shards(bank)
    except (BankCorrupt, BankLimit, BankMismatch) as error:
        problems = [str(error)]
    for problem in dict.fromkeys(problems):
        typer.echo(plain(f"bad: {problem}"))
    for name in unnamed:
        typer.echo(f"unnamed: {name}: left by a crash; 'bnn bank repair' adopts it")
    if not problems:
        typer.echo(f"good: {len(opened)} samples" + ("" if full else "; --full compares every byte"))
    return 1 if problems else 0


@app.command()
def repair(
    bank: BankPath,
    out: NewBank,
    resumable: Annotated[
        bool, typer.Option("--resumable", help="Keep rows only as far as the fit can go on from them.")
    ] = False,
    overwrite: common.Overwrite = False,
    debug: common.Debug = False,
) -> None:
    """Copy every sound row of a damaged bank into a new one, and name the files that are dropped."""
    del debug
    from bnn import bank as banks
    from bnn.cli.show import plain

    with common.bar("repair", "B") as progress:
        found = banks.repair(bank, out, resumable=resumable, overwrite=overwrite, progress=progress)
    for file in found.files:
        if file.fate != "kept":
            typer.echo(plain(f"{file.fate}: {file.name}: {file.reason}"))
    why = "base.safetensors is lost" if found.bank.info.get("lost") else "no state follows its last row"
    resume = "can go on with --resume" if found.resumable else f"cannot be resumed: {why}"
    typer.echo(f"good: {len(found.bank)} samples; the fit {resume}")


@app.command()
def diagnose(
    bank: reading.BankArgument,
    data: Annotated[
        str | None, typer.Option(help="Data; test rows are probe inputs. [default: the bank's]", show_default=False)
    ] = None,
    model: reading.Model = None,
    residency: reading.Residency = "mapped",
    host_budget: reading.HostBudget = None,
    cache: reading.Cache = None,
    data_root: common.DataRoot = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    trust: common.Trust = False,
    debug: common.Debug = False,
) -> int:
    """Say whether the chains of a bank can be trusted; exit 1 where they are bad, or too few to tell."""
    del debug
    from bnn.cli.show import show_diagnosis
    from bnn.errors import BnnError, choose

    choose("--residency", residency, ("mapped", "host", "streamed"))  # chains are judged by the CPU
    opened = reading.open_bank(
        bank,
        residency=residency,
        host_budget=host_budget,
        cache=cache,
        allow_other_device=True,  # no sample of a virtual bank is judged
    )
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


app.command("thin")(reduce.thin)
app.command("cast")(reduce.cast)


@app.command()
def merge(
    bank: Annotated[
        list[str], typer.Argument(help="Folders of two banks or more, or their addresses.", metavar="BANK BANK...")
    ],
    out: NewBank,
    overwrite: common.Overwrite = False,
    cache: reading.Cache = None,
    allow_other_device: reading.AllowOtherDevice = False,
    debug: common.Debug = False,
) -> None:
    """Put the samples of several banks of one module and likelihood into a new one; chains are renumbered."""
    del debug
    from bnn import bank as banks
    from bnn.cli.show import show_bank

    opened = reading.open_banks(bank, cache=cache, allow_other_device=allow_other_device)
    with common.bar("merge", "sample") as progress:
        found = banks.merge(opened, out, overwrite=overwrite, progress=progress)
    show_bank(found)


@app.command()
def materialise(
    bank: reading.BankArgument,
    out: NewBank,
    overwrite: common.Overwrite = False,
    cache: reading.Cache = None,
    allow_other_device: reading.AllowOtherDevice = False,
    debug: common.Debug = False,
) -> None:
    """Make every sample of a virtual bank and write them as an ordinary one, which is the same on every machine."""
    del debug
    from bnn import bank as banks
    from bnn.cli.show import show_bank

    opened = reading.open_bank(bank, cache=cache, allow_other_device=allow_other_device)
    with common.bar("materialise", "sample") as progress:
        found = banks.materialise(opened, out, overwrite=overwrite, progress=progress)
    show_bank(found)


@app.command()
def compact(
    bank: reading.BankArgument,
    out: NewBank,
    shard_bytes: Annotated[str, typer.Option(help="Bytes of a shard, at most, such as 64MB.")] = "256MiB",
    order: Annotated[
        str, typer.Option(help="striped: every shard a small bank; chain: chain after chain, draws in order.")
    ] = "striped",
    seed: common.Seed = 0,
    overwrite: common.Overwrite = False,
    cache: reading.Cache = None,
    allow_other_device: reading.AllowOtherDevice = False,
    debug: common.Debug = False,
) -> None:
    """Copy a bank into few shards of one size, its rows spread over them so that any shard stands for the whole."""
    del debug
    from bnn import bank as banks
    from bnn.cli.show import show_bank

    opened = reading.open_bank(bank, cache=cache, allow_other_device=allow_other_device)
    with common.bar("compact", "sample") as progress:
        found = banks.compact(
            opened,
            out,
            shard_bytes=shard_bytes,
            order=order,  # type: ignore[arg-type]  # checked there
            seed=seed,
            overwrite=overwrite,
            progress=progress,
        )
    show_bank(found)


@app.command()
def export(
    bank: reading.BankArgument,
    out: Annotated[Path, typer.Option(help="File to write, safetensors.", metavar="FILE")],
    index: Annotated[
        int | None, typer.Option(help="The sample of this bank index, as a state dict.", show_default=False)
    ] = None,
    mean: Annotated[bool, typer.Option("--mean", help="The weighted mean of all samples, as a state dict.")] = False,
    chains: Annotated[bool, typer.Option("--chains", help="Draws by chain, for ArviZ.")] = False,
    params: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            help="Parameters in the file of --chains, '!' negates; repeatable. [default: none]",
            show_default=False,
        ),
    ] = None,
    overwrite: common.Overwrite = False,
    cache: reading.Cache = None,
    allow_other_device: reading.AllowOtherDevice = False,
    debug: common.Debug = False,
) -> None:
    """Write one sample, the mean or the chains of a bank as a safetensors file for other tools."""
    del debug
    from bnn import bank as banks
    from bnn.bank import format as fmt
    from bnn.bank.exporting import check_target
    from bnn.cli.show import size
    from bnn.errors import ConfigError

    said = [flag for flag, given in (("--index", index is not None), ("--mean", mean), ("--chains", chains)) if given]
    if len(said) != 1:
        got = " and ".join(said) or "none of them"
        raise ConfigError("bank export", want="--index, --mean or --chains", got=got, fix="say one of them")
    if params and not chains:
        raise ConfigError("--params", want="--chains", got=said[0], fix="leave it out: a state dict is whole")
    opened = reading.open_bank(bank, cache=cache, allow_other_device=allow_other_device)
    if index is not None:
        if not 0 <= index < len(opened):
            raise ConfigError(
                f"--index {index}", want=f"0 <= index < {len(opened)}", got="one outside", fix="choose one inside"
            )
        fmt.check_rows(opened.block([index]).params, str(bank), index)
        banks.write_state_dict(opened, out, opened[index], overwrite=overwrite)
    elif mean:
        check_target(out, overwrite=overwrite)  # before a large bank is read
        with common.bar("mean", "sample") as progress:
            found = banks.mean(opened, progress=progress)
        banks.write_state_dict(opened, out, found, overwrite=overwrite)
    else:
        with common.bar("export", "B") as progress:
            banks.write_chains(opened, out, params=params or (), overwrite=overwrite, progress=progress)
    typer.echo(f"{out}: {size(out.stat().st_size)}")


app.command("import")(importing.import_)
app.command("plan")(plan.plan)
app.command("loo")(loo.loo)
app.command("stack")(loo.stack)


def diagnosis_of(bank: Bank, rebuilt: tuple[nn.Module, DataSet] | None) -> Diagnosis:
    """What the chains of a bank are worth: on test rows of its data, where its module and they are at hand."""
    from bnn.evaluation.convergence import diagnose, probe_rows
    from bnn.functional import FunctionalModel

    if rebuilt is None or not len(rebuilt[1].test.x):
        return diagnose(bank)
    module, dataset = rebuilt
    return diagnose(bank, net=FunctionalModel(module, bank).settled(), x=probe_rows(dataset.test.x))
