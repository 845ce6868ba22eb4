"""Noise a row in place of noise a batch: local reparameterisation and Flipout for guides with independent weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from bnn.errors import ConfigError
from bnn.inference.families import NormalFamily
from bnn.model import BayesianModel
from bnn.types import Batch, Params

RowNoise: TypeAlias = Literal["local", "flipout"]

CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)


class Use(NamedTuple):
    """How a forward uses a tensor: as weight or bias of a layer, or otherwise."""

    kind: Literal["linear", "convolution", "other"]
    shape: tuple[int, ...] = ()  # of the layer's inputs


class Noise(NamedTuple):
    """A normal over parameters: theta = mean + delta, delta one draw of Normal(0, scale^2)."""

    drawn: Params
    mean: Params
    scale: Params


class Watch(TorchFunctionMode):
    """Records how a forward uses the tensors of a sample: found by identity, under their names."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.names = {id(tensor): name for name, tensor in params.items()}
        self.uses: dict[str, list[Use]] = {name: [] for name in params}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        # Reading a shape or dtype is no use, reading a transpose is.
        if getattr(func, "__name__", "") != "__get__" or isinstance(found, Tensor):
            use = Use("other")
            # A weight that is given by keyword is not one that `PerRow` replaces.
            if func is functional.linear and len(args) > 1:
                use = Use("linear", tuple(args[0].shape))
            elif func in CONVOLUTIONS and len(args) > 1:
                use = Use("convolution", tuple(args[0].shape))
            for place, leaf in enumerate(pytree.tree_leaves((args, kwargs))):
                if isinstance(leaf, Tensor) and id(leaf) in self.names:
                    # Inputs of a layer, in place 0, may not be parameters of the sample.
                    self.uses[self.names[id(leaf)]].append(use if place > 0 else Use("other"))
        return found


def eligible(uses: Mapping[str, list[Use]], how: RowNoise, num_rows: int) -> frozenset[str]:
    """Names of the tensors that may have noise a row: used once, by a layer that allows it.

    Local reparameterisation is exact where a row meets each weight once: a linear layer on inputs [B, C].
    Flipout also takes linear layers on [B, ..., C] and convolutions, whose positions share one draw.

    Raises:
        ConfigError: there are none.
    """

    def allowed(use: Use) -> bool:
        if use.kind == "other" or len(use.shape) < 2 or use.shape[0] != num_rows:
            return False
        return how == "flipout" or (use.kind == "linear" and len(use.shape) == 2)

    found = frozenset(name for name, seen in uses.items() if len(seen) == 1 and allowed(seen[0]))
    if not found:
        raise ConfigError(
            "Guide(variance_reduction=)",
            want="a linear layer on rows [B, C]" if how == "local" else "a linear or convolutional layer used once",
            got="none that is Bayesian",
            fix="try 'flipout' or 'antithetic'" if how == "local" else "try 'antithetic'",
        )
    return found


def eligible_rows(model: BayesianModel, batch: Batch, how: RowNoise) -> frozenset[str]:
    """Names of the tensors of a model that may have noise a row.

    Seen from a forward of the batch and one of twice its rows: an axis of so many positions as the batch has rows
    does not grow with it, and is not taken for the rows.
    """
    params = model.module_params()

    def seen(times: int) -> frozenset[str]:
        x = pytree.tree_map(lambda leaf: torch.cat([leaf] * times) if isinstance(leaf, Tensor) else leaf, batch.x)
        with torch.no_grad(), Watch(params) as watch:
            model.forward(params, x)
        return eligible(watch.uses, how, times * len(batch.y))

    once = seen(1)
    return once & seen(2)


