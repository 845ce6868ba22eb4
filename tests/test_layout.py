"""Which tensors are Bayesian: globs, ties, parametrisations, dtypes, fingerprints."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bnn.errors import BankMismatch, ConfigError, ModuleError
from bnn.layout import Entry, Layout, layout_of, select


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.head = nn.Linear(3, 7, bias=True)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(x))


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def test_all_parameters_in_order() -> None:
    layout = layout_of(two_layers())
    assert layout.names == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert layout.num_values == 4 * 5 + 5 + 5 * 3 + 3
    assert layout.num_bytes == 4 * layout.num_values


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ("2.*", ["2.weight", "2.bias"]),
        ("2", ["2.weight", "2.bias"]),
        (["*", "!*.bias"], ["0.weight", "2.weight"]),
        ("!0", ["2.weight", "2.bias"]),
        (["*.weight", "!0.*", "0.bias"], ["0.bias", "2.weight"]),
        ("[02].bias", ["0.bias", "2.bias"]),
    ],
)
def test_globs(patterns: str | list[str], names: list[str]) -> None:
    assert list(layout_of(two_layers(), patterns).names) == names


def test_unknown_glob_lists_the_parameters() -> None:
    with pytest.raises(ConfigError, match=r"'head\.\*', which matches none; the parameters are 0\.weight"):
        layout_of(two_layers(), "head.*")


def test_nothing_chosen_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one Bayesian parameter"):
        layout_of(two_layers(), ["*", "!*"])


def test_tied_weights_are_one_entry_with_an_alias() -> None:
    layout = layout_of(Tied())
    assert layout.names == ("embed.weight", "head.bias")
    assert layout.aliases == {"head.weight": "embed.weight"}


def test_a_glob_on_the_second_name_chooses_the_tied_tensor() -> None:
    layout = layout_of(Tied(), "head.weight")
    assert layout.names == ("embed.weight",)
    assert layout.aliases == {"head.weight": "embed.weight"}


def test_parametrised_weights_go_by_their_original() -> None:
    module = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    names = layout_of(module).names
    assert "parametrizations.weight.original0" in names
    assert "weight" not in names


def test_mixed_dtypes_are_kept_and_promote() -> None:
    module = nn.Sequential(nn.Linear(2, 3).double(), nn.Linear(3, 4).to(torch.bfloat16))
    layout = layout_of(module)
    assert [e.dtype for e in layout.entries] == [torch.float64] * 2 + [torch.bfloat16] * 2
    assert layout.dtype == torch.float64
    params = {name: p.detach() for name, p in module.named_parameters()}
    back = layout.unflatten(layout.flatten(params))
    assert all(torch.equal(back[name], params[name]) and back[name].dtype == params[name].dtype for name in params)


def test_names_with_at_are_refused() -> None:
    module = nn.Module()
    module.register_parameter("@scale", nn.Parameter(torch.zeros(2)))
    with pytest.raises(ModuleError, match="without a leading '@'"):
        layout_of(module)


def test_lazy_and_complex_parameters_are_refused() -> None:
    with pytest.raises(ModuleError, match="lazy"):
        layout_of(nn.LazyLinear(3))
    module = nn.Module()
    module.register_parameter("z", nn.Parameter(torch.zeros(2, dtype=torch.complex64)))
    with pytest.raises(ModuleError, match="complex64"):
        layout_of(module)


@given(st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=5), st.integers(2, 6))
def test_flatten_is_undone_by_unflatten(shapes: list[list[int]], size: int) -> None:
    layout = Layout(tuple(Entry(f"p{i}", tuple(shape), torch.float32) for i, shape in enumerate(shapes)))
    source = torch.Generator().manual_seed(0)
    one = {e.name: torch.randn(e.shape, generator=source) for e in layout.entries}
    many = {e.name: torch.randn(size, *e.shape, generator=source) for e in layout.entries}
    for params, lead in ((one, ()), (many, (size,))):
        flat = layout.flatten(params)
        assert flat.shape == (*lead, layout.num_values)
        back = layout.unflatten(flat)
        assert all(torch.equal(back[name], params[name]) for name in params)


def test_fingerprint_follows_names_shapes_and_ties_but_not_dtypes() -> None:
    base = layout_of(two_layers())
    assert base.fingerprint == layout_of(two_layers()).fingerprint
    assert base.fingerprint == layout_of(two_layers().double()).fingerprint
    others = [
        layout_of(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))),
        layout_of(two_layers(), "0"),
        layout_of(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))),
    ]
    assert len({base.fingerprint, *(layout.fingerprint for layout in others)}) == 4
    untied = Tied()
    untied.head.weight = nn.Parameter(untied.embed.weight.detach().clone())
    assert layout_of(Tied(), "embed").fingerprint != layout_of(untied, "embed").fingerprint


def test_config_round_trip() -> None:
    layout = layout_of(Tied(), extra=[Entry("@likelihood.scale", (), torch.float32)])
    assert Layout.from_config(layout.to_config()) == layout


def test_difference_names_the_first_entry_that_departs() -> None:
    base = layout_of(two_layers())
    wider = layout_of(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))
    assert base.difference(base) is None
    assert base.difference(wider) == "'0.weight' [6, 4] where '0.weight' [5, 4] stands"
    longer = layout_of(nn.Sequential(*two_layers(), nn.Linear(3, 2)))
    assert base.difference(longer) == "'3.weight' [2, 3] added"
    assert longer.difference(base) == "'3.weight' [2, 3] missing"
    with pytest.raises(BankMismatch, match=r"module mlp: want .* got a module with '0.weight' \[6, 4\]"):
        base.require(wider, place="module mlp")


def test_select_with_only_negations_starts_from_all() -> None:
    assert select(["a", "b", "c.d"], ["!b", "!c"]) == {"a"}
