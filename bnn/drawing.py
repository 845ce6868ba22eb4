"""Samples by number: sample i is made from (seed, i) alone, whatever is drawn beside it, before it or elsewhere."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from bnn import priors
from bnn.errors import ConfigError
from bnn.layout import Layout
from bnn.likelihoods import likelihood_from_config
from bnn.machine import blank, threads
from bnn.priors import FanIn, Normal, Unknown
from bnn.seeding import deriving, generator
from bnn.space import Space
from bnn.types import Params

NORMAL_FAMILIES: tuple[str, ...] = ("mean-field", "low-rank", "full-rank")
VIRTUAL_FAMILIES: tuple[str, ...] = ("prior", *NORMAL_FAMILIES)
VIRTUAL_DRAWS: tuple[str, ...] = ("random", "antithetic")

# Normals made and scaled at once: 512 KiB, which a cache holds beside their scales. A call costs as much as 2,000 of them.
PIECE = 2**17
ALL = slice(None)
LEAST_PIECE = 16  # torch makes normals by sixteens, and fewer in another way: the last piece is longer, not shorter

CORRELATION = {"low-rank": "factor", "full-rank": "lower"}  # what a family has beside loc and scale


class Draws(Protocol):
    """A source of samples by number."""

    def one(self, index: int) -> Params:
        """Sample number `index`, a tensor [*shape] an entry."""
        ...

    def several(self, indices: Sequence[int]) -> Params:
        """K samples, each with the bits that `one` gives it; a tensor [K, *shape] an entry."""
        ...


@dataclass(frozen=True)
class GuideDraws:
    """Samples theta(u) of a normal over the unconstrained space, u = loc + scale (z + c).

    - mean-field: c = 0;
    - low-rank: c = factor z', with z' the last R of P + R normals;
    - full-rank: c = lower z, lower having zeros on and above its diagonal.

    The normals of sample i are one call of a generator keyed by (seed, "draw", i); antithetic samples 2 j and 2 j + 1
    share those of (seed, "draw", j), with opposite signs. Everything is computed on the CPU. Sums and products of
    two numbers are rounded in one way only. Products of a matrix are of one sample each, on one thread and in memory
    of the same alignment, for their order of summation hangs on these.

    Args:
        space: from u to the values that a bank keeps.
        tensors: `loc`, `scale` [P] and, of what is not mean-field, `factor` [P, R] or `lower` [P, P]; on the CPU, in
            the layout's dtype of a flat vector.
        seed: of the run.
        antithetic: whether samples come in pairs about loc.
    """

    space: Space
    tensors: Mapping[str, Tensor]
    seed: int
    antithetic: bool = False

    def one(self, index: int) -> Params:
        loc = self.tensors["loc"]
        if not self._is_small:
            row = blank(loc.shape, loc.dtype)
            self._make(row, index)
            return self.space.values(row)
        source, negated = self._source(index)
        row = torch.randn(len(loc), generator=source, dtype=loc.dtype, device=loc.device)
        values = row.numpy()
        self._scale(values, negated, ALL, out=values)
        return self.space.values(row)

    def several(self, indices: Sequence[int]) -> Params:
        return self.space.values(self.flat(indices))

    def flat(self, indices: Sequence[int]) -> Tensor:
        """u of K samples, [K, P]."""
        loc = self.tensors["loc"]
        found = blank((len(indices), len(loc)), loc.dtype)  # [K, P]
        if not self._is_small:
            for row, index in zip(found.unbind(), indices, strict=True):
                self._make(row, index)
            return found
        normals = torch.empty_like(loc)  # stays in a cache, and each row is written once
        values = normals.numpy()
        for out, index in zip(found.numpy(), indices, strict=True):
            source, negated = self._source(index)
            normals.normal_(generator=source)
            self._scale(values, negated, ALL, out=out)
        return found

    @cached_property
    def _is_small(self) -> bool:
        """Whether a sample is normals that a cache holds, and no more than products and sums of two numbers."""
        return self.tensors.keys() == {"loc", "scale"} and len(self.tensors["loc"]) < PIECE + LEAST_PIECE

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """scale and loc [P] for NumPy, which begins an operation sooner than torch and rounds products and sums alike."""
        return self.tensors["scale"].numpy(), self.tensors["loc"].numpy()

    @cached_property
    def _seed_of(self) -> Callable[[int], int]:
        return deriving(self.seed, "draw")

    def __reduce__(self) -> tuple[object, ...]:
        return GuideDraws, (self.space, self.tensors, self.seed, self.antithetic)  # without what is cached

    def _source(self, index: int) -> tuple[torch.Generator, bool]:
        """Where the normals of a sample come from, and whether they change their signs."""
        if not self.antithetic:
            return _generator().manual_seed(self._seed_of(index)), False
        pair, second = divmod(index, 2)
        return _generator().manual_seed(self._seed_of(pair)), bool(second)

    def _scale(self, normals: np.ndarray, negated: bool, here: slice, *, out: np.ndarray) -> None:
        """Numbers of u of a sample of mean-field from their normals, which are written over."""
        scale, loc = self._arrays
        if negated:
            np.negative(normals, out=normals)
        np.multiply(normals, scale[here], out=normals)
        np.add(normals, loc[here], out=out)

    def _make(self, row: Tensor, index: int) -> None:
        """Put u of a sample into a row [P]."""
        source, negated = self._source(index)
        if self.tensors.keys() != {"loc", "scale"}:
            with threads(1):
                self._correlated(row, source, negated)
            row.mul_(self.tensors["scale"]).add_(self.tensors["loc"])
            return
        values, cuts = row.numpy(), [*range(0, len(row) - LEAST_PIECE, PIECE), len(row)]
        for start, stop in pairwise(cuts):  # pieces that a cache holds: the normals are those of one call
            here = slice(start, stop)
            row[here].normal_(generator=source)
            self._scale(values[here], negated, here, out=values[here])

    def _correlated(self, row: Tensor, source: torch.Generator, negated: bool) -> None:
        """Put z + c of a sample into a row [P]."""
        size = len(row)
        extra = self.tensors["factor"].shape[1] if "factor" in self.tensors else 0
        normals = torch.empty(size + extra, dtype=row.dtype).normal_(generator=source)
        if negated:
            normals.neg_()
        if "factor" in self.tensors:
            torch.add(normals[:size], self.tensors["factor"].mv(normals[size:].clone()), out=row)
        else:
            torch.add(normals, self.tensors["lower"].mv(normals), out=row)


_own = threading.local()


def _generator() -> torch.Generator:
    """This thread's generator, to be seeded before each use: making one takes as long as some hundred normals."""
    source: torch.Generator | None = getattr(_own, "source", None)
    if source is None:
        source = _own.source = torch.Generator()
    return source


