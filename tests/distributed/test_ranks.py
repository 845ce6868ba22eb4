"""Two and three ranks as processes of this machine: what they say to each other, and how they miss each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from ranked import TALK, launch

from bnn import distributed
from bnn.distributed import Ranks
from bnn.errors import ConfigError


@pytest.mark.parametrize(("total", "world_size"), [(8, 3), (3, 3), (2, 5), (0, 2), (7, 1)])
def test_parts_cover_everything_once(total: int, world_size: int) -> None:
    for split in (Ranks.share, Ranks.stride):
        parts = [list(split(Ranks(rank, world_size), total)) for rank in range(world_size)]
        assert sorted(number for part in parts for number in part) == list(range(total))
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
    shares = [number for rank in range(world_size) for number in Ranks(rank, world_size).share(total)]
    assert shares == list(range(total))
    assert Ranks(0, world_size).stride(total) == Ranks(0, world_size).stride(total + 1)[: -(-total // world_size)]


@pytest.mark.parametrize("world_size", [2, 3])
def test_what_is_said_comes_to_all(world_size: int) -> None:
    ended = launch(world_size, "collectives", script=TALK)
    assert [process.returncode for process in ended] == [0] * world_size, ended[0].err
    told = [json.loads(process.out) for process in ended]
    assert all(each == told[0] for each in told)
    assert told[0]["pooled"] == [[float(rank)] * 2 for rank in range(world_size) for _ in range(rank)]
    ranks = sum(range(world_size))
    assert told[0]["total"] == [ranks, world_size]
    later = [ranks, ranks + world_size, ranks + 2 * world_size]
    assert told[0]["later"] == [[3, *later], [100_000, *later], [1, ranks], [0]]
    assert told[0]["values"] == [{"rank": rank, "text": "ü" * rank} for rank in range(world_size)]
    assert told[0]["first"] == [0, "x"]
    assert told[0]["flag"] is True
    assert told[0]["nothing"] is None
    assert told[0]["tensor"] == "tensor([0.+1.j, 1.+1.j, 2.+1.j])"
    assert told[0]["plain"] == [4, {"a": [1.5, None]}]


def test_a_sum_that_was_given_up_is_taken_for_no_other() -> None:
    ended = launch(2, "given_up", script=TALK)
    assert [process.returncode for process in ended] == [0, 0], "".join(p.err for p in ended)
    sums = [[3.0] * 3, [30.0] * 3, [3.0] * 3, ["refused"], ["refused"], [3.0] * 3]
    assert [json.loads(process.out) for process in ended] == [sums, sums]


def test_items_in_turn_come_in_order_to_all_in_few_calls() -> None:
    """Six rounds of two ranks are told after the first, two more and the last three; one by one where nothing may wait."""
    ended = launch(2, "turns", script=TALK)
    assert [process.returncode for process in ended] == [0, 0], "".join(p.err for p in ended)
    told = [json.loads(process.out) for process in ended]
    assert told[0] == told[1]
    many, singly, one, none, broken = told[0]
    items = [[item, [item] * item, item % 2] for item in range(13)]
    assert (many, singly) == (
        [items[:11], 3 * 4, ""],
        [items[:11], 6 * 4, ""],
    )  # JSON, then tensors, each with its length
    assert (one, none) == ([items[:1], 4, ""], [[], 0, ""])
    assert broken == [items[:7], 3 * 4, "item 7"]


def test_columns_of_a_mesh_hear_of_an_error_after_the_same_item() -> None:
    ended = launch(4, "mesh", script=TALK)
    assert [process.returncode for process in ended] == [0] * 4, "".join(p.err for p in ended)
    assert [json.loads(process.out) for process in ended] == [[["item 26", 26]] * 4] * 4


def test_without_torchrun_nothing_is_imported_or_made() -> None:
    """A plain fit joins nobody, and costs no process group and no import of torch's elastic launcher."""
    code = (
        "import bnn.distributed as d, torch\n"
        "with d.joined() as together:\n"
        "    assert together is d.ranks() is d.ALONE and not together.several\n"
        "    assert together.pooled(torch.ones(2)).tolist() == [1, 1] and together.values(3) == [3]\n"
        "    together.wait(), together.barrier()\n"
        "assert not torch.distributed.is_initialized()\n"
    )
    clean = {name: value for name, value in os.environ.items() if name not in distributed.LAUNCHED}
    subprocess.run([sys.executable, "-c", code], check=True, env=clean, timeout=60)


