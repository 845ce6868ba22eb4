"""Pictures of a report, as PNG bytes."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

from bnn.errors import ConfigError

if TYPE_CHECKING:
    from bnn.evaluation.report import Report


def draw(report: Report) -> dict[str, bytes]:
    """All pictures for the task of a report: name -> PNG.

    Classification: the reliability diagram, and the predictive entropy inside and outside.
    Regression: targets against predictions, and the histogram of the probability integral transform.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "report", want="matplotlib for its pictures", got="none installed", fix="pip install 'bnn-toolkit[demo]'"
        ) from error

    def canvas() -> Any:
        # A figure without pyplot: no global state, no windows.
        figure = Figure(figsize=(4.8, 4.0), dpi=110, layout="constrained")
        return figure, figure.subplots()

    if report.task == "classification":
        pictures = {"reliability": _reliability(report, *canvas())}
        pictures["entropy"] = _entropy(report, *canvas())
        return pictures
    return {"predictions": _predictions(report, *canvas()), "pit": _pit(report, *canvas())}


def _reliability(report: Report, figure: Any, axes: Any) -> bytes:
    assert report.bins is not None
    count, confidence, accuracy = (values.numpy() for values in report.bins)
    edges = np.linspace(0, 1, len(count) + 1)
    filled = count > 0
    axes.bar(edges[:-1][filled], accuracy[filled], width=1 / len(count), align="edge", alpha=0.7, edgecolor="white")
    axes.plot(confidence[filled], accuracy[filled], "o", color="black", markersize=4)
    axes.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
    for left, number in zip(edges[:-1][filled], count[filled], strict=True):
        axes.text(left + 0.5 / len(count), 0.01, str(number), ha="center", va="bottom", fontsize=6, rotation=90)
    ece = report.metrics["ece"].value
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy", title=f"reliability, ECE {ece:.3f}")
    return _png(figure)


def _entropy(report: Report, figure: Any, axes: Any) -> bytes:
    inside = report.rows["total_entropy"].numpy()
    outside = None if report.ood_entropy is None else report.ood_entropy.numpy()
    top = max(inside.max(), 0.0 if outside is None else outside.max()) + 1e-9
    bins = np.linspace(0, top, 31)
    axes.hist(inside, bins=bins, alpha=0.6, density=True, label="in distribution")
    if outside is not None:
        axes.hist(outside, bins=bins, alpha=0.6, density=True, label="out of distribution")
    axes.set(xlabel="predictive entropy (nats)", ylabel="density", title="total uncertainty")
    axes.legend()
    return _png(figure)


def _predictions(report: Report, figure: Any, axes: Any) -> bytes:
    y, mean = (report.rows[name][:, 0].numpy() for name in ("y", "mean"))
    scale = (report.rows["aleatoric_variance"] + report.rows["epistemic_variance"])[:, 0].sqrt().numpy()
    axes.errorbar(y, mean, yerr=scale, fmt="o", markersize=3, linewidth=0.7, alpha=0.7)
    span = [min(y.min(), mean.min()), max(y.max(), mean.max())]
    axes.plot(span, span, color="grey", linestyle="--", linewidth=1)
    axes.set(xlabel="target", ylabel="predictive mean ± standard deviation", title="predictions")
    return _png(figure)


def _pit(report: Report, figure: Any, axes: Any) -> bytes:
    axes.hist(report.rows["pit"].flatten().numpy(), bins=np.linspace(0, 1, 21), density=True, alpha=0.7)
    axes.axhline(1.0, color="grey", linestyle="--", linewidth=1)
    axes.set(xlim=(0, 1), xlabel="predictive CDF at the target", ylabel="density", title="PIT: flat where calibrated")
    return _png(figure)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
