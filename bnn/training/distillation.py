"""Distil a bank into one module: it is taught the predictive of the whole bank, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset

from bnn.bank import Bank
from bnn.batches import full_batch, moved
from bnn.distributed import ALONE, Ranks, ranks
from bnn.errors import ConfigError, choose
from bnn.fitting import digest_of, provenance, sampling_record, versions
from bnn.functional import FunctionalModel, Skeleton
from bnn.layout import Entry, layout_of
from bnn.likelihoods import SCALE, Categorical, Gaussian, Likelihood, as_columns, likelihood_from_config
from bnn.predictive import ClassPredictive, TargetPredictive, predict
from bnn.priors import HalfCauchy
from bnn.samplers import EpochSampler, PairedLoader
from bnn.seeding import derive, generator
from bnn.softmax import log_softmax
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
from bnn.turns import in_turn
from bnn.types import Block, Data, Params, State

Targets: TypeAlias = Literal["paired", "predictive"]
TARGETS: tuple[str, ...] = ("paired", "predictive")

CACHE_ROWS = 512  # rows whose predictive is computed at once


class Lesson(NamedTuple):
    """Everything that does not change while a student is taught."""

    net: FunctionalModel
    student: Skeleton
    likelihood: Likelihood
    weights: Tensor  # [S] of the samples, with mean 1
    loader: PairedLoader
    importance: bool
    cache: tuple[Tensor, Tensor] | None  # outputs [N, C] and scales of the whole predictive
    noise: float
    mixup: float
    seed: int
    together: Ranks


def distil(
    student: nn.Module,
    net: FunctionalModel,
    data: Data,
    *,
    out: str | Path,
    targets: Targets = "paired",
    num_indices: int | None = None,
    window: int | None = None,
    noise: float = 0.0,
    mixup: float = 0.0,
    likelihood: Likelihood | None = None,
    held_out: Data | None = None,
    sampler: EpochSampler[Any] | None = None,
    importance_weights: bool = False,
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
    seed: int = 0,
    shared_indices: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool | None = None,
    record: Mapping[str, Any] | None = None,
) -> Bank:
    """Distil a bank into one module, by stochastic steps in both data and samples.

    minimise over phi: E_{x, i} KL(p(y | x, theta_i) || q(y | x, phi))

    Each batch of data meets one bank index, so that a step costs one pass of one sample, and over
    many steps the student learns the predictive of the whole bank, sample weights included: its minimum is the mean
    probability for classes, mean and standard deviation of the mixture for a Gaussian. With
    `num_indices` a step averages over K samples; with `targets="predictive"` the predictive of the whole
    bank is computed once for every row and kept, which has the same minimum and no noise from samples.

    Args:
        student: gives structure and initial values; not changed.
        net: the module under the bank that teaches.
        data: training rows, a pair of tensors or a data set; targets are not looked at.
        out: a folder for the result: a bank of one sample, `model.safetensors` with the same values
            as an ordinary state dict, and `curve.csv`, a row an epoch.
        targets: `"paired"` with the samples that a batch meets, or `"predictive"`, for data that give the
            same inputs whenever a row is asked for.
        num_indices: samples a batch meets; None is one.
        window: shards of the bank that samples are drawn from at once, as for `train`.
        noise: standard deviation of normal noise added to inputs of teacher and student, at least 0.
        mixup: alpha of Beta(alpha, alpha), by which inputs are mixed with those of another row; 0 is off.
            Teacher and student see the mixed inputs, so that the teacher says what they are.
        likelihood: what outputs mean; the one that the bank was made with by default. The student
            of a Gaussian has one noise scale of its own, `@likelihood.scale`.
        held_out: rows judged after every epoch.
        sampler, importance_weights, num_epochs, batch_size, lr, optimizer, scheduler, scheduler_interval,
            clip_norm, precision, patience, monitor, log, num_workers, collate_fn, seed, shared_indices, resume, overwrite,
            progress, record: as for `train`, also what it says of several ranks. With noise or mixup every rank reads whole
            batches, and then takes its share.

    Returns:
        The student as a bank of one sample.

    Raises:
        ConfigError: an option out of range.
        BankExists, BankMismatch: as for `fit`.
        FitError: the loss is not finite.

    Source: Balan et al. (2015), arXiv:1506.04416; Hinton et al. (2015), arXiv:1503.02531; of mixed
    inputs, Zhang et al. (2018), arXiv:1710.09412.
    """
    recipe = Recipe(num_epochs, lr, optimizer, scheduler, scheduler_interval, clip_norm, precision, patience, monitor)
    check_log(log)
    _check_inputs(targets, num_indices, window, noise, mixup)
    likelihood = likelihood or likelihood_from_config(net.bank.info.get("likelihood"))
    is_normal = isinstance(likelihood, Gaussian)
    if not isinstance(likelihood, Categorical | Gaussian):
        raise ConfigError(
            "likelihood",
            want="Categorical or Gaussian, whose predictive a student can be taught",
            got=type(likelihood).__name__,
            fix="evaluate the bank itself",
        )
    net = net.settled()  # a run that goes on meets the same bits: by rule, whatever ways are fast today
    layout = layout_of(student, extra=[Entry(SCALE, (), torch.float32)] if is_normal else [])
    all_ranks, changed = ranks(), bool(noise or mixup)
    loader = paired(
        data, net.bank, batch_size=batch_size, num_indices=num_indices, window=window, num_workers=num_workers,
        collate_fn=collate_fn, seed=seed,
        sampler=sampler, importance=importance_weights, judged=held_out is not None,
        together=all_ranks, shared_indices=shared_indices, whole=changed,
    )  # fmt: skip
    cache = whole_predictive(net, data, likelihood, all_ranks) if targets == "predictive" else None
    lesson = Lesson(
        net, Skeleton(student, layout, detach=True), likelihood, relative_weights(net.bank), loader,
        importance_weights, cache, noise, mixup, seed, all_ranks,
    )  # fmt: skip
    named = dict(student.named_parameters())
    start = {entry.name: named[entry.name].detach() for entry in layout.entries if entry.name != SCALE}
    if is_normal:
        start[SCALE] = torch.zeros(())  # the logarithm of the scale moves
    judged = None if held_out is None else _judge(lesson, held_out)
    problem = Problem("distil", layout, start, _loss(lesson), _from_log, judged)
    options = {
        **recipe.to_config(start),
        "targets": targets,
        "num_indices": num_indices,
        **({} if window is None else {"window": window}),
        "noise": noise,
        "mixup": mixup,
        "batch_size": batch_size,
        "teacher": net.bank.digest,
        "strategy": net.strategy,
        **({} if shared_indices else {"ranks": all_ranks.world_size}),
    }
    config = {
        "likelihood": _of_student(likelihood).to_config(),
        "task": likelihood.task,
        "method": {"name": "distil", "options": options},
        "sampling": _sampling(net, data, sampler, importance=importance_weights),
        "seed": seed,
        "provenance": {
            **provenance(student, data),
            "held_out": None if held_out is None else digest_of(held_out),
        },
        "versions": versions(),
        **(record or {}),
    }
    buffers = {n: t for n, t in student.state_dict().items() if n not in layout.names and n not in layout.aliases}

    parts = {"student": (student, None), "module": (net.module, net.bank.layout)}
    again = {"resume": resume, "overwrite": overwrite}
    check_ranks(config, parts, {"rows": data, "held_out": held_out}, again, all_ranks)

    def steps(state: State | None) -> Iterator[tuple[Block, State]]:
        return run(problem, recipe, loader, net.device, state, all_ranks)

    return keep(
        out, steps, title="distil", layout=layout, config=config, base=buffers, export="model.safetensors", log=log,
        resume=resume, overwrite=overwrite, progress=progress, together=all_ranks,
    )  # fmt: skip


def divergence(
    likelihood: Likelihood, teacher: Tensor, student: Tensor, teacher_scale: Tensor, scale: Tensor
) -> Tensor:
    """KL(teacher || student) of each row [B], in nats.

    Classes: sum_c p_c (log p_c - log q_c). Normals, summed over outputs:
    log(s / sigma) + (sigma^2 + (mu - m)^2) / (2 s^2) - 1/2

    Args:
        likelihood: what outputs mean.
        teacher: logits or means of a sample [B, C].
        student: logits or means of the student [B, C].
        teacher_scale: sigma, a scalar or [B, C]; unused for classes.
        scale: s, a scalar; unused for classes.
    """
    if isinstance(likelihood, Gaussian):
        mu, m = as_columns(teacher), as_columns(student)
        each = (scale / teacher_scale).log() + (teacher_scale**2 + (mu - m).square()) / (2 * scale**2) - 0.5
        return each.sum(dim=-1)
    log_p, log_q = log_softmax(teacher), log_softmax(student)
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p)).sum(dim=-1)  # 0 log 0 = 0


def whole_predictive(
    net: FunctionalModel, data: Data, likelihood: Likelihood, together: Ranks = ALONE
) -> tuple[Tensor, Tensor]:
    """What the whole bank says of every row: log probabilities [N, C], or mean and standard deviation [N, C].

    Ranks take batches of the rows in turn, and all have what is found.
    """
    if isinstance(data, Dataset):
        parts: Iterator[Any] = iter(DataLoader(data, batch_size=CACHE_ROWS, generator=torch.Generator().manual_seed(0)))
    else:
        x, y, _ = full_batch(data)
        parts = (
            (pytree.tree_map(lambda leaf: leaf[start : start + CACHE_ROWS], x), y[start : start + CACHE_ROWS])  # noqa: B023
            for start in range(0, len(y), CACHE_ROWS)
        )

    def said(part: Any) -> dict[str, Tensor]:
        predictive = predict(net, inputs_and_targets(part).x, likelihood=likelihood)
        if isinstance(predictive, TargetPredictive):
            return {"outputs": predictive.mean.float(), "scales": predictive.variance.sqrt().float()}
        return {"outputs": predictive.log_probs.float()}

    found = list(in_turn(parts, said, together))
    scales = [state["scales"] for state in found if "scales" in state]
    return torch.cat([state["outputs"] for state in found]), torch.cat(scales) if scales else torch.ones(())


def _of_student(likelihood: Likelihood) -> Likelihood:
    """The likelihood of the student: of a Gaussian one whose scale is learnt, as the student's is."""
    if isinstance(likelihood, Gaussian) and not likelihood.unknowns:
        return Gaussian(HalfCauchy(1.0))
    return likelihood


