"""bnn fit: a posterior over the weights of a module, kept as a bank."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bnn.cli import common

if TYPE_CHECKING:
    from bnn.likelihoods import Likelihood
    from bnn.priors import Prior
    from bnn.types import Method


def fit(
    data: Annotated[
        str, typer.Option(help="digits, diabetes, FILE.csv:TARGET, FILE.npz, a UCI folder, package.module:function.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the bank.")],
    model: Annotated[
        str, typer.Option(help="mlp:WIDTHS[,tanh|relu|silu], cnn, or package.module:function.")
    ] = "mlp:64,64",
    method: Annotated[str, typer.Option(help="prior, mean-field, low-rank, map or hmc.")] = "hmc",
    num_samples: Annotated[
        int | None,
        typer.Option(help="Samples in the bank, all chains together. [default: 200; 1 for map]", show_default=False),
    ] = None,
    num_chains: Annotated[int | None, typer.Option(help="Chains of hmc.", show_default=False)] = None,
    num_warmup: Annotated[
        int | None, typer.Option(help="Draws a chain for adaptation, of hmc.", show_default=False)
    ] = None,
    num_steps: Annotated[
        int | None, typer.Option(help="Leapfrog steps of hmc, optimisation steps of guides.", show_default=False)
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows a step, of guides.", show_default=False)] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of guides.", show_default=False)] = None,
    draws: Annotated[
        str | None,
        typer.Option(help="Draws of guides: random, antithetic, sobol or mean.", show_default=False),
    ] = None,
    balance: common.Balance = None,
    rank: Annotated[int | None, typer.Option(help="Rank of low-rank.", show_default=False)] = None,
    bayesian: Annotated[
        list[str] | None,
        typer.Option(
            help="Globs of the Bayesian parameters, '!' negates; repeatable. [default: *]", show_default=False
        ),
    ] = None,
    prior: Annotated[str, typer.Option(help="fan-in (scale / sqrt(inputs)) or normal.")] = "fan-in",
    prior_scale: Annotated[float, typer.Option(help="Scale of the prior.")] = 1.0,
    noise_scale: Annotated[
        float | None,
        typer.Option(
            help="Noise of a regression, in standard deviations of the target; learnt by default.", show_default=False
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(help="1 is the Bayes posterior.")] = 1.0,
    task: Annotated[
        str | None, typer.Option(help="classification or regression, for a CSV file.", show_default=False)
    ] = None,
    split: Annotated[int, typer.Option(help="Split of a UCI folder, or seed of the 20 % test split.")] = 0,
    data_root: common.DataRoot = None,
    seed: common.Seed = 0,
    resume: common.Resume = False,
    overwrite: common.Overwrite = False,
    config: common.Config = None,
    debug: common.Debug = False,
) -> None:
    """Fit a posterior over the weights of a module and keep it as a bank."""
    del config, debug  # read before the verb runs
    from bnn import fitting, modules
    from bnn.cli.show import show_bank
    from bnn.data import load_data
    from bnn.errors import ConfigError, choose
    from bnn.model import BayesianModel

    if task is not None:
        choose("--task", task, ("classification", "regression"))
        if ".csv:" not in data:
            raise ConfigError("--task", want="a CSV file, FILE.csv:TARGET", got=f"--data {data}", fix="leave it out")
    chosen = make_method(
        method,
        {
            "num_chains": num_chains,
            "num_warmup": num_warmup,
            "num_steps": num_steps,
            "batch_size": batch_size,
            "lr": lr,
            "rank": rank,
            "draws": draws,
        },
    )
    made_prior = make_prior(prior, prior_scale)
    dataset = load_data(data, split=split, task=task, root=data_root)  # type: ignore[arg-type]
    record = {"model": common.model_record(model, dataset, seed), "data": dataset.record}
    module = modules.build(model, input_shape=dataset.input_shape, num_outputs=dataset.num_outputs, seed=seed)
    bayesian_model = BayesianModel(
        module,
        prior=made_prior,
        likelihood=make_likelihood(dataset.task, noise_scale),
        num_data=len(dataset.train.y),
        bayesian=bayesian or "*",
        temperature=temperature,
    )
    batches = getattr(chosen, "num_steps", 1) * min(getattr(chosen, "batch_size", 1), len(dataset.train.y))
    sampler, importance = common.make_sampler(
        balance, dataset.train, task=dataset.task, num_epochs=batches / len(dataset.train.y), seed=seed
    )
    one = method == "map" or draws == "mean"
    samples = num_samples if num_samples is not None else (1 if one else 200)
    bank = fitting.fit(
        bayesian_model,
        dataset.train,
        method=chosen,
        num_samples=samples,
        out=out,
        seed=seed,
        sampler=sampler,
        importance_weights=True if importance else None,
        resume=resume,
        overwrite=overwrite,
        record=record,
    )
    show_bank(bank)


def make_method(name: str, given: dict[str, Any]) -> Method:
    """A method of the table with the options that were given.

    Raises:
        ConfigError: an unknown method, or an option that it has not.
    """
    from bnn.errors import ConfigError, choose
    from bnn.inference import METHODS

    choose("--method", name, list(METHODS))
    made = METHODS[name]()
    options = {key: value for key, value in given.items() if value is not None}
    for key in options:
        if not hasattr(made, key):
            raise ConfigError(
                f"--{key.replace('_', '-')}",
                want="an option of the method",
                got=f"method {name}, which has none",
                fix="leave it out",
            )
    return METHODS[name](**options)


def make_prior(name: str, scale: float) -> Prior:
    """The prior that `--prior` and `--prior-scale` name."""
    from bnn import priors
    from bnn.errors import choose

    choose("--prior", name, ("fan-in", "normal"))
    return priors.FanIn(scale) if name == "fan-in" else priors.Normal(0.0, scale)


def make_likelihood(task: str, noise_scale: float | None) -> Likelihood:
    """Categorical for classes; for a regression Gaussian with the noise given, or learnt."""
    from bnn import likelihoods, priors
    from bnn.errors import ConfigError

    if task == "regression":
        return likelihoods.Gaussian(priors.HalfCauchy(1.0) if noise_scale is None else noise_scale)
    if noise_scale is not None:
        raise ConfigError("--noise-scale", want="a regression", got="classes", fix="leave it out")
    return likelihoods.Categorical()
