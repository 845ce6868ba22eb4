"""The tensor operations of a function without the Python around them: traced, and compiled from the trace."""

from __future__ import annotations

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
    from torch.fx.experimental.proxy_tensor import make_fx  # a third of a second, which not everybody needs

    with warnings.catch_warnings():
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

    return device.type == "cuda" or any(
        shutil.which(name)
        for option in (inductor.cpp.cxx,)
        for name in (*(o for o in (option if isinstance(option, tuple) else (option,)) if o), "c++", "g++", "clang++")
    )
