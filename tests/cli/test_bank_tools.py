"""`bnn bank thin | merge | export | plan`: what they write and say, their exit codes, what they refuse."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.numpy
import safetensors.torch
import torch

from bnn.bank import Bank, mean
from bnn.bank import format as fmt
from bnn.cli import plan, run

Call = Callable[..., tuple[int, str, str]]

HMC = "--data rows.csv:y --model mlp:3 --method hmc --num-chains 3 --num-warmup 40 --num-steps 4"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows, and two banks of three chains fitted to them."""
    folder = tmp_path_factory.mktemp("banks")
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    lines = [f"{a:.4f},{b:.4f},{a - b:.4f}" for a, b in x.tolist()]
    (folder / "rows.csv").write_text("\n".join(["a,b,y", *lines]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for seed in (0, 1):
            assert run(f"fit {HMC} --num-samples 60 --seed {seed} --out bank{seed}".split()) == 0
    return folder


@pytest.fixture
def bnn(
    call: Callable[[str], tuple[int, str, str]], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Call:
    """Run a command line in an empty folder with links to the banks: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    for name in ("rows.csv", "bank0", "bank1"):
        (tmp_path / name).symlink_to(made / name)
    return call


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_thin(bnn: Call, made: Path) -> None:
    before = digests(made / "bank0")
    code, out, err = bnn("bank thin bank0 --every 4 --out new")
    assert (code, err) == (0, "")
    assert out.startswith("new: 15 samples of 14 values")  # 3 chains of 20 draws
    old, new = Bank.open("bank0"), Bank.open("new")
    kept = [row for row in range(60) if int(old.draw[row]) % 4 == 0]
    assert new.draw.tolist() == old.draw[kept].tolist()
    assert all(torch.equal(new[place]["1.weight"], old[row]["1.weight"]) for place, row in enumerate(kept))
    assert digests(made / "bank0") == before
    assert bnn("bank verify new --full")[0] == 0
    code, out, err = bnn("bank thin bank0 --every 2 --out new")
    assert (code, out) == (2, "")
    assert "kept" in err
    assert len(Bank.open("new")) == 15
    assert bnn("bank thin bank0 --every 2 --out new --overwrite")[0] == 0
    assert len(Bank.open("new")) == 30


def test_merge_can_be_judged_like_one_run(bnn: Call) -> None:
    code, out, err = bnn("bank merge bank0 bank1 --out new")
    assert (code, err) == (0, "")
    assert "new: 120 samples of 14 values" in out
    assert "method      hmc" in out
    new, banks = Bank.open("new"), [Bank.open("bank0"), Bank.open("bank1")]
    assert sorted(set(new.chain.tolist())) == [0, 1, 2, 3, 4, 5]
    assert torch.equal(new.columns["energy"], torch.cat([bank.columns["energy"] for bank in banks]))
    assert "model       mlp:3" in out
    told = json.loads(bnn("bank diagnose new --json")[1])
    assert (told["num_chains"], told["num_draws"], told["without_predictions"]) == (6, 20, None)
    code, out, err = bnn("bank merge bank0 bank0 --out again")
    assert (code, out) == (2, "")
    assert "each bank once" in err
    assert not Path("again").exists()
    assert bnn("bank merge bank0 --out again")[0] == 2


def test_export_of_a_sample_and_of_the_mean(bnn: Call) -> None:
    bank = Bank.open("bank0")
    for flag, wanted in (("--index 7", bank[7]), ("--mean", mean(bank))):
        code, out, err = bnn(f"bank export bank0 --out model.safetensors {flag} --overwrite")
        assert (code, err) == (0, "")
        assert re.fullmatch(r"model\.safetensors: 4\.1 kB\n", out)
        found = safetensors.torch.load_file("model.safetensors")
        assert set(found) == {name for name in bank.layout.names if not name.startswith("@")}
        assert all(torch.equal(found[name], wanted[name]) for name in found)


def test_export_of_chains(bnn: Call) -> None:
    code, _, err = bnn("bank export bank0 --out chains --chains --params 1 --params @*")
    assert (code, err) == (0, "")
    found = safetensors.numpy.load_file("chains")
    assert found["posterior.1.weight"].shape == (3, 20, 3, 2)
    assert {name for name in found if name.startswith("posterior.")} == {
        "posterior.1.weight", "posterior.1.bias", "posterior.@likelihood.scale",
    }  # fmt: skip
    assert set(found) > {"sample_stats.lp", "sample_stats.diverging", "sample_stats.acceptance_rate"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "want --index, --mean or --chains, got none of them"),
        ("--mean --index 3", "got --index and --mean"),
        ("--index 60", "0 <= index < 60"),
        ("--index -1", "0 <= index < 60"),
        ("--mean --params *", "--params: want --chains, got --mean"),
        ("--chains --params nothing", "params: want patterns that match a parameter"),
    ],
)
def test_export_refuses(bnn: Call, words: str, said: str) -> None:
    code, out, err = bnn(f"bank export bank0 --out file {words}")
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1
    assert not Path("file").exists()


def test_export_keeps_what_is_there(bnn: Call, made: Path) -> None:
    Path("file").write_text("mine")
    before = digests(made / "bank0")
    for words in ("--index 0", "--mean", "--chains"):
        code, _, err = bnn(f"bank export bank0 --out file {words}")
        assert code == 2
        assert "a file, which is kept" in err
        assert bnn(f"bank export bank0 --out bank0/main-000000.safetensors {words} --overwrite")[0] == 2
    assert Path("file").read_text() == "mine"
    assert digests(made / "bank0") == before
    code, _, err = bnn("bank export bank0 --out nowhere/file --index 0")
    assert code == 3
    assert len(err.splitlines()) == 1


# Plan


def bytes_told(out: str) -> int:
    found = re.search(r"\(([\d,]+) bytes\)", out)
    assert found, out
    return int(found[1].replace(",", ""))


def test_plan_tells_the_bytes_of_the_bank(bnn: Call) -> None:
    code, out, err = bnn(f"bank plan {HMC} --num-samples 60 --trial 0")
    assert (code, err) == (0, "")
    assert "sample      14 values, 120 B with its columns" in out  # 14 float32, 8 columns of 8 bytes
    assert "1 shard of at most" in out
    assert "sampling" not in out
    assert bytes_told(out) == sum(path.stat().st_size for path in Path("bank0").glob("main-*.safetensors"))


def test_plan_counts_what_is_outside_the_sample(bnn: Call) -> None:
    words = f"{HMC} --likelihood student-t --bayesian 3.* --num-samples 30"
    code, out, _ = bnn(f"bank plan {words} --trial 0")
    assert code == 0
    assert bnn(f"fit {words} --out part")[0] == 0
    files = {path.name: path.stat().st_size for path in Path("part").glob("*.safetensors") if "state" not in path.name}
    assert set(files) == {"main-000000.safetensors", "base.safetensors"}
    assert bytes_told(out) == sum(files.values())


def test_plan_measures_the_disk_and_leaves_it_as_it_was(bnn: Call, tmp_path: Path) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    code, out, _ = bnn(f"bank plan {HMC} --num-samples 60 --trial 0 --out banks/new")
    assert code == 0
    assert re.search(r"^disk        [\d.]+ GB free at banks/new$", out, re.MULTILINE)
    assert re.search(r"^write       less than 0\.1 s at [\d.]+ [kMG]B a second$", out, re.MULTILINE)
    assert re.search(r"^read        ", out, re.MULTILINE)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    (tmp_path / "there").mkdir()
    assert bnn(f"bank plan {HMC} --num-samples 60 --trial 0 --out there")[0] == 0
    assert list((tmp_path / "there").iterdir()) == []


def test_plan_says_when_a_bank_does_not_fit(bnn: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    words = f"bank plan {HMC} --num-samples 60 --trial 0 --out new"
    needed = bytes_told(bnn(words)[1])
    monkeypatch.setattr(plan, "free_bytes", lambda folder: needed)
    assert bnn(words)[0] == 0
    monkeypatch.setattr(plan, "free_bytes", lambda folder: needed - 1)
    code, out, err = bnn(words)
    assert (code, err) == (1, "")
    assert out.splitlines()[-1].startswith("bad: new: want ")
    assert not Path("new").exists()


def test_plan_tries_the_method(bnn: Call) -> None:
    code, out, _ = bnn(f"bank plan {HMC} --num-samples 6 --trial 300")
    assert code == 0
    assert re.search(r"^sampling    .* s: the whole run was tried$", out, re.MULTILINE)
    code, out, _ = bnn(f"bank plan {HMC.replace('40', '4000000')} --num-samples 600 --trial 0.2 --option init=prior")
    assert code == 0
    assert re.search(r"^sampling    at least \S+ (h|days|min), by .* of 4,000,000 of warm-up; ", out, re.MULTILINE)
    code, out, _ = bnn("bank plan --data rows.csv:y --method mean-field --num-steps 4000000 --num-samples 6 --trial .2")
    assert code == 0
    assert re.search(r"^sampling    about \S+ (h|days|min), by .* of 4,000,006$", out, re.MULTILINE)


def test_plan_foresees_ranks(bnn: Call) -> None:
    """Three chains on five ranks: 8 + 32 + 1 bytes a meeting, which go round by 4 + 4 + 3 messages of 20 ms."""
    code, out, _ = bnn(
        f"bank plan {HMC} --num-samples 60 --trial .1 --ranks 5 --latency 0.02 --bandwidth 1GB --out new"
    )
    assert code == 0
    assert "ranks       5: 1 of 3 chains on the busiest" in out
    assert "network     1.0 GB a second, 20000 us a message" in out
    assert "talk        a meeting in warm-up: 41 bytes of each rank in 3 calls, 220 ms" in out
    assert re.search(
        r"^run         (about|at least) .* on 5 ranks, .* in one process: efficiency \d+%$", out, re.MULTILINE
    )
    assert re.search(r"^first       talk, \d+% of the run: a meeting in warm-up: 220 ms of talk$", out, re.MULTILINE)
    assert "a fit wants a chain for each rank" in out
    # One batch: 4 calls of 4 messages of 20 ms, beside which bytes take microseconds.
    assert re.search(r"^evaluate    1 batch of held-out rows: .* sent by a rank in 4 calls, 320 ms$", out, re.MULTILINE)
    assert "fewer batches than ranks: share samples with --mesh" in out
    words = "bank plan --data rows.csv:y --model mlp:3 --method mean-field --num-samples 6 --trial .1"
    code, out, _ = bnn(f"{words} --ranks 4 --latency 0.02")
    assert code == 0
    assert "ranks       4: 8 of 32 rows of a batch on the busiest" in out
    assert "talk        a step: 60 bytes of each rank in 1 calls, 120 ms" in out  # P + 1 = 15 float32
    assert "the all-reduce of 60 B is longer than the" in out
    code, out, _ = bnn("bank plan --data rows.csv:y --method prior --num-samples 6 --ranks 4 --trial .1")
    assert code == 0
    assert "talk        none: ranks go alone" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--ranks 2 --trial 0", "--ranks: want a trial"),
        ("--ranks 0", "ranks: want at least 1, got 0"),
        ("--ranks 2 --latency -1", "latency: want 0 seconds or more"),
        ("--bandwidth none", "--bandwidth: want a number of bytes"),
        ("--trial -1", "--trial: want 0 seconds or more"),
        ("--trial nan", "--trial: want 0 seconds or more"),
        ("--num-samples 0", "num_samples: want at least 1"),
        ("--num-samples 61", "num_samples"),
        ("--method none", "--method"),
        ("--out rows.csv", "--out rows.csv: want a folder or nothing"),
        ("--bayesian nothing", "patterns that match"),
    ],
)
def test_plan_refuses(bnn: Call, words: str, said: str) -> None:
    code, _, err = bnn(f"bank plan {HMC} --num-samples 60 {words}")
    assert code == 2
    assert said in err
    assert len(err.splitlines()) == 1


def states(*marks: tuple[float, str, int, int, int], steps: int) -> object:
    """States as a method gives them, each at its second on a clock: (second, phase, step, of, steps before it)."""
    for second, phase, step, num_steps, before in marks:
        Clock.now = second
        told = {"name": phase, "step": step, "num_steps": num_steps}
        yield {"step": before + step, "num_steps": steps, "info": {}, **({"phase": told} if phase else {})}


class Clock:
    now = 0.0

    @staticmethod
    def perf_counter() -> float:
        return Clock.now


@pytest.mark.parametrize(
    ("marks", "steps", "limit", "seconds", "at_least", "complete"),
    [
        # compilation before step 1 counts once, then 0.5 s a step
        ([(10.0, "", 1, 21, 0), (10.5, "", 2, 21, 0), (12.0, "", 5, 21, 0)], 21, 12.0, 20.0, False, False),
        # stopped in warm-up: sampling is not guessed
        ([(1.0, "warm-up", 1, 11, 0), (3.0, "warm-up", 3, 11, 0)], 111, 3.0, 11.0, True, False),
        # stopped at the end of warm-up
        ([(1.0, "warm-up", 5, 10, 0), (1.5, "warm-up", 10, 10, 0)], 110, 0.5, 1.5, True, False),
        # sampling has a speed of its own, counted from the end of warm-up
        ([(5.0, "warm-up", 10, 10, 0), (5.25, "sampling", 1, 100, 10)], 110, 5.1, 30.0, False, False),
        ([(5.0, "warm-up", 10, 10, 0), (5.2, "sampling", 1, 9, 10), (6.0, "sampling", 3, 9, 10)], 19, 6.0, 8.0, False, False),
        # two states at least: one is no speed
        ([(4.0, "", 2, 8, 0), (4.5, "", 3, 8, 0)], 8, 1.0, 7.0, False, False),
        ([(4.0, "", 8, 8, 0)], 8, 1.0, 4.0, False, True),
        ([(1.0, "", 1, 2, 0), (2.0, "", 2, 2, 0)], 2, 60.0, 2.0, False, True),
    ],
)  # fmt: skip
def test_a_trial_speaks_for_the_whole_run(
    monkeypatch: pytest.MonkeyPatch,
    marks: list[tuple[float, str, int, int, int]],
    steps: int,
    limit: float,
    seconds: float,
    at_least: bool,
    complete: bool,
) -> None:
    monkeypatch.setattr(plan, "time", Clock)
    Clock.now = 0.0
    found = plan.measure_run(states(*marks, steps=steps), limit)
    assert found.seconds == pytest.approx(seconds)
    assert (found.at_least, found.complete) == (at_least, complete)


def test_repair_names_what_is_dropped_and_says_whether_the_fit_can_go_on(bnn: Call, made: Path) -> None:
    shutil.copytree(made / "bank0", "hurt")
    shutil.copy("hurt/main-000000.safetensors", "hurt/main-000007.safetensors")
    code, out, _ = bnn("bank verify hurt")
    assert code == 0
    assert out.startswith("unnamed: main-000007.safetensors: left by a crash;")
    Path("hurt/main-000007.safetensors").unlink()
    Path("hurt/manifest-main.json").write_text("{}")
    code, out, err = bnn("bank repair hurt --out mended")
    assert (code, err) == (0, "")
    assert "dropped: manifest-main.json: want " in out
    assert "adopted: main-000000.safetensors: 60 rows" in out
    assert out.endswith("good: 60 samples; the fit can go on with --resume\n")
    assert torch.equal(Bank.open("mended").log_joint, Bank.open(made / "bank0").log_joint)
    code, out, _ = bnn(f"fit {HMC} --num-samples 66 --seed 0 --out mended --resume")
    assert code == 0
    assert len(Bank.open("mended")) == 66
    for state in Path("hurt").glob("state-*"):
        state.unlink()
    code, out, _ = bnn("bank repair hurt --out again")
    assert "cannot be resumed: no state follows its last row" in out
    code, _, err = bnn("bank repair hurt --out more --resumable")
    assert (code, "want a state of 'main' to go on from" in err) == (2, True)
    assert bnn("bank repair hurt --out again")[0] == 2
    assert bnn("bank verify again --full")[0] == 0


def test_a_lost_manifest_is_bad_and_names_the_way_out(bnn: Call, made: Path) -> None:
    shutil.copytree(made / "bank0", "lost")
    Path("lost/manifest-main.json").unlink()
    for flag in ("", " --full"):
        code, out, _ = bnn(f"bank verify lost{flag}")
        assert code == 1
        assert out.startswith("bad: main-000000.safetensors: manifest-main.json, which named it, is gone")
        assert "'bnn bank repair'" in out
        assert "good" not in out
    code, out, err = bnn(f"fit {HMC} --num-samples 60 --seed 0 --out lost --resume")
    assert (code, out) == (2, "")
    assert "manifest-main.json" in err
    assert "bnn bank repair" in err
    assert (tmp := Path("lost/main-000000.safetensors")).read_bytes() == (made / "bank0" / tmp.name).read_bytes()
    code, out, err = bnn("bank merge lost bank1 --out new")
    assert (code, out) == (2, "")
    assert "lost: want at least one sample, got none" in err
    assert bnn("bank repair lost --out mended")[0] == 0
    assert len(Bank.open("mended")) == 60


def test_info_says_what_a_bank_was_made_of_and_whether_a_fit_goes_on(bnn: Call, made: Path) -> None:
    shutil.copytree(made / "bank0", "part")
    manifest = Path("part/manifest-main.json")
    manifest.write_text(json.dumps(fmt.seal({**json.loads(manifest.read_text()), "complete": False}, "m")))
    assert "complete    no: go on with --resume" in bnn("bank info part")[1]
    out = bnn("bank thin part --every 4 --out few")[1]
    assert f"thinned     every 4 draws, of {Bank.open('part').digest[:12]}" in out
    assert "complete    no, and no state to go on from" in out
    out = bnn("bank merge bank0 bank1 --out both")[1]
    assert f"merged      2 banks: 60 of {Bank.open('bank0').digest[:12]}, 60 of" in out
    assert "complete    yes" in out


def test_verify_sees_a_cut_state(bnn: Call, made: Path) -> None:
    shutil.copytree(made / "bank0", "cut")
    state = next(Path("cut").glob("state-*"))
    state.write_bytes(state.read_bytes()[:-1])
    code, out, _ = bnn("bank verify cut")
    assert (code, out.startswith(f"bad: {state.name}: ")) == (1, True)


def test_plan_of_too_many_samples_ends_at_once(bnn: Call) -> None:
    code, _, err = bnn("bank plan --data rows.csv:y --num-samples 1000000000000000 --trial 0")
    assert (code, "which fill the 1000000 shards of a writer" in err) == (2, True)


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_an_export_replaces_files_only(bnn: Call, kind: str) -> None:
    """A device that is replaced by a file, as /dev/null once was, is nobody's wish."""
    if kind == "pipe":
        os.mkfifo("out")
    else:
        Path("out").symlink_to("elsewhere")
    for flag in ("--mean", "--index 3", "--chains"):
        code, out, err = bnn(f"bank export bank0 --out out {flag} --overwrite")
        assert (code, out) == (2, "")
        assert "want a file or nothing, got a link, device or pipe" in err
    assert Path("out").is_fifo() or Path("out").is_symlink()
