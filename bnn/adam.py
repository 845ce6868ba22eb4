"""Parameters under Adam as a state that a bank can keep: tensors under flat names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bnn.types import State


def save(optimizer: torch.optim.Adam, named: Mapping[str, Tensor]) -> State:
    """Copies of the parameters (`value.<name>`) and of what Adam knows of them (`adam.<name>.<key>`)."""
    state: State = {}
    for name, parameter in named.items():
        state[f"value.{name}"] = parameter.detach().clone()
        for key, moment in optimizer.state.get(parameter, {}).items():
            state[f"adam.{name}.{key}"] = moment.detach().clone()
    return state


def load(state: State, optimizer: torch.optim.Adam, named: Mapping[str, Tensor]) -> None:
    """Put what `save` gave back into the parameters and the optimiser."""
    for name, parameter in named.items():
        with torch.no_grad():
            parameter.copy_(state[f"value.{name}"])
        prefix = f"adam.{name}."
        moments = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if moments:
            # Adam counts its steps on the CPU, wherever the parameters are.
            optimizer.state[parameter] = {
                key: value.clone() if key == "step" else value.to(parameter.device, copy=True)
                for key, value in moments.items()
            }
