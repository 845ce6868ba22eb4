"""The fixed beginning of a module, run once a batch where only what follows it has samples."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils import _pytree as pytree

from bnn.functional.outputs import taken_apart
from bnn.functional.skeleton import Call, Skeleton, is_transformed, version
from bnn.functional.ways import is_plain
from bnn.layout import Layout
from bnn.types import Params

MOST_HEADS = 3  # that are tried, from the part that holds the samples' parameters outwards


class NotAHead(Exception):
    """The part does not stand for the module: it is not asked again."""


class Trunk:
    """What comes before the head of a module, where the head holds all that the samples bring.

    The head is the children of an `nn.Sequential` from the first one with samples on, or one part of any module. That
    it can stand for the whole is proved for each batch, never assumed: without hooks, the head's tensors are not
    used before it, it is called once, and its output is that of the module, the very same object.

    Args:
        module: the whole.
        layout: what samples bring.
        whole: the skeleton of the module.
    """

    def __init__(self, module: nn.Module, layout: Layout, whole: Skeleton, head: nn.Module, prefix: str) -> None:
        self._whole, self._prefix = whole, prefix
        self._layout = layout
        self.head = Skeleton(head, layout, detach=False, prefix=f"{prefix}." if prefix else "")
        self._before: Skeleton | None = None
        if not prefix:  # an nn.Sequential, cut between two children
            first = list(module._modules).index(next(iter(head._modules)))
            before = nn.Sequential(OrderedDict(list(module._modules.items())[:first]))  # type: ignore[arg-type]
            self._before = Skeleton(before, Layout(()), detach=False)

    def inputs(self, params: Params, x: Any, device: torch.device) -> Any:
        """The inputs of the head for a batch, given any sample; None where it cannot stand for the module now.

        Raises:
            NotAHead: the forward shows that it cannot at all.
        """
        if _has_hooks(self._whole.live) or torch.is_inference_mode_enabled() or is_transformed():
            return None  # tensors of inference mode do not count what is written into them
        shell = self._whole.shell()
        if shell.draws.get(self._whole.follow_modes(shell, may_draw=True), True):
            return None
        if self._before is not None:
            return self._run_before(x, device)
        try:
            return self._captured(params, x, device)
        except NotAHead:
            raise
        except Exception as error:
            self._whole(params, x, device=device, draw_key=(0, "trunk", 0, 0))  # raises if it is the forward that fails
            raise NotAHead from error

    def _run_before(self, x: Any, device: torch.device) -> Any:
        assert self._before is not None
        found = self._before({}, x, device=device)
        return found if isinstance(found, Tensor) else Call((found,), {})

    def _captured(self, params: Params, x: Any, device: torch.device) -> Any:
        shell = self._whole.shell()
        filled = self._whole.values(shell, params, device)
        ours = [place for place, slot in enumerate(shell.slots) if slot.kept_as in params]
        empty = [
            slot.placeholder if slot.kept_as in params else value
            for slot, value in zip(shell.slots, filled, strict=True)
        ]
        calls: list[Call] = []
        outputs: list[Any] = []
        versions: list[list[int]] = []
        around = _surroundings(device)

        def before(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if _surroundings(device) != around:  # such as autocast or no_grad about the head alone
                raise NotAHead
            # Containers of its own: the head may empty a list that it is given.
            calls.append(Call(pytree.tree_map(_leaf, args), pytree.tree_map(_leaf, kwargs)))
            versions.append(_versions(calls[-1]))
            for place in ours:
                shell.slots[place].shadow[shell.slots[place].key] = filled[place]

        def after(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            outputs.append(output)
            versions.append(_versions(output))
            for place in ours:  # on the meta device: whoever uses them elsewhere fails, or gives what is no value
                shell.slots[place].shadow[shell.slots[place].key] = shell.slots[place].placeholder

        head = shell.module.get_submodule(self._prefix)
        hooks = [
            head.register_forward_pre_hook(before, with_kwargs=True),
            head.register_forward_hook(after, with_kwargs=True),
        ]
        try:
            found = self._whole.run(shell, empty, x)
        finally:
            for hook in hooks:
                hook.remove()
        if len(calls) != 1 or found is not outputs[0] or [_versions(calls[0]), _versions(found)] != versions:
            raise NotAHead  # nor may anything be written to on the way, or after the head
        only = calls[0].args[0] if len(calls[0].args) == 1 and not calls[0].kwargs else None
        inputs = only if isinstance(only, Tensor) else calls[0]
        again = self.head(params, inputs, device=device, draw_key=(0, "trunk", 0, 0))
        if not _same(again, found) or _versions(calls[0]) != versions[0]:
            raise NotAHead
        return inputs


def _leaf(leaf: Any) -> Any:
    """A value that the head may be given again for every sample."""
    if isinstance(leaf, Tensor) and not leaf.is_meta:
        return leaf
    if isinstance(leaf, Tensor) or not is_plain(leaf):
        raise NotAHead
    return leaf


def _surroundings(device: torch.device) -> tuple[Any, ...]:
    return torch.is_grad_enabled(), torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)


def _same(found: Any, expected: Any) -> bool:
    """Whether two outputs are the same values of the same kind."""
    mine, theirs = taken_apart(found)[0], taken_apart(expected)[0]
    return len(mine) == len(theirs) and all(
        one.dtype == other.dtype
        and one.shape == other.shape
        and one.requires_grad == other.requires_grad
        and torch.allclose(one.double(), other.double(), rtol=1e-5, atol=1e-8, equal_nan=True)
        for one, other in zip(mine, theirs, strict=True)
    )


def trunks_of(module: nn.Module, layout: Layout, whole: Skeleton) -> list[Trunk]:
    """What may be the trunk of a module, that with the smallest head first; none where samples reach to its beginning."""
    names = [name for name in layout.names if not name.startswith("@")]
    every = [
        *(n for n, _ in module.named_parameters(remove_duplicate=False)),
        *(n for n, _ in module.named_buffers(remove_duplicate=False)),
    ]
    sampled = [name for name in every if layout.aliases.get(name, name) in names]
    if not sampled:
        return []
    if type(module).forward is nn.Sequential.forward:
        children = list(module._modules)
        first = min(children.index(name.split(".")[0]) for name in sampled)
        if first == 0:
            return []
        head = nn.Sequential(OrderedDict(list(module._modules.items())[first:]))  # type: ignore[arg-type]
        return [Trunk(module, layout, whole, head, "")]
    owners = [
        name.split(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]
        for name in sampled
    ]
    path = owners[0].split(".") if owners[0] else []
    for owner in owners[1:]:
        shared = 0
        for mine, theirs in zip(path, owner.split("."), strict=False):
            if mine != theirs:
                break
            shared += 1
        path = path[:shared]
    prefixes = [".".join(path[:depth]) for depth in range(len(path), 0, -1)]
    return [Trunk(module, layout, whole, module.get_submodule(prefix), prefix) for prefix in prefixes[:MOST_HEADS]]


def _versions(output: Any) -> list[int]:
    values = (output.args, output.kwargs) if isinstance(output, Call) else output
    return [version(leaf) for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def _has_hooks(module: nn.Module) -> bool:
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return True
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
