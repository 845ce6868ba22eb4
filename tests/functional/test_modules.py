"""The modules that people bring: every way that is open to one equals load_state_dict on a copy."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnn
from bnn.bank import Bank
from bnn.functional import FunctionalModel
from bnn.functional.outputs import taken_apart
from bnn.seeding import generator

SAMPLES = 5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed, *shape))


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def cnn(norm: Callable[[int], nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), norm(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    ).eval()


class Residual(nn.Module):
    """A block of ResNet-18, as torchvision and timm have it."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.down = None
        if stride != 1 or before != after:
            self.down = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.down is None else self.down(x)
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + shortcut)


class ResNet18(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.stages = nn.Sequential(
            *[
                nn.Sequential(Residual(a, b, 1 if k == 0 else 2), Residual(b, b, 1))
                for k, (a, b) in enumerate(pairwise(widths))
            ]
        )
        self.fc = nn.Linear(widths[-1], 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stages(self.stem(x)).mean(dim=(2, 3)))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.rnn = kind(4, 5, num_layers=2, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(dim=1))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(dim=1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x).mean(dim=1))


@dataclasses.dataclass(frozen=True)
class Found:
    logits: Tensor
    hidden: tuple[Tensor, dict[str, Tensor]]
    note: str = "kept"


class ManyOutputs(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.second, self.kind = nn.Linear(4, 6), nn.Linear(6, 3), kind

    def forward(self, x: Tensor) -> Any:
        hidden = self.first(x).tanh()
        logits = self.second(hidden)
        if self.kind == "dict":
            return {"logits": logits, "hidden": [hidden, {"square": hidden.square()}], "none": None}
        if self.kind == "tuple":
            return logits, (hidden, logits.argmax(dim=1))
        return Found(logits, (hidden, {"square": hidden.square()}))


class Containers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Sequential(nn.Linear(4, 4))}) for _ in range(2)]
        )
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(4)) for _ in range(2)])
        self.table = nn.ParameterDict({"shift": nn.Parameter(torch.zeros(4))})

    def forward(self, x: Tensor) -> Tensor:
        for block, scale in zip(self.blocks, self.scales, strict=True):
            x = block["b"](block["a"](x).tanh()) * scale + self.table["shift"]
        return x


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "mlp": (Mlp, lambda: normal(7, 4)),
    "eval batch norm": (lambda: cnn(nn.BatchNorm2d), lambda: normal(7, 2, 5, 5)),
    "group norm": (lambda: cnn(lambda c: nn.GroupNorm(2, c)), lambda: normal(7, 2, 5, 5)),
    "resnet-18": (lambda: ResNet18().eval(), lambda: normal(2, 3, 16, 16)),
    "lstm": (lambda: Recurrent(nn.LSTM), lambda: normal(7, 6, 4)),
    "gru": (lambda: Recurrent(nn.GRU), lambda: normal(7, 6, 4)),
    "attention": (lambda: Attention().eval(), lambda: normal(7, 6, 8)),
    "transformer encoder": (lambda: Encoder().eval(), lambda: normal(7, 6, 8)),
    "tied embeddings": (Tied, lambda: torch.randint(7, (6, 2), generator=generator(0, "tokens"))),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), lambda: normal(7, 4)),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)).eval(), lambda: normal(7, 4)),
    "nested containers": (Containers, lambda: normal(7, 4)),
    "dict outputs": (lambda: ManyOutputs("dict"), lambda: normal(7, 4)),
    "tuple outputs": (lambda: ManyOutputs("tuple"), lambda: normal(7, 4)),
    "dataclass outputs": (lambda: ManyOutputs("dataclass"), lambda: normal(7, 4)),
}
NO_VMAP = {"lstm", "gru"}


def states_of(module: nn.Module, *, buffers: bool = False) -> list[dict[str, Tensor]]:
    """State dicts with all parameters moved, and on request the buffers of real numbers."""
    states = []
    for k in range(SAMPLES):
        state = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
        shared: dict[int, Tensor] = {}
        parameters = dict(module.named_parameters(remove_duplicate=False))
        for name, tensor in state.items():
            if name in parameters:
                moved = shared.setdefault(id(parameters[name]), tensor + 0.2 * normal(*tensor.shape, seed=k))
                state[name] = moved
            elif buffers and tensor.is_floating_point():
                state[name] = tensor + 0.5 * normal(*tensor.shape, seed=k).abs()
        states.append(state)
    return states


def expected_of(module: nn.Module, states: list[dict[str, Tensor]], x: Any) -> list[list[Tensor]]:
    """The slow obvious version: load_state_dict on a copy."""
    found = []
    for state in states:
        filled = copy.deepcopy(module)
        filled.load_state_dict(state)
        with torch.no_grad():
            if isinstance(x, dict):
                found.append(taken_apart(filled(**x))[0])
            else:
                found.append(taken_apart(filled(*x) if isinstance(x, tuple) else filled(x))[0])
    return found


