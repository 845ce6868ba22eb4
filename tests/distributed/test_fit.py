"""`fit` on two and three ranks against one process: the same rows, the same steps, the same refusals."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from ranked import CHAINS, GUIDES, ROWS, WARM, WORK, bottomless, launch, model, paths, rows, sorted_rows

import bnn
from bnn.bank import merge
from bnn.errors import FitError
from bnn.types import Method

ALL = CHAINS | ROWS | GUIDES
FEW = ("hmc", "chees", "prior", "ensemble", "mean-field", "map")
GROWN = ("hmc", "prior", "mean-field")  # resumed with twice the samples


@pytest.fixture(scope="module", params=[2, 3])
def world_size(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def split(world_size: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Banks of all methods, each made by so many ranks."""
    out = tmp_path_factory.mktemp(f"ranks-{world_size}")
    ended = launch(world_size, "fits", out, ",".join(ALL if world_size == 2 else FEW))
    assert [process.returncode for process in ended] == [0] * world_size, "\n".join(p.err for p in ended)
    return out


def whole(method: Method, num_samples: int, seed: int = 3) -> bnn.Bank:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bnn.fit(model(), rows(), method=method, num_samples=num_samples, seed=seed)


def pair(name: str, split: Path) -> tuple[bnn.Bank, bnn.Bank]:
    """A bank of one process, and that of the ranks."""
    if not (split / name).exists():
        pytest.skip("three ranks run the methods that two might have right by chance")
    method, num_samples = ALL[name]
    return whole(method, num_samples * (1 + (name in GROWN))), bnn.Bank.open(split / name)


