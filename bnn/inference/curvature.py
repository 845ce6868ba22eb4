"""The curvature of a model at a point: Gauss-Newton sums over rows, whole, as Kronecker factors or as a diagonal.

G = sum_b w_b J_b^T F_b J_b, J_b = d outputs_b / d u [C, P], F_b the Fisher information of y_b about the outputs

With F_b = R_b R_b^T every form is a sum over the rows of R_b^T J_b, so that none has a negative eigenvalue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from bnn.batches import moved
from bnn.errors import FitError, ModuleError
from bnn.layout import Layout
from bnn.model import BayesianModel
from bnn.types import Batch, Params

Structure: TypeAlias = Literal["full", "kron", "diag"]
STRUCTURES: tuple[str, ...] = ("full", "kron", "diag")

CONVOLUTIONS: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)
ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")

# Float64 throughout: the rounding of a large sum in float32 is larger than a small prior precision beside it.
BYTES = 8
MATRICES = 3  # room for a matrix, its factor and the work between
ROOM = 2**28  # bytes for the rows in work at once


class Plan(NamedTuple):
    """Which tensors have their curvature kept in which form."""

    dense: tuple[str, ...]  # one matrix over all of them
    kron: tuple[str, ...]  # two factors each, or one for a bias
    diagonal: tuple[str, ...]
    unknowns: tuple[str, ...]  # of the likelihood, a number each
    num_bytes: int  # of the curvature
    row_bytes: int  # of the work on one row of data

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.dense, *self.kron, *self.diagonal, *self.unknowns)


class Dense(NamedTuple):
    """The curvature of several tensors as one matrix."""

    names: tuple[str, ...]
    matrix: Tensor  # [Q, Q]

    def relative(self, precision: Tensor) -> Tensor:
        """Eigenvalues [Q] of D^-1/2 G D^-1/2, for the prior precisions D [Q]."""
        scale = precision.rsqrt()
        found: Tensor = torch.linalg.eigvalsh(self.matrix * scale * scale.unsqueeze(1)).clamp_min(0)
        return found

    def plus(self, precision: Tensor, temperature: float) -> DenseRoot:
        """(G + D) / T, factored."""
        total = self.matrix / temperature
        total.diagonal().add_(precision / temperature)
        factor, failed = torch.linalg.cholesky_ex(total)
        if bool(failed):
            raise not_finite("a matrix that is not positive definite")
        return DenseRoot(self.names, factor)


class DenseRoot(NamedTuple):
    """H = L L^T."""

    names: tuple[str, ...]
    factor: Tensor  # [Q, Q] lower triangular

    @property
    def log_det(self) -> float:
        return 2.0 * float(self.factor.diagonal().log().sum())

    def spread(self, normals: Tensor) -> Tensor:
        """L^-T z [Q], of covariance H^-1."""
        found: Tensor = torch.linalg.solve_triangular(self.factor.T, normals.unsqueeze(1), upper=True)
        return found.squeeze(1)

    def solve(self, values: Tensor) -> Tensor:
        """H^-1 v [Q]."""
        return torch.cholesky_solve(values.unsqueeze(1), self.factor).squeeze(1)


class Spectral(NamedTuple):
    """The curvature of one tensor, as a matrix [rows, columns]: eigenvalues along two bases.

    (left x right) diag(values) (left x right)^T; there is no right basis for a bias, and none for a diagonal.
    """

    names: tuple[str, ...]
    values: Tensor  # [rows, columns]
    left: Tensor | None = None  # [rows, rows], an eigenvector a column
    right: Tensor | None = None  # [columns, columns]

    def relative(self, precision: Tensor) -> Tensor:
        """Eigenvalues [Q] of D^-1/2 G D^-1/2, for the prior precisions D [Q]."""
        return self.values.flatten() / precision

    def plus(self, precision: Tensor, temperature: float) -> Spectral:
        """(G + D) / T; with a basis other than the tensor's own D must be one number."""
        return self._replace(values=(self.values + precision.view_as(self.values)) / temperature)

    @property
    def log_det(self) -> float:
        return float(self.values.log().sum())

    def spread(self, normals: Tensor) -> Tensor:
        """H^-1/2 z [Q], with the symmetric root, in which the order and signs of eigenvectors cancel."""
        return self._scaled(normals, self.values.rsqrt())

    def solve(self, values: Tensor) -> Tensor:
        """H^-1 v [Q]."""
        return self._scaled(values, self.values.reciprocal())

    def _scaled(self, flat: Tensor, factors: Tensor) -> Tensor:
        matrix = flat.view_as(self.values)
        if self.left is None:
            return (matrix * factors).flatten()
        if self.right is None:
            return (self.left @ (self.left.T @ matrix * factors)).flatten()
        return (self.left @ (self.left.T @ matrix @ self.right * factors) @ self.right.T).flatten()


