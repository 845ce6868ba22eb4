"""Gradients on batches, against autograd by hand; traces of them, against those through Python."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from scenarios import classifier
from torch import Tensor, nn

from bnn import likelihoods, priors
from bnn.inference import gradients
from bnn.inference.gradients import STEPS_BEFORE_TRACING, alike, gradient_of
from bnn.model import BayesianModel
from bnn.seeding import generator
from bnn.tracing import trace
from bnn.types import Batch

LATE = STEPS_BEFORE_TRACING


class Case(NamedTuple):
    model: BayesianModel
    batch: Batch
    flat: Tensor  # [3, P]


@pytest.fixture
def noisy() -> Case:
    """A regression in float64 with a learnt scale: P = 4 * 5 + 5 + 5 * 2 + 2 + 1 = 38."""
    source = generator(5, "climbing")
    x, y = torch.randn(11, 4, generator=source).double(), torch.randn(11, 2, generator=source).double()
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    likelihood = likelihoods.Gaussian(priors.LogNormal(-0.3, 0.8))
    model = BayesianModel(module, prior=priors.Normal(0.0, 0.7), likelihood=likelihood, num_data=29, temperature=0.5)
    return Case(model, Batch(x, y), 0.4 * torch.randn(3, 38, generator=source).double())


@pytest.mark.parametrize("constrained", [False, True])
def test_gradients_of_several_positions_are_those_of_each(noisy: Case, constrained: bool) -> None:
    gradient = gradient_of(noisy.model, constrained=constrained)
    slopes, heights = gradient(noisy.flat, noisy.batch, 1.3, 0)
    assert slopes.shape == (3, 38)
    assert heights.shape == (3,)
    assert not slopes.requires_grad
    assert not heights.requires_grad
    for row in range(3):
        slope, height = gradient(noisy.flat[row : row + 1], noisy.batch, 1.3, 0)
        assert slope.shape == (1, 38)
        torch.testing.assert_close(slope[0], slopes[row], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(height[0], heights[row], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("constrained", [False, True])
def test_gradients_are_those_of_the_log_density_by_hand(noisy: Case, constrained: bool) -> None:
    """T log density = N / B * weight * log likelihood + log prior + T * log Jacobian, with autograd's derivative."""
    _, batch, flat = noisy
    slopes, heights = gradient_of(noisy.model, constrained=constrained)(flat, batch, 0.8, 0)
    for row in range(3):
        u = flat[row].clone().requires_grad_()
        first, one, second, two, log_scale = u.split([20, 5, 10, 2, 1])
        mean = torch.tanh(batch.x @ first.view(5, 4).T + one) @ second.view(2, 5).T + two
        likelihood = torch.distributions.Normal(mean, log_scale.exp()).log_prob(batch.y).sum()
        prior = torch.distributions.Normal(0.0, 0.7).log_prob(u[:-1]).sum()
        prior = prior + torch.distributions.LogNormal(-0.3, 0.8).log_prob(log_scale.exp()).sum()
        expected = (0.8 * 29 / 11 * likelihood + prior) / 0.5
        expected = expected if constrained else expected + log_scale.sum()
        expected.backward()
        torch.testing.assert_close(heights[row], expected.detach(), rtol=1e-5, atol=1e-5)
        assert u.grad is not None
        torch.testing.assert_close(slopes[row], u.grad, rtol=1e-5, atol=1e-5)


# Traces


class Mixed(nn.Module):
    """Convolutions and layers whose slopes torch writes in other operations where they may have slopes of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.last = nn.Linear(4 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.silu(self.norm(self.first(x)))
        return self.last(nn.functional.gelu(hidden).flatten(1))


class Branching(nn.Module):
    """Asks for a number in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if float(x.sum()) > 0 else self.layer(-2 * x)


class Numpy(nn.Module):
    """Takes numbers of a batch by a way that a trace does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * float(x.numpy().mean())


class Pair(nn.Module):
    """Of two inputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.layer(left) * right


def model_with(module: nn.Module) -> BayesianModel:
    return BayesianModel(module, prior=priors.FanIn(), likelihood=likelihoods.Categorical(), num_data=40)


def batch_of(number: int, *shape: int, rows: int = 7, weighted: bool = False) -> Batch:
    source = generator(3, "batch", number)
    x, y = torch.randn(rows, *shape, generator=source), torch.randint(3, (rows,), generator=source)
    return Batch(x, y, torch.rand(rows, generator=source) if weighted else None)


def positions(model: BayesianModel, num: int) -> Tensor:
    return 0.3 * torch.randn(num, model.layout.num_values, generator=generator(4, "positions"))


def num_traced(gradient: Any) -> int:
    """Forms of batches that are taken by a trace."""
    return sum(kept.graph is not None for kept in gradient._kept.values())


