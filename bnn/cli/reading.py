"""How verbs open the banks that they use: where samples are meanwhile, copies of banks at addresses; and flags that go with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from bnn.bank import Bank

BankOption = Annotated[str, typer.Option(help="Folder of the bank, or its address.")]
BankArgument = Annotated[str, typer.Argument(help="Folder of the bank, or its address.", metavar="BANK")]

Residency = Annotated[
    str,
    typer.Option(
        help="Where samples are meanwhile: mapped; host, all in memory; device, all on that of --device; streamed, "
        "through a budget."
    ),
]
HostBudget = Annotated[
    str | None,
    typer.Option(help="Memory that the samples of a bank may take, such as 2GB.", metavar="SIZE", show_default=False),
]
DeviceBudget = Annotated[
    str | None,
    typer.Option(
        help="Memory of the device that the samples of a bank may take, such as 1GB.",
        metavar="SIZE",
        show_default=False,
    ),
]
Cache = Annotated[
    Path | None, typer.Option(help="Folder for copies of a bank's files, where BANK is an address.", show_default=False)
]
AllowOtherDevice = Annotated[
    bool,
    typer.Option("--allow-other-device", help="Open a virtual bank on another CPU or torch than it was made with."),
]

Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda.")]
Model = Annotated[
    str | None, typer.Option(help="Repeats a package.module:function that the bank names.", show_default=False)
]
Models = Annotated[
    list[str] | None,
    typer.Option(help="Repeats a package.module:function that a bank names; repeatable.", show_default=False),
]
Split = Annotated[
    int | None,
    typer.Option(
        help="Split of a UCI folder, or seed of the 20 % test split. [default: the bank's]", show_default=False
    ),
]
Base = Annotated[
    Path | None,
    typer.Option(
        help="Values of parameters outside the bank: free.safetensors of 'bnn train --free', or its folder. "
        "[default: the bank's]",
        show_default=False,
    ),
]
PriorShift = Annotated[
    bool, typer.Option("--prior-shift", help="Correct a bank of balanced classes for their natural shares.")
]

Mesh = Annotated[
    str | None,
    typer.Option(
        help="Under torchrun, DATAxSAMPLES: ranks that take batches in turn, times ranks that share the samples of each. "
        "[default: all take batches]",
        show_default=False,
    ),
]


def mesh_of(text: str | None) -> tuple[int, int] | None:
    """`2x3` as (2, 3).

    Raises:
        ConfigError: something else.
    """
    from bnn.errors import ConfigError

    if text is None:
        return None
    data, _, samples = text.partition("x")
    if not (data.isdecimal() and samples.isdecimal()):
        raise ConfigError("--mesh", want="DATAxSAMPLES, two whole numbers", got=repr(text), fix="such as 2x1")
    return int(data), int(samples)


def open_bank(
    path: str,
    *,
    residency: str = "mapped",
    device: str | None = None,
    host_budget: str | None = None,
    device_budget: str | None = None,
    cache: Path | None = None,
    allow_other_device: bool = False,
) -> Bank:
    """The bank of a verb, as `Bank.open` opens it; samples that are on a device at all are on that of the verb.

    Raises:
        BnnError: as `Bank.open` does.
    """
    from bnn.bank import Bank

    on_device = residency == "device" or (residency == "streamed" and str(device).startswith("cuda"))
    return Bank.open(
        path,
        residency=residency,  # type: ignore[arg-type]  # checked there
        device=device if on_device else None,
        host_budget=host_budget,
        device_budget=device_budget,
        cache=cache,
        allow_other_device=allow_other_device,
    )


def open_banks(paths: Sequence[str], *, cache: Path | None = None, **options: Any) -> list[Bank]:
    """Several, of which some may be at addresses, alike but for that; a budget is one for each of them."""
    from bnn.bank.address import is_address

    somewhere_else = any(is_address(path) for path in paths)
    return [
        open_bank(path, cache=cache if is_address(path) or not somewhere_else else None, **options) for path in paths
    ]
