"""How verbs open the banks that they use: residency and budgets, banks at addresses, virtual banks; equal results, one line else."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from bnn.bank import Bank
from bnn.cli import app, run

Call = Callable[..., tuple[int, str, str]]

HMC = "--method hmc --num-chains 2 --num-warmup 20 --num-steps 4 --num-samples 400"
STREAMED = "--residency streamed --host-budget 50KB"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows of three classes, a bank of 400 samples in small shards, in two orders, one of the last layer, a virtual one."""
    folder = tmp_path_factory.mktemp("banks")
    x = torch.randn(90, 2, generator=torch.Generator().manual_seed(0))
    kinds = ["oak", "pine", "fir"]
    rows = [f"{a:.4f},{b:.4f},{kinds[int(a > 0) + int(b > 0.5)]}" for a, b in x.tolist()]
    (folder / "t.csv").write_text("\n".join(["a,b,y", *rows]) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        fit = "fit --data t.csv:y --model mlp:4"
        assert run(f"{fit} {HMC} --out whole".split()) == 0
        assert run(["bank", "compact", "whole", "--out", "bank", "--shard-bytes", "10KB"]) == 0
        assert run(["bank", "compact", "whole", "--out", "chain", "--order", "chain", "--shard-bytes", "10KB"]) == 0
        assert run(f"{fit} {HMC} --bayesian 3.* --out whole-head".split()) == 0
        assert run(["bank", "compact", "whole-head", "--out", "head", "--shard-bytes", "10KB"]) == 0
        assert run(f"{fit} --method mean-field --num-steps 30 --num-samples 70 --virtual --out virtual".split()) == 0
    assert len(Bank.open(folder / "bank").shard_rows) > 5
    assert len(Bank.open(folder / "head").shard_rows) > 3
    return folder


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The residency of every bank that is opened: that it was asked for is seen there, not in figures that are alike."""
    found: list[str] = []
    real = Bank.open

    def watched(path: Any, **options: Any) -> Bank:
        bank = real(path, **options)
        found.append(bank.residency)
        return bank

    monkeypatch.setattr(Bank, "open", staticmethod(watched))
    return found


@pytest.fixture
def site(made: Path) -> Iterator[str]:
    """The folder of the banks at an address."""
    pytest.importorskip("aiohttp", reason="aiohttp (extra 'remote') is not installed")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(made))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


RESIDENCIES = {
    "host": "--residency host --host-budget 1MB",
    "device": "--residency device --device-budget 1MB",
    "streamed": STREAMED,
}


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_reports_and_tables_do_not_hang_on_the_residency(bnn_run: Call, opened: list[str], residency: str) -> None:
    reports, tables = [], []
    for name, flags in (("a", ""), ("b", RESIDENCIES[residency])):
        assert bnn_run(f"evaluate --bank bank --report report-{name} {flags}")[0] == 0
        reports.append(json.loads(Path(f"report-{name}/report.json").read_text())["reports"]["bank"])
        assert bnn_run(f"predict --bank bank --data t.csv --out {name}.csv {flags}")[0] == 0
        tables.append(Path(f"{name}.csv").read_text())
    assert reports[0]["metrics"] == reports[1]["metrics"]
    assert tables[0] == tables[1]
    assert opened == ["mapped", "mapped", residency, residency]


@pytest.mark.parametrize("residency", RESIDENCIES)
@pytest.mark.parametrize(
    "words", ["compare --bank bank --bank chain", "bank loo bank", "bank diagnose bank", "calibrate --bank copy"]
)
def test_what_other_verbs_say_does_not_hang_on_it_either(
    bnn_run: Call, made: Path, opened: list[str], residency: str, words: str
) -> None:
    if words.startswith("bank loo"):
        pytest.importorskip("arviz", reason="arviz (extra 'test') is not installed")
    if words.startswith("bank diagnose") and residency == "device":
        pytest.skip("chains are judged on the CPU: 'device' is refused, as another test holds")
    shutil.copytree(made / "bank", "copy")
    again = " --overwrite" if words.startswith("calibrate") else ""
    first = bnn_run(words)
    second = bnn_run(f"{words} {RESIDENCIES[residency]}{again}")
    assert first == second
    assert first[2] == ""
    assert set(opened) == {"mapped", residency}


def test_stacked_banks_are_those_of_mapped_ones(bnn_run: Call) -> None:
    words = "bank stack bank chain --held-out --out"
    assert bnn_run(f"{words} a")[0] == 0
    assert bnn_run(f"{words} b {STREAMED}")[0] == 0
    assert Bank.open("a").digest == Bank.open("b").digest


@pytest.mark.parametrize("job", ["--bank bank", "--bank head --free 1.*"])
def test_training_through_a_budget_ends_with_the_bits_of_a_mapped_bank(
    bnn_run: Call, opened: list[str], job: str
) -> None:
    words = f"train {job} --num-epochs 4 --batch-size 9 --num-indices 3"
    for out, flags in {
        "plain": "",
        "window": "--window 2",
        "streamed": f"--window 2 {STREAMED}",
        "host": "--window 2 --residency host",
    }.items():
        code, _, err = bnn_run(f"{words} {flags} --out {out}")
        assert (code, err) == (0, "")
    assert [place for place in opened if place != "mapped"] == ["streamed", "host"]
    values = {out: Bank.open(out)[0]["1.weight"] for out in ("plain", "window", "streamed", "host")}
    assert torch.equal(values["window"], values["streamed"])
    assert torch.equal(values["window"], values["host"])
    assert not torch.equal(values["window"], values["plain"])
    options = {out: Bank.open(out).info["method"]["options"] for out in values}
    assert options["window"] == options["streamed"] == {**options["plain"], "window": 2}
    assert bnn_run(f"{words} --window 3 --out window --resume")[0] == 2


def test_a_file_may_name_the_residency(bnn_run: Call, opened: list[str]) -> None:
    Path("run.toml").write_text('residency = "streamed"\nhost-budget = "50KB"\n')
    assert bnn_run("evaluate --bank bank --figures basic --config run.toml")[0] == 0
    Path("run.toml").write_text('residency = "streamed"\nhost-budget = 50000\n')
    assert bnn_run("evaluate --bank bank --figures basic --config run.toml")[0] == 0
    assert opened == ["streamed", "streamed"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--residency disk", "residency: want one of mapped, host, device, streamed, got 'disk'"),
        ("--residency streamed", "want a host_budget, got none; say how much memory: host_budget='2GB', --host-budget 2GB"),
        ("--residency streamed --host-budget 5000",
         "bank: want host_budget of at least 24576 bytes, for 2 shards of 12288 bytes, got 5000; raise it\n"),
        ("--residency streamed --host-budget 20KB", "got 20000; raise it, or make smaller shards: 'bnn bank compact --shard-bytes 5000'"),
        ("--residency host --host-budget 5KB", "for the whole bank, got 5000; raise it, or use residency='streamed'"),
        ("--residency device --device-budget 5KB", "bank: want device_budget of at least"),
        ("--host-budget 5KB", "bank: want host_budget of at least"),
        ("--device-budget 1GB", "residency='mapped': want no device_budget, got 1000000000"),
        ("--residency host --device-budget 1GB", "residency='host': want no device_budget, got 1000000000"),
        ("--residency streamed --host-budget much", "host_budget: want a number of bytes, or a text such as '2GB'"),
        ("--cache copies", "bank: want an address, with cache=, prefetch= or offline=, got a folder"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("verb", ["evaluate --bank bank", "train --bank bank --out new", "bank loo bank"])
def test_what_cannot_be_had_gets_one_line(bnn_run: Call, tmp_path: Path, verb: str, flags: str, told: str) -> None:
    code, out, err = bnn_run(f"{verb} {flags}")
    assert (code, out) == (2, "")
    assert told in err
    assert err.count("\n") == 1
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "copies").exists()


def test_chains_are_judged_on_the_cpu(bnn_run: Call) -> None:
    code, _, err = bnn_run("bank diagnose bank --residency device")
    assert (code, err.startswith("--residency: want one of mapped, host, streamed, got 'device'")) == (2, True)


@pytest.mark.parametrize("words", ["--window 0", "--window 2 --targets predictive"])
def test_windows_that_mean_nothing(bnn_run: Call, tmp_path: Path, words: str) -> None:
    code, _, err = bnn_run(f"train --bank bank --out new {words}")
    assert (code, err.count("\n")) == (2, 1)
    assert "window" in err
    assert not (tmp_path / "new").exists()


# Virtual banks


def test_a_virtual_bank_goes_wherever_its_materialised_copy_does(bnn_run: Call) -> None:
    assert bnn_run("bank materialise virtual --out made")[0] == 0
    for bank in ("virtual", "made"):
        assert bnn_run(f"evaluate --bank {bank} --report report-{bank}")[0] == 0
        assert bnn_run(f"predict --bank {bank} --data t.csv --out {bank}.csv")[0] == 0
        assert bnn_run(f"train --bank {bank} --num-epochs 2 --window 2 --out student-{bank}")[0] == 0
        assert bnn_run(f"bank compact {bank} --out compact-{bank} --shard-bytes 20KB")[0] == 0
        assert bnn_run(f"bank cast {bank} --codec int8 --probe t.csv:y --out int8-{bank}")[0] == 0
        assert bnn_run(f"bank thin {bank} --best 7 --out best-{bank}")[0] == 0
    figures = [
        json.loads(Path(f"report-{n}/report.json").read_text())["reports"][n]["metrics"] for n in ("virtual", "made")
    ]
    assert figures[0] == figures[1]
    assert Path("virtual.csv").read_text() == Path("made.csv").read_text()
    assert torch.equal(Bank.open("student-virtual")[0]["1.weight"], Bank.open("student-made")[0]["1.weight"])
    for kind in ("compact", "int8", "best"):
        first, second = (Bank.open(f"{kind}-{n}").block(slice(None)).params for n in ("virtual", "made"))
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_virtual_bank_has_nothing_to_stream(bnn_run: Call) -> None:
    for flags, got in ((STREAMED, "got another"), ("--host-budget 50KB", "got host_budget=50000")):
        code, _, err = bnn_run(f"evaluate --bank virtual {flags}")
        assert (code, err.count("\n")) == (2, 1)
        assert "want 'mapped' for a virtual bank" in err
        assert got in err
        assert "'bnn bank materialise'" in err


# Banks at an address


def test_every_verb_takes_an_address(bnn_run: Call, site: str) -> None:
    """The same out of a cache, streamed, as from the folder."""
    there = f"{site}/bank --cache copies"
    assert bnn_run(f"predict --bank {there} --data t.csv --out there.csv {STREAMED}")[0] == 0
    assert bnn_run("predict --bank bank --data t.csv --out here.csv")[0] == 0
    assert Path("there.csv").read_text() == Path("here.csv").read_text()
    assert bnn_run(f"train --bank {there} --num-epochs 2 --out a")[0] == 0
    assert bnn_run("train --bank bank --num-epochs 2 --out b")[0] == 0
    assert torch.equal(Bank.open("a")[0]["1.weight"], Bank.open("b")[0]["1.weight"])
    code, _, _ = bnn_run(f"compare --bank {there} --bank whole --json compared.json")
    assert code == 0
    assert json.loads(Path("compared.json").read_text())["comparisons"][0]["reference"] == f"{site}/bank"
    assert bnn_run(f"bank diagnose {there}") == bnn_run("bank diagnose bank")
    assert bnn_run(f"predict --bank {site}/virtual --cache copies --data t.csv --out virtual.csv")[0] == 0
    for verb in ("cast --codec int8", "compact", "thin --every 2", "merge whole"):
        assert bnn_run(f"bank {verb} {there} --out new --overwrite")[0] == 0
        assert bnn_run(f"bank {verb} bank --out old --overwrite")[0] == 0
        assert torch.equal(Bank.open("new").block([5, 2]).params["1.weight"], Bank.open("old").block([5, 2]).params["1.weight"])  # fmt: skip
    assert bnn_run(f"bank export {there} --index 3 --out three.safetensors")[0] == 0
    assert bnn_run(f"bank materialise {site}/virtual --cache copies --out made")[0] == 0
    assert len(Bank.open("made")) == 70


def test_a_calibration_stands_beside_the_copies(bnn_run: Call, site: str, made: Path) -> None:
    code, out, _ = bnn_run(f"calibrate --bank {site}/bank --cache copies")
    assert (code, out.startswith("copies/")) == (0, True)
    assert not (made / "bank" / "calibration.json").exists()
    assert bnn_run(f"predict --bank {site}/bank --cache copies --data t.csv --calibrated --out found.csv")[0] == 0
    assert "set_size" in Path("found.csv").read_text().splitlines()[0]
    assert bnn_run(f"calibrate --bank {site}/bank --cache copies")[0] == 2


@pytest.mark.parametrize("verb", ["predict --data t.csv --out new.csv", "train --out new", "calibrate", "compare --bank bank"])  # fmt: skip
def test_an_address_wants_a_cache(bnn_run: Call, tmp_path: Path, site: str, verb: str) -> None:
    code, out, err = bnn_run(f"{verb} --bank {site}/bank")
    assert (code, out) == (2, "")
    assert "pass cache=FOLDER (--cache FOLDER)" in err
    assert not list(tmp_path.glob("new*"))


def test_banks_of_one_name_have_reports_of_their_own(bnn_run: Call, site: str, made: Path) -> None:
    words = f"evaluate --bank bank --bank {site}/bank --bank {made}/bank --bank ./bank --bank bank --cache copies"
    assert bnn_run(f"{words} --figures basic --report report")[0] == 0
    reports = json.loads(Path("report/report.json").read_text())["reports"]
    assert len(reports) == 4  # the one that was named twice has one
    assert {report["bank"] for report in reports.values()} == {"bank", f"{site}/bank", f"{made}/bank", "./bank"}  # fmt: skip
    assert {"bank", "bank-2"} < reports.keys()


def test_info_says_how_rows_were_put(bnn_run: Call) -> None:
    out = bnn_run("bank info bank")[1]
    assert f"compacted   rows striped, of {Bank.open('whole').digest[:12]}\n" in out


def test_all_verbs_that_use_a_bank_have_the_same_flags() -> None:
    group: Any = typer.main.get_command(app)
    residency = {"--residency", "--host-budget", "--device-budget", "--cache", "--allow-other-device"}
    verbs = {name: group.commands[name] for name in ("evaluate", "predict", "train", "compare", "calibrate")}
    verbs |= {name: group.commands["bank"].commands[name] for name in ("loo", "stack")}
    for name, verb in verbs.items():
        assert residency <= {flag for parameter in verb.params for flag in parameter.opts}, name
