"""Costs of gradients: operations against the trace, figures against closed forms, and those of all against few."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnn import likelihoods, priors
from bnn.inference import density as density_module
from bnn.inference.costs import Cost, Costs, Operation, cost_of, record
from bnn.inference.density import target_of_model
from bnn.model import BayesianModel
from bnn.seeding import generator, isolated
from bnn.tracing import trace
from bnn.types import Batch


def cost(function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Cost:
    first, *rest = (torch.ones(shape) for shape in shapes)
    return cost_of(record(function, (first, *rest)))


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (torch.mm, [(3, 5), (5, 7)], 2 * 3 * 5 * 7),
        (torch.bmm, [(4, 3, 5), (4, 5, 7)], 2 * 4 * 3 * 5 * 7),
        (torch.addmm, [(7,), (3, 5), (5, 7)], 2 * 3 * 5 * 7),
        (torch.baddbmm, [(4, 3, 7), (4, 3, 5), (4, 5, 7)], 2 * 4 * 3 * 5 * 7),
        (lambda a, b: a @ b @ b, [(3, 5), (5, 5)], 2 * 2 * 3 * 5 * 5),
        (lambda a: a @ a, [(5, 5)], 2 * 5 * 5 * 5),
        (lambda a, b: (a + b).tanh(), [(3, 5), (3, 5)], 0),
    ],
)
def test_products_of_matrices(function: Callable[..., Tensor], shapes: Any, expected: int) -> None:
    assert cost(function, *shapes).products == expected


def test_products_of_a_convolution_are_those_of_its_output_and_window() -> None:
    """2 x rows x output channels x positions x input channels of a group x window."""
    assert cost(nn.functional.conv2d, (2, 3, 8, 9), (5, 3, 3, 4)).products == 2 * 2 * 5 * (6 * 6) * 3 * (3 * 4)
    grouped = cost(lambda x, weight: nn.functional.conv2d(x, weight, groups=2), (2, 4, 8, 9), (6, 2, 3, 4))
    assert grouped.products == 2 * 2 * 6 * (6 * 6) * 2 * (3 * 4)
    turned = cost(nn.functional.conv_transpose2d, (2, 3, 8, 9), (3, 5, 3, 4)).products
    assert turned == 2 * 2 * 3 * (8 * 9) * 5 * (3 * 4)


def test_products_of_the_gradients_of_a_convolution_are_as_many_again_each() -> None:
    def both(x: Tensor, weight: Tensor) -> Any:
        return torch.func.grad(lambda x, w: nn.functional.conv2d(x, w).sum(), argnums=(0, 1))(x, weight)

    def one(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.grad(lambda w: nn.functional.conv2d(x, w).sum())(weight)

    forward = cost(nn.functional.conv2d, (2, 3, 8, 9), (5, 3, 3, 4)).products
    assert cost(both, (2, 3, 8, 9), (5, 3, 3, 4)).products == 3 * forward
    assert cost(one, (2, 3, 8, 9), (5, 3, 3, 4)).products == 2 * forward


def test_bytes_are_those_that_live_at_once() -> None:
    kept, size = 4 * 6 * 10, (6, 10)
    assert cost(lambda a: (a + 1) * 2, size).bytes == 2 * kept  # a sum until its product is there
    assert cost(lambda a: (((a + 1) * 2).tanh() - 3).exp(), size).bytes == 2 * kept  # one after the other
    assert cost(lambda a: torch.stack([a + 1, a + 2, a + 3]), size).bytes == 6 * kept
    assert cost(lambda a: a.t().reshape(60).view(3, 20)[1:], (10, 6)).bytes == kept  # only the copy is new
    assert cost(lambda a: a.view(60)[3:].unsqueeze(0), size).bytes == 0
    assert cost(lambda a: a.index_select(0, torch.tensor([0, 2, 4])), size).bytes >= kept // 2
    values = cost(lambda a: torch.func.grad(lambda b: b[2, 3].square())(a), size)
    assert values.bytes >= kept  # the gradient of a selection is as large as what was selected from


def test_what_no_result_needs_is_left_out() -> None:
    def function(a: Tensor) -> Tensor:
        a.exp().sum()
        return (a * 2).tanh()

    found = record(function, [torch.ones(3, 5)])
    assert found == [
        Operation("aten.mul.Tensor", (), False, 15.0, 60.0, 0.0),
        Operation("aten.tanh.default", (0,), False, 15.0, 60.0, 0.0),
    ]


MODULES: dict[str, Callable[[], nn.Module]] = {
    "dense": lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 5), nn.Tanh(), nn.Linear(5, 4)),
    "convolution": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 4)
    ),
}


def gradients(
    name: str, num_rows: int, make: Callable[[], nn.Module] | None = None
) -> tuple[Any, Callable[[int, int], tuple[Tensor, ...]]]:
    """Gradients of a model over chains, and their arguments for so many rows and chains."""
    source = generator(0, name)
    x, y = torch.randn(num_rows, 2, 6, 6, generator=source), torch.randint(4, (num_rows,), generator=source)
    with isolated(0, name):
        module = (make or MODULES[name])()
    model = BayesianModel(
        module,
        prior=priors.Normal(0.0, priors.HalfCauchy(1.0)),
        likelihood=likelihoods.Categorical(),
        num_data=num_rows,
    )
    target = target_of_model(model, Batch(x, y))
    flat = 0.2 * torch.randn(11, model.layout.num_values, generator=source)

    def arguments(rows: int, chains: int) -> tuple[Tensor, ...]:
        return flat[:chains], *(tensor[:rows] for tensor in target.slices(1)[0][1])

    return density_module._vectorised(target), arguments


@pytest.mark.parametrize("name", sorted(MODULES))
def test_operations_are_those_of_the_trace(name: str) -> None:
    vectorised, arguments = gradients(name, 13)
    graph = trace(vectorised, arguments(13, 5))
    traced = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    found = [operation.name for operation in record(vectorised, arguments(13, 5))]
    # A trace picks the results of an operation with several by one more of Python's each.
    assert sorted(found) == sorted(name for name in traced if "getitem" not in name)


@pytest.mark.parametrize(("rows", "chains"), [(13, 7), (29, 2), (8, 11), (2, 5)])
@pytest.mark.parametrize("name", sorted(MODULES))
def test_costs_of_any_size_are_those_recorded_there(name: str, rows: int, chains: int) -> None:
    vectorised, arguments = gradients(name, 29)
    costs = Costs(lambda r, c: record(vectorised, arguments(r, c)), (4, 6), (2, 3))
    whole = cost_of(record(vectorised, arguments(rows, chains)))
    assert costs.at(rows, chains) == pytest.approx(whole, rel=1e-9)


def test_costs_where_data_cannot_be_cut() -> None:
    vectorised, arguments = gradients("dense", 9)
    costs = Costs(lambda r, c: record(vectorised, arguments(r, c)), (9,), (2, 3))
    assert costs.at(9, 7) == pytest.approx(cost_of(record(vectorised, arguments(9, 7))), rel=1e-9)


def test_costs_of_one_number_of_chains_alone() -> None:
    vectorised, arguments = gradients("convolution", 29)
    costs = Costs(lambda r, c: record(vectorised, arguments(r, c)), (4, 6), (5,))
    assert costs.at(13, 5) == pytest.approx(cost_of(record(vectorised, arguments(13, 5))), rel=1e-9)


def test_costs_of_a_module_that_is_unrolled_chain_by_chain() -> None:
    """An LSTM has no rule under vmap: each chain has operations of its own, so that costs as a whole are a line in chains."""

    class Sequences(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.last = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.lstm(x.flatten(1, 2))[0][:, -1])

    vectorised, arguments = gradients("lstm", 29, Sequences)
    costs = Costs(lambda r, c: record(vectorised, arguments(r, c)), (4, 6), (2, 3))
    assert len(record(vectorised, arguments(4, 2))) < len(record(vectorised, arguments(4, 3)))
    for rows, chains, apart in ((4, 9, 1e-9), (6, 7, 1e-9), (29, 7, 0.25)):  # oneDNN's workspace is no line in rows
        found, expected = costs.at(rows, chains), cost_of(record(vectorised, arguments(rows, chains)))
        assert found.products == pytest.approx(expected.products, rel=1e-9)
        assert found == pytest.approx(expected, rel=apart)


def test_costs_of_operations_that_differ_with_the_rows_are_in_proportion() -> None:
    def function(a: Tensor) -> Tensor:
        return (a + 1).tanh() if len(a) > 5 else a + 1

    costs = Costs(lambda r, c: record(function, (torch.ones(r, c),)), (4, 6), (2, 3))
    assert costs.at(30, 9).bytes == 2 * 4 * 30 * 9


def test_a_record_holds_no_more_than_the_run_of_what_it_records() -> None:
    """Values that nothing needs any more are given back while it goes on."""
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def function(a: Tensor) -> Tensor:
        nonlocal most
        for _ in range(20):
            a = a + 1
            alive.append(weakref.ref(a))
            most = max(most, sum(each() is not None for each in alive))
        return a

    assert len(record(function, [torch.ones(3, 5)])) == 20
    assert most <= 2
