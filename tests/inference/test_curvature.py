"""Gauss-Newton curvature against sums over rows of Jacobians that autograd gives one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from scenarios import classifier
from torch import Tensor, nn

from bnn.errors import FitError, ModuleError
from bnn.inference import curvature
from bnn.inference.curvature import Dense, Piece, Spectral, Structure, measure, places_of, plan
from bnn.likelihoods import Bernoulli, Categorical, Gaussian
from bnn.model import BayesianModel
from bnn.priors import LogNormal, Normal
from bnn.seeding import generator
from bnn.types import Batch, Params

EXACT = {"rtol": 2e-5, "atol": 2e-5}  # of sums of about 1 to 100, whose Jacobians are in float32


def normal(*shape: int, key: str = "x") -> Tensor:
    return torch.randn(shape, generator=generator(5, "curvature", key, *shape))


def fill(module: nn.Module, scale: float = 0.6) -> nn.Module:
    """Random values of one size for all parameters, so that none of them is 0."""
    source = generator(6, "fill")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=source))
    return module


def at_module(model: BayesianModel) -> Params:
    return model.constrain(model.unconstrain(model.module_params()))[0]


def measured(
    model: BayesianModel, structure: Structure, batches: list[Batch], names: list[str] | None = None
) -> tuple[Piece, ...]:
    params = at_module(model)
    flat = model.unconstrain(model.module_params())
    chosen = list(model.layout.names) if names is None else names
    form = plan(model, structure, chosen, params, model.prior_precision(flat), batches[0].x)
    return measure(model, form, params, batches)


def matrix(piece: Piece) -> Tensor:
    """The curvature that a piece stands for, [Q, Q]."""
    if isinstance(piece, Dense):
        return piece.matrix
    if piece.left is None:
        return torch.diag(piece.values.flatten())
    basis = piece.left if piece.right is None else torch.kron(piece.left, piece.right)
    return basis @ torch.diag(piece.values.flatten()) @ basis.T


def by_name(pieces: tuple[Piece, ...]) -> dict[str, Tensor]:
    return {piece.names[0]: matrix(piece) for piece in pieces}


def fisher_of(model: BayesianModel, outputs: Tensor) -> Tensor:
    """Of one row, [C, C], from the second moments of the score: written anew for each likelihood."""
    if isinstance(model.likelihood, Categorical):
        probs = outputs.softmax(0)
        scores = [F.one_hot(torch.tensor(y), len(probs)) - probs for y in range(len(probs))]
        return sum(p * torch.outer(s, s) for p, s in zip(probs, scores, strict=True))  # type: ignore[return-value]
    if isinstance(model.likelihood, Bernoulli):
        chance = outputs.sigmoid()[0]
        return (chance * (1 - chance) ** 2 + (1 - chance) * chance**2).view(1, 1)
    assert isinstance(model.likelihood, Gaussian)
    scale = (
        model.likelihood.scale if isinstance(model.likelihood.scale, float) else 1.0
    )  # the median of LogNormal(0, _)
    return torch.eye(len(outputs)) / scale**2


def slow(model: BayesianModel, batch: Batch) -> Tensor:
    """sum_b w_b J_b^T F_b J_b over the module's own tensors, in float64."""
    own = [entry for entry in model.layout.entries if not entry.name.startswith("@")]
    params = at_module(model)
    flat = torch.cat([params[entry.name].flatten() for entry in own])
    total = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for row in range(len(batch.y)):

        def outputs(flat: Tensor, row: int = row) -> Tensor:
            pieces = flat.split([entry.numel for entry in own])
            given = {entry.name: piece.view(entry.shape) for entry, piece in zip(own, pieces, strict=True)}
            return model.forward(params | given, batch.x[row : row + 1]).reshape(-1)

        jacobian = torch.autograd.functional.jacobian(outputs, flat).double()  # [C, P]
        weight = 1.0 if batch.weight is None else float(batch.weight[row])
        total += weight * jacobian.T @ fisher_of(model, outputs(flat).detach()).double() @ jacobian
    return total


