"""Options and steps that several verbs share."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bnn.errors import BankCorrupt, BankMismatch, ConfigError

if TYPE_CHECKING:
    from torch import nn

    from bnn.bank import Bank
    from bnn.bank.moving import Progress
    from bnn.data import DataSet
    from bnn.samplers import EpochSampler
    from bnn.types import Batch


TABLES = "bnn.tables"  # where the tables of a configuration file wait for their flags


def options_of(
    context: typer.Context, flag: str, pairs: list[str] | None, flags: dict[str, tuple[str, Any]]
) -> dict[str, Any]:
    """The options of a repeatable KEY=VALUE flag, with those that have flags of their own.

    A table of the configuration file comes first, then the flags, then the pairs.

    Args:
        context: of the command.
        flag: such as `--option`.
        pairs: what was given with it.
        flags: option -> the name of its flag's parameter, and its value; None is not given.

    Raises:
        ConfigError: an option given twice on the command line.
    """
    from bnn.cli.options import parse_pairs

    table = context.meta.get(TABLES, {}).get(flag.removeprefix("--").replace("-", "_"), {})
    found, given = {key.replace("-", "_"): value for key, value in table.items()}, parse_pairs(flag, pairs or ())
    for key, (parameter, value) in flags.items():
        source = getattr(context.get_parameter_source(parameter), "name", "DEFAULT")
        own = f"--{parameter.replace('_', '-')}"
        if source == "COMMANDLINE" and key in given:
            raise ConfigError(own, want=f"it or {flag} {key}=", got="both", fix="leave one of them out")
        if value is not None and (source != "DEFAULT" or key not in found):
            found[key] = value
    for key in found | given:
        if key == "name":
            raise ConfigError(flag, want="an option", got="'name'", fix="say it with a flag of its own")
    return found | given


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take the values of a TOML file as defaults: flags on the command line win, of tables key by key."""
    if path is None:
        return None
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(str(path), want="a TOML file", got="none", fix="check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), want="TOML", got=str(error), fix="mend the file") from error
    known = {parameter.name for parameter in context.command.params}
    plain = {key.replace("-", "_"): value for key, value in values.items()}
    for key in plain:
        if key not in known - {"config"}:
            raise ConfigError(
                f"{path} '{key}'",
                want="the name of a flag",
                got="an unknown one",
                fix=f"see '{context.command_path} --help'",
            )
    context.meta[TABLES] = {key: plain.pop(key) for key in list(plain) if isinstance(plain[key], dict)}
    context.default_map = {**(context.default_map or {}), **plain}
    return path


DataRoot = Annotated[str | None, typer.Option(help="Folder where relative paths of data begin.", show_default=False)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run at --out.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")]
Trust = Annotated[bool, typer.Option("--trust", help="Run the package.module:function that a bank names.")]
Config = Annotated[
    Path | None,
    typer.Option(help="TOML file with values for these flags; flags win.", callback=read_config, is_eager=True),
]


Balance = Annotated[
    str | None,
    typer.Option(
        help="Draw classes as balanced as skew=1.0 says; also ,schedule=linear:0.5 or exponential:0.9 (for train "
        "recall:1 or loss:1), and ,importance to keep the target.",
        show_default=False,
    ),
]


BALANCE = re.compile(
    r"skew=(?P<skew>[^,]+)(,schedule=(?P<kind>linear|exponential|recall|loss):(?P<value>[^,]+))?(?P<importance>,importance)?"
)


def make_sampler(
    balance: str | None, rows: Batch, *, task: str, num_epochs: float, seed: int
) -> tuple[EpochSampler[Any] | None, bool]:
    """The sampler that `--balance` names, and whether rows get importance weights.

    `skew=S[,schedule=linear:STOP | exponential:RATE | recall:STRENGTH | loss:STRENGTH][,importance]`; a
    linear schedule goes from S to STOP over the run.

    Raises:
        ConfigError: another text, or a regression.
    """
    from bnn import samplers

    if balance is None:
        return None, False
    if task != "classification":
        raise ConfigError("--balance", want="classes", got="a regression", fix="leave it out")
    said = BALANCE.fullmatch(balance)
    try:
        skew, value = float(said["skew"]), float(said["value"] or 0.0)  # type: ignore[index]
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"--balance {balance}",
            want="skew=NUMBER[,schedule=linear:STOP|exponential:RATE|recall:STRENGTH|loss:STRENGTH][,importance]",
            got="something else",
            fix="write for example skew=1.0,schedule=linear:0.5",
        ) from error
    assert said is not None
    schedules: dict[str, Callable[[], samplers.Schedule]] = {
        "linear": lambda: samplers.Linear(skew, value, max(1, math.ceil(num_epochs))),
        "exponential": lambda: samplers.Exponential(skew, value),
        "recall": lambda: samplers.ByMetric("recall", skew=skew, strength=value),
        "loss": lambda: samplers.ByMetric("loss", skew=skew, strength=value),
    }
    sampler: EpochSampler[Any] = samplers.ClassBalancedSampler(rows.y, skew, seed=seed)
    if said["kind"] is not None:
        sampler = samplers.DynamicClassSampler(rows.y, schedules[said["kind"]](), seed=seed)
    return sampler, said["importance"] is not None


def training_rows(data: DataSet, *, apart: bool, seed: int) -> tuple[Batch, Batch]:
    """The training rows and the held-out ones of the curve: the test rows, or, where they decide anything, a tenth
    of the training rows set apart.

    Raises:
        DataError: the data are not those that the bank was fitted to, and have no training rows.
    """
    import torch

    from bnn.errors import DataError
    from bnn.seeding import generator
    from bnn.types import Batch

    x, y, _ = data.train
    if len(y) < 2:
        raise DataError(
            "--data",
            want="the data that the bank was fitted to, which have training rows",
            got="other data",
            fix="leave --data out",
        )
    if not apart:
        return data.train, data.test
    order = torch.randperm(len(y), generator=generator(seed, "held out"))
    cut = max(1, len(y) // 10)
    return Batch(x[order[cut:]], y[order[cut:]]), Batch(x[order[:cut]], y[order[:cut]])


def model_record(spec: str, data: DataSet, seed: int, num_outputs: int | None = None) -> dict[str, Any]:
    """What `bank.json` keeps of a module, so that it can be built again."""
    options = {"input_shape": data.input_shape, "num_outputs": num_outputs or data.num_outputs, "seed": seed}
    return {"spec": spec, "options": options}


def module_of(bank: Bank, *, model: str | None = None, base: Path | None = None, trust: bool = False) -> nn.Module:
    """The module that a bank was fitted to, with the values that the bank keeps once.

    Args:
        bank: of `bnn fit`.
        model: repeats a package.module:function.
        base: other values of parameters outside the sample: `free.safetensors` of `bnn train --free`, or
            its folder.
        trust: whether code that the bank names may run.

    Raises:
        BankMismatch: the bank names no module, or another one than `model`; or `base` holds what it has not.
        ConfigError: it names code to run, and nobody vouched for it.
    """
    from bnn import modules

    record = bank.info.get("model")
    if record is None:
        raise BankMismatch(
            str(bank.path),
            want="a bank made with 'bnn fit'",
            got="one that names no model",
            fix="use it from Python: bnn.evaluate(bnn.FunctionalModel(module, bank), data)",
        )
    spec, options = str(record.get("spec")), record.get("options")
    if not isinstance(options, dict) or not {"input_shape", "num_outputs", "seed"} <= options.keys():
        raise BankCorrupt(
            f"{bank.path}/bank.json", want="a model with spec and options", got=repr(record), fix="restore the file"
        )
    if model is not None and model != spec:
        raise BankMismatch(str(bank.path), want=f"--model {spec}, as the bank says", got=model, fix="leave --model out")
    require_trust(spec, said=model, trust=trust, place=f"{bank.path} model", flag="--model")
    module = modules.build(
        spec, input_shape=options["input_shape"], num_outputs=options["num_outputs"], seed=options["seed"]
    )
    state = module.state_dict()
    kept = {} if base is not None and bank.info.get("lost") else bank.base()
    for name, tensor in kept.items():
        if name in state and state[name].shape == tensor.shape:
            state[name].copy_(tensor)  # the module was built here and is nobody else's
    if base is not None:
        _load_base(base, bank, state)
    return module


def _why_not(name: str, bank: Bank, state: dict[str, Any]) -> str:
    if name not in state:
        return "which the module has not"
    inside = name in bank.layout.names or name in bank.layout.aliases
    return "which the bank holds" if inside else f"where the module has {list(state[name].shape)}"


def _load_base(path: Path, bank: Bank, state: dict[str, Any]) -> None:
    """Put the values of a safetensors file into a module's state dict, if all of them lie outside the sample."""
    from bnn.arrays import read_tensors

    file = path / "free.safetensors" if path.is_dir() else path
    for name, tensor in read_tensors(file).items():
        outside = name in state and name not in bank.layout.names and name not in bank.layout.aliases
        if not outside or tuple(state[name].shape) != tuple(tensor.shape):
            raise BankMismatch(
                f"--base {file} '{name}'",
                want="parameters of the module outside the bank, in their shapes",
                got=f"{list(tensor.shape)}, " + _why_not(name, bank, state),
                fix="pass the file that 'bnn train --free' made with this bank",
            )
        state[name].copy_(tensor)


def record_of(bank: Bank) -> dict[str, Any]:
    """What a bank keeps of the data that it was fitted to.

    Raises:
        BankMismatch: it names no data.
        BankCorrupt: the record is not whole.
    """
    record = bank.info.get("data")
    if record is None:
        raise BankMismatch(
            str(bank.path),
            want="a bank made with 'bnn fit'",
            got="one that names no data",
            fix="use it from Python: bnn.evaluate(...)",
        )
    if not {"spec", "split", "task", "sha256", "inputs", "target", "classes"} <= record.keys():
        raise BankCorrupt(
            f"{bank.path}/bank.json", want="a full record of the data", got=repr(record), fix="restore the file"
        )
    return dict(record)


def class_shares(bank: Bank) -> tuple[list[float], list[float]]:
    """Shares of the classes in training and in the data, as the bank keeps them."""
    record = bank.info.get("sampling") or {}
    if "class_shares" not in record or record.get("posterior") != "balanced":
        raise BankMismatch(
            f"{bank.path} --prior-shift",
            want="a bank fitted with --balance of one skew, without importance",
            got=f"a {record.get('posterior', 'natural')} posterior"
            + (", whose shares changed over epochs" if record.get("posterior") == "balanced" else ""),
            fix="leave --prior-shift out",
        )
    return record["class_shares"], record["natural_shares"]


def data_of(bank: Bank, *, data: str | None, root: str | None, split: int | None, trust: bool) -> DataSet:
    """The data that a bank was fitted to, or others, standardised as those were.

    Raises:
        BankMismatch: the bank names no data, or rows have another shape.
        DataError: the data cannot be read, or the bank has seen their test rows.
    """
    from bnn.data import load_data

    record = record_of(bank)
    spec = data or record["spec"]
    require_trust(spec, said=data, trust=trust, place=f"{bank.path} data", flag="--data")
    found = load_data(
        spec, split=record["split"] if split is None else split, task=record["task"], root=root, fitted=record
    )
    shape = (bank.info.get("model") or {}).get("options", {}).get("input_shape")
    if shape is not None and list(shape) != found.input_shape:
        raise BankMismatch(
            str(bank.path),
            want=f"rows of shape {list(shape)}, as the bank was fitted to",
            got=str(found.input_shape),
            fix="choose data of the same shape",
        )
    return found


@contextmanager
def bar(title: str, unit: str) -> Iterator[Progress]:
    """A bar on stderr, where that is a terminal, for what tells how much is done."""
    from tqdm import tqdm

    with tqdm(desc=title, unit=unit, unit_scale=unit == "B", delay=1.0, disable=None) as shown:

        def progress(done: int, total: int) -> None:
            shown.total = total
            shown.update(done - shown.n)

        yield progress


def models_of(banks: Sequence[Bank], models: Sequence[str] | None) -> list[str | None]:
    """Which of the repeated `--model` each bank names; None where it names another.

    Raises:
        BankMismatch: one that no bank names.
    """
    specs = [(bank.info.get("model") or {}).get("spec") for bank in banks]
    for model in models or ():
        if model not in specs:
            named = ", ".join(str(spec) for spec in specs)
            raise BankMismatch("--model", want=f"one that a bank names: {named}", got=model, fix="leave it out")
    return [spec if spec in (models or ()) else None for spec in specs]


def check_same_data(banks: Sequence[Bank]) -> None:
    """Raise BankMismatch unless banks were fitted to the same rows, standardised alike."""
    facts = ("sha256", "split", "task", "inputs", "target", "classes")
    first = banks[0].info.get("data") or {}
    for bank in banks[1:]:
        record = bank.info.get("data") or {}
        different = [fact for fact in facts if record.get(fact) != first.get(fact)]
        if different:
            raise BankMismatch(
                str(bank.path),
                want=f"the data of {banks[0].path}, split and standardised alike",
                got=f"another {', '.join(different)}",
                fix="choose banks of one data set and split",
            )


def check_device(name: str) -> str:
    """The device, if torch knows it and has it."""
    import torch

    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise ConfigError("--device", want="cpu or cuda", got=repr(name), fix="leave it out for cpu") from error
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise ConfigError("--device", want="a device that is here", got=repr(name), fix="leave it out for cpu")
    return name


def check_folder(flag: str, path: Path | None) -> None:
    """Raise ConfigError if something other than a folder stands where files are to be written."""
    if path is not None and path.exists() and not path.is_dir():
        raise ConfigError(f"{flag} {path}", want="a folder or nothing", got="a file", fix="choose another name")


def require_trust(spec: str, *, said: str | None, trust: bool, place: str, flag: str) -> None:
    """Raise ConfigError for code that a bank names, unless the user repeated its name or said `--trust`."""
    from bnn.modules import is_reference

    if is_reference(spec) and said != spec and not trust:
        raise ConfigError(
            place,
            want="your word for code that the bank names",
            got=repr(spec),
            fix=f"repeat it as {flag} {spec}, or say --trust",
        )
