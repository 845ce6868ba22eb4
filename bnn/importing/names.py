"""Names of another tool and the names of a module: which is which, and in which order the axes stand."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from bnn.errors import BankMismatch, ConfigError
from bnn.layout import Entry, Layout

Names: TypeAlias = Mapping[str, Any]
"""The source's name -> a name of the module; `{"name", "transpose"}` where axes stand otherwise; False to leave it out.

`transpose` is True for a matrix [in, out], or the list of the source's axes in the module's order, such as
`[3, 2, 0, 1]` for a kernel [height, width, in, out]. A name that is not in the map stands for itself.
"""


class Renamed(NamedTuple):
    """What a value of the source becomes."""

    name: str
    transpose: bool | tuple[int, ...] = False

    def axes(self, num_axes: int) -> tuple[int, ...] | None:
        """The source's axes of one sample in the module's order; None as they are."""
        if isinstance(self.transpose, bool):
            return tuple(reversed(range(num_axes))) if self.transpose else None
        return self.transpose


def read_names(path: str | Path) -> dict[str, Any]:
    """The map that a TOML file holds: `w1 = "0.weight"`, `w2 = { name = "2.weight", transpose = true }`, `extra = false`.

    Raises:
        ConfigError: no such file, or no such map in it.
    """
    try:
        names = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(str(path), want="a TOML file", got=error.strerror or "none", fix="check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), want="TOML", got=str(error), fix="mend the file; quote names with dots") from error
    for name in names:
        renamed(name, names, str(path))
    return names


def renamed(name: str, names: Names | None, place: str = "names") -> Renamed | None:
    """What the map says of a name; None where it is left out.

    Raises:
        ConfigError: the map says something else than a name, a table or False of it.
    """
    said = (names or {}).get(name, name)
    if said is False or said is None:
        return None
    table = {"name": said} if isinstance(said, str) else dict(said) if isinstance(said, Mapping) else {}
    target, transpose = table.pop("name", None), table.pop("transpose", False)
    if isinstance(transpose, Sequence) and all(type(axis) is int for axis in transpose):
        transpose = tuple(transpose)
    if table or not isinstance(target, str) or not isinstance(transpose, (bool, tuple)):
        raise ConfigError(
            f"{place} '{name}'",
            want='a name, {name = "...", transpose = true or a list of axes}, or false to leave it out',
            got=repr(said)[:100],
            fix=f'write {name} = "0.weight"',
        )
    return Renamed(target, transpose)


def recorded(names: Names | None) -> dict[str, Any]:
    """The map as a record keeps it, under `names`, plain values alone; nothing where there is none."""

    def plain(said: Renamed | None) -> Any:
        if said is None:
            return False
        axes = list(said.transpose) if isinstance(said.transpose, tuple) else said.transpose
        return {"name": said.name, "transpose": axes} if axes else said.name

    return {"names": {name: plain(renamed(name, names)) for name in sorted(names)}} if names else {}


def shape_in(name: str, shape: Sequence[int], axes: tuple[int, ...] | None) -> tuple[int, ...]:
    """The shape of one sample after its axes are put in the module's order.

    Raises:
        ConfigError: these are not its axes.
    """
    if axes is None:
        return tuple(shape)
    if sorted(axes) != list(range(len(shape))):
        raise ConfigError(
            f"names '{name}'",
            want=f"each of its {len(shape)} axes once",
            got=f"transpose = {list(axes)}",
            fix="name them in the module's order, the first axis of one sample is 0",
        )
    return tuple(shape[axis] for axis in axes)


def places_of(sources: Iterable[str], names: Names | None, place: str) -> None:
    """Raise ConfigError where the map names what the source has not, or two of its names become one."""
    there, taken = list(sources), dict[str, str]()
    for name in names or ():
        if name not in there:
            raise ConfigError(
                f"names '{name}'",
                want=f"a name of {place}",
                got="none of that name",
                fix=f"it has {', '.join(there[:8])}{', ...' if len(there) > 8 else ''}",
            )
    for name in there:
        found = renamed(name, names)
        if found is None:
            continue
        if found.name in taken:
            raise ConfigError(
                f"names '{name}'",
                want="a name of its own",
                got=f"'{found.name}', which '{taken[found.name]}' becomes",
                fix="leave one of them out with false",
            )
        taken[found.name] = name


def check_entry(entry: Entry, shape: tuple[int, ...] | None, place: str) -> None:
    """Raise BankMismatch unless one sample of an entry has its shape; None is no value at all."""
    if shape == entry.shape:
        return
    if shape is None:
        fix = "map a name to it with names=, or leave it out of the sample: BayesianModel(bayesian=...)"
    elif tuple(reversed(shape)) == entry.shape:
        fix = "say transpose in names="
    else:
        fix = "pass the module that these values are of"
    raise BankMismatch(
        place, want=str(entry), got="nothing under that name" if shape is None else f"{list(shape)}", fix=fix
    )


def check_no_others(found: Iterable[str], known: Iterable[str], layout: Layout, place: str) -> None:
    """Raise BankMismatch for the first name that the module does not know."""
    unknown = sorted(set(found) - set(known))
    if unknown:
        missing = [name for name in layout.names if name not in set(found)]
        hint = (
            f"map it to '{missing[0]}', or leave it out with false, in names="
            if missing
            else "leave it out with false in names="
        )
        raise BankMismatch(place, want="names of the module alone", got=f"'{unknown[0]}' too", fix=hint)


def check_real(name: str, dtype: str, is_real: bool, place: str) -> None:
    """Raise BankMismatch for whole numbers, truth values and texts: no sample of a parameter is made of them."""
    if not is_real:
        raise BankMismatch(
            place, want=f"real numbers as '{name}'", got=dtype, fix="convert it, or leave it out with false in names="
        )
