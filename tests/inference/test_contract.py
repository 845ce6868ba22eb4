"""One contract for every method: a row in the table below is all that a new method adds."""

from __future__ import annotations

import copy
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar, NamedTuple

import pytest
import torch
from scenarios import classifier, undefined_classifier
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bnn
from bnn import likelihoods, priors
from bnn.bank import Bank
from bnn.errors import BnnError, ConfigError, FitError
from bnn.fitting import fit
from bnn.inference import HMC, IVON, METHODS, NUTS, SGHMC, SGLD, SWAG, Ensemble, Guide, Laplace, Prior
from bnn.model import BayesianModel
from bnn.seeding import generator
from bnn.types import Block, Data, Method, State


class Row(NamedTuple):
    """A method at a size that a test can afford, and how many samples to ask for."""

    method: Method
    num_samples: int
    more: int | None  # a larger number that a finished bank can grow to
    has_log_joint: bool = False


TABLE: dict[str, Row] = {
    "prior": Row(Prior(block_size=4), 6, 11),
    "mean-field": Row(Guide("mean-field", num_steps=120, batch_size=7, block_size=4), 6, 11),
    "low-rank": Row(Guide("low-rank", num_steps=120, batch_size=7, rank=3, block_size=4), 6, 11),
    "full-rank": Row(Guide("full-rank", num_steps=60, batch_size=7, block_size=4), 6, 11),
    "flow": Row(Guide("flow", num_steps=60, batch_size=7, hidden=3, block_size=4), 6, 11),
    "guide": Row(Guide("AutoNormal", num_steps=60, batch_size=7, sites="parameter", block_size=4), 6, 11),
    "map": Row(Guide("map", num_steps=120, batch_size=7), 1, None),
    "laplace": Row(Laplace(num_steps=60, batch_size=7, block_size=4), 6, 11),
    "ensemble": Row(Ensemble(num_steps=60, batch_size=7, group_size=4), 6, 11, has_log_joint=True),
    "swag": Row(SWAG(num_steps=70, batch_size=7, num_models=8, rank=3, collect_every=9, block_size=4), 6, 11),
    "ivon": Row(IVON(num_steps=60, batch_size=7, block_size=4), 6, 11),
    "sgld": Row(SGLD(num_chains=2, num_warmup=20, climb_steps=60, cycle_steps=None, thin=9, batch_size=7), 6, 10),
    "sghmc": Row(
        SGHMC(num_chains=2, num_warmup=20, climb_steps=60, cycle_steps=30, draws_per_cycle=2, batch_size=7), 6, 10
    ),
    "hmc": Row(HMC(num_chains=2, num_warmup=12, num_steps=4, init="prior"), 6, 10, has_log_joint=True),
    "nuts": Row(NUTS(num_chains=2, num_warmup=8, max_tree_depth=3, init="prior"), 6, 10, has_log_joint=True),
}


def large(width: int = 70) -> tuple[BayesianModel, tuple[Tensor, Tensor]]:
    """P = 5,112 (of width 20: 462) with a learnt noise scale, a frozen layer and batch norm in eval mode."""
    source = generator(4, "large")
    x = torch.randn(41, 6, generator=source)
    y = torch.sin(x[:, :1]) + 0.1 * torch.randn(41, 1, generator=source)
    module = nn.Sequential(
        nn.Linear(6, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
    )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=source))
    module.eval()
    likelihood = likelihoods.Gaussian(priors.LogNormal(-1.0, 1.0))
    model = BayesianModel(
        module,
        prior=priors.FanIn(1.0),
        likelihood=likelihood,
        num_data=41,
        bayesian=["*", "!1", "!0.weight"],
        temperature=0.5,
    )
    return model, (x, y)


CASES: dict[str, Callable[[], tuple[BayesianModel, tuple[Tensor, Tensor]]]] = {"small": classifier, "large": large}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[BayesianModel, tuple[Tensor, Tensor]]:
    row = request.getfixturevalue("row") if "row" in request.fixturenames else None
    if request.param == "large" and row is TABLE["full-rank"]:
        return large(width=20)  # 5,112^2 values, with their moments, would take minutes and gigabytes
    return CASES[request.param]()


@pytest.fixture(params=TABLE)
def row(request: pytest.FixtureRequest) -> Row:
    return TABLE[request.param]


def run(row: Row, case: tuple[BayesianModel, Data], **options: object) -> list[tuple[Block, State]]:
    given = {"num_samples": row.num_samples, "seed": 3, **options}
    return list(row.method.run(case[0], case[1], **given))  # type: ignore[arg-type]


