"""What a run leaves behind: a bank of one sample, the same values as an ordinary state dict, and its curve."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bnn.bank import Bank, BankWriter, write_state_dict
from bnn.fitting import drive
from bnn.layout import Layout
from bnn.training.logs import CurveLog, Log
from bnn.training.loop import curve_of
from bnn.types import Block, State


def keep(
    out: str | Path,
    steps: Callable[[State | None], Iterator[tuple[Block, State]]],
    *,
    title: str,
    layout: Layout,
    config: Mapping[str, Any],
    base: Mapping[str, Tensor],
    export: str,
    log: Log,
    resume: bool,
    overwrite: bool,
    progress: bool | None,
) -> Bank:
    """Run `steps` from the state that `out` holds, keep what they yield, and write the files beside the bank."""
    writer = BankWriter(out, layout=layout, config=dict(config), base=dict(base), resume=resume, overwrite=overwrite)
    folder, curve = Path(out), CurveLog(Path(out), log)
    try:
        if writer.num_rows == 0:
            drive(writer, curve.follow(steps(writer.state)), title=title, progress=progress)
        elif not writer.complete:  # stopped between its last row and the end
            writer.close()
        else:
            writer.release()
        bank = Bank.open(out)
        if not (folder / export).exists():
            write_files(folder, bank, writer.state or {}, curve, export)
    finally:
        curve.close()
    return bank


def write_files(folder: Path, bank: Bank, state: State, curve: CurveLog, export: str) -> None:
    """The values as a state dict, and the whole curve, for tools that know nothing of banks."""
    curve.write(curve_of(state))
    write_state_dict(bank, folder / export, bank[0])
