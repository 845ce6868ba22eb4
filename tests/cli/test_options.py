"""Options beyond the flags: KEY=VALUE pairs, tables of a configuration file, and the file that says the same."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bnn import likelihoods, priors
from bnn.bank import Bank
from bnn.cli.options import as_toml, check_kind, parse_pairs
from bnn.errors import ConfigError
from bnn.inference import METHODS
from bnn.seeding import generator

pytest.importorskip("sklearn", reason="scikit-learn (extra 'demo') is not installed")

QUICK = {
    "prior": "",
    "map": "--num-steps 20",
    "mean-field": "--num-steps 20 --option variance_reduction=local",
    "low-rank": "--num-steps 20 --rank 2",
    "full-rank": "--num-steps 20",
    "flow": "--num-steps 20 --option hidden=4",
    "guide": "--num-steps 20 --option family=AutoDiagonalNormal --option sites=parameter",
    "laplace": "--num-steps 20 --option structure=full",
    "ensemble": "--num-steps 20 --option group_size=2",
    "swag": "--num-steps 20 --option num_models=4 --rank 2",
    "ivon": "--num-steps 20",
    "sgld": "--num-chains 2 --num-warmup 5 --option climb_steps=20 --option cycle_steps=none --option thin=2",
    "sghmc": "--num-chains 2 --num-warmup 5 --option climb_steps=20 --option cycle_steps=20",
    "hmc": "--num-chains 2 --num-warmup 5 --num-steps 2",
    "nuts": "--num-chains 2 --num-warmup 5 --option max_tree_depth=2 --option init=prior",
}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def bnn(call: Callable[[str], tuple[int, str, str]]) -> Callable[[str], tuple[int, str, str]]:
    """Run a command line: exit code, stdout, stderr."""
    return call


def write_table(kind: str) -> None:
    """40 rows of two inputs; the target is a word of two, a count, or a number."""
    x = torch.randn(40, 2, generator=generator(0, "table"))
    if kind == "binary":
        y = ["yes" if a > 0 else "no" for a in x[:, 0].tolist()]
    elif kind == "count":
        y = [str(int(n)) for n in torch.poisson((0.5 * x[:, 0]).exp() * 3, generator=generator(1, "table"))]
    else:
        y = [f"{a:.4f}" for a in (x[:, 0] + 0.3 * x[:, 1]).tolist()]
    rows = [f"{a:.4f},{b:.4f},{c}" for (a, b), c in zip(x.tolist(), y, strict=True)]
    Path("t.csv").write_text("\n".join(["a,b,y", *rows]) + "\n")


def test_the_quick_table_has_every_method() -> None:
    assert QUICK.keys() == METHODS.keys()


@pytest.mark.filterwarnings("ignore::UserWarning")  # of methods that took too few steps, about themselves
@pytest.mark.parametrize("method", QUICK)
def test_every_method_is_reached_and_its_file_says_the_same(
    bnn: Callable[[str], tuple[int, str, str]], method: str
) -> None:
    write_table("binary")
    words = (
        f"--data t.csv:y --model mlp:3 --method {method} {QUICK[method]} --num-samples {1 if method == 'map' else 4}"
    )
    code, told, err = bnn(f"fit {words} --print-config")
    assert (code, err) == (0, "")
    assert not Path("bank").exists()
    Path("run.toml").write_text(told)
    assert bnn("fit --config run.toml --print-config") == (0, told, "")
    code, _, err = bnn("fit --config run.toml --out bank")
    assert code == 0, err
    code, _, err = bnn(f"fit {words} --out again")
    assert code == 0, err
    first, second = Bank.open("bank"), Bank.open("again")
    assert first.info["method"] == second.info["method"]
    assert len(first) == (1 if method == "map" else 4)
    name = first.layout.names[0]
    assert torch.equal(first.block(slice(None)).params[name], second.block(slice(None)).params[name])
    assert bnn("evaluate --bank bank")[0] == 0


@pytest.mark.parametrize(
    ("kind", "flags", "expected", "outputs"),
    [
        ("binary", "", likelihoods.Categorical(), 2),
        ("binary", "--likelihood bernoulli", likelihoods.Bernoulli(), 1),
        ("number", "", likelihoods.Gaussian(priors.HalfCauchy(1.0)), 1),
        ("number", "--likelihood heteroscedastic --likelihood-option floor=0.01",
         likelihoods.HeteroscedasticGaussian(0.01), 2),
        ("number", "--likelihood student-t --likelihood-option df=3 --noise-scale 0.5", likelihoods.StudentT(3, 0.5), 1),
        ("count", "--likelihood poisson", likelihoods.Poisson(), 1),
    ],
)  # fmt: skip
def test_every_likelihood_is_fitted_and_judged(
    bnn: Callable[[str], tuple[int, str, str]], kind: str, flags: str, expected: Any, outputs: int
) -> None:
    write_table(kind)
    words = f"fit --data t.csv:y --model mlp:3 --method mean-field --num-steps 200 --lr 0.05 {flags} --num-samples 8"
    code, told, _ = bnn(f"{words} --print-config")
    Path("run.toml").write_text(told)
    assert bnn("fit --config run.toml --print-config")[1] == told
    code, _, err = bnn(f"{words} --out bank")
    assert (code, err) == (0, "")
    bank = Bank.open("bank")
    assert likelihoods.likelihood_from_config(bank.info["likelihood"]) == expected
    assert bank[0]["3.weight"].shape == (outputs, 3)
    assert bank.info["data"]["target"] is None or kind == "number"  # counts and classes are not standardised
    code, _, err = bnn("evaluate --bank bank --report report")
    assert (code, err) == (0, "")
    metrics = json.loads(Path("report/report.json").read_text())["reports"]["bank"]["metrics"]
    if kind == "binary":
        assert "crps" not in metrics
    else:
        assert (metrics["crps"]["value"] is None) == (kind == "count" or "student-t" in flags)
        assert metrics["crps"]["value"] is not None or metrics["crps"]["note"]
    if kind == "binary":
        assert metrics["accuracy"]["value"] > 0.6


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", priors.FanIn(1.0)),
        ("--prior normal --prior-scale 0.5", priors.Normal(0.0, 0.5)),
        ("--prior laplace --prior-scale half-cauchy:2", priors.Laplace(0.0, priors.HalfCauchy(2.0))),
        ("--prior student-t --prior-option df=3 --prior-scale log-normal:0,0.5 --prior-option shared=false",
         priors.StudentT(3, 0.0, priors.LogNormal(0.0, 0.5), shared=False)),
        ("--prior scale-mixture --prior-option ratio=0.2", priors.ScaleMixture(ratio=0.2)),
        ('--prior fan-in --prior-option family={name="StudentT",df=4.0}', priors.FanIn(family=priors.StudentT(4.0))),
        ('--prior normal --prior-option scale={"*.bias"=0.1,"*"=1.0}', priors.Normal(0.0, {"*.bias": 0.1, "*": 1.0})),
    ],
)  # fmt: skip
def test_every_prior_is_reached(bnn: Callable[[str], tuple[int, str, str]], flags: str, expected: Any) -> None:
    write_table("number")
    words = f"fit --data t.csv:y --model mlp:3 --method prior --num-samples 3 {flags}"
    code, told, err = bnn(f"{words} --print-config")
    assert (code, err) == (0, "")
    Path("run.toml").write_text(told)
    assert bnn("fit --config run.toml --print-config")[1] == told
    assert bnn("fit --config run.toml --out bank")[0] == 0
    assert priors.prior_from_config(Bank.open("bank").info["prior"]) == expected


def test_flags_win_over_the_file_key_by_key(bnn: Callable[[str], tuple[int, str, str]]) -> None:
    write_table("number")
    Path("run.toml").write_text(
        'data = "t.csv:y"\nmethod = "swag"\nlr = 0.5\n[option]\nnum_models = 7\nmomentum = 0.5\n'
        '[prior-option]\nbias_scale = 2.0\n[likelihood-option]\nscale = 0.25\n'
    )  # fmt: skip
    told = tomllib.loads(bnn("fit --config run.toml --option num-models=9 --num-steps 30 --print-config")[1])
    assert (told["option"]["num_models"], told["option"]["momentum"]) == (9, 0.5)
    assert (told["option"]["lr"], told["option"]["num_steps"]) == (0.5, 30)
    assert told["prior-option"]["bias_scale"] == 2.0
    assert told["likelihood-option"]["scale"] == 0.25
    told = tomllib.loads(bnn("fit --config run.toml --option lr=0.2 --noise-scale 3 --prior-scale 7 --print-config")[1])
    assert told["option"]["lr"] == 0.2
    assert told["likelihood-option"]["scale"] == 3.0
    assert told["prior-option"] == {"scale": 7.0, "bias_scale": 2.0}


@pytest.mark.parametrize(
    ("flags", "table", "key", "value"),
    [
        ("--lr 0.5", "option", "lr", 0.5),
        ("--num-steps 9", "option", "num_steps", 9),
        ("--batch-size 3", "option", "batch_size", 3),
        ("--draws sobol", "option", "draws", "sobol"),
        ("--option hidden=5", "option", "hidden", 5),
        ("--prior-scale 7", "prior-option", "scale", 7.0),
        ("--prior-option scale=6.0", "prior-option", "scale", 6.0),
        ("--noise-scale 0.25", "likelihood-option", "scale", 0.25),
        ("--likelihood-option scale=0.125", "likelihood-option", "scale", 0.125),
    ],
)
def test_a_flag_wins_over_a_printed_file(
    bnn: Callable[[str], tuple[int, str, str]], flags: str, table: str, key: str, value: Any
) -> None:
    """Such a file has every option in its tables, those with flags of their own too."""
    write_table("number")
    told = bnn("fit --data t.csv:y --method mean-field --print-config")[1]
    Path("run.toml").write_text(told)
    changed = tomllib.loads(bnn(f"fit --config run.toml {flags} --print-config")[1])
    expected = tomllib.loads(told)
    assert expected[table][key] != value
    expected[table][key] = value
    assert changed == expected


FIT = "fit --data t.csv:y --model mlp:3 --out bank --num-samples 2"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"{FIT} --option lr", "--option: want KEY=VALUE, got 'lr'"),
        (f"{FIT} --method swag --option lr=1 --option lr=2", "--option: want each key once, got 'lr' twice"),
        (f"{FIT} --method swag --lr 1 --option lr=2", "--lr: want it or --option lr=, got both"),
        (f"{FIT} --prior-scale 2 --prior-option scale=3", "--prior-scale: want it or --prior-option scale=, got both"),
        (f"{FIT} --noise-scale 2 --likelihood-option scale=3", "--noise-scale: want it or --likelihood-option scale="),
        (f"{FIT} --prior-option name=Laplace", "--prior-option: want an option, got 'name'"),
        (f"{FIT} --method swag --option collect_every=2.5", "SWAG(collect_every=): want a whole number or None, got 2.5"),
        (f"{FIT} --method ensemble --option patience=abc", "Ensemble(patience=): want a whole number or None, got 'abc'"),
        (f"{FIT} --method laplace --option on=[1]", "Laplace(on=): want globs of names, got [1]"),
        (f"{FIT} --method guide --option family=flow", "--option family: want a guide of Pyro, Auto..., got 'flow'"),
        (f"{FIT} --method map --lr inf --num-samples 1", "Guide(lr=): want a positive number, got inf"),
        (f"{FIT} --method swag --option lr=fast", "--option lr: want a number, got 'fast'"),
        (f"{FIT} --method swag --option num_models=2.5", "--option num_models: want a whole number, got 2.5"),
        (f"{FIT} --method hmc --option compile=1", "HMC(compile=): want True or False or None, got 1"),
        (f"{FIT} --method hmc --option init=nowhere", "HMC(init=): want one of prior, ensemble, module, map, got 'nowhere'"),
        (f"{FIT} --method hmc --option mass=dense", "HMC(mass=): want one of diagonal, low-rank, unit, got 'dense'"),
        (f"{FIT} --method hmc --option thin=true", "--option thin: want a whole number, got True"),
        (f"{FIT} --method swag --option friction=0.1", "--option friction: want an option of the method swag: num_steps"),
        (f"{FIT} --method flow --option family=map", "--option family: want an option of the method flow"),
        (f"{FIT} --method guide --option family=AutoNope", "want one of mean-field, low-rank, full-rank, flow, map, Auto"),
        (f"{FIT} --method laplace --option structure=dense", "Laplace(structure=): want one of full, kron, diag"),
        (f"{FIT} --prior cauchy", "--prior: want one of fan-in, normal, laplace, student-t, scale-mixture"),
        (f"{FIT} --prior-scale wide", "--prior-scale: want a number, half-cauchy:SCALE or log-normal:LOC,SCALE"),
        (f"{FIT} --prior-scale half-cauchy:-1", "HalfCauchy(scale=): want a positive number, got -1.0"),
        (f"{FIT} --prior-option df=3", "prior FanIn: want options among scale, bias_scale, family, shared, got 'df'"),
        (f"{FIT} --task regression --likelihood categorical", "--likelihood: want one for a regression, as the data are, got categorical"),
        (f"{FIT} --likelihood cauchy", "--likelihood: want one of categorical, bernoulli, gaussian"),
        (f"{FIT} --likelihood poisson --method map --num-samples 1", "likelihood Poisson: want counts 0, 1, 2, ..."),
        (f"{FIT} --likelihood poisson --noise-scale 1", "--noise-scale: want the likelihood gaussian or student-t"),
        (f"{FIT} --likelihood-option df=3", "likelihood Gaussian: want options among scale, got 'df'"),
        (f"{FIT} --method map --prior-scale half-cauchy:1 --num-samples 1", "Guide('map'): want a prior with fixed scales"),
        (f"{FIT} --method full-rank --option memory=1000", "at least 32,368 bytes for 34 values, got 1,000"),
        ("fit --data t.csv:y", "--out: want a folder for the bank, got none"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_gets_one_line(
    bnn: Callable[[str], tuple[int, str, str]], words: str, message: str
) -> None:
    write_table("number")
    if "full-rank" in words:
        words = words.replace("mlp:3", "mlp:8")
    code, out, err = bnn(words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not Path("bank").exists()


def test_bernoulli_of_three_classes_is_refused(bnn: Callable[[str], tuple[int, str, str]]) -> None:
    code, _, err = bnn("fit --data digits --likelihood bernoulli --method prior --out bank")
    assert code == 2
    assert "--likelihood: want two classes for bernoulli, got 10" in err


# The functions


def test_values_are_toml_or_texts() -> None:
    found = parse_pairs("--option", ["a=1", "b=0.5", "c=true", "d=[1, 2]", "e=relu", "f=a=b", 'g="1"', "h-i={ j = 1 }"])
    assert found == {"a": 1, "b": 0.5, "c": True, "d": [1, 2], "e": "relu", "f": "a=b", "g": "1", "h_i": {"j": 1}}


def test_kinds_are_those_of_the_defaults() -> None:
    assert check_kind("x", 1, 0.5) == 1
    assert check_kind("x", ["a"], ()) == ("a",)
    assert check_kind("x", "a", ()) == ("a",)
    assert check_kind("x", 5, None) == 5
    for value, default in [(True, 1), ("1", 1), (1, True), (0.5, 1), ([], 0.5), (1, "a")]:
        with pytest.raises(ConfigError, match="x: want"):
            check_kind("x", value, default)


def test_toml_reads_back() -> None:
    values = {
        "a": 1, "b": 0.1, "c": True, "d": 'say "hi"\n\t\\', "e": ["x", 1e-30, [2]], "f": None, "g-h": "ü",
        "t": {"k": 1, "odd key": {"n": [1, {"m": False}]}, "none": None}, "empty": {"x": None},
    }  # fmt: skip
    found = tomllib.loads(as_toml(values))
    assert found == {
        **{key: values[key] for key in "abcde"}, "g-h": "ü", "t": {"k": 1, "odd key": {"n": [1, {"m": False}]}},
    }  # fmt: skip


def test_chains_start_at_rows_of_a_bank(bnn: Callable[[str], tuple[int, str, str]]) -> None:
    write_table("number")
    words = "fit --data t.csv:y --model mlp:3"
    assert bnn(f"{words} --method ensemble --num-steps 20 --num-samples 3 --out first")[0] == 0
    words += " --method hmc --num-chains 2 --num-warmup 3 --num-steps 2 --num-samples 4 --option init=first"
    told = bnn(f"{words} --print-config")[1]
    assert tomllib.loads(told)["option"]["init"] == "first"
    code, _, err = bnn(f"{words} --option step_size=1e-9 --out bank")
    assert code == 0, err
    first, bank = Bank.open("first"), Bank.open("bank")
    assert bank.info["method"]["options"]["init"] == f"bank {first.digest}"
    starts = {tuple(first[row]["1.weight"].flatten().tolist()) for row in range(3)}
    for row in range(4):  # steps too short to leave the start
        found = bank[row]["1.weight"].flatten()
        assert min(float((found - torch.tensor(start)).abs().max()) for start in starts) < 1e-4
    code, _, err = bnn(f"{words} --model mlp:4 --out other")
    assert code == 2
    assert "init: want the layout" in err
