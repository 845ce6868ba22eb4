"""A bar of a producer's own steps on stderr, one a phase."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from bnn.types import State

Found = TypeVar("Found")


def with_progress(
    run: Iterable[tuple[Found, State]], title: str, progress: bool | None
) -> Iterator[tuple[Found, State]]:
    """The run itself, with a bar on stderr: steps done and to do, steps a second, time left, and the state's `info`.

    A state that names a phase, `{"name", "step", "num_steps"}`, gets a bar a phase: warm-up and sampling have
    speeds of their own. A phase with `"thin"` keeps one draw of so many steps, and its bar counts those.

    Args:
        run: pairs of anything and the state that follows it.
        title: stands before the bar.
        progress: whether to show it; None where stderr is a terminal.
    """
    bar: tqdm | None = None
    shown = ""
    try:
        for found, state in run:
            phase = state.get("phase") or {"name": "", "step": state["step"], "num_steps": state["num_steps"]}
            step, num_steps = (phase[name] // phase.get("thin", 1) for name in ("step", "num_steps"))
            if bar is None or phase["name"] != shown:
                if bar is not None:
                    bar.close()
                shown = phase["name"]
                unit = "draw" if "thin" in phase else "step"
                bar = _bar(f"{title} {shown}".strip(), progress, unit, initial=max(step - 1, 0))
            bar.total = num_steps
            bar.update(step - bar.n)
            bar.set_postfix({key: f"{value:.3g}" for key, value in state["info"].items()}, refresh=False)
            yield found, state
    finally:
        if bar is not None:
            bar.close()


def _bar(title: str, progress: bool | None, unit: str, *, initial: int) -> tqdm:
    """A bar that counts speed from the step at which this run began."""
    return tqdm(desc=title, initial=initial, unit=unit, delay=1.0, disable=None if progress is None else not progress)
