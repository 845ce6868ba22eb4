"""Every method, killed at any file of its bank and resumed, ends with the rows and columns of an unbroken run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

KILLS = """
import os, random, signal, sys, warnings
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
from inference.test_contract import TABLE
from scenarios import classifier
from bnn.bank import Bank, disk, writer
from bnn.fitting import fit

warnings.simplefilter("ignore")
writer.ROW_SECONDS = writer.STATE_SECONDS = 0.0  # a commit for every block and state
model, data = classifier()


def forked(work):
    child = os.fork()  # nothing here has begun a thread
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitpid(child, 0)[1]


def fitting(row, out, resume, last=None):
    def work():
        real, seen = disk.replace, [0]

        def replace(source, target):
            seen[0] += 1
            if seen[0] == last:
                os.kill(os.getpid(), signal.SIGKILL)
            real(source, target)

        disk.replace = replace
        fit(model, data, method=row.method, num_samples=row.num_samples, out=out, seed=3, resume=resume, progress=False)
        if last is None:
            with open(out + ".count", "w") as file:
                file.write(str(seen[0]))

    return work


for name, row in TABLE.items():
    whole = f"{sys.argv[1]}/{name}"
    assert forked(fitting(row, whole, False)) == 0, name
    expected, files = Bank.open(whole).block(slice(None)), int(open(whole + ".count").read())
    chance, kills = random.Random(name), 0
    for trial in range(int(sys.argv[3])):
        out, resume = f"{whole}-{trial}", False
        while True:
            status = forked(fitting(row, out, resume, chance.randint(1, files)))
            if status == 0:
                break
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (name, status)
            kills, resume = kills + 1, True
        found = Bank.open(out, verify="full").block(slice(None))
        for key in expected.params:
            assert torch.equal(found.params[key], expected.params[key]), (name, key)
        for mine, theirs in zip((*found[1:5], *found.columns.values()), (*expected[1:5], *expected.columns.values())):
            assert torch.equal(mine.nan_to_num(-1.0), theirs.nan_to_num(-1.0)), name
    print(name, kills)
"""


@pytest.mark.slow
def test_every_method_survives_kills(tmp_path: Path, tell: Callable[[str], None]) -> None:
    code = [sys.executable, "-c", KILLS, str(tmp_path), str(Path(__file__).parents[1]), "1"]
    done = subprocess.run(code, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    kills = dict(line.split() for line in done.stdout.splitlines())
    assert all(int(count) > 0 for count in kills.values()), kills
    tell(f"kill -9 and resume, kills a method: {', '.join(f'{name} {count}' for name, count in kills.items())}")
