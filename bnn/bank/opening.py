"""What a bank's folder holds now, or held at a commit: its shards, checked before any is mapped."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bnn.bank import files, remote
from bnn.bank import format as fmt
from bnn.bank.manifests import Described, read_manifests
from bnn.bank.shards import MappedShard, Verify
from bnn.bank.snapshot import Snapshot, as_of
from bnn.bank.verifying import verify_files
from bnn.errors import BankCorrupt, BankMismatch


class Found(NamedTuple):
    """A commit of a bank on disk."""

    shards: list[MappedShard]
    info: dict[str, Any]
    snapshot: Snapshot


def find(
    folder: Path,
    known: tuple[int, int] | None,
    described: Described,
    *,
    verify: Verify,
    snapshot: Snapshot | None,
    source: remote.Source | None,
    prefetch: bool,
) -> Found:
    """The shards that the manifests name now, or as far as a snapshot reached.

    Args:
        folder: of the bank.
        known: by which it was known before `bank.json` was read.
        described: what that says.
        verify: as of `Bank.open`.
        snapshot: of an earlier opening; None for now.
        source: the address that the folder is a cache of.
        prefetch: have all of its shards now.

    Raises:
        BankCorrupt, BankMismatch, BankLimit: as of `Bank.open`.
    """
    config, layout, identity = described.config, described.layout, described.identity
    manifests = read_manifests(folder, described, elsewhere=source.num_shards if source else 0)
    if snapshot is not None:
        manifests = as_of(snapshot, manifests, identity, folder)
    if source is not None:
        remote.have(source, described, manifests, states=verify == "full", prefetch=prefetch)
    row_bytes = described.stored.num_bytes + 8 * len(fmt.column_dtypes(described.columns))
    for fact in described.beside:
        if files.regular_size(folder / fact["file"]) != fact["bytes"]:
            got = "another size, or no regular file"
            raise fmt.corrupt(str(folder / fact["file"]), f"{fact['bytes']} bytes", got)
    shards = []
    for manifest in manifests:
        origin = described.origin(manifest["writer"])
        shards += [MappedShard(folder / fact["file"], fact, origin, verify, known) for fact in manifest["shards"]]
    if source is not None:
        for shard, fact in zip(shards, (fact for m in manifests for fact in m["shards"]), strict=True):
            shard.fetch = partial(source.fetch, fact)
    for shard in shards:
        size = files.regular_size(shard.path)
        if shard.fetch is not None and size != shard.bytes:
            size = shard.bytes  # it comes when it is touched
        if size != shard.bytes or size < shard.rows * row_bytes:
            got = f"{size} bytes" if size is not None else "no regular file"
            raise fmt.corrupt(str(shard.path), f"{shard.bytes} bytes for {shard.rows} rows", got)
    files.check_same(folder, known)
    if verify == "full":
        problems = verify_files(folder)
        if problems:
            raise BankCorrupt(
                str(folder),
                want="the bytes of its manifests",
                got=problems[0],
                fix="restore the file from a copy, or make the bank again",
            )
    facts = [layout.fingerprint, *(f["sha256"] for m in manifests for f in m["shards"])]
    facts += [] if described.coding is None else [described.coding.sha256]
    info = {
        **config,
        "complete": bool(manifests) and all(m["complete"] for m in manifests),
        "resumable": _is_resumable(config, manifests),
        "diagnostics": {m["writer"]: m["info"] for m in manifests},
    }
    digest = hashlib.sha256("".join(facts).encode()).hexdigest()
    if snapshot is not None and digest != snapshot.digest:
        raise BankMismatch(
            str(folder), want="the rows that were opened", got="others", fix="open it anew with Bank.open"
        )
    marks = {m["writer"]: (m["generation"], len(m["shards"])) for m in manifests}
    return Found(shards, info, Snapshot(identity, marks, digest))


def _is_resumable(config: Mapping[str, Any], manifests: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a fit can go on behind the rows of every writer: a state follows them, or there are none yet."""
    is_copy = any(key in config for key in ("thinned", "merged", "compacted", "lost", "codec"))
    return not is_copy and all(m["state"] is not None or not m["rows"] for m in manifests)
