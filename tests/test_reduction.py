"""Smaller banks: certificates against predictions made one sample at a time, and choices against every other choice."""

from __future__ import annotations

import itertools
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from memory import PEAK
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bnn
from bnn import likelihoods, reduction
from bnn.bank import Bank, moving
from bnn.errors import BankError, BankExists, ConfigError
from bnn.layout import Entry, layout_of
from bnn.likelihoods import Categorical, Likelihood
from bnn.priors import HalfCauchy
from bnn.types import make_block

S, N, C = 40, 26, 3
NOISE = Entry("@likelihood.scale", (), torch.float32)


def module_of(outputs: int = C) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, outputs))


def bank_of(module: nn.Module, *, size: int = S, seed: int = 0, weighted: bool = False, spread: float = 1.0) -> Bank:
    """Samples of four chains about one point, at random."""
    layout, source = layout_of(module, extra=[NOISE]), torch.Generator().manual_seed(seed)
    params = {e.name: 0.3 + spread * torch.randn(size, *e.shape, generator=source) for e in layout.entries}
    params[NOISE.name] = params[NOISE.name].exp()
    index = torch.arange(size)
    weight = 0.7 * torch.randn(size, generator=source).double() if weighted else None
    block = make_block(params, chain=index % 4, draw=index // 4, log_weight=weight)
    return Bank.from_blocks([block], layout=layout, info={"likelihood": Categorical().to_config()})


def rows_of(size: int = N, seed: int = 1) -> Tensor:
    return torch.randn(size, 5, generator=torch.Generator().manual_seed(seed))


def outputs_of(module: nn.Module, bank: Bank, x: Tensor) -> Tensor:
    """What the module itself says with each sample loaded into it, float64 [S, N, C]."""
    found = []
    for index in range(len(bank)):
        params = {name: tensor for name, tensor in bank[index].items() if not name.startswith("@")}
        found.append(torch.func.functional_call(module, params, x).detach().double())
    return torch.stack(found)


def slow_probs(module: nn.Module, bank: Bank, x: Tensor) -> Tensor:
    weight = bank.log_weight.softmax(dim=0)
    return (weight[:, None, None] * outputs_of(module, bank, x).softmax(dim=-1)).sum(dim=0)


def slow_kl(p: Tensor, q: Tensor) -> Tensor:
    return torch.nn.functional.kl_div(q.log(), p, reduction="none").sum(dim=-1)


def close(found: float, wanted: Tensor | float) -> bool:
    return found == pytest.approx(float(wanted), rel=1e-3, abs=1e-11)


# Casting


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("codec", ["bf16", "fp16", "int8"])
def test_the_certificate_is_what_the_written_bank_does(tmp_path: Path, codec: Any, weighted: bool) -> None:
    module, x = module_of(), rows_of()
    bank = bank_of(module, weighted=weighted)
    told: list[tuple[int, int]] = []
    small = reduction.cast(
        bank, tmp_path / "small", codec=codec, net=bnn.FunctionalModel(module, bank), x=x,
        progress=lambda *place: told.append(place),
    )  # fmt: skip
    assert small.info["codec"]["name"] == codec
    assert small.info["codec"]["of"] == bank.digest
    assert told[-1] == (5 * S, 5 * S)
    assert told == sorted(told)
    found = small.info["codec"]["predictive"]
    p, q = slow_probs(module, bank, x), slow_probs(module, small, x)
    kl, apart = slow_kl(p, q), 0.5 * (p - q).abs().sum(dim=-1)
    assert found["rows"] == N
    assert close(found["kl"]["mean"], kl.mean())
    assert close(found["kl"]["largest"], kl.max())
    assert close(found["total_variation"]["mean"], apart.mean())
    assert close(found["total_variation"]["largest"], apart.max())
    assert found["kl"]["largest"] > 0
    before, after = bank.block(range(S)).params, small.block(range(S)).params
    for name, error in small.info["codec"]["errors"].items():
        wide = before[name].double()
        relative = (after[name].double() - wide).abs() / wide.std(dim=0, correction=0)
        assert error == pytest.approx(float(relative.max()), rel=1e-9), name
        assert (error == 0) == (name == NOISE.name)
    assert list(small.info["codec"]["errors"]) == sorted(bank.layout.names)  # as JSON has them


def test_more_bits_say_less_wrong(tmp_path: Path) -> None:
    module, x = module_of(), rows_of()
    bank = bank_of(module, size=200, spread=0.5)
    net = bnn.FunctionalModel(module, bank)
    found = {
        codec: reduction.cast(bank, tmp_path / codec, codec=codec, net=net, x=x).info["codec"]
        for codec in ("int8", "bf16", "fp16")
    }
    errors = [max(one["errors"].values()) for one in found.values()]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.03
    assert found["fp16"]["predictive"]["kl"]["mean"] < found["bf16"]["predictive"]["kl"]["mean"]
    assert all(one["predictive"]["kl"]["largest"] < 1e-4 for one in found.values())


@pytest.mark.parametrize(
    ("likelihood", "outputs"),
    [
        (likelihoods.Gaussian(HalfCauchy(1.0)), C),
        (likelihoods.HeteroscedasticGaussian(), 2 * C),
        (likelihoods.StudentT(df=5.0, scale=HalfCauchy(1.0)), C),
        (likelihoods.Poisson(), C),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_certificate_of_a_regression(tmp_path: Path, likelihood: Likelihood, outputs: int) -> None:
    module, x = module_of(outputs), rows_of()
    bank = bank_of(module, weighted=True, spread=0.3)

    def moments(of: Bank) -> tuple[Tensor, Tensor]:
        weight = of.log_weight.softmax(dim=0)[:, None, None]
        said = outputs_of(module, of, x)
        scale = of.block(range(S)).params[NOISE.name].double()[:, None, None]
        if isinstance(likelihood, likelihoods.Poisson):
            means, noise = said.exp(), said.exp()
        elif isinstance(likelihood, likelihoods.HeteroscedasticGaussian):
            means, scales = likelihood.split(said)
            noise = scales.square()
        else:
            factor = 5 / 3 if isinstance(likelihood, likelihoods.StudentT) else 1.0
            means, noise = said, factor * scale.square().expand_as(said)
        mean = (weight * means).sum(dim=0)
        return mean, (weight * (noise + (means - mean).square())).sum(dim=0)

    small = reduction.cast(
        bank, tmp_path / "small", codec="int8", net=bnn.FunctionalModel(module, bank), x=x, likelihood=likelihood
    )
    found = small.info["codec"]["predictive"]
    (m0, v0), (m1, v1) = moments(bank), moments(small)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(m0, v0.sqrt()), normal(m1, v1.sqrt()))
    assert found["kl"]["mean"] == pytest.approx(float(kl.mean()), rel=0.02, abs=1e-11)
    assert found["kl"]["largest"] == pytest.approx(float(kl.max()), rel=0.02, abs=1e-11)
    shift = (m0 - m1).abs() / v0.sqrt()
    assert found["shift"]["mean"] == pytest.approx(float(shift.mean()), rel=0.01)
    assert found["shift"]["largest"] == pytest.approx(float(shift.max()), rel=0.01)


def test_a_noise_without_variance_has_no_certificate(tmp_path: Path) -> None:
    module = module_of()
    bank = bank_of(module)
    with pytest.raises(ConfigError, match="predictives with a variance"):
        reduction.cast(
            bank, tmp_path / "small", codec="int8", net=bnn.FunctionalModel(module, bank), x=rows_of(),
            likelihood=likelihoods.StudentT(df=2.0),
        )  # fmt: skip
    assert not (tmp_path / "small").exists()


def test_a_bound_that_is_not_kept_leaves_nothing_behind(tmp_path: Path) -> None:
    module, x = module_of(), rows_of()
    bank = bank_of(module)
    net = bnn.FunctionalModel(module, bank)
    largest = reduction.cast(bank, tmp_path / "free", codec="int8", net=net, x=x).info["codec"]["predictive"]["kl"][
        "largest"
    ]
    with pytest.raises(BankError, match=r"want a KL of at most .* nats in every probe row, got .* with int8"):
        reduction.cast(bank, tmp_path / "folder" / "small", codec="int8", net=net, x=x, max_kl=0.9 * largest)
    assert not (tmp_path / "folder").exists()
    kept = reduction.cast(bank, tmp_path / "small", codec="int8", net=net, x=x, max_kl=1.1 * largest)
    assert len(kept) == S


def test_everything_that_takes_a_bank_takes_a_coded_one(tmp_path: Path) -> None:
    """Predict, evaluate, pair and move it: equal to an ordinary bank of the decoded samples."""
    module, x = module_of(), rows_of()
    bank = bank_of(module, weighted=True)
    small = reduction.cast(bank, tmp_path / "small", codec="int8")
    assert "predictive" not in small.info["codec"]
    plain = Bank.from_blocks([small.block(range(S))], layout=small.layout, info=small.info)
    ours, theirs = (bnn.FunctionalModel(module, each).settled() for each in (small, plain))
    torch.testing.assert_close(ours(x, 3), theirs(x, 3), rtol=0, atol=0)
    torch.testing.assert_close(ours(x, [4, 1]), theirs(x, [4, 1]), rtol=0, atol=0)
    index = torch.arange(N) % S
    torch.testing.assert_close(ours(x, rows=index), theirs(x, rows=index), rtol=0, atol=0)
    assert torch.equal(bnn.predict(ours, x).log_probs, bnn.predict(theirs, x).log_probs)
    data = TensorDataset(x, torch.arange(N) % C)
    assert bnn.evaluate(ours, DataLoader(data, 9)).metrics == bnn.evaluate(theirs, DataLoader(data, 9)).metrics
    loader = bnn.PairedLoader(data, bnn.SampleIndexSampler(small, seed=2), batch_size=8, shuffle=True)
    for (batch, _), i in loader:
        assert torch.equal(ours(batch, i), theirs(batch, i))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"codec": "int4"}, "codec: want one of bf16, fp16, int8, got 'int4'"),
        ({"x": rows_of()}, "net= and x= together"),
        ({"max_kl": 0.1}, "max_kl: want a probe set"),
    ],
)
def test_cast_refuses_what_it_cannot_mean(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    bank = bank_of(module_of())
    with pytest.raises(ConfigError, match=words):
        reduction.cast(bank, tmp_path / "new", **{"codec": "int8", **options})
    assert not (tmp_path / "new").exists()


def test_probe_sets_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    module, x = module_of(), rows_of()
    bank, other = bank_of(module), bank_of(module, seed=9)
    net = bnn.FunctionalModel(module, bank)
    empty = Bank.from_blocks([], layout=bank.layout, info={})
    for call in (
        lambda: reduction.cast(other, tmp_path / "new", codec="int8", net=net, x=x),
        lambda: reduction.thin(other, tmp_path / "new", best=3, net=net, x=x),
    ):
        with pytest.raises(ConfigError, match="net: want the module under this bank"):
            call()
    with pytest.raises(ConfigError, match="a number of nats, 0 at least"):
        reduction.cast(bank, tmp_path / "new", codec="int8", net=net, x=x, max_kl=math.nan)
    with pytest.raises(ConfigError, match="at least one sample"):
        reduction.cast(empty, tmp_path / "new", codec="int8")
    with pytest.raises(RuntimeError):  # the module's own words for rows of another shape
        reduction.cast(bank, tmp_path / "new", codec="int8", net=net, x=torch.zeros(4, 6))
    assert not (tmp_path / "new").exists()
    small = reduction.cast(bank, tmp_path / "new", codec="int8")
    with pytest.raises(ConfigError, match="the bank itself"):
        reduction.cast(small, tmp_path / "new", codec="fp16", overwrite=True)
    with pytest.raises(BankExists):
        reduction.cast(bank, tmp_path / "new", codec="fp16")


CODE = (
    PEAK
    + """
import sys, torch
from torch import nn
from bnn import reduction
from bnn.bank import Bank, BankWriter, writer as writing
from bnn.layout import layout_of
from bnn.types import make_block

writing.SHARD_BYTES = 32 * 2**20  # what a writer gathers, and a reader maps, is no part of what is asked here
S, K = 3000, 60
layout = layout_of(nn.Linear(1000, 199, bias=False))
writer = BankWriter(f"{sys.argv[1]}/bank", layout=layout, config={})
for start in range(0, S, K):
    index = torch.arange(start, start + K)
    flat = (index.float() - 1500).view(K, 1).expand(K, layout.num_values)
    writer.append(make_block(layout.unflatten(flat), chain=index % 3, draw=index // 3))
writer.close()
small = reduction.cast(Bank.open(f"{sys.argv[1]}/bank"), f"{sys.argv[1]}/small", codec="int8")
seen = max(float((block.params["weight"] - (first + torch.arange(len(block.chain)) - 1500.).view(-1, 1, 1)).abs().max())
           for first, block in small.blocks(64))
print(peak(), seen)
"""
)


@pytest.mark.slow
def test_banks_of_gigabytes_are_cast_in_little_memory(tmp_path: Path) -> None:
    """A bank of 2.4 GB in shards of 32 MiB, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak, seen = map(float, done.stdout.split())
    assert peak < 1_300_000_000, f"{peak / 1e6:.0f} MB resident"
    assert seen <= 1500 / 127 / 2 * 1.01


# The best few samples


def value_of(features: Tensor, chosen: Any) -> float:
    rows = torch.tensor([int(row) for row in chosen])
    return float(features[rows].double().mean(dim=0).square().sum())


@pytest.mark.parametrize("seed", range(6))
def test_no_exchange_makes_a_choice_better(seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    features = torch.randn(30, 11, generator=source)
    chosen = reduction.chosen_of(features, 7).tolist()
    assert len(set(chosen)) == 7
    assert chosen == sorted(chosen)
    best = value_of(features, chosen)
    for place, new in itertools.product(range(7), set(range(30)) - set(chosen)):
        assert value_of(features, [*chosen[:place], new, *chosen[place + 1 :]]) >= best * (1 - 1e-5)
    random = [value_of(features, torch.randperm(30, generator=source)[:7]) for _ in range(200)]
    assert best < min(random)


def test_a_choice_is_near_the_best_of_all() -> None:
    """Among the best twentieth of all 495 choices each time, and now and then the best itself."""
    ranks = []
    for seed in range(10):
        features = torch.randn(12, 5, generator=torch.Generator().manual_seed(seed))
        found = value_of(features, reduction.chosen_of(features, 4))
        every = [value_of(features, choice) for choice in itertools.combinations(range(12), 4)]
        ranks.append(sum(value < found * (1 - 1e-5) for value in every))
    assert max(ranks) < 495 / 20, ranks
    assert min(ranks) == 0


@pytest.mark.parametrize("task", ["classes", "targets"])
def test_features_measure_the_kl(task: str) -> None:
    """|mean feature|^2 / 2 is the KL up to third powers of the difference."""
    module = module_of()
    bank = bank_of(module, size=300, spread=0.2)
    likelihood = Categorical() if task == "classes" else likelihoods.Gaussian()
    views = reduction._views(bnn.FunctionalModel(module, bank), rows_of(), likelihood)
    features = reduction._features(views)
    torch.testing.assert_close(features.mean(dim=0), torch.zeros(features.shape[1]), rtol=0, atol=1e-4)
    few = torch.randperm(300, generator=torch.Generator().manual_seed(0))[:60]
    error = views.error(few)["kl"]["mean"] * N * (1 if task == "classes" else C)
    assert value_of(features, few) / 2 == pytest.approx(error, rel=0.1)


@pytest.mark.parametrize("task", ["classes", "targets"])
def test_the_best_samples_beat_plain_thinning_on_other_rows(tmp_path: Path, task: str) -> None:
    """On rows that neither choice nor certificate saw, over banks of several seeds."""
    module, likelihood = module_of(), Categorical() if task == "classes" else likelihoods.Gaussian()
    gains = []
    for seed in range(8):
        bank = bank_of(module, size=160, seed=seed)
        net = bnn.FunctionalModel(module, bank).settled()
        best = reduction.thin(
            bank, tmp_path / f"best{seed}", best=20, net=net, x=rows_of(96, seed + 50), likelihood=likelihood
        )
        plain = moving.thin(bank, tmp_path / f"plain{seed}", every=8)
        assert len(best) == len(plain) == 20
        fresh = rows_of(200, seed + 100)
        whole = bnn.predict(net, fresh, likelihood=likelihood)
        errors = [
            reduction.compare(whole, bnn.predict(bnn.FunctionalModel(module, few), fresh, likelihood=likelihood))
            for few in (best, plain)
        ]
        gains.append(math.log(errors[1]["kl"]["mean"] / errors[0]["kl"]["mean"]))
    mean, error = statistics.mean(gains), statistics.stdev(gains) / math.sqrt(len(gains))
    assert mean - 3 * error > math.log(1.5), gains


def test_what_thinning_records(tmp_path: Path) -> None:
    module, x = module_of(), rows_of(30)
    bank = bank_of(module, size=80, weighted=True)
    net = bnn.FunctionalModel(module, bank)
    few = reduction.thin(bank, tmp_path / "few", best=9, net=net, x=x)
    found = few.info["thinned"]
    assert (found["best"], found["of"], found["rows"], found["held_out"]) == (9, bank.digest, 30, 7)
    held = x[3::4]
    whole, part = slow_probs(module, bank, held), slow_probs(module, few, held)
    assert found["kl"]["best"]["mean"] == pytest.approx(float(slow_kl(whole, part).mean()), rel=1e-4)
    assert found["kl"]["best"]["largest"] == pytest.approx(float(slow_kl(whole, part).max()), rel=1e-4)
    assert set(found["kl"]) == set(found["total_variation"]) == {"best", "plain", "random"}
    assert not few.log_weight.any()  # chosen to count alike
    places = [next(i for i in range(80) if torch.equal(bank[i]["0.bias"], few[k]["0.bias"])) for k in range(9)]
    assert places == sorted(places)
    assert few.chain.tolist() == [int(bank.chain[i]) for i in places]
    again = reduction.thin(bank, tmp_path / "again", best=9, net=net, x=x)
    assert again.digest == few.digest
    assert again.info["thinned"] == found
    every = reduction.thin(
        bank_of(module), tmp_path / "all", best=S, net=bnn.FunctionalModel(module, bank_of(module)), x=x
    )
    assert len(every) == S
    assert every.info["thinned"]["kl"]["best"]["largest"] < 1e-9


def test_plain_samples_are_spread_over_chains() -> None:
    bank = bank_of(module_of(), size=80)  # four chains of twenty draws, interleaved
    for size in (1, 4, 8, 20, 80):
        places = reduction._spread(bank, size)
        assert len(set(places.tolist())) == size
        counts = torch.bincount(bank.chain[places], minlength=4)
        assert size < 4 or int(counts.max()) == int(counts.min()) == size // 4


def test_thin_refuses_what_it_cannot_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = module_of(), rows_of()
    bank = bank_of(module)
    net = bnn.FunctionalModel(module, bank)
    for best in (0, -1, S + 1):
        with pytest.raises(ConfigError, match=f"best: want 1 to {S} samples, got {best}"):
            reduction.thin(bank, tmp_path / "new", best=best, net=net, x=x)
    with pytest.raises(ConfigError, match="at least 8 probe rows, got 5"):
        reduction.thin(bank, tmp_path / "new", best=3, net=net, x=x[:5])
    monkeypatch.setattr(reduction, "VIEW_BYTES", 8 * S * C * 20)
    with pytest.raises(ConfigError, match=f"at most 20 probe rows, .* got {N}"):
        reduction.thin(bank, tmp_path / "new", best=3, net=net, x=x)
    assert len(reduction.thin(bank, tmp_path / "new", best=3, net=net, x=x[:20])) == 3
