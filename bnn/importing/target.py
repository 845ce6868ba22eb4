"""What an import becomes: the layout of a module, and the bank that blocks are poured into."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bnn.bank import Bank, BankWriter
from bnn.bank import format as fmt
from bnn.errors import BankError, BankMismatch
from bnn.fitting import versions
from bnn.layout import Layout, layout_of
from bnn.model import BayesianModel
from bnn.types import Block, Params

Progress = Callable[[int, int], object]  # told how much is done, and how much there is


class Target(NamedTuple):
    """The bank to be made, before its samples."""

    module: nn.Module
    layout: Layout
    config: dict[str, Any]

    def base(self) -> Params:
        """Parameters outside the sample and buffers, as the module has them."""
        kept = set(self.layout.names) | set(self.layout.aliases)
        tensors = {name: t for name, t in self.module.state_dict().items() if isinstance(t, Tensor)}
        return {name: tensor.detach() for name, tensor in tensors.items() if name not in kept}


def target_of(
    model: nn.Module | BayesianModel, *, buffers: Sequence[str] = (), only: Sequence[str] | None = None
) -> Target:
    """The layout of samples of a module, or of a model with its unknowns.

    Args:
        model: a module, all of whose parameters are in the sample; or a BayesianModel, which says which are.
        buffers: that belong to the sample too.
        only: the parameters of the sample, where the source decides it; a BayesianModel must agree.

    Raises:
        BankMismatch: the BayesianModel has others in its sample.
    """
    module = model.module if isinstance(model, BayesianModel) else model
    full = model.layout if isinstance(model, BayesianModel) else layout_of(module)
    own = layout_of(module, buffers=buffers)
    layout = Layout((*full.entries, *(entry for entry in own.entries if entry.name in buffers)), full.aliases)
    if only is not None:
        chosen = {name for name in layout.names if name in only}
        if isinstance(model, BayesianModel) and chosen != set(layout.names):
            raise BankMismatch(
                "bayesian",
                want=f"the parameters of the source: {', '.join(only)[:200]}",
                got=", ".join(layout.names)[:200],
                fix="pass BayesianModel(bayesian=[...]) with those, and noise that is fixed",
            )
        aliases = {alias: name for alias, name in layout.aliases.items() if name in chosen}
        layout = Layout(tuple(entry for entry in layout.entries if entry.name in chosen), aliases)
    return Target(module, layout, model.to_config() if isinstance(model, BayesianModel) else {})


def sample_block(values: Mapping[str, Tensor], layout: Layout, place: str, first_row: int) -> Params:
    """Values [K, *shape] in the layout's dtypes on the CPU, in its order.

    Raises:
        BankError: a row holds NaN or Inf, or what the entry's dtype cannot hold; parameter and row are named.
    """
    params = {e.name: values[e.name].detach().to("cpu", e.dtype).contiguous() for e in layout.entries}
    fmt.check_rows(params, place, first_row)
    return params


def casts(dtypes: Mapping[str, str], layout: Layout) -> dict[str, str]:
    """What was kept in another dtype than it came in: entry -> the dtype of the source."""
    kept = {entry.name: str(entry.dtype).removeprefix("torch.") for entry in layout.entries}
    return {name: dtype for name, dtype in dtypes.items() if kept.get(name, dtype) != dtype}


def version_of(package: str) -> dict[str, str]:
    """The version of a package for `bank.json`, where it is installed."""
    try:
        return {package: version(package)}
    except PackageNotFoundError:
        return {}


def pour(
    blocks: Iterable[Block],
    target: Target,
    options: Mapping[str, Any],
    *,
    out: str | Path | None,
    overwrite: bool,
    record: Mapping[str, Any] | None,
    more_versions: Mapping[str, str] | None = None,
    total: int | None = None,
    progress: Progress | None = None,
) -> Bank:
    """The bank of these blocks, on disk or in memory; whatever goes wrong, half a bank is not left behind.

    Args:
        blocks: of the target's layout.
        target: what they are samples of.
        options: of the method "import": where the samples come from, and what tells them apart from others.
        out: a folder; in memory without it.
        overwrite: replace a bank that is there.
        record: more for `bank.json`.
        more_versions: of what made the samples.
        total: how many samples there will be, where that is known.
        progress: told after each block how many samples are in the bank, and `total`.

    Raises:
        BankError: there is no sample.
    """
    config = {
        **target.config,
        "method": {"name": "import", "options": dict(options)},
        "versions": {**versions(), **(more_versions or {})},
        "model": None,
        "data": None,
        **(record or {}),
    }

    def counted() -> Iterable[Block]:
        done = 0
        for block in blocks:
            yield block
            done += block.num_samples
            if progress is not None and total is not None:
                progress(done, total)
        if not done:
            raise BankError(str(options["from"]), want="at least one sample", got="none", fix="pass some")

    if out is None:
        info = {**config, "complete": True}
        copied = [block._replace(params=_owned(block.params)) for block in counted()]
        return Bank.from_blocks(copied, layout=target.layout, info=info, base=target.base())
    writer = BankWriter(out, layout=target.layout, config=config, base=target.base(), overwrite=overwrite)
    try:
        for block in counted():
            writer.append(block)
        writer.close()
    except BaseException:
        writer.abandon(rows=True)
        raise
    return Bank.open(out)


def _owned(params: Params) -> Params:
    """The same values in memory of the bank's own: the source may change its arrays."""
    return {name: torch.empty_like(tensor).copy_(tensor) for name, tensor in params.items()}
