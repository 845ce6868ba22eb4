"""Train the parameters outside the sample, while every batch meets a sample of the bank."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from bnn.bank import Bank
from bnn.batches import full_batch, moved
from bnn.distributed import ranks
from bnn.errors import ConfigError
from bnn.fitting import digest_of, provenance, sampling_record, versions
from bnn.functional import FunctionalModel, Skeleton
from bnn.layout import Layout, as_patterns, layout_of, matches
from bnn.likelihoods import Bernoulli, Likelihood, as_columns, likelihood_from_config
from bnn.samplers import EpochSampler, PairedLoader, TensorRows
from bnn.training.files import keep
from bnn.training.lessons import (
    check_ranks,
    class_figures,
    inputs_and_targets,
    paired,
    relative_weights,
    row_weights,
    weighted_mean,
)
from bnn.training.logs import Log, check_log
from bnn.training.loop import HeldOut, OptimizerFactory, Precision, Problem, Recipe, SchedulerFactory, run
from bnn.types import Batch, Block, Data, Params, State

HELD_OUT_SAMPLES = 32  # of the bank, by which held-out rows are judged after every epoch


class _Setting(NamedTuple):
    """Everything that does not change while the free parameters are trained."""

    net: FunctionalModel
    whole: Skeleton  # takes sample and free parameters together
    likelihood: Likelihood
    loss: Callable[[Tensor, Tensor], Tensor] | None
    weights: Tensor  # [S] of the samples, with mean 1
    loader: PairedLoader
    importance: bool


def train(
    module: nn.Module,
    bank: Bank,
    data: Data,
    *,
    out: str | Path,
    free: str | Sequence[str] = "*",
    likelihood: Likelihood | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    held_out: Data | None = None,
    sampler: EpochSampler[Any] | None = None,
    importance_weights: bool = False,
    num_indices: int | None = None,
    window: int | None = None,
    num_epochs: int = 100,
    batch_size: int = 128,
    lr: float = 3e-3,
    optimizer: OptimizerFactory | None = None,
    scheduler: SchedulerFactory | None = None,
    scheduler_interval: Literal["step", "epoch"] = "epoch",
    clip_norm: float | None = None,
    precision: Precision = "float32",
    patience: int | None = None,
    monitor: str = "held_out_nll",
    log: Log = "csv",
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    shared_indices: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool | None = None,
    record: Mapping[str, Any] | None = None,
) -> Bank:
    """Train the parameters that are not in the bank, each batch under the samples that it is paired with.

    minimise over phi: E_{i, batch} -1 / B sum_b w_b log p(y_b | x_b, theta_i, phi)

    theta_i are the samples of the bank, with their log weights, and phi the parameters outside it, from
    the module's values on. The module itself is not changed: `module.load_state_dict(trained[0],
    strict=False)` puts the result into it. **Samples were drawn given the old values of phi**: after
    training they are stale, and a posterior of theta given the new ones needs another fit.

    **On several ranks**, inside `bnn.distributed.joined()`, every rank calls `train` with the same arguments. Each takes its share of the
    rows of every batch, and gradients are summed: a step is that of one process on the whole batch, to rounding. Rank 0
    writes. A run goes on with any number of ranks, unless each meets samples of its own.

    Args:
        module: the module whose parameters the bank holds in part.
        bank: samples of the others.
        data: a pair of tensors or a data set of rows (x, y).
        out: a folder for the result: a bank of one sample, `free.safetensors` with the same values as a
            state dict, and `curve.csv`, a row an epoch.
        free: globs of the parameters to train among those outside the bank, `!` negates; by default all that
            require gradients.
        likelihood: what outputs mean; the one that the bank was made with by default.
        loss: outputs [B, C], targets [B] -> loss of each row [B], in place of the likelihood.
        held_out: rows judged after every epoch, under at most 32 samples evenly spaced in the bank.
        sampler: order of the rows, such as `samplers.ClassBalancedSampler`; each once, shuffled, by default.
        importance_weights: whether to weigh rows by 1 / (N pi_i), so that the target stays that of all rows.
        num_indices: samples a batch meets, whose losses are averaged; None is one.
        window: shards of the bank that samples are drawn from at once, as of `SampleIndexSampler`, so that a bank which is
            larger than memory is read once a pass; None for all.
        num_epochs: passes over the data, at least 1.
        batch_size: rows a step.
        lr: of Adam, falling exponentially to a hundredth over the run.
        optimizer: makes another from the list of values, such as `lambda values: torch.optim.SGD(values, 0.1)`;
            its learning rate is its own.
        scheduler: makes a learning rate scheduler from the optimiser.
        scheduler_interval: whether that steps after every epoch or every step. `ReduceLROnPlateau` is given `monitor`.
        clip_norm: largest norm of the gradient, of all values together.
        precision: `"bfloat16"` or `"float16"` computes forward passes in mixed precision; values stay as they are.
        patience: stop after so many epochs in which `monitor` got no better, and keep the best values.
        monitor: figure of the held-out rows that is to fall.
        log: `"tensorboard"` writes events beside the CSV file.
        num_workers: processes that load data.
        collate_fn: makes a batch (x, y) of a list of rows, such as one that pads text.
        device: where to compute; the module's own by default.
        seed: of the order of data and bank indices.
        shared_indices: on several ranks, whether all meet the samples that one process would; else each meets its own.
        resume: go on with an unfinished run at `out`; it ends with the same bits as one that was not interrupted.
        overwrite: replace what is at `out`.
        progress: show a bar on stderr; by default where stderr is a terminal.
        record: more for `bank.json`.

    Returns:
        The trained parameters as a bank of one sample.

    Raises:
        ConfigError: an option out of range, no parameter outside the bank, or ranks that differ.
        BankExists, BankMismatch: as for `fit`.
        FitError: the loss is not finite.
        RankLost: another rank ended, or was silent for longer than the timeout.

    Examples:
        >>> import tempfile, bnn
        >>> module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> x, y = torch.randn(20, 3), torch.randint(0, 2, (20,))
        >>> model = bnn.BayesianModel(module, prior=bnn.priors.Normal(), num_data=20, bayesian="2",
        ...                           likelihood=bnn.likelihoods.Categorical())
        >>> head = bnn.fit(model, (x, y), method=bnn.inference.Prior(), num_samples=8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trained = train(module, head, (x, y), out=f"{folder}/trunk", num_epochs=2)
        ...     sorted(trained[0])
        ['0.bias', '0.weight']
    """
    recipe = Recipe(num_epochs, lr, optimizer, scheduler, scheduler_interval, clip_norm, precision, patience, monitor)
    check_log(log)
    likelihood = likelihood or likelihood_from_config(bank.info.get("likelihood"))
    net = FunctionalModel(module, bank, device=device)
    layout = free_layout(module, bank.layout, free)
    all_ranks = ranks()
    loader = paired(
        data, bank, batch_size=batch_size, num_indices=num_indices, window=window, num_workers=num_workers,
        collate_fn=collate_fn, seed=seed,
        sampler=sampler, importance=importance_weights, judged=held_out is not None,
        together=all_ranks, shared_indices=shared_indices,
    )  # fmt: skip
    together = Layout((*bank.layout.entries, *layout.entries), {**bank.layout.aliases, **layout.aliases})
    whole = Skeleton(module, together, detach=True)
    setting = _Setting(net, whole, likelihood, loss, relative_weights(bank), loader, importance_weights)
    judged = None if held_out is None else _judge(setting, moved(full_batch(held_out), net.device))
    named = dict(module.named_parameters())
    start = {name: named[name].detach() for name in layout.names}
    problem = Problem("train", layout, start, _loss(setting), lambda values: values, judged)
    config = {
        "likelihood": likelihood.to_config(),
        "task": likelihood.task,
        "method": {
            "name": "train",
            "options": {
                **recipe.to_config(start),
                "batch_size": batch_size,
                "num_indices": num_indices,
                **({} if window is None else {"window": window}),
                "loss": "likelihood" if loss is None else "given",
                "bank": bank.digest,
                **({} if shared_indices else {"ranks": all_ranks.world_size}),
            },
        },
        "sampling": sampling_record(data, sampler, importance=importance_weights),
        "seed": seed,
        "provenance": {
            **provenance(module, data),
            "frozen": frozen_digest(module, together),
            "held_out": None if held_out is None else digest_of(held_out),
        },
        "versions": versions(),
        **(record or {}),
    }

    again = {"resume": resume, "overwrite": overwrite}
    check_ranks(config, {"module": (module, bank.layout)}, {"rows": data, "held_out": held_out}, again, all_ranks)

    def steps(state: State | None) -> Iterator[tuple[Block, State]]:
        return run(problem, recipe, loader, net.device, state, all_ranks)

    return keep(
        out, steps, title="train", layout=layout, config=config, base={}, export="free.safetensors", log=log,
        resume=resume, overwrite=overwrite, progress=progress, together=all_ranks,
    )  # fmt: skip


def frozen_digest(module: nn.Module, moving: Layout) -> str:
    """Of the parameters and buffers that neither the bank nor the run moves: a resumed run finds the same."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if isinstance(tensor, Tensor) and name not in moving.names and name not in moving.aliases:
            digest.update(
                name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            )
    return digest.hexdigest()


def free_layout(module: nn.Module, held: Layout, free: str | Sequence[str]) -> Layout:
    """The parameters outside the bank that the globs choose.

    Raises:
        ConfigError: the bank holds all parameters, or those that a glob names.
    """
    kept = {*held.names, *held.aliases}
    named = dict(module.named_parameters(remove_duplicate=False))
    outside = [name for name in named if name not in kept]
    if not outside:
        raise ConfigError(
            "free",
            want="parameters outside the bank",
            got="a bank that holds all of them",
            fix="fit a bank of some parameters only (bayesian=), or distil this one",
        )
    for pattern in as_patterns(free):
        plain = pattern.removeprefix("!")
        if not any(matches(plain, name) for name in outside):
            inside = any(matches(plain, name) for name in kept)
            raise ConfigError(
                "free",
                want=f"patterns that match parameters outside the bank: {', '.join(outside)}",
                got=f"{pattern!r}, which matches {'what the bank holds' if inside else 'nothing'}",
                fix="change the pattern",
            )
    held_back = [f"!{glob.escape(name)}" for name in kept if not name.startswith("@")]
    if as_patterns(free) == ("*",):  # frozen parameters are trained where they are named, not by default
        frozen = [name for name in outside if not named[name].requires_grad]
        held_back += [f"!{glob.escape(name)}" for name in frozen]
        if frozen == outside:
            raise ConfigError(
                "free",
                want="parameters outside the bank that require gradients",
                got="none",
                fix=f"name those to train, such as free={outside[0]!r}",
            )
    return layout_of(module, [*as_patterns(free), *held_back])


def _loss(setting: _Setting) -> Callable[[Params, Any, int | Tensor, Any, int], Tensor]:
    """This rank's part of the mean loss of a batch over the samples that it meets."""
    checked = False

    def mean_loss(values: Params, data: Any, index: int | Tensor, rows: Any, step: int) -> Tensor:
        nonlocal checked
        del step
        if data is None:  # a rank without rows of this batch
            return torch.zeros((), device=setting.net.device)
        batch = moved(inputs_and_targets(data, setting.loader), setting.net.device)
        weights = row_weights(setting.loader, rows) if setting.importance else None
        indices = [index] if isinstance(index, int) else index.tolist()
        total = torch.zeros((), device=setting.net.device)
        for one in indices:
            params = setting.net.params(one) | values
            outputs = setting.whole(params, batch.x, device=setting.net.device)
            if not checked:
                _check_targets(setting, outputs, batch)
                checked = True
            each = _row_losses(setting, outputs, params, batch)
            total = total + setting.weights[one].to(each) * weighted_mean(each, weights)
        return total * (len(batch.y) / setting.loader.total) / len(indices)

    return mean_loss


def _check_targets(setting: _Setting, outputs: Any, batch: Batch) -> None:
    """Raise DataError unless outputs fit the targets: all of them where they are in memory."""
    if setting.loss is None:
        rows = setting.loader.dataset
        y = rows.tensors[-1] if isinstance(rows, TensorRows) else batch.y
        setting.likelihood.check(outputs[:1] if isinstance(outputs, Tensor) else outputs, y.to(batch.y.device))


def _row_losses(setting: _Setting, outputs: Any, params: Params, batch: Batch) -> Tensor:
    """What each row costs under one full set of parameters, [B]."""
    if setting.loss is None:
        return -setting.likelihood.log_prob(outputs, batch.y, params)
    each = setting.loss(outputs, batch.y)
    if each.shape != batch.y.shape[:1]:
        raise ConfigError(
            "loss",
            want=f"a loss for each row, [{len(batch.y)}]",
            got=f"{list(each.shape)}",
            fix="leave the mean out (reduction='none')",
        )
    return each


def _judge(setting: _Setting, batch: Batch) -> Callable[[Params], HeldOut]:
    """Held-out rows under evenly spaced samples: the mean predictive's NLL, and what classes have come to."""
    weighty = setting.weights.nonzero().squeeze(1)  # samples of weight 0 would leave no judge
    places = torch.linspace(0, len(weighty) - 1, min(HELD_OUT_SAMPLES, len(weighty))).round().long()
    chosen = weighty[places].tolist()
    log_weight = setting.weights[chosen].log().log_softmax(dim=0).tolist()

    def judge(values: Params) -> HeldOut:
        classes = setting.likelihood.task == "classification"
        found: list[Tensor] = []
        for index, weight in zip(chosen, log_weight, strict=True):
            params = setting.net.params(index) | values
            outputs = setting.whole(params, batch.x, device=setting.net.device)
            if not found:
                setting.likelihood.check(outputs[:1] if isinstance(outputs, Tensor) else outputs, batch.y)
            if classes:
                if isinstance(setting.likelihood, Bernoulli):
                    outputs = setting.likelihood.class_logits(as_columns(outputs))
                each = outputs.double().log_softmax(dim=-1)
            else:
                each = setting.likelihood.log_prob(outputs, batch.y, params).double()
            found.append((each + weight).cpu())
        mixed = torch.logsumexp(torch.stack(found), dim=0)  # [B, C] of classes, [B] of a regression
        if classes:
            return class_figures(mixed, batch.y.cpu().flatten().long())
        return HeldOut({"held_out_nll": -float(mixed.mean())}, {})

    return judge
