"""bnn predict: what a bank says of new rows, as a table with uncertainties, intervals or sets, and whom to ask instead."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from bnn.cli import common, reading
from bnn.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from bnn.cli.tables import Columns
    from bnn.distributed import Ranks
    from bnn.functional import FunctionalModel
    from bnn.newrows import NewRows
    from bnn.posthoc import Calibration
    from bnn.predictive import ClassPredictive, TargetPredictive

LEVEL = 0.9


class _Asked(NamedTuple):
    """What is wanted of each row."""

    level: float
    calibration: Calibration | None
    abstain_above: float | None
    classes: list[str] | None
    shares: tuple[list[float], list[float]] | None
    loc: Tensor
    scale: Tensor


class _Counts:
    """Rows written, and those of them to abstain on."""

    def __init__(self) -> None:
        self.rows = self.abstained = 0


def predict(
    bank: reading.BankOption,
    data: Annotated[str, typer.Option(help="New rows: FILE.csv, with or without the target, or FILE.npz with x.")],
    out: Annotated[Path, typer.Option(help="Table to write: FILE.csv or FILE.parquet.", metavar="FILE")],
    level: Annotated[
        float | None,
        typer.Option(help="Level of intervals. [default: 0.9, or that of the calibration]", show_default=False),
    ] = None,
    calibrated: Annotated[
        bool, typer.Option("--calibrated", help="Use the calibration.json of 'bnn calibrate' beside the bank.")
    ] = False,
    abstain_above: Annotated[
        float | None,
        typer.Option(help="Abstain where total uncertainty is larger. [default: see the guide]", show_default=False),
    ] = None,
    model: reading.Model = None,
    base: reading.Base = None,
    prior_shift: reading.PriorShift = False,
    mesh: reading.Mesh = None,
    device: reading.Device = "cpu",
    residency: reading.Residency = "mapped",
    host_budget: reading.HostBudget = None,
    device_budget: reading.DeviceBudget = None,
    cache: reading.Cache = None,
    data_root: common.DataRoot = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file at --out.")] = False,
    trust: common.Trust = False,
    allow_other_device: reading.AllowOtherDevice = False,
    config: common.Config = None,
    debug: common.Debug = False,
) -> None:
    """Predict new rows under all samples of a bank, and write a table."""
    del config, debug
    import torch

    from bnn.cli.tables import check_out, write_table
    from bnn.distributed import ranks
    from bnn.functional import FunctionalModel
    from bnn.newrows import new_rows
    from bnn.posthoc import Calibration

    common.check_device(device)
    together = ranks()
    shape = reading.mesh_of(mesh)
    if together.rank == 0:
        # After a restart too: the file may be one that the first start refused to replace.
        check_out(out, overwrite=overwrite)
    opened = reading.open_bank(
        bank,
        residency=residency,
        device=device,
        host_budget=host_budget,
        device_budget=device_budget,
        cache=cache,
        allow_other_device=allow_other_device,
    )
    record = common.record_of(opened)
    calibration = _calibration(opened, Calibration, base) if calibrated else None
    _check_options(record["task"], level, calibration, abstain_above)
    module = common.module_of(opened, model=model, base=base, trust=trust)
    rows = new_rows(
        _file(data, record, data_root),
        record,
        input_shape=opened.info["model"]["options"]["input_shape"],
    )
    target = record["target"]
    asked = _Asked(
        level if level is not None else LEVEL if calibration is None else calibration.level,
        calibration,
        abstain_above,
        record["classes"],
        common.class_shares(opened) if prior_shift else None,
        torch.zeros(()) if target is None else torch.tensor(target["loc"], dtype=torch.float64),
        torch.ones(()) if target is None else torch.tensor(target["scale"], dtype=torch.float64),
    )
    counts = _Counts()
    net = FunctionalModel(module, opened, device=device).settled()
    if together.several:
        _check_ranks(net, _file(data, record, data_root), asked, shape, together)
    tables = _tables(net, rows, asked, counts, *together.placed(shape))
    if together.rank:
        for _ in tables:
            pass  # rank 0 writes
        return
    write_table(out, tables)
    typer.echo(f"{out}: {counts.rows} rows, {counts.abstained} of them to abstain on")


def _calibration(bank: Any, kind: Any, base: Path | None) -> Calibration:
    if base is not None:
        raise ConfigError(
            "--calibrated",
            want="the values that the bank was calibrated with",
            got=f"--base {base}",
            fix="leave out one",
        )
    found: Calibration = kind.open(bank)
    return found


def _check_options(
    task: str, level: float | None, calibration: Calibration | None, abstain_above: float | None
) -> None:
    """Raise ConfigError for flags that mean nothing here."""
    if level is not None and not 0.0 < level < 1.0:
        raise ConfigError("--level", want="a number between 0 and 1", got=str(level), fix="such as 0.9")
    if level is not None and calibration is not None and level != calibration.level:
        raise ConfigError(
            "--level",
            want=f"{calibration.level:g}, which the bank was calibrated for",
            got=f"{level:g}",
            fix="leave it out, or say bnn calibrate --level with it",
        )
    if level is not None and calibration is None and task == "classification":
        raise ConfigError(
            "--level", want="--calibrated beside it, for sets of classes", got="none", fix="leave it out, or say both"
        )
    if abstain_above is not None and math.isnan(abstain_above):
        raise ConfigError("--abstain-above", want="a number", got="NaN", fix="in nats for classes, else a variance")


def _file(data: str, record: dict[str, Any], data_root: str | None) -> Path:
    return Path(data_root or ".") / _file_of(data, record)


def _check_ranks(
    net: FunctionalModel, path: Path, asked: _Asked, mesh: tuple[int, int] | None, together: Ranks
) -> None:
    """Raise ConfigError on every rank unless all have the same bank, module, file and options."""
    import hashlib

    from bnn.evaluation.mesh import check_ranks

    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    options = asked._asdict()
    options["calibration"] = None if asked.calibration is None else repr(asked.calibration)
    check_ranks(net, {}, {**options, "mesh": mesh, "file": digest}, together)


def _file_of(data: str, record: dict[str, Any]) -> str:
    """The file that `--data` names: `FILE.csv:TARGET` of the fit's target is FILE.csv."""
    path, _, target = data.rpartition(":")
    if path.endswith(".csv") and target == str(record["spec"]).rpartition(":")[2]:
        return path
    return data


