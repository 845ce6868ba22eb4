"""Guides against closed forms: the low-rank one of full rank is exact, the mean-field one minimises KL(q || p)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from scenarios import classifier, linear_regression
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bnn import likelihoods, priors
from bnn.bank import Bank
from bnn.errors import ConfigError, FitError
from bnn.fitting import fit
from bnn.inference import Guide
from bnn.model import BayesianModel
from bnn.types import Batch


def moments(guide: Guide, num_samples: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    case = linear_regression()
    return moments_of(fit(case.model, case.data, method=guide, num_samples=num_samples, seed=1))


def moments_of(bank: Bank) -> tuple[torch.Tensor, torch.Tensor]:
    flat = linear_regression().model.layout.flatten(bank.block(slice(None)).params).double()
    return flat.mean(dim=0), flat.T.cov()


@pytest.fixture(scope="module")
def of_full_rank() -> Bank:
    """Fitted on all rows, so that only Monte Carlo error and the end of the optimisation remain."""
    case = linear_regression()
    guide = Guide("low-rank", rank=5, num_steps=3000, batch_size=30, lr=0.05)
    return fit(case.model, case.data, method=guide, num_samples=4000, seed=1)


def test_low_rank_of_full_rank_agrees_with_the_closed_form(of_full_rank: Bank) -> None:
    case = linear_regression()
    mean, covariance = moments_of(of_full_rank)
    spread = case.covariance.diagonal().sqrt()
    # 4 standard errors of 4,000 draws, and as much again for what is left of the optimisation noise.
    assert float(((mean - case.mean) / spread).abs().max()) < 8 / math.sqrt(4000)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(case.covariance), covariance, upper=False)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(case.covariance), whitened.T, upper=False)
    assert float((whitened - torch.eye(5)).abs().max()) < 8 * math.sqrt(2 / 4000)


def test_mean_field_has_the_precision_of_the_posterior_on_its_diagonal() -> None:
    """For a normal target the best factorised normal has mean mu and variances 1 / (precision)_ii."""
    case = linear_regression()
    mean, covariance = moments(Guide("mean-field", num_steps=3000, batch_size=30, lr=0.02))
    expected = 1 / torch.linalg.inv(case.covariance).diagonal()
    assert float(((mean - case.mean) / expected.sqrt()).abs().max()) < 8 / math.sqrt(4000)
    assert float((covariance.diagonal() / expected - 1).abs().max()) < 8 * math.sqrt(2 / 4000)


def test_map_is_the_mode() -> None:
    case = linear_regression()
    bank = fit(case.model, case.data, method=Guide("map", num_steps=1000, batch_size=30, lr=0.05), num_samples=1)
    found = case.model.layout.flatten(bank[0]).double()
    assert float((found - case.mean).abs().max()) < 1e-3


def test_map_with_learnt_noise_is_the_mode_of_the_constrained_values() -> None:
    """y ~ N(0, s^2), log s ~ N(0.2, 0.7^2): the mode of the log joint over s, by a grid."""
    module = nn.Linear(1, 1)
    likelihood = likelihoods.Gaussian(priors.LogNormal(0.2, 0.7))
    model = BayesianModel(module, prior=priors.Normal(0.0, 1e-3), likelihood=likelihood, num_data=6)
    y = torch.tensor([[-1.2], [0.3], [0.9], [-0.4], [1.1], [0.2]])
    bank = fit(model, (torch.zeros(6, 1), y), method=Guide("map", num_steps=1000, batch_size=6, lr=0.05), num_samples=1)
    s = torch.linspace(0.2, 3.0, 28_001)
    log_joint = torch.distributions.Normal(0.0, s.unsqueeze(1)).log_prob(y.T).sum(dim=1) + likelihood.scale.log_prob(s)
    assert float(bank[0]["@likelihood.scale"]) == pytest.approx(float(s[log_joint.argmax()]), abs=2e-3)


def test_a_short_last_batch_weighs_by_its_rows() -> None:
    """In an unshuffled loader the last row is a batch of its own: it must not count as much as 128 others."""
    rows, module = 129, nn.Linear(1, 1)
    y = torch.zeros(rows, 1)
    y[-1] = 30.0
    model = BayesianModel(
        module, prior=priors.Normal(0.0, 100.0), likelihood=likelihoods.Gaussian(1.0), num_data=rows, bayesian="bias"
    )
    loader = DataLoader(TensorDataset(torch.zeros(rows, 1), y), batch_size=128)
    bank = fit(model, loader, method=Guide("map", num_steps=1000, lr=0.05), num_samples=1)
    assert float(bank[0]["bias"]) == pytest.approx(30.0 / rows, abs=0.05)


def test_minibatches_lead_to_the_same_posterior() -> None:
    case = linear_regression()
    mean, _ = moments(Guide("low-rank", rank=5, num_steps=1500, batch_size=7, lr=0.05))
    spread = case.covariance.diagonal().sqrt()
    assert float(((mean - case.mean) / spread).abs().max()) < 0.3  # the noise of batches of 7 of 30


def test_elbo_per_row_is_below_the_log_evidence_and_close_for_full_rank(of_full_rank: Bank) -> None:
    case = linear_regression()
    elbo = of_full_rank.info["diagnostics"]["main"]["elbo_per_row"] * 30
    assert elbo < case.log_evidence + 0.5
    assert elbo > case.log_evidence - 1.0


def test_draws_do_not_depend_on_the_block_size() -> None:
    model, data = classifier()
    banks = [
        fit(model, data, method=Guide(num_steps=60, block_size=size), num_samples=7, seed=2).block(slice(None))
        for size in (1, 3, 64)
    ]
    for bank in banks[1:]:
        assert all(torch.equal(bank.params[name], banks[0].params[name]) for name in model.layout.names)


def test_the_start_is_the_modules_own_values() -> None:
    model, data = classifier()
    bank = fit(model, data, method=Guide("map", num_steps=1, lr=1e-9), num_samples=1)
    own = model.module_params()
    assert all(torch.allclose(bank[0][name], own[name], atol=1e-6) for name in model.layout.names)


def test_a_loss_that_is_not_finite_says_at_which_step() -> None:
    model, (x, y) = classifier()
    with pytest.raises(
        FitError,
        match=r"want a finite loss and gradient, got a loss that is not at step 1; the last good ELBO a row was -\d",
    ):
        list(Guide(lr=1e30, num_steps=100).run(model, (x, y), num_samples=1, seed=0))


@pytest.mark.parametrize(
    "options", [{"num_steps": 0}, {"rank": 0}, {"lr": 0.0}, {"init_scale": -1.0}, {"batch_size": 0}]
)
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="Guide"):
        Guide("low-rank", **options)  # type: ignore[arg-type]


def test_an_unknown_family_lists_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"mean-field, low-rank, full-rank, flow, map, Auto.*, got 'laplac'"):
        Guide("laplac")  # type: ignore[arg-type]


def test_the_users_pyro_store_survives() -> None:
    pyro.param("mine", torch.ones(3))
    try:
        model, data = classifier()
        fit(model, data, method=Guide(num_steps=10), num_samples=2)
        assert list(pyro.get_param_store().keys()) == ["mine"]
        assert not pyro.settings.get("module_local_params")
    finally:
        pyro.get_param_store().clear()


def test_the_factor_of_the_pyro_model_is_the_log_density() -> None:
    from bnn.inference import svi

    model, (x, y) = classifier()
    theta = torch.randn(model.layout.num_values)
    program = pyro.poutine.condition(svi.density, data={"theta": theta})
    trace = pyro.poutine.trace(program).get_trace(model, "flat", Batch(x, y), 1.0)
    assert float(trace.log_prob_sum()) == pytest.approx(float(model.log_density(theta, Batch(x, y))[0]), rel=1e-6)


# Draws from a fitted guide


def learnt_noise() -> tuple[BayesianModel, tuple[Tensor, Tensor]]:
    """A regression of 3 inputs whose noise scale is learnt, so that unconstrained values are not those of the bank."""
    case = linear_regression(num_inputs=3)
    likelihood = likelihoods.Gaussian(priors.LogNormal(-1.0, 1.0))
    return BayesianModel(case.model.module, prior=case.model.prior, likelihood=likelihood, num_data=30), case.data


def draw(family: str, draws: str, num_samples: int, case: Any = None, **options: Any) -> Tensor:
    """Draws in unconstrained space, [S, P], of a guide that took a few steps."""
    model, data = case or learnt_noise()
    seed = options.pop("seed", 4)
    guide = Guide(family, num_steps=40, rank=2, lr=0.05, init_scale=0.3, draws=draws, **options)  # type: ignore[arg-type]
    bank = fit(model, data, method=guide, num_samples=num_samples, seed=seed)
    return model.unconstrain(bank.block(slice(None)).params)


def covariance_of(family: str) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the guide that `draw` fits, from its own parameters: W W^T + D, in Pyro's form of them."""
    model, data = learnt_noise()
    guide = Guide(family, num_steps=40, rank=2, lr=0.05, init_scale=0.3)  # type: ignore[arg-type]
    *_, (_, state) = guide.run(model, data, num_samples=1, seed=4)
    scale = nn.functional.softplus(state["value.scale_unconstrained"])
    factor = state["value.cov_factor"] * scale.unsqueeze(1) if family == "low-rank" else torch.zeros(5, 1)
    return state["value.loc"].double(), (factor @ factor.T + scale.square().diag()).double()


