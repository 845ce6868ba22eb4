"""The tensor operations of a function without the Python around them: traced, and compiled from the trace."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx


def trace(
    function: Callable[..., Any],
    arguments: Sequence[Tensor],
    check: Callable[[fx.GraphModule], None] = lambda graph: None,
) -> fx.GraphModule:
    """The tensor operations that a function runs on such arguments, without the Python and autograd around them.

    `check` sees all operations, also those whose results went into Python alone, which are then taken out.
    """
    # A third of a second, which not everybody needs.
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    # Each operation notes the shape of its result in a mode for such notes: without one at hand torch makes one an
    # operation, stack trace and all, which is half the time of a trace.
    notes = TracingContext(FakeTensorMode(allow_fallback_kernels=True))
    with tracing(notes), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch says of its own tracing
        graph = make_fx(function)(*arguments)
    check(graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def compiled(graph: fx.GraphModule, arguments: Sequence[Tensor], threads: int = 0) -> Callable[..., Any]:
    """A trace handed to torch's compiler, and compiled at once; `threads` of 0 are as many as torch has."""
    # tanh by way of exp: to rounding of 1, not of the value, and three times as fast.
    settings: dict[str, str | int | bool | Callable[..., Any]] = {
        "cpp.threads": threads or -1,
        "cpp.use_decompose_tanh": True,
    }
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch says of itself while it loads its compiler
        function: Callable[..., Any] = torch.compile(graph, dynamic=False, options=settings)
        function(*arguments)  # compiled now, not at the first step; again with these settings where torch forgets it
    return function


def has_compiler(device: torch.device) -> bool:
    """Whether torch.compile can work here: with a C++ compiler, for CUDA with Triton, which torch brings there."""
    from torch._inductor import config as inductor

    option = inductor.cpp.cxx
    chosen = [name for name in (option if isinstance(option, tuple) else (option,)) if name]
    return device.type == "cuda" or any(shutil.which(name) for name in (*chosen, "c++", "g++", "clang++"))


def simplify(graph: fx.GraphModule) -> None:
    """Take out operations that do nothing, add biases inside products, and call torch's functions where they are faster.

    Each call of a small operation costs a microsecond or two, whatever it does. Results agree to rounding.
    """
    aten = torch.ops.aten
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    if any(node.target._schema.is_mutable for node in calls if hasattr(node.target, "_schema")):
        return  # who writes into what is left as it was
    for node in calls:
        if _does_nothing(node):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    for node in list(graph.graph.find_nodes(op="call_function", target=aten.add.Tensor)):
        _add_inside_product(graph.graph, node)
    graph.graph.eliminate_dead_code()
    for node in graph.graph.nodes:
        if node.op == "call_function" and not node.kwargs:
            node.target = _FASTER.get(node.target, node.target)
    graph.recompile()


_FASTER: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.addmm.default: torch.addmm,
    torch.ops.aten.baddbmm.default: torch.baddbmm,
    torch.ops.aten.bmm.default: torch.bmm,
    torch.ops.aten.mm.default: torch.mm,
    torch.ops.aten.t.default: torch.t,
    torch.ops.aten.transpose.int: torch.transpose,
    torch.ops.aten.tanh.default: torch.tanh,
    torch.ops.aten.relu.default: torch.relu,
    torch.ops.aten.unsqueeze.default: torch.unsqueeze,
    torch.ops.aten.expand.default: torch.Tensor.expand,
    torch.ops.aten.view.default: torch.Tensor.view,
}


def _does_nothing(node: fx.Node) -> bool:
    """A view or expansion to the shape that is there already, or a number that changes nothing: x 1, / 1, ** 1, - 0."""
    aten = torch.ops.aten
    before, after = (
        part.meta.get("val") if isinstance(part, fx.Node) else None
        for part in (node.args[0] if node.args else None, node)
    )
    if not isinstance(before, Tensor) or not isinstance(after, Tensor) or before.dtype != after.dtype:
        return False
    same = before.shape == after.shape and before.stride() == after.stride()
    if node.target in _NEUTRAL:
        returned = any(user.op == "output" for user in node.users)  # outputs are no inputs
        number = node.args[1] if len(node.args) == 2 and not node.kwargs else None
        neutral = isinstance(number, int | float) and number == _NEUTRAL[node.target] and math.copysign(1.0, number) > 0
        return same and neutral and not returned  # of a slice it is a copy, in another order, which a view may count on
    views = (aten.view.default, aten._unsafe_view.default, aten.expand.default, aten.detach.default, aten.alias.default)
    return node.target in views and same


_NEUTRAL: dict[Any, int] = {
    torch.ops.aten.mul.Scalar: 1,
    torch.ops.aten.mul.Tensor: 1,
    torch.ops.aten.div.Tensor: 1,
    torch.ops.aten.pow.Tensor_Scalar: 1,
    torch.ops.aten.sub.Tensor: 0,
}


def _add_inside_product(graph: fx.Graph, node: fx.Node) -> None:
    """bias + bmm(a, b) -> baddbmm(bias, a, b), where the product is used for nothing else."""
    if len(node.args) != 2 or node.kwargs:
        return
    for product, bias in (node.args, node.args[::-1]):
        if not (isinstance(product, fx.Node) and isinstance(bias, fx.Node)):
            continue
        shapes = [
            part.meta["val"].shape if isinstance(part.meta.get("val"), Tensor) else None
            for part in (product, bias, node)
        ]
        dtypes = {part.meta["val"].dtype for part in (product, bias, node) if isinstance(part.meta.get("val"), Tensor)}
        fits = product.target is torch.ops.aten.bmm.default and len(product.users) == 1 and shapes[0] == shapes[2]
        fits = fits and len(dtypes) == 1
        if fits and shapes[1] is not None and len(shapes[1]) in (0, 1, 2, 3):
            with graph.inserting_before(node):
                fused = graph.call_function(torch.ops.aten.baddbmm.default, (bias, *product.args))
            fused.meta = dict(node.meta)
            node.replace_all_uses_with(fused)
            graph.erase_node(node)
            return
