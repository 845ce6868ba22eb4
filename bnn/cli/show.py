"""Tables on stdout."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from bnn.bank import Bank
    from bnn.evaluation import Figure, Report
    from bnn.evaluation.verdict import Diagnosis


def show_bank(bank: Bank) -> None:
    """What a bank is, in a few lines."""
    method, data, model, likelihood = (bank.info.get(key) or {} for key in ("method", "data", "model", "likelihood"))
    lines = [
        f"{bank.path}: {len(bank)} samples of {bank.layout.num_values:,} values, {_takes(bank)}",
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


def _takes(bank: Bank) -> str:
    """What the samples of a bank take on disk."""
    told = size(len(bank) * bank.stored.num_bytes)
    virtual = bank.info.get("virtual")
    if not isinstance(virtual, dict) or "made" not in virtual:
        return told
    made = virtual["made"]
    return f"virtual: {told} if they were kept; made on {made['cpu']} ({made['capability']}), torch {made['torch']}"


def _complete(info: Mapping[str, Any]) -> str:
    if info.get("complete"):
        return "yes"
    return "no: go on with --resume" if info.get("resumable") else "no, and no state to go on from"


def _made_of(info: Mapping[str, Any]) -> list[str]:
    """Lines where a bank was made of others, or of what was left of one."""
    lines = []
    thinned, merged, lost = info.get("thinned"), info.get("merged"), info.get("lost")
    compacted = info.get("compacted")
    codec, decoded = info.get("codec"), info.get("decoded")
    if isinstance(codec, dict):
        lines += _coded(codec)
    if isinstance(decoded, dict):
        lines.append(f"decoded     from {decoded.get('codec')}, of {str(decoded.get('of'))[:12]}")
    if isinstance(thinned, dict) and "best" in thinned:
        lines += _best(thinned)
    elif isinstance(thinned, dict):
        lines.append(f"thinned     every {thinned.get('every')} draws, of {str(thinned.get('of'))[:12]}")
    if isinstance(compacted, dict):
        lines.append(f"compacted   rows {info.get('row_order')}, of {str(compacted.get('of'))[:12]}")
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


def _coded(codec: Mapping[str, Any]) -> list[str]:
    """What a codec did to the samples, and to predictions."""
    lines = [f"codec       {codec.get('name')}, of {str(codec.get('of'))[:12]}"]
    errors = {name: value for name, value in (codec.get("errors") or {}).items() if isinstance(value, (int, float))}
    if errors:
        worst = max(errors, key=lambda name: errors[name])
        lines.append(f"error       at most {errors[worst]:.2g} standard deviations, in '{worst}'")
    predictive = codec.get("predictive") or {}
    for name in ("kl", "total_variation", "shift"):
        if isinstance(predictive.get(name), dict):
            told = f"{_distance(name, predictive[name])}, on {predictive.get('rows')} rows"
            lines.append(f"{name.replace('_', ' '):11} {told}")
    return lines


def _best(thinned: Mapping[str, Any]) -> list[str]:
    """What the best few samples are worth, beside others of the same number."""
    lines = [f"thinned     the best {thinned.get('best')}, of {str(thinned.get('of'))[:12]}"]
    for name in ("kl", "total_variation", "shift"):
        ways = thinned.get(name)
        if isinstance(ways, dict):
            told = [f"{way} {_distance(name, ways[way])}" for way in ("best", "plain", "random") if way in ways]
            lines.append(f"{name.replace('_', ' '):11} {'; '.join(told)}")
    return lines


def _distance(name: str, found: Any) -> str:
    """Mean and largest distance of predictives over rows, with its unit."""
    mean, largest = (found.get(word) if isinstance(found, dict) else None for word in ("mean", "largest"))
    if not isinstance(mean, (int, float)) or not isinstance(largest, (int, float)):
        return "not recorded"
    unit = {"kl": " nats", "shift": " sd"}.get(name, "")
    return f"{mean:.2g} (at most {largest:.2g}){unit}"


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
    """The headline of each bank; then one row a figure, one column a bank; information in nats, or in bits."""
    lines = Console(soft_wrap=True, highlight=False, markup=False)
    for bank, report in reports.items():
        lines.print(plain(f"{bank}: {report.headline}"))
    names = list(only) or list(dict.fromkeys(name for report in reports.values() for name in report.metrics))
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for bank in reports:
        table.add_column(Text(plain(bank)), justify="left")
    for name in names:
        cells = [_cell(report.metrics.get(name), unit) for report in reports.values()]
        table.add_row(name.replace("_", " "), *cells)
    if speed:
        table.add_row("rows/s", *(f"{report.rows_per_second:,.0f}" for report in reports.values()))
    wide = 40 + 80 * len(reports)  # where nobody reads along, lines are not broken
    Console(soft_wrap=False, highlight=False, width=None if lines.is_terminal else wide).print(table)
    lines.print("value ± standard error over rows (Monte Carlo error over samples)")
    for bank, report in reports.items():
        reasons: dict[str, list[str]] = {}
        for name in names:
            figure = report.metrics.get(name)
            if figure is not None and figure.value is None:
                reasons.setdefault(figure.note or "", []).append(name.replace("_", " "))
        for why, missing in reasons.items():
            lines.print(plain(f"{bank}: no {', '.join(missing)}: {why}"))


def _cell(figure: Figure | None, unit: str) -> str:
    """A figure with its errors."""
    if figure is None:
        return ""
    if figure.value is None:
        return "none"
    divisor = math.log(2.0) if unit == "bits" and figure.unit == "nats" else 1.0
    found = f"{figure.value / divisor:.4f}"
    if figure.standard_error is not None:
        found += f" ± {figure.standard_error / divisor:.4f}"
    return found + (f" ({figure.monte_carlo_error / divisor:.4f})" if figure.monte_carlo_error is not None else "")


def size(num_bytes: float) -> str:
    """Bytes in words, in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    raise AssertionError("unreachable")


def _options(options: dict[str, object]) -> str:
    return " ".join(f"{key}={value}" for key, value in options.items() if value is not None)
