"""What comes before the samples' parameters runs once a batch, and only where that is proved to be the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnn
from bnn.bank import Bank
from bnn.functional import FunctionalModel
from bnn.seeding import generator
from bnn.types import make_block

SAMPLES = 5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed, *shape))


class Counted(nn.Linear):
    """A layer that counts how often any copy of it is run."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return super().forward(x)


class Headed(nn.Module):
    """Trunk and head by name; `after` is what the forward does around the head."""

    def __init__(self, after: str = "nothing") -> None:
        super().__init__()
        self.trunk, self.after = nn.Sequential(Counted(4, 6), nn.Tanh()), after
        self.head = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Any:
        hidden = self.trunk(x)
        if self.after == "twice":
            return self.head(hidden) + self.head(-hidden)
        if self.after == "uses the weights":
            return self.head(hidden + self.head[0].weight.sum())
        if self.after == "norm of the weights":
            self.seen = self.head[0].weight.norm()  # of no consequence
        found = self.head(hidden)
        if self.after == "softmax":
            return found.softmax(dim=-1)
        if self.after == "in place":
            return found.mul_(2.0)
        if self.after == "dict":
            return {"logits": found, "hidden": hidden}
        return found


def bank_over(module: nn.Module, patterns: str | list[str]) -> Bank:
    model = bnn.BayesianModel(
        module,
        prior=bnn.priors.Normal(0.0, 0.7),
        likelihood=bnn.likelihoods.Categorical(),
        num_data=1,
        bayesian=patterns,
    )
    draws = [model.sample_prior(0, index) for index in range(SAMPLES)]
    params = {name: torch.stack([draw[name] for draw in draws]) for name in model.layout.names}
    block = make_block(params, chain=torch.zeros(SAMPLES), draw=torch.arange(SAMPLES))
    return Bank.from_blocks([block], layout=model.layout, info={})


def check(module: nn.Module, bank: Bank, *, split: bool, strategy: Any = "loop") -> None:
    """Outputs equal one sample at a time through the whole; the trunk ran once a block exactly where it may."""
    x = normal(7, 4)
    net = FunctionalModel(module, bank, strategy=strategy, compile=False)
    with torch.no_grad():
        whole = [net(x, k) for k in range(SAMPLES)]
        net(x, slice(None))  # what is learnt at first is learnt
        Counted.calls = 0
        block = net(x, slice(None))
        calls = Counted.calls
    for k, expected in enumerate(whole):
        if isinstance(expected, dict):
            torch.testing.assert_close({name: values[k] for name, values in block.items()}, expected)
        else:
            torch.testing.assert_close(block[k], expected)
            assert strategy != "loop" or torch.equal(block[k], expected)  # the same operations
    assert net._prepared(x).kind == ("head" if split else "module")
    if split:
        assert calls == 1
    elif strategy == "loop":
        assert calls >= SAMPLES


@pytest.mark.parametrize("strategy", ["loop", "vmap", "auto"])
@pytest.mark.parametrize("patterns", ["2", "4", ["2.bias"], ["2", "4"]])
def test_a_sequential_is_cut_before_the_first_sampled_child(patterns: Any, strategy: Any) -> None:
    module = nn.Sequential(Counted(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3), nn.LogSoftmax(dim=-1))
    check(module, bank_over(module, patterns), split=True, strategy=strategy)


@pytest.mark.parametrize("strategy", ["loop", "vmap", "auto"])
@pytest.mark.parametrize("patterns", ["head", "head.2", ["head.2.weight"]])
def test_a_head_of_any_module_stands_for_it(patterns: Any, strategy: Any) -> None:
    module = Headed()
    check(module, bank_over(module, patterns), split=True, strategy=strategy)
    check(module, bank_over(module, patterns), split=True, strategy=strategy)


def test_a_weight_that_is_looked_at_to_no_effect_is_no_obstacle() -> None:
    module = Headed("norm of the weights")
    check(module, bank_over(module, "head"), split=True)


@pytest.mark.parametrize("after", ["twice", "uses the weights", "softmax", "in place", "dict"])
def test_where_the_head_is_not_the_end_the_whole_is_run(after: str) -> None:
    module = Headed(after)
    check(module, bank_over(module, "head"), split=False)


