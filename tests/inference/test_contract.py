"""One contract for every method: a row in the table below is all that a new method adds."""

from __future__ import annotations

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


# Of 53 steps of 4 batches an epoch one state comes on the way, at step 50, in mid-epoch, and one at the end.
TABLE: dict[str, Row] = {
    "prior": Row(Prior(block_size=4), 6, 11),
    "mean-field": Row(Guide("mean-field", num_steps=53, batch_size=7, block_size=4), 6, 11),
    "low-rank": Row(Guide("low-rank", num_steps=53, batch_size=7, rank=3, block_size=4), 6, 11),
    "full-rank": Row(Guide("full-rank", num_steps=53, batch_size=7, block_size=4), 6, 11),
    "flow": Row(Guide("flow", num_steps=53, batch_size=7, hidden=3, block_size=4), 6, 11),
    "guide": Row(Guide("AutoNormal", num_steps=53, batch_size=7, sites="parameter", block_size=4), 6, 11),
    "map": Row(Guide("map", num_steps=53, batch_size=7), 1, None),
    "laplace": Row(Laplace(num_steps=53, batch_size=7, block_size=4), 6, 11),
    "ensemble": Row(Ensemble(num_steps=53, batch_size=7, group_size=4), 6, 11, has_log_joint=True),
    "swag": Row(SWAG(num_steps=53, batch_size=7, num_models=8, rank=3, collect_every=9, block_size=4), 6, 11),
    "ivon": Row(IVON(num_steps=53, batch_size=7, block_size=4), 6, 11),
    "sgld": Row(SGLD(num_chains=2, num_warmup=20, climb_steps=53, cycle_steps=None, thin=9, batch_size=7), 6, 10),
    "sghmc": Row(
        SGHMC(num_chains=2, num_warmup=20, climb_steps=53, cycle_steps=30, draws_per_cycle=2, batch_size=7), 6, 10
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


@pytest.fixture(params=CASES, scope="module")
def case(request: pytest.FixtureRequest) -> tuple[BayesianModel, tuple[Tensor, Tensor]]:
    row = request.getfixturevalue("row") if "row" in request.fixturenames else None
    if request.param == "large" and row is TABLE["full-rank"]:
        return large(width=20)  # 5,112^2 values, with their moments, would take minutes and gigabytes
    return CASES[request.param]()


@pytest.fixture(params=TABLE, scope="module")
def row(request: pytest.FixtureRequest) -> Row:
    return TABLE[request.param]


class Made(NamedTuple):
    """A whole run, watched on its way: no test changes it."""

    found: list[tuple[Block, State]]
    copies: list[dict[str, Tensor]]  # of the tensors of each state, taken when it came
    before: dict[str, Tensor]  # the module's tensors
    flags: tuple[list[object], list[object]]


@pytest.fixture(scope="module")
def made(row: Row, case: tuple[BayesianModel, Data]) -> Made:
    module = case[0].module
    before = {name: t.detach().clone() for name, t in [*module.named_parameters(), *module.named_buffers()]}
    flags = flags_of(module)
    found: list[tuple[Block, State]] = []
    copies: list[dict[str, Tensor]] = []
    for block, state in row.method.run(case[0], case[1], num_samples=row.num_samples, seed=3):
        found.append((block, state))
        copies.append({name: value.clone() for name, value in state.items() if isinstance(value, Tensor)})
    return Made(found, copies, before, flags)


def flags_of(module: nn.Module) -> tuple[list[object], list[object]]:
    return [(p.requires_grad, p.grad, id(p)) for p in module.parameters()], [m.training for m in module.modules()]


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


def test_blocks_hold_what_the_layout_says(row: Row, case: tuple[BayesianModel, Data], made: Made) -> None:
    model, _ = case
    assert model.layout.num_values in (43, 462, 5112)
    for block, _ in made.found:
        assert list(block.params) == list(model.layout.names)
        for entry in model.layout.entries:
            assert block.params[entry.name].shape == (block.num_samples, *entry.shape)
            assert block.params[entry.name].dtype == entry.dtype
            assert not block.params[entry.name].requires_grad
        assert block.chain.dtype == block.draw.dtype == torch.int64
        assert block.log_joint.dtype == block.log_weight.dtype == torch.float64
    rows = rows_of(made.found)
    assert len(rows["@chain"]) == row.num_samples
    assert bool((rows["@log_weight"] == 0).all())
    assert len(set(zip(rows["@chain"].tolist(), rows["@draw"].tolist(), strict=True))) == row.num_samples
    if "@likelihood.scale" in rows:
        assert bool((rows["@likelihood.scale"] > 0).all())


def test_log_joint_is_the_full_data_one_of_the_constrained_values_or_nan(
    row: Row, case: tuple[BayesianModel, Data], made: Made
) -> None:
    rows = rows_of(made.found)
    if not row.has_log_joint:
        assert bool(rows["@log_joint"].isnan().all())
        return
    model, data = case
    batch = bnn.types.Batch(*data)
    for k in range(row.num_samples):
        expected = model.log_joint({name: rows[name][k] for name in model.layout.names}, batch)
        assert float(rows["@log_joint"][k]) == pytest.approx(float(expected), rel=1e-5, abs=1e-3)


def test_states_tell_progress_and_what_follows_is_new(made: Made) -> None:
    steps = [state["step"] for _, state in made.found]
    assert steps == sorted(set(steps))
    assert all(state["num_steps"] == steps[-1] for _, state in made.found)
    for _, state in made.found:
        assert all(isinstance(value, float | int) for value in state["info"].values())


def test_a_second_run_is_the_same_and_touches_no_global_state(
    row: Row, case: tuple[BayesianModel, Data], made: Made, world_untouched: None
) -> None:
    before = torch.get_rng_state()
    found = []
    for block, state in row.method.run(case[0], case[1], num_samples=row.num_samples, seed=3):
        assert torch.equal(before, torch.get_rng_state())  # also in the middle of a run, where the caller has control
        found.append((block, state))
    assert equal(rows_of(found), rows_of(made.found))


@pytest.mark.parametrize("case", ["small"], indirect=True)
def test_another_seed_leads_to_other_samples(row: Row, case: tuple[BayesianModel, Data], made: Made) -> None:
    first, other = rows_of(made.found), rows_of(run(row, case, seed=4))
    name = next(iter(other))
    assert not torch.equal(first[name], other[name])


def test_resume_from_every_state_equals_the_unbroken_run(
    row: Row, case: tuple[BayesianModel, Data], made: Made, tmp_path: Path
) -> None:
    whole = made.found
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


def test_states_are_not_changed_by_what_follows(made: Made) -> None:
    for (_, state), copies in zip(made.found, made.copies, strict=True):
        assert all(torch.equal(state[name], tensor) for name, tensor in copies.items())


def test_the_module_is_bit_equal_afterwards(case: tuple[BayesianModel, Data], made: Made) -> None:
    module = case[0].module
    after = dict([*module.named_parameters(), *module.named_buffers()])
    assert all(torch.equal(after[name], tensor) for name, tensor in made.before.items())
    assert flags_of(module) == made.flags


def test_fit_writes_a_bank_that_is_resumed_and_grows_bit_for_bit(
    row: Row, case: tuple[BayesianModel, Data], made: Made, tmp_path: Path
) -> None:
    model, data = case

    def interrupted(run: Iterator[tuple[Block, State]], *args: object) -> Iterator[tuple[Block, State]]:
        for count, found in enumerate(run):
            if count == 1:
                raise KeyboardInterrupt
            yield found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bnn.fitting.with_progress", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(model, data, method=row.method, num_samples=row.num_samples, out=tmp_path / "bank", seed=3)
    broken = Bank.open(tmp_path / "bank")
    assert len(broken) < row.num_samples
    assert not broken.info["complete"]
    resumed = fit(
        model, data, method=row.method, num_samples=row.num_samples, out=tmp_path / "bank", seed=3, resume=True
    )
    assert resumed.info["complete"]
    assert equal(rows_of_bank(resumed), rows_of(made.found))
    if row.more is not None:
        grown = fit(model, data, method=row.method, num_samples=row.more, out=tmp_path / "bank", seed=3, resume=True)
        in_memory = fit(model, data, method=row.method, num_samples=row.more, seed=3)
        assert len(grown) == row.more
        assert equal(rows_of_bank(grown), rows_of_bank(in_memory))


def rows_of_bank(bank: Bank) -> dict[str, Tensor]:
    return rows_of([(bank.block(slice(None)), {})])


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.more is None])
def test_a_mode_is_one_sample(name: str) -> None:
    with pytest.raises(ConfigError, match="num_samples"):
        run(TABLE[name], classifier(), num_samples=2)


