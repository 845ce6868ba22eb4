"""What a run leaves behind: a bank of one sample, the same values as an ordinary state dict, and its curve."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bnn.bank import Bank, BankWriter, write_state_dict
from bnn.distributed import Ranks
from bnn.fitting import drive
from bnn.layout import Layout
from bnn.together import open_part
from bnn.training.logs import CurveLog, Log
from bnn.training.loop import curve_of
from bnn.types import Block, State, make_block


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
    together: Ranks,
) -> Bank:
    """Run `steps` from the state that `out` holds, keep what they yield, and write the files beside the bank.

    Of several ranks all take part, and rank 0 writes.
    """
    options: dict[str, Any] = {"layout": layout, "config": dict(config), "base": dict(base)}
    folder, curve = Path(out), CurveLog(Path(out), log)
    writer: BankWriter | None
    if together.several:
        writer = open_part(folder, options, together, alone=True, resume=resume, overwrite=overwrite)
    else:
        writer = BankWriter(folder, resume=resume, overwrite=overwrite, **options)
    num_rows = together.first_value(None if writer is None else writer.num_rows)
    state = together.first_state(None if writer is None else writer.state)
    if writer is None:
        if num_rows == 0:
            for _ in steps(state):
                pass  # rank 0 writes what all have optimised
    else:
        try:
            if num_rows == 0:
                drive(writer, curve.follow(steps(state)), title=title, progress=progress)
            elif not writer.complete:  # stopped between its last row and the end
                writer.close()
            else:
                writer.release()
            if not (folder / export).exists():
                write_files(folder, Bank.open(out), writer.state or {}, curve, export)
        finally:
            curve.close()
    if not together.several:
        return Bank.open(out)
    together.wait()
    row = together.first_state(dict(Bank.open(out)[0]) if writer is not None else None)
    if not (folder / "bank.json").exists():  # on a host of its own, without the folder that rank 0 wrote
        assert row is not None
        params = {name: tensor.unsqueeze(0) for name, tensor in row.items()}
        block = make_block(params, chain=torch.zeros(1), draw=torch.zeros(1))
        return Bank.from_blocks([block], layout=layout, info=dict(config), base=dict(base))
    return Bank.open(out)


def write_files(folder: Path, bank: Bank, state: State, curve: CurveLog, export: str) -> None:
    """The values as a state dict, and the whole curve, for tools that know nothing of banks."""
    curve.write(curve_of(state))
    write_state_dict(bank, folder / export, bank[0])
