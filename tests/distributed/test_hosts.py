"""Two hosts under torchrun against one process: hosts that die, links that are cut and that lose packets, disks of their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hosts
import numpy as np
import pytest
import torch
from hosts import Agent, Host, until
from ranked import WORK, free_port, sorted_rows

import bnn
from bnn import cli
from bnn.errors import BnnError

TIMEOUT = 6  # seconds without a sign of another rank
FIT = (
    "fit --data rows.csv:y --model mlp:2 --method hmc --num-samples 80 --num-chains 4 --num-warmup 45 --option num_steps=3 "
    "--option init=prior --option dtype=float64 --option compile=false --data-root"
)
PACE = "0.1"  # seconds before each block: 45 of warm-up and 20 draws leave time for what happens in between
Pair = tuple[Host, Host]
Start = Callable[..., list[Agent]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, and the bank of one process."""
    found = tmp_path_factory.mktemp("alone")
    random = np.random.default_rng(0)
    x = random.normal(size=(180, 3))
    y = x @ [1.0, 2.0, -1.0] + random.normal(size=180)
    np.savetxt(found / "rows.csv", np.c_[x, y].round(3), "%g", ",", header="a,b,c,y", comments="")
    assert cli.run(fit(found, found / "bank")) == 0
    return found


def fit(folder: Path, out: Path | str) -> list[str]:
    return [*FIT.split(), str(folder), "--out", str(out)]


def evaluate(folder: Path, bank: Path, report: Path) -> list[str]:
    return ["evaluate", "--bank", str(bank), "--data-root", str(folder), "--report", str(report)]


@pytest.fixture(scope="module")
def possible() -> None:
    if (reason := hosts.missing()) is not None:
        pytest.skip(reason)