class Flat(nn.Module):
    """A module of one output, given as [B]."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 5), nn.SiLU(), nn.Linear(5, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).squeeze(-1)


def softmax() -> tuple[BayesianModel, Batch]:
    model, (x, y) = classifier(num_rows=11)
    fill(model.module)
    return model, Batch(x, y)


def regression() -> tuple[BayesianModel, Batch]:
    module = fill(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)))
    likelihood = Gaussian(LogNormal(0.0, 0.7))
    model = BayesianModel(module, prior=Normal(0.0, 1.3), likelihood=likelihood, num_data=11, temperature=0.5)
    return model, Batch(normal(11, 4), normal(11, 2, key="y"))


def logistic() -> tuple[BayesianModel, Batch]:
    model = BayesianModel(fill(Flat()), prior=Normal(0.0, 1.3), likelihood=Bernoulli(), num_data=11)
    return model, Batch(normal(11, 4), (normal(11, key="y") > 0).long())


CASES: dict[str, Callable[[], tuple[BayesianModel, Batch]]] = {
    "softmax": softmax,
    "regression": regression,
    "logistic": logistic,
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[BayesianModel, Batch]:
    return CASES[request.param]()


def test_full_is_the_sum_over_rows(case: tuple[BayesianModel, Batch]) -> None:
    model, batch = case
    dense = measured(model, "full", [batch])[0]
    expected = slow(model, batch)
    assert float(expected.abs().max()) > 0.1
    torch.testing.assert_close(matrix(dense), expected, **EXACT)


def test_diag_is_the_diagonal_of_full(case: tuple[BayesianModel, Batch]) -> None:
    model, batch = case
    own = [name for name in model.layout.names if not name.startswith("@")]
    pieces = by_name(measured(model, "diag", [batch]))
    found = torch.cat([pieces[name].diagonal() for name in own])
    torch.testing.assert_close(found, slow(model, batch).diagonal(), **EXACT)


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_the_unknown_has_the_information_of_its_logarithm(structure: Structure) -> None:
    model, batch = regression()
    found = by_name(measured(model, structure, [batch]))["@likelihood.scale"]
    torch.testing.assert_close(found, torch.full((1, 1), 11 * 2 * 2.0, dtype=torch.float64))


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_parts_of_the_data_add_up_and_small_rooms_change_nothing(
    structure: Structure, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = softmax()
    whole = by_name(measured(model, structure, [batch]))
    parts = [Batch(batch.x[part], batch.y[part]) for part in (slice(0, 4), slice(4, 11))]
    for room in (2**28, 24 * 3 * 43 * 2, 24 * 43 * 2):  # all rows, two of them, two of the three directions of one
        monkeypatch.setattr(curvature, "ROOM", room)
        found = by_name(measured(model, structure, parts))
        assert found.keys() == whole.keys()
        for name, expected in whole.items():
            torch.testing.assert_close(found[name], expected, **EXACT)


class Counting(nn.Linear):
    """Writes down how many rows it is given."""

    seen: ClassVar[list[int]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return super().forward(x)


@pytest.mark.parametrize(("structure", "each"), [("full", 2 * 10), ("kron", 4 + 2), ("diag", 2 * 10)])
def test_rows_at_once_are_those_that_the_room_holds(
    structure: Structure, each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = BayesianModel(Counting(4, 2), prior=Normal(), likelihood=Gaussian(0.7), num_data=11)
    for rows in (5, 3):
        monkeypatch.setattr(curvature, "ROOM", 24 * each * rows)
        Counting.seen.clear()
        measured(model, structure, [Batch(normal(11, 4), normal(11, 2, key="y"))])
        assert max(Counting.seen) == rows


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_an_epoch_that_leaves_rows_out_is_scaled_to_all(structure: Structure) -> None:
    model, batch = softmax()
    part = Batch(batch.x[:7], batch.y[:7])
    found = by_name(measured(model, structure, [part]))
    some = BayesianModel(model.module, prior=model.prior, likelihood=model.likelihood, num_data=7)
    for name, expected in by_name(measured(some, structure, [part])).items():
        torch.testing.assert_close(found[name], 11 / 7 * expected, **EXACT)


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_weights_multiply_rows(structure: Structure) -> None:
    """A row of weight 2 is there twice; one of weight 0 is not."""
    model, batch = softmax()
    weight = torch.tensor([2.0, 0.0] + [1.0] * 9)
    again = [0, 0, *range(2, 11)]
    found = by_name(measured(model, structure, [batch._replace(weight=weight)]))
    for name, expected in by_name(measured(model, structure, [Batch(batch.x[again], batch.y[again])])).items():
        torch.testing.assert_close(found[name], expected, **EXACT)
    if structure == "full":
        weighed = slow(model, batch._replace(weight=weight))
        torch.testing.assert_close(found["1.weight"], weighed, **EXACT)


def test_a_part_of_the_tensors_is_a_part_of_the_matrix() -> None:
    model, batch = softmax()
    names = ["1.bias", "3.weight"]
    places = places_of(model.layout, names)
    assert places.tolist() == [*range(20, 25), *range(25, 40)]
    dense = measured(model, "full", [batch], names)[0]
    assert dense.names == tuple(names)
    torch.testing.assert_close(matrix(dense), slow(model, batch)[places][:, places], **EXACT)


def test_kron_is_exact_for_a_linear_layer_under_a_gaussian() -> None:
    module = fill(nn.Linear(4, 2, bias=False))
    model = BayesianModel(module, prior=Normal(), likelihood=Gaussian(0.4), num_data=11)
    batch = Batch(normal(11, 4), normal(11, 2, key="y"), weight=torch.linspace(0.2, 2.0, 11))
    pieces = measured(model, "kron", [batch])
    assert isinstance(pieces[0], Spectral)
    assert pieces[0].right is not None
    torch.testing.assert_close(matrix(pieces[0]), slow(model, batch), **EXACT)


def test_kron_of_a_deeper_layer_is_the_product_of_its_means() -> None:
    """A x B / N with A from inputs and B from slopes, row by row; biases have their exact block."""
    model, batch = softmax()
    found = by_name(measured(model, "kron", [batch]))
    hidden = model.module[:3](batch.x)  # type: ignore[index]
    blocks = slow(model, batch)
    for name, bias, taken in [("1.weight", "1.bias", batch.x), ("3.weight", "3.bias", hidden)]:
        where = places_of(model.layout, [bias])
        left = blocks[where][:, where]  # the block of a bias is the sum of g g^T
        torch.testing.assert_close(found[bias], left, **EXACT)
        right = sum(torch.outer(row, row) for row in taken.detach().double())
        torch.testing.assert_close(found[name], torch.kron(left, right / 11), **EXACT)  # type: ignore[arg-type]


class Convolutional(nn.Module):
    """A convolution with every option, whose outputs a linear layer reads after an activation in place."""

    def __init__(self, *, in_place: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2))
        self.act = nn.ReLU(inplace=in_place)
        self.last = nn.Linear(3 * 3 * 2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x)).flatten(1))


def image_model(module: nn.Module) -> tuple[BayesianModel, Batch]:
    model = BayesianModel(fill(module), prior=Normal(), likelihood=Categorical(), num_data=7)
    return model, Batch(normal(7, 2, 5, 4), torch.arange(7) % 4)


def test_kron_of_a_convolution_has_positions_for_rows() -> None:
    model, batch = image_model(Convolutional())
    found = by_name(measured(model, "kron", [batch]))
    module = model.module
    assert isinstance(module, Convolutional)
    patches = F.unfold(batch.x, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)).mT.double()  # [R, T, in]
    assert patches.shape == (7, 6, 12)
    right = sum(torch.outer(patch, patch) for row in patches for patch in row)
    left = torch.zeros(3, 3, dtype=torch.float64)
    for row in range(7):
        given = module.first(batch.x[row : row + 1]).detach()  # [1, 3, 3, 2]

        def rest(given: Tensor) -> Tensor:
            return module.last(given.relu().flatten(1)).squeeze(0)  # [C]

        slopes = torch.autograd.functional.jacobian(rest, given).reshape(4, 3, 6).double()  # [C, out, T]
        fisher = fisher_of(model, rest(given).detach()).double()
        for position in range(6):
            left += slopes[:, :, position].T @ fisher @ slopes[:, :, position]
    torch.testing.assert_close(found["first.weight"], torch.kron(left, right) / (7 * 6), **EXACT)  # type: ignore[arg-type]
    where = places_of(model.layout, ["first.bias"])
    torch.testing.assert_close(found["first.bias"], slow(model, batch)[where][:, where], **EXACT)


def test_an_activation_in_place_changes_nothing() -> None:
    model, batch = image_model(Convolutional(in_place=True))
    other, _ = image_model(Convolutional(in_place=False))
    found, expected = (by_name(measured(one, "kron", [batch])) for one in (model, other))
    for name in model.layout.names:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(3, 4, 3, stride=2, padding=1), (5, 3, 9)),
        (nn.Conv2d(2, 3, (3, 2), padding="same", dilation=2), (5, 2, 6, 7)),
        (nn.Conv3d(2, 3, 2, padding="valid"), (5, 2, 4, 3, 5)),
    ],
)
def test_patches_are_what_a_convolution_multiplies(layer: nn.Conv2d, shape: tuple[int, ...]) -> None:
    x = normal(*shape)
    func = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[x.dim() - 2]
    how = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    patches = curvature._patches(func, {"input": x, "weight": layer.weight, **how})  # [R, T, in]
    given = patches @ layer.weight.detach().flatten(1).T + layer.bias.detach()  # type: ignore[union-attr]
    torch.testing.assert_close(given, layer(x).detach().flatten(2).mT, rtol=1e-5, atol=1e-5)


class Shared(nn.Module):
    """One layer called twice, and one over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Linear(2, 3)
        self.layer = nn.Linear(6, 6)
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.tokens(x.view(len(x), 2, 2)).flatten(1)
        return self.last(self.layer(torch.tanh(self.layer(hidden))))


