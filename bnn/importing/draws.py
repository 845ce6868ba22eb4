"""Draws by chain as a bank: arrays [chains, draws, *shape] of NumPyro, Pyro, ArviZ or any other sampler."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bnn.arrays import read_npz, read_tensors
from bnn.bank import Bank
from bnn.bank.moving import rows_at_once
from bnn.errors import BankMismatch, ConfigError, DataError
from bnn.importing.names import Names, check_entry, check_no_others, check_real, places_of, recorded, renamed, shape_in
from bnn.importing.target import Progress, casts, pour, sample_block, target_of, version_of
from bnn.layout import Layout
from bnn.model import BayesianModel
from bnn.types import Block, make_block


class _Values(NamedTuple):
    """Draws of one entry [chains, draws, *shape of the source], and the order that the module has its axes in."""

    source: str
    array: np.ndarray
    axes: tuple[int, ...] | None

    def rows(self, chain: int, start: int, stop: int) -> Tensor:
        """Draws of a chain [K, *shape], axes in the module's order; a copy where the source's memory is read-only."""
        piece = self.array[chain, start:stop]
        if self.axes is not None:
            piece = piece.transpose(0, *(axis + 1 for axis in self.axes))
        return torch.from_numpy(np.require(piece, requirements=["C", "W"]))


def from_draws(
    draws: Any,
    model: nn.Module | BayesianModel,
    *,
    names: Names | None = None,
    log_joint: Any = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    record: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Bank:
    """A bank of the draws of some other sampler, which keep their chain and draw.

    Rows stand chain by chain. Log weights are 0; `log_joint` is NaN unless it is given, for other tools keep densities of
    another space or without their constants. Values are rounded to the module's dtype, and `bank.json` says from which.

    Args:
        draws: name -> an array [chains, draws, *shape], as of `mcmc.get_samples(group_by_chain=True)` in NumPyro and Pyro;
            or what ArviZ keeps: an `InferenceData` or `DataTree` with a group `posterior`, or that group.
        model: the module that they are of, or a BayesianModel, whose unknowns (`@likelihood.scale`) are then of the
            sample too.
        names: the draws' names -> those of the module, with `transpose` for matrices [in, out], as JAX has them; False
            for what is no parameter.
        log_joint: the full-data log joint of each draw [chains, draws].
        out: a folder to write the bank to; in memory without it.
        overwrite: replace a bank that is there.
        record: more for `bank.json`, such as `{"likelihood": likelihood.to_config()}`.
        progress: told after each block how many samples are in the bank, and S.

    Raises:
        DataError: these are no draws by chain.
        BankMismatch: a name is missing, unknown or of another shape, holds whole numbers, or other chains and draws.
        BankError: a value is NaN or Inf; the row is named.
        ConfigError: a map of names that does not fit.

    Examples:
        >>> import numpy as np, torch
        >>> draws = {"w": np.ones((4, 50, 3, 2)), "b": np.zeros((4, 50, 2)), "tau": np.ones((4, 50))}
        >>> names = {"w": {"name": "weight", "transpose": True}, "b": "bias", "tau": False}
        >>> bank = from_draws(draws, torch.nn.Linear(3, 2), names=names)
        >>> len(bank), bank[0]["weight"].shape, bank.chain.unique().tolist(), int(bank.draw.max())
        (200, torch.Size([2, 3]), [0, 1, 2, 3], 49)
    """
    arrays, chains, steps, package = _arrays_of(draws)
    target = target_of(model)
    values = _matched(arrays, names, target.layout)
    num_chains, num_draws = next(iter(values.values())).array.shape[:2]
    densities = None if log_joint is None else torch.from_numpy(np.array(_array("log_joint", log_joint), dtype=float))
    if densities is not None and tuple(densities.shape) != (num_chains, num_draws):
        got = f"{list(densities.shape)}"
        raise BankMismatch("log_joint", want=f"[{num_chains}, {num_draws}]", got=got, fix="pass one number a draw")
    chains = np.arange(num_chains) if chains is None else chains
    steps = np.arange(num_draws) if steps is None else steps
    size = rows_at_once(target.layout)

    def blocks() -> Iterator[Block]:
        for place in range(num_chains):
            for start in range(0, num_draws, size):
                stop = min(start + size, num_draws)
                found = {name: one.rows(place, start, stop) for name, one in values.items()}
                yield make_block(
                    sample_block(found, target.layout, "draws", place * num_draws + start),
                    chain=torch.full((stop - start,), int(chains[place])),
                    draw=torch.from_numpy(steps[start:stop].astype(np.int64)),
                    log_joint=None if densities is None else densities[place, start:stop],
                )

    options = {
        "from": "draws",
        "package": package,
        "chains": num_chains,
        "draws": num_draws,
        **recorded(names),
        "sha256": _digest(values, densities),
        "cast": casts({name: str(one.array.dtype) for name, one in values.items()}, target.layout),
    }
    return pour(
        blocks(), target, options, out=out, overwrite=overwrite, record=record,
        more_versions=version_of(package), total=num_chains * num_draws, progress=progress,
    )  # fmt: skip


def read_draws(path: str | Path) -> Any:
    """The draws that a file holds: `.safetensors`, `.npz`, or ArviZ's `.nc`, arrays [chains, draws, *shape].

    In a `.safetensors` file of `bnn bank export --chains` they are what begins with `posterior.`.

    Raises:
        DataError: no such file, or none of these kinds; pickled arrays are refused.
        ConfigError: a `.nc` file, and ArviZ is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(str(path), want="a file of draws", got="none", fix="check the path")
    if path.suffix == ".safetensors":
        tensors = read_tensors(path)
        grouped = {n.removeprefix("posterior."): t for n, t in tensors.items() if n.startswith("posterior.")}
        return dict(grouped or tensors)
    if path.suffix == ".npz":
        return read_npz(path, fix="save it anew")
    if path.suffix == ".nc":
        try:
            import arviz
        except ImportError as error:
            raise ConfigError(str(path), want="ArviZ to read it", got="none", fix="pip install arviz") from error
        try:
            return arviz.from_netcdf(path)["posterior"]
        except (OSError, KeyError, ValueError, TypeError) as error:
            got = f"{type(error).__name__}: {error}"[:200]
            raise DataError(str(path), want="a file of ArviZ with a posterior", got=got, fix="save it anew") from error
    raise DataError(
        str(path), want=".safetensors, .npz or .nc", got=path.suffix or "no suffix", fix="save the draws as one of them"
    )


