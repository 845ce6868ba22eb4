"""Virtual banks: the bits of the fit without them, whatever is drawn beside, where and by whom; refused where they cannot be."""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from forging import edit_json
from scipy import stats
from torch import Tensor, nn

import bnn
from bnn import cli
from bnn.bank import Bank, VirtualBank, files, materialise, mean, merge, repair, thin, verify_files, write_state_dict
from bnn.bank import format as fmt
from bnn.drawing import GuideDraws, draws_of, witness
from bnn.errors import (
    BankCorrupt,
    BankError,
    BankExists,
    BankMismatch,
    BnnError,
    ConfigError,
    OtherDevice,
)
from bnn.inference import HMC, Guide, Prior
from bnn.likelihoods import Categorical, Gaussian
from bnn.model import BayesianModel
from bnn.priors import FanIn, HalfCauchy, Laplace, LogNormal, Normal
from bnn.seeding import generator, isolated
from bnn.types import Method

S, N = 11, 17
Data = tuple[Tensor, Tensor]


def regression(width: int = 4, num_inputs: int = 3) -> tuple[BayesianModel, Data]:
    """A noise and a scale of the prior that are learnt: two unknowns, one of them under the values of the weights."""
    source = generator(1, "virtual")
    with isolated(1, "module"):
        module = nn.Sequential(nn.Linear(num_inputs, width), nn.Tanh(), nn.Linear(width, 2))
    prior, likelihood = FanIn(scale=LogNormal(0.1, 0.3)), Gaussian(HalfCauchy(0.5))
    x = torch.randn(N, num_inputs, generator=source)
    model = BayesianModel(module, prior=prior, likelihood=likelihood, num_data=N)
    return model, (x, torch.randn(N, 2, generator=source))


def classifier(width: int = 6, num_inputs: int = 5, dtype: torch.dtype = torch.float32) -> tuple[BayesianModel, Data]:
    source = generator(2, "virtual")
    with isolated(2, "module"):
        module = nn.Sequential(nn.Linear(num_inputs, width), nn.ReLU(), nn.Linear(width, 4)).to(dtype)
    x = torch.randn(N, num_inputs, generator=source).to(dtype)
    model = BayesianModel(module, prior=Normal(0.0, 0.7), likelihood=Categorical(), num_data=N)
    return model, (x, torch.arange(N) % 4)


