"""The unconstrained space in which samplers move, and the way back to the values that banks keep."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bnn.layout import Entry, Layout
from bnn.priors import Prior, Unknown
from bnn.types import Params


class Space:
    """u [P]: a positive unknown is its logarithm, values under an unknown scale s are z with theta = loc + scale s z.

    Args:
        layout: of the sample, unknowns included.
        entries: those of the module.
        prior: of the entries.
        unknowns: of likelihood and prior.
    """

    def __init__(self, layout: Layout, entries: Sequence[Entry], prior: Prior, unknowns: Sequence[Unknown]) -> None:
        self.layout, self.unknowns = layout, tuple(unknowns)
        places = [(entry, prior.place(entry)) for entry in entries]
        self.scaled = [(entry, place) for entry, place in places if place.unknown is not None]

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


def _beside(scale: Tensor, entry: Entry) -> Tensor:
    """A scale (a scalar, or [K]) in a shape that multiplies values [*shape] or [K, *shape] of an entry."""
    return scale.reshape(scale.shape + (1,) * len(entry.shape))
