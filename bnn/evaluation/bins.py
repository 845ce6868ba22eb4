"""Rows in bins of confidence, for many views at once; `bnn.metrics` has the definitions, and the same of one view."""

from __future__ import annotations

import torch
from torch import Tensor


def equal_places(confidence: Tensor, num_bins: int) -> Tensor:
    """Place of each float64 confidence among equal bins (a, b], of which the first also holds 0; int64.

    As `torch.bucketize` among the edges k / M, at a third of its price: what lies just above an edge is placed too low at
    first, by less than one bin and never too high, and so compared with one edge.
    """
    place = (confidence * (num_bins * (1.0 - 1e-15))).ceil_().sub_(1.0).clamp_(0.0, num_bins - 1.0)
    above = confidence > (place + 1.0).div_(num_bins)
    return place.add_(above.double()).long().clamp_(0, num_bins - 1)  # NaN too gets a place


def equally_filled_places(confidence: Tensor, num_bins: int) -> Tensor:
    """Place of each confidence [V, N] among bins of equally many rows, as `metrics.adaptive_bins` has it; int64 [V, N]."""
    ordered, order = confidence.sort(dim=1)
    size = ordered.shape[1]
    first, last = torch.ones_like(order, dtype=torch.bool), torch.ones_like(order, dtype=torch.bool)
    first[:, 1:] = last[:, :-1] = ordered[:, 1:] != ordered[:, :-1]
    rank = torch.arange(size)
    start = torch.where(first, rank, 0).cummax(dim=1).values  # of the rows that tie
    end = torch.where(last, rank, size).flip(1).cummin(dim=1).values.flip(1)
    middle = (start + end) // 2
    least, larger = divmod(size, num_bins)  # the first `larger` parts hold least + 1 rows
    border = larger * (least + 1)
    place = torch.where(middle < border, middle // (least + 1), larger + (middle - border) // max(least, 1))
    return torch.empty_like(order).scatter_(1, order, place)


def counted(place: Tensor, num_bins: int, *weights: Tensor) -> Tensor:
    """Rows, and each of some weights [V, N], summed by the places [V, N] of rows among bins, float64 [1 + weights, V, M]."""
    views = len(place)
    flat = (place + num_bins * torch.arange(views)[:, None]).flatten()
    found = [torch.bincount(flat, minlength=views * num_bins).double()]
    found += [torch.bincount(flat, weight.flatten(), minlength=views * num_bins) for weight in weights]
    return torch.stack(found).view(-1, views, num_bins)
