"""Deep ensembles: members climb the log joint from starts of their own, a group of them at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, Subset

from bnn.arrays import read_tensors
from bnn.batches import Sampled, minibatches, moved, num_batches, num_rows
from bnn.distributed import Ranks, ranks
from bnn.errors import ConfigError, DataError, check_kinds, choose
from bnn.inference.climbing import Climb, climb, require_finite, starts, weighted_batches
from bnn.inference.gradients import Gradient, gradient_of
from bnn.model import BayesianModel
from bnn.seeding import generator
from bnn.types import Batch, Block, Data, Params, State, make_block

MemberStart: TypeAlias = Literal["reset", "prior"]
MEMBER_STARTS: tuple[str, ...] = ("reset", "prior")

STEPS_PER_STATE = 50  # optimisation steps between two states that a bank may keep

Score: TypeAlias = Callable[[Tensor], Tensor]
"""Positions u [M, P] -> a number of each [M], float64."""


@dataclass(frozen=True)
class Ensemble:
    """Points of high log joint, each climbed to from a start of its own.

    theta_m = argmax log p(theta | D) by Adam on batches, from theta_m at the start, for m = 0 .. S - 1

    Members are trained `group_size` at once, on one `vmap` axis; all meet the same batches, and differ
    by their starts. A group is always trained whole, and what was not asked for is left out: a bank of S
    samples grows to more with the same bits, and `num_samples` is best a multiple of `group_size`.
    Memory is `group_size` times that of about ten copies of the parameters, and of one forward and backward;
    `group_size=1` trains modules that vmap cannot take.

    With `patience` some rows are held out. After each epoch, and at the end, a member's mean log likelihood of
    them is compared with its best; it stops after `patience` epochs without a better one, and its best
    values are the sample. The likelihood of the other rows is scaled to all N.

    With `checkpoints` members start at values from files, and are those values where `num_steps` is 0. What a
    checkpoint says of parameters outside the sample and of buffers must equal the module's: a bank keeps those
    once. Unknowns that no file has start at the model's defaults.

    A sample's chain is the number of its member; its log joint is that of all rows, and NaN for a
    `DataLoader` or under a sampler.

    Args:
        num_steps: optimisation steps of a group, at least 1, or 0 with `checkpoints`.
        batch_size: rows a step.
        lr: of Adam, falling exponentially to a hundredth over the steps.
        start: `"reset"` calls `reset_parameters` of every layer of a copy of the module, `"prior"` draws
            from the prior.
        patience: epochs without a better held-out log likelihood after which a member stops, at
            least 1; None trains on all rows to the end.
        held_out: share of the rows that is held out with `patience`, in (0, 1).
        checkpoints: paths of `.safetensors` state dicts, one a member.
        group_size: members trained at once, at least 1.

    Raises:
        ConfigError: an option out of range, or `patience` for data whose rows cannot be held out.
        DataError: a checkpoint that cannot be read, or is of another module.
        FitError: a log joint that is not finite.

    Source: Lakshminarayanan et al. (2017), arXiv:1612.01474, without its adversarial examples.
    """

    num_steps: int = 2000
    batch_size: int = 128
    lr: float = 0.01
    start: MemberStart = "reset"
    patience: int | None = None
    held_out: float = 0.1
    checkpoints: tuple[str, ...] = ()
    group_size: int = 5

    name: ClassVar[str] = "ensemble"
    split: ClassVar[str] = "rows"

    def __post_init__(self) -> None:
        check_kinds(self)
        choose("Ensemble(start=)", self.start, MEMBER_STARTS)
        least = {"num_steps": 0 if self.checkpoints else 1, "batch_size": 1, "group_size": 1, "patience": 1}
        for name, bound in least.items():
            if (value := getattr(self, name)) is not None and value < bound:
                raise ConfigError(f"Ensemble({name}=)", want=f"at least {bound}", got=str(value), fix="raise it")
        if not self.lr > 0:
            raise ConfigError("Ensemble(lr=)", want="a positive number", got=str(self.lr), fix="try 0.01")
        if not 0 < self.held_out < 1:
            raise ConfigError("Ensemble(held_out=)", want="a share in (0, 1)", got=str(self.held_out), fix="try 0.1")
        if self.checkpoints:
            _check_paths(self)

    def run(
        self, model: BayesianModel, data: Data, *, num_samples: int, seed: int, state: State | None = None
    ) -> Iterator[tuple[Block, State]]:
        if self.checkpoints and num_samples != len(self.checkpoints):
            raise ConfigError(
                "num_samples",
                want=f"{len(self.checkpoints)}, one a checkpoint",
                got=str(num_samples),
                fix=f"pass num_samples={len(self.checkpoints)}",
            )
        yield from _run(self, model, data, num_samples, seed, state)


class Watch(NamedTuple):
    """The best that each member of a group was on held-out rows."""

    flat: Tensor  # [M, P] unconstrained
    score: Tensor  # [M] mean log likelihood a row
    waited: Tensor  # [M] int64, looks since then
    past: Tensor  # [2, *] scores and waits of the members of all groups before, for diagnostics

    @property
    def members(self) -> Tensor:
        """Scores and waits of all members so far, [2, *]."""
        return torch.cat([self.past, torch.stack([self.score, self.waited.to(self.score)])], dim=1)


class Group(NamedTuple):
    """Members that are trained at once, and how far they are."""

    number: int
    step: int  # of num_steps
    at: Climb
    watch: Watch | None

    @property
    def found(self) -> Tensor:
        """The members' values [M, P]."""
        return self.at.flat if self.watch is None else self.watch.flat

    def save(self) -> State:
        watch = {} if self.watch is None else {f"watch.{name}": value for name, value in self.watch._asdict().items()}
        return {"group": self.number, "group_step": self.step, **self.at.save(), **watch}

    @staticmethod
    def load(state: State, device: torch.device) -> Group:
        watch = None
        if "watch.flat" in state:
            watch = Watch(*(state[f"watch.{name}"].to(device) for name in Watch._fields))
        return Group(state["group"], state["group_step"], Climb.load(state, device), watch)


