"""Which tensors of a module are Bayesian: their names, shapes, dtypes, ties and fingerprint."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bnn.errors import BankMismatch, ConfigError, ModuleError
from bnn.types import Block, Params, make_block

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Entry(NamedTuple):
    """One Bayesian tensor. Names that begin with `@` belong to the likelihood or prior, not the module."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"'{self.name}' {list(self.shape)}"


@dataclass(frozen=True)
class Layout:
    """The Bayesian tensors of a module in their order, and the names tied to them.

    `aliases` maps a second name of a tied tensor to the name it is kept under.
    """

    entries: tuple[Entry, ...]
    aliases: dict[str, str] = field(default_factory=dict)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self.entries)

    @cached_property
    def num_values(self) -> int:
        """P, the numbers in one sample."""
        return sum(entry.numel for entry in self.entries)

    @cached_property
    def sizes(self) -> list[int]:
        """Numbers in each entry."""
        return [entry.numel for entry in self.entries]

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of one sample."""
        return sum(entry.numel * entry.dtype.itemsize for entry in self.entries)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over names, shapes and ties; dtypes stand beside it."""
        facts = [[[e.name, list(e.shape)] for e in self.entries], sorted(self.aliases.items())]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of a flat vector [P]: it holds every entry, and is float32 at least.

        Samplers move in steps that half precision rounds away, whatever the module computes in.
        """
        dtype = torch.float32
        for entry in self.entries:
            dtype = torch.promote_types(dtype, entry.dtype)
        return dtype

    def flatten(self, params: Params) -> Tensor:
        """Params of shapes [*shape] or [K, *shape] -> one tensor [P] or [K, P]."""
        extra = params[self.names[0]].dim() - len(self.entries[0].shape)
        return torch.cat(
            [
                params[e.name].flatten(extra).to(self.dtype) if e.shape else params[e.name].unsqueeze(-1).to(self.dtype)
                for e in self.entries
            ],
            dim=-1,
        )

    def unflatten(self, flat: Tensor) -> Params:
        """One tensor [P] or [K, P] -> params of shapes [*shape] or [K, *shape]; views where dtypes agree."""
        pieces = flat.split(self.sizes, dim=-1)
        return {
            e.name: piece.reshape((*flat.shape[:-1], *e.shape)).to(e.dtype)
            for e, piece in zip(self.entries, pieces, strict=True)
        }

    def cut(self, flat: Tensor) -> Params:
        """What `unflatten` gives of contiguous numbers [P] or [K, P] outside transforms, in a fifth of its time."""
        if flat.dim() == 1:
            params = dict(zip(self.names, torch.unsafe_split_with_sizes(flat, self.sizes), strict=True))
            for name, sizes in self._shaped:
                # The same numbers in this shape: `view` would make one more tensor of them.
                params[name].resize_(*sizes)
        else:
            before, across, first = tuple(flat.shape[:-1]), (self.num_values,) * (flat.dim() - 1), flat.storage_offset()
            params = {
                name: flat.as_strided(before + shape, across + strides, first + at)
                for name, shape, strides, at in self._steps
            }
        if flat.dtype not in self._only:
            params = {e.name: params[e.name].to(e.dtype) for e in self.entries}
        return params

    @cached_property
    def _shaped(self) -> list[tuple[str, tuple[Any, ...]]]:
        """Each entry that is no vector, with its shape as numbers, which torch reads faster than a tuple."""
        return [(e.name, e.shape or ((),)) for e in self.entries if len(e.shape) != 1]

    @cached_property
    def _steps(self) -> list[tuple[str, tuple[int, ...], tuple[int, ...], int]]:
        """Name, shape and strides of each entry in a flat vector, and where it begins."""
        begins = accumulate(self.sizes[:-1], initial=0)
        return [
            (e.name, e.shape, tuple(math.prod(e.shape[place + 1 :]) for place in range(len(e.shape))), begin)
            for e, begin in zip(self.entries, begins, strict=True)
        ]

    @cached_property
    def _only(self) -> frozenset[torch.dtype]:
        """The dtype of all entries, if they share one."""
        dtypes = frozenset(e.dtype for e in self.entries)
        return dtypes if len(dtypes) == 1 else frozenset()

    def no_rows(self) -> Block:
        """A block of no samples: what a producer yields while it warms up or optimises."""
        none = torch.empty(0, dtype=torch.int64)
        return make_block(
            {e.name: torch.empty(0, *e.shape, dtype=e.dtype) for e in self.entries}, chain=none, draw=none
        )

    def difference(self, other: Layout, *, dtypes: bool = True) -> str | None:
        """The first entry in which `other` departs from this layout, in words; None where they agree."""
        for mine, theirs in zip(self.entries, other.entries, strict=False):
            if (mine.name, mine.shape) != (theirs.name, theirs.shape):
                return f"{theirs} where {mine} stands"
            if dtypes and mine.dtype != theirs.dtype:
                return f"'{mine.name}' as {theirs.dtype} where {mine.dtype} stands"
        if len(self.entries) != len(other.entries):
            longer, verb = (other, "added") if len(other.entries) > len(self.entries) else (self, "missing")
            return f"{longer.entries[min(len(self.entries), len(other.entries))]} {verb}"
        if self.aliases != other.aliases:
            return f"ties {other.aliases} where {self.aliases} stand"
        return None

    def require(self, other: Layout, *, place: str, dtypes: bool = True) -> None:
        """Raise BankMismatch, naming the first differing entry, unless `other` has this layout; in other dtypes, if asked."""
        difference = self.difference(other, dtypes=dtypes)
        if difference is not None:
            raise BankMismatch(
                place,
                want=f"the layout {self.fingerprint[:12]} of the bank",
                got=f"a module with {difference}",
                fix="use the module and the 'bayesian' patterns that the bank was made with",
            )

    def to_config(self) -> dict[str, Any]:
        return {
            "entries": [[e.name, list(e.shape), str(e.dtype).removeprefix("torch.")] for e in self.entries],
            "aliases": dict(sorted(self.aliases.items())),
        }

    @staticmethod
    def from_config(config: dict[str, Any]) -> Layout:
        entries = tuple(Entry(name, tuple(shape), DTYPES[dtype]) for name, shape, dtype in config["entries"])
        return Layout(entries, dict(config["aliases"]))


def matches(pattern: str, name: str) -> bool:
    """Whether a glob names this parameter, or a module that holds it (`head` names `head.weight`)."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")


