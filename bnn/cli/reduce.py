"""bnn bank cast and thin: smaller banks, with what that costs on a probe set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bnn.cli import common, reading

if TYPE_CHECKING:
    from torch import Tensor

    from bnn.bank import Bank
    from bnn.functional import FunctionalModel

NewBank = Annotated[Path, typer.Option(help="Folder for the new bank.")]

MOST_ROWS = 1024  # of a probe set


def cast(
    bank: reading.BankArgument,
    codec: Annotated[str, typer.Option(help="bf16, fp16 or int8.")],
    out: NewBank,
    probe: Annotated[
        str | None,
        typer.Option(help="Data on whose test rows predictions are compared. [default: none]", show_default=False),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            help="Write nothing where the KL of a probe row is above so many nats. [default: no bound]",
            show_default=False,
        ),
    ] = None,
    model: reading.Model = None,
    cache: reading.Cache = None,
    data_root: common.DataRoot = None,
    trust: common.Trust = False,
    overwrite: common.Overwrite = False,
    allow_other_device: reading.AllowOtherDevice = False,
    debug: common.Debug = False,
) -> None:
    """Keep the samples of a bank in fewer bytes in a new one, with the largest errors that this makes."""
    del debug
    from bnn import reduction
    from bnn.bank.codecs import CODECS
    from bnn.cli.show import show_bank
    from bnn.errors import choose

    choose("--codec", codec, tuple(CODECS))
    opened = reading.open_bank(bank, cache=cache, allow_other_device=allow_other_device)
    net, x = None, None
    if probe is not None:
        net, x = _probe(opened, probe, model=model, root=data_root, trust=trust)
    with common.bar("cast", "sample") as progress:
        found = reduction.cast(
            opened,
            out,
            codec=codec,  # type: ignore[arg-type]  # chosen above
            net=net,
            x=x,
            max_kl=max_kl,
            overwrite=overwrite,
            progress=progress,
        )
    show_bank(found)


def thin(
    bank: reading.BankArgument,
    out: NewBank,
    every: Annotated[int | None, typer.Option(help="Keep every n-th draw of each chain.", show_default=False)] = None,
    best: Annotated[
        int | None,
        typer.Option(help="Keep so many samples, those whose predictive is nearest that of all.", show_default=False),
    ] = None,
    probe: Annotated[
        str | None,
        typer.Option(help="Data on whose test rows --best chooses. [default: the bank's]", show_default=False),
    ] = None,
    model: reading.Model = None,
    cache: reading.Cache = None,
    data_root: common.DataRoot = None,
    seed: common.Seed = 0,
    trust: common.Trust = False,
    overwrite: common.Overwrite = False,
    allow_other_device: reading.AllowOtherDevice = False,
    debug: common.Debug = False,
) -> None:
    """Keep every n-th draw of each chain in a new bank (of an ensemble every n-th sample), or the best few samples."""
    del debug
    from bnn import bank as banks
    from bnn import reduction
    from bnn.cli.show import show_bank
    from bnn.errors import ConfigError

    if (every is None) == (best is None):
        got = "neither" if every is None else "both"
        raise ConfigError("bank thin", want="--every or --best", got=got, fix="say one of them")
    if probe is not None and best is None:
        raise ConfigError("--probe", want="--best", got="--every", fix="leave it out: draws are counted, not judged")
    opened = reading.open_bank(bank, cache=cache, allow_other_device=allow_other_device)
    with common.bar("thin", "sample") as progress:
        if every is not None:
            found = banks.thin(opened, out, every=every, overwrite=overwrite, progress=progress)
        else:
            assert best is not None
            net, x = _probe(opened, probe, model=model, root=data_root, trust=trust)
            found = reduction.thin(
                opened, out, best=best, net=net, x=x, seed=seed, overwrite=overwrite, progress=progress
            )
    show_bank(found)


def _probe(
    bank: Bank, data: str | None, *, model: str | None, root: str | None, trust: bool
) -> tuple[FunctionalModel, Tensor]:
    """The module under a bank, and test rows of data spread evenly, as many as are looked at.

    Raises:
        DataError: the data have no test rows.
    """
    from bnn.errors import DataError
    from bnn.functional import FunctionalModel

    module = common.module_of(bank, model=model, trust=trust)
    found = common.data_of(bank, data=data, root=root, split=None, trust=trust).test.x
    if not len(found):
        raise DataError("--probe", want="test rows", got="none", fix="name data that have some")
    return FunctionalModel(module, bank), found[:: -(-len(found) // MOST_ROWS)]