class Task(NamedTuple):
    """What all steps have in common."""

    options: Ensemble
    model: BayesianModel
    seed: int
    training: Data
    gradient: Gradient
    score: Score | None  # on held-out rows, with `patience`
    epoch: int  # batches of the training rows
    together: Ranks  # of which this one trains every so-many-th member

    def members(self, group: int) -> range:
        """Numbers of the members of a group of this rank, of all ranks' members."""
        first, every, size = self.together.rank, self.together.world_size, self.options.group_size
        return range(first + group * size * every, first + (group + 1) * size * every, every)


def first_look(flat: Tensor, score: Tensor, before: Watch | None) -> Watch:
    """Positions [M, P] and their scores [M] before any step: the best so far; and what the group before had."""
    past = score.new_zeros(2, 0) if before is None else before.members
    return Watch(flat, score, torch.zeros_like(score, dtype=torch.int64), past)


def look(watch: Watch, flat: Tensor, score: Tensor) -> Watch:
    """The best so far, after another look: where a score [M] is above all before it, it and its position."""
    better = score > watch.score  # [M]
    best = torch.where(better.unsqueeze(1), flat, watch.flat)  # [M, P]
    waited = torch.where(better, 0, watch.waited + 1)
    return watch._replace(flat=best, score=torch.where(better, score, watch.score), waited=waited)


def freeze(old: Climb, new: Climb, stopped: Tensor) -> Climb:
    """A step of all members but the stopped ones [M], which stay where they were."""
    return Climb(*(torch.where(stopped.unsqueeze(1), o, n) for o, n in zip(old, new, strict=True)))


def window(task: Task, group: Group, batches: Iterator[tuple[Batch, float]]) -> tuple[Group, Tensor]:
    """Up to STEPS_PER_STATE steps of a group, and the log joints [W, M] met there; to its end if all have stopped."""
    options, at, watch, step = task.options, group.at, group.watch, group.step
    heights: list[Tensor] = []
    end = min(step + STEPS_PER_STATE, options.num_steps)
    while step < end:
        slope, height = task.gradient(at.flat, *next(batches), step)
        new = climb(at, slope, step=step, num_steps=options.num_steps, lr=options.lr)
        at = new if watch is None else freeze(at, new, _stopped(options, watch))
        heights.append(height)
        step += 1
        if watch is not None and task.score is not None and (step % task.epoch == 0 or step == options.num_steps):
            watch = look(watch, at.flat, task.score(at.flat))
            step = options.num_steps if bool(_stopped(options, watch).all()) else step
    require_finite("Ensemble", torch.stack(heights), at.flat, start=group.step, last_good=None, lr=options.lr)
    return Group(group.number, step, at, watch), torch.stack(heights)


