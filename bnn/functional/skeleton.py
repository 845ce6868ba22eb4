"""A module's structure without its values: run with any tensors, while the module itself is never entered."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils import _pytree as pytree

from bnn.errors import ModuleError
from bnn.layout import Layout
from bnn.seeding import isolated
from bnn.types import Params

Outputs: TypeAlias = Any
"""A tensor, or any nesting of tuples, lists, dicts and dataclasses of tensors: whatever the module returns."""

OF_TORCH = "torch.nn.modules."  # where classes are that torch brings

DrawKey: TypeAlias = tuple[int, str, int, int | str]
"""Seed and place of what a forward draws in train mode, as in `seeding.derive`: (seed, what for, batch, bank index)."""


class Call(NamedTuple):
    """Arguments of a forward, where they are neither a tensor, a tuple nor a dict alone."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Clone(NamedTuple):
    """A private copy of a live buffer, and the versions of both when it was made."""

    live: Tensor
    live_version: int
    tensor: Tensor
    version: int


class Slot(NamedTuple):
    """Where a tensor is put in a copy, and where its value is found unless the sample has it."""

    kept_as: str  # its name in a sample
    shadow: dict[str, Any]  # of its owner in the copy: `_parameters` or `_buffers`, or the attributes themselves
    live: dict[str, Any]  # that of its owner in the live module: new tensors put into it are seen
    key: str
    placeholder: Tensor
    is_buffer: bool


