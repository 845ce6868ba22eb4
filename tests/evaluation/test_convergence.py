"""The verdict on chains: its rules one by one, banks whose truth is known, and figures against the slow way."""

from __future__ import annotations

import json
import math
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from scenarios import classifier, linear_regression
from torch import Tensor, nn

from bnn.bank import Bank
from bnn.diagnostics import split_rhat
from bnn.errors import BankError, ConfigError, DataError
from bnn.evaluation import convergence
from bnn.evaluation.convergence import CHAINS, INDEPENDENT, arrange, diagnose, probe_rows
from bnn.evaluation.verdict import Diagnosis, Mixing, judge
from bnn.fitting import fit
from bnn.functional import FunctionalModel
from bnn.inference import HMC, METHODS, SGLD, Prior
from bnn.layout import Entry, layout_of
from bnn.likelihoods import Bernoulli, Categorical, Gaussian
from bnn.priors import HalfCauchy
from bnn.seeding import generator
from bnn.types import make_block

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it announces its next version at each import
    import arviz

BAND = Mixing(
    num=3, rhat=1.0, worst="output 1 of probe row 2", share_noticed=0.0, ess_bulk=900.0, ess_tail=900.0, mcse=0.01
)
GOOD = Diagnosis(
    "too few to tell",
    "",
    method="hmc",
    num_chains=4,
    num_draws=100,
    predictions=BAND,
    log_joint=BAND._replace(num=1),
    acceptance=0.8,
    divergent=0,
    num_trajectories=400,
    ebfmi=(0.9, 1.0, 1.1, 0.8),
    longest_stay=(3, 2, 1, 4),
)


def normals(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=generator(seed, "draws", len(size)), dtype=torch.float64)


def bank_of(
    draws: Tensor,
    module: nn.Module,
    *,
    method: str | None = "hmc",
    likelihood: Any = None,
    log_joint: Tensor | None = None,
    extra: Any = (),
    options: dict[str, Any] | None = None,
    columns: dict[str, Tensor] | None = None,
) -> Bank:
    """A bank of draws [C, D, P] of a module, its rows in a random order; by default chains agree on the log joint."""
    chains, length, _ = draws.shape
    layout = layout_of(module, extra=extra)
    log_joint = normals(chains, length, seed=7) if log_joint is None else log_joint
    rows = torch.randperm(chains * length, generator=generator(1, "rows"))
    chain, draw = rows // length, rows % length
    params = layout.unflatten(draws.reshape(chains * length, -1)[rows].float())
    more = {name: column.reshape(-1)[rows] for name, column in (columns or {}).items()}
    block = make_block(params, chain=chain, draw=draw, log_joint=log_joint.reshape(-1)[rows], columns=more)
    info = {
        "method": None if method is None else {"name": method, "options": options or {}},
        "likelihood": None if likelihood is None else likelihood.to_config(),
    }
    return Bank.from_blocks([block], layout=layout, info=info)


def line() -> nn.Module:
    return nn.Linear(2, 1)


# The rules, on figures


def test_a_good_verdict_says_by_what() -> None:
    found = judge(GOOD)
    assert (found.verdict, found.trusted, found.reasons) == ("good", True, ())
    assert found.text == "good: 4 chains of 100 draws, R-hat at most 1.000, bulk ESS at least 900"
    told = judge(GOOD._replace(noise=BAND._replace(rhat=1.04, ess_bulk=123.4)).without("this, that"))
    assert told.text.endswith("R-hat at most 1.040, bulk ESS at least 123 (not judged: this, that)")


