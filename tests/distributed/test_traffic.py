"""What two and three ranks send, counted, is what the model says, to the byte."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from ranked import launch, model

from bnn.evaluation.views import views_of
from bnn.inference.guide import make_family
from bnn.likelihoods import Categorical
from bnn.scaling import class_state_bytes, fit_calls, gathered, target_state_bytes
from bnn.together import split_of
from bnn.traffic import Call

HERE = Path(__file__).parent
SCRIPT = HERE / "counting.py"
sys.path.insert(0, str(HERE))

import counting  # noqa: E402
import using  # noqa: E402


@pytest.fixture(scope="module", params=[2, 3])
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[dict[str, Any]]]:
    """The number of ranks, and what each counted."""
    ended = launch(request.param, tmp_path_factory.mktemp("ranks"), script=SCRIPT)
    assert [process.returncode for process in ended] == [0] * request.param, "\n".join(p.err for p in ended)
    return request.param, [json.loads(process.out) for process in ended]


@pytest.mark.parametrize("name", counting.COUNTED)
def test_a_fit_sends_what_the_model_says(name: str, told: tuple[int, list[dict[str, Any]]]) -> None:
    world_size, counts = told
    method, _ = counting.METHODS[name]
    layout = model().layout
    num_parameters = 0
    if split_of(method) == "gradients":
        num_parameters = sum(p.numel() for p in make_family(method, model(), 3).parameters.values())
    calls = fit_calls(method, world_size, num_values=layout.num_values, itemsize=8, num_parameters=num_parameters)
    expected = [*calls.once, *calls.step * calls.num_steps, *calls.edge * calls.num_edges]
    for each in counts:
        before, after = each["fits"][name]
        assert difference(after, before) == by_kind(expected)


@pytest.mark.parametrize(("figures", "task"), counting.EVALUATED)
def test_an_evaluation_sends_what_the_model_says(
    figures: str, task: str, told: tuple[int, list[dict[str, Any]]]
) -> None:
    """One batch, so that all but one rank have nothing to say: JSON, then tensors, and each time how many bytes."""
    whole = figures == "all"
    views = views_of(using.net(Categorical()).bank, beginnings=whole)
    if task == "classes":
        tensors = class_state_bytes(using.N, views, num_classes=using.C, num_bins=6, whole=whole)
    else:
        tensors = target_state_bytes(using.N, views, num_targets=2, whole=whole)
    tensors += using.N * using.D * 8 if whole else 0  # rows on which chains are judged
    for each in told[1]:
        (before, after), [text] = each["evaluations"][counting.EVALUATED.index((figures, task))]
        assert difference(after, before) == by_kind(gathered(text) + gathered(tensors))


def difference(after: list[dict[str, int]], before: list[dict[str, int]]) -> tuple[Counter[str], Counter[str]]:
    return tuple(Counter(one) - Counter(two) for one, two in zip(after, before, strict=True))  # type: ignore[return-value]


def by_kind(calls: list[Call]) -> tuple[Counter[str], Counter[str]]:
    made, payload = Counter[str](), Counter[str]()
    for call in calls:
        made[call.kind] += 1
        payload[call.kind] += call.payload
    return made, payload