@pytest.mark.parametrize(("counts", "again"), [((), False), (("0", "0", "0"), False), (("0", "0", "1"), True)])
def test_a_restart_that_one_host_counts_is_known_to_all(counts: tuple[str, ...], again: bool) -> None:
    """torchrun counts on the host whose ranks failed, and starts those of the others again without."""
    ended = launch(3, "starts", *counts, script=TALK)
    assert [json.loads(process.out) for process in ended] == [[again, again]] * 3


def test_ranks_meet_again_where_rank_0_has_not_closed_the_last_meeting_yet() -> None:
    ended = launch(3, "meets", "4", script=TALK)
    expected = [[[number, rank] for rank in range(3)] for number in range(4)]
    assert [process.returncode for process in ended] == [0, 0, 0], "".join(p.err for p in ended)
    assert [json.loads(process.out) for process in ended] == [expected] * 3


def test_a_start_that_nobody_counts_is_known_by_where_ranks_meet() -> None:
    """As where a host joins a run: torchrun's store is that of the start before, and no count goes up."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    ended = launch(2, "ends_badly", script=TALK, **place)
    assert all(process.returncode for process in ended)
    for again in (True, False):  # the second follows one that ended well
        ended = launch(2, "starts", script=TALK, **place)
        assert [json.loads(process.out) for process in ended] == [[again, again]] * 2, ended[0].err


KINDS = ("error", "killed", "stopped")


@pytest.mark.parametrize("kind", [f"{when}{kind}" for when in ("", "before a sum ", "summing ") for kind in KINDS])
def test_a_rank_that_is_lost_ends_the_others_in_time(kind: str) -> None:
    """Rank 0 knows at once where the other's connection closes, and else after the timeout of 3 seconds."""
    ended = launch(2, "silence", kind, BNN_RANKS_TIMEOUT="3", awaited=0, script=TALK)
    waited, _, said = ended[0].out.partition("\n")
    assert said.startswith("RankLost: rank 0 of 2: want ")
    assert "BNN_RANKS_TIMEOUT" in said
    assert "--resume" in said
    if kind.endswith("error"):
        assert "rank 1 ended: ValueError: no such file" in said
    if kind.endswith("stopped"):
        assert "sum" in kind or "no sign of rank 1 for 3 s" in said
        assert 2.5 < float(waited) < 8
    else:
        assert float(waited) < 2.5


@pytest.mark.parametrize("kind", ["meeting stopped", "meeting waited"])
def test_ranks_end_in_time_where_the_meeting_place_is_lost(kind: str) -> None:
    """Rank 0, which holds it, stands still with its connections open, as where a link is cut."""
    ended = launch(2, "silence", kind, BNN_RANKS_TIMEOUT="3", awaited=1, timeout=60, script=TALK)
    waited, _, said = ended[1].out.partition("\n")
    assert said.startswith("RankLost: rank 1 of 2: want "), ended[1].err
    assert 2.5 < float(waited) < 30  # and not a quarter of an hour
    if kind == "meeting waited":
        assert "no answer from where the ranks meet" in said


@pytest.mark.parametrize("seconds", ["0", "-1", "soon", "nan"])
def test_a_timeout_that_is_none_is_refused(seconds: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(distributed.TIMEOUT_NAME, seconds)
    with pytest.raises(ConfigError, match="seconds above 0"), distributed.joined():
        pass
