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
from bnn.scaling import JSON, class_state_bytes, evaluation_calls, fit_calls, target_state_bytes
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


@pytest.mark.parametrize(("figures", "task", "batch_size"), counting.EVALUATED)
def test_an_evaluation_sends_what_the_model_says(
    figures: str, task: str, batch_size: int, told: tuple[int, list[dict[str, Any]]]
) -> None:
    """In one batch all but one rank have nothing to say. JSON, then tensors, and each time how many bytes."""
    whole = figures == "all"
    views = views_of(using.net(Categorical()).bank, beginnings=whole)

    def of_tensors(num_rows: int) -> int:
        judged = num_rows * using.D * 8 if whole else 0  # rows on which chains are judged
        if task == "classes":
            found = class_state_bytes(num_rows, views, num_classes=using.C, num_bins=6, whole=whole)
        else:
            found = target_state_bytes(num_rows, views, num_targets=2, whole=whole)
        return found + judged

    for each in told[1]:
        (before, after), texts = each["evaluations"][counting.EVALUATED.index((figures, task, batch_size))]
        num_rounds = -(-using.N // (batch_size * told[0]))
        assert len(texts) == num_rounds.bit_length()  # of 1 round, 2, 4 and so on
        assert sum(texts) <= num_rounds * JSON
        made, payload = by_kind(evaluation_calls(using.N, told[0], of_tensors, batch_size=batch_size, json_bytes=0))
        payload["all_gather"] += sum(texts)
        assert difference(after, before) == (made, payload)


def difference(after: list[dict[str, int]], before: list[dict[str, int]]) -> tuple[Counter[str], Counter[str]]:
    return tuple(Counter(one) - Counter(two) for one, two in zip(after, before, strict=True))  # type: ignore[return-value]


def by_kind(calls: list[Call]) -> tuple[Counter[str], Counter[str]]:
    made, payload = Counter[str](), Counter[str]()
    for call in calls:
        made[call.kind] += 1
        payload[call.kind] += call.payload
    return made, payload
