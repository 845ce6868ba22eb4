"""Evaluation on several ranks: who takes which batches under which samples, and what must be alike before anyone begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from bnn.distributed import ALONE, Ranks
from bnn.evaluation.class_sums import ClassSums
from bnn.evaluation.target_sums import TargetSums
from bnn.functional import FunctionalModel
from bnn.mixtures import Mixture, NormalMixture, PoissonMixture, StudentTMixture
from bnn.types import Data

MIXTURES: dict[str, type[Mixture]] = {kind.__name__: kind for kind in (NormalMixture, PoissonMixture, StudentTMixture)}
PREFIX = "mixture."

Sums = TypeVar("Sums", ClassSums, TargetSums)


class Mesh(NamedTuple):
    """A rank's place among rows of ranks that share a batch, each under its part of the samples."""

    column: Ranks = ALONE  # ranks with the same samples, which take batches in turn
    row: Ranks = ALONE  # ranks with the same batches
    samples: range | None = None  # None for all
    several: bool = False
    shown: bool = True  # whether this rank shows progress


def mesh_of(mesh: tuple[int, int] | None, together: Ranks, num_samples: int) -> Mesh:
    """The place of this rank.

    Raises:
        ConfigError: a mesh that is not of as many ranks.
    """
    column, row = together.placed(mesh)
    if not together.several:
        return Mesh()
    return Mesh(column, row, row.share(num_samples) if row.several else None, True, together.rank == 0)


def check_ranks(
    net: FunctionalModel, data: Mapping[str, Data | None], options: Mapping[str, Any], together: Ranks
) -> None:
    """Raise ConfigError on every rank unless all have the same bank, module, data, options and versions."""
    from bnn.fitting import data_facts, module_facts, versions  # of several ranks alone: it costs time to import
    from bnn.together import check_alike

    held, state = {*net.bank.layout.names, *net.bank.layout.aliases}, net.module.state_dict()
    outside = {name: value for name, value in state.items() if isinstance(value, Tensor) and name not in held}
    facts = {
        "versions": versions(),
        "bank": {"digest": net.bank.digest, "samples": len(net.bank)},
        "module": module_facts(net.module, outside),
        "data": {name: None if one is None else data_facts(one) for name, one in data.items()},
        "options": {name: str(value) for name, value in options.items()},
    }
    check_alike(facts, together)


def merged(like: Sums, states: Sequence[Mapping[str, Any]]) -> Sums:
    """The sums of all ranks of a row, of the rows of data that `like` is of, from their `state`."""
    whole = like.of({})
    for state in states:
        whole.merge(like.of({name: value for name, value in state.items() if not name.startswith(PREFIX)}))
    return whole


def mixture_state(mixture: Mixture) -> dict[str, Any]:
    """A mixture for other ranks."""
    fields = {f"{PREFIX}{name}": value for name, value in mixture._asdict().items()}
    return {f"{PREFIX}kind": type(mixture).__name__, **fields}


def mixture_of(state: Mapping[str, Any]) -> Mixture | None:
    """The mixture that a rank sent, of its part of the samples; None where it has none."""
    fields = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
    if not fields:
        return None
    return MIXTURES[fields.pop("kind")](**fields)
