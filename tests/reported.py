"""Contents of `report.json` as an evaluation writes them, computed by NumPy from predictives that are made up here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.special
import scipy.stats
from numpy.typing import NDArray

Array = NDArray[np.float64]

SAMPLES, ROWS, CLASSES, OUTSIDE, CHAINS, BINS = 48, 360, 10, 240, 4, 15
SCORES = ("predictive_entropy", "expected_entropy", "mutual_information", "one_minus_max_prob")
NO_MEAN = "not a mean over rows: no standard error"


def figure(
    value: float | None,
    error: float | None = None,
    monte_carlo: float | None = None,
    *,
    definition: str,
    higher: bool | None = None,
    unit: str = "",
    bins: int | None = None,
    note: str | None = None,
    n: int = ROWS,
) -> dict[str, Any]:
    return {
        "value": value,
        "standard_error": error,
        "monte_carlo_error": monte_carlo,
        "n": n,
        "definition": definition,
        "bins": bins,
        "higher_is_better": higher,
        "unit": unit,
        "note": note,
    }


def mean(values: Array, per_sample: Array | None = None, **more: Any) -> dict[str, Any]:
    """A mean over rows [N]; its Monte Carlo error from values of samples [S], by batch means of chains."""
    monte_carlo = None
    if per_sample is not None:
        monte_carlo = float(scipy.stats.sem(per_sample.reshape(CHAINS, -1).mean(axis=1)))
    return figure(float(values.mean()), float(scipy.stats.sem(values)), monte_carlo, n=len(values), **more)


def log_probs(
    source: np.random.Generator, y: NDArray[np.int64], size: int, *, skill: float, spread: float, doubt: float = 1.5
) -> Array:
    """[S, N, C]: the row's own logits, shared by all samples, and what samples disagree on."""
    own = source.normal(0, doubt, (size, CLASSES))
    own[np.arange(size), y] += skill * source.gamma(2.0, 1.0, size)
    logits = own + source.normal(0, spread, (SAMPLES, size, CLASSES))
    return scipy.special.log_softmax(logits, axis=-1)


def entropy(probs: Array) -> Array:
    return scipy.special.entr(probs).sum(axis=-1)


def score_rows(logs: Array) -> dict[str, Array]:
    probs = np.exp(logs).mean(axis=0)
    total, expected = entropy(probs), entropy(np.exp(logs)).mean(axis=0)
    found = (total, expected, np.maximum(total - expected, 0), 1 - probs.max(axis=1))
    return dict(zip(SCORES, found, strict=True))


def counts(values: Array, edges: Array) -> list[int]:
    return [int(number) for number in np.histogram(values, edges)[0]]


def auroc(inside: Array, outside: Array) -> float:
    return float(scipy.stats.mannwhitneyu(outside, inside).statistic / (len(inside) * len(outside)))


def kept(loss: Array, unsure: Array) -> tuple[list[float], list[float]]:
    """Coverage and risk at each threshold, ties merged, 200 points at most."""
    order = np.argsort(unsure, kind="stable")
    risk, coverage = np.cumsum(loss[order]) / np.arange(1, len(loss) + 1), np.arange(1, len(loss) + 1) / len(loss)
    last = np.append(np.diff(unsure[order]) > 0, True)
    risk, coverage = risk[last], coverage[last]
    kept = np.unique(np.linspace(0, len(risk) - 1, min(200, len(risk))).astype(int))
    return coverage[kept].tolist(), risk[kept].tolist()


def reliability(confidence: Array, correct: Array) -> dict[str, list[Any]]:
    edges = np.linspace(0, 1, BINS + 1)
    place = np.clip(np.searchsorted(edges, confidence) - 1, 0, BINS - 1)
    rows = np.bincount(place, minlength=BINS)

    def of(values: Array) -> list[float | None]:
        sums = np.bincount(place, values, BINS)
        return [float(total / number) if number else None for total, number in zip(sums, rows, strict=True)]

    return {"edges": edges.tolist(), "rows": rows.tolist(), "confidence": of(confidence), "accuracy": of(correct)}


def first_samples(score: Callable[[int], float]) -> tuple[list[int], list[float]]:
    numbers = [1, 2, 4, 8, 16, 32, SAMPLES]
    return numbers, [score(number) for number in numbers]