def rows_of(found: list[tuple[Block, State]]) -> dict[str, Tensor]:
    names = found[0][0].params
    columns = {
        f"@{key}": torch.cat([getattr(b, key) for b, _ in found])
        for key in ("chain", "draw", "log_joint", "log_weight")
    }
    return {name: torch.cat([block.params[name] for block, _ in found]) for name in names} | columns


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k].nan_to_num(-1.0), b[k].nan_to_num(-1.0)) for k in a)


def test_the_table_has_every_method() -> None:
    assert TABLE.keys() == METHODS.keys()


def test_methods_are_frozen_dataclasses(row: Row) -> None:
    assert dataclasses.is_dataclass(row.method)
    with pytest.raises(dataclasses.FrozenInstanceError):
        row.method.block_size = 3  # type: ignore[attr-defined,misc]


def test_options_of_another_kind_are_refused(row: Row) -> None:
    """By name, when the method is made: not in the middle of a fit."""
    for option in dataclasses.fields(row.method):  # type: ignore[arg-type]
        kinds = str(option.type).split(" | ")
        if {"int", "float", "bool"} & set(kinds):
            for value in (
                "2",
                [1],
                True if "bool" not in kinds else 1,
                *([2.5] if "float" not in kinds else [math.nan]),
            ):
                with pytest.raises(ConfigError, match=rf"{type(row.method).__name__}\({option.name}=\): want"):
                    dataclasses.replace(row.method, **{option.name: value})


def test_blocks_hold_what_the_layout_says(row: Row, case: tuple[BayesianModel, Data]) -> None:
    model, _ = case
    assert model.layout.num_values in (43, 462, 5112)
    found = run(row, case)
    for block, _ in found:
        assert list(block.params) == list(model.layout.names)
        for entry in model.layout.entries:
            assert block.params[entry.name].shape == (block.num_samples, *entry.shape)
            assert block.params[entry.name].dtype == entry.dtype
            assert not block.params[entry.name].requires_grad
        assert block.chain.dtype == block.draw.dtype == torch.int64
        assert block.log_joint.dtype == block.log_weight.dtype == torch.float64
    rows = rows_of(found)
    assert len(rows["@chain"]) == row.num_samples
    assert bool((rows["@log_weight"] == 0).all())
    assert len(set(zip(rows["@chain"].tolist(), rows["@draw"].tolist(), strict=True))) == row.num_samples
    if "@likelihood.scale" in rows:
        assert bool((rows["@likelihood.scale"] > 0).all())


def test_log_joint_is_the_full_data_one_of_the_constrained_values_or_nan(
    row: Row, case: tuple[BayesianModel, Data]
) -> None:
    rows = rows_of(run(row, case))
    if not row.has_log_joint:
        assert bool(rows["@log_joint"].isnan().all())
        return
    model, data = case
    batch = bnn.types.Batch(*data)
    for k in range(row.num_samples):
        expected = model.log_joint({name: rows[name][k] for name in model.layout.names}, batch)
        assert float(rows["@log_joint"][k]) == pytest.approx(float(expected), rel=1e-5, abs=1e-3)


def test_states_tell_progress_and_what_follows_is_new(row: Row, case: tuple[BayesianModel, Data]) -> None:
    found = run(row, case)
    steps = [state["step"] for _, state in found]
    assert steps == sorted(set(steps))
    assert all(state["num_steps"] == steps[-1] for _, state in found)
    for _, state in found:
        assert all(isinstance(value, float | int) for value in state["info"].values())


def test_repeatable_by_seed(row: Row, case: tuple[BayesianModel, Data]) -> None:
    first = rows_of(run(row, case))
    assert equal(first, rows_of(run(row, case)))
    other = rows_of(run(row, case, seed=4))
    name = next(iter(other))
    assert not torch.equal(first[name], other[name])


