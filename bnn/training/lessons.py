"""What training with a bank and distilling one share: rows with their order, held-out figures, sample weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from bnn.batches import full_batch, sampled
from bnn.distributed import Ranks
from bnn.errors import ConfigError, DataError
from bnn.fitting import data_facts, module_facts
from bnn.functional import SampleSource
from bnn.layout import Layout
from bnn.samplers import ByMetric, DynamicClassSampler, EpochSampler, PairedLoader, SampleIndexSampler, TensorRows
from bnn.together import check_alike
from bnn.training.loop import HeldOut
from bnn.types import Batch, Data


def paired(
    data: Data,
    bank: SampleSource,
    *,
    batch_size: int,
    num_indices: int | None,
    window: int | None,
    num_workers: int,
    collate_fn: Callable[[list[Any]], Any] | None,
    seed: int,
    sampler: EpochSampler[Any] | None,
    importance: bool,
    judged: bool,
    together: Ranks,
    shared_indices: bool,
    whole: bool = False,
) -> PairedLoader:
    """Batches of the data, each with the bank indices it meets; of several ranks each gets its share, unless `whole` is said.

    Raises:
        ConfigError: a `DataLoader`, which has an order of its own; a sampler that waits for held-out figures
            where none are measured.
    """
    if isinstance(data, torch.utils.data.DataLoader):
        raise ConfigError(
            "data",
            want="a pair of tensors or a data set, which are paired with the bank here",
            got="a DataLoader",
            fix="pass its data set, and batch_size=, num_workers=, sampler=",
        )
    if importance and sampler is None:
        raise ConfigError(
            "importance_weights", want="sampler=, whose chances they make up for", got="none", fix="pass sampler="
        )
    if sampler is not None:
        sampled(data, sampler, importance=importance)  # refuses what does not fit the data
        by_metric = isinstance(sampler, DynamicClassSampler) and isinstance(sampler.schedule, ByMetric)
        if by_metric and not judged:
            raise ConfigError(
                "sampler", want="held_out= rows for a schedule by metric", got="none", fix="pass held_out"
            )
    place = {"rank": together.rank, "world_size": together.world_size}
    indices = SampleIndexSampler(bank, seed=seed, window=window)
    if not shared_indices:
        indices = SampleIndexSampler(bank, seed=seed, rank=together.rank, world_size=together.world_size, window=window)
    rows = data if isinstance(data, Dataset) else TensorRows(tuple(full_batch(data)[:2]))
    options: dict[str, Any] = {
        "num_indices": num_indices,
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "collate_fn": collate_fn,
        **({} if whole else place),
    }
    if sampler is not None and sampler.of_batches:
        return PairedLoader(rows, indices, batch_sampler=sampler, **options)
    return PairedLoader(rows, indices, batch_size=batch_size, shuffle=sampler is None, sampler=sampler, **options)


def inputs_and_targets(data: Any, loader: PairedLoader | None = None) -> Batch:
    """The batch that a loader gave; rows that were not looked at as a whole are checked here.

    Raises:
        DataError: anything but rows (x, y), or NaN or Inf.
    """
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise DataError("data", want="rows (x, y)", got=type(data).__name__, fix="pass a data set of such pairs")
    if loader is not None and isinstance(loader.dataset, TensorRows):
        return Batch(data[0], data[1])
    return full_batch((data[0], data[1]))


def weighted_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """Mean over rows [B] of what each costs, times its importance weight where there are any; a scalar."""
    return values.mean() if weights is None else (weights.to(values) * values).mean()


def class_figures(log_probs: Tensor, y: Tensor) -> HeldOut:
    """NLL and accuracy of log probabilities [B, C] at classes y [B], and loss and recall of each class."""
    nll = -log_probs.gather(1, y.unsqueeze(1)).squeeze(1)  # [B]
    correct = (log_probs.argmax(dim=1) == y).double()
    count = torch.bincount(y, minlength=log_probs.shape[1]).double()

    def of_classes(values: Tensor) -> list[float]:
        sums = torch.zeros_like(count).index_add_(0, y, values.double())
        # A class that no held-out row has counts as the mean: nothing is known of it.
        return torch.where(count > 0, sums / count.clamp_min(1), values.double().mean()).tolist()

    figures = {"held_out_nll": float(nll.mean()), "held_out_accuracy": float(correct.mean())}
    return HeldOut(figures, {"recall": of_classes(correct), "loss": of_classes(nll)})


def relative_weights(bank: SampleSource) -> Tensor:
    """S w_i of each sample [S], with mean 1: what a step under sample i counts for."""
    return len(bank) * bank.log_weight.softmax(dim=0)


def row_weights(loader: PairedLoader, rows: Any) -> Tensor:
    """Importance weights of the rows of a batch, times B / mean B: steps take a short batch for a whole one."""
    sampler = loader.sampler
    total = int(sampler.batch_sizes().sum()) if sampler.of_batches else len(sampler)
    weights: Tensor = sampler.importance_weights(rows) * (loader.total * len(loader) / total)
    return weights


def check_ranks(
    config: Mapping[str, Any],
    modules: Mapping[str, tuple[nn.Module, Layout | None]],
    data: Mapping[str, Data | None],
    options: Mapping[str, Any],
    together: Ranks,
) -> None:
    """Raise ConfigError on every rank unless all have the same versions, options, modules and data.

    Args:
        config: as `bank.json` keeps it.
        modules: by name, with the layout of a bank whose samples stand for values of theirs.
        data: by name.
        options: more of them.
        together: the ranks; nothing is asked of one.
    """
    if not together.several:
        return
    facts: dict[str, Any] = {key: value for key, value in config.items() if key not in ("data", "provenance")}
    for name, (module, layout) in modules.items():
        held = set() if layout is None else {*layout.names, *layout.aliases}
        values = {n: v for n, v in module.state_dict().items() if isinstance(v, Tensor) and n not in held}
        facts[name] = module_facts(module, values)
    facts["data"] = {name: None if one is None else data_facts(one) for name, one in data.items()}
    check_alike({**facts, **options}, together)
