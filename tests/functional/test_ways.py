"""How blocks are run: what auto chooses, what keeps to memory, what may draw, and what is refused by name."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnn.bank import Bank
from bnn.errors import ConfigError, ModuleError, SlowerWay
from bnn.functional import FunctionalModel
from bnn.functional import model as model_module
from bnn.functional.calibration import Choice, Trial, calibrate, calibrate_single, mixes_rows, profiled
from bnn.functional.model import _spread
from bnn.functional.ways import Way
from bnn.seeding import generator
from bnn.tracing import has_compiler

SAMPLES = 6
compiler = pytest.mark.skipif(not has_compiler(torch.device("cpu")), reason="no C++ compiler for torch.compile")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed, *shape))


def bank_of(module: nn.Module, size: int = SAMPLES, dtype: torch.dtype | None = None) -> Bank:
    """Samples about the module's own values, one chain each."""
    states = [
        {
            name: tensor.detach() + 0.3 * normal(*tensor.shape, seed=k) if tensor.is_floating_point() else tensor
            for name, tensor in module.state_dict().items()
        }
        for k in range(size)
    ]
    for state in states:
        state.update({name: buffer for name, buffer in module.named_buffers() if name in state})
    if dtype is None:
        return Bank.from_state_dicts(states, module=module)
    other = Bank.from_state_dicts(states, module=module)
    params = {name: torch.stack([one[name] for one in other]).to(dtype) for name in other.layout.names}
    entries = tuple(entry._replace(dtype=dtype) for entry in other.layout.entries)
    block = other.block(slice(None))._replace(params=params)
    return Bank.from_blocks([block], layout=type(other.layout)(entries, other.layout.aliases), info={})


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


# Auto


def test_auto_tries_the_ways_once_and_explains() -> None:
    module = mlp()
    net, x = FunctionalModel(module, bank_of(module)), normal(5, 4)
    assert net.explain() == ""
    with torch.no_grad():
        net(x, slice(None))
        told = net.explain()
        net(x, [3, 1, 0, 2, 5])  # of about the size
        assert net.explain() == told
        net(normal(7, 4), slice(None))
    assert told.splitlines()[0].startswith("module, up to 8 samples, x [5, 4]: ")
    assert sum("us a sample" in line for line in told.splitlines()) >= 3
    assert sum(line.startswith("  *") for line in told.splitlines()) == 1
    assert len(net.explain().splitlines()) == 2 * len(told.splitlines())


def test_auto_takes_the_least_time_of_what_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that the test sets: seconds a block by way of running it."""
    module, x = mlp(), normal(5, 4)
    net = FunctionalModel(module, bank_of(module, 40))
    params = net.bank.block(slice(None)).params
    runner = net._whole
    net(x, 0)
    profile = profiled(lambda: runner.one({n: t[0] for n, t in params.items()}, x, ("a",)), [x])
    for costs, best in (
        (
            {
                "loop": 1.0,
                "vmap of 8": 4.0,
                "vmap of 32": 40.0,
                "loop, traced": 2.0,
                "vmap of 8, traced": 9.0,
                "vmap of 2, traced": 9.0,
            },
            "vmap of 8",
        ),
        (
            {
                "loop": 1.0,
                "vmap of 8": 9.0,
                "vmap of 32": 90.0,
                "loop, traced": 0.5,
                "vmap of 8, traced": 9.0,
                "vmap of 2, traced": 9.0,
            },
            "loop, traced",
        ),
        (
            {
                "loop": 1.0,
                "vmap of 8": 4.0,
                "vmap of 32": 1.0,
                "vmap of 40": 2.0,
                "loop, traced": 2.0,
                "vmap of 32, traced": 0.1,
            },
            "vmap of 32, traced",
        ),
    ):
        tried: list[Way] = []
        block = runner.block

        def recorded(way: Way, *rest: Any, block: Any = block, tried: list[Way] = tried) -> Any:
            tried.append(way)
            return block(way, *rest)

        def clock(run: Any, device: Any, costs: dict[str, float] = costs, tried: list[Way] = tried) -> float:
            run()
            return costs[str(tried[-1])] * (4 if tried[-1].strategy == "loop" else 1)

        monkeypatch.setattr(runner, "block", recorded)
        monkeypatch.setattr("bnn.functional.calibration.seconds_of", clock)
        monkeypatch.setattr("bnn.functional.calibration._worth", lambda *_: True)
        monkeypatch.setattr("bnn.functional.calibration.LONG_SAMPLE", 1e9)
        found = calibrate(runner, params, x, profile, forms=("eager", "traced"), most_samples=1000, rows=None)
        assert str(found.way) == best
        monkeypatch.setattr(runner, "block", block)


@pytest.mark.parametrize("hit", ["eager", "traced"])
def test_a_measurement_that_something_else_hit_does_not_decide(monkeypatch: pytest.MonkeyPatch, hit: str) -> None:
    """A trace takes 1, Python 1.2; what else runs adds half to the first measurement of one of them."""
    module, x = mlp(), normal(5, 4)
    net = FunctionalModel(module, bank_of(module, 3))
    runner, params, seen = net._whole, net.bank[0], {"eager": 0, "traced": 0}
    net(x, 0)
    profile = profiled(lambda: runner.again(params, x), [])

    def clock(run: Any, device: Any) -> float:
        form = "traced" if getattr(run, "func", None) == runner.single else "eager"
        seen[form] += 1
        return {"eager": 1.2, "traced": 1.0}[form] * (1.5 if form == hit and seen[form] == 1 else 1.0)

    monkeypatch.setattr("bnn.functional.calibration.seconds_of", clock)
    found = calibrate_single(runner, params, x, profile, ("eager", "traced"))
    assert str(found.way) == "loop, traced"
    assert seen == {"eager": 2, "traced": 2}


def test_a_way_that_gives_other_outputs_is_not_open() -> None:
    class Odd(nn.Module):
        """Looks whether it is under vmap, which no module should."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale + float(torch._C._functorch.is_batchedtensor(self.scale))

    module = Odd()
    net, x = FunctionalModel(module, bank_of(module)), normal(5, 4)
    with torch.no_grad():
        torch.testing.assert_close(net(x, [0, 4])[1], x * net.bank[4]["scale"])
    assert "vmap of 2: not open: outputs differ" in net.explain()


