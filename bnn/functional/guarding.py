"""What a forward may not do: write into the samples or inputs that it is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bnn.errors import ModuleError
from bnn.functional.skeleton import DrawKey, Outputs, version
from bnn.functional.ways import Runner, num_rows, rows_of
from bnn.types import Params

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError, RuntimeError)
"""What running out of memory raises, among other things: `is_out_of_memory` tells."""

FIRST_DRAW: DrawKey = (0, "first forward", 0, 0)

_VERSION = attrgetter("_version")  # mapped in C over every tensor of a sample, twice a call


def admitted(runner: Runner, params: Params, x: Any, *, is_head: bool = False) -> bool:
    """Run one sample for the first time in these modes, on clones: does it draw, does it write into what it is given?

    Returns:
        Whether the runner may be used; only a head may not, and the whole module is run instead.

    Raises:
        ModuleError: it writes; the parameter is named.
    """
    given, own = clones(params, x)
    watched = [*given.values(), *tensors_of(own)]
    before = [version(tensor) for tensor in watched]
    with torch.no_grad():
        try:
            runner.one(given, own, FIRST_DRAW)
        except OUT_OF_MEMORY as error:
            count = num_rows(x) or 0
            if not is_out_of_memory(error) or count < 2:
                raise
            return admitted(runner, params, rows_of(x, slice(0, count // 2)), is_head=is_head)
    after = [version(tensor) for tensor in watched]
    if is_head and (after != before or runner.draws()):
        return False  # of samples one after another, the second would see what the first wrote
    _refuse_writes(list(given), before, after)
    refuse_changes(params, given)
    return True


def guarded(params: Params, x: Any, run: Callable[[], Outputs]) -> Outputs:
    """Run, and raise ModuleError if anything was written into samples or inputs."""
    watched = [*params.values(), x] if isinstance(x, Tensor) else [*params.values(), *tensors_of(x)]
    try:
        before = list(map(_VERSION, watched))
    except RuntimeError:  # inputs of inference mode do not count their writes
        watched = [tensor for tensor in watched if not tensor.is_inference()]
        before = list(map(_VERSION, watched))
    outputs = run()
    after = list(map(_VERSION, watched))
    if after != before:
        _refuse_writes(list(params), before, after)
    return outputs


def clones(params: Params, x: Any) -> tuple[Params, Any]:
    """The values of a sample and inputs as tensors of their own, which count what is written into them."""
    with torch.inference_mode(False):
        given = {name: tensor.clone() for name, tensor in params.items() if not name.startswith("@")}
        own = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, x)
    return given, own


def refuse_changes(params: Params, given: Params) -> None:
    """Raise ModuleError where clones no longer hold a sample's values: writes by way of `.data` are not counted."""
    for name, tensor in given.items():
        if not torch.equal(tensor, params[name]) and not bool((params[name] != params[name]).any()):
            _refuse_writes([name], [0], [1])


def tensors_of(x: Any) -> list[Tensor]:
    """The tensors among inputs."""
    return [x] if isinstance(x, Tensor) else [leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor)]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, on the CPU or a device."""
    words = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        "allocate memory" in words or "not enough memory" in words or "out of memory" in words
    )


def _refuse_writes(names: Sequence[str], before: Sequence[int], after: Sequence[int]) -> None:
    """`names` are those of the first tensors; the inputs follow."""
    for place, (old, new) in enumerate(zip(before, after, strict=True)):
        if old != new:
            raise ModuleError(
                f"parameter '{names[place]}'" if place < len(names) else "input x",
                want="a forward that leaves what it is given alone",
                got="one that writes into it in place",
                fix="write into a copy (inplace=False, or .clone() first)",
            )
