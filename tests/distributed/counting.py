"""What ranks send in fits and evaluations, counted; run as a script, once a rank, by `ranked.launch`."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranked
from distributed import using

import bnn
from bnn import distributed, pacing, together
from bnn.evaluation import mesh
from bnn.inference import HMC, Guide
from bnn.likelihoods import Categorical, Gaussian
from bnn.traffic import Traffic, counted

EXTRA: dict[str, Any] = {
    "climbed": (HMC(num_chains=5, num_warmup=45, num_steps=3, compile=False, step_size=0.1, mass="unit"), 10),
    "two": (Guide("low-rank", rank=3, num_steps=20, batch_size=10), 4),
}
METHODS = ranked.CHAINS | ranked.ROWS | ranked.GUIDES | EXTRA
COUNTED = (
    "hmc",
    "chees",
    "low-rank mass",
    "climbed",
    "nuts",
    "sghmc",
    "prior",
    "mean-field",
    "two",
    "antithetic",
    "flow",
    "map",
)
EVALUATED = [(figures, task, using.N) for figures in ("basic", "all") for task in ("classes", "targets")]
EVALUATED += [
    ("basic", "targets", using.BATCH),
    ("all", "classes", 2),
]  # in rounds of as many batches as there are ranks


def marked(method: Any, traffic: Traffic, marks: list[Traffic]) -> Any:
    """A method that notes what was sent before its run, and last at its end."""
    kind = type(method)

    def run(self: Any, *arguments: Any, **options: Any) -> Iterator[Any]:
        marks.append(copy.deepcopy(traffic))
        try:
            yield from kind.run(self, *arguments, **options)
        finally:
            marks.append(copy.deepcopy(traffic))

    made = type(kind.__name__, (kind,), {"run": run})
    return made(**{each.name: getattr(method, each.name) for each in dataclasses.fields(method)})


def fits(out: Path) -> dict[str, Any]:
    """Bytes and calls by kind of the run of each method."""
    found = {}
    for name in COUNTED:
        method, num_samples = METHODS[name]
        marks: list[Traffic] = []
        with counted() as traffic:
            own = marked(method, traffic, marks)
            bnn.fit(ranked.model(), ranked.rows(), method=own, num_samples=num_samples, out=out / name, seed=3)
        found[name] = [[each.calls, each.payload] for each in (marks[0], marks[-1])]
    return found


def evaluated(figures: Any, task: str, batch_size: int) -> Any:
    """Calls and bytes of an evaluation, after what is compared before it, and how long its JSON is."""
    of_classes, marks, texts = task == "classes", list[Traffic](), list[int]()
    net = using.net(Categorical()) if of_classes else using.net(Gaussian(), 2)
    compared, values = mesh.check_ranks, distributed.Ranks.values

    def check(*arguments: Any) -> None:
        compared(*arguments)
        marks.append(copy.deepcopy(traffic))
        texts.clear()

    def said(self: Any, value: Any) -> list[Any]:
        heard = values(self, value)
        texts.append(max(len(json.dumps(each).encode()) for each in heard))
        return heard

    with counted() as traffic, pytest.MonkeyPatch.context() as patch:
        patch.setattr("bnn.evaluation.scoring.check_ranks", check)
        patch.setattr(distributed.Ranks, "values", said)
        data = using.classes() if of_classes else using.numbers()
        bnn.evaluate(net, data, num_bins=6, figures=figures, batch_size=batch_size)
    return [[each.calls, each.payload] for each in (marks[0], traffic)], texts


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    # The model counts no states of warm-up, which a slow machine would come to, and the fewest meetings.
    together.STATE_SECONDS = pacing.SECONDS = float("inf")
    with distributed.joined():
        told = {"fits": fits(Path(sys.argv[1])), "evaluations": [evaluated(*each) for each in EVALUATED]}
    sys.stdout.write(json.dumps(told))
