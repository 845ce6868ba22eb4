"""Ensembles against closed forms, and against members that are trained one by one in a plain loop."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from scenarios import classifier, linear_regression
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import bnn
from bnn import likelihoods, priors
from bnn.batches import Sampled
from bnn.errors import BnnError, ConfigError, DataError, FitError
from bnn.fitting import fit
from bnn.inference import ensemble
from bnn.inference.climbing import starts, weighted_batches
from bnn.inference.ensemble import Ensemble, first_look, held_out_score, look, split
from bnn.model import BayesianModel
from bnn.samplers import ClassBalancedSampler
from bnn.seeding import generator, isolated
from bnn.types import Batch, Block, Data, State


def run(method: Ensemble, model: BayesianModel, data: Data, num_samples: int, **options: Any) -> list[Any]:
    return list(method.run(model, data, num_samples=num_samples, **{"seed": 3, **options}))


def flat_of(model: BayesianModel, found: list[tuple[Block, State]]) -> Tensor:
    """All samples as [S, P]."""
    blocks = [block for block, _ in found if block.num_samples]
    return torch.cat([model.unconstrain(block.params) for block in blocks])


def wide_classifier(num_rows: int = 23, *, noise: bool = False) -> tuple[BayesianModel, tuple[Tensor, Tensor]]:
    """The small classifier in float64, where the order of sums does not show; its labels can be noise."""
    model, (x, y) = classifier(num_rows)
    y = torch.randint(0, 3, (num_rows,), generator=generator(2, "noise")) if noise else y
    module = model.module.double()
    prior = priors.Normal(0.0, 10.0 if noise else 1.0)
    return BayesianModel(module, prior=prior, likelihood=model.likelihood, num_data=num_rows), (x.double(), y)


# What is climbed to


def test_every_member_reaches_the_mode_of_a_conjugate_posterior() -> None:
    case = linear_regression()
    method = Ensemble(num_steps=900, batch_size=30, lr=0.1, group_size=3)
    found = run(method, case.model, case.data, 4)
    members = flat_of(case.model, found).double()
    assert members.shape == (4, 5)
    deviations = (members - case.mean).abs() / case.covariance.diagonal().sqrt()
    assert float(deviations.max()) < 1e-3
    assert float((members[0] - members[1]).abs().max()) > 0  # two climbs, not one


def test_the_maximum_is_that_of_the_values_that_are_kept_not_of_their_logarithms() -> None:
    """At the MAP of y ~ N(b, s^2) with priors of b and s, d log joint / ds = 0, without a Jacobian."""
    source = generator(1, "map")
    x, y = torch.zeros(9, 1), 0.5 + 0.3 * torch.randn(9, 1, generator=source)
    module, likelihood = nn.Linear(1, 1).double(), likelihoods.Gaussian(priors.LogNormal(0.0, 1.0))
    model = BayesianModel(module, prior=priors.Normal(), likelihood=likelihood, num_data=9)
    method = Ensemble(num_steps=400, batch_size=9, lr=0.05, group_size=2)
    (block, _) = run(method, model, (x.double(), y.double()), 2)[-1]
    for row in range(2):
        bias = block.params["bias"][row].double().requires_grad_()
        scale = block.params["@likelihood.scale"][row].double().requires_grad_()
        joint = torch.distributions.Normal(bias, scale).log_prob(y.double()).sum()
        joint = joint + torch.distributions.Normal(0.0, 1.0).log_prob(bias).sum()
        joint = joint + torch.distributions.LogNormal(0.0, 1.0).log_prob(scale)
        slopes = torch.autograd.grad(joint, [bias, scale])
        assert max(float(slope.abs()) for slope in slopes) < 0.02  # d log Jacobian / ds = 1 / s is about 3


def test_batches_lead_to_the_mode_too() -> None:
    case = linear_regression()
    found = run(Ensemble(num_steps=600, batch_size=7, lr=0.1, group_size=2), case.model, case.data, 2)
    deviations = (flat_of(case.model, found).double() - case.mean).abs() / case.covariance.diagonal().sqrt()
    assert float(deviations.max()) < 0.2  # the last steps are of 5e-4, whose noise is left


def test_members_differ_and_their_mixture_is_better_than_they_are() -> None:
    model, (x, y) = classifier(60)
    fresh, labels = classifier(400)[1]
    bank = fit(model, (x, y), method=Ensemble(num_steps=300, batch_size=20), num_samples=6, seed=1)
    net = bnn.FunctionalModel(model.module, bank)
    log_probs = net(fresh, slice(None)).log_softmax(dim=-1)  # [6, 400, 3]
    each = -log_probs.gather(-1, labels.expand(6, -1).unsqueeze(-1)).squeeze(-1)  # [6, 400]
    mixture = -(-each).logsumexp(dim=0) + math.log(6)  # [400]
    assert float(mixture.mean()) < float(each.mean()) - 0.001
    for a in range(6):
        for b in range(a):
            assert float((log_probs[a] - log_probs[b]).abs().mean()) > 0.01
    assert float(each.mean()) < 0.8 * math.log(3)  # they have learnt something


# Members are kept apart, and each is one function


def test_members_share_no_memory_and_no_entry() -> None:
    """A list of one object many times would make all members one."""
    model, data = classifier()
    (block, _) = run(Ensemble(num_steps=1, batch_size=7, group_size=4), model, data, 4)[-1]
    for name, values in block.params.items():
        before = values.clone()
        for a in range(4):
            for b in range(a):
                assert not torch.equal(values[a], values[b]), name
        values[1] = 77.0
        assert torch.equal(values[[0, 2, 3]], before[[0, 2, 3]]), name
        assert bool((values[1] == 77.0).all())


def test_layers_at_any_depth_begin_anew() -> None:
    with isolated(0, "nested"):
        module = nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(4, 5)), nn.Tanh()), nn.Linear(5, 3))
    model = BayesianModel(module, prior=priors.Normal(), likelihood=likelihoods.Categorical(), num_data=23)
    (block, _) = run(Ensemble(num_steps=1, lr=1e-9, group_size=3), model, classifier()[1], 3)[-1]
    for name, values in block.params.items():
        own = module.get_parameter(name).detach()
        assert len({row.sum().item() for row in values} | {own.sum().item()}) == 4, name


def test_a_member_is_the_same_function_for_every_batch() -> None:
    model, data = classifier()
    bank = fit(model, data, method=Ensemble(num_steps=20, batch_size=7, group_size=3), num_samples=3)
    net = bnn.FunctionalModel(model.module, bank)
    x = data[0][:7]
    assert torch.equal(net(x, 1), net(x, 1))
    parts = torch.cat([net(x[:2], 1), net(x[2:], 1)])
    torch.testing.assert_close(parts, net(x, 1))
    assert float((net(x, 0) - net(x, 1)).abs().max()) > 0.01


@pytest.mark.parametrize("start", ["reset", "prior"])
def test_members_trained_at_once_are_those_trained_alone(start: Any) -> None:
    model, data = wide_classifier()
    together = run(Ensemble(num_steps=60, batch_size=7, group_size=5, start=start), model, data, 5)
    alone = run(Ensemble(num_steps=60, batch_size=7, group_size=1, start=start), model, data, 5)
    pairs = run(Ensemble(num_steps=60, batch_size=7, group_size=2, start=start), model, data, 5)
    expected = flat_of(model, together)
    assert expected.shape == (5, 43)
    torch.testing.assert_close(flat_of(model, alone), expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(flat_of(model, pairs), expected, rtol=1e-8, atol=1e-8)
    assert torch.cat([block.chain for block, _ in pairs]).tolist() == [0, 1, 2, 3, 4]
    assert torch.cat([block.draw for block, _ in pairs]).tolist() == [0] * 5


# Growth


@pytest.mark.parametrize("patience", [None, 2])
@pytest.mark.parametrize("sizes", [(1, 3), (4, 6), (3, 8), (6, 8)])
def test_a_finished_run_grows_with_the_same_bits(patience: int | None, sizes: tuple[int, int]) -> None:
    model, data = classifier()
    method = Ensemble(num_steps=30, batch_size=7, group_size=3, patience=patience)
    few, many = sizes
    first = run(method, model, data, few)
    rest = run(method, model, data, many, state=first[-1][1])
    whole = run(method, model, data, many)
    assert torch.equal(flat_of(model, first + rest), flat_of(model, whole))
    assert torch.equal(
        torch.cat([block.log_joint for block, _ in first + rest]), torch.cat([block.log_joint for block, _ in whole])
    )
    assert rest[-1][1]["info"] == whole[-1][1]["info"]
    assert rest[-1][1]["step"] == whole[-1][1]["step"] == whole[0][1]["num_steps"]


def test_an_interrupted_run_can_be_asked_for_more() -> None:
    model, data = classifier()
    method = Ensemble(num_steps=70, batch_size=7, group_size=2)
    begun = run(method, model, data, 2)[0]
    assert begun[0].num_samples == 0
    assert begun[1]["step"] == 50
    rest = run(method, model, data, 3, state=begun[1])
    assert torch.equal(flat_of(model, rest), flat_of(model, run(method, model, data, 3)))


# Early stopping


class Slow(NamedTuple):
    flat: Tensor  # [P], best
    score: float
    looks: int  # taken


def slow_member(
    method: Ensemble, model: BayesianModel, data: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]], number: int
) -> Slow:
    """One member by torch's Adam, epoch by epoch, with early stopping as it is told in words."""
    training, (held_x, held_y) = data
    flat = nn.Parameter(starts(model, method.start, number + 1, 3)[number])
    optimizer = torch.optim.Adam([flat], lr=method.lr, maximize=True)
    rows = len(training[1])
    epoch = math.ceil(rows / method.batch_size)
    assert method.patience is not None

    def score() -> float:
        params = model.layout.unflatten(flat.detach())
        log_probs = model.forward(params, held_x).log_softmax(dim=-1)
        return sum(float(log_probs[row, held_y[row]]) for row in range(len(held_y))) / len(held_y)

    best = Slow(flat.detach().clone(), score(), 0)
    waited, looks = 0, 0
    batches = weighted_batches(model, training, method.batch_size, seed=3)
    for step in range(method.num_steps):
        batch, _ = next(batches)
        optimizer.param_groups[0]["lr"] = method.lr * 0.01 ** (step / method.num_steps)
        optimizer.zero_grad()
        params = model.layout.unflatten(flat)
        log_probs = model.forward(params, batch.x).log_softmax(dim=-1)
        # N / B of the batch, times its rows by the mean rows of a batch.
        scale = model.num_data / len(batch.y) * len(batch.y) / (rows / epoch)
        log_likelihood = log_probs[torch.arange(len(batch.y)), batch.y].sum()
        (scale * log_likelihood + torch.distributions.Normal(0.0, model.prior.scale).log_prob(flat).sum()).backward()  # type: ignore[attr-defined]
        optimizer.step()
        if (step + 1) % epoch == 0 or step + 1 == method.num_steps:
            looks += 1
            if (now := score()) > best.score:
                best, waited = Slow(flat.detach().clone(), now, looks), 0
            else:
                waited += 1
            if waited == method.patience:
                break
    return best._replace(looks=looks)


