"""Log densities of many positions at once, with gradients: vectorised over chains, traced, and compiled where it pays."""

from __future__ import annotations

import bisect
import math
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, fx
from torch._dynamo.exc import TorchDynamoException
from torch.utils import _pytree as pytree

from bnn.errors import BnnError, ConfigError, FitError
from bnn.hoisting import hoist
from bnn.inference import products
from bnn.inference.costs import Costs, Operation, record
from bnn.machine import threads
from bnn.model import BayesianModel
from bnn.tracing import compiled, has_compiler, reuse_memory, simplify, trace
from bnn.types import Batch

Mode: TypeAlias = Literal["compiled", "traced", "eager"]

WORTH_COMPILING = 30.0  # seconds of gradients; a compilation takes 3 to 20, and halves them
ONE_THREAD = 5e-4  # seconds of arithmetic a gradient, under which two threads only wait for each other
CACHE, FEW_ROWS = 32 * 2**20, 256  # bytes of a slice where memory is not bounded, about a cache; and its rows, at least
KEPT = 2**26  # bytes of what follows from the data alone, where memory is not bounded; or as many as the data have
RECORDED, RECORDED_CHAINS = (4, 8), (2, 3)  # rows, at least, and chains whose gradients tell what those of all cost


class Plan(NamedTuple):
    """How gradients are computed. Choices change bits, so that a run keeps them: by rule at first, recorded after."""

    mode: Mode
    slices: int  # of the data, whose gradients are summed
    threads: int  # 0: as many as torch has
    onednn: bool = False  # whether large products of matrices are oneDNN's

    def save(self) -> dict[str, Any]:
        return {f"plan.{name}": value for name, value in self._asdict().items()}

    @staticmethod
    def load(state: dict[str, Any]) -> Plan:
        return Plan(*(state[f"plan.{name}"] for name in Plan._fields))


class Values(NamedTuple):
    """What a density says of C positions. Sums are in float64: their differences decide."""

    log_density: Tensor  # [C] float64
    log_joint: Tensor  # [C] float64
    gradient: Tensor  # [C, P] of the log density, in the dtype of the positions


Density: TypeAlias = Callable[[Tensor], Values]
"""Positions u [C, P] -> values. Its `plan` and `compile_seconds` say how it was made."""

Piece: TypeAlias = Callable[..., tuple[Tensor, Tensor]]
"""u [P], then tensors of data -> log density and log joint, scalars: those of all data, or estimates from a slice."""


Made: TypeAlias = Callable[..., tuple[Tensor, Tensor, Tensor]]
"""u [C, P] and tensors of a slice -> gradient [C, P], log density [C] and log joint [C]."""


class Target(NamedTuple):
    """A log density as a sum over slices of data: log pi(u) = sum_i share_i piece(u, *slices_i)."""

    piece: Piece
    slices: Callable[[int], list[tuple[float, tuple[Tensor, ...]]]]  # shares and data of so many slices
    most_slices: int
    in_dims: tuple[int | None, ...]  # of the tensors of data: 0 for one slice a chain, None for all chains alike


