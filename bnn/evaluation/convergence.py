"""Whether the chains of a bank can be trusted: a verdict, what speaks against them, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bnn.bank import Bank
from bnn.diagnostics import MIN_DRAWS, ebfmi, ess_bulk, ess_tail, mcse_mean, split_rhat
from bnn.errors import BankError, ConfigError
from bnn.evaluation.verdict import NOTICED_RHAT, Diagnosis, Mixing, judge
from bnn.functional import FunctionalModel
from bnn.likelihoods import Bernoulli, Categorical, Likelihood, likelihood_from_config, one_tensor
from bnn.seeding import generator
from bnn.types import Block

CHAINS = ("hmc", "nuts", "sghmc", "sgld")  # methods whose samples are steps of chains
INDEPENDENT = (
    "prior",
    "mean-field",
    "low-rank",
    "full-rank",
    "flow",
    "guide",
    "map",
    "laplace",
    "ensemble",
    "swag",
    "ivon",
)
MIXED = "stack"  # a mixture of posteriors, which are not meant to agree

VISIBLE = 1e-3  # of a class probability: outputs that spread by less over all draws change no prediction
VALUES = 2**23  # float64 numbers held at once, 64 MiB
JUDGED_VALUES = 2**20  # draws judged between two steps of the bar
SAMPLE_BYTES = 64 * 1024 * 1024  # samples of one block


class Probes(NamedTuple):
    """Where predictions are looked at."""

    net: FunctionalModel
    x: Any
    likelihood: Likelihood | None
    seed: int


def diagnose(
    bank: Bank,
    *,
    net: FunctionalModel | None = None,
    x: Any = None,
    likelihood: Likelihood | None = None,
    num_parameters: int = 2000,
    seed: int = 0,
    progress: bool | None = None,
) -> Diagnosis:
    """Say whether the chains of a bank agree, move, and are long enough.

    Chains are cut to the shortest. Judged are, as far as they can be had, the outputs of the module on probe inputs
    (class probabilities, or a regression's outputs), the learnt noise, the log joint, and what a Hamiltonian sampler
    noted down. Weights are told but not judged: hidden units can change places, and weights of chains that agree on
    every prediction then never agree.

    - "not a Markov chain": samples of the method are no steps of chains.
    - "bad": R-hat above 1.05, or a bulk ESS below 100, of any output, the noise or the log joint; more than 1 % of
      trajectories divergent; an E-BFMI below 0.3; a chain that stays at one log joint for half of its draws, and at
      least 10, in a row; an output that is not finite.
    - "too few to tell": fewer than 100 draws a chain, a single chain, or neither outputs, noise nor log joint to judge
      by. Such chains are bad only where few draws show it: R-hat above 2 from 10 draws on, divergent trajectories, a
      chain that stands still, an output that is not finite.
    - "good": else.

    R-hat^2 - 1 is about the variance between half chains over that inside them. At 1.05 their means spread by a third
    of a posterior standard deviation, as they do also where a half chain is worth fewer than ten independent draws.
    The customary 1.01 is meant for one quantity: the largest of hundreds of outputs exceeds it by chance.

    Args:
        bank: of any method.
        net: the module under the bank, with `x`; without, predictions are not judged, and the text says so.
        x: probe inputs of B rows, such as `probe_rows(x_test)`.
        likelihood: what outputs mean; the one that the bank was made with by default. Without any, they are taken
            as they are.
        num_parameters: weights looked at, chosen at random where there are more; 0 for none.
        seed: of that choice.
        progress: show a bar on stderr; by default where stderr is a terminal.

    Raises:
        ConfigError: one of `net` and `x` without the other, or a negative `num_parameters`.
        BankError: two samples of the same chain and draw.

    Examples:
        >>> import bnn
        >>> module = torch.nn.Linear(2, 1)
        >>> bank = bnn.Bank.from_state_dicts([module.state_dict()] * 3, module=module)
        >>> diagnose(bank).text
        'not a Markov chain: nothing to diagnose, samples of state-dicts are no steps of chains'

    Source: Vehtari et al. (2021), arXiv:1903.08008; Betancourt (2016), arXiv:1604.00695.
    """
    return examine(
        bank, net=net, x=x, likelihood=likelihood, num_parameters=num_parameters, seed=seed, progress=progress
    ).diagnosis


class Examined(NamedTuple):
    """A verdict, and what it was found by."""

    diagnosis: Diagnosis
    figures: Tensor | None = None  # [4, Q] R-hat, bulk and tail ESS and MCSE of outputs on probe rows


def examine(
    bank: Bank,
    *,
    net: FunctionalModel | None,
    x: Any,
    likelihood: Likelihood | None,
    num_parameters: int,
    seed: int = 0,
    progress: bool | None = None,
) -> Examined:
    """What `diagnose` does, with the figures of each output; arguments as there."""
    if (net is None) != (x is None):
        raise ConfigError(
            "diagnose", want="net= and x= together", got="one of them", fix="pass the module under the bank and inputs"
        )
    if num_parameters < 0:
        raise ConfigError("diagnose(num_parameters=)", want="at least 0", got=str(num_parameters), fix="try 2000")
    method = str((bank.info.get("method") or {}).get("name") or "")
    if not len(bank):
        return Examined(Diagnosis("too few to tell", "too few to tell: the bank has no sample yet; go on with its fit"))
    if not _has_chains(bank, method):
        kind = "independent draws of its approximation" if method in INDEPENDENT else "no steps of chains"
        text = f"not a Markov chain: nothing to diagnose, samples of {method or 'this bank'} are {kind}"
        return Examined(Diagnosis("not a Markov chain", text, method=method))
    order = arrange(bank)
    noise = _places(bank, "@likelihood.")
    chosen = _choice(bank.layout.num_values, num_parameters, seed, "parameters")
    passes = (net is not None) + _num_passes(bank, noise) + _num_passes(bank, chosen)
    with tqdm(
        total=passes * len(bank) + len(noise) + len(chosen) + 1,
        desc="diagnose",
        unit="step",  # a sample read, or a quantity judged
        delay=2.0,
        disable=None if progress is None else not progress,
    ) as bar:
        found, figures = _columns(bank, order, method, bar), None
        if net is None:
            found = found.without("predictions, without probe inputs")
        else:
            config = bank.info.get("likelihood")
            likelihood = likelihood or (None if config is None else likelihood_from_config(config))
            found, figures = _predictions(found, bank, order, Probes(net, x, likelihood, seed), bar)
        noted, weights = _parameters(bank, noise, order, bar), _parameters(bank, chosen, order, bar)
        return Examined(judge(found._replace(noise=noted, parameters=weights)), figures)


def arrange(bank: Bank) -> Tensor:
    """Bank indices of chains and draws, int64 [C, D], whatever the order of rows in the bank.

    Chains are cut to the first D draws, as many as the shortest one has.

    Raises:
        BankError: two samples of the same chain and draw.
    """
    chain, draw = bank.chain.numpy(), bank.draw.numpy()
    order = np.lexsort((draw, chain))
    again = (np.diff(chain[order]) == 0) & (np.diff(draw[order]) == 0)
    if again.any():
        first = order[int(again.argmax())]
        raise BankError(
            f"{bank.path or 'bank'}",
            want="one sample a chain and draw",
            got=f"two of chain {chain[first]}, draw {draw[first]}",
            fix="number the chains of each writer apart",
        )
    _, begins = np.unique(chain[order], return_index=True)
    shortest = int(np.diff(begins, append=len(order)).min())
    return torch.from_numpy(np.stack([order[begin : begin + shortest] for begin in begins]))


def probe_rows(x: Tensor, *, num: int = 64, seed: int = 0) -> Tensor:
    """At most `num` rows of x [N, ...], chosen at random and kept in their order: [min(num, N), ...]."""
    return x[_choice(len(x), num, seed, "probes")]


def _figures(draws: Tensor, bar: Any, *, visible: float = 0.0) -> Tensor:
    """R-hat, bulk and tail ESS and MCSE of quantities [C, D, Q]: [4, Q]; NaN of those that vary not, or less than `visible`."""
    found = []
    for some in draws.split(max(1, JUDGED_VALUES // (draws.shape[0] * draws.shape[1])), dim=2):
        figures = torch.stack([split_rhat(some), ess_bulk(some), ess_tail(some), mcse_mean(some)])  # [4, q]
        unseen = some.flatten(0, 1).std(dim=0, correction=0) < visible  # [q]
        found.append(torch.where(unseen, math.nan, figures))
        bar.update(some.shape[2])
    return torch.cat(found, dim=1)


def _summary(figures: Tensor, name: Callable[[int], str]) -> Mixing | None:
    """The worst of figures [4, Q] of quantities, named; None where no quantity has any."""
    rhat, bulk, tail, error = figures
    kept = ~rhat.isnan()
    if not kept.any():
        return None
    worst = int(torch.where(kept, rhat, -math.inf).argmax())
    return Mixing(
        num=int(kept.sum()),
        rhat=float(rhat[worst]),
        worst=name(worst),
        share_noticed=float((rhat[kept] > NOTICED_RHAT).double().mean()),
        ess_bulk=float(bulk[kept].min()),
        ess_tail=float(tail[kept].min()),
        mcse=float(error[kept].max()),
    )


def _has_chains(bank: Bank, method: str) -> bool:
    """Whether samples are steps of chains: by the method, and of one that is not known by the column of chains."""
    if method in (*CHAINS, *INDEPENDENT, MIXED):
        return method in CHAINS
    return len(bank.chain.unique()) < len(bank)


def _columns(bank: Bank, order: Tensor, method: str, bar: Any) -> Diagnosis:
    """What the columns of the bank say: the log joint, and what a Hamiltonian sampler noted down."""
    found = Diagnosis("too few to tell", "", method=method, num_chains=order.shape[0], num_draws=order.shape[1])
    if order.numel() < len(bank):
        found = found.without(f"{len(bank) - order.numel()} draws beyond the end of the shortest chain")
    log_joint = bank.log_joint[order]  # [C, D]
    if log_joint.isnan().any():
        found = found.without("the log joint, which the bank does not hold")
    else:
        figures = _figures(log_joint.unsqueeze(2), bar)
        stay = tuple(_longest_stay(log_joint).tolist())
        found = found._replace(log_joint=_summary(figures, lambda _: "log joint"), longest_stay=stay)
    columns = {key: column[order] for key, column in bank.columns.items()}  # [C, D] each
    if "acceptance" in columns:
        found = found._replace(acceptance=float(columns["acceptance"].mean()))
    if "divergent" in columns:
        options = (bank.info.get("method") or {}).get("options") or {}
        trajectories = order.numel() * int(options.get("thin") or 1)
        found = found._replace(divergent=int(columns["divergent"].sum()), num_trajectories=trajectories)
    if "energy" in columns:
        found = found._replace(ebfmi=tuple(ebfmi(columns["energy"]).tolist()))
    return found


def _longest_stay(values: Tensor) -> Tensor:
    """Most draws in a row with the same value, [C, D] -> [C]."""
    place = torch.arange(values.shape[1])
    moved = torch.ones_like(values, dtype=torch.bool)
    moved[:, 1:] = values.diff(dim=1) != 0
    since = torch.where(moved, place, 0).cummax(dim=1).values  # the draw at which it came to where it is
    return (place - since + 1).amax(dim=1)


@torch.no_grad()
def _predictions(
    found: Diagnosis, bank: Bank, order: Tensor, probes: Probes, bar: Any
) -> tuple[Diagnosis, Tensor | None]:
    """Figures of the outputs on probe inputs: of all, or of as many as memory allows, chosen at random."""
    shape: Sequence[int] = ()
    chosen = torch.empty(0, dtype=torch.int64)
    values = torch.empty(len(bank), 0, dtype=torch.float64)
    for start, block in _blocks(bank, bar):
        outputs = _meaning(one_tensor(probes.net.apply(block, probes.x)), probes.likelihood)  # [K, B, ...]
        flat = outputs.cpu().double().flatten(1)  # [K, Q]
        if not flat.isfinite().all():
            bad = start + int((~flat.isfinite()).any(dim=1).nonzero()[0])
            reason = f"sample {bad} gives NaN or Inf on the probe inputs: check those, and the step size"
            return found._replace(reasons=(*found.reasons, reason)), None
        if start == 0:
            shape = outputs.shape[1:]
            chosen = _choice(flat.shape[1], max(1, VALUES // len(bank)), probes.seed, "outputs")
            values = values.new_empty(len(bank), len(chosen))
            bar.total += len(chosen)
        values[start : start + len(flat)] = flat[:, chosen]
    few = order.shape[1] < MIN_DRAWS
    classes = isinstance(probes.likelihood, Bernoulli | Categorical)
    figures = _figures(values[order], bar, visible=VISIBLE if classes else 0.0)
    found = found._replace(predictions=_summary(figures, lambda q: _output(int(chosen[q]), shape)))
    return found if found.predictions or few else found.without("predictions, none of which varies"), figures


def _output(place: int, shape: Sequence[int]) -> str:
    """What a number of the outputs [B, ...] is called."""
    row, *output = (int(part) for part in np.unravel_index(place, tuple(shape)))
    return f"output {', '.join(map(str, output)) or 0} of probe row {row}"


def _meaning(outputs: Tensor, likelihood: Likelihood | None) -> Tensor:
    """Probabilities where outputs are logits; ranks do not ask for the scale of other outputs."""
    if isinstance(likelihood, Categorical):
        return outputs.double().softmax(dim=-1)
    return outputs.double().sigmoid() if isinstance(likelihood, Bernoulli) else outputs


def _parameters(bank: Bank, chosen: Tensor, order: Tensor, bar: Any) -> Mixing | None:
    """Figures of the numbers `chosen` [Q] of each sample, read in so many passes that memory stays bounded."""
    if not len(chosen):
        return None
    figures = []
    for group in chosen.chunk(_num_passes(bank, chosen)):
        values = torch.empty(len(bank), len(group), dtype=torch.float64)
        picks = list(_picks(bank, group))
        for start, block in _blocks(bank, bar):
            pieces = [block.params[name].reshape(block.num_samples, -1)[:, here] for name, here in picks]
            values[start : start + block.num_samples] = torch.cat([piece.double() for piece in pieces], dim=1)
        figures.append(_figures(values[order], bar))
    return _summary(torch.cat(figures, dim=1), lambda q: _name(bank, int(chosen[q])))


def _num_passes(bank: Bank, chosen: Tensor) -> int:
    """Passes over the bank in which so many numbers of each sample are read."""
    return math.ceil(len(chosen) * len(bank) / VALUES)


def _blocks(bank: Bank, bar: Any) -> Iterator[tuple[int, Block]]:
    """The bank in blocks of bounded size."""
    for start, block in bank.blocks(max(1, min(16, SAMPLE_BYTES // bank.layout.num_bytes))):
        yield start, block
        bar.update(block.num_samples)


def _picks(bank: Bank, chosen: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Where chosen numbers of a sample stand: entry by entry, its name and places in it."""
    first = 0
    for entry in bank.layout.entries:
        here = chosen[(chosen >= first) & (chosen < first + entry.numel)] - first
        if len(here):
            yield entry.name, here
        first += entry.numel


def _places(bank: Bank, prefix: str) -> Tensor:
    """Places in a sample of all numbers of entries whose names begin so."""
    entries = bank.layout.entries
    flags = torch.tensor([entry.name.startswith(prefix) for entry in entries])
    return flags.repeat_interleave(torch.tensor([entry.numel for entry in entries])).nonzero()[:, 0]


def _name(bank: Bank, place: int) -> str:
    """What a number of a sample is called, such as `0.weight[3, 1]`."""
    for entry in bank.layout.entries:
        if place < entry.numel:
            index = ", ".join(str(int(part)) for part in np.unravel_index(place, entry.shape))
            return f"{entry.name}[{index}]" if entry.shape else entry.name
        place -= entry.numel
    raise AssertionError("unreachable")


def _choice(size: int, num: int, seed: int, what: str) -> Tensor:
    """At most `num` of `size` places, in order."""
    if size <= num:
        return torch.arange(size)
    return torch.randperm(size, generator=generator(seed, "diagnose", what))[:num].sort().values
