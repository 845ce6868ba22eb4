"""States of the library `posteriors` as a bank: what its chains passed through, or draws from its approximations."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnn.bank import Bank
from bnn.bank import format as fmt
from bnn.bank.moving import rows_at_once
from bnn.errors import BankError, BankMismatch, ConfigError
from bnn.importing.names import Names, check_entry, check_no_others, check_real, places_of, recorded, renamed, shape_in
from bnn.importing.target import Progress, casts, pour, sample_block, target_of, version_of
from bnn.layout import Layout
from bnn.model import BayesianModel
from bnn.types import Block, Params, make_block

SPREADS = ("log_sd_diag", "sd_diag", "prec_diag", "prec", "cov", "L_factor")  # what only a state of a distribution has


def from_states(
    states: Any,
    model: nn.Module | BayesianModel,
    *,
    names: Names | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    record: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Bank:
    """A bank of states of the library `posteriors`, one draw a state; states are taken one by one as they come.

    A state whose params have one axis more than the module's, as of chains that run side by side under `torch.vmap`, is
    one draw of each chain. Log joints are NaN: the library's `log_posterior` is of a batch, and scaled as its user likes.

    Args:
        states: an iterable of states, such as of `posteriors.sgmcmc.sghmc`, or of their `params`; it may be a generator
            that samples as it goes. Or stacked params, name -> [S, *shape], as `posteriors.vi.diag.sample(state, (S,))`
            gives them. Params are nested dictionaries or TensorDicts, whose names are joined by dots.
        model: the module that they are of, or a BayesianModel.
        names: the states' names -> those of the module, where they differ.
        out: a folder to write the bank to; in memory without it.
        overwrite: replace a bank that is there.
        record: more for `bank.json`, such as `{"likelihood": likelihood.to_config()}`.
        progress: told after each block how many samples are in the bank, and S where that is known.

    Raises:
        ConfigError: a state of a distribution, which has to be sampled first; a map of names that does not fit.
        BankMismatch: a name is missing, unknown or of another shape, or holds whole numbers.
        BankError: no state, or a value is NaN or Inf; the row is named.

    Examples:
        >>> import torch
        >>> module = torch.nn.Linear(3, 2)
        >>> walk = ({"weight": torch.full((2, 3), float(step)), "bias": torch.zeros(2)} for step in range(5))
        >>> bank = from_states(walk, module)
        >>> bank.draw.tolist(), float(bank[3]["weight"][0, 0])
        ([0, 1, 2, 3, 4], 3.0)

    Source: Duffield et al. (2024), arXiv:2406.00104; https://github.com/normal-computing/posteriors.
    """
    target = target_of(model)
    layout = target.layout
    if isinstance(getattr(states, "params", None), list):  # states that torch.stack put together keep a list of them
        states = states.params
    stacked = _params_of(states, "states") if hasattr(states, "params") or hasattr(states, "keys") else None
    found = (
        _as_they_come(states, names, layout)
        if stacked is None
        else _of_stacked(_matched(stacked, names, layout, "states")[0], layout)
    )
    first = next(found, None)
    if first is None:
        raise BankError("states", want="at least one", got="none", fix="pass the states of a chain")
    digest = hashlib.sha256()
    for name in layout.names:
        digest.update(fmt.tensor_bytes(first.params[name].cpu().contiguous()))
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in first.params.items()}

    def blocks() -> Iterator[Block]:
        done = 0
        for block in itertools.chain([first], found):
            yield block._replace(params=sample_block(block.params, layout, "states", done))
            done += block.num_samples

    length = len(states) if hasattr(states, "__len__") and stacked is None else None
    total = len(next(iter(stacked.values()))) if stacked else length and length * first.num_samples
    options = {"from": "posteriors", **recorded(names), "sha256": digest.hexdigest(), "cast": casts(dtypes, layout)}
    return pour(
        blocks(), target, options, out=out, overwrite=overwrite, record=record,
        more_versions=version_of("posteriors"), total=total, progress=progress,
    )  # fmt: skip


def _params_of(state: Any, place: str) -> dict[str, Tensor]:
    """The tensors of a state by name, nested names joined by dots.

    Raises:
        ConfigError: it is a distribution, or has no tensors.
    """
    spread = next((name for name in SPREADS if hasattr(state, name)), None)
    if spread is not None:
        raise ConfigError(
            place,
            want="draws",
            got=f"a distribution, of which '{spread}' tells the spread",
            fix="sample it first: posteriors.vi.diag.sample(state, (S,)), or the sample of its own module",
        )
    params = getattr(state, "params", state)
    found: dict[str, Tensor] = {}
    for name, value in _leaves(params, ()):
        if not isinstance(value, Tensor):
            raise ConfigError(
                place, want="params: names and tensors", got=type(value).__name__, fix="pass named parameters, a dict"
            )
        found[name] = value.detach()
    return found


def _leaves(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if hasattr(tree, "items") and not isinstance(tree, Tensor):
        for key, value in tree.items():
            yield from _leaves(value, (*path, str(key)))
    else:
        yield ".".join(path), tree


def _matched(found: Mapping[str, Tensor], names: Names | None, layout: Layout, place: str) -> tuple[Params, int]:
    """Tensors under the module's names, and how many axes stand before those of one sample: 0 or 1."""
    places_of(found, names, place)
    shapes = {entry.name: entry.shape for entry in layout.entries}
    ordered: Params = {}
    leads = set[int]()
    for source, tensor in found.items():
        said = renamed(source, names)
        if said is None:
            continue
        lead = tensor.dim() - len(shapes.get(said.name, tensor.shape))
        axes = said.axes(tensor.dim() - lead)
        if axes is not None and lead >= 0:
            shape_in(source, tensor.shape[lead:], axes)
            tensor = tensor.permute(*range(lead), *(axis + lead for axis in axes))
        ordered[said.name] = tensor
        leads.add(lead)
    check_no_others(ordered, layout.names, layout, place)
    lead = 1 if leads == {1} else 0
    for entry in layout.entries:
        given = ordered.get(entry.name)
        check_entry(entry, None if given is None else tuple(given.shape[lead:]), place)
        assert given is not None
        check_real(entry.name, str(given.dtype), given.is_floating_point(), place)
    sizes = {len(tensor) for tensor in ordered.values()} if lead else set[int]()
    if len(sizes) > 1:
        raise BankMismatch(place, want="as many rows of each", got=f"{sorted(sizes)}", fix="stack params of one run")
    return {entry.name: ordered[entry.name] for entry in layout.entries}, lead


