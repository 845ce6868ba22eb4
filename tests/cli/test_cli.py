"""The command line: what --help says is done, and what bad input gets."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forging import edit_json

from bnn.bank import Bank
from bnn.cli import run

pytest.importorskip("sklearn", reason="scikit-learn (extra 'demo') is not installed")

REAL = Path(__file__).parents[3] / "shared" / "data"
FAST_HMC = ["--method", "hmc", "--num-chains", "2", "--num-warmup", "40", "--num-steps", "6", "--num-samples", "10"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def bnn(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line: exit code, stdout, stderr."""

    def call(*words: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = run([piece for word in words for piece in word.split()])
        found = capfd.readouterr()
        return code, found.out, found.err

    return call


# End to end


def test_digits_from_fit_to_student(bnn: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    fit = "fit --data digits --model mlp:16 --method mean-field --num-steps 600 --num-samples 20 --prior-scale 2"
    code, out, err = bnn(f"{fit} --out banks/mf")
    assert (code, err) == (0, "")
    assert "20 samples of 1,210 values" in out
    code, out, err = bnn("fit --data digits --model mlp:16 --prior-scale 2 --out banks/hmc", " ".join(FAST_HMC))
    assert code == 0
    code, out, err = bnn("evaluate --bank banks/mf --bank banks/hmc --ood digits-shuffled --report report")
    assert (code, err) == (0, "")
    report = json.loads((tmp_path / "report" / "report.json").read_text())["reports"]
    assert set(report) == {"mf", "hmc"}
    accuracy = report["mf"]["metrics"]["accuracy"]["value"]
    assert accuracy > 0.85  # 600 steps of a small network; chance is 0.1
    assert f"{accuracy:.4f}" in out
    assert report["mf"]["num_rows"] == 359
    assert out.startswith("mf: 359 rows, 20 samples: accuracy")
    assert report["hmc"]["diagnosis"]["text"] in out  # too short to be judged: its first line says so
    names = {p.name for p in (tmp_path / "report").iterdir()}
    assert {"report.json", "report.html"} <= names
    assert all(re.fullmatch(r"(mf|hmc)-\w+\.svg", name) for name in names - {"report.json", "report.html"})
    code, out, err = bnn("train --bank banks/mf --student mlp:12,relu --num-epochs 200 --out student")
    assert (code, err) == (0, "")
    assert {"model.safetensors", "curve.csv", "bank.json"} <= {p.name for p in (tmp_path / "student").iterdir()}
    code, out, err = bnn("evaluate --bank student")
    assert code == 0
    assert float(re.search(r"\naccuracy\s+(\S+)", out)[1]) > 0.85  # type: ignore[index]


def test_diabetes_in_the_targets_own_units(bnn: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, _, _ = bnn("fit --data diabetes --model mlp:8 --out bank", " ".join(FAST_HMC))
    assert code == 0
    assert "@likelihood.scale" in Bank.open("bank").layout.names
    code, out, _ = bnn("evaluate --bank bank --report report")
    assert code == 0
    metrics = json.loads((tmp_path / "report" / "report.json").read_text())["reports"]["bank"]["metrics"]
    assert 40 < metrics["rmse"]["value"] < 90  # the target spreads by 77
    assert 0.75 < metrics["coverage_90"]["value"] <= 1.0
    code, _, _ = bnn("train --bank bank --num-epochs 20 --out student")
    assert code == 0
    code, out, _ = bnn("evaluate --bank student --bank bank")
    assert code == 0
    assert "crps" in out


@pytest.mark.skipif(not REAL.is_dir(), reason="the folder of real data sets is not here")
def test_a_uci_folder(bnn: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    words = f"fit --data uci/yacht --data-root {REAL} --split 2 --model mlp:10 --out bank"
    assert bnn(words, " ".join(FAST_HMC))[0] == 0
    code, _, _ = bnn(f"evaluate --bank bank --data-root {REAL} --report report")
    assert code == 0
    found = json.loads((tmp_path / "report" / "report.json").read_text())["reports"]["bank"]
    assert found["num_rows"] == 31
    assert found["metrics"]["rmse"]["value"] < 8  # the target spreads by 15
    code, _, err = bnn(f"evaluate --bank bank --data-root {REAL} --split 3")
    assert code == 2
    assert "want split 2, which the bank was fitted on, got 3" in err


def test_csv_npz_and_partial_banks(bnn: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    rows = "\n".join(f"{i % 7},{i % 5},{'oak' if i % 7 > 2 else 'pine'}" for i in range(60))
    (tmp_path / "trees.csv").write_text("a,b,kind\n" + rows)
    words = (
        "fit --data trees.csv:kind --model mlp:6 --method low-rank --rank 2 --num-steps 300 --num-samples 6 --out bank"
    )
    assert bnn(words, "--bayesian 3 --bayesian 1.bias")[0] == 0
    assert Bank.open("bank").layout.names == ("1.bias", "3.weight", "3.bias")
    assert set(Bank.open("bank").base()) == {"1.weight"}
    nats, bits = (
        float(bnn(f"evaluate --bank bank --unit {unit}")[1].split("\nnll ")[1].split()[0]) for unit in ("nats", "bits")
    )
    assert bits == pytest.approx(nats / math.log(2), abs=2e-4)
    assert bnn("train --bank bank --num-epochs 2 --out student")[0] == 0
    (tmp_path / "new.csv").write_text("a,b,kind\n1,2,pine\n6,1,oak\n5,5,oak\n")
    assert bnn("evaluate --bank bank --data new.csv:kind --report r")[0] == 0
    assert json.loads((tmp_path / "r" / "report.json").read_text())["reports"]["bank"]["num_rows"] == 3


def test_a_partial_bank_is_evaluated_with_the_values_it_was_fitted_beside(
    bnn: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """The base of the bank, not a freshly built module, stands for the parameters outside the sample."""
    (tmp_path / "trained_nets.py").write_text(
        "import torch\nfrom torch import nn\ncalls = 0\n"
        "def net(input_shape, num_outputs):\n"
        "    global calls\n    calls += 1\n"
        "    module = nn.Sequential(nn.Linear(input_shape[0], 4), nn.BatchNorm1d(4), nn.Linear(4, num_outputs))\n"
        "    with torch.no_grad():\n        module[0].weight.fill_(calls)\n"
        "    module[1].running_mean.fill_(calls)\n    return module\n"
    )
    words = "fit --data diabetes --model trained_nets:net --bayesian 2 --method prior --num-samples 3 --out bank"
    assert bnn(words)[0] == 0
    code, _, err = bnn("evaluate --bank bank")
    assert code == 2
    assert "repeat it as --model trained_nets:net, or say --trust" in err
    figures = []
    for how in ("--trust", "--model trained_nets:net"):
        assert bnn(f"evaluate --bank bank {how} --report r")[0] == 0
        figures.append(
            json.loads((tmp_path / "r" / "report.json").read_text())["reports"]["bank"]["metrics"]["rmse"]["value"]
        )
    sys.modules.pop("trained_nets")
    assert figures[0] == figures[1]


def test_resume_and_overwrite(bnn: Callable[..., tuple[int, str, str]]) -> None:
    fit = "fit --data diabetes --model mlp:4 --method mean-field --num-steps 100 --out bank"
    assert bnn(f"{fit} --num-samples 5")[0] == 0
    code, _, err = bnn(f"{fit} --num-samples 5")
    assert code == 2
    assert err == (
        "bank: want a new folder, got a bank, which is kept; go on with resume, replace it with overwrite, or choose another name\n"
    )
    assert len(Bank.open("bank")) == 5
    assert bnn(f"{fit} --num-samples 8 --resume")[0] == 0
    assert len(Bank.open("bank")) == 8
    code, _, err = bnn("fit --data diabetes --model mlp:4 --method mean-field --num-steps 90 --out bank --resume")
    assert code == 2
    assert "bank.json: want method =" in err
    assert bnn(f"{fit} --num-samples 3 --overwrite")[0] == 0
    assert len(Bank.open("bank")) == 3


def test_resuming_for_fewer_samples_than_there_are_says_so(bnn: Callable[..., tuple[int, str, str]]) -> None:
    from bnn.cli import say_warning

    fit = "fit --data diabetes --model mlp:4 --method prior --out bank"
    assert bnn(f"{fit} --num-samples 9")[0] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = say_warning
        code, _, err = bnn(f"{fit} --num-samples 5 --resume")
        assert code == 0
        assert err == (
            "warning: fit: bank: the bank has 9 samples already, more than the 5 asked for: nothing is added or taken "
            "away; ask for more, or keep fewer with bnn bank thin\n"
        )
        assert len(Bank.open("bank")) == 9
        assert bnn(f"{fit} --num-samples 9 --resume")[2] == ""


def test_config_file_and_flags_that_win(bnn: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    (tmp_path / "fit.toml").write_text(
        'data = "diabetes"\nout = "bank"\nmodel = "mlp:3"\nmethod = "prior"\nnum-samples = 7\nbayesian = ["*", "!*.bias"]\n'
    )
    assert bnn("fit --config fit.toml --num-samples 4")[0] == 0
    bank = Bank.open("bank")
    assert len(bank) == 4
    assert bank.layout.names == ("1.weight", "3.weight", "@likelihood.scale")
    (tmp_path / "bad.toml").write_text("num_sample = 7\n")
    code, _, err = bnn("fit --config bad.toml")
    assert code == 2
    assert "'num_sample': want the name of a flag" in err
    (tmp_path / "worse.toml").write_text("= 7\n")
    assert bnn("fit --config worse.toml")[0] == 2
    assert bnn("fit --config absent.toml")[0] == 2


def test_bank_info_and_verify(bnn: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    bnn("fit --data diabetes --model mlp:4 --method prior --num-samples 5 --out bank")
    code, out, _ = bnn("bank info bank")
    assert code == 0
    assert "5 samples of 50 values" in out
    assert "diabetes, split 0" in out
    for flag in ("", "--full"):
        code, out, _ = bnn(f"bank verify bank {flag}")
        assert (code, out.split(":")[0]) == (0, "good")
    shard = tmp_path / "bank" / "main-000000.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[5000] ^= 1
    shard.write_bytes(raw)
    assert bnn("bank verify bank")[0] == 0
    code, out, _ = bnn("bank verify bank --full")
    assert code == 1
    assert out == "bad: main-000000.safetensors: other bytes than the manifest says\n"
    shard.write_bytes(raw[:-3])
    code, out, _ = bnn("bank verify bank")
    assert code == 1
    assert "main-000000.safetensors" in out
    code, _, err = bnn("evaluate --bank bank")
    assert code == 2
    assert re.search(r"main-000000\.safetensors: want \d+ bytes for 5 rows, got \d+ bytes; restore", err)


def test_bench_prints_ratios_and_compares(bnn: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, out, _ = bnn("bench select --num-samples 60 --width 16 --json a.json")
    assert code == 0
    assert out.split()[0] == "ratio"
    found = json.loads((tmp_path / "a.json").read_text())
    assert {row["rival"] for row in found["rows"]} == {"torch.stack of state dicts"}
    assert found["machine"]["torch"] == torch.__version__
    for row in found["rows"]:
        row["ratio"] *= 1000
    (tmp_path / "better.json").write_text(json.dumps(found))
    code, out, _ = bnn("bench select --num-samples 60 --width 16 --compare better.json")
    assert code == 1
    assert "slower: select" in out
    code, _, err = bnn("bench select --compare absent.json")
    assert code == 2
    assert "a file that --json wrote" in err


def test_bench_bank_reads_through_every_residency(bnn: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = bnn("bench bank --num-samples 200 --width 16")
    assert code == 0
    assert out.count("NumPy memmap") == 2
    assert {"bank[i], mapped", "bank[i], in memory"} <= {cell.strip() for cell in out.replace("  ", "\n").splitlines()}
    assert "a pass, streamed" in out
    ratios = [line.split()[0] for line in out.splitlines()[1:]]
    assert all(float(ratio) > 0 for ratio in ratios), ratios
    assert "bare reads" in out


def test_bench_apply_agrees_with_its_rivals(bnn: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = bnn("bench apply --num-samples 30 --width 8")
    assert code == 0
    assert {"param.data", "load_state_dict"} <= set(out.split())


# Balance, free parameters, teachers and optimisers


def write_table(folder: Path) -> None:
    """240 rows of three kinds, two of them rare, that two numbers tell apart in part."""
    import numpy as np

    source = np.random.default_rng(0)
    kinds = source.choice(["ash", "elm", "oak"], size=240, p=[0.8, 0.12, 0.08])
    centre = {"ash": (0, 0), "elm": (1.5, 0), "oak": (0, 1.5)}
    rows = [
        f"{centre[kind][0] + a},{centre[kind][1] + b},{kind}"
        for kind, a, b in zip(kinds, *source.normal(size=(2, 240)), strict=True)
    ]
    (folder / "t.csv").write_text("p,q,kind\n" + "\n".join(rows))


TABLE = (
    "fit --data t.csv:kind --model mlp:6 --method mean-field --num-steps 60 --batch-size 64 --num-samples 5 --out bank"
)
HEAD = "fit --data t.csv:kind --model mlp:6 --method prior --bayesian 3 --num-samples 5 --out bank"


@pytest.mark.parametrize(
    ("balance", "sampler", "identity"),
    [
        ("skew=1.0", "ClassBalancedSampler", None),
        ("skew=0.5", "ClassBalancedSampler", None),
        # 60 steps of 64 rows are 20 epochs of 192.
        ("skew=1.0,schedule=linear:0.5", "DynamicClassSampler", "Linear(start=1.0, stop=0.5, num_epochs=20)"),
        ("skew=1.5,schedule=exponential:0.9", "DynamicClassSampler", "Exponential(start=1.5, rate=0.9)"),
    ],
)
def test_fit_balances_classes_and_says_so(
    bnn: Callable[..., tuple[int, str, str]], tmp_path: Path, balance: str, sampler: str, identity: str | None
) -> None:
    write_table(tmp_path)
    with pytest.warns(UserWarning, match="this is a balanced posterior") as heard:
        assert bnn(f"{TABLE} --balance {balance}")[0] == 0
    assert len(heard) == 1
    record = Bank.open("bank").info["sampling"]
    assert (record["sampler"], record["posterior"]) == (sampler, "balanced")
    if identity is None:
        skew = float(balance.removeprefix("skew="))
        mass = [share ** (1 - skew) for share in record["natural_shares"]]
        assert record["class_shares"] == pytest.approx([one / sum(mass) for one in mass])
    else:
        assert record["identity"]["schedule"] == identity
    code, _, err = bnn(f"{TABLE} --balance {balance},importance --overwrite")
    assert (code, err) == (0, "")
    assert Bank.open("bank").info["sampling"]["posterior"] == "natural"
    plain = Bank.open("bank").block(slice(None)).params["1.weight"].clone()
    assert bnn(f"{TABLE} --overwrite")[0] == 0
    assert Bank.open("bank").info["sampling"] == {"sampler": None, "posterior": "natural"}
    assert not torch.equal(Bank.open("bank").block(slice(None)).params["1.weight"], plain)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"{TABLE} --balance 1.0", "--balance 1.0: want skew=NUMBER[,schedule=linear:STOP|"),
        (f"{TABLE} --balance skew", "write for example skew=1.0,schedule=linear:0.5"),
        (f"{TABLE} --balance skew=much", "--balance skew=much: want skew=NUMBER"),
        (f"{TABLE} --balance schedule=linear:0.5", "want skew=NUMBER"),
        (f"{TABLE} --balance skew=1,schedule=cosine:0.5", "want skew=NUMBER"),
        (f"{TABLE} --balance skew=1,schedule=linear", "want skew=NUMBER"),
        (f"{TABLE} --balance skew=1,schedule=", "want skew=NUMBER"),
        (f"{TABLE} --balance skew=1,schedule=:0.5", "want skew=NUMBER"),
        (f"{TABLE} --balance skew=1,importance=yes", "want skew=NUMBER"),
        (f"{TABLE} --balance skew=1,strength=2", "want skew=NUMBER"),
        (f"{TABLE} --balance skew=1,skew=2", "want skew=NUMBER"),
        (f"{TABLE} --balance skew=nan", "finite"),
        (f"{TABLE} --balance skew=1,schedule=exponential:2", "Exponential(rate=): want above 0, at most 1, got 2.0"),
        (f"{TABLE} --balance skew=1,schedule=recall:1", "sampler: want a schedule by epoch, got one by metric"),
        (f"{TABLE} --balance skew=1,schedule=loss:-1", "ByMetric(strength=): want at least 0, got -1.0"),
        ("fit --data t.csv:kind --model mlp:6 --method hmc --num-samples 8 --balance skew=1,schedule=linear:0 --out bank",
         "chances that do not change from epoch to epoch"),
        ("fit --data diabetes --model mlp:4 --method map --balance skew=1 --out bank", "--balance: want classes, got a regression"),
        (f"{TABLE} --draws halton", "Guide(draws=): want one of random, antithetic, sobol, mean, got 'halton'"),
        (f"{TABLE} --draws mean", "num_samples: want 1 for Guide(draws='mean'), which is one point, got 5"),
        (f"{HEAD} --draws sobol", "--draws: want an option of the method prior: block_size, got none of these"),
        ("fit --data t.csv:kind --method map --draws mean --out bank", "Guide(draws=): want none for 'map', a point"),
    ],
)  # fmt: skip
def test_balances_and_draws_that_mean_nothing_get_one_line(
    bnn: Callable[..., tuple[int, str, str]], tmp_path: Path, words: str, message: str
) -> None:
    write_table(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code, out, err = bnn(words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "bank").exists()


def test_fit_draws_as_it_is_told(bnn: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    write_table(tmp_path)
    assert bnn(f"{TABLE.replace('--num-samples 5', '')} --draws mean")[0] == 0
    mean = Bank.open("bank").block(slice(None)).params["1.weight"]
    assert len(mean) == 1
    assert bnn(f"{TABLE.replace('--num-samples 5', '--num-samples 6')} --draws antithetic --overwrite")[0] == 0
    bank = Bank.open("bank")
    pairs = bank.block(slice(None)).params["1.weight"].unflatten(0, (3, 2)).mean(dim=1)
    torch.testing.assert_close(pairs, mean.expand_as(pairs))
    assert bank.info["method"]["options"]["draws"] == "antithetic"


def test_free_parameters_are_trained_and_evaluated_as_the_base(
    bnn: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """Of a head drawn from its prior, which only a trunk that fits it makes good."""
    from safetensors.torch import load_file

    from bnn.data import load_data
    from bnn.evaluation import evaluate
    from bnn.functional import FunctionalModel
    from bnn.modules import build

    write_table(tmp_path)
    assert bnn(HEAD)[0] == 0
    words = "train --bank bank --free * --num-epochs 60 --batch-size 32 --lr 0.02 --num-indices 2 --clip-norm 5"
    code, out, err = bnn(f"{words} --out trunk")
    assert (code, err) == (0, "")
    assert "1 samples of 18 values" in out
    files = {path.name for path in (tmp_path / "trunk").iterdir()}
    assert {"bank.json", "free.safetensors", "curve.csv"} <= files
    assert "model.safetensors" not in files
    trained = {name: tensor for name, tensor in load_file("trunk/free.safetensors").items() if name[0] != "@"}
    assert trained.keys() == {"1.weight", "1.bias"}
    module = build("mlp:6", input_shape=[2], num_outputs=3, seed=0)
    module.load_state_dict(trained, strict=False)
    expected = evaluate(FunctionalModel(module, Bank.open("bank")), load_data("t.csv:kind").test).metrics["nll"].value
    found = {}
    for name, base in (("plain", ""), ("folder", "--base trunk"), ("file", "--base trunk/free.safetensors")):
        assert bnn(f"evaluate --bank bank {base} --report {name}")[0] == 0
        found[name] = json.loads((tmp_path / name / "report.json").read_text())["reports"]["bank"]["metrics"]["nll"][
            "value"
        ]
    assert found["folder"] == found["file"] == pytest.approx(expected, rel=1e-5)
    assert found["folder"] < found["plain"] - 0.1
    assert bnn(f"{words.replace('--free *', '--free 1.bias')} --out bias")[0] == 0
    assert Bank.open("bias").layout.names == ("1.bias",)
    assert bnn("evaluate --bank bank --base bias")[0] == 0


def test_bases_that_fit_no_bank_are_refused(bnn: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    write_table(tmp_path)
    assert bnn(HEAD)[0] == 0
    for name, tensors in (
        ("inside", {"3.bias": torch.zeros(3)}),
        ("shape", {"1.bias": torch.zeros(7)}),
        ("unknown", {"9.bias": torch.zeros(3)}),
    ):
        save_file(tensors, f"{name}.safetensors")
    (tmp_path / "garbage.safetensors").write_bytes(b"no such thing")
    (tmp_path / "empty").mkdir()
    for base, message in (
        ("inside.safetensors", "--base inside.safetensors '3.bias': want parameters of the module outside the bank"),
        ("shape.safetensors", "got [7], where the module has [6]"),
        ("unknown.safetensors", "got [3], which the module has not"),
        ("garbage.safetensors", "garbage.safetensors: want a safetensors file"),
        ("empty", "empty/free.safetensors: want a safetensors file, got none"),
        ("nowhere", "nowhere: want a safetensors file, got none"),
    ):
        code, out, err = bnn(f"evaluate --bank bank --base {base}")
        assert (code, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1


def test_targets_optimisers_and_patience_of_a_student(bnn: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """Each flag reaches the run: its record, its curve, its values."""
    write_table(tmp_path)
    assert bnn(TABLE)[0] == 0
    words = "train --bank bank --num-epochs 4 --batch-size 50"
    values, curves = {}, {}
    for name, flags in {
        "plain": "",
        "predictive": "--targets predictive",
        "sgd": "--optimizer sgd",
        "adamw": "--optimizer adamw",
        "noise": "--noise 0.2",
        "mixup": "--mixup 0.4",
        "several": "--num-indices 3",
        "half": "--precision bfloat16",
        "balanced": "--balance skew=1.0",
        "by recall": "--balance skew=1.0,schedule=recall:1.0",
    }.items():
        out = name.replace(" ", "-")
        code, _, err = bnn(f"{words} {flags} --out {out}")
        assert (code, err) == (0, ""), name
        values[name] = Bank.open(out)[0]["1.weight"]
        curves[name] = (tmp_path / out / "curve.csv").read_text().splitlines()
        assert len(curves[name]) == 5
        assert curves[name][0] == "epoch,loss,lr,held_out_nll,held_out_accuracy,held_out_kl"
    for name, value in values.items():
        assert sum(torch.equal(value, other) for other in values.values()) == 1, name
    assert Bank.open("predictive").info["method"]["options"]["targets"] == "predictive"
    assert Bank.open("sgd").info["optimizer"] == "sgd"
    assert float(curves["sgd"][-1].split(",")[2]) == pytest.approx(3e-3 * 0.01 ** (3 / 4))  # in its last epoch
    assert float(curves["plain"][-1].split(",")[2]) == pytest.approx(3e-3 * 0.01 ** (15 / 16))  # in its last step
    assert Bank.open("balanced").info["sampling"]["sampler"] == "ClassBalancedSampler"
    # Where held-out rows decide something they are a tenth of the training rows, set apart; 192 of the 240 are those.
    assert Bank.open("balanced").info["provenance"]["rows"] == 192
    assert Bank.open("by-recall").info["provenance"]["rows"] == 173
    assert bnn("train --bank bank --num-epochs 200 --batch-size 16 --lr 0.1 --patience 2 --out stopped")[0] == 0
    stopped = Bank.open("stopped")
    assert stopped.info["provenance"]["rows"] == 173
    scores = [float(line.split(",")[3]) for line in (tmp_path / "stopped" / "curve.csv").read_text().splitlines()[1:]]
    assert len(scores) < 200
    assert scores.index(min(scores)) == len(scores) - 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--free * --student mlp:4", "--student: want no --free beside it"),
        ("--free * --targets predictive", "--targets: want no --free beside it"),
        ("--free * --noise 0.1", "--noise: want no --free beside it"),
        ("--free * --mixup 0.1", "--mixup: want no --free beside it"),
        ("--free 3", "free: want patterns that match parameters outside the bank: 1.weight, 1.bias, got '3'"),
        ("--targets mean", "targets: want one of paired, predictive, got 'mean'"),
        ("--targets predictive --noise 0.1", "targets='predictive': want neither noise, mixup, num_indices nor window"),
        ("--optimizer adagrad", "--optimizer: want one of adam, adamw, sgd, got 'adagrad'"),
        ("--precision int8", "precision: want one of float32, bfloat16, float16"),
        ("--patience 0", "patience: want at least 1 epoch"),
        ("--clip-norm 0", "clip_norm: want a number above 0"),
        ("--num-indices 0", "num_indices: want at least 1"),
        ("--log wandb", "log: want one of csv, tensorboard"),
        ("--balance skew=a", "--balance skew=a: want skew=NUMBER"),
        ("--lr 0", "lr: want a number above 0"),
        ("--lr 0 --optimizer sgd", "lr: want a number above 0"),
        ("--num-workers -1", "num_workers: want at least 0"),
    ],
)
def test_bad_flags_of_train_get_one_line_and_leave_nothing(
    bnn: Callable[..., tuple[int, str, str]], tmp_path: Path, flags: str, message: str
) -> None:
    write_table(tmp_path)
    assert bnn(HEAD)[0] == 0
    code, out, err = bnn(f"train --bank bank {flags} --out s")
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "s").exists()


def test_a_bank_that_holds_everything_leaves_nothing_to_train(
    bnn: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    write_table(tmp_path)
    assert bnn(TABLE)[0] == 0
    code, _, err = bnn("train --bank bank --free * --out s")
    assert code == 2
    assert "free: want parameters outside the bank, got a bank that holds all of them" in err


def test_a_balanced_bank_is_judged_at_natural_shares(bnn: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """As `evaluate` says of it in Python, with the shares that the bank keeps; other banks have none to correct."""
    from bnn.data import load_data
    from bnn.evaluation import evaluate
    from bnn.functional import FunctionalModel
    from bnn.modules import build

    write_table(tmp_path)
    with pytest.warns(UserWarning, match="balanced posterior"):
        assert bnn(f"{TABLE.replace('60', '400')} --balance skew=1.0")[0] == 0
    bank, data = Bank.open("bank"), load_data("t.csv:kind")
    net = FunctionalModel(build("mlp:6", input_shape=[2], num_outputs=3, seed=0), bank)
    counts = torch.bincount(data.train.y)
    shift = [1 / 3] * 3, (counts / counts.sum()).tolist()
    figures = {}
    for name, flag in (("plain", ""), ("shifted", "--prior-shift")):
        assert bnn(f"evaluate --bank bank {flag} --report {name}")[0] == 0
        figures[name] = json.loads((tmp_path / name / "report.json").read_text())["reports"]["bank"]["metrics"]["nll"][
            "value"
        ]
    assert figures["shifted"] == pytest.approx(evaluate(net, data.test, prior_shift=shift).metrics["nll"].value)
    assert figures["plain"] == pytest.approx(evaluate(net, data.test).metrics["nll"].value)
    assert figures["shifted"] < figures["plain"] - 0.05
    for flags, got in (("", "natural"), ("--balance skew=1.0,importance", "natural")):
        assert bnn(f"{TABLE} {flags} --overwrite")[0] == 0
        code, _, err = bnn("evaluate --bank bank --prior-shift")
        assert code == 2
        assert f"--prior-shift: want a bank fitted with --balance of one skew, without importance, got a {got}" in err


def test_units_of_information(bnn: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """Tables are in bits where that is said, reports always in nats."""
    write_table(tmp_path)
    assert bnn(TABLE)[0] == 0
    shown, kept = {}, {}
    for unit in ("nats", "bits"):
        code, out, _ = bnn(f"evaluate --bank bank --unit {unit} --report {unit}")
        assert code == 0
        told = out.splitlines()
        end = next(place for place, line in enumerate(told) if line.startswith("value ±"))
        assert all(line.startswith("bank: no ") for line in told[end + 1 :])  # why figures are missing
        lines = [line.split("  ") for line in told[2:end]]
        shown[unit] = {
            line[0].replace(" ", "_"): re.findall(r"-?[0-9.]+", "".join(line[1:]))
            for line in lines
            if "none" not in "".join(line)
        }
        kept[unit] = json.loads((tmp_path / unit / "report.json").read_text())["reports"]["bank"]["metrics"]
    assert {name: figure["value"] for name, figure in kept["bits"].items()} == {
        name: figure["value"] for name, figure in kept["nats"].items()
    }
    assert shown["nats"].keys() >= {"nll", "gibbs_nll", "mutual_information", "accuracy", "ece"}
    for name, numbers in shown["nats"].items():  # the value and both errors
        factor = math.log(2) if kept["nats"][name]["unit"] == "nats" else 1.0
        in_bits = [float(number) * factor for number in shown["bits"][name]]
        assert in_bits == pytest.approx([float(number) for number in numbers], abs=2e-4), name
        assert len(numbers) == 1 + sum(
            kept["nats"][name][e] is not None for e in ("standard_error", "monte_carlo_error")
        )
    code, _, err = bnn("evaluate --bank bank --unit hartley")
    assert code == 2
    assert "--unit: want one of nats, bits, got 'hartley'" in err


# Bad input: one line on stderr, exit code 2, nothing half-written

FIT = "fit --model mlp:4 --method prior --num-samples 4 --out bank"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"{FIT} --data digitz", "data: want digits, digits-shuffled, diabetes, digits-KIND-SEVERITY"),
        (f"{FIT} --data diabetes --method nutz", "--method: want one of prior, mean-field, low-rank, full-rank, flow, map, guide, laplace"),
        (f"{FIT} --data diabetes --model resnet", "model: want mlp:WIDTHS[,ACTIVATION]"),
        (f"{FIT} --data diabetes --bayesian head.*", "bayesian: want patterns that match a parameter, got 'head.*'"),
        (f"{FIT} --data d.csv:z", "d.csv: want a column 'z', got columns a, y"),
        (f"{FIT} --data d.csv:y --task regression", "d.csv line 3: want a number in column 'y' for regression, got 'tall'"),
        (f"{FIT} --data nan.csv:y", "data 'nan.csv:y': want finite numbers, got NaN or Inf in row 1 of x"),
        (f"{FIT} --data diabetes --task ranking", "--task: want one of classification, regression"),
        (f"{FIT} --data diabetes --prior horseshoe", "--prior: want one of fan-in, normal"),
        (f"{FIT} --data diabetes --prior-scale 0", "FanIn(scale=): want a positive number"),
        (f"{FIT} --data diabetes --temperature -1", "temperature: want a positive number"),
        (f"{FIT} --data digits --noise-scale 1", "--noise-scale: want a regression"),
        (f"{FIT} --data diabetes --lr 0.1", "--lr: want an option of the method prior: block_size, got none of these"),
        (f"{FIT} --data diabetes --method hmc --num-samples 10 --num-chains 4", "num_samples: want a multiple of num_chains = 4, got 10; pass 8 or 12"),
        (f"{FIT} --data diabetes --method map", "num_samples: want 1 for Guide('map'), which is one point, got 4"),
        (f"{FIT} --data diabetes --method mean-field --num-steps 100 --lr 1e30", "Guide('mean-field'): want a finite loss and gradient"),
        (f"{FIT} --data diabetes --resume", "bank: want a bank to go on with, got none"),
        (f"{FIT} --data diabetes --resume --overwrite", "bank: want resume or overwrite, got both"),
        (f"{FIT} --data diabetes --num-samples many", "bnn fit: Invalid value for '--num-samples'"),
        (f"{FIT}", "Missing option '--data'"),
        (f"{FIT} --data diabetes --colour red", "No such option"),
        ("fly", "No such command 'fly'"),
        ("evaluate --bank nowhere", "nowhere: want a bank, got nothing there"),
        ("evaluate --bank .", ".: want a bank, got a folder without bank.json"),
        (f"evaluate --bank {__file__}", "test_cli.py: want a bank, got a file"),
        ("bank info nowhere", "nowhere: want a bank"),
        ("bank verify nowhere", "nowhere: want a bank"),
        ("train --bank nowhere --out s", "nowhere: want a bank"),
        ("bench fly", "bench: want one of write, read, bank, select, apply, train, got 'fly'"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line_and_leaves_nothing(
    bnn: Callable[..., tuple[int, str, str]], tmp_path: Path, words: str, message: str
) -> None:
    (tmp_path / "d.csv").write_text("a,y\n1,2\n2,tall\n3,4\n")
    (tmp_path / "nan.csv").write_text("a,y\n1,2\nnan,3\n3,4\n")
    before = sorted(tmp_path.iterdir())
    code, out, err = bnn(words)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert out == ""
    assert sorted(tmp_path.iterdir()) == before


def bad_files(folder: Path) -> None:
    """Files that are broken in one way each."""
    import gzip

    import numpy as np

    (folder / "latin.csv").write_bytes("a,y\n1,2\nß,3\n".encode("latin-1"))
    (folder / "long.csv").write_text("a,y\n" + "1" * 200_000 + ",2\n1,2\n")
    (folder / "twice.csv").write_text("a,y,y\n1,2,3\n4,5,6\n")
    (folder / "blank.csv").write_text("a,y\n1,2\n2,\n3,4\n")
    (folder / "zip.npz").write_bytes(b"PK\x03\x04 and no more")
    np.save(folder / "array.npy", np.ones(3))
    (folder / "array.npy").rename(folder / "array.npz")
    np.savez(folder / "scalar.npz", x=np.float64(1), y=np.float64(2))
    np.savez(folder / "huge.npz", x=np.ones((3, 2)), y=np.array([0, 1, 10**10]))
    np.savez(folder / "test.npz", x=np.ones((3, 2)), y=np.ones(3), x_test=np.ones((2, 5)), y_test=np.ones(2))
    for name, index in (("empty", ""), ("outside", "99\n")):
        (folder / name).mkdir()
        np.savetxt(folder / name / "data.txt", np.ones((6, 3)))
        (folder / name / "index_features.txt").write_text("0\n1\n")
        (folder / name / "index_target.txt").write_text("2\n")
        (folder / name / "index_train_0.txt").write_text("0\n1\n2\n")
        (folder / name / "index_test_0.txt").write_text(index)
    (folder / "mnist").mkdir()
    for name in ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        (folder / "mnist" / name).write_bytes(gzip.compress(bytes(2000))[:-10])
    (folder / "mine.py").write_text(
        "from torch import nn\nvalue = 3\n"
        "def fails(**_):\n    raise KeyError('inside')\n"
        "def narrow(input_shape, num_outputs):\n    return nn.Linear(99, num_outputs)\n"
        "def wide(input_shape, num_outputs):\n    return nn.Sequential(nn.Flatten(), nn.Linear(10, 7))\n"
    )
    (folder / "broken.py").write_text("def f(:\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"{FIT} --data latin.csv:y", "comma-separated text in UTF-8"),
        (f"{FIT} --data long.csv:y", "comma-separated text in UTF-8"),
        (f"{FIT} --data twice.csv:y", "'y' twice"),
        (f"{FIT} --data blank.csv:y", "blank.csv line 3: want numbers in column 'y', or names of classes throughout, got ''"),
        (f"{FIT} --data zip.npz", "an .npz archive of plain arrays"),
        (f"{FIT} --data array.npz", "want an .npz archive of plain arrays, got no zip archive"),
        (f"{FIT} --data scalar.npz", "numbers, as many rows as its y"),
        (f"{FIT} --data huge.npz", "fewer than 100000 classes"),
        (f"{FIT} --data test.npz", "rows shaped as those of x and y"),
        (f"{FIT} --data empty", "index_test_0.txt: want numbers, got none"),
        (f"{FIT} --data outside", "index_test_0.txt: want numbers in [0, 6), got 99 to 99"),
        (f"{FIT} --data mnist", "a gzip file in IDX format"),
        (f"{FIT} --data mine:fails", "KeyError: 'inside'"),
        (f"{FIT} --data mine:value", "want a function, got int"),
        (f"{FIT} --data broken:f", "SyntaxError"),
        (f"{FIT} --data diabetes --model mine:fails", "KeyError: 'inside'"),
        (f"{FIT} --data diabetes --model mine:narrow", "want a module from rows [10] to 1 outputs, got RuntimeError"),
        (f"{FIT} --data diabetes --model mine:wide", "got outputs [2, 7]"),
        (f"{FIT} --data diabetes --model mlp:99999999999", "widths such as 64,64, at most 65536"),
        (f"{FIT} --data diabetes --num-samples 0", "num_samples: want at least 1, got 0"),
        (f"{FIT} --data diabetes --num-samples -4", "num_samples: want at least 1, got -4"),
        (f"{FIT} --data diabetes --task regression", "--task: want a CSV file"),
        ("bench select --num-samples 10", "--num-samples of at least 25"),
        ("bench read --json nowhere/x.json", "a folder that is there"),
        ("bench apply --device tpu9", "--device: want"),
        ("evaluate --bank . --device cuda:77", "--device: want a device that is here"),
        ("evaluate --bank . --report mine.py", "want a folder or nothing, got a file"),
    ],
)  # fmt: skip
def test_broken_files_and_code_get_one_line_too(
    bnn: Callable[..., tuple[int, str, str]], tmp_path: Path, words: str, message: str
) -> None:
    bad_files(tmp_path)
    code, out, err = bnn(words.replace("--out bank", "--out deep/er/bank"))
    for name in ("mine", "broken"):
        sys.modules.pop(name, None)
    assert (code, out) == (2, ""), err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "deep").exists()


def test_a_bank_is_not_judged_on_rows_it_has_seen_nor_on_other_shapes(
    bnn: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    rows = "\n".join(f"{i % 7},{i % 5},{i % 11}" for i in range(60))
    (tmp_path / "a.csv").write_text("p,q,y\n" + rows)
    assert bnn(f"{FIT.replace('prior', 'map --num-steps 50').replace('4 --out', '1 --out')} --data a.csv:y")[0] == 0
    (tmp_path / "moved.csv").write_bytes((tmp_path / "a.csv").read_bytes())
    for spec in ("a.csv:y", "./a.csv:y", "moved.csv:y"):
        code, _, err = bnn(f"evaluate --bank bank --split 7 --data {spec}")
        assert code == 2
        assert "want split 0, which the bank was fitted on, got 7" in err
    assert bnn("evaluate --bank bank --data moved.csv:y")[0] == 0
    (tmp_path / "swapped.csv").write_text("q,p,y\n1,2,3\n4,5,6\n")
    code, _, err = bnn("evaluate --bank bank --data swapped.csv:y")
    assert code == 2
    assert "want columns p, q, as the bank was fitted to, got q, p" in err
    for spec, message in (("digits", "want a regression, got a classification"), ("diabetes", "rows of 2 values")):
        code, _, err = bnn(f"evaluate --bank bank --data {spec}")
        assert code == 2
        assert message in err


def test_several_targets_and_columns_of_one(bnn: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    import numpy as np

    source = np.random.default_rng(0)
    x = source.normal(size=(50, 3))
    for name, scale in (("one", [40.0]), ("two", [40.0, 0.1])):
        np.savez(tmp_path / f"{name}.npz", x=x, y=(x[:, :1] + 0.1 * source.normal(size=(50, len(scale)))) * scale)
        assert (
            bnn(
                f"fit --data {name}.npz --model mlp:4 --method mean-field --num-steps 200 --num-samples 5 --out {name}"
            )[0]
            == 0
        )
        assert bnn(f"evaluate --bank {name} --report r{name}")[0] == 0
        figures = json.loads((tmp_path / f"r{name}" / "report.json").read_text())["reports"][name]["metrics"]
        assert 1 < figures["rmse"]["value"] < 80  # in the units of the first target, which spreads by 40


def test_outside_rows_go_through_the_standardiser_of_the_fit(
    bnn: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """The fit's own test rows as rows from outside are the same distribution: AUROC one half, exactly."""
    rows = "\n".join(f"{1000 + i % 7},{i % 5},{'ab'[i % 2]}" for i in range(60))
    (tmp_path / "a.csv").write_text("p,q,y\n" + rows)
    assert bnn("fit --data a.csv:y --model mlp:4 --method mean-field --num-steps 50 --num-samples 4 --out bank")[0] == 0
    from bnn.data import load_data

    data = load_data("a.csv:y")
    assert data.inputs is not None
    raw = data.test.x.double() * data.inputs.scale + data.inputs.loc
    lines = "\n".join(f"{float(p)},{float(q)},a" for p, q in raw)
    (tmp_path / "same.csv").write_text("p,q,y\n" + lines)
    assert bnn("evaluate --bank bank --ood same.csv:y --report r")[0] == 0
    figures = json.loads((tmp_path / "r" / "report.json").read_text())["reports"]["bank"]["metrics"]
    assert figures["auroc"]["value"] == pytest.approx(0.5, abs=0.05)
    assert f"{len(data.test.y)} rows outside" in figures["auroc"]["definition"]  # all rows of a foreign file


def test_debug_shows_the_traceback(bnn: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = bnn("bank info nowhere --debug")
    assert code == 2
    assert "Traceback" in err
    assert err.endswith("make one with bnn.fit or 'bnn fit --out'\n")


def test_a_bank_of_another_module_names_the_first_differing_entry(
    bnn: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    bnn("fit --data diabetes --model mlp:4 --method prior --num-samples 5 --out bank")
    model = json.loads((tmp_path / "bank" / "bank.json").read_text())["model"]
    config = edit_json(tmp_path / "bank" / "bank.json", model=model | {"spec": "mlp:5"})
    edit_json(tmp_path / "bank" / "manifest-main.json", bank=config["checksum"])
    code, _, err = bnn("evaluate --bank bank")
    assert code == 2
    assert "'1.weight' [5, 10] where '1.weight' [4, 10] stands" in err


def test_input_output_failures_exit_with_3(
    bnn: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bnn.bank.disk.os.fsync", full)
    code, _, err = bnn(f"{FIT} --data diabetes")
    assert code == 3
    assert "No space left on device" in err
    assert "make room" in err


def test_interruption_exits_with_130_and_says_how_to_go_on(
    bnn: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(run: object, *_: object) -> object:
        yield next(run)  # type: ignore[call-overload]
        raise KeyboardInterrupt

    fit = "fit --data diabetes --model mlp:4 --method mean-field --num-steps 100 --num-samples 5 --out bank"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bnn.fitting.with_progress", interrupted)
        code, _, err = bnn(fit)
    assert code == 130
    assert err == "interrupted; what was committed is kept, go on with the same command and --resume\n"
    assert bnn(f"{fit} --resume")[0] == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bnn.data.load_data", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        code, _, err = bnn(fit.replace("--out bank", "--out other"))
    assert (code, err) == (130, "interrupted; nothing was left behind\n")
    assert len(Bank.open("bank")) == 5


def test_a_real_ctrl_c_keeps_what_was_committed(tmp_path: Path) -> None:
    """Sent once the first commit is there, half a second after the first row, in place of ten."""
    import signal
    import time

    words = (
        "fit --data diabetes --model mlp:20 --method hmc --num-chains 2 --num-warmup 0 --num-samples 200000 "
        "--option compile=false --out bank"
    )
    code = "from bnn.bank import writer; writer.ROW_SECONDS = 0.5; from bnn.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, *words.split()],
        stderr=subprocess.PIPE,
        text=True,
        # Which shells take from what they start in the background, and with it from its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        for _ in range(1200):
            time.sleep(0.1)
            if (tmp_path / "bank" / "manifest-main.json").exists() or process.poll() is not None:
                break
        process.send_signal(signal.SIGINT)
        try:
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, err
    assert "go on with the same command and --resume" in err
    assert "Traceback" not in err
    bank = Bank.open(tmp_path / "bank", verify="full")
    assert len(bank) > 0
    assert not bank.info["complete"]


# Start-up


def lines_of(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_bnn_loads_neither_torch_nor_pyro() -> None:
    assert lines_of("import sys, bnn; print('torch' in sys.modules, 'pyro' in sys.modules)") == "False False\n"


def test_help_does_not_import_torch() -> None:
    code = "import sys; from bnn.cli import run; run(['--help']); print('torch' in sys.modules)"
    out = lines_of(code)
    assert out.endswith("False\n")
    for verb in ("fit", "train", "evaluate", "bank", "bench", "demo"):
        assert f"  {verb} " in out


def test_importing_everything_changes_no_global_state() -> None:
    code = (
        "import torch, numpy, random, logging, warnings\n"
        "before = torch.initial_seed(), torch.get_default_dtype(), len(logging.root.handlers), torch.is_grad_enabled()\n"
        "import bnn\n[getattr(bnn, name) for name in bnn.__all__]\n"
        "import pyro\n"
        "after = torch.initial_seed(), torch.get_default_dtype(), len(logging.root.handlers), torch.is_grad_enabled()\n"
        "print(before == after, list(pyro.get_param_store().keys()))"
    )
    assert lines_of(code) == "True []\n"


def test_warnings_are_one_line(bnn: Callable[..., tuple[int, str, str]]) -> None:
    from bnn.cli import say_warning

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = say_warning
        code, _, err = bnn(
            "fit --data diabetes --model mlp:4 --method hmc --num-chains 2 --num-warmup 0 --num-steps 2 --num-samples 4 --out bank"
        )
    assert code == 0
    assert all(line.startswith("warning: ") for line in err.splitlines())