def test_calls_of_a_shared_layer_are_positions() -> None:
    model = BayesianModel(fill(Shared()), prior=Normal(), likelihood=Gaussian(0.7), num_data=7)
    batch = Batch(normal(7, 4), normal(7, 2, key="y"))
    found, blocks = by_name(measured(model, "kron", [batch])), slow(model, batch)
    for name in ("tokens.bias", "layer.bias", "last.bias"):  # summed over calls and tokens first, so exact
        where = places_of(model.layout, [name])
        torch.testing.assert_close(found[name], blocks[where][:, where], **EXACT)
    module = model.module
    assert isinstance(module, Shared)
    first = module.tokens(batch.x.view(7, 2, 2)).flatten(1)
    second = torch.tanh(module.layer(first))
    taken = torch.cat([first, second]).detach().double()  # two calls for each of 7 rows
    weight, last = module.layer.weight.detach(), module.last.weight.detach()
    left = torch.zeros(6, 6, dtype=torch.float64)
    for row in range(7):
        slope = last @ weight @ torch.diag(1 - second[row].detach() ** 2)  # of the outputs about the first call
        left += sum((s.T @ s).double() for s in (slope, last)) / 0.7**2  # type: ignore[arg-type]
    torch.testing.assert_close(found["layer.weight"], torch.kron(left, taken.T @ taken) / 14, **EXACT)


