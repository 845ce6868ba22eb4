"""Ways to run a block of samples: one after another or all at once, through Python, traced, compiled or as a graph."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from bnn import tracing
from bnn.errors import ModuleError
from bnn.functional.graphs import Graphed
from bnn.functional.outputs import Form as OutputForm
from bnn.functional.outputs import combined, put_together, stacked, taken_apart
from bnn.functional.skeleton import DrawKey, Outputs, Skeleton, version
from bnn.types import Params

Strategy: TypeAlias = Literal["auto", "loop", "vmap"]
Form: TypeAlias = Literal["eager", "traced", "compiled", "graph"]

MOST_TRACES = 256  # that are kept, of a module or its head

Function: TypeAlias = Callable[..., Sequence[Tensor]]
"""A tensor for every slot and then the leaves of x -> the leaves of the outputs."""


class Way(NamedTuple):
    """How a block is run. What the results are does not hang on it, but for rounding."""

    strategy: Literal["loop", "vmap"]
    form: Form = "eager"
    samples: int = 1  # that vmap runs at once
    rows: int | None = None  # of x at once; None is all

    def __str__(self) -> str:
        words = [self.strategy if self.strategy == "loop" else f"vmap of {self.samples}"]
        words += [] if self.form == "eager" else [self.form]
        words += [] if self.rows is None else [f"{self.rows} rows at once"]
        return ", ".join(words)


class Traced(NamedTuple):
    """A function without Python, and how its outputs are put together again."""

    function: Function
    form: OutputForm | None


class Runner:
    """Runs the samples of a block by any way.

    Args:
        skeleton: of the module, or of a part of it.
        names: of the parameters and buffers that samples bring.
        device: where to compute.
    """

    def __init__(self, skeleton: Skeleton, names: Sequence[str], device: torch.device) -> None:
        self.skeleton, self.device = skeleton, device
        self._names = frozenset(names)
        self._functions: dict[tuple[Any, ...], Traced] = {}
        self._lock = threading.RLock()
        self._attends = any(
            isinstance(part, (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder))
            for part in skeleton.live.modules()
        )

    def one(self, params: Params, x: Any, draw_key: DrawKey) -> Outputs:
        """Outputs [B, ...] of one sample by Python; in train mode with random numbers from `draw_key`."""
        return self.skeleton(params, x, device=self.device, draw_key=draw_key)

    def again(self, params: Params, x: Any) -> Outputs:
        """Outputs [B, ...] of one sample by Python, in modes in which `draws` was just found to be False."""
        shell = self.skeleton.shell()
        return self.skeleton.run(shell, self.skeleton.values(shell, params, self.device), x)

    def draws(self) -> bool | None:
        """Whether a forward in the present modes draws random numbers; None where this thread has run none yet."""
        shell = self.skeleton.shell()
        return shell.draws.get(self.skeleton.follow_modes(shell, may_draw=True))

    def single(self, form: Form, params: Params, x: Any) -> Outputs:
        """Outputs [B, ...] of one sample by a trace, in such modes."""
        shell = self.skeleton.shell()
        values = self.skeleton.values(shell, params, self.device)
        leaves, structure = apart(x)
        traced = self.function("loop", form, values, leaves, structure)
        return put_together(traced.function(*values, *_tensors(leaves)), traced.form)

    def block(self, way: Way, params: Params, x: Any, draw_keys: Sequence[DrawKey] | None = None) -> Outputs:
        """Outputs [K, B, ...] of the samples of `params` [K, ...]; with `draw_keys`, one a sample, they may draw."""
        size = len(next(iter(params.values())))
        count = num_rows(x) if way.rows is not None else None
        if way.rows is None or count is None or count <= way.rows:
            return self._samples(way, params, size, x, draw_keys)
        parts = [
            self._samples(way, params, size, rows_of(x, slice(start, start + way.rows)), draw_keys)
            for start in range(0, count, way.rows)
        ]
        return combined(lambda tensors: torch.cat(tensors, dim=1), parts)  # [K, B, ...]

    def _samples(self, way: Way, params: Params, size: int, x: Any, draw_keys: Sequence[DrawKey] | None) -> Outputs:
        if draw_keys is not None:
            each = [
                self.one({name: tensor[k] for name, tensor in params.items()}, x, key)
                for k, key in enumerate(draw_keys)
            ]
            return combined(stacked, each)
        if way.strategy == "loop":
            return self._loop(way, params, size, x)
        if way.samples >= size:
            return self._together(way, params, size, x)
        parts = [
            self._together(
                way,
                {name: t[start : start + way.samples] for name, t in params.items()},
                min(way.samples, size - start),
                x,
            )
            for start in range(0, size, way.samples)
        ]
        return combined(torch.cat, parts)

    def _loop(self, way: Way, params: Params, size: int, x: Any) -> Outputs:
        shell = self.skeleton.shell()
        self.skeleton.follow_modes(shell, may_draw=True)
        values = self.skeleton.values(shell, params, self.device)
        places = [place for place, slot in enumerate(shell.slots) if slot.kept_as in params]
        columns = [values[place].unbind(0) for place in places]
        if way.form == "eager":
            outputs = []
            for k in range(size):
                for place, column in zip(places, columns, strict=True):
                    values[place] = column[k]
                clones = len(shell.clones)
                outputs.append(self.skeleton.run(shell, values, x))
                if len(shell.clones) != clones:  # the forward wrote into a buffer: the next sample gets a fresh one
                    fresh = self.skeleton.values(shell, params, self.device)
                    values = [value if place in places else fresh[place] for place, value in enumerate(values)]
            return combined(stacked, outputs)  # K times [B, ...] -> [K, B, ...]
        leaves, structure = apart(x)
        for place, column in zip(places, columns, strict=True):
            values[place] = column[0]
        traced = self.function("loop", way.form, values, leaves, structure)
        tensors = _tensors(leaves)
        found = []
        for k in range(size):
            for place, column in zip(places, columns, strict=True):
                values[place] = column[k]
            found.append(traced.function(*values, *tensors))
        return put_together([torch.stack(column) for column in zip(*found, strict=True)], traced.form)

    def _together(self, way: Way, params: Params, size: int, x: Any) -> Outputs:
        shell = self.skeleton.shell()
        self.skeleton.follow_modes(shell, may_draw=True)
        values = self.skeleton.values(shell, params, self.device)
        if way.form == "eager":
            return self._batched(lambda given: self.skeleton.run(shell, given, x), (self._axes(),), values)
        leaves, structure = apart(x)
        values = [value.contiguous() for value in values]
        traced = self.function("vmap", way.form, values, leaves, structure, size)
        tensors = _tensors(leaves)
        return put_together(traced.function(*values, *tensors), traced.form)

    def rows(self, params: Params, x: Any) -> Outputs:
        """Outputs [G, M, ...] of G groups of M rows, each group under a sample of its own: all at once."""
        shell = self.skeleton.shell()
        self.skeleton.follow_modes(shell, may_draw=True)
        values = self.skeleton.values(shell, params, self.device)
        axes = pytree.tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, x)
        return self._batched(lambda given, part: self.skeleton.run(shell, given, part), (self._axes(), axes), values, x)

    def _batched(self, function: Callable[..., Outputs], axes: tuple[Any, ...], *arguments: Any) -> Outputs:
        """Outputs [K, ...] of a function under vmap: only tensors pass through that."""
        form: OutputForm | None = None

        def of_tensors(*batched: Any) -> list[Tensor]:
            nonlocal form
            tensors, form = taken_apart(function(*batched))
            return tensors

        with self._plain_attention():
            return put_together(torch.func.vmap(of_tensors, in_dims=axes)(*arguments), form)

    def function(
        self,
        strategy: Literal["loop", "vmap"],
        form: Form,
        values: Sequence[Tensor],
        leaves: Sequence[Any],
        structure: pytree.TreeSpec,
        size: int = 1,
    ) -> Traced:
        """The function of one shape of x and block, traced at its first use.

        Raises:
            ModuleError: the forward cannot be traced; it says why.
        """
        shell = self.skeleton.shell()
        own = [
            (t.shape, t.stride(), t.dtype)
            for t, name in zip(values, shell.names, strict=True)
            if name not in self._names
        ]
        first = leaves[0] if structure is _LEAF else None
        shapes = (first.shape, first.stride(), first.dtype) if first is not None else (structure, signature(leaves))
        key = strategy, form, size, values[0].dtype if values else None, tuple(own), shapes, shell.modes, _autocast()
        found = self._functions.get(key)
        if found is None:
            with self._lock:
                found = self._functions.get(key)
                if found is None:
                    while len(self._functions) >= MOST_TRACES:
                        self._functions.pop(next(iter(self._functions)))
                    found = self._functions[key] = self._made(strategy, form, values, leaves, structure)
        return found

    def _made(
        self,
        strategy: Literal["loop", "vmap"],
        form: Form,
        values: Sequence[Tensor],
        leaves: Sequence[Any],
        structure: pytree.TreeSpec,
    ) -> Traced:
        shell = self.skeleton.shell()
        outputs_form: OutputForm | None = None
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

        def forward(*tensors: Tensor) -> list[Tensor]:
            given, whole = list(tensors[: len(values)]), list(leaves)
            for place, tensor in zip(places, tensors[len(values) :], strict=True):
                whole[place] = tensor
            x = pytree.tree_unflatten(whole, structure)

            def run(given: list[Tensor]) -> list[Tensor]:
                nonlocal outputs_form
                tensors, outputs_form = taken_apart(self.skeleton.run(shell, given, x))
                return tensors

            return torch.func.vmap(run, in_dims=(self._axes(),))(given) if strategy == "vmap" else run(given)

        if not all(isinstance(leaf, Tensor) or is_plain(leaf) for leaf in leaves):
            raise cannot(strategy, form, "an object among the inputs, whose state a trace does not see")
        arguments = [*values, *(leaves[place] for place in places)]
        before = [version(tensor) for tensor in arguments]
        with torch.no_grad(), self._plain_attention():
            try:
                graph = tracing.trace(forward, arguments, lambda graph: refuse_untraceable(graph, strategy, form))
            except ModuleError:
                raise
            except Exception as error:  # tracing runs anybody's code
                raise cannot(strategy, form, error) from error
        if [version(tensor) for tensor in arguments] != before:
            raise cannot(strategy, form, "the forward writes into its inputs")
        tracing.simplify(graph)
        function: Function = graph.forward
        if form == "compiled":
            try:
                function = tracing.compiled(graph, arguments)
            except Exception as error:  # the compiler, and whatever it calls
                raise cannot(strategy, form, error) from error
        elif form == "graph":
            try:
                function = Graphed(graph.forward, arguments)
            except RuntimeError as error:  # what CUDA cannot record
                raise cannot(strategy, form, error) from error
        return Traced(function, outputs_form)

    def _axes(self) -> list[int | None]:
        return [0 if slot.kept_as in self._names else None for slot in self.skeleton.shell().slots]

    @contextmanager
    def _attention(self) -> Iterator[None]:
        # The fused fast path of attention layers in eval mode has no rule for vmap.
        with _FAST_PATH:
            before = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
            try:
                yield
            finally:
                torch.backends.mha.set_fastpath_enabled(before)

    def _plain_attention(self) -> Any:
        return self._attention() if self._attends else nullcontext()


_LEAF = pytree.tree_flatten(torch.zeros(()))[1]
_FAST_PATH = threading.RLock()  # a switch of the process: one thread at a time turns it


def cannot(strategy: str, form: str, why: Exception | str) -> ModuleError:
    """The error of a way that is not open to a module."""
    if isinstance(why, Exception):
        lines = str(why).strip().splitlines()
        why = f"{type(why).__name__}: {lines[0] if lines else ''}"
    return ModuleError(
        f"strategy '{strategy}', {form}",
        want="a forward of tensor operations that can be "
        + ("traced" if form != "eager" else "batched by torch.func.vmap"),
        got=why[:300],
        fix="use strategy='loop'" + ("" if form == "eager" else " and compile=False"),
    )


def refuse_untraceable(graph: fx.GraphModule, strategy: str, form: str) -> None:
    """Raise ModuleError where a trace would not be true of other values, or of what others may put in the place of a tensor."""
    for node in graph.graph.find_nodes(op="get_attr"):
        if not all("lift_fresh" in str(user.target) for user in node.users):
            raise cannot(strategy, form, "a tensor that is neither input, parameter nor buffer")
    why = tracing.untrue(graph)
    if why is not None:
        raise cannot(strategy, form, why)


def num_rows(x: Any) -> int | None:
    """B, where all tensors of x have the same length; None where they differ."""
    leaves = [leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor)]
    lengths = {leaf.shape[0] if leaf.dim() else None for leaf in leaves}
    return lengths.pop() if len(lengths) == 1 else None


def rows_of(x: Any, rows: slice | Tensor) -> Any:
    """Some rows of every tensor of x."""
    return pytree.tree_map(lambda leaf: leaf[rows] if isinstance(leaf, Tensor) else leaf, x)


def _tensors(leaves: Sequence[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def signature(leaves: Sequence[Any]) -> tuple[Any, ...]:
    """What a trace hangs on: shapes of tensors, plain values with their kind (1 is not True), other objects by themselves."""
    return tuple(
        [
            (leaf.shape, leaf.stride(), leaf.dtype)
            if isinstance(leaf, Tensor)
            else (type(leaf), leaf if is_plain(leaf) else id(leaf))
            for leaf in leaves
        ]
    )


def is_plain(leaf: Any) -> bool:
    """Whether a value that is no tensor is the same whenever it is equal."""
    return isinstance(leaf, (type(None), bool, int, float, complex, str, torch.dtype, torch.device))


def apart(x: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """The leaves of x and its structure; without a walk for a tensor alone."""
    return ([x], _LEAF) if isinstance(x, Tensor) else pytree.tree_flatten(x)


def _autocast() -> tuple[Any, ...]:
    if not torch._C._is_any_autocast_enabled():
        return ()
    return tuple(
        [torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in ("cpu", "cuda")]
    )
