"""Products of matrices of many chains by oneDNN, one call a chain, where that beats torch's own batched product."""

from __future__ import annotations

import platform

import torch
from torch import Tensor, fx

from bnn.machine import cpu

# On an x86 CPU torch hands float32 products to MKL, which runs on AMD's at half the vector width. oneDNN, which torch
# brings as well, does not: 1.6 to 2 times as fast on matrices from about 64 columns on, slower on smaller ones. On Intel's
# MKL was 1.6 to 5 times as fast as these calls of oneDNN at every size tried, from 50 to 300 columns.
LEAST_SIDE, LEAST_OPERATIONS = 64, 1_000_000


@torch.library.custom_op("bnn::products", mutates_args=())
def products(left: Tensor, right: Tensor) -> Tensor:
    """[C, M, K] x [C, K, N] -> [C, M, N], a product a chain."""
    turned = right.transpose(1, 2)  # [C, N, K]: a linear layer multiplies by the transpose
    linear = torch.ops.mkldnn._linear_pointwise
    pairs = zip(left.unbind(), turned.unbind(), strict=True)
    return torch.stack([linear(one, other, None, "none", [], "") for one, other in pairs])


@products.register_fake
def _(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(left.shape[0], left.shape[1], right.shape[2])


def available() -> bool:
    """Whether this CPU and this build of torch have what `products` calls. It is no public function of torch."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def worthwhile() -> bool:
    """Whether they are faster here than torch's own: on processors of AMD."""
    return available() and "AMD" in cpu("vendor_id")


def replaced(graph: fx.GraphModule) -> int:
    """Let `products` take the place of batched products that are large enough; how many there were."""
    count = 0
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.bmm.default):
        left, right = (argument.meta["val"] for argument in node.args)
        _, rows, inner = left.shape
        columns = right.shape[2]
        small = min(inner, columns) < LEAST_SIDE or 2 * rows * inner * columns < LEAST_OPERATIONS
        if small or left.dtype != torch.float32 or left.device.type != "cpu":
            continue
        node.target = torch.ops.bnn.products.default
        count += 1
    if count:
        graph.recompile()
    return count
