"""Which way to run a block of samples: measured once for each shape, on the samples and rows that came."""

from __future__ import annotations

import time
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bnn.errors import BnnError
from bnn.functional.outputs import taken_apart
from bnn.functional.ways import Form, Runner, Way, num_rows, rows_of
from bnn.types import Params

CALL_SECONDS = 8e-6  # that Python spends about an operation, which a trace saves
WORTH_TRACING = 0.05  # share of a sample's time that this must be
SHORT_TRACE, LONGEST_TRACE = 100, 2000  # operations
HARDLY_MORE = 1.03  # times the least seconds: within the noise of a measurement
LONG_SAMPLE = 0.1  # seconds of one sample on a CPU, where there is nothing left to gain by running several at once
FIRST_BLOCK, GROWTH, WORSE = 8, 4, 1.2  # samples that vmap is tried with first; how they grow, until that costs more
TRIAL_SECONDS, TRIAL_RUNS, MOST_RUNS = 0.01, 3, 50  # runs of a trial: three, and more while they are short
NEAR = 2.0  # times the least seconds: ways that are timed once more, since what else ran may have hit one of them


class Profile(NamedTuple):
    """What one sample takes on a batch."""

    bytes: int  # of the values that are alive at once, at most
    output_bytes: int
    operations: int


class Trial(NamedTuple):
    """One way, and what a sample took by it; None where it is not open, and why."""

    way: Way
    seconds: float | None
    why: str = ""


class Choice(NamedTuple):
    """The way of one shape of x and block, and what else was tried."""

    way: Way
    trials: tuple[Trial, ...]
    profile: Profile


def calibrate_single(runner: Runner, params: Params, x: Any, profile: Profile, forms: tuple[Form, ...]) -> Choice:
    """The form of single samples, each run on its own: through Python, or by a trace where calls are what costs."""
    trials: list[Trial] = []

    def attempt(way: Way, run: Callable[[], Any]) -> None:
        try:
            with torch.no_grad():
                if not close(stack_of(run()), reference, runner.device):
                    trials.append(Trial(way, None, "outputs differ from those through Python"))
                    return
                trials.append(Trial(way, seconds_of(run, runner.device)))
        except Exception as error:  # a form that is not open to this module, for whatever reason torch finds
            trials.append(Trial(way, None, words(error)))

    def stack_of(outputs: Any) -> Any:
        return [tensor.unsqueeze(0) for tensor in taken_apart(outputs)[0]]

    def python() -> Any:
        return runner.one(params, x, (0, "forward", 0, 0))

    with torch.no_grad():
        reference = stack_of(python())
    attempt(Way("loop"), python)
    for form in forms:
        if form != "eager" and _worth(form, profile, trials[0].seconds or 0.0):
            attempt(Way("loop", form), partial(runner.single, form, params, x))

    def again(way: Way) -> float:
        run = python if way.form == "eager" else partial(runner.single, way.form, params, x)
        with torch.no_grad():
            return seconds_of(run, runner.device)

    trials = runoff(trials, again)
    allowed = [t for t in trials if t.seconds is not None and t.way.form in forms] or trials[:1]
    return Choice(_simplest(allowed), tuple(trials), profile)


class Meter(TorchDispatchMode):
    """Counts operations, and the bytes of the values that they make and that are alive at once.

    `ignore` are tensors that were there before.
    """

    def __init__(self, ignore: list[Tensor]) -> None:
        super().__init__()
        self.operations = self.peak = self._alive = 0
        self._before = {tensor.untyped_storage()._cdata for tensor in ignore}
        self._holders: dict[int, int] = {}  # how many tensors lie in a storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.operations += 1
        for leaf in pytree.tree_leaves(found):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
                storage = leaf.untyped_storage()
                if storage._cdata not in self._before:
                    self._hold(leaf, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self._alive)
        return found

    def _hold(self, tensor: Tensor, storage: int, size: int) -> None:
        if storage not in self._holders:
            self._holders[storage] = 0
            self._alive += size
        self._holders[storage] += 1
        weakref.finalize(tensor, self._release, storage, size)

    def _release(self, storage: int, size: int) -> None:
        self._holders[storage] -= 1
        if not self._holders[storage]:
            del self._holders[storage]
            self._alive -= size


