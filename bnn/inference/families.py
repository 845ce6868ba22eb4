"""Families of distributions q over unconstrained space that a guide fits: normals, and a flow."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from pyro.distributions.transforms import Spline
from torch import Tensor, nn

from bnn.seeding import isolated

SPLINE_BINS, SPLINE_BOUND = 8, 3.0  # of the flow's marginals, in standard deviations
LARGEST_LOG_SCALE = 2.0  # of one step of the flow: what keeps exp() in bounds while it learns


class Draw(NamedTuple):
    """A draw u [P] of q as a function of its parameters, and -log q(u), or its mean, as far as they move it."""

    flat: Tensor
    surprise: Tensor  # a scalar; its mean over draws is the entropy of q


class Family(Protocol):
    """A distribution q of u = T(z), with z standard normal."""

    parameters: dict[str, Tensor]  # leaves that are optimised

    @property
    def num_normals(self) -> int:
        """Standard normals behind one draw."""
        ...

    def draw(self, normals: Tensor) -> Draw:
        """u and -log q(u) for standard normals [num_normals]."""
        ...


class Point:
    """All mass at u = loc: what is found is a mode."""

    def __init__(self, start: Tensor) -> None:
        self.parameters = {"loc": _leaf(start)}

    @property
    def num_normals(self) -> int:
        return 0

    def draw(self, normals: Tensor) -> Draw:
        del normals
        return Draw(self.parameters["loc"], torch.zeros(()))


class NormalFamily:
    """u = loc + s (z_1 + W z_2), W [P, rank]; rank 0 is mean-field: Normal(loc, diag(s) (I + W W^T) diag(s)).

    H[q] = sum log s + log det(I + W^T W) / 2 + P log(2 pi e) / 2

    s = softplus of its parameter. The gradient of -log q(u) at a draw is that of H[q], since z does not move.
    """

    def __init__(self, start: Tensor, scale: Tensor, rank: int, generator: torch.Generator) -> None:
        self.parameters = {"loc": _leaf(start), "scale_unconstrained": _leaf(scale.expm1().log())}
        if rank:
            factor = torch.randn(len(start), rank, generator=generator) / math.sqrt(rank)
            self.parameters["cov_factor"] = _leaf(factor.to(start))
        self.rank = rank

    @property
    def num_normals(self) -> int:
        return len(self.parameters["loc"]) + self.rank

    @property
    def scale(self) -> Tensor:
        """s, [P]."""
        return nn.functional.softplus(self.parameters["scale_unconstrained"])

    def draw(self, normals: Tensor) -> Draw:
        loc, scale = self.parameters["loc"], self.scale
        entropy = scale.log().sum() + 0.5 * len(loc) * (1.0 + math.log(2.0 * math.pi))
        if not self.rank:
            return Draw(torch.addcmul(loc, scale, normals), entropy)
        factor = self.parameters["cov_factor"]
        first, second = normals.split([len(loc), self.rank])
        inner = torch.eye(self.rank, dtype=factor.dtype, device=factor.device) + factor.T @ factor  # [rank, rank]
        return Draw(loc + scale * (first + factor @ second), entropy + 0.5 * torch.logdet(inner))


class FullRankFamily:
    """u = loc + s L z, L lower triangular with a diagonal of ones: a normal with any covariance.

    H[q] = sum log s + P log(2 pi e) / 2
    """

    def __init__(self, start: Tensor, scale: Tensor) -> None:
        size = len(start)
        self.parameters = {
            "loc": _leaf(start),
            "scale_unconstrained": _leaf(scale.expm1().log()),
            "lower": _leaf(start.new_zeros(size, size)),  # below the diagonal; the rest stays 0
        }

    @property
    def num_normals(self) -> int:
        return len(self.parameters["loc"])

    def draw(self, normals: Tensor) -> Draw:
        loc, lower = self.parameters["loc"], self.parameters["lower"]
        scale = nn.functional.softplus(self.parameters["scale_unconstrained"])
        entropy = scale.log().sum() + 0.5 * len(loc) * (1.0 + math.log(2.0 * math.pi))
        return Draw(loc + scale * (normals + lower.tril(-1) @ normals), entropy)

    @staticmethod
    def num_bytes(size: int, itemsize: int) -> int:
        """Of a fit: L, its triangle, gradients of both and one that a trace is held against, and two moments of the optimiser."""
        return 7 * size * size * itemsize


class FlowFamily:
    """u = loc + s h(g(z)): an inverse autoregressive flow h of a monotone spline g a value.

    h_i(v) = m_i(v_<i) + exp(l_i(v_<i)) v_i, with m and l of one masked net with a hidden layer of given width

    An affine flow is normal in its first value, and so in one dimension; the splines g (rational quadratic, of
    SPLINE_BINS bins over +-SPLINE_BOUND, the identity outside) let every value have several modes. At the start
    q is Normal(loc, s^2).

    Source: Kingma et al. (2016), arXiv:1606.04934; Germain et al. (2015), arXiv:1502.03509; Durkan et al. (2019),
    arXiv:1906.04032.
    """

    def __init__(self, start: Tensor, scale: Tensor, hidden: int, generator: torch.Generator) -> None:
        size = len(start)
        # Value i may look at those before it: hidden units carry degrees spread evenly over them.
        degrees = torch.linspace(1, max(size - 1, 1), hidden).round().to(start.device)  # [H]
        values = torch.arange(1, size + 1, device=start.device)
        self.masks = (degrees.unsqueeze(1) >= values).to(start), (values.unsqueeze(1) > degrees).to(start).repeat(2, 1)
        first = torch.randn(hidden, size, generator=generator).to(start) / math.sqrt(size)
        self.spline = _identity_spline(start)
        self.parameters = {
            "loc": _leaf(start),
            "scale_unconstrained": _leaf(scale.expm1().log()),
            "hidden.weight": _leaf(first),  # [H, P]
            "hidden.bias": _leaf(start.new_zeros(hidden)),
            "out.weight": _leaf(start.new_zeros(2 * size, hidden)),  # [2 P, H]: m, then l
            "out.bias": _leaf(start.new_zeros(2 * size)),
            **{f"spline.{name}": parameter for name, parameter in self.spline.named_parameters()},
        }

    @property
    def num_normals(self) -> int:
        return len(self.parameters["loc"])

    def draw(self, normals: Tensor) -> Draw:
        here = self.parameters
        normals = normals.clone()  # of the tensor that it saw last Pyro's spline hands out what it made of it then
        bent = self.spline(normals)
        log_slope = self.spline.log_abs_det_jacobian(normals, bent).sum()
        hidden = torch.tanh(
            nn.functional.linear(bent, here["hidden.weight"] * self.masks[0], here["hidden.bias"])
        )  # [H]
        shift, raw = nn.functional.linear(hidden, here["out.weight"] * self.masks[1], here["out.bias"]).chunk(2)
        log_scale = LARGEST_LOG_SCALE * torch.tanh(raw / LARGEST_LOG_SCALE)
        scale = nn.functional.softplus(here["scale_unconstrained"])
        flat = here["loc"] + scale * (shift + log_scale.exp() * bent)
        log_volume = log_slope + log_scale.sum() + scale.log().sum()
        return Draw(flat, 0.5 * normals.square().sum() + 0.5 * len(normals) * math.log(2.0 * math.pi) + log_volume)

    @staticmethod
    def num_bytes(size: int, hidden: int, itemsize: int) -> int:
        """Of a fit: parameters, gradients, two moments of the optimiser; masks and masked weights of the net."""
        net = 3 * size * hidden
        others = hidden + size * (4 + 3 * SPLINE_BINS - 1)
        return (4 * (net + others) + 3 * net) * itemsize


def _leaf(values: Tensor) -> Tensor:
    return values.detach().clone().requires_grad_()


def _identity_spline(like: Tensor) -> Spline:
    """Pyro's spline over each value, at the identity: equal bins and slopes of 1."""
    with isolated(0, "spline", cuda=False):  # Pyro starts it at random, from the global stream
        spline = Spline(len(like), count_bins=SPLINE_BINS, bound=SPLINE_BOUND, order="quadratic").to(like)
    with torch.no_grad():
        spline.unnormalized_widths.zero_()
        spline.unnormalized_heights.zero_()
        # Pyro adds a least slope of 1e-3 to the softplus of these.
        spline.unnormalized_derivatives.fill_(math.log(math.expm1(1.0 - 1e-3)))
    return spline
