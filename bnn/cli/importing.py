"""bnn bank import: checkpoints or draws of other tools as a bank."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bnn.cli import common
from bnn.cli.fit import make_likelihood, num_outputs

KINDS = ("checkpoints", "draws")


def import_(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(help="Folder of checkpoints, or file of draws.", metavar="SOURCE")],
    kind: Annotated[
        str, typer.Option("--from", help="checkpoints (a folder) or draws (.safetensors, .npz, .nc).", metavar="KIND")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the new bank.")],
    model: Annotated[
        str, typer.Option(help="The module that the samples are of: mlp:64,64, cnn or package.module:function.")
    ],
    data: Annotated[str, typer.Option(help="The data that they were fitted to, which say what goes in and out.")],
    names: Annotated[
        Path | None,
        typer.Option(help="TOML file: the source's names and the module's, where they differ.", show_default=False),
    ] = None,
    bayesian: Annotated[
        list[str] | None,
        typer.Option(
            help="Globs of the parameters in the sample, '!' negates; repeatable. [default: *]", show_default=False
        ),
    ] = None,
    likelihood: Annotated[
        str | None,
        typer.Option(
            help="categorical or bernoulli; gaussian, heteroscedastic, student-t or poisson. [default: by the task]",
            show_default=False,
        ),
    ] = None,
    likelihood_option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Any option of the likelihood; repeatable.", show_default=False),
    ] = None,
    noise_scale: Annotated[
        float | None,
        typer.Option(
            help="Noise of a regression, in standard deviations of the target; by default the source has it.",
            show_default=False,
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="classification or regression, for a CSV file.", show_default=False)
    ] = None,
    split: Annotated[int, typer.Option(help="Split of a UCI folder, or seed of the 20 % test split.")] = 0,
    data_root: common.DataRoot = None,
    seed: Annotated[int, typer.Option(help="Seed of the module's values outside the sample.")] = 0,
    overwrite: common.Overwrite = False,
    debug: common.Debug = False,
) -> None:
    """Make a bank of another tool's samples: one checkpoint each, or draws by chain."""
    del debug
    from bnn import importing, modules
    from bnn.cli.show import show_bank
    from bnn.data import load_data
    from bnn.errors import ConfigError, choose
    from bnn.importing.names import read_names
    from bnn.model import BayesianModel
    from bnn.priors import Normal

    if kind in ("laplace-torch", "posteriors", "numpyro", "pyro"):
        said = "save draws as .npz or .safetensors and say --from draws, or call bnn.importing from Python"
        raise ConfigError("--from", want=f"one of {', '.join(KINDS)}", got=repr(kind), fix=said)
    choose("--from", kind, KINDS)
    if task is not None:
        choose("--task", task, ("classification", "regression"))
    dataset = load_data(data, split=split, task=task, root=data_root, counts=likelihood == "poisson")  # type: ignore[arg-type]
    noise = {"scale": ("noise_scale", noise_scale)}
    made = make_likelihood(
        likelihood, dataset, noise_scale, common.options_of(context, "--likelihood-option", likelihood_option, noise)
    )
    outputs = num_outputs(made, dataset)
    bayesian_model = BayesianModel(
        modules.build(model, input_shape=dataset.input_shape, num_outputs=outputs, seed=seed),
        prior=Normal(),  # says nothing here: the record below leaves it open
        likelihood=made,
        num_data=len(dataset.train.y),
        bayesian=bayesian or "*",
    )
    record: dict[str, Any] = {
        "model": common.model_record(model, dataset, seed, outputs),
        "data": dataset.record,
        "prior": None,
        "seed": None,
    }
    options: dict[str, Any] = {
        "names": None if names is None else read_names(names),
        "out": out,
        "overwrite": overwrite,
        "record": record,
    }
    if kind == "checkpoints":
        with common.bar("import", "file") as progress:
            bank = importing.from_checkpoints(source, bayesian_model, **options, progress=progress)
    else:
        draws = importing.read_draws(source)
        with common.bar("import", "sample") as progress:
            bank = importing.from_draws(draws, bayesian_model, **options, progress=progress)
    show_bank(bank)
