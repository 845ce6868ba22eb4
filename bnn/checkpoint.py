"""Any nesting of plain values and tensors as a state that a bank can keep: tensors by name, the rest as JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bnn.errors import ConfigError
from bnn.types import State


def pack(name: str, value: Any) -> State:
    """A state of one plain value under `name`, and of the tensors in it under `name.<number>`, copied.

    Args:
        name: what the state calls it.
        value: dicts with keys of str or int, lists, tuples, tensors, numbers, strings, None; such as the
            `state_dict` of an optimiser or scheduler.

    Raises:
        ConfigError: something else, whose place is named.
    """
    state: State = {}
    plain = _pack(value, name, state)
    return {name: plain, **state}


def unpack(name: str, state: State) -> Any:
    """What `pack` was given."""
    return _unpack(state[name], state)


def _pack(value: Any, path: str, state: State) -> Any:
    if isinstance(value, Tensor):
        name = f"{path.partition('.')[0]}.{len(state)}"  # by number: paths of different keys can read alike
        state[name] = value.detach().clone()
        return {"@tensor": name}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"@float": str(value)}
    if isinstance(value, Counter):
        return {"@counter": [[key, count] for key, count in value.items()]}
    if isinstance(value, Mapping) and all(type(key) in (str, int) for key in value):
        return {"@items": [[key, _pack(item, f"{path}.{key}", state)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_pack(item, f"{path}.{place}", state) for place, item in enumerate(value)]
        return {"@tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, torch.dtype):
        return {"@dtype": str(value).removeprefix("torch.")}
    raise ConfigError(
        path,
        want="numbers, strings, tensors, and lists and dicts of them, which a checkpoint can keep",
        got=type(value).__name__,
        fix="use an optimiser or scheduler whose state_dict holds no other objects",
    )


def _unpack(value: Any, state: State) -> Any:
    if isinstance(value, list):
        return [_unpack(item, state) for item in value]
    match value:
        case {"@tensor": name}:
            return state[name].clone()
        case {"@float": text}:
            return float(text)
        case {"@counter": items}:
            return Counter(dict(items))
        case {"@items": items}:
            return {key: _unpack(item, state) for key, item in items}
        case {"@tuple": items}:
            return tuple(_unpack(item, state) for item in items)
        case {"@dtype": name}:
            return getattr(torch, name)
        case _:
            return value