@dataclass(frozen=True)
class PriorDraws:
    """Samples of a prior, each from a generator keyed by (seed, "prior", i).

    Args:
        prior: of the entries of the module.
        layout: of the sample.
        unknowns: of the likelihood.
        seed: of the run.
    """

    prior: priors.Prior
    layout: Layout
    unknowns: tuple[Unknown, ...]
    seed: int

    def one(self, index: int) -> Params:
        return draw_prior(self.prior, self.layout, self.unknowns, generator(self.seed, "prior", index))

    def several(self, indices: Sequence[int]) -> Params:
        draws = [self.one(index) for index in indices]
        if not draws:
            return {e.name: torch.empty(0, *e.shape, dtype=e.dtype) for e in self.layout.entries}
        return {name: torch.stack([draw[name] for draw in draws]) for name in self.layout.names}


def draw_prior(prior: priors.Prior, layout: Layout, unknowns: Sequence[Unknown], source: torch.Generator) -> Params:
    """One draw of every entry of a layout: those of the module under the prior, then unknowns of the likelihood."""
    params = priors.sample(prior, [entry for entry in layout.entries if not entry.name.startswith("@")], source)
    for unknown in unknowns:
        params[unknown.name] = unknown.prior.sample(source).to(torch.float32)
    return {name: params[name] for name in layout.names}


