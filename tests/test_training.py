"""Distillation: losses against closed forms, the student against the mean predictive, resume bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from scenarios import classifier
from torch import nn

from bnn import likelihoods, priors
from bnn.bank import Bank
from bnn.errors import BankExists, ConfigError, FitError
from bnn.fitting import fit
from bnn.functional import FunctionalModel
from bnn.inference import Prior
from bnn.layout import layout_of
from bnn.likelihoods import SCALE
from bnn.model import BayesianModel
from bnn.modules import build
from bnn.seeding import generator
from bnn.training import distil, divergence
from bnn.types import make_block


def teacher(num_samples: int = 5) -> tuple[FunctionalModel, tuple[torch.Tensor, torch.Tensor]]:
    model, data = classifier()
    bank = fit(model, data, method=Prior(), num_samples=num_samples)
    return FunctionalModel(model.module, bank), data


def test_divergence_of_classes() -> None:
    p, q = (torch.randn(7, 3, generator=generator(i), dtype=torch.float64) for i in range(2))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )
    one = torch.ones(())
    torch.testing.assert_close(divergence(likelihoods.Categorical(), p, q, one, one), expected)


def test_divergence_of_normals_sums_over_outputs() -> None:
    mu, m = (torch.randn(7, 2, generator=generator(i)) for i in range(2))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mu, 0.3), torch.distributions.Normal(m, 0.8)
    )
    found = divergence(likelihoods.Gaussian(0.3), mu, m, torch.tensor(0.3), torch.tensor(0.8))
    torch.testing.assert_close(found, expected.sum(dim=1))


def test_a_student_that_can_learns_the_mean_predictive(tmp_path: Path) -> None:
    """A table of logits, one a row of data, can stand for any probabilities: its optimum is their mean over samples."""
    logits = 2 * torch.randn(5, 9, 3, generator=generator(0))  # [S, rows, C]
    module = nn.Embedding(9, 3)
    bank = Bank.from_state_dicts([{"weight": one} for one in logits], module=module)
    rows = torch.arange(9)
    student = distil(
        module, FunctionalModel(module, bank), (rows, rows), out=tmp_path / "s", likelihood=likelihoods.Categorical(),
        num_epochs=1500, batch_size=9, lr=0.1,
    )  # fmt: skip
    torch.testing.assert_close(
        student[0]["weight"].softmax(dim=1), logits.softmax(dim=-1).mean(dim=0), rtol=0, atol=0.02
    )


def test_weighted_banks_teach_by_weight(tmp_path: Path) -> None:
    """The optimum is the weighted mean of the samples' probabilities."""
    logits = 2 * torch.randn(4, 9, 3, generator=generator(0))  # [S, rows, C]
    log_weight = torch.tensor([0.0, -1.0, -2.0, 0.5], dtype=torch.float64)
    module = nn.Embedding(9, 3)
    layout = layout_of(module)
    block = make_block({"weight": logits}, chain=torch.zeros(4), draw=torch.arange(4), log_weight=log_weight)
    bank = Bank.from_blocks([block], layout=layout, info={"likelihood": {"name": "Categorical"}})
    rows = torch.arange(9)
    student = distil(
        module, FunctionalModel(module, bank), (rows, rows), out=tmp_path / "s", num_epochs=2000, batch_size=9, lr=0.1
    )
    expected = (log_weight.softmax(dim=0).view(4, 1, 1) * logits.softmax(dim=-1)).sum(dim=0).float()
    torch.testing.assert_close(student[0]["weight"].softmax(dim=1), expected, rtol=0, atol=0.02)


def test_a_gaussian_student_learns_mean_and_spread_of_the_mixture(tmp_path: Path) -> None:
    """Means mu_k of a constant and scales sigma_k: the optimum is their mean and sqrt(mean sigma^2 + var mu)."""
    module = nn.Linear(1, 1)
    mu, sigma = torch.tensor([-1.0, 0.5, 2.0, 3.0]), torch.tensor([0.2, 0.5, 0.9, 0.4])
    model = BayesianModel(
        module, prior=priors.Normal(), likelihood=likelihoods.Gaussian(priors.HalfCauchy(1.0)), num_data=9
    )
    params = {"weight": torch.zeros(4, 1, 1), "bias": mu.unsqueeze(1), SCALE: sigma}
    block = make_block(params, chain=torch.zeros(4), draw=torch.arange(4))
    bank = Bank.from_blocks([block], layout=model.layout, info=model.to_config())
    x = torch.linspace(-1, 1, 8).unsqueeze(1)
    student = distil(
        module,
        FunctionalModel(module, bank),
        (x, x),
        held_out=(x, x),
        out=tmp_path / "s",
        num_epochs=3000,
        batch_size=8,
        lr=0.03,
    )
    assert float(student[0]["bias"]) == pytest.approx(float(mu.mean()), abs=0.05)
    expected = float((sigma.square().mean() + mu.var(correction=0)).sqrt())
    assert float(student[0][SCALE]) == pytest.approx(expected, rel=0.03)
    curve = json.loads((tmp_path / "s" / "curve.json").read_text())
    assert set(curve[0]) == {"epoch", "loss", "held_out_nll"}