@pytest.mark.parametrize(("num_steps", "patience"), [(30, 4), (151, 4), (110, 99)])
def test_early_stopping_keeps_the_best_as_a_plain_loop_does(num_steps: int, patience: int) -> None:
    model, data = wide_classifier(40, noise=patience == 4)
    method = Ensemble(num_steps=num_steps, batch_size=7, lr=0.05, patience=patience, held_out=0.3, group_size=3)
    training, held = split(data, 0.3, 3)
    assert [len(training[1]), len(held[1])] == [28, 12]
    slow = [slow_member(method, model, (training, held), number) for number in range(5)]
    found = run(method, model, data, 5)
    torch.testing.assert_close(
        flat_of(model, found), torch.stack([one.flat for one in slow]), rtol=1e-6, atol=1e-6, check_dtype=False
    )
    info = found[-1][1]["info"]
    assert info["held_out_per_row"] == pytest.approx(sum(one.score for one in slow) / 5, rel=1e-6)
    if num_steps == 151:  # members stop, at different times
        looks = [one.looks for one in slow]
        assert info["stopped"] == 5
        assert len(set(looks[:3])) > 1
        assert max(looks) * 4 < num_steps
    elif patience == 99:  # members of labels that can be learnt are best late, several states after their start
        assert info["stopped"] == 0
        assert len(found) > 7
    else:
        assert 0 < info["stopped"] < 5