METHODS: dict[str, Method] = {
    "prior": Prior(block_size=3),
    "mean-field": Guide("mean-field", num_steps=30, batch_size=8, block_size=3),
    "mean-field, antithetic": Guide("mean-field", num_steps=30, batch_size=8, block_size=3, draws="antithetic"),
    "low-rank": Guide("low-rank", num_steps=30, batch_size=8, block_size=3, rank=2),
    "full-rank": Guide("full-rank", num_steps=30, batch_size=8, block_size=3, draws="antithetic"),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
CHEAP = METHODS["mean-field"]


def made(out: Path, method: Method = CHEAP, num_samples: int = S, **options: Any) -> Bank:
    model, data = regression()
    return bnn.fit(model, data, method=method, num_samples=num_samples, out=out, seed=5, virtual=True, **options)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert tensor.shape == other[name].shape
        assert torch.equal(tensor, other[name]), name


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


# Bits


@every_method
def test_the_bits_are_those_of_the_fit_without_it(method: Method, tmp_path: Path, world_untouched: None) -> None:
    """Shards and bank.json of the materialised bank, byte for byte; and each sample, alone and in any block."""
    model, data = regression()
    plain = bnn.fit(model, data, method=method, num_samples=S, out=tmp_path / "plain", seed=5)
    bank = made(tmp_path / "virtual", method)
    told: list[tuple[int, int]] = []
    found = materialise(bank, tmp_path / "made", progress=lambda *done: told.append(done))
    assert told[-1] == (S, S)
    for name in ("bank.json", "main-000000.safetensors"):
        assert (tmp_path / "made" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes(), name
    assert len(found) == len(plain) == len(bank) == S
    whole = plain.block(slice(None))
    assert set(whole.params) >= {"0.weight", "@likelihood.scale", "@prior.scale"}
    assert bool((whole.params["@likelihood.scale"] > 0).all())
    for i in (0, 7, S - 1, -2):
        assert_same(bank[i], plain[i])
    for chosen in (slice(None), slice(8, 1, -3), slice(2, 9, 2), [9, 2, 2, -1], torch.tensor([4]), []):
        mine, theirs = bank.block(chosen), plain.block(chosen)
        assert_same(mine.params, theirs.params)
        for column in ("chain", "draw", "log_weight"):
            assert torch.equal(getattr(mine, column), getattr(theirs, column)), column
        assert bool(mine.log_joint.isnan().all())
    for size in (1, 4, 64):
        pieces = list(bank.blocks(size))
        assert [first for first, _ in pieces] == list(range(0, S, size))
        assert_same({n: torch.cat([b.params[n] for _, b in pieces]) for n in whole.params}, whole.params)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_come_out_as_in_ordinary_banks(dtype: torch.dtype) -> None:
    model, data = classifier(dtype=dtype)
    options: dict[str, Any] = {"method": CHEAP, "num_samples": 7, "seed": 3}
    bank, plain = bnn.fit(model, data, **options, virtual=True), bnn.fit(model, data, **options)
    assert bank[3]["0.weight"].dtype == dtype
    assert_same(bank.block([6, 0, 3]).params, plain.block([6, 0, 3]).params)


SHA = """
import hashlib, pickle, sys, torch
from bnn.bank import Bank
opened, sent = Bank.open(sys.argv[1]), pickle.loads(open(sys.argv[1] + ".pickle", "rb").read())
for bank, threads in ((opened, 1), (sent, 1), (opened, 3)):
    torch.set_num_threads(threads)
    digest = hashlib.sha256()
    for chosen in ([5, 1], [3], list(range(8))):
        for tensor in bank.block(chosen).params.values():
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    print(digest.hexdigest(), bank.digest, len(bank))
"""


@pytest.mark.parametrize("family", ["mean-field", "low-rank", "full-rank"])
def test_neither_processes_nor_threads_change_a_bit(family: Any, tmp_path: Path) -> None:
    """Wide enough for torch to share each operation among threads, and of a length that no vector divides."""
    width, num_inputs = (17, 19) if family == "full-rank" else (201, 211)
    model, data = regression(width, num_inputs)
    method = Guide(family, num_steps=4, batch_size=N, rank=3)
    bank = bnn.fit(model, data, method=method, num_samples=8, out=tmp_path / "bank", virtual=True)
    assert family == "full-rank" or bank.layout.num_values > 40_000
    (tmp_path / "bank.pickle").write_bytes(pickle.dumps(bank))
    here = hashlib.sha256()
    for chosen in ([5, 1], [3], list(range(8))):
        for tensor in bank.block(chosen).params.values():
            here.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    words = [sys.executable, "-c", SHA, str(tmp_path / "bank")]
    told = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    assert told == [f"{here.hexdigest()} {bank.digest} 8"] * 3
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        alone = [bank[i] for i in range(8)]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    with ThreadPoolExecutor(4) as pool:
        beside = list(pool.map(bank.__getitem__, range(8)))
    for i in range(8):
        assert_same(alone[i], beside[i])
        assert_same(alone[i], {name: t[i] for name, t in bank.block(slice(None)).params.items()})


def test_a_bank_in_memory_is_the_one_on_disk(tmp_path: Path) -> None:
    model, data = regression()
    bank = bnn.fit(model, data, method=CHEAP, num_samples=S, seed=5, virtual=True)
    assert bank.path is None
    assert_same(bank[4], made(tmp_path / "bank")[4])
    again = pickle.loads(pickle.dumps(bank))
    assert_same(bank[4], again[4])
    assert (again.digest, len(again)) == (bank.digest, S)
    assert bank.refresh() is bank
    assert materialise(bank, tmp_path / "made").digest == materialise(made(tmp_path / "other"), tmp_path / "two").digest


# Statistics


def flat_draws(family: str, num_samples: int, draws: str = "random") -> tuple[Tensor, dict[str, Tensor]]:
    """Draws of a guide that was written down, in unconstrained space [S, P], and its tensors."""
    source, size, rank = generator(8), 5, 2
    layout = bnn.BayesianModel(nn.Linear(4, 1), prior=Normal(), likelihood=Gaussian(1.0), num_data=1).layout
    tensors = {"loc": torch.randn(size, generator=source), "scale": torch.rand(size, generator=source) + 0.2}
    if family == "low-rank":
        tensors["factor"] = torch.randn(size, rank, generator=source)
    if family == "full-rank":
        tensors["lower"] = torch.randn(size, size, generator=source).tril(-1)
    said = {"prior": Normal().to_config(), "likelihood": Gaussian(1.0).to_config()}
    found = draws_of(layout, family=family, draws=draws, seed=3, tensors=tensors, **said)
    assert isinstance(found, GuideDraws)
    return found.flat(range(num_samples)), tensors


@pytest.mark.parametrize("family", ["mean-field", "low-rank", "full-rank"])
def test_draws_are_normal_with_the_mean_and_covariance_of_the_guide(family: str) -> None:
    """In standard errors of 4,000 draws; each whitened value against the normal by Kolmogorov and Smirnov."""
    count = 4000
    flat, tensors = flat_draws(family, count)
    size, scale = len(tensors["loc"]), tensors["scale"].double()
    mix = torch.eye(size, dtype=torch.float64)
    if family == "full-rank":
        mix = mix + tensors["lower"].double()
    factor = tensors.get("factor", torch.zeros(size, 1)).double()
    covariance = scale.unsqueeze(1) * (mix @ mix.T + factor @ factor.T) * scale
    centred = flat.double() - tensors["loc"].double()
    spread = covariance.diagonal()
    assert float((centred.mean(dim=0).abs() / (spread / count).sqrt()).max()) < 4
    error = ((spread.unsqueeze(0) * spread.unsqueeze(1) + covariance.square()) / count).sqrt()
    assert float(((centred.T @ centred / count - covariance).abs() / error).max()) < 4
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), centred.T, upper=False)  # [P, S]
    for value in white:
        assert stats.kstest(value.numpy(), "norm").pvalue > 1e-3
    for lag in (1, 2, 7):  # samples are independent: no echo of one in a later one
        echo = (white[:, lag:] * white[:, :-lag]).mean(dim=1)
        assert float(echo.abs().max()) < 4 / (count - lag) ** 0.5


