"""The run of HMC: climb, warm-up and sampling, trajectory by trajectory, each with the state to go on from."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from bnn.distributed import ALONE, Ranks
from bnn.errors import FitError
from bnn.inference import starting
from bnn.inference.adaptation import Length, Moments, StepSize, windows
from bnn.inference.climbing import Climb
from bnn.inference.density import Plan, Prepared, Target, prepare
from bnn.inference.hamiltonian import Metric, Position, Transition, transition
from bnn.inference.starting import CLIMB_STEPS
from bnn.inference.warmup import Adaptation, common_step, first_adaptation, update_adaptation
from bnn.pacing import Meetings
from bnn.seeding import generator
from bnn.types import State

if TYPE_CHECKING:
    from bnn.inference.hmc import HMC

COLUMNS = ("acceptance", "divergent", "step_size", "energy")
LIKELY_STEPS = 64  # of a trajectory whose length is learnt, about, for the rule that decides on compiling
NEVER = (2**62, 0)  # a trajectory that no run comes to, of a chain
MET = 4  # int64 that a rank tells where all meet
STUCK = 100  # trajectories in a row without one accepted in any chain, after which nothing will come
ENOUGH_TO_JUDGE = 4  # trajectories of a chain: with fewer, one that is refused is no sign of anything


class Sums(NamedTuple):
    """Running figures of the trajectories since the last kept draw, and of all after warm-up."""

    acceptance: Tensor  # [C] probabilities since the last kept draw
    divergent: Tensor  # [C] trajectories since the last kept draw
    accepted: Tensor  # [C] probabilities after warm-up
    divergences: int  # of this phase, warm-up or sampling
    leapfrogs: int  # a chain, in all
    still: int  # trajectories in a row in which no chain moved


class Draw(NamedTuple):
    """Where the chains stand after a step of the run."""

    at: Position
    number: int | None  # of the kept draw; None in climb and warm-up, and between kept draws
    columns: dict[str, Tensor]  # [C] each, of COLUMNS
    num_steps: int  # leapfrog steps of the trajectory


def run_chains(
    options: HMC,
    target: Target,
    start: Callable[[], Tensor],
    scale: Tensor,
    seed: int,
    num_draws: int,
    state: State | None,
    *,
    warns: bool = True,
    together: Ranks = ALONE,
) -> Iterator[tuple[Draw, State]]:
    """Climb, warm up and sample, yielding after each step where the chains stand and the state to go on from.

    Randomness is by (seed, chain, trajectory), whatever runs beside. Several ranks have their share of the chains each,
    and learn in warm-up what one process would: figures of all chains are gathered in their order, and summed as
    there. Where nothing is learnt from all they go on alone, but for meetings every few seconds, at which they hear whether
    any chain moves, and of which the state says that it "meets"; after warm-up no rank waits for another.

    Args:
        start: positions [C, P] of this rank's chains to begin at; asked where there is no state.
        scale: of the prior [P]: units of the climb, and of the first mass.
        num_draws: kept draws a chain. How gradients are computed follows from the number asked for at first; a run
            that goes on keeps the plan in its state, also with a larger number.
        warns: at the end, of what makes draws useless.
        together: the ranks that the chains are split over.
    """
    chains = together.share(options.num_chains)
    plan = None if state is None else Plan.load(state)
    flat = start() if state is None else _flat_in(state, scale)
    climb_steps = CLIMB_STEPS if starting.climbs(options.init) else 0
    trajectories = options.num_warmup + num_draws * options.thin
    total = climb_steps + trajectories
    num_gradients = climb_steps + trajectories * min(options.most_steps, LIKELY_STEPS)
    density = prepare(
        target,
        flat,
        num_gradients=num_gradients,
        memory=options.memory,
        compile=options.compile,
        plan=plan,
        num_chains=options.num_chains,
    )
    if state is None or "climb.flat" in state:
        if climb_steps:
            for draw, following in _climb(density, flat, scale, state, total):
                yield draw, following
                flat = draw.at.flat
        at = _checked_start(flat, density, together)
        step, adaptation, sums = 0, first_adaptation(options, density, at, scale, seed, together), _no_sums(at)
        common = 1.0
    else:
        step, (at, adaptation, sums) = state["step"] - climb_steps, _restored(state, scale)
        common = state.get("common", 1.0)
    edges = set(windows(options.num_warmup))
    meetings, infinite = Meetings(together.timeout, options.num_warmup), NEVER
    while step < total - climb_steps:
        warm = step < options.num_warmup
        learnt = adaptation.step_size
        step_size = (learnt.log_step if warm else learnt.log_step_mean).exp()  # [C]
        if options.learns_length and (warm or not together.several):
            common = common_step(together.pooled(step_size))
        num_steps = _num_steps(options, adaptation.length, common, seed, step)
        noise, uniform = _randomness(at.flat, seed, step, first=chains.start)
        before = at.flat
        at, found = transition(density, at, noise, uniform, adaptation.metric, step_size, num_steps)
        step += 1
        if step - 1 == options.num_warmup:
            sums = sums._replace(divergences=0)  # those of warm-up
        # After warm-up a rank does not know whether another one's chains move.
        moved = bool((at.flat != before).any()) or (together.several and not warm)
        sums = _added(sums, found, num_steps, warm=warm, moved=moved)
        infinite = min(infinite, _first_infinite(found, step, chains.start))
        still, apart = sums.still, warm and together.several
        meets = apart and meetings.due(step)
        if meets:
            still, infinite = _of_all(still, infinite, step, meetings, together)
        if meets or not apart:
            _require_moving(options, infinite, still, step)
        if warm:
            adaptation = update_adaptation(
                options,
                adaptation,
                found,
                before,
                at.flat,
                scale,
                step_size=step_size,
                num_steps=num_steps,
                step=step,
                edges=edges,
                together=together,
                common=common,
            )
            if together.several and options.learns_length and step == options.num_warmup:
                common = common_step(together.pooled(adaptation.step_size.log_step_mean.exp()))
        draw = _draw(options, at, found, sums, step - options.num_warmup, step_size, num_steps)
        if draw.number is not None:
            sums = sums._replace(acceptance=torch.zeros_like(sums.accepted), divergent=torch.zeros_like(sums.accepted))
        told = _told(options, found, sums, step, step_size, num_draws)
        told["info"]["compile_seconds"] = density.compile_seconds
        progress = {"step": climb_steps + step, "num_steps": total, **told}
        agreed = {"common": common, "meets": meets or not warm} if together.several else {}
        yield draw, {**_saved(density.plan, at, adaptation, sums), **progress, **agreed}
    if num_draws and warns:
        trouble = movement(sums.accepted, sums.divergences, num_draws * options.thin, first=chains.start)
        if trouble:
            warnings.warn(f"HMC: {trouble}", stacklevel=2)


def _climb(
    density: Prepared, flat: Tensor, scale: Tensor, state: State | None, total: int
) -> Iterator[tuple[Draw, State]]:
    """Adam up the log density from `flat`, or from where the state left it, fifty steps a turn."""
    at = starting.first_climb(flat, scale) if state is None else Climb.load(state, scale.device)
    step = 0 if state is None else state["step"]
    nothing = torch.full((len(flat),), math.nan, dtype=torch.float64, device=flat.device)
    while step < CLIMB_STEPS:
        at = starting.climb_step(density, at, scale, step)
        step += 1
        if step % 50 == 0:
            climbed = at.flat * scale
            state = {
                **at.save(),
                **density.plan.save(),
                "step": step,
                "num_steps": total,
                "phase": _phase("climb", step, CLIMB_STEPS),
                "info": {"compile_seconds": density.compile_seconds},
            }
            none = dict.fromkeys(COLUMNS, nothing)
            yield Draw(Position(climbed, nothing, nothing, climbed), None, none, 0), state


def _checked_start(flat: Tensor, density: Prepared, together: Ranks) -> Position:
    """The chains where they start.

    Raises:
        FitError: a density or gradient that is not finite there; the chains are named.
    """
    values = density(flat)
    fine = values.log_density.isfinite() & values.gradient.isfinite().all(dim=1)
    heights, bad = together.pooled(values.log_density), together.pooled((~fine).to(torch.uint8))  # of all ranks
    if bad.any():
        chains = bad.nonzero().flatten().tolist()
        raise FitError(
            "HMC",
            want="a finite log density and gradient at the start",
            got=f"{float(heights[chains[0]])} in chain {chains[0]}"
            + (f", as in {len(chains)} chains" * (len(chains) > 1)),
            fix="start elsewhere; of a model, use a narrower prior, standardise the data, or init='module'",
        )
    return Position(flat, *values)


def _first_infinite(found: Transition, step: int, first: int) -> tuple[int, int]:
    """This trajectory and the first chain whose density has turned infinite there, of chains from `first` on; or `NEVER`."""
    return (step, first + int(found.infinite.nonzero()[0])) if found.infinite.any() else NEVER


def _of_all(
    still: int, infinite: tuple[int, int], step: int, meetings: Meetings, together: Ranks
) -> tuple[int, tuple[int, int]]:
    """For how long no chain of any rank has moved, and where one first turned infinite; all agree on their next meeting."""
    own = torch.tensor([[meetings.proposal(step), still, *infinite]])  # [1, MET]
    more, stood, steps, chains = together.pooled(own).T.tolist()  # of each rank
    meetings.agree(step, more[0])
    return min(stood), min(zip(steps, chains, strict=True))


def _require_moving(options: HMC, infinite: tuple[int, int], still: int, step: int) -> None:
    """Raise FitError where a density has turned infinite, at a trajectory of a chain, or no chain has moved for long."""

    def when(step: int) -> str:
        after = step - options.num_warmup - 1
        return f"trajectory {step - 1} of warm-up" if after < 0 else f"draw {after // options.thin}"

    if infinite < NEVER:
        raise FitError(
            "HMC",
            want="a log density below infinity",
            got=f"inf in chain {infinite[1]} at {when(infinite[0])}",
            fix="look for a scale that reaches 0, or a logarithm or division without a bound; what was committed stays",
        )
    if still >= STUCK:
        raise FitError(
            "HMC",
            want="chains that move",
            got=f"every chain standing still for {still} trajectories, up to {when(step)}",
            fix="raise num_warmup or target_accept, or look for a density that is NaN beside the chains; what was committed stays",
        )


def _num_steps(options: HMC, length: Length, common: float, seed: int, step: int) -> int:
    """Leapfrog steps of trajectory number `step`; `common` is the mean step size of all chains, where a length is learnt."""
    if options.learns_length:
        warm = step < options.num_warmup
        time = van_der_corput(step + 1) * math.exp(length.log_length if warm else length.log_length_mean)
        return min(max(math.ceil(time / common), 1), options.most_steps)
    if options.trajectory == "fixed":
        return options.most_steps
    shortest = math.ceil(options.most_steps / 2)
    source = generator(seed, "length", step)
    return int(torch.randint(shortest, options.most_steps + 1, (), generator=source))


def van_der_corput(number: int) -> float:
    """Element `number` >= 1 of a sequence that fills (0, 1) evenly: its binary digits, mirrored at the point."""
    value, place = 0.0, 0.5
    while number:
        number, digit = divmod(number, 2)
        value, place = value + digit * place, place / 2
    return value


def _randomness(like: Tensor, seed: int, step: int, *, first: int = 0) -> tuple[Tensor, Tensor]:
    """Normals [C, P] and uniforms [C] of trajectory `step`: by (seed, chain, step), whatever runs beside."""
    sources = [generator(seed, "chain", chain, step) for chain in range(first, first + len(like))]
    noise = torch.stack([torch.randn(like.shape[1], generator=source, dtype=like.dtype) for source in sources])
    uniform = torch.stack([torch.rand((), generator=source, dtype=torch.float64) for source in sources])
    return noise.to(like.device), uniform.to(like.device)


def _no_sums(at: Position) -> Sums:
    zeros = torch.zeros_like(at.log_density)
    return Sums(zeros, zeros, zeros, 0, 0, 0)


def _added(sums: Sums, found: Transition, num_steps: int, *, warm: bool, moved: bool) -> Sums:
    """The sums with one more trajectory; those of draws begin after warm-up."""
    sums = sums._replace(
        divergences=sums.divergences + int(found.divergent.sum()),
        leapfrogs=sums.leapfrogs + num_steps,
        still=0 if moved else sums.still + 1,
    )
    if warm:
        return sums
    return sums._replace(
        acceptance=sums.acceptance + found.acceptance,
        divergent=sums.divergent + found.divergent.double(),
        accepted=sums.accepted + found.acceptance,
    )


def _draw(
    options: HMC, at: Position, found: Transition, sums: Sums, after: int, step_size: Tensor, num_steps: int
) -> Draw:
    """What the chains' positions are `after` so many trajectories past warm-up: a kept draw or none."""
    kept = after > 0 and after % options.thin == 0
    columns = {
        "acceptance": sums.acceptance / options.thin,
        "divergent": sums.divergent,
        "step_size": step_size,
        "energy": found.energy,
    }
    return Draw(at, after // options.thin - 1 if kept else None, columns, num_steps)


def movement(accepted: Tensor, divergences: int, num_trajectories: int, *, first: int = 0) -> str:
    """What makes draws useless, and a way out: chains that stand still or trajectories that diverge; else nothing.

    Args:
        accepted: probabilities [C], summed over `num_trajectories` of each chain.
        divergences: of all chains.
        first: number of the first chain.
    """
    each = accepted / num_trajectories  # [C]
    slow = (each < 0.2).nonzero().flatten().tolist() if num_trajectories >= ENOUGH_TO_JUDGE else []
    if not slow and divergences <= 0.05 * num_trajectories * len(each):
        return ""
    named = (
        f"chains {', '.join(str(first + chain) for chain in slow[:8])} accepted {float(each[slow].mean()):.2f} of their trajectories, "
        if slow
        else ""
    )
    return (
        f"{named}{divergences} of {num_trajectories * len(each)} trajectories diverged: "
        "the draws do not represent the posterior; raise num_warmup, target_accept or the prior's precision"
    )


def _told(options: HMC, found: Transition, sums: Sums, step: int, step_size: Tensor, num_draws: int) -> dict[str, Any]:
    """The phase that trajectory number `step`, from 1, belongs to, and the figures of a state."""
    after = max(step - options.num_warmup, 0)
    if after:
        phase = _phase("sampling", after, num_draws * options.thin) | {"thin": options.thin}
    else:
        phase = _phase("warm-up", step, options.num_warmup)
    info = {
        "acceptance": float(sums.accepted.mean()) / after if after else float(found.acceptance.mean()),
        "divergences": float(sums.divergences),
        "step_size": float(step_size.log().mean().exp()),
        "leapfrogs": float(sums.leapfrogs),
    }
    return {"phase": phase, "info": info}


def _phase(name: str, step: int, num_steps: int) -> dict[str, Any]:
    """Where a run stands, for its bar."""
    return {"name": name, "step": step, "num_steps": num_steps}


def _saved(plan: Plan, at: Position, adaptation: Adaptation, sums: Sums) -> State:
    """All that the next trajectory needs, under flat names."""
    parts: dict[str, Any] = {"at": at, **adaptation._asdict(), "sums": sums}
    found = {f"{name}.{key}": value for name, part in parts.items() for key, value in part._asdict().items()}
    return found | plan.save()


def _flat_in(state: State, scale: Tensor) -> Tensor:
    """Positions that a state holds, climbing or sampling."""
    climbing = state.get("climb.flat")
    flat: Tensor = state["at.flat"].to(scale.device) if climbing is None else climbing.to(scale.device) * scale
    return flat


def _restored(state: State, scale: Tensor) -> tuple[Position, Adaptation, Sums]:
    here = {key: v.to(scale.device) if isinstance(v, Tensor) else v for key, v in state.items()}

    def part(name: str, kind: Any) -> Any:
        return kind(*(here[f"{name}.{key}"] for key in kind._fields))

    kinds = {"step_size": StepSize, "metric": Metric, "moments": Moments, "length": Length}
    adaptation = Adaptation(**{name: part(name, kind) for name, kind in kinds.items()})
    return part("at", Position), adaptation, part("sums", Sums)
