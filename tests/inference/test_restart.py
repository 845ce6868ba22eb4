"""Runs of HMC that are killed, grow, or last long: the bank is that of one unbroken run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from memory import PEAK
from scenarios import classifier

from bnn.bank import Bank, writer
from bnn.errors import FitError
from bnn.fitting import fit
from bnn.inference import chains
from bnn.inference.chains import COLUMNS
from bnn.inference.hmc import HMC, sample
from bnn.inference.starting import CLIMB_STEPS
from bnn.seeding import generator
from bnn.tracing import has_compiler

CLIMBS = CLIMB_STEPS // 50  # turns of the climb, after each of which there is a state
TESTS = str(Path(__file__).parents[1])

# Forks a fit a turn, and kills it without warning after so many of its steps and a moment more.
KILLED = """
import json, os, signal, sys, time, warnings
folder, tests, told = sys.argv[1:]
sys.path.insert(0, tests)
told = json.loads(told)
# Or each fit starts processes that import torch: to compile in, and to try the instructions that the CPU says it has.
os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_VEC_ISA_OK": "1"}
import torch
torch.set_num_threads(1)
from scenarios import classifier
import bnn.fitting as fitting
from bnn.bank import writer
from bnn.inference.hmc import HMC

writer.ROW_SECONDS = writer.STATE_SECONDS = told["commit"]


def fit(report):
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}-cache-{os.getpid()}"  # what is compiled is compiled anew
    shown = fitting.with_progress

    def reporting(run, title, progress):
        for pair in shown(run, title, progress):
            yield pair
            os.write(report, b".")

    fitting.with_progress = reporting
    model, data = classifier()
    resume = os.path.exists(folder + "/bank.json")
    fitting.fit(model, data, method=HMC(**told["options"]), num_samples=told["num_samples"], out=folder, seed=told["seed"], resume=resume)


ends = []
for steps, moment in [*told["kills"], (10**9, 0.0)]:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            fit(write)
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    os.close(write)
    while steps > 0 and os.read(read, 1):
        steps -= 1
    time.sleep(moment)
    if steps == 0:
        os.kill(child, signal.SIGKILL)
    os.close(read)
    ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    rows = [json.load(open(folder + "/manifest-main.json"))["rows"]] if os.path.exists(folder + "/manifest-main.json") else [0]
    ends.append(rows[0])