@pytest.mark.parametrize("size", [3, 2**16 + 15, 2**16 + 16, 2 * 2**16 + 7, 3 * 2**16, 3 * 2**16 + 17])
def test_pieces_have_the_normals_of_one_call(size: int) -> None:
    """Around the ends of pieces that a cache holds; of two samples beside each other."""
    likelihood = Gaussian(1.0)
    layout = BayesianModel(nn.Linear(size, 1, bias=False), prior=Normal(), likelihood=likelihood, num_data=1).layout
    tensors = {
        "loc": torch.randn(size, generator=generator(8)),
        "scale": torch.rand(size, generator=generator(9)) + 0.2,
    }
    said = {"prior": Normal().to_config(), "likelihood": likelihood.to_config()}
    found = draws_of(layout, family="mean-field", draws="antithetic", seed=3, tensors=tensors, **said)
    z = torch.randn(size, generator=generator(3, "draw", 2))
    pair = found.several([4, 5])["weight"][:, 0]  # [2, P]
    assert torch.equal(pair[0], z * tensors["scale"] + tensors["loc"])
    assert torch.equal(pair[1], -z * tensors["scale"] + tensors["loc"])


def test_antithetic_draws_are_mirrored_in_pairs() -> None:
    flat, tensors = flat_draws("full-rank", 9, "antithetic")
    off = flat - tensors["loc"]
    torch.testing.assert_close(off[0:8:2], -off[1:8:2], rtol=0, atol=1e-6)
    assert len(off[::2, 0].unique()) == 5


def test_samples_of_the_prior_have_its_spread() -> None:
    """FanIn(1.5) of 5 inputs is a standard deviation of 1.5 / sqrt 5, biases have 0.4; a log-normal noise."""
    module = nn.Linear(5, 3)
    likelihood = Gaussian(LogNormal(0.3, 0.5))
    model = BayesianModel(module, prior=FanIn(1.5, bias_scale=0.4), likelihood=likelihood, num_data=N)
    data = torch.zeros(N, 5), torch.zeros(N, 3)
    bank = bnn.fit(model, data, method=Prior(), num_samples=2000, seed=1, virtual=True)
    block = bank.block(slice(None)).params
    for values, scale in ((block["weight"], 1.5 / 5**0.5), (block["bias"], 0.4)):
        assert stats.kstest(values.flatten().numpy() / scale, "norm").pvalue > 1e-3
    assert stats.kstest((block["@likelihood.scale"].log().numpy() - 0.3) / 0.5, "norm").pvalue > 1e-3


# Length