def test_a_stopped_member_does_not_come_back() -> None:
    """Its held-out likelihood would rise again later: with more patience it does."""
    model, data = wide_classifier(40, noise=True)
    options: dict[str, Any] = {"num_steps": 400, "batch_size": 7, "lr": 0.05, "held_out": 0.3, "group_size": 3}
    stopped = run(Ensemble(patience=1, **options), model, data, 3)[-1][1]
    patient = run(Ensemble(patience=90, **options), model, data, 3)[-1][1]
    assert stopped["info"]["stopped"] == 3
    assert stopped["info"]["held_out_per_row"] < patient["info"]["held_out_per_row"]


def test_a_stopped_member_stands_still_while_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ensemble, "STEPS_PER_STATE", 4)
    model, data = wide_classifier(40, noise=True)
    found = run(Ensemble(num_steps=200, batch_size=7, patience=2, held_out=0.3, group_size=4), model, data, 4)
    states = [state for block, state in found if not block.num_samples]
    stood, moved = 0, 0
    for before, after in pairwise(states):
        stopped = before["watch.waited"] >= 2
        still = (before["climb.flat"] == after["climb.flat"]).all(dim=1)
        assert torch.equal(still, stopped)
        assert torch.equal(after["watch.flat"][stopped], before["watch.flat"][stopped])
        stood, moved = stood + int(stopped.sum()), moved + int((~stopped).sum())
    assert stood > 2
    assert moved > 2