def traces_of(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is traced from now on."""
    found: list[Any] = []

    def noted(*given: Any) -> Any:
        found.append(trace(*given))
        return found[-1]

    monkeypatch.setattr(gradients, "trace", noted)
    return found


def assert_same(gradient: Any, other: Callable[..., Any], flat: Tensor, batch: Batch, weight: float = 1.0) -> None:
    """A late step gives what Python gives."""
    slopes, heights = gradient(flat, batch, weight, LATE)
    expected, at = other(flat, batch, weight, 0)
    torch.testing.assert_close(slopes, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    torch.testing.assert_close(heights, at, rtol=1e-6, atol=1e-6)
    assert not slopes.requires_grad


@pytest.mark.parametrize("num", [1, 3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("module", ["mlp", "mixed"])
def test_late_steps_are_traced_and_give_the_same(module: str, weighted: bool, num: int) -> None:
    torch.manual_seed(0)
    model = model_with(Mixed() if module == "mixed" else nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 3)))
    shape = (1, 3, 3) if module == "mixed" else (4,)
    flat, gradient, other = positions(model, num), gradient_of(model), gradient_of(model)
    for number in range(5):
        assert_same(gradient, other, flat + 0.1 * number, batch_of(number, *shape, weighted=weighted))
    assert num_traced(gradient) == 1
    assert not other._kept  # type: ignore[attr-defined]


def test_each_form_of_batch_has_a_trace_of_its_own() -> None:
    """By rows, weight of the likelihood, importance weights or none, number of positions, and dtype."""
    model, _ = classifier()
    gradient, other = gradient_of(model), gradient_of(model)
    for number in range(3):
        for num in (1, 2):
            for rows, weight, weighted in ((7, 1.0, False), (5, 1.0, False), (5, 0.4, False), (5, 0.4, True)):
                batch = batch_of(number, 4, rows=rows, weighted=weighted)
                assert_same(gradient, other, positions(model, num), batch, weight)
    assert num_traced(gradient) == 8


def test_inputs_may_be_nested() -> None:
    model = model_with(Pair())
    gradient, other = gradient_of(model), gradient_of(model)
    for number in range(4):
        left = batch_of(number, 4)
        assert_same(gradient, other, positions(model, 2), Batch({"left": left.x, "right": left.x[:, :1]}, left.y))
    assert num_traced(gradient) == 1


def test_an_object_among_the_inputs_is_left_to_python() -> None:
    """Its state may change, and no trace sees it."""

    class Factor:
        value = 1.0

    class Scaled(Pair):
        def forward(self, left: Tensor, factor: Factor) -> Tensor:  # type: ignore[override]
            return self.layer(left) * factor.value

    model, factor = model_with(Scaled()), Factor()
    gradient, other = gradient_of(model), gradient_of(model)
    for number in range(4):
        factor.value = number + 1.0
        left = batch_of(number, 4)
        assert_same(gradient, other, positions(model, 1), Batch({"left": left.x, "factor": factor}, left.y))
    assert num_traced(gradient) == 0


@pytest.mark.parametrize("module", [Branching, Numpy])
def test_what_a_trace_cannot_see_is_left_to_python(module: Callable[[], nn.Module]) -> None:
    """A branch on values ends the trace; numbers that were taken past it differ on the next batch."""
    model = model_with(module())
    gradient, other = gradient_of(model), gradient_of(model)
    for number in range(6):
        assert_same(gradient, other, positions(model, 1), batch_of(number, 4))
    assert num_traced(gradient) == 0


def test_a_run_that_goes_on_gets_the_same_bits() -> None:
    """Whether a step is traced follows from its number, not from how many there were in this process."""
    model, _ = classifier()
    flat, steps = positions(model, 3), range(LATE + 6)
    whole = gradient_of(model)
    found = [whole(flat, batch_of(step, 4), 1.0, step) for step in steps]
    for start in (LATE - 3, LATE, LATE + 3):
        resumed = gradient_of(model)
        for step in steps[start:]:
            slopes, heights = resumed(flat, batch_of(step, 4), 1.0, step)
            assert torch.equal(slopes, found[step][0])
            assert torch.equal(heights, found[step][1])


def test_no_more_forms_are_traced_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of any length would cost a trace a step; those that have one keep it."""
    monkeypatch.setattr(gradients, "MOST_FORMS", 2)
    traces = traces_of(monkeypatch)
    model, _ = classifier()
    gradient, other = gradient_of(model), gradient_of(model)
    for rows in (3, 4, 3, 5, 6, 3, 4, 5):
        assert_same(gradient, other, positions(model, 1), batch_of(rows, 4, rows=rows))
    assert len(traces) == num_traced(gradient) == 2


class Counting(nn.Module):
    """Writes into a buffer that its outputs hang on: a sample sees what the buffer was, plus one step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("shift", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.shift[1:].add_(1e-3)
        found: Tensor = self.layer(x) + self.shift
        return found


class InPlace(nn.Module):
    """Writes into its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x.sub_(1.0).mul_(3.0))
        return found


