"""A calibration as JSON beside a bank: written whole, read with suspicion, refused for any other samples."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bnn
from bnn.bank import Bank, BankWriter
from bnn.bank import format as fmt
from bnn.errors import BankCorrupt, BankError, BankExists, BankMismatch, ConfigError
from bnn.layout import layout_of
from bnn.posthoc import FILE, Calibration, Estimate
from bnn.types import make_block

CLASSES = Calibration(
    "of-a-bank",
    {"name": "Categorical"},
    41,
    0.9,
    temperature=1.25,
    before=Estimate(0.7, 0.05),
    after=Estimate(0.625, math.nan),
    score="aps",
    limit=0.875,
    prior_shift=((0.5, 0.5), (0.25, 0.75)),
    data={"spec": "d.csv:y", "seed": 3, "share": 0.5},
)
TARGETS = Calibration("of-a-bank", {"name": "Gaussian", "scale": 1.0}, 19, 0.8, margins=(0.5, -0.25, 0.0))


def bank_of(path: Path | None, num_samples: int = 3) -> Bank:
    module = nn.Linear(4, 2)
    states = [{name: torch.full_like(p, float(s)) for name, p in module.named_parameters()} for s in range(num_samples)]
    return Bank.from_state_dicts(states, module=module, out=path)


def same(one: Calibration, other: Calibration) -> bool:
    """Equal, where a standard error that is NaN in both is equal too."""
    plain = [replace(each, after=None) for each in (one, other)]
    return plain[0] == plain[1] and repr(one.after) == repr(other.after)


@pytest.mark.parametrize("calibration", [CLASSES, TARGETS], ids=["classes", "targets"])
def test_it_goes_through_json(calibration: Calibration) -> None:
    text = json.dumps(calibration.to_config(), allow_nan=False)
    assert same(Calibration.from_config(json.loads(text)), calibration)


def test_its_task_and_quantiles() -> None:
    assert (CLASSES.task, CLASSES.quantiles) == ("classification", ())
    assert TARGETS.task == "regression"
    assert TARGETS.quantiles == pytest.approx((0.1, 0.9))


@pytest.mark.parametrize(
    ("calibration", "changes", "match"),
    [
        (CLASSES, {"temperature": 0.0}, "'temperature'.*a positive number"),
        (CLASSES, {"temperature": "1"}, "'temperature'"),
        (CLASSES, {"temperature": True}, "'temperature'"),
        (CLASSES, {"temperature": math.nan}, "'temperature'"),
        (CLASSES, {"temperature": None}, "null for a regression"),
        (CLASSES, {"score": "raps"}, "'score'.*one of lac, aps"),
        (CLASSES, {"score": ["lac"]}, "'score'"),
        (CLASSES, {"limit": None}, "'limit'"),
        (CLASSES, {"margins": [1.0]}, "'margins'.*null for classes"),
        (CLASSES, {"level": 1.0}, "'level'"),
        (CLASSES, {"num_rows": 0}, "'num_rows'"),
        (CLASSES, {"bank": 5}, "'bank'"),
        (CLASSES, {"likelihood": "Categorical"}, "'likelihood'"),
        (CLASSES, {"before": {"value": 1.0}}, "'before'"),
        (CLASSES, {"prior_shift": [[0.5, 0.5]]}, "'prior_shift'"),
        (CLASSES, {"more": 1}, "'more' beside them"),
        (TARGETS, {"margins": []}, "'margins'.*a number for each output"),
        (TARGETS, {"margins": [1.0, "2"]}, "'margins'"),
        (TARGETS, {"limit": 0.5}, "'limit'.*null for a regression"),
    ],
)
def test_values_that_mean_nothing_are_refused(calibration: Calibration, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Calibration.from_config(calibration.to_config() | changes)
    config = calibration.to_config()
    del config["level"]
    with pytest.raises(ConfigError, match="'level' missing"):
        Calibration.from_config(config)


def test_it_is_kept_beside_its_bank(tmp_path: Path) -> None:
    bank = bank_of(tmp_path / "bank")
    calibration = replace(CLASSES, bank=bank.digest)
    assert calibration.save(bank) == tmp_path / "bank" / FILE
    opened = Bank.open(tmp_path / "bank", verify="full")  # a reader of banks ignores it
    assert same(Calibration.open(opened), calibration)
    found = json.loads((tmp_path / "bank" / FILE).read_text())
    assert (found["format"], found["version"], found["bank"]) == ("bnn-calibration", 1, bank.digest)
    assert found["checksum"] == fmt.checksum(found)
    assert not [path.name for path in (tmp_path / "bank").iterdir() if path.name.startswith(".tmp-")]
    with pytest.raises(BankExists, match="a calibration, which is kept"):
        calibration.save(bank)
    other = replace(calibration, temperature=2.0)
    other.save(bank, overwrite=True)
    assert same(Calibration.open(bank), other)


def test_it_belongs_to_those_samples(tmp_path: Path) -> None:
    bank, other = bank_of(tmp_path / "bank"), bank_of(tmp_path / "other", 5)
    calibration = replace(TARGETS, bank=bank.digest)
    with pytest.raises(BankMismatch, match="another bank"):
        calibration.save(other)
    calibration.save(bank)
    (tmp_path / "other" / FILE).write_bytes((tmp_path / "bank" / FILE).read_bytes())
    with pytest.raises(BankMismatch, match=f"want the samples {bank.digest[:12]}.*got {other.digest[:12]}"):
        Calibration.open(other)
    memory = bank_of(None)
    with pytest.raises(BankMismatch, match="one in memory"):
        replace(calibration, bank=memory.digest).save(memory)
    with pytest.raises(BankMismatch, match="make one with 'bnn calibrate'"):
        Calibration.open(memory)
    (tmp_path / "other" / FILE).unlink()
    with pytest.raises(BankMismatch, match=f"want {FILE} beside it, got none"):
        Calibration.open(other)


def test_an_overwritten_bank_loses_it_and_one_that_grew_makes_it_stale(tmp_path: Path) -> None:
    module, path = nn.Linear(3, 2), tmp_path / "bank"
    layout = layout_of(module)

    def write(rows: int, **options: bool) -> Bank:
        writer = BankWriter(path, layout=layout, config={}, base={}, **options)
        params = {name: torch.randn(rows, *p.shape) for name, p in module.named_parameters()}
        block = make_block(params, chain=torch.zeros(rows, dtype=torch.int64), draw=torch.arange(rows))
        writer.append(block, {"step": rows})
        writer.close(complete=False)
        return Bank.open(path)

    bank = write(4)
    replace(CLASSES, bank=bank.digest).save(bank)
    grown = write(2, resume=True)
    assert len(grown) == 6
    with pytest.raises(BankMismatch, match="samples have come to it since; calibrate this bank again"):
        Calibration.open(grown)
    assert (path / FILE).exists()
    anew = write(5, overwrite=True)
    assert len(anew) == 5
    assert not (path / FILE).exists()


def test_a_file_that_was_altered_is_refused(tmp_path: Path) -> None:
    bank = bank_of(tmp_path / "bank")
    path = replace(CLASSES, bank=bank.digest).save(bank)
    whole = json.loads(path.read_text())

    def write(**changes: Any) -> None:
        path.write_text(json.dumps(fmt.seal({**whole, **changes}, FILE)))

    path.write_text(json.dumps({**whole, "temperature": 0.5}))
    with pytest.raises(BankCorrupt, match="checksum"):
        Calibration.open(bank)
    write(limit="all")
    with pytest.raises(BankCorrupt, match=r"calibration\.json calibration 'limit': want a number, got 'all'"):
        Calibration.open(bank)
    write(version=2)
    with pytest.raises(BankError, match="install a newer bnn-toolkit"):
        Calibration.open(bank)
    write(format="bnn-bank")
    with pytest.raises(BankCorrupt, match="bnn-calibration"):
        Calibration.open(bank)
    path.write_text("{")
    with pytest.raises(BankCorrupt, match="a JSON object"):
        Calibration.open(bank)
    assert bnn.Calibration is Calibration
