"""Apply the samples of a bank to data without ever touching the module: (bank index, x) -> outputs."""

from __future__ import annotations

import copy
import glob
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils import _pytree as pytree

from bnn.errors import BankError, ConfigError, DataError, ModuleError, choose
from bnn.layout import Layout, layout_of
from bnn.types import Block, Params

if TYPE_CHECKING:
    from collections.abc import Mapping

Strategy: TypeAlias = Literal["loop", "vmap"]
STRATEGIES: tuple[str, ...] = ("loop", "vmap")

Outputs: TypeAlias = Any
"""A tensor, or a tuple, list or dict of tensors: whatever the module returns."""


class SampleSource(Protocol):
    """What is asked of a bank here: a fixed, ordered set of samples."""

    @property
    def layout(self) -> Layout: ...

    @property
    def info(self) -> Mapping[str, Any]: ...

    @property
    def chain(self) -> Tensor: ...

    @property
    def log_weight(self) -> Tensor: ...

    @property
    def digest(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Params: ...

    def block(self, indices: Sequence[int] | slice | Tensor) -> Block: ...


class _Clone(NamedTuple):
    """A private copy of a live buffer, and the versions of both when it was made."""

    live: Tensor
    live_version: int
    tensor: Tensor
    version: int


class _Slot(NamedTuple):
    """Where a parameter is put in a copy, and where its value is found unless the sample has it."""

    kept_as: str  # its name in a sample
    shadow: dict[str, Any]  # `_parameters` of its owner in the copy
    live: dict[str, Any]  # that of its owner in the live module: new tensors put into it are seen
    key: str
    placeholder: Tensor


class _Shell(NamedTuple):
    """A copy of a module without values, for one thread."""

    module: nn.Module
    parts: list[tuple[nn.Module, nn.Module]]  # (live, copy) pairs, to carry train / eval over
    slots: list[_Slot]
    buffers: list[tuple[str, dict[str, Any], dict[str, Any], str]]  # name, in the copy, live, key
    clones: dict[str, _Clone]


class Skeleton:
    """A module's structure run with given parameters; the module itself is never entered.

    Each thread has its own copy, whose parameters and buffers live on the meta device.
    Tensors that are not given come from the live module at each call; buffers are passed as private
    clones, so that a forward that writes into them changes nothing outside.

    Args:
        module: the module to copy; hook-style `weight_norm` and `spectral_norm`, scripted and lazy
            modules are refused.
        layout: its Bayesian parameters.
        detach: whether gradients are kept from reaching the module's own parameters.

    Raises:
        ModuleError: the module cannot be copied, or is in a mode that would change it.
    """

    def __init__(self, module: nn.Module, layout: Layout, *, detach: bool) -> None:
        check_copyable(module)
        self._module, self._detach = module, detach
        self._aliases = dict(layout.aliases)
        self._local = threading.local()
        self._shell()  # what cannot be copied is refused here, not at the first call

    def __call__(self, params: Params, x: Any, *, device: torch.device | None = None) -> Outputs:
        """Outputs of the module for one sample: x is a tensor, a tuple (*args) or a dict (**kwargs)."""
        shell = self._shell()
        for live, shadow in shell.parts:
            if live.training:
                check_mode(live)
                shadow.training = True
            elif shadow.training:
                shadow.training = False
        try:
            self._fill(shell, params, device)
            if isinstance(x, Tensor):
                return shell.module(x)
            args = () if isinstance(x, dict) else x if isinstance(x, tuple) else (x,)
            return shell.module(*args, **(x if isinstance(x, dict) else {}))
        finally:
            for slot in shell.slots:  # keeps no sample alive, nor a tensor of a transform that has ended
                slot.shadow[slot.key] = slot.placeholder
            for name in [name for name, clone in shell.clones.items() if _version(clone.tensor) != clone.version]:
                del shell.clones[name]  # written to by the forward: the next call starts from the live one

    def _shell(self) -> _Shell:
        shell: _Shell | None = getattr(self._local, "shell", None)
        if shell is None:
            shadow = _without_values(self._module)
            parts = list(zip(self._module.modules(), shadow.modules(), strict=True))
            # Where each tensor stands is resolved once: walking the module at every call, as
            # `torch.func.functional_call` does, costs more than a small forward.
            slots = [
                _Slot(self._aliases.get(name, name), there._parameters, here._parameters, key, placeholder)
                for name, here, there, key, placeholder in _owned(self._module, shadow, "_parameters")
            ]
            buffers = [
                (name, there._buffers, here._buffers, key)
                for name, here, there, key, _ in _owned(self._module, shadow, "_buffers")
            ]
            shell = self._local.shell = _Shell(shadow, parts, slots, buffers, {})
        return shell

    def _fill(self, shell: _Shell, params: Params, device: torch.device | None) -> None:
        """Put every tensor that the copy needs into it: the sample's, else the live module's."""
        for kept_as, shadow, live, key, _ in shell.slots:
            given = params.get(kept_as)
            if given is None:
                given = live[key].detach() if self._detach else live[key]
                given = given if device is None else given.to(device)
            shadow[key] = given
        for name, shadow, live, key in shell.buffers:
            buffer: Tensor = live[key]
            clone = shell.clones.get(name)
            if clone is None or clone.live is not buffer or clone.live_version != _version(buffer):
                copied = buffer.detach().to(device or buffer.device, copy=True)
                clone = shell.clones[name] = _Clone(buffer, _version(buffer), copied, _version(copied))
            shadow[key] = clone.tensor


class FunctionalModel:
    """The module under the samples of a bank.

    `net(x, i)` gives the outputs [B, C] of sample i; `net(x, [i, j])` and `net(x, slice)` those of K
    samples [K, B, C]; `net(x, rows=index)` with index int64 [B] a sample a row, [B, C].
    x is a tensor, a tuple of arguments or a dict of keyword arguments; outputs may be any nesting of
    tuples, lists and dicts of tensors. Parameters outside the sample, buffers and the train / eval
    mode are the live module's at each call, and gradients reach the former and x.

    Args:
        module: never changed, also when its forward raises, and from any number of threads.
        bank: the samples.
        device: where to compute; the module's own device by default. x and samples are moved there.
        strategy: `"loop"` runs the samples of a block one after another, `"vmap"` all at once.

    Raises:
        BankMismatch: the bank belongs to another module; the first differing entry is named.
        ModuleError: the module cannot be copied, or its mode makes it change or draw random numbers.

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
        strategy: Strategy = "loop",
    ) -> None:
        choose("strategy", strategy, STRATEGIES)
        self.bank = bank
        self.device = torch.device(device) if device is not None else device_of(module)
        self._strategy = strategy
        own = tuple(entry for entry in bank.layout.entries if not entry.name.startswith("@"))
        extra = bank.layout.entries[len(own) :]
        names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        patterns = [glob.escape(entry.name) for entry in own if entry.name in names]
        found = layout_of(module, patterns, extra) if patterns else Layout(extra)
        bank.layout.require(found, place=f"module {type(module).__name__}")
        self._skeleton = Skeleton(module, bank.layout, detach=False)

    def __call__(
        self, x: Any, index: int | Sequence[int] | slice | Tensor | None = None, *, rows: Tensor | None = None
    ) -> Outputs:
        if (index is None) == (rows is None):
            raise ConfigError(
                "net(x, ...)",
                want="either an index or rows=",
                got="both or neither",
                fix="pass net(x, i), net(x, [i, j]), net(x, slice) or net(x, rows=index)",
            )
        x = self._moved(x)
        if rows is not None:
            return self._by_row(x, rows)
        if isinstance(index, (int, np.integer)) or (isinstance(index, Tensor) and index.dim() == 0):
            return self._skeleton(self.params(int(index)), x, device=self.device)
        return self.apply(self.bank.block(index), x)  # type: ignore[arg-type]

    def params(self, index: int) -> Params:
        """The values of one sample on the model's device."""
        moved: Params = self._moved(self.bank[index])
        return moved

    def apply(self, block: Block, x: Any) -> Outputs:
        """Outputs [K, B, C] of the K samples of a block."""
        params, x = self._moved(block.params), self._moved(x)
        if block.num_samples == 0:
            raise BankError("net(x, index)", want="at least one sample", got="none", fix="pick indices below len(bank)")
        if self._strategy == "vmap":
            return torch.func.vmap(lambda one: self._skeleton(one, x, device=self.device))(params)
        outputs = [
            self._skeleton({name: tensor[k] for name, tensor in params.items()}, x, device=self.device)
            for k in range(block.num_samples)
        ]
        return _zip_leaves(torch.stack, outputs)  # K times [B, C] -> [K, B, C]

    def _by_row(self, x: Any, rows: Tensor) -> Outputs:
        """Outputs [B, C] with a sample a row: rows are grouped by index, one call a group."""
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
        order = rows.argsort(stable=True)
        indices, counts = rows[order].unique_consecutive(return_counts=True)
        groups = []
        for index, places in zip(indices.tolist(), order.split(counts.tolist()), strict=True):
            here = places.to(self.device)
            part = pytree.tree_map(lambda leaf: leaf[here] if isinstance(leaf, Tensor) else leaf, x)  # noqa: B023
            groups.append(self._skeleton(self.params(index), part, device=self.device))
        back = order.argsort().to(self.device)
        return _zip_leaves(lambda leaves: torch.cat(leaves)[back], groups)

    def _moved(self, values: Any) -> Any:
        def move(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or leaf.device == self.device:
                return leaf
            return leaf.to(self.device, non_blocking=True)

        if isinstance(values, Tensor):
            return move(values)
        if type(values) is dict:  # the params of a sample, without a walk
            return {name: self._moved(leaf) for name, leaf in values.items()}
        return pytree.tree_map(move, values)


def check_copyable(module: nn.Module) -> None:
    """Raise ModuleError, naming the place, for what a copy without values cannot stand for."""
    for name, part in module.named_modules():
        place = f"module '{name}' ({type(part).__name__})"
        if isinstance(part, torch.jit.ScriptModule):
            raise ModuleError(
                place, want="a Python module", got="a scripted one", fix="pass the module before torch.jit.script"
            )
        if isinstance(part, nn.modules.lazy.LazyModuleMixin) and part.has_uninitialized_params():  # type: ignore[misc]
            raise ModuleError(
                place, want="materialised parameters", got="a lazy module", fix="run the module once on a batch"
            )
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.max_norm is not None:
            raise ModuleError(
                place,
                want="a forward that leaves its weights alone",
                got="max_norm, which rescales them in place",
                fix="drop max_norm, and bound the rows by their prior",
            )
        for hook in part._forward_pre_hooks.values():
            if isinstance(hook, (WeightNorm, SpectralNorm)):
                raise ModuleError(
                    place,
                    want="parametrised weights",
                    got=f"the hook-style {type(hook).__name__}, which leaves tensors behind",
                    fix=f"use torch.nn.utils.parametrizations.{'weight_norm' if isinstance(hook, WeightNorm) else 'spectral_norm'}",
                )


def check_mode(part: nn.Module) -> None:
    """Raise ModuleError for a layer in train mode that would change the module or draw random numbers."""
    if isinstance(part, _BatchNorm):
        raise ModuleError(
            type(part).__name__,
            want="eval mode",
            got="train mode, in which it rewrites its statistics",
            fix="call module.eval()",
        )
    rate = getattr(part, "dropout", 0.0) if isinstance(part, (nn.MultiheadAttention, nn.RNNBase)) else 0.0
    if isinstance(part, _DropoutNd):
        rate = part.p
    if isinstance(part, nn.RReLU) or (isinstance(rate, float) and rate > 0):
        raise ModuleError(
            type(part).__name__,
            want="eval mode",
            got="train mode, in which it draws from the global stream",
            fix="call module.eval()",
        )


def _owned(
    module: nn.Module, shadow: nn.Module, kind: Literal["_parameters", "_buffers"]
) -> Iterator[tuple[str, nn.Module, nn.Module, str, Tensor]]:
    """(full name, owner, its copy, key, tensor of the copy) of every tensor, shared ones under each of their names."""
    named = zip(module.named_modules(remove_duplicate=False), shadow.named_modules(remove_duplicate=False), strict=True)
    for (prefix, owner), (_, copied) in named:
        for key, placeholder in getattr(copied, kind).items():
            if placeholder is not None:
                yield f"{prefix}.{key}" if prefix else key, owner, copied, key, placeholder


def _without_values(module: nn.Module) -> nn.Module:
    """A deep copy whose parameters and buffers are on the meta device: no value is copied."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    try:
        return copy.deepcopy(module, memo)
    except (TypeError, RuntimeError) as error:
        raise ModuleError(
            f"module {type(module).__name__}",
            want="a module that copy.deepcopy can copy",
            got=str(error),
            fix="keep files, locks and graph tensors out of its attributes",
        ) from error


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; tensors of inference mode do not count, and are never equal."""
    return -1 if tensor.is_inference() else tensor._version


def device_of(module: nn.Module) -> torch.device:
    """Where the first parameter of a module is; the CPU for a module without any."""
    tensor = next(iter(module.parameters()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _zip_leaves(combine: Callable[[list[Tensor]], Tensor], outputs: list[Outputs]) -> Outputs:
    """Combine the tensors that stand at the same place of several outputs of one structure."""
    flat = [pytree.tree_flatten(output) for output in outputs]
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    return pytree.tree_unflatten([combine(list(column)) for column in columns], flat[0][1])
