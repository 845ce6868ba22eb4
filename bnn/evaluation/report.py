"""What an evaluation found: figures, values of each row, and files for people and machines."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from bnn.bank.files import write_atomic
from bnn.evaluation import page, pictures
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
        """Write `report.json`, `report.html` and pictures into a folder, made if missing."""
        save_reports({"bank": self}, folder)

    def __str__(self) -> str:
        lines = [f"{self.num_rows} rows, {self.num_samples} samples"]
        for name, figure in self.metrics.items():
            error = "" if figure.error is None else f" ± {figure.error:.4f}"
            lines.append(f"{name:20} {figure.value:.4f}{error}")
        return "\n".join(lines)


def save_reports(reports: dict[str, Report], folder: str | Path) -> None:
    """Write several banks' reports side by side: one `report.json`, one `report.html`, pictures of each as SVG.

    Args:
        reports: by name of the bank.
        folder: made if missing; files of these names are replaced.
    """
    facts = {name: report.to_dict() for name, report in reports.items()}
    drawn = pictures.draw_all(facts)
    html = page.render(facts)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in drawn.items():
        for kind, picture in found.items():
            write_atomic(folder / f"{name.replace('/', '-')}-{kind}.svg", [picture.encode()])
    write_atomic(folder / "report.json", [(json.dumps(facts, indent=2, default=str) + "\n").encode()])
    write_atomic(folder / "report.html", [html.encode()])