print(json.dumps(ends))
"""


def options_of(**more: Any) -> dict[str, Any]:
    return {"num_chains": 3, "num_warmup": 45, "num_steps": 3, "rank": 2, "compile": False} | more


def assert_same_bank(found: Bank, expected: Bank) -> None:
    assert len(found) == len(expected)
    a, b = found.block(slice(None)), expected.block(slice(None))
    for name, tensor in b.params.items():
        assert torch.equal(a.params[name], tensor), name
    for name in ("chain", "draw", "log_joint", "log_weight"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert sorted(a.columns) == sorted(COLUMNS)
    for name in COLUMNS:
        assert torch.equal(a.columns[name], b.columns[name]), name


def killed(
    folder: Path, options: dict[str, Any], num_samples: int, kills: list[tuple[int, float]], commit: float
) -> list[int]:
    """Exit codes and committed rows, one after the other, of fits that are killed and of the last one, which is not."""
    told = {"options": options, "num_samples": num_samples, "kills": kills, "commit": commit, "seed": 7}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), TESTS, json.dumps(told)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ends: list[int] = json.loads(done.stdout)
    assert ends[-2] == 0, done.stderr
    return ends


def moments_of(num_kills: int, num_steps: int, seed: int) -> list[tuple[int, float]]:
    """Steps of the run and seconds after which it is killed, again and again; drawn, but the same each time."""
    source = generator(seed, "kills")
    steps = torch.randint(1, num_steps, (num_kills,), generator=source).tolist()
    return list(zip(steps, (0.004 * torch.rand(num_kills, generator=source)).tolist(), strict=True))


def test_a_fit_killed_in_climb_warm_up_and_sampling_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    """45 steps of warm-up and 24 of sampling come after the climb; each kill leaves what had been committed before it."""
    options = options_of(trajectory="chees", mass="low-rank", thin=3)
    ends = killed(tmp_path / "bank", options, 24, [(3, 0.0), (CLIMBS + 14, 0.002), (40, 0.001), (6, 0.0)], 0.0)
    assert ends[0::2] == [-9, -9, -9, -9, 0]
    rows = ends[1::2]
    assert rows == sorted(rows)
    assert rows[1] == 0 < rows[3] < 24 == rows[4]
    model, data = classifier()
    unbroken = fit(model, data, method=HMC(**options), num_samples=24, seed=7)
    assert_same_bank(Bank.open(tmp_path / "bank"), unbroken)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "trajectory", "mass", "thin"),
    [  # every two of them meet
        (0, "fixed", "diagonal", 1),
        (1, "fixed", "low-rank", 3),
        (2, "jittered", "low-rank", 1),
        (3, "jittered", "diagonal", 3),
        (4, "chees", "diagonal", 1),
        (5, "chees", "low-rank", 3),
    ],
)
def test_fits_killed_at_any_moment_end_as_unbroken_ones(
    tmp_path: Path, number: int, trajectory: str, mass: str, thin: int
) -> None:
    """With a commit at every step, or only now and then, so that a kill costs steps that are then done again."""
    options = options_of(trajectory=trajectory, mass=mass, thin=thin)
    kills = moments_of(
        8, (CLIMBS + 45 + 10 * thin) // 4, number
    )  # of steps so few that four of them do not reach the end
    ends = killed(tmp_path / "bank", options, 30, kills, 0.0 if number % 2 else 0.02)
    assert ends.count(-9) >= 3
    model, data = classifier()
    unbroken = fit(model, data, method=HMC(**options), num_samples=30, seed=7)  # type: ignore[arg-type]
    assert_same_bank(Bank.open(tmp_path / "bank"), unbroken)


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(torch.device("cpu")), reason="no C++ compiler for torch.compile")
def test_a_compiled_fit_that_is_killed_compiles_again_and_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    options = options_of(trajectory="chees", compile=True)
    ends = killed(tmp_path / "bank", options, 24, [(CLIMBS + 49, 0.001)], 0.0)  # in sampling
    assert ends[0::2] == [-9, 0]
    assert 0 < ends[1] < 24
    killed(tmp_path / "unbroken", options, 24, [], 0.0)
    assert_same_bank(Bank.open(tmp_path / "bank"), Bank.open(tmp_path / "unbroken"))
    model, data = classifier()
    traced = fit(model, data, method=HMC(**options | {"compile": False}), num_samples=24, seed=7)
    first = Bank.open(tmp_path / "bank").log_joint[:3]
    torch.testing.assert_close(first, traced.log_joint[:3], rtol=0.5, atol=20.0)  # another rounding, the same target


@pytest.mark.parametrize(("trajectory", "mass", "thin"), [("jittered", "diagonal", 1), ("chees", "low-rank", 3)])
def test_a_bank_that_grows_is_that_of_a_fit_that_was_asked_for_all_at_once(
    tmp_path: Path, trajectory: str, mass: str, thin: int
) -> None:
    model, data = classifier()
    method = HMC(**options_of(trajectory=trajectory, mass=mass, thin=thin))
    few = fit(model, data, method=method, num_samples=9, out=tmp_path / "bank", seed=7)
    assert len(few) == 9
    assert few.info["complete"]
    for total in (12, 24):
        grown = fit(model, data, method=method, num_samples=total, out=tmp_path / "bank", seed=7, resume=True)
        assert len(grown) == total
    at_once = fit(model, data, method=method, num_samples=24, seed=7)
    assert_same_bank(grown, at_once)
    assert grown.draw.tolist() == [draw for draw in range(8) for _ in range(3)]


def test_rows_and_the_state_of_a_fit_that_is_interrupted_go_on(tmp_path: Path) -> None:
    """Ctrl-C in the middle of sampling: what has come is committed, and the rest is as it would have been."""
    model, data = classifier()
    method = HMC(**options_of(thin=2))
    count = 0

    def interrupting(run: Any, title: str, progress: bool | None) -> Any:
        nonlocal count
        for pair in run:
            count += 1
            if count == CLIMBS + 45 + 7:
                raise KeyboardInterrupt
            yield pair

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bnn.fitting.with_progress", interrupting)
        with pytest.raises(KeyboardInterrupt):
            fit(model, data, method=method, num_samples=24, out=tmp_path / "bank", seed=7)
    assert len(Bank.open(tmp_path / "bank")) == 9  # three draws of three chains
    found = fit(model, data, method=method, num_samples=24, out=tmp_path / "bank", seed=7, resume=True)
    assert_same_bank(found, fit(model, data, method=method, num_samples=24, seed=7))


def test_a_recorded_plan_is_kept_when_a_fit_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the rule decided stays decided, also where more memory or another rule would now decide otherwise."""
    model, data = classifier(num_rows=60)
    method = HMC(**options_of(num_warmup=30, init="prior", memory=9_000))
    monkeypatch.setattr(writer, "STATE_SECONDS", 0.0)
    states = [state for _, state in method.run(model, data, num_samples=6, seed=7)]
    assert states[0]["plan.slices"] > 1
    plan = {name: states[0][name] for name in ("plan.mode", "plan.slices", "plan.threads")}
    monkeypatch.setattr("bnn.inference.density._num_slices", lambda *_: 1)
    monkeypatch.setattr("bnn.inference.density.WORTH_COMPILING", 0.0)
    monkeypatch.setattr("bnn.inference.density.ONE_THREAD", 0.0)
    rest = list(method.run(model, data, num_samples=6, seed=7, state=states[20]))
    assert {name: rest[-1][1][name] for name in plan} == plan
    assert torch.equal(rest[-1][1]["at.flat"], states[-1]["at.flat"])


