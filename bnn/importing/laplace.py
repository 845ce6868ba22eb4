"""A posterior of laplace-torch as a bank: its own draws, under the module's names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnn.bank import Bank
from bnn.bank import format as fmt
from bnn.bank.moving import rows_at_once
from bnn.errors import BankMismatch, ConfigError
from bnn.importing.names import check_entry
from bnn.importing.target import Progress, Target, casts, pour, sample_block, target_of, version_of
from bnn.model import BayesianModel
from bnn.seeding import generator
from bnn.types import Block, Params, make_block


def from_laplace(
    laplace: Any,
    model: nn.Module | BayesianModel,
    *,
    num_samples: int,
    seed: int = 0,
    out: str | Path | None = None,
    overwrite: bool = False,
    record: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Bank:
    """A bank of independent draws from a fitted posterior of laplace-torch: all weights, the last layer or a subnetwork.

        theta ~ N(mean, posterior_precision^-1)

    The draws are those of its own `sample(K, generator)`, K of them at once, in whatever structure it has (full, kron,
    lowrank, diag), draws of one chain, as those of a guide are. Of a posterior of the last layer the sample is that
    layer, and everything before it is kept once.

    Args:
        laplace: fitted, such as `Laplace(module, "classification", "last_layer", "kron")`.
        model: the module that it was fitted on, or a BayesianModel of it, with as many parameters in the sample.
        num_samples: S, at least 1.
        seed: of the draws.
        out: a folder to write the bank to; in memory without it.
        overwrite: replace a bank that is there.
        record: more for `bank.json`, such as `{"likelihood": likelihood.to_config()}`.
        progress: told after each block how many samples are in the bank, and S.

    Raises:
        ConfigError: laplace-torch is not installed; this is no posterior of weights of it, or not fitted; `num_samples`.
        BankMismatch: the module has other names or shapes, or other values outside the sample.
        BankError: a draw holds NaN or Inf.

    Source: Daxberger et al. (2021), arXiv:2106.14806; https://github.com/aleximmer/Laplace.
    """
    if num_samples < 1:
        raise ConfigError("num_samples", want="at least 1", got=str(num_samples), fix="raise it")
    _check_posterior(laplace)
    own = _own_parameters(laplace)
    target = target_of(model, only=list(own))
    for name, parameter in own.items():
        if name not in target.layout.names:
            raise BankMismatch(
                "model", want=f"'{name}' {list(parameter.shape)} of the posterior", got="no such parameter",
                fix="pass the module that the posterior was fitted on",
            )  # fmt: skip
    for entry in target.layout.entries:
        check_entry(entry, tuple(own[entry.name].shape) if entry.name in own else None, "laplace")
    _check_outside(laplace, target)
    source = generator(seed, "import", "laplace", device=laplace.mean.device)
    size = min(rows_at_once(target.layout), num_samples)
    first = _drawn(laplace, size, source, own)  # by which this posterior is told from others

    def blocks() -> Iterator[Block]:
        for start in range(0, num_samples, size):
            stop = min(start + size, num_samples)
            values = first if not start else _drawn(laplace, stop - start, source, own)
            params = sample_block(values, target.layout, "laplace", start)
            yield make_block(params, chain=torch.zeros(stop - start), draw=torch.arange(start, stop))

    digest = hashlib.sha256()
    for name in target.layout.names:
        digest.update(fmt.tensor_bytes(first[name].cpu().contiguous()))
    options = {
        "from": "laplace-torch",
        "posterior": type(laplace).__name__,
        "num_samples": num_samples,
        "block": size,
        "sha256": digest.hexdigest(),
        "cast": casts({n: str(t.dtype).removeprefix("torch.") for n, t in first.items()}, target.layout),
    }
    return pour(
        blocks(), target, options, out=out, overwrite=overwrite, record={"seed": seed, **(record or {})},
        more_versions=version_of("laplace-torch"), total=num_samples, progress=progress,
    )  # fmt: skip


def _check_posterior(laplace: Any) -> None:
    """Raise ConfigError unless this is a fitted posterior over weights."""
    try:
        from laplace.baselaplace import ParametricLaplace
    except ImportError as error:
        raise ConfigError(
            "laplace", want="laplace-torch installed", got="no such package", fix="pip install laplace-torch"
        ) from error
    if not isinstance(laplace, ParametricLaplace):
        raise ConfigError(
            "laplace",
            want="a posterior over weights of laplace-torch",
            got=type(laplace).__name__,
            fix="fit Laplace(...) with hessian_structure full, kron, lowrank or diag: 'gp' has no weights to draw",
        )
    if not isinstance(laplace.mean, Tensor) or laplace.mean.dim() != 1 or getattr(laplace, "H", None) is None:
        raise ConfigError("laplace", want="a fitted posterior", got="one before fit()", fix="call fit(loader) first")


def _is_last_layer(laplace: Any) -> bool:
    return type(laplace.model).__name__ == "FeatureExtractor" and type(laplace.model).__module__.startswith("laplace.")


def _own_parameters(laplace: Any) -> dict[str, Tensor]:
    """The parameters that a draw [P] is cut into, in their order there, by the names of the module."""
    inner = laplace.model.model if _is_last_layer(laplace) else laplace.model
    chosen = laplace.model.last_layer.parameters() if _is_last_layer(laplace) else laplace.params
    names = {id(parameter): name for name, parameter in inner.named_parameters()}
    return {names[id(parameter)]: parameter for parameter in chosen}


def _check_outside(laplace: Any, target: Target) -> None:
    """Raise BankMismatch where the posterior was fitted on other values outside the sample."""
    inner = laplace.model.model if _is_last_layer(laplace) else laplace.model
    theirs = inner.state_dict()
    for name, tensor in target.base().items():
        if name in theirs and not torch.equal(theirs[name].cpu(), tensor.cpu()):
            raise BankMismatch(
                f"model '{name}'",
                want="the values that the posterior was fitted on: a bank keeps once what is outside its samples",
                got="others",
                fix="pass that module, in the state that it was fitted in",
            )


def _drawn(laplace: Any, size: int, source: torch.Generator, own: Mapping[str, Tensor]) -> Params:
    """Its draws [K, P] as params [K, *shape]."""
    with torch.no_grad():
        flat = laplace.sample(size, generator=source).detach()  # [K, P]
    pieces = flat.split([parameter.numel() for parameter in own.values()], dim=-1)
    return {n: piece.reshape(size, *p.shape) for (n, p), piece in zip(own.items(), pieces, strict=True)}
