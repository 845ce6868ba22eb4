"""Apply the samples of a bank to data without ever touching the module: (bank index, x) -> outputs."""

from __future__ import annotations

import glob
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _get_current_dispatch_mode

from bnn import tracing
from bnn.errors import BankError, ConfigError, DataError, ModuleError, choose
from bnn.functional.choosing import Chooser, Prepared
from bnn.functional.guarding import (
    FIRST_DRAW,
    OUT_OF_MEMORY,
    admitted,
    clones,
    guarded,
    is_out_of_memory,
    refuse_changes,
    tensors_of,
)
from bnn.functional.outputs import combined
from bnn.functional.skeleton import DrawKey, Outputs, Skeleton, device_of, is_transformed
from bnn.functional.trunk import NotAHead, trunks_of
from bnn.functional.ways import Form, Runner, Strategy, Way, rows_of
from bnn.layout import Layout, layout_of
from bnn.machine import keep_freed
from bnn.types import Block, DrawTable, Params

if TYPE_CHECKING:
    from collections.abc import Mapping

STRATEGIES: tuple[str, ...] = ("auto", "loop", "vmap")

BLOCK_BYTES = 64 * 2**20  # of samples read at once, which are copied where they lie in two shards
MOST_SAMPLES = 1024  # of a block that is streamed
SPREAD_SAMPLES = 32  # of a block of every n-th sample, after each of which a caller may stop
LEAST_FOR_TRUNK = 4  # samples, for which what comes before the head is run apart
SETTLED_BYTES = 2**23  # of the values that vmap by rule makes at once on a CPU: with more, they leave its cache
OUTPUT_BYTES = 2**22  # of a block on a CPU, which whoever takes them reads again: no more than its cache holds