class Odd(nn.Module):
    """Tensors that no linear layer or plain convolution has to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.grouped = nn.Conv1d(4, 4, 1, groups=2)
        self.tied = nn.Linear(4, 4, bias=False)
        self.first = nn.Linear(3, 3)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.embedding(x)) @ self.tied.weight  # [B, 3, 4]
        hidden = self.grouped(self.tied(hidden).mT)  # [B, 4, 3]
        hidden = self.first(hidden.transpose(0, 1)).sum(dim=2).T  # rows are not its first dimension
        return self.last(hidden)


def test_other_tensors_have_a_diagonal() -> None:
    model = BayesianModel(fill(Odd()), prior=Normal(), likelihood=Gaussian(0.7), num_data=7)
    batch = Batch(torch.arange(21).view(7, 3) % 5, normal(7, 2, key="y"))
    pieces = measured(model, "kron", [batch])
    kron = {piece.names[0] for piece in pieces if isinstance(piece, Spectral) and piece.left is not None}
    assert kron == {"last.weight", "last.bias"}
    found, expected = by_name(pieces), slow(model, batch)
    assert found.keys() == set(model.layout.names)
    for name in found.keys() - kron:
        where = places_of(model.layout, [name])
        torch.testing.assert_close(found[name].diagonal(), expected[where, where], rtol=1e-4, atol=1e-4)


def test_prior_scales_within_a_tensor_have_a_diagonal() -> None:
    model, batch = softmax()
    precision = torch.ones(43, dtype=torch.float64)
    precision[3] = 2.0  # of 1.weight
    form = plan(model, "kron", model.layout.names, at_module(model), precision, batch.x)
    assert form.diagonal == ("1.weight",)
    assert form.kron == ("1.bias", "3.weight", "3.bias")


class Turned(nn.Module):
    """Where there are three rows the layer has them first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x if len(x) == 3 else x.unsqueeze(0)).reshape(-1, 2)


def test_a_layer_that_loses_sight_of_rows_is_refused() -> None:
    model = BayesianModel(Turned(), prior=Normal(), likelihood=Gaussian(0.7), num_data=7)
    with pytest.raises(ModuleError, match=r"layer\.bias, layer\.weight without"):
        measured(model, "kron", [Batch(normal(7, 4), normal(7, 2, key="y"))])


