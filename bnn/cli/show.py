"""Tables on stdout."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from bnn.bank import Bank
    from bnn.evaluation import Report
    from bnn.evaluation.verdict import Diagnosis


def show_bank(bank: Bank) -> None:
    """What a bank is, in a few lines."""
    method, data, model, likelihood = (bank.info.get(key) or {} for key in ("method", "data", "model", "likelihood"))
    lines = [
        f"{bank.path}: {len(bank)} samples of {bank.layout.num_values:,} values, {size(len(bank) * bank.layout.num_bytes)}",
        f"method      {method.get('name', 'not recorded')} {_options(method.get('options') or {})}",
        f"model       {model.get('spec', 'not recorded')}",
        f"data        {data['spec'] + ', split ' + str(data.get('split')) if 'spec' in data else 'not recorded'}",
        f"likelihood  {likelihood.get('name', 'not recorded')}",
        *_posterior(bank.info.get("sampling") or {}),
        *_made_of(bank.info),
        f"complete    {_complete(bank.info)}",
    ]
    for writer, found in bank.info.get("diagnostics", {}).items():
        if found:
            lines.append(f"{writer:11} " + ", ".join(f"{key} {value:.4g}" for key, value in found.items()))
    Console(soft_wrap=True, highlight=False, markup=False).print("\n".join(map(plain, lines)))


def _complete(info: Mapping[str, Any]) -> str:
    if info.get("complete"):
        return "yes"
    return "no: go on with --resume" if info.get("resumable") else "no, and no state to go on from"


def _made_of(info: Mapping[str, Any]) -> list[str]:
    """Lines where a bank was made of others, or of what was left of one."""
    lines = []
    thinned, merged, lost = info.get("thinned"), info.get("merged"), info.get("lost")
    if isinstance(thinned, dict):
        lines.append(f"thinned     every {thinned.get('every')} draws, of {str(thinned.get('of'))[:12]}")
    if isinstance(merged, list):
        parts = [one if isinstance(one, dict) else {} for one in merged]
        told = ", ".join(
            f"{one.get('samples')} of {str(one.get('digest'))[:12]}"
            + (f" weighing {one['share']:.3g}" if isinstance(one.get("share"), float) else "")
            for one in parts[:8]
        )
        lines.append(f"merged      {len(parts)} banks: {told}{', ...' if len(parts) > 8 else ''}")
    if isinstance(lost, list):
        lines.append(f"lost        {', '.join(str(name) for name in lost[:8])}")
    return lines


def plain(line: str) -> str:
    """A line whose control characters, which a terminal would obey, are written out: a bank may be anybody's."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in line)


def show_diagnosis(found: Diagnosis) -> None:
    """The verdict on chains in one line, then its figures."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(found.text)
    parts = {what: getattr(found, what) for what in ("predictions", "noise", "log_joint", "parameters")}
    if any(parts.values()):
        table = Table(box=None, pad_edge=False)
        for head in ("", "number", "R-hat", "above 1.01", "bulk ESS", "tail ESS", "MCSE"):
            table.add_column(head, justify="right" if head else "left")
        table.add_column("worst")
        for what, part in parts.items():
            if part is not None:
                ess = f"{part.ess_bulk:.0f}", f"{part.ess_tail:.0f}", f"{part.mcse:.2g}"
                name = what.replace("_", " ")
                table.add_row(name, f"{part.num}", f"{part.rhat:.3f}", f"{part.share_noticed:.0%}", *ess, part.worst)
        Console(highlight=False, width=None if console.is_terminal else 200).print(table)
    moved = []
    if found.acceptance is not None:
        moved.append(f"acceptance {found.acceptance:.2f}")
    if found.divergent is not None:
        moved.append(f"{found.divergent} of {found.num_trajectories} trajectories diverged")
    if found.ebfmi:
        moved.append(f"E-BFMI {min(found.ebfmi):.2f} to {max(found.ebfmi):.2f}")
    if found.longest_stay:
        moved.append(f"longest stay {max(found.longest_stay)} of {found.num_draws} draws")
    if moved:
        console.print(", ".join(moved))


def _posterior(sampling: Mapping[str, Any]) -> list[str]:
    """A line where rows were drawn unlike, and nothing where they were not."""
    if sampling.get("posterior") == "balanced":
        return ["posterior   balanced: of reweighted rows, not of the data as they are"]
    return ["posterior   of the data, by importance weights"] if sampling.get("importance_weights") else []


def show_reports(
    reports: dict[str, Report], *, only: Sequence[str] = (), unit: str = "nats", speed: bool = False
) -> None:
    """One row a bank, one column a figure; information in nats, or in bits."""
    names = list(only) or list(dict.fromkeys(name for report in reports.values() for name in report.metrics))
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    if speed:
        table.add_column("rows/s", justify="right")
    for bank, report in reports.items():
        cells = []
        for name in names:
            figure = report.metrics.get(name)
            divisor = math.log(2.0) if unit == "bits" and is_information(name) else 1.0
            cells.append("" if figure is None else f"{figure.value / divisor:.4f}")
        table.add_row(bank, *cells, *([f"{report.rows_per_second:,.0f}"] if speed else []))
    Console(soft_wrap=False, highlight=False, width=None if Console().is_terminal else 200).print(table)


def is_information(name: str) -> bool:
    """Whether a figure is in nats."""
    return "entropy" in name or name in ("mutual_information", "nll", "gibbs_nll")


def size(num_bytes: float) -> str:
    """Bytes in words, in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    raise AssertionError("unreachable")


def _options(options: dict[str, object]) -> str:
    return " ".join(f"{key}={value}" for key, value in options.items() if value is not None)
