"""Applying samples: right outputs by every way, and a module that is bit-equal afterwards."""

from __future__ import annotations

import copy
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bnn import likelihoods, priors
from bnn.bank import Bank
from bnn.errors import BankMismatch, ConfigError, DataError, ModuleError
from bnn.functional import FunctionalModel
from bnn.model import BayesianModel
from bnn.seeding import generator
from bnn.types import Params, make_block


def bank_of(module: nn.Module, size: int = 6, bayesian: str | list[str] = "*", seed: int = 0) -> Bank:
    """A bank of random samples in memory."""
    model = BayesianModel(
        module, prior=priors.Normal(0.0, 0.5), likelihood=likelihoods.Categorical(), num_data=1, bayesian=bayesian
    )
    draws = [model.sample_prior(seed, index) for index in range(size)]
    params = {name: torch.stack([draw[name] for draw in draws]) for name in model.layout.names}
    block = make_block(params, chain=torch.zeros(size), draw=torch.arange(size))
    return Bank.from_blocks([block], layout=model.layout, info={})


def by_hand(module: nn.Module, params: Params, *args: Any, **kwargs: Any) -> Any:
    """The slow obvious version: a copy of the module with the values written into it."""
    filled = copy.deepcopy(module)
    named = dict(filled.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, tensor in params.items():
            named[name].copy_(tensor)
        return filled(*args, **kwargs)


def fingerprint(module: nn.Module) -> list[Any]:
    """Everything of a module that must not change, with the identity of its tensors."""
    facts: list[Any] = [
        (name, id(p), p.detach().clone(), p.requires_grad, p.grad) for name, p in module.named_parameters()
    ]
    facts += [(name, id(b), b.clone()) for name, b in module.named_buffers()]
    facts += [
        (name, part.training, len(part._forward_hooks), sorted(vars(part))) for name, part in module.named_modules()
    ]
    return [*facts, torch.get_rng_state()]


def same(before: list[Any], after: list[Any]) -> bool:
    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor):
            return torch.equal(a, b)
        return all(map(equal, a, b)) if isinstance(a, tuple) else bool(a == b)

    return len(before) == len(after) and all(map(equal, before, after))


class TwoHeads(nn.Module):
    """Takes two inputs by keyword, gives a dict with a nested tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Any]:
        return {"sum": self.left(a) + self.right(b), "parts": (self.left(a), self.right(b))}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


class Raises(nn.Module):
    """Works through its layers, writes into a buffer, then fails."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.fail = True

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        self.calls += 1
        if self.fail:
            raise RuntimeError("on purpose")
        return y + 0 * self.calls


def convolutional() -> nn.Module:
    module = nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(5 * 16, 3)
    )
    module[1].running_mean.uniform_(-1, 1)
    module[1].running_var.uniform_(0.5, 2)
    return module.eval()


CASES: dict[str, tuple[Any, Any]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), lambda: torch.randn(5, 4)),
    "conv and eval batch norm": (convolutional, lambda: torch.randn(5, 2, 6, 6)),
    "tied": (Tied, lambda: torch.randint(7, (5, 2))),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), lambda: torch.randn(5, 4)),
    "layer norm": (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)), lambda: torch.randn(5, 4)),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # weight norm has no batching rule upstream
