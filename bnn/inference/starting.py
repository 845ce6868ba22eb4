"""Where chains start: draws of the prior, the module, a climb from either, or rows of a bank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from bnn.errors import ConfigError, choose
from bnn.inference.climbing import Climb, Start, climb, starts
from bnn.inference.density import Density
from bnn.model import BayesianModel
from bnn.seeding import generator
from bnn.types import Params

Init: TypeAlias = Literal["prior", "ensemble", "module", "map"]
INITS: tuple[str, ...] = ("prior", "ensemble", "module", "map")

CLIMB_STEPS, CLIMB_RATE = 1000, 0.05  # of the optimisation before warm-up, in prior standard deviations a step


def check_init(place: str, init: Any) -> None:
    """Raise ConfigError unless `init` is one of INITS, or a bank."""
    if isinstance(init, str):
        choose(place, init, INITS)
    elif not (hasattr(init, "block") and hasattr(init, "layout")):
        raise ConfigError(place, want=f"one of {', '.join(INITS)}, or a bank", got=repr(init)[:100], fix="choose one")


def positions(
    model: BayesianModel, init: Init | Sequence[Params], num_chains: int, seed: int, *, chains: range | None = None
) -> Tensor:
    """Positions [C, P] in unconstrained space, before any climb; of these `chains` alone where they are named.

    `"prior"` and `"ensemble"`: a draw of the prior each; `"module"` and `"map"`: the module's values; a bank:
    rows of it, drawn without repeats.

    Raises:
        BankMismatch: a bank of another module.
        ConfigError: a bank with fewer rows than chains.
    """
    chains = range(num_chains) if chains is None else chains
    if isinstance(init, str):
        kind: Start = "prior" if init in ("prior", "ensemble") else "module"
        return starts(model, kind, len(chains), seed, first=chains.start)
    bank: Any = init
    if bank.layout.fingerprint != model.layout.fingerprint:  # dtypes may differ: chains may move in another
        model.layout.require(bank.layout, place="init")
    if len(bank) < num_chains:
        raise ConfigError(
            "init", want=f"a bank with a row for each of {num_chains} chains", got=f"{len(bank)}", fix="start fewer"
        )
    rows = torch.randperm(len(bank), generator=generator(seed, "start"))[chains.start : chains.stop]
    params = bank.block(rows).params
    return model.unconstrain({e.name: params[e.name].to(e.dtype, copy=True) for e in model.layout.entries}).to(
        model.device
    )


def climbs(init: Init | Sequence[Params]) -> bool:
    """Whether chains climb before they sample."""
    return init in ("ensemble", "map") if isinstance(init, str) else False


def first_climb(flat: Tensor, scale: Tensor) -> Climb:
    """A climb that begins at positions [C, P], in units of the prior's scale [P]."""
    return Climb.of(flat / scale)


def climb_step(density: Density, at: Climb, scale: Tensor, step: int) -> Climb:
    """One step of Adam up the log density of every chain, of CLIMB_STEPS in all.

    The positions that it leads to are no draws: warm-up makes those.
    """
    gradient = density(at.flat * scale).gradient * scale
    return climb(at, gradient, step=step, num_steps=CLIMB_STEPS, lr=CLIMB_RATE)