@pytest.mark.parametrize("what", ["predictions", "noise", "log_joint"])
@pytest.mark.parametrize("method", [*CHAINS, "mine"])
def test_r_hat_and_ess_are_judged_at_their_limits(what: str, method: str) -> None:
    name = what.replace("_", " ")
    longer = {"hmc": "num_steps", "nuts": "num_samples"}.get(method, "thin")
    figures = GOOD._replace(method=method)
    for part in (BAND._replace(rhat=1.05), BAND._replace(ess_bulk=100.0), BAND._replace(ess_tail=9.0)):
        assert judge(figures._replace(**{what: part})).verdict == "good"
    apart = judge(figures._replace(**{what: BAND._replace(rhat=1.051, ess_bulk=50.0)}))
    assert (apart.verdict, apart.trusted, len(apart.reasons)) == ("bad", False, 1)
    want = (
        f"bad: chains disagree, R-hat 1.051 on {name} (output 1 of probe row 2), want at most 1.05: raise num_samples"
    )
    assert apart.text.startswith(want)
    poor = judge(figures._replace(**{what: BAND._replace(ess_bulk=99.0)}))
    assert poor.text.startswith(
        f"bad: 400 draws are worth 99 on {name} (bulk ESS), want at least 100: raise num_samples"
    )
    assert longer in poor.text
    assert judge(figures._replace(**{what: BAND._replace(rhat=math.inf)})).verdict == "bad"


def test_disagreement_in_several_places_is_one_reason() -> None:
    found = judge(GOOD._replace(predictions=BAND._replace(rhat=1.5), log_joint=BAND._replace(num=1, rhat=1.7)))
    assert len(found.reasons) == 1
    assert "R-hat 1.500 on predictions (output 1 of probe row 2), 1.700 on log joint, want at most 1.05: " in found.text


def test_weights_are_told_but_not_judged() -> None:
    assert judge(GOOD._replace(parameters=BAND._replace(rhat=9.0, ess_bulk=2.0))).verdict == "good"


def test_divergent_trajectories() -> None:
    assert judge(GOOD._replace(divergent=4)).verdict == "good"
    found = judge(GOOD._replace(divergent=5))
    assert found.text.startswith("bad: 5 of 400 trajectories diverged (1.2%, want at most 1%): raise target_accept")
    assert judge(GOOD._replace(divergent=5, num_trajectories=500)).verdict == "good"


def test_energies() -> None:
    assert judge(GOOD._replace(ebfmi=(1.0, 0.3, math.nan))).verdict == "good"
    found = judge(GOOD._replace(ebfmi=(1.0, 0.29, 0.5)))
    assert found.text.startswith("bad: E-BFMI is 0.29 (want at least 0.3)")
    assert judge(GOOD._replace(ebfmi=(0.1,), num_draws=99)).verdict == "too few to tell"
    assert judge(GOOD._replace(ebfmi=(math.nan,))).verdict == "good"
    assert judge(GOOD._replace(ebfmi=(math.nan, 0.29))).verdict == "bad"


def test_a_chain_that_stood_still() -> None:
    assert judge(GOOD._replace(longest_stay=(49, 2, 3, 1))).verdict == "good"
    found = judge(GOOD._replace(longest_stay=(1, 2, 50, 1)))
    assert found.text.startswith("bad: chain 2 stood still for 50 of its 100 draws: raise target_accept")
    assert judge(GOOD._replace(num_draws=12, longest_stay=(9, 1, 1, 1))).verdict == "too few to tell"
    assert judge(GOOD._replace(num_draws=12, longest_stay=(1, 10, 1, 1))).verdict == "bad"


def test_too_few_draws_or_chains() -> None:
    found = judge(GOOD._replace(num_draws=99))
    assert (found.verdict, found.trusted) == ("too few to tell", False)
    assert found.text == "too few to tell: 4 chains of 99 draws, want 100 draws a chain; raise num_samples and resume"
    found = judge(GOOD._replace(num_chains=1))
    assert found.text == "too few to tell: 1 chain of 100 draws, want at least 2 chains; fit again with num_chains=4"
    poor = BAND._replace(rhat=1.9, ess_bulk=3.0)
    assert judge(GOOD._replace(num_draws=99, predictions=poor)).verdict == "too few to tell"
    assert judge(GOOD._replace(num_draws=99, predictions=poor._replace(rhat=2.1))).verdict == "bad"
    assert judge(GOOD._replace(num_draws=9, predictions=poor._replace(rhat=2.1))).verdict == "too few to tell"
    assert judge(GOOD._replace(num_chains=1, log_joint=poor._replace(rhat=2.1))).verdict == "bad"
    assert judge(GOOD._replace(num_draws=9, divergent=5)).verdict == "bad"


