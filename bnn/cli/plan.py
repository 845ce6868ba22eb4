"""bnn bank plan: what a bank will take, in bytes and in time, before it is made."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from bnn.cli import common, fit, many

if TYPE_CHECKING:
    from bnn.data import DataSet
    from bnn.model import BayesianModel
    from bnn.types import State

PIECE_BYTES = 8 * 1024 * 1024
MOST_BYTES = 64 * 1024 * 1024  # written to measure a disk
MOST_SECONDS = 2.0


def plan(
    context: typer.Context,
    data: Annotated[str, typer.Option(help="As for bnn fit.")],
    num_samples: Annotated[int, typer.Option(help="Samples in the bank, all chains together.")],
    model: Annotated[str, typer.Option(help="As for bnn fit.")] = "mlp:64,64",
    method: Annotated[str, typer.Option(help="As for bnn fit.")] = "hmc",
    num_chains: Annotated[int | None, typer.Option(help="As for bnn fit.", show_default=False)] = None,
    num_warmup: Annotated[int | None, typer.Option(help="As for bnn fit.", show_default=False)] = None,
    num_steps: Annotated[int | None, typer.Option(help="As for bnn fit.", show_default=False)] = None,
    batch_size: Annotated[int | None, typer.Option(help="As for bnn fit.", show_default=False)] = None,
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
    prior: Annotated[str, typer.Option(help="As for bnn fit.")] = "fan-in",
    prior_scale: Annotated[str, typer.Option(help="As for bnn fit.")] = "1.0",
    prior_option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Any other option of the prior; repeatable.", show_default=False),
    ] = None,
    likelihood: Annotated[str | None, typer.Option(help="As for bnn fit.", show_default=False)] = None,
    likelihood_option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Any option of the likelihood; repeatable.", show_default=False),
    ] = None,
    noise_scale: Annotated[float | None, typer.Option(help="As for bnn fit.", show_default=False)] = None,
    task: Annotated[str | None, typer.Option(help="As for bnn fit.", show_default=False)] = None,
    split: Annotated[int, typer.Option(help="As for bnn fit.")] = 0,
    data_root: common.DataRoot = None,
    seed: common.Seed = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder that the bank is meant for: its disk is asked and measured.", show_default=False),
    ] = None,
    trial: Annotated[float, typer.Option(help="Seconds for which the method is run in memory; 0 is not at all.")] = 5.0,
    num_ranks: Annotated[
        int | None, typer.Option("--ranks", help="Ranks of torchrun, to be foreseen too.", show_default=False)
    ] = None,
    bandwidth: Annotated[str, typer.Option(help="Bytes a second that a rank can send, such as 1.25GB.")] = "1.25GB",
    latency: Annotated[float, typer.Option(help="Seconds of one message between ranks.")] = 50e-6,
    config: common.Config = None,
    debug: common.Debug = False,
) -> int:
    """Say what a bank would take: bytes, time to write and read it, time to sample; exit 1 where it does not fit."""
    del config, debug  # read before the verb runs
    from bnn.bank import size_of
    from bnn.cli.show import size
    from bnn.errors import ConfigError
    from bnn.progress import with_progress

    if not 0 <= trial < float("inf"):
        raise ConfigError("--trial", want="0 seconds or more", got=str(trial), fix="leave it out for 5")
    if num_ranks is not None and not trial:
        raise ConfigError("--ranks", want="a trial, by which it foresees", got="--trial 0", fix="leave --trial out")
    between = many.network(bandwidth, latency)
    common.check_folder("--out", out)
    flags = {"num_chains": num_chains, "num_warmup": num_warmup, "num_steps": num_steps, "batch_size": batch_size}
    chosen = fit.make_method(
        method, common.options_of(context, "--option", option, {key: (key, value) for key, value in flags.items()})
    )
    scale = {"scale": ("prior_scale", fit.parse_scale(prior_scale))}
    made_prior = fit.make_prior(prior, common.options_of(context, "--prior-option", prior_option, scale))
    dataset = _load(data, split=split, task=task, root=data_root, likelihood=likelihood)
    noise = {"scale": ("noise_scale", noise_scale)}
    made_likelihood = fit.make_likelihood(
        likelihood, dataset, noise_scale, common.options_of(context, "--likelihood-option", likelihood_option, noise)
    )
    bayesian_model = _model(model, dataset, made_prior, made_likelihood, bayesian=bayesian, seed=seed)
    planned = size_of(
        bayesian_model.layout, num_samples, columns=getattr(chosen, "columns", ()), base=bayesian_model.base()
    )
    shards = "1 shard" if planned.num_shards == 1 else f"{planned.num_shards:,} shards"
    typer.echo(f"sample      {planned.num_values:,} values, {size(planned.row_bytes)} with its columns")
    typer.echo(f"bank        {num_samples:,} samples, {size(planned.num_bytes)} ({planned.num_bytes:,} bytes)")
    typer.echo(f"shards      {shards} of at most {planned.rows_per_shard:,} rows; more where rows come slowly")
    write_seconds = 0.0
    if out is not None:
        free = free_bytes(out)
        typer.echo(f"disk        {size(free)} free at {out}")
        if free < planned.num_bytes:
            typer.echo(
                f"bad: {out}: want {size(planned.num_bytes)}, got {size(free)} free; choose another disk, or thin"
            )
            return 1
        speed = measure_disk(out, min(MOST_BYTES, planned.num_bytes))
        for verb, rate in (("write", speed.write), ("read", speed.read)):
            told = f"{duration(planned.num_bytes / rate)} at {size(rate)} a second" if rate else "not measured here"
            typer.echo(f"{verb:11} {told}")
        write_seconds = planned.num_bytes / speed.write
    if num_ranks is not None:
        many.tell(
            many.foresee(
                chosen, bayesian_model, dataset, num_ranks, num_samples=num_samples, seed=seed, trial=trial,
                network=between, write_seconds=write_seconds,
            ),
            between,
        )  # fmt: skip
        many.tell_evaluation(dataset, num_samples, getattr(chosen, "num_chains", 1), num_ranks, between)
    elif trial:
        run = with_progress(
            chosen.run(bayesian_model, dataset.train, num_samples=num_samples, seed=seed), f"try {chosen.name}", None
        )
        typer.echo(f"sampling    {_told(measure_run((state for _, state in run), trial))}")
    return 0


class DiskSpeed(NamedTuple):
    """Bytes a second."""

    write: float  # made durable
    read: float | None  # from the disk itself; None where the system cannot be asked to forget a file


def measure_disk(folder: Path, num_bytes: int) -> DiskSpeed:
    """Write, sync and read again a file in a folder, which is made if missing; file and folder are gone after.

    Args:
        folder: of the bank to come.
        num_bytes: at most; fewer where the disk is slow.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    file = folder / f".tmp-plan-{os.getpid()}"
    piece = os.urandom(min(PIECE_BYTES, num_bytes))  # some disks compress
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            return _measure(descriptor, piece, num_bytes)
        finally:
            os.close(descriptor)
    finally:
        file.unlink(missing_ok=True)
        for place in made:
            if place.exists():
                place.rmdir()