def test_a_group_that_has_stopped_ends_its_run_early() -> None:
    model, data = wide_classifier(40, noise=True)
    method = Ensemble(num_steps=1000, batch_size=7, lr=0.05, patience=3, group_size=2)
    found = run(method, model, data, 3)
    steps = [state["step"] for _, state in found]
    assert len(steps) < 12  # of the 42 that two groups have when nobody stops
    assert steps == sorted(set(steps))
    assert steps[-1] == 2003 == found[0][1]["num_steps"]
    assert found[-1][1]["info"]["stopped"] == 3  # not 4: the one that was not asked for does not count


def test_resumes_from_every_state_with_patience() -> None:
    model, data = wide_classifier(40, noise=True)
    method = Ensemble(num_steps=170, batch_size=7, lr=0.02, patience=12, held_out=0.3, group_size=2)
    whole = run(method, model, data, 3)
    assert len(whole) > 4
    for place in range(len(whole) - 1):
        rest = run(method, model, data, 3, state=whole[place][1])
        assert torch.equal(flat_of(model, whole[: place + 1] + rest), flat_of(model, whole)), place
        assert rest[-1][1]["info"] == whole[-1][1]["info"]


def test_the_start_is_kept_where_nothing_is_better() -> None:
    """At the maximum likelihood of the held-out rows themselves every step leads down."""
    model, data = wide_classifier(40)
    method = Ensemble(num_steps=40, batch_size=7, patience=2, group_size=2, lr=3.0)
    params = flat_of(model, run(method, model, data, 2))
    assert torch.equal(params, starts(model, "reset", 2, 3))


def test_split_takes_every_row_once_by_the_seed() -> None:
    x, y = torch.arange(50.0).unsqueeze(1), torch.arange(50)
    training, held = split(({"a": x, "b": (x + 1,)}, y), 0.24, 5)
    assert len(held[1]) == 12
    assert sorted(training[1].tolist() + held[1].tolist()) == list(range(50))
    assert held[1].tolist() == sorted(held[1].tolist()) != list(range(12))
    assert torch.equal(held[0]["a"].squeeze(1).long(), held[1])
    assert torch.equal(training[0]["b"][0].squeeze(1).long() - 1, training[1])
    assert torch.equal(split((x, y), 0.24, 5)[1][1], held[1])
    assert not torch.equal(split((x, y), 0.24, 6)[1][1], held[1])
    subsets = split(TensorDataset(x, y), 0.24, 5)
    assert [int(row[1]) for row in subsets[1]] == held[1].tolist()
    assert [int(row[1]) for row in subsets[0]] == training[1].tolist()
    assert [len(part[1]) for part in split((x[:3], y[:3]), 0.001, 0)] == [2, 1]
    assert [len(part[1]) for part in split((x[:3], y[:3]), 0.999, 0)] == [1, 2]


