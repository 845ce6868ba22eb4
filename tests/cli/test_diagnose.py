"""`bnn bank diagnose`: its verdict and exit code, what it leaves out, and the same line after a fit."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from scenarios import linear_regression

from bnn.bank import Bank
from bnn.cli import run
from bnn.cli.show import show_diagnosis
from bnn.evaluation.convergence import diagnose, probe_rows
from bnn.evaluation.verdict import Diagnosis, Mixing
from bnn.fitting import fit
from bnn.functional import FunctionalModel
from bnn.inference import HMC

Call = Callable[..., tuple[int, str, str]]

CODE = (
    "import numpy as np\nimport torch\nfrom torch import nn\n"
    "def rows():\n"
    "    source = np.random.default_rng(0)\n"
    "    x = source.normal(size=(60, 3))\n"
    "    return {'x': x, 'y': x @ np.array([1.0, -2.0, 0.5]) + 0.3 * source.normal(size=60)}\n"
    "def line(input_shape, num_outputs):\n"
    "    return nn.Linear(input_shape[0], num_outputs)\n"
)
HMC_OPTIONS = "--method hmc --num-chains 3 --num-warmup 100 --num-steps 4"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bank of long chains, and code that its data and module are made by."""
    folder = tmp_path_factory.mktemp("banks")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        (folder / "trees_of_mine.py").write_text(CODE)
        words = f"fit --data trees_of_mine:rows --model trees_of_mine:line {HMC_OPTIONS} --num-samples 900 --out long"
        assert run(words.split()) == 0
    return folder