def test_the_rule_of_compiling_counts_the_draws_asked_for_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many draws are worth a compilation that few are not; a bank that grows keeps what was decided at its beginning."""
    asked: list[int] = []
    inner = chains.prepare

    def prepare(*args: Any, **options: Any) -> Any:
        asked.append(options["num_gradients"])
        return inner(*args, **options)

    monkeypatch.setattr(chains, "prepare", prepare)
    monkeypatch.setattr("bnn.inference.density.has_compiler", lambda device: True)
    monkeypatch.setattr("bnn.inference.density.compiled", lambda graph, tensors, number: graph)
    model, data = classifier()
    method = HMC(**options_of(init="prior", num_warmup=30, thin=2, compile=None))

    def mode_of(num_samples: int) -> str:
        _, state = next(iter(method.run(model, data, num_samples=num_samples, seed=7)))
        return str(state["plan.mode"])

    mode_of(30)
    mode_of(300)
    sample(lambda u: -u.square().sum(), torch.zeros(3, 2), num_draws=5, num_warmup=7, thin=4, num_steps=3)
    assert asked == [(30 + 10 * 2) * 3, (30 + 100 * 2) * 3, (7 + 5 * 4) * 3]
    monkeypatch.setattr("bnn.inference.density.WORTH_COMPILING", 1.0)  # second
    assert (mode_of(3), mode_of(300_000)) == ("traced", "compiled")
    few = list(method.run(model, data, num_samples=3, seed=7))
    grown = method.run(model, data, num_samples=300_000, seed=7, state=few[-1][1])
    assert next(iter(grown))[1]["plan.mode"] == "traced"
    many = method.run(model, data, num_samples=300_000, seed=7, state={**few[-1][1], "plan.mode": "compiled"})
    assert next(iter(many))[1]["plan.mode"] == "compiled"


def test_a_fit_that_cannot_go_on_keeps_what_was_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = classifier()
    method = HMC(**options_of())
    monkeypatch.setattr(writer, "ROW_SECONDS", 0.0)

    def failing(run: Any, title: str, progress: bool | None) -> Any:
        for pair in run:
            if pair[1]["step"] == CLIMB_STEPS + 45 + 4:
                raise FitError("HMC", want="a", got="b", fix="c")
            yield pair

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bnn.fitting.with_progress", failing)
        with pytest.raises(FitError):
            fit(model, data, method=method, num_samples=24, out=tmp_path / "bank", seed=7)
    whole = fit(model, data, method=method, num_samples=24, seed=7)
    kept = Bank.open(tmp_path / "bank")
    assert len(kept) == 9
    assert torch.equal(kept.log_joint, whole.log_joint[:9])
    found = fit(model, data, method=method, num_samples=24, out=tmp_path / "bank", seed=7, resume=True)
    assert_same_bank(found, whole)


LONG = (
    PEAK
    + """
import sys
import torch
torch.set_num_threads(1)
from torch import nn
from bnn import likelihoods, priors
from bnn.bank import writer
from bnn.fitting import fit
from bnn.inference.hmc import HMC
from bnn.model import BayesianModel

writer.ROW_SECONDS = 0.2
module = nn.Sequential(nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1))
model = BayesianModel(module, prior=priors.Normal(0.0, 0.1), likelihood=likelihoods.Gaussian(1.0), num_data=20)
data = torch.zeros(20, 50), torch.zeros(20, 1)
method = HMC(num_chains=5, num_warmup=5, num_steps=1, step_size=0.1, init="prior", compile=False)
before = peak()
bank = fit(model, data, method=method, num_samples=int(sys.argv[2]), out=sys.argv[1])
print(len(bank) * bank.layout.num_bytes, peak() - before)
"""
)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_draws(tmp_path: Path) -> None:
    """Eight times the draws, 80 MiB of them, in a process of its own each: what it holds at most stays the same."""
    held = []
    for number in (1000, 8000):
        words = [sys.executable, "-c", LONG, str(tmp_path / str(number)), str(number)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        held.append([int(word) for word in done.stdout.split()])
    (few_rows, few), (many_rows, many) = held
    assert many_rows > 75 * 2**20
    assert many - few < 0.25 * (many_rows - few_rows)