@pytest.mark.parametrize("branch", ["if", "shape", "item"])
def test_forwards_that_follow_values_are_not_traced(branch: str) -> None:
    """A trace of one batch would be wrong for another; the outputs must be right for both."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            if branch == "if":
                return x * self.scale if x.sum() > 0 else x - self.scale
            if branch == "shape":
                return x * self.scale / x[x > 0].numel()
            return x * self.scale * float(x.sum())

    module = Branch()
    net = FunctionalModel(module, bank_of(module))
    with torch.no_grad():
        for x in (normal(5, 4).abs(), -normal(5, 4).abs() - 0.1, normal(5, 4, seed=1)):
            for _ in range(20):  # past the calls after which single samples are traced
                found = net(x, 3)
            expected = torch.func.functional_call(module, dict(net.bank[3]), (x,))
            torch.testing.assert_close(found, expected)
            torch.testing.assert_close(net(x, [3, 1])[0], expected)


def test_single_samples_are_traced_only_after_some_calls_and_agree() -> None:
    module, x = mlp(), normal(5, 4)
    net = FunctionalModel(module, bank_of(module))
    with torch.no_grad():
        first = [net(x, k) for k in range(SAMPLES)]
        assert "one sample" not in net.explain()
        for _ in range(20):
            net(x, 0)
        assert "module, one sample, x [5, 4]: loop" in net.explain()
        for k in range(SAMPLES):
            torch.testing.assert_close(net(x, k), first[k])
            torch.testing.assert_close(net._whole.single("traced", net.params(k), x), first[k])
        module[0].weight.add_(1.0)  # the sample's, not the module's
        torch.testing.assert_close(net(x, 0), first[0])


def test_traces_see_what_changes_outside_the_sample() -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).eval()
    bank = bank_of(module)
    last = Bank.from_blocks(
        [
            bank.block(slice(None))._replace(
                params={n: torch.stack([one[n] for one in bank]) for n in ("0.weight", "0.bias")}
            )
        ],
        layout=type(bank.layout)(bank.layout.entries[:2]),
        info={},
    )
    net, x = FunctionalModel(module, last), normal(5, 4)
    for name in ("loop", "vmap"):
        way = Way(name, "traced", 6)  # type: ignore[arg-type]
        params = last.block(slice(None)).params
        with torch.no_grad():
            net(x, 0)
            before = net._whole.block(way, params, x)
            module[2].weight.mul_(2.0)
            module[1].running_mean.add_(0.5)
            after = net._whole.block(way, params, x)
            assert not torch.equal(before, after)
            torch.testing.assert_close(after, net._whole.block(Way("loop"), params, x))


@compiler
@pytest.mark.parametrize("strategy", ["auto", "loop", "vmap"])
def test_compiled_equals_eager(strategy: Any) -> None:
    module, x = mlp(), normal(5, 4)
    bank = bank_of(module)
    plain = FunctionalModel(module, bank, strategy="loop")
    net = FunctionalModel(module, bank, strategy=strategy, compile=True)
    with torch.no_grad():
        torch.testing.assert_close(net(x, slice(None)), plain(x, slice(None)))
        torch.testing.assert_close(net(x, 2), plain(x, 2))
        torch.testing.assert_close(net(x, 3), plain(x, 3))
    assert "compiled" in net.explain()
    x.requires_grad_()
    net(x, 2).sum().backward()  # through Python
    assert x.grad is not None


def test_without_a_compiler_compile_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bnn.tracing.has_compiler", lambda device: False)
    module = mlp()
    with pytest.raises(ConfigError, match=r"compile: want a C\+\+ compiler"):
        FunctionalModel(module, bank_of(module), compile=True)


@compiler
def test_a_forward_that_cannot_be_compiled_is_refused_by_name() -> None:
    class Branch(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    module = nn.Sequential(Branch(4, 3))
    for strategy in ("auto", "loop"):
        net = FunctionalModel(module, bank_of(module), compile=True, strategy=strategy)  # type: ignore[arg-type]
        with pytest.raises(ModuleError, match=r"got .*(value|data|trac)"), torch.no_grad():
            net(normal(5, 4), slice(None))


def test_settled_follows_the_module_and_not_the_clock() -> None:
    for module, expected in ((mlp(), "vmap"), (nn.Sequential(nn.Conv1d(2, 3, 1)), "loop"), (nn.LSTM(4, 3), "loop")):
        net = FunctionalModel(module, bank_of(module))
        assert net.settled().strategy == expected
        assert net.settled().compile is False
        assert FunctionalModel(module, net.bank, strategy="loop", compile=False).settled().strategy == "loop"
    net = FunctionalModel(module := mlp(), bank_of(module)).settled()
    assert torch.equal(
        net(normal(5, 4), slice(None)), FunctionalModel(module, net.bank).settled()(normal(5, 4), slice(None))
    )


# Memory


@pytest.mark.parametrize("strategy", ["auto", "loop", "vmap"])
def test_blocks_keep_to_a_budget(strategy: Any) -> None:
    """Bytes of the values that are alive at once, beside the outputs: at most the budget, for samples and then rows."""
    module, x = nn.Sequential(nn.Linear(4, 256), nn.Tanh(), nn.Linear(256, 3)), normal(64, 4)
    bank = bank_of(module, 20)
    expected = FunctionalModel(module, bank, strategy="loop")(x, slice(None))
    one = 2 * 64 * 256 * 4  # of one sample on all rows
    for budget in (4 * one, one // 2, one // 16):
        net = FunctionalModel(module, bank, strategy=strategy, memory=budget)
        with torch.no_grad():
            torch.testing.assert_close(net(x, slice(None)), expected, rtol=1e-5, atol=1e-5)
            params = bank.block(slice(None)).params
            outputs = 4 * 20 * 64 * 3 * 4  # in pieces, put together, once more while rows are
            run = partial(net.apply, bank.block(slice(None)), x)
            profiled(run, [])  # under a meter everything runs through Python, which is a choice of its own
            peak = profiled(run, [x, *params.values()]).bytes
        assert peak <= budget + outputs
        way = next(iter(net._chooser.choices.values())).way
        assert (way.rows is None) == (budget > one)


def test_rows_of_a_module_that_mixes_them_are_not_cut() -> None:
    class Centred(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(dim=0))

    module, x = Centred(4, 3), normal(64, 4)
    bank = bank_of(module)
    net = FunctionalModel(module, bank, memory=1, strategy="loop")
    with torch.no_grad():
        for k, found in enumerate(net(x, slice(None))):
            torch.testing.assert_close(found, F.linear(x - x.mean(dim=0), bank[k]["weight"], bank[k]["bias"]))
    assert next(iter(net._chooser.choices.values())).way.rows is None
    cpu = torch.device("cpu")
    assert mixes_rows(lambda part: module(part), x, 10, cpu)
    assert not mixes_rows(lambda part: F.linear(part, module.weight), x, 10, cpu)
    assert mixes_rows(lambda part: module.weight, x, 10, cpu)  # no row of its own for each


class Hungry(nn.Linear):
    """Runs out of memory on more than so many rows, all samples together."""

    most = 8

    def forward(self, x: Tensor) -> Tensor:
        size = (
            torch._C._functorch.get_unwrapped(self.weight).shape[0]
            if torch._C._functorch.is_batchedtensor(self.weight)
            else 1
        )
        if size * len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return super().forward(x)


def test_out_of_memory_halves_samples_and_then_rows_and_says_so_once() -> None:
    module = Hungry(4, 3)
    net = FunctionalModel(module, bank_of(module), strategy="vmap")
    x = normal(4, 4)
    expected = torch.stack([F.linear(x, one["weight"], one["bias"]) for one in net.bank])
    with pytest.warns(SlowerWay, match="out of memory by vmap of 6: going on by vmap of 3") as said, torch.no_grad():
        torch.testing.assert_close(net(x, slice(None)), expected)
    assert len(said) == 1
    assert [choice.way for choice in net._chooser.choices.values()] == [Way("vmap", "eager", 1)]
    with torch.no_grad():  # no more warnings, which would be errors here
        torch.testing.assert_close(net(x, slice(None)), expected)
        x = normal(30, 4)
        found = net(x, slice(None))
    torch.testing.assert_close(found, torch.stack([F.linear(x, one["weight"], one["bias"]) for one in net.bank]))
    assert [choice.way for choice in net._chooser.choices.values()][1] == Way("vmap", "eager", 1, 7)


def test_out_of_memory_that_cannot_be_halved_is_raised() -> None:
    module = Hungry(4, 3)
    Hungry.most = 0
    try:
        net = FunctionalModel(module, bank_of(module), strategy="loop")
        with pytest.raises(torch.OutOfMemoryError):
            net(normal(4, 4), slice(None))
    finally:
        Hungry.most = 8


MEMORY_LIMIT = """
import resource, warnings, torch, bnn
from torch import nn
torch.set_num_threads(1)
module = nn.Sequential(nn.Linear(8, 4096), nn.Tanh(), nn.Linear(4096, 2))
bank = bnn.Bank.from_state_dicts([module.state_dict()] * 40, module=module)
x = torch.randn(512, 8)
expected = module(x)
net = bnn.FunctionalModel(module, bank, strategy="vmap", memory=2**40)
net(x[:2], [0, 1])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 200 * 2**20,) * 2)
with torch.no_grad(), warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    found = net(x, slice(None))  # 40 samples of 8 MiB an activation
assert torch.allclose(found, expected.expand(40, -1, -1), atol=1e-5)
print([str(one.message) for one in seen if "out of memory" in str(one.message)])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_a_process_that_has_no_more_memory_goes_on_with_less() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_LIMIT], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "going on by vmap of" in done.stdout