def _arrays_of(draws: Any) -> tuple[dict[str, np.ndarray], np.ndarray | None, np.ndarray | None, str]:
    """Arrays by name, numbers of chains and draws where the source names them, and the package they are of."""
    posterior = getattr(draws, "posterior", None)
    if posterior is None:
        posterior = draws
    if hasattr(posterior, "data_vars"):
        found = {}
        for name, variable in posterior.data_vars.items():
            if not {"chain", "draw"} <= set(variable.dims):
                got = f"axes {', '.join(map(str, variable.dims)) or 'none'}"
                raise DataError(f"draws '{name}'", want="axes chain and draw", got=got, fix="leave it out of the group")
            found[str(name)] = np.asarray(variable.transpose("chain", "draw", ...).values)
        return found, _numbers(posterior, "chain"), _numbers(posterior, "draw"), "arviz"
    if not isinstance(posterior, Mapping):
        raise DataError(
            "draws",
            want="name -> array [chains, draws, *shape], or ArviZ's InferenceData or DataTree",
            got=type(draws).__name__,
            fix="pass mcmc.get_samples(group_by_chain=True)",
        )
    arrays = {str(name): _array(str(name), values) for name, values in posterior.items()}
    kind = type(next(iter(posterior.values()), None)).__module__.partition(".")[0]
    return arrays, None, None, {"jaxlib": "jax"}.get(kind, kind)


def _numbers(posterior: Any, axis: str) -> np.ndarray | None:
    """The numbers that ArviZ has for chains or draws; None where they are no such numbers."""
    if axis not in getattr(posterior, "coords", ()):
        return None
    numbers = np.asarray(posterior.coords[axis].values)
    whole = numbers.dtype.kind in "iu" and bool((numbers >= 0).all()) and len(np.unique(numbers)) == len(numbers)
    return numbers if whole else None


def _array(name: str, values: Any) -> np.ndarray:
    """An array of NumPy, JAX or torch as one of NumPy, without a copy where that can be."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values  # which NumPy has not
    found = np.asarray(values)
    if found.ndim < 2:
        raise DataError(
            f"draws '{name}'",
            want="[chains, draws, *shape]",
            got=f"{list(found.shape)}",
            fix="pass draws by chain: get_samples(group_by_chain=True), or values[None] for one chain",
        )
    return found


def _matched(arrays: Mapping[str, np.ndarray], names: Names | None, layout: Layout) -> dict[str, _Values]:
    """The arrays under the module's names, each checked."""
    places_of(arrays, names, "the draws")
    found: dict[str, _Values] = {}
    for source, array in arrays.items():
        said = renamed(source, names)
        if said is not None:
            found[said.name] = _Values(source, array, said.axes(array.ndim - 2))
    check_no_others(found, layout.names, layout, "draws")
    first = None
    for entry in layout.entries:
        one = found.get(entry.name)
        place = "draws" if one is None else f"draws '{one.source}'"
        check_entry(entry, None if one is None else shape_in(one.source, one.array.shape[2:], one.axes), place)
        assert one is not None
        check_real(one.source, str(one.array.dtype), one.array.dtype.kind == "f", place)
        first = first or one
        if one.array.shape[:2] != first.array.shape[:2]:
            raise BankMismatch(
                place,
                want=f"{list(first.array.shape[:2])} chains and draws, as '{first.source}' has",
                got=f"{list(one.array.shape[:2])}",
                fix="pass draws of one run",
            )
    return {entry.name: found[entry.name] for entry in layout.entries}


def _digest(values: Mapping[str, _Values], densities: Tensor | None) -> str:
    """Of all values as they came, entry by entry, by which these draws are told from others."""
    digest = hashlib.sha256()
    for name, one in values.items():
        digest.update(f"{name} {one.axes} {one.array.dtype} {one.array.shape}".encode())
        for chain in one.array:
            digest.update(np.ascontiguousarray(chain).data)
    if densities is not None:
        digest.update(densities.numpy().tobytes())
    return digest.hexdigest()
