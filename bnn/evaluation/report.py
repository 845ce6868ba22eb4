"""What an evaluation found: figures, values of each row, and files for people and machines."""

from __future__ import annotations

import base64
import html
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from bnn.bank.files import write_atomic
from bnn.evaluation import plots
from bnn.likelihoods import Task
from bnn.metrics import Bins


class Figure(NamedTuple):
    """One metric: its value, its standard error over rows (None where it is no mean), what it means."""

    value: float
    error: float | None
    definition: str


@dataclass
class Report:
    """Figures of one bank on one data set.

    `metrics` maps a name to its `Figure`; `rows` a name to a value a row [N] or [N, C], with `y` the
    targets; `bins` is the reliability diagram and `ood_entropy` [M] the predictive entropy outside.
    """

    task: Task
    metrics: dict[str, Figure]
    rows: dict[str, Tensor]
    num_rows: int
    num_samples: int
    seconds: float
    bins: Bins | None = None
    ood_entropy: Tensor | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def rows_per_second(self) -> float:
        """Rows of data evaluated under all samples, a second."""
        return self.num_rows / max(self.seconds, 1e-9)

    def add(self, name: str, value: float, definition: str, error: float | None = None) -> None:
        self.metrics[name] = Figure(value, error, definition)

    def add_mean(self, name: str, values: Tensor, definition: str) -> None:
        """A mean over rows [N], with its standard error."""
        size = len(values)
        error = float(values.std() / size**0.5) if size > 1 and bool(values.isfinite().all()) else None
        self.add(name, float(values.mean()), definition, error)

    def to_dict(self) -> dict[str, Any]:
        """What `report.json` holds."""
        metrics = {
            name: {
                "value": f.value if math.isfinite(f.value) else None,
                "standard_error": f.error,
                "definition": f.definition,
            }
            for name, f in self.metrics.items()
        }
        bins = None if self.bins is None else {k: v.tolist() for k, v in self.bins._asdict().items()}
        return {
            **self.about,
            "task": self.task,
            "num_rows": self.num_rows,
            "num_samples": self.num_samples,
            "seconds": self.seconds,
            "rows_per_second": self.rows_per_second,
            "metrics": metrics,
            "calibration_bins": bins,
        }

    def save(self, folder: str | Path) -> None:
        """Write `report.json`, `report.html` and pictures into a folder, made if missing.

        Raises:
            ConfigError: matplotlib, which draws the pictures, is not installed.
        """
        save_reports({"bank": self}, folder)

    def __str__(self) -> str:
        lines = [f"{self.num_rows} rows, {self.num_samples} samples"]
        for name, figure in self.metrics.items():
            error = "" if figure.error is None else f" ± {figure.error:.4f}"
            lines.append(f"{name:20} {figure.value:.4f}{error}")
        return "\n".join(lines)


def save_reports(reports: dict[str, Report], folder: str | Path) -> None:
    """Write several banks' reports side by side: one `report.json`, one `report.html`, pictures of each.

    Args:
        reports: by name of the bank.
        folder: made if missing; files of these names are replaced.
    """
    pictures = {
        f"{name.replace('/', '-')}-{kind}.png": picture
        for name, report in reports.items()
        for kind, picture in plots.draw(report).items()
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {name: report.to_dict() for name, report in reports.items()}
    for name, picture in pictures.items():
        write_atomic(folder / name, [picture])
    write_atomic(folder / "report.json", [(json.dumps(facts, indent=2, default=str) + "\n").encode()])
    write_atomic(folder / "report.html", [_page(reports, pictures).encode()])


def _page(reports: dict[str, Report], pictures: dict[str, bytes]) -> str:
    """One self-contained page: a table over banks, definitions, pictures."""
    names = list(dict.fromkeys(metric for report in reports.values() for metric in report.metrics))
    definitions = {n: f.definition for report in reports.values() for n, f in report.metrics.items()}
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = ""
    for bank, report in reports.items():
        cells = "".join(f"<td>{_cell(report.metrics.get(name))}</td>" for name in names)
        body += f"<tr><th>{html.escape(bank)}<br><small>{report.num_samples} samples</small></th>{cells}</tr>"
    listed = "".join(f"<dt>{html.escape(n)}</dt><dd>{html.escape(definitions[n])}</dd>" for n in names)
    shown = "".join(
        f'<figure><img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        f"<figcaption>{html.escape(name)}</figcaption></figure>"
        for name, png in pictures.items()
    )
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:76rem;padding:0 1rem}"
        "table{border-collapse:collapse}th,td{padding:.3rem .7rem;border-bottom:1px solid #ccc;text-align:right}"
        "tr>th:first-child{text-align:left}figure{display:inline-block;margin:.5rem}img{max-width:24rem}dt{font-weight:600}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>bnn report</title><style>{style}</style>'
        f"<h1>Predictive uncertainty</h1><table><tr><th></th>{head}</tr>{body}</table>"
        f"<p>± is one standard error over rows of data.</p><h2>Pictures</h2>{shown}<h2>Definitions</h2><dl>{listed}</dl></html>\n"
    )


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return ""
    return f"{figure.value:.4f}" + ("" if figure.error is None else f"<br><small>± {figure.error:.4f}</small>")
