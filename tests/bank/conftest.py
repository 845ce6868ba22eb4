"""A process apart, for what a test cannot do in its own: forks, kills, limits and other users."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

TESTS = str(Path(__file__).parents[1])


@pytest.fixture(scope="session")
def alone() -> Iterator[Callable[..., Any]]:
    """`alone(function, *args)`: its result, from a fresh fork of a process with one thread that has torch loaded.

    Arguments and result are plain values; an error there is an AssertionError here, with its traceback.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    code = f"import sys; sys.path.insert(0, {TESTS!r}); import disk_faults; disk_faults.serve()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def call(function: Callable[..., Any], *args: Any, limit: float = 100.0) -> Any:
            module = f"bank.{Path(function.__code__.co_filename).stem}"
            order = {"module": module, "function": function.__name__, "args": args, "limit": limit}
            print(json.dumps(order, default=str), file=process.stdin, flush=True)
            ready, _, _ = select.select([process.stdout], [], [], limit + 30)
            assert ready, f"{function.__name__} did not come back"
            answer = json.loads(process.stdout.readline())
            assert "error" not in answer, answer["error"]
            return answer["result"]

        yield call
        process.stdin.close()