def test_spread_orders_begin_everywhere() -> None:
    for count in (1, 2, 3, 8, 13):
        assert sorted(_spread(count)) == list(range(count))
    assert _spread(8)[:4] == [0, 4, 2, 6]


# Nothing is changed, and what writes is refused


class Writer(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.mul_(2.0)
        return super().forward(x)


class LateWriter(nn.Linear):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        if type(self).calls > 3:
            self.weight.mul_(2.0)
        return super().forward(x)


@pytest.mark.parametrize("strategy", ["auto", "loop", "vmap"])
@pytest.mark.parametrize("index", [2, slice(None)], ids=["one", "block"])
def test_a_module_that_writes_into_its_parameters_is_refused_before_the_bank_is_touched(
    index: Any, strategy: Any
) -> None:
    module = nn.Sequential(Writer(4, 3))
    bank = bank_of(module)
    before = bank.block(slice(None)).params["0.weight"].clone()
    net = FunctionalModel(module, bank, strategy=strategy)
    with (
        pytest.raises(ModuleError, match=r"parameter '0\.weight': want a forward that leaves .* in place"),
        torch.no_grad(),
    ):
        net(normal(5, 4), index)
    assert torch.equal(bank.block(slice(None)).params["0.weight"], before)


def test_a_module_that_writes_later_is_seen_too() -> None:
    module = LateWriter(4, 3)
    LateWriter.calls = 0
    net = FunctionalModel(module, bank_of(module), strategy="loop")
    with torch.no_grad():
        net(normal(5, 4), 0)
        while LateWriter.calls < 3:
            net(normal(5, 4), 1)
        with pytest.raises(ModuleError, match="parameter 'weight'"):
            net(normal(5, 4), 1)


def test_a_module_that_writes_into_its_inputs_is_refused() -> None:
    module = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3))
    x = normal(5, 4)
    before = x.clone()
    for index in (1, slice(None)):
        with (
            pytest.raises(ModuleError, match=r"input x: want a forward that leaves what it is given alone"),
            torch.no_grad(),
        ):
            FunctionalModel(module, bank_of(module))(x, index)
    assert torch.equal(x, before)