def profiled(run: Callable[[], Any], ignore: list[Tensor]) -> Profile:
    """Run a forward once, and what it took; `ignore` are the tensors that are there already."""
    meter = Meter(ignore)
    with torch.no_grad(), meter:
        outputs = run()
    tensors, _ = taken_apart(outputs)
    return Profile(meter.peak, sum(tensor.nbytes for tensor in tensors), meter.operations)


def forms_of(compile: bool | None, device: torch.device) -> tuple[Form, ...]:
    """The forms that `auto` may choose from."""
    if compile:
        return ("compiled",)
    if compile is False:
        return ("eager",)
    return ("eager", "traced", "graph") if device.type == "cuda" else ("eager", "traced")


def calibrate(
    runner: Runner,
    params: Params,
    x: Any,
    profile: Profile,
    *,
    forms: tuple[Form, ...],
    most_samples: int,
    rows: int | None,
) -> Choice:
    """Try what is open for a block, and choose what takes the least time a sample.

    Args:
        runner: of the module or its head; one sample has run in these modes.
        params: the samples [K, ...].
        x: the batch.
        profile: of one sample.
        forms: that may be chosen.
        most_samples: that vmap may run at once.
        rows: of x at once, None for all.
    """
    size = len(next(iter(params.values())))
    trials: list[Trial] = []
    device = runner.device

    def part(way: Way) -> tuple[Params, int]:
        # All ways run about as many samples: one that meets few of them again and again meets them in the cache.
        count = min(size, max(way.samples if way.strategy == "vmap" else 1, several))
        return {name: tensor[:count] for name, tensor in params.items()}, count

    def again(way: Way) -> float:
        block, count = part(way)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            return seconds_of(lambda: runner.block(way, block, x), device) / count

    def attempt(way: Way) -> float | None:
        block, count = part(way)
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="There is a performance drop")  # the time shows it
                outputs = runner.block(way, block, x)
                if reference and not close(outputs, reference[0], device):
                    trials.append(Trial(way, None, "outputs differ from those of one sample at a time"))
                    return None
                if not reference:
                    reference.append(outputs)
                seconds = seconds_of(lambda: runner.block(way, block, x), device) / count
        except Exception as error:  # a way that is not open to this module, for whatever reason torch finds
            trials.append(Trial(way, None, words(error)))
            return None
        trials.append(Trial(way, seconds))
        return seconds

    reference: list[Any] = []
    several = 2
    runner.block(
        Way("loop", "eager", 1, rows), {name: tensor[:1] for name, tensor in params.items()}, x
    )  # raises as it is
    first = attempt(Way("loop", "eager", 1, rows))
    assert first is not None
    several = max(2, min(size, int(TRIAL_SECONDS / first)))
    if several > 8:
        trials.clear()
        first = attempt(Way("loop", "eager", 1, rows)) or first
    for form in forms:
        if form != "eager" and _worth(form, profile, first):
            attempt(Way("loop", form, 1, rows))
    if size > 1 and most_samples > 1 and (first < LONG_SAMPLE or device.type != "cpu"):
        best, samples = float("inf"), min(FIRST_BLOCK, size, most_samples)
        base: Form = "eager" if "eager" in forms else forms[0]
        while True:
            seconds = attempt(Way("vmap", base, samples, rows))
            if seconds is None or seconds > WORSE * best:
                break
            best = min(best, seconds)
            if samples == min(size, most_samples):
                break
            samples = min(samples * GROWTH, size, most_samples)
        fastest = min(
            (t for t in trials if t.seconds and t.way.strategy == "vmap"), key=lambda t: t.seconds or 0.0, default=None
        )
        if fastest is not None:
            for form in forms:
                if form != base and _worth(form, profile, (fastest.seconds or 0.0) * fastest.way.samples):
                    for samples in dict.fromkeys((fastest.way.samples, max(fastest.way.samples // GROWTH, 1))):
                        attempt(Way("vmap", form, samples, rows))
    trials = runoff(trials, again)
    allowed = [t for t in trials if t.seconds is not None and t.way.form in forms] or [
        t for t in trials if t.seconds is not None
    ]
    return Choice(_simplest(allowed), tuple(trials), profile)


def runoff(trials: list[Trial], again: Callable[[Way], float]) -> list[Trial]:
    """The same trials, with those near the best timed once more: the least of both counts."""
    least = min((trial.seconds for trial in trials if trial.seconds is not None), default=0.0)
    near = [trial.seconds is not None and trial.seconds <= NEAR * least for trial in trials]
    if sum(near) < 2:
        return trials
    return [
        trial._replace(seconds=min(trial.seconds, again(trial.way))) if is_near and trial.seconds is not None else trial
        for trial, is_near in zip(trials, near, strict=True)
    ]


def _simplest(trials: list[Trial]) -> Way:
    """The first way, as they are tried from simple to involved, that takes hardly more than the fastest."""
    least = min(trial.seconds or 0.0 for trial in trials)
    return next(trial.way for trial in trials if (trial.seconds or 0.0) <= HARDLY_MORE * least)


def words(error: Exception) -> str:
    """What an error says, in a line."""
    lines = str(error).strip().splitlines()
    return (error.got if isinstance(error, BnnError) else f"{type(error).__name__}: {lines[0] if lines else ''}")[:200]


def _worth(form: Form, profile: Profile, seconds: float) -> bool:
    """Whether a form is tried. A trace takes about a millisecond an operation, and may also put operations together."""
    if form == "compiled" or profile.operations <= SHORT_TRACE:
        return True
    return profile.operations <= LONGEST_TRACE and profile.operations * CALL_SECONDS > WORTH_TRACING * seconds


def close(found: Any, expected: Any, device: torch.device) -> bool:
    """Whether outputs agree for the samples that both have, as far as sums in another order do."""
    for mine, theirs in zip(taken_apart(found)[0], taken_apart(expected)[0], strict=True):
        count = min(len(mine), len(theirs))
        mine, theirs = mine[:count], theirs[:count]
        if not mine.is_floating_point():
            if not torch.equal(mine, theirs):
                return False
            continue
        loose = mine.dtype in (torch.float16, torch.bfloat16) or device.type == "cuda"
        scale = float(theirs.abs().nan_to_num(0.0, 0.0, 0.0).max()) if theirs.numel() else 0.0
        if not torch.allclose(
            mine, theirs, rtol=0.0, atol=(2e-2 if loose else 1e-4) * max(scale, 1e-30), equal_nan=True
        ):
            return False
    return True


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """The least seconds of a few runs, after the one that was for checking."""
    best, spent, runs = float("inf"), 0.0, 0
    while (runs < TRIAL_RUNS and spent < 10 * TRIAL_SECONDS) or (spent < TRIAL_SECONDS and runs < MOST_RUNS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
        best, spent, runs = min(best, seconds), spent + seconds, runs + 1
    return best


def mixes_rows(run: Callable[[Any], Any], x: Any, rows: int, device: torch.device) -> bool:
    """Whether outputs of x in pieces of so many rows differ from those of all rows: then a batch cannot be cut."""
    count = num_rows(x) or 0
    with torch.no_grad():
        whole = taken_apart(run(x))[0]
        pieces = [taken_apart(run(rows_of(x, slice(start, start + rows))))[0] for start in range(0, count, rows)]
    if any(tensor.shape[:1] != (count,) for tensor in whole):
        return True
    return not close([torch.cat(list(column)) for column in zip(*pieces, strict=True)], whole, device)