@pytest.mark.parametrize("form", ["dataset", "loader"])
@pytest.mark.parametrize("case", ["small"], indirect=True)
def test_data_sets_and_loaders_serve_as_well_as_tensors(
    row: Row, case: tuple[BayesianModel, tuple[Tensor, Tensor]], made: Made, form: str
) -> None:
    model, tensors = case
    dataset = TensorDataset(*tensors)
    data = dataset if form == "dataset" else DataLoader(dataset, batch_size=7, shuffle=True)
    found = rows_of(run(row, (model, data)))
    if form == "dataset":
        assert equal(found, rows_of(made.found))
    else:
        assert equal(found, rows_of(run(row, (model, data))))
        assert len(found["@chain"]) == row.num_samples


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


@pytest.fixture(scope="module")
def partial(row: Row, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of the last layer alone: the others are its base."""
    out = tmp_path_factory.mktemp("partial") / "bank"
    model, data = classifier()
    fit(of_last_layer(model.module), data, method=row.method, num_samples=row.num_samples, out=out)
    return out


def of_last_layer(module: nn.Module) -> BayesianModel:
    return BayesianModel(
        module, prior=priors.FanIn(1.5), likelihood=likelihoods.Categorical(), num_data=23, bayesian="3"
    )


@pytest.mark.parametrize("what", ["data", "module", "base"])
def test_resume_knows_its_data_and_module_again(row: Row, what: str, partial: Path) -> None:
    model, (x, y) = classifier()
    module = model.module
    if what == "module":
        module[2] = nn.ReLU()  # type: ignore[index,operator]
    if what == "base":
        with torch.no_grad():
            module[1].weight.add_(1.0)  # type: ignore[index,operator,union-attr]
    data = (x * 100, y) if what == "data" else (x, y)
    with pytest.raises(BnnError, match="provenance" if what != "base" else "parameters outside the sample"):
        fit(of_last_layer(module), data, method=row.method, num_samples=row.num_samples, out=partial, resume=True)


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


@pytest.mark.parametrize("dtypes", ["bfloat16", "mixed"])
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
