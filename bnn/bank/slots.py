"""Memory for shards, taken once and used again: buffers of this process, or of a CUDA device behind pinned ones."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bnn.bank import disk


class Memory(Protocol):
    """Where shards are read into, and where their values are seen."""

    @property
    def staging(self) -> int | None:
        """Shards that can be on their way at once; None where as many as there are buffers."""
        ...

    def blank(self) -> Tensor:
        """A new buffer, uint8."""
        ...

    def target(self, buffer: Tensor) -> Tensor:
        """Where the bytes of a file are read to, on their way to a buffer."""
        ...

    def deliver(self, target: Tensor, buffer: Tensor, size: int, after: Iterable[Any]) -> None:
        """Bring bytes that were read into the buffer, after the marks of its last use; returns when they are there."""
        ...

    def stream(self) -> Any:
        """What the calling thread's work on views is ordered by; None where it is done when it returns."""
        ...

    def used(self, streams: Iterable[Any]) -> list[Any]:
        """Marks of all work on such streams so far: a buffer is not filled before that is done."""
        ...

    def undo(self, target: Tensor) -> None:
        """Take a target back whose bytes go nowhere."""
        ...

    def lease(self, buffer: Tensor) -> Any:
        """An object that torch keeps for as long as a tensor made of it, or a view of one, is held."""
        ...

    def seen(self, lease: Any) -> Tensor:
        """The bytes of a buffer, uint8."""
        ...


class HostMemory:
    """Buffers of this process, page-aligned and private; none of their memory is taken before it is read into."""

    staging = None

    def __init__(self, size: int) -> None:
        self._size = size

    def blank(self) -> Tensor:
        pages = disk.blank_pages(self._size)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a system without them
                pages.madvise(mmap.MADV_HUGEPAGE)  # the first filling else stops at every 4 KiB
        return torch.from_numpy(np.frombuffer(pages, dtype=np.uint8))

    def target(self, buffer: Tensor) -> Tensor:
        return buffer

    def deliver(self, target: Tensor, buffer: Tensor, size: int, after: Iterable[Any]) -> None:
        """The bytes were read to where they are seen."""

    def undo(self, target: Tensor) -> None:
        """It is the buffer itself."""

    def stream(self) -> Any:
        return None

    def used(self, streams: Iterable[Any]) -> list[Any]:
        del streams
        return []

    def lease(self, buffer: Tensor) -> Any:
        return buffer.numpy()[:]  # an array of its own

    def seen(self, lease: Any) -> Tensor:
        return torch.from_numpy(lease)


class _CudaLease:
    """Memory of a device under the protocol by which arrays of it are shared: torch keeps the object that has it."""

    def __init__(self, buffer: Tensor) -> None:
        self._buffer = buffer
        self.__cuda_array_interface__ = {
            "shape": (buffer.numel(),),
            "typestr": "|u1",
            "data": (buffer.data_ptr(), False),
            "version": 2,
        }


class CudaMemory:
    """Buffers of a CUDA device, and pinned ones through which files reach them on a stream of their own.

    A buffer is filled again only after events of the streams that had its views; `record_stream`, which would delay
    what the allocator frees, is not needed, for nothing is allocated.
    """

    def __init__(self, size: int, device: torch.device, staging: int) -> None:
        self._size, self._device, self.staging = size, device, staging
        self._pinned = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(staging)]
        self._stream = torch.cuda.Stream(device)

    def blank(self) -> Tensor:
        return torch.empty(self._size, dtype=torch.uint8, device=self._device)

    def target(self, buffer: Tensor) -> Tensor:
        del buffer
        return self._pinned.pop()

    def deliver(self, target: Tensor, buffer: Tensor, size: int, after: Iterable[Any]) -> None:
        try:
            with torch.cuda.stream(self._stream):
                for mark in after:
                    self._stream.wait_event(mark)
                buffer[:size].copy_(target[:size], non_blocking=True)
                done = torch.cuda.Event()
                done.record(self._stream)
            done.synchronize()  # of this thread alone: the views that follow wait for nothing
        finally:
            self.undo(target)

    def undo(self, target: Tensor) -> None:
        self._pinned.append(target)

    def stream(self) -> Any:
        return torch.cuda.current_stream(self._device)

    def used(self, streams: Iterable[Any]) -> list[Any]:
        return [stream.record_event() for stream in streams]

    def lease(self, buffer: Tensor) -> Any:
        return _CudaLease(buffer)

    def seen(self, lease: Any) -> Tensor:
        return torch.as_tensor(lease, device=self._device)
