"""Densities of many positions against autograd on one at a time, and the rule by which they are computed."""

from __future__ import annotations

import math
import shutil
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from scenarios import classifier
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from bnn import likelihoods, priors
from bnn.errors import ConfigError, FitError
from bnn.inference import density as density_module
from bnn.inference.costs import cost_of, record
from bnn.inference.density import (
    Plan,
    Prepared,
    Target,
    prepare,
    target_of_function,
    target_of_model,
    threads,
)
from bnn.model import BayesianModel
from bnn.modules import build
from bnn.seeding import generator, isolated
from bnn.tracing import has_compiler, trace
from bnn.types import Batch

CHAINS = 3
PLENTY = 1024**3


class Case(NamedTuple):
    model: BayesianModel
    batch: Batch


class Tied(nn.Module):
    """Words in, scores of words out, through one table."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.mixing = nn.Linear(4, 4)
        self.scores = nn.Linear(4, 7, bias=False)
        self.scores.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.scores(torch.tanh(self.mixing(self.embedding(words).mean(dim=1))))


class Two(nn.Module):
    """Inputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 5), nn.Linear(2, 5)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.tanh(self.left(left)) * self.right(right)


def normalised() -> nn.Module:
    """Batch norm in eval mode: its buffers are no constants of nought and one."""
    norm = nn.BatchNorm1d(5)
    norm.running_mean, norm.running_var = torch.linspace(-0.3, 0.4, 5), torch.linspace(0.5, 2.0, 5)
    return nn.Sequential(nn.Linear(4, 5), norm, nn.Tanh(), nn.Linear(5, 2)).eval()


def convolution() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 4)
    ).eval()


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


CASES = ("plain", "weighted", "unknown scales", "batch norm", "convolution", "tied", "by name", "part", "cold")


def case_of(name: str, dtype: torch.dtype = torch.float64, num_rows: int = 23) -> Case:
    """A model of each kind with rows of its own; what is shared differs in size from everything else."""
    source = generator(0, "rows of", name)
    modules: dict[str, Callable[[], nn.Module]] = {
        "batch norm": normalised,
        "convolution": convolution,
        "tied": Tied,
        "by name": Two,
    }
    with isolated(1, name):
        module = modules.get(name, plain)().to(dtype)
    x: Any = torch.randn(num_rows, 4, generator=source, dtype=dtype)
    y = torch.randn(num_rows, 2, generator=source, dtype=dtype)
    if name == "convolution":
        x = torch.randn(num_rows, 2, 6, 6, generator=source, dtype=dtype)
        y = torch.randint(4, (num_rows,), generator=source)
    if name == "tied":
        x = torch.randint(7, (num_rows, 6), generator=source)
        y = torch.randint(7, (num_rows,), generator=source)
    if name == "by name":
        x = {"left": torch.randn(num_rows, 3, generator=source, dtype=dtype), "right": x[:, :2].clone()}
        y = torch.randn(num_rows, 5, generator=source, dtype=dtype)
    likelihood: Any = likelihoods.Gaussian(0.8) if y.is_floating_point() else likelihoods.Categorical()
    prior: Any = priors.Normal(0.1, 1.3)
    if name == "unknown scales":
        likelihood, prior = likelihoods.Gaussian(priors.HalfCauchy(0.6)), priors.Normal(0.0, priors.HalfCauchy(1.5))
    weight = torch.rand(num_rows, generator=source, dtype=dtype) * 2 if name == "weighted" else None
    model = BayesianModel(
        module,
        prior=prior,
        likelihood=likelihood,
        num_data=num_rows,
        bayesian="0.*" if name == "part" else "*",
        temperature=0.4 if name == "cold" else 1.0,
    )
    return Case(model, Batch(x, y, weight))


def positions_of(model: BayesianModel, dtype: torch.dtype = torch.float64) -> Tensor:
    return 0.6 * torch.randn(CHAINS, model.layout.num_values, generator=generator(2, "positions"), dtype=dtype)