families = pytest.mark.parametrize("family", ["mean-field", "low-rank"])


@families
@pytest.mark.parametrize("draws", ["random", "antithetic", "sobol"])
def test_draws_have_the_mean_and_covariance_of_the_guide(family: str, draws: str) -> None:
    """In standard errors of 4,096 random draws; two samples of a pair say of the covariance what one does."""
    mean, covariance = covariance_of(family)
    flat = draw(family, draws, 4096).double()
    count = 2048 if draws == "antithetic" else 4096
    spread = covariance.diagonal()
    assert float(((flat.mean(dim=0) - mean).abs() / (spread / 4096).sqrt()).max()) < 4
    error = ((spread.unsqueeze(0) * spread.unsqueeze(1) + covariance.square()) / count).sqrt()
    assert float(((flat.T.cov() - covariance).abs() / error).max()) < 4
    if family == "low-rank":
        assert float((covariance - spread.diag()).abs().max()) > 0.1 * float(spread.max())  # it does correlate


@families
@pytest.mark.parametrize("num_samples", [7, 8])
def test_antithetic_draws_are_mirrored_about_the_mean_in_pairs(family: str, num_samples: int) -> None:
    """In unconstrained space, in which the noise scale is its logarithm; a last one without a partner is like any."""
    mean = draw(family, "mean", 1)[0]
    flat = draw(family, "antithetic", num_samples)
    first, second = flat[0:6:2] - mean, flat[1:6:2] - mean
    torch.testing.assert_close(first, -second, rtol=0, atol=1e-6)
    assert bool((first.abs() > 1e-4).all())
    assert len(first[:, 0].unique()) == 3  # each pair is another
    whole = draw(family, "antithetic", 8)
    assert torch.equal(flat, whole[:num_samples])