def test_nothing_to_judge_by_is_never_good() -> None:
    found = judge(GOOD._replace(predictions=None, log_joint=None))
    assert found.verdict == "too few to tell"
    assert "neither predictions nor a log joint" in found.text
    assert judge(GOOD._replace(predictions=None)).verdict == "good"


def test_json_of_figures() -> None:
    found = judge(GOOD._replace(log_joint=BAND._replace(rhat=math.inf), ebfmi=(0.5, math.nan)))
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["verdict"] == "bad"
    assert told["log_joint"]["rhat"] is None
    assert told["ebfmi"] == [0.5, None]
    assert told["predictions"]["worst"] == "output 1 of probe row 2"
    assert told["noise"] is None


# Chains of a bank


def test_rows_are_arranged_by_chain_and_draw_and_cut_to_the_shortest() -> None:
    module = line()
    chain = torch.tensor([5, 2, 5, 2, 5, 9, 2, 9, 5, 9])
    draw = torch.tensor([7, 1, 2, 0, 3, 0, 4, 2, 9, 1])
    params = layout_of(module).unflatten(torch.arange(30.0).reshape(10, 3))
    bank = Bank.from_blocks([make_block(params, chain=chain, draw=draw)], layout=layout_of(module), info={})
    order = arrange(bank)
    assert order.tolist() == [[3, 1, 6], [2, 4, 0], [5, 9, 7]]
    found = diagnose(bank)
    assert (found.num_chains, found.num_draws) == (3, 3)
    assert found.unjudged[0] == "1 draws beyond the end of the shortest chain"


def test_two_samples_of_one_draw_are_refused() -> None:
    module = line()
    params = layout_of(module).unflatten(torch.zeros(4, 3))
    twice = make_block(params, chain=torch.tensor([0, 1, 0, 1]), draw=torch.tensor([0, 3, 1, 3]))
    bank = Bank.from_blocks([twice], layout=layout_of(module), info={})
    with pytest.raises(BankError, match="want one sample a chain and draw, got two of chain 1, draw 3"):
        diagnose(bank)


def by_hand(draws: np.ndarray) -> tuple[float, ...]:
    """Largest R-hat, share above 1.01, least bulk and tail ESS, largest MCSE of quantities [C, D, Q], one by one."""
    columns = [draws[:, :, place] for place in range(draws.shape[2])]
    rhat = [float(arviz.rhat(one)) for one in columns]
    bulk, tail = ([float(arviz.ess(one, method=kind)) for one in columns] for kind in ("bulk", "tail"))
    error = [float(arviz.mcse(one, method="mean")) for one in columns]
    return max(rhat), sum(value > 1.01 for value in rhat) / len(rhat), min(bulk), min(tail), max(error)


def close(found: Mixing | None, want: tuple[float, ...], num: int) -> None:
    assert found is not None
    assert found.num == num
    told = found.rhat, found.share_noticed, found.ess_bulk, found.ess_tail, found.mcse
    assert told == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("kind", ["classes", "two classes", "regression"])
