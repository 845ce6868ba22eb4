"""The ways that a functional model has chosen, one a shape: measured or by option, within a budget of bytes."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bnn.errors import ModuleError, SlowerWay
from bnn.functional.calibration import (
    Choice,
    Profile,
    Trial,
    calibrate,
    calibrate_single,
    close,
    forms_of,
    mixes_rows,
    profiled,
    seconds_of,
    words,
)
from bnn.functional.guarding import FIRST_DRAW, OUT_OF_MEMORY, admitted, is_out_of_memory, tensors_of
from bnn.functional.skeleton import Outputs
from bnn.functional.ways import Form, Runner, Strategy, Way, num_rows, rows_of, signature
from bnn.types import Params

SINGLES_BEFORE_TRACING = 16  # calls of one shape with a single index, before a trace is tried

MOST_CHOICES = 256  # that are kept

Key = tuple[Any, ...]


class Prepared(NamedTuple):
    """A batch and what runs it: the whole module, or its head on what the fixed beginning made of the batch."""

    runner: Runner
    x: Any
    kind: str  # "module" or "head"


class Chooser:
    """Chooses how blocks, single samples and rows are run, and keeps the choices.

    Args:
        strategy, compile, memory: as for `FunctionalModel`.
        device: where to compute.
        name: of the module, for messages.
    """

    def __init__(
        self, *, strategy: Strategy, compile: bool | None, memory: int, device: torch.device, name: str
    ) -> None:
        self.memory = memory
        self.at_once = memory  # bytes of what vmap runs together; one sample may take `memory`
        self.choices: dict[Key, Choice] = {}
        self._strategy, self._compile, self._device, self._name = strategy, compile, device, name
        self._labels: dict[Key, str] = {}  # of the choices, for people
        self._profiles: dict[Key, Profile] = {}
        self._singles: dict[Key, int] = {}  # calls so far, or -1 where the form is chosen
        self._refused: set[str] = set()  # the kinds that vmap cannot take
        self._said: set[str] = set()
        self._lock = threading.RLock()

    def explain(self) -> str:
        """What was chosen for each shape, and what the other ways took."""
        lines: list[str] = []
        with self._lock:
            for key, choice in self.choices.items():
                lines.append(f"{self._labels[key]}: {choice.way}")
                for trial in choice.trials:
                    took = (
                        f"not open: {trial.why}" if trial.seconds is None else f"{trial.seconds * 1e6:,.1f} us a sample"
                    )
                    lines.append(f"  {'*' if trial.way == choice.way else ' '} {trial.way}: {took}")
                if not choice.trials:
                    lines.append("  by option, nothing was tried")
        return "\n".join(lines)

    def of_block(self, prepared: Prepared, params: Params, *, python: bool) -> tuple[Key, Choice]:
        """How a block [K, ...] is run; `python` where traces are no choice."""
        runner, x, kind = prepared
        size = len(next(iter(params.values())))
        key = (*self._key(runner, x, kind, size), python)
        found = self.choices.get(key)
        if found is None:
            label = f"{kind}, {'up to ' * (size > 1)}{bucket(size)} samples" + ", with gradients" * python
            found = self._kept(key, label, x, lambda: self._chosen(prepared, params, python))
        return key, found

    def of_single(self, runner: Runner, params: Params, x: Any) -> Form:
        """How single samples of one shape are run: through Python at first, by a trace if that is faster."""
        key = self._key(runner, x, "one sample")
        count = self._singles.get(key, 0)
        if count < 0 and key in self.choices:
            return self.choices[key].way.form
        if not self._compile and count < SINGLES_BEFORE_TRACING:
            self._singles[key] = count + 1
            return "eager"

        def chosen() -> Choice:
            stacked = {name: tensor.unsqueeze(0) for name, tensor in params.items()}
            profile = self.profile(Prepared(runner, x, "module"), stacked)
            return self._compiled_if_asked(
                calibrate_single(runner, params, x, profile, forms_of(self._compile, self._device))
            )

        found = self._kept(key, "module, one sample", x, chosen)
        self._singles[key] = -1
        return found.way.form

    def of_rows(
        self,
        runner: Runner,
        x: Any,
        groups: int,
        most: int,
        *,
        python: bool,
        one_by_one: Callable[[], Outputs],
        together: Callable[[], Outputs],
    ) -> bool:
        """Whether groups of at most `most` rows, a sample each, are run together: where that is faster and gives the same."""
        key = (*self._key(runner, rows_of(x, slice(0, 1)), f"{bucket(most)} rows a sample", groups), python)
        loop, at_once = Way("loop"), Way("vmap", "eager", groups)

        def chosen() -> Choice:
            with torch.no_grad():
                slow = Trial(loop, seconds_of(one_by_one, self._device))
                try:
                    if not close(together(), one_by_one(), self._device):
                        raise ValueError("outputs differ from those of one group at a time")
                    fast = Trial(at_once, seconds_of(together, self._device))
                except Exception as error:  # no way for this module, for whatever reason torch finds
                    return Choice(loop, (slow, Trial(at_once, None, words(error))), Profile(0, 0, 0))
            faster = self._strategy == "vmap" or (fast.seconds or 0.0) < (slow.seconds or 0.0)
            return Choice(at_once if faster else loop, (slow, fast), Profile(0, 0, 0))

        return self._kept(key, f"module, {groups} groups of at most {most} rows", x, chosen).way.strategy == "vmap"

    def profile(self, prepared: Prepared, params: Params) -> Profile:
        """What one sample of a block takes on x: measured once a shape."""
        runner, x, kind = prepared
        first = {name: tensor[0] for name, tensor in params.items()}
        if runner.draws() is None:
            admitted(runner, first, x)
        key = self._key(runner, x, kind)
        if key not in self._profiles:
            self._profiles[key] = self._measured(runner, first, x)
        return self._profiles[key]

    def smaller(self, key: Key, prepared: Prepared, way: Way, params: Params, error: BaseException) -> Way:
        """Half of what ran out of memory, samples first, then rows; chosen from now on. Raises the error where none is."""
        runner, x, _ = prepared
        at_once = min(way.samples, len(next(iter(params.values())))) if way.strategy == "vmap" else 1
        rows = way.rows if way.rows is not None else num_rows(x)
        if at_once > 1:
            found = way._replace(samples=at_once // 2)
        elif (
            rows is not None and rows > 1 and not (way.rows is None and self._mixes_rows(runner, params, x, rows // 2))
        ):
            found = way._replace(rows=rows // 2)
        else:
            raise error
        self._say(
            "memory",
            f"out of memory by {way._replace(samples=at_once)}: going on by {found}, and less where that is still too much",
        )
        with self._lock:
            self.choices[key] = self.choices[key]._replace(way=found)
        return found

    def _kept(self, key: Key, label: str, x: Any, chosen: Callable[[], Choice]) -> Choice:
        with self._lock:
            if key not in self.choices:
                found = chosen()
                while len(self.choices) >= MOST_CHOICES:
                    oldest = next(iter(self.choices))
                    del self.choices[oldest], self._labels[oldest]
                    self._singles.pop(oldest, None)
                self._labels[key] = label + ", x " + " and ".join(str(list(leaf.shape)) for leaf in tensors_of(x))
                self.choices[key] = found
            return self.choices[key]

    def _chosen(self, prepared: Prepared, params: Params, python: bool) -> Choice:
        runner, x, kind = prepared
        size, profile = len(next(iter(params.values()))), self.profile(prepared, params)
        rows = self._rows_at_once(runner, params, x, profile)
        share = 1.0 if rows is None else rows / (num_rows(x) or 1)
        most = min(bucket(size), max(1, int(self.at_once // max(profile.bytes * share, 1))))
        casts = torch.is_autocast_enabled(self._device.type)  # which vmap does not under autocast
        compile = False if python else self._compile
        if self._strategy == "auto":
            tried = {name: tensor[:most] for name, tensor in params.items()}
            choice = calibrate(
                runner, tried, x, profile,
                forms=forms_of(compile, self._device), most_samples=1 if casts else most, rows=rows,
            )  # fmt: skip
            return choice if python else self._compiled_if_asked(choice)
        loop = Way("loop", "compiled" if compile else "eager", 1, rows)
        if self._strategy == "vmap" and casts:
            self._say_refused(kind, "it casts nothing under autocast")
        elif self._strategy == "vmap" and self._takes_vmap(prepared, params, rows):
            return Choice(loop._replace(strategy="vmap", samples=most), (), profile)
        return Choice(loop, (), profile)

    def _takes_vmap(self, prepared: Prepared, params: Params, rows: int | None) -> bool:
        """Whether vmap can take the module; said once where it cannot."""
        runner, x, kind = prepared
        if kind in self._refused:
            return False
        first = {name: tensor[:1] for name, tensor in params.items()}
        with torch.no_grad():
            expected = runner.block(Way("loop", "eager", 1, rows), first, x)
            try:
                if close(runner.block(Way("vmap", "eager", 1, rows), first, x), expected, self._device):
                    return True
                why = "its outputs differ from those of one sample at a time"
            except Exception as error:  # whatever torch finds
                why = words(error)
        self._refused.add(kind)
        self._say_refused(kind, why)
        return False

    def _compiled_if_asked(self, choice: Choice) -> Choice:
        if not self._compile or choice.way.form == "compiled":
            return choice
        why = next((trial.why for trial in choice.trials if trial.way.form == "compiled" and trial.why), "no such way")
        raise ModuleError(
            f"module {self._name}", want="a forward that torch.compile takes", got=why, fix="pass compile=None"
        )

    def _rows_at_once(self, runner: Runner, params: Params, x: Any, profile: Profile) -> int | None:
        """Rows of a batch that keep to `memory`; None is all of them."""
        count = num_rows(x) or 0
        if profile.bytes <= self.memory or count < 2:
            return None
        rows = max(1, count * self.memory // profile.bytes)
        return None if self._mixes_rows(runner, params, x, rows) else rows

    def _mixes_rows(self, runner: Runner, params: Params, x: Any, rows: int) -> bool:
        """Whether one sample's outputs in pieces of so many rows differ from those of all rows, or of as many as memory holds."""
        first = {name: tensor[0] for name, tensor in params.items()}
        while True:
            try:
                return mixes_rows(lambda part: runner.one(first, part, FIRST_DRAW), x, rows, self._device)
            except OUT_OF_MEMORY as error:
                count = num_rows(x) or 0
                if not is_out_of_memory(error) or count < 4:
                    raise
                x, rows = rows_of(x, slice(0, count // 2)), min(rows, count // 4)

    def _measured(self, runner: Runner, params: Params, x: Any) -> Profile:
        try:
            return profiled(lambda: runner.one(params, x, FIRST_DRAW), [*params.values(), *tensors_of(x)])
        except OUT_OF_MEMORY as error:
            count = num_rows(x) or 0
            if not is_out_of_memory(error) or count < 2:
                raise
            half = self._measured(runner, params, rows_of(x, slice(0, count // 2)))
            # Half of the rows were all that there is memory for, or less: so much is to be cut at least.
            return half._replace(bytes=max(2 * half.bytes, 2 * self.memory), output_bytes=2 * half.output_bytes)

    def _key(self, runner: Runner, x: Any, kind: str, size: int = 1) -> Key:
        """What a choice hangs on: a shape of x, a size of block, and the modes of the module."""
        if isinstance(x, Tensor):
            shapes: Any = (x.shape, x.stride(), x.dtype)
        else:
            leaves, structure = pytree.tree_flatten(x)
            shapes = structure, signature(leaves)
        casts = torch.is_autocast_enabled(self._device.type)
        return kind, shapes, bucket(size), runner.skeleton.shell().modes, casts

    def _say_refused(self, kind: str, why: str) -> None:
        self._say(kind, f"torch.func.vmap cannot take {self._name} ({why[:200]}): its samples run one after another")

    def _say(self, what: str, text: str) -> None:
        """A warning, once."""
        if what not in self._said:
            self._said.add(what)
            warnings.warn(text, SlowerWay, stacklevel=8)


def bucket(size: int) -> int:
    """Blocks of about one size share a choice: the next power of two."""
    return 1 << (size - 1).bit_length()
