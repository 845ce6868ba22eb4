"""The machine that bits hang on: its CPU, and how many threads of it torch takes."""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


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
