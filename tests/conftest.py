"""Fixtures that every test may use, and the watch over the world's state."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyro
import pytest
import torch

from bnn.seeding import derive

# Small tensors: a second thread costs more than it brings, and more still beside other processes.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start


@pytest.fixture(autouse=True)
def own_streams(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test starts from global random states of its own, so that none depends on those before it."""
    # Not `isolated`, which holds the lock on global state: threads that a test starts would wait for its end.
    seed = derive(0, request.node.nodeid)
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        yield
    np.random.set_state(numpy_state)  # noqa: NPY002
    random.setstate(python_state)


@pytest.fixture
def world_untouched() -> Iterator[None]:
    """Fail a test after which the global random states or Pyro's store are not what they were before it."""
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    store = dict(pyro.get_param_store().items())
    yield
    assert torch.equal(before[0], torch.get_rng_state()), "torch's global random state was touched"
    assert np.array_equal(before[1], np.random.get_state()[1]), "NumPy's global random state was touched"  # noqa: NPY002
    assert before[2] == random.getstate(), "Python's global random state was touched"
    assert dict(pyro.get_param_store().items()) == store, "Pyro's parameter store was touched"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Each device; cuda is skipped where there is none."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture
def oracle() -> Callable[..., Any]:
    """Import a library that judges ours and that tests do without, or skip; whatever asks for this is marked `oracles`."""

    def load(name: str, exc_type: type[ImportError] = ModuleNotFoundError) -> Any:
        reason = f"{name.partition('.')[0]} is not here, which is an oracle: see .ci/run"
        return pytest.importorskip(name, reason=reason, exc_type=exc_type)

    return load


def pytest_itemcollected(item: pytest.Item) -> None:
    if "oracle" in getattr(item, "fixturenames", ()):
        item.add_marker("oracles")


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Say a figure that is to stand at the end of the tests' output, also when they run in several processes."""
    return lambda text: request.node.user_properties.append(("told", text))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The figures that tests told: kills survived, states replayed, banks mutated."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    for report in reports:
        for key, text in report.user_properties:
            if key == "told":
                terminalreporter.write_line(f"{report.nodeid.split('::')[-1]}: {text}")