def chains(source: np.random.Generator, *, apart: float) -> dict[str, Any]:
    """Histograms of R-hat and effective sample sizes of 300 predictions."""
    rhat = 1 + apart * source.gamma(2.0, 0.01, 300)
    ess = np.minimum(SAMPLES * 10, SAMPLES * 10 * source.beta(6, 3, 300) / apart)
    rhat_edges = np.linspace(min(1.0, rhat.min()), rhat.max(), 31)
    ess_edges = np.linspace(0, ess.max(), 31)
    return {
        "rhat": {"edges": rhat_edges.tolist(), "quantities": counts(rhat, rhat_edges)},
        "ess": {"edges": ess_edges.tolist(), "quantities": counts(ess, ess_edges)},
        "worst": (float(rhat.max()), float(ess.min())),
    }


def shared(
    task: str, bank: str, metrics: dict[str, Any], curves: dict[str, Any], verdict: str | None
) -> dict[str, Any]:
    text = {
        "bad": "bad: chains disagree on predictions (largest R-hat 1.31, want at most 1.05); raise num_samples and num_warmup",
        "good": "good: 4 chains of 120 draws agree",
        None: "",
    }[verdict]
    worst = {name: metrics[name]["value"] for name in ("rhat", "ess") if name in metrics}
    return {
        "bank": bank,
        "digest": "3f9a1c" * 10,
        "data": "digits" if task == "classification" else "concrete",
        "ood": "digits-shuffled" if "auroc" in metrics else None,
        "task": task,
        "num_rows": ROWS if task == "classification" else 120,
        "num_samples": SAMPLES,
        "num_chains": CHAINS if verdict else 1,
        "seconds": 1.25,
        "rows_per_second": 288.0,
        "headline": ("The chains disagree: figures below are not of the posterior. " if verdict == "bad" else "")
        + f"nll {metrics['nll']['value']:.3f} on held-out rows.",
        "diagnosis": None if verdict is None else {"verdict": verdict, "text": text, **worst},
        "metrics": metrics,
        "curves": curves,
    }