def test_figures_are_those_of_the_slow_way(kind: str) -> None:
    outputs = {"classes": 4, "two classes": 1, "regression": 3}[kind]
    module = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, outputs))
    draws = normals(3, 26, layout_of(module).num_values)
    for step in range(1, 26):
        draws[:, step] += 0.7 * draws[:, step - 1]
    likelihood = {"classes": Categorical(), "two classes": Bernoulli(), "regression": Gaussian()}[kind]
    log_joint = normals(3, 26, seed=2)
    bank = bank_of(draws, module, likelihood=likelihood, log_joint=log_joint)
    x = torch.randn(5, 2, generator=generator(3))
    found = diagnose(bank, net=FunctionalModel(module, bank), x=x)
    shown = np.zeros((3, 26, 5 * outputs))
    for chain in range(3):
        for draw in range(26):
            state = layout_of(module).unflatten(draws[chain, draw].float())
            result = torch.func.functional_call(module, state, (x,)).detach().double()
            result = result.softmax(-1) if kind == "classes" else result.sigmoid() if kind == "two classes" else result
            shown[chain, draw] = result.flatten()
    close(found.predictions, by_hand(shown), 5 * outputs)
    close(found.parameters, by_hand(draws.float().double().numpy()), draws.shape[2])
    close(found.log_joint, by_hand(log_joint.unsqueeze(2).numpy()), 1)
    assert found.predictions is not None
    place = int(np.argmax([float(arviz.rhat(shown[:, :, q])) for q in range(shown.shape[2])]))
    assert found.predictions.worst == f"output {place % outputs} of probe row {place // outputs}"


@pytest.mark.parametrize("seed", range(4))
def test_independent_chains_are_good_on_hundreds_of_outputs(seed: int) -> None:
    """The least that is not too few: 4 chains of 100 draws, 64 probe rows, 10 classes."""
    module = nn.Linear(7, 10)
    bank = bank_of(
        normals(4, 100, 80, seed=seed), module, likelihood=Categorical(), log_joint=normals(4, 100, seed=seed)
    )
    x = torch.randn(64, 7, generator=generator(seed))
    found = diagnose(bank, net=FunctionalModel(module, bank), x=x)
    assert found.verdict == "good", found.text
    assert found.predictions is not None
    assert found.predictions.num == 640
    assert found.predictions.rhat > 1.01  # which is why 1.01 is no limit for the largest of many


def test_one_chain_elsewhere_is_bad_and_says_where() -> None:
    module = line()
    draws = normals(3, 150, 3)
    draws[1, :, 0] += 1.0  # the weight of the first input, which is 0 in all rows but one
    bank = bank_of(draws, module, likelihood=Gaussian())
    x = torch.tensor([[0.0, 1.0], [0.0, -1.0], [2.0, 0.5], [0.0, 3.0]])
    found = diagnose(bank, net=FunctionalModel(module, bank), x=x)
    assert found.verdict == "bad"
    assert found.predictions is not None
    assert found.predictions.worst == "output 0 of probe row 2"
    assert found.parameters is not None
    assert found.parameters.worst == "weight[0, 0]"
    assert diagnose(bank).verdict == "good"  # the log joint does not show it
    assert diagnose(bank).text.endswith("(not judged: predictions, without probe inputs)")


def test_hidden_units_that_change_places_do_not_matter() -> None:
    """Chains agree on every prediction, and on no weight."""
    module = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    layout = layout_of(module)
    draws = layout.flatten({e.name: 4.0 + normals(4, 120, *e.shape) * 0.3 for e in layout.entries}).reshape(4, 120, -1)
    params = layout.unflatten(draws)
    params["0.weight"] += torch.tensor([0.0, 3.0, -5.0]).view(3, 1)
    for chain, order in enumerate([[0, 1, 2], [1, 2, 0], [2, 0, 1], [1, 0, 2]]):
        for name, axis in (("0.weight", 1), ("0.bias", 1), ("2.weight", 2)):
            params[name][chain] = params[name][chain].index_select(axis, torch.tensor(order))
    flat = layout.flatten(params).reshape(4, 120, -1)
    bank = bank_of(flat, module, likelihood=Gaussian())
    found = diagnose(bank, net=FunctionalModel(module, bank), x=torch.randn(9, 2, generator=generator(1)) * 0.1)
    assert found.parameters is not None
    assert found.parameters.rhat > 2.0
    assert found.verdict == "good", found.text


