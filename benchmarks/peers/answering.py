"""What the peers of hmc.py share: a problem from a file, and one JSON answer for each JSON request on stdin.

A peer stays alive between requests, so that the ways of a benchmark can take turns. Knows nothing of bnn.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Problem(NamedTuple):
    """A regression on an MLP with tanh, standard normal priors and a known noise."""

    x: np.ndarray  # [B, inputs]
    y: np.ndarray  # [B, 1]
    probes: np.ndarray  # [20, inputs]
    starts: np.ndarray  # [C, P], in the order of a torch module: weight [out, in], bias [out], a layer after the other
    points: np.ndarray  # [2, P], where densities and gradients are compared
    widths: list[int]  # inputs, hidden units, outputs
    noise: float


def read_problem(path: str) -> Problem:
    found = np.load(path)
    arrays = {name: found[name] for name in ("x", "y", "probes", "starts", "points")}
    return Problem(**arrays, widths=found["widths"].tolist(), noise=float(found["noise"]))


def layers(problem: Problem, flat: Any) -> list[tuple[Any, Any]]:
    """The weight [out, in] and bias [out] of each layer, cut from a vector [P] of any library."""
    found, start = [], 0
    for inputs, outputs in zip(problem.widths[:-1], problem.widths[1:], strict=True):
        middle = start + inputs * outputs
        found.append((flat[start:middle].reshape(outputs, inputs), flat[middle : middle + outputs]))
        start = middle + outputs
    return found


def serve(answers: dict[str, Callable[..., dict[str, Any]]], versions: dict[str, str]) -> None:
    """Print the versions, then the answer to each request {"ask": name, ...}, until stdin ends."""
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not stand between the answers
    print(json.dumps(versions), file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(answers[request.pop("ask")](**request)), file=out, flush=True)