@pytest.fixture
def bnn(call: Callable[[str], tuple[int, str, str]], made: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run a command line in the folder of the bank: exit code, stdout, stderr."""
    monkeypatch.chdir(made)
    monkeypatch.syspath_prepend(str(made))
    return call


def figures(out: str, what: str) -> list[str]:
    row = re.search(rf"^{what} +(.*?) *$", out, re.MULTILINE)
    assert row, out
    return row[1].split(maxsplit=6)


def test_good_chains_are_trusted(bnn: Call, made: Path) -> None:
    code, out, err = bnn("bank diagnose long --trust")
    assert (code, err) == (0, "")
    assert out.startswith("good: 3 chains of 300 draws, R-hat at most 1.0")
    assert "not judged" not in out
    number, rhat, _, bulk, _, error, worst = figures(out, "predictions")
    assert number == "12"  # the test rows: 20 % of 60
    assert 0.99 < float(rhat) < 1.05
    assert float(bulk) > 100
    assert 0 < float(error) < 1
    assert re.fullmatch(r"output 0 of probe row \d+", worst)
    assert figures(out, "noise")[6] == "@likelihood.scale"
    assert figures(out, "parameters")[0] == "5"  # weights, bias and noise
    assert figures(out, "log joint")[0] == "1"
    assert re.fullmatch(
        r"acceptance 0\.\d\d, 0 of 900 trajectories diverged, E-BFMI .* to .*, longest stay \d+ of 300 draws",
        out.splitlines()[-1],
    )


def test_figures_are_those_of_the_library_on_the_test_rows(bnn: Call, made: Path) -> None:
    from bnn.cli import common

    code, out, _ = bnn("bank diagnose long --trust --json")
    told = json.loads(out)
    bank = Bank.open("long")
    module = common.module_of(bank, trust=True)
    data = common.data_of(bank, data=None, root=None, split=None, trust=True)
    want = diagnose(bank, net=FunctionalModel(module, bank), x=probe_rows(data.test.x))
    assert code == 0
    assert told == {"bank": "long", "trusted": True, **want.to_dict(), "without_predictions": None}


def test_many_test_rows_are_thinned_to_sixty_four(bnn: Call, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn (extra 'demo') is not installed")
    words = f"{HMC_OPTIONS.replace('--num-warmup 100', '--num-warmup 60')} --num-samples 30 --out {tmp_path}/short"
    assert bnn(f"fit --data diabetes --model mlp:3 {words}")[0] == 0
    code, out, _ = bnn(f"bank diagnose {tmp_path}/short --json")
    assert code == 1
    assert json.loads(out)["predictions"]["num"] == 64


def test_code_that_a_bank_names_is_not_run_unasked(bnn: Call) -> None:
    code, out, err = bnn("bank diagnose long")
    assert (code, err) == (0, "")
    assert out.startswith("good: 3 chains of 300 draws")
    assert "(not judged: predictions, without probe inputs)" in out
    assert "predictions were left out: long model: want your word for code that the bank names" in out
    assert "or say --trust" in out
    assert not re.search("^predictions +[0-9]", out, re.MULTILINE)
    told = json.loads(bnn("bank diagnose long --json")[1])
    assert told["predictions"] is None
    assert "want your word" in told["without_predictions"]
    said = "bank diagnose long --model trees_of_mine:line --data trees_of_mine:rows"
    assert "not judged" not in bnn(said)[1]


@pytest.mark.parametrize("flags", ["--data nowhere.npz", "--model mlp:3 --trust", "--data trees_of_mine:rows"])
def test_what_was_asked_for_and_cannot_be_had_is_an_error(bnn: Call, flags: str) -> None:
    code, out, err = bnn(f"bank diagnose long {flags}")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1


def test_data_that_are_gone(bnn: Call, made: Path, tmp_path: Path) -> None:
    rows = "\n".join(f"{i % 7},{i % 5},{i % 3}.5" for i in range(40))
    (tmp_path / "trees.csv").write_text("a,b,c\n" + rows)
    words = "--model mlp:2 --method hmc --num-chains 2 --num-warmup 60 --num-steps 4 --num-samples 8"
    assert bnn(f"fit --data trees.csv:c --data-root {tmp_path} {words} --out {tmp_path}/bank")[0] == 0
    code, out, _ = bnn(f"bank diagnose {tmp_path}/bank")
    assert code == 1
    assert out.startswith("too few to tell: 2 chains of 4 draws, want 100 draws a chain; raise num_samples and resume")
    assert "predictions were left out: " in out
    code, out, _ = bnn(f"bank diagnose {tmp_path}/bank --data-root {tmp_path}")
    assert code == 1
    assert "left out" not in out


def test_a_chain_elsewhere_is_not_trusted(bnn: Call, made: Path, tmp_path: Path) -> None:
    """The rows of one chain, moved: a bank of the same name for everything, that should not be trusted."""
    from bnn.bank import BankWriter
    from bnn.types import make_block

    bank = Bank.open("long")
    block = bank.block(range(len(bank)))
    params = {name: value.clone() for name, value in block.params.items()}
    params["bias"][bank.chain == 1] += 3.0
    config = {key: bank.info[key] for key in ("method", "model", "data", "likelihood")}
    writer = BankWriter(tmp_path / "moved", layout=bank.layout, config=config, base=bank.base())
    writer.append(make_block(params, chain=block.chain, draw=block.draw, log_joint=block.log_joint))
    writer.close()
    code, out, _ = bnn(f"bank diagnose {tmp_path}/moved --trust")
    assert code == 1
    assert out.startswith("bad: chains disagree, R-hat ")
    assert "raise num_samples, num_warmup, and num_steps for longer trajectories" in out


def test_methods_without_chains(bnn: Call, tmp_path: Path) -> None:
    words = (
        f"fit --data trees_of_mine:rows --model trees_of_mine:line --method prior --num-samples 7 --out {tmp_path}/p"
    )
    told = "not a Markov chain: nothing to diagnose, samples of prior are independent draws of its approximation"
    code, out, err = bnn(words)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == f"verdict     {told}"
    for flags in ("", " --trust"):
        assert bnn(f"bank diagnose {tmp_path}/p{flags}") == (0, told + "\n", "")


def test_a_fit_ends_with_the_verdict_and_exits_with_0(bnn: Call, tmp_path: Path) -> None:
    words = f"fit --data trees_of_mine:rows --model trees_of_mine:line {HMC_OPTIONS} --out {tmp_path}/bank"
    code, out, err = bnn(f"{words} --num-samples 30")
    assert (code, err) == (0, "")
    said = out.splitlines()[-1]
    assert (
        said
        == "verdict     too few to tell: 3 chains of 10 draws, want 100 draws a chain; raise num_samples and resume"
    )
    code, out, _ = bnn(f"{words} --num-samples 900 --resume")
    assert code == 0
    said = out.splitlines()[-1].removeprefix("verdict     ")
    assert said.startswith("good: 3 chains of 300 draws")
    assert bnn(f"bank diagnose {tmp_path}/bank --trust")[1].splitlines()[0] == said


def test_a_verdict_that_cannot_be_had_does_not_spoil_a_fit(
    bnn: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bnn.errors import DataError
    from bnn.evaluation import convergence

    def refuse(*_: object, **__: object) -> Diagnosis:
        raise DataError("module", want="one tensor of outputs", got="tuple", fix="wrap the module")

    monkeypatch.setattr(convergence, "diagnose", refuse)
    words = (
        f"fit --data trees_of_mine:rows --model trees_of_mine:line --method prior --num-samples 7 --out {tmp_path}/p"
    )
    code, out, _ = bnn(words)
    assert code == 0
    assert out.splitlines()[-1] == "verdict     none: module: want one tensor of outputs, got tuple; wrap the module"


def test_no_bank(bnn: Call) -> None:
    code, _, err = bnn("bank diagnose nowhere")
    assert code == 2
    assert "nowhere: want a bank" in err


def test_a_bank_of_python_is_diagnosed_without_predictions(bnn: Call, tmp_path: Path) -> None:
    """`bnn.fit` records neither module nor data."""
    scenario = linear_regression()
    method = HMC(num_chains=2, num_warmup=40, num_steps=6)
    fit(scenario.model, scenario.data, method=method, num_samples=20, out=tmp_path / "bank", progress=False)
    code, out, _ = bnn(f"bank diagnose {tmp_path}/bank")
    assert code == 1
    assert "predictions were left out: " in out
    assert "names no model" in out


def test_damage_is_named(bnn: Call, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "long", tmp_path / "bank")
    (shard,) = (tmp_path / "bank").glob("main-*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    code, _, err = bnn(f"bank diagnose {tmp_path}/bank --trust")
    assert code == 2
    assert shard.name in err


def test_all_figures_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    part = Mixing(7, 1.234, "output 2 of probe row 5", 0.43, 321.4, 98.6, 0.0123)
    moved = {"acceptance": 0.756, "divergent": 3, "num_trajectories": 90, "ebfmi": (0.91, 0.85)}
    moved |= {"longest_stay": (2, 5, 3), "num_draws": 30}
    show_diagnosis(Diagnosis("bad", "bad: this", predictions=part)._replace(**moved))
    said, head, row, last = (line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert said == "bad: this"
    assert re.split(" {2,}", head.strip()) == ["number", "R-hat", "above 1.01", "bulk ESS", "tail ESS", "MCSE", "worst"]
    assert re.split(" {2,}", row) == [
        "predictions",
        "7",
        "1.234",
        "43%",
        "321",
        "99",
        "0.012",
        "output 2 of probe row 5",
    ]
    assert last == "acceptance 0.76, 3 of 90 trajectories diverged, E-BFMI 0.85 to 0.91, longest stay 5 of 30 draws"
    show_diagnosis(Diagnosis("good", "good: that"))
    assert capsys.readouterr().out == "good: that\n"


def test_global_streams_are_left_alone(bnn: Call) -> None:
    before = torch.get_rng_state()
    assert bnn("bank diagnose long --trust")[0] == 0
    assert torch.equal(before, torch.get_rng_state())
