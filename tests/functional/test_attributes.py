"""Tensors among the attributes of a copy: for torch's own parts alone, and never where the difference could be told."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree as pytree

from bnn.bank import Bank
from bnn.errors import ModuleError
from bnn.functional import FunctionalModel
from bnn.seeding import generator

SAMPLES, ROWS = 6, 5
NO_VMAP = ("lstm", "encoder layer", "parametrised", "forward by new")  # which torch has no rule for, and warns of


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed, *shape))


def states_of(module: nn.Module) -> list[dict[str, Tensor]]:
    """Samples of the parameters, tied ones alike; buffers are the module's own."""
    filled, states = copy.deepcopy(module), []
    for k in range(SAMPLES):
        with torch.no_grad():
            for parameter in filled.parameters():
                parameter.copy_(normal(*parameter.shape, seed=k))
        states.append({name: tensor.clone() for name, tensor in filled.state_dict().items()})
    return states


def by_hand(module: nn.Module, state: dict[str, Tensor], x: Any) -> Any:
    """The slow obvious version: load_state_dict on a copy."""
    filled = copy.deepcopy(module)
    filled.load_state_dict(state)
    with torch.no_grad():
        return filled(*x) if isinstance(x, tuple) else filled(x)


def agree(module: nn.Module, x: Any, strategies: tuple[str, ...] = ("loop", "vmap", "auto")) -> None:
    """Single samples and blocks equal the slow version, twice each, by every way."""
    states = states_of(module)
    bank = Bank.from_state_dicts(states, module=module)
    expected = [by_hand(module, state, x) for state in states]
    for strategy in strategies:
        net = FunctionalModel(module, bank, strategy=strategy)  # type: ignore[arg-type]
        with torch.no_grad():
            for index in (3, 1, 3):
                torch.testing.assert_close(net(x, index), expected[index])
            for _ in range(2):
                stacked = pytree.tree_map(lambda *leaves: torch.stack(leaves), *expected)  # [K, B, C]
                torch.testing.assert_close(net(x, slice(None)), stacked)


def are_attributes(module: nn.Module) -> bool:
    """Whether a copy of the module has its tensors among its attributes."""
    net = FunctionalModel(module, Bank.from_state_dicts(states_of(module), module=module))
    shell = net._whole.skeleton.shell()
    places = {id(part.__dict__) for part in shell.module.modules()}
    found = {id(slot.shadow) in places for slot in shell.slots}
    assert len(found) == 1, "of one module, all or none"
    return found.pop()


# Parts of torch


def test_parts_of_torch_find_their_tensors_without_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    usual = nn.Module.__getattr__

    def counted(self: nn.Module, name: str) -> Any:
        asked.append(name)
        return usual(self, name)

    monkeypatch.setattr(nn.Module, "__getattr__", counted)
    module = nn.Sequential(nn.Conv1d(4, 6, 1, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6, 3))
    module.eval()
    net = FunctionalModel(module, Bank.from_state_dicts(states_of(module), module=module), strategy="loop")
    x = normal(ROWS, 4, 1)
    with torch.no_grad():
        net(x, 0)
        asked.clear()
        net(x, 1)
        assert asked == []
        module(x)
        assert {"weight", "bias", "running_mean"} <= set(asked)


def tied() -> nn.Module:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second, first)


PARTS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "linear": (lambda: nn.Linear(4, 3), normal(ROWS, 4)),
    "convolution": (lambda: nn.Conv2d(2, 3, 3), normal(ROWS, 2, 4, 4)),
    "batch norm": (lambda: nn.BatchNorm1d(4).eval(), normal(ROWS, 4)),
    "instance norm": (lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True).eval(), normal(ROWS, 4, 7)),
    "layer norm": (lambda: nn.LayerNorm(4), normal(ROWS, 4)),
    "embedding": (lambda: nn.Embedding(9, 4), torch.tensor([3, 0, 8, 1, 3])),
    "tied": (tied, normal(ROWS, 4)),
    "lstm": (lambda: nn.LSTM(4, 3, num_layers=2), normal(7, ROWS, 4)),
    "attention": (lambda: nn.MultiheadAttention(4, 2).eval(), (normal(7, ROWS, 4),) * 3),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval(),
        normal(ROWS, 7, 4),
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_torch_equal_load_state_dict(name: str) -> None:
    make, x = PARTS[name]
    assert are_attributes(make())
    agree(make(), x, ("loop", "auto") if name in NO_VMAP else ("loop", "vmap", "auto"))


def test_buffers_that_a_forward_writes_are_fresh_for_every_sample() -> None:
    module = nn.Sequential(nn.InstanceNorm1d(4, affine=True, track_running_stats=True), nn.Flatten(), nn.Linear(28, 3))
    assert are_attributes(module)
    before = copy.deepcopy(module.state_dict())
    agree(module, normal(ROWS, 4, 7), ("loop",))
    torch.testing.assert_close(module.state_dict(), before, rtol=0.0, atol=0.0)


def test_four_threads_get_their_own_samples() -> None:
    module = nn.Sequential(nn.Linear(4, 30), nn.Tanh(), nn.Linear(30, 3))
    states, x = states_of(module), normal(ROWS, 4)
    net = FunctionalModel(module, Bank.from_state_dicts(states, module=module), strategy="loop")
    expected, wrong = [by_hand(module, state, x) for state in states], []

    def work(first: int) -> None:
        with torch.no_grad():
            for k in range(200):
                index = (first + k) % SAMPLES
                if not torch.allclose(net(x, index), expected[index], rtol=1e-5, atol=1e-6):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("stop", [None, RuntimeError, KeyboardInterrupt])