def test_a_length_costs_nothing_and_changes_no_sample(tmp_path: Path) -> None:
    bank = made(tmp_path / "bank", num_samples=10**9)
    assert isinstance(bank, VirtualBank)
    guide = 2 * 4 * bank.layout.num_values
    assert folder_bytes(tmp_path / "bank") < guide + 16_384
    assert len(bank) == 10**9
    assert int(bank.block([-1]).draw) == 10**9 - 1
    assert bank.log_weight.shape == bank.log_joint.shape == bank.chain.shape == (10**9,)
    few = bank.with_length(S)
    assert (len(few), len(bank)) == (S, 10**9)
    assert few.digest != bank.digest
    assert few.digest == bank.with_length(3).with_length(S).digest
    assert torch.equal(few.draw, torch.arange(S))
    assert_same(few[7], bank[7])
    with pytest.raises(IndexError, match=f"want 0 <= index < {S}"):
        few[S]
    with pytest.raises(IndexError, match=f"want 0 <= index < {S}"):
        few.block([0, S])
    assert len(Bank.open(tmp_path / "bank")) == 10**9  # nothing was written
    assert len(materialise(few, tmp_path / "few")) == S
    assert few.info["virtual"]["length"] == S
    assert len(pickle.loads(pickle.dumps(few))) == S


def test_a_resume_gives_another_length_without_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = made(tmp_path / "bank")

    def no_run(*_: Any, **__: Any) -> Iterator[Any]:
        raise AssertionError("the fit is over")

    monkeypatch.setattr(Guide, "run", no_run)
    for size in (1000, 1000, 4):
        found = made(tmp_path / "bank", num_samples=size, resume=True)
        assert len(found) == len(Bank.open(tmp_path / "bank", verify="full")) == size
        assert_same(found[3], bank[3])
    assert len(bank) == S  # which was opened before
    assert len(bank.refresh()) == 4
    assert len(pickle.loads(pickle.dumps(bank))) == S
    assert_same(pickle.loads(pickle.dumps(bank))[9], bank[9])


@pytest.mark.parametrize("num_samples", [0, -3, 2**48])
def test_a_length_out_of_range_is_refused(num_samples: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"num_samples: want at least 1"):
        made(tmp_path / "bank", num_samples=num_samples)
    assert not (tmp_path / "bank").exists()
    with pytest.raises(ConfigError, match=r"num_samples: want at least 1 and below 2\^48"):
        made(tmp_path / "good").with_length(num_samples)  # type: ignore[attr-defined]


# Resume


@pytest.mark.parametrize("states", [1, 2, 3])
def test_a_fit_that_was_stopped_goes_on_to_the_same_bits(states: int, tmp_path: Path) -> None:
    """In the middle of the fit, and where the guide is done but the bank not complete."""
    method = Guide("low-rank", num_steps=120, batch_size=8, rank=2)

    def cut(producer: Any, *_: Any) -> Iterator[Any]:
        for count, found in enumerate(producer):
            if count == states:
                raise KeyboardInterrupt
            yield found
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bnn.fitting.with_progress", cut)
        with pytest.raises(KeyboardInterrupt):
            made(tmp_path / "cut", method)
    with pytest.raises(BankError, match="want a virtual bank whose fit is finished, got one that is not"):
        Bank.open(tmp_path / "cut")
    model, data = regression()
    with pytest.raises(BankMismatch, match="requires = "):  # as an ordinary bank it cannot go on
        bnn.fit(model, data, method=method, num_samples=S, out=tmp_path / "cut", seed=5, resume=True)
    found, whole = made(tmp_path / "cut", method, resume=True), made(tmp_path / "whole", method)
    assert_same(found.block(slice(None)).params, whole.block(slice(None)).params)
    assert found.digest == whole.digest


# Users of banks


@pytest.fixture
def pair(tmp_path: Path) -> tuple[BayesianModel, Data, Bank, Bank]:
    """A model and its data, a virtual bank and its ordinary one."""
    model, data = classifier()
    bank = bnn.fit(model, data, method=CHEAP, num_samples=S, out=tmp_path / "virtual", virtual=True)
    return model, data, bank, materialise(bank, tmp_path / "plain")


def test_everything_after_the_bank_does_not_know(pair: tuple[BayesianModel, Data, Bank, Bank], tmp_path: Path) -> None:
    model, (x, y), bank, plain = pair
    nets = [bnn.FunctionalModel(model.module, each).settled() for each in (bank, plain)]
    rows = torch.arange(N) % S
    for call in (lambda n: n(x, 3), lambda n: n(x, [9, 0, 4]), lambda n: n(x, slice(1, 8)), lambda n: n(x, rows=rows)):
        assert torch.equal(call(nets[0]), call(nets[1]))
    probs = [bnn.predict(net, x).probs for net in nets]  # type: ignore[union-attr]
    assert torch.equal(*probs)
    early = [bnn.predict(net, x, tolerance=0.05).probs for net in nets]  # type: ignore[union-attr]
    assert torch.equal(*early)
    reports = [bnn.evaluate(net, (x, y)).to_dict()["metrics"] for net in nets]
    assert reports[0] == reports[1]
    students = [
        bnn.distil(model.module, net, (x, y), out=tmp_path / f"student{i}", num_epochs=2, batch_size=5)
        for i, net in enumerate(nets)
    ]
    assert_same(students[0][0], students[1][0])