class Dropping(nn.Module):
    """Leaves a layer out by a number that Python draws."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        return found if random.random() < 2.0 else 0.0 * found


@pytest.mark.parametrize("module", [InPlace, Dropping])
def test_what_writes_or_draws_is_left_to_python(module: Callable[[], nn.Module]) -> None:
    """And each batch is seen once: a trace that was tried has not changed it, nor drawn."""
    model = model_with(module())
    gradient, other = gradient_of(model), gradient_of(model)
    for number in range(4):
        batch, again = batch_of(number, 4), batch_of(number, 4)
        stream = random.getstate()
        found = gradient(positions(model, 1), batch, 1.0, LATE)
        after = random.getstate()
        random.setstate(stream)
        expected = other(positions(model, 1), again, 1.0, 0)
        assert random.getstate() == after
        assert torch.equal(found[0], expected[0])
        assert torch.equal(batch.x, again.x)
    assert num_traced(gradient) == 0


def test_a_buffer_that_is_written_is_new_at_each_call_of_a_trace() -> None:
    model = model_with(Counting())
    gradient, other = gradient_of(model), gradient_of(model)
    for number in range(8):
        assert_same(gradient, other, positions(model, 1), batch_of(number, 4))
    assert num_traced(gradient) == 1
    assert torch.equal(dict(model.module.named_buffers())["shift"], torch.zeros(3))


class Sized(nn.Module):
    """Cuts by numbers that it reads past the trace."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = int((x.numpy()[:, 0] > 0).sum())
        parts = torch.split(x, [first, len(x) - first])
        found: Tensor = torch.cat([self.layer(part) * (number + 1) for number, part in enumerate(parts)])
        return found


def test_a_size_past_the_trace_is_found_out() -> None:
    model = model_with(Sized())
    gradient, other = gradient_of(model), gradient_of(model)
    for number in range(6):
        assert_same(gradient, other, positions(model, 1), batch_of(number, 4))
    assert num_traced(gradient) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tensors_are_alike_to_half_their_digits(dtype: torch.dtype) -> None:
    """Each by its own largest number, so that small ones do not hide behind others."""
    one = torch.tensor([100.0, -1.0], dtype=dtype), torch.tensor([1e-3, math.nan], dtype=dtype)
    half = torch.finfo(dtype).eps ** 0.5
    assert alike(one, one)
    near = one[0], one[1] * (1 + 0.5 * half)
    far = one[0], one[1] * (1 + 4.0 * half)
    assert alike(near, one)
    assert not alike(far, one)
    assert not alike(one[:1], one)
    assert not alike((one[0], torch.zeros(2, dtype=dtype)), one)


def test_autocast_goes_through_python() -> None:
    model, _ = classifier()
    gradient = gradient_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        gradient(positions(model, 1), batch_of(0, 4), 1.0, LATE)
    assert num_traced(gradient) == 0
    assert_same(gradient, gradient_of(model), positions(model, 1), batch_of(1, 4))


@pytest.mark.parametrize("num", [1, 2])
def test_a_height_that_nothing_moves_has_no_slope(num: int) -> None:
    model, _ = classifier()

    class Still(BayesianModel):
        def log_density(self, flat: Tensor, batch: Batch, *, weight: float = 1.0) -> tuple[Tensor, Tensor]:
            return torch.tensor(3.0), torch.tensor(3.0)

    still = Still(model.module, prior=model.prior, likelihood=model.likelihood, num_data=40)
    gradient = gradient_of(still)
    for step in (0, LATE, LATE, LATE, LATE):
        slopes, heights = gradient(positions(still, num), batch_of(0, 4), 1.0, step)
        assert torch.equal(slopes, torch.zeros(num, still.layout.num_values))
        assert torch.equal(heights, torch.full((num,), 3.0))


def test_positions_and_batches_are_left_as_they_were() -> None:
    """Also by traces, whose results write over what they are made of."""
    model, _ = classifier()
    gradient, flat, batch = gradient_of(model), positions(model, 2), batch_of(0, 4, weighted=True)
    kept, x, y, weight = flat.clone(), batch.x.clone(), batch.y.clone(), batch.weight.clone()  # type: ignore[union-attr]
    first = [gradient(flat, batch, 1.0, LATE) for _ in range(4)]
    assert num_traced(gradient) == 1
    assert torch.equal(flat, kept)
    assert torch.equal(batch.x, x)
    assert torch.equal(batch.y, y)
    assert batch.weight is not None
    assert torch.equal(batch.weight, weight)
    assert all(torch.equal(one[0], first[0][0]) for one in first)