def _measure(descriptor: int, piece: bytes, num_bytes: int) -> DiskSpeed:
    written, began = 0, time.perf_counter()
    while written < num_bytes and time.perf_counter() - began < MOST_SECONDS:
        written += os.write(descriptor, piece)
        os.fsync(descriptor)
    write = written / (time.perf_counter() - began)
    if not hasattr(os, "posix_fadvise"):  # the pages just written would be read from memory
        return DiskSpeed(write, None)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.lseek(descriptor, 0, os.SEEK_SET)
    began = time.perf_counter()
    while os.read(descriptor, PIECE_BYTES):
        pass
    return DiskSpeed(write, written / (time.perf_counter() - began))


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk of a folder, or of the nearest one above it that exists."""
    return shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists())).free


class Mark(NamedTuple):
    """Where a run stood at a moment."""

    seconds: float  # since it began
    phase: str
    step: int  # of the phase
    num_steps: int  # of the phase
    rest: int  # steps of later phases


class Trial(NamedTuple):
    """What a run that was stopped says of the whole."""

    last: Mark | None  # None: no step was done, since there was none to do
    seconds: float  # of the whole run, as far as its phases were reached
    complete: bool  # whether the run came to its end
    at_least: bool  # whether phases were not reached


def measure_run(states: Iterable[State], limit: float) -> Trial:
    """Run a method until `limit` seconds have passed, and say what the whole would take.

    seconds = elapsed + (steps to do in the phase) * (seconds a step of the phase)

    The speed of a phase is that between its first and its last state: what came before its first step, such as
    compilation, is counted once. Phases after the one that was reached have speeds of their own and are not guessed.

    Args:
        states: of the run, as they come.
        limit: seconds; the run stops with the first state after it, but not before the second of all.
    """
    began = time.perf_counter()
    start: Mark | None = None  # where the phase began, as far as its speed is concerned
    last: Mark | None = None
    complete = True
    for state in states:
        phase = state.get("phase") or {"name": "", "step": state["step"], "num_steps": state["num_steps"]}
        rest = (state["num_steps"] - state["step"]) - (phase["num_steps"] - phase["step"])
        now = Mark(time.perf_counter() - began, phase["name"], phase["step"], phase["num_steps"], rest)
        if last is None:
            start = now
        elif now.phase != last.phase:
            start = now._replace(seconds=last.seconds, step=0)
        last = now
        if now.seconds >= limit and now != start:  # two states are a speed
            complete = rest == 0 and now.step >= now.num_steps
            break
    elapsed = time.perf_counter() - began
    if complete or last is None or start is None:
        return Trial(last, elapsed, True, False)
    pace = (last.seconds - start.seconds) / max(last.step - start.step, 1)
    return Trial(last, last.seconds + pace * (last.num_steps - last.step), False, last.rest > 0)


def duration(seconds: float) -> str:
    """Seconds in words."""
    for unit, length in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 0.1 else "less than 0.1 s"


def _told(found: Trial) -> str:
    if found.complete or found.last is None:
        return f"{duration(found.seconds)}: the whole run was tried"
    last = found.last
    where = f" of {last.phase}" if last.phase else ""
    tried = f"by {duration(last.seconds)} up to step {last.step:,} of {last.num_steps:,}{where}"
    if found.at_least:
        return f"at least {duration(found.seconds)}, {tried}; the phases after it come to that"
    return f"about {duration(found.seconds)}, {tried}"


def _load(data: str, *, split: int, task: str | None, root: str | None, likelihood: str | None) -> DataSet:
    """The data, read as `bnn fit` reads them."""
    from bnn.data import load_data
    from bnn.errors import ConfigError, choose

    if task is not None:
        choose("--task", task, ("classification", "regression"))
        if ".csv:" not in data:
            raise ConfigError("--task", want="a CSV file, FILE.csv:TARGET", got=f"--data {data}", fix="leave it out")
    if task is None and ".csv:" in data and likelihood in ("categorical", "bernoulli"):
        task = "classification"  # numbers in the target's column are classes, then
    return load_data(data, split=split, task=task, root=root, counts=likelihood == "poisson")  # type: ignore[arg-type]


def _model(
    spec: str, dataset: DataSet, prior: Any, likelihood: Any, *, bayesian: list[str] | None, seed: int
) -> BayesianModel:
    from bnn import modules
    from bnn.model import BayesianModel

    outputs = fit.num_outputs(likelihood, dataset)
    return BayesianModel(
        modules.build(spec, input_shape=dataset.input_shape, num_outputs=outputs, seed=seed),
        prior=prior,
        likelihood=likelihood,
        num_data=len(dataset.train.y),
        bayesian=bayesian or "*",
    )
