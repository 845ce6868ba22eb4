"""The modules that the command line can build from a few words, and those that it imports."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from bnn.errors import ConfigError, choose
from bnn.seeding import isolated

MAX_WIDTH = 65_536
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "silu": nn.SiLU}


def build(spec: str, *, input_shape: Sequence[int], num_outputs: int, seed: int) -> nn.Module:
    """A module in eval mode, its initial values drawn from `seed`.

    Args:
        spec: `mlp:64,64` with widths of hidden layers and, after them, `tanh` (default), `relu` or
            `silu`; `cnn`, two convolutions for inputs [channels, height, width]; or
            `package.module:function`, called with `input_shape=` and `num_outputs=`.
        input_shape: shape of one row.
        num_outputs: classes, or targets.
        seed: of the initial values.

    Raises:
        ConfigError: the spec names no module, or one that does not fit the inputs.
    """
    with isolated(seed, "module"):
        if spec == "mlp" or spec.startswith("mlp:"):
            return _mlp(spec, math.prod(input_shape), num_outputs).eval()
        if spec == "cnn":
            return _cnn(tuple(input_shape), num_outputs).eval()
        if is_reference(spec):
            module = call(spec, "model", input_shape=tuple(input_shape), num_outputs=num_outputs)
            if not isinstance(module, nn.Module):
                raise ConfigError(f"model '{spec}'", want="a torch module", got=type(module).__name__, fix="return one")
            _try(module.eval(), spec, tuple(input_shape), num_outputs)
            return module
    raise ConfigError(
        "model", want="mlp:WIDTHS[,ACTIVATION], cnn or package.module:function", got=repr(spec), fix="try mlp:64,64"
    )


def is_reference(spec: str) -> bool:
    """Whether a spec is `package.module:function`, which runs the user's code."""
    package, colon, function = spec.partition(":")
    return (
        bool(colon)
        and not package.endswith(".csv")
        and function.isidentifier()
        and all(part.isidentifier() for part in package.split("."))
    )


def load(spec: str, place: str) -> Callable[..., Any]:
    """The function that `package.module:function` names; the current folder is searched too."""
    package, _, name = spec.partition(":")
    folder = os.getcwd()
    added = folder not in sys.path
    if added:
        sys.path.insert(0, folder)
    try:
        function = getattr(importlib.import_module(package), name)
    except Exception as error:  # importing runs the user's code, which may raise anything
        raise ConfigError(
            f"{place} '{spec}'",
            want="an importable function",
            got=f"{type(error).__name__}: {error}",
            fix="check the name, and run from the folder that holds the package",
        ) from error
    finally:
        if added:
            sys.path.remove(folder)
    if not callable(function):
        raise ConfigError(f"{place} '{spec}'", want="a function", got=type(function).__name__, fix="name a function")
    return function  # type: ignore[no-any-return]


def call(spec: str, place: str, **options: Any) -> Any:
    """What the function that `package.module:function` names returns; whatever it raises is the user's to mend."""
    function = load(spec, place)
    try:
        return function(**options)
    except Exception as error:
        raise ConfigError(
            f"{place} '{spec}'",
            want=f"a function that takes {', '.join(options) or 'no arguments'}",
            got=f"{type(error).__name__}: {error}",
            fix="mend it; --debug shows where",
        ) from error


def _try(module: nn.Module, spec: str, input_shape: tuple[int, ...], num_outputs: int) -> None:
    """Run a module of the user on two rows of zeros: what does not fit shows here, and not in the middle of a fit."""
    want = f"a module from rows {list(input_shape)} to {num_outputs} outputs"
    try:
        with torch.no_grad():
            outputs = module(torch.zeros(2, *input_shape))
        got = f"outputs {list(outputs.shape)}" if isinstance(outputs, torch.Tensor) else type(outputs).__name__
        fits = isinstance(outputs, torch.Tensor) and tuple(outputs.shape) == (2, num_outputs)
    except Exception as error:
        raise ConfigError(
            f"model '{spec}'", want=want, got=f"{type(error).__name__}: {error}", fix="mend it; --debug shows where"
        ) from error
    if not fits and not (num_outputs == 1 and got == "outputs [2]"):
        raise ConfigError(f"model '{spec}'", want=want, got=got, fix="use input_shape and num_outputs as given")


def _mlp(spec: str, num_inputs: int, num_outputs: int) -> nn.Module:
    words = [word.strip() for word in spec.partition(":")[2].split(",") if word.strip()]
    activation = words.pop() if words and not words[-1].isdecimal() else "tanh"
    choose("model mlp", activation, list(ACTIVATIONS))
    if not all(word.isdecimal() and 0 < int(word) <= MAX_WIDTH for word in words):
        raise ConfigError(
            "model mlp", want=f"widths such as 64,64, at most {MAX_WIDTH}", got=repr(spec), fix="try mlp:64,64,tanh"
        )
    widths = [num_inputs, *map(int, words)]
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], num_outputs))


def _cnn(input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    if len(input_shape) != 3 or min(input_shape[1:]) < 4:
        raise ConfigError(
            "model cnn",
            want="inputs [channels, height, width] of at least 4 x 4",
            got=str(list(input_shape)),
            fix="use mlp:64,64 for such rows",
        )
    return nn.Sequential(
        nn.Conv2d(input_shape[0], 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, num_outputs),
    )