def _sampling(net: FunctionalModel, data: Data, sampler: Any, *, importance: bool) -> dict[str, Any]:
    """How rows were drawn: a student of a balanced posterior is balanced, whatever the order of its own rows."""
    taught = dict(net.bank.info.get("sampling") or {})
    own = sampling_record(data, sampler, importance=importance)
    return taught if taught.get("posterior") == "balanced" else own


def _check_inputs(targets: str, num_indices: int | None, window: int | None, noise: float, mixup: float) -> None:
    choose("targets", targets, TARGETS)
    if not (0 <= noise < float("inf") and 0 <= mixup < float("inf")):
        raise ConfigError("distil", want="noise and mixup of at least 0", got=f"{noise}, {mixup}", fix="0 is off")
    if targets == "predictive" and (noise or mixup or num_indices is not None or window is not None):
        raise ConfigError(
            "targets='predictive'",
            want="neither noise, mixup, num_indices nor window beside it",
            got="one of them",
            fix="the predictive is computed once, of the rows as they are: use targets='paired'",
        )


def _loss(lesson: Lesson) -> Callable[[Params, Any, int | Tensor, Any, int], Tensor]:
    """This rank's part of the mean divergence of the student from what teaches it, over the rows of a batch."""

    def mean_divergence(values: Params, data: Any, index: int | Tensor, rows: Any, step: int) -> Tensor:
        nothing = torch.zeros((), device=lesson.net.device)
        if data is None:  # a rank without rows of this batch
            return nothing
        x = moved(inputs_and_targets(data, lesson.loader).x, lesson.net.device)
        if lesson.noise or lesson.mixup:  # of the whole batch, as one process changes it
            x, rows = _own(_changed(x, lesson, step), rows, lesson.together)
            if not len(rows):
                return nothing
        params = _from_log(values)
        scale = params.get(SCALE, torch.ones(()))
        student = lesson.student(params, x, device=lesson.net.device)
        weights = row_weights(lesson.loader, rows) if lesson.importance else None
        total = torch.zeros((), device=lesson.net.device)
        taught = list(_teachers(lesson, x, index, rows))
        for weight, teacher, teacher_scale in taught:
            each = divergence(lesson.likelihood, teacher, student, teacher_scale, scale)
            total = total + weight * weighted_mean(each, weights)
        return total * (len(rows) / lesson.loader.total) / len(taught)

    return mean_divergence


