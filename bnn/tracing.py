"""The tensor operations of a function without the Python around them: traced, and compiled from the trace."""

from __future__ import annotations

import math
import operator
import shutil
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
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
    _make_anew(graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def untrue(graph: fx.GraphModule) -> str | None:
    """Why a trace would not be true of other values: shapes or numbers that follow data, random numbers; None where it is."""
    tags = {
        torch.Tag.dynamic_output_shape: "a shape that depends on values",
        torch.Tag.data_dependent_output: "a number that depends on values",
        torch.Tag.nondeterministic_seeded: "random numbers",
    }
    for node in graph.graph.nodes:
        for tag, words in tags.items():
            if node.op == "call_function" and tag in getattr(node.target, "tags", ()) and not _drops_nothing(node):
                return f"{words} ({node.target})"
        if "as_strided" in str(node.target):
            return "strides written out (as_strided)"
    return None


def _drops_nothing(node: fx.Node) -> bool:
    """Attention of torch counts as random, also where its dropout, the only number among its arguments, is 0."""
    numbers = [value for value in (*node.args, *node.kwargs.values()) if isinstance(value, float)]
    return "scaled_dot_product" in str(node.target) and "dropout_p" not in node.kwargs and not any(numbers[:1])


def _make_anew(graph: fx.GraphModule) -> None:
    """x.sub_(y) -> x.sub(y) of the same form, where nobody else reads x: so torch writes slopes of SiLU, for one.

    A trace in which nothing is written into can be simplified.
    """
    for node in graph.graph.nodes:
        source: Any = node.args[0] if writes(node) and node.args else None
        if not _is_owned(source) or len(source.users) > 1 or value_of(node) is None:
            continue
        name, overload = node.target._schema.name.removeprefix("aten::"), node.target._overloadname
        anew = getattr(getattr(torch.ops.aten, name.removesuffix("_"), None), overload, None)
        if name.endswith("_") and anew is not None and all(value_of(part) is not None for part in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), value_of)
            with suppress(Exception):  # what cannot be foreseen stays as it is
                node.target = anew if _form(anew(*args, **kwargs)) == _form(value_of(node)) else node.target


def _form(value: Any) -> tuple[Any, ...] | None:
    """Of a tensor what views of it count on, and what numbers it holds."""
    return (value.shape, value.stride(), value.dtype, value.device) if isinstance(value, Tensor) else None


def compiled(graph: fx.GraphModule, arguments: Sequence[Tensor], threads: int = 0) -> Callable[..., Any]:
    """A trace handed to torch's compiler, and compiled at once; `threads` of 0 are as many as torch has.

    Where nothing is written into, views in it become reshapes, which copy what does not lie as it should: of some kernels, such as
    the slope of a log softmax over a transpose, the compiler expects results that lie as their inputs do, not as the kernels
    leave them.
    """
    if not any(map(writes, graph.graph.nodes)):
        for node in graph.graph.nodes:
            if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
                node.target = torch.ops.aten.reshape.default
        graph.recompile()
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
    if any(map(writes, graph.graph.nodes)):
        return  # who writes into what is left as it was
    for node in [node for node in graph.graph.nodes if node.op == "call_function"]:
        same = node.args[0] if _does_nothing(node) else _turned_twice(node)
        if same is not None:
            node.replace_all_uses_with(same)
            graph.graph.erase_node(node)
    if any(node.target is aten.sigmoid.default for node in graph.graph.nodes):
        _fuse_slopes_of_silu(graph)
    for node in graph.graph.find_nodes(op="call_function", target=aten._to_copy.default):
        _convert_before_expanding(graph.graph, node)
    for node in graph.graph.find_nodes(op="call_function", target=aten.add.Tensor):
        _add_inside_product(graph.graph, node)
    graph.graph.eliminate_dead_code()
    for node in graph.graph.nodes:
        if node.op == "call_function" and not node.kwargs:
            node.target = _FASTER.get(node.target, node.target)
    graph.recompile()


def reuse_memory(graph: fx.GraphModule) -> None:
    """Let activations and their slopes write over what they are made of, where nobody else reads it; the same bits.

    What is written where it was read needs no other memory, and no room in a cache for it. For graphs that are called without
    autograd.
    """
    owned = {node for node in graph.graph.nodes if _is_owned(node)}
    for node in graph.graph.nodes:
        source: Any = node.args[0] if node.op == "call_function" and node.args else None
        if source not in owned or len(source.users) > 1:
            continue
        if value_of(node) is None or _form(value_of(source)) != _form(value_of(node)):
            continue
        if operation_of(node) in _OVER:
            node.target = _OVER[operation_of(node)]
        elif node.target in _SLOPE_OVER:
            node.target, node.kwargs = _SLOPE_OVER[node.target], {**node.kwargs, "grad_input": source}
    graph.recompile()