def as_patterns(bayesian: str | Sequence[str]) -> tuple[str, ...]:
    """One glob or several, as a tuple."""
    return (bayesian,) if isinstance(bayesian, str) else tuple(bayesian)


def select(names: Iterable[str], bayesian: str | Sequence[str]) -> set[str]:
    """Names chosen by glob patterns, read in order; `!` takes names away again.

    Raises:
        ConfigError: a pattern that matches no name.
    """
    patterns, names = as_patterns(bayesian), list(names)
    chosen: set[str] = set(names) if patterns and patterns[0].startswith("!") else set()
    for pattern in patterns:
        hit = {name for name in names if matches(pattern.removeprefix("!"), name)}
        if not hit:
            raise ConfigError(
                "bayesian",
                want="patterns that match a parameter",
                got=f"{pattern!r}, which matches none",
                fix=f"the parameters are {', '.join(names)}",
            )
        chosen = chosen - hit if pattern.startswith("!") else chosen | hit
    return chosen


def layout_of(
    module: nn.Module,
    bayesian: str | Sequence[str] = "*",
    extra: Sequence[Entry] = (),
    *,
    buffers: Sequence[str] = (),
) -> Layout:
    """The layout of the parameters of `module` that the patterns choose, followed by `extra` entries.

    Tied weights are one entry under their first name; their other names are aliases, and a pattern
    that matches any of the names chooses the tensor. Parametrised weights go by their original
    (`fc.parametrizations.weight.original`).

    Args:
        module: any module whose parameters have a shape.
        bayesian: one glob or several; `!` negates. `fc` also stands for all below the module `fc`.
        extra: entries of likelihood and prior, named `@...`.
        buffers: names of buffers that samples bring, such as the statistics of batch norm; they follow the parameters.

    Raises:
        ConfigError: a pattern matches nothing, or nothing is chosen.
        ModuleError: names with `@`, complex or not yet materialised parameters.
    """
    named = list(module.named_parameters(remove_duplicate=False))
    for name, parameter in named:
        if name.startswith("@"):
            raise ModuleError(
                f"parameter '{name}'",
                want="a name without a leading '@'",
                got="one with it",
                fix="rename it: '@' marks entries of likelihood and prior",
            )
        if nn.parameter.is_lazy(parameter):
            raise ModuleError(
                f"parameter '{name}'",
                want="a shape",
                got="a lazy parameter",
                fix="run the module once on a batch to materialise it",
            )
    chosen = select([name for name, _ in named], bayesian)
    first_name: dict[int, str] = {}
    names_of: dict[str, list[str]] = {}
    for name, parameter in named:
        kept = first_name.setdefault(id(parameter), name)
        names_of.setdefault(kept, []).append(name)
    parameters = dict(named)
    entries, aliases = [], {}
    for kept, names in names_of.items():
        if not chosen.intersection(names):
            continue
        parameter = parameters[kept]
        if parameter.dtype not in DTYPES.values():
            raise ModuleError(
                f"parameter '{kept}'",
                want=f"one of {', '.join(DTYPES)}",
                got=str(parameter.dtype),
                fix="leave it out with bayesian=['*', '!" + kept + "']",
            )
        entries.append(Entry(kept, tuple(parameter.shape), parameter.dtype))
        aliases.update(dict.fromkeys(names[1:], kept))
    if not entries:
        raise ConfigError(
            "bayesian",
            want="at least one Bayesian parameter",
            got="none",
            fix="pass bayesian='*' or a module with parameters",
        )
    kept_buffers = dict(module.named_buffers()) if buffers else {}
    entries += [Entry(n, tuple(b.shape), b.dtype) for n, b in kept_buffers.items() if n in buffers]
    return Layout((*entries, *extra), aliases)