def test_antithetic_means_of_what_is_odd_are_those_of_the_guide() -> None:
    mean = draw("low-rank", "mean", 1)[0].double()
    spread = covariance_of("low-rank")[1].diagonal().sqrt()
    off = {
        name: float(((draw("low-rank", name, 10).double().mean(dim=0) - mean).abs() / spread).max())
        for name in ("random", "antithetic")
    }
    assert off["antithetic"] < 1e-5
    assert off["random"] > 0.1


@families
def test_the_mean_is_one_sample_and_that_of_the_guide(family: str) -> None:
    found = draw(family, "mean", 1)
    assert found.shape == (1, 5)
    torch.testing.assert_close(found[0].double(), covariance_of(family)[0], rtol=0, atol=1e-6)


@families
def test_the_mean_of_sobol_draws_is_far_nearer_than_that_of_random_ones(family: str) -> None:
    """Of 256 draws in 43 dimensions, root mean square in standard deviations: at most a tenth."""
    case = classifier()
    mean = draw(family, "mean", 1, case)[0].double()
    off = {}
    for name in ("random", "sobol"):
        flat = draw(family, name, 256, case).double()
        off[name] = float(((flat.mean(dim=0) - mean) / flat.std(dim=0)).square().mean().sqrt())
    assert 0.04 < off["random"] < 0.09  # 1 / 16 is to be expected
    assert off["sobol"] < off["random"] / 10


def test_every_margin_of_sobol_draws_is_filled_evenly() -> None:
    """Each sixteenth of the normal of each value gets 16 of 256 draws; rounding may carry one over an edge."""
    model, data = case = classifier()
    flat = draw("mean-field", "sobol", 256, case).double()
    *_, (_, state) = Guide(num_steps=40, lr=0.05, init_scale=0.3).run(model, data, num_samples=1, seed=4)
    scale = nn.functional.softplus(state["value.scale_unconstrained"]).double()
    edges = torch.special.ndtri(torch.linspace(0, 1, 17, dtype=torch.float64)[1:-1])
    cells = torch.bucketize((flat - state["value.loc"].double()) / scale, edges)  # [S, P]
    counts = torch.stack([torch.bincount(one, minlength=16) for one in cells.T])
    assert int((counts - 16).abs().max()) <= 1


@pytest.mark.parametrize("seed", [0, 5])
@families
def test_sobol_draws_are_a_prefix_of_more_of_them(family: str, seed: int) -> None:
    """Also in blocks of another size, which start anywhere in the sequence."""
    whole = draw(family, "sobol", 256, seed=seed)
    assert len(whole[:, 0].unique()) == 256
    assert torch.equal(draw(family, "sobol", 64, seed=seed), whole[:64])
    assert torch.equal(draw(family, "sobol", 70, seed=seed, block_size=3), whole[:70])
    assert not torch.equal(draw(family, "sobol", 64, seed=seed + 1), whole[:64])