def test_slow_chains_are_worth_few_draws() -> None:
    module = line()
    draws = normals(4, 400, 3)
    for step in range(1, 400):
        draws[:, step] = 0.95 * draws[:, step - 1] + math.sqrt(1 - 0.95**2) * draws[:, step]
    bank = bank_of(draws, module, likelihood=Gaussian())
    found = diagnose(bank, net=FunctionalModel(module, bank), x=torch.eye(2))
    assert found.verdict == "bad"
    assert found.predictions is not None
    assert found.predictions.ess_bulk < 100


def test_the_noise_is_judged_without_a_module() -> None:
    module, likelihood = line(), Gaussian(HalfCauchy(1.0))
    extra = [Entry("@likelihood.scale", (), torch.float32)]
    draws = normals(4, 100, 4).exp()
    bank = bank_of(draws, module, likelihood=likelihood, extra=extra)
    found = diagnose(bank)
    assert found.noise is not None
    assert (found.verdict, found.noise.num, found.noise.worst) == ("good", 1, "@likelihood.scale")
    draws[2, :, 3] *= 5.0
    found = diagnose(bank_of(draws, module, likelihood=likelihood, extra=extra))
    assert found.verdict == "bad"
    assert "on noise" in found.text


def test_an_output_that_never_varies_is_no_quantity() -> None:
    """The bias is the same in all samples, and so is the output at 0; the other outputs share one R-hat."""
    module = line()
    draws = normals(3, 150, 3)
    draws[:, :, 2] = 0.7
    draws[1, :, :2] += 1.0
    bank = bank_of(draws, module, likelihood=Gaussian())
    found = diagnose(bank, net=FunctionalModel(module, bank), x=torch.tensor([[0.0, 0.0], [0.0, 1.0], [2.0, 0.0]]))
    assert found.predictions is not None
    assert found.parameters is not None
    assert (found.predictions.num, found.parameters.num) == (2, 2)
    assert found.predictions.rhat == pytest.approx(found.parameters.rhat)
    assert found.predictions.worst in ("output 0 of probe row 1", "output 0 of probe row 2")
    assert found.predictions.share_noticed == 1.0


@pytest.mark.parametrize("likelihood", [Bernoulli(), Categorical()])
def test_logits_are_judged_as_probabilities(likelihood: Any) -> None:
    """A logit of 30 or of 40 is a probability of 1."""
    module = nn.Linear(2, 1) if isinstance(likelihood, Bernoulli) else nn.Linear(2, 2)
    draws = normals(3, 100, layout_of(module).num_values)
    draws[:, :, -1] += 30.0
    draws[2, :, -1] += 10.0
    bank = bank_of(draws, module, likelihood=likelihood)
    assert diagnose(bank, net=FunctionalModel(module, bank), x=torch.eye(2)).predictions is None


def test_probabilities_that_cannot_be_told_apart_are_left_out() -> None:
    """A class that is all but certain in every draw: ranks would judge the thirteenth digit."""
    module = nn.Linear(2, 3)
    draws = 0.1 * normals(4, 100, 9)
    draws[:, :, 6] += 60.0  # the bias of class 0
    draws[1, :, 6] += 5.0
    bank = bank_of(draws, module, likelihood=Categorical())
    net = FunctionalModel(module, bank)
    found = diagnose(bank, net=net, x=torch.eye(2))
    assert found.predictions is None
    assert found.text.endswith("(not judged: predictions, none of which varies)")
    assert found.verdict == "good"
    assert diagnose(bank, net=net, x=torch.eye(2), likelihood=Gaussian()).verdict == "bad"