def target_of_model(model: BayesianModel, batch: Batch) -> Target:
    """The full-data log density of a model, in slices of rows that differ by one row at most.

    log pi(u) = sum_i B_i / N log_density(u; slice i), each with its likelihood scaled by N / B_i
    """
    leaves, structure = pytree.tree_flatten(batch)
    rows = len(batch.y)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def piece(flat: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        whole = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            whole[place] = tensor
        return model.log_density(flat, pytree.tree_unflatten(whole, structure))

    def slices(count: int) -> list[tuple[float, tuple[Tensor, ...]]]:
        edges = [rows * number // count for number in range(count + 1)]
        return [
            ((stop - start) / rows, tuple(leaves[place][start:stop] for place in places))
            for start, stop in pairwise(edges)
        ]

    return Target(piece, slices, rows, (None,) * len(places))


def target_of_function(log_density: Callable[..., Tensor], context: Tensor | None) -> Target:
    """Any log density u [P] -> scalar; with a context, one slice of it a chain as a second argument."""

    def piece(flat: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        value = log_density(flat, *tensors)
        return value, value

    tensors = () if context is None else (context,)
    return Target(piece, lambda count: [(1.0, tensors)] * count, 1, (0,) * len(tensors))


def prepare(
    target: Target,
    flat: Tensor,
    *,
    num_gradients: int,
    memory: int | None,
    compile: bool | None,
    plan: Plan | None = None,
    num_chains: int | None = None,
) -> Prepared:
    """The density of a target at positions such as `flat` [C, P], by the plan recorded or the rule.

    Data are cut where the values that a gradient keeps at once would need more than `memory` bytes, and on a CPU, where
    that is None, into slices that a cache holds; what follows from the data alone, such as features that no chain moves, is computed
    once where `memory` is None; gradients are compiled where there is a compiler and they would take
    longer than half a minute without; one thread serves where the work is small. All of this follows from shapes and options.

    Args:
        num_gradients: that will be asked for, about.
        compile: True or False overrule the rule.
        plan: of the run that goes on.
        num_chains: of all ranks, by which the rule goes where `flat` holds some of them; those of `flat` where None.

    Raises:
        ConfigError: `compile=True`, or a plan that was compiled, without a compiler; `memory` for not even one row.
        FitError: the density cannot be vectorised over chains.
    """
    resumed, graph = plan is not None, None
    if plan is None:
        plan, graph = _plan(target, flat, num_chains or len(flat), num_gradients, memory, compile)
    if plan.mode == "compiled" and not has_compiler(flat.device):
        raise ConfigError(
            "compile",
            want="a C++ compiler (c++, g++ or clang++)",
            got="none on this machine" + ("" if compile else ", where the run that goes on had one"),
            fix="install one" + (", or pass compile=False" if compile else ""),
        )
    if plan.onednn and not products.available():
        raise ConfigError(
            "plan",
            want="a CPU and a torch with oneDNN, as the run that goes on had",
            got="none",
            fix="go on where it began",
        )
    try:
        return Prepared(target, plan, flat, graph, keeps=memory is None)
    except TorchDynamoException as error:  # a compiler that is there and does not work
        first = (str(error).strip().splitlines() or [""])[0]
        if compile or resumed:
            raise ConfigError(
                "compile", want="a C++ compiler that works", got=first, fix="mend it, or begin with compile=False"
            ) from error
        warnings.warn(f"gradients are not compiled: {first}", stacklevel=2)
        return Prepared(target, plan._replace(mode="traced"), flat, keeps=memory is None)  # by a trace of its own


class Prepared:
    """A density with its plan: holds the traced or compiled functions, one for each shape of a slice.

    `graph` is the trace of the first, where there is one already. Where it `keeps` values, those that
    follow from a slice alone are computed once, the largest left out until they take no more than the slice, or its part of `KEPT`.
    """

    def __init__(
        self, target: Target, plan: Plan, flat: Tensor, graph: fx.GraphModule | None = None, *, keeps: bool = False
    ) -> None:
        self.plan, self.compile_seconds = plan, 0.0
        self._vectorised = _vectorised(target)
        self._parts: list[tuple[float, Made, Sequence[Tensor]]] = []  # share of the sum, function, what it takes
        functions: dict[tuple[torch.Size, ...], tuple[Made, Callable[..., Sequence[Tensor]]]] = {}
        started = time.perf_counter()
        for share, tensors in target.slices(plan.slices):
            shapes = tuple(tensor.shape for tensor in tensors)
            if shapes not in functions:
                functions[shapes] = self._made(flat, tensors, graph, keeps)
                graph = None
            function, further = functions[shapes]
            with torch.no_grad(), threads(plan.threads):
                self._parts.append((share, function, (*tensors, *further(*tensors))))
        if plan.mode == "compiled":
            self.compile_seconds = time.perf_counter() - started

    def __call__(self, flat: Tensor) -> Values:
        with torch.no_grad(), threads(self.plan.threads):
            if len(self._parts) == 1:
                _, function, tensors = self._parts[0]
                gradient, value, log_joint = function(flat, *tensors)
                return Values(value, log_joint, gradient)
            gradient = torch.zeros_like(flat)
            value = log_joint = torch.zeros(len(flat), dtype=torch.float64, device=flat.device)
            for share, function, tensors in self._parts:
                part = function(flat, *tensors)
                gradient = gradient + share * part[0]
                value, log_joint = value + share * part[1], log_joint + share * part[2]
            return Values(value, log_joint, gradient)

    def _made(
        self, flat: Tensor, tensors: Sequence[Tensor], graph: fx.GraphModule | None, keeps: bool
    ) -> tuple[Made, Callable[..., Sequence[Tensor]]]:
        """The function of a slice, and what else it takes of the slice."""

        def nothing(*tensors: Tensor) -> Sequence[Tensor]:
            return ()

        if self.plan.mode == "eager":
            return self._vectorised, nothing
        with threads(self.plan.threads):
            graph = graph or trace(self._vectorised, (flat, *tensors))
            if self.plan.onednn:
                products.replaced(graph)
            if self.plan.mode == "traced":
                simplify(graph)
            most = max(KEPT // self.plan.slices, sum(tensor.nbytes for tensor in tensors)) if keeps else 0
            further = hoist(graph, most)
            if self.plan.mode == "traced":
                reuse_memory(graph)
                return graph, further
            with torch.no_grad():  # as at each call
                given = further(*tensors)
            return compiled(graph, (flat, *tensors, *given), self.plan.threads), further


def _vectorised(target: Target) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """u [C, P], data -> gradient [C, P], log density [C] and log joint [C]."""
    one = torch.func.grad_and_value(target.piece, has_aux=True)
    many = torch.func.vmap(one, in_dims=(0, *target.in_dims))

    def vectorised(flat: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        slope, (value, log_joint) = many(flat, *tensors)
        return slope.detach(), value.detach().double(), log_joint.detach().double()

    return vectorised


def _plan(
    target: Target, flat: Tensor, num_chains: int, num_gradients: int, memory: int | None, compile: bool | None
) -> tuple[Plan, fx.GraphModule | None]:
    """The plan of so many chains by the rule, and the trace of those of `flat` on the first slice."""
    vectorised, slices = _vectorised(target), 1
    try:
        costs = _costs(target, vectorised, flat, num_chains)
        slices = _num_slices(target, costs, num_chains, memory, flat.device)
        cost = costs.at(target.most_slices // slices, num_chains)
        graph = trace(vectorised, (flat, *target.slices(slices)[0][1]))
    except BnnError:
        raise
    except Exception as error:  # tracing runs anybody's code: whether it can be vectorised at all is asked next
        _require_vectorisable(target, flat, target.slices(slices)[0][1], error)
        if memory is not None and target.most_slices > 1:
            raise ConfigError(
                "memory", want="a density that can be traced, to be cut", got="one that cannot", fix="leave memory out"
            ) from error
        return Plan("eager", slices, 0), None
    threads = 1 if cost.seconds - cost.overhead < ONE_THREAD and flat.device.type == "cpu" else 0
    by_rule = slices * cost.seconds * num_gradients > WORTH_COMPILING and has_compiler(flat.device)
    wanted = by_rule if compile is None else compile
    onednn = products.worthwhile() and products.replaced(graph) > 0
    return Plan("compiled" if wanted else "traced", slices, threads, onednn), graph


def _costs(target: Target, vectorised: Callable[..., Any], flat: Tensor, num_chains: int) -> Costs:
    """What gradients of so many chains cost, for any number of rows of the target."""
    total = target.most_slices
    rows = [total // (total // few) for few in RECORDED] if total >= 2 * max(RECORDED) else [total]
    chains = RECORDED_CHAINS if num_chains > max(RECORDED_CHAINS) else [num_chains]

    def recorded(rows: int, chains: int) -> list[Operation]:
        these = torch.arange(chains, device=flat.device) % len(flat)
        slices = target.slices(total // rows)[0][1]
        data = (tensor if dim is None else tensor[these] for tensor, dim in zip(slices, target.in_dims, strict=True))
        return record(vectorised, (flat[these], *data))

    return Costs(recorded, rows, chains)


def _require_vectorisable(target: Target, flat: Tensor, tensors: Sequence[Tensor], error: Exception) -> None:
    """Warn where only tracing fails, which costs speed; raise FitError where `vmap` does, or the density itself."""
    try:
        _vectorised(target)(flat, *tensors)
    except BnnError:
        raise
    except Exception as failure:
        _require_computable(target, flat, tensors)
        raise FitError(
            "log density",
            want="one that torch.func.vmap takes: tensors in, a scalar out, no `if` and no .item() on values",
            got=_in_a_line(failure),
            fix="it works on one position; use torch.where in place of `if` on values, and torch's operations alone",
        ) from failure
    warnings.warn(
        f"the log density cannot be traced ({_in_a_line(error)}); each gradient runs through Python",
        stacklevel=2,
    )


def _require_computable(target: Target, flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Raise FitError with the error of the density itself, where it fails on the position of chain 0 alone too."""
    data = (tensor if dim is None else tensor[0] for tensor, dim in zip(tensors, target.in_dims, strict=True))
    try:
        target.piece(flat[0].clone(), *data)
    except BnnError:
        raise
    except Exception as failure:
        raise FitError(
            "log density",
            want="a value at the position of chain 0",
            got=_in_a_line(failure),
            fix="mend the density: it fails so on that position alone",
        ) from failure


def _in_a_line(error: Exception) -> str:
    """Kind of an error, and the first line of what it says."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def _num_slices(target: Target, costs: Costs, num_chains: int, memory: int | None, device: torch.device) -> int:
    """The least number of slices with which a gradient keeps at most `memory` bytes at once."""
    fewest = max(target.most_slices // FEW_ROWS, 1)
    if target.most_slices < 2 * max(RECORDED) or (memory is None and (device.type != "cpu" or fewest == 1)):
        return 1

    def bytes_of(rows: int) -> float:
        return costs.at(rows, num_chains).bytes

    budget = max(bytes_of(0), 0.0) + CACHE if memory is None else memory
    if memory is not None and bytes_of(1) > budget:
        raise ConfigError(
            "memory",
            want=f"at least {math.ceil(bytes_of(1)):,} bytes, for one row of data and {num_chains} chains",
            got=f"{memory:,}",
            fix="raise it, or take fewer chains",
        )
    most = target.most_slices if memory is not None else fewest  # also where no slice fits a cache
    counts = range(1, most)  # of slices, of which the first that fits is sought
    return 1 + bisect.bisect_left(counts, True, key=lambda n: bytes_of(math.ceil(target.most_slices / n)) <= budget)
