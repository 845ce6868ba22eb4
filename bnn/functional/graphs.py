"""CUDA graphs: a function recorded once and replayed over one static set of tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WARM_UPS = 3  # runs before the recording, as torch asks: libraries choose algorithms and take workspaces in them


class Graphed:
    """A function of tensors as a CUDA graph.

    A graph holds the addresses that it was recorded with. Arguments are therefore copied into tensors of its own
    before each replay, and outputs are copied out, so that neither hangs on what comes after.

    Args:
        function: tensors -> tensors, without random numbers and without synchronising.
        arguments: of the shapes, dtypes and strides that it will be given.
    """

    def __init__(self, function: Callable[..., Sequence[Tensor]], arguments: Sequence[Tensor]) -> None:
        self._lock = threading.Lock()  # one set of static tensors: one replay at a time
        self._inputs = [torch.empty_like(tensor).copy_(tensor) for tensor in arguments]
        self._device = self._inputs[0].device
        with torch.no_grad(), torch.cuda.device(self._device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    function(*self._inputs)
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._outputs = list(function(*self._inputs))
            self._done = torch.cuda.Event()
            self._done.record()

    def __call__(self, *arguments: Tensor) -> list[Tensor]:
        with self._lock, torch.no_grad(), torch.cuda.device(self._device):
            torch.cuda.current_stream().wait_event(self._done)  # of the last replay, which may be another stream's
            torch._foreach_copy_(self._inputs, list(arguments))
            self._graph.replay()
            found = [output.clone() for output in self._outputs]
            self._done.record()
            return found