@pytest.mark.parametrize("strategy", ["auto", "loop", "vmap"])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_what_stops_a_forward_leaves_everything_as_it_was(stop: type[BaseException], strategy: Any) -> None:
    class Stops(nn.Linear):
        stopping = False

        def forward(self, x: Tensor) -> Tensor:
            outputs = super().forward(x)
            if type(self).stopping:
                raise stop
            return outputs

    module = nn.Sequential(Stops(4, 3), nn.Dropout(0.5))
    bank, x = bank_of(module), normal(5, 4)
    net = FunctionalModel(module, bank, strategy=strategy, compile=False)  # a trace does not enter the forward
    module.eval()
    expected = net(x, slice(None))
    state, values = torch.get_rng_state(), {n: t.clone() for n, t in module.state_dict().items()}
    Stops.stopping = True
    for training in (False, True):
        module.train(training and strategy != "vmap")
        with pytest.raises(stop):
            net(x, slice(None))
        with pytest.raises(stop):
            net(x, 1)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(values[n], t) for n, t in module.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled()
    Stops.stopping = False
    module.eval()
    torch.testing.assert_close(net(x, slice(None)), expected)


def test_four_threads_with_blocks_and_single_samples() -> None:
    module, x = nn.Sequential(*[nn.Linear(8, 8) for _ in range(10)]), normal(3, 8)
    net = FunctionalModel(module, bank_of(module, 16))
    plain = FunctionalModel(module, net.bank, strategy="loop", compile=False)
    with torch.no_grad():
        expected = plain(x, slice(None))
    wrong: list[int] = []

    def work(start: int) -> None:
        with torch.no_grad():
            for step in range(40):
                index = (start + step) % 12
                found = net(x, slice(index, index + 4)), net(x, index)
                if not torch.allclose(found[0], expected[index : index + 4], atol=1e-5) or not torch.allclose(
                    found[1], expected[index], atol=1e-5
                ):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(3 * k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# Gradients, dtypes, autocast


@pytest.mark.parametrize("strategy", ["auto", "loop", "vmap"])
@pytest.mark.parametrize("call", ["one", "block", "rows"])
def test_gradients_reach_inputs_and_free_parameters_through_every_way(call: str, strategy: Any) -> None:
    module = mlp()
    bank = bank_of(module)
    head = Bank.from_blocks(
        [
            bank.block(slice(None))._replace(
                params={n: torch.stack([one[n] for one in bank]) for n in ("2.weight", "2.bias")}
            )
        ],
        layout=type(bank.layout)(bank.layout.entries[2:]),
        info={},
    )
    rows = torch.tensor([1, 3, 1, 0, 5])
    arguments: dict[str, Any] = {"one": {"index": 3}, "block": {"index": [0, 3, 5]}, "rows": {"rows": rows}}[call]
    found = []
    for net in (
        FunctionalModel(module, head, strategy=strategy),
        FunctionalModel(module, head, strategy="loop", compile=False),
    ):
        x = normal(5, 4).requires_grad_()
        module.zero_grad()
        for _ in range(3):
            outputs = net(x, **arguments)
        outputs.square().sum().backward()
        assert x.grad is not None
        found.append((outputs.detach(), x.grad, module[0].weight.grad.clone()))
        assert module[2].weight.grad is None
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected)
    filled = mlp()
    filled.load_state_dict(module.state_dict() | head[3])
    if call == "one":
        torch.testing.assert_close(found[0][0], filled(normal(5, 4)))