def test_free_parameters_are_trained_under_it(tmp_path: Path) -> None:
    _, (x, y) = classifier()
    module = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 4))
    model = BayesianModel(module, prior=Normal(), likelihood=Categorical(), num_data=N, bayesian="0")
    bank = bnn.fit(model, (x, y), method=CHEAP, num_samples=S, out=tmp_path / "virtual", virtual=True)
    assert set(bank.base()) == set(module.state_dict()) - {"0.weight", "0.bias"}
    plain = materialise(bank, tmp_path / "plain")
    assert_same(plain.base(), bank.base())
    trained = [
        bnn.train(module, each, (x, y), out=tmp_path / f"free{i}", num_epochs=2, batch_size=5)
        for i, each in enumerate((bank, plain))
    ]
    assert_same(trained[0][0], trained[1][0])


def test_samplers_know_their_bank_again(pair: tuple[BayesianModel, Data, Bank, Bank]) -> None:
    _, _, bank, plain = pair
    positions = np.arange(3 * S)
    for strategy in ("shuffle", "weighted", "stratified"):
        one, other = (bnn.SampleIndexSampler(each, strategy=strategy, seed=4) for each in (bank, plain))  # type: ignore[arg-type]
        assert np.array_equal(one.at(positions), other.at(positions))
    state = bnn.SampleIndexSampler(bank, seed=4).state_dict()
    bnn.SampleIndexSampler(Bank.open(bank.path), seed=4).load_state_dict(state)  # type: ignore[arg-type]
    with pytest.raises(BankMismatch):
        bnn.SampleIndexSampler(bank.with_length(S + 1), seed=4).load_state_dict(state)  # type: ignore[attr-defined]


def test_tools_that_move_rows_make_them(pair: tuple[BayesianModel, Data, Bank, Bank], tmp_path: Path) -> None:
    model, data, bank, plain = pair
    few = [thin(each, tmp_path / f"few{i}", every=3) for i, each in enumerate((bank, plain))]
    assert_same(few[0].block(slice(None)).params, few[1].block(slice(None)).params)
    assert "virtual" not in few[0].info
    other = bnn.fit(model, data, method=CHEAP, num_samples=3, seed=9, virtual=True)
    both = merge([bank, other], tmp_path / "both")
    assert len(both) == S + 3
    assert_same(both[S + 1], other[1])
    assert_same(mean(bank), mean(plain))
    write_state_dict(bank, tmp_path / "one.safetensors", bank[5])
    assert torch.equal(safetensors.torch.load_file(tmp_path / "one.safetensors")["0.bias"], plain[5]["0.bias"])
    with pytest.raises(ConfigError, match="want a virtual bank, got one that keeps its rows"):
        materialise(plain, tmp_path / "again")
    with pytest.raises(ConfigError, match="got the bank itself"):
        materialise(bank, bank.path, overwrite=True)  # type: ignore[arg-type]
    with pytest.raises(BankExists):
        materialise(bank, tmp_path / "both")
    with pytest.raises(BankError, match="want a bank that keeps rows, got a virtual bank"):
        repair(bank.path, tmp_path / "repaired")  # type: ignore[arg-type]
    assert bnn.diagnose(bank).verdict == "not a Markov chain"


def test_it_has_the_interface_of_a_bank(tmp_path: Path) -> None:
    bank = made(tmp_path / "bank")
    public = {name for name in dir(Bank) if not name.startswith("_")}
    assert public - set(dir(bank)) == {"open", "from_blocks", "from_state_dicts"}
    assert isinstance(bank, Bank)
    assert bank.columns == {}
    assert bank.check_headers() == bank.check_values() == []
    bank.release()
    assert len(list(bank)) == S
    assert repr(bank) == f"VirtualBank({tmp_path / 'bank'}: 11 samples of 28 values)"


# What is refused


