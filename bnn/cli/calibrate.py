"""bnn calibrate: temperature, conformal sets and intervals from a share of the test rows, kept beside the bank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bnn.cli import common, reading

if TYPE_CHECKING:
    from bnn.calibrating import Judged
    from bnn.posthoc import Calibration, Estimate


def calibrate(
    bank: reading.BankOption,
    data: Annotated[
        str | None,
        typer.Option(help="Data; a share of their test rows is used. [default: the bank's]", show_default=False),
    ] = None,
    share: Annotated[float, typer.Option(help="Share of the test rows to calibrate on; the rest judges it.")] = 0.5,
    level: Annotated[float, typer.Option(help="Share of new rows that a set or interval is to hold.")] = 0.9,
    sets: Annotated[str, typer.Option(help="Sets of classes: lac, small, or aps, larger for hard rows.")] = "lac",
    model: reading.Model = None,
    split: reading.Split = None,
    prior_shift: reading.PriorShift = False,
    device: reading.Device = "cpu",
    residency: reading.Residency = "mapped",
    host_budget: reading.HostBudget = None,
    device_budget: reading.DeviceBudget = None,
    cache: reading.Cache = None,
    data_root: common.DataRoot = None,
    seed: common.Seed = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the calibration beside the bank.")] = False,
    trust: common.Trust = False,
    allow_other_device: reading.AllowOtherDevice = False,
    config: common.Config = None,
    debug: common.Debug = False,
) -> None:
    """Calibrate the predictive of a bank on a share of the test rows, and keep that as calibration.json beside it."""
    del config, debug
    from bnn import calibrating, posthoc
    from bnn.data import held_out
    from bnn.errors import BankExists, choose
    from bnn.functional import FunctionalModel
    from bnn.posthoc.conformal import SCORES, check_level

    choose("--sets", sets, tuple(SCORES))
    check_level(level)
    common.check_device(device)
    opened = reading.open_bank(
        bank,
        residency=residency,
        device=device,
        host_budget=host_budget,
        device_budget=device_budget,
        cache=cache,
        allow_other_device=allow_other_device,
    )
    assert opened.path is not None
    if (opened.path / posthoc.FILE).exists() and not overwrite:
        raise BankExists(
            str(opened.path / posthoc.FILE),
            want="nothing there",
            got="a calibration, which is kept",
            fix="say --overwrite",
        )
    module = common.module_of(opened, model=model, trust=trust)
    dataset = common.data_of(opened, data=data, root=data_root, split=split, trust=trust)
    shares = common.class_shares(opened) if prior_shift else None
    rows, rest = held_out(dataset, share=share, seed=seed)
    net = FunctionalModel(module, opened, device=device).settled()
    found = calibrating.calibrate(net, rows[:2], level=level, score=sets, prior_shift=shares)  # type: ignore[arg-type]
    kept = ("spec", "split", "sha256")
    about = {key: dataset.record[key] for key in kept} | {
        "part": "test",
        "share": share,
        "seed": seed,
        "of": len(dataset.test.y),
    }
    found = replace(found, data=about)
    judged = calibrating.judge(
        net, rest[:2], found, prior_shift=shares, loc=dataset.units.loc, scale=dataset.units.scale
    )
    path = found.save(opened, overwrite=overwrite)
    typer.echo("\n".join(_told(path, found, judged)))


def _told(path: Path, found: Calibration, judged: Judged) -> list[str]:
    """What was fitted, and what it does on the rest of the test rows."""

    def figure(estimate: Estimate | None) -> str:
        return "" if estimate is None else f"{estimate.value:.4f} ± {estimate.standard_error:.4f}"

    lines = [f"{path}: {found.num_rows} of {found.data['of']} test rows, seed {found.data['seed']}"]
    if found.temperature is not None:
        lines += [
            f"temperature  {found.temperature:.4f}",
            f"sets         {found.score}, each score at most {found.limit:.4f}",
            f"on the other {judged.num_rows} test rows:",
            f"nll          {figure(judged.before)}, tempered {figure(judged.after)}",
            f"coverage     {figure(judged.coverage)}, asked for {found.level:g}",
            f"set size     {figure(judged.size)}",
        ]
    else:
        lines += [
            f"margins      {', '.join(f'{margin:.4f}' for margin in found.margins or ())}, in standard deviations of the target",
            f"on the other {judged.num_rows} test rows:",
            f"coverage     {figure(judged.uncalibrated_coverage)}, calibrated {figure(judged.coverage)}, asked for {found.level:g}",
            f"width        {figure(judged.uncalibrated_size)}, calibrated {figure(judged.size)}",
        ]
    lines.append(
        "Judge the calibrated predictive on those other rows: bnn.data.held_out with this share and seed gives them."
    )
    return lines