class Keyed(Dataset[Any]):
    """Rows with a dictionary for x."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, row: int) -> tuple[dict[str, Tensor], Tensor]:
        return {"input": self.x[row]}, self.y[row]


def test_data_sets_are_held_out_as_tensors_are() -> None:
    model, (x, y) = classifier()
    method = Ensemble(num_steps=30, batch_size=7, patience=2, group_size=2)
    expected = flat_of(model, run(method, model, (x, y), 2))
    for data in (Keyed(x, y), TensorDataset(x, y), ({"input": x}, y)):
        assert torch.equal(flat_of(model, run(method, model, data, 2)), expected)


def test_rows_that_cannot_be_held_out_are_refused() -> None:
    model, (x, y) = classifier()
    loader = DataLoader(TensorDataset(x, y), batch_size=7)
    under = Sampled((x, y), ClassBalancedSampler(y, seed=0), True)
    method = Ensemble(num_steps=5, patience=2)
    for data, got in ((loader, "a DataLoader"), (under, "data under a sampler")):
        with pytest.raises(ConfigError, match=rf"Ensemble\(patience=\): want a pair of tensors.* got {got}; pass the"):
            run(method, model, data, 2)
    single = BayesianModel(model.module, prior=model.prior, likelihood=model.likelihood, num_data=1)
    with pytest.raises(ConfigError, match="want two rows at least, got 1"):
        run(method, single, (x[:1], y[:1]), 2)


def test_nan_is_refused_by_its_row_also_where_rows_are_held_out() -> None:
    model, (x, y) = classifier()
    x = x.clone()
    x[17, 2] = torch.nan
    with pytest.raises(DataError, match="NaN or Inf in row 17 of x"):
        run(Ensemble(num_steps=5, patience=2), model, (x, y), 2)


def test_no_number_is_better_than_nan() -> None:
    model, data = wide_classifier()
    flat = starts(model, "reset", 3, 3)
    flat[1, 4] = torch.nan
    scores = held_out_score(model, data, 5, 0)(flat)
    assert scores.isfinite().tolist() == [True, False, True]
    assert float(scores[1]) == -math.inf
    assert torch.equal(look(first_look(flat, scores, None), flat, scores + 1).waited, torch.tensor([0, 1, 0]))
    expected = model.log_likelihood(model.layout.unflatten(flat[2]), Batch(*data)) / 23
    torch.testing.assert_close(scores[2], expected, rtol=1e-10, atol=1e-10)


# Log joints


def test_log_joints_are_those_of_all_rows_or_nan() -> None:
    model, (x, y) = wide_classifier()
    loader, sampler = DataLoader(TensorDataset(x, y), batch_size=7), ClassBalancedSampler(y, seed=0)
    for method in (Ensemble(num_steps=6, batch_size=5, group_size=2, patience=9), Ensemble(num_steps=6, group_size=1)):
        found = run(method, model, (x, y), 3)
        values = torch.cat([block.log_joint for block, _ in found])
        for value, flat in zip(values, flat_of(model, found), strict=True):
            expected = model.log_joint(model.layout.unflatten(flat), Batch(x, y))
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    for data in (loader, Sampled((x, y), sampler, True)):
        block, _ = run(Ensemble(num_steps=6, group_size=2), model, data, 2)[-1]
        assert bool(block.log_joint.isnan().all())


def test_a_sampler_changes_what_is_climbed() -> None:
    model, data = classifier()
    method = Ensemble(num_steps=20, batch_size=7, group_size=2)
    sampler = ClassBalancedSampler(data[1], seed=0)
    bank = fit(model, data, method=method, num_samples=2, sampler=sampler, importance_weights=True)
    plain = fit(model, data, method=method, num_samples=2)
    assert not torch.equal(bank[0]["1.weight"], plain[0]["1.weight"])
    assert bool(bank.log_joint.isnan().all())
    assert not bool(plain.log_joint.isnan().any())


# Checkpoints


class Buffered(nn.Module):
    """A classifier with buffers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with isolated(seed, "buffered"):
            self.body = nn.Linear(4, 5)
            self.norm = nn.BatchNorm1d(5)
            self.head = nn.Linear(5, 3)
            nn.init.normal_(self.norm.weight)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.body(x))))