@pytest.mark.parametrize("strategy", ["auto", "loop", "vmap"])
def test_banks_of_other_dtypes_are_cast_to_the_modules(strategy: Any) -> None:
    module, x = mlp(), normal(5, 4)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        bank = bank_of(module, dtype=dtype)
        net = FunctionalModel(module, bank, strategy=strategy)
        with torch.no_grad():
            found = net(x, slice(None))
            assert found.dtype == torch.float32
            filled = mlp()
            filled.load_state_dict({name: tensor.float() for name, tensor in bank[4].items()})
            torch.testing.assert_close(found[4], filled(x))
            torch.testing.assert_close(net(x, 4), filled(x))
            torch.testing.assert_close(net(x, rows=torch.tensor([4, 4, 1, 4, 4]))[0], filled(x)[0])
    net = FunctionalModel(module, bank_of(module), strategy=strategy)
    net(x, 0)
    module.double()  # seen at the next call
    assert net(x.double(), slice(None)).dtype == net(x.double(), 0).dtype == torch.float64


@pytest.mark.parametrize("strategy", ["auto", "loop", "vmap"])
def test_autocast_is_the_callers(strategy: Any) -> None:
    module, x = mlp(), normal(5, 4)
    net = FunctionalModel(module, bank_of(module), strategy=strategy)
    said = (
        pytest.warns(SlowerWay, match="vmap cannot take .*it casts nothing under autocast")
        if strategy == "vmap"
        else nullcontext()
    )
    with torch.no_grad():
        plain = net(x, slice(None))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with said:
                mixed = net(x, slice(None))
            assert torch.equal(net(x, slice(None)), mixed)
            for _ in range(20):
                single = net(x, 2)
        again = net(x, slice(None))
    assert mixed.dtype == single.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), plain, rtol=0.05, atol=0.05)
    torch.testing.assert_close(single.float(), plain[2], rtol=0.05, atol=0.05)
    assert torch.equal(again, plain)