@pytest.mark.parametrize(
    ("method", "match"),
    [
        (HMC(num_chains=2), r"virtual: want one of the methods prior, mean-field, low-rank, full-rank, got hmc"),
        (Guide("flow"), "got flow; leave virtual out"),
        (Guide("map"), "got map"),
        (Guide("AutoNormal"), "got AutoNormal"),
        (Guide(draws="sobol"), "virtual: want draws that are random or antithetic, got sobol"),
        (Guide(draws="mean"), "got mean"),
    ],
)
def test_methods_without_samples_by_number_are_refused(method: Method, match: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=match):
        made(tmp_path / "bank", method)
    assert not (tmp_path / "bank").exists()


def test_priors_likelihoods_and_writers_that_do_not_go_with_it_are_refused(tmp_path: Path) -> None:
    class Own(Categorical):
        pass

    module, data = nn.Linear(3, 4), (torch.zeros(N, 3), torch.arange(N) % 4)
    options: dict[str, Any] = {"num_samples": 2, "virtual": True}
    skewed = BayesianModel(module, prior=Laplace(), likelihood=Categorical(), num_data=N)
    with pytest.raises(ConfigError, match="prior: want a normal one, Normal or FanIn, got Laplace"):
        bnn.fit(skewed, data, method=Prior(), **options)
    assert len(bnn.fit(skewed, data, method=CHEAP, **options)) == 2  # a guide of it is normal
    own = BayesianModel(module, prior=Normal(), likelihood=Own(), num_data=N)
    with pytest.raises(ConfigError, match="likelihood"):
        bnn.fit(own, data, method=CHEAP, **options)
    with pytest.raises(ConfigError, match="writer: want one for a virtual bank, which has no parts, got b"):
        made(tmp_path / "bank", writer="b")


def state_path(folder: Path) -> Path:
    (path,) = folder.glob("state-*.safetensors")
    return path


def forge(
    folder: Path,
    *,
    bank: dict[str, Any] | None = None,
    state: Callable[[dict[str, Any]], dict[str, Any]] = lambda state: state,
) -> None:
    """Change what `bank.json` and the state say, with all sums that go with them."""
    path, manifest = state_path(folder), folder / "manifest-main.json"
    mapped = files.map_tensors(path)
    kept = fmt.decode_state({n: t.clone() for n, t in mapped.tensors.items()}, mapped.metadata, "state")
    config = edit_json(folder / "bank.json", **(bank or {}))
    tensors, metadata = fmt.encode_state(state(kept), "state")
    metadata |= {"bank": config["checksum"], "writer": "main", "rows": "0"}
    written = files.write_tensors(path, tensors, metadata, sealed=True)
    fact = {"file": path.name, "bytes": written.bytes, "sha256": written.sha256}
    edit_json(manifest, bank=config["checksum"], state=fact)


def test_a_forged_bank_that_says_the_same_opens(tmp_path: Path) -> None:
    """So that what the next test refuses is refused for its reason."""
    bank = made(tmp_path / "bank")
    forge(tmp_path / "bank")
    assert_same(Bank.open(tmp_path / "bank")[2], bank[2])


def changed(**values: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: {**state, **values}


def one_value(name: str, value: float) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(state: dict[str, Any]) -> dict[str, Any]:
        tensor = state[name].clone()
        tensor[3] = value
        return {**state, name: tensor}

    return change


SAID = {"family": "mean-field", "draws": "random"}
MADE = {"cpu": "x", "capability": "y", "torch": 3}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"bank": {"virtual": {**SAID, "family": "flow"}}}, r"family: want one of prior, mean-field.*got 'flow'"),
        ({"bank": {"virtual": {**SAID, "family": "low-rank"}}}, r"tensors: want \['factor', 'loc', 'scale'\]"),
        ({"bank": {"virtual": {**SAID, "family": "prior"}}}, "tensors: want none of a prior"),
        ({"bank": {"virtual": {**SAID, "draws": "sobol"}}}, "draws: want one of random, antithetic, got 'sobol'"),
        ({"bank": {"virtual": None}}, "want an object as 'virtual', and a seed"),
        ({"bank": {"virtual": ["a list"]}}, "want an object or null as 'virtual'"),
        ({"bank": {"seed": "0"}}, "want an object as 'virtual', and a seed"),
        ({"bank": {"prior": {"name": "Strange"}}}, "prior name: want one of Normal"),
        ({"bank": {"prior": {"name": "Normal", "scale": {"name": "Normal"}}}}, "want"),
        ({"bank": {"prior": None}}, "prior"),
        ({"bank": {"likelihood": {"name": "Gaussian", "scale": 1.0}}}, r"layout: want the unknowns \['@prior.scale'\]"),
        ({"state": one_value("loc", float("nan"))}, "loc: want finite values, got NaN or Inf"),
        ({"state": one_value("scale", float("inf"))}, "scale: want finite values, got NaN or Inf"),
        ({"state": one_value("scale", 0.0)}, "scale: want values above 0"),
        ({"state": changed(loc=torch.zeros(27))}, r"loc: want torch.float32 \[28\], got torch.float32 \[27\]"),
        ({"state": changed(loc=torch.zeros(28).double())}, r"loc: want torch.float32 \[28\], got torch.float64 \[28\]"),
        ({"state": changed(more=torch.zeros(2))}, "tensors: want"),
        ({"state": changed(length=0)}, "want length, made and witness of a virtual bank"),
        ({"state": changed(length=True)}, "want length, made and witness"),
        ({"state": changed(length=2**48)}, "want length, made and witness"),
        ({"state": changed(made=MADE)}, "want length, made and witness"),
        ({"state": changed(witness="0")}, "want length, made and witness"),
    ],
)
def test_what_makes_no_samples_is_refused_by_name(change: dict[str, Any], match: str, tmp_path: Path) -> None:
    made(tmp_path / "bank")
    forge(tmp_path / "bank", **change)
    with pytest.raises(BankCorrupt, match=match):
        Bank.open(tmp_path / "bank")