def one_at_a_time(case: Case, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The slow obvious version: log density [C], log joint [C] and gradient [C, P] by autograd, chain after chain."""
    values, joints, slopes = [], [], []
    for row in flat:
        u = row.clone().requires_grad_()
        value, _ = case.model.log_density(u, case.batch)
        value.backward()
        assert u.grad is not None
        values.append(value.detach().double())
        slopes.append(u.grad)
        joints.append(case.model.log_joint(case.model.constrain(row)[0], case.batch).detach().double())
    return torch.stack(values), torch.stack(joints), torch.stack(slopes)


def quadratic(u: Tensor) -> Tensor:
    return -0.5 * (u.square() * torch.arange(1.0, 6.0).to(u)).sum()


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_autograd_one_chain_at_a_time(name: str) -> None:
    """Whole, and as sums over unlike slices of rows; traced and eager are the same operations, bit for bit."""
    case = case_of(name)
    flat = positions_of(case.model)
    value, joint, gradient = one_at_a_time(case, flat)
    target = target_of_model(case.model, case.batch)
    digits = 1e-6 if case.model.unknowns else 1e-12  # unknowns of a model are float32, whatever its module is
    for slices in (1, 4):  # 23 rows in slices of 5 and 6
        traced = Prepared(target, Plan("traced", slices, 1), flat)(flat)
        for found, expected in zip(traced, (value, joint, gradient), strict=True):
            torch.testing.assert_close(found, expected, rtol=digits, atol=digits * float(expected.abs().max()))
        eager = Prepared(target, Plan("eager", slices, 0), flat)(flat)
        assert all(torch.equal(a, b) for a, b in zip(traced, eager, strict=True))


@pytest.mark.parametrize("name", ["plain", "convolution", "tied"])
def test_traced_is_eager_in_float32_too_at_positions_that_were_not_traced(name: str) -> None:
    case = case_of(name, torch.float32)
    flat = positions_of(case.model, torch.float32)
    target = target_of_model(case.model, case.batch)
    traced, eager = (Prepared(target, Plan(mode, 1, 1), torch.zeros_like(flat)) for mode in ("traced", "eager"))  # type: ignore[arg-type]
    for found, expected in zip(traced(flat), eager(flat), strict=True):
        assert torch.equal(found, expected)
    assert traced(flat).gradient.dtype == torch.float32
    assert traced(flat).log_density.dtype == traced(flat).log_joint.dtype == torch.float64
    _, joint, gradient = one_at_a_time(case, flat)
    torch.testing.assert_close(traced(flat).log_joint, joint, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(traced(flat).gradient, gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["plain", "weighted"])
def test_any_number_of_slices_gives_the_gradient_of_all_rows(name: str) -> None:
    case = case_of(name)
    flat = positions_of(case.model)
    target = target_of_model(case.model, case.batch)
    whole = Prepared(target, Plan("eager", 1, 0), flat)(flat)
    for count in (2, 3, 7, 22, 23):
        sizes = [len(tensors[0]) for _, tensors in target.slices(count)]
        assert len(sizes) == count
        assert sum(sizes) == 23
        assert max(sizes) - min(sizes) == (23 % count > 0)
        assert math.isclose(sum(share for share, _ in target.slices(count)), 1.0)
        cut = Prepared(target, Plan("eager", count, 0), flat)(flat)
        for found, expected in zip(cut, whole, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))


def test_slices_cover_every_row_once_with_its_own_target_and_weight() -> None:
    case = case_of("weighted")
    pieces = [tensors for _, tensors in target_of_model(case.model, case.batch).slices(5)]
    x, y, weight = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    assert torch.equal(x, case.batch.x)
    assert torch.equal(y, case.batch.y)
    assert case.batch.weight is not None
    assert torch.equal(weight, case.batch.weight)


def test_a_context_is_given_a_slice_a_chain() -> None:
    """log pi_c(u) = -1/2 |u - m_c|^2: the gradient of chain c is m_c - u."""
    means, flat = torch.randn(3, 5, generator=generator(0)), torch.randn(3, 5, generator=generator(1))
    target = target_of_function(lambda u, mean: -0.5 * (u - mean).square().sum(), means)
    for mode in ("traced", "eager"):
        found = Prepared(target, Plan(mode, 1, 1), flat)(flat)  # type: ignore[arg-type]
        torch.testing.assert_close(found.gradient, means - flat)
        torch.testing.assert_close(found.log_density, -0.5 * (flat - means).square().sum(dim=1).double())
        assert torch.equal(found.log_joint, found.log_density)


def test_values_are_summed_in_float64() -> None:
    """The log likelihood of 4,000 rows in float32, of which a float32 sum would lose the last digits."""
    source = generator(0, "sums")
    x, y = torch.randn(4000, 1, generator=source), 300 * torch.randn(4000, 1, generator=source)
    model = BayesianModel(
        nn.Linear(1, 1), prior=priors.Normal(), likelihood=likelihoods.Gaussian(1.0), num_data=4000, bayesian="weight"
    )
    with torch.no_grad():
        model.module.bias.zero_()  # type: ignore[union-attr, operator]
    flat = torch.tensor([[0.25], [0.25 + 2**-20]])
    found = Prepared(target_of_model(model, Batch(x, y)), Plan("traced", 1, 1), flat)(flat).log_density
    slope = ((y - flat[0] * x).double() * x.double()).sum() - 0.25
    assert abs(float(found[0])) > 1e8
    assert float(found[1] - found[0]) == pytest.approx(
        float(slope) * 2**-20, abs=2.0
    )  # rows are rounded, not their sum


def test_plans_survive_a_state() -> None:
    for plan in (Plan("compiled", 3, 1, True), Plan("traced", 1, 0), Plan("eager", 17, 2)):
        assert Plan.load({"step": 3, **plan.save()}) == plan


def modes_of(monkeypatch: pytest.MonkeyPatch, *, compiler: bool) -> Callable[..., Plan]:
    """`prepare` as a plan, with a compiler that does nothing, or without one."""
    monkeypatch.setattr(density_module, "compiled", lambda graph, tensors, number: graph)
    monkeypatch.setattr(density_module, "has_compiler", lambda device: compiler)
    target, flat = target_of_function(quadratic, None), torch.ones(3, 5)

    def planned(num_gradients: int, compile: bool | None = None, plan: Plan | None = None) -> Plan:
        made = prepare(target, flat, num_gradients=num_gradients, memory=PLENTY, compile=compile, plan=plan)
        torch.testing.assert_close(made(flat).gradient, -torch.arange(1.0, 6.0).expand(3, 5))
        return made.plan

    return planned


def test_the_rule_compiles_what_takes_longer_than_a_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = modes_of(monkeypatch, compiler=True)
    assert planned(10).mode == "traced"
    assert planned(10**10).mode == "compiled"  # at 4e-6 s an operation more than a minute by far
    assert planned(10, compile=True).mode == "compiled"
    assert planned(10**10, compile=False).mode == "traced"
    target, flat = target_of_function(quadratic, None), torch.ones(3, 5)
    seconds = cost_of(record(density_module._vectorised(target), (flat,))).seconds
    monkeypatch.setattr(density_module, "WORTH_COMPILING", seconds * 1000.5)
    assert [planned(number).mode for number in (1000, 1001)] == ["traced", "compiled"]


def test_the_rule_counts_every_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    modes_of(monkeypatch, compiler=True)
    case = case_of("plain")
    flat = positions_of(case.model)
    target = target_of_model(case.model, case.batch)
    monkeypatch.setattr(density_module, "_num_slices", lambda *_: 5)
    seconds = cost_of(record(density_module._vectorised(target), (flat, *target.slices(5)[0][1]))).seconds
    monkeypatch.setattr(density_module, "WORTH_COMPILING", 100 * seconds * 4.5)
    assert prepare(target, flat, num_gradients=100, memory=PLENTY, compile=None).plan == Plan("compiled", 5, 1)
    monkeypatch.setattr(density_module, "WORTH_COMPILING", 100 * seconds * 5.5)
    assert prepare(target, flat, num_gradients=100, memory=PLENTY, compile=None).plan == Plan("traced", 5, 1)


def test_without_a_compiler_nothing_is_compiled_unless_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = modes_of(monkeypatch, compiler=False)
    assert planned(10**10).mode == "traced"
    with pytest.raises(ConfigError, match=r"compile: want a C\+\+ compiler .*or pass compile=False$"):
        planned(10, compile=True)
    with pytest.raises(ConfigError, match=r"none on this machine, where the run that goes on had one; install one$"):
        planned(10, plan=Plan("compiled", 1, 1))


def test_a_compiler_that_does_not_work_leaves_traced_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a warning, where nobody asked for it; else it is an error."""

    def broken(*arguments: Any) -> None:
        raise TorchDynamoException("CppCompileError: c++: not found\nand more")

    case = last_layer()
    target, flat = target_of_model(case.model, case.batch), positions_of(case.model)
    monkeypatch.setattr(density_module, "has_compiler", lambda device: True)
    monkeypatch.setattr(density_module, "compiled", broken)
    with pytest.warns(UserWarning, match="gradients are not compiled: CppCompileError: c.+: not found$"):
        made = prepare(target, flat, num_gradients=10**10, memory=None, compile=None)
    assert made.plan.mode == "traced"
    found = prepare(target, flat, num_gradients=1, memory=None, compile=False)
    assert all(map(torch.equal, made(flat), found(flat)))
    with pytest.raises(ConfigError, match=r"compile: want a C.+ compiler that works, got CppCompileError"):
        prepare(target, flat, num_gradients=10, memory=None, compile=True)


def test_a_recorded_plan_is_kept_where_the_rule_would_say_other(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = modes_of(monkeypatch, compiler=True)
    assert planned(10, plan=Plan("compiled", 1, 2)) == Plan("compiled", 1, 2)
    assert planned(10**10, plan=Plan("traced", 1, 0)) == Plan("traced", 1, 0)
    assert planned(10, compile=True, plan=Plan("eager", 1, 0)) == Plan("eager", 1, 0)
    case = case_of("plain")
    flat = positions_of(case.model)
    cut = prepare(
        target_of_model(case.model, case.batch),
        flat,
        num_gradients=1,
        memory=PLENTY,
        compile=None,
        plan=Plan("traced", 4, 1),
    )
    assert len(cut._parts) == 4
    torch.testing.assert_close(cut(flat).gradient, one_at_a_time(case, flat)[2], rtol=1e-12, atol=1e-11)


def test_a_plan_with_products_of_onednn_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = modes_of(monkeypatch, compiler=False)
    monkeypatch.setattr(density_module.products, "available", lambda: False)
    with pytest.raises(ConfigError, match=r"plan: want a CPU and a torch with oneDNN") as refused:
        planned(10, plan=Plan("traced", 1, 1, True))
    assert "\n" not in str(refused.value)


def test_whether_there_is_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, expected in ((("g++",), True), (("clang++",), True), (("c++",), True), (("gcc",), False), ((), False)):
        monkeypatch.setattr(shutil, "which", lambda name, there=there: f"/bin/{name}" if name in there else None)
        assert has_compiler(torch.device("cpu")) == expected
    assert has_compiler(torch.device("cuda"))


def test_small_work_takes_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of("plain")
    flat, target = positions_of(case.model), target_of_model(case.model, case.batch)
    cost = cost_of(record(density_module._vectorised(target), (flat, *target.slices(1)[0][1])))
    arithmetic = cost.seconds - cost.overhead
    assert 0 < arithmetic < cost.seconds
    for limit, number in ((1.001 * arithmetic, 1), (0.999 * arithmetic, 0)):
        monkeypatch.setattr(density_module, "ONE_THREAD", limit)
        assert prepare(target, flat, num_gradients=1, memory=PLENTY, compile=None).plan.threads == number


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_the_number_of_threads_is_left_alone_also_on_errors(two_threads: None) -> None:
    seen: list[int] = []

    def watched(u: Tensor) -> Tensor:
        seen.append(torch.get_num_threads())
        return quadratic(u)

    flat = torch.ones(3, 5)
    Prepared(target_of_function(watched, None), Plan("eager", 1, 1), flat)(flat)
    assert (seen, torch.get_num_threads()) == ([1], 2)
    Prepared(target_of_function(watched, None), Plan("eager", 1, 0), flat)(flat)
    assert (seen, torch.get_num_threads()) == ([1, 2], 2)

    def failing(u: Tensor) -> Tensor:
        raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        Prepared(target_of_function(failing, None), Plan("eager", 1, 1), flat)(flat)
    assert torch.get_num_threads() == 2
    with pytest.raises(ValueError, match="on purpose"):
        Prepared(target_of_function(failing, None), Plan("traced", 1, 1), flat)
    assert torch.get_num_threads() == 2
    with threads(0):
        assert torch.get_num_threads() == 2


def test_gradients_leave_no_graph_of_autograd_and_no_grad_mode_behind() -> None:
    case = case_of("plain")
    flat = positions_of(case.model)
    for mode in ("traced", "eager"):
        found = Prepared(target_of_model(case.model, case.batch), Plan(mode, 2, 1), flat)(flat)  # type: ignore[arg-type]
        assert not any(tensor.requires_grad for tensor in found)
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in case.model.module.parameters())


def untraceable(u: Tensor) -> Tensor:
    if _get_current_dispatch_mode() is not None:
        raise RuntimeError("seen while tracing")
    return quadratic(u)


def test_a_density_that_cannot_be_traced_warns_and_works() -> None:
    flat = torch.randn(3, 5, generator=generator(0))
    with pytest.warns(UserWarning, match="cannot be traced .*seen while tracing.*each gradient runs through Python"):
        made = prepare(target_of_function(untraceable, None), flat, num_gradients=10**10, memory=PLENTY, compile=None)
    assert made.plan.mode == "eager"
    torch.testing.assert_close(made(flat).gradient, -flat * torch.arange(1.0, 6.0))


def test_a_density_that_cannot_be_vectorised_is_refused_in_one_line() -> None:
    def branches(u: Tensor) -> Tensor:
        return -u.sum() if u[0] > 0 else u.sum()

    with pytest.raises(FitError, match=r"log density: want one that torch.func.vmap takes.*use torch.where") as refused:
        prepare(target_of_function(branches, None), torch.ones(3, 5), num_gradients=1, memory=PLENTY, compile=None)
    assert "\n" not in str(refused.value)


class Living(TorchDispatchMode):
    """The most bytes that results of operations hold at once while it is on: of those that anybody still refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self._made = 0, []  # type: ignore[var-annotated]

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {self._place(t) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = operation(*args, **(kwargs or {}))
        alive = [(place, size, ref) for place, size, ref in self._made if ref() is not None]
        known = {place for place, _, _ in alive}
        for leaf in pytree.tree_leaves(made):
            if isinstance(leaf, Tensor) and (self._place(leaf) in known or self._place(leaf) not in given):
                alive.append((self._place(leaf), leaf.untyped_storage().nbytes(), weakref.ref(leaf)))
        self._made = alive
        self.peak = max(self.peak, sum({place: size for place, size, _ in alive}.values()))
        return made

    @staticmethod
    def _place(tensor: Tensor) -> int:
        return tensor.untyped_storage().data_ptr()


def regression(spec: str, num_rows: int, num_inputs: int) -> tuple[Target, Tensor]:
    source = generator(0, spec)
    x, y = torch.randn(num_rows, num_inputs, generator=source), torch.randn(num_rows, 2, generator=source)
    module = build(spec, input_shape=[num_inputs], num_outputs=2, seed=0)
    model = BayesianModel(module, prior=priors.Normal(), likelihood=likelihoods.Gaussian(0.5), num_data=num_rows)
    return target_of_model(model, Batch(x, y)), 0.3 * torch.randn(CHAINS, model.layout.num_values, generator=source)


@pytest.mark.parametrize("spec", ["mlp:50", "mlp:50,50", "mlp:10,200,10,relu"])
def test_the_cost_of_a_gradient_bounds_the_bytes_that_it_keeps(spec: str) -> None:
    target, flat = regression(spec, 1100, 6)
    tensors = target.slices(1)[0][1]
    graph = trace(density_module._vectorised(target), (flat, *tensors))
    with torch.no_grad(), Living() as living:
        graph(flat, *tensors)
    assert living.peak <= cost_of(record(density_module._vectorised(target), (flat, *tensors))).bytes < 3 * living.peak


@pytest.mark.parametrize(("spec", "share"), [("mlp:50", 0.9), ("mlp:50,50", 0.3), ("mlp:10,200,10,relu", 0.1)])
def test_memory_bounds_the_bytes_that_a_gradient_keeps(spec: str, share: float) -> None:
    """Under budgets that are too small for all rows, by the plan's own count and by what operations keep."""
    target, flat = regression(spec, 1100, 6)
    vectorised = density_module._vectorised(target)
    memory = int(share * cost_of(record(vectorised, (flat, *target.slices(1)[0][1]))).bytes)
    made = prepare(target, flat, num_gradients=1, memory=memory, compile=False)
    assert made.plan.slices > 1
    sizes = {len(tensors[0]): tensors for _, tensors in target.slices(made.plan.slices)}
    assert cost_of(record(vectorised, (flat, *sizes[max(sizes)]))).bytes <= memory
    with Living() as living:
        cut = made(flat)
    sums = 4 * flat.nbytes  # gradients that are added up
    assert living.peak <= memory + sums
    whole = Prepared(target, Plan("traced", 1, 1), flat)(flat)
    torch.testing.assert_close(cut.log_density, whole.log_density, rtol=1e-6, atol=0)
    torch.testing.assert_close(cut.gradient, whole.gradient, rtol=1e-3, atol=1e-4 * float(whole.gradient.abs().max()))


def slices_of(target: Target, flat: Tensor, memory: int | None) -> int:
    costs = density_module._costs(target, density_module._vectorised(target), flat, len(flat))
    return density_module._num_slices(target, costs, len(flat), memory, flat.device)


def test_as_few_slices_as_the_budget_allows() -> None:
    target, flat = regression("mlp:50", 1100, 6)
    vectorised = density_module._vectorised(target)

    def needed(count: int) -> float:
        return cost_of(record(vectorised, (flat, *target.slices(count)[0][1]))).bytes

    for count in (1, 6):
        found = slices_of(target, flat, int(1.05 * needed(count)))
        assert found <= count
        assert needed(found) <= 1.05 * needed(count)


def test_without_a_bound_slices_fit_a_cache_but_are_not_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no row adds to, such as the gradient itself, does not count, since slices do not make it less."""
    target, flat = regression("mlp:10,200,10,relu", 1100, 6)
    vectorised = density_module._vectorised(target)

    def in_a_cache(size: int) -> int:
        monkeypatch.setattr(density_module, "CACHE", size)
        return slices_of(target, flat, None)

    few, many = (cost_of(record(vectorised, (flat, *target.slices(count)[0][1]))).bytes for count in (2, 1))
    a_row = (many - few) / 550  # both far from where fixed parts decide
    assert in_a_cache(int(1.001 * 1100 * a_row)) == 1
    assert in_a_cache(int(1.001 * 550 * a_row)) == 2
    assert in_a_cache(int(0.3 * 1100 * a_row)) == 4
    assert in_a_cache(int(0.05 * 1100 * a_row)) == 4  # of 275 rows: FEW_ROWS are 256


@pytest.mark.parametrize("rows", [511, 512, 9])
@pytest.mark.parametrize(("chains", "all_chains"), [(3, 3), (3, 1024), (1, 7)])
def test_a_density_is_traced_once(monkeypatch: pytest.MonkeyPatch, rows: int, chains: int, all_chains: int) -> None:
    """At the shape that is used, whatever has to be known of others; the largest other is of a few rows and chains."""
    shapes: list[tuple[int, int]] = []
    tried: list[tuple[int, int]] = []

    def counted(function: Any, arguments: Any) -> Any:
        shapes.append((len(arguments[0]), len(arguments[1])))
        return trace(function, arguments)

    def recorded(function: Any, arguments: Any) -> Any:
        tried.append((len(arguments[0]), len(arguments[1])))
        return record(function, arguments)

    monkeypatch.setattr(density_module, "trace", counted)
    monkeypatch.setattr(density_module, "record", recorded)
    target, flat = regression("mlp:50", rows, 6)
    made = prepare(target, flat[:chains], num_gradients=1, memory=None, compile=False, num_chains=all_chains)
    assert shapes == [(chains, rows // made.plan.slices)]
    assert max(tried) <= (3, 9)


@pytest.mark.parametrize(("spec", "memory"), [("mlp:50", None), ("mlp:10,200,10,relu", 20_000_000)])
def test_the_plan_of_a_share_of_the_chains_is_that_of_all(spec: str, memory: int | None) -> None:
    """Rules go by all chains of all ranks, so that each computes as one process would."""
    target, flat = regression(spec, 2300, 6)
    many = flat.repeat(31, 1)  # 93 chains

    def plan_of(chains: int, all_chains: int) -> Plan:
        return density_module._plan(target, many[:chains], all_chains, 40, memory, None)[0]

    whole = plan_of(93, 93)
    assert whole.slices > plan_of(3, 3).slices
    assert plan_of(1, 93) == plan_of(31, 93) == whole


def test_rows_wider_than_a_cache_are_still_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one slice, since there are few; nothing is warned of."""
    monkeypatch.setattr(density_module, "CACHE", 10)
    target, flat = regression("mlp:50", 20, 6)
    assert prepare(target, flat, num_gradients=1, memory=None, compile=None).plan == Plan("traced", 1, 1)


def last_layer(dtype: torch.dtype = torch.float64, *, classes: bool = False) -> Case:
    """Rows whose features no chain moves: the last layer alone is Bayesian."""
    case = case_of("plain", dtype)
    likelihood: Any = likelihoods.Categorical() if classes else likelihoods.Gaussian(0.8)
    y = case.batch.y.argmax(dim=1) if classes else case.batch.y
    model = BayesianModel(case.model.module, prior=priors.Normal(), likelihood=likelihood, num_data=23, bayesian="2.*")
    return Case(model, case.batch._replace(y=y))


@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize("name", [*CASES, "last layer"])
def test_what_follows_from_the_data_alone_is_computed_once_to_the_same_bits(name: str, slices: int) -> None:
    case = last_layer() if name == "last layer" else case_of(name)
    target, flat = target_of_model(case.model, case.batch), positions_of(case.model)
    plan = Plan("traced", slices, 1)
    once, anew = (Prepared(target, plan, flat, keeps=keeps) for keeps in (True, False))
    rows = [tensor for _, tensors in target.slices(slices) for tensor in tensors]

    def kept(part: Any) -> list[Tensor]:
        """What a slice's function takes that lies neither in the data nor in constants of the trace."""
        constants = [value for value in (*vars(part[1]).values(), *part[1].buffers()) if isinstance(value, Tensor)]
        given = {t.untyped_storage().data_ptr() for t in [*rows, *constants, *part[1].parameters()]}
        return [t for t in part[2] if t.untyped_storage().data_ptr() not in given]

    assert sum(t.untyped_storage().nbytes() for part in once._parts for t in kept(part)) <= density_module.KEPT
    assert not [t for part in anew._parts for t in kept(part)]
    for scale in (1.0, 0.5):
        assert all(map(torch.equal, once(scale * flat), anew(scale * flat)))
    if name == "last layer":  # its features [rows, 6] are there
        assert all(any(t.shape[-1:] == (6,) for t in kept(part)) for part in once._parts)
        called = [[str(node.target) for node in part[1].graph.nodes] for part in (once._parts[0], anew._parts[0])]
        assert [any("tanh" in target for target in targets) for targets in called] == [False, True]


def test_memory_for_not_even_one_row_is_refused_in_one_line() -> None:
    target, flat = regression("mlp:50", 1100, 6)
    with pytest.raises(
        ConfigError, match=r"memory: want at least [\d,]+ bytes, for one row .* and 3 chains"
    ) as refused:
        prepare(target, flat, num_gradients=1, memory=100, compile=False)
    assert "\n" not in str(refused.value)
    needed = int(refused.value.want.split(" ")[2].replace(",", ""))
    made = prepare(target, flat, num_gradients=1, memory=needed, compile=False)
    assert made.plan.slices > 100


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(torch.device("cpu")), reason="no C++ compiler for torch.compile")
@pytest.mark.parametrize("memory", [PLENTY, None])
@pytest.mark.parametrize(("name", "slices"), [("plain", 4), ("tied", 1), ("convolution", 1), ("last layer", 2)])
def test_compiled_is_close_to_traced_and_repeats_its_own_bits(name: str, slices: int, memory: int | None) -> None:
    case = last_layer(torch.float32, classes=True) if name == "last layer" else case_of(name, torch.float32)
    flat = positions_of(case.model, torch.float32)
    target = target_of_model(case.model, case.batch)
    made = prepare(target, flat, num_gradients=1, memory=memory, compile=True, plan=Plan("compiled", slices, 1))
    assert made.compile_seconds > 0
    found = made(flat)
    for a, b in zip(found, Prepared(target, Plan("traced", slices, 1), flat)(flat), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
    torch.compiler.reset()  # as anybody in the process may: what is compiled again later has the same bits
    again = prepare(target, flat, num_gradients=1, memory=memory, compile=None, plan=made.plan)
    assert all(torch.equal(a, b) for a, b in zip(found, again(flat), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found, made(flat), strict=True))


def test_nothing_is_said_of_tracing() -> None:
    model, (x, y) = classifier()
    flat = positions_of(model, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = prepare(target_of_model(model, Batch(x, y)), flat, num_gradients=1, memory=PLENTY, compile=None)
    assert made.plan == Plan("traced", 1, 1)
    assert made.compile_seconds == 0.0
