"""Small images made worse, by kind and severity: what a predictive does away from its data."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor
from torch.nn import functional

from bnn.errors import ConfigError, DataError, choose
from bnn.seeding import generator

# What severities 1 to 5 are of each kind; `corrupted` says what the numbers mean.
SEVERITIES: dict[str, tuple[float, float, float, float, float]] = {
    "noise": (0.08, 0.16, 0.24, 0.32, 0.40),
    "blur": (0.4, 0.6, 0.8, 1.0, 1.3),
    "contrast": (0.75, 0.6, 0.45, 0.3, 0.15),
    "rotation": (10.0, 20.0, 30.0, 40.0, 50.0),
    "shift": (0.5, 1.0, 1.5, 2.0, 2.5),
}
KINDS = tuple(SEVERITIES)
SPEC = re.compile(r"digits-(?P<kind>[a-z]+)-(?P<severity>[0-9]+)")


def corrupted(x: Tensor, kind: str, severity: int, seed: int = 0) -> Tensor:
    """Images of one corruption; a severity of 0 changes nothing.

    | kind | severity 1 to 5 | what is done |
    |---|---|---|
    | `noise` | 0.08, 0.16, 0.24, 0.32, 0.40 | normal noise of this standard deviation, cut to [0, 1] |
    | `blur` | 0.4, 0.6, 0.8, 1.0, 1.3 | a Gaussian of this standard deviation, in pixels; edges go on |
    | `contrast` | 0.75, 0.6, 0.45, 0.3, 0.15 | differences from the image's mean, times this |
    | `rotation` | 10, 20, 30, 40, 50 | degrees about the centre, one way or the other; what comes in is 0 |
    | `shift` | 0.5, 1, 1.5, 2, 2.5 | pixels in a direction of its own; what comes in is 0 |

    Noise, ways and directions are drawn by `seed`, the same for all severities of a kind: an image only gets worse.
    They belong to places in `x`, so that the same images in another order are corrupted otherwise. Numbers of `blur`
    and `shift` are meant for images of 8 x 8 pixels.

    Args:
        x: images [N, C, H, W] in [0, 1], floating point; it is not changed.
        kind: one of the table.
        severity: 0 to 5.
        seed: of what is drawn.

    Returns:
        Images of the same shape and dtype in [0, 1]; `x` itself for severity 0.

    Raises:
        DataError: no images in [0, 1].
        ConfigError: another kind or severity.

    Examples:
        >>> x = torch.tensor([0.0, 1.0]).repeat(32).view(1, 1, 8, 8)  # stripes
        >>> [round(float((corrupted(x, "contrast", s) - x).abs().mean()), 3) for s in (0, 1, 5)]
        [0.0, 0.125, 0.425]

    Source: kinds and five severities as Hendrycks and Dietterich (2019), arXiv:1903.12261; the numbers are ours.
    """
    choose("corrupted(kind=)", kind, KINDS)
    if type(severity) is not int or not 0 <= severity <= 5:
        raise ConfigError(
            "corrupted(severity=)", want="a whole number from 0 to 5", got=repr(severity), fix="choose one"
        )
    if x.dim() != 4 or not x.is_floating_point():
        got = f"{x.dtype} {list(x.shape)}"
        raise DataError("corrupted", want="floating-point images [N, C, H, W]", got=got, fix="reshape them")
    if x.numel() and not (float(x.min()) >= 0.0 and float(x.max()) <= 1.0):
        got = f"{float(x.min()):.4g} to {float(x.max()):.4g}"
        raise DataError("corrupted", want="pixels in [0, 1]", got=got, fix="scale them before")
    if severity == 0 or not x.numel():
        return x
    amount, random = SEVERITIES[kind][severity - 1], generator(seed, "corruption", kind)
    images = x.detach().to("cpu", torch.float64)
    if kind == "noise":
        found = images + amount * torch.randn(images.shape, generator=random, dtype=torch.float64)
    elif kind == "blur":
        found = _blurred(images, amount)
    elif kind == "contrast":
        mean = images.mean(dim=(1, 2, 3), keepdim=True)  # [N, 1, 1, 1]
        found = mean + amount * (images - mean)
    elif kind == "rotation":
        sign = 2.0 * torch.randint(2, (len(images),), generator=random).double() - 1.0  # [N]
        found = _moved(images, math.radians(amount) * sign, torch.zeros(len(images), 2, dtype=torch.float64))
    else:
        direction = 2.0 * math.pi * torch.rand(len(images), generator=random, dtype=torch.float64)  # [N]
        steps = amount * torch.stack([direction.cos(), direction.sin()], dim=1)  # [N, 2] pixels along x and y
        found = _moved(images, torch.zeros(len(images), dtype=torch.float64), steps)
    return found.clamp(0.0, 1.0).to(x)


def parse(spec: str) -> tuple[str, int] | None:
    """Kind and severity, 1 to 5, of a spec such as `digits-blur-3`; None for other specs."""
    found = SPEC.fullmatch(spec)
    if found is None or found["kind"] not in SEVERITIES or not 1 <= int(found["severity"]) <= 5:
        return None
    return found["kind"], int(found["severity"])


def _blurred(images: Tensor, deviation: float) -> Tensor:
    """Rows and then columns under a Gaussian of so many pixels, whose weights sum to one."""
    radius = math.ceil(3.0 * deviation)
    places = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weights = (-0.5 * (places / deviation).square()).exp()
    weights = weights / weights.sum()
    shape = images.shape
    flat = functional.pad(images.reshape(-1, 1, *shape[2:]), (radius,) * 4, mode="replicate")  # [N C, 1, H + 2 r, ...]
    across = functional.conv2d(flat, weights.view(1, 1, 1, -1))
    return functional.conv2d(across, weights.view(1, 1, -1, 1)).view(shape)


def _moved(images: Tensor, angle: Tensor, steps: Tensor) -> Tensor:
    """Images turned by angles [N] and moved by pixels [N, 2], between pixels by bilinear interpolation."""
    height, width = images.shape[2:]
    cos, sin = angle.cos(), angle.sin()
    # Where each pixel of the result comes from, in coordinates of -1 to 1 over the image.
    ratio = height / width
    x_row = torch.stack([cos, -sin * ratio, -2.0 * steps[:, 0] / width], dim=1)
    y_row = torch.stack([sin / ratio, cos, -2.0 * steps[:, 1] / height], dim=1)
    places = functional.affine_grid(torch.stack([x_row, y_row], dim=1), list(images.shape), align_corners=False)
    return functional.grid_sample(images, places, mode="bilinear", padding_mode="zeros", align_corners=False)
