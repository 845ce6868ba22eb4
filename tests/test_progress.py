"""Bars on stderr: one a phase, none where nobody looks."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from scenarios import linear_regression

from bnn import progress
from bnn.errors import FitError
from bnn.fitting import fit
from bnn.inference.hmc import HMC, sample
from bnn.inference.starting import CLIMB_STEPS
from bnn.progress import with_progress
from bnn.types import State


class Terminal(io.StringIO):
    """Stands in for stderr; whether anybody looks at it is said."""

    def __init__(self, looked_at: bool) -> None:
        super().__init__()
        self.looked_at = looked_at

    def isatty(self) -> bool:
        return self.looked_at


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by two seconds each time that a bar looks at it, so that no run is too short to be shown."""
    ticks = iter(range(0, 10**9, 2))
    monkeypatch.setattr("tqdm.std.time", lambda: float(next(ticks)))


def state_of(step: int, total: int, phase: tuple[str, int, int] | None = None, **info: float) -> State:
    plain: State = {"step": step, "num_steps": total, "info": info}
    return plain if phase is None else plain | {"phase": dict(zip(("name", "step", "num_steps"), phase, strict=True))}


def two_phases() -> Iterator[tuple[str, State]]:
    for step in range(1, 6):
        yield f"warm {step}", state_of(step, 8, ("warm-up", step, 5), acceptance=0.123456)
    for step in range(1, 4):
        yield f"draw {step}", state_of(5 + step, 8, ("sampling", step, 3), acceptance=0.75)


class Bar:
    """A bar that remembers: its title, how far it came, whether it was closed."""

    made: ClassVar[list[Bar]] = []

    def __init__(self, **options: Any) -> None:
        self.options, self.n, self.total, self.closed, self.told = options, options.get("initial", 0), None, False, {}  # type: ignore[var-annotated]
        Bar.made.append(self)

    def update(self, steps: int) -> None:
        assert not self.closed
        assert steps >= 0
        self.n += steps

    def set_postfix(self, told: dict[str, str], refresh: bool) -> None:
        self.told = told

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Bar]:
    monkeypatch.setattr(progress, "tqdm", Bar)
    monkeypatch.setattr(Bar, "made", [])
    return Bar.made


def test_pairs_pass_through_untouched() -> None:
    expected = list(two_phases())
    for shown in (True, False, None):
        assert list(with_progress(two_phases(), "hmc", shown)) == expected


def test_each_phase_has_a_bar_of_its_own(bars: list[Bar]) -> None:
    run = with_progress(two_phases(), "hmc", True)
    for _ in range(6):
        next(run)
    assert [bar.options["desc"] for bar in bars] == ["hmc warm-up", "hmc sampling"]
    assert [(bar.n, bar.total, bar.closed) for bar in bars] == [(5, 5, True), (1, 3, False)]
    assert [bar.told for bar in bars] == [{"acceptance": "0.123"}, {"acceptance": "0.75"}]
    list(run)
    assert [(bar.n, bar.total, bar.closed) for bar in bars] == [(5, 5, True), (3, 3, True)]


def test_a_run_without_phases_has_one_bar(bars: list[Bar]) -> None:
    run = [("a", state_of(10, 30, loss=1.0)), ("b", state_of(25, 30, loss=0.5))]
    assert list(with_progress(run, "svi", None)) == run
    (bar,) = bars
    assert (bar.options["desc"], bar.n, bar.total, bar.closed) == ("svi", 25, 30, True)
    assert bar.options["disable"] is None  # tqdm then asks whether stderr is a terminal


def test_bars_close_when_the_run_fails_and_when_nobody_goes_on(bars: list[Bar]) -> None:
    def failing() -> Iterator[tuple[str, State]]:
        yield from two_phases()
        raise FitError("hmc", want="a", got="b", fix="c")

    with pytest.raises(FitError):
        list(with_progress(failing(), "hmc", True))
    assert [bar.closed for bar in bars] == [True, True]
    run = with_progress(two_phases(), "hmc", True)
    next(run)
    assert not bars[-1].closed
    run.close()  # type: ignore[attr-defined]
    assert bars[-1].closed
    interrupted = with_progress(two_phases(), "hmc", True)
    next(interrupted)
    with pytest.raises(KeyboardInterrupt):
        interrupted.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    assert bars[-1].closed


def test_a_run_that_goes_on_does_not_count_what_was_done_before_in_its_speed(bars: list[Bar]) -> None:
    """Else the first step of it would seem to have been five hundred, and the time left next to nothing."""
    rest = [("draw", state_of(step, 1000, ("sampling", step, 1000))) for step in (500, 501, 502)]
    list(with_progress(rest, "hmc", True))
    (bar,) = bars
    assert bar.options["initial"] in (499, 500)
    assert bar.n == 502


def test_a_run_without_steps_opens_no_bar(bars: list[Bar]) -> None:
    assert list(with_progress([], "hmc", True)) == []
    assert bars == []


@pytest.mark.parametrize(
    ("looked_at", "shown", "written"),
    [(True, None, True), (False, None, False), (True, False, False), (False, False, False), (False, True, True)],
)
def test_bars_are_for_terminals_unless_asked_for(
    hurried: None, monkeypatch: pytest.MonkeyPatch, looked_at: bool, shown: bool | None, written: bool
) -> None:
    stderr = Terminal(looked_at)
    monkeypatch.setattr("sys.stderr", stderr)
    list(with_progress(two_phases(), "hmc", shown))
    text = stderr.getvalue()
    assert bool(text) == written
    if written:
        assert re.search(r"hmc warm-up: 100%.*5/5", text)
        assert re.search(r"hmc sampling: 100%.*3/3.*acceptance=0.75", text)
        assert "step" in text
        assert text.endswith("\n")  # what is printed next begins a line


def test_fits_and_samples_show_climb_warm_up_and_sampling(
    hurried: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = linear_regression()
    method = HMC(num_chains=2, num_warmup=20, num_steps=2, thin=2)
    for looked_at in (True, False):
        stderr = Terminal(looked_at)
        monkeypatch.setattr("sys.stderr", stderr)
        fit(case.model, case.data, method=method, num_samples=6)
        text = stderr.getvalue()
        found = [name for name in ("climb: 100%", "warm-up: 100%", "sampling: 100%") if f"hmc {name}" in text]
        assert len(found) == (3 if looked_at else 0)
        if looked_at:
            assert f"{CLIMB_STEPS}/{CLIMB_STEPS}" in text
            assert "20/20" in text
            assert "3/3" in text  # draws a chain, of two trajectories each
            assert "6/6" not in text
            assert "draw/s" in text
            for told in ("acceptance=", "step_size=", "divergences="):
                assert told in text
        else:
            assert text == ""
    stderr = Terminal(True)
    monkeypatch.setattr("sys.stderr", stderr)
    sample(lambda u: -u.square().sum(), torch.zeros(2, 3), num_draws=5, num_warmup=20, progress=False)
    assert stderr.getvalue() == ""
    sample(lambda u: -u.square().sum(), torch.zeros(2, 3), num_draws=5, num_warmup=20)
    assert "hmc sampling: 100%" in stderr.getvalue()
    assert capsys.readouterr().out == ""
