"""Train with a bank: teach one network, batch by batch, by the sample that is paired with the batch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset

from bnn import adam
from bnn.bank import Bank, BankWriter
from bnn.bank.files import write_atomic
from bnn.batches import full_batch, moved
from bnn.errors import ConfigError, FitError
from bnn.fitting import drive
from bnn.functional import FunctionalModel, Skeleton
from bnn.layout import Entry, Layout, layout_of
from bnn.likelihoods import SCALE, Gaussian, Likelihood, as_columns, likelihood_from_config
from bnn.predictive import ClassPredictive, predict
from bnn.samplers import PairedLoader, SampleIndexSampler
from bnn.types import Block, Data, Params, State, make_block

STEPS_PER_STATE = 50


class Rows(Dataset[tuple[Any, Tensor]]):
    """Tensors in memory, or tuples and dicts of them, as a data set."""

    def __init__(self, x: Any, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, row: int) -> tuple[Any, Tensor]:
        return pytree.tree_map(lambda leaf: leaf[row], self.x), self.y[row]


class _Lesson(NamedTuple):
    """Everything that does not change while a student is taught."""

    net: FunctionalModel
    student: Skeleton
    layout: Layout
    likelihood: Likelihood
    weights: Tensor  # [S] of the samples, summing to 1
    held_out: tuple[Tensor, Tensor, Any] | None  # x, y, predictive of the bank


def distil(
    student: nn.Module,
    net: FunctionalModel,
    data: Data,
    *,
    out: str | Path,
    held_out: Data | None = None,
    likelihood: Likelihood | None = None,
    num_epochs: int = 100,
    batch_size: int = 128,
    lr: float = 3e-3,
    num_workers: int = 0,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool | None = None,
    record: Mapping[str, Any] | None = None,
) -> Bank:
    """Distil a bank into one network, by stochastic steps in both data and samples.

    minimise over phi: E_{x, i} KL(p(y | x, theta_i) || q(y | x, phi))

    Each batch of data meets one bank index, so that a step costs one pass of one sample, and over
    many steps the student learns the predictive of the whole bank, sample weights included: its minimum is the mean
    probability for classes, mean and standard deviation of the mixture for a Gaussian.

    Args:
        student: gives structure and initial values; not changed.
        net: the module under the bank that teaches.
        data: training rows; targets are not looked at.
        out: a folder for the result: a bank of one sample, `model.safetensors` with the same values
            as an ordinary state dict, and `curve.json`, a row an epoch.
        held_out: rows on which the curve is measured.
        likelihood: what outputs mean; the one that the bank was made with by default. The student
            of a Gaussian has one noise scale of its own, `@likelihood.scale`.
        num_epochs: passes over the data, at least 1.
        batch_size: rows a step.
        lr: of Adam, falling exponentially to a hundredth over the run.
        num_workers: processes that load data.
        seed: of the order of data and bank indices.
        resume: go on with an unfinished run at `out`; it ends as if it had not been interrupted.
        overwrite: replace what is at `out`.
        progress: show a bar on stderr; by default where stderr is a terminal.
        record: more for `bank.json`.

    Returns:
        The student as a bank of one sample.

    Raises:
        BankExists, BankMismatch: as for `fit`.
        FitError: the loss is not finite.

    Source: Balan et al. (2015), arXiv:1506.04416; Hinton et al. (2015), arXiv:1503.02531.
    """
    if num_epochs < 1 or batch_size < 1 or not 0 < lr < math.inf:
        raise ConfigError(
            "distil",
            want="num_epochs and batch_size of at least 1, lr above 0",
            got=f"{num_epochs}, {batch_size}, {lr}",
            fix="raise them",
        )
    likelihood = likelihood or likelihood_from_config(net.bank.info.get("likelihood"))
    is_normal = isinstance(likelihood, Gaussian)
    layout = layout_of(student, extra=[Entry(SCALE, (), torch.float32)] if is_normal else [])
    dataset = data if isinstance(data, Dataset) else Rows(*full_batch(data))
    indices = SampleIndexSampler(net.bank, seed=seed)
    loader = PairedLoader(dataset, indices, batch_size=batch_size, shuffle=True, num_workers=num_workers)
    kept = None
    if held_out is not None:
        rows = full_batch(held_out)
        kept = rows.x, rows.y, predict(net, rows.x, likelihood=likelihood)
    config = {
        "likelihood": likelihood.to_config(),
        "task": likelihood.task,
        "method": {
            "name": "distil",
            "options": {"num_epochs": num_epochs, "batch_size": batch_size, "lr": lr, "teacher": net.bank.digest},
        },
        "seed": seed,
        **(record or {}),
    }
    buffers = {n: t for n, t in student.state_dict().items() if n not in layout.names and n not in layout.aliases}
    writer = BankWriter(out, layout=layout, config=config, base=buffers, resume=resume, overwrite=overwrite)
    if writer.num_rows == 0:
        lesson = _Lesson(
            net, Skeleton(student, layout, detach=True), layout, likelihood, net.bank.log_weight.softmax(dim=0), kept
        )
        start = {e.name: dict(student.named_parameters())[e.name].detach() for e in layout.entries if e.name != SCALE}
        if is_normal:
            start[SCALE] = torch.ones(())
        drive(writer, _run(lesson, loader, start, num_epochs, lr, writer.state), title="distil", progress=progress)
    elif not writer.complete:  # stopped between its last row and the end
        writer.close()
    else:
        writer.release()
    taught = Bank.open(out)
    if not all((Path(out) / name).exists() for name in ("model.safetensors", "curve.json")):
        _write_files(Path(out), taught, writer.state or {})
    return taught


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
        teacher_scale: sigma, a scalar; unused for classes.
        scale: s, a scalar; unused for classes.
    """
    if isinstance(likelihood, Gaussian):
        mu, m = as_columns(teacher), as_columns(student)
        each = (scale / teacher_scale).log() + (teacher_scale**2 + (mu - m).square()) / (2 * scale**2) - 0.5
        return each.sum(dim=-1)
    log_p, log_q = teacher.log_softmax(dim=-1), student.log_softmax(dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def _run(
    lesson: _Lesson, loader: PairedLoader, start: Params, num_epochs: int, lr: float, state: State | None
) -> Iterator[tuple[Block, State]]:
    device = lesson.net.device
    values = {name: tensor.to(device, copy=True).requires_grad_() for name, tensor in _to_log(start).items()}
    optimizer = torch.optim.Adam(values.values(), lr=lr)
    step, total, curve, losses = 0, num_epochs * len(loader), [], 0.0
    if state is not None:
        adam.load(state, optimizer, values)
        step, curve, losses = state["step"], state["curve"], state["losses"]
        loader.load_state_dict(state["loader"])
    for epoch in range(step // len(loader), num_epochs):
        for (x, _), index in loader:
            x = tuple(x) if isinstance(x, list) else x  # collating makes lists of tuples
            optimizer.param_groups[0]["lr"] = lr * 0.01 ** (step / total)
            losses += _step(lesson, values, optimizer, moved(x, device), index, step)
            step += 1
            if step % len(loader) == 0:
                curve = [*curve, {"epoch": epoch + 1, "loss": losses / len(loader), **_held_out(lesson, values)}]
                losses = 0.0
            if step % STEPS_PER_STATE == 0 and step < total:
                yield lesson.layout.no_rows(), _save(values, optimizer, loader, step, total, curve, losses)
    taught = _from_log({name: tensor.detach() for name, tensor in values.items()})
    block = make_block(
        {name: tensor.unsqueeze(0).to("cpu", copy=True) for name, tensor in taught.items()},
        chain=torch.zeros(1),
        draw=torch.zeros(1),
    )
    yield block, _save(values, optimizer, loader, step, total, curve, losses)


def _step(
    lesson: _Lesson, values: Params, optimizer: torch.optim.Adam, x: Any, index: int | Tensor, step: int
) -> float:
    """One optimiser step on one batch under one sample; the loss before it."""
    index = int(index)
    with torch.no_grad():
        teacher = lesson.net(x, index)
        weight = len(lesson.net.bank) * float(lesson.weights[index])
        teacher_scale = _scale(lesson.likelihood, lesson.net.params(index))
    params = _from_log(values)
    optimizer.zero_grad()
    student = lesson.student(params, x, device=lesson.net.device)
    scale = params.get(SCALE, torch.ones(()))
    loss = weight * divergence(lesson.likelihood, teacher, student, teacher_scale, scale).mean()
    if not torch.isfinite(loss):
        raise FitError("distil", want="a finite loss", got=f"{float(loss.detach())} at step {step}", fix="lower lr")
    loss.backward()
    optimizer.step()
    return float(loss.detach())


@torch.no_grad()
def _held_out(lesson: _Lesson, values: Params) -> dict[str, float]:
    """The student on held-out rows: NLL of the targets, and for classes its divergence from the bank."""
    if lesson.held_out is None:
        return {}
    x, y, predictive = lesson.held_out
    params = _from_log({name: tensor.detach() for name, tensor in values.items()})
    outputs = lesson.student(params, moved(x, lesson.net.device), device=lesson.net.device).cpu()
    # The student's scale is an entry of its params, under whatever prior the likelihood has it learnt with.
    likelihood = Gaussian(float(params[SCALE])) if isinstance(lesson.likelihood, Gaussian) else lesson.likelihood
    figures = {"held_out_nll": -float(likelihood.log_prob(outputs, y, params).mean())}
    if isinstance(predictive, ClassPredictive):
        log_q = outputs.double().log_softmax(dim=-1)
        gap = (predictive.probs * (predictive.log_probs - log_q)).sum(dim=-1)
        figures["held_out_kl"] = float(gap.mean())
    return figures


def _scale(likelihood: Likelihood, params: Params) -> Tensor:
    return likelihood.scale_of(params) if isinstance(likelihood, Gaussian) else torch.ones(())


def _to_log(params: Params) -> Params:
    return params | ({SCALE: params[SCALE].log()} if SCALE in params else {})


def _from_log(values: Params) -> Params:
    return values | ({SCALE: values[SCALE].exp()} if SCALE in values else {})


def _save(
    values: Params,
    optimizer: torch.optim.Adam,
    loader: PairedLoader,
    step: int,
    total: int,
    curve: list[dict[str, float]],
    losses: float,
) -> State:
    return adam.save(optimizer, values) | {
        "loader": loader.state_dict(),
        "step": step,
        "num_steps": total,
        "curve": curve,
        "losses": losses,
        "info": curve[-1] if curve else {},
    }


def _write_files(folder: Path, bank: Bank, state: State) -> None:
    """`model.safetensors` and `curve.json` beside the bank, for tools that know nothing of banks."""
    bank.export(folder / "model.safetensors", 0)
    curve = json.dumps(state.get("curve", []), indent=2, sort_keys=True) + "\n"
    write_atomic(folder / "curve.json", [curve.encode()])