def classification(
    bank: str = "hmc", *, seed: int = 0, ood: bool = True, verdict: str | None = "good", skill: float = 3.0
) -> dict[str, Any]:
    """One report of classes, with every curve that the task has."""
    source = np.random.default_rng(seed)
    y = np.random.default_rng(1).integers(0, CLASSES, ROWS)
    logs = log_probs(source, y, ROWS, skill=skill, spread=1.2)
    outside = log_probs(source, np.zeros(OUTSIDE, dtype=np.int64), OUTSIDE, skill=0.3, spread=2.0)
    probs, rows = np.exp(logs).mean(axis=0), score_rows(logs)
    confidence, wrong = probs.max(axis=1), (probs.argmax(axis=1) != y).astype(float)
    own = -np.log(probs[np.arange(ROWS), y])
    per_sample = -logs[:, np.arange(ROWS), y]
    brier = ((probs - np.eye(CLASSES)[y]) ** 2).sum(axis=1)
    bins = reliability(confidence, 1 - wrong)
    gaps = [
        (n / ROWS, abs(a - c))
        for n, a, c in zip(*(bins[k] for k in ("rows", "accuracy", "confidence")), strict=True)
        if n
    ]
    votes = np.stack([(logs.argmax(axis=2) == c).sum(axis=0) for c in range(CLASSES)], axis=1)
    coverage, risk = kept(wrong, rows["predictive_entropy"])
    oracle_coverage, oracle_risk = kept(wrong, wrong)

    def nll_of(number: int) -> float:
        return float(-np.log(np.exp(logs[:number]).mean(axis=0)[np.arange(ROWS), y]).mean())

    def accuracy_of(number: int) -> float:
        return float((np.exp(logs[:number]).mean(axis=0).argmax(axis=1) == y).mean())

    hits = (logs.argmax(axis=2) == y).mean(axis=1)
    metrics = {
        "accuracy": mean(1 - wrong, hits, definition="share of rows whose most probable class is right", higher=True),
        "top_5": mean((np.argsort(-probs)[:, :5] == y[:, None]).any(axis=1).astype(float), definition="share of rows whose class is among the five most probable", higher=True),
        "nll": mean(own, per_sample.mean(axis=1), definition="-mean log p(y | x)", higher=False, unit="nats"),
        "gibbs_nll": mean(per_sample.mean(axis=0), per_sample.mean(axis=1), definition="-mean over rows and samples of log p_s(y | x)", higher=False, unit="nats"),
        "brier": mean(brier, definition="mean sum_c (p_c - 1[y = c])²", higher=False),
        "ece": figure(sum(n * g for n, g in gaps), definition="sum_m rows_m / N · |accuracy_m - confidence_m|", higher=False, bins=BINS, note=NO_MEAN),
        "rmsce": figure(sum(n * g**2 for n, g in gaps) ** 0.5, definition="root of sum_m rows_m / N · (accuracy_m - confidence_m)²", higher=False, bins=BINS, note=NO_MEAN),
        "mce": figure(max(g for _, g in gaps), definition="largest |accuracy_m - confidence_m|", higher=False, bins=BINS, note="of the fullest bins; bins of few rows decide it"),
        **{name: mean(rows[name], definition=f"mean {name.replace('_', ' ')}", unit="nats") for name in SCORES[:3]},
        "variation_ratio": mean(1 - votes.max(axis=1) / SAMPLES, definition="mean 1 - largest share of votes"),
        "disagreement": mean(1 - (votes * (votes - 1)).sum(axis=1) / (SAMPLES * (SAMPLES - 1)), definition="probability that two samples vote unlike"),
        "aurc": figure(float(np.mean(risk)), definition="area under risk against coverage", higher=False, note=NO_MEAN),
        "coverage_at_risk_5": figure(None, definition="largest coverage at which at most 5 % of the rows kept are wrong", higher=True, note="no threshold keeps the risk below 5 %"),
    }  # fmt: skip
    if ood:
        unsure = score_rows(outside)
        for score in SCORES:
            end = "" if score == "predictive_entropy" else f"_{score}"
            metrics[f"auroc{end}"] = figure(auroc(rows[score], unsure[score]), definition=f"P({score} outside > inside) + P(equal) / 2", higher=True, n=ROWS + OUTSIDE)  # fmt: skip
    scores = {}
    for score in SCORES:
        values = [rows[score], *([score_rows(outside)[score]] if ood else [])]
        edges = np.linspace(0, max(v.max() for v in values), 31)
        scores[score] = {"edges": edges.tolist()} | {
            part: counts(v, edges) for part, v in zip(("inside", "outside"), values, strict=False)
        }
    edges = np.linspace(0, max(rows[name].max() for name in SCORES[1:3]), 31)
    numbers, nlls = first_samples(nll_of)
    curves: dict[str, Any] = {
        "reliability": bins,
        "risk_coverage": {"coverage": coverage, "risk": risk, "oracle_coverage": oracle_coverage, "oracle_risk": oracle_risk},
        "scores": scores,
        "entropy_split": {"edges": edges.tolist()} | {name: counts(rows[name], edges) for name in SCORES[1:3]},
        "samples": {
            "num_samples": numbers,
            "metrics": {"nll": nlls, "accuracy": first_samples(accuracy_of)[1]},
            "needed": {"nll": 21, "accuracy": None},
        },
        "shift": {
            kind: {
                "severity": list(range(6)),
                "metrics": {
                    "accuracy": [accuracy_of(SAMPLES) * (1 - slope * level**1.5) for level in range(6)],
                    "nll": [nlls[-1] * (1 + 4 * slope * level) for level in range(6)],
                    "ece": [metrics["ece"]["value"] + slope * level / 3 for level in range(6)],
                },
            }
            for kind, slope in (("noise", 0.02), ("rotation", 0.05), ("blur", 0.035), ("contrast", 0.01))
        },
    }  # fmt: skip
    if verdict:
        found = chains(source, apart=12.0 if verdict == "bad" else 1.0)
        worst = found.pop("worst")
        metrics["rhat"] = figure(
            worst[0], definition="largest rank-normalised split R-hat of the predictions", higher=False, n=300
        )
        metrics["ess"] = figure(
            worst[1], definition="least bulk effective sample size of the predictions", higher=True, n=300
        )
        curves |= found
    return shared("classification", bank, metrics, curves, verdict)


