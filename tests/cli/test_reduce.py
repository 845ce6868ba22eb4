"""`bnn bank cast` and `bnn bank thin --best`: what they write and say, their exit codes, what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bnn.bank import Bank
from bnn.cli import run

Call = Callable[..., tuple[int, str, str]]

METHOD = "--model mlp:3 --method laplace --option structure=full --num-steps 60 --num-samples 40"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows, a bank of classes and one of targets."""
    folder = tmp_path_factory.mktemp("banks")
    x = torch.randn(80, 2, generator=torch.Generator().manual_seed(0))
    kinds = ["oak", "pine", "fir"]
    rows = [(a, b, a - b, kinds[int(a > 0) + int(b > 0.5)]) for a, b in x.tolist()]
    (folder / "kinds.csv").write_text("\n".join(["a,b,y", *(f"{a:.4f},{b:.4f},{kind}" for a, b, _, kind in rows)]))
    (folder / "targets.csv").write_text("\n".join(["a,b,y", *(f"{a:.4f},{b:.4f},{y:.4f}" for a, b, y, _ in rows)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("kinds", "targets"):
            assert run(f"fit --data {name}.csv:y {METHOD} --out {name}".split()) == 0
    return folder


@pytest.mark.parametrize("codec", ["bf16", "fp16", "int8"])
def test_cast_writes_a_smaller_bank_and_says_what_it_costs(bnn_run: Call, codec: str) -> None:
    code, out, err = bnn_run(f"bank cast kinds --codec {codec} --probe kinds.csv:y --out small")
    assert (code, err) == (0, "")
    found, old = Bank.open("small"), Bank.open("kinds")
    said = found.info["codec"]
    assert said["predictive"]["rows"] == 16  # the test rows of the bank's own split
    worst = max(said["errors"], key=said["errors"].get)
    assert f"codec       {codec}, of {old.digest[:12]}\n" in out
    assert f"error       at most {said['errors'][worst]:.2g} standard deviations, in '{worst}'\n" in out
    kl = said["predictive"]["kl"]
    assert f"kl          {kl['mean']:.2g} (at most {kl['largest']:.2g}) nats, on 16 rows\n" in out
    assert "total variation " in out
    assert found.stored.num_bytes < old.layout.num_bytes
    assert bnn_run("bank info small") == (0, out, "")
    assert bnn_run("bank verify small --full")[:2] == (0, "good: 40 samples\n")
    assert bnn_run("evaluate --bank small --bank kinds")[0] == 0


def test_cast_of_a_regression(bnn_run: Call) -> None:
    code, out, _ = bnn_run("bank cast targets --codec int8 --probe targets.csv:y --out small")
    shift = Bank.open("small").info["codec"]["predictive"]["shift"]
    assert code == 0
    assert f"shift       {shift['mean']:.2g} (at most {shift['largest']:.2g}) sd, on 16 rows\n" in out
    assert bnn_run("bank cast targets --codec fp16 --out plain")[0] == 0
    assert "predictive" not in Bank.open("plain").info["codec"]


def test_cast_above_the_bound_leaves_nothing(bnn_run: Call, tmp_path: Path) -> None:
    code, out, err = bnn_run("bank cast kinds --codec int8 --probe kinds.csv:y --max-kl 1e-12 --out deep/small")
    assert (code, out) == (2, "")
    assert err.startswith("deep/small: want a KL of at most 1e-12 nats in every probe row, got ")
    assert not (tmp_path / "deep").exists()
    assert bnn_run("bank cast kinds --codec int8 --probe kinds.csv:y --max-kl 0.1 --out small")[0] == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("bank cast kinds --codec zip --out new", "--codec: want one of bf16, fp16, int8, got 'zip'"),
        ("bank cast kinds --codec int8 --max-kl 1 --out new", "max_kl: want a probe set"),
        (
            "bank cast kinds --codec int8 --probe digits --out new",
            "data: want rows of 2 values, as the bank was fitted to",
        ),
        ("bank cast none --codec int8 --out new", "none: want a bank"),
        ("bank thin kinds --out new", "bank thin: want --every or --best, got neither"),
        ("bank thin kinds --every 2 --best 3 --out new", "bank thin: want --every or --best, got both"),
        ("bank thin kinds --every 2 --probe kinds.csv:y --out new", "--probe: want --best, got --every"),
        ("bank thin kinds --best 41 --out new", "best: want 1 to 40 samples, got 41"),
    ],
)
def test_what_is_refused(bnn_run: Call, tmp_path: Path, words: str, told: str) -> None:
    code, out, err = bnn_run(words)
    assert (code, out) == (2, "")
    assert told in err
    assert err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_thin_to_the_best(bnn_run: Call) -> None:
    code, out, err = bnn_run("bank thin kinds --best 6 --out few")
    assert (code, err) == (0, "")
    found = Bank.open("few")
    assert len(found) == 6
    thinned = json.loads(Path("few/bank.json").read_text())["thinned"]
    assert thinned["held_out"] == 4
    assert f"thinned     the best 6, of {Bank.open('kinds').digest[:12]}\n" in out
    told = "; ".join(
        f"{way} {thinned['kl'][way]['mean']:.2g} (at most {thinned['kl'][way]['largest']:.2g}) nats"
        for way in ("best", "plain", "random")
    )
    assert f"kl          {told}\n" in out
    assert bnn_run("bank thin few --every 2 --out fewer")[0] == 0
    assert bnn_run("bank thin targets --best 6 --probe targets.csv:y --out other")[0] == 0
    assert set(Bank.open("other").info["thinned"]["shift"]) == {"best", "plain", "random"}
