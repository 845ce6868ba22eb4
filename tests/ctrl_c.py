"""Ctrl-C where Python takes notice of it: before the first line of a function, and after a call of C.

Python also does so where loops go back, and inside of calls that wait, which are not tried here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from inspect import isgenerator
from types import FrameType
from typing import Any, NamedTuple
from unittest import mock

NOTICED = ("call", "c_return")


class Swallowed(AssertionError):
    """A Ctrl-C after which the work went on as if nothing had been."""


class Came(NamedTuple):
    """What became of a Ctrl-C."""

    where: str | None  # None where the work has fewer places
    out: bool  # whether it came out of the work
    elsewhere: bool  # where an object of others died, out of which nothing comes


def everywhere(attempt: Callable[[], Callable[[], object]], *, every: int = 1) -> Iterator[str]:
    """Run what `attempt` prepares again and again, with Ctrl-C at one place more each time, until none is left.

    Yields where it came, after each, for the caller to look at what it left; what comes out must be KeyboardInterrupt.
    Of many places only each `every`th is taken.
    """
    place = 1
    while (came := _interrupted(attempt(), place)).where is not None:
        if came.out:
            yield came.where
        elif not came.elsewhere:
            raise Swallowed(came.where)
        place += every


def _interrupted(run: Callable[[], object], place: int) -> Came:
    seen, where, told, failed = 0, None, list[Any](), list[Any]()

    def look(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal seen, where
        if event in NOTICED:
            seen += 1
        if event in NOTICED and seen == place:
            sys.setprofile(None)
            called = getattr(argument, "__qualname__", "")
            where = f"{frame.f_code.co_qualname}:{frame.f_lineno} {called}"
            raise KeyboardInterrupt

    def unraisable(what: Any) -> None:  # of what runs where objects die, and of threads
        (told if what.exc_type is KeyboardInterrupt else failed).append(what)

    with mock.patch.object(sys, "unraisablehook", unraisable):
        sys.setprofile(look)
        try:
            run()
        except KeyboardInterrupt:
            return Came(where, True, False)
        finally:
            sys.setprofile(None)
            assert not failed, (where, failed[0].exc_value)
    # A generator that dies is closed, of which a profile takes notice, and Ctrl-C does not where it has nothing to do.
    died = told[0].object if told else None
    closed = isgenerator(died) and died.__name__ == "<genexpr>"
    return Came(where, False, closed or not getattr(died, "__module__", "bnn").startswith("bnn"))
