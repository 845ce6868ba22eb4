"""The command line on several ranks: rank 0 speaks, and for the others too."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bnn.distributed import Ranks

VERBS = ("fit", "train", "evaluate", "predict")  # whose work is split over ranks
ALIKE_SECONDS = 2.0  # in which rank 0 meets an error that all ranks have


class Voice:
    """What a rank puts before its messages, and whether it has any."""

    prefix = ""
    silent = False


VOICE = Voice()


@contextmanager
def on_ranks(arguments: list[str]) -> Iterator[None]:
    """Meet the other ranks for a verb that is split over them; without torchrun, and for other verbs, nothing."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1" or arguments[:1] not in [[verb] for verb in VERBS]
    if alone or {"--help", "--print-config"} & set(arguments):
        yield
        return
    from bnn.distributed import joined

    VOICE.prefix = f"rank {os.environ.get('RANK')}: "
    with joined() as together:
        said: list[str] = []
        before = warnings.showwarning

        def collect(message: Warning | str, *rest: object, **options: object) -> None:
            said.append(str(message))
            if together.rank == 0:
                before(message, *rest, **options)  # type: ignore[arg-type]

        VOICE.prefix = f"rank {together.rank}: " if together.rank else ""
        warnings.showwarning = collect
        try:
            yield
            together.post(f"warnings/{together.rank}", json.dumps(said))
            together.wait()
        except BaseException as error:
            VOICE.silent = _is_said(error, together)
            if together.rank and not VOICE.silent:
                _tell(said, before)
            raise
        finally:
            warnings.showwarning = before
        if together.rank == 0:
            _tell(_of_others(said, together), before)


def _is_said(error: BaseException, together: Ranks) -> bool:
    """Whether rank 0 says the same for all. It stays a while, for those who ask: the meeting place may end with it."""
    interrupted = isinstance(error, KeyboardInterrupt)  # which rank 0 says for all, unasked
    if together.rank and interrupted:
        return True
    others = range(1, together.world_size)
    with suppress(RuntimeError):
        together.post(f"error/{together.rank}", str(error))
        end = time.monotonic() + ALIKE_SECONDS
        while time.monotonic() < end and not interrupted:
            said = together.posted("error/0")
            if together.rank and said is not None:
                together.post(f"heard/{together.rank}", "")
                return said == str(error)
            if together.rank == 0 and all(together.posted(f"heard/{rank}") is not None for rank in others):
                break
            time.sleep(0.02)
    return False


def _of_others(own: list[str], together: Ranks) -> list[str]:
    """Warnings of other ranks that this one has not met, with the first rank that has."""
    found: dict[str, str] = dict.fromkeys(own, "")
    for rank in range(1, together.world_size):
        for text in json.loads(together.posted(f"warnings/{rank}") or "[]"):
            found.setdefault(text, f"rank {rank}: {text}")
    return [told for told in found.values() if told]


def _tell(texts: list[str], show: object) -> None:
    for text in texts:
        show(UserWarning(text), UserWarning, "", 0)  # type: ignore[operator]