@dataclass
class Shell:
    """A copy of a module without values, for one thread."""

    module: nn.Module
    parts: list[tuple[nn.Module, nn.Module]]  # (live, copy) pairs, to carry train / eval over
    slots: list[Slot]
    clones: dict[str, _Clone] = field(default_factory=dict)
    draws: dict[tuple[bool, ...], bool] = field(
        default_factory=dict
    )  # whether a forward draws, by the modes of the parts
    modes: tuple[bool, ...] | None = None  # train or eval of every part, as they were carried over last
    may_draw: bool = False  # and what was allowed then

    def __post_init__(self) -> None:
        # As lists of their own, since every call walks through them.
        self.names = [slot.kept_as for slot in self.slots]
        self.targets = [(slot.shadow, slot.key) for slot in self.slots]
        self.empty = [((slot.shadow, slot.key), slot.placeholder) for slot in self.slots]


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
        prefix: of the names in a sample, where the module is a part of the one that the sample is of.

    Raises:
        ModuleError: the module cannot be copied, or is in a mode that would change it.
    """

    def __init__(self, module: nn.Module, layout: Layout, *, detach: bool, prefix: str = "") -> None:
        check_copyable(module)
        self.live, self._detach, self._prefix = module, detach, prefix
        self._aliases = dict(layout.aliases)
        self._local = threading.local()
        self.shell()  # what cannot be copied is refused here, not at the first call

    def __call__(
        self, params: Params, x: Any, *, device: torch.device | None = None, draw_key: DrawKey | None = None
    ) -> Outputs:
        """Outputs of the module for one sample.

        Args:
            params: the sample.
            x: a tensor, a tuple (*args), a dict (**kwargs), or a `Call`.
            device: where tensors that are not in the sample are wanted.
            draw_key: where layers in train mode may draw from, such as dropout; without it they are refused.
        """
        shell = self.shell()
        if draw_key is not None and is_transformed():
            draw_key = None  # no state can be read here, so that layers that draw are refused
        modes = self.follow_modes(shell, may_draw=draw_key is not None)
        values = self.values(shell, params, device)
        if draw_key is None:
            return self.run(shell, values, x)
        draws = shell.draws.get(modes)
        if draws is False:
            return self.run(shell, values, x)
        with isolated(*draw_key):
            before = None if draws else streams(device)
            outputs = self.run(shell, values, x)
            if before is not None:  # the first forward in these modes shows whether they draw
                shell.draws[modes] = _may_draw(shell) or streams(device) != before
        return outputs

    def shell(self) -> Shell:
        """This thread's copy."""
        shell: Shell | None = getattr(self._local, "shell", None)
        if shell is None:
            shadow = _without_values(self.live)
            parts = list(zip(self.live.modules(), shadow.modules(), strict=True))
            as_attributes = _asks_by_attribute(shadow)
            for part in shadow.modules() if as_attributes else ():
                vars(part).update({**part._parameters, **part._buffers})  # with those that are None
            # Where each tensor stands is resolved once: walking the module at every call, as
            # `torch.func.functional_call` does, costs more than a small forward.
            kinds: tuple[Literal["_parameters", "_buffers"], ...] = ("_parameters", "_buffers")
            slots = [
                Slot(
                    self._aliases.get(self._prefix + name, self._prefix + name),
                    vars(there) if as_attributes else getattr(there, kind),
                    getattr(here, kind),
                    key,
                    placeholder,
                    kind == "_buffers",
                )
                for kind in kinds
                for name, here, there, key, placeholder in _owned(self.live, shadow, kind)
            ]
            shell = self._local.shell = Shell(shadow, parts, slots)
        return shell

    def follow_modes(self, shell: Shell, *, may_draw: bool = False) -> tuple[bool, ...]:
        """Carry the train / eval mode of every part of the live module over; the modes."""
        modes = tuple([live.training for live, _ in shell.parts])
        if modes != shell.modes or (shell.may_draw and not may_draw):
            shell.modes = None
            for live, shadow in shell.parts:
                if live.training:
                    check_mode(live, may_draw=may_draw)
                shadow.training = live.training
            shell.modes, shell.may_draw = modes, may_draw
        return modes

    def values(self, shell: Shell, params: Params, device: torch.device | None) -> list[Tensor]:
        """A tensor for every slot: the sample's, else the live module's."""
        try:
            return [params[name] for name in shell.names]
        except KeyError:  # the live module has the rest
            values: list[Any] = [params.get(name) for name in shell.names]
        for place, value in enumerate(values):
            if value is None:
                values[place] = self._own(shell, shell.slots[place], device)
        return values

    def _own(self, shell: Shell, slot: Slot, device: torch.device | None) -> Tensor:
        """What the live module has in a slot."""
        tensor: Tensor = slot.live[slot.key]
        if slot.is_buffer:
            return self._private(shell, slot.kept_as, tensor, device)
        tensor = tensor.detach() if self._detach else tensor
        return tensor if device is None or tensor.device == device else tensor.to(device)

    def run(self, shell: Shell, values: Sequence[Tensor], x: Any) -> Outputs:
        """The forward of this thread's copy with a tensor for every slot."""
        try:
            for (shadow, key), value in zip(shell.targets, values, strict=True):
                shadow[key] = value
            if isinstance(x, Tensor):
                return shell.module(x)
            if isinstance(x, Call):  # with containers of its own: a forward may empty a list that it is given
                return shell.module(*pytree.tree_map(_same, x.args), **pytree.tree_map(_same, x.kwargs))
            args = () if isinstance(x, dict) else x if isinstance(x, tuple) else (x,)
            return shell.module(*args, **(x if isinstance(x, dict) else {}))
        finally:
            for (shadow, key), placeholder in shell.empty:
                shadow[key] = placeholder  # keeps no sample alive, nor a tensor of a transform that has ended
            if shell.clones:
                for name in [name for name, clone in shell.clones.items() if version(clone.tensor) != clone.version]:
                    del shell.clones[name]  # written to by the forward: the next call starts from the live one

    @staticmethod
    def _private(shell: Shell, name: str, buffer: Tensor, device: torch.device | None) -> Tensor:
        clone = shell.clones.get(name)
        if clone is None or clone.live is not buffer or clone.live_version != version(buffer):
            with torch.inference_mode(False):  # kept, and used in calls that are not in it
                copied = buffer.detach().to(device or buffer.device, copy=True)
            clone = shell.clones[name] = _Clone(buffer, version(buffer), copied, version(copied))
        return clone.tensor