# Dropout


@pytest.mark.parametrize("kind", ["layer", "function"])
def test_dropout_in_train_mode_has_a_stream_for_each_sample_and_batch(kind: str) -> None:
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.drop = nn.Linear(4, 50), nn.Dropout(0.5 if kind == "layer" else 0.0)

        def forward(self, x: Tensor) -> Tensor:
            found = self.drop(self.fc(x))
            return F.dropout(found, 0.5, self.training) if kind == "function" else found

    module, x = Drops(), torch.ones(3, 4)
    bank = bank_of(module)
    net = FunctionalModel(module, bank, seed=7)
    state = torch.get_rng_state()
    with torch.no_grad():
        block = net(x, slice(None), batch=5)
        zero = block == 0
        assert 0.4 < float(zero.double().mean()) < 0.6
        assert not torch.equal(zero[0], zero[1])  # a mask a sample
        assert torch.equal(net(x, 3, batch=5), block[3])  # whatever it is run with
        assert torch.equal(net(x, [4, 3], batch=5), block[[4, 3]])
        assert torch.equal(net(x, rows=torch.tensor([3, 3, 3]), batch=5), block[3])
        assert not torch.equal(net(x, 3, batch=6) == 0, zero[3])  # and a batch
        assert not torch.equal(FunctionalModel(module, bank, seed=8)(x, 3, batch=5) == 0, zero[3])
        again = FunctionalModel(module, bank, seed=7)
        counted = [again(x, 3) for _ in range(2)]
        assert not torch.equal(counted[0] == 0, counted[1] == 0)  # batches are counted
        assert torch.equal(FunctionalModel(module, bank, seed=7)(x, 3), counted[0])
        module.eval()
        plain = net(x, slice(None))
        assert not bool((plain == 0).any())
        assert torch.equal(torch.where(zero, 0.0, 2 * plain), torch.where(zero, 0.0, block))
    assert torch.equal(state, torch.get_rng_state())


def test_what_draws_is_refused_under_vmap() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    net = FunctionalModel(module, bank_of(module), strategy="vmap")
    with pytest.raises(ModuleError, match=r"no random numbers under strategy='vmap'.*use strategy='loop'"):
        net(normal(5, 4), slice(None))


