"""Banks that somebody has altered on purpose: sealed again, so that only the check in question can find it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bnn.bank import files
from bnn.bank import format as fmt


def edit_json(path: Path, **changes: Any) -> dict[str, Any]:
    """Change keys of `bank.json` or a manifest, with the checksum that goes with them."""
    config = fmt.seal({**json.loads(path.read_text()), **changes}, path.name)
    path.write_text(json.dumps(config))
    return config


def edit_fact(folder: Path, number: int = 0, writer: str = "main", **changes: Any) -> None:
    """Change what a manifest says of one shard."""
    path = folder / f"manifest-{writer}.json"
    shards = json.loads(path.read_text())["shards"]
    shards[number] |= changes
    edit_json(path, shards=shards)


def replace_tensors(folder: Path, tensors: dict[str, Any], *, number: int = 0, metadata: dict[str, str]) -> None:
    """Put a shard of these tensors and metadata in place of one, with sums in the manifest that fit it."""
    path = folder / f"main-{number:06d}.safetensors"
    written = files.write_tensors(path, tensors, metadata, sealed=True)
    edit_fact(folder, number, **written._asdict())
