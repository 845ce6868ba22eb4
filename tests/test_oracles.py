"""Libraries that judge ours: CI runs what asks for them by its mark, `oracles`."""

from __future__ import annotations

import re
from pathlib import Path

IN_TEST = {"aiohttp", "arviz", "fsspec", "sklearn", "xarray"}  # the extra `test` brings them, and nothing is skipped


def test_whatever_is_skipped_without_a_library_that_ci_adds_has_the_mark() -> None:
    """A call of its own for another would have neither run: not without the library, and not by the mark."""
    wanted, here = {f'"{name}"' for name in IN_TEST}, Path(__file__).parent
    found = {path: re.findall(r"importorskip\(\s*([^,)]+)", path.read_text("utf-8")) for path in here.rglob("*.py")}
    assert found.pop(here / "conftest.py") == ["name"]  # the fixture
    others = {path.name: asked for path, asked in found.items() if not set(asked) <= wanted}
    assert not others, f"want the fixture `oracle` for these: {others}"