class PerRow(TorchFunctionMode):
    """Runs a forward with noise of its own a row, in the layers whose tensors are eligible.

    Local, for outputs a = W x + b of W ~ Normal(M, S^2), b ~ Normal(m, s^2): a ~ Normal(M x + m, S^2 x^2 + s^2).
    Flipout: a = M x + m + r * (D (q * x) + d), with the batch's draw D, d of W - M, b - m and signs q, r a row.
    Other tensors keep the batch's draw. Expectations over rows are those of one draw for all of them.

    Source: Kingma et al. (2015), arXiv:1506.02557; Wen et al. (2018), arXiv:1803.04386.
    """

    def __init__(self, noise: Noise, names: frozenset[str], how: RowNoise, generator: torch.Generator) -> None:
        super().__init__()
        self.noise, self.how, self.generator = noise, how, generator
        self.names = {id(noise.drawn[name]): name for name in names}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (func is functional.linear or func in CONVOLUTIONS) and len(args) > 1 and id(args[1]) in self.names:
            x, weight, bias, *rest = (*args, None)[: max(len(args), 3)]
            bias = kwargs.pop("bias", bias)

            def layer(x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
                return func(x, weight, bias, *rest, **kwargs)

            return self._local(layer, x, weight, bias) if self.how == "local" else self._flip(layer, x, weight, bias)
        return func(*args, **kwargs)

    def _parts(self, tensor: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Mean, deviation and scale of a tensor; a bias that is not eligible is its own mean."""
        name = self.names.get(id(tensor))
        if tensor is None or name is None:
            return tensor, None, None
        mean = self.noise.mean[name]
        return mean, tensor - mean, self.noise.scale[name]

    def _local(self, layer: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        (mean, _, scale), (bias_mean, _, bias_scale) = self._parts(weight), self._parts(bias)
        assert scale is not None
        variance = layer(x.square(), scale.square(), None if bias_scale is None else bias_scale.square())
        # An input of zeros without a bias has no variance, and a root there no gradient.
        spread = variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt()
        normals = torch.randn(spread.shape, generator=self.generator, device=spread.device, dtype=spread.dtype)
        return layer(x, mean, bias_mean) + spread * normals

    def _flip(self, layer: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        (mean, delta, _), (bias_mean, bias_delta, _) = self._parts(weight), self._parts(bias)
        middle = layer(x, mean, bias_mean)
        at = -1 if layer_is_linear(weight) else 1  # the axis of channels
        off = layer(x * self._signs(x, at), delta, bias_delta)
        return middle + self._signs(off, at) * off

    def _signs(self, like: Tensor, at: int) -> Tensor:
        """+-1 a row and channel, the same at all positions."""
        shape = [1] * like.dim()
        shape[0], shape[at] = like.shape[0], like.shape[at]
        drawn = torch.randint(2, shape, generator=self.generator, device=like.device)
        return (2 * drawn - 1).to(like.dtype)


def layer_is_linear(weight: Tensor) -> bool:
    """Whether a weight is a linear layer's, [out, in]; those of convolutions have more axes."""
    return weight.dim() == 2


def row_noise_loss(
    family: NormalFamily,
    model: BayesianModel,
    batch: Batch,
    weight: float,
    normals: Tensor,
    rows: frozenset[str],
    how: RowNoise,
    source: torch.Generator,
) -> Tensor:
    """-ELBO of one draw with noise of its own a row in the likelihood; the prior is taken at the draw of the batch."""
    draw = family.draw(normals)
    own = {e.name: torch.full(e.shape, not e.name.startswith("@")) for e in model.layout.entries}
    of_module = torch.cat([flag.flatten() for flag in own.values()]).to(model.device)  # [P]
    drawn, log_jacobian = model.constrain(draw.flat)
    # Unknowns keep the draw of the batch. Scales are found at zero, where low precision has room for small ones.
    mean, none, one = (
        model.constrain(torch.where(of_module, flat, draw.flat))[0]
        for flat in (family.parameters["loc"], torch.zeros_like(draw.flat), family.scale)
    )
    noise = Noise(drawn, mean, {name: one[name] - none[name] for name in rows})
    with PerRow(noise, rows, how, source):
        log_joint = model.log_joint(drawn, batch, weight=weight)
    return -(log_joint + log_jacobian + draw.surprise)