@pytest.mark.parametrize("strategy", ["loop", "vmap"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_equal_those_of_a_module_with_the_values_written_in(case: str, strategy: str) -> None:
    make, inputs = CASES[case]
    module, x = make(), inputs()
    bank = bank_of(module)
    net = FunctionalModel(module, bank, strategy=strategy)
    expected = torch.stack([by_hand(module, bank[i], x) for i in range(6)])  # [K, B, ...]
    before = fingerprint(module)
    torch.testing.assert_close(net(x, 4), expected[4])
    torch.testing.assert_close(net(x, torch.tensor(4)), expected[4])
    torch.testing.assert_close(net(x, [5, 0, 3]), expected[[5, 0, 3]])
    torch.testing.assert_close(net(x, torch.tensor([5, 0, 3])), expected[[5, 0, 3]])
    torch.testing.assert_close(net(x, slice(1, 5)), expected[1:5])
    rows = torch.tensor([2, 5, 2, 0, 5])
    torch.testing.assert_close(net(x, rows=rows), expected[rows, torch.arange(5)])
    assert same(before, fingerprint(module))


@pytest.mark.parametrize("strategy", ["loop", "vmap"])
def test_dict_and_tuple_inputs_and_outputs(strategy: str) -> None:
    module = TwoHeads()
    a, b = torch.randn(5, 4), torch.randn(5, 2)
    bank = bank_of(module)
    net = FunctionalModel(module, bank, strategy=strategy)
    expected = [by_hand(module, bank[i], a, b) for i in range(6)]
    for x in ({"a": a, "b": b}, (a, b)):
        block = net(x, [1, 3])
        torch.testing.assert_close(block["sum"], torch.stack([expected[1]["sum"], expected[3]["sum"]]))
        torch.testing.assert_close(block["parts"][1], torch.stack([expected[i]["parts"][1] for i in (1, 3)]))
        by_row = net(x, rows=torch.tensor([0, 3, 0, 1, 3]))
        torch.testing.assert_close(by_row["parts"][0][3], expected[1]["parts"][0][3])


@pytest.mark.parametrize("strategy", ["loop", "vmap"])
def test_partial_banks_take_the_rest_from_the_live_module(strategy: str) -> None:
    module = CASES["mlp"][0]()
    bank, x = bank_of(module, bayesian="2"), torch.randn(5, 4)
    net = FunctionalModel(module, bank, strategy=strategy)
    with torch.no_grad():
        module[0].weight.mul_(2.0)  # seen, because it is the module's own
        module[2].weight.fill_(1e6)  # not seen, because it is the sample's
    torch.testing.assert_close(net(x, [2, 1])[0], by_hand(module, bank[2], x))


def test_gradients_reach_inputs_and_free_parameters() -> None:
    module = CASES["mlp"][0]()
    net = FunctionalModel(module, bank_of(module, bayesian="2"))
    x = torch.randn(5, 4, requires_grad=True)
    net(x, 1).sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().sum()) > 0
    assert module[0].weight.grad is not None
    assert module[2].weight.grad is None


@pytest.mark.parametrize("fail", [True, False])
def test_a_forward_that_writes_and_raises_changes_nothing(fail: bool) -> None:
    module = Raises()
    module.fail = fail
    bank, x = bank_of(module), torch.randn(5, 4)
    net = FunctionalModel(module, bank)
    before = fingerprint(module)
    for _ in range(3):
        if fail:
            with pytest.raises(RuntimeError, match="on purpose"):
                net(x, 2)
        else:
            torch.testing.assert_close(net(x, 2), nn.functional.linear(x, bank[2]["fc.weight"], bank[2]["fc.bias"]))
    assert same(before, fingerprint(module))


def test_four_threads_at_once_get_their_own_samples() -> None:
    module = nn.Sequential(*[nn.Linear(8, 8) for _ in range(20)])
    bank, x = bank_of(module, size=8), torch.randn(3, 8)
    net = FunctionalModel(module, bank)
    expected = [net(x, i) for i in range(8)]
    before = fingerprint(module)
    wrong: list[int] = []

    def work(start: int) -> None:
        for step in range(100):
            index = (start + step) % 8
            if not torch.equal(net(x, index), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(2 * k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert same(before, fingerprint(module))


def test_the_mode_is_the_live_modules_at_each_call() -> None:
    module = convolutional()
    net = FunctionalModel(module, bank_of(module))
    x = torch.randn(5, 2, 6, 6)
    before = net(x, 0)
    module.train()
    with pytest.raises(ModuleError, match=r"BatchNorm2d: want eval mode, got train mode.*module\.eval\(\)"):
        net(x, 0)
    module.eval()
    assert torch.equal(net(x, 0), before)


def test_buffers_are_the_live_modules_at_each_call() -> None:
    module = convolutional()
    bank, x = bank_of(module), torch.randn(5, 2, 6, 6)
    net = FunctionalModel(module, bank)
    before = net(x, 1)
    module[1].running_mean.add_(1.0)
    assert not torch.equal(net(x, 1), before)
    torch.testing.assert_close(net(x, 1), by_hand(module, bank[1], x))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.LazyLinear(2)), "lazy"),
        (lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 3))), "hook-style SpectralNorm"),
        (lambda: nn.Sequential(nn.Embedding(4, 3, max_norm=0.1)), "max_norm"),
    ],
)
def test_what_cannot_be_copied_is_refused_by_name(make: Any, match: str) -> None:
    with pytest.raises(ModuleError, match=match):
        bank_of(make())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_hook_style_weight_norm_and_scripts_are_refused() -> None:
    with pytest.raises(ModuleError, match="hook-style WeightNorm"):
        bank_of(nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 3))))
    with pytest.raises(ModuleError, match="scripted"):
        bank_of(torch.jit.script(nn.Linear(4, 3)))