# Graphs


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["loop", "vmap"])
def test_cuda_graphs_replay_with_other_samples_and_rows(device: str, strategy: Any) -> None:
    if device == "cpu":
        pytest.skip("a CPU has no graphs")
    module = mlp()
    bank = bank_of(module, 12)
    net = FunctionalModel(module, bank, device=device)
    plain = FunctionalModel(module, bank)
    with torch.no_grad():
        for seed, chosen in enumerate((slice(0, 6), slice(6, 12), slice(0, 6))):
            x = normal(5, 4, seed=seed)
            net(x, 0)
            found = net._whole.block(Way(strategy, "graph", 6), net._taken(bank.block(chosen).params), x.to(device))
            torch.testing.assert_close(found.cpu(), plain(x, chosen), rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_auto_on_cuda_gives_what_the_cpu_gives(device: str) -> None:
    module, x = mlp(), normal(5, 4)
    bank = bank_of(module, 40)
    expected = FunctionalModel(module, bank)(x, slice(None))
    net = FunctionalModel(module, bank, device=device)
    with torch.no_grad():
        torch.testing.assert_close(net(x, slice(None)).cpu(), expected, rtol=1e-3, atol=1e-4)
        for _ in range(20):
            torch.testing.assert_close(net(x, 3).cpu(), expected[3], rtol=1e-3, atol=1e-4)


def test_a_choice_is_kept_as_it_was_made() -> None:
    way = Way("vmap", "traced", 32, 100)
    assert str(way) == "vmap of 32, traced, 100 rows at once"
    assert Choice(way, (Trial(way, 1.0),), profiled(lambda: torch.ones(3), [])).profile.output_bytes == 12
    assert model_module.STRATEGIES == ("auto", "loop", "vmap")


# Inputs and surroundings that once gave wrong results


class Flagged(nn.Linear):
    def forward(self, x: Tensor, flag: Any = False) -> Tensor:
        outputs = super().forward(x)
        for _ in range(20):
            outputs = outputs.tanh() * 1.1
        if flag is True and float(outputs.sum()) > -1e9:
            outputs = -outputs
        return outputs * 3 if flag == 1 and flag is not True else outputs


def test_plain_values_among_inputs_are_told_apart() -> None:
    module, x = Flagged(4, 3), normal(5, 4)
    net = FunctionalModel(module, bank_of(module))
    with torch.no_grad():
        for flag in (False, True, 1, 1.0, 0):
            expected = torch.stack([torch.func.functional_call(module, dict(one), (x, flag)) for one in net.bank])
            for _ in range(20):
                torch.testing.assert_close(net({"x": x, "flag": flag}, 2), expected[2])
            torch.testing.assert_close(net({"x": x, "flag": flag}, slice(None)), expected)


def test_objects_among_inputs_are_seen_as_they_are() -> None:
    class Options:
        factor = 1.0

    class Optional(nn.Linear):
        def forward(self, x: Tensor, options: Options) -> Tensor:
            return super().forward(x) * options.factor

    module, x, options = Optional(4, 3), normal(5, 4), Options()
    net = FunctionalModel(module, bank_of(module))
    with torch.no_grad():
        for factor in (1.0, 5.0):
            options.factor = factor
            for _ in range(20):
                found = net({"x": x, "options": options}, 2)
            torch.testing.assert_close(found, factor * F.linear(x, net.bank[2]["weight"], net.bank[2]["bias"]))
            torch.testing.assert_close(net({"x": x, "options": options}, [2, 1, 0, 3])[0], found)


def test_buffers_of_another_shape_and_tensors_that_are_replaced_are_seen() -> None:
    class Masked(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 3)
            self.register_buffer("mask", torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return (super().forward(x).unsqueeze(-1) * self.mask).sum(-1) / self.mask.numel()

    module, x = Masked(), normal(5, 4)
    net = FunctionalModel(module, bank_of(module))
    with torch.no_grad():
        for mask in (torch.ones(1), torch.arange(4.0)):
            module.mask = mask
            expected = torch.stack([torch.func.functional_call(module, dict(one), (x,)) for one in net.bank])
            for _ in range(20):
                torch.testing.assert_close(net(x, 2), expected[2])
            torch.testing.assert_close(net(x, slice(None)), expected)


def test_rows_are_cut_only_where_the_very_pieces_give_the_same() -> None:
    class Shared(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + (x[:, 0] > 0).float().mean()

    module, x = Shared(4, 3), normal(64, 4)
    x[:2] = x[0]
    bank = bank_of(module)
    net = FunctionalModel(module, bank, memory=1000, strategy="loop")
    with torch.no_grad():
        for k, found in enumerate(net(x, slice(None))):
            torch.testing.assert_close(
                found, F.linear(x, bank[k]["weight"], bank[k]["bias"]) + (x[:, 0] > 0).float().mean()
            )


def test_vmap_that_differs_from_the_loop_is_not_taken() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    module = nn.TransformerEncoder(layer, 1).eval()
    x, mask = normal(3, 6, 8), torch.zeros(3, 6, dtype=torch.bool)
    mask[0, 3:] = True  # torch's fast path gives zeros there, its other one does not
    bank = bank_of(module)
    inputs = {"src": x, "src_key_padding_mask": mask}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of nested tensors, and ours that is tested elsewhere
        expected = FunctionalModel(module, bank, strategy="loop")(inputs, slice(None))
        for strategy in ("vmap", "auto"):
            found = FunctionalModel(module, bank, strategy=strategy)(inputs, slice(None))  # type: ignore[arg-type]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("warm", [False, True])
def test_transforms_of_torch_may_be_around_a_call(warm: bool) -> None:
    module, x = mlp(), normal(5, 4)
    net = FunctionalModel(module, bank_of(module))
    if warm:
        net(x, 0)
        net(x, [0, 1])
    plain = FunctionalModel(module, net.bank, strategy="loop", compile=False)
    leaf = x.clone().requires_grad_()
    plain(leaf, 0).sum().backward()
    torch.testing.assert_close(torch.func.grad(lambda a: net(a, 0).sum())(x), leaf.grad)
    assert torch.func.jacrev(lambda a: net(a, 0))(x).shape == (5, 3, 5, 4)
    rows = torch.func.vmap(lambda a: net(a.unsqueeze(0), [0, 1, 2, 3]).squeeze(1))(x)
    torch.testing.assert_close(rows.transpose(0, 1), plain(x, [0, 1, 2, 3]))


def test_writes_by_way_of_data_are_refused_before_the_bank_is_touched() -> None:
    class Clamped(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.weight.data.clamp_(min=0.0)
            return super().forward(x)

    module = Clamped(4, 3)
    for index in (1, slice(None)):
        net = FunctionalModel(module, bank_of(module))
        before = net.bank.block(slice(None)).params["weight"].clone()
        with pytest.raises(ModuleError, match="parameter 'weight'"), torch.no_grad():
            net(normal(5, 4), index)
        assert torch.equal(before, net.bank.block(slice(None)).params["weight"])


def test_inference_mode_changes_nothing() -> None:
    class Counts(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 3)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return super().forward(x) * self.count

    module, x = Counts(), normal(5, 4)
    net = FunctionalModel(module, bank_of(module), strategy="loop")
    with torch.inference_mode():
        found = net(x, slice(None))
        for k, one in enumerate(net.bank):
            torch.testing.assert_close(found[k], F.linear(x, one["weight"], one["bias"]))
    leaf = x.clone().requires_grad_()
    net(leaf, 0).sum().backward()
    assert leaf.grad is not None
    writer = nn.Sequential(Writer(4, 3))
    with pytest.raises(ModuleError, match=r"parameter '0\.weight'"), torch.inference_mode():
        FunctionalModel(writer, bank_of(writer))(x, slice(None))


def test_negative_indices_are_the_same_samples_also_where_layers_draw() -> None:
    module, x = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5)), normal(3, 4)
    net = FunctionalModel(module, bank_of(module))
    with torch.no_grad():
        last = net(x, SAMPLES - 1, batch=3)
        assert torch.equal(net(x, -1, batch=3), last)
        assert torch.equal(net(x, [-1], batch=3)[0], last)
        assert torch.equal(net(x, rows=torch.tensor([-1, SAMPLES - 1, -1]), batch=3), last)


@pytest.mark.parametrize("index", [torch.ones(SAMPLES, dtype=torch.bool), [0.5, 1.0], torch.tensor(1.7), True])
def test_masks_and_fractions_are_no_indices(index: Any) -> None:
    from bnn.errors import DataError

    module = mlp()
    net = FunctionalModel(module, bank_of(module))
    with pytest.raises(DataError, match=r"net\(x, index\): want whole numbers"):
        net(normal(5, 4), index)
    with pytest.raises(DataError, match=r"net\(x, rows=\): want"):
        net(normal(SAMPLES, 4), rows=torch.zeros(SAMPLES, 1, dtype=torch.int64))
    assert net(normal(3, 4), rows=[0, 1, 0]).shape == (3, 3)  # type: ignore[arg-type]


def test_a_bank_is_sent_as_large_as_it_is() -> None:
    import pickle

    module = nn.Linear(50, 50)
    bank = bank_of(module, 30)
    before = len(pickle.dumps(bank))
    bank[3]
    assert len(pickle.dumps(bank)) < 1.1 * before