def _tables(
    net: FunctionalModel, rows: NewRows, asked: _Asked, counts: _Counts, column: Ranks, row: Ranks
) -> Iterator[Columns]:
    """The columns of each batch, in order on all ranks: those of a column predict them in turn, those of a row together."""
    import numpy as np
    import torch
    from tqdm import tqdm

    from bnn.posthoc.calibration import quantiles_of
    from bnn.predictive import ClassPredictive, predict
    from bnn.turns import in_turn

    def columns_of(x: Tensor) -> dict[str, Any]:
        found = predict(
            net, x, prior_shift=asked.shares, loc=asked.loc, scale=asked.scale, quantiles=_levels(net, asked),
            calibration=asked.calibration, ranks=row, mesh=(1, row.world_size),
        )  # fmt: skip
        if isinstance(found, ClassPredictive):
            columns = _class_columns(found, asked)
        else:
            columns = _target_columns(found, asked, quantiles_of(asked.level))
        state = {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in columns.items()}
        return {**state, "@names": list(columns)}  # in their order, which tensors and lists do not travel in

    disable = None if column.rank == row.rank == 0 else True
    with tqdm(total=rows.total, desc="predict", unit="row", delay=1.0, disable=disable) as bar:
        for state in in_turn(rows.batches, columns_of, column, row):
            names = state["@names"]
            columns = {n: state[n].numpy() if isinstance(state[n], torch.Tensor) else state[n] for n in names}
            size = len(columns["abstain"])
            first = np.arange(counts.rows, counts.rows + size)
            counts.rows += size
            counts.abstained += int(columns["abstain"].sum())
            yield {"row": first, **columns}
            bar.update(size)


def _levels(net: FunctionalModel, asked: _Asked) -> tuple[float, ...]:
    from bnn.likelihoods import likelihood_from_config
    from bnn.posthoc.calibration import quantiles_of

    is_regression = likelihood_from_config(net.bank.info.get("likelihood")).task == "regression"
    return quantiles_of(asked.level) if is_regression and asked.calibration is None else ()


def _class_columns(found: ClassPredictive, asked: _Asked) -> dict[str, Any]:
    probs = found.probs  # [B, C]
    names = asked.classes or [str(number) for number in range(probs.shape[1])]
    best, place = probs.max(dim=1)
    total = found.expected_entropy + found.mutual_information
    columns: dict[str, Any] = {"predicted": [names[one] for one in place.tolist()], "probability": best.numpy()}
    columns |= {f"p_{name}": probs[:, number].numpy() for number, name in enumerate(names)}
    columns |= _parts(total, found.expected_entropy, found.mutual_information)
    undecided = best <= 0.5
    if found.calibrated is not None:
        sets = found.calibrated.sets
        columns |= {f"in_set_{name}": sets[:, number].numpy() for number, name in enumerate(names)}
        columns["set_size"] = sets.sum(dim=1).numpy()
        undecided = sets.sum(dim=1) != 1
    columns["abstain"] = _abstain(total, undecided, asked)
    return columns


def _target_columns(found: TargetPredictive, asked: _Asked, levels: tuple[float, float]) -> dict[str, Any]:
    interval = found.calibrated
    lower, upper = (found.quantiles[level] for level in levels) if interval is None else interval
    columns: dict[str, Any] = {}
    outputs = found.mean.shape[1]
    for number in range(outputs):
        end = f"_{number}" if outputs > 1 else ""
        columns[f"mean{end}"] = found.mean[:, number].numpy()
        parts = _parts(found.variance[:, number], found.aleatoric[:, number], found.epistemic[:, number])
        columns |= {f"{name}{end}": values for name, values in parts.items()}
        columns[f"lower{end}"], columns[f"upper{end}"] = lower[:, number].numpy(), upper[:, number].numpy()
    unknown = (found.epistemic > found.aleatoric).any(dim=1)
    columns["abstain"] = _abstain(found.variance.amax(dim=1), unknown, asked)
    return columns


def _parts(total: Tensor, aleatoric: Tensor, epistemic: Tensor) -> dict[str, np.ndarray]:
    named = (("total", total), ("aleatoric", aleatoric), ("epistemic", epistemic))
    return {name: values.numpy() for name, values in named}


def _abstain(total: Tensor, by_default: Tensor, asked: _Asked) -> np.ndarray:
    """Whether to ask somebody else, bool [B]."""
    found: np.ndarray = (by_default if asked.abstain_above is None else total > asked.abstain_above).numpy()
    return found
