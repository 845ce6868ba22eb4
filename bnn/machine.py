"""The machine that bits hang on: its CPU, how many threads of it torch takes, and its memory."""

from __future__ import annotations

import functools
import math
import mmap
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

HUGE_PAGE = 2**21  # bytes
FRESH = 2**25  # bytes from which on glibc asks the system for pages each time, and never keeps what was freed


@functools.cache
def cpu(key: str = "model name") -> str:
    """What the system says of the CPU under a key, such as `vendor_id`; outside Linux the processor's name."""
    told = Path("/proc/cpuinfo")
    if told.is_file():
        lines = told.read_text(encoding="utf-8", errors="replace").splitlines()
        found = next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")
        if found or key != "model name":
            return found
    return platform.processor() or platform.machine()


def makes_bits() -> dict[str, str]:
    """What decides the last bits of arithmetic on a CPU: its model, the instructions taken, and torch's build."""
    return {
        "cpu": cpu(),
        "capability": torch.backends.cpu.get_cpu_capability(),  # which ATEN_CPU_CAPABILITY may lower
        "torch": torch.__version__,
    }


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Run with so many threads of torch, 0 for as many as there are, and leave their number as it was."""
    before = torch.get_num_threads()
    if number in (0, before):
        yield
        return
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed() -> None:
    """Let the allocator keep what is freed for what comes next, rather than give it back to the system.

    glibc gives the end of its heap back where more lies free there than twice the largest piece, below 32 MiB, that was ever freed
    to the system: in a fresh process so little that forwards whose values come and go are handed the same pages, blank, over and
    over. So a piece of that size is asked for, not touched, and freed, which costs next to nothing, also under another allocator.
    Afterwards a process may keep 64 MiB that it no longer uses.

    Source: mallopt(3), M_TRIM_THRESHOLD and M_MMAP_THRESHOLD.
    """
    torch.empty(FRESH - HUGE_PAGE, dtype=torch.uint8)


def blank(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU whose values are not set, as of `torch.empty`; a large one lies in huge pages where there are any.

    The system stops whoever writes into a new page for the first time, and a page is 4 KiB: in a fresh tensor that
    takes about as long as decoding a sample or drawing half of it.
    """
    size = math.prod(shape)
    num_bytes = size * dtype.itemsize
    if num_bytes < FRESH or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device="cpu")
    pages = mmap.mmap(-1, -(-num_bytes // HUGE_PAGE) * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system built without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype, count=size).view(torch.Size(shape))