def test_bytes_are_those_of_the_matrices() -> None:
    model, batch = softmax()
    params, precision = at_module(model), torch.ones(43)
    sizes = {s: plan(model, s, model.layout.names, params, precision, batch.x).num_bytes for s in curvature.STRUCTURES}  # type: ignore[arg-type]
    kron = 43 + (5**2 + 4**2) + 5**2 + (3**2 + 5**2) + 3**2
    assert sizes == {"full": 24 * 43**2, "kron": 24 * kron, "diag": 24 * 43}


def test_a_curvature_that_is_not_finite_is_refused() -> None:
    model, batch = regression()
    with torch.no_grad():
        model.module[2].weight.fill_(torch.inf)  # type: ignore[index,union-attr]
    for structure in curvature.STRUCTURES:
        with pytest.raises(FitError, match="finite"):
            measured(model, structure, [batch])  # type: ignore[arg-type]
    with pytest.raises(FitError, match="not positive definite"):
        Dense(("fc.weight",), -torch.eye(3)).plus(torch.tensor([2.0, 0.5, 2.0]), 1.0)


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_pieces_solve_and_spread_as_their_matrix_says(structure: Structure) -> None:
    model, batch = softmax()
    temperature = 0.5
    for piece in measured(model, structure, [batch]):
        size = len(matrix(piece))
        each = torch.linspace(0.5, 2.0, size, dtype=torch.float64)
        precision = each if structure != "kron" else each[:1].expand(size)
        total = (matrix(piece) + torch.diag(precision)) / temperature
        root = piece.plus(precision, temperature)
        assert root.log_det == pytest.approx(float(torch.logdet(total)), rel=1e-9)
        columns = torch.eye(size, dtype=torch.float64)
        inverse = torch.stack([root.solve(column) for column in columns])
        torch.testing.assert_close(inverse, torch.linalg.inv(total), rtol=1e-8, atol=1e-10)
        spread = torch.stack([root.spread(column) for column in columns], dim=1)
        torch.testing.assert_close(spread @ spread.T, inverse, rtol=1e-8, atol=1e-10)
        scale = torch.diag(precision.rsqrt())
        expected = torch.linalg.eigvalsh(scale @ matrix(piece) @ scale).clamp_min(0)
        torch.testing.assert_close(piece.relative(precision).sort().values, expected, rtol=1e-7, atol=1e-9)


def test_the_rows_of_a_draw_do_not_depend_on_the_order_of_eigenvectors() -> None:
    """The symmetric root: eigenvectors of another sign and order give the same draw."""
    model, batch = softmax()
    piece = next(piece for piece in measured(model, "kron", [batch]) if piece.names == ("3.weight",))
    assert isinstance(piece, Spectral)
    assert piece.left is not None
    normals = normal(15).double()
    other = piece._replace(values=piece.values.flip(0), left=-piece.left.flip(1))
    precision = torch.ones(15, dtype=torch.float64)
    torch.testing.assert_close(other.plus(precision, 1.0).spread(normals), piece.plus(precision, 1.0).spread(normals))


def test_no_eigenvalue_is_negative_where_the_hessian_has_some() -> None:
    """A 4-20-1 tanh network after training: its Hessian is no precision, its Gauss-Newton matrix is one."""
    source = generator(2, "hessian")
    x = torch.randn(60, 4, generator=source)
    y = torch.sin(2 * x[:, :1]) * x[:, 1:2] + 0.3 * torch.randn(60, 1, generator=source)
    module = nn.Sequential(nn.Linear(4, 20), nn.Tanh(), nn.Linear(20, 1)).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=source))
    model = BayesianModel(module, prior=Normal(0.0, 3.0), likelihood=Gaussian(0.3), num_data=60)
    batch = Batch(x.double(), y.double())
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        (-model.log_joint(dict(module.named_parameters()), batch)).backward()  # to the module's own parameters
        optimizer.step()
    flat = model.unconstrain(model.module_params())
    assert len(flat) == 121
    hessian = -torch.autograd.functional.hessian(lambda u: model.log_density(u, batch)[0], flat)
    assert int((torch.linalg.eigvalsh(hessian) < 0).sum()) >= 5
    precision = model.prior_precision(flat).double()
    dense = measured(model, "full", [batch])[0]
    values = torch.linalg.eigvalsh(matrix(dense) + torch.diag(precision))
    assert float(values.min()) >= 0.999 / 3.0**2
    assert dense.plus(precision, 1.0).log_det == pytest.approx(float(values.log().sum()), rel=1e-9)
