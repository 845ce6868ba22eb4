"""bnn fit: a posterior over the weights of a module, kept as a bank."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bnn.cli import common

if TYPE_CHECKING:
    from bnn.data import DataSet
    from bnn.likelihoods import Likelihood
    from bnn.priors import Prior
    from bnn.types import Method


SAMPLES = {"map": 1, "ensemble": 10}  # in a bank, where nothing is said; 200 of other methods

PRIOR_NAMES = {
    "fan-in": "FanIn",
    "normal": "Normal",
    "laplace": "Laplace",
    "student-t": "StudentT",
    "scale-mixture": "ScaleMixture",
}
LIKELIHOOD_NAMES = {
    "categorical": "Categorical",
    "bernoulli": "Bernoulli",
    "gaussian": "Gaussian",
    "heteroscedastic": "HeteroscedasticGaussian",
    "student-t": "StudentT",
    "poisson": "Poisson",
}

FLAGS = (
    "num_chains",
    "num_warmup",
    "num_steps",
    "batch_size",
    "lr",
    "rank",
    "draws",
)  # options with a flag of their own


def fit(
    context: typer.Context,
    data: Annotated[
        str, typer.Option(help="digits, diabetes, FILE.csv:TARGET, FILE.npz, a UCI folder, package.module:function.")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for the bank.", show_default=False)] = None,
    model: Annotated[
        str, typer.Option(help="mlp:WIDTHS[,tanh|relu|silu], cnn, or package.module:function.")
    ] = "mlp:64,64",
    method: Annotated[
        str,
        typer.Option(
            help="prior, mean-field, low-rank, full-rank, flow, guide, map, laplace, ensemble, swag, ivon, sgld, sghmc, hmc or nuts."
        ),
    ] = "hmc",
    num_samples: Annotated[
        int | None,
        typer.Option(
            help="Samples in the bank, all chains together. [default: 200; 1 for map, 10 for ensemble]",
            show_default=False,
        ),
    ] = None,
    num_chains: Annotated[
        int | None, typer.Option(help="Chains of hmc, nuts, sghmc, sgld.", show_default=False)
    ] = None,
    num_warmup: Annotated[
        int | None,
        typer.Option(help="Draws or steps a chain that are not kept, of hmc, nuts, sghmc, sgld.", show_default=False),
    ] = None,
    num_steps: Annotated[
        int | None, typer.Option(help="Leapfrog steps of hmc, optimisation steps of others.", show_default=False)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Rows a step; hmc and nuts take all.", show_default=False)
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.", show_default=False)] = None,
    draws: Annotated[
        str | None,
        typer.Option(help="Draws of guides: random, antithetic, sobol or mean.", show_default=False),
    ] = None,
    balance: common.Balance = None,
    rank: Annotated[
        int | None, typer.Option(help="Rank of low-rank, swag and the low-rank mass of hmc.", show_default=False)
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Any other option of the method; repeatable.", show_default=False),
    ] = None,
    bayesian: Annotated[
        list[str] | None,
        typer.Option(
            help="Globs of the Bayesian parameters, '!' negates; repeatable. [default: *]", show_default=False
        ),
    ] = None,
    prior: Annotated[
        str, typer.Option(help="fan-in (scale / sqrt(inputs)), normal, laplace, student-t or scale-mixture.")
    ] = "fan-in",
    prior_scale: Annotated[
        str, typer.Option(help="Scale of the prior: a number, half-cauchy:SCALE or log-normal:LOC,SCALE.")
    ] = "1.0",
    prior_option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Any other option of the prior; repeatable.", show_default=False),
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
    writer: Annotated[
        str, typer.Option(help="Whose part of the bank this is, where several processes fill one, a name each.")
    ] = "main",
    resume: common.Resume = False,
    overwrite: common.Overwrite = False,
    virtual: Annotated[
        bool,
        typer.Option(
            "--virtual", help="Keep the guide or prior in place of samples, which are made when asked for: any number."
        ),
    ] = False,
    config: common.Config = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print what would run as a file for --config, and stop.")
    ] = False,
    debug: common.Debug = False,
) -> None:
    """Fit a posterior over the weights of a module and keep it as a bank."""
    del config, debug  # read before the verb runs
    from bnn import fitting, modules
    from bnn.cli.bank import diagnosis_of
    from bnn.cli.show import show_bank
    from bnn.data import load_data
    from bnn.distributed import ranks
    from bnn.errors import BnnError, ConfigError, choose
    from bnn.model import BayesianModel

    if task is not None:
        choose("--task", task, ("classification", "regression"))
        if ".csv:" not in data:
            raise ConfigError("--task", want="a CSV file, FILE.csv:TARGET", got=f"--data {data}", fix="leave it out")
    if out is None and not print_config:
        raise ConfigError("--out", want="a folder for the bank", got="none", fix="pass --out FOLDER")
    flags = {
        "num_chains": num_chains,
        "num_warmup": num_warmup,
        "num_steps": num_steps,
        "batch_size": batch_size,
        "lr": lr,
        "rank": rank,
        "draws": draws,
    }
    chosen = make_method(
        method, common.options_of(context, "--option", option, {key: (key, value) for key, value in flags.items()})
    )
    scale = {"scale": ("prior_scale", parse_scale(prior_scale))}
    made_prior = make_prior(prior, common.options_of(context, "--prior-option", prior_option, scale))
    said = task
    if task is None and ".csv:" in data and likelihood in ("categorical", "bernoulli"):
        said = "classification"  # numbers in the target's column are classes, then
    dataset = load_data(data, split=split, task=said, root=data_root, counts=likelihood == "poisson")  # type: ignore[arg-type]
    noise = {"scale": ("noise_scale", noise_scale)}
    made_likelihood = make_likelihood(
        likelihood, dataset, noise_scale, common.options_of(context, "--likelihood-option", likelihood_option, noise)
    )
    samples = num_samples if num_samples is not None else 1 if draws == "mean" else SAMPLES.get(method, 200)
    if print_config:
        told = {
            "data": data, "model": model, "method": method, "num-samples": samples, "bayesian": bayesian or ["*"],
            "prior": prior, "temperature": temperature, "task": task, "split": split, "balance": balance,
            "data-root": data_root, "seed": seed, "virtual": virtual or None,
        }  # fmt: skip
        typer.echo(_told(told, chosen, made_prior, made_likelihood))
        return
    outputs = num_outputs(made_likelihood, dataset)
    record = {"model": common.model_record(model, dataset, seed, outputs), "data": dataset.record}
    module = modules.build(model, input_shape=dataset.input_shape, num_outputs=outputs, seed=seed)
    bayesian_model = BayesianModel(
        module,
        prior=made_prior,
        likelihood=made_likelihood,
        num_data=len(dataset.train.y),
        bayesian=bayesian or "*",
        temperature=temperature,
    )
    rows = len(dataset.train.y)
    num_epochs = num_batches(chosen, samples, rows) * min(getattr(chosen, "batch_size", 1), rows) / rows
    sampler, importance = common.make_sampler(
        balance, dataset.train, task=dataset.task, num_epochs=num_epochs, seed=seed
    )
    bank = fitting.fit(
        bayesian_model,
        dataset.train,
        method=chosen,
        num_samples=samples,
        out=out,
        seed=seed,
        sampler=sampler,
        importance_weights=True if importance else None,
        writer=writer,
        resume=resume,
        overwrite=overwrite,
        virtual=virtual,
        record=record,
    )
    if ranks().rank:  # rank 0 speaks for all
        return
    show_bank(bank)
    try:
        verdict = diagnosis_of(bank, (module, dataset)).text
    except BnnError as error:  # the bank is there and whole, whatever keeps its chains from being judged
        verdict = f"none: {error}"
    typer.echo(f"verdict     {verdict}")


def make_method(name: str, options: dict[str, Any]) -> Method:
    """A method of the table with the options that were given.

    Raises:
        ConfigError: an unknown method, or an option that it has not, or of another kind.
    """
    from bnn.bank import Bank
    from bnn.cli.options import check_kind
    from bnn.errors import ConfigError, choose
    from bnn.inference import METHODS

    choose("--method", name, list(METHODS))
    made = METHODS[name]()
    fields = dataclasses.fields(made)  # type: ignore[arg-type]
    known = {field.name: getattr(made, field.name) for field in fields}
    types = {field.name: str(field.type) for field in fields}
    for key, value in options.items():
        if name == "guide" and key == "family" and not str(value).startswith("Auto"):
            raise ConfigError(
                "--option family", want="a guide of Pyro, Auto...", got=repr(value), fix="or take its own --method"
            )
        if key not in known or (key == "family" and name != "guide"):
            raise ConfigError(
                f"--{key.replace('_', '-')}" if key in FLAGS else f"--option {key}",
                want=f"an option of the method {name}: {', '.join(key for key in known if key != 'family')}",
                got="none of these",
                fix="leave it out",
            )
        if key == "init" and "Sequence" in types[key] and (Path(str(value)) / "bank.json").is_file():
            options[key] = Bank.open(value)
            continue
        may_be_none = "None" in types[key]
        options[key] = None if may_be_none and value == "none" else check_kind(f"--option {key}", value, known[key])
    return METHODS[name](**options)


def num_batches(method: Method, num_samples: int, num_rows: int) -> int:
    """Batches that a method meets, over which a schedule of classes runs."""
    from bnn.inference import SGHMC, SGLD, SWAG
    from bnn.inference.sgmcmc import num_turns

    if isinstance(method, SGHMC | SGLD):
        return method.climb_steps + num_turns(method, num_samples // method.num_chains)
    if isinstance(method, SWAG):
        every = method.collect_every or math.ceil(num_rows / method.batch_size)
        return method.num_steps + method.num_models * every
    return getattr(method, "num_steps", None) or 1


def make_prior(name: str, options: dict[str, Any]) -> Prior:
    """The prior that `--prior`, `--prior-scale` and `--prior-option` name."""
    from bnn.errors import choose
    from bnn.priors import prior_from_config

    choose("--prior", name, list(PRIOR_NAMES))
    return prior_from_config({"name": PRIOR_NAMES[name], **options})


def parse_scale(text: str) -> Any:
    """A number, or the configuration of a prior over one: `half-cauchy:SCALE`, `log-normal:LOC,SCALE`."""
    from bnn.errors import ConfigError

    kind, _, numbers = text.partition(":")
    try:
        values = [float(number) for number in (numbers or kind).split(",")]
    except ValueError:
        values = []
    if not numbers and len(values) == 1:
        return values[0]
    if kind == "half-cauchy" and len(values) == 1:
        return {"name": "HalfCauchy", "scale": values[0]}
    if kind == "log-normal" and len(values) == 2:
        return {"name": "LogNormal", "loc": values[0], "scale": values[1]}
    raise ConfigError(
        "--prior-scale",
        want="a number, half-cauchy:SCALE or log-normal:LOC,SCALE",
        got=repr(text),
        fix="write for example half-cauchy:1.0",
    )


def make_likelihood(
    name: str | None, dataset: DataSet, noise_scale: float | None, options: dict[str, Any]
) -> Likelihood:
    """The likelihood that the flags name; by default Categorical for classes, Gaussian for a regression.

    The noise of `gaussian` and `student-t` is learnt unless it is given.
    """
    from bnn.errors import ConfigError, choose
    from bnn.likelihoods import likelihood_from_config

    default = "categorical" if dataset.task == "classification" else "gaussian"
    name = choose("--likelihood", name or default, list(LIKELIHOOD_NAMES))
    config: dict[str, Any] = {"name": LIKELIHOOD_NAMES[name]}
    if name in ("gaussian", "student-t"):
        config["scale"] = {"name": "HalfCauchy", "scale": 1.0}
    elif noise_scale is not None:
        wanted = "a regression" if dataset.task == "classification" else "the likelihood gaussian or student-t"
        raise ConfigError("--noise-scale", want=wanted, got=f"likelihood {name}", fix="leave it out")
    made = likelihood_from_config(config | options)
    if made.task != dataset.task:
        raise ConfigError(
            "--likelihood",
            want=f"one for a {dataset.task}, as the data are",
            got=f"{name}, for a {made.task}",
            fix="leave it out, or say --task for a CSV file",
        )
    if name == "bernoulli" and dataset.num_outputs != 2:
        raise ConfigError(
            "--likelihood", want="two classes for bernoulli", got=str(dataset.num_outputs), fix="choose categorical"
        )
    return made


def num_outputs(likelihood: Likelihood, dataset: DataSet) -> int:
    """Outputs that a module needs under a likelihood."""
    from bnn.likelihoods import Bernoulli, HeteroscedasticGaussian

    if isinstance(likelihood, Bernoulli):
        return 1
    return dataset.num_outputs * (2 if isinstance(likelihood, HeteroscedasticGaussian) else 1)


def _told(told: dict[str, Any], method: Method, prior: Prior, likelihood: Likelihood) -> str:
    """Everything that would run as a configuration file."""
    from bnn.bank import Bank
    from bnn.cli.options import as_toml
    from bnn.fitting import method_options
    from bnn.inference import METHODS

    usual = method_options(METHODS[told["method"]]())
    options = {key: "none" if value is None else value for key, value in method_options(method).items()}
    options = {key: value for key, value in options.items() if value != "none" or usual[key] is not None}
    if isinstance(getattr(method, "init", None), Bank):
        options["init"] = str(method.init.path)  # type: ignore[attr-defined]
    if told["method"] != "guide":  # elsewhere the method's name says it
        options.pop("family", None)
    names = {value: key for key, value in LIKELIHOOD_NAMES.items()}
    prior_options, likelihood_options = prior.to_config(), likelihood.to_config()
    prior_options.pop("name")
    told["likelihood"] = names[likelihood_options.pop("name")]
    tables = {"option": options, "prior-option": prior_options, "likelihood-option": likelihood_options}
    return as_toml(told | tables)