def test_a_changed_guide_is_found_by_its_witness(tmp_path: Path) -> None:
    made(tmp_path / "bank")
    forge(tmp_path / "bank", state=one_value("loc", 0.25))
    with pytest.raises(BankMismatch, match="want sample 0 with the bits that it had, got others on the same"):
        Bank.open(tmp_path / "bank")


def test_every_part_of_the_guides_file_is_covered(tmp_path: Path) -> None:
    made(tmp_path / "bank")
    path = state_path(tmp_path / "bank")
    raw = path.read_bytes()
    for place in (*range(0, 60, 7), 4096 + 1, 4096 + 4 * 28, len(raw) - 2):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 4]) + raw[place + 1 :])
        with pytest.raises(BankCorrupt, match="want the state that the manifest names, got another one"):
            Bank.open(tmp_path / "bank")
        assert verify_files(tmp_path / "bank")
    path.write_bytes(raw[:-5])
    with pytest.raises(BankCorrupt):
        Bank.open(tmp_path / "bank", verify="never")
    path.unlink()
    with pytest.raises(BankCorrupt):
        Bank.open(tmp_path / "bank")


def test_files_of_another_virtual_bank_are_refused(tmp_path: Path) -> None:
    """Of the same length and layout, made with another seed."""
    model, data = regression()
    for seed in (0, 1):
        bnn.fit(model, data, method=CHEAP, num_samples=S, out=tmp_path / f"{seed}", seed=seed, virtual=True)
    mine, theirs = tmp_path / "0", tmp_path / "1"
    state_path(mine).write_bytes(state_path(theirs).read_bytes())
    with pytest.raises(BankCorrupt, match="the state that the manifest names"):
        Bank.open(mine)
    with pytest.raises(BankMismatch, match="want the bank"):
        Bank.open(mine, verify="never")
    (mine / "manifest-main.json").write_bytes((theirs / "manifest-main.json").read_bytes())
    with pytest.raises(BankMismatch):
        Bank.open(mine)


def test_a_bank_that_took_its_place_is_not_opened_again(tmp_path: Path) -> None:
    model, data = regression()
    bank = made(tmp_path / "bank")
    sent = pickle.dumps(bank)
    bnn.fit(model, data, method=CHEAP, num_samples=S, out=tmp_path / "bank", seed=6, virtual=True, overwrite=True)
    for again in (bank.refresh, lambda: pickle.loads(sent)):
        with pytest.raises(BankMismatch, match="want the virtual bank that was opened"):
            again()
    ordinary = bnn.fit(model, data, method=CHEAP, num_samples=S, out=tmp_path / "bank", seed=5, overwrite=True)
    with pytest.raises(BankMismatch, match="want the virtual bank that was opened"):
        pickle.loads(sent)
    sent = pickle.dumps(ordinary)
    made(tmp_path / "bank", overwrite=True)
    with pytest.raises(BankMismatch):
        pickle.loads(sent)


def test_an_older_reader_refuses_it_by_its_feature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path / "bank")
    monkeypatch.setattr(fmt, "FEATURES", frozenset({"columns"}))
    with pytest.raises(BankError, match="got version 2 with virtual; install a newer"):
        Bank.open(tmp_path / "bank")