def split(data: Data, share: float, seed: int) -> tuple[Data, Data]:
    """Rows to train on, and rows that are held out: chosen by the seed, each in the order of the data.

    Raises:
        ConfigError: data whose rows cannot be chosen, or a single row.
    """
    if isinstance(data, DataLoader | Sampled):
        raise ConfigError(
            "Ensemble(patience=)",
            want="a pair of tensors or a data set, of which rows can be held out",
            got="a DataLoader" if isinstance(data, DataLoader) else "data under a sampler",
            fix="pass the data set itself, or leave patience out",
        )
    rows = num_rows(data)
    if rows < 2:
        raise ConfigError("Ensemble(patience=)", want="two rows at least", got=str(rows), fix="leave patience out")
    next(minibatches(data, 1, seed=seed))  # refuses NaN in tensors by the row of the data, not of a part of them
    count = min(max(round(share * rows), 1), rows - 1)
    order = torch.randperm(rows, generator=generator(seed, "held out"))
    held, others = order[:count].sort().values, order[count:].sort().values
    if isinstance(data, Dataset):
        return Subset(data, others.tolist()), Subset(data, held.tolist())
    return _rows(data, others), _rows(data, held)


def held_out_score(model: BayesianModel, data: Data, batch_size: int, seed: int) -> Score:
    """The mean log likelihood of a row of the data under each member."""
    batches, rows = num_batches(data, batch_size), num_rows(data)

    def log_likelihood(flat: Tensor, batch: Batch) -> Tensor:
        return model.log_likelihood(model.constrain(flat)[0], batch)

    def score(flat: Tensor) -> Tensor:
        found = islice(minibatches(data, batch_size, seed=seed), batches)
        total = _total(log_likelihood, flat, ((moved(batch, model.device),) for batch in found))
        return (total / rows).nan_to_num(nan=-math.inf, neginf=-math.inf)  # any number is better than NaN

    return score


def full_log_joint(model: BayesianModel, data: Data, batch_size: int, seed: int) -> Score:
    """The log joint of all rows under each member: the mean over an epoch's batches, weighted by their rows.

    NaN for data whose batches need not meet each row once: of a loader, or under a sampler.
    """

    def log_joint(flat: Tensor, batch: Batch, weight: float) -> Tensor:
        return model.log_density(flat, batch, weight=weight)[1]

    def score(flat: Tensor) -> Tensor:
        if isinstance(data, DataLoader | Sampled):
            return torch.full((len(flat),), math.nan, dtype=torch.float64)
        batches = num_batches(data, batch_size)
        return _total(log_joint, flat, islice(weighted_batches(model, data, batch_size, seed=seed), batches)) / batches

    return score


def _total(function: Callable[..., Tensor], flat: Tensor, batches: Iterable[tuple[Any, ...]]) -> Tensor:
    """The sum over batches of a function of a position and a batch, for each position [M, P]: [M], float64."""
    total = torch.zeros(len(flat), dtype=torch.float64, device=flat.device)
    with torch.no_grad():
        for batch in batches:
            # One by one: without a gradient vmap has no rule for some layers that it trains, such as nn.LSTM.
            total += torch.stack([function(one, *batch) for one in flat])
    return total


def read_checkpoint(path: str, model: BayesianModel) -> Params:
    """The values of a member from a `.safetensors` state dict; unknowns of the model at their defaults.

    Raises:
        DataError: a tensor is missing, has another shape or holds NaN, or one that the bank keeps once for
            all members differs from the module's.
    """
    tensors, layout, found = read_tensors(Path(path)), model.layout, model.module_params()
    for entry in layout.entries:
        if entry.name.startswith("@"):
            continue
        # Of tied tensors a file may have any one name.
        names = [entry.name, *(alias for alias, kept in layout.aliases.items() if kept == entry.name)]
        tensor = next((tensors[name] for name in names if name in tensors), None)
        got = "nothing" if tensor is None else f"{list(tensor.shape)} of {tensor.dtype}"
        if tensor is None or tuple(tensor.shape) != entry.shape or not tensor.is_floating_point():
            raise DataError(path, want=f"{entry} of {entry.dtype}", got=got, fix="pass state dicts of this module")
        if not bool(tensor.isfinite().all()):
            raise DataError(path, want=f"finite numbers in '{entry.name}'", got="NaN or Inf", fix="leave it out")
        found[entry.name] = tensor.to(model.device, entry.dtype)
    for name, own in model.base().items():
        if name in tensors and not torch.equal(tensors[name], own.cpu()):
            raise DataError(
                path,
                want=f"the module's values of '{name}', which is not in the sample: a bank keeps it once",
                got="others",
                fix="load them into the module, if all checkpoints agree on them",
            )
    return found


