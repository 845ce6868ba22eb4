"""Where ranks meet: a store of torch.distributed that is not waited for without end."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from typing import Any, cast


class Meeting:
    """The store where ranks meet, with an end to the waiting for its answers.

    torch's own waits for the answer to a request until the system gives the connection up: a quarter of an hour where a
    link is cut or a host loses its power.

    Args:
        store: of torch.distributed.
        limit: seconds; once an answer has taken longer, all further requests are refused at once.
    """

    def __init__(self, store: Any, limit: float) -> None:
        self._store, self.limit, self._lost = store, limit, False

    def set(self, name: str, text: str) -> None:
        self._answer(self._store.set, name, text)

    def get(self, name: str) -> bytes:
        return cast(bytes, self._answer(self._store.get, name))

    def check(self, names: list[str]) -> bool:
        return bool(self._answer(self._store.check, names))

    def add(self, name: str, number: int) -> int:
        return int(self._answer(self._store.add, name, number))

    def _answer(self, ask: Callable[..., Any], *arguments: Any) -> Any:
        found: list[Any] = []
        failed: list[RuntimeError] = []

        def asked() -> None:
            try:
                found.append(ask(*arguments))
            except RuntimeError as error:
                failed.append(error)

        if not self._lost:
            asking = threading.Thread(target=asked, daemon=True, name="bnn-meeting")
            asking.start()
            asking.join(self.limit)
            if not (found or failed):
                self._lost = True  # never again otherwise: a late answer to another thread is no sign of life
        if failed:
            raise failed[0]
        if not found:
            raise RuntimeError("no answer from where the ranks meet: its host, or the link to it, is gone")
        return found[0]


def agree(store: Any, rank: int, world_size: int, timeout: float) -> str:
    """A name that the ranks of this start share, and those of earlier ones in the same store do not.

    torchrun may keep its store from start to start, with addresses of processes that are gone. Each rank says
    hello by a name of its own; rank 0 tells whom it has heard, until all have answered to that.
    """
    own, end = os.urandom(8).hex(), time.monotonic() + timeout

    def read(key: str) -> str:
        return str(store.get(key).decode()) if store.check([key]) else ""

    heard = {0: own}
    store.set(f"hello/{rank}", own)
    while time.monotonic() < end:
        if rank == 0:
            for other in range(1, world_size):
                heard[other] = read(f"hello/{other}")
            store.set("round", json.dumps({"name": own, "heard": heard}))
            if all(read(f"answer/{other}") == f"{own}/{heard[other]}" for other in range(1, world_size)):
                return own
        elif told := read("round"):
            facts = json.loads(told)
            if facts["heard"].get(str(rank)) == own:
                answer = f"{facts['name']}/{own}"
                store.set(f"answer/{rank}", answer)
                return str(facts["name"])
        time.sleep(0.02)
    raise RuntimeError(f"not all {world_size} ranks came")
