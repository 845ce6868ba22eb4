"""The verdict on chains: figures, and the rules by which they speak for or against a bank."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

from bnn.diagnostics import ENOUGH_DRAWS, MAX_RHAT, MIN_EBFMI

Verdict: TypeAlias = Literal["good", "bad", "too few to tell", "not a Markov chain"]

MIN_ESS = 100.0
NOTICED_RHAT = 1.01  # told as a share; the largest of hundreds of outputs lies above it by chance
APART_RHAT = 2.0  # no chance of few draws: half chains' means spread by 1.7 standard deviations of a half chain
MAX_DIVERGENT = 0.01
MIN_STAY = 10  # draws in a row at one place, and half the chain, before it counts as standing still

# What to raise where chains disagree, and where they are worth too few draws.
ADVICE = {
    "hmc": ("num_samples, num_warmup, and num_steps for longer trajectories", "num_samples, or num_steps"),
    "nuts": ("num_samples and num_warmup", "num_samples"),
}
OTHER_ADVICE = ("num_samples, num_warmup and thin", "num_samples, or thin")


class Mixing(NamedTuple):
    """How chains agree on several quantities, the worst of them counted."""

    num: int  # quantities that vary
    rhat: float  # largest
    worst: str  # the quantity with that R-hat
    share_noticed: float  # of the quantities, with an R-hat above 1.01
    ess_bulk: float  # least
    ess_tail: float  # least
    mcse: float  # largest standard error of a mean, in the unit of its quantity


class Diagnosis(NamedTuple):
    """What `diagnose` found; figures that could not be had are None."""

    verdict: Verdict
    text: str  # one line: the verdict, what speaks against the chains, what to do, what was not judged
    reasons: tuple[str, ...] = ()  # what speaks against the chains
    unjudged: tuple[str, ...] = ()  # what was not looked at, and why
    method: str = ""
    num_chains: int = 0
    num_draws: int = 0  # of each chain, cut to the shortest
    predictions: Mixing | None = None
    noise: Mixing | None = None  # learnt unknowns of the likelihood
    log_joint: Mixing | None = None
    parameters: Mixing | None = None  # told, not judged
    acceptance: float | None = None  # mean probability
    divergent: int | None = None  # trajectories
    num_trajectories: int | None = None
    ebfmi: tuple[float, ...] | None = None  # of each chain
    longest_stay: tuple[int, ...] | None = None  # of each chain, draws in a row with one log joint

    @property
    def trusted(self) -> bool:
        """Whether nothing speaks against the use of the bank."""
        return self.verdict in ("good", "not a Markov chain")

    def without(self, what: str) -> Diagnosis:
        """The same, with something told as not judged."""
        return self._replace(unjudged=(*self.unjudged, what))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; numbers that are not finite are None."""
        found: dict[str, Any] = _plain(self._asdict())
        return found


def judge(found: Diagnosis) -> Diagnosis:
    """The verdict on these figures, and its text, by the rules of `diagnose`."""
    few = found.num_draws < ENOUGH_DRAWS or found.num_chains < 2
    reasons = (*found.reasons, *_movement(found, few=few), *_agreement(found, few=few))
    judged = [part for part in (found.predictions, found.noise, found.log_joint) if part is not None]
    chains = f"{found.num_chains} chain{'s' * (found.num_chains > 1)} of {found.num_draws} draws"
    verdict: Verdict = "good"
    if reasons:
        verdict, told = "bad", "; ".join(reasons)
    elif few:
        short = found.num_draws < ENOUGH_DRAWS
        want = f"{ENOUGH_DRAWS} draws a chain" if short else "at least 2 chains"
        way = "raise num_samples and resume" if short else "fit again with num_chains=4"
        verdict, told = "too few to tell", f"{chains}, want {want}; {way}"
    elif not judged:
        verdict = "too few to tell"
        told = f"{chains}, and neither predictions nor a log joint to judge by; pass the module and probe inputs"
    else:
        rhat, least = max(part.rhat for part in judged), min(part.ess_bulk for part in judged)
        told = f"{chains}, R-hat at most {rhat:.3f}, bulk ESS at least {least:.0f}"
    aside = f" (not judged: {'; '.join(found.unjudged)})" if found.unjudged else ""
    return found._replace(verdict=verdict, text=f"{verdict}: {told}{aside}", reasons=reasons)


def _movement(found: Diagnosis, *, few: bool) -> Iterator[str]:
    """What is wrong with how chains move."""
    stays = found.longest_stay or (0,)
    if max(stays) >= max(MIN_STAY, found.num_draws / 2):
        yield (
            f"chain {stays.index(max(stays))} stood still for {max(stays)} of its {found.num_draws} draws: raise "
            "target_accept, which makes steps smaller, or num_warmup"
        )
    if found.divergent and found.num_trajectories and found.divergent > MAX_DIVERGENT * found.num_trajectories:
        share = found.divergent / found.num_trajectories
        yield (
            f"{found.divergent} of {found.num_trajectories} trajectories diverged ({share:.1%}, want at most "
            f"{MAX_DIVERGENT:.0%}): raise target_accept, or standardise the data and narrow the prior"
        )
    least = min((value for value in found.ebfmi or () if math.isfinite(value)), default=math.inf)
    if least < MIN_EBFMI and not few:
        yield (
            f"E-BFMI is {least:.2f} (want at least {MIN_EBFMI}): chains reach energies slowly, as in heavy tails; "
            "raise num_warmup, or choose priors with lighter tails"
        )


def _agreement(found: Diagnosis, *, few: bool) -> Iterator[str]:
    """Where chains disagree, or are worth too few draws."""
    if found.num_draws < MIN_STAY:
        return
    mend, lengthen = ADVICE.get(found.method, OTHER_ADVICE)
    parts = {"predictions": found.predictions, "noise": found.noise, "log joint": found.log_joint}
    judged = {what: part for what, part in parts.items() if part is not None}
    apart = {what: part for what, part in judged.items() if part.rhat > (APART_RHAT if few else MAX_RHAT)}
    if apart:
        told = (f"{part.rhat:.3f} on {what}" + f" ({part.worst})" * (part.num > 1) for what, part in apart.items())
        yield f"chains disagree, R-hat {', '.join(told)}, want at most {MAX_RHAT}: raise {mend}"
    poor = {what: part for what, part in judged.items() if part.ess_bulk < MIN_ESS and what not in apart and not few}
    if poor:
        told = (f"{part.ess_bulk:.0f} on {what}" for what, part in poor.items())
        total = found.num_chains * found.num_draws
        yield f"{total} draws are worth {', '.join(told)} (bulk ESS), want at least {MIN_ESS:.0f}: raise {lengthen}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mixing):
        return _plain(value._asdict())
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