def _run(
    options: Ensemble, model: BayesianModel, data: Data, num_samples: int, seed: int, state: State | None
) -> Iterator[tuple[Block, State]]:
    task = _task(options, model, data, seed)
    log_joint = full_log_joint(model, data, options.batch_size, seed)
    size, num_steps = options.group_size, options.num_steps
    num_samples = len(task.together.stride(num_samples))  # this rank's
    total = math.ceil(num_samples / size) * num_steps + num_samples
    if not num_samples:
        return  # more ranks than members
    drawn, info = (0, {}) if state is None else (state["drawn"], state["info"])
    group = _begin(task, 0, None) if state is None else Group.load(state, model.device)
    while drawn < num_samples:
        if drawn == (group.number + 1) * size:
            group = _begin(task, group.number + 1, group.watch)
        batches = weighted_batches(model, task.training, options.batch_size, seed=seed, start=group.step)
        while group.step < num_steps:
            group, heights = window(task, group, batches)
            height = float(heights.double().mean())
            info = {"log_joint_per_row": height / model.num_data, **_watched(options, group, num_samples)}
            facts = {"drawn": drawn, "step": group.number * num_steps + group.step + drawn, "num_steps": total}
            yield model.layout.no_rows(), {**group.save(), **facts, "info": info}
        first = group.number * size  # its first member
        rows = slice(drawn - first, min(num_samples - first, size))
        drawn = first + rows.stop
        params, _ = model.constrain(group.found[rows].cpu())  # [K, P]
        chain = torch.tensor(task.members(group.number))[rows]
        values = log_joint(group.found)[rows].cpu()
        block = make_block(params, chain=chain, draw=torch.zeros_like(chain), log_joint=values)
        facts = {"drawn": drawn, "step": (group.number + 1) * num_steps + drawn, "num_steps": total}
        info = {**info, **_watched(options, group, num_samples)}
        yield block, {**group.save(), **facts, "info": info}


def _task(options: Ensemble, model: BayesianModel, data: Data, seed: int) -> Task:
    training, score = data, None
    if options.patience is not None:
        training, held = split(data, options.held_out, seed)
        score = held_out_score(model, held, options.batch_size, seed)
    epoch = num_batches(training, options.batch_size)
    return Task(options, model, seed, training, gradient_of(model, constrained=True), score, epoch, ranks())


def _begin(task: Task, number: int, before: Watch | None) -> Group:
    """A group at its start."""
    options, model, members = task.options, task.model, task.members(number)
    if options.checkpoints:
        paths = options.checkpoints[members.start : members.stop : members.step]
        params = [read_checkpoint(path, model) for path in paths]
        flat = torch.stack([model.unconstrain(member) for member in params])
    else:
        found = starts(
            model, options.start, max(options.group_size, 2), task.seed, first=members.start, every=members.step
        )
        if torch.equal(found[0], found[1]):
            raise ConfigError(
                "Ensemble(start='reset')",
                want="a layer with reset_parameters, by which members differ, among what is Bayesian",
                got="none",
                fix="pass start='prior'",
            )
        flat = found[: options.group_size]
    watch = None if task.score is None else first_look(flat, task.score(flat), before)
    return Group(number, 0, Climb.of(flat), watch)


def _stopped(options: Ensemble, watch: Watch) -> Tensor:
    """Which members [M] have waited as long as they may."""
    return watch.waited >= (options.patience or 0)


def _watched(options: Ensemble, group: Group, num_samples: int) -> dict[str, float]:
    """Of the members so far that were asked for: their mean held-out score, and how many have stopped."""
    if group.watch is None:
        return {}
    scores, waited = group.watch.members[:, :num_samples]
    found = {"held_out_per_row": float(scores.mean()), "stopped": int((waited >= (options.patience or 0)).sum())}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _check_paths(options: Ensemble) -> None:
    """Raise ConfigError unless the checkpoints are paths of safetensors files, and the only start."""
    paths = options.checkpoints
    if not isinstance(paths, tuple) or not all(isinstance(path, str) for path in paths):
        raise ConfigError(
            "Ensemble(checkpoints=)", want="a tuple of paths as str, one a member", got=repr(paths), fix="pass such"
        )
    for path in paths:
        if Path(path).suffix != ".safetensors":
            raise ConfigError(
                "Ensemble(checkpoints=)",
                want=".safetensors files, of which nothing is run",
                got=path,
                fix="load pickled ones with torch.load(path, weights_only=True), and pass the state dicts to "
                "bnn.Bank.from_state_dicts",
            )
    if options.start != "reset":
        raise ConfigError(
            "Ensemble(start=)",
            want="none with checkpoints=, which are the start",
            got=options.start,
            fix="leave it out",
        )


def _rows(data: Any, places: Tensor) -> Any:
    """These rows of a pair of tensors, or of any nesting of them."""
    return pytree.tree_map(lambda leaf: leaf[places.to(leaf.device)] if isinstance(leaf, Tensor) else leaf, data)