@pytest.fixture
def cable(possible: None) -> Iterator[Pair]:
    with hosts.namespaces() as pair:
        yield pair


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Pair:
    """With a cable, or where none can be made two addresses of this machine."""
    if hosts.missing() is None:
        found: Pair = request.getfixturevalue("cable")
        return found
    return Host("127.0.0.1", "lo"), Host("127.0.0.2", "lo")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts torchrun on both hosts, which meet at the first; what is left at the end is killed."""
    started: list[Agent] = []

    def both(pair: Pair, *arguments: str | Path, ranks: tuple[int, int] = (1, 1), restarts: int = 0) -> list[Agent]:
        port, agents = free_port(), []
        for number, host in enumerate(pair):
            meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{pair[0].address}:{port}", "--rdzv-id", "7"]
            first = [
                "--rdzv-conf",
                f"is_host={'false' if number else 'true'}",
            ]  # the name of the machine is that of both
            size = ["--nnodes", "2", "--nproc-per-node", str(ranks[number]), "--max-restarts", str(restarts)]
            log = tmp_path / f"{len(started) + number}.log"
            agents.append(host.start(log, *size, *meeting, *first, *arguments, BNN_RANKS_TIMEOUT=str(TIMEOUT)))
        started.extend(agents)
        return agents

    yield both
    for agent in started:
        hosts.kill_all(agent)


def have_committed(bank: Path, *, rows: int) -> Callable[[], bool]:
    """Whether two ranks have committed a state, and all together so many rows."""

    def found() -> bool:
        try:
            opened = bnn.Bank.open(bank)
        except (BnnError, OSError):
            return False
        return len(list(bank.glob("state-*"))) >= 2 and len(opened) >= rows

    return found


def same_rows(bank: Path, expected: Path) -> None:
    (places, values), (others, found) = sorted_rows(bnn.Bank.open(expected)), sorted_rows(bnn.Bank.open(bank))
    assert torch.equal(places, others)
    for name, value in values.items():
        assert torch.equal(value, found[name]), name


def finish(start: Start, pair: Pair, bank: Path, folder: Path) -> None:
    """The same command with --resume ends with the rows of one process."""
    agents = start(pair, "-m", "bnn", *fit(folder, bank), "--resume")
    assert [agent.ended() for agent in agents] == [0, 0], "".join(agent.said() for agent in agents)
    same_rows(bank, folder / "bank")


def figures(report: Path) -> Any:
    found = json.loads((report / "report.json").read_text())
    return [bank["metrics"] for bank in found["reports"].values()]


@pytest.mark.slow
def test_killed_ranks_of_a_host_are_started_again(pair: Pair, start: Start, folder: Path, tmp_path: Path) -> None:
    """One rank on the first host, two on the other. Then both hosts evaluate the bank, to the figures of one process."""
    bank = tmp_path / "bank"
    lines = [" ".join(words) for words in (fit(folder, bank), evaluate(folder, bank, tmp_path / "two"))]
    agents = start(pair, WORK, "paced", PACE, *lines, ranks=(1, 2), restarts=1)
    until(have_committed(bank, rows=8), what="rows of warm chains")
    before = len(bnn.Bank.open(bank))
    killed = hosts.ranks_of(agents[1])
    assert len(killed) == 2
    hosts.kill(*killed)
    assert [agent.ended() for agent in agents] == [0, 0], "".join(agent.said() for agent in agents)
    assert before < 80
    assert "exitcode: -9" in agents[1].said() or "SIGKILL" in agents[1].said()
    assert bnn.Bank.open(bank).info["ranks"] == {"world_size": 3}
    same_rows(bank, folder / "bank")
    assert cli.run(evaluate(folder, bank, tmp_path / "one")) == 0
    assert figures(tmp_path / "two") == figures(tmp_path / "one")
    assert ["rmse" in agent.said() for agent in agents] == [True, False]  # rank 0 speaks


@pytest.mark.slow
def test_a_host_that_dies_ends_the_other_at_once(
    pair: Pair, start: Start, folder: Path, tmp_path: Path, tell: Callable[[str], None]
) -> None:
    """Its connections close. What was committed is there."""
    bank = tmp_path / "bank"
    agents = start(pair, WORK, "paced", PACE, " ".join(fit(folder, bank)))
    until(have_committed(bank, rows=0), what="states of warm-up")
    hosts.kill_all(agents[1])
    seconds = until(lambda: "--resume" in agents[0].said(), what="an error of the host that is left")
    assert agents[0].ended() != 0
    assert "rank 0 of 2: want " in agents[0].said()
    assert not hosts.ranks_of(agents[0])
    assert seconds < TIMEOUT
    tell(f"said after {seconds:.1f} s")
    assert not len(bnn.Bank.open(bank))
    assert len(list(bank.glob("state-*"))) >= 2


@pytest.mark.hosts
@pytest.mark.parametrize("rows", [0, 4])
def test_a_link_that_is_cut_ends_both_hosts_in_time(
    rows: int, cable: Pair, start: Start, folder: Path, tmp_path: Path, tell: Callable[[str], None]
) -> None:
    """In warm-up, where ranks wait for each other, and once each draws on its own, when they wait at the end alone.

    No connection closes. Two seconds later than the timeout are what rank 1 waits for rank 0 to say the same, and one what it
    asks why.
    """
    bank = tmp_path / "bank"
    agents = start(cable, WORK, "paced", PACE, " ".join(fit(folder, bank)))
    until(have_committed(bank, rows=rows), what="rows")
    cable[1].ip("link", "set", cable[1].link, "down")
    seconds = until(lambda: all("--resume" in agent.said() for agent in agents), what="errors of both")
    assert "rank 0 of 2: want " in agents[0].said()
    assert "rank 1 of 2: want " in agents[1].said()
    drawing = 20 * float(PACE) if rows else 0.0
    assert TIMEOUT / 2 < seconds < drawing + TIMEOUT + 5
    until(lambda: not any(map(hosts.ranks_of, agents)), 5, what="the end of all ranks")
    tell(f"said after {seconds:.1f} s")
    for agent in agents:
        hosts.kill_all(agent)  # torchrun waits for its own meeting place, as long as the system does
    assert len(bnn.Bank.open(bank)) == (80 if rows else 0)
    if rows:
        same_rows(bank, folder / "bank")
        return
    cable[1].ip("link", "set", cable[1].link, "up")
    finish(start, cable, bank, folder)


@pytest.mark.hosts
def test_a_link_that_loses_packets_changes_nothing(
    cable: Pair, start: Start, folder: Path, tmp_path: Path, tell: Callable[[str], None]
) -> None:
    """1 % of those to each host: they are sent again, and fit and evaluation end as without."""
    for host in cable:
        if (reason := hosts.lose(host, 0.01)) is not None:
            pytest.skip(reason)
    bank = tmp_path / "bank"
    lines = [" ".join(words) for words in (fit(folder, bank), evaluate(folder, bank, tmp_path / "two"))]
    agents = start(cable, WORK.with_name("using.py"), "command_lines", *lines)
    assert [agent.ended() for agent in agents] == [0, 0], "".join(agent.said() for agent in agents)
    same_rows(bank, folder / "bank")
    assert cli.run(evaluate(folder, bank, tmp_path / "one")) == 0
    assert figures(tmp_path / "two") == figures(tmp_path / "one")
    dropped = sum(map(hosts.lost, cable))
    assert dropped > 0
    tell(f"{dropped} packets lost")


@pytest.mark.slow
def test_hosts_with_disks_of_their_own_write_parts_that_merge(folder: Path, tmp_path: Path) -> None:
    """Each host by its --node-rank, and the same --out in folders of their own."""
    port, agents = free_port(), []
    for number, address in enumerate(["127.0.0.1", "127.0.0.2"]):
        (tmp_path / f"host{number}").mkdir()
        place = ["--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "1"]
        meeting = ["--master-addr", "127.0.0.1", "--master-port", str(port)]
        arguments = [*place, *meeting, "-m", "bnn", *fit(folder, "bank")]
        log = tmp_path / f"{number}.log"
        agents.append(Host(address, "lo").start(log, *arguments, folder=tmp_path / f"host{number}"))
    try:
        assert [agent.ended() for agent in agents] == [0, 0], "".join(agent.said() for agent in agents)
    finally:
        for agent in agents:
            hosts.kill_all(agent)
    parts = [tmp_path / f"host{number}" / "bank" for number in range(2)]
    assert [list(bnn.Bank.open(part).info["diagnostics"]) for part in parts] == [["r0000"], ["r0001"]]
    assert [len(bnn.Bank.open(part)) for part in parts] == [40, 40]
    assert cli.run(["bank", "merge", *map(str, parts), "--out", str(tmp_path / "all")]) == 0
    same_rows(tmp_path / "all", folder / "bank")
