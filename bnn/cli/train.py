"""bnn train: distil a bank into one network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bnn.cli import common


def train(
    bank: Annotated[Path, typer.Option(help="Folder of the bank that teaches.")],
    out: Annotated[
        Path, typer.Option(help="Folder for the student: a bank of one sample, model.safetensors, curve.json.")
    ],
    student: Annotated[
        str,
        typer.Option(
            help="Structure of the student, as --model of 'bnn fit'. [default: the bank's]", show_default=False
        ),
    ] = "",
    data: Annotated[
        str | None,
        typer.Option(help="Repeats a package.module:function that the bank names as its data.", show_default=False),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Repeats a package.module:function that the bank names.", show_default=False)
    ] = None,
    num_epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Rows a step.")] = 128,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 3e-3,
    num_workers: Annotated[int, typer.Option(help="Processes that load data.")] = 0,
    data_root: common.DataRoot = None,
    seed: common.Seed = 0,
    resume: common.Resume = False,
    overwrite: common.Overwrite = False,
    trust: common.Trust = False,
    config: common.Config = None,
    debug: common.Debug = False,
) -> None:
    """Teach one network, batch by batch, by the sample of the bank that is paired with the batch."""
    del config, debug
    from bnn import modules
    from bnn.bank import Bank
    from bnn.cli.show import show_bank
    from bnn.errors import DataError
    from bnn.functional import FunctionalModel
    from bnn.training import distil

    teacher = Bank.open(bank)
    module = common.module_of(teacher, model=model, trust=trust)
    dataset = common.data_of(teacher, data=data, root=data_root, split=None, trust=trust)
    if not len(dataset.train.y):
        raise DataError(
            f"--data {data}",
            want="the data that the bank was fitted to, which have training rows",
            got="other data",
            fix="leave --data out",
        )
    spec = student or teacher.info["model"]["spec"]
    pupil = modules.build(spec, input_shape=dataset.input_shape, num_outputs=dataset.num_outputs, seed=seed)
    record = {"model": common.model_record(spec, dataset, seed), "data": dataset.record}
    taught = distil(
        pupil,
        FunctionalModel(module, teacher),
        dataset.train,
        held_out=dataset.test,
        out=out,
        num_epochs=num_epochs,
        batch_size=batch_size,
        lr=lr,
        num_workers=num_workers,
        seed=seed,
        resume=resume,
        overwrite=overwrite,
        record=record,
    )
    show_bank(taught)
