"""bnn bank plan --ranks: what many ranks would take, from two short runs of one process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from bnn.cli.show import size

if TYPE_CHECKING:
    from bnn.data import DataSet
    from bnn.model import BayesianModel
    from bnn.scaling import RanksPlan
    from bnn.traffic import Network
    from bnn.types import Method

LOST = {
    "idle": "idle ranks",
    "uneven": "uneven ranks",
    "fixed": "work that does not shrink",
    "talk": "talk",
    "disk": "the disk",
}


def network(bandwidth: str, latency: float) -> Network:
    """What --bandwidth and --latency say."""
    from bnn.bank.residency import num_bytes
    from bnn.errors import ConfigError
    from bnn.traffic import network_of

    try:
        found = num_bytes("--bandwidth", bandwidth)
    except ConfigError as error:
        fix = "say how many a rank can send in a second"
        raise ConfigError(error.place, want=error.want, got=error.got, fix=fix) from None
    return network_of(found, latency)


def foresee(
    method: Method,
    model: BayesianModel,
    dataset: DataSet,
    num_ranks: int,
    *,
    num_samples: int,
    seed: int,
    trial: float,
    network: Network,
    write_seconds: float,
) -> RanksPlan:
    """A plan for so many ranks, from `trial` seconds of the whole fit and as many of the largest part."""
    from bnn.inference.guide import Guide, make_family
    from bnn.progress import with_progress
    from bnn.scaling import fit_calls, paces, plan_ranks, share_of

    share = share_of(method, num_samples, len(dataset.train.y), num_ranks)
    most, num_parameters = None, 0
    if isinstance(method, Guide):
        most = method.num_steps
        num_parameters = sum(p.numel() for p in make_family(method, model, seed).parameters.values())

    def tried(one: Method, samples: int, title: str) -> Any:
        run = one.run(model, dataset.train, num_samples=samples, seed=seed)
        return paces((state for _, state in with_progress(run, title, None)), trial, most=most)

    whole = tried(method, num_samples, f"try {method.name}")
    own = tried(share.method, share.num_samples, f"try the part of a rank of {num_ranks}")
    layout = model.layout
    calls = fit_calls(
        method,
        num_ranks,
        num_values=layout.num_values,
        itemsize=layout.dtype.itemsize,
        num_parameters=num_parameters,
        trajectory_seconds=own["warm-up"].seconds if "warm-up" in own else 0.0,
    )
    phases = whole.keys() & own.keys()
    return plan_ranks(
        share,
        whole,
        own,
        calls,
        num_ranks,
        network=network,
        write_seconds=write_seconds,
        all_phases=not phases or "sampling" in phases or phases == {""},
    )


def tell_evaluation(dataset: DataSet, num_samples: int, num_chains: int, num_ranks: int, network: Network) -> None:
    """A line of what `bnn evaluate` says between ranks on the held-out rows, with what it does where nothing is asked for."""
    import inspect

    from bnn.evaluation import evaluate
    from bnn.scaling import class_state_bytes, evaluation_calls, planned_views, target_state_bytes
    from bnn.traffic import talk_of

    usual = {name: one.default for name, one in inspect.signature(evaluate).parameters.items()}
    views, batch_size = planned_views(num_samples, num_chains), usual["batch_size"]

    def of_tensors(num_rows: int) -> int:
        if dataset.task == "classification":
            return class_state_bytes(
                num_rows, views, num_classes=dataset.num_outputs, num_bins=usual["num_bins"], whole=True
            )
        return target_state_bytes(num_rows, views, num_targets=dataset.num_outputs, whole=True)

    num_rows = len(dataset.test.y)
    num_batches = -(-num_rows // batch_size)
    talk = talk_of(evaluation_calls(num_rows, num_ranks, of_tensors, batch_size=batch_size), num_ranks, network)
    batches = "1 batch" if num_batches == 1 else f"{num_batches:,} batches"
    least = "at least " if num_batches > num_ranks else ""  # more where rounds of batches take seconds
    typer.echo(
        f"evaluate    {batches} of held-out rows: {size(talk.sent)} sent by a rank in {least}{talk.calls} calls, "
        f"{talk.seconds * 1e3:.3g} ms"
    )
    if num_batches < num_ranks:
        typer.echo("            fewer batches than ranks: share samples with --mesh")


def tell(found: RanksPlan, network: Network) -> None:
    """The plan as lines."""
    from bnn.cli.plan import duration

    share, several = found.share, found.num_ranks
    typer.echo(f"ranks       {several:,}: {share.most:,} of {share.parts:,} {share.what} on the busiest")
    typer.echo(f"network     {size(network.bandwidth)} a second, {network.latency * 1e6:g} us a message")
    if found.calls.step:
        typer.echo(
            f"talk        {found.calls.what}: {found.step.payload:,} bytes of each rank in {found.step.calls} calls, "
            f"{found.step.seconds * 1e3:.3g} ms"
        )
    else:
        typer.echo("talk        none: ranks go alone")
    typer.echo(f"traffic     {size(found.talk.sent)} sent by a rank in all, {size(found.talk.sent * several)} by all")
    kind = "at least " if found.at_least else "about "
    typer.echo(
        f"run         {kind}{duration(found.seconds)} on {several:,} ranks, {duration(found.alone)} in one process: "
        f"efficiency {found.efficiency:.0%}"
    )
    first = found.losses[0]
    if not first.seconds:
        typer.echo("first       nothing breaks")
        return
    typer.echo(f"first       {LOST[first.name]}, {first.seconds / found.seconds:.0%} of the run: {first.told}")
    if share.what == "chains" and share.parts < several:
        typer.echo("            a fit wants a chain for each rank: raise --num-chains")
    if found.calls.step and several > 1:
        work = (found.seconds - found.talk.seconds) / max(found.calls.num_steps, 1)
        if found.calls.what == "a step" and found.step.seconds > work:
            typer.echo(
                f"            the all-reduce of {size(found.step.payload)} is longer than the {work * 1e3:.3g} ms of a step"
            )
