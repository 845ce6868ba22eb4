"""What R ranks would take: their calls step by step, the time of a run, and what breaks first."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from bnn.errors import ConfigError
from bnn.evaluation import target_figures
from bnn.evaluation.class_figures import BASIC, MORE, TOP
from bnn.evaluation.views import GROUPS, Views, views_of
from bnn.inference.adaptation import windows
from bnn.inference.chains import MET
from bnn.inference.hmc import HMC
from bnn.inference.starting import CLIMB_STEPS, climbs
from bnn.inference.warmup import LEARNT_FROM
from bnn.pacing import following, meetings_in
from bnn.together import split_of
from bnn.traffic import Call, Network, Talk, talk_of
from bnn.turns import bounded
from bnn.types import Method, State

LENGTH, FLAG, COLUMN = 8, 1, 8  # bytes: of what says how many rows a rank has; of a yes or no; of a float64
NULL = 4  # bytes of the JSON that a barrier says
JSON = 2048  # at most of what a batch of an evaluation says beside its tensors: their names and shapes
CLIMB_PER_STATE = 50


class FitCalls(NamedTuple):
    """Collective calls of a fit, after what is compared before anyone begins."""

    once: list[Call]
    step: list[Call]  # of each of `num_steps`
    num_steps: int
    edge: list[Call]  # of each of `num_edges`, where a mass is learnt, or a guide's ranks are aligned
    num_edges: int
    what: str  # a step is: of chains a meeting of ranks that go on alone, or a trajectory of which all learn

    def whole(self, num_ranks: int, network: Network) -> Talk:
        """All of them."""
        once, step, edge = (talk_of(calls, num_ranks, network) for calls in (self.once, self.step, self.edge))
        return once.plus(step.times(self.num_steps)).plus(edge.times(self.num_edges))


def fit_calls(
    method: Method,
    num_ranks: int,
    *,
    num_values: int,
    itemsize: int,
    num_parameters: int = 0,
    trajectory_seconds: float = 0.0,
) -> FitCalls:
    """What R ranks say to each other in a fit; nothing after warm-up, nor of methods whose rows are split.

    In warm-up ranks of HMC meet about every two seconds, 4 int64 and a flag. Rows of c = ceil(C / R) chains are gathered where a mass is
    learnt, 2 c P values, and c W P for W draws of a low-rank one; ChEES learns from each trajectory, of 4 c P values and
    3 c float64. A step of a guide sums the slope at its draw and its height at once: P + 1 values, and 2 P + 1 of antithetic
    draws; after fifty rank 0 tells its parameters and their two moments. States that all commit in warm-up, one in 20
    seconds, come to it, 12 bytes each.

    Args:
        method: to be split.
        num_ranks: R.
        num_values: P, the numbers in one sample.
        itemsize: bytes of one.
        num_parameters: Q, of what a guide optimises.
        trajectory_seconds: of warm-up, of which the number of meetings follows; the fewest by default.

    Examples:
        >>> calls = fit_calls(HMC(num_chains=6, trajectory="jittered"), 4, num_values=100, itemsize=4)
        >>> sum(call.payload for call in calls.step)  # 8 + 4 * 8 gathered, 1 of rank 0
        41
    """
    if split_of(method) == "gradients":
        from bnn.inference.guide import STEPS_PER_STATE  # with Pyro, which not everybody needs

        draws = 2 if method.variance_reduction == "antithetic" else 1  # type: ignore[attr-defined]
        step = [Call("all_reduce", (draws * num_values + 1) * itemsize)]
        edge, num_steps = [Call("broadcast", 3 * num_parameters * itemsize)], method.num_steps  # type: ignore[attr-defined]
        return FitCalls([], step, num_steps, edge, math.ceil(num_steps / STEPS_PER_STATE), "a step")
    if isinstance(method, HMC):
        return _hmc_calls(method, num_ranks, num_values * itemsize, trajectory_seconds)
    return FitCalls([], [], 0, [], 0, "a row")


def _hmc_calls(method: HMC, num_ranks: int, row_bytes: int, trajectory_seconds: float) -> FitCalls:
    chains = math.ceil(method.num_chains / num_ranks)  # others pad theirs to so many
    flag, column, rows = [Call("broadcast", FLAG)], gathered(chains * COLUMN), gathered(chains * row_bytes)
    begin = column + gathered(chains)  # densities, and whether they are finite
    if method.step_size is None:
        begin += gathered(chains) + column  # first steps that have no end, and the steps
    begin += column + (rows if method.learns_length else [])
    climb = flag * (CLIMB_STEPS // CLIMB_PER_STATE if climbs(method.init) else 0)
    end = (column if method.learns_length else []) + gathered(NULL)  # common step; the state that all commit
    edges = [] if method.mass == "unit" else windows(method.num_warmup)
    kept = math.ceil(20 * method.rank / method.num_chains) + 1 if method.mass == "low-rank" else 0
    edge = 2 * rows + gathered(chains * kept * row_bytes)
    meeting, num_meetings = gathered(MET * COLUMN) + flag, meetings_in(method.num_warmup, trajectory_seconds)
    if not method.learns_length:
        return FitCalls(begin + climb + end, meeting, num_meetings, edge, len(edges), "a meeting in warm-up")
    learnt = column + 2 * rows  # LEARNT_FROM: acceptance, proposal, velocity
    assert len(LEARNT_FROM) == 3
    step, once = column + learnt + 2 * rows + column, begin + climb + meeting * num_meetings + end
    return FitCalls(once, step, method.num_warmup, edge, len(edges), "a trajectory of warm-up")


def gathered(num_bytes: int) -> list[Call]:
    """Rows that all ranks get of all: how many each has, and the rows."""
    return [Call("all_gather", LENGTH), Call("all_gather", num_bytes)]


def class_state_bytes(num_rows: int, views: Views, *, num_classes: int, num_bins: int, whole: bool) -> int:
    """Bytes of tensors that a batch of an evaluation of classes says to all ranks, but for the rows on which chains are judged.

    8 (V + 3 V M + F V + (F + 3) B), with F figures of V views, M bins and B rows; where every figure is asked for
    also 8 (2 (1 + H) C M + B C + 5 (1 + H) B), of C classes and H halves of the runs of draws

    Args:
        num_rows: B, of the batch.
        views: of the bank.
        num_classes: C.
        num_bins: M, of the calibration error.
        whole: whether every figure and curve is asked for.

    Examples:
        >>> import torch
        >>> one = Views(torch.zeros(1), torch.zeros(1), torch.zeros(1), 1, torch.zeros(0, 1), (1,))
        >>> class_state_bytes(3, one, num_classes=2, num_bins=5, whole=False)  # 8 (1 + 15 + 6 + 27)
        392
    """
    figures = len(BASIC) + (len(MORE) - (num_classes <= TOP) if whole else 0)
    num_views, halves = views.num_views, views.left_out.stop  # the whole bank too
    numbers = num_views * (1 + 3 * num_bins + figures) + (figures + 3) * num_rows
    if whole:
        numbers += 2 * halves * num_classes * num_bins + num_rows * num_classes + 5 * halves * num_rows
    return COLUMN * numbers


def target_state_bytes(num_rows: int, views: Views, *, num_targets: int, whole: bool) -> int:
    """Bytes of tensors that a batch of a regression's evaluation says to all ranks, but for the rows on which chains are judged.

    8 (V + F V + (F + 2) B C + 2 B), with F figures of V views, B rows and C targets: the log densities of two
    are of all targets of a row. Where every figure is asked for F is 4 more, and quantiles add 2 B C

    Args:
        num_rows: B, of the batch.
        views: of the bank.
        num_targets: C.
        whole: whether every figure and curve is asked for.

    Examples:
        >>> import torch
        >>> one = Views(torch.zeros(1), torch.zeros(1), torch.zeros(1), 1, torch.zeros(0, 1), (1,))
        >>> target_state_bytes(3, one, num_targets=2, whole=False)  # 8 (1 + 10 + 72 + 6)
        712
    """
    figures = len(target_figures.BASIC) + (len(target_figures.MORE) if whole else target_figures.ALWAYS)
    of_targets = figures + 2 + (2 if whole else 0)
    return COLUMN * (views.num_views * (1 + figures) + (of_targets * num_targets + 2) * num_rows)


@dataclass(frozen=True)
class _Planned:
    """Draws of a bank that is not there yet, chain by chain."""

    chain: Tensor
    draw: Tensor

    @property
    def log_weight(self) -> Tensor:
        return torch.zeros(len(self), dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.chain)


def planned_views(num_samples: int, num_chains: int) -> Views:
    """As many views as an evaluation of all figures has of a bank with so many samples that weigh alike.

    Chains are cut into no more than 20 runs, so that 20 draws of each tell how many: its samples are not looked at.

    Examples:
        >>> planned_views(1000, 4).num_views  # the whole, 19 halves of 20 runs, and beginnings of 1, 2, ..., 512
        30
    """
    draws = max(1, min(num_samples // num_chains, GROUPS))
    number = torch.arange(num_chains * draws)
    views = views_of(_Planned(number // draws, number % draws), beginnings=False)
    shorter = (2**power for power in range((num_samples - 1).bit_length()))
    return views._replace(sizes=(*shorter, num_samples))


def evaluation_calls(
    num_rows: int,
    num_ranks: int,
    state_bytes: Callable[[int], int],
    *,
    batch_size: int,
    json_bytes: int = JSON,
    batch_seconds: float = 0.0,
) -> list[Call]:
    """What R ranks say to each other in an evaluation, after what is compared before anyone begins.

    Ranks take batches in turn, and all tell what they have found, each padded to that of the largest: after one round of R batches,
    after two more, and so on, until the rounds between take two seconds, or 64 MiB wait.

    Args:
        num_rows: N, of the data.
        num_ranks: R.
        state_bytes: of what a batch of so many rows says in tensors.
        batch_size: rows of a batch.
        json_bytes: beside them.
        batch_seconds: that one takes, of which the number of calls follows; the fewest by default.

    Examples:
        >>> found = evaluation_calls(36, 2, lambda rows: 8 * rows, batch_size=8, json_bytes=50)
        >>> [call.payload for call in found]  # of 8 rows, then of 8 and 4
        [8, 50, 8, 64, 8, 100, 8, 96]
    """
    of_rounds = [state_bytes(min(batch_size, num_rows - row)) for row in range(0, num_rows, batch_size * num_ranks)]
    calls, told, more = list[Call](), 0, 1
    while told < len(of_rounds):
        sizes = of_rounds[told : told + more]
        calls += gathered(len(sizes) * json_bytes) + gathered(sum(sizes))
        soon = following(len(sizes), len(sizes) * batch_seconds)
        told, more = told + len(sizes), bounded(soon, sum(sizes) / len(sizes) * num_ranks)
    return calls


class Pace(NamedTuple):
    """How fast a phase of a run goes."""

    seconds: float  # a step
    num_steps: int  # of the phase


def paces(states: Iterable[State], limit: float, *, most: int | None = None) -> dict[str, Pace]:
    """Run a method for `limit` seconds, and say how fast each phase goes that it comes to.

    seconds a step = (last state of the phase - its first) / (steps between); what came before the first state of all, such
    as compilation, is left out

    Args:
        states: of the run, as they come.
        limit: seconds; the run stops with the first state after it, but not before the second of all.
        most: steps of the run at most; None for all.
    """
    began = time.perf_counter()
    found: dict[str, Pace] = {}
    starts: dict[str, tuple[float, int]] = {}  # seconds and step where a phase begins
    before = None
    for number, state in enumerate(states):
        now = time.perf_counter() - began
        phase = state.get("phase") or {"name": "", "step": state["step"], "num_steps": state["num_steps"]}
        name, step = phase["name"], phase["step"]
        if name not in starts:
            starts[name] = (now, step) if before is None else (before, 0)
        start, first = starts[name]
        steps = step - first
        alone = now / max(step, 1)  # a phase of one state, the first of all
        found[name] = Pace((now - start) / steps if steps else alone, phase["num_steps"])
        before = now
        if (now >= limit and number) or (most is not None and state["step"] >= most):
            break
    return found


class Share(NamedTuple):
    """What the rank with most has of a fit, as a fit of one process."""

    method: Method
    num_samples: int
    parts: int  # chains, samples, or rows of a batch, of all ranks
    most: int  # of one rank
    what: str


def share_of(method: Method, num_samples: int, num_rows: int, num_ranks: int) -> Share:
    """The part of the rank that has most.

    Args:
        method: of the fit.
        num_samples: S.
        num_rows: N, of the training data.
        num_ranks: R.

    Raises:
        ConfigError: fewer than one rank, or a method that ranks cannot share.

    Examples:
        >>> share = share_of(HMC(num_chains=6), 60, 100, 4)
        >>> share.most, share.method.num_chains, share.num_samples
        (2, 2, 20)
    """
    if num_ranks < 1:
        raise ConfigError("ranks", want="at least 1", got=str(num_ranks), fix="raise it")
    options: Any = method
    split = split_of(method) if num_ranks > 1 else split_of(method) or "rows"
    if split == "chains":
        parts = options.num_chains
        most = math.ceil(parts / num_ranks)
        learnt = {"trajectory": "chees" if method.learns_length else "jittered"} if _is_open(method) else {}
        own = dataclasses.replace(options, num_chains=most, **learnt)
        return Share(own, num_samples // parts * most, parts, most, "chains")
    if split == "rows":
        most = math.ceil(num_samples / num_ranks)
        return Share(method, most, num_samples, most, "samples")
    if split == "gradients":
        parts = min(options.batch_size or num_rows, num_rows)
        most = math.ceil(parts / num_ranks)
        return Share(dataclasses.replace(options, batch_size=most), num_samples, parts, most, "rows of a batch")
    raise ConfigError(
        f"method {method.name}",
        want="one that several ranks can share",
        got=f"{type(method).__name__} on {num_ranks} ranks",
        fix="run it in one process; docs/beyond-one-machine.md lists the others",
    )


def _is_open(method: Method) -> TypeGuard[HMC]:
    """Whether how long trajectories are hangs on the number of chains."""
    return isinstance(method, HMC) and method.trajectory == "auto"


class Loss(NamedTuple):
    """What keeps R ranks from being R times as fast."""

    name: str  # idle, uneven, fixed, talk or disk
    seconds: float  # of a run
    told: str


class RanksPlan(NamedTuple):
    """What a fit on R ranks would take."""

    num_ranks: int
    share: Share
    calls: FitCalls
    step: Talk  # of one step
    talk: Talk  # of the run
    alone: float  # seconds of one process, as far as phases were tried
    seconds: float  # of R ranks, as far
    at_least: bool  # whether phases were not tried
    losses: list[Loss]  # the largest first

    @property
    def efficiency(self) -> float:
        """T_1 / (R T_R)."""
        return self.alone / (self.num_ranks * self.seconds)


def plan_ranks(
    share: Share,
    whole: Mapping[str, Pace],
    own: Mapping[str, Pace],
    calls: FitCalls,
    num_ranks: int,
    *,
    network: Network = Network(),  # noqa: B008  # a tuple of numbers
    write_seconds: float = 0.0,
    all_phases: bool = True,
) -> RanksPlan:
    """What R ranks would take, from how fast one process does all of a fit, and the part of the rank that has most.

    T_R = sum over phases (steps * seconds a step of the part) + talk_R + writing

    Ranks write to one disk, as fast together as one alone. Against T_1 / R are lost: idle or uneven ranks, the part's seconds times
    1 - parts / (R most); what of a step does not shrink with its part; talk; and writing.

    Args:
        share: of the rank with most.
        whole: paces of the whole fit.
        own: paces of the part. Phases that only one of them came to are left out.
        calls: as of `fit_calls`.
        num_ranks: R, at least 1.
        network: between ranks.
        write_seconds: of the whole bank.
        all_phases: whether both runs came to their last phase.
    """
    phases = [name for name in own if name in whole]
    work = sum(own[name].seconds * own[name].num_steps for name in phases)
    alone = sum(whole[name].seconds * whole[name].num_steps for name in phases)
    step, talk = talk_of(calls.step, num_ranks, network), calls.whole(num_ranks, network)
    busy = share.parts / (num_ranks * share.most)  # of the ranks' time
    idle = num_ranks - min(num_ranks, math.ceil(share.parts / share.most))
    uneven = f"{share.parts} {share.what} on {num_ranks} ranks: {share.most} on some, fewer on others"
    losses = [
        Loss("idle", work * (1 - busy), f"only {share.parts} {share.what}, {idle} ranks idle")
        if idle
        else Loss("uneven", work * (1 - busy), uneven),
        Loss(
            "fixed",
            max(work * busy - alone / num_ranks, 0.0),
            f"{share.most} of {share.parts} {share.what} take {work / alone if alone else 0:.0%} of the time of all",
        ),
        Loss("talk", talk.seconds, f"{calls.what}: {step.seconds * 1e3:.3g} ms of talk" if calls.step else "none"),
        Loss("disk", write_seconds * (1 - 1 / num_ranks), "all ranks write to one disk"),
    ]
    losses.sort(key=lambda loss: -loss.seconds)
    total = work + talk.seconds + write_seconds
    return RanksPlan(num_ranks, share, calls, step, talk, alone + write_seconds, total, not all_phases, losses)