def frozen(values: Mapping[str, Tensor]) -> Params:
    """What `GuideDraws` needs of a normal guide's parameters, `loc`, `scale_unconstrained` and `cov_factor` or `lower`."""
    here = {name: value.detach().cpu() for name, value in values.items()}
    with threads(1):  # how softplus is rounded hangs on where a thread begins
        found = {"loc": here["loc"], "scale": nn.functional.softplus(here["scale_unconstrained"])}
    if "cov_factor" in here:
        found["factor"] = here["cov_factor"]
    if "lower" in here:
        found["lower"] = here["lower"].tril(-1)
    return {name: value.contiguous() for name, value in found.items()}


def draws_of(
    layout: Layout,
    *,
    family: str,
    draws: str,
    seed: int,
    prior: Mapping[str, Any] | None,
    likelihood: Mapping[str, Any] | None,
    tensors: Mapping[str, Tensor],
) -> Draws:
    """The source of samples that a bank describes in plain values and the guide's tensors.

    Raises:
        ConfigError: what a virtual bank cannot be made of; the first thing that is wrong is named.
    """
    if family not in VIRTUAL_FAMILIES:
        raise ConfigError(
            "family", want=f"one of {', '.join(VIRTUAL_FAMILIES)}", got=repr(family)[:100], fix="fit an ordinary bank"
        )
    if draws not in VIRTUAL_DRAWS or (family == "prior" and draws != "random"):
        raise ConfigError(
            "draws", want=f"one of {', '.join(VIRTUAL_DRAWS)}", got=repr(draws)[:100], fix="fit an ordinary bank"
        )
    known, unknowns = priors.prior_from_config(prior or {}), likelihood_from_config(dict(likelihood or {})).unknowns
    entries = [entry for entry in layout.entries if not entry.name.startswith("@")]
    known.check(entries)
    every = (*unknowns, *priors.unknowns(known, entries))
    wanted, got = tuple(unknown.name for unknown in every), layout.names[len(entries) :]
    if wanted != got:
        raise ConfigError(
            "layout", want=f"the unknowns {list(wanted)} last", got=str(list(got))[:200], fix="fit an ordinary bank"
        )
    if family == "prior":
        kind = known.family if isinstance(known, FanIn) else known
        if not isinstance(kind, Normal):
            raise ConfigError(
                "prior", want="a normal one, Normal or FanIn", got=type(kind).__name__, fix="fit an ordinary bank"
            )
        if tensors:
            raise ConfigError("tensors", want="none of a prior", got=f"'{min(tensors)}'", fix="fit it again")
        return PriorDraws(known, layout, tuple(unknowns), seed)
    _check_tensors(layout, family, tensors)
    return GuideDraws(Space(layout, entries, known, every), dict(tensors), seed, draws == "antithetic")


def _check_tensors(layout: Layout, family: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise ConfigError unless these are the tensors of such a guide, finite, with scales above 0."""
    size = layout.num_values
    names = {"loc", "scale"} | ({CORRELATION[family]} if family in CORRELATION else set())
    if tensors.keys() != names:
        raise ConfigError("tensors", want=str(sorted(names)), got=str(sorted(tensors))[:200], fix="fit it again")
    for name, tensor in sorted(tensors.items()):
        rank = tensor.shape[1] if name == "factor" and tensor.dim() == 2 else 0
        want = {"factor": (size, max(rank, 1)), "lower": (size, size)}.get(name, (size,))
        if tuple(tensor.shape) != want or tensor.dtype != layout.dtype:
            got = f"{tensor.dtype} {list(tensor.shape)}"
            raise ConfigError(name, want=f"{layout.dtype} {list(want)}", got=got, fix="fit it again")
        if not bool(torch.isfinite(tensor).all()):
            raise ConfigError(name, want="finite values", got="NaN or Inf", fix="fit it again")
    if not bool((tensors["scale"] > 0).all()):
        raise ConfigError("scale", want="values above 0", got="one that is not", fix="fit it again")


def witness(draws: Draws, layout: Layout) -> str:
    """The sha256 of the bytes of sample 0: where it is another, samples come out with other bits than they had."""
    digest = hashlib.sha256()
    sample = draws.one(0)
    for name in layout.names:
        digest.update(sample[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