def test_resume_after_an_interruption_is_bit_equal(tmp_path: Path) -> None:
    net, (x, y) = teacher()
    module = build("mlp:6", input_shape=[4], num_outputs=3, seed=2)

    def run(out: str, **options: bool) -> Bank:
        return distil(
            module, net, (x, y), held_out=(x, y), out=tmp_path / out, num_epochs=40, batch_size=5, seed=1, **options
        )

    whole = run("whole")

    def interrupted(run, *args):  # type: ignore[no-untyped-def]
        for count, found in enumerate(run):
            if count == 2:
                raise KeyboardInterrupt
            yield found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bnn.fitting._with_progress", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("broken")
    assert len(Bank.open(tmp_path / "broken")) == 0
    resumed = run("broken", resume=True)
    assert all(torch.equal(resumed[0][name], whole[0][name]) for name in whole.layout.names)
    curves = [(tmp_path / name / "curve.json").read_text() for name in ("whole", "broken")]
    assert curves[0] == curves[1]
    assert len(json.loads(curves[0])) == 40
    run("broken", resume=True)  # complete already: nothing to do
    with pytest.raises(BankExists):
        run("whole")


def test_stopped_after_the_last_row_it_is_finished_by_resume(tmp_path: Path) -> None:
    net, (x, y) = teacher()
    module = build("mlp:6", input_shape=[4], num_outputs=3, seed=2)

    def run(**options: bool) -> Bank:
        return distil(module, net, (x, y), out=tmp_path / "s", num_epochs=4, seed=1, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bnn.training._write_files", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert run(resume=True).info["complete"]
    assert {"model.safetensors", "curve.json"} <= {path.name for path in (tmp_path / "s").iterdir()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bnn.bank.writer.BankWriter.close", lambda self: (self.commit(), interrupt()))
        with pytest.raises(KeyboardInterrupt):
            run(overwrite=True)
    assert not Bank.open(tmp_path / "s").info["complete"]
    assert run(resume=True).info["complete"]


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_bank_that_replaces_a_student_leaves_nothing_of_it(tmp_path: Path) -> None:
    net, (x, y) = teacher()
    module = build("mlp:6", input_shape=[4], num_outputs=3, seed=2)
    distil(module, net, (x, y), out=tmp_path / "s", num_epochs=1)
    model, data = classifier()
    fit(model, data, method=Prior(), num_samples=2, out=tmp_path / "s", overwrite=True)
    assert not {"model.safetensors", "curve.json"} & {path.name for path in (tmp_path / "s").iterdir()}


def test_tuple_inputs_are_taught_too(tmp_path: Path) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.inner(a + b)

    module, (_, (x, y)) = Sum(), classifier()
    bank = Bank.from_state_dicts([module.state_dict()] * 3, module=module, info={"likelihood": {"name": "Categorical"}})
    student = distil(
        module, FunctionalModel(module, bank), ((x, x), y), out=tmp_path / "s", num_epochs=2, batch_size=5, lr=1e-7
    )
    # It begins at its teacher, and steps of 1e-7 leave it there.
    torch.testing.assert_close(student[0]["inner.weight"], bank[0]["inner.weight"])


def test_files_for_tools_that_know_nothing_of_banks(tmp_path: Path, world_untouched: None) -> None:
    net, (x, y) = teacher()
    student = build("mlp:6", input_shape=[4], num_outputs=3, seed=2)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    bank = distil(student, net, (x, y), held_out=(x, y), out=tmp_path / "s", num_epochs=6)
    assert all(torch.equal(p, before[name]) for name, p in student.named_parameters())
    loaded = safetensors.torch.load_file(tmp_path / "s" / "model.safetensors")
    fresh = build("mlp:6", input_shape=[4], num_outputs=3, seed=9)
    fresh.load_state_dict({name: tensor for name, tensor in loaded.items() if not name.startswith("@pad")})
    torch.testing.assert_close(fresh(x), FunctionalModel(student, bank)(x, 0))
    curve = json.loads((tmp_path / "s" / "curve.json").read_text())
    assert [row["epoch"] for row in curve] == [1, 2, 3, 4, 5, 6]
    assert set(curve[0]) == {"epoch", "loss", "held_out_nll", "held_out_kl"}


def test_workers_do_not_change_the_student(tmp_path: Path) -> None:
    net, (x, y) = teacher()
    module = build("mlp:6", input_shape=[4], num_outputs=3, seed=2)
    banks = [
        distil(module, net, (x, y), out=tmp_path / str(workers), num_epochs=3, batch_size=5, num_workers=workers)
        for workers in (0, 2)
    ]
    assert all(torch.equal(banks[0][0][name], banks[1][0][name]) for name in banks[0].layout.names)


def test_bad_options_and_losses_leave_nothing_behind(tmp_path: Path) -> None:
    net, (x, y) = teacher()
    module = build("mlp:6", input_shape=[4], num_outputs=3, seed=2)
    for options in ({"num_epochs": 0}, {"batch_size": 0}, {"lr": 0.0}):
        with pytest.raises(ConfigError, match="distil"):
            distil(module, net, (x, y), out=tmp_path / "s", **options)  # type: ignore[arg-type]
    with pytest.raises(FitError, match="lower lr"):
        distil(module, net, (x.sign() * 3e38, y), out=tmp_path / "s", num_epochs=2)
    assert not (tmp_path / "s").exists()
