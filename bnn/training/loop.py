"""The one training loop: values moved by any optimiser, batch after batch, resumable bit for bit."""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from bnn.checkpoint import pack, unpack
from bnn.distributed import ALONE, Ranks
from bnn.errors import ConfigError, DataError, FitError, choose
from bnn.layout import Layout
from bnn.machine import keep_freed
from bnn.samplers import DynamicClassSampler, PairedLoader
from bnn.types import Block, Params, State, make_block

STEPS_PER_STATE = 50
STATE_SECONDS = 1.0  # a state also at the end of an epoch, where the last one is older: logs follow long epochs

OptimizerFactory: TypeAlias = Callable[[list[Tensor]], Optimizer]
SchedulerFactory: TypeAlias = Callable[[Optimizer], Any]

Precision: TypeAlias = Literal["float32", "bfloat16", "float16"]
PRECISIONS: tuple[str, ...] = ("float32", "bfloat16", "float16")
HIGHER_IS_BETTER = ("held_out_accuracy",)
INTERVALS: tuple[str, ...] = ("step", "epoch")


@dataclass(frozen=True)
class Recipe:
    """How values are optimised; `train` and `distil` say what each option means.

    Raises:
        ConfigError: an option out of range.
    """

    num_epochs: int
    lr: float
    optimizer: OptimizerFactory | None = None
    scheduler: SchedulerFactory | None = None
    scheduler_interval: Literal["step", "epoch"] = "epoch"
    clip_norm: float | None = None
    precision: Precision = "float32"
    patience: int | None = None
    monitor: str = "held_out_nll"

    def __post_init__(self) -> None:
        choose("precision", self.precision, PRECISIONS)
        choose("scheduler_interval", self.scheduler_interval, INTERVALS)
        for name, legal, want in (
            ("num_epochs", self.num_epochs >= 1, "at least 1"),
            ("lr", 0 < self.lr < math.inf, "a number above 0"),
            ("clip_norm", self.clip_norm is None or self.clip_norm > 0, "a number above 0"),
            ("patience", self.patience is None or self.patience >= 1, "at least 1 epoch"),
        ):
            if not legal:
                raise ConfigError(name, want=want, got=str(getattr(self, name)), fix="change it")

    def to_config(self, start: Params) -> dict[str, Any]:
        """What a record keeps; of optimiser and scheduler, their kind, made for values such as those at the start."""
        optimizer, scheduler = self.make([tensor.detach().clone().requires_grad_() for tensor in start.values()])
        plain = {key: value for key, value in vars(self).items() if key not in ("optimizer", "scheduler")}
        made = {"optimizer": optimizer, "scheduler": scheduler}
        return {**plain, **{key: None if one is None else type(one).__name__ for key, one in made.items()}}

    def make(self, values: list[Tensor]) -> tuple[Optimizer, Any]:
        """Optimiser and scheduler of these values.

        Raises:
            ConfigError: what should make them does not, or an optimiser that wants to run the loss itself.
        """
        if self.optimizer is None:
            optimizer: Any = torch.optim.Adam(values, lr=self.lr)
        else:
            optimizer = self.optimizer(values) if callable(self.optimizer) else self.optimizer
        if not isinstance(optimizer, Optimizer) or isinstance(optimizer, torch.optim.LBFGS):
            raise ConfigError(
                "optimizer",
                want="a function from the list of values to an optimiser that steps without a closure",
                got=type(optimizer).__name__,
                fix="pass for example lambda values: torch.optim.SGD(values, lr=0.1)",
            )
        if self.scheduler is not None and not callable(self.scheduler):
            raise ConfigError(
                "scheduler",
                want="a function from the optimiser to a scheduler",
                got=type(self.scheduler).__name__,
                fix="pass for example lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 10)",
            )
        return optimizer, None if self.scheduler is None else self.scheduler(optimizer)