def test_the_first_point_of_a_sobol_sequence_is_a_sample_like_any() -> None:
    """Torch keeps that point in float32, which rounds the ones next to 1 up to it: of this seed in dimension 43."""
    flat = draw("mean-field", "sobol", 3, classifier(), seed=443671)
    assert bool(flat.isfinite().all())


@pytest.mark.parametrize("edge", [0.0, 1 - 2.0**-30, 1.0])
def test_points_at_the_ends_of_the_unit_interval_are_finite_draws(edge: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the normal's quantiles are infinite: such points are rare, and a bank takes no sample that is not finite."""

    def at_the_edge(engine: Any, n: int, *, dtype: torch.dtype) -> Tensor:
        return torch.full((n, engine.dimension), edge, dtype=dtype)

    monkeypatch.setattr(torch.quasirandom.SobolEngine, "draw", at_the_edge)
    flat = draw("low-rank", "sobol", 3)
    assert bool(flat.isfinite().all())
    mean = draw("low-rank", "mean", 1)
    assert bool(((flat > mean) == (edge > 0.5))[:, -1].all())


def wide(num_values: int) -> tuple[BayesianModel, tuple[Tensor, Tensor]]:
    module = nn.Linear(num_values, 1, bias=False)
    model = BayesianModel(module, prior=priors.Normal(), likelihood=likelihoods.Gaussian(1.0), num_data=3)
    return model, (torch.zeros(3, num_values), torch.zeros(3, 1))


@pytest.mark.parametrize(("family", "num_values"), [("mean-field", 21_202), ("low-rank", 21_195)])
def test_more_dimensions_than_the_sequence_has_are_refused(family: Any, num_values: int) -> None:
    model, data = wide(num_values)
    guide = Guide(family, num_steps=1, rank=7, draws="sobol")
    with pytest.raises(ConfigError, match=r"at most 21,201 dimensions, which the sequence has, got 21,202; draw with"):
        list(guide.run(model, data, num_samples=2, seed=0))


def test_as_many_dimensions_as_the_sequence_has_are_drawn() -> None:
    model, data = wide(21_201)
    bank = fit(model, data, method=Guide(num_steps=1, draws="sobol"), num_samples=2)
    assert bool(bank[1]["weight"].isfinite().all())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"family": "map", "draws": "antithetic"}, r"Guide\(draws=\): want none for 'map', a point, got antithetic"),
        ({"family": "map", "draws": "mean"}, r"Guide\(draws=\): want none for 'map'"),
        ({"draws": "halton"}, r"Guide\(draws=\): want one of random, antithetic, sobol, mean, got 'halton'"),
    ],
)
def test_draws_that_do_not_go_together_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Guide(**options)


def test_the_mean_in_several_samples_is_refused() -> None:
    model, data = classifier()
    with pytest.raises(ConfigError, match=r"num_samples: want 1 for Guide\(draws='mean'\), which is one point, got 2"):
        fit(model, data, method=Guide(draws="mean", num_steps=1), num_samples=2)


@families
@pytest.mark.parametrize("draws", ["random", "antithetic", "sobol", "mean"])
def test_draws_are_the_same_bits_after_a_resume_and_when_a_bank_grows(family: Any, draws: Any, tmp_path: Path) -> None:
    """Cut inside the optimisation and inside a block of draws, of 3 samples, which is no whole number of pairs."""
    model, data = learnt_noise()
    size = 1 if draws == "mean" else 11

    def run(out: str, num_samples: int = size, **how: bool) -> Tensor:
        guide = Guide(family, num_steps=102, rank=2, block_size=3, draws=draws)
        bank = fit(model, data, method=guide, num_samples=num_samples, out=tmp_path / out, seed=3, **how)
        return model.unconstrain(bank.block(slice(None)).params)

    whole = run("whole")
    for states in (1, 2) if draws == "mean" else (1, 5):  # two of the optimisation, one at its end, then blocks

        def cut(producer: Any, *_: Any, states: int = states) -> Iterator[Any]:
            for count, found in enumerate(producer):
                if count == states:
                    raise KeyboardInterrupt
                yield found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("bnn.fitting.with_progress", cut)
            with pytest.raises(KeyboardInterrupt):
                run(f"cut-{states}")
        assert len(Bank.open(tmp_path / f"cut-{states}")) == max(0, 3 * (states - 3))
        assert torch.equal(run(f"cut-{states}", resume=True), whole)
    if draws == "mean":
        with pytest.raises(ConfigError, match="num_samples: want 1"):
            run("whole", 2, resume=True)
        return
    run("grown", 4)
    assert torch.equal(run("grown", resume=True), whole)
