"""Traces: simplified ones give what the function gives, and never write where it does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from bnn.seeding import generator
from bnn.tracing import reuse_memory, simplify, trace, writes


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


@pytest.mark.parametrize(
    ("function", "left"),
    [
        pytest.param(lambda x: (x * 1.0).exp(), 1, id="times 1"),
        pytest.param(lambda x: (x / 1).exp(), 1, id="over 1"),
        pytest.param(lambda x: (x**1.0).exp(), 1, id="to the power of 1"),
        pytest.param(lambda x: (x - 0.0).exp(), 1, id="less 0"),
        pytest.param(lambda x: (x + 0.0) / x, 2, id="and 0"),  # -0 and 0 are 0
        pytest.param(lambda x: (x / 2).exp(), 2, id="over 2"),
        pytest.param(lambda x: (x - -0.0).exp(), 2, id="less -0"),  # which makes 0 of -0
        pytest.param(lambda x: (1.0 - x).exp(), 2, id="1 less it"),
    ],
)
def test_numbers_that_change_nothing_are_taken_out(function: Callable[..., Tensor], left: int) -> None:
    x = torch.tensor([-0.0, 0.0, 3.5, -torch.inf, torch.nan, 1e-45])
    graph = trace(function, [x])
    simplify(graph)
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    assert len(calls) == left
    assert torch.equal(graph(x).view(torch.int32), function(x).view(torch.int32))


@pytest.mark.parametrize(
    ("function", "left"),
    [
        pytest.param(lambda x: x.transpose(1, 2).transpose(1, 2).exp(), 1, id="back"),
        pytest.param(lambda x: x.transpose(0, 1).transpose(1, 2).exp(), 3, id="other axes"),
        pytest.param(lambda x: x.transpose(1, 2).transpose(0, 1).transpose(0, 1).exp(), 2, id="back to a transpose"),
        pytest.param(lambda x: x[0].t().t().exp(), 2, id="of a matrix"),
        pytest.param(lambda x: (x.transpose(1, 2) + 1).transpose(1, 2).exp(), 4, id="something between"),
    ],
)
def test_a_transpose_that_undoes_another_is_taken_out(function: Callable[[Tensor], Tensor], left: int) -> None:
    graph = trace(function, [normal(2, 3, 3)])
    simplify(graph)
    assert len([node for node in graph.graph.nodes if node.op == "call_function"]) == left
    assert torch.equal(graph(normal(2, 3, 3, seed=1)), function(normal(2, 3, 3, seed=1)))


@pytest.mark.parametrize("change", [lambda x: x * 1.0, lambda x: x / 1, lambda x: x**1.0, lambda x: x - 0.0])
def test_a_copy_of_a_slice_is_left_where_a_view_counts_on_its_order(change: Callable[[Tensor], Tensor]) -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        part = change(x.chunk(2, dim=-1)[0])  # [5, 3, 2] of [5, 3, 4], dense once it is copied
        return part.view(15, 2) + 1, change(x.transpose(0, 1)).as_strided((2, 3), (3, 1))

    graph = trace(function, [normal(5, 3, 4)])
    simplify(graph)
    other = normal(5, 3, 4, seed=1)
    assert all(map(torch.equal, graph(other), function(other)))


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


def test_memory_is_reused_along_a_chain_and_through_a_view() -> None:
    graph = trace(lambda x: x.exp().tanh().relu().view(3, 2).sigmoid(), [normal(6)])
    wanted = graph(normal(6, seed=1))
    reuse_memory(graph)
    over = [node for node in graph.graph.nodes if node.op == "call_function" and writes_over(node)]
    assert len(over) == 3
    assert torch.equal(graph(normal(6, seed=1)), wanted)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "silu": nn.functional.silu,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_slopes_write_over_what_nobody_reads(activation: str) -> None:
    """Of silu the slope alone, which reads what the activation is of."""

    def height(weight: Tensor, x: Tensor) -> Tensor:
        hidden = ACTIVATIONS[activation](x @ weight)
        return (ACTIVATIONS[activation](hidden @ weight) ** 2).sum()

    graph = trace(torch.func.grad(height), [normal(6, 6), normal(5, 6)])
    before = graph(normal(6, 6, seed=1), normal(5, 6, seed=2))
    simplify(graph)
    wanted = graph(normal(6, 6, seed=1), normal(5, 6, seed=2))
    reuse_memory(graph)
    over = [node for node in graph.graph.nodes if node.op == "call_function" and writes_over(node)]
    assert len(over) == (2 if activation == "silu" else 4)
    given = normal(6, 6, seed=1), normal(5, 6, seed=2)
    for _ in range(2):
        assert torch.equal(graph(*given), wanted)
    torch.testing.assert_close(wanted, before)  # silu's slopes to rounding
    assert all(map(torch.equal, given, (normal(6, 6, seed=1), normal(5, 6, seed=2))))


def silu_of(weight: Tensor, x: Tensor) -> Tensor:
    return nn.functional.silu(nn.functional.silu(x @ weight) @ weight).square().sum()


@pytest.mark.parametrize("several", [False, True])
def test_slopes_of_silu_are_one_operation_each(several: bool) -> None:
    function = torch.func.grad(silu_of)
    arguments = normal(6, 6), normal(5, 6)
    if several:
        function, arguments = torch.func.vmap(function, in_dims=(0, None)), (normal(3, 6, 6), normal(5, 6))
    graph = trace(function, arguments)
    simplify(graph)
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert len([name for name in names if "silu_backward" in name]) == 2
    assert not [name for name in names if "sigmoid" in name or "fill" in name]
    assert all(isinstance(node.meta.get("val"), Tensor) for node in graph.graph.nodes if "silu" in str(node.target))
    others = normal(*arguments[0].shape, seed=1), normal(5, 6, seed=2)
    torch.testing.assert_close(graph(*others), function(*others))


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x: (lambda s: (1.0 - s) * x + s)(x.sigmoid()), id="a sigmoid alone"),
        pytest.param(lambda x: (lambda s: x.sum() * s * (x * (torch.ones(6) - s) + 1.0))(x.sigmoid()), id="by hand"),
    ],
)
def test_other_uses_of_a_sigmoid_are_left(function: Callable[[Tensor], Tensor]) -> None:
    graph = trace(function, [normal(6)])
    simplify(graph)
    assert torch.equal(graph(normal(6, seed=1)), function(normal(6, seed=1)))


def read_through_a_view(x: Tensor) -> Tensor:
    made = x.exp()
    part = made[1:]
    made.mul_(2.0)
    return part + made[0]


@pytest.mark.parametrize(
    ("function", "writing"),
    [
        pytest.param(lambda x: x.exp().mul_(2.0).sub_(x), 0, id="into what was made"),
        pytest.param(lambda x: x.exp().mul_(2).clamp_(0.5), 0, id="by a number of another kind"),
        pytest.param(lambda x: torch.zeros(6).index_add_(0, torch.arange(6), x), 0, id="by place"),
        pytest.param(lambda x: x.exp().mul_(x.double()), 1, id="by values of another dtype"),
        pytest.param(lambda x: x.exp()[1:].mul_(2.0), 0, id="into a view of it"),
        pytest.param(lambda x: (lambda m: m + m)(x.exp().gt_(1.0)), 1, id="flags as numbers"),
        pytest.param(
            lambda x: (lambda y: y.addmm_(x[:2, None], x[None, :2]).t().reshape(-1))(x[:4].view(2, 2).t().exp()),
            1,
            id="laid out otherwise",
        ),
        pytest.param(read_through_a_view, 1, id="into what a view reads"),
        pytest.param(lambda x: (x.view(2, 3).T * 2).add_(x.view(3, 2)).T.view(6), 0, id="in another order"),
        pytest.param(lambda x: (lambda y: y.mul_(2.0).sum() + y.sum())(x.exp()), 0, id="into what is read later"),
    ],
)
def test_what_is_written_into_is_made_anew_where_nobody_else_reads_it(
    function: Callable[[Tensor], Tensor], writing: int
) -> None:
    graph = trace(function, [normal(6)])
    assert sum(map(writes, graph.graph.nodes)) == writing, graph.code
    assert torch.equal(graph(normal(6, seed=1)), function(normal(6, seed=1)))
    assert graph(normal(6, seed=1)).dtype == function(normal(6, seed=1)).dtype


def writes_over(node: fx.Node) -> bool:
    return node.target in (torch.tanh_, torch.relu_, torch.sigmoid_) or "grad_input" in node.kwargs


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x: x.tanh(), id="what is given"),
        pytest.param(lambda x: x.view(3, 2).tanh().sum() + x.sum(), id="a view of it"),
        pytest.param(lambda x: x.exp().tanh() + x.exp()[0], id="twice made"),
        pytest.param(lambda x: (lambda y: y.tanh() + y)(x.exp()), id="what is read again"),
        pytest.param(
            lambda x: (lambda y: y.view(3, 2).tanh().sum() + y.sum())(x.exp()), id="what is read again through a view"
        ),
        pytest.param(lambda x: (lambda y: (y.tanh(), y))(x.exp()), id="what is handed out"),
        pytest.param(lambda x: x.exp().to(torch.int64).sigmoid(), id="of another dtype"),
        pytest.param(lambda x: x.sort().values.tanh(), id="one of several results"),
    ],
)
def test_what_is_read_again_is_not_written_over(function: Callable[[Tensor], Any]) -> None:
    graph = trace(function, [normal(6)])
    wanted = function(normal(6, seed=1))
    reuse_memory(graph)
    given = normal(6, seed=1)
    found = graph(given)
    assert torch.equal(given, normal(6, seed=1))
    for a, b in zip(
        found if isinstance(found, tuple) else [found], wanted if isinstance(wanted, tuple) else [wanted], strict=True
    ):
        assert torch.equal(a, b)


def test_products_take_their_bias_in_and_nothing_is_left_of_views() -> None:
    function, arguments = CASES["several"]
    graph = trace(function, arguments)
    simplify(graph)
    names = [node.target.__name__ for node in graph.graph.nodes if node.op == "call_function"]
    assert sorted(names) == ["baddbmm", "expand", "tanh", "transpose", "view"]


def from_flat(flat: Tensor, x: Tensor) -> Tensor:
    """A layer whose weight and bias are parts of one row [30], as chains have them, and slopes of a sum in float64."""

    def height(flat: Tensor) -> Tensor:
        whole = flat[:30]
        logits = nn.functional.linear(x, whole[:24].view(6, 4), whole[24:])
        return logits.tanh().sum() - whole.square().sum(dtype=torch.float64)

    return -torch.func.grad(height)(flat)


def test_parts_of_flat_positions_cost_no_copies() -> None:
    """The bias goes into its product as it lies; a slice of everything and its slope are the thing itself; numbers are converted few."""
    several = torch.func.vmap(from_flat, in_dims=(0, None))
    graph = trace(several, [normal(3, 30), normal(5, 4)])
    wanted = graph(normal(3, 30, seed=1), normal(5, 4, seed=2))
    simplify(graph)
    assert torch.equal(graph(normal(3, 30, seed=1), normal(5, 4, seed=2)), wanted)
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    aten = torch.ops.aten
    assert not [node for node in calls if node.target is aten.mul.Scalar and node.args[1] == 1]
    slices = [node for node in calls if node.target in (aten.slice.Tensor, aten.slice_backward.default)]
    assert all(node.meta["val"].shape != node.args[0].meta["val"].shape for node in slices)
    assert [node.meta["val"].numel() for node in calls if node.target is aten._to_copy.default] == [3, 3]


def in_order(x: Tensor, y: Tensor) -> Tensor:
    many = x.double().unsqueeze(1).expand(3, 4).to(torch.float32)  # dense, which a view counts on
    return many.view(12) + y[0, 0]


def beside_a_transpose(x: Tensor, y: Tensor) -> Tensor:
    many = x.double().unsqueeze(1).expand(3, 4).to(torch.float32)  # after which the product is laid out, not after y
    return (many * y.T).view(12)


def of_a_transpose(x: Tensor, y: Tensor) -> Tensor:
    many = y.double().T.unsqueeze(0).expand(2, 3, 4).to(torch.float32)
    return (many * x[:, None]).reshape(24)


@pytest.mark.parametrize("function", [in_order, beside_a_transpose, of_a_transpose])
def test_what_is_read_in_its_own_order_is_converted_as_it_was(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    graph = trace(function, [normal(3), normal(4, 3)])
    simplify(graph)
    others = normal(3, seed=1), normal(4, 3, seed=1)
    assert torch.equal(graph(*others), function(*others))


def test_a_bias_that_cannot_be_seen_as_it_lies_is_copied_as_before() -> None:
    def function(weight: Tensor, x: Tensor) -> Tensor:
        bias = (weight[:, :, :2] / 1.0).reshape(3, 1, 8)  # [3, 4, 2] of [3, 4, 6], dense once it is copied
        return torch.bmm(x, weight[:, :, :1].expand(3, 4, 8)) + bias

    graph = trace(function, [normal(3, 4, 6), normal(3, 5, 4)])
    simplify(graph)
    others = normal(3, 4, 6, seed=1), normal(3, 5, 4, seed=1)
    torch.testing.assert_close(graph(*others), function(*others))


def test_what_only_python_saw_is_checked_before_it_is_taken_out() -> None:
    seen: list[str] = []
    trace(
        lambda x: x * x[x > 0].numel(),
        [torch.tensor([1.0, -1.0])],
        lambda graph: seen.extend(str(node.target) for node in graph.graph.nodes),
    )
    assert any("index" in name for name in seen)
