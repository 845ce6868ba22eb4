"""Rows in bins for many views at once, against torch's own search and the bins of `bnn.metrics`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bnn import metrics
from bnn.evaluation.bins import counted, equal_places, equally_filled_places
from bnn.seeding import generator

VIEWS, ROWS = 3, 41


def confidences(*, ties: bool) -> Tensor:
    found = torch.rand(VIEWS, ROWS, generator=generator(0, ties), dtype=torch.float64)
    return (8 * found).round() / 8 if ties else found


@pytest.mark.parametrize("num_bins", [1, 2, 3, 7, 15, 49, 100, 1000])
def test_edges_and_their_neighbours_stand_where_a_search_puts_them(num_bins: int) -> None:
    edges = torch.arange(num_bins + 1, dtype=torch.float64) / num_bins
    above, below = (edges.nextafter(torch.full_like(edges, end)) for end in (2.0, -1.0))
    drawn = torch.rand(1000, generator=generator(1), dtype=torch.float64)
    given = torch.cat([edges, above, below.clamp_min(0), drawn, torch.tensor([5e-324], dtype=torch.float64)])
    assert torch.equal(equal_places(given, num_bins), torch.bucketize(given, edges[1:-1]))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("num_bins", [1, 4, 15, 60])
def test_bins_of_equally_many_rows_are_those_of_the_metrics(ties: bool, num_bins: int) -> None:
    confidence = confidences(ties=ties)
    correct = (torch.rand(VIEWS, ROWS, generator=generator(2), dtype=torch.float64) < 0.4).double()
    place = equally_filled_places(confidence, num_bins)
    rows, sums, right = counted(place, num_bins, confidence, correct)
    for view in range(VIEWS):
        bins = metrics.adaptive_bins(confidence[view], correct[view], num_bins=num_bins)
        assert rows[view].tolist() == bins.rows.tolist()
        filled = bins.rows.clamp_min(1)
        torch.testing.assert_close(sums[view] / filled, bins.confidence)
        torch.testing.assert_close(right[view] / filled, bins.accuracy)


def test_what_is_no_number_spoils_its_own_view_alone() -> None:
    confidence = confidences(ties=False)
    confidence[1, 5] = torch.nan
    for place in (equal_places(confidence, 7), equally_filled_places(confidence, 7)):
        assert counted(place, 7, confidence)[1].sum(dim=1).isnan().tolist() == [False, True, False]
