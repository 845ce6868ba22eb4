"""Which commit of a bank a reader has, by which it knows its rows again later and elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from bnn.errors import BankMismatch


class Snapshot(NamedTuple):
    """Which commit of which bank was opened."""

    identity: str | None  # the checksum of bank.json
    marks: dict[str, tuple[int, int]]  # writer -> its generation and number of shards
    digest: str


def as_of(
    snapshot: Snapshot, manifests: list[dict[str, Any]], identity: str | None, folder: Path
) -> list[dict[str, Any]]:
    """Manifests cut back to the shards that a snapshot had.

    Raises:
        BankMismatch: another bank, or an older commit of this one.
    """
    if identity != snapshot.identity:
        raise BankMismatch(
            str(folder), want="the bank that was opened", got="another in its place", fix="open it anew with Bank.open"
        )
    now = {manifest["writer"]: manifest for manifest in manifests}
    for writer, (generation, shards) in snapshot.marks.items():
        found = now[writer]["generation"] if writer in now else -1
        if found < generation or len(now[writer]["shards"]) < shards:
            raise BankMismatch(
                str(folder),
                want=f"generation {generation} of writer '{writer}' at least",
                got=f"{found}" if found >= 0 else "none",
                fix="an older commit was put back: open it anew with Bank.open",
            )
    return [now[w] | {"shards": now[w]["shards"][:shards]} for w, (_, shards) in sorted(snapshot.marks.items())]
