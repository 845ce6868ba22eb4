"""What a gradient of many chains costs, from the shapes of its values: recorded on few rows and chains, and reckoned for all."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

# What a gradient costs without a compiler, for the rule that decides: measured with small networks on one core.
SECONDS_PER_CALL, SECONDS_PER_VALUE, SECONDS_PER_OPERATION = 4e-6, 6e-10, 2.5e-11


class Operation(NamedTuple):
    """One tensor operation of a function."""

    name: str
    inputs: tuple[int, ...]  # numbers of the operations whose results it takes
    is_view: bool  # its result lies in the memory of the first input
    values: float  # numbers in its results
    bytes: float
    products: float  # multiplications and additions of matrix products


class Cost(NamedTuple):
    """Of one gradient."""

    bytes: float  # of the values that are kept at once, at most
    products: float  # multiplications and additions of matrix products
    seconds: float  # about, without a compiler
    overhead: float  # of them, that of calls


def record(function: Callable[..., Any], arguments: Sequence[Tensor]) -> list[Operation]:
    """The operations that lead to what a function returns, in their order; it is run on the arguments.

    Examples:
        >>> import torch
        >>> [operation.name for operation in record(lambda x: (x @ x).sum(), [torch.ones(3, 3)])]
        ['aten.mm.default', 'aten.sum.default']
    """
    recorder = _Recorder()
    with recorder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch says of operations without a rule for many at once: costs tell
        returned = function(*arguments)
    needed = {recorder.maker_of(leaf) for leaf in pytree.tree_leaves(returned)} - {None}
    for number in reversed(range(len(recorder.operations))):
        if number in needed:
            needed.update(recorder.operations[number].inputs)
    kept = {number: place for place, number in enumerate(sorted(n for n in needed if n is not None))}
    return [
        recorder.operations[number]._replace(inputs=tuple(kept[i] for i in recorder.operations[number].inputs))
        for number in kept
    ]


class _Recorder(TorchDispatchMode):
    """Writes down operations, and knows whose result a tensor is as long as there is one that needs it."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._made: Any = WeakTensorKeyDictionary()  # by tensor: the operation that made it

    def maker_of(self, value: Any) -> int | None:
        found: int | None = self._made.get(value) if isinstance(value, Tensor) else None
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = pytree.tree_leaves((args, kwargs))
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        results = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        makers = [self.maker_of(tensor) for tensor in given]  # before an operation in place becomes the maker
        for tensor in results:
            self._made[tensor] = len(self.operations)
        self.operations.append(
            Operation(
                str(func),
                tuple(maker for maker in makers if maker is not None),
                _is_view(func),
                float(sum(tensor.numel() for tensor in results)),
                float(sum(tensor.nbytes for tensor in results)),
                _products(func, args, results),
            )
        )
        return result


def _is_view(func: Any) -> bool:
    """Whether a result lies in the memory of an argument: the operation says that it returns an alias."""
    return func is torch.ops.aten._unsafe_view.default or any(
        result.alias_info is not None for result in func._schema.returns
    )


def _products(func: Any, args: Sequence[Any], results: Sequence[Tensor]) -> float:
    """2 m k n of a product [.., m, k] x [.., k, n]; of convolutions 2 a value of the output and of its window."""
    aten = torch.ops.aten
    if func in (aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default):
        left = [argument for argument in args if isinstance(argument, Tensor)][-2]
        return 2.0 * results[0].numel() * left.shape[-1]
    if func is aten.convolution.default:  # of input, weight, bias, ..; the seventh says whether it is transposed
        moved = args[0] if args[6] else results[0]
        return 2.0 * float(moved.numel() * args[1][0].numel())
    if (
        func is aten.convolution_backward.default
    ):  # of output, input, weight, ..; the last which gradients are asked for
        moved = args[1] if args[7] else args[0]
        return 2.0 * float(sum(args[-1][:2]) * moved.numel() * args[2][0].numel())
    return 0.0


