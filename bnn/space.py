"""The unconstrained space in which samplers move, and the way back to the values that banks keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bnn import priors
from bnn.layout import Entry, Layout
from bnn.priors import Family, Place, Prior, Unknown
from bnn.types import Params

CPU = torch.device("cpu")
FEW = 2**20  # values: of more, calls of operations are not what a log prior costs, and a scale for each is memory


class Space:
    """u [P]: a positive unknown is its logarithm, values under an unknown scale s are z with theta = loc + scale s z.

    Args:
        layout: of the sample, unknowns included.
        entries: those of the module.
        prior: of the entries.
        unknowns: of likelihood and prior.
        device: where u is, as a rule.
    """

    def __init__(
        self,
        layout: Layout,
        entries: Sequence[Entry],
        prior: Prior,
        unknowns: Sequence[Unknown],
        device: torch.device = CPU,
    ) -> None:
        self.layout, self.unknowns = layout, tuple(unknowns)
        places = [(entry, prior.place(entry)) for entry in entries]
        self.scaled = [(entry, place) for entry, place in places if place.unknown is not None]
        self._entries, self._prior, self._alike = tuple(entries), prior, _alike(places, device)

    def log_prior(self, params: Params) -> Tensor:
        """log p(theta), unknowns included, a scalar."""
        return self._with_unknowns(priors.log_prob(self._prior, self._entries, params), params)

    def log_prior_at(self, flat: Tensor, params: Params) -> Tensor:
        """log p(theta(u)) of u [P], whose params are known: `log_prior` to rounding of float64, in few operations.

        Of values with one family and known scales z = (u - loc) / scale is one vector, and log f(z) one sum.
        """
        alike = self._alike
        if alike is None or not alike.fits(flat):
            return self.log_prior(params)
        z = flat[: alike.num_values]
        z = (z if alike.loc == 0.0 else z - alike.loc) / alike.scale
        return self._with_unknowns(alike.family.log_prob(z) - alike.log_scale, params)

    def _with_unknowns(self, total: Tensor, params: Params) -> Tensor:
        for unknown in self.unknowns:
            total = total + unknown.prior.log_prob(params[unknown.name])
        return total

    def constrain(self, flat: Tensor) -> tuple[Params, Tensor]:
        """u [P] or [K, P] -> params as banks keep them, and log |d theta / d u|, a scalar or [K]."""
        params = self.layout.unflatten(flat)
        log_jacobian = flat.new_zeros(flat.shape[:-1])
        for unknown in self.unknowns:
            log_jacobian = log_jacobian + params[unknown.name]
            params[unknown.name] = params[unknown.name].exp()
        for entry, scale in self._spread(params, flat):
            log_jacobian = log_jacobian + entry.numel * scale.log()
        return params, log_jacobian

    def values(self, flat: Tensor) -> Params:
        """Contiguous u [P] or [K, P] -> params as banks keep them: each sample has the same bits whatever stands beside it.

        Sums and products of two numbers are rounded in one way only. How an exponential is depends on its place in a
        vector, so that each sample gets a call of its own.
        """
        params = self.layout.cut(flat)
        for unknown in self.unknowns:
            logs = params[unknown.name]
            several = logs.dim() and len(logs)
            params[unknown.name] = torch.stack([each.exp() for each in logs]) if several else logs.exp()
        self._spread(params, flat)
        return params

    def unconstrain(self, params: Params) -> Tensor:
        """Params -> u, [P] or [K, P]."""
        changed = {unknown.name: params[unknown.name].log() for unknown in self.unknowns}
        for entry, place in self.scaled:
            scale = place.scale * params[place.unknown.name]  # type: ignore[union-attr]
            changed[entry.name] = (params[entry.name] - place.loc) / _beside(scale, entry)
        return self.layout.flatten(params | changed)

    def _spread(self, params: Params, flat: Tensor) -> list[tuple[Entry, Tensor]]:
        """Put loc + scale s z in the place of z; entries with their scale s, a scalar or [K]."""
        if not self.scaled:
            return []
        found = []
        pieces = dict(zip(self.layout.names, flat.split(self.layout.sizes, dim=-1), strict=True))
        for entry, place in self.scaled:
            scale = place.scale * params[place.unknown.name]  # type: ignore[union-attr]
            z = pieces[entry.name].reshape((*flat.shape[:-1], *entry.shape))  # rounded once, after scaling
            params[entry.name] = (place.loc + _beside(scale, entry) * z).to(entry.dtype)
            found.append((entry, scale))
        return found


class _Alike(NamedTuple):
    """Values of one family with known scales, as one vector."""

    family: Family
    num_values: int
    loc: float
    scale: Tensor  # [num_values]
    log_scale: float  # summed over values

    def fits(self, flat: Tensor) -> bool:
        """Whether u [P] can be divided by the scales as it is."""
        return flat.dtype == self.scale.dtype and flat.device == self.scale.device


def _alike(places: Sequence[tuple[Entry, Place]], device: torch.device) -> _Alike | None:
    """The values of all entries as one vector, where they are alike and few."""
    num_values = sum(entry.numel for entry, _ in places)
    if not places:
        return None
    entry, place = places[0]
    first = (entry.dtype, place.family, place.loc, None)
    alike = all((entry.dtype, place.family, place.loc, place.unknown) == first for entry, place in places)
    # Entries of other dtypes are rounded to these, and then computed in float32.
    if not alike or num_values > FEW or entry.dtype not in (torch.float32, torch.float64):
        return None
    scales = [torch.full((entry.numel,), place.scale, dtype=entry.dtype, device=device) for entry, place in places]
    log_scale = math.fsum(entry.numel * math.log(place.scale) for entry, place in places)
    return _Alike(place.family, num_values, place.loc, torch.cat(scales), log_scale)


def _beside(scale: Tensor, entry: Entry) -> Tensor:
    """A scale (a scalar, or [K]) in a shape that multiplies values [*shape] or [K, *shape] of an entry."""
    return scale.reshape(scale.shape + (1,) * len(entry.shape))
