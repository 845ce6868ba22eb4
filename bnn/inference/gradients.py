"""Gradients of a model's log density on batches: through Python at first, by a trace where many have the same form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from bnn.functional.skeleton import streams
from bnn.functional.ways import apart, is_plain, signature
from bnn.model import BayesianModel
from bnn.seeding import isolated
from bnn.tracing import lies_in_another, reuse_memory, simplify, trace, untrue, written_by
from bnn.types import Batch

STEPS_BEFORE_TRACING = 50  # a trace takes as long as many gradients of a small module
CHECKS = 2  # batches on which a trace is held against Python: what it took from the first is another in the second
MOST_FORMS = 64  # of batches that are traced: where each had another length, every step would pay for a trace

Height: TypeAlias = Callable[[Tensor, Batch, float], Tensor]
"""u [P], a batch and its weight -> a log density, a scalar."""

Gradient: TypeAlias = Callable[[Tensor, Batch, float, int], tuple[Tensor, ...]]
"""Positions u [M, P], a batch, its weight and the number of the step -> gradient [M, P] and value [M] of a log density."""


def height_of(model: BayesianModel, *, constrained: bool = False) -> Height:
    """The log density of u; `constrained`, that of the values that a bank keeps, without the Jacobian: its maximum is the MAP."""

    def height(flat: Tensor, batch: Batch, weight: float) -> Tensor:
        log_density, log_joint = model.log_density(flat, batch, weight=weight)
        return log_joint if constrained else log_density

    return height


def gradient_of(model: BayesianModel, *, constrained: bool = False) -> Gradient:
    """The gradient of the log density of M positions, in the unconstrained space of the model; traced as `Repeated` says.

    Args:
        model: whose density.
        constrained: as for `height_of`.
    """
    height = height_of(model, constrained=constrained)
    several = torch.func.vmap(torch.func.grad_and_value(height), in_dims=(0, None, None))

    def gradient(flat: Tensor, batch: Batch, weight: float) -> tuple[Tensor, ...]:
        if len(flat) == 1:  # a batch axis of one only slows convolutions down
            return _slope_of_one(lambda place: height(place, batch, weight), flat)
        slopes, heights = several(flat, batch, weight)
        return slopes.detach(), heights.detach()

    return Repeated(gradient, model.device)


def _slope_of_one(height_at: Callable[[Tensor], Tensor], flat: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient [1, P] and height [1] at u [1, P], by autograd alone: it keeps nothing for slopes of slopes."""
    with torch.enable_grad():
        place = flat[0].detach().requires_grad_()  # [P]
        height = height_at(place)
        if not height.requires_grad:
            return torch.zeros_like(flat), height.detach().unsqueeze(0)
        (slope,) = torch.autograd.grad(height, place)
    return slope.unsqueeze(0), height.detach().unsqueeze(0)


class Kept(NamedTuple):
    """The operations of one form of batch; None where Python is to run them."""

    graph: fx.GraphModule | None
    checks: int = CHECKS  # that are left


class Repeated:
    """A function of values, a batch and its weight that is called step after step, with batches of few forms.

    From step number `STEPS_BEFORE_TRACING` on it is traced for each form of batch, since on few rows Python takes longer than
    the arithmetic. By the step's number a run that was resumed does as it would have done, and gets the same bits, but for rounding
    where a trace was refused in it. A function that cannot be traced, or does not give the same so, goes on through Python.
    Parameters that it finds elsewhere may change between calls, in place; what else it finds there is taken as it was.

    Args:
        through_python: the function, to tensors that nobody differentiates.
        device: of what it is given.
    """

    def __init__(
        self, through_python: Callable[[Tensor, Batch, float], tuple[Tensor, ...]], device: torch.device
    ) -> None:
        self._through_python, self._device = through_python, device
        self._kept: dict[Any, Kept] = {}  # by the form of what they take

    def __call__(self, values: Tensor, batch: Batch, weight: float, step: int) -> tuple[Tensor, ...]:
        if step < STEPS_BEFORE_TRACING or torch._C._is_any_autocast_enabled():
            return self._through_python(values, batch, weight)
        leaves, structure = apart(batch.x)
        leaves = [*leaves, batch.y, batch.weight]
        form = structure, signature([values, *leaves]), weight
        kept = self._kept.get(form)
        if kept is None and len(self._kept) < MOST_FORMS:
            kept = self._kept[form] = Kept(self._trace(values, leaves, structure, weight))
        if kept is None or kept.graph is None:
            return self._through_python(values, batch, weight)
        tensors = [values, *(leaf for leaf in leaves if isinstance(leaf, Tensor))]
        if not kept.checks:
            return _run(kept.graph, tensors)
        expected = self._through_python(values, batch, weight)
        try:
            found = _run(kept.graph, tensors)
        except RuntimeError:  # a size that it took from the batch before
            found = ()
        same = alike(found, expected)
        self._kept[form] = kept._replace(checks=kept.checks - 1) if same else Kept(None)
        return found if same else expected

    def _trace(
        self, values: Tensor, leaves: list[Any], structure: pytree.TreeSpec, weight: float
    ) -> fx.GraphModule | None:
        """The trace of such batches, where there is one that is true of others."""
        if not all(isinstance(leaf, Tensor) or is_plain(leaf) for leaf in leaves):
            return None  # an object among the inputs, whose state a trace does not see
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

        def function(values: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            whole = list(leaves)
            for place, tensor in zip(places, tensors, strict=True):
                whole[place] = tensor
            *parts, y, row_weight = whole
            return self._through_python(values, Batch(pytree.tree_unflatten(parts, structure), y, row_weight), weight)

        own = [values.clone(), *(leaves[place].clone() for place in places)]  # a forward may write into its inputs
        with isolated(0, "trace", cuda=self._device.type == "cuda"):
            before = streams(self._device)
            try:
                graph = trace(function, own, _require_true)
            except Exception:  # tracing runs anybody's code; so does Python, which says what is wrong
                return None
            if streams(self._device) != before:  # numbers of Python or NumPy that it drew would be those of all steps
                return None
        simplify(graph)
        reuse_memory(graph)
        return graph


def _run(graph: fx.GraphModule, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        found: tuple[Tensor, ...] = graph(*tensors)
    return found


def alike(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether tensors agree as far as half the digits of their dtype of fewest go, of the largest number of each."""
    if [each.shape for each in found] != [each.shape for each in expected]:
        return False
    share = max(torch.finfo(each.dtype).eps for each in expected) ** 0.5
    for mine, theirs in zip(found, expected, strict=True):
        largest = float(theirs.abs().nan_to_num(0.0, 0.0, 0.0).max()) if theirs.numel() else 0.0
        if not torch.allclose(mine, theirs, rtol=0.0, atol=share * largest, equal_nan=True):
            return False
    return True


def _require_true(graph: fx.GraphModule) -> None:
    """Raise ValueError where a trace would not be true of other values, or would change what others hold."""
    if why := untrue(graph):
        raise ValueError(why)
    for node in graph.graph.nodes:
        for written in written_by(node):
            while lies_in_another(written):
                written = written.all_input_nodes[0]
            if written.op != "call_function":
                raise ValueError(f"{node.target} writes into what the function is given")
