"""bnn train: train the parameters outside a bank, or distil it into one module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from bnn.cli import common, reading


def train(
    bank: reading.BankOption,
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for the result: a bank of one sample, model.safetensors or free.safetensors, curve.csv."
        ),
    ],
    free: Annotated[
        list[str] | None,
        typer.Option(
            help="Globs of parameters outside the bank, to be trained under its samples; repeatable. "
            "[default: distil the bank]",
            show_default=False,
        ),
    ] = None,
    student: Annotated[
        str,
        typer.Option(
            help="Structure of the student, as --model of 'bnn fit'. [default: the bank's]", show_default=False
        ),
    ] = "",
    targets: Annotated[
        str,
        typer.Option(help="What teaches a student: paired (the samples of a batch) or predictive (the whole bank)."),
    ] = "paired",
    num_indices: Annotated[
        int | None, typer.Option(help="Samples that a batch meets. [default: 1]", show_default=False)
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            help="Shards of the bank that batches meet samples of at a time. [default: all]", show_default=False
        ),
    ] = None,
    noise: Annotated[float, typer.Option(help="Standard deviation of noise on a student's inputs.")] = 0.0,
    mixup: Annotated[float, typer.Option(help="Alpha of mixed inputs of a student; 0 is off.")] = 0.0,
    balance: common.Balance = None,
    data: Annotated[
        str | None,
        typer.Option(help="Repeats a package.module:function that the bank names as its data.", show_default=False),
    ] = None,
    model: reading.Model = None,
    num_epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Rows a step.")] = 128,
    optimizer: Annotated[str, typer.Option(help="adam, adamw or sgd (with momentum 0.9).")] = "adam",
    lr: Annotated[float, typer.Option(help="Learning rate, falling to a hundredth over the run.")] = 3e-3,
    clip_norm: Annotated[float | None, typer.Option(help="Largest norm of the gradient.", show_default=False)] = None,
    precision: Annotated[str, typer.Option(help="Of forward passes: float32, bfloat16 or float16.")] = "float32",
    patience: Annotated[
        int | None,
        typer.Option(
            help="Stop after so many epochs without a better NLL of held-out rows, a tenth of the training rows.",
            show_default=False,
        ),
    ] = None,
    log: Annotated[str, typer.Option(help="csv, or tensorboard beside it.")] = "csv",
    num_workers: Annotated[int, typer.Option(help="Processes that load data.")] = 0,
    device: reading.Device = "cpu",
    residency: reading.Residency = "mapped",
    host_budget: reading.HostBudget = None,
    device_budget: reading.DeviceBudget = None,
    cache: reading.Cache = None,
    data_root: common.DataRoot = None,
    seed: common.Seed = 0,
    own_indices: Annotated[
        bool, typer.Option("--own-indices", help="Under torchrun, let each rank meet samples of its own at a step.")
    ] = False,
    resume: common.Resume = False,
    overwrite: common.Overwrite = False,
    trust: common.Trust = False,
    allow_other_device: reading.AllowOtherDevice = False,
    config: common.Config = None,
    debug: common.Debug = False,
) -> None:
    """Train with a bank: parameters outside it with --free, or else one student that learns what it predicts."""
    del config, debug
    from bnn import modules
    from bnn import training as jobs
    from bnn.cli.show import show_bank
    from bnn.distributed import ranks
    from bnn.functional import FunctionalModel

    common.check_device(device)
    taught_by = reading.open_bank(
        bank,
        residency=residency,
        device=device,
        host_budget=host_budget,
        device_budget=device_budget,
        cache=cache,
        allow_other_device=allow_other_device,
    )
    module = common.module_of(taught_by, model=model, trust=trust)
    dataset = common.data_of(taught_by, data=data, root=data_root, split=None, trust=trust)
    decides = patience is not None or (balance is not None and ("recall" in balance or "loss" in balance))
    rows, held_out = common.training_rows(dataset, apart=decides, seed=seed)
    sampler, importance = common.make_sampler(balance, rows, task=dataset.task, num_epochs=num_epochs, seed=seed)
    make_optimizer, make_scheduler = make_factories(optimizer, lr, num_epochs)
    shared: dict[str, Any] = {
        "out": out,
        "held_out": held_out,
        "num_indices": num_indices,
        "window": window,
        "sampler": sampler,
        "importance_weights": importance,
        "num_epochs": num_epochs,
        "batch_size": batch_size,
        "lr": lr,
        "optimizer": make_optimizer,
        "scheduler": make_scheduler,
        "clip_norm": clip_norm,
        "precision": precision,
        "patience": patience,
        "log": log,
        "num_workers": num_workers,
        "seed": seed,
        "shared_indices": not own_indices,
        "resume": resume,
        "overwrite": overwrite,
    }
    if free:
        check_for_student(student=student, targets=targets, noise=noise, mixup=mixup)
        record = {"model": None, "data": dataset.record, "optimizer": optimizer}
        trained = jobs.train(module, taught_by, rows, free=free, device=device, record=record, **shared)
    else:
        spec = student or taught_by.info["model"]["spec"]
        pupil = modules.build(spec, input_shape=dataset.input_shape, num_outputs=dataset.num_outputs, seed=seed)
        record = {
            "model": common.model_record(spec, dataset, seed),
            "data": dataset.record,
            "optimizer": optimizer,
        }
        net = FunctionalModel(module, taught_by, device=device)
        trained = jobs.distil(pupil, net, rows, targets=targets, noise=noise, mixup=mixup, record=record, **shared)  # type: ignore[arg-type]  # checked by distil
    if ranks().rank == 0:  # which speaks for all
        show_bank(trained)


def check_for_student(*, student: str, targets: str, noise: float, mixup: float) -> None:
    """Raise ConfigError for options of a student beside `--free`, which has none."""
    from bnn.errors import ConfigError

    said = {"--student": student, "--targets": targets != "paired", "--noise": noise, "--mixup": mixup}
    for flag, given in said.items():
        if given:
            raise ConfigError(flag, want="no --free beside it: it is about a student", got="both", fix="leave one out")


def make_factories(
    name: str, lr: float, num_epochs: int
) -> tuple[Callable[[list[Any]], Any] | None, Callable[[Any], Any] | None]:
    """The optimiser that `--optimizer` names, and its fall to a hundredth; None for the default, Adam."""
    import torch

    from bnn.errors import choose

    choose("--optimizer", name, ("adam", "adamw", "sgd"))
    if name == "adam":
        return None, None

    def make_optimizer(values: list[Any]) -> Any:
        return torch.optim.AdamW(values, lr) if name == "adamw" else torch.optim.SGD(values, lr, momentum=0.9)

    def make_scheduler(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.01 ** (1 / num_epochs))

    return make_optimizer, make_scheduler
