"""Fit a posterior and keep it as a bank: producer -> writer, with resume and progress."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import platform
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
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
from bnn.distributed import Ranks, ranks
from bnn.errors import BankError, BnnError, ConfigError, FitError, RankLost
from bnn.machine import keep_freed
from bnn.model import BayesianModel
from bnn.progress import with_progress
from bnn.samplers import ByMetric, DynamicClassSampler, EpochSampler
from bnn.seeding import derive
from bnn.together import Checkpoints, agreed_state, check_alike, check_method, open_part, own_rows, split_of
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

    **On several ranks**, inside `bnn.distributed.joined()`, every rank calls `fit` with the same arguments: chains, samples
    of the prior and members of an ensemble are split over the ranks, each of which writes its part of one
    bank; of guides the rows of each batch are. What cannot be split is refused.

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
        ConfigError: `num_samples` or the model's `num_data` is wrong; a virtual bank of another method; on several ranks, a
            method that cannot be split, a virtual bank, or ranks that differ in versions, options, module or data.
        RankLost: another rank ended, or was silent for longer than the timeout.
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
    keep_freed()
    together = ranks()
    if together.several:
        facts = {"num_samples": num_samples, "importance_weights": importance_weights, "writer": writer}
        check_alike({**_facts(model, data, config), **facts, "resume": resume, "overwrite": overwrite}, together)
        check_method(method, together)
        if virtual:
            raise ConfigError(
                "virtual", want="one process, which keeps the guide alone", got="several ranks", fix="leave it out"
            )
        return _fit_on_ranks(
            model, data, config, together, method=method, num_samples=num_samples, out=out, seed=seed, writer=writer,
            resume=resume, overwrite=overwrite, progress=progress,
        )  # fmt: skip
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
    own = seed if writer == "main" else derive(seed, "writer", writer)
    _check_state(kept, num_samples)
    if kept.num_rows < num_samples:
        run = method.run(model, data, num_samples=num_samples, seed=own, state=kept.state)
        drive(kept, run, title=method.name, progress=progress)
    else:
        _end(kept, num_samples)
    return Bank.open(out)


def _fit_on_ranks(
    model: BayesianModel,
    data: Data,
    config: dict[str, Any],
    together: Ranks,
    *,
    method: Method,
    num_samples: int,
    out: str | Path | None,
    seed: int,
    writer: str,
    resume: bool,
    overwrite: bool,
    progress: bool | None,
) -> Bank:
    """`fit`, by all ranks: each writes its own rows, or rank 0 alone the samples of what all have optimised."""
    if out is None or writer != "main":
        raise ConfigError(
            "out" if out is None else "writer",
            want="a folder" if out is None else "none: ranks write under names of their own",
            got="none, with several ranks" if out is None else writer,
            fix="pass out=" if out is None else "leave it out",
        )
    alone = split_of(method) == "gradients"  # rank 0 writes
    wanted = num_samples if alone else own_rows(method, num_samples, together)
    if not alone:
        config["ranks"] = {"world_size": together.world_size}
    options = {"layout": model.layout, "config": config, "base": model.base()}
    kept = open_part(Path(out), options, together, alone=alone, resume=resume, overwrite=overwrite)
    if kept is not None:
        _check_state(kept, wanted)
    num_rows = kept.num_rows if kept is not None else 0
    if alone:
        num_rows, state = together.first_value(num_rows), together.first_state(kept.state if kept else None)
    else:
        state = agreed_state(kept, method, together) if kept is not None else None
    title, shown = method.name, progress if together.rank == 0 else False
    if num_rows < wanted:
        run = method.run(model, data, num_samples=num_samples, seed=seed, state=state)
        if kept is None:
            _optimised(run)
        else:
            take = Checkpoints(kept, method, together, state).take
            drive(kept, run, title=title, progress=shown, take=take)
    elif kept is not None:
        _end(kept, wanted)
    together.wait()
    if not (Path(out) / "bank.json").exists():  # on a host of its own, without the folder that rank 0 wrote
        return Bank.from_blocks([], layout=model.layout, info=config, base=model.base())
    return Bank.open(out)


def _optimised(run: Iterator[tuple[Block, State]]) -> None:
    """Take part in what all ranks optimise, up to the samples that rank 0 draws."""
    for block, _ in run:
        if block.num_samples:
            return


def _facts(model: BayesianModel, data: Data, config: Mapping[str, Any]) -> dict[str, Any]:
    """What must be alike on all ranks: versions, options, module with its values, and all rows of tensors."""
    return {
        **{key: value for key, value in config.items() if key not in ("data", "provenance")},
        "module": module_facts(model.module, {**model.module_params(), **model.base()}),
        "data": data_facts(data),
    }


def module_facts(module: nn.Module, values: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What a module consists of, and digests of these values of it."""
    parts = {name or "whole": f"{type(part).__name__}({part.extra_repr()})" for name, part in module.named_modules()}
    return {
        "a_part": parts,
        "values": {name: digest_of([tensor], rows=None) for name, tensor in values.items()},
    }


