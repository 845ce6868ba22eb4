"""Gradients of a model's log density on batches: through Python at first, by a trace where many have the same form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from bnn.functional.calibration import close
from bnn.functional.ways import apart, is_plain, signature
from bnn.model import BayesianModel
from bnn.tracing import reuse_memory, simplify, trace, untrue
from bnn.types import Batch

STEPS_BEFORE_TRACING = 50  # a trace takes as long as some hundred gradients of a small module
CHECKS = (
    2  # batches on which a trace is held against Python: a number that it took from the first is another in the second
)
MOST_TRACES = 64  # that are kept: the last used, since a batch may be of any shape

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


class Traced(NamedTuple):
    """The operations of one form of batch; None where Python is to run them."""

    graph: fx.GraphModule | None
    checks: int = CHECKS  # that are left


class Repeated:
    """A function of a tensor, a batch and its weight that is called step after step, with batches of few forms.

    From step number `STEPS_BEFORE_TRACING` on it is traced for each form of batch, since on few rows Python takes longer than
    the arithmetic. By the step's number a run that was resumed does as it would have done, and gets the same bits. A function that
    cannot be traced, or does not give the same so, goes on through Python. Tensors that it takes from elsewhere
    may change between calls, in place.

    Args:
        through_python: the function: tensors of one axis at least, which nobody differentiates.
        device: of what it is given.
    """

    def __init__(
        self, through_python: Callable[[Tensor, Batch, float], tuple[Tensor, ...]], device: torch.device
    ) -> None:
        self._through_python, self._device = through_python, device
        self._traces: dict[Any, Traced] = {}  # by the form of what they take, the last used last

    def __call__(self, first: Tensor, batch: Batch, weight: float, step: int) -> tuple[Tensor, ...]:
        if step < STEPS_BEFORE_TRACING or torch._C._is_any_autocast_enabled():
            return self._through_python(first, batch, weight)
        leaves, structure = apart(batch.x)
        leaves = [*leaves, batch.y, batch.weight]
        form = first.shape, first.dtype, structure, signature(leaves), weight
        traced = self._traces.pop(form, None) or self._traced(first, leaves, structure, weight)
        self._traces[form] = traced
        if traced.graph is None:
            return self._through_python(first, batch, weight)
        with torch.no_grad():
            found: tuple[Tensor, ...] = traced.graph(first, *(leaf for leaf in leaves if isinstance(leaf, Tensor)))
        if traced.checks:
            expected = self._through_python(first, batch, weight)
            if not close(found, expected, self._device):
                self._traces[form] = Traced(None)
                return expected
            self._traces[form] = traced._replace(checks=traced.checks - 1)
        return found

    def _traced(self, first: Tensor, leaves: list[Any], structure: pytree.TreeSpec, weight: float) -> Traced:
        """The trace of such batches, where there is one that is true of others."""
        if len(self._traces) >= MOST_TRACES:
            del self._traces[next(iter(self._traces))]
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        if not all(isinstance(leaf, Tensor) or is_plain(leaf) for leaf in leaves):
            return Traced(None)  # an object among the inputs, whose state a trace does not see

        def function(first: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            whole = list(leaves)
            for place, tensor in zip(places, tensors, strict=True):
                whole[place] = tensor
            *parts, y, row_weight = whole
            return self._through_python(first, Batch(pytree.tree_unflatten(parts, structure), y, row_weight), weight)

        try:
            graph = trace(function, (first, *(leaves[place] for place in places)), _require_true)
        except Exception:  # tracing runs anybody's code; so does Python, which says what is wrong
            return Traced(None)
        simplify(graph)
        reuse_memory(graph)
        return Traced(graph)


def _require_true(graph: fx.GraphModule) -> None:
    if why := untrue(graph):
        raise ValueError(why)
