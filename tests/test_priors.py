"""Priors: densities against torch.distributions, draws against SciPy, scales by glob, fan-in and prior, round trips."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor
from torch import distributions as D

from bnn import priors
from bnn.errors import BnnError, ConfigError
from bnn.layout import Entry
from bnn.priors import FanIn, HalfCauchy, Laplace, LogNormal, Normal, ScaleMixture, StudentT, prior_from_config
from bnn.seeding import generator

ENTRIES = (
    Entry("fc.weight", (5, 4), torch.float32),
    Entry("fc.bias", (5,), torch.float32),
    Entry("conv.weight", (6, 3, 2, 2), torch.float64),
)
BY_FAN_IN = {"fc.weight": 1 / math.sqrt(4), "fc.bias": None, "conv.weight": 1 / math.sqrt(12)}
FAMILIES = (Normal(), Laplace(), StudentT(), StudentT(1.0), StudentT(0.5), ScaleMixture(), ScaleMixture(0.2, 0.03))
HUGE = pytest.param(10**400, id="beyond-float")
families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: str(family).split(", loc")[0])


def reference(family: priors.Family, loc: float, scale: float) -> D.Distribution:
    """The family at a place and scale, by torch.distributions in float64."""
    at, spread = torch.tensor(loc, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64)
    if isinstance(family, Normal):
        return D.Normal(at, spread)
    if isinstance(family, Laplace):
        return D.Laplace(at, spread)
    if isinstance(family, StudentT):
        return D.StudentT(torch.tensor(family.df, dtype=torch.float64), at, spread)
    assert isinstance(family, ScaleMixture)
    shares = torch.tensor([family.share, 1 - family.share], dtype=torch.float64)
    spreads = spread * torch.tensor([1.0, family.ratio], dtype=torch.float64)
    return D.MixtureSameFamily(D.Categorical(shares), D.Normal(at.expand(2), spreads))


def cdf(family: priors.Family, z: float) -> float:
    """P(Z <= z) of the family itself, by SciPy."""
    if isinstance(family, Normal):
        return float(scipy.stats.norm.cdf(z))
    if isinstance(family, Laplace):
        return float(scipy.stats.laplace.cdf(z))
    if isinstance(family, StudentT):
        return float(scipy.stats.t.cdf(z, family.df))
    assert isinstance(family, ScaleMixture)
    wide, narrow = scipy.stats.norm.cdf(z), scipy.stats.norm.cdf(z, scale=family.ratio)
    return float(family.share * wide + (1 - family.share) * narrow)


def check_shares(values: Tensor, expected: Callable[[float], float], points: list[float]) -> None:
    """The share of draws below each point is its probability, within four standard errors."""
    count, checked = values.numel(), 0
    assert bool(torch.isfinite(values).all())
    for point in points:
        chance = expected(point)
        if count * min(chance, 1 - chance) < 20:
            continue  # too few for a standard error
        error = math.sqrt(chance * (1 - chance) / count)
        assert abs(float((values <= point).double().mean()) - chance) < 4 * error, point
        checked += 1
    assert checked >= 5


def some_values(entries: tuple[Entry, ...] = ENTRIES) -> dict[str, Tensor]:
    return {e.name: (1.5 * torch.randn(e.shape, generator=generator(4, e.name))).to(e.dtype) for e in entries}


def expected_log_prob(family: priors.Family, loc: float, scales: dict[str, float], params: dict[str, Tensor]) -> Tensor:
    """Entry by entry, with scales that the test says."""
    return torch.stack(
        [reference(family, loc, scale).log_prob(params[name].double()).sum() for name, scale in scales.items()]
    ).sum()


# Densities


@families
@pytest.mark.parametrize(("loc", "scale"), [(0.0, 1.0), (0.3, 0.7), (-2.0, 5.0)])
def test_log_prob_is_that_of_independent_values(family: priors.Family, loc: float, scale: float) -> None:
    params = some_values()
    expected = expected_log_prob(family, loc, dict.fromkeys(params, scale), params)
    found = priors.log_prob(replace(family, loc=loc, scale=scale), ENTRIES, params)
    assert found.shape == ()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-4)


@families
def test_log_prob_with_scales_by_glob(family: priors.Family) -> None:
    params = some_values()
    scales = {"fc.weight": 2.0, "fc.bias": 0.1, "conv.weight": 0.4}
    prior = replace(family, loc=0.2, scale={"*.bias": 0.1, "conv": 0.4, "*": 2.0})
    expected = expected_log_prob(family, 0.2, scales, params)
    torch.testing.assert_close(priors.log_prob(prior, ENTRIES, params).double(), expected, rtol=1e-6, atol=1e-4)


@families
def test_log_prob_by_fan_in(family: priors.Family) -> None:
    params = some_values()
    scales = {name: 0.5 if by is None else 3.0 * by for name, by in BY_FAN_IN.items()}
    expected = expected_log_prob(family, 0.0, scales, params)
    found = priors.log_prob(FanIn(3.0, 0.5, family), ENTRIES, params)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-4)


@families
def test_log_prob_given_unknown_scales(family: priors.Family) -> None:
    """Given the scales in the sample it is the prior with those scales fixed; their own prior is added elsewhere."""
    params = some_values()
    unknown = HalfCauchy(1.0)
    given = {"@prior.scale.*.weight": 0.6, "@prior.scale.*": 1.7}
    prior = replace(family, loc=-0.1, scale={"*.weight": unknown, "*": unknown})
    expected = expected_log_prob(family, -0.1, {"fc.weight": 0.6, "fc.bias": 1.7, "conv.weight": 0.6}, params)
    found = priors.log_prob(prior, ENTRIES, params | {name: torch.tensor(scale) for name, scale in given.items()})
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-4)
    by_fan_in = FanIn(unknown, unknown, family)
    scales = {name: 1.7 if by is None else 0.6 * by for name, by in BY_FAN_IN.items()}
    given = {"@prior.scale": 0.6, "@prior.bias_scale": 1.7}
    found = priors.log_prob(by_fan_in, ENTRIES, params | {name: torch.tensor(scale) for name, scale in given.items()})
    expected = expected_log_prob(family, 0.0, scales, params)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-4)


@families
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float64(family: priors.Family, dtype: torch.dtype) -> None:
    """A thousand values, whose log densities a half-precision sum would round by units."""
    entries = (Entry("a", (50, 20), dtype),)
    params = some_values(entries)
    expected = expected_log_prob(family, 0.3, {"a": 0.7}, params)
    found = priors.log_prob(replace(family, loc=0.3, scale=0.7), entries, params)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)


@families
def test_the_gradient_is_finite_at_the_centre_and_far_out(family: priors.Family) -> None:
    z = torch.tensor([0.0, 1e-20, -3.0, 1e6], requires_grad=True)
    (slope,) = torch.autograd.grad(family.log_prob(z), z)
    assert bool(torch.isfinite(slope).all())
    assert float(slope[2]) > 0 > float(slope[3])


# Draws


@families
def test_draws_follow_the_distribution(family: priors.Family) -> None:
    drawn = family.sample((400, 500), generator(1))
    assert drawn.shape == (400, 500)
    points = [s * z for z in (0.01, 0.05, 0.2, 0.7, 1.5, 3.0, 5.0, 8.0, 30.0, 1e3, 1e5) for s in (1.0, -1.0)]
    check_shares(drawn.double(), lambda z: cdf(family, z), [*points, 0.0])


def test_laplace_has_no_values_beyond_its_tails() -> None:
    """P(|z| > 40) = exp(-40): of fifty million draws none may lie there."""
    source = generator(0)
    farthest = max(float(Laplace().sample((5_000_000,), source).abs().max()) for _ in range(10))
    assert 12 < farthest < 40


@pytest.mark.parametrize("df", [1.0, 0.5])
def test_heavy_tails_stay_finite(df: float) -> None:
    drawn = StudentT(df).sample((3_000_000,), generator(3))
    assert bool(torch.isfinite(drawn).all())
    assert float(drawn.abs().max()) > 1e5  # and far out they are


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_heavy_tails_stay_finite_in_the_dtype_of_the_entry(dtype: torch.dtype) -> None:
    drawn = priors.sample(StudentT(0.5), [Entry("a", (300, 100), dtype)], generator(3))["a"]
    assert drawn.dtype == dtype
    assert bool(torch.isfinite(drawn).all())


@families
def test_draws_are_the_generators(family: priors.Family) -> None:
    draws = [family.sample((30, 7), generator(seed)) for seed in (5, 5, 6)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("family", [Normal(), Laplace(), StudentT(12.0), ScaleMixture(), ScaleMixture(0.2, 0.03)])
def test_the_spread_is_the_standard_deviation_of_draws(family: priors.Family) -> None:
    squares = family.sample((300_000,), generator(2)).double().square()
    error = float(squares.std()) / math.sqrt(len(squares))
    assert abs(float(squares.mean()) - family.spread**2) < 4 * error


@pytest.mark.parametrize(
    ("df", "spread"), [(0.5, 1.0), (1.0, 1.0), (2.0, 1.0), (2.5, math.sqrt(5)), (4.0, math.sqrt(2))]
)
def test_the_spread_of_a_student_t_is_one_where_it_has_none(df: float, spread: float) -> None:
    assert StudentT(df).spread == pytest.approx(spread)


def test_draws_have_the_moments_of_the_prior() -> None:
    entry = Entry("w", (400, 100), torch.float32)
    drawn = priors.sample(Normal(0.5, 2.0), [entry], generator(1))["w"].double()
    count = drawn.numel()
    assert abs(float(drawn.mean()) - 0.5) < 4 * 2.0 / math.sqrt(count)
    assert abs(float(drawn.var()) - 4.0) < 4 * 4.0 * math.sqrt(2 / count)


@families
def test_draws_of_entries_have_their_places(family: priors.Family) -> None:
    """By fan-in and by glob: each entry, less its loc and over its scale, is of the family."""
    entries = (Entry("fc.weight", (200, 100), torch.float32), Entry("fc.bias", (20_000,), torch.float64))
    points = [-8.0, -2.0, -0.7, -0.1, 0.0, 0.05, 0.4, 1.3, 4.0]
    globs = replace(family, loc=0.3, scale={"*.bias": 0.1, "*": 2.0})
    for prior, loc, scales in ((FanIn(3.0, 0.5, family), 0.0, (0.3, 0.5)), (globs, 0.3, (2.0, 0.1))):
        drawn = priors.sample(prior, entries, generator(7))
        for entry, scale in zip(entries, scales, strict=True):
            assert (drawn[entry.name].shape, drawn[entry.name].dtype) == (entry.shape, entry.dtype)
            check_shares((drawn[entry.name].double() - loc) / scale, lambda z: cdf(family, z), points)


# Unknown scales


@pytest.mark.parametrize(
    ("prior", "names"),
    [
        (Normal(), []),
        (Normal(scale=HalfCauchy()), ["@prior.scale"]),
        (Normal(scale={"*.bias": 0.1, "*": HalfCauchy()}), ["@prior.scale.*"]),
        (Laplace(scale={"fc": LogNormal(), "*": HalfCauchy()}), ["@prior.scale.fc", "@prior.scale.*"]),
        (
            StudentT(scale=HalfCauchy(), shared=False),
            ["@prior.scale.fc.weight", "@prior.scale.fc.bias", "@prior.scale.conv.weight"],
        ),
        (
            Normal(scale={"*.bias": 0.1, "*": HalfCauchy()}, shared=False),
            ["@prior.scale.*.fc.weight", "@prior.scale.*.conv.weight"],
        ),
        (FanIn(), []),
        (FanIn(HalfCauchy()), ["@prior.scale"]),
        (FanIn(bias_scale=LogNormal()), ["@prior.bias_scale"]),
        (FanIn(HalfCauchy(), LogNormal()), ["@prior.scale", "@prior.bias_scale"]),
        (
            FanIn(HalfCauchy(), LogNormal(), shared=False),
            ["@prior.scale.fc.weight", "@prior.bias_scale.fc.bias", "@prior.scale.conv.weight"],
        ),
    ],
)
def test_names_of_unknown_scales(prior: priors.Prior, names: list[str]) -> None:
    assert [unknown.name for unknown in priors.unknowns(prior, ENTRIES)] == names


def test_an_unknown_scale_has_the_prior_that_was_given_for_its_entries() -> None:
    prior = Normal(scale={"*.bias": HalfCauchy(0.2), "*": LogNormal(0.1, 0.4)})
    assert dict(priors.unknowns(prior, ENTRIES)) == {
        "@prior.scale.*.bias": HalfCauchy(0.2),
        "@prior.scale.*": LogNormal(0.1, 0.4),
    }


@families
def test_values_drawn_with_unknown_scales_follow_the_family_given_them(family: priors.Family) -> None:
    """Over many draws: the median of the scale, and z = (theta - loc) / scale of the family whatever the scale is."""
    entries = (Entry("fc.weight", (3, 2), torch.float32), Entry("fc.bias", (3,), torch.float32))
    prior = replace(family, loc=0.3, scale=LogNormal(0.4, 0.8))
    source = generator(9)
    draws = [priors.sample(prior, entries, source) for _ in range(3000)]
    scales = torch.stack([one["@prior.scale"] for one in draws]).double()
    weights = torch.stack([one["fc.weight"].flatten() for one in draws]).double()
    wide = scales > math.exp(0.4)
    assert abs(float(wide.double().mean()) - 0.5) < 4 * 0.5 / math.sqrt(3000)
    assert abs(float(scales.log().std()) - 0.8) < 4 * 0.8 / math.sqrt(2 * 3000)
    z = (weights - 0.3) / scales[:, None]
    for part in (wide, ~wide):
        check_shares(z[part], lambda point: cdf(family, point), [-3.0, -1.0, -0.2, 0.0, 0.1, 0.5, 2.0])


def test_scales_that_are_not_shared_are_drawn_one_an_entry() -> None:
    source, prior = generator(1), Normal(scale=HalfCauchy(0.7), shared=False)
    draws = [priors.sample(prior, ENTRIES[:2], source) for _ in range(3000)]
    below = torch.stack(
        [torch.stack([d[f"@prior.scale.fc.{name}"] < 0.7 for name in ("weight", "bias")]) for d in draws]
    )
    for share, chance in ((below[:, 0], 0.5), (below[:, 1], 0.5), (below.all(dim=1), 0.25)):
        assert abs(float(share.double().mean()) - chance) < 4 * math.sqrt(chance * (1 - chance) / 3000)


# Places


def test_fan_in_is_the_number_of_inputs_of_an_output() -> None:
    prior = FanIn(3.0, 0.5)
    assert [prior.place(e).scale for e in ENTRIES] == [3.0 / 2.0, 0.5, 3.0 / math.sqrt(12)]


def test_the_first_matching_pattern_counts() -> None:
    prior = Normal(0.0, {"fc.*": 0.1, "*.weight": 0.2, "*": 0.3})
    assert [prior.place(e).scale for e in ENTRIES] == [0.1, 0.1, 0.2]


@pytest.mark.parametrize("family", [Normal, Laplace, StudentT, ScaleMixture])
def test_uncovered_entries_and_idle_patterns_are_refused(family: type[priors.Family]) -> None:
    with pytest.raises(ConfigError, match=rf"^{family.__name__}\(scale=\): want a pattern for 'conv\.weight'"):
        family(scale={"fc.*": 0.1}).check(ENTRIES)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"'head\.\*', which matches none"):
        family(scale={"head.*": HalfCauchy(), "*": 1.0}).check(ENTRIES)  # type: ignore[call-arg]
    family(scale={"fc": 1.0, "*": HalfCauchy()}).check(ENTRIES)  # type: ignore[call-arg]


# Options


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan, "1", True, [1.0], None, HUGE])
def test_scales_must_be_positive(scale: Any) -> None:
    for make in (Normal, Laplace, StudentT, ScaleMixture, FanIn, HalfCauchy, LogNormal):
        with pytest.raises(ConfigError, match=rf"^{make.__name__}\(scale=\): want a positive number"):
            make(scale=scale)
    for given in ({"*": scale}, {"fc": HalfCauchy(), "*": scale}):
        with pytest.raises(ConfigError, match=r"^Laplace\(scale=\): want a positive number"):
            Laplace(scale=given)
    with pytest.raises(ConfigError, match=r"^FanIn\(bias_scale=\): want a positive number"):
        FanIn(bias_scale=scale)


@pytest.mark.parametrize("value", [math.inf, math.nan, "1", [1.0], None, True, HUGE])
def test_places_must_be_finite(value: Any) -> None:
    for make in (Normal, Laplace, StudentT, ScaleMixture, LogNormal):
        with pytest.raises(ConfigError, match=rf"^{make.__name__}\(loc=\): want a finite number"):
            make(loc=value)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.5, math.nan, "0.5", [0.5], None, True])
def test_shares_and_ratios_lie_between_zero_and_one(value: Any) -> None:
    for option in ("share", "ratio"):
        with pytest.raises(ConfigError, match=rf"^ScaleMixture\({option}=\): want a number in \(0, 1\)"):
            ScaleMixture(**{option: value})


@pytest.mark.parametrize("df", [0.0, -1.0, math.inf, math.nan, "4", None, True])
def test_degrees_of_freedom_must_be_positive(df: Any) -> None:
    with pytest.raises(ConfigError, match=r"^StudentT\(df=\): want a positive number"):
        StudentT(df)


@pytest.mark.parametrize("scale", [HalfCauchy, LogNormal])
def test_a_prior_over_a_scale_is_made_before_it_is_passed(scale: Any) -> None:
    for make in (Normal, Laplace, FanIn):
        with pytest.raises(ConfigError, match=r"\(scale=\)"):
            make(scale=scale)


@pytest.mark.parametrize("shared", ["no", [], 0, None])
def test_shared_is_true_or_false(shared: Any) -> None:
    for make in (Normal, StudentT, FanIn):
        with pytest.raises(ConfigError, match=r"shared="):
            make(scale=HalfCauchy(), shared=shared)


def test_fixed_scales_have_nothing_to_share() -> None:
    for make in (Normal, Laplace, StudentT, ScaleMixture, FanIn):
        with pytest.raises(ConfigError, match=rf"^{make.__name__}\(shared=False\): want a scale with a prior"):
            make(shared=False)
    assert not FanIn(bias_scale=HalfCauchy(), shared=False).shared


@pytest.mark.parametrize(
    "family",
    [Normal(0.1), Normal(scale=2.0), Laplace(scale=HalfCauchy()), Normal(scale={"*": 1.0}), "Normal", FanIn(), None],
)
def test_fan_in_takes_a_family_at_its_own_scale(family: Any) -> None:
    with pytest.raises(ConfigError, match=r"^FanIn\(family=\): want a family at loc 0 and scale 1"):
        FanIn(family=family)


# Priors over one positive unknown


def test_half_cauchy_and_log_normal_densities() -> None:
    s = torch.tensor([0.01, 0.5, 3.0, 40.0], dtype=torch.float64)
    expected = torch.distributions.HalfCauchy(torch.tensor(0.7, dtype=torch.float64)).log_prob(s)
    torch.testing.assert_close(HalfCauchy(0.7).log_prob(s), expected)
    expected = torch.distributions.LogNormal(torch.tensor(0.3, dtype=torch.float64), 0.8).log_prob(s)
    torch.testing.assert_close(LogNormal(0.3, 0.8).log_prob(s), expected)


@pytest.mark.parametrize(
    ("prior", "truth"),
    [
        (HalfCauchy(0.7), scipy.stats.halfcauchy(scale=0.7)),
        (LogNormal(0.3, 0.8), scipy.stats.lognorm(0.8, 0, math.exp(0.3))),
    ],
)
def test_positive_draws_follow_their_distribution(prior: priors.PositivePrior, truth: Any) -> None:
    source = generator(2)
    drawn = torch.stack([prior.sample(source) for _ in range(4000)])
    assert bool((drawn > 0).all())
    assert prior.median == pytest.approx(float(truth.median()))
    check_shares(
        drawn.double(), lambda s: float(truth.cdf(s)), [float(truth.ppf(p)) for p in (0.02, 0.2, 0.5, 0.8, 0.98)]
    )


# Configs

FORMS = (
    *FAMILIES,
    Normal(0.3, 0.7),
    Normal(-1, 2),
    Laplace(0.1, {"*.bias": 0.1, "*": 1.0}),
    StudentT(2.5, 0.1, HalfCauchy(2.0)),
    ScaleMixture(0.3, 0.02, 0.1, LogNormal(0.2, 0.3)),
    Normal(scale={"fc": HalfCauchy(0.5), "*.bias": 0.2, "*": LogNormal(-1.0, 0.5)}),
    Normal(scale={"fc": HalfCauchy(0.5), "*": 0.2}, shared=False),
    Laplace(scale=HalfCauchy(), shared=False),
    FanIn(),
    FanIn(1.5, 0.3),
    FanIn(HalfCauchy(2.0), LogNormal(0.1, 0.2)),
    FanIn(HalfCauchy(2.0), shared=False),
    FanIn(1.5, HalfCauchy(), StudentT(3.0), shared=False),
    *(FanIn(2.0, family=family) for family in FAMILIES),
)


@pytest.mark.parametrize("prior", FORMS, ids=str)
def test_config_round_trip(prior: priors.Prior) -> None:
    config = prior.to_config()
    assert prior_from_config(json.loads(json.dumps(config, allow_nan=False))) == prior
    assert config["name"] == type(prior).__name__
    if isinstance(scales := getattr(prior, "scale", None), dict):  # the first that matches counts: order is meaning
        assert list(prior_from_config(json.loads(json.dumps(config))).scale) == list(scales)  # type: ignore[attr-defined]


def test_the_order_of_patterns_survives_a_store_that_sorts_keys() -> None:
    prior = Normal(scale={"fc.bias": 0.1, "*": 1.0})
    again = prior_from_config(json.loads(json.dumps(prior.to_config(), sort_keys=True)))
    assert [again.place(entry).scale for entry in ENTRIES] == [1.0, 0.1, 1.0]


def test_configs_say_no_more_than_was_chosen() -> None:
    assert Normal(0.0, 1.5).to_config() == {"name": "Normal", "loc": 0.0, "scale": 1.5}
    assert FanIn(1.5).to_config() == {"name": "FanIn", "scale": 1.5, "bias_scale": 1.0}
    assert FanIn(HalfCauchy(0.5), shared=False).to_config() == {
        "name": "FanIn",
        "scale": {"name": "HalfCauchy", "scale": 0.5},
        "bias_scale": 1.0,
        "shared": False,
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"name": "Normall"},
            r"^prior name: want one of Normal, Laplace, StudentT, ScaleMixture, FanIn, got 'Normall'",
        ),
        ({"name": "HalfCauchy"}, r"^prior name: want one of Normal, .*, got 'HalfCauchy'"),
        ({}, r"^prior name: want one of Normal"),
        ({"name": "Normal", "scales": 1.0}, r"^prior Normal: want options among loc, scale, shared, got 'scales'"),
        (
            {"name": "StudentT", "share": 1.0},
            r"^prior StudentT: want options among df, loc, scale, shared, got 'share'",
        ),
        (
            {"name": "FanIn", "loc": 1.0},
            r"^prior FanIn: want options among scale, bias_scale, family, shared, got 'loc'",
        ),
        (
            {"name": "Normal", "scale": {"name": "Cauchy"}},
            r"^prior scale name: want one of HalfCauchy, LogNormal.*'Cauchy'",
        ),
        (
            {"name": "Normal", "scale": {"name": "HalfCauchy", "loc": 1}},
            r"HalfCauchy: want options among scale, got 'loc'",
        ),
        ({"name": "Normal", "scale": {"*": {"name": "Half"}}}, r"^prior scale name: want one of HalfCauchy"),
        ({"name": "Normal", "scale": {"name": "Normal"}}, r"^Normal\(scale=\): want a positive number"),
        ({"name": "FanIn", "family": {"name": "HalfCauchy"}}, r"^FanIn\(family=\): want a family"),
    ],
)
def test_unknown_names_and_options_are_refused_with_the_list(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prior_from_config(config)


NUMBERS: tuple[Any, ...] = (
    "x",
    None,
    [],
    [1.0],
    True,
    {},
    {"*": {"*": 1.0}},
    {"*": "x"},
    {"name": ["Normal"]},
    math.nan,
)


@pytest.mark.parametrize("config", ["x", None, [], [1], True, 3, math.nan, {"name": ["Normal"]}, {"name": {}}], ids=str)
def test_a_config_that_is_none_is_refused(config: Any) -> None:
    with pytest.raises(BnnError, match=r"^prior"):
        prior_from_config(config)


@pytest.mark.parametrize("value", NUMBERS, ids=str)
@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("Normal", "loc"),
        ("Normal", "scale"),
        ("Laplace", "scale"),
        ("StudentT", "df"),
        ("ScaleMixture", "share"),
        ("ScaleMixture", "ratio"),
        ("FanIn", "scale"),
        ("FanIn", "bias_scale"),
        ("FanIn", "family"),
    ],
)
def test_options_of_a_wrong_type_are_refused(name: str, option: str, value: Any) -> None:
    with pytest.raises(BnnError, match=option):
        prior_from_config({"name": name, option: value})


@pytest.mark.parametrize("value", [value for value in NUMBERS if value is not True], ids=str)
@pytest.mark.parametrize(("name", "option"), [("HalfCauchy", "scale"), ("LogNormal", "loc"), ("LogNormal", "scale")])
def test_options_of_a_wrong_type_inside_a_scale_are_refused(name: str, option: str, value: Any) -> None:
    with pytest.raises(BnnError, match=option):
        prior_from_config({"name": "Normal", "scale": {"*": {"name": name, option: value}}})


def test_a_log_normal_beyond_all_numbers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^LogNormal\(loc=\)"):
        prior_from_config({"name": "Normal", "scale": {"name": "LogNormal", "loc": 1000.0}})