@pytest.mark.parametrize("name", sorted(CHAINS.keys() | ROWS.keys()))
def test_rows_are_those_of_one_process(name: str, split: Path) -> None:
    """Uncompiled float64: the same chains, draws and values. Products whose shape hangs on the number of chains may
    round otherwise: those of a low-rank mass, and of gradients of one chain alone.
    """
    here, there = pair(name, split)
    assert there.info["complete"]
    (places, values), (others, found) = sorted_rows(here), sorted_rows(there)
    assert torch.equal(places, others)
    for key in values:
        if name in ("hmc", "chees", "nuts", "prior"):
            assert torch.equal(values[key].nan_to_num(7.0), found[key].nan_to_num(7.0)), key
        else:
            torch.testing.assert_close(found[key], values[key], rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("name", sorted(GUIDES))
def test_guides_take_the_steps_of_one_process(name: str, split: Path) -> None:
    """Gradients are summed over rows in another order: equal to rounding, in one bank that rank 0 wrote."""
    here, there = pair(name, split)
    assert list(there.info["diagnostics"]) == ["main"]
    assert "ranks" not in there.info
    (places, values), (others, found) = sorted_rows(here), sorted_rows(there)
    assert torch.equal(places, others)
    for key in values:
        torch.testing.assert_close(found[key], values[key], rtol=1e-9, atol=1e-9, equal_nan=True)


def test_overwriting_replaces_the_parts_of_all_ranks(split: Path) -> None:
    """Where another bank was, the last fit put HMC with another seed."""
    method, num_samples = ALL["hmc"]
    here, there = whole(method, num_samples, seed=5), bnn.Bank.open(split / "over")
    (places, values), (others, found) = sorted_rows(here), sorted_rows(there)
    assert torch.equal(places, others)
    assert all(torch.equal(values[key], found[key]) for key in values)


def test_each_rank_writes_its_part(split: Path, world_size: int) -> None:
    bank = bnn.Bank.open(split / "hmc")
    assert list(bank.info["diagnostics"]) == [f"r{rank:04d}" for rank in range(world_size)]
    assert bank.info["ranks"] == {"world_size": world_size}
    assert sorted(set(bank.chain.tolist())) == list(range(5))
    assert not list((split / "hmc").glob(".tmp-*"))


def test_parts_of_hosts_without_a_common_folder_are_merged(split: Path, tmp_path: Path) -> None:
    """Each host has the bank with the parts of its own ranks; their chains keep their numbers."""
    import shutil

    writers = sorted(bnn.Bank.open(split / "hmc").info["diagnostics"])
    for writer in writers:
        shutil.copytree(split / "hmc", tmp_path / writer)
        for other in writers:
            for file in (tmp_path / writer).glob(f"*-{other}*"):
                if other != writer:
                    file.unlink()
            for file in (tmp_path / writer).glob(f"{other}-*"):
                if other != writer:
                    file.unlink()
    merged = merge([bnn.Bank.open(tmp_path / writer) for writer in writers], tmp_path / "merged")
    (places, values), (others, found) = sorted_rows(bnn.Bank.open(split / "hmc")), sorted_rows(merged)
    assert torch.equal(places, others)
    assert all(torch.equal(values[key], found[key]) for key in values)


def test_what_differs_between_ranks_is_named_on_all(tmp_path: Path) -> None:
    ended = launch(2, "refusals", tmp_path / "bank")
    assert [process.returncode for process in ended] == [0, 0], ended[1].err
    told = [json.loads(process.out) for process in ended]
    assert told[0] == told[1]
    for words, said in zip(
        [
            ("ConfigError: rank 1: want seed = 0, as on rank 0, got 1",),
            ("method.options.block_size = 8", "got 9"),
            ("num_samples = 4", "got 5"),
            ("rank 1: want data.digest = ",),
            ("rank 1: want module.a_part.1 = Tanh()", "got ReLU()"),
            ("rank 1: want module.values.0.weight = ",),
            ("resume = False", "got True"),
            ("one that several ranks can share: prior, mean-field", "SWAG on 2 ranks"),
            ("a guide of Pyro on 2 ranks",),
            ("without variance_reduction",),
            ("a chain for each of 2 ranks", "got 1"),
            ("num_warmup=",),
            ("out: want a folder",),
            ("writer: want none",),
            ("ConfigError: rank 1: want versions.bnn = ", ", as on rank 0, got 9.8.7", "the same versions"),
            (f"rank 1: want versions.torch = {torch.__version__}, as on rank 0, got 2.10.1",),
        ],
        told[0],
        strict=True,
    ):
        assert all(word in said for word in words), said
    assert not (tmp_path / "bank").exists()


HMC_OPTIONS = [
    "--model", "mlp:2", "--method", "hmc", "--num-samples", "24", "--num-chains", "4",
    "--num-warmup", "45", "--option", "num_steps=3", "--option", "init=prior", "--option", "dtype=float64",
    "--option", "compile=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a fit to a file, which is read without the packages that data sets come with."""
    path = tmp_path_factory.mktemp("data") / "rows.csv"
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(5))
    lines = [f"{a:.4f},{b:.4f},{c:.4f},{2 * a - b:.4f}" for a, b, c in x.tolist()]
    path.write_text("\n".join(["a,b,c,y", *lines, ""]))
    return ["--data", f"{path}:y", *HMC_OPTIONS]


@pytest.fixture(scope="module")
def alone(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "bank"
    from bnn.cli import run

    assert run(["fit", *options, "--out", str(out)]) == 0
    return out


def test_killed_ranks_go_on_under_torchrun(tmp_path: Path, options: list[str], alone: Path) -> None:
    """Rank 1 dies by SIGKILL in warm-up, while rank 0 commits the state that it lacks, and again in sampling."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2"]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    arguments = [str(WORK), "command_line", "31,18", "fit", *options, "--out", str(tmp_path / "bank")]
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    ended = subprocess.run(
        [*command, *meeting, *arguments],
        env={**clean, **paths(), "OMP_NUM_THREADS": "1", "BNN_RANKS_TIMEOUT": "30"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("Signal 9 (SIGKILL)") >= 2 or ended.stderr.count("exitcode: -9") >= 2
    assert ended.stdout.count("verdict") == 1
    (places, values), (others, found) = (
        sorted_rows(bnn.Bank.open(alone)),
        sorted_rows(bnn.Bank.open(tmp_path / "bank")),
    )
    assert torch.equal(places, others)
    assert all(torch.equal(values[key], found[key]) for key in values)


def test_a_guide_is_the_same_on_ranks_that_round_apart(split: Path, world_size: int) -> None:
    told = [json.loads((split / f"rounded-{rank}.json").read_text()) for rank in range(world_size)]
    assert [len(states) for states in told] == [3] * world_size
    assert all(states == told[0] for states in told)
    assert told[0][0] != told[0][1]


def test_chains_that_are_of_no_use_end_all_ranks_with_the_error_of_one_process(tmp_path: Path) -> None:
    """They hear of it when they meet: of the first that came to an infinite density, and of chains that stand still on all."""
    wrong, data = bottomless()
    with pytest.raises(FitError) as alone:
        bnn.fit(wrong, data, method=WARM, num_samples=10, seed=3)
    assert " of warm-up; " in str(alone.value)
    ended = launch(2, "useless", tmp_path)
    assert [process.returncode for process in ended] == [0, 0], "\n".join(p.err for p in ended)
    for infinite, still, moving in (process.out.splitlines() for process in ended):
        assert infinite == f"FitError: {alone.value}"
        assert re.search(
            r"got every chain standing still for \d\d trajectories, up to trajectory \d+ of warm-up;", still
        )
        assert moving == "nothing"  # for the others do


def test_a_restart_goes_on_with_what_an_earlier_start_began_and_nothing_else(tmp_path: Path) -> None:
    """Not with a bank that it refused to replace, though of the same run; nor with one that it was to replace and had not yet."""
    method, num_samples = GUIDES["mean-field"]
    out = tmp_path / "bank"
    bnn.fit(model(), rows(), method=method, num_samples=num_samples, out=out, seed=3)
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}  # where torchrun's starts all meet
    for _ in range(2):
        ended = launch(2, "over", out, "00", "", **place)
        assert all(process.out.startswith("BankExists") for process in ended), ended[0].err
        assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()} == before
    went_on = []
    for overwriting, killed in (("10", "0"), ("11", "1"), ("11", "1"), ("11", "")):  # rank 0 decides
        ended = launch(2, "over", out, overwriting, killed, awaited=0 if killed else None, **place)
        assert ended[0].returncode == (-9 if killed else 0), ended[0].err
        went_on.append(ended[0].out.split()[0])
        is_old = (out / "bank.json").stat().st_mtime_ns == before["bank.json"][0]
        assert is_old == (killed == "0")
    assert went_on == ["None", "None", "50", "60"]
    assert len(bnn.Bank.open(out)) == num_samples


def test_rank_0_speaks_for_all(tmp_path: Path, options: list[str]) -> None:
    """Steps far too long: each rank warns of its own chains. Then the bank is there, which all ranks would say."""
    useless = ["--num-warmup", "1", "--option", "step_size=50.0", "--out", str(tmp_path / "bank")]
    first, second = launch(2, "command_line", "", "fit", *options, *useless)
    assert (first.returncode, second.returncode) == (0, 0), first.err
    assert "warning: HMC: chains 0, 1 accepted" in first.err
    assert "warning: rank 1: HMC: chains 2, 3 accepted" in first.err
    assert "verdict" in first.out
    assert second.out + second.err == ""
    first, second = launch(2, "command_line", "", "fit", *options, *useless)
    assert (first.returncode, second.returncode) == (2, 2)
    assert first.err.strip().startswith(f"{tmp_path}/bank: want a new folder")
    assert second.err == ""
    # Something that only one of them meets is said by that one, and the other says why it ends.
    first, second = launch(2, "odd_command", "fit", *options, "--out", str(tmp_path / "other"))
    assert (first.returncode, second.returncode) == (3, 2)
    assert second.err.startswith("rank 1: missing.csv")
    assert "rank 1 ended: DataError: missing.csv" in first.err