def test_a_copy_keeps_no_sample_however_a_forward_ends(stop: type[BaseException] | None) -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    before, states = copy.deepcopy(module.state_dict()), states_of(module)
    net = FunctionalModel(module, Bank.from_state_dicts(states, module=module), strategy="loop", compile=False)
    runner, x = net._whole, normal(ROWS, 4)
    net(x, 0)
    sample = {name: tensor.clone() for name, tensor in states[1].items()}
    held = weakref.ref(sample["0.weight"])

    def at_the_first(part: nn.Module, args: Any, output: Any) -> None:
        if stop is not None and isinstance(part, nn.Linear):
            raise stop("in the middle")

    hook = register_module_forward_hook(at_the_first)
    try:
        if stop is None:
            runner.again(sample, x)
        else:
            with pytest.raises(stop, match="in the middle"):
                runner.again(sample, x)
    finally:
        hook.remove()
    shell = runner.skeleton.shell()
    assert all(slot.shadow[slot.key] is slot.placeholder for slot in shell.slots)
    del sample
    gc.collect()
    assert held() is None
    torch.testing.assert_close(module.state_dict(), before, rtol=0.0, atol=0.0)
    torch.testing.assert_close(net(x, 2).detach(), by_hand(module, states[2], x))


@pytest.mark.parametrize("index", [1, slice(None)], ids=["one", "block"])
@pytest.mark.parametrize("late", [False, True])
def test_writes_into_samples_are_refused_by_name(index: Any, late: bool) -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    bank = Bank.from_state_dicts(states_of(module), module=module)
    net, x = FunctionalModel(module, bank, strategy="loop", compile=False), normal(ROWS, 4)

    def scale(part: nn.Module, args: Any) -> None:
        if isinstance(part, nn.Linear) and part.out_features == 3:
            part.weight.mul_(1.5)

    with torch.no_grad():
        if late:
            net(x, index)
        hook = register_module_forward_pre_hook(scale)
        try:
            with pytest.raises(ModuleError, match=r"parameter '1\.weight': want a forward that leaves .* in place"):
                net(x, index)
        finally:
            hook.remove()


# Parts that may look for their tensors elsewhere: all stays where torch keeps it


def through_functional_call(layer: nn.Linear, x: Tensor) -> Tensor:
    found: Tensor = torch.func.functional_call(layer, {"weight": 2.0 * layer.weight}, (x,)) + layer(x)
    return found


def through_a_clone(layer: nn.Linear, x: Tensor) -> Tensor:
    clone = layer.__new__(type(layer))
    clone.__dict__ = layer.__dict__.copy()
    clone._parameters = clone._parameters.copy()
    clone._parameters["weight"] = clone._parameters["weight"] * 2.0  # type: ignore[assignment, operator]
    other: Tensor = clone(x)
    return other


def through_a_new_parameter(layer: nn.Linear, x: Tensor) -> Tensor:
    before = layer.weight
    del layer.weight
    layer.weight = nn.Parameter(2.0 * before)
    found: Tensor = layer(x)
    layer._parameters["weight"] = before  # type: ignore[assignment]
    return found.add(layer(x))


LOOKS: dict[str, Callable[[nn.Linear, Tensor], Tensor]] = {
    "parameters": lambda layer, x: layer(x.to(next(layer.parameters()).dtype)) + next(layer.parameters()).sum(),
    "key": lambda layer, x: F.linear(x, layer._parameters["weight"], layer._parameters.get("bias")),  # type: ignore[arg-type]
    "state": lambda layer, x: F.linear(x, **layer.state_dict()),
    "functional_call": through_functional_call,
    "clone": through_a_clone,
    "new": through_a_new_parameter,
}


class Looks(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layer, self.last = kind, nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(LOOKS[self.kind](self.layer, self.layer(x)))
        return found


class Tripled(nn.Linear):
    def __getattr__(self, name: str) -> Any:
        found: Any = super().__getattr__(name)
        return 3.0 * found if name == "weight" else found


class Squared(nn.Linear):
    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        found = self._parameters["weight"]
        assert found is not None
        return found.square()


def layer_of(kind: type[nn.Linear]) -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    module[1].__class__ = kind
    return module


def parametrised() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)))


def hooked() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    module[1].register_forward_hook(lambda part, args, output: output + dict(part.named_parameters())["weight"].sum())
    return module


def pre_hooked() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    module.register_forward_pre_hook(lambda part, args: args[0] * next(part.parameters()).sum())
    return module


def with_a_forward_of_its_own() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    module[1].forward = _by_key.__get__(module[1])
    return module


def _by_key(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer._parameters["weight"])  # type: ignore[arg-type]


def hidden() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    vars(module[1])["weight"] = normal(3, 6, seed=9)
    return module


KINDS: dict[str, Callable[[], nn.Module]] = {
    **{f"forward by {kind}": lambda kind=kind: Looks(kind) for kind in LOOKS},  # type: ignore[misc]
    "a part within": lambda: nn.Sequential(Looks("parameters"), nn.Linear(3, 3)),
    "__getattr__": lambda: layer_of(Tripled),
    "property": lambda: layer_of(Squared),
    "parametrised": parametrised,
    "hook": hooked,
    "hook before": pre_hooked,
    "forward replaced": with_a_forward_of_its_own,
    "hidden": hidden,
}


def test_a_class_of_torch_that_others_have_patched_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Linear, "forward", _by_key)
    module = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    assert not are_attributes(module)
    agree(module, normal(ROWS, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_modules_that_may_look_elsewhere_are_left_as_they_are(kind: str) -> None:
    assert not are_attributes(KINDS[kind]())
    agree(KINDS[kind](), normal(ROWS, 4), ("loop",) if kind in NO_VMAP else ("loop", "vmap", "auto"))
