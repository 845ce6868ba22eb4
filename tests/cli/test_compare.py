"""`bnn compare`, `bnn bank loo`, `bnn bank stack`: what they say and write, and what they refuse."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import bnn
from bnn.bank import Bank
from bnn.cli import common, run
from bnn.evaluation import Pointwise, compare, log_likelihoods, loo, stacking_weights

Call = Callable[..., tuple[int, str, str]]

KINDS = {
    "hmc": "--method hmc --num-chains 2 --num-warmup 40 --num-steps 4 --num-samples 60",
    "mf": "--method mean-field --num-steps 60 --num-samples 50",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows of a regression and of classes, and two banks fitted to each."""
    folder = tmp_path_factory.mktemp("banks")
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(50, generator=torch.Generator().manual_seed(1))
    target = 40 + 5 * (x[:, 0] - x[:, 1] + 0.5 * noise)
    rows = [
        f"{a:.4f},{b:.4f},{t:.4f},{'yes' if t > 40 else 'no'}"
        for (a, b), t in zip(x.tolist(), target.tolist(), strict=True)
    ]
    for name, column in (("rows", 2), ("kinds", 3)):
        lines = [",".join([*line.split(",")[:2], line.split(",")[column]]) for line in rows]
        (folder / f"{name}.csv").write_text("\n".join(["a,b,y", *lines]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for kind, options in KINDS.items():
            for data in ("rows", "kinds"):
                assert run(f"fit --data {data}.csv:y --model mlp:3 {options} --out {data}-{kind}".split()) == 0
        assert run(f"fit --data rows.csv:y --model mlp:3 {KINDS['mf']} --split 1 --out split".split()) == 0
        assert run(f"fit --data rows.csv:y --model mlp:4 {KINDS['mf']} --out wide".split()) == 0
    return folder


def rebuilt(name: str) -> tuple[bnn.FunctionalModel, bnn.data.DataSet]:
    bank = Bank.open(name)
    module = common.module_of(bank)
    return bnn.FunctionalModel(module, bank).settled(), common.data_of(
        bank, data=None, root=None, split=None, trust=False
    )


@pytest.mark.parametrize("data", ["rows", "kinds"])
def test_compare_says_what_python_says(bnn_run: Call, data: str) -> None:
    code, out, err = bnn_run(f"compare --bank {data}-hmc --bank {data}-mf --json found.json")
    assert (code, err) == (0, "")
    told = json.loads(Path("found.json").read_text())
    assert (told["format"], told["version"]) == ("bnn-comparison", 1)
    (found,) = told["comparisons"]
    (one, dataset), (other, _) = rebuilt(f"{data}-hmc"), rebuilt(f"{data}-mf")
    wanted = compare(one, other, dataset.test, loc=dataset.units.loc, scale=dataset.units.scale)
    assert found["metrics"] == wanted.to_dict()["metrics"]
    assert (found["reference"], found["bank"], found["num_rows"]) == (f"{data}-hmc", f"{data}-mf", 10)
    assert found["digests"] == [one.bank.digest, other.bank.digest]
    head, row = out.splitlines()
    assert head.split()[:2] == ["from", f"{data}-hmc"]
    assert row.startswith(f"{data}-mf")
    for figure in wanted.figures.values():
        assert f"{figure.value:.4g} ±" in row


def test_compare_takes_modules_of_other_shapes(bnn_run: Call) -> None:
    code, out, _ = bnn_run("compare --bank rows-hmc --bank rows-mf --bank wide")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["from", "rows-mf", "wide"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--bank rows-hmc", "want two banks at least, got 1"),
        ("--bank rows-hmc --bank kinds-hmc", "want the data of rows-hmc"),
        ("--bank rows-hmc --bank split", "got another split, inputs, target"),
        ("--bank rows-hmc --bank nothing", "nothing"),
        ("--bank rows-hmc --bank wide --model cnn", "--model: want one that a bank names: mlp:3, mlp:4, got cnn"),
        ("--bank rows-hmc --bank rows-mf --device tpu", "--device"),
    ],
)
def test_compare_refuses(bnn_run: Call, words: str, said: str) -> None:
    code, out, err = bnn_run(f"compare {words}")
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1


def test_loo_tells_elpd_and_keeps_the_values(bnn_run: Call) -> None:
    code, out, err = bnn_run("bank loo rows-hmc --out values.safetensors")
    assert (code, err) == (0, "")
    net, dataset = rebuilt("rows-hmc")
    values = log_likelihoods(net, dataset.train, loc=dataset.units.loc, scale=dataset.units.scale)
    found = loo(values)
    kept = Pointwise.open("values.safetensors")
    assert torch.equal(kept.log_likelihood, values.log_likelihood)
    assert kept.log_likelihood.shape == (60, 40)
    first, second = out.splitlines()
    assert first == str(found)
    assert re.fullmatch(r"elpd_loo -\d+\.\d+ ± \d+\.\d+, p_loo \d+\.\d+, 40 rows, Pareto k .*", first)
    assert re.match(r"elpd_waic -\d+\.\d+ ± \d+\.\d+, p_waic \d+\.\d+", second)
    assert found.elpd < -80  # of a target whose noise is about 2.5: in its own units
    code, _, err = bnn_run("bank loo rows-hmc --out values.safetensors")
    assert code == 2
    assert "kept" in err
    assert bnn_run("bank loo rows-hmc --out values.safetensors --overwrite")[0] == 0


def test_loo_wants_the_rows_of_the_fit(bnn_run: Call) -> None:
    lines = Path("rows.csv").read_text().splitlines()
    Path("others.csv").write_text("\n".join(lines[:30]))
    code, out, err = bnn_run("bank loo rows-hmc --data others.csv:y")
    assert (code, out) == (2, "")
    assert "want the data that the bank was fitted to, got other data" in err
    code, out, err = bnn_run("bank loo rows-hmc --out rows-hmc/bank.json --overwrite")
    assert code == 2
    assert "want a file beside the bank's own" in err


@pytest.mark.parametrize("flag", ["", " --held-out"])
def test_stack_weighs_by_rows_not_seen(bnn_run: Call, flag: str) -> None:
    code, out, err = bnn_run(f"bank stack rows-hmc rows-mf --out both{flag}")
    assert (code, err) == (0, "")
    densities = []
    for name in ("rows-hmc", "rows-mf"):
        net, dataset = rebuilt(name)
        rows = dataset.test if flag else dataset.train
        values = log_likelihoods(net, rows, loc=dataset.units.loc, scale=dataset.units.scale)
        densities.append(values.log_predictive() if flag else loo(values).rows)
    wanted = stacking_weights(torch.stack(densities)).weights
    both = Bank.open("both")
    assert len(both) == 110
    for part, weight in zip(both.log_weight.split([60, 50]), wanted.tolist(), strict=True):
        assert float(part.exp().sum()) == pytest.approx(weight, abs=1e-9)
    for line, weight, name in zip(out.splitlines(), wanted.tolist(), ("rows-hmc", "rows-mf"), strict=False):
        assert line.startswith(f"weight {weight:.4f}  {name}: elpd")
    assert "together elpd -" in out
    assert "method      stack" in out
    assert f"weighing {float(wanted[0]):.3g}" in out
    assert bnn_run("evaluate --bank both")[0] == 0
    assert bnn_run("bank verify both --full")[0] == 0
    code, told, _ = bnn_run("bank diagnose both")
    assert (code, told.startswith("not a Markov chain")) == (0, True)
    assert bnn_run("bank stack rows-hmc rows-mf --out both")[0] == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("rows-hmc", "at least two, got 1"),
        ("rows-hmc kinds-hmc", "want the data of rows-hmc"),
        ("rows-hmc rows-hmc", "each bank once"),
        ("rows-hmc wide", "the layout as in rows-hmc"),
    ],
)
def test_stack_refuses(bnn_run: Call, words: str, said: str) -> None:
    code, _, err = bnn_run(f"bank stack {words} --out new")
    assert code == 2
    assert said in err
    assert len(err.splitlines()) == 1
    assert not Path("new").exists()