class SampleSource(DrawTable, Protocol):
    """What is asked of a bank here: a fixed, ordered set of samples."""

    @property
    def layout(self) -> Layout: ...

    @property
    def info(self) -> Mapping[str, Any]: ...

    @property
    def digest(self) -> str: ...

    def __getitem__(self, index: int) -> Params: ...

    def block(self, indices: Sequence[int] | slice | Tensor) -> Block: ...


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
        memory: bytes that the values of a block's forward may take at once: samples, then rows, are cut to keep to it.
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
        if not isinstance(memory, int) or memory < 1:
            raise ConfigError("memory", want="a number of bytes", got=repr(memory), fix="leave it out for 1 GiB")
        self.module, self.bank, self.strategy, self.compile = module, bank, strategy, compile
        self.device = torch.device(device) if device is not None else device_of(module)
        self.seed = seed
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
        # Where the module holds what samples bring: looked at in every call, for its dtypes may change.
        self._held = [(slot.live, slot.key) for slot in whole.shell().slots if slot.kept_as in self._entry_dtypes]
        self._trunks = [
            (trunk, Runner(trunk.head, self._names, self.device)) for trunk in trunks_of(module, layout, whole)
        ]
        self._lock = threading.RLock()
        self._chooser = Chooser(
            strategy=strategy, compile=compile, memory=memory, device=self.device, name=type(module).__name__
        )
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
            return self._by_row(x, _as_indices("net(x, rows=)", rows), batch)
        if isinstance(index, (int, np.integer)) and not isinstance(index, bool):
            return self._single(x, int(index), batch)
        chosen = index if isinstance(index, slice) else _as_indices("net(x, index)", index)
        if isinstance(chosen, Tensor) and chosen.dim() == 0:
            return self._single(x, int(chosen), batch)
        block = self.bank.block(chosen)
        if block.num_samples == 0:
            raise BankError("net(x, index)", want="at least one sample", got="none", fix="pick indices below len(bank)")
        return self._apply(self._taken(block.params), self._prepared(x, block.num_samples), chosen, batch)

    @property
    def memory(self) -> int:
        """Bytes that the values of a forward may take at once."""
        return self._chooser.memory

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
        return self._apply(self._taken(block.params), self._prepared(x, block.num_samples), indices, batch)

    def stream(
        self, x: Any, *, batch: int | None = None, spread: bool = False, samples: range | None = None
    ) -> Iterator[tuple[Tensor, Block, Outputs]]:
        """Bank indices [K], block and outputs [K, B, C] of the whole bank, in blocks that keep to `memory`.

        What comes before the samples' parameters in the module runs once.

        Args:
            x: inputs of B rows.
            batch: number of the batch, for layers that draw.
            spread: take every n-th sample from first to last, then those beside them, and so on, so that what has
                come so far is always spread over the bank.
            samples: of neighbours, in place of the whole bank; not beside `spread`.
        """
        x, size = self._moved(x), len(self.bank)
        if not size:
            raise BankError("bank", want="at least one sample", got="none", fix="go on with its fit first")
        prepared = self._prepared(x, size)
        profile = self._chooser.profile(prepared, self._taken(self.bank.block(slice(0, 1)).params))
        output_bytes = self.memory // 4
        if self.device.type == "cpu":
            output_bytes = min(output_bytes, OUTPUT_BYTES)
            keep_freed()
        most = max(
            1,
            min(
                MOST_SAMPLES,
                BLOCK_BYTES // self.bank.layout.num_bytes,
                output_bytes // max(profile.output_bytes, 1),
            ),
        )
        number = self._next_batch(batch) if prepared.runner.draws() else 0
        is_spread = self.bank.info.get("row_order") == "striped"  # any neighbours are, and are read from one shard
        if spread and not is_spread:
            step = -(-size // min(most, SPREAD_SAMPLES))
            passes = [slice(start, size, step) for start in _spread(step)]
        else:
            most = min(most, SPREAD_SAMPLES) if spread else most
            some = range(size) if samples is None else samples
            passes = [slice(start, min(start + most, some.stop), 1) for start in range(some.start, some.stop, most)]
        if passes and getattr(self.bank, "residency", None) == "streamed":  # now, and again for the next batch
            order = np.concatenate([np.arange(chosen.start, chosen.stop, chosen.step) for chosen in passes])
            self.bank.follow(np.concatenate([order, order]), window=size)  # type: ignore[attr-defined]
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
        found = FunctionalModel(
            self.module,
            self.bank,
            device=self.device,
            strategy=by_rule if self.strategy == "auto" else self.strategy,
            compile=bool(self.compile),
            memory=self.memory,
            seed=self.seed,
        )
        if self.device.type == "cpu":
            found._chooser.at_once = min(self.memory, SETTLED_BYTES)
        return found

    def explain(self) -> str:
        """What was chosen for each shape that came, and what the other ways took; empty before the first block."""
        return self._chooser.explain()

    # One sample

    def _single(self, x: Any, index: int, batch: int | None) -> Outputs:
        params = self.params(index)
        index %= len(self.bank)
        runner = self._whole
        draws = runner.draws()
        if draws is not None:
            if draws:
                return runner.one(params, x, self._draw_key(index, self._next_batch(batch)))
            form: Form = "eager"
            if self.compile or (self.strategy == "auto" and self.compile is None):
                form = "eager" if self._needs_python(x, params) else self._chooser.of_single(runner, params, x)
            if form == "eager":
                return guarded(params, x, lambda: runner.again(params, x))
            return guarded(params, x, lambda: runner.single(form, params, x))
        # The first forward in these modes, on clones: what it writes into them is seen, and refused.
        if is_transformed():
            return runner.one(params, x, FIRST_DRAW)  # nothing can be learnt of it there
        given, own = clones(params, x)
        number = self._batches if batch is None else batch
        outputs = guarded(given, own, lambda: runner.one(given, own, self._draw_key(index, number)))
        refuse_changes(params, given)
        if runner.draws():
            self._next_batch(batch)
        return outputs

    # Blocks

    def _prepared(self, x: Any, count: int = LEAST_FOR_TRUNK) -> Prepared:
        """The head and what the fixed beginning makes of x, where the head can stand for the module under `count` samples."""
        for trunk, head in self._trunks if count >= LEAST_FOR_TRUNK and not is_transformed() else ():
            params = self._taken(self.bank[0])
            if self._whole.draws() is None:
                admitted(self._whole, params, x)
            try:
                inputs = trunk.inputs(params, x, self.device)
                if inputs is None:
                    break
                if head.draws() is not None or admitted(head, params, inputs, is_head=True):
                    return Prepared(head, inputs, "head")
            except NotAHead:
                pass
            with self._lock:
                self._trunks = [pair for pair in self._trunks if pair[0] is not trunk]
        return Prepared(self._whole, x, "module")

    def _apply(
        self,
        params: Params,
        prepared: Prepared,
        indices: Sequence[int] | slice | np.ndarray | Tensor,
        batch: int | None,
    ) -> Outputs:
        runner, x, _ = prepared
        if is_transformed():
            return runner.block(Way("vmap" if self.strategy == "vmap" else "loop", "eager", len(self.bank)), params, x)
        if runner.draws() is None:
            admitted(runner, {name: tensor[0] for name, tensor in params.items()}, x)
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
            return guarded(params, x, lambda: runner.block(Way("loop"), params, x, keys))
        python = self._needs_python(x, params)
        key, choice = self._chooser.of_block(prepared, params, python=python)
        way = choice.way._replace(form="eager") if python else choice.way
        while True:
            try:
                return guarded(params, x, partial(runner.block, way, params, x))
            except ModuleError:  # a last, smaller block of a shape that cannot be traced
                if way.form == "eager" or self.compile:
                    raise
                way = way._replace(form="eager")
            except OUT_OF_MEMORY as error:
                if not is_out_of_memory(error):
                    raise
                way = self._chooser.smaller(key, prepared, way, params, error)

    # A sample a row

    def _by_row(self, x: Any, rows: Tensor, batch: int | None) -> Outputs:
        """Outputs [B, C] with a sample a row: rows are grouped by index, one call a group, or all groups at once."""
        for leaf in pytree.tree_leaves(x):
            if isinstance(leaf, Tensor) and (rows.dim() != 1 or leaf.shape[:1] != rows.shape):
                raise DataError(
                    "net(x, rows=)",
                    want=f"one index a row of x, {leaf.shape[0] if leaf.dim() else 'which has no rows'} of them",
                    got=f"{len(rows)}" if rows.dim() == 1 else f"a tensor {list(rows.shape)}",
                    fix="pass an int64 tensor of shape [B]",
                )
        if len(rows) == 0:
            raise DataError("net(x, rows=)", want="at least one row", got="none", fix="skip empty batches")
        runner = self._whole
        if runner.draws() is None:
            admitted(runner, self.params(int(rows[0])), x)
        rows = torch.where(rows < 0, rows + len(self.bank), rows)
        order = rows.argsort(stable=True)
        indices, counts = rows[order].unique_consecutive(return_counts=True)
        if runner.draws():
            number = self._next_batch(batch)
            return self._groups(x, indices, counts, order, [self._draw_key(int(index), number) for index in indices])
        size, most = len(indices), int(counts.max())
        taken = size * (self.bank.layout.num_bytes + most * sum(leaf[:1].nbytes for leaf in tensors_of(x)))
        one_by_one = partial(self._groups, x, indices, counts, order, None)
        if self.strategy == "loop" or size == 1 or taken > self.memory or torch.is_autocast_enabled(self.device.type):
            return one_by_one()
        together = partial(self._at_once, x, indices, counts, order)
        python = self._needs_python(x, {})
        run_together = self._chooser.of_rows(
            runner, x, size, most, python=python, one_by_one=one_by_one, together=together
        )
        return together() if run_together else one_by_one()

    def _groups(
        self, x: Any, indices: Tensor, counts: Tensor, order: Tensor, draw_keys: Sequence[DrawKey] | None
    ) -> Outputs:
        """One call of the module for the rows of each sample."""
        groups = []
        for place, (index, rows) in enumerate(zip(indices.tolist(), order.split(counts.tolist()), strict=True)):
            part, params = rows_of(x, rows.to(self.device)), self.params(index)
            key = FIRST_DRAW if draw_keys is None else draw_keys[place]
            groups.append(guarded(params, part, partial(self._whole.one, params, part, key)))
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
        found = guarded(params, part, partial(self._whole.rows, params, part))  # [G, M, ...]
        back = own.flatten().nonzero().squeeze(1)[order.argsort()].to(self.device)
        return combined(lambda tensors: tensors[0].flatten(0, 1)[back], [found])

    # What every way shares

    def _needs_python(self, x: Any, params: Params) -> bool:
        """Whether gradients are wanted, or a transform of torch is around this call: traces know of neither."""
        if is_transformed() or _get_current_dispatch_mode() is not None:
            return True
        if not torch.is_grad_enabled():
            return False
        return (
            any(leaf.requires_grad for leaf in tensors_of(x))
            or any(tensor.requires_grad for tensor in params.values())
            or any(
                slot.live[slot.key].requires_grad
                for slot in self._whole.skeleton.shell().slots
                if slot.kept_as not in params
            )
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
        now = [live[key].dtype for live, key in self._held]
        if self._cast is None or self._cast[0] != now:
            slots = self._whole.skeleton.shell().slots
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


def _as_indices(place: str, indices: Any) -> Tensor:
    """Bank indices as an int64 tensor.

    Raises:
        DataError: masks and fractions, which are no indices.
    """
    found = torch.as_tensor(indices)
    if found.numel() and (found.dtype == torch.bool or found.is_floating_point() or found.is_complex()):
        raise DataError(
            place, want="whole numbers", got=str(found.dtype), fix="pass bank indices; of a mask, mask.nonzero()"
        )
    return found.to("cpu", torch.int64)


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


def _spread(count: int) -> list[int]:
    """0 to count - 1 in an order whose beginnings are spread evenly: bits reversed."""
    bits = max((count - 1).bit_length(), 1)
    return [place for place in (int(f"{k:0{bits}b}"[::-1], 2) for k in range(1 << bits)) if place < count]