def _same(leaf: Any) -> Any:
    return leaf


def is_transformed() -> bool:
    """Whether a transform of torch.func is around this call: it wraps tensors, and state that is read or set inside."""
    return torch._C._functorch.peek_interpreter_stack() is not None


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


def check_mode(part: nn.Module, *, may_draw: bool = False) -> None:
    """Raise ModuleError for a layer in train mode that would change the module or draw random numbers."""
    if isinstance(part, _BatchNorm):
        raise ModuleError(
            type(part).__name__,
            want="eval mode",
            got="train mode, in which it rewrites its statistics",
            fix="call module.eval()" + (", or .eval() of this layer alone" if may_draw else ""),
        )
    if not may_draw and _draws_in_training(part):
        raise ModuleError(
            type(part).__name__,
            want="eval mode",
            got="train mode, in which it draws from the global stream",
            fix="call module.eval()",
        )


def _draws_in_training(part: nn.Module) -> bool:
    """Whether a layer of torch is known to draw random numbers in train mode."""
    rate = getattr(part, "dropout", 0.0) if isinstance(part, (nn.MultiheadAttention, nn.RNNBase)) else 0.0
    if isinstance(part, _DropoutNd):
        rate = part.p
    return isinstance(part, nn.RReLU) or (isinstance(rate, float) and rate > 0)


def _may_draw(shell: Shell) -> bool:
    return any(shadow.training and _draws_in_training(shadow) for _, shadow in shell.parts)


def streams(device: torch.device | None) -> tuple[Any, ...]:
    """The states of the global random streams, to be compared."""
    numpy_state: Any = np.random.get_state()  # noqa: NPY002 - compared, not used
    states = [torch.default_generator.get_state().numpy().tobytes(), random.getstate()]
    states += [numpy_state[1].tobytes(), numpy_state[2]]
    if device is not None and device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device).numpy().tobytes())
    return tuple(states)


def _owned(
    module: nn.Module, shadow: nn.Module, kind: Literal["_parameters", "_buffers"]
) -> Iterator[tuple[str, nn.Module, nn.Module, str, Tensor]]:
    """(full name, owner, its copy, key, tensor of the copy) of every tensor, shared ones under each of their names."""
    named = zip(module.named_modules(remove_duplicate=False), shadow.named_modules(remove_duplicate=False), strict=True)
    for (prefix, owner), (_, copied) in named:
        for key, placeholder in getattr(copied, kind).items():
            if placeholder is not None:
                yield f"{prefix}.{key}" if prefix else key, owner, copied, key, placeholder


def _asks_by_attribute(module: nn.Module) -> bool:
    """Whether forwards find their tensors by `part.weight` alone: those of torch's own classes, as torch wrote them.

    Put among the attributes of a part, they are then found without a call of `nn.Module.__getattr__`, which is a tenth of a
    small forward and more. Any other class may walk through `parameters()`, replace tensors there, or look names up by a
    rule of its own: in a module with one such part, with a hook, or with a method or tensor hidden by an attribute, all
    tensors stay where torch keeps them.
    """
    for part in module.modules():
        kind, own, tensors = type(part), vars(part).keys(), {*part._parameters, *part._buffers}
        is_of_torch = kind.__module__.startswith(OF_TORCH) and kind.forward.__module__.startswith(OF_TORCH)
        is_hidden = bool(own & tensors) or any(hasattr(kind, name) for name in own | tensors)
        if not is_of_torch or is_hidden or part._forward_hooks or part._forward_pre_hooks:
            return False
    return True


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


def version(tensor: Tensor) -> int:
    """How often a tensor was written to; -1 for those of inference mode, which do not count."""
    return -1 if tensor.is_inference() else tensor._version


def device_of(module: nn.Module) -> torch.device:
    """Where the first parameter of a module is; the CPU for a module without any."""
    tensor = next(iter(module.parameters()), None)
    return torch.device("cpu") if tensor is None else tensor.device
