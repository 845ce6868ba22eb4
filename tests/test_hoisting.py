"""What a trace makes of its data alone: computed once, with the same bits, and within its bytes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from bnn.hoisting import hoist
from bnn.seeding import generator
from bnn.tracing import simplify, trace

PLENTY = 2**30


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed, *shape))


def calls(graph: fx.GraphModule) -> list[str]:
    return [node.target.__name__ for node in graph.graph.nodes if node.op == "call_function"]


def classes(u: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Slopes of the log likelihood of classes at several u [K, 12], of rows [B, 3] and their classes [B]."""

    def height(u: Tensor) -> Tensor:
        logits = nn.functional.linear(x.tanh(), u.view(4, 3)).log_softmax(dim=1)
        return logits.gather(1, y.unsqueeze(1)).sum(dtype=torch.float64)

    return torch.func.vmap(torch.func.grad(height))(u)


def data(seed: int) -> tuple[Tensor, Tensor]:
    return normal(7, 3, seed=seed), torch.randint(4, (7,), generator=generator(seed))


@pytest.mark.parametrize("simple", [False, True])
def test_what_is_made_of_data_alone_is_made_once_with_the_same_bits(simple: bool) -> None:
    graph = trace(classes, [normal(2, 12), *data(0)])
    if simple:
        simplify(graph)
    wanted = {seed: graph(normal(2, 12, seed=9), *data(seed)) for seed in (0, 1)}
    names = calls(graph)
    found = hoist(graph, PLENTY)
    left = calls(graph)
    assert any("tanh" in name for name in names)
    assert any("scatter" in name for name in names)  # of the targets' places, which slopes begin with
    assert not [name for name in left if "tanh" in name or "scatter" in name]
    for seed, value in wanted.items():
        kept = [each.clone() for each in data(seed)]
        made = found(*data(seed))
        assert torch.equal(graph(normal(2, 12, seed=9), *data(seed), *made), value)
        assert torch.equal(graph(normal(2, 12, seed=9), *data(seed), *made), value)  # what was made is not used up
        assert all(map(torch.equal, kept, data(seed)))


def storages(made: tuple[Tensor, ...], given: tuple[Tensor, ...]) -> int:
    """Bytes of the memory that these hold beside what was given."""
    own = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in made}
    return sum(num_bytes for place, num_bytes in own.items() if place not in {g.data_ptr() for g in given})


@pytest.mark.parametrize("most", [0, 55, 56, 139, 140, 307, 308, PLENTY])
def test_values_within_their_bytes_are_kept_the_largest_last(most: int) -> None:
    graph = trace(classes, [normal(2, 12), *data(0)])
    wanted = graph(normal(2, 12, seed=9), *data(1))
    given = data(1)
    made = hoist(graph, most)(*given)
    assert storages(made, given) <= most
    assert torch.equal(graph(normal(2, 12, seed=9), *given, *made), wanted)
    # tanh(x) [7, 3] has 84 bytes, the targets' places [2, 7, 4] 224, and the ones at them [2, 7] 56.
    assert ("tanh.default" in calls(graph)) == (most < 84 + 56)
    assert ("scatter_add.default" in calls(graph)) == (most < 84 + 224)
    assert ("_to_copy.default" in calls(graph)) == (most < 56)
    assert made  # views of the data cost nothing


def test_random_numbers_are_drawn_at_each_call() -> None:
    graph = trace(lambda u, x: u + torch.rand_like(x) * x.exp(), [normal(5), normal(5)])
    made = hoist(graph, PLENTY)(normal(5))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.equal(graph(normal(5), normal(5), *made), graph(normal(5), normal(5), *made))
    assert [each.shape for each in made] == [(5,)]  # exp


@pytest.mark.parametrize(
    ("function", "kept"),
    [
        pytest.param(lambda u, x: (u + x.exp(), x.sin()), 1, id="itself"),
        pytest.param(lambda u, x: (u + x.exp(), x.sin().view(1, 5).expand(3, 5)), 1, id="a view of it"),
        pytest.param(lambda u, x: (u + x.exp(), x.sin().view(5, 1).split(2)[0]), 1, id="a part of it"),
        pytest.param(lambda u, x: (u + x.exp(), u * x.sin()), 2, id="something of both"),
    ],
)
def test_what_is_handed_out_is_made_anew(
    function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], kept: int
) -> None:
    graph = trace(function, [normal(5), normal(5)])
    made = hoist(graph, PLENTY)(normal(5))
    assert len(made) == kept
    memory = {each.untyped_storage().data_ptr() for each in made}
    for _ in range(2):
        found = graph(normal(5), normal(5), *made)
        assert all(map(torch.equal, found, function(normal(5), normal(5))))
        assert not memory & {each.untyped_storage().data_ptr() for each in found}


def test_several_results_of_one_operation_count_each() -> None:
    def function(u: Tensor, x: Tensor) -> Tensor:
        values, places = x.topk(10)  # 40 and 80 bytes
        return u * values + places

    wanted = function(normal(10), normal(20, seed=1))
    for most, kept in ((119, 40), (120, 120)):
        graph = trace(function, [normal(10), normal(20)])
        made = hoist(graph, most)(normal(20, seed=1))
        assert storages(made, (normal(20, seed=1),)) == kept
        assert torch.equal(graph(normal(10), normal(20, seed=1), *made), wanted)


def written(u: Tensor, x: Tensor) -> Tensor:
    once = x * 1.0
    once[1:].mul_(2.0)
    return u + once


@pytest.mark.parametrize(
    ("function", "left"),
    [
        pytest.param(written, 4, id="who writes is left alone"),
        pytest.param(lambda u, x: u + (x * 1.0).mul_(2.0), 1, id="who writes into its own"),
        pytest.param(lambda u, x: u * torch.ones_like(u) + u.new_zeros(5), 2, id="shapes are known"),
        pytest.param(lambda u, x: u.exp(), 1, id="nothing of the data"),
        pytest.param(lambda u, x: u + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).sin(), 1, id="constants"),
        pytest.param(lambda u, x: u + x.max(dim=0).values + x.view(5, 1).split(2)[0].sum(), 2, id="several results"),
        pytest.param(lambda u, x: u + torch.ones_like(torch.outer(u, x).T).sum(dim=0), 6, id="of another order"),
    ],
)
def test_what_is_left(function: Callable[[Tensor, Tensor], Tensor], left: int) -> None:
    graph = trace(function, [normal(5), normal(5)])
    made = hoist(graph, PLENTY)(normal(5, seed=1))
    u, x = normal(5, seed=2), normal(5, seed=1)
    assert torch.equal(graph(u, x, *made), function(u, x))
    assert len(calls(graph)) == left, calls(graph)


def test_without_data_there_is_nothing_to_give() -> None:
    graph = trace(lambda u: u * torch.ones_like(u), [normal(5)])
    made = hoist(graph, PLENTY)()
    assert torch.equal(graph(normal(5, seed=1), *made), normal(5, seed=1))
