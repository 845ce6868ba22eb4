"""Training data as batches: all rows once an epoch, startable anywhere, whatever holds them."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from bnn.batches import full_batch, minibatches, num_batches, num_rows
from bnn.errors import DataError

X, Y = torch.arange(11.0).view(11, 1), torch.arange(11)
FORMS = {
    "tensors": (X, Y),
    "dataset": TensorDataset(X, Y),
    "loader": DataLoader(TensorDataset(X, Y), batch_size=4),
    "shuffling loader": DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_full_batch_holds_every_row_once(form: str, world_untouched: None) -> None:
    batch = full_batch(FORMS[form])
    assert sorted(batch.y.tolist()) == list(range(11))
    assert torch.equal(batch.x[:, 0], batch.y.float())
    assert num_rows(FORMS[form]) == 11


@pytest.mark.parametrize("form", FORMS)
def test_every_epoch_holds_every_row_once(form: str, world_untouched: None) -> None:
    data = FORMS[form]
    assert num_batches(data, 4) == 3
    found = [batch.y.tolist() for batch in islice(minibatches(data, 4, seed=1), 9)]
    epochs = [[row for rows in found[start : start + 3] for row in rows] for start in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert [len(rows) for rows in found[:3]] == [4, 4, 3]
    if form != "loader":
        assert epochs[0] != epochs[1]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("start", [1, 3, 5, 8])
def test_started_anywhere_the_rest_is_the_same(form: str, start: int) -> None:
    whole = [batch.y.tolist() for batch in islice(minibatches(FORMS[form], 4, seed=1), 9)]
    rest = [batch.y.tolist() for batch in islice(minibatches(FORMS[form], 4, seed=1, start=start), 9 - start)]
    assert rest == whole[start:]


def test_batches_larger_than_the_data_hold_all_of_it() -> None:
    assert num_batches((X, Y), 100) == 1
    assert len(next(minibatches((X, Y), 100, seed=0)).y) == 11


def test_inputs_may_be_dicts_and_tuples() -> None:
    data = {"a": X, "b": (X + 1, X + 2)}, Y
    batch = next(minibatches(data, 4, seed=0))
    assert torch.equal(batch.x["b"][1][:, 0], batch.y + 2.0)
    assert full_batch(data).x["a"].shape == (11, 1)


class Counted(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter([])


class Unpaired(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.zeros(2)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ((X, Y[:5]), "5 rows of x, as of y, got 11"),
        ((X.clone().fill_(torch.nan), Y), "NaN or Inf in row 0 of x"),
        ((X, torch.full((11,), torch.inf)), "NaN or Inf in row 0 of y"),
        ((X[:0], Y[:0]), "at least one row"),
        (X, "rows"),
        (Unpaired(), r"rows \(x, y\)"),
    ],
)
def test_what_is_no_data_is_refused(data: object, match: str) -> None:
    with pytest.raises(DataError, match=match):
        full_batch(data)


def test_iterable_data_sets_are_refused() -> None:
    with pytest.raises(DataError, match="a map-style data set"):
        num_rows(DataLoader(Counted(), batch_size=2))