def saved(folder: Path, count: int) -> tuple[str, ...]:
    paths = tuple(str(folder / f"member-{number}.safetensors") for number in range(count))
    for number, path in enumerate(paths):
        save_file(Buffered(number + 1).state_dict(), path)
    return paths


def buffered(**options: Any) -> BayesianModel:
    given = {"likelihood": likelihoods.Categorical(), "num_data": 23, "prior": priors.Normal(), **options}
    return BayesianModel(Buffered(0), **given)


@pytest.mark.parametrize("group_size", [2, 5])
def test_checkpoints_are_the_samples_bit_for_bit_without_steps(tmp_path: Path, group_size: int) -> None:
    model, data, paths = buffered(), classifier()[1], saved(tmp_path, 3)
    bank = fit(model, data, method=Ensemble(num_steps=0, checkpoints=paths, group_size=group_size), num_samples=3)
    assert bank.chain.tolist() == [0, 1, 2]
    for number in range(3):
        expected = dict(Buffered(number + 1).named_parameters())
        assert all(torch.equal(bank[number][name], value) for name, value in expected.items())
        assert list(bank[number]) == list(expected)
        params = {name: value.detach() for name, value in expected.items()}
        assert float(bank.log_joint[number]) == pytest.approx(float(model.log_joint(params, Batch(*data))), rel=1e-5)


def test_checkpoints_are_where_members_start(tmp_path: Path) -> None:
    model, data, paths = buffered(), classifier()[1], saved(tmp_path, 3)
    bank = fit(model, data, method=Ensemble(num_steps=1, lr=0.01, checkpoints=paths, group_size=2), num_samples=3)
    for number in range(3):
        change = (bank[number]["head.weight"] - Buffered(number + 1).head.weight.detach()).abs()
        assert float(change.max()) == pytest.approx(0.01, rel=1e-3)  # the first step of Adam is one learning rate


def test_a_run_from_checkpoints_resumes(tmp_path: Path) -> None:
    model, data, paths = buffered(), classifier()[1], saved(tmp_path, 3)
    method = Ensemble(num_steps=60, batch_size=7, checkpoints=paths, group_size=2)
    whole = run(method, model, data, 3)
    for place in range(len(whole) - 1):
        rest = run(method, model, data, 3, state=whole[place][1])
        assert torch.equal(flat_of(model, whole[: place + 1] + rest), flat_of(model, whole)), place
    kept = fit(model, data, method=method, num_samples=3, out=tmp_path / "bank", seed=3)
    again = fit(model, data, method=method, num_samples=3, out=tmp_path / "bank", seed=3, resume=True)
    assert torch.equal(model.unconstrain(again.block(slice(None)).params), flat_of(model, whole))
    assert len(kept) == len(again)


def test_unknowns_that_no_checkpoint_has_start_at_their_default(tmp_path: Path) -> None:
    model = buffered(likelihood=likelihoods.Gaussian(priors.HalfCauchy(1.0)))
    data = classifier()[1][0], torch.randn(23, 3, generator=generator(0, "targets"))
    method = Ensemble(num_steps=0, checkpoints=saved(tmp_path, 2))
    bank = fit(model, data, method=method, num_samples=2)
    assert float(bank[1]["@likelihood.scale"]) == float(model.module_params()["@likelihood.scale"])


def test_checkpoints_of_a_partly_bayesian_module(tmp_path: Path) -> None:
    """What is not in the sample must be the module's own: else each member would be run with the layers of another."""
    data, paths = classifier()[1], saved(tmp_path, 2)
    model = buffered(bayesian=["head"])
    method = Ensemble(num_steps=0, checkpoints=paths)
    with pytest.raises(DataError, match=r"member-0\.safetensors: want the module's values of 'body\.weight'"):
        fit(model, data, method=method, num_samples=2)
    own = model.module.state_dict()
    for path in paths:
        save_file({**own, **{n: t for n, t in load_file(path).items() if n.startswith("head")}}, path)
    bank = fit(model, data, method=method, num_samples=2)
    assert list(bank[0]) == ["head.weight", "head.bias"]
    assert torch.equal(bank[1]["head.weight"], Buffered(2).head.weight)