def _as_they_come(states: Iterable[Any], names: Names | None, layout: Layout) -> Iterator[Block]:
    """A block a state: one row, or one for each chain."""
    for step, state in enumerate(states):
        params, lead = _matched(_params_of(state, f"state {step}"), names, layout, f"state {step}")
        if not lead:
            params = {name: tensor[None] for name, tensor in params.items()}  # [1, *shape]
        count = len(next(iter(params.values())))
        yield make_block(params, chain=torch.arange(count), draw=torch.full((count,), step))


def _of_stacked(params: Params, layout: Layout) -> Iterator[Block]:
    """Blocks of stacked params [S, *shape]: draws of one chain."""
    for entry in layout.entries:
        if params[entry.name].dim() != len(entry.shape) + 1:
            raise BankMismatch(
                "states", want=f"[S, *{list(entry.shape)}] as '{entry.name}'", got=f"{list(params[entry.name].shape)}",
                fix="stack draws: posteriors.vi.diag.sample(state, (S,)); or pass a list of states",
            )  # fmt: skip
    size, count = rows_at_once(layout), len(params[layout.names[0]])
    for start in range(0, count, size):
        rows = {name: tensor[start : start + size] for name, tensor in params.items()}
        stop = min(start + size, count)
        yield make_block(rows, chain=torch.zeros(stop - start), draw=torch.arange(start, stop))
