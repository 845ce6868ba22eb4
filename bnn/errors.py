"""Every error that bnn raises: one line with place, want, got and way out."""

from __future__ import annotations

import dataclasses
from typing import Any


class BnnError(Exception):
    """Something the caller can put right.

    Args:
        place: the file, argument or entry that is wrong.
        want: what was expected there.
        got: what was found.
        fix: what the reader can do about it.
    """

    def __init__(self, place: str, *, want: str, got: str, fix: str) -> None:
        super().__init__(f"{place}: want {want}, got {got}; {fix}")
        self.place, self.want, self.got, self.fix = place, want, got, fix

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions cross process borders (DataLoader workers); keyword-only arguments need help.
        return _rebuild, (type(self), self.place, self.want, self.got, self.fix)


def _rebuild(kind: type[BnnError], place: str, want: str, got: str, fix: str) -> BnnError:
    return kind(place, want=want, got=got, fix=fix)


class ConfigError(BnnError):
    """An option is unknown, out of range or contradicts another."""


class DataError(BnnError):
    """Data that cannot be read or cannot mean what is asked of them."""


class ModuleError(BnnError):
    """A module that cannot be run functionally, or not in its present mode."""


class FitError(BnnError):
    """A producer cannot go on: the loss or the log joint is not finite."""


class BankError(BnnError):
    """A bank that cannot be opened, read or written."""


class BankNotFound(BankError):
    """The folder is not there or is no bank."""


class BankExists(BankError):
    """The folder to write to is there already."""


class BankCorrupt(BankError):
    """A file of the bank is cut, altered or not what the manifest says."""


class BankMismatch(BankError):
    """The bank belongs to another module, method or data set."""


class BankLimit(BankError):
    """A bank that asks for more than a reader gives: a longer header, more JSON, more open files."""


class BankWriteError(BankError):
    """The disk refused a write: full, read-only or failing."""


class BankLocked(BankError):
    """Another process is writing under the same writer name."""


class RankLost(BnnError):
    """Another rank of the run has ended, or gave no sign for longer than the timeout."""


class NotConverged(UserWarning):
    """A producer stopped before its samples represent the posterior: it says what still moved."""


class OtherDevice(UserWarning):
    """The samples of a virtual bank come out with other bits here than where it was made."""


class SlowerWay(UserWarning):
    """What was asked for cannot be had here: samples run in a slower way, or fewer of them at once."""


def choose(place: str, value: str, table: dict[str, object] | tuple[str, ...] | list[str]) -> str:
    """`value` if the table has it; otherwise a ConfigError that lists the choices."""
    if value not in table:
        raise ConfigError(place, want=f"one of {', '.join(table)}", got=repr(value), fix="choose from that list")
    return value


def check_kinds(options: Any) -> None:
    """Raise ConfigError for a field of a dataclass of options that is not of the kind of number it is declared as."""
    for option in dataclasses.fields(options):
        value, kinds = getattr(options, option.name), str(option.type).split(" | ")
        if (value is None and "None" in kinds) or not {"int", "float", "bool"} & set(kinds):
            continue
        whole = isinstance(value, int) and not isinstance(value, bool)
        fine = {
            "int": whole,
            "float": whole or (isinstance(value, float) and value == value),
            "bool": isinstance(value, bool),
        }
        if not any(fine.get(kind, False) for kind in kinds):
            words = {"int": "a whole number", "float": "a number", "bool": "True or False"}
            raise ConfigError(
                f"{type(options).__name__}({option.name}=)",
                want=" or ".join(words.get(kind, kind) for kind in kinds),
                got=repr(value)[:100],
                fix=f"the default is {option.default!r}",
            )