class HeldOut(NamedTuple):
    """What held-out rows say: figures for the curve, and per-class values for a sampler that asks for them."""

    figures: dict[str, float]
    per_class: dict[str, list[float]]


class Problem(NamedTuple):
    """What is optimised: start values, the mean loss of a batch, and how it is judged between epochs."""

    name: str
    layout: Layout  # of the values, as the bank of the result keeps them
    start: Params
    loss: Callable[[Params, Any, int | Tensor, Any, int], Tensor]
    """(values, data, bank index, row numbers, step) -> the mean loss of the batch, a scalar; of several ranks this one's
    part of it, which all add up to."""
    finish: Callable[[Params], Params]
    """Values -> params as the bank keeps them."""
    held_out: Callable[[Params], HeldOut] | None


class Progress(NamedTuple):
    """Everything that changes beside values and optimiser."""

    step: int = 0
    losses: float = 0.0  # summed over the present epoch
    lr: float = 0.0  # of the last step
    columns: tuple[str, ...] = ()
    curve: Tensor = torch.empty(0, 0, dtype=torch.float64)  # [epochs, columns]
    best: float = math.inf
    waited: int = 0  # epochs since the best
    stopped: bool = False


class _Machine(NamedTuple):
    """Optimiser, scheduler and scaler at work on the values."""

    values: Params
    optimizer: Optimizer
    scheduler: Any
    scaler: Any
    best_values: Params


def run(
    problem: Problem,
    recipe: Recipe,
    loader: PairedLoader,
    device: torch.device,
    state: State | None,
    together: Ranks = ALONE,
) -> Iterator[tuple[Block, State]]:
    """Optimise; yields blocks of no rows while it goes on, and the one row of the result at the end, on every rank."""
    if recipe.patience is not None and problem.held_out is None:
        raise ConfigError("patience", want="held_out= rows to judge by", got="none", fix="pass held_out")
    keep_freed()
    total = recipe.num_epochs * len(loader)
    machine, progress = _start(problem, recipe, device), Progress()
    if state is not None:
        progress = _restore(state, machine, loader)
    elif isinstance(loader.sampler, DynamicClassSampler):
        loader.sampler.reset()  # what it was told in another run is not this one's
    yielded_at = time.monotonic()
    while progress.step < total and not progress.stopped:
        for data, index in loader:
            progress = _step(problem, recipe, machine, progress, (data, index, loader.rows), device, total, together)
            ended = progress.step % len(loader) == 0
            if ended:  # inside the loop: a state taken now has the whole epoch behind it
                progress = _end_epoch(problem, recipe, machine, progress, loader, together)
            late = ended and time.monotonic() - yielded_at > STATE_SECONDS
            if (late or progress.step % STEPS_PER_STATE == 0) and progress.step < total and not progress.stopped:
                yield problem.layout.no_rows(), _save(machine, progress, loader, total)
                yielded_at = time.monotonic()
            if progress.stopped:
                break
    final = machine.best_values if recipe.patience is not None else machine.values
    params = problem.finish({name: tensor.detach() for name, tensor in final.items()})
    block = make_block(
        {name: tensor.unsqueeze(0).to("cpu", copy=True) for name, tensor in params.items()},
        chain=torch.zeros(1),
        draw=torch.zeros(1),
    )
    yield block, _save(machine, progress, loader, total)


def _start(problem: Problem, recipe: Recipe, device: torch.device) -> _Machine:
    values = {n: t.detach().to(device, copy=True).requires_grad_() for n, t in problem.start.items()}
    optimizer, scheduler = recipe.make(list(values.values()))
    scaler = torch.amp.GradScaler(device.type) if recipe.precision == "float16" else None
    best = {name: tensor.detach().clone() for name, tensor in values.items()} if recipe.patience is not None else {}
    return _Machine(values, optimizer, scheduler, scaler, best)