def test_an_output_that_is_not_finite_is_bad_and_names_the_sample() -> None:
    module = line()
    bank = bank_of(normals(2, 5, 3), module, likelihood=Gaussian())
    x = torch.tensor([[1.0, torch.inf]])
    found = diagnose(bank, net=FunctionalModel(module, bank), x=x)
    assert found.verdict == "bad"
    assert found.text.startswith("bad: sample 0 gives NaN or Inf on the probe inputs")
    draws = normals(3, 40, 3)
    draws[1, 17] = 3e38
    bank = bank_of(draws, module, likelihood=Gaussian())
    at = int(((bank.chain == 1) & (bank.draw == 17)).nonzero()[0])
    found = diagnose(bank, net=FunctionalModel(module, bank), x=torch.ones(4, 2))
    assert found.text.startswith(f"bad: sample {at} gives NaN or Inf")


def test_outputs_that_are_no_tensor_are_refused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(2, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.line(x), self.line(x)

    bank = bank_of(normals(2, 5, 3), Two())
    with pytest.raises(DataError, match="want one tensor of outputs, got tuple"):
        diagnose(bank, net=FunctionalModel(Two(), bank), x=torch.ones(4, 2))


def test_a_stuck_chain_by_its_log_joint() -> None:
    module = line()
    log_joint = normals(3, 120)
    log_joint[2, 30:100] = -5.0
    found = diagnose(bank_of(normals(3, 120, 3), module, log_joint=log_joint))
    assert found.longest_stay == (1, 1, 70)
    assert "chain 2 stood still for 70 of its 120 draws" in found.text
    same = diagnose(bank_of(normals(3, 120, 3), module, log_joint=torch.zeros(3, 120)))
    assert same.longest_stay == (120, 120, 120)
    assert same.verdict == "bad"


def test_two_chains_that_stand_still_apart() -> None:
    module = line()
    draws = normals(2, 1, 3).expand(2, 120, 3)
    bank = bank_of(draws, module, likelihood=Gaussian(), log_joint=torch.full((2, 120), torch.nan))
    found = diagnose(bank, net=FunctionalModel(module, bank), x=torch.eye(2))
    assert found.verdict == "bad"
    assert "R-hat inf on predictions" in found.text


def test_a_log_joint_that_was_not_computed() -> None:
    module = line()
    bank = bank_of(normals(4, 100, 3), module, method="sgld", log_joint=torch.full((4, 100), torch.nan))
    found = diagnose(bank)
    assert (found.verdict, found.log_joint, found.longest_stay) == ("too few to tell", None, None)
    assert "the log joint, which the bank does not hold; predictions, without probe inputs" in found.text
    found = diagnose(bank, net=FunctionalModel(module, bank), x=torch.eye(2))
    assert found.verdict == "good"


def test_columns_of_a_hamiltonian_sampler() -> None:
    module, draws = line(), normals(3, 120, 3)
    divergent = torch.zeros(3, 120)
    divergent[1, 3], divergent[2, 50] = 3, 4
    energy, acceptance = normals(3, 120, seed=5), torch.linspace(0.5, 1.0, 360).view(3, 120)
    columns = {"acceptance": acceptance, "divergent": divergent, "energy": energy, "step_size": acceptance}
    found = diagnose(bank_of(draws, module, options={"thin": 2}, columns=columns))
    assert found.verdict == "good", found.text
    assert found.acceptance == pytest.approx(0.75)
    assert (found.divergent, found.num_trajectories) == (7, 720)
    assert found.ebfmi == pytest.approx(arviz.bfmi(energy.numpy()).tolist())
    found = diagnose(bank_of(draws, module, columns=columns))  # without the option, one trajectory a draw
    assert (found.divergent, found.num_trajectories) == (7, 360)
    assert "7 of 360 trajectories diverged" in found.text
    found = diagnose(bank_of(draws, module, columns={"energy": energy.cumsum(dim=1)}))
    assert (found.divergent, found.acceptance) == (None, None)
    assert "E-BFMI" in found.text


# Which banks have chains


def test_every_method_is_known_to_have_chains_or_not() -> None:
    assert not set(CHAINS) & set(INDEPENDENT)
    assert {made().name for made in METHODS.values()} <= {*CHAINS, *INDEPENDENT}
    assert set(METHODS) <= {*CHAINS, *INDEPENDENT}


@pytest.mark.parametrize("method", INDEPENDENT)
def test_independent_draws_have_nothing_to_diagnose(method: str) -> None:
    found = diagnose(bank_of(torch.zeros(1, 6, 3), line(), method=method))
    assert (found.verdict, found.trusted, found.method) == ("not a Markov chain", True, method)
    want = f"nothing to diagnose, samples of {method} are independent draws of its approximation"
    assert found.text == f"not a Markov chain: {want}"


@pytest.mark.parametrize("method", ["mine", None])
def test_a_method_that_is_not_known_is_judged_by_its_column_of_chains(method: str | None) -> None:
    assert diagnose(bank_of(normals(4, 100, 3), line(), method=method)).verdict == "good"
    found = diagnose(bank_of(normals(7, 1, 3), line(), method=method))
    assert found.verdict == "not a Markov chain"
    assert "no steps of chains" in found.text


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("chains", [1, 2])
def test_very_short_chains(chains: int, length: int) -> None:
    module = line()
    bank = bank_of(normals(chains, length, 3), module, likelihood=Categorical())
    found = diagnose(bank, net=FunctionalModel(module, bank), x=torch.eye(2))
    assert (found.verdict, found.predictions, found.unjudged) == ("too few to tell", None, ())


def test_a_bank_without_samples() -> None:
    module = line()
    bank = Bank.from_blocks([], layout=layout_of(module), info={"method": {"name": "hmc", "options": {}}})
    found = diagnose(bank)
    assert (found.verdict, found.trusted) == ("too few to tell", False)


# Bounds, options and side effects


def test_memory_bounds_change_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 4))
    bank = bank_of(normals(3, 20, 25), module, likelihood=Gaussian())
    whole = diagnose(bank)
    monkeypatch.setattr(convergence, "VALUES", 60 * 7)
    monkeypatch.setattr(convergence, "JUDGED_VALUES", 60 * 2)
    monkeypatch.setattr(convergence, "SAMPLE_BYTES", 300)
    sizes, read = [], []
    figures, blocks = convergence._figures, Bank.blocks
    monkeypatch.setattr(Bank, "blocks", lambda self, size: (read.append(size), blocks(self, size))[1])
    monkeypatch.setattr(
        convergence, "_figures", lambda draws, bar, **more: (sizes.append(draws.shape), figures(draws, bar, **more))[1]
    )
    judged: list[int] = []
    monkeypatch.setattr(convergence, "split_rhat", lambda draws: (judged.append(draws.numel()), split_rhat(draws))[1])
    found = diagnose(bank)
    assert found == whole
    assert max(judged) == 60 * 2
    assert [size[2] for size in sizes] == [1, 7, 7, 7, 4]
    assert set(read) == {3}  # samples of 100 bytes
    net, x = FunctionalModel(module, bank), torch.randn(5, 2, generator=generator(0))
    some = diagnose(bank, net=net, x=x).predictions
    assert some is not None
    assert some.num == 7  # of the 20 outputs, chosen by the seed
    chosen = {diagnose(bank, net=net, x=x, seed=seed).predictions for seed in range(6)}
    assert len(chosen) > 1
    for seed in range(6):
        one = diagnose(bank, net=net, x=x, seed=seed).predictions
        assert one is not None
        output, row = (int(number) for number in re.findall(r"\d+", one.worst))
        shown = net(x, slice(0, len(bank)))[arrange(bank)][:, :, row, output]  # [C, D]
        assert one.rhat == pytest.approx(float(split_rhat(shown)), rel=1e-6)
    monkeypatch.undo()
    every = diagnose(bank, net=net, x=x).predictions
    assert every is not None
    assert all(one is not None and one.rhat <= every.rhat for one in chosen)


