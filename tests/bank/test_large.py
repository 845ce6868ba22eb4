"""A bank larger than the memory it may take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from memory import PEAK

CODE = (
    PEAK
    + """
import sys, torch
from pathlib import Path
from torch import nn
import bnn
from bnn.bank import BankWriter, repair, verify_files
from bnn.layout import layout_of
from bnn.likelihoods import Categorical
from bnn.types import make_block

S, K = 10_000, 50
module = nn.Sequential(nn.Linear(310, 310), nn.Tanh(), nn.Linear(310, 11)).eval()
layout = layout_of(module)
assert 99_000 < layout.num_values < 101_000, layout.num_values
source = torch.Generator().manual_seed(0)
writer = BankWriter(sys.argv[1], layout=layout, config={"likelihood": Categorical().to_config()})
for start in range(0, S, K):
    flat = torch.randn(K, layout.num_values, generator=source) * 0.05
    writer.append(make_block(layout.unflatten(flat), chain=torch.zeros(K), draw=torch.arange(start, start + K)))
writer.close()
bank = bnn.Bank.open(sys.argv[1])
assert len(bank) == S
x, y = torch.randn(37, 310, generator=source), torch.randint(11, (37,), generator=source)
report = bnn.evaluate(bnn.FunctionalModel(module, bank), (x, y), progress=False)
order = bnn.SampleIndexSampler(bank).at(range(500)).tolist()
assert all(torch.isfinite(bank[i]["0.weight"]).all() for i in order)
assert verify_files(Path(sys.argv[1])) == bank.check_headers() == bank.check_values() == []
Path(sys.argv[1], "manifest-main.json").unlink()
assert len(repair(sys.argv[1], sys.argv[1] + "-mended").bank) == S
print(peak(), report.num_samples, report.metrics["nll"].value)
"""
)


@pytest.mark.slow
def test_ten_thousand_samples_of_a_hundred_thousand_values_under_a_gigabyte(tmp_path: Path) -> None:
    """Four gigabytes written, evaluated, read at random, verified and repaired, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "bank")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    peak, samples, nll = done.stdout.split()
    assert int(samples) == 10_000
    assert 2.2 < float(nll) < 3.0  # near log 11 = 2.4: the weights are noise
    assert int(peak) < 1_000_000_000, f"{int(peak) / 1e6:.0f} MB resident"
