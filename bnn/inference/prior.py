"""Samples of the prior: what the model believes before it sees data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from bnn.distributed import ranks
from bnn.errors import ConfigError, check_kinds
from bnn.model import BayesianModel
from bnn.types import Block, Data, State, make_block


@dataclass(frozen=True)
class Prior:
    """Independent draws theta_i ~ p(theta), each from a generator keyed by (seed, i).

    Args:
        block_size: samples a block, at least 1; the samples do not depend on it.
    """

    block_size: int = 64
    name: ClassVar[str] = "prior"
    split: ClassVar[str] = "rows"

    def __post_init__(self) -> None:
        check_kinds(self)
        if self.block_size < 1:
            raise ConfigError("Prior(block_size=)", want="at least 1", got=str(self.block_size), fix="raise it")

    def run(
        self, model: BayesianModel, data: Data, *, num_samples: int, seed: int, state: State | None = None
    ) -> Iterator[tuple[Block, State]]:
        del data  # the prior has seen none
        first = 0 if state is None else state["step"]
        own = ranks().stride(num_samples)  # sample i whoever draws it
        for start in range(first, len(own), self.block_size):
            indices = own[start : start + self.block_size]
            draws = [model.sample_prior(seed, "prior", index) for index in indices]
            params = {name: torch.stack([draw[name] for draw in draws]) for name in model.layout.names}
            block = make_block(
                params, chain=torch.zeros(len(indices), dtype=torch.int64), draw=torch.tensor(list(indices))
            )
            yield block, {"step": start + len(indices), "num_steps": len(own), "info": {}}