def test_a_choice_of_the_parameters() -> None:
    bank = bank_of(normals(3, 20, 25), nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 4)))
    every, some = diagnose(bank).parameters, diagnose(bank, num_parameters=6).parameters
    assert every is not None
    assert some is not None
    assert (every.num, some.num) == (25, 6)
    assert diagnose(bank, num_parameters=0).parameters is None
    assert diagnose(bank, num_parameters=6) == diagnose(bank, num_parameters=6)
    assert len({diagnose(bank, num_parameters=6, seed=seed).parameters for seed in range(5)}) > 1


def test_wrong_options() -> None:
    module = line()
    bank = bank_of(normals(2, 4, 3), module)
    with pytest.raises(ConfigError, match="want net= and x= together, got one of them"):
        diagnose(bank, x=torch.eye(2))
    with pytest.raises(ConfigError, match="want net= and x= together"):
        diagnose(bank, net=FunctionalModel(module, bank))
    with pytest.raises(ConfigError, match="want at least 0, got -1"):
        diagnose(bank, num_parameters=-1)


def test_probe_rows_are_chosen_once_and_for_all() -> None:
    x = torch.arange(40.0).view(20, 2)
    rows = probe_rows(x, num=7)
    assert rows.shape == (7, 2)
    assert torch.equal(rows, probe_rows(x, num=7))
    assert (rows[1:, 0] > rows[:-1, 0]).all()
    assert len({tuple(probe_rows(x, num=7, seed=seed)[:, 0].tolist()) for seed in range(5)}) == 5
    assert torch.equal(probe_rows(x), x)


