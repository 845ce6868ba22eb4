"""Modules from a few words."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from bnn.errors import ConfigError
from bnn.modules import build, is_reference


@pytest.mark.parametrize(
    ("spec", "kinds"),
    [
        ("mlp:7,5", [nn.Flatten, nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear]),
        ("mlp:7,relu", [nn.Flatten, nn.Linear, nn.ReLU, nn.Linear]),
        ("mlp:7,5,silu", [nn.Flatten, nn.Linear, nn.SiLU, nn.Linear, nn.SiLU, nn.Linear]),
        ("mlp", [nn.Flatten, nn.Linear]),
    ],
)
def test_mlps(spec: str, kinds: list[type]) -> None:
    module = build(spec, input_shape=[2, 3], num_outputs=4, seed=0)
    assert [type(part) for part in module] == kinds  # type: ignore[attr-defined]
    assert module(torch.zeros(5, 2, 3)).shape == (5, 4)
    assert not module.training


def test_cnn() -> None:
    module = build("cnn", input_shape=[1, 8, 8], num_outputs=4, seed=0)
    assert module(torch.zeros(5, 1, 8, 8)).shape == (5, 4)
    with pytest.raises(ConfigError, match=r"\[channels, height, width\]"):
        build("cnn", input_shape=[10], num_outputs=4, seed=0)


def test_values_follow_the_seed_alone(world_untouched: None) -> None:
    first, again, other = (build("mlp:7", input_shape=[3], num_outputs=2, seed=seed)[1].weight for seed in (0, 0, 1))  # type: ignore[index]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_functions_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_nets_module.py").write_text(
        "from torch import nn\n"
        "def net(input_shape, num_outputs):\n    return nn.Linear(input_shape[0], num_outputs)\n"
        "def wrong(input_shape, num_outputs):\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    assert build("my_nets_module:net", input_shape=[3], num_outputs=2, seed=0).weight.shape == (2, 3)
    with pytest.raises(ConfigError, match="a torch module, got int"):
        build("my_nets_module:wrong", input_shape=[3], num_outputs=2, seed=0)
    with pytest.raises(ConfigError, match="an importable function"):
        build("my_nets_module:absent", input_shape=[3], num_outputs=2, seed=0)
    sys.modules.pop("my_nets_module")


@pytest.mark.parametrize("spec", ["resnet", "mlp:64,sine", "mlp:0", "mlp:a,b", "", "cnn:3"])
def test_unknown_specs_are_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match="model"):
        build(spec, input_shape=[3], num_outputs=2, seed=0)


def test_references() -> None:
    assert is_reference("package.module:function")
    assert not any(is_reference(spec) for spec in ("digits", "mlp:64", "wine.csv:quality", "a b:c", "x:", ":y"))