def _step(
    problem: Problem,
    recipe: Recipe,
    machine: _Machine,
    progress: Progress,
    pair: tuple[Any, int | Tensor, Any],
    device: torch.device,
    total: int,
    together: Ranks,
) -> Progress:
    """One optimiser step on one batch."""
    machine.optimizer.zero_grad()
    if recipe.scheduler is None and recipe.optimizer is None:  # Adam falls to a hundredth over the run
        machine.optimizer.param_groups[0]["lr"] = recipe.lr * 0.01 ** (progress.step / total)
    mixed = recipe.precision != "float32"
    autocast = torch.autocast(device.type, dtype=getattr(torch, recipe.precision)) if mixed else nullcontext()
    with torch.enable_grad(), autocast:
        try:
            loss = problem.loss(machine.values, *pair, progress.step)
        except (RuntimeError, TypeError, IndexError) as error:
            if progress.step or isinstance(error, torch.OutOfMemoryError):
                raise
            lines = str(error).strip().splitlines()
            raise DataError(
                problem.name,
                want="rows that the module takes, and outputs that the loss takes",
                got=f"{type(error).__name__}: {lines[0] if lines else ''}",
                fix="check the shape and dtype of x, and the structure of the module",
            ) from error
    scaler, optimizer = machine.scaler, machine.optimizer
    found = float(loss.detach())
    if together.several:
        found = _summed_gradients(machine, loss, together)
    if not math.isfinite(found):
        raise FitError(
            problem.name, want="a finite loss", got=f"{found} at step {progress.step}", fix="lower lr, or clip_norm"
        )
    if not together.several:
        (loss if scaler is None else scaler.scale(loss)).backward()
    if recipe.clip_norm is not None:
        if scaler is not None:
            scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(machine.values.values(), recipe.clip_norm)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    lr = float(optimizer.param_groups[0]["lr"])
    if recipe.scheduler is not None and recipe.scheduler_interval == "step":
        _advance(machine, None)
    return progress._replace(step=progress.step + 1, losses=progress.losses + found, lr=lr)


def _summed_gradients(machine: _Machine, loss: Tensor, together: Ranks) -> float:
    """Gradients of this rank's part of the loss, summed over all ranks at once, and the whole loss."""
    values = list(machine.values.values())
    kind = functools.reduce(torch.promote_types, {value.dtype for value in values})  # of gradients too
    size = 1 + sum(value.numel() for value in values)
    summed_over_ranks = together.coming_total(torch.empty(size, dtype=kind, device=values[0].device))
    if loss.requires_grad:  # a rank without rows has a loss of 0 and no gradients
        (loss if machine.scaler is None else machine.scaler.scale(loss)).backward()
    parts = [torch.zeros_like(value) if value.grad is None else value.grad for value in values]
    summed = summed_over_ranks(
        torch.cat([part.to(kind).flatten() for part in parts] + [loss.detach().to(kind).reshape(1)])
    )
    for value, part in zip(values, summed[:-1].split([value.numel() for value in values]), strict=True):
        value.grad = part.to(value.dtype).view_as(value).clone()
    return float(summed[-1])


def _advance(machine: _Machine, figure: float | None) -> None:
    """One step of the scheduler, which is told the held-out figure if it asks for one."""
    if isinstance(machine.scheduler, ReduceLROnPlateau):
        if figure is None:
            raise ConfigError(
                "scheduler",
                want="ReduceLROnPlateau by epoch, with held_out= rows to judge by",
                got="none, or scheduler_interval='step'",
                fix="pass held_out, and leave scheduler_interval out",
            )
        machine.scheduler.step(figure)
        return
    with warnings.catch_warnings():
        if (
            machine.scaler is not None
        ):  # it leaves out optimiser steps whose gradients overflow, so that none may have come
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        machine.scheduler.step()


