"""The modules of apply.py, and the same arithmetic written by hand on ready tensors."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnn.types import Params


class Task(NamedTuple):
    """A module, its inputs, and the arithmetic that no way of applying it can do without."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of one row
    bare: Callable[[Params, Tensor], Tensor]  # one sample [*shape] and x -> [B, C]
    bare_batched: Callable[[Params, Tensor], Tensor] | None  # K samples [K, *shape] and x -> [K, B, C], by bmm
    widths: tuple[int, ...] = ()  # of an MLP


def mlp(widths: tuple[int, ...]) -> Task:
    def make() -> nn.Module:
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.Tanh()]
        return nn.Sequential(*layers[:-1])

    places = range(0, 2 * (len(widths) - 1), 2)

    def bare(params: Params, x: Tensor) -> Tensor:
        for place in places:
            x = torch.addmm(params[f"{place}.bias"], x, params[f"{place}.weight"].t())
            x = x.tanh() if place != places[-1] else x
        return x

    def bare_batched(params: Params, x: Tensor) -> Tensor:
        size = len(params["0.bias"])
        x = x.expand(size, *x.shape)  # [K, B, I]
        for place in places:
            x = torch.baddbmm(params[f"{place}.bias"].unsqueeze(1), x, params[f"{place}.weight"].transpose(1, 2))
            x = x.tanh() if place != places[-1] else x
        return x

    return Task("MLP " + "-".join(map(str, widths)), make, (widths[0],), bare, bare_batched, widths)


class Residual(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.down: nn.Module | None = None
        if stride != 1 or before != after:
            self.down = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + (x if self.down is None else self.down(x)))


class ResNet18(nn.Module):
    """He et al. (2015), arXiv:1512.03385: 7 x 7 stem with stride 2 and pooling, four stages of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        widths = (64, 64, 128, 256, 512)
        self.stages = nn.ModuleList(
            nn.Sequential(Residual(a, b, 1 if k == 0 else 2), Residual(b, b, 1))
            for k, (a, b) in enumerate(pairwise(widths))
        )
        self.fc = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for stage in self.stages:
            x = stage(x)
        return self.fc(x.mean(dim=(2, 3)))


def _normalised(x: Tensor, params: Params, name: str, buffers: Params) -> Tensor:
    return F.batch_norm(
        x,
        buffers[f"{name}.running_mean"],
        buffers[f"{name}.running_var"],
        params[f"{name}.weight"],
        params[f"{name}.bias"],
    )


def resnet() -> Task:
    module = ResNet18().eval()
    buffers = dict(module.named_buffers())

    def bare(params: Params, x: Tensor) -> Tensor:
        x = F.max_pool2d(
            F.relu(_normalised(F.conv2d(x, params["conv1.weight"], None, 2, 3), params, "bn1", buffers)), 3, 2, 1
        )
        for stage in range(4):
            for block in range(2):
                at, stride = f"stages.{stage}.{block}", 2 if stage and not block else 1
                out = F.relu(
                    _normalised(
                        F.conv2d(x, params[f"{at}.conv1.weight"], None, stride, 1), params, f"{at}.bn1", buffers
                    )
                )
                out = _normalised(F.conv2d(out, params[f"{at}.conv2.weight"], None, 1, 1), params, f"{at}.bn2", buffers)
                if f"{at}.down.0.weight" in params:
                    x = _normalised(
                        F.conv2d(x, params[f"{at}.down.0.weight"], None, stride), params, f"{at}.down.1", buffers
                    )
                x = F.relu(out + x)
        return F.linear(x.mean(dim=(2, 3)), params["fc.weight"], params["fc.bias"])

    return Task("ResNet-18, 32 x 32", lambda: module, (3, 32, 32), bare, None)


def cnn() -> Task:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(16 * 16, 10),
        )  # fmt: skip

    def bare(params: Params, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(F.conv2d(x, params["0.weight"], params["0.bias"], 1, 1)), 2)
        x = F.max_pool2d(F.relu(F.conv2d(x, params["3.weight"], params["3.bias"], 1, 1)), 2)
        return F.linear(x.flatten(1), params["7.weight"], params["7.bias"])

    return Task("CNN, 16 x 16", make, (1, 16, 16), bare, None)


class Encoder(nn.Module):
    """Two layers of width 64 with 4 heads on 16 vectors, and a linear layer on their mean."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(dim=1))


def encoder() -> Task:
    def bare(params: Params, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        for layer in range(2):
            at = f"encoder.layers.{layer}"
            mixed = F.linear(x, params[f"{at}.self_attn.in_proj_weight"], params[f"{at}.self_attn.in_proj_bias"])
            q, k, v = mixed.view(rows, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
            heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, length, width)
            out = F.linear(heads, params[f"{at}.self_attn.out_proj.weight"], params[f"{at}.self_attn.out_proj.bias"])
            x = F.layer_norm(x + out, (width,), params[f"{at}.norm1.weight"], params[f"{at}.norm1.bias"])
            out = F.relu(F.linear(x, params[f"{at}.linear1.weight"], params[f"{at}.linear1.bias"]))
            out = F.linear(out, params[f"{at}.linear2.weight"], params[f"{at}.linear2.bias"])
            x = F.layer_norm(x + out, (width,), params[f"{at}.norm2.weight"], params[f"{at}.norm2.bias"])
        return F.linear(x.mean(dim=1), params["head.weight"], params["head.bias"])

    return Task("transformer encoder", lambda: Encoder().eval(), (16, 64), bare, None)


def tasks() -> list[Task]:
    """The grid's modules, from the smallest on."""
    return [mlp((20, 64, 64, 1)), mlp((64, 128, 128, 10)), mlp((784, 512, 512, 10)), cnn(), encoder(), resnet()]
