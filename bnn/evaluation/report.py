"""What an evaluation found: figures with both their errors, values of each row, curves, and files for people and machines."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from bnn.bank.files import write_atomic
from bnn.evaluation import page, pictures
from bnn.evaluation.definitions import definition_of
from bnn.evaluation.verdict import Diagnosis
from bnn.likelihoods import Task

FORMAT, VERSION = "bnn-report", 1


class Figure(NamedTuple):
    """One metric: its value and errors, None where there are none and the note says why."""

    value: float | None
    standard_error: float | None  # from having so many rows
    monte_carlo_error: float | None  # from having so many samples
    n: int  # rows, or other things that it is of
    definition: str
    bins: int | None = None
    higher_is_better: bool | None = None
    unit: str = ""
    note: str | None = None

    def __str__(self) -> str:
        """The value and the error over rows; then the error over samples.

        >>> str(Figure(0.25, 0.01, 0.002, 100, "share"))
        '0.2500 ± 0.0100 (samples ± 0.0020)'
        """
        if self.value is None:
            return "none"
        errors = f" ± {self.standard_error:.4f}" if self.standard_error is not None else ""
        return f"{self.value:.4f}{errors}" + (
            f" (samples ± {self.monte_carlo_error:.4f})" if self.monte_carlo_error is not None else ""
        )


@dataclass
class Report:
    """Figures of one bank on one data set.

    `metrics` maps an id to its `Figure`; `curves` holds what pictures are drawn from; `rows` a value a row [N] or [N, C] by
    name, with `y` the targets; `outside` the scores [M] of rows from outside the distribution.
    """

    task: Task
    num_rows: int
    num_samples: int
    num_chains: int
    seconds: float
    metrics: dict[str, Figure] = field(default_factory=dict)
    curves: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    outside: dict[str, Tensor] = field(default_factory=dict)
    diagnosis: Diagnosis | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def rows_per_second(self) -> float:
        """Rows of data evaluated under all samples, a second."""
        return self.num_rows / max(self.seconds, 1e-9)

    @property
    def headline(self) -> str:
        """The first line for people: where the chains of the bank disagree, it says so before anything else."""
        chains = f", {self.num_chains} chains" if self.num_chains > 1 else ""
        told = f"{self.num_rows} rows, {self.num_samples} samples{chains}"
        main = ("accuracy", "nll") if self.task == "classification" else ("rmse", "nll")
        shown = [
            f"{name} {figure.value:.4g} {figure.unit if figure.unit == 'nats' else ''}".strip()
            for name in main
            if (figure := self.metrics[name]).value is not None
        ]
        told = f"{told}: {', '.join(shown)}" if shown else told
        if self.diagnosis is None or self.diagnosis.trusted:
            return told
        if self.diagnosis.verdict == "bad":
            return f"not to be trusted, {self.diagnosis.text}. {told}"
        return f"{told}. Chains: {self.diagnosis.text}"

    def add(
        self,
        name: str,
        value: float,
        *,
        n: int,
        standard_error: float | None = None,
        monte_carlo_error: float | None = None,
        bins: int | None = None,
        outside: int = 0,
        note: str | None = None,
    ) -> None:
        """One figure. What is not finite becomes None, with a note."""
        notes = [note] if note else []
        if not math.isfinite(value) and not note:
            notes.append("no number" if math.isnan(value) else "infinite")
        if standard_error is not None and not math.isfinite(standard_error):
            standard_error = None
        if monte_carlo_error is not None and not math.isfinite(monte_carlo_error):
            monte_carlo_error = None
        if not math.isfinite(value):
            standard_error = monte_carlo_error = None
        else:
            if standard_error is None and not note:
                notes.append("one row: no error over rows" if n == 1 else "no error over rows")
            if monte_carlo_error is None and not note:
                notes.append("one sample: no error over samples" if self.num_samples == 1 else "no error over samples")
        found = definition_of(name, outside)
        self.metrics[name] = Figure(
            value if math.isfinite(value) else None,
            standard_error,
            monte_carlo_error,
            n,
            found.text,
            bins,
            found.higher_is_better,
            found.unit,
            "; ".join(notes) or None,
        )

    def to_dict(self) -> dict[str, Any]:
        """One report of `report.json`, plain values of which all numbers are finite."""
        metrics = {name: figure._asdict() for name, figure in self.metrics.items()}
        diagnosis = None
        if self.diagnosis is not None:
            rhat, ess = (self.metrics[name].value if name in self.metrics else None for name in ("rhat", "ess"))
            diagnosis = {"verdict": self.diagnosis.verdict, "text": self.diagnosis.text, "rhat": rhat, "ess": ess}
        return {
            **{name: self.about.get(name) for name in ("bank", "digest", "data", "ood")},
            **{name: value for name, value in self.about.items() if name not in ("bank", "digest", "data", "ood")},
            "task": self.task,
            "num_rows": self.num_rows,
            "num_samples": self.num_samples,
            "num_chains": self.num_chains,
            "seconds": self.seconds,
            "rows_per_second": self.rows_per_second,
            "headline": self.headline,
            "diagnosis": diagnosis,
            "metrics": metrics,
            "curves": self.curves,
        }

    def save(self, folder: str | Path) -> None:
        """Write `report.json`, `report.html` and pictures into a folder, made if missing."""
        save_reports({"bank": self}, folder)

    def __str__(self) -> str:
        lines = [self.headline]
        lines += [f"{name:28} {figure}" for name, figure in self.metrics.items()]
        return "\n".join(lines)


def save_reports(reports: dict[str, Report], folder: str | Path) -> None:
    """Write several banks' reports side by side: one `report.json`, one `report.html`, pictures of each as SVG.

    Args:
        reports: by name of the bank.
        folder: made if missing; files of these names are replaced.
    """
    facts = {name: _plain(report.to_dict()) for name, report in reports.items()}
    files = {
        f"{name.replace('/', '-')}-{kind}.svg": picture
        for name, drawn in pictures.draw_all(facts).items()
        for kind, picture in drawn.items()
    }
    whole = {"format": FORMAT, "version": VERSION, "reports": facts}
    files["report.json"] = json.dumps(whole, indent=2, allow_nan=False) + "\n"
    files["report.html"] = page.render(facts)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_atomic(folder / name, [text.encode()])


def _plain(value: Any) -> Any:
    """Values as JSON has them: paths as text, and None for numbers that are not finite."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
