"""Words that every room shares: params, blocks, batches, states and methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from bnn.model import BayesianModel

Params: TypeAlias = dict[str, Tensor]
"""One tensor a Bayesian parameter, keyed as in `module.named_parameters()`."""

State: TypeAlias = dict[str, Any]
"""What a producer needs to go on: tensors and plain values (numbers, strings, lists, dicts of them).

Every state has `step` and `num_steps` (progress, in the producer's own steps) and `info` (a flat
dict of diagnostics that the bank's manifest keeps).
"""

Data: TypeAlias = Any
"""A pair of tensors `(x, y)`, a `torch.utils.data.Dataset` of such rows, or a `DataLoader`."""


class Batch(NamedTuple):
    """Rows of data: inputs (a tensor, tuple or dict of tensors [B, ...]) and targets [B, ...].

    `weight` [B] multiplies the log likelihood of each row: importance weights of rows that were not
    drawn alike; None is 1 each.
    """

    x: Any
    y: Tensor
    weight: Tensor | None = None


class Block(NamedTuple):
    """K samples together; the only thing that passes from a producer to a bank.

    `params` has a tensor [K, *shape] a parameter. `chain` and `draw` (int64 [K]) say where a sample
    came from. `log_joint` (float64 [K]) is the full-data log joint of the constrained values, NaN
    where it was not computed. `log_weight` (float64 [K]) is 0 unless samples are truly weighted.
    `columns` (float64 [K] each) are what the method declares in its own `columns` and says of each
    sample beside, such as the acceptance of the trajectory that led to it.
    """

    params: Params
    chain: Tensor
    draw: Tensor
    log_joint: Tensor
    log_weight: Tensor
    columns: dict[str, Tensor]

    @property
    def num_samples(self) -> int:
        return len(self.chain)


def make_block(
    params: Params,
    *,
    chain: Tensor,
    draw: Tensor,
    log_joint: Tensor | None = None,
    log_weight: Tensor | None = None,
    columns: Mapping[str, Tensor] | None = None,
) -> Block:
    """A block from `params` [K, *shape] with what is left out filled in: NaN, 0 and no more columns."""
    size = len(chain)
    return Block(
        params=params,
        chain=chain.to(torch.int64),
        draw=draw.to(torch.int64),
        log_joint=torch.full((size,), torch.nan, dtype=torch.float64) if log_joint is None else log_joint.double(),
        log_weight=torch.zeros(size, dtype=torch.float64) if log_weight is None else log_weight.double(),
        columns={name: column.double() for name, column in (columns or {}).items()},
    )


class DrawTable(Protocol):
    """Chain, draw and log weight of S samples, whatever holds them or plans to."""

    @property
    def chain(self) -> Tensor: ...

    @property
    def draw(self) -> Tensor: ...

    @property
    def log_weight(self) -> Tensor: ...

    def __len__(self) -> int: ...


class Method(Protocol):
    """A way of making samples: a frozen dataclass of options with one verb.

    A method whose blocks have more columns names them in a class variable `columns`.
    """

    @property
    def name(self) -> str: ...

    def run(
        self, model: BayesianModel, data: Data, *, num_samples: int, seed: int, state: State | None = None
    ) -> Iterator[tuple[Block, State]]:
        """Yield blocks until `num_samples` samples exist, each with the state that follows it.

        A block may hold no rows (warm-up, optimisation); its state is still worth keeping. Started
        again with a state it yields what would have followed, bit for bit.
        """
        ...
