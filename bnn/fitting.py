"""Fit a posterior and keep it as a bank: producer -> writer, with resume and progress."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import platform
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.data import TensorDataset

from bnn.bank import Bank, BankWriter
from bnn.bank.virtual import checked_length, in_memory, is_finished
from bnn.batches import changes, num_rows, reweights, sampled
from bnn.errors import BankError, BnnError, ConfigError, FitError
from bnn.model import BayesianModel
from bnn.progress import with_progress
from bnn.samplers import ByMetric, DynamicClassSampler, EpochSampler
from bnn.seeding import derive
from bnn.types import Block, Data, Method, State
from bnn.virtual import until_fitted, virtual_record


def fit(
    model: BayesianModel,
    data: Data,
    *,
    method: Method,
    num_samples: int,
    out: str | Path | None = None,
    seed: int = 0,
    sampler: EpochSampler[Any] | None = None,
    importance_weights: bool | None = None,
    writer: str = "main",
    resume: bool = False,
    overwrite: bool = False,
    virtual: bool = False,
    progress: bool | None = None,
    record: Mapping[str, Any] | None = None,
) -> Bank:
    """Run a method on a model and data, and return the bank of its samples.

    With `out`, rows and the method's state are committed as they come: a run that is killed or
    interrupted goes on with `resume=True`, and ends with the same bits as one that was not.
    A bank that is complete grows when resumed with a larger `num_samples`.

    **A sampler that draws rows unlike changes the likelihood, and so the posterior.** With
    `importance_weights` each row's log likelihood is divided by N times its chance, and the target stays the
    posterior of the data; without, it is that of the reweighted data, sum_i N pi_i log p(y_i | x_i, theta), and
    `bank.info["sampling"]` says so.

    Args:
        model: what to fit.
        data: a pair of tensors, a data set, or a data loader.
        method: such as `inference.HMC(num_chains=8)`.
        num_samples: S, the samples in the bank, all chains together.
        out: a folder for the bank; in memory without it.
        seed: of everything random; global random states are neither read nor changed.
        sampler: order in which methods of batches meet the rows, such as `samplers.ClassBalancedSampler`;
            methods of all rows at once take its chances as weights. By default all rows alike.
        importance_weights: whether to keep the target; None is no, with a warning where it matters.
        writer: whose part of the bank this is. Several processes may fill one bank at once, all with the same
            options but each under a name of its own, which gives it random numbers of its own; `num_samples`
            is then that of the part. The first to commit begins the bank.
        resume: go on with the unfinished bank at `out`; a bank that has more samples than asked for stays as it is,
            with a warning.
        overwrite: replace the bank at `out`.
        virtual: keep the fitted guide in place of samples, which are made from it and the seed when asked for: a
            `bnn.bank.VirtualBank`, of any length. Of the methods mean-field, low-rank, full-rank and of normal priors,
            with draws that are random or antithetic. Resumed with another `num_samples` it has that length.
        progress: show a bar on stderr; by default where stderr is a terminal.
        record: more for `bank.json`: `model` and `data` as the command line keeps them.

    Raises:
        BankExists: `out` is there and neither resume nor overwrite was said.
        BankMismatch: the bank to resume was made with other options.
        ConfigError: `num_samples` or the model's `num_data` is wrong; a virtual bank of another method.
        DataError, FitError: as the method says; nothing half-written is left behind.

    Examples:
        >>> import torch
        >>> from bnn import inference, likelihoods, priors
        >>> module = torch.nn.Linear(2, 3)
        >>> model = BayesianModel(module, prior=priors.Normal(), likelihood=likelihoods.Categorical(), num_data=4)
        >>> fit(model, (torch.zeros(4, 2), torch.tensor([0, 1, 2, 0])), method=inference.Prior(), num_samples=10)
        Bank(in memory: 10 samples of 9 values)
    """
    if num_samples < 1:
        raise ConfigError("num_samples", want="at least 1", got=str(num_samples), fix="raise it")
    if num_rows(data) != model.num_data:
        raise ConfigError(
            "num_data",
            want=f"{num_rows(data)}, the rows of the data",
            got=str(model.num_data),
            fix="pass num_data=len(data) to the model",
        )
    config = describe(model, method, seed, record) | {"provenance": provenance(model.module, data)}
    if virtual:
        checked_length(num_samples)
        if writer != "main":
            raise ConfigError(
                "writer", want="one for a virtual bank, which has no parts", got=writer, fix="leave it out"
            )
        config |= virtual_record(model, method)
    if importance_weights and sampler is None:
        raise ConfigError(
            "importance_weights", want="sampler=, whose chances they make up for", got="none", fix="pass sampler="
        )
    config["sampling"] = sampling_record(data, sampler, importance=bool(importance_weights))
    if sampler is not None:
        if isinstance(sampler, DynamicClassSampler) and isinstance(sampler.schedule, ByMetric):
            raise ConfigError(
                "sampler", want="a schedule by epoch", got="one by metric, which no fit measures", fix="choose Linear"
            )
        data = sampled(data, sampler, importance=bool(importance_weights))
    if reweights(data) and importance_weights is None:
        warnings.warn(
            "fit: rows are not drawn alike, so that this is a balanced posterior, of the reweighted data; keep that "
            "of the data with sampler= and importance_weights=True (--balance skew=...,importance), or pass False",
            stacklevel=2,
        )
    if out is None:
        if writer != "main":
            raise ConfigError("writer", want="out=, the folder that writers share", got="none", fix="pass out=")
        if virtual:
            run = until_fitted(model, data, method, num_samples=num_samples, seed=seed, state=None)
            *_, last = (state for _, state in with_progress(run, method.name, progress))
            return cast(Bank, in_memory(config, model.layout, last, model.base()))
        run = method.run(model, data, num_samples=num_samples, seed=seed)
        blocks, told = [], {}
        for block, state in with_progress(run, method.name, progress):
            told = state["info"]  # of the last one: states are large
            if block.num_samples:
                blocks.append(block)
        info = {**config, "complete": True, "diagnostics": {"main": told}}
        return Bank.from_blocks(blocks, layout=model.layout, info=info, base=model.base())
    kept = BankWriter(
        out, layout=model.layout, config=config, base=model.base(), writer=writer, resume=resume, overwrite=overwrite
    )
    if virtual:
        if kept.complete and is_finished(kept.state) and kept.state["length"] == num_samples:  # type: ignore[index]
            kept.release()
        else:
            run = until_fitted(model, data, method, num_samples=num_samples, seed=seed, state=kept.state)
            drive(kept, run, title=method.name, progress=progress)
        return Bank.open(out)
    if kept.num_rows and kept.num_rows < num_samples and kept.state is None:
        kept.release()
        raise BankError(
            str(out),
            want="a state that follows its last row, to go on from",
            got="none, as in a bank that was repaired",
            fix="repair the damaged one with --resumable, or fit into another folder and merge",
        )
    if kept.num_rows < num_samples:
        own = seed if writer == "main" else derive(seed, "writer", writer)
        run = method.run(model, data, num_samples=num_samples, seed=own, state=kept.state)
        drive(kept, run, title=method.name, progress=progress)
        return Bank.open(out)
    if kept.num_rows > num_samples:
        part = "bank" if writer == "main" else f"part of {writer}"
        warnings.warn(
            f"fit: {out}: the {part} has {kept.num_rows} samples already, more than the {num_samples} asked for: "
            "nothing is added or taken away; ask for more, or keep fewer with bnn bank thin",
            stacklevel=2,
        )
    if not kept.complete:  # killed between its last row and the end
        kept.close()
    else:
        kept.release()
    return Bank.open(out)


def drive(writer: BankWriter, run: Iterable[tuple[Block, State]], *, title: str, progress: bool | None = None) -> None:
    """Pour a producer's blocks into a writer and close it; whatever happens, no committed row is lost.

    On Ctrl-C what has come so far is committed. Where the producer cannot go on (FitError), what was committed
    stays. On other errors a folder in which nothing was committed but states is taken away.
    """
    try:
        for block, state in with_progress(run, title, progress):
            writer.append(block, state)
        writer.close()
    except KeyboardInterrupt:
        if writer.has_news:
            writer.commit()
        writer.release()
        raise
    except FitError:
        writer.release()  # what was committed before it stays, as the error says
        raise
    except BnnError:
        writer.abandon()
        raise
    except BaseException:
        if writer.has_news:  # a worker that died, memory that ran out: what has come is still right
            with suppress(OSError, BnnError):
                writer.commit()
        writer.release()
        raise


def describe(model: BayesianModel, method: Method, seed: int, record: Mapping[str, Any] | None) -> dict[str, Any]:
    """What `bank.json` says beside format and layout."""
    return {
        **model.to_config(),
        "method": {"name": method.name, "options": method_options(method)},
        "seed": seed,
        "versions": versions(),
        **({"columns": list(method.columns)} if hasattr(method, "columns") else {}),
        "model": None,
        "data": None,
        **(record or {}),
    }


def method_options(method: Method) -> dict[str, Any]:
    """The options of a method as plain values: what is no number, string or list of them stands under its name."""

    def plain(value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, (list, tuple)):
            return [plain(inner) for inner in value]
        if isinstance(value, functools.partial):
            options = {key: plain(inner) for key, inner in value.keywords.items()}
            arguments = {"arguments": plain(value.args)} if value.args else {}
            return {"partial": plain(value.func), **arguments, **options}
        if isinstance(value, torch.Tensor):
            return f"tensor {list(value.shape)} {digest_of((value,))}"
        if hasattr(value, "digest"):
            return f"bank {value.digest}"
        named = value if hasattr(value, "__qualname__") else type(value)
        return f"{named.__module__}:{named.__qualname__}"

    options = dataclasses.fields(method)  # type: ignore[arg-type]
    return {option.name: plain(getattr(method, option.name)) for option in options}


def versions() -> dict[str, str]:
    """What a bank was made with."""
    return {
        "bnn": version("bnn-toolkit"),
        "torch": torch.__version__,
        "pyro": version("pyro-ppl"),
        "python": platform.python_version(),
    }


def sampling_record(data: Data, sampler: Any, *, importance: bool) -> dict[str, Any]:
    """What `bank.json` says of how rows were drawn, and which posterior that makes: natural or balanced."""
    if sampler is None:
        return {"sampler": None, "posterior": "balanced" if reweights(data) else "natural"}
    under = sampled(data, sampler, importance=importance)
    found = {
        "sampler": type(sampler).__name__,
        "seed": sampler.seed,
        "identity": sampler.identity(),
        "importance_weights": importance,
        "posterior": "balanced" if reweights(under) else "natural",
    }
    if hasattr(sampler, "class_shares") and not changes(sampler):
        found["class_shares"] = sampler.class_shares().tolist()
        found["natural_shares"] = sampler.natural_shares().tolist()
    return found


def provenance(module: nn.Module, data: Data) -> dict[str, Any]:
    """Digests by which a resumed fit knows its module and data again.

    Of the module its structure as it prints; of tensors the first 1,000 rows. Other data sets may
    draw at random what they return, so that only their length is kept.
    """
    structure = hashlib.sha256(repr(module).encode()).hexdigest()
    return {"module": structure, "rows": num_rows(data), "data": digest_of(data)}


def digest_of(data: Data) -> str | None:
    """Of the first 1,000 rows of tensors, and their shapes; None for data sets that are no tensors."""
    tensors = data.tensors if isinstance(data, TensorDataset) else data if isinstance(data, (tuple, list)) else ()
    digest = hashlib.sha256()
    for leaf in pytree.tree_leaves(list(tensors)):
        if isinstance(leaf, torch.Tensor):
            rows = leaf[:1000].detach().cpu().contiguous()
            digest.update(
                str((rows.dtype, tuple(leaf.shape))).encode() + rows.flatten().view(torch.uint8).numpy().tobytes()
            )
    return digest.hexdigest() if len(tensors) else None
