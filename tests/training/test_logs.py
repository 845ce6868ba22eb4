"""What a run writes while it goes on: the curve as CSV, and TensorBoard events read back with TensorBoard's own reader."""

from __future__ import annotations

import builtins
import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from scenarios import classifier
from torch import Tensor

from bnn.bank import Bank
from bnn.errors import ConfigError
from bnn.fitting import fit
from bnn.functional import FunctionalModel
from bnn.inference import Prior
from bnn.modules import build
from bnn.training import distil

EPOCHS, STEPS = 6, 5  # 23 rows in batches of 5


def run(out: Path, **options: Any) -> Bank:
    model, (x, y) = classifier()
    bank = fit(model, (x, y), method=Prior(), num_samples=3)
    net, student = FunctionalModel(model.module, bank), build("mlp:6", input_shape=[4], num_outputs=3, seed=2)
    given = {"held_out": (x, y), "num_epochs": EPOCHS, "batch_size": 5, "seed": 1, **options}
    return distil(student, net, (x, y), out=out, **given)


def read_curve(folder: Path) -> list[dict[str, str]]:
    with (folder / "curve.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@contextmanager
def cut_after(step: int) -> Iterator[None]:
    """Ctrl-C once the state of this step has come."""

    def cut(producer: Any, *_: Any) -> Iterator[Any]:
        for block, state in producer:
            yield block, state
            if state["step"] == step and state["num_steps"] == EPOCHS * STEPS:
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bnn.fitting.with_progress", cut)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.fixture(autouse=True)
def state_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bnn.training.loop.STEPS_PER_STATE", 1)


@pytest.fixture
def written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curve and commits with every state, as in a run of many hours they would come now and then."""
    monkeypatch.setattr("bnn.training.logs.CURVE_SECONDS", -1.0)
    monkeypatch.setattr("bnn.bank.writer.STATE_SECONDS", -1.0)


# CSV


def test_the_curve_is_a_row_an_epoch(tmp_path: Path) -> None:
    run(tmp_path / "s")
    rows = read_curve(tmp_path / "s")
    assert list(rows[0]) == ["epoch", "loss", "lr", "held_out_nll", "held_out_accuracy", "held_out_kl"]
    assert [row["epoch"] for row in rows] == [str(epoch) for epoch in range(1, EPOCHS + 1)]
    rates = [0.003 * 0.01 ** ((epoch * STEPS - 1) / (EPOCHS * STEPS)) for epoch in range(1, EPOCHS + 1)]
    assert [float(row["lr"]) for row in rows] == pytest.approx(rates)
    assert b"\r\n" in (tmp_path / "s" / "curve.csv").read_bytes()  # as RFC 4180 has it


def test_the_curve_follows_the_run(tmp_path: Path, written_at_once: None) -> None:
    """While it goes on the file holds the epochs so far: nothing of the epoch in hand, nothing less."""
    found = []

    def watch(producer: Any, *_: Any) -> Iterator[Any]:
        for block, state in producer:
            curve = tmp_path / "s" / "curve.csv"
            found.append((state["step"], len(read_curve(tmp_path / "s")) if curve.exists() else None))
            yield block, state

    run(tmp_path / "warm")  # its bank is fitted under the patch as well, so that only the run itself is looked at
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bnn.fitting.with_progress", watch)
        run(tmp_path / "s")
    steps = found[1:]  # without the bank's own
    assert steps[0] == (1, None)  # no bank was begun yet
    assert steps[1:] == [(step, step // STEPS) for step in range(2, EPOCHS * STEPS + 1)]
    assert len(read_curve(tmp_path / "s")) == EPOCHS


def test_a_resumed_run_leaves_the_whole_curve(tmp_path: Path, written_at_once: None) -> None:
    whole = run(tmp_path / "whole")
    with cut_after(13):
        run(tmp_path / "broken")
    assert len(read_curve(tmp_path / "broken")) == 2
    resumed = run(tmp_path / "broken", resume=True)
    assert read_curve(tmp_path / "broken") == read_curve(tmp_path / "whole")
    assert torch.equal(resumed[0]["1.weight"], whole[0]["1.weight"])


def test_overwrite_begins_a_new_curve(tmp_path: Path) -> None:
    run(tmp_path / "s")
    run(tmp_path / "s", num_epochs=2, held_out=None, overwrite=True)
    assert [list(row) for row in read_curve(tmp_path / "s")] == [["epoch", "loss", "lr"]] * 2


# TensorBoard


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of every tag, in the order in which TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(one.step, one.value) for one in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def expected(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What the curve of the folder says, as float32, which events hold."""
    rows = read_curve(folder)
    tags = [name for name in rows[0] if name != "epoch"]
    return {tag: [(int(row["epoch"]), float(torch.tensor(float(row[tag])))) for row in rows] for tag in tags}


@pytest.fixture
def tensorboard(oracle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of one second and process are told apart by a counter and read in the order of their names: 10 before 9."""
    writer = oracle("tensorboard.summary.writer.event_file_writer")
    monkeypatch.setattr(writer, "_global_uid", writer.AtomicCounter(0))


def test_events_are_the_curve(tmp_path: Path, tensorboard: None) -> None:
    run(tmp_path / "s", log="tensorboard")
    assert len(read_curve(tmp_path / "s")) == EPOCHS  # the CSV file is there as well
    assert events(tmp_path / "s") == expected(tmp_path / "s")


def test_csv_alone_writes_no_events(tmp_path: Path, tensorboard: None) -> None:
    run(tmp_path / "s")
    assert events(tmp_path / "s") == {}


@pytest.mark.parametrize("cuts", [[7], [10], [4], [8, 21], [11, 14, 15]])
def test_a_resumed_run_shows_every_epoch_once(
    tmp_path: Path, tensorboard: None, written_at_once: None, cuts: list[int]
) -> None:
    for number, cut in enumerate(cuts):
        with cut_after(cut):
            run(tmp_path / "s", log="tensorboard", resume=number > 0)
    run(tmp_path / "s", log="tensorboard", resume=True)
    assert events(tmp_path / "s") == expected(tmp_path / "s")


@pytest.mark.parametrize("cut", [7, 12])
def test_epochs_that_were_committed_but_not_yet_written_are_not_lost(
    tmp_path: Path, tensorboard: None, cut: int
) -> None:
    """Curves are written every other second: an interruption commits a state with epochs that no event holds yet."""
    with cut_after(cut):
        run(tmp_path / "s", log="tensorboard")
    run(tmp_path / "s", log="tensorboard", resume=True)
    assert events(tmp_path / "s") == expected(tmp_path / "s")


def test_epochs_that_were_written_but_not_committed_come_once(
    tmp_path: Path, tensorboard: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the events of epoch 4, with a commit of epoch 1: epochs 2 to 4 are taken again and replace those."""
    monkeypatch.setattr("bnn.training.logs.CURVE_SECONDS", -1.0)
    committed = []

    def killed(writer: Any, **_: Any) -> None:
        committed.append(1)

    with pytest.MonkeyPatch.context() as patch, cut_after(21):
        from bnn.bank import BankWriter

        append, commit = BankWriter.append, BankWriter.commit

        def append_and_commit(writer: BankWriter, block: Any, state: Any = None) -> None:
            append(writer, block, state)
            if state["step"] == STEPS + 2:
                commit(writer)

        patch.setattr(BankWriter, "append", append_and_commit)
        patch.setattr(BankWriter, "commit", killed)  # as if there had been no time for it
        run(tmp_path / "s", log="tensorboard")
    assert committed  # Ctrl-C did try
    assert [step for step, _ in events(tmp_path / "s")["loss"]] == [1, 2, 3, 4]
    run(tmp_path / "s", log="tensorboard", resume=True)
    assert events(tmp_path / "s") == expected(tmp_path / "s")


def test_overwrite_takes_old_events_away(tmp_path: Path, tensorboard: None) -> None:
    run(tmp_path / "s", log="tensorboard")
    run(tmp_path / "s", log="tensorboard", num_epochs=2, overwrite=True)
    found = events(tmp_path / "s")
    assert [step for step, _ in found["loss"]] == [1, 2]
    assert found == expected(tmp_path / "s")
    run(tmp_path / "s", num_epochs=2, overwrite=True)
    assert events(tmp_path / "s") == {}


def test_the_log_may_be_another_after_a_resume(tmp_path: Path, tensorboard: None, written_at_once: None) -> None:
    """Begun without events, gone on with them: those show the whole run."""
    with cut_after(12):
        run(tmp_path / "s")
    run(tmp_path / "s", log="tensorboard", resume=True)
    assert events(tmp_path / "s") == expected(tmp_path / "s")


def test_without_the_package_the_log_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match="log='tensorboard': want the package tensorboard, got none"):
        run(tmp_path / "s", log="tensorboard")
    assert list(tmp_path.iterdir()) == []
    assert isinstance(run(tmp_path / "s")[0]["1.weight"], Tensor)