def regression(
    bank: str = "concrete-hmc", *, seed: int = 0, verdict: str | None = None, noise: float = 5.0
) -> dict[str, Any]:
    """One report of a regression in a unit of its own (targets near 36), with every curve that the task has."""
    source, rows, data = np.random.default_rng(seed), 120, np.random.default_rng(2)
    truth = data.gamma(5.0, 7.0, rows)
    y = truth + data.normal(0, 5.0, rows)
    mu = truth + source.normal(0, 1.5, rows) + source.normal(0, 2.0, (SAMPLES, rows))  # [S, N]
    sigma = np.full((SAMPLES, rows), noise)
    centre, aleatoric, epistemic = mu.mean(axis=0), (sigma**2).mean(axis=0), mu.var(axis=0)
    scale = np.sqrt(aleatoric + epistemic)
    logs = scipy.stats.norm.logpdf(y, mu, sigma)
    u = scipy.stats.norm.cdf(y, mu, sigma).mean(axis=0)

    def inside(level: float) -> Array:
        return (np.abs(2 * u - 1) <= level).astype(float)

    lower, upper = centre - 1.645 * scale, centre + 1.645 * scale
    squares = (y - centre) ** 2
    rmse = float(np.sqrt(squares.mean()))
    metrics = {
        "rmse": figure(rmse, float(scipy.stats.sem(squares) / (2 * rmse)), 0.011, definition="root of mean (y - mean)²", higher=False, unit="target", n=rows),
        "mae": mean(np.abs(y - np.median(mu, axis=0)), definition="mean |y - median|", higher=False, unit="target"),
        "nll": mean(-scipy.special.logsumexp(logs, axis=0) + np.log(SAMPLES), -logs.mean(axis=1), definition="-mean log p(y | x)", higher=False, unit="nats"),
        "aleatoric": mean(aleatoric, definition="mean variance of the noise", unit="target^2"),
        "epistemic": mean(epistemic, definition="mean variance of the samples' means", unit="target^2"),
        **{f"coverage_{p}": mean(inside(p / 100), definition=f"share of targets in the central {p} % interval") for p in (50, 90, 95)},
        "width_90": mean(upper - lower, definition="mean width of the central 90 % interval", higher=False, unit="target"),
        "crps": mean(0.7 * np.abs(y - centre), definition="mean continuous ranked probability score", higher=False, unit="target"),
        "sharpness": mean(scale, definition="mean standard deviation of the predictive", higher=False, unit="target"),
    }  # fmt: skip
    order = np.argsort(centre)
    pit_edges, levels = np.linspace(0, 1, 21), np.linspace(0.05, 0.95, 19)
    band = scipy.stats.binom.ppf([0.025 / 20, 1 - 0.025 / 20], rows, 1 / 20)
    numbers, rmses = first_samples(lambda number: float(np.sqrt(((y - mu[:number].mean(axis=0)) ** 2).mean())))
    curves: dict[str, Any] = {
        "band": {
            **{name: values[order].tolist() for name, values in (("target", y), ("mean", centre), ("lower", lower), ("upper", upper))},
            "level": 0.9,
        },
        "pit": {"edges": pit_edges.tolist(), "rows": counts(u, pit_edges), "lower": float(band[0]), "upper": float(band[1])},
        "calibration": {"level": levels.tolist(), "coverage": [float(inside(level).mean()) for level in levels]},
        "samples": {"num_samples": numbers, "metrics": {"rmse": rmses}, "needed": {"rmse": 12}},
    }  # fmt: skip
    if verdict:
        found = chains(source, apart=12.0 if verdict == "bad" else 1.0)
        worst = found.pop("worst")
        metrics["rhat"] = figure(
            worst[0], definition="largest rank-normalised split R-hat of the predictions", higher=False, n=300
        )
        metrics["ess"] = figure(
            worst[1], definition="least bulk effective sample size of the predictions", higher=True, n=300
        )
        curves |= found
    return shared("regression", bank, metrics, curves, verdict)


def banks(names: Sequence[str] = ("hmc", "mean-field")) -> dict[str, dict[str, Any]]:
    """Reports of two banks on the same rows: the first, whose chains agree, is the better one."""
    first, second = names
    return {
        first: classification(first, verdict="good"),
        second: classification(second, seed=3, verdict="bad", skill=1.2),
    }
