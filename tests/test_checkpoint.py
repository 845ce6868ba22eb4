"""Nested values into states and back: what optimisers and schedulers keep, through the JSON of its plain part."""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, MultiStepLR, OneCycleLR, ReduceLROnPlateau, SequentialLR, StepLR

from bnn.checkpoint import pack, unpack
from bnn.errors import ConfigError
from bnn.seeding import generator
from bnn.types import State

profile = settings(max_examples=200, deadline=None, derandomize=True)


def through_json(state: State) -> State:
    """The state with its plain part written as strict JSON and read again, as a bank keeps it."""
    plain = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    return {**json.loads(json.dumps(plain, allow_nan=False)), **tensors}


def same(a: Any, b: Any) -> bool:
    """Equal in value, type and, of floats, in every bit that counts; of tensors in dtype and shape too."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return (
            isinstance(b, dict)
            and isinstance(a, Counter) == isinstance(b, Counter)
            and [(type(key), key) for key in a] == [(type(key), key) for key in b]
            and all(same(a[key], b[key]) for key in a)
        )
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float):
        return (
            type(b) is float
            and (a == b or (math.isnan(a) and math.isnan(b)))
            and (math.copysign(1, a) == math.copysign(1, b) or math.isnan(a))
        )
    return type(a) is type(b) and a == b


def tensor(seed: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Values that tell tensors apart."""
    return torch.randint(0, 100, shape, generator=generator(seed)).to(dtype)


DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
TENSORS = st.builds(
    tensor,
    st.integers(0, 10**6),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
)
PLAIN = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(DTYPES)
    | st.dictionaries(st.integers(-5, 50) | st.text(max_size=3), st.integers(0, 9), max_size=3).map(Counter)
)
# Names that look like the codec's own, and keys that print alike or hold dots, as names of parameters do.
KEYS = (
    st.integers(-3, 12) | st.text(max_size=3) | st.sampled_from(["0", "1", "a", "a.b", "a.", "@tensor", "@items", "b"])
)
NESTED = st.recursive(
    PLAIN | TENSORS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=12,
)


@profile
@given(NESTED)
def test_nested_values_come_back_through_json(value: Any) -> None:
    state = pack("name", value)
    assert "name" in state
    assert all(isinstance(found, Tensor) == (key != "name") for key, found in state.items())
    assert all(key == "name" or key.startswith("name.") for key in state)
    assert same(unpack("name", through_json(state)), value)


@pytest.mark.parametrize(
    "value",
    [
        math.inf,
        -math.inf,
        math.nan,
        -0.0,
        {0: 1, 10: {"exp_avg": 2}},
        {"0": "text", 0: "number"},
        (1, (2, [3, (4,)]), []),
        (),
        {},
        Counter({30: 1, 80: 2}),
        Counter(),
        torch.float16,
        [None, True, 1, 1.0, "1"],
        {"@tensor": "x", "@tuple": [1], "@float": "inf"},
        OrderedDict(a=1, b=(2,)),
    ],
    ids=str,
)
def test_plain_values_come_back(value: Any) -> None:
    found = unpack("x", through_json(pack("x", value)))
    assert same(found, dict(value) if isinstance(value, OrderedDict) else value)


@pytest.mark.parametrize(
    "value",
    [
        {"a.b": torch.zeros(2), "a": {"b": torch.ones(3)}},
        {1: torch.zeros(2), "1": torch.ones(3)},
        {"a": [torch.zeros(2)], "a.0": torch.ones(3)},
        {"a": {"": torch.zeros(2)}, "a.": torch.ones(3)},
    ],
    ids=["dots", "numbers", "places", "empty"],
)
def test_no_two_tensors_share_a_name(value: Any) -> None:
    """Keys that lead to one path when they are joined by dots."""
    assert same(unpack("x", pack("x", value)), value)


def test_several_values_share_a_state() -> None:
    first, second = {"w": torch.ones(2)}, {"w": torch.zeros(3), "n": 4}
    state = {**pack("a", first), **pack("b", second)}
    assert same(unpack("a", state), first)
    assert same(unpack("b", state), second)


def test_tensors_are_copies_both_ways() -> None:
    """What an optimiser does to its moments afterwards changes no state, and the other way round."""
    moment = torch.ones(3, requires_grad=True)
    state = pack("x", {"m": moment})
    with torch.no_grad():
        moment.add_(1.0)
    found = unpack("x", state)["m"]
    assert torch.equal(found, torch.ones(3))
    assert not found.requires_grad
    found.add_(5.0)
    assert torch.equal(unpack("x", state)["m"], torch.ones(3))


