"""What many ranks would take: calls against closed forms, paces by a clock, and what is lost to what."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bnn
from bnn import scaling
from bnn.errors import ConfigError
from bnn.evaluation.views import views_of
from bnn.inference import HMC, SWAG, Guide, Prior
from bnn.layout import Entry, Layout
from bnn.scaling import Pace, fit_calls, paces, plan_ranks, planned_views, share_of
from bnn.traffic import Call, Network, count, counted, network_of, talk_of
from bnn.types import make_block


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 5, 8, 64, 1024])
def test_a_ring_sends_as_if_every_rank_passed_its_share_on(num_ranks: int) -> None:
    """Against the algorithms played out: which share each rank sends at each turn, and who has heard of whom."""
    size, network = 960 * 1024, Network(bandwidth=1e6, latency=1e-3)
    ring = sum(size / num_ranks for _ in range(2) for _ in range(num_ranks - 1))
    gather = sum(size for _ in range(num_ranks - 1))
    informed, turns = 1, 0
    while informed < num_ranks:
        informed, turns = 2 * informed, turns + 1
    # Two tell each other their summands, and up to four what is to be gathered: as many bytes, all of them at once.
    expected = {
        "all_reduce": (1 if num_ranks == 2 else 2 * (num_ranks - 1), ring),
        "all_gather": (1 if num_ranks <= 4 else num_ranks - 1, gather),
    }
    expected["broadcast"] = turns, turns * size
    for kind, (messages, sent) in expected.items():
        call = Call(kind, size)  # type: ignore[arg-type]
        assert call.messages(num_ranks) == messages
        assert call.sent(num_ranks) == pytest.approx(sent)
        assert call.seconds(num_ranks, network) == pytest.approx(messages * 1e-3 + sent / 1e6)


def test_calls_are_counted_where_somebody_counts() -> None:
    count("broadcast", 5)
    with counted() as outer:
        count("all_reduce", 7)
        with counted() as inner:
            count("all_reduce", 11)
        count("all_reduce", 13)
    count("broadcast", 5)
    assert (outer.calls, outer.payload) == ({"all_reduce": 2}, {"all_reduce": 20})
    assert (inner.calls, inner.payload) == ({"all_reduce": 1}, {"all_reduce": 11})
    assert talk_of([Call("all_reduce", 5)], 1, Network()) == (0, 0, 0.0, 0.0)


def test_a_fit_says_in_closed_form() -> None:
    """Of P = 7 numbers of 4 bytes: a guide's slope and height, and its 3 x 14 parameters and moments; the meetings of HMC; what ChEES asks of each trajectory."""
    guide = fit_calls(Guide(num_steps=101), 6, num_values=7, itemsize=4, num_parameters=14)
    assert (guide.step, guide.num_steps) == ([Call("all_reduce", 4 * 8)], 101)
    assert (guide.edge, guide.num_edges) == ([Call("broadcast", 4 * 42)], 3)
    pair = Guide(variance_reduction="antithetic")
    assert fit_calls(pair, 6, num_values=7, itemsize=4).step == [Call("all_reduce", 4 * 15)]
    for chains, ranks, most in ((8, 3, 3), (64, 64, 1), (5, 8, 1)):
        plain = HMC(num_chains=chains, trajectory="fixed")
        found = fit_calls(plain, ranks, num_values=7, itemsize=4)
        assert sum(call.payload for call in found.step) == 8 + 4 * 8 + 1
        assert found.num_steps == 8  # after 1, 3, 7, ..., 127 and 200 trajectories
        assert sum(call.payload for call in found.edge) == 3 * 8 + 2 * most * 7 * 4
        chees = fit_calls(HMC(num_chains=chains, trajectory="chees"), ranks, num_values=7, itemsize=4)
        assert sum(call.payload for call in chees.step) == 7 * 8 + 4 * most * 7 * 4 + 3 * most * 8
        more = sum(call.payload for call in chees.once) - sum(call.payload for call in found.once)
        assert more == 8 * (8 + 4 * 8 + 1) + 8 + most * 7 * 4 + 8 + most * 8  # its meetings, positions and common step
    slow = fit_calls(HMC(num_chains=5, num_warmup=50), 2, num_values=7, itemsize=4, trajectory_seconds=1.0)
    assert slow.num_steps == 26  # after 1, 3, 5, ..., 49 and 50
    assert fit_calls(Prior(), 3, num_values=7, itemsize=4).step == []
    low = fit_calls(HMC(num_chains=4, mass="low-rank", rank=3), 2, num_values=7, itemsize=4).edge
    assert low[-1].payload == 2 * (20 * 3 // 4 + 1) * 7 * 4


@pytest.mark.parametrize(("num_samples", "num_chains"), [(1, 1), (7, 1), (60, 3), (600, 5), (90, 45), (520, 40)])
def test_views_of_a_plan_are_as_many_as_those_of_its_bank(num_samples: int, num_chains: int) -> None:
    block = make_block(
        {"weight": torch.zeros(num_samples, 2)},
        chain=torch.arange(num_samples) // (num_samples // num_chains),
        draw=torch.arange(num_samples) % (num_samples // num_chains),
    )
    bank = bnn.Bank.from_blocks([block], layout=Layout((Entry("weight", (2,), torch.float32),), {}), info={})
    found, expected = planned_views(num_samples, num_chains), views_of(bank)
    assert (found.num_views, found.left_out, found.sizes) == (
        expected.num_views,
        expected.left_out,
        expected.sizes,
    )


def test_the_busiest_rank_has_the_larger_part() -> None:
    share = share_of(HMC(num_chains=20), 200, 50, 8)
    assert (share.parts, share.most, share.num_samples) == (20, 3, 30)
    assert share.method.learns_length  # type: ignore[attr-defined]  # as the twenty do
    assert not share_of(HMC(num_chains=6), 60, 50, 4).method.learns_length  # type: ignore[attr-defined]
    share = share_of(Guide(batch_size=128), 5, 50, 8)
    assert (share.parts, share.most, share.method.batch_size) == (50, 7, 7)  # type: ignore[attr-defined]
    assert share_of(Prior(), 11, 50, 3)[1:4] == (4, 11, 4)
    with pytest.raises(ConfigError, match="SWAG on 2 ranks"):
        share_of(SWAG(), 4, 50, 2)
    with pytest.raises(ConfigError, match="ranks: want at least 1, got 0"):
        share_of(HMC(), 4, 50, 0)


class Clock:
    now = 0.0

    @staticmethod
    def perf_counter() -> float:
        return Clock.now


def marks(*told: tuple[float, str, int, int]) -> Iterator[Any]:
    for second, name, step, num_steps in told:
        Clock.now = second
        yield {"step": step, "num_steps": 99, "phase": {"name": name, "step": step, "num_steps": num_steps}}


def test_paces_leave_out_what_comes_before_the_first_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "time", Clock)
    run = (30.0, "climb", 50, 1000), (31.0, "climb", 100, 1000), (31.5, "warm-up", 1, 9), (32.5, "warm-up", 3, 9)
    Clock.now = 0.0
    found = paces(marks(*run), 40.0)
    assert found == {"climb": Pace(0.02, 1000), "warm-up": Pace(0.5, 9)}
    Clock.now = 0.0
    assert set(paces(marks(*run), 31.2)) == {"climb", "warm-up"}
    Clock.now = 0.0
    assert set(paces(marks(*run), 0.0)) == {"climb"}  # two states are a pace
    Clock.now = 0.0
    assert set(paces(marks(*run), 40.0, most=100)) == {"climb"}


def test_time_is_lost_to_what_breaks_first() -> None:
    """Ten chains on four ranks: 6 s of work for the three of one; 4 s alone would be an even share of 16."""
    method = HMC(num_chains=10, num_warmup=100, trajectory="fixed", init="prior", step_size=0.1, mass="unit")
    share, calls = share_of(method, 100, 50, 4), fit_calls(method, 4, num_values=7, itemsize=4)
    whole, own = {"warm-up": Pace(0.16, 100)}, {"warm-up": Pace(0.06, 100), "sampling": Pace(1.0, 10)}
    network = Network(bandwidth=1e6, latency=1e-3)
    found = plan_ranks(share, whole, own, calls, 4, network=network, write_seconds=2.0, all_phases=False)
    step = (1 + 1 + 2) * 1e-3 + (3 * 8 + 3 * 32 + 2 * 1) / 1e6
    assert found.step.seconds == pytest.approx(step)
    assert found.step.sent == 3 * 8 + 3 * 32 + 2
    lost = {loss.name: loss.seconds for loss in found.losses}
    assert lost["uneven"] == pytest.approx(6.0 * (1 - 10 / 12))
    assert lost["fixed"] == pytest.approx(6.0 * 10 / 12 - 4.0)
    assert lost["disk"] == pytest.approx(2.0 * 3 / 4)
    assert lost["talk"] == pytest.approx(found.talk.seconds)
    assert found.talk.seconds > 8 * step  # of as many meetings
    assert found.losses[0].name == "disk"
    assert found.seconds == pytest.approx(18.0 / 4 + sum(lost.values()))
    assert found.efficiency == pytest.approx(18.0 / (4 * found.seconds))
    assert found.at_least
    idle = plan_ranks(share_of(method, 100, 50, 64), whole, own, calls, 64, network=network)
    assert "only 10 chains, 54 ranks idle" in {loss.told for loss in idle.losses}


@pytest.mark.parametrize(
    ("bandwidth", "latency"), [(0.0, 0.0), (-1.0, 0.1), (math.inf, 0.1), (1.0, -0.1), (1.0, math.nan)]
)
def test_a_network_that_cannot_be_is_refused(bandwidth: float, latency: float) -> None:
    with pytest.raises(ConfigError):
        network_of(bandwidth, latency)
    assert network_of(5.0, 0.0) == Network(5.0, 0.0)


def test_the_page_says_what_the_model_says() -> None:
    page = (Path(__file__).parent.parent / "docs" / "beyond-one-machine.md").read_text(encoding="utf-8")
    methods: dict[str, Any] = {
        "HMC, a meeting in warm-up": HMC(num_chains=1024, trajectory="jittered"),
        "HMC with ChEES, a trajectory of warm-up": HMC(num_chains=1024, trajectory="chees"),
        "mean-field, a step": Guide(),
    }
    for name, method in methods.items():
        for ranks in (8, 64, 1024):
            calls = fit_calls(method, ranks, num_values=100_000, itemsize=4)
            talk = talk_of(calls.step, ranks, Network())
            cells = f"{ranks:,} | {talk.payload:,} | {talk.sent:,.0f} | {talk.seconds * 1e3:,.1f} ms"
            assert f"| {name} | {cells} |" in page