def test_samples_that_reach_the_beginning_leave_no_trunk() -> None:
    module = Headed()
    for patterns in ("*", ["trunk.0.bias", "head"]):
        check(module, bank_over(module, patterns), split=False)
    tied = nn.Sequential(Counted(4, 4), nn.Tanh(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    check(tied, bank_over(tied, "2.weight"), split=False)


@pytest.mark.parametrize("where", ["trunk", "head", "whole", "everywhere"])
def test_hooks_keep_the_whole(where: str) -> None:
    module = Headed()
    bank = bank_over(module, "head")
    net, x = FunctionalModel(module, bank), normal(7, 4)
    assert net._prepared(x).kind == "head"
    seen = []

    def hook(part: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append(part)
        return output * 2

    if where == "everywhere":
        handle = nn.modules.module.register_module_forward_hook(hook)
    else:
        handle = {"trunk": module.trunk[1], "head": module.head, "whole": module}[where].register_forward_hook(hook)
    try:
        assert net._prepared(x).kind == "module"
        fresh = FunctionalModel(module, bank, compile=False)
        with torch.no_grad():
            torch.testing.assert_close(fresh(x, [1, 2])[0], fresh(x, 1))
        assert seen
    finally:
        handle.remove()


def test_a_head_that_writes_into_its_inputs_keeps_the_whole() -> None:
    module = nn.Sequential(Counted(4, 6), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 3)))
    bank = bank_over(module, "1")
    net, x = FunctionalModel(module, bank, strategy="loop", compile=False), normal(7, 4)
    with torch.no_grad():
        found = net(x, slice(None))
        for k in range(SAMPLES):
            torch.testing.assert_close(found[k], net(x, k))
    assert net._prepared(x).kind == "module"


def test_a_trunk_that_draws_keeps_the_whole() -> None:
    module = nn.Sequential(Counted(4, 60), nn.Dropout(0.5), nn.Linear(60, 3))
    bank = bank_over(module, "2")
    net, x = FunctionalModel(module, bank), normal(7, 4)
    with torch.no_grad():
        block = net(x, slice(None), batch=3)
        assert net._prepared(x).kind == "module"
        for k in range(SAMPLES):
            assert torch.equal(block[k], net(x, k, batch=3))
        module.eval()
        net(x, slice(None))
        assert net._prepared(x).kind == "head"


def test_what_changes_between_batches_is_seen() -> None:
    class Fickle(Headed):
        def forward(self, x: Tensor) -> Tensor:
            found = self.head(self.trunk(x))
            return found if x.sum() > 0 else -found

    module = Fickle()
    net = FunctionalModel(module, bank_over(module, "head"))
    with torch.no_grad():
        for x in (normal(7, 4).abs(), -normal(7, 4).abs()):
            torch.testing.assert_close(net(x, [2, 3])[1], torch.func.functional_call(module, dict(net.bank[3]), (x,)))
        module.trunk[0].weight.mul_(2.0)
        x = normal(7, 4).abs()
        torch.testing.assert_close(net(x, [2, 3])[1], torch.func.functional_call(module, dict(net.bank[3]), (x,)))


def test_inputs_by_keyword_and_several_of_them_reach_the_head() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.fc(left) * right

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.pair = Counted(4, 4), Pair()

        def forward(self, x: Tensor) -> Tensor:
            return self.pair(self.first(x), right=x)

    module = Whole()
    for strategy in ("loop", "vmap"):
        check(module, bank_over(module, "pair"), split=True, strategy=strategy)


def test_predictions_run_the_trunk_once_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bnn.functional.model.MOST_SAMPLES", 2)  # three blocks
    module = Headed()
    net, x = FunctionalModel(module, bank_over(module, "head"), strategy="loop", compile=False), normal(7, 4)
    expected = bnn.predict(net, x, likelihood=bnn.likelihoods.Categorical())
    Counted.calls = 0
    found = bnn.predict(net, x, likelihood=bnn.likelihoods.Categorical())
    assert Counted.calls == 1
    assert torch.equal(found.mean, expected.mean)


@pytest.mark.parametrize("strategy", ["loop", "vmap"])
def test_gradients_pass_through_the_trunk(strategy: Any) -> None:
    module = Headed()
    bank, found = bank_over(module, "head"), []
    for net in (FunctionalModel(module, bank, strategy=strategy), None):
        x = normal(7, 4).requires_grad_()
        module.zero_grad()
        outputs = net(x, slice(None)) if net is not None else torch.stack([
            torch.func.functional_call(module, dict(bank[k]), (x,)) for k in range(SAMPLES)
        ])  # fmt: skip
        outputs.square().sum().backward()
        found.append((x.grad, module.trunk[0].weight.grad.clone()))
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected)


class Decoder(nn.Module):
    """Takes what it needs from a list, which it empties."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, skips: list[Tensor]) -> Tensor:
        while skips:
            x = self.step(x) + skips.pop()
        return self.last(x)


class WithSkips(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.decoder = Counted(4, 4), Decoder()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.decoder(hidden, [hidden, 2 * hidden])


def test_a_head_that_empties_a_list_gets_a_list_of_its_own() -> None:
    module = WithSkips()
    for strategy in ("loop", "vmap", "auto"):
        check(module, bank_over(module, "decoder"), split=True, strategy=strategy)


@pytest.mark.parametrize("around", ["attribute", "autocast", "no_grad", "written after", "scaled in place"])
def test_what_the_module_does_around_its_head_keeps_the_whole(around: str) -> None:
    class Around(Headed):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.trunk(x)
            if around == "attribute":
                self.head[1].gain = float(x.shape[0])
                return self.head(hidden) if hasattr(self, "never") else self.scaled(hidden)
            if around == "autocast":
                with torch.autocast("cpu", torch.bfloat16):
                    return self.head(hidden)
            if around == "no_grad":
                with torch.no_grad():
                    return self.head(hidden)
            found = self.head(hidden)
            if around == "written after":
                hidden.zero_()
            else:
                found += 1.0
            return found

        def scaled(self, hidden: Tensor) -> Tensor:
            return self.head(hidden)

    class Gain(nn.Tanh):
        gain = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.gain

    module = Around()
    if around == "attribute":
        module.head[1] = Gain()
    x = normal(7, 4)
    net = FunctionalModel(module, bank_over(module, "head"), strategy="loop", compile=False)
    grad = around == "no_grad"
    with torch.set_grad_enabled(grad):
        found = net(x, slice(None))
        for k in range(SAMPLES):
            torch.testing.assert_close(found[k], net(x, k))
        assert found.requires_grad == net(x, 0).requires_grad
        assert net._prepared(x).kind == "module"


def test_a_call_that_fails_does_not_end_the_trunk() -> None:
    module = Headed()
    net = FunctionalModel(module, bank_over(module, "head"))
    assert net._prepared(normal(7, 4)).kind == "head"
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        net(normal(7, 6), slice(None))
    assert net._prepared(normal(7, 4)).kind == "head"