def _end_epoch(
    problem: Problem,
    recipe: Recipe,
    machine: _Machine,
    progress: Progress,
    loader: PairedLoader,
    together: Ranks,
) -> Progress:
    """Judge on held-out rows, write the curve, tell scheduler and sampler, and stop where nothing gets better."""
    epoch = progress.step // len(loader)
    row = {"epoch": epoch, "loss": progress.losses / len(loader), "lr": progress.lr}
    figure: float | None = None
    if problem.held_out is not None:
        with torch.no_grad():
            found = problem.held_out({name: tensor.detach() for name, tensor in machine.values.items()})
        found = HeldOut(*together.first_value(list(found)))  # all stop where rank 0 does, also on unlike machines
        row |= found.figures
        figure = _figure(recipe.monitor, found.figures)
        sampler = loader.sampler
        if isinstance(sampler, DynamicClassSampler) and sampler.wants_metrics and found.per_class:
            size = len(sampler.natural_shares())  # the module can have outputs for classes without rows
            sampler.update({name: values[:size] for name, values in found.per_class.items()})
    if recipe.scheduler is not None and recipe.scheduler_interval == "epoch":
        _advance(machine, figure)
    values = torch.tensor([list(row.values())], dtype=torch.float64)
    curve = torch.cat([progress.curve, values]) if progress.columns else values
    progress = progress._replace(losses=0.0, columns=tuple(row), curve=curve)
    if recipe.patience is None or figure is None:
        return progress
    if figure < progress.best:
        for name, tensor in machine.values.items():
            machine.best_values[name].copy_(tensor.detach())
        return progress._replace(best=figure, waited=0)
    return progress._replace(waited=progress.waited + 1, stopped=progress.waited + 1 >= recipe.patience)


def _figure(monitor: str, figures: dict[str, float]) -> float:
    if monitor not in figures:
        raise ConfigError(
            "monitor", want=f"one of {', '.join(figures)}", got=repr(monitor), fix="choose a held-out figure"
        )
    figure = -figures[monitor] if monitor in HIGHER_IS_BETTER else figures[monitor]
    if math.isnan(figure):
        raise FitError("held_out", want=f"a {monitor} that is a number", got="NaN", fix="look at the held-out rows")
    return figure


def _save(machine: _Machine, progress: Progress, loader: PairedLoader, total: int) -> State:
    return {
        **pack("values", machine.values),
        **pack("best_values", machine.best_values),
        **pack("optimizer", machine.optimizer.state_dict()),
        **pack("scheduler", None if machine.scheduler is None else machine.scheduler.state_dict()),
        **pack("scaler", None if machine.scaler is None else machine.scaler.state_dict()),
        **pack("progress", progress._asdict()),
        "loader": loader.state_dict(),
        "step": progress.step,
        "num_steps": total,
        "info": _last(progress),
    }


def _last(progress: Progress) -> dict[str, float]:
    """The last row of the curve, less what is no number."""
    if not progress.columns:
        return {}
    row = dict(zip(progress.columns, progress.curve[-1].tolist(), strict=True))
    return {name: value for name, value in row.items() if math.isfinite(value)}


def curve_of(state: State) -> list[dict[str, float]]:
    """A row an epoch: epoch, mean loss, learning rate, and what held-out rows say."""
    return _rows(Progress(**unpack("progress", state)))


def _rows(progress: Progress) -> list[dict[str, float]]:
    rows = [dict(zip(progress.columns, values, strict=True)) for values in progress.curve.tolist()]
    return [{**row, "epoch": int(row["epoch"])} for row in rows]


def _restore(state: State, machine: _Machine, loader: PairedLoader) -> Progress:
    with torch.no_grad():
        for kept, values in (("values", machine.values), ("best_values", machine.best_values)):
            for name, tensor in unpack(kept, state).items():
                values[name].copy_(tensor)
    machine.optimizer.load_state_dict(unpack("optimizer", state))
    for part, kept in ((machine.scheduler, "scheduler"), (machine.scaler, "scaler")):
        if part is not None:
            part.load_state_dict(unpack(kept, state))
    loader.load_state_dict(state["loader"])
    return Progress(**unpack("progress", state))