Piece: TypeAlias = Dense | Spectral
Root: TypeAlias = DenseRoot | Spectral


def places_of(layout: Layout, names: Iterable[str]) -> Tensor:
    """Where the values of these tensors stand in a flat sample [P]: int64 [Q]."""
    ends = torch.tensor([entry.numel for entry in layout.entries]).cumsum(0).tolist()
    where = {e.name: torch.arange(end - e.numel, end) for e, end in zip(layout.entries, ends, strict=True)}
    return torch.cat([where[name] for name in names])


def plan(
    model: BayesianModel, structure: Structure, names: Sequence[str], params: Params, precision: Tensor, x: Any
) -> Plan:
    """The form in which the curvature of each of these tensors is kept, and the bytes that takes.

    Kronecker factors are for weights and biases that the module gives to linear layers and ungrouped
    convolutions and to nothing else, with rows along the first dimension, and under one prior scale a
    tensor; all others have a diagonal.

    Args:
        params: any sample.
        precision: of the prior [P].
        x: inputs of one row at least.
    """
    own = tuple(name for name in names if not name.startswith("@"))
    unknowns = tuple(name for name in names if name.startswith("@"))
    rows = 3  # few layers take three things that are no rows
    recorder = _Recorder({name: params[name] for name in own}, rows)
    with torch.no_grad(), recorder:
        num_outputs = _columns(model.forward(params, _rows(x, [0] * rows))).shape[1]
    size = sum(params[name].numel() for name in own)
    unit = MATRICES * BYTES
    if structure == "full":
        return Plan(own, (), (), unknowns, unit * size**2, unit * num_outputs * size)
    if structure == "diag":
        return Plan((), (), own, unknowns, unit * size, unit * num_outputs * size)
    alike = {name for name in own if len(precision[places_of(model.layout, [name])].unique()) == 1}
    seen = {name for call in recorder.calls for name in (call.weight, call.bias) if name is not None}
    kron = tuple(name for name in own if name in (seen & alike) - recorder.others)
    diagonal = tuple(name for name in own if name not in kron)
    widths = [width for name in kron for width in (len(params[name]), params[name][0].numel())]
    num = size + sum(width**2 for width in widths if width > 1)
    row = sum(call.patches.numel() + call.outputs.numel() for call in recorder.calls) // rows
    row += num_outputs * sum(params[name].numel() for name in diagonal)
    return Plan((), kron, diagonal, unknowns, unit * num, unit * row)


