"""Curves of a run: a CSV file that follows it, and TensorBoard events where asked for."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from bnn.bank.files import write_atomic
from bnn.errors import ConfigError, choose
from bnn.training.loop import curve_of
from bnn.types import Block, State

Log: TypeAlias = Literal["csv", "tensorboard"]
LOGS: tuple[str, ...] = ("csv", "tensorboard")

CURVE_SECONDS = 2.0  # between two writes of the curve, each of which is synced to disk


def check_log(log: str) -> None:
    """Raise ConfigError for an unknown log, or one whose package is not installed."""
    choose("log", log, LOGS)
    if log == "tensorboard":
        _summary_writer()


class CurveLog:
    """Follows a run: `curve.csv` in the folder of its bank, and TensorBoard events beside it where asked for.

    Nothing is written before the bank is begun. The state holds the whole curve, so that a resumed run replaces what
    the interrupted one wrote, be it beyond its last commit or short of it.
    """

    def __init__(self, folder: Path, log: Log) -> None:
        self._folder, self._log = folder, log
        self._seen = 0  # rows written as events
        self._written_at = time.monotonic()
        self._events: Any = None

    def follow(self, run: Iterable[tuple[Block, State]]) -> Iterator[tuple[Block, State]]:
        """The run itself, logged as it goes on."""
        for block, state in run:
            if time.monotonic() - self._written_at > CURVE_SECONDS and (self._folder / "bank.json").exists():
                self.write(curve_of(state))
            yield block, state

    def write(self, curve: Sequence[dict[str, float]]) -> None:
        """Bring the files up to this curve, a row an epoch."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(name for row in curve for name in row)))
        writer.writeheader()
        writer.writerows(curve)
        write_atomic(self._folder / "curve.csv", [text.getvalue().encode()])
        if self._log == "tensorboard" and len(curve) > self._seen:
            if self._events is None:
                for old in self._folder.glob("events.out.tfevents.*"):
                    old.unlink()
                self._events = _summary_writer()(str(self._folder))
            for row in curve[self._seen :]:
                for name, value in row.items():
                    if name != "epoch":
                        self._events.add_scalar(name, value, global_step=int(row["epoch"]))
            self._events.flush()
            self._seen = len(curve)
        self._written_at = time.monotonic()

    def close(self) -> None:
        if self._events is not None:
            self._events.close()


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "log='tensorboard'",
            want="the package tensorboard",
            got="none",
            fix="pip install tensorboard, or pass log='csv'",
        ) from error
    return SummaryWriter