def test_checkpoints_with_other_buffers_are_refused(tmp_path: Path) -> None:
    paths = saved(tmp_path, 2)
    save_file({**load_file(paths[1]), "norm.running_mean": torch.ones(5)}, paths[1])
    with pytest.raises(DataError, match=r"member-1\.safetensors: want the module's values of 'norm\.running_mean'"):
        fit(buffered(), classifier()[1], method=Ensemble(num_steps=0, checkpoints=paths), num_samples=2)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"head.bias": None}, r"member-1\.safetensors: want 'head\.bias' \[3\] of torch\.float32, got nothing"),
        ({"head.bias": torch.zeros(4)}, r"member-1\.safetensors: want 'head\.bias' \[3\] of .*, got \[4\] of"),
        ({"head.bias": torch.zeros(3, dtype=torch.int32)}, r"member-1.*'head\.bias' .* got \[3\] of torch\.int32"),
        ({"head.bias": torch.full((3,), torch.nan)}, r"member-1.*want finite numbers in 'head\.bias'"),
    ],
)
def test_checkpoints_of_another_module_are_refused(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    paths = saved(tmp_path, 2)
    tensors = {**load_file(paths[1]), **change}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, paths[1])
    with pytest.raises(DataError, match=match):
        fit(buffered(), classifier()[1], method=Ensemble(num_steps=0, checkpoints=paths), num_samples=2)


def test_checkpoints_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"got runs/a\.pt; load .* torch\.load\(path, weights_only=True\).*from_state"
    ):
        Ensemble(checkpoints=("runs/a.pt",))
    (tmp_path / "a.safetensors").write_bytes(b"not one")
    for name, got in (("a", "safetensors file, got"), ("b", "got none")):
        method = Ensemble(num_steps=0, checkpoints=(str(tmp_path / f"{name}.safetensors"),))
        with pytest.raises(DataError, match=got):
            fit(buffered(), classifier()[1], method=method, num_samples=1)
    with pytest.raises(ConfigError, match="num_samples: want 1, one a checkpoint, got 2"):
        fit(buffered(), classifier()[1], method=Ensemble(num_steps=0, checkpoints=("a.safetensors",)), num_samples=2)


# Modules of other kinds


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with isolated(seed, "tied"):
            self.encode, self.decode = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.head = nn.Linear(4, 3)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.decode(torch.tanh(self.encode(x))))


def test_tied_weights_are_one(tmp_path: Path) -> None:
    module, data = Tied(0), classifier()[1]
    model = BayesianModel(module, prior=priors.Normal(), likelihood=likelihoods.Categorical(), num_data=23)
    bank = fit(model, data, method=Ensemble(num_steps=20, batch_size=7, group_size=3), num_samples=3)
    assert list(bank[0]) == ["encode.weight", "head.weight", "head.bias"]
    member, sample = Tied(9), bank[2]
    member.load_state_dict({**sample, "decode.weight": sample["encode.weight"]})
    assert member.decode.weight is member.encode.weight
    torch.testing.assert_close(bnn.FunctionalModel(module, bank)(data[0], 2), member(data[0]))
    paths = tuple(str(tmp_path / f"{number}.safetensors") for number in range(2))
    for number, path in enumerate(paths):
        save_model(Tied(number + 1), path)
    assert set(load_file(paths[0])) == {"decode.weight", "head.weight", "head.bias"}  # under its other name
    kept = fit(model, data, method=Ensemble(num_steps=0, checkpoints=paths), num_samples=2)
    assert torch.equal(kept[1]["encode.weight"], Tied(2).encode.weight)


def test_some_layers_only() -> None:
    model, data = classifier()
    part = BayesianModel(model.module, prior=model.prior, likelihood=model.likelihood, num_data=23, bayesian="3")
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    bank = fit(part, data, method=Ensemble(num_steps=60, batch_size=7, patience=20, group_size=2), num_samples=3)
    assert list(bank[0]) == ["3.weight", "3.bias"]
    assert len({float(bank[number]["3.weight"].sum()) for number in range(3)}) == 3
    assert all(torch.equal(before[name], tensor) for name, tensor in model.module.state_dict().items())
    assert torch.equal(bank.base()["1.weight"], before["1.weight"])
    outputs = model.module[3].bias + 0 * data[0][:, :1]  # type: ignore[index]
    assert bnn.FunctionalModel(model.module, bank)(data[0], 1).shape == outputs.shape