def test_through_the_files_of_a_bank(tmp_path: Path) -> None:
    from bnn.bank import files
    from bnn.bank import format as fmt

    value = {
        "state": {0: {"m": torch.arange(6.0).view(2, 3), "step": torch.tensor(3.0)}},
        "best": math.inf,
        7: (1, None),
    }
    tensors, metadata = fmt.encode_state({**pack("x", value), "step": 1}, "state")
    files.write_tensors(tmp_path / "s.safetensors", tensors, metadata)
    mapped = files.map_tensors(tmp_path / "s.safetensors")
    state = fmt.decode_state({name: t.clone() for name, t in mapped.tensors.items()}, mapped.metadata, "state")
    assert same(unpack("x", state), value)


class Rule:
    def __call__(self, epoch: int) -> float:
        return 1.0


@pytest.mark.parametrize(
    ("value", "place", "got"),
    [
        (len, "x", "builtin_function_or_method"),
        ({"a": {"b": [1, len]}}, r"x\.a\.b\.1", "builtin_function_or_method"),
        ({"rule": (0, Rule())}, r"x\.rule\.1", "Rule"),
        ([{1, 2}], r"x\.0", "set"),
        ({"z": 1j}, r"x\.z", "complex"),
        ({"z": b"bytes"}, r"x\.z", "bytes"),
        ({(1, 2): 3}, "x", "dict"),
        ({"a": {None: 1}}, r"x\.a", "dict"),
        ({"a": {True: 1}}, r"x\.a", "dict"),
    ],
)
def test_what_no_checkpoint_can_keep_is_refused_by_its_place(value: Any, place: str, got: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{place}: want numbers, strings, tensors, .*, got {got};"):
        pack("x", value)


# What it is for


def spent(scheduler: Any, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """So many steps of a loop on one parameter."""
    for step in range(steps):
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.full_like(parameter, 0.1 * step + 1)
        optimizer.step()
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(1.0)
        else:
            scheduler.step()


OPTIMIZERS = {
    "sgd": lambda values: torch.optim.SGD(values, 0.1, momentum=0.9),
    "adam": lambda values: torch.optim.Adam(values, 0.1, amsgrad=True),
    "adamw": lambda values: torch.optim.AdamW(values, 0.1),
    "nadam": lambda values: torch.optim.NAdam(values, 0.1),
    "rmsprop": lambda values: torch.optim.RMSprop(values, 0.1, momentum=0.3),
    "adagrad": lambda values: torch.optim.Adagrad(values, 0.1),
    "rprop": lambda values: torch.optim.Rprop(values, 0.1),
}
SCHEDULERS = {
    "step": lambda optimizer: StepLR(optimizer, 2),
    "multi-step": lambda optimizer: MultiStepLR(optimizer, [2, 2, 5]),
    "one cycle": lambda optimizer: OneCycleLR(
        optimizer, 0.3, total_steps=20, cycle_momentum=not optimizer.defaults.keys().isdisjoint({"momentum", "betas"})
    ),
    "plateau": lambda optimizer: ReduceLROnPlateau(optimizer, patience=1),
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda step: 0.9**step),
    "sequential": lambda optimizer: SequentialLR(
        optimizer, [StepLR(optimizer, 2), LambdaLR(optimizer, lambda step: 0.5**step)], milestones=[4]
    ),
}


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("scheduler_name", SCHEDULERS)
def test_optimisers_and_schedulers_go_on_from_a_checkpoint(optimizer_name: str, scheduler_name: str) -> None:
    """Five steps, a checkpoint, five more: in new objects the same values and rates, bit for bit."""
    values = nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3))
    optimizer = OPTIMIZERS[optimizer_name]([values])
    scheduler = SCHEDULERS[scheduler_name](optimizer)
    spent(scheduler, optimizer, 5)
    state = through_json(
        {
            **pack("values", values),
            **pack("optimizer", optimizer.state_dict()),
            **pack("scheduler", scheduler.state_dict()),
        }
    )
    spent(scheduler, optimizer, 5)
    again = nn.Parameter(torch.zeros(2, 3))
    other = OPTIMIZERS[optimizer_name]([again])
    other_scheduler = SCHEDULERS[scheduler_name](other)
    with torch.no_grad():
        again.copy_(unpack("values", state))
    other.load_state_dict(unpack("optimizer", state))
    other_scheduler.load_state_dict(unpack("scheduler", state))
    spent(other_scheduler, other, 5)
    assert torch.equal(again, values)
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