def cost_of(operations: Sequence[Operation]) -> Cost:
    """What operations cost: the peak of their living results, their matrix products, and a rough time on one core."""
    made = [operation for operation in operations if not operation.is_view]
    products = sum(operation.products for operation in made)
    overhead = len(made) * SECONDS_PER_CALL
    work = sum(operation.values for operation in made) * SECONDS_PER_VALUE + products * SECONDS_PER_OPERATION
    return Cost(_peak(operations), products, overhead + work, overhead)


def _peak(operations: Sequence[Operation]) -> float:
    """The most bytes that results take at once, where each lives until it and its views are last used."""
    owner: list[int] = []  # the operation in whose memory a result lies
    last_use: dict[int, int] = {}
    for number, operation in enumerate(operations):
        within = operation.is_view and operation.inputs
        owner.append(owner[operation.inputs[0]] if within else number)
        last_use.update({owner[used]: number for used in operation.inputs})
    ends: dict[int, float] = {}
    for number, user in last_use.items():
        ends[user] = ends.get(user, 0.0) + _held(operations[number])
    living = peak = 0.0
    for number, operation in enumerate(operations):
        if owner[number] == number:
            living += _held(operation)
            peak = max(peak, living)
        living -= ends.get(number, 0.0)
    return peak


def _held(operation: Operation) -> float:
    """Bytes of its own: a view of an argument lies where that does."""
    return 0.0 if operation.is_view else operation.bytes


class Costs:
    """What gradients of any number of rows and chains cost, from those of few.

    Of each operation, values, bytes and products are a + b rows + c chains + d rows chains; four small records tell
    them. Where there are other operations for another number of chains, as of a module that is unrolled chain by chain, what
    all cost together is a line in chains; where there are for another number of rows it is in proportion to them. What
    grows faster than its rows, such as attention of all rows to all, is told as too cheap.

    Args:
        recorded: numbers of rows and chains -> the operations of that gradient.
        rows: two numbers to record at, or one where data cannot be cut.
        chains: two numbers to record at, or one where no other is asked for.
    """

    def __init__(
        self, recorded: Callable[[int, int], list[Operation]], rows: Sequence[int], chains: Sequence[int]
    ) -> None:
        self._rows, self._chains = tuple(dict.fromkeys(rows)), tuple(chains)
        self._found = [[recorded(r, c) for r in self._rows] for c in self._chains]

    def at(self, rows: int, chains: int) -> Cost:
        """Of one gradient of so many chains on so many rows of data."""
        by_chains = [self._of_rows(found, rows) for found in self._found]
        shares = _shares(self._chains, chains)
        if _alike(by_chains):
            return cost_of([_combined(each, shares) for each in zip(*by_chains, strict=True)])
        costs = [cost_of(found) for found in by_chains]
        return Cost(*(max(_weighed(each, shares), 0.0) for each in zip(*costs, strict=True)))

    def _of_rows(self, found: Sequence[list[Operation]], rows: int) -> list[Operation]:
        """The operations of so many rows, from those of few and many."""
        if not _alike(found):
            return [_combined([operation], [rows / self._rows[-1]]) for operation in found[-1]]
        return [_combined(each, _shares(self._rows, rows)) for each in zip(*found, strict=True)]


def _shares(known: Sequence[int], asked: int) -> list[float]:
    """Of what is known at one number or two, to add up to what a line through them says of another."""
    if len(known) == 1:
        return [1.0]
    across = (asked - known[0]) / (known[1] - known[0])
    return [1.0 - across, across]


def _alike(records: Sequence[list[Operation]]) -> bool:
    """Whether all have the same operations."""
    return len({tuple(operation.name for operation in found) for found in records}) == 1


def _combined(operations: Sequence[Operation], shares: Sequence[float]) -> Operation:
    """An operation whose figures are the sum of shares of others'."""
    figures = zip(*((each.values, each.bytes, each.products) for each in operations), strict=True)
    values, size, products = (max(_weighed(each, shares), 0.0) for each in figures)
    return operations[0]._replace(values=values, bytes=size, products=products)


def _weighed(figures: Sequence[float], shares: Sequence[float]) -> float:
    return sum(share * figure for share, figure in zip(shares, figures, strict=True))