class Branching(nn.Module):
    """Its way depends on a value of its parameters, which vmap over them cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        with isolated(0, "branching"):
            self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.layer(x)
        return outputs if self.layer.bias.sum().item() > 0 else -outputs


def test_what_vmap_cannot_take_is_trained_one_by_one() -> None:
    model = BayesianModel(Branching(), prior=priors.Normal(), likelihood=likelihoods.Categorical(), num_data=23)
    options: dict[str, Any] = {"num_steps": 40, "batch_size": 7, "patience": 9}
    found = run(Ensemble(group_size=1, **options), model, classifier()[1], 2)
    assert flat_of(model, found).shape == (2, 15)
    with pytest.raises(RuntimeError, match="item"):
        run(Ensemble(group_size=2, **options), model, classifier()[1], 2)


def test_members_that_would_all_be_equal_are_refused() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    model = BayesianModel(Bare(), prior=priors.Normal(), likelihood=likelihoods.Categorical(), num_data=23)
    for group_size in (1, 3):
        method = Ensemble(num_steps=5, group_size=group_size)
        with pytest.raises(ConfigError, match=r"want a layer with reset_parameters.* pass start='prior'"):
            run(method, model, classifier()[1], 3)
    assert len(flat_of(model, run(Ensemble(num_steps=5, start="prior"), model, classifier()[1], 3))) == 3


# Options and failures


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_steps": 0}, r"Ensemble\(num_steps=\): want at least 1, got 0"),
        ({"num_steps": -1, "checkpoints": ("a.safetensors",)}, r"Ensemble\(num_steps=\): want at least 0, got -1"),
        ({"batch_size": 0}, r"Ensemble\(batch_size=\)"),
        ({"group_size": 0}, r"Ensemble\(group_size=\)"),
        ({"patience": 0}, r"Ensemble\(patience=\): want at least 1"),
        ({"held_out": 0.0}, r"Ensemble\(held_out=\): want a share in \(0, 1\)"),
        ({"held_out": 1.0}, r"Ensemble\(held_out=\)"),
        ({"lr": 0.0}, r"Ensemble\(lr=\)"),
        ({"lr": math.nan}, r"Ensemble\(lr=\)"),
        ({"start": "module"}, r"Ensemble\(start=\): want one of reset, prior, got 'module'"),
        ({"start": "prior", "checkpoints": ("a.safetensors",)}, r"Ensemble\(start=\): want none with checkpoints="),
        ({"checkpoints": (3,)}, r"Ensemble\(checkpoints=\): want a tuple of paths"),
        ({"checkpoints": "a.safetensors"}, r"Ensemble\(checkpoints=\): want a tuple of paths"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(BnnError, match=match):
        Ensemble(**options)


@pytest.mark.parametrize("patience", [None, 3])
def test_a_climb_that_diverges_says_at_which_step(patience: int | None) -> None:
    model, data = classifier()
    with pytest.raises(FitError, match=r"Ensemble: .* at step 1; the last good one was -[\d.]+; lower lr"):
        run(Ensemble(num_steps=200, lr=1e30, patience=patience), model, data, 3)


def test_diagnostics_are_of_a_row() -> None:
    model, data = wide_classifier()
    found = run(Ensemble(num_steps=300, batch_size=23, lr=0.05, group_size=2), model, data, 2)
    info = found[-1][1]["info"]
    assert set(info) == {"log_joint_per_row"}
    assert info["log_joint_per_row"] == pytest.approx(float(found[-1][0].log_joint.mean()) / 23, rel=1e-3)


class Last(nn.Module):
    """The last output of a recurrent layer over two positions of two inputs."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.body, self.head = kind(2, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.body(x.unflatten(1, (2, 2)))
        return self.head(outputs[:, -1])


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch, of nn.LSTM under vmap
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_are_trained_side_by_side(kind: type[nn.RNNBase]) -> None:
    """vmap has no rule for them where no gradient is asked for."""
    _, data = classifier()
    model = BayesianModel(Last(kind), prior=priors.FanIn(1.5), likelihood=likelihoods.Categorical(), num_data=23)
    found = run(Ensemble(num_steps=4, batch_size=7, group_size=3, patience=2), model, data, 3)
    block = found[-1][0]
    assert block.num_samples == 3
    assert bool(block.log_joint.isfinite().all())
