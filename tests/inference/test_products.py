"""Products by oneDNN against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from bnn.inference import products
from bnn.inference.density import prepare, target_of_function
from bnn.seeding import generator

needs_onednn = pytest.mark.skipif(not products.available(), reason="no oneDNN in this build of torch, or no x86 CPU")


@needs_onednn
@pytest.mark.parametrize("turned", [False, True])
def test_products_are_those_of_torch(turned: bool) -> None:
    left = torch.randn(3, 70, 66, generator=generator(0))
    right = torch.randn(3, 65, 66, generator=generator(1)).transpose(1, 2)
    if turned:  # as the gradient of weights asks for them
        left, right = left.transpose(1, 2).contiguous().transpose(1, 2), right.contiguous()
    expected = (left.double() @ right.double()).float()
    torch.testing.assert_close(products.products(left, right), expected, rtol=1e-5, atol=1e-4)
    torch.library.opcheck(products.products, (left, right))


@needs_onednn
def test_large_products_of_a_graph_are_replaced_and_small_ones_are_not() -> None:
    def function(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return torch.bmm(torch.bmm(a, b), c)

    sizes = ((2, 130, 70), (2, 70, 80), (2, 80, 5))
    values = [torch.randn(size, generator=generator(2, *size)) for size in sizes]
    graph = make_fx(function)(*values)
    assert products.replaced(graph) == 1
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert names == ["bnn.products.default", "aten.bmm.default"]
    torch.testing.assert_close(graph(*values), function(*values), rtol=1e-4, atol=1e-3)
    assert products.replaced(graph) == 0


@pytest.mark.parametrize("size", [63, 64])
def test_sides_under_the_limit_stay(size: int) -> None:
    values = torch.randn(2, 200, size), torch.randn(2, size, 100)
    assert products.replaced(make_fx(torch.bmm)(*values)) == (size == 64)


def test_other_dtypes_stay() -> None:
    values = torch.randn(2, 200, 90, dtype=torch.float64), torch.randn(2, 90, 100, dtype=torch.float64)
    assert products.replaced(make_fx(torch.bmm)(*values)) == 0


@needs_onednn
@pytest.mark.parametrize(("vendor", "taken"), [("AuthenticAMD", True), ("GenuineIntel", False), ("", False)])
def test_a_new_run_takes_them_on_amd_alone_and_a_recorded_plan_everywhere(
    monkeypatch: pytest.MonkeyPatch, vendor: str, taken: bool
) -> None:
    monkeypatch.setattr(products, "cpu", lambda key: vendor)
    matrix = torch.randn(70, 70, generator=generator(4)) / 10
    rows = torch.randn(110, 70, generator=generator(5))
    target = target_of_function(lambda u: -(rows @ (u.view(70, 70) @ matrix).tanh()).square().sum() / 1000, None)
    flat = torch.randn(3, 4900, generator=generator(6))
    made = prepare(target, flat, num_gradients=1, memory=None, compile=False)
    assert made.plan.onednn == taken
    again = prepare(target, flat, num_gradients=1, memory=None, compile=False, plan=made.plan._replace(onednn=True))
    assert again.plan.onednn
    torch.testing.assert_close(again(flat).gradient, made(flat).gradient, rtol=1e-3, atol=1e-4)
