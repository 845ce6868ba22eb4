"""Modules whose outputs are looked up by row number, so that a sample can say anything one likes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import bnn
from bnn.layout import Entry, layout_of
from bnn.likelihoods import SCALE, Likelihood
from bnn.seeding import generator
from bnn.types import make_block


class Table(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(shape, dtype=torch.float64))

    def forward(self, rows: Tensor) -> Tensor:
        return self.table[rows]


def table_net(
    tables: Tensor,
    *,
    log_weight: Tensor | None = None,
    scales: Tensor | None = None,
    likelihood: Likelihood | None = None,
    chain: Tensor | None = None,
    draw: Tensor | None = None,
    **info: object,
) -> bnn.FunctionalModel:
    """A module under a bank whose sample s gives `tables[s]`, with weights and noise scales [S] of their own."""
    module, size = Table(tuple(tables.shape[1:])), len(tables)
    extra = [] if scales is None else [Entry(SCALE, (), scales.dtype)]
    params = {"table": tables} if scales is None else {"table": tables, SCALE: scales}
    chain = torch.arange(size) if chain is None else chain
    draw = torch.zeros(size, dtype=torch.int64) if draw is None else draw
    block = make_block(params, chain=chain, draw=draw, log_weight=log_weight)
    if likelihood is not None:
        info["likelihood"] = likelihood.to_config()
    return bnn.FunctionalModel(module, bnn.Bank.from_blocks([block], layout=layout_of(module, extra=extra), info=info))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed, *shape), dtype=torch.float64)
