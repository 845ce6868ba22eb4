"""The judge of what a process holds, judged."""

import subprocess
import sys

from memory import PEAK, peak


def test_a_child_of_a_large_process_is_small() -> None:
    held = bytearray(b"1" * 300_000_000)
    assert peak() > len(held)
    done = subprocess.run([sys.executable, "-c", PEAK + "\nprint(peak())"], capture_output=True, text=True, check=True)
    assert 2**20 < int(done.stdout) < 100_000_000


def test_what_is_given_back_counts() -> None:
    before = peak()
    code = PEAK + "\nbefore = peak()\nheld = b'1' * 200_000_000\ndel held\nprint(peak() - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 190_000_000 < int(done.stdout) < 210_000_000
    assert peak() - before < 100_000_000