def _is_owned(node: Any) -> bool:
    """Whether it is a call whose result lies in memory that the call has made, or that nobody reads but through this result."""
    called = operation_of(node) if isinstance(node, fx.Node) else None
    if not isinstance(called, torch._ops.OpOverload) or len(called._schema.returns) != 1:
        return False
    if is_view(node):
        return len(node.all_input_nodes) == 1 and len(node.all_input_nodes[0].users) == 1 and _is_owned(node.args[0])
    return called._schema.returns[0].alias_info is None


def is_view(node: fx.Node) -> bool:
    """Whether results of a call lie in the memory of what it is given."""
    called = operation_of(node)
    if called is torch.ops.aten._unsafe_view.default:  # whose declaration denies it
        return True
    return isinstance(called, torch._ops.OpOverload) and any(
        part.alias_info is not None for part in called._schema.returns
    )


def lies_in_another(node: fx.Node) -> bool:
    """Whether a result is in the memory of the first thing that its call is given: a view, or one of several views."""
    if node.op == "call_function" and operation_of(node) is operator.getitem:
        return is_view(node.all_input_nodes[0])
    return node.op == "call_function" and is_view(node)


_OVER: dict[Any, Any] = {
    torch.ops.aten.tanh.default: torch.tanh_,
    torch.ops.aten.relu.default: torch.relu_,
    torch.ops.aten.sigmoid.default: torch.sigmoid_,
}
_SLOPE_OVER: dict[Any, Any] = {
    torch.ops.aten.tanh_backward.default: torch.ops.aten.tanh_backward.grad_input,
    torch.ops.aten.threshold_backward.default: torch.ops.aten.threshold_backward.grad_input,  # of relu
    torch.ops.aten.sigmoid_backward.default: torch.ops.aten.sigmoid_backward.grad_input,
    torch.ops.aten.silu_backward.default: torch.ops.aten.silu_backward.grad_input,
}
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


def writes(node: fx.Node) -> bool:
    """Whether a call writes into what it is given."""
    called = operation_of(node)
    return isinstance(called, torch._ops.OpOverload) and called._schema.is_mutable


def written_by(node: fx.Node) -> list[fx.Node]:
    """What a call writes into, of what it is given."""
    if not writes(node):
        return []
    arguments = operation_of(node)._schema.arguments
    given = dict(zip((argument.name for argument in arguments), node.args, strict=False)) | node.kwargs
    found: list[fx.Node] = []
    for argument in arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            fx.map_arg(given.get(argument.name), found.append)
    return found


def operation_of(node: fx.Node) -> Any:
    """What a call runs, also where `simplify` has put a function of torch in the place of its operation."""
    return _OPERATIONS.get(node.target, node.target)


_OPERATIONS: dict[Any, Any] = {function: operation for operation, function in _FASTER.items()}


def _does_nothing(node: fx.Node) -> bool:
    """A view, expansion or slice that is all that is there already, or a number that changes nothing: x 1, / 1, ** 1, - 0."""
    aten = torch.ops.aten
    before, after = (value_of(node.args[0]) if node.args else None), value_of(node)
    if after is None or _form(before) != _form(after):
        return False  # of a slice x 1 is a copy, in another order, which a view may count on
    if node.target is aten.slice_backward.default or _is_neutral(node):
        return all(user.op != "output" for user in node.users)  # outputs are no inputs
    return node.target in _VIEWS


def _turned_twice(node: fx.Node) -> Any:
    """What a transpose of a transpose is a view of, where it lies as that does; else None."""
    turned: Any = node.args[0] if node.target in _TRANSPOSES else None
    if not isinstance(turned, fx.Node) or turned.target not in _TRANSPOSES:
        return None
    if value_of(node) is None or _form(value_of(turned.args[0])) != _form(value_of(node)):
        return None
    axes = {part.args[1:] for part in (node, turned)}
    return turned.args[0] if len(axes) == 1 else None


def _is_neutral(node: fx.Node) -> bool:
    """Whether a number is added or multiplied that changes nothing."""
    number = node.args[1] if node.target in _NEUTRAL and len(node.args) == 2 and not node.kwargs else None
    return isinstance(number, int | float) and number == _NEUTRAL[node.target] and math.copysign(1.0, number) > 0


def value_of(part: Any) -> Tensor | None:
    """What is known of a tensor of the trace: shape, strides, dtype."""
    found = part.meta.get("val") if isinstance(part, fx.Node) else None
    return found if isinstance(found, Tensor) else None


_VIEWS = (
    torch.ops.aten.view.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.expand.default,
    torch.ops.aten.slice.Tensor,
    torch.ops.aten.detach.default,
    torch.ops.aten.alias.default,
)
_TRANSPOSES = (torch.ops.aten.transpose.int, torch.ops.aten.t.default)
_NEUTRAL: dict[Any, int] = {
    torch.ops.aten.mul.Scalar: 1,
    torch.ops.aten.mul.Tensor: 1,
    torch.ops.aten.div.Tensor: 1,
    torch.ops.aten.pow.Tensor_Scalar: 1,
    torch.ops.aten.sub.Tensor: 0,
}


