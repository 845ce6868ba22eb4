"""Outputs of a module as a list of tensors, and back: any nesting of tuples, lists, dicts and dataclasses."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bnn.errors import ModuleError


class _Opened(NamedTuple):
    """A dataclass with its fields as a list: torch walks into those only that are registered with it."""

    fields: list[Any]
    whole: _Hidden


class _Hidden:
    """An object that a walk does not enter."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Form(NamedTuple):
    """What outputs are apart from their tensors."""

    structure: pytree.TreeSpec
    others: list[Any]  # a leaf each: what is no tensor, and None for what is one
    is_tensor: list[bool]

    def build(self, tensors: Sequence[Tensor]) -> Any:
        """Outputs of this form with other tensors in them."""
        given = iter(tensors)
        leaves = [
            next(given) if is_tensor else other for is_tensor, other in zip(self.is_tensor, self.others, strict=True)
        ]
        return _closed(pytree.tree_unflatten(leaves, self.structure))


def taken_apart(outputs: Any) -> tuple[list[Tensor], Form | None]:
    """The tensors of outputs in their order, and the form around them; None for a single tensor.

    Raises:
        ModuleError: outputs hold an object that is neither tensors nor a plain value.
    """
    if isinstance(outputs, Tensor):
        return [outputs], None
    leaves, structure = pytree.tree_flatten(_opened(outputs))
    is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
    others = [None if here else leaf for here, leaf in zip(is_tensor, leaves, strict=True)]
    for other in others:
        if not isinstance(other, (type(None), bool, int, float, str, _Hidden)):
            raise ModuleError(
                "module",
                want="outputs of tensors in tuples, lists, dicts and dataclasses",
                got=f"a {type(other).__name__} among them",
                fix="wrap the module so that it returns what you need as tensors",
            )
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)], Form(structure, others, is_tensor)


def put_together(tensors: Sequence[Tensor], form: Form | None) -> Any:
    """The inverse of `taken_apart`."""
    return tensors[0] if form is None else form.build(tensors)


def combined(combine: Callable[[list[Tensor]], Tensor], outputs: Sequence[Any]) -> Any:
    """Combine the tensors that stand at the same place of several outputs of one form."""
    if isinstance(outputs[0], Tensor):
        return combine(list(outputs))
    apart = [taken_apart(output) for output in outputs]
    columns = zip(*(tensors for tensors, _ in apart), strict=True)
    return put_together([combine(list(column)) for column in columns], apart[0][1])


def stacked(tensors: list[Tensor]) -> Tensor:
    """K times [B, ...] -> [K, B, ...]."""
    return torch.stack(tensors)


def _is_plain_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type) and type(value) not in pytree.SUPPORTED_NODES


def _opened(outputs: Any) -> Any:
    def open_one(value: Any) -> Any:
        if not _is_plain_dataclass(value):
            return value
        fields = [_opened(getattr(value, field.name)) for field in dataclasses.fields(value)]
        empty = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(empty, field.name, None)  # frozen ones too; tensors of a sample are not kept alive
        return _Opened(fields, _Hidden(empty))

    return pytree.tree_map(open_one, outputs, is_leaf=_is_plain_dataclass)


def _closed(outputs: Any) -> Any:
    def close_one(value: Any) -> Any:
        if not isinstance(value, _Opened):
            return value
        made = copy.copy(value.whole.value)
        for field, inner in zip(dataclasses.fields(made), value.fields, strict=True):
            object.__setattr__(made, field.name, _closed(inner))
        return made

    return pytree.tree_map(close_one, outputs, is_leaf=lambda value: isinstance(value, _Opened))