def test_a_module_of_another_layout_is_refused(tmp_path: Path) -> None:
    bank = made(tmp_path / "bank")
    with pytest.raises(BankMismatch, match="want the layout"):
        bnn.FunctionalModel(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), bank)


# Another machine

ELSEWHERE = {"cpu": "another CPU", "capability": "NEON", "torch": "9.9.0"}


@pytest.mark.parametrize("key", ELSEWHERE)
def test_another_machine_is_refused_unless_it_is_allowed(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = made(tmp_path / "bank")
    here = bank.info["virtual"]["made"]
    monkeypatch.setattr("bnn.bank.virtual.makes_bits", lambda: {**here, key: ELSEWHERE[key]})
    with pytest.raises(
        BankMismatch, match=f"where its samples were made, got .*{ELSEWHERE[key]}.*--allow-other-device"
    ):
        Bank.open(tmp_path / "bank")
    found = Bank.open(tmp_path / "bank", allow_other_device=True)  # without a warning: the bits are the same
    assert_same(found[3], bank[3])
    assert found.digest == bank.digest
    assert_same(pickle.loads(pickle.dumps(found))[3], bank[3])
    monkeypatch.setattr("bnn.bank.virtual.witness", lambda *_: "0" * 64)
    with pytest.warns(OtherDevice, match="samples come out with other bits on"):
        found = Bank.open(tmp_path / "bank", allow_other_device=True)
    assert found.digest != bank.digest
    assert found.check_values() == []  # nothing is damaged
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(Bank.open(tmp_path / "bank", verify="never", allow_other_device=True)) == S


def test_the_witness_is_sample_0(tmp_path: Path) -> None:
    bank = made(tmp_path / "bank")
    raw = b"".join(bank[0][name].numpy().tobytes() for name in bank.layout.names)
    assert bank.info["virtual"]["witness"] == hashlib.sha256(raw).hexdigest()
    assert bank.info["virtual"]["witness"] == witness(bank._draws, bank.layout)  # type: ignore[attr-defined]


# Command line


def test_the_command_line_makes_and_uses_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def run(words: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = cli.run(words.split())
        told = capfd.readouterr()
        return code, told.out, told.err

    fit = "fit --data diabetes --model mlp:3 --method mean-field --num-steps 20 --out v --virtual"
    code, out, _ = run(f"{fit} --num-samples 1000000")
    assert code == 0
    assert "v: 1000000 samples of 38 values, virtual: 152.0 MB if they were kept; made on" in out
    assert "not a Markov chain" in out
    code, out, _ = run(f"{fit} --num-samples 12 --resume")
    assert (code, "v: 12 samples" in out) == (0, True)
    assert run("bank verify v")[0] == run("bank verify v --full")[0] == 0
    assert run("bank info v")[1].startswith("v: 12 samples")
    code, out, _ = run("bank diagnose v --json")
    assert json.loads(out)["verdict"] == "not a Markov chain"
    assert run("bank materialise v --out m")[0] == 0
    assert run("bank verify m --full")[0] == 0
    told = run("evaluate --bank v --bank m")[1]
    (row,) = [line.split() for line in told.splitlines() if line.startswith("rmse")]
    assert len(row) == 9  # its name; value, sign and two errors of each bank
    assert row[1:5] == row[5:]
    assert run("bank thin v --every 2 --out t")[0] == 0
    assert run("bank export v --index 3 --out s.safetensors")[0] == 0
    assert run("bank merge v m --out vm")[0] == 0
    code, _, err = run("bank materialise m --out mm")
    assert (code, "want a virtual bank" in err) == (2, True)
    here = Bank.open("v").info["virtual"]["made"]
    monkeypatch.setattr("bnn.bank.virtual.makes_bits", lambda: {**here, "torch": "9.9.0"})
    for words in ("bank materialise v --out n", "bank thin v --every 2 --out n", "evaluate --bank v"):
        code, _, err = run(words)
        assert (code, "--allow-other-device" in err) == (2, True)
        assert run(f"{words} --allow-other-device")[0] == 0
        if "--out n" in words:
            assert run("bank verify n --full")[0] == 0
            for path in Path("n").iterdir():
                path.unlink()
            Path("n").rmdir()
    assert run("bank info v")[0] == run("bank verify v")[0] == run("bank diagnose v")[0] == 0
    path = state_path(Path("v"))
    path.write_bytes(path.read_bytes()[:-4] + b"\1\2\3\4")
    code, out, _ = run("bank verify v --full")
    assert (code, f"bad: {path.name}" in out) == (1, True)
    with pytest.raises(BnnError):
        Bank.open("v")
