"""What tests of the command line share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bnn.cli import run


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Callable[[str], tuple[int, str, str]]:
    """Run a command line: exit code, stdout, stderr."""

    def run_line(words: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = run(words.split())
        found = capfd.readouterr()
        return code, found.out, found.err

    return run_line


@pytest.fixture
def bnn_run(
    call: Callable[[str], tuple[int, str, str]], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], tuple[int, str, str]]:
    """Run a command line in an empty folder with links to what `made` holds: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return call