def test_the_bar_counts_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    module = line()
    bank = bank_of(normals(3, 20, 3), module, likelihood=Gaussian(HalfCauchy(1.0)))
    bars: list[Any] = []
    shown: list[Any] = []
    bar = convergence.tqdm

    def made(**options: Any) -> Any:
        shown.append(options["disable"])
        bars.append(bar(**options))
        return bars[-1]

    monkeypatch.setattr(convergence, "tqdm", made)
    streams = torch.get_rng_state()
    diagnose(bank, net=FunctionalModel(module, bank), x=torch.eye(2), num_parameters=2, progress=True)
    diagnose(bank, progress=False)
    diagnose(bank)
    assert torch.equal(streams, torch.get_rng_state())
    # Samples are read twice; parameters, outputs and the log joint are judged.
    assert bars[0].n == bars[0].total == 2 * 60 + 2 + 2 + 1
    assert shown == [False, True, None]  # None: as stderr is a terminal or not


# Samplers of the house


@pytest.fixture(scope="module")
def three_classes() -> tuple[Any, Any]:
    return classifier()


def test_chains_of_hmc_on_a_linear_regression_are_good() -> None:
    scenario = linear_regression()
    bank = fit(
        scenario.model,
        scenario.data,
        method=HMC(num_chains=4, num_warmup=100, num_steps=4),
        num_samples=1200,
        progress=False,
    )
    found = diagnose(bank, net=FunctionalModel(scenario.model.module, bank), x=probe_rows(scenario.data[0], num=9))
    assert found.verdict == "good", found.text
    assert found.predictions is not None
    assert found.predictions.num == 9


def test_chains_that_have_not_moved_far_are_bad(three_classes: tuple[Any, Any]) -> None:
    model, data = three_classes
    bank = fit(
        model,
        data,
        method=SGLD(num_chains=3, num_warmup=1, climb_steps=1, lr=1e-5, cycle_steps=None, thin=1),
        num_samples=60,
        progress=False,
    )
    found = diagnose(bank, net=FunctionalModel(model.module, bank), x=data[0])
    assert found.verdict == "bad"
    assert "chains disagree" in found.text


def test_draws_of_a_prior_are_no_chain(three_classes: tuple[Any, Any]) -> None:
    model, data = three_classes
    assert diagnose(fit(model, data, method=Prior(), num_samples=9, progress=False)).verdict == "not a Markov chain"