def _own(x: Any, rows: Any, together: Ranks) -> tuple[Any, Any]:
    """A rank's share of the inputs of a batch and of their row numbers."""
    share = together.share(len(rows))
    own = slice(share.start, share.stop)
    return pytree.tree_map(lambda leaf: leaf[own] if isinstance(leaf, Tensor) else leaf, x), rows[own]


def _teachers(lesson: Lesson, x: Any, index: int | Tensor, rows: Any) -> Iterator[tuple[float, Tensor, Tensor]]:
    """(weight, outputs [B, C], scale) of what teaches a batch: its samples, or the whole predictive."""
    if lesson.cache is not None:
        outputs, scales = lesson.cache
        chosen = torch.as_tensor(np.asarray(rows))
        scale = scales[chosen] if scales.dim() else scales
        yield 1.0, outputs[chosen].to(lesson.net.device), scale.to(lesson.net.device)
        return
    for one in [index] if isinstance(index, int) else index.tolist():
        with torch.no_grad():
            teacher = lesson.net(x, one)
            scale = torch.ones(())
            if isinstance(lesson.likelihood, Gaussian):
                scale = lesson.likelihood.scale_of(lesson.net.params(one))
        yield float(lesson.weights[one]), teacher, scale


def _changed(x: Any, lesson: Lesson, step: int) -> Any:
    """Inputs with noise, or mixed with those of another row; the same at the same step whenever it is taken."""
    if not (lesson.noise or lesson.mixup):
        return x
    leaves = [leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor)]
    if not all(leaf.is_floating_point() for leaf in leaves):
        raise ConfigError("noise, mixup", want="inputs of real numbers", got="whole numbers", fix="leave both at 0")
    source = generator(lesson.seed, "inputs", step)
    if lesson.mixup:
        share = float(np.random.default_rng(derive(lesson.seed, "mixup", step)).beta(lesson.mixup, lesson.mixup))
        partner = torch.randperm(len(leaves[0]), generator=source).to(lesson.net.device)
        x = pytree.tree_map(lambda leaf: share * leaf + (1 - share) * leaf[partner], x)
    if lesson.noise:

        def noisy(leaf: Tensor) -> Tensor:
            normals = torch.randn(leaf.shape, generator=source, dtype=leaf.dtype)
            return leaf + lesson.noise * normals.to(leaf.device)

        x = pytree.tree_map(noisy, x)
    return x