def data_facts(data: Data) -> dict[str, Any]:
    """How many rows there are, and a digest of all of them where they are tensors."""
    return {"rows": num_rows(data), "digest": digest_of(data, rows=None)}


def _check_state(kept: BankWriter, num_samples: int) -> None:
    """Raise BankError where rows are to follow others, and no state says how."""
    if kept.num_rows and kept.num_rows < num_samples and kept.state is None:
        kept.release()
        raise BankError(
            str(kept.path),
            want="a state that follows its last row, to go on from",
            got="none, as in a bank that was repaired",
            fix="repair the damaged one with --resumable, or fit into another folder and merge",
        )


def _end(kept: BankWriter, num_samples: int) -> None:
    """Leave a part that has all its rows as it is, or mark it complete."""
    if kept.num_rows > num_samples:
        part = "bank" if kept.writer == "main" else f"part of {kept.writer}"
        warnings.warn(
            f"fit: {kept.path}: the {part} has {kept.num_rows} samples already, more than the {num_samples} asked for: "
            "nothing is added or taken away; ask for more, or keep fewer with bnn bank thin",
            stacklevel=3,
        )
    if not kept.complete:  # killed between its last row and the end
        kept.close()
    else:
        kept.release()


def drive(
    writer: BankWriter,
    run: Iterable[tuple[Block, State]],
    *,
    title: str,
    progress: bool | None = None,
    take: Callable[[Block, State], None] | None = None,
) -> None:
    """Pour a producer's blocks into a writer and close it; whatever happens, no committed row is lost.

    On Ctrl-C what has come so far is committed. Where the producer cannot go on (FitError), what was committed
    stays. On other errors a folder in which nothing was committed but states is taken away, unless it
    is another rank that was lost.

    Args:
        take: what becomes of a block and the state after it; by default the writer appends them.
    """
    take = writer.append if take is None else take
    try:
        for block, state in with_progress(run, title, progress):
            take(block, state)
        writer.close()
    except KeyboardInterrupt:
        if writer.has_news:
            writer.commit()
        writer.release()
        raise
    except (FitError, RankLost):
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


def digest_of(data: Data, rows: int | None = 1000) -> str | None:
    """Of the first rows of tensors, or all, and their shapes; None for data sets that are no tensors."""
    tensors = data.tensors if isinstance(data, TensorDataset) else data if isinstance(data, (tuple, list)) else ()
    digest = hashlib.sha256()
    for leaf in pytree.tree_leaves(list(tensors)):
        if isinstance(leaf, torch.Tensor):
            first = leaf if rows is None or not leaf.dim() else leaf[:rows]
            first = first.detach().cpu().contiguous()
            digest.update(
                str((first.dtype, tuple(leaf.shape))).encode() + first.flatten().view(torch.uint8).numpy().tobytes()
            )
    return digest.hexdigest() if len(tensors) else None
