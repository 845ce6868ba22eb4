"""The files of a bank against what `bank.json` and its manifests say of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bnn.bank import files
from bnn.bank import format as fmt
from bnn.bank.manifests import read_config, read_manifests
from bnn.errors import BankError


def unnamed_shards(folder: Path) -> list[str]:
    """Shards that no manifest names though their writer has one: a crash leaves some, which nothing reads."""
    manifests = {manifest["writer"]: manifest["shards"] for manifest in read_manifests(folder, read_config(folder))}
    named = {fact["file"] for shards in manifests.values() for fact in shards}
    matches = [match for match in map(fmt.SHARD_NAME.fullmatch, files.names(folder)) if match]
    return [match.group() for match in matches if match.group(1) in manifests and match.group() not in named]


def lost_shards(folder: Path) -> list[str]:
    """One line for each shard whose writer has no manifest: that is written before the first shard, so it was lost."""
    there = files.names(folder)
    shards = [match for match in map(fmt.SHARD_NAME.fullmatch, there) if match]
    there = files.names(folder)  # again: whoever has a shard had a manifest before
    writers = {match.group(1) for match in map(fmt.MANIFEST_NAME.fullmatch, there) if match}
    lost = [match for match in shards if match.group(1) not in writers]
    return [
        f"{match.group()}: manifest-{match.group(1)}.json, which named it, is gone; 'bnn bank repair' adopts it"
        for match in lost
    ]


def wrong_sizes(folder: Path) -> list[str]:
    """One line for each base, codec or state that has not the size that `bank.json` or its manifest says."""
    described = read_config(folder)
    problems = [line for fact in described.beside for line in _of_other_size(folder, fact)]
    for manifest in read_manifests(folder, described):
        state = manifest["state"]
        while state is not None and (found := _of_other_size(folder, state)):
            now = {m["writer"]: m["state"] for m in read_manifests(folder, described)}.get(manifest["writer"])
            if now == state:
                problems += found
                break
            state = now  # its writer has committed since and removed the old one
    return problems


def _of_other_size(folder: Path, fact: Mapping[str, Any]) -> list[str]:
    size = files.regular_size(folder / fact["file"])
    if size == fact["bytes"]:
        return []
    return [f"{fact['file']}: {'no regular file' if size is None else f'{size} bytes'} instead of {fact['bytes']}"]


def verify_files(folder: Path, progress: Callable[[int, int], object] | None = None) -> list[str]:
    """Compare every committed file with its sha256; one line a file that differs, or that no manifest is left to name.

    Args:
        folder: of the bank.
        progress: told after each step how many bytes are read, and how many there are.
    """
    described = read_config(folder)
    manifests = read_manifests(folder, described)
    done, total = 0, sum(fact["bytes"] for manifest in manifests for fact in manifest["shards"])

    def told(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(min(done, total), total)

    problems = _differing(folder, described.beside, told)
    for manifest in manifests:
        problems += _differing(folder, manifest["shards"], told)
        state, found = manifest["state"], list[str]()
        while state is not None and (found := _differing(folder, [state], told)):
            now = {m["writer"]: m["state"] for m in read_manifests(folder, described)}.get(manifest["writer"])
            if now == state:
                break
            state = now  # its writer has committed since and removed the old one
        problems += found
    return problems + lost_shards(folder)


def _differing(folder: Path, facts: Sequence[dict[str, Any]], told: Callable[[int], object]) -> list[str]:
    """One line for each file that is not what its fact says."""
    problems = []
    for fact in facts:
        try:
            if files.sha256_of(folder / fact["file"], told) != fact["sha256"]:
                problems.append(f"{fact['file']}: other bytes than the manifest says")
        except BankError as error:
            problems.append(f"{fact['file']}: {error.got}")
    return problems