def check(
    module: nn.Module, states: list[dict[str, Tensor]], x: Any, *, no_vmap: bool = False, bank: Bank | None = None
) -> None:
    """Every way that is open to a module, with one index, a block, a slice and a sample a row."""
    expected = expected_of(module, states, x)
    bank = bank or Bank.from_state_dicts(states, module=module)
    whole = [torch.stack([one[place] for one in expected]) for place in range(len(expected[0]))]  # [K, ...]

    def agree(found: Any, wanted: list[Tensor]) -> None:
        tensors = taken_apart(found)[0]
        assert len(tensors) == len(wanted)
        for mine, theirs in zip(tensors, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)

    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")  # of torch's own, where it has no rule
        for options in (
            {"strategy": "loop"},
            {"strategy": "vmap"},
            {"strategy": "auto"},
            {"strategy": "auto", "compile": False},
        ):
            if no_vmap and options["strategy"] == "vmap":
                continue
            net = FunctionalModel(module, bank, **options)  # type: ignore[arg-type]
            agree(net(x, 3), expected[3])
            agree(net(x, [4, 0, 2]), [tensor[[4, 0, 2]] for tensor in whole])
            agree(net(x, slice(None)), whole)
            agree(net(x, slice(None)), whole)  # as it was chosen the first time
            assert type(taken_apart(net(x, 1))[1]) is type(taken_apart(net(x, [1]))[1])
            rows = torch.tensor([2, 4, 2, 0, 4, 1, 3])[: len(taken_apart(x)[0][0])]
            agree(net(x, rows=rows), [tensor[rows, torch.arange(len(rows))] for tensor in whole])


@pytest.mark.parametrize("case", CASES)
def test_every_way_equals_load_state_dict_on_a_copy(case: str) -> None:
    make, inputs = CASES[case]
    module = make()
    check(module, states_of(module), inputs(), no_vmap=case in NO_VMAP)


def test_the_form_of_outputs_is_kept() -> None:
    module = ManyOutputs("dataclass")
    net = FunctionalModel(module, Bank.from_state_dicts(states_of(module), module=module))
    for strategy in ("loop", "vmap"):
        net = FunctionalModel(module, net.bank, strategy=strategy)  # type: ignore[arg-type]
        found = net(normal(7, 4), [0, 1])
        assert isinstance(found, Found)
        assert found.note == "kept"
        assert found.hidden[1]["square"].shape == (2, 7, 6)
        assert torch.equal(found.hidden[0].square(), found.hidden[1]["square"])


@pytest.mark.parametrize("folder", [False, True], ids=["memory", "disk"])
def test_statistics_of_batch_norm_may_belong_to_the_samples(folder: bool, tmp_path: Any) -> None:
    module = cnn(nn.BatchNorm2d)
    states = states_of(module, buffers=True)
    bank = Bank.from_state_dicts(states, module=module, out=tmp_path / "bank" if folder else None)
    assert {"1.running_mean", "1.running_var"} < set(bank.layout.names)
    check(module, states, normal(7, 2, 5, 5), bank=bank)


@pytest.mark.parametrize("case", sorted(NO_VMAP))
def test_what_vmap_has_no_rule_for_runs_by_loop_and_says_so_once(case: str) -> None:
    make, inputs = CASES[case]
    module, x = make(), inputs()
    states = states_of(module)
    net = FunctionalModel(module, Bank.from_state_dicts(states, module=module), strategy="vmap")
    with pytest.warns(bnn.errors.SlowerWay, match="vmap cannot take Recurrent"), torch.no_grad():
        found = net(x, slice(None))
    with torch.no_grad():  # nothing more is said: warnings are errors here
        net(x, [0, 1])
        net(x[:3], slice(None))
    torch.testing.assert_close(found, torch.stack([one[0] for one in expected_of(module, states, x)]))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about itself
def test_small_bert_and_gpt2(oracle: Any) -> None:
    transformers = oracle("transformers")
    tokens = torch.randint(50, (3, 6), generator=generator(0, "tokens"))
    sizes = {"vocab_size": 50, "max_position_embeddings": 16}
    bert = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3, **sizes
        )
    ).eval()
    check(bert, states_of(bert), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
    gpt = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, vocab_size=50, use_cache=False)
    ).eval()
    check(gpt, states_of(gpt), {"input_ids": tokens})


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about itself
def test_a_bank_over_the_adapters_of_lora_alone(oracle: Any) -> None:
    transformers = oracle("transformers")
    peft = oracle("peft")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3, vocab_size=50,
        max_position_embeddings=16,
    )  # fmt: skip
    adapted = peft.get_peft_model(
        transformers.BertForSequenceClassification(config),
        peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False),
    ).eval()
    model = bnn.BayesianModel(
        adapted,
        prior=bnn.priors.Normal(0.0, 0.5),
        likelihood=bnn.likelihoods.Categorical(),
        num_data=1,
        bayesian="*lora_*",
    )
    tokens = torch.randint(50, (3, 6), generator=generator(0, "tokens"))
    data = torch.zeros(1, 6, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    bank = bnn.fit(model, data, method=bnn.inference.Prior(), num_samples=SAMPLES)
    assert all("lora_" in name for name in bank.layout.names)
    states = [adapted.state_dict() | bank[index] for index in range(SAMPLES)]
    check(adapted, states, {"input_ids": tokens}, bank=bank)


def test_small_timm_resnet_and_vit(oracle: Any) -> None:
    timm = oracle("timm", exc_type=ImportError)  # which wants a torchvision that fits torch
    vit = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3
    ).eval()
    check(vit, states_of(vit), normal(2, 3, 16, 16))
    resnet = timm.models.resnet.ResNet(
        timm.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=3, channels=(4, 8, 12, 16)
    ).eval()
    check(resnet, states_of(resnet), normal(2, 3, 32, 32))