def test_resume_from_every_state_equals_the_unbroken_run(
    row: Row, case: tuple[BayesianModel, Data], tmp_path: Path
) -> None:
    whole = run(row, case)
    expected = rows_of(whole)
    places = sorted({0, 1, len(whole) // 2, len(whole) - 2} & set(range(len(whole) - 1)))
    for place in places:
        state = through_disk(whole[place][1], tmp_path / f"{place}.safetensors")
        rest = run(row, case, state=state)
        assert equal(rows_of([*whole[: place + 1], *rest]), expected), f"resumed after state {place}"


def through_disk(state: State, path: Path) -> State:
    """The state as a killed process would find it."""
    from bnn.bank import files
    from bnn.bank import format as fmt

    tensors, metadata = fmt.encode_state(state, "state")
    files.write_tensors(path, tensors, metadata)
    mapped = files.map_tensors(path)
    return fmt.decode_state({name: t.clone() for name, t in mapped.tensors.items()}, mapped.metadata, "state")


def test_states_are_not_changed_by_what_follows(row: Row, case: tuple[BayesianModel, Data]) -> None:
    kept: list[tuple[State, dict[str, Tensor]]] = []
    for _, state in row.method.run(case[0], case[1], num_samples=row.num_samples, seed=3):
        kept.append((state, {k: v.clone() for k, v in state.items() if isinstance(v, Tensor)}))
    for state, copies in kept:
        assert all(torch.equal(state[name], tensor) for name, tensor in copies.items())


def test_the_module_is_bit_equal_afterwards(row: Row, case: tuple[BayesianModel, Data]) -> None:
    module = case[0].module
    before = {name: t.detach().clone() for name, t in [*module.named_parameters(), *module.named_buffers()]}
    flags = [(p.requires_grad, p.grad, id(p)) for p in module.parameters()], [m.training for m in module.modules()]
    run(row, case)
    after = dict([*module.named_parameters(), *module.named_buffers()])
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert (
        [(p.requires_grad, p.grad, id(p)) for p in module.parameters()],
        [m.training for m in module.modules()],
    ) == flags


def test_global_state_is_untouched(row: Row, case: tuple[BayesianModel, Data], world_untouched: None) -> None:
    producer = row.method.run(case[0], case[1], num_samples=row.num_samples, seed=3)
    before = torch.get_rng_state()
    count = 0
    for block, _ in producer:
        assert torch.equal(before, torch.get_rng_state())  # also in the middle of a run, where the caller has control
        count += block.num_samples
    assert count == row.num_samples


def test_fit_writes_a_bank_and_resumes_it_bit_for_bit(
    row: Row, case: tuple[BayesianModel, Data], tmp_path: Path
) -> None:
    model, data = case
    whole = fit(model, data, method=row.method, num_samples=row.num_samples, out=tmp_path / "whole", seed=3)
    assert len(whole) == row.num_samples
    assert whole.info["complete"]

    def interrupted(run: Iterator[tuple[Block, State]], *args: object) -> Iterator[tuple[Block, State]]:
        for count, found in enumerate(run):
            if count == 1:
                raise KeyboardInterrupt
            yield found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bnn.fitting.with_progress", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(model, data, method=row.method, num_samples=row.num_samples, out=tmp_path / "broken", seed=3)
    assert len(Bank.open(tmp_path / "broken")) < row.num_samples
    resumed = fit(
        model, data, method=row.method, num_samples=row.num_samples, out=tmp_path / "broken", seed=3, resume=True
    )
    assert resumed.info["complete"]
    expected, found = whole.block(slice(None)), resumed.block(slice(None))
    for mine, theirs in zip(found[1:5], expected[1:5], strict=True):
        assert torch.equal(mine.nan_to_num(-1.0), theirs.nan_to_num(-1.0))
    assert equal(found.params, expected.params)
    assert equal(found.columns, expected.columns)
    in_memory = fit(model, data, method=row.method, num_samples=row.num_samples, seed=3).block(slice(None))
    assert all(torch.equal(in_memory.params[name], expected.params[name]) for name in model.layout.names)


def test_a_complete_bank_grows(row: Row, case: tuple[BayesianModel, Data], tmp_path: Path) -> None:
    if row.more is None:
        with pytest.raises(ConfigError, match="num_samples"):
            run(row, case, num_samples=2)
        return
    model, data = case
    fit(model, data, method=row.method, num_samples=row.num_samples, out=tmp_path / "bank", seed=3)
    grown = fit(model, data, method=row.method, num_samples=row.more, out=tmp_path / "bank", seed=3, resume=True)
    whole = fit(model, data, method=row.method, num_samples=row.more, seed=3)
    assert len(grown) == row.more
    name = model.layout.names[0]
    assert torch.equal(grown.block(slice(None)).params[name], whole.block(slice(None)).params[name])


@pytest.mark.parametrize("form", ["dataset", "loader"])
def test_data_sets_and_loaders_serve_as_well_as_tensors(row: Row, form: str) -> None:
    model, (x, y) = classifier()
    dataset = TensorDataset(x, y)
    data = dataset if form == "dataset" else DataLoader(dataset, batch_size=7, shuffle=True)
    found = rows_of(run(row, (model, data)))
    assert len(found["@chain"]) == row.num_samples
    assert equal(found, rows_of(run(row, (model, data))))
    if form == "dataset":
        assert equal(found, rows_of(run(row, (model, (x, y)))))


def test_nan_in_data_is_refused(row: Row) -> None:
    model, (x, y) = classifier()
    x = x.clone()
    x[5, 1] = torch.nan
    if isinstance(row.method, Prior):
        assert len(run(row, (model, (x, y)))) > 0  # the prior never looks at data
        return
    with pytest.raises(BnnError, match="NaN or Inf in row 5 of x"):
        run(row, (model, (x, y)))


def test_a_run_that_fails_leaves_nothing_half_written(tmp_path: Path) -> None:
    for method in (Guide(lr=1e30, num_steps=200), HMC(num_chains=2, num_warmup=3)):
        model, data = classifier() if isinstance(method, Guide) else undefined_classifier()
        with pytest.raises(BnnError, match="finite"):
            fit(model, data, method=method, num_samples=4, out=tmp_path / "bank")
        assert not (tmp_path / "bank").exists()


def test_a_run_that_fails_late_keeps_its_last_commit(tmp_path: Path) -> None:
    """States of the optimisation were committed on the way: the bank opens, has no rows, and is not complete."""
    from bnn.bank import writer
    from bnn.inference import guide

    model, data = classifier()
    step = guide._optimise

    def failing(*args: object) -> Tensor:
        if args[4].start == 100:  # type: ignore[attr-defined]
            raise FitError("Guide", want="a finite loss", got="none at step 100", fix="lower lr")
        return step(*args)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "STATE_SECONDS", 0.0)
        patch.setattr("bnn.inference.guide._optimise", failing)
        with pytest.raises(FitError, match="at step 100"):
            fit(model, data, method=Guide(num_steps=200), num_samples=2, out=tmp_path / "bank")
    kept = Bank.open(tmp_path / "bank")
    assert (len(kept), kept.info["complete"]) == (0, False)
    whole = fit(model, data, method=Guide(num_steps=200), num_samples=2)
    resumed = fit(model, data, method=Guide(num_steps=200), num_samples=2, out=tmp_path / "bank", resume=True)
    assert torch.equal(resumed[1]["1.weight"], whole[1]["1.weight"])


@pytest.mark.parametrize("num_samples", [0, -4])
def test_no_samples_are_refused(row: Row, num_samples: int, tmp_path: Path) -> None:
    model, data = classifier()
    with pytest.raises(ConfigError, match="num_samples: want at least 1"):
        fit(model, data, method=row.method, num_samples=num_samples, out=tmp_path / "bank")
    assert list(tmp_path.iterdir()) == []


def test_rows_that_are_not_num_data_are_refused(row: Row) -> None:
    model, (x, y) = classifier()
    with pytest.raises(ConfigError, match="num_data: want 20, the rows of the data, got 23"):
        fit(model, (x[:20], y[:20]), method=row.method, num_samples=row.num_samples)


@pytest.mark.parametrize("what", ["data", "module", "base"])
def test_resume_knows_its_data_and_module_again(row: Row, what: str, tmp_path: Path) -> None:
    model, (x, y) = classifier()
    partial = BayesianModel(model.module, prior=model.prior, likelihood=model.likelihood, num_data=23, bayesian="3")
    fit(partial, (x, y), method=row.method, num_samples=row.num_samples, out=tmp_path / "bank")
    module = copy.deepcopy(model.module)
    if what == "module":
        module[2] = nn.ReLU()  # type: ignore[index,operator]
    if what == "base":
        with torch.no_grad():
            module[1].weight.add_(1.0)  # type: ignore[index,operator,union-attr]
    other = BayesianModel(module, prior=model.prior, likelihood=model.likelihood, num_data=23, bayesian="3")
    data = (x * 100, y) if what == "data" else (x, y)
    with pytest.raises(BnnError, match="provenance" if what != "base" else "parameters outside the sample"):
        fit(other, data, method=row.method, num_samples=row.num_samples, out=tmp_path / "bank", resume=True)


def test_in_memory_banks_have_diagnostics_too() -> None:
    model, data = classifier()
    info = fit(model, data, method=TABLE["hmc"].method, num_samples=6).info
    assert info["complete"]
    assert set(info["diagnostics"]["main"]) == {
        "acceptance",
        "divergences",
        "step_size",
        "leapfrogs",
        "compile_seconds",
    }


@pytest.mark.parametrize("name", [name for name in TABLE if name != "prior"])
def test_rows_and_targets_that_do_not_fit_the_module_are_refused(name: str) -> None:
    model, (x, y) = classifier()
    row = TABLE[name]
    for data, match in [((x, y + 1), r"classes in \[0, 3\), one an output of the module, got 1 to 3"),
                        ((x[:, :3], y), r"rows that the module \(Sequential\) takes, got RuntimeError")]:  # fmt: skip
        with pytest.raises(BnnError, match=match):
            run(row, (model, data))


def test_four_fits_at_once_wait_for_each_other(world_untouched: None) -> None:
    model, data = classifier()
    method = Guide(num_steps=120)
    expected = fit(model, data, method=method, num_samples=2, seed=1)[1]["1.weight"]
    found: list[Tensor] = []
    threads = [
        threading.Thread(
            target=lambda: found.append(fit(model, data, method=method, num_samples=2, seed=1)[1]["1.weight"])
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(one, expected) for one in found)


def test_progress_goes_to_stderr_only_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    model, data = classifier()
    fit(model, data, method=Prior(), num_samples=3)
    assert capsys.readouterr() == ("", "")
    fit(model, data, method=Patient(), num_samples=3, progress=True)
    found = capsys.readouterr()
    assert found.out == ""
    assert "patient" in found.err
    assert "3/3" in found.err


@dataclasses.dataclass(frozen=True)
class Patient:
    """The prior, after longer than the second that a bar waits before it shows."""

    name: ClassVar[str] = "patient"

    def run(self, *args: object, **options: object) -> Iterator[tuple[Block, State]]:
        for found in Prior(block_size=1).run(*args, **options):  # type: ignore[arg-type]
            time.sleep(0.6)
            yield found


def test_bank_records_how_it_was_made(tmp_path: Path) -> None:
    model, data = classifier()
    fit(model, data, method=HMC(num_chains=2, num_warmup=30, num_steps=2), num_samples=4, out=tmp_path / "bank", seed=9)
    info = Bank.open(tmp_path / "bank").info
    assert info["method"]["name"] == "hmc"
    assert info["method"]["options"]["num_chains"] == 2
    assert info["seed"] == 9
    assert info["prior"] == {"name": "FanIn", "scale": 1.5, "bias_scale": 1.0}
    assert info["likelihood"] == {"name": "Categorical"}
    assert info["num_data"] == 23
    assert set(info["versions"]) == {"bnn", "torch", "pyro", "python"}
    assert set(info["diagnostics"]["main"]) == {
        "acceptance",
        "divergences",
        "step_size",
        "leapfrogs",
        "compile_seconds",
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_module_on_the_gpu_is_fitted_there_and_its_samples_come_to_the_cpu(row: Row, tmp_path: Path) -> None:
    model, data = large()
    model.module.cuda()
    try:
        bank = fit(model, data, method=row.method, num_samples=row.num_samples, out=tmp_path / "bank", seed=3)
        block = bank.block(slice(None))
        assert all(tensor.device.type == "cpu" and bool(tensor.isfinite().all()) for tensor in block.params.values())
        on_gpu = bnn.predict(bnn.FunctionalModel(model.module, bank, device="cuda"), data[0])
        model.module.cpu()
        on_cpu = bnn.predict(bnn.FunctionalModel(model.module, bank), data[0])
        torch.testing.assert_close(on_gpu.mean, on_cpu.mean, rtol=1e-3, atol=1e-3)  # type: ignore[union-attr]
    finally:
        model.module.cpu()


@pytest.mark.parametrize("dtypes", ["float64", "bfloat16", "mixed"])
def test_other_dtypes_are_kept(row: Row, dtypes: str) -> None:
    model, (x, y) = classifier()
    dtype = torch.bfloat16 if dtypes == "bfloat16" else torch.float64
    module = model.module.to(dtype)
    if dtypes == "mixed":
        module = nn.Sequential(module, Narrow())
    wide = BayesianModel(module, prior=model.prior, likelihood=model.likelihood, num_data=23)
    rows = rows_of(run(row, (wide, (x.to(dtype), y))))
    for entry in wide.layout.entries:
        assert rows[entry.name].dtype == entry.dtype
        assert bool(rows[entry.name].isfinite().all())


class Narrow(nn.Module):
    """A float16 parameter behind float64 layers."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3, dtype=torch.float16))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift.to(x.dtype)
