"""What a trace makes of its data alone, taken out of it: computed once, not at each call."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from bnn.tracing import lies_in_another, operation_of, value_of, writes


def hoist(graph: fx.GraphModule, most_bytes: int) -> fx.GraphModule:
    """Take out of a trace what does not depend on its first argument: views of the others, and values of few bytes.

    A trace f(u, *data) becomes f(u, *data, *made) with made = found(*data), and the same bits, as long as nobody changes the data
    or constants of the trace. Random numbers stay, and what is handed out; so do the largest of the values, until the others
    take no more than `most_bytes` together.

    Returns:
        found: data -> made, a tuple of tensors.

    Examples:
        >>> import torch
        >>> from bnn.tracing import trace
        >>> graph = trace(lambda u, x: u * x.exp().sum(), [torch.ones(2), torch.ones(3)])
        >>> made = hoist(graph, most_bytes=100)(torch.ones(3))
        >>> [tuple(each.shape) for each in made], graph(torch.ones(2), torch.ones(3), *made)
        ([()], tensor([8.1548, 8.1548]))
    """
    _, *data = graph.graph.find_nodes(op="placeholder")
    alone: list[fx.Node] = []
    if not any(map(writes, graph.graph.nodes)):  # who writes into what is left as it was
        _fill_by_shape(graph.graph)
        alone = _of_data_alone(graph.graph, data)
    made = _edge(alone)
    while made and sum(dict(map(_memory, made)).values()) > most_bytes:
        largest = max(made, key=lambda node: _memory(node)[1])
        dropped: set[fx.Node] = {largest}
        for node in alone:
            if not dropped.isdisjoint(node.all_input_nodes):
                dropped.add(node)
        alone = [node for node in alone if node not in dropped]
        made = _edge(alone)
    found = _alone(graph, data, alone, made)
    with graph.graph.inserting_after([*graph.graph.find_nodes(op="placeholder")][-1]):
        for node in reversed(made):
            given = graph.graph.placeholder(f"made_{node.name}")
            given.meta = dict(node.meta)
            node.replace_all_uses_with(given)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return found


def _alone(
    graph: fx.GraphModule, data: Iterable[fx.Node], alone: Iterable[fx.Node], made: Iterable[fx.Node]
) -> fx.GraphModule:
    """data -> made, by the operations `alone`."""
    whole = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {node: whole.placeholder(node.name) for node in data}
    for node in [*graph.graph.find_nodes(op="get_attr"), *alone]:
        copies[node] = whole.node_copy(node, lambda each: copies[each])
    whole.output(tuple(copies[node] for node in made))
    whole.eliminate_dead_code()
    return fx.GraphModule(graph, whole)


def _of_data_alone(graph: fx.Graph, data: Iterable[fx.Node]) -> list[fx.Node]:
    """Calls whose results follow from these arguments and constants, in their order; but for random numbers, and what is handed out."""
    outward = set(next(node for node in graph.nodes if node.op == "output").all_input_nodes)
    for node in reversed(graph.nodes):
        if node in outward and lies_in_another(node):
            outward.update(node.all_input_nodes[:1])
    known = {*data, *graph.find_nodes(op="get_attr")}
    found = []
    for node in graph.nodes:
        settled = node.op == "call_function" and node not in outward and _settled(node)
        if settled and known.issuperset(node.all_input_nodes):
            known.add(node)
            found.append(node)
    return found


def _settled(node: fx.Node) -> bool:
    """Whether a call gives the same each time."""
    called = operation_of(node)
    if called is operator.getitem:
        return True
    return isinstance(called, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded not in called.tags


def _edge(alone: list[fx.Node]) -> list[fx.Node]:
    """Of these calls those that others ask for."""
    within = set(alone)
    return [node for node in alone if value_of(node) is not None and not within.issuperset(node.users)]


def _memory(node: fx.Node) -> tuple[fx.Node, int]:
    """Which call has made the memory that a result lies in, and how many bytes: none of an argument's."""
    while lies_in_another(node):
        node = node.all_input_nodes[0]
    value = value_of(node)
    return node, 0 if node.op != "call_function" or value is None else value.nbytes


def _fill_by_shape(graph: fx.Graph) -> None:
    """x.new_zeros(shape), ones_like(x) and their kind -> full(shape, number), which asks for no tensor."""
    aten = torch.ops.aten
    numbers = {
        aten.zeros_like.default: 0,
        aten.ones_like.default: 1,
        aten.new_zeros.default: 0,
        aten.new_ones.default: 1,
    }
    for node in graph.nodes:
        value: Tensor | None = value_of(node)
        if node.op != "call_function" or node.target not in numbers or value is None or not value.is_contiguous():
            continue
        with graph.inserting_before(node):
            options: dict[str, Any] = {"dtype": value.dtype, "device": value.device, "pin_memory": False}
            filled = graph.call_function(aten.full.default, (list(value.shape), numbers[node.target]), options)
        filled.meta = dict(node.meta)
        node.replace_all_uses_with(filled)
        graph.erase_node(node)