def test_a_module_that_deepcopy_cannot_copy_is_refused() -> None:
    module = nn.Linear(4, 3)
    module.lock = threading.Lock()
    with pytest.raises(ModuleError, match=r"copy\.deepcopy"):
        bank_of(module)


def test_a_bank_of_another_module_names_the_first_differing_entry() -> None:
    bank = bank_of(CASES["mlp"][0]())
    wider = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    with pytest.raises(BankMismatch, match=r"'0\.weight' \[8, 4\] where '0\.weight' \[6, 4\] stands"):
        FunctionalModel(wider, bank)
    with pytest.raises(BankMismatch, match=r"'2\.weight' \[3, 6\] where '0\.weight' \[6, 4\] stands"):
        FunctionalModel(nn.Sequential(nn.Tanh(), nn.Tanh(), nn.Linear(6, 3)), bank)


def test_numpy_indices_and_odd_names() -> None:
    module = nn.ModuleDict({"a[0]": nn.Linear(4, 3)})
    module.forward = lambda x: x  # type: ignore[method-assign]
    bank = bank_of(module, bayesian="*")
    assert FunctionalModel(module, bank).bank is bank
    mlp = CASES["mlp"][0]()
    net, x = FunctionalModel(mlp, bank_of(mlp)), torch.randn(5, 4)
    assert torch.equal(net(x, np.int64(2)), net(x, 2))


def test_wrong_calls_are_refused() -> None:
    module = CASES["mlp"][0]()
    net = FunctionalModel(module, bank_of(module))
    x = torch.randn(5, 4)
    with pytest.raises(ConfigError, match="either an index or rows="):
        net(x)
    with pytest.raises(ConfigError, match="either an index or rows="):
        net(x, 1, rows=torch.zeros(5))
    with pytest.raises(DataError, match="one index a row of x, 5 of them, got 4"):
        net(x, rows=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(IndexError, match="bank index 6"):
        net(x, 6)
    with pytest.raises(ConfigError, match="one of auto, loop, vmap, got 'fast'"):
        FunctionalModel(module, net.bank, strategy="fast")  # type: ignore[arg-type]


@pytest.mark.gpu
def test_cuda_gives_what_the_cpu_gives(device: str) -> None:
    module = convolutional()
    bank, x = bank_of(module), torch.randn(5, 2, 6, 6, generator=generator(0))
    expected = FunctionalModel(module, bank)(x, [1, 4])
    for strategy in ("loop", "vmap"):
        found = FunctionalModel(module, bank, device=device, strategy=strategy)(x, [1, 4])  # type: ignore[arg-type]
        assert found.device.type == device
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-4)
