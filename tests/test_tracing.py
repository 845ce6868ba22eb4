"""Traces: simplified ones give what the function gives, and never write where it does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from bnn.seeding import generator
from bnn.tracing import simplify, trace


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed, *shape))


def linear(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return nn.functional.linear(x, weight, bias).tanh()


def batched(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return torch.func.vmap(linear, in_dims=(0, 0, None))(weight, bias, x)


def twice_used(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    product = torch.bmm(x.expand(3, 5, 4), weight.transpose(1, 2))  # [3, 5, 6]
    return product + bias.unsqueeze(1) + product


def convolved(weight: Tensor, x: Tensor) -> Tensor:
    return torch.func.vmap(lambda w, x: nn.functional.conv2d(x, w).relu().mean(dim=(2, 3)), in_dims=(0, None))(
        weight, x
    )


def written(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    shift = bias * 1
    shift.mul_(2.0)  # a copy, until it is taken for the bias
    return nn.functional.linear(x, weight[0], shift[0])


CASES: dict[str, tuple[Callable[..., Tensor], Sequence[Tensor]]] = {
    "one": (linear, (normal(6, 4), normal(6), normal(5, 4))),
    "several": (batched, (normal(3, 6, 4), normal(3, 6), normal(5, 4))),
    "one row": (batched, (normal(3, 6, 4), normal(3, 6), normal(1, 4))),
    "one sample": (batched, (normal(1, 6, 4), normal(1, 6), normal(5, 4))),
    "a product used twice": (twice_used, (normal(3, 6, 4), normal(3, 6), normal(5, 4))),
    "a bias of another kind": (
        lambda a, b, c: torch.bmm(a, b) + c.round().to(torch.int64),
        (normal(3, 5, 4), normal(3, 4, 2), normal(3, 5, 2)),
    ),
    "a product with 1 alone": (lambda x: x * 1, (normal(5, 4),)),
    "convolutions": (convolved, (normal(3, 4, 2, 3, 3), normal(5, 2, 6, 6))),
    "a copy that is written to": (written, (normal(3, 6, 4), normal(3, 6), normal(5, 4))),
}


@pytest.mark.parametrize("case", CASES)
def test_a_simplified_trace_gives_what_the_function_gives(case: str) -> None:
    function, arguments = CASES[case]
    graph = trace(function, arguments)
    before = len(graph.graph.nodes)
    simplify(graph)
    for seed in (0, 1):  # also of other values than it was traced with
        others = [normal(*argument.shape, seed=seed + 1) for argument in arguments]
        kept = [other.clone() for other in others]
        torch.testing.assert_close(graph(*others), function(*others))
        assert all(map(torch.equal, kept, others))
    assert len(graph.graph.nodes) <= before


def test_products_take_their_bias_in_and_nothing_is_left_of_views() -> None:
    function, arguments = CASES["several"]
    graph = trace(function, arguments)
    simplify(graph)
    names = [node.target.__name__ for node in graph.graph.nodes if node.op == "call_function"]
    assert sorted(names) == ["baddbmm", "expand", "tanh", "transpose", "view"]


def test_what_only_python_saw_is_checked_before_it_is_taken_out() -> None:
    seen: list[str] = []
    trace(
        lambda x: x * x[x > 0].numel(),
        [torch.tensor([1.0, -1.0])],
        lambda graph: seen.extend(str(node.target) for node in graph.graph.nodes),
    )
    assert any("index" in name for name in seen)