def _judge(lesson: Lesson, held_out: Data) -> Callable[[Params], HeldOut]:
    """The student on held-out rows: NLL of the targets, and for classes its divergence from the bank."""
    x, y, _ = full_batch(held_out)
    predictive = predict(lesson.net, x, likelihood=lesson.likelihood)
    x = moved(x, lesson.net.device)

    def judge(values: Params) -> HeldOut:
        params = _from_log(values)
        outputs = lesson.student(params, x, device=lesson.net.device).cpu()
        if isinstance(predictive, ClassPredictive):
            log_q = outputs.double().log_softmax(dim=-1)
            gap = (predictive.probs * (predictive.log_probs - log_q)).sum(dim=-1)
            found = class_figures(log_q, y.cpu())
            return HeldOut({**found.figures, "held_out_kl": float(gap.mean())}, found.per_class)
        # The student's scale is an entry of its params, under whatever prior the likelihood has it learnt with.
        nll = -float(Gaussian(float(params[SCALE])).log_prob(outputs, y.cpu(), params).mean())
        return HeldOut({"held_out_nll": nll}, {})

    return judge


def _from_log(values: Params) -> Params:
    """Values as they move -> params as a bank keeps them: the noise scale is the exponential of one."""
    return values | ({SCALE: values[SCALE].exp()} if SCALE in values else {})
