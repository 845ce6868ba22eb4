"""Apply the samples of a bank to data without ever touching the module: (bank index, x) -> outputs."""

from __future__ import annotations

import glob
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _get_current_dispatch_mode

from bnn import tracing
from bnn.errors import BankError, ConfigError, DataError, ModuleError, SlowerWay, choose
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
from bnn.functional.outputs import combined
from bnn.functional.skeleton import DrawKey, Outputs, Skeleton, device_of, version
from bnn.functional.trunk import NotAHead, trunks_of
from bnn.functional.ways import Form, Runner, Strategy, Way, num_rows, rows_of
from bnn.layout import Layout, layout_of
from bnn.types import Block, Params

if TYPE_CHECKING:
    from collections.abc import Mapping

STRATEGIES: tuple[str, ...] = ("auto", "loop", "vmap")

SINGLES_BEFORE_TRACING = 16  # calls of one shape with a single index, before a trace is tried
BLOCK_BYTES = 64 * 2**20  # of samples read at once, which are copied where they lie in two shards
MOST_SAMPLES = 1024  # of a block that is streamed
SPREAD_SAMPLES = 32  # of a block of every n-th sample, after each of which a caller may stop
SETTLED_BYTES = 2**25  # of values at once, where the choice goes by rule: about a cache


_NO_DRAW: DrawKey = (0, "forward", 0, 0)  # where a forward was seen not to draw