def measure(model: BayesianModel, plan: Plan, params: Params, batches: Iterable[Batch]) -> tuple[Piece, ...]:
    """The curvature G at a sample over batches that together stand for all N rows, on the model's device.

    Args:
        params: where, on the model's device.
        batches: an epoch; sums are scaled by N over its rows, should it leave some out or repeat some.

    Raises:
        FitError: the curvature is not finite.
        ModuleError: a layer that was given rows is given something else.
    """
    params = {name: tensor.detach() for name, tensor in params.items()}
    sums = _Sums()
    size = max(1, ROOM // max(1, plan.row_bytes))
    for batch in batches:
        for start in range(0, len(batch.y), size):
            part = Batch(*(_rows(field, slice(start, start + size)) for field in batch))
            _add(sums, model, plan, params, moved(part, model.device))
    tensors = [*sums.diagonal.values(), *sums.left.values(), *sums.right.values()]
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise not_finite("NaN or Inf")
    scale = model.num_data / sums.rows
    dense = [Dense(plan.dense, sums.left.pop("").mul_(scale))] if plan.dense else []
    alone = [Spectral((name,), scale * value.unsqueeze(1)) for name, value in sums.diagonal.items()]
    return (*dense, *(_kron(sums, name, scale) for name in plan.kron), *alone)


def not_finite(got: str) -> FitError:
    """The error of a curvature that no normal has."""
    return FitError("Laplace", want="a curvature that is finite", got=got, fix="lower lr, or standardise the data")


@dataclass
class _Sums:
    """What a pass over the data adds up; the dense matrix stands in `left` under no name."""

    rows: int = 0
    diagonal: dict[str, Tensor] = field(default_factory=dict)
    left: dict[str, Tensor] = field(default_factory=dict)  # of the slopes of what layers give
    right: dict[str, Tensor] = field(default_factory=dict)  # of what layers take
    count: dict[str, Tensor] = field(default_factory=dict)  # what they took, positions times weights of rows


def _kron(sums: _Sums, name: str, scale: float) -> Spectral:
    """A x B / count in its eigenbasis; B alone for a bias."""
    values, left = torch.linalg.eigh(sums.left[name])
    values = scale * values.clamp_min(0).unsqueeze(1)
    if name not in sums.right:
        return Spectral((name,), values, left)
    others, right = torch.linalg.eigh(sums.right[name])
    return Spectral((name,), values * others.clamp_min(0) / sums.count[name], left, right)


def _add(sums: _Sums, model: BayesianModel, plan: Plan, params: Params, batch: Batch) -> None:
    """Add the rows of a batch to the sums."""
    with torch.no_grad():
        outputs = _columns(model.forward(params, batch.x))  # [R, C]
        fisher = model.likelihood.fisher(outputs, params)  # [R, C, C]
    weight = (torch.ones(len(outputs)) if batch.weight is None else batch.weight).to(outputs.device, torch.float64)
    values, vectors = torch.linalg.eigh(fisher.double())
    roots = (vectors * (weight.unsqueeze(1) * values.clamp_min(0)).sqrt().unsqueeze(1)).mT  # [R, K, C]
    sums.rows += len(outputs)
    if plan.dense or plan.diagonal:
        _add_jacobians(sums, model, plan, params, batch.x, roots.to(outputs))
    if plan.kron:
        _add_factors(sums, model, plan, params, batch.x, weight, roots.to(outputs))
    for name in plan.unknowns:
        information = model.likelihood.unknown_fisher(outputs)
        _sum(sums.diagonal, name, (weight * information).sum().view(1))


def _add_jacobians(sums: _Sums, model: BayesianModel, plan: Plan, params: Params, x: Any, roots: Tensor) -> None:
    """Add the products and squares of R_b^T J_b, a few of its rows at a time where one row of data is large."""
    names = (*plan.dense, *plan.diagonal)
    size = sum(params[name].numel() for name in names)
    for some in roots.split(max(1, ROOM // (MATRICES * BYTES * size)), dim=1):
        slopes = _jacobians(model, params, names, x, some)
        if plan.dense:
            matrix = torch.cat([slopes[name] for name in plan.dense], dim=1).double()  # [R K, Q]
            total = sums.left.setdefault("", matrix.new_zeros(matrix.shape[1], matrix.shape[1]))
            total.addmm_(matrix.T, matrix)
        for name in plan.diagonal:
            _sum(sums.diagonal, name, slopes[name].double().square().sum(dim=0))


def _jacobians(model: BayesianModel, params: Params, names: Sequence[str], x: Any, roots: Tensor) -> Params:
    """roots [R, K, C] times the Jacobian of each row, [R K, numel] a tensor.

    The module's own tensors are u themselves; unknowns, which are not, are no inputs of the module.
    """
    chosen = {name: params[name] for name in names}

    def one_row(row: Any, root: Tensor) -> Params:
        def outputs(chosen: Params) -> Tensor:
            given = pytree.tree_map(lambda leaf: leaf.unsqueeze(0), row)
            return _columns(model.forward(params | chosen, given)).squeeze(0)  # [C]

        pull = torch.func.vjp(outputs, chosen)[1]
        found: Params = torch.func.vmap(lambda direction: pull(direction)[0])(root)  # [K, *shape]
        return found

    found = torch.func.vmap(one_row)(x, roots)  # [R, K, *shape]
    return {name: found[name].reshape(roots.shape[0] * roots.shape[1], -1) for name in names}


def _add_factors(
    sums: _Sums, model: BayesianModel, plan: Plan, params: Params, x: Any, weight: Tensor, roots: Tensor
) -> None:
    """Add the Kronecker factors of linear and convolutional layers, one backward pass an output of the module.

    Positions of one row (pixels, tokens, calls of a shared layer) count as rows of their own for a weight,
    which neglects their products; for a bias they are summed first, which is exact.
    """
    with torch.enable_grad():
        leaves = {name: params[name].detach().requires_grad_() for name in plan.kron}
        recorder = _Recorder(leaves, len(weight))
        with recorder:
            outputs = _columns(model.forward(params | leaves, x))
    if recorder.others:
        raise ModuleError(
            "Laplace('kron')",
            want="layers that take rows along their first dimension, for all rows",
            got=f"{', '.join(sorted(recorder.others))} without",
            fix="use structure='diag'",
        )
    for call in recorder.calls:
        if call.weight is not None:
            taken = call.patches.double()  # [R, T, in]
            _sum(sums.right, call.weight, torch.einsum("r,rti,rtj->ij", weight, taken, taken))
            _sum(sums.count, call.weight, taken.shape[1] * weight.sum())
    for direction in roots.unbind(dim=1):  # [R, C]
        slopes = torch.autograd.grad(
            outputs, [call.outputs for call in recorder.calls], direction, retain_graph=True, materialize_grads=True
        )
        biases: dict[str, Tensor] = {}
        for call, slope in zip(recorder.calls, slopes, strict=True):
            given = call.positions(slope).double()  # [R, T, out]
            if call.weight is not None:
                _sum(sums.left, call.weight, given.flatten(0, 1).T @ given.flatten(0, 1))
            if call.bias is not None:
                _sum(biases, call.bias, given.sum(dim=1))  # [R, out]
        for name, rows in biases.items():
            _sum(sums.left, name, rows.T @ rows)


class _Call(NamedTuple):
    """One use of a layer."""

    weight: str | None
    bias: str | None
    patches: Tensor  # [R, T, in] what the weight multiplies
    outputs: Tensor  # as the layer gave them
    channels_last: bool

    def positions(self, values: Tensor) -> Tensor:
        """Values of the shape of the outputs as [R, T, out]."""
        if self.channels_last:
            return values.reshape(len(values), -1, values.shape[-1])
        return values.flatten(2).mT


class _Recorder(TorchFunctionMode):
    """Sees what a module does with these tensors: the calls of layers, and other uses."""

    def __init__(self, params: Params, num_rows: int) -> None:
        super().__init__()
        self._params = params  # held, so that no id is given twice
        self._names = {id(tensor): name for name, tensor in params.items()}
        self._num_rows = num_rows
        self.calls: list[_Call] = []
        self.others: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        leaves = pytree.tree_leaves((args, kwargs))
        used = {self._names[id(leaf)] for leaf in leaves if id(leaf) in self._names}
        if not used or not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(found)):
            return found  # such as the shape of a weight
        call = self._call(func, dict(zip(ARGUMENTS, args, strict=False)) | (kwargs or {}), found)
        if call is None:
            self.others |= used
            return found
        self.others |= used - {call.weight, call.bias}
        self.calls.append(call)
        return found.clone()  # what comes next may write into it, and the slope of what it was is asked for

    def _call(self, func: Any, given: dict[str, Any], found: Any) -> _Call | None:
        linear = func is F.linear
        if not (linear or func in CONVOLUTIONS) or given.get("groups", 1) != 1:
            return None
        x, weight = given["input"], given["weight"]
        if len(x) != self._num_rows or (x.dim() < 2 if linear else x.dim() != weight.dim()):
            return None
        patches = x.detach().reshape(len(x), -1, x.shape[-1]) if linear else _patches(func, given)
        name, bias = (self._names.get(id(given.get(key))) for key in ("weight", "bias"))
        return _Call(name, bias, patches, found, linear)


def _patches(func: Callable[..., Tensor], given: dict[str, Any]) -> Tensor:
    """What each position of a convolution sums over, [R, T, in]: the same convolution with one-hot kernels."""
    x, weight = given["input"].detach(), given["weight"]
    size = weight[0].numel()
    kernel = torch.eye(size, dtype=weight.dtype, device=weight.device).reshape(size, *weight.shape[1:])
    how = {key: given[key] for key in ("stride", "padding", "dilation") if key in given}
    return func(x, kernel, **how).flatten(2).mT


def _sum(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value


def _columns(outputs: Tensor) -> Tensor:
    """Outputs as [R, C]; those of one number a row may come as [R]."""
    return outputs.unsqueeze(-1) if outputs.dim() == 1 else outputs


def _rows(values: Any, which: Any) -> Any:
    """Some rows of a batch, or of its inputs."""
    return pytree.tree_map(lambda leaf: leaf[which] if isinstance(leaf, Tensor) else leaf, values)