def _convert_before_expanding(graph: fx.Graph, node: fx.Node) -> None:
    """x.expand(shape).to(dtype) -> x.to(dtype).expand(shape), where dense tensors of that shape are made of it by arithmetic."""
    aten = torch.ops.aten
    expanded: Any = node.args[0]
    if not isinstance(expanded, fx.Node) or expanded.target is not aten.expand.default or set(node.kwargs) != {"dtype"}:
        return
    few: Any = expanded.args[0]
    shape = expanded.args[1:]
    # What others are laid out by must be dense as it was, for views to come.
    users = [user for user in node.users if user.target in _ARITHMETIC]
    beside = [
        value_of(part)
        for user in users
        for part in (user, *user.args)
        if isinstance(part, fx.Node) and part is not node
    ]
    dense = all(value is not None and value.is_contiguous() for value in (value_of(few), *beside))
    shapes = {value.shape for value in map(value_of, (node, *users)) if value is not None}
    if len(users) < len(node.users) or not dense or len(shapes) > 1:
        return
    with graph.inserting_before(node):
        converted = graph.call_function(aten._to_copy.default, (few,), node.kwargs)
        many = graph.call_function(aten.expand.default, (converted, *shape))
    converted.meta["val"] = aten._to_copy.default(few.meta["val"], **node.kwargs)
    many.meta["val"] = aten.expand.default(converted.meta["val"], *shape)
    node.replace_all_uses_with(many)
    graph.erase_node(node)


_ARITHMETIC = (
    torch.ops.aten.add.Tensor,
    torch.ops.aten.sub.Tensor,
    torch.ops.aten.mul.Tensor,
    torch.ops.aten.div.Tensor,
)


def _fuse_slopes_of_silu(graph: fx.GraphModule) -> None:
    """d silu(x) / dx, which torch writes in eight operations where slopes may have slopes of their own, by its one for the rest."""
    # Which a trace has loaded, and whoever imports this room need not.
    from torch.fx.passes.utils.matcher_utils import InternalMatch
    from torch.fx.subgraph_rewriter import replace_pattern_with_filters

    aten = torch.ops.aten

    def written(slope: Any, x: Any) -> Any:
        sigmoid = aten.sigmoid.default(x)
        ones = aten.fill.Scalar(aten.empty_like.default(sigmoid, memory_format=torch.preserve_format), 1.0)
        rest = aten.add.Scalar(aten.mul.Tensor(x, aten.sub.Tensor(ones, sigmoid)), 1.0)
        return aten.mul.Tensor(aten.mul.Tensor(slope, sigmoid), rest)

    def fused(slope: Any, x: Any) -> Any:
        return aten.silu_backward.default(slope, x)

    def alike(match: InternalMatch, original: fx.Graph, pattern: fx.Graph) -> bool:
        forms = {_form(value_of(node)) for node in (*match.placeholder_nodes, *match.returning_nodes)}
        return len(forms) == 1 and None not in forms

    for found in replace_pattern_with_filters(graph, written, fused, [alike]):
        for node in found.replacements:
            value = next(value for value in map(value_of, node.all_input_nodes) if value is not None)
            node.meta["val"] = torch.empty_like(value)


def _add_inside_product(graph: fx.Graph, node: fx.Node) -> None:
    """bias + bmm(a, b) -> baddbmm(bias, a, b), where the product is used for nothing else."""
    if len(node.args) != 2 or node.kwargs:
        return
    for product, bias in (node.args, node.args[::-1]):
        if not (isinstance(product, fx.Node) and isinstance(bias, fx.Node)):
            continue
        values = [value_of(part) for part in (product, bias, node)]
        shapes = [None if value is None else value.shape for value in values]
        dtypes = {value.dtype for value in values if value is not None}
        fits = product.target is torch.ops.aten.bmm.default and len(product.users) == 1 and shapes[0] == shapes[2]
        fits = fits and len(dtypes) == 1
        if fits and shapes[1] is not None and len(shapes[1]) in (0, 1, 2, 3):
            with graph.inserting_before(node):
                unscaled = _unscaled(graph, bias)
                fused = graph.call_function(torch.ops.aten.baddbmm.default, (unscaled, *product.args))
            fused.meta = dict(node.meta)
            node.replace_all_uses_with(fused)
            graph.erase_node(node)
            return


def _unscaled(graph: fx.Graph, bias: fx.Node) -> fx.Node:
    """A bias without a product with 1 before it, which has made it dense: products of matrices take one of any strides."""
    view = torch.ops.aten.view.default
    viewed = bias.target is view
    scaled: Any = bias.args[0] if viewed else bias
    source = scaled.args[0] if isinstance(scaled, fx.Node) and _is_neutral(scaled) else None
    value, wanted = value_of(source), value_of(scaled)
    if not isinstance(source, fx.Node) or value is None or wanted is None:
        return bias
    if value.dtype != wanted.dtype or value.shape != wanted.shape:
        return bias
    if not viewed:
        return source
    try:
        there = view(value, bias.args[1])
    except (RuntimeError, ValueError):  # it cannot be seen so without a copy; of fake tensors torch raises the latter
        return bias
    seen = graph.call_function(view, (source, bias.args[1]))
    seen.meta["val"] = there
    return seen