class SampleSource(Protocol):
    """What is asked of a bank here: a fixed, ordered set of samples."""

    @property
    def layout(self) -> Layout: ...

    @property
    def info(self) -> Mapping[str, Any]: ...

    @property
    def chain(self) -> Tensor: ...

    @property
    def draw(self) -> Tensor: ...

    @property
    def log_weight(self) -> Tensor: ...

    @property
    def digest(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Params: ...

    def block(self, indices: Sequence[int] | slice | Tensor) -> Block: ...


class _Prepared(NamedTuple):
    """A batch and what runs it: the whole module, or its head on what the fixed beginning made of the batch."""

    runner: Runner
    x: Any
    kind: str  # "module" or "head"


class FunctionalModel:
    """The module under the samples of a bank.

    `net(x, i)` gives the outputs [B, C] of sample i; `net(x, [i, j])` and `net(x, slice)` those of K
    samples [K, B, C]; `net(x, rows=index)` with index int64 [B] a sample a row, [B, C].
    x is a tensor, a tuple of arguments or a dict of keyword arguments; outputs may be any nesting of
    tuples, lists, dicts and dataclasses of tensors. Parameters outside the sample, buffers and the train / eval
    mode are the live module's at each call, and gradients reach the former and x.

    Layers that draw in train mode (dropout) draw from a stream of their own for each (seed, index, batch), and leave
    the global ones alone; batch norm is refused in train mode, in which it would rewrite its statistics.

    Args:
        module: never changed, also when its forward raises, and from any number of threads.
        bank: the samples; in another dtype than the module's they are cast to that.
        device: where to compute; the module's own device by default. x and samples are moved there.
        strategy: `"loop"` runs the samples of a block one after another, `"vmap"` all at once. `"auto"` measures both
            on the first block of a shape and keeps the faster; `explain()` tells. A module that vmap cannot
            take runs by loop, which is said once.
        compile: True hands the forward to torch's compiler (many seconds, once a shape); False runs it through Python;
            None lets `"auto"` take a trace of it where that is faster. With gradients it runs through Python.
        memory: bytes that the values of a forward may take at once: samples, then rows, are cut to keep to it.
        seed: of what layers in train mode draw.

    Raises:
        BankMismatch: the bank belongs to another module; the first differing entry is named.
        ModuleError: the module cannot be copied, its mode makes it change, or it writes into its parameters.
        ConfigError: an option that is unknown or out of range; `compile=True` without a compiler.

    Examples:
        >>> import bnn, torch
        >>> module = torch.nn.Linear(3, 2)
        >>> bank = bnn.Bank.from_state_dicts([module.state_dict()] * 4, module=module)
        >>> net = bnn.FunctionalModel(module, bank)
        >>> x = torch.zeros(5, 3)
        >>> net(x, 1).shape, net(x, [0, 3]).shape, net(x, rows=torch.tensor([0, 1, 2, 3, 0])).shape
        (torch.Size([5, 2]), torch.Size([2, 5, 2]), torch.Size([5, 2]))
    """

    def __init__(
        self,
        module: nn.Module,
        bank: SampleSource,
        *,
        device: str | torch.device | None = None,
        strategy: Strategy = "auto",
        compile: bool | None = None,
        memory: int = 2**30,
        seed: int = 0,
    ) -> None:
        choose("strategy", strategy, STRATEGIES)
        if memory < 1:
            raise ConfigError("memory", want="a number of bytes", got=str(memory), fix="leave it out for 1 GiB")
        self.module, self.bank, self.strategy, self.compile = module, bank, strategy, compile
        self.device = torch.device(device) if device is not None else device_of(module)
        self.memory, self.seed = memory, seed
        if compile and not tracing.has_compiler(self.device):
            raise ConfigError(
                "compile",
                want="a C++ compiler (c++, g++ or clang++)",
                got="none on this machine",
                fix="pass compile=None",
            )
        layout = bank.layout
        own = tuple(entry for entry in layout.entries if not entry.name.startswith("@"))
        layout.require(_layout_in(module, layout), place=f"module {type(module).__name__}", dtypes=False)
        self._names = tuple(entry.name for entry in own)
        self._entry_dtypes = {entry.name: entry.dtype for entry in own}
        whole = Skeleton(module, layout, detach=False)
        self._whole = Runner(whole, self._names, self.device)
        self._trunks = [
            (trunk, Runner(trunk.head, self._names, self.device)) for trunk in trunks_of(module, layout, whole)
        ]
        self._lock = threading.RLock()
        self._choices: dict[tuple[Any, ...], Choice] = {}
        self._labels: dict[tuple[Any, ...], str] = {}  # of the choices, for people
        self._profiles: dict[tuple[Any, ...], Profile] = {}
        self._singles: dict[tuple[Any, ...], int] = {}
        self._refused: dict[str, str] = {}  # what vmap said of the module and of its head
        self._said: set[str] = set()
        self._cast: tuple[list[torch.dtype], dict[str, torch.dtype]] | None = None
        self._batches = 0  # numbers of the batches that drew, where the caller gives none

    def __call__(
        self,
        x: Any,
        index: int | Sequence[int] | slice | Tensor | None = None,
        *,
        rows: Tensor | None = None,
        batch: int | None = None,
    ) -> Outputs:
        """Outputs of one sample, of several, or of a sample a row.

        Args:
            x: inputs of B rows.
            index: a bank index, or K of them.
            rows: a bank index a row, int64 [B].
            batch: number of the batch, for layers that draw: the same number gives the same draws. By default
                batches are counted.
        """
        if (index is None) == (rows is None):
            raise ConfigError(
                "net(x, ...)",
                want="either an index or rows=",
                got="both or neither",
                fix="pass net(x, i), net(x, [i, j]), net(x, slice) or net(x, rows=index)",
            )
        x = self._moved(x)
        if rows is not None:
            return self._by_row(x, rows, batch)
        if isinstance(index, (int, np.integer)) or (isinstance(index, Tensor) and index.dim() == 0):
            return self._single(x, int(index), batch)
        block = self.bank.block(index)  # type: ignore[arg-type]
        if block.num_samples == 0:
            raise BankError("net(x, index)", want="at least one sample", got="none", fix="pick indices below len(bank)")
        return self._apply(self._taken(block.params), self._prepared(x), index, batch)  # type: ignore[arg-type]

    def params(self, index: int) -> Params:
        """The values of one sample on the model's device, in the module's dtypes."""
        return self._taken(self.bank[index])

    def apply(
        self, block: Block, x: Any, *, indices: Sequence[int] | np.ndarray | None = None, batch: int | None = None
    ) -> Outputs:
        """Outputs [K, B, C] of the K samples of a block; `indices` are theirs in the bank, for layers that draw."""
        if block.num_samples == 0:
            raise BankError("net(x, index)", want="at least one sample", got="none", fix="pick indices below len(bank)")
        x = self._moved(x)
        indices = range(block.num_samples) if indices is None else indices
        return self._apply(self._taken(block.params), self._prepared(x), indices, batch)

    def stream(
        self, x: Any, *, batch: int | None = None, spread: bool = False
    ) -> Iterator[tuple[Tensor, Block, Outputs]]:
        """Bank indices [K], block and outputs [K, B, C] of the whole bank, in blocks that keep to `memory`.

        What comes before the samples' parameters in the module runs once.

        Args:
            x: inputs of B rows.
            batch: number of the batch, for layers that draw.
            spread: take every n-th sample from first to last, then those beside them, and so on, so that what has
                come so far is always spread over the bank.
        """
        x, size = self._moved(x), len(self.bank)
        if not size:
            raise BankError("bank", want="at least one sample", got="none", fix="go on with its fit first")
        prepared = self._prepared(x)
        profile = self._profile(prepared, self._taken(self.bank.block(slice(0, 1)).params))
        most = max(
            1,
            min(
                MOST_SAMPLES,
                BLOCK_BYTES // self.bank.layout.num_bytes,
                self.memory // 4 // max(profile.output_bytes, 1),
            ),
        )
        number = self._next_batch(batch) if prepared.runner.draws() else 0
        if spread:
            step = -(-size // min(most, SPREAD_SAMPLES))
            passes = [slice(start, size, step) for start in _spread(step)]
        else:
            passes = [slice(start, min(start + most, size), 1) for start in range(0, size, most)]
        for chosen in passes:
            indices = torch.arange(chosen.start, chosen.stop, chosen.step)
            block = self.bank.block(chosen)
            yield indices, block, self._apply(self._taken(block.params), prepared, indices.numpy(), number)

    def settled(self) -> FunctionalModel:
        """This model with a strategy by rule, for results that must repeat to the bit whatever the machine is doing.

        `"auto"` becomes `"vmap"` for modules of linear layers and activations alone, else `"loop"`.
        """
        if self.strategy != "auto" and self.compile is not None:
            return self
        plain = (nn.Linear, nn.Sequential, nn.Tanh, nn.ReLU, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Flatten, nn.Identity)
        by_rule: Strategy = "vmap" if all(type(part) in plain for part in self.module.modules()) else "loop"
        return FunctionalModel(
            self.module,
            self.bank,
            device=self.device,
            strategy=by_rule if self.strategy == "auto" else self.strategy,
            compile=bool(self.compile),
            memory=min(self.memory, SETTLED_BYTES) if by_rule == "vmap" else self.memory,
            seed=self.seed,
        )

    def explain(self) -> str:
        """What was chosen for each shape that came, and what the other ways took; empty before the first block."""
        lines: list[str] = []
        with self._lock:
            for key, choice in self._choices.items():
                lines.append(f"{self._labels[key]}: {choice.way}")
                for trial in choice.trials:
                    took = (
                        f"{trial.seconds * 1e6:,.1f} us a sample"
                        if trial.seconds is not None
                        else f"not open: {trial.why}"
                    )
                    lines.append(f"  {'*' if trial.way == choice.way else ' '} {trial.way}: {took}")
                if not choice.trials:
                    lines.append("  by option, nothing was tried")
        return "\n".join(lines)

    # One sample

    def _single(self, x: Any, index: int, batch: int | None) -> Outputs:
        params = self.params(index)
        runner = self._whole
        draws = runner.draws()
        if draws is not None:
            if draws:
                return runner.one(params, x, self._draw_key(index, self._next_batch(batch)))
            if (
                self.compile is not False
                and (self.strategy == "auto" or self.compile)
                and not self._needs_python(x, params)
            ):
                form = self._single_form(params, x)
                if form != "eager":
                    return self._guarded(params, x, lambda: runner.single(form, params, x))
            return self._guarded(params, x, lambda: runner.again(params, x))
        # The first forward in these modes, on clones: what it writes into them is seen, and refused.
        given = {name: tensor.clone() for name, tensor in params.items() if not name.startswith("@")}
        own = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, x)
        number = self._batches if batch is None else batch
        outputs = self._guarded(given, own, lambda: runner.one(given, own, self._draw_key(index, number)))
        if runner.draws():
            self._next_batch(batch)
        return outputs

    def _single_form(self, params: Params, x: Any) -> Form:
        """How single samples of one shape are run: through Python at first, by a trace if that is faster."""
        key = self._key(self._whole, x, "one sample")
        count = self._singles.get(key, 0)
        if count < 0:
            return self._choices[key].way.form
        if not self.compile and count < SINGLES_BEFORE_TRACING:
            self._singles[key] = count + 1
            return "eager"
        with self._lock:
            if self._singles.get(key, 0) >= 0:
                stacked = {name: tensor.unsqueeze(0) for name, tensor in params.items()}
                profile = self._profile(_Prepared(self._whole, x, "module"), stacked)
                forms = forms_of(self.compile, self.device)
                choice = calibrate_single(self._whole, params, x, profile, forms)
                if self.compile and choice.way.form != "compiled":
                    raise self._not_compiled(choice)
                self._keep(key, choice, "module, one sample", x)
                self._singles[key] = -1
        return self._choices[key].way.form

    # Blocks

    def _prepared(self, x: Any) -> _Prepared:
        """The head and what the fixed beginning makes of x, where the head can stand for the module."""
        while self._trunks:
            trunk, head = self._trunks[0]
            params = self._taken(self.bank[0])
            if self._whole.draws() is None:
                self._admit(self._whole, params, x, "module")
            try:
                inputs = trunk.inputs(params, x, self.device)
                if inputs is None:
                    break
                if head.draws() is not None or self._admit(head, params, inputs, "head"):
                    return _Prepared(head, inputs, "head")
            except NotAHead:
                pass
            with self._lock:
                self._trunks = self._trunks[1:]
        return _Prepared(self._whole, x, "module")

    def _apply(
        self,
        params: Params,
        prepared: _Prepared,
        indices: Sequence[int] | slice | np.ndarray | Tensor,
        batch: int | None,
    ) -> Outputs:
        runner, x, kind = prepared
        if runner.draws() is None:
            self._admit(runner, {name: tensor[0] for name, tensor in params.items()}, x, kind)
        if runner.draws():
            if self.strategy == "vmap":
                raise ModuleError(
                    f"module {type(self.module).__name__}",
                    want="no random numbers under strategy='vmap'",
                    got="layers that draw in train mode, or a forward that always does",
                    fix="use strategy='loop', or module.eval()",
                )
            number, size = self._next_batch(batch), len(self.bank)
            chosen = range(*indices.indices(size)) if isinstance(indices, slice) else indices
            keys = [self._draw_key(int(index) % size, number) for index in chosen]
            return self._guarded(params, x, lambda: runner.block(Way("loop"), params, x, keys))
        python = self._needs_python(x, params)
        key, choice = self._choice(prepared, params, python)
        way = choice.way._replace(form="eager") if python else choice.way
        while True:
            try:
                return self._guarded(params, x, partial(runner.block, way, params, x))
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                way = self._smaller(prepared, way, params, error)
                with self._lock:
                    self._choices[key] = choice._replace(way=way)

    def _choice(self, prepared: _Prepared, params: Params, python: bool) -> tuple[tuple[Any, ...], Choice]:
        runner, x, kind = prepared
        size = len(next(iter(params.values())))
        key = (*self._key(runner, x, kind, size), python)
        found = self._choices.get(key)
        if found is not None:
            return key, found
        with self._lock:
            found = self._choices.get(key)
            if found is None:
                found = self._chosen(prepared, params, python)
                self._keep(
                    key,
                    found,
                    f"{kind}, {'up to ' * (size > 1)}{_bucket(size)} samples" + (", with gradients" if python else ""),
                    x,
                )
        return key, found

    def _keep(self, key: tuple[Any, ...], choice: Choice, label: str, x: Any) -> None:
        self._labels[key] = label + ", x " + " and ".join(str(list(leaf.shape)) for leaf in _tensors(x))
        self._choices[key] = choice

    def _chosen(self, prepared: _Prepared, params: Params, python: bool) -> Choice:
        runner, x, kind = prepared
        size = len(next(iter(params.values())))
        profile = self._profile(prepared, params)
        rows = self._rows_at_once(runner, params, x, profile)
        share = 1.0 if rows is None else rows / (num_rows(x) or 1)
        most = min(_bucket(size), max(1, int(self.memory // max(profile.bytes * share, 1))))
        if torch.is_autocast_enabled(self.device.type):
            most = 1  # vmap casts nothing under autocast
        forms = forms_of(False if python else self.compile, self.device)
        if self.strategy == "auto":
            tried = {name: tensor[: min(len(tensor), most)] for name, tensor in params.items()}
            choice = calibrate(runner, tried, x, profile, forms=forms, most_samples=most, rows=rows)
            if self.compile and not python and choice.way.form != "compiled":
                raise self._not_compiled(choice)
            return choice
        form: Form = "compiled" if self.compile and not python else "eager"
        if self.strategy == "loop" or kind in self._refused:
            return Choice(Way("loop", form, 1, rows), (), profile)
        if torch.is_autocast_enabled(self.device.type):
            self._say_refused(kind, "it casts nothing under autocast")
            return Choice(Way("loop", form, 1, rows), (), profile)
        way = Way("vmap", form, most, rows)
        first = {name: tensor[:1] for name, tensor in params.items()}
        try:
            with torch.no_grad():
                runner.block(way._replace(form="eager"), first, x)
        except Exception as error:  # is it vmap that fails, or the module itself?
            with torch.no_grad():
                runner.block(Way("loop", "eager", 1, rows), first, x)
            lines = str(error).strip().splitlines()
            self._refused[kind] = f"{type(error).__name__}: {lines[0] if lines else ''}"
            self._say_refused(kind, self._refused[kind])
            way = Way("loop", form, 1, rows)
        return Choice(way, (), profile)

    def _say_refused(self, kind: str, why: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(
                f"torch.func.vmap cannot take {type(self.module).__name__} ({why[:200]}): its samples run one after another",
                SlowerWay,
                stacklevel=7,
            )

    def _rows_at_once(self, runner: Runner, params: Params, x: Any, profile: Profile) -> int | None:
        """Rows of a batch that keep to `memory`; None is all of them."""
        if profile.bytes <= self.memory:
            return None
        count = num_rows(x)
        if count is None or count < 2:
            return None
        first = {name: tensor[0] for name, tensor in params.items()}
        if mixes_rows(lambda part: runner.one(first, part, _NO_DRAW), x, rows_of):
            return None
        return max(1, count * self.memory // profile.bytes)

    def _smaller(self, prepared: _Prepared, way: Way, params: Params, error: BaseException) -> Way:
        """Half of what ran out of memory: samples first, then rows."""
        runner, x, _ = prepared
        size = len(next(iter(params.values())))
        at_once = min(way.samples, size) if way.strategy == "vmap" else 1
        count = num_rows(x)
        rows = way.rows if way.rows is not None else count
        if at_once > 1:
            smaller = way._replace(samples=at_once // 2)
        elif rows is not None and rows > 1 and way.rows != 1:
            first = {name: tensor[0] for name, tensor in params.items()}
            if way.rows is None and mixes_rows(lambda part: runner.one(first, part, _NO_DRAW), x, rows_of):
                raise error
            smaller = way._replace(rows=rows // 2)
        else:
            raise error
        if "memory" not in self._said:
            self._said.add("memory")
            before = way._replace(samples=at_once)
            warnings.warn(
                f"out of memory by {before}: going on by {smaller}, and less where that is still too much",
                SlowerWay,
                stacklevel=4,
            )
        return smaller

    # A sample a row

    def _by_row(self, x: Any, rows: Tensor, batch: int | None) -> Outputs:
        """Outputs [B, C] with a sample a row: rows are grouped by index, one call a group, or all groups at once."""
        rows = rows.to("cpu", torch.int64)
        for leaf in pytree.tree_leaves(x):
            if isinstance(leaf, Tensor) and len(leaf) != len(rows):
                raise DataError(
                    "net(x, rows=)",
                    want=f"one index a row of x, {len(leaf)} of them",
                    got=f"{len(rows)}",
                    fix="pass an int64 tensor of shape [B]",
                )
        if len(rows) == 0:
            raise DataError("net(x, rows=)", want="at least one row", got="none", fix="skip empty batches")
        runner = self._whole
        if runner.draws() is None:
            self._admit(runner, self.params(int(rows[0])), rows_of(x, slice(0, 1)), "module")
        order = rows.argsort(stable=True)
        indices, counts = rows[order].unique_consecutive(return_counts=True)
        if runner.draws():
            number = self._next_batch(batch)
            return self._groups(x, indices, counts, order, [self._draw_key(int(index), number) for index in indices])
        size, most = len(indices), int(counts.max())
        taken = size * (self.bank.layout.num_bytes + most * sum(leaf[:1].nbytes for leaf in _tensors(x)))
        if self.strategy == "loop" or size == 1 or taken > self.memory or torch.is_autocast_enabled(self.device.type):
            return self._groups(x, indices, counts, order, None)
        key = (
            *self._key(runner, rows_of(x, slice(0, 1)), f"{_bucket(most)} rows a sample", size),
            self._needs_python(x, {}),
        )
        if key not in self._choices:
            with self._lock:
                self._keep(
                    key,
                    self._chosen_for_rows(x, indices, counts, order),
                    f"module, {size} groups of at most {most} rows",
                    x,
                )
        if self._choices[key].way.strategy == "loop":
            return self._groups(x, indices, counts, order, None)
        return self._at_once(x, indices, counts, order)

    def _chosen_for_rows(self, x: Any, indices: Tensor, counts: Tensor, order: Tensor) -> Choice:
        """Groups one after another or all at once: what takes less time, and gives the same."""
        loop, together = Way("loop"), Way("vmap", "eager", len(indices))
        profile = Profile(0, 0, 0)
        with torch.no_grad():
            reference = self._groups(x, indices, counts, order, None)
            slow = Trial(loop, seconds_of(lambda: self._groups(x, indices, counts, order, None), self.device))
            try:
                if not close(self._at_once(x, indices, counts, order), reference, self.device):
                    raise ValueError("outputs differ from those of one group at a time")
                fast = Trial(together, seconds_of(lambda: self._at_once(x, indices, counts, order), self.device))
            except Exception as error:  # no way for this module, for whatever reason torch finds
                return Choice(loop, (slow, Trial(together, None, words(error))), profile)
        chosen = together if self.strategy == "vmap" or (fast.seconds or 0.0) < (slow.seconds or 0.0) else loop
        return Choice(chosen, (slow, fast), profile)

    def _groups(
        self, x: Any, indices: Tensor, counts: Tensor, order: Tensor, draw_keys: Sequence[DrawKey] | None
    ) -> Outputs:
        """One call of the module for the rows of each sample."""
        groups = []
        for place, (index, rows) in enumerate(zip(indices.tolist(), order.split(counts.tolist()), strict=True)):
            part, params = rows_of(x, rows.to(self.device)), self.params(index)
            key = _NO_DRAW if draw_keys is None else draw_keys[place]
            groups.append(self._guarded(params, part, partial(self._whole.one, params, part, key)))
        back = order.argsort().to(self.device)
        return combined(lambda tensors: torch.cat(tensors)[back], groups)

    def _at_once(self, x: Any, indices: Tensor, counts: Tensor, order: Tensor) -> Outputs:
        """All groups in one call under vmap, filled up to the rows of the largest with rows that are left out again."""
        size, most = len(indices), int(counts.max())
        firsts = counts.cumsum(0) - counts
        places = torch.arange(most).expand(size, most)  # [G, M]
        own = places < counts.unsqueeze(1)
        chosen = order[torch.where(own, firsts.unsqueeze(1) + places, firsts.unsqueeze(1))].to(self.device)
        params, part = self._taken(self.bank.block(indices).params), rows_of(x, chosen)
        found = self._guarded(params, part, partial(self._whole.rows, params, part))  # [G, M, ...]
        back = own.flatten().nonzero().squeeze(1)[order.argsort()].to(self.device)
        return combined(lambda tensors: tensors[0].flatten(0, 1)[back], [found])

    # What every way shares

    def _admit(self, runner: Runner, params: Params, x: Any, kind: str) -> bool:
        """Run one sample for the first time in these modes, on clones: does it draw, does it write into what it is given?"""
        given = {name: tensor.clone() for name, tensor in params.items() if not name.startswith("@")}
        own = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, x)
        leaves = _tensors(own)
        before = [version(tensor) for tensor in (*given.values(), *leaves)]
        with torch.no_grad():
            try:
                runner.one(given, own, self._draw_key("first", 0))
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error) or (num_rows(x) or 0) < 2:
                    raise
                return self._admit(runner, params, rows_of(x, slice(0, (num_rows(x) or 0) // 2)), kind)
        after = [version(tensor) for tensor in (*given.values(), *leaves)]
        if kind == "head" and (after != before or runner.draws()):
            return False  # of samples one after another, the second would see what the first wrote
        _refuse_writes([*given, *["input"] * len(leaves)], before, after)
        return True

    def _guarded(self, params: Params, x: Any, run: Callable[[], Outputs]) -> Outputs:
        """Run, and see whether anything was written into samples or inputs."""
        watched = [*params.values(), x] if isinstance(x, Tensor) else [*params.values(), *_tensors(x)]
        try:
            before = [tensor._version for tensor in watched]
        except RuntimeError:  # tensors of inference mode do not count their writes
            return run()
        outputs = run()
        after = [tensor._version for tensor in watched]
        if after != before:
            _refuse_writes([*params, *["input"] * (len(watched) - len(params))], before, after)
        return outputs

    def _profile(self, prepared: _Prepared, params: Params) -> Profile:
        """What one sample takes on x: measured once a shape."""
        runner, x, kind = prepared
        first = {name: tensor[0] for name, tensor in params.items()}
        if runner.draws() is None:
            self._admit(runner, first, x, kind)
        key = self._key(runner, x, kind)
        if key not in self._profiles:
            self._profiles[key] = self._measured(runner, first, x)
        return self._profiles[key]

    def _measured(self, runner: Runner, params: Params, x: Any) -> Profile:
        try:
            return profiled(lambda: runner.one(params, x, self._draw_key("first", 0)), [*params.values(), *_tensors(x)])
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            count = num_rows(x) or 0
            if not _is_out_of_memory(error) or count < 2:
                raise
            half = self._measured(runner, params, rows_of(x, slice(0, count // 2)))
            # Half of the rows were all that there is memory for, or less: so much is to be cut at least.
            return half._replace(bytes=max(2 * half.bytes, 2 * self.memory), output_bytes=2 * half.output_bytes)

    def _key(self, runner: Runner, x: Any, kind: str, size: int = 1) -> tuple[Any, ...]:
        """What a choice hangs on: a shape of x, a size of block, and the modes of the module."""
        if isinstance(x, Tensor):
            shapes: Any = (x.shape, x.stride(), x.dtype)
        else:
            leaves, structure = pytree.tree_flatten(x)
            shapes = (
                structure,
                *[(leaf.shape, leaf.stride(), leaf.dtype) if isinstance(leaf, Tensor) else None for leaf in leaves],
            )
        return (
            kind,
            shapes,
            _bucket(size),
            runner.skeleton.shell().modes,
            torch.is_autocast_enabled(self.device.type),
        )

    def _needs_python(self, x: Any, params: Params) -> bool:
        """Whether gradients are wanted, or a transform of torch is around this call: traces know of neither."""
        if torch._C._functorch.peek_interpreter_stack() is not None or _get_current_dispatch_mode() is not None:
            return True
        if not torch.is_grad_enabled():
            return False
        return (
            any(leaf.requires_grad for leaf in _tensors(x))
            or any(tensor.requires_grad for tensor in params.values())
            or any(
                slot.live[slot.key].requires_grad
                for slot in self._whole.skeleton.shell().slots
                if slot.kept_as not in params
            )
        )

    def _not_compiled(self, choice: Choice) -> ModuleError:
        why = next((trial.why for trial in choice.trials if trial.way.form == "compiled" and trial.why), "no such way")
        return ModuleError(
            f"module {type(self.module).__name__}",
            want="a forward that torch.compile takes",
            got=why,
            fix="pass compile=None",
        )

    def _draw_key(self, index: int | str, batch: int) -> DrawKey:
        return (self.seed, "forward", batch, index)

    def _next_batch(self, batch: int | None) -> int:
        if batch is not None:
            return batch
        with self._lock:
            self._batches += 1
            return self._batches - 1

    def _taken(self, params: Params) -> Params:
        """Samples on the device of the model and in the dtypes of the module; `@` names are left as they are."""
        dtypes = self._dtypes()
        first = next(iter(params.values()), None)
        if not dtypes and (first is None or first.device == self.device):  # the tensors of a bank are all on one device
            return params
        return {
            name: tensor.to(self.device, dtypes.get(name, tensor.dtype), non_blocking=True)
            for name, tensor in params.items()
        }

    def _dtypes(self) -> dict[str, torch.dtype]:
        """Of the entries that the module holds in another dtype than the bank."""
        slots = self._whole.skeleton.shell().slots
        now = [slot.live[slot.key].dtype for slot in slots[:1]]  # a module is cast as a whole
        if self._cast is None or self._cast[0] != now:
            differing = {
                slot.kept_as: slot.live[slot.key].dtype
                for slot in slots
                if self._entry_dtypes.get(slot.kept_as, slot.live[slot.key].dtype) != slot.live[slot.key].dtype
            }
            self._cast = now, differing
        return self._cast[1]

    def _moved(self, values: Any) -> Any:
        if isinstance(values, Tensor):
            return values if values.device == self.device else values.to(self.device, non_blocking=True)
        return pytree.tree_map(lambda leaf: self._moved(leaf) if isinstance(leaf, Tensor) else leaf, values)


def _layout_in(module: nn.Module, layout: Layout) -> Layout:
    """The layout of the same entries in a module; of buffers too, where samples bring them."""
    own = [entry for entry in layout.entries if not entry.name.startswith("@")]
    extra = [entry for entry in layout.entries if entry.name.startswith("@")]
    names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    buffers = {name for name, _ in module.named_buffers()}
    patterns = [glob.escape(entry.name) for entry in own if entry.name in names]
    sampled = [entry.name for entry in own if entry.name in buffers]
    if not patterns:
        return Layout(tuple(extra))
    return layout_of(module, patterns, extra, buffers=sampled)


def _refuse_writes(names: Sequence[str], before: list[int], after: list[int]) -> None:
    for name, old, new in zip(names, before, after, strict=True):
        if old != new:
            place = "input x" if name == "input" else f"parameter '{name}'"
            raise ModuleError(
                place,
                want="a forward that leaves what it is given alone",
                got="one that writes into it in place",
                fix="write into a copy (inplace=False, or .clone() first)",
            )


def _tensors(x: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor)]


def _bucket(size: int) -> int:
    """Blocks of about one size share a choice: the next power of two."""
    return 1 << (size - 1).bit_length()


def _spread(count: int) -> list[int]:
    """0 to count - 1 in an order whose beginnings are spread evenly: bits reversed."""
    bits = max((count - 1).bit_length(), 1)
    return [place for place in (int(f"{k:0{bits}b}"[::-1], 2) for k in range(1 << bits)) if place < count]


def _is_out_of_memory(error: BaseException) -> bool:
    words = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        "allocate memory" in words or "not enough memory" in words or "out of memory" in words
    )
