"""Files at an address, by fsspec: what stands there, and their bytes in steps. Nothing here writes."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

from bnn.bank import files
from bnn.bank import format as fmt
from bnn.errors import BankCorrupt, BankError, BankLimit, ConfigError

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://")
MAX_ADDRESS = 2048


def is_address(path: object) -> bool:
    """Whether a path is an address, `scheme://...`, rather than a folder here."""
    return isinstance(path, str) and ADDRESS.match(path) is not None


def check_address(address: str) -> None:
    """Raise ConfigError for an address to which no name of a file can be put."""
    if len(address) > MAX_ADDRESS or re.search(r"[?#\s]", address):
        raise ConfigError(
            shown(address),
            want="an address without query, fragment or blanks",
            got="one with them",
            fix="give keys to fsspec by its own configuration",
        )


def shown(address: str) -> str:
    """An address as it may stand in a message: without name and password, query and fragment."""
    scheme, _, rest = address.partition("://")
    rest = re.split(r"[?#]", rest)[0]
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"[:MAX_ADDRESS]


def _connect(address: str) -> tuple[Any, str, dict[str, Any]]:
    """fsspec's file system of an address, the path in it, and options to read a file from first byte to last."""
    scheme = address.partition("://")[0].lower()
    try:
        from fsspec.core import url_to_fs

        there, root = url_to_fs(address)
    except ImportError as error:
        raise ConfigError(
            shown(address), want=f"fsspec, and its package for {scheme}://", got=str(error)[:200],
            fix="pip install 'bnn-toolkit[remote]'; s3:// wants s3fs, gs:// gcsfs",
        ) from error  # fmt: skip
    except ValueError as error:
        raise ConfigError(
            shown(address), want="a scheme that fsspec knows", got=str(error)[:200], fix="check the address"
        ) from error
    # A file in one request, since not every server gives parts of one.
    return there, root.rstrip("/"), {"block_size": 0} if scheme in ("http", "https") else {}


def pieces(address: str, name: str, limit: int) -> Iterator[bytes]:
    """The bytes of a file at the address in steps; of one longer than `limit` no more than a step beyond.

    Raises:
        BankError: it is not there, or cannot be read. Never OSError, which would be taken for the cache's disk.
    """
    there, root, options = _connect(address)
    place, total = f"{shown(address)}/{name}", 0
    try:
        with there.open(f"{root}/{name}", "rb", **options) as file:
            while total <= limit and (piece := file.read(files.READ_STEP)):
                total += len(piece)
                yield piece
    except BankError:
        raise
    except Exception as error:  # every file system has errors of its own
        cause = error.__cause__ or error  # fsspec calls a server that cannot be reached a file that is not found
        if isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) in (404, 410):
            raise BankCorrupt(
                place, want="the file", got="nothing there", fix="check the address; or restore the file there"
            ) from error
        raise BankError(
            place, want="to read it", got=_told(cause, address), fix="check network and permission, try again"
        ) from error


def _told(error: BaseException, address: str) -> str:
    """An error of a file system, without what the address keeps secret."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return shown(address).join(text.split(address))[:200]


def read_small(address: str, name: str, limit: int) -> bytes:
    """A file at the address, of at most `limit` bytes."""
    raw = b"".join(pieces(address, name, limit))
    if len(raw) > limit:
        raise fmt.too_large(f"{shown(address)}/{name}", f"at most {limit} bytes", "more")
    return raw


def listed(address: str) -> tuple[list[str], int]:
    """Names of the manifests at the address, and how many shards stand there.

    A web server may list nothing: then the writer `main` is asked for, as most banks have it, with a warning.
    """
    there, root, options = _connect(address)
    is_web = "block_size" in options
    try:
        there.invalidate_cache(root)
        found = [str(name) for name in there.ls(f"{root}/" if is_web else root, detail=False)]
    except Exception as error:  # as above
        if not is_web:
            raise BankError(
                shown(address),
                want="to list it",
                got=_told(error, address),
                fix="check network and permission, try again",
            ) from error
        found = []
    names = {name.rstrip("/").rpartition("/")[2] for name in found}
    manifests = sorted(name for name in names if fmt.MANIFEST_NAME.fullmatch(name))
    num_shards = sum(fmt.SHARD_NAME.fullmatch(name) is not None for name in names)
    if len(manifests) > fmt.MAX_WRITERS:
        raise BankLimit(
            shown(address), want=f"manifests of at most {fmt.MAX_WRITERS} writers", got=f"{len(manifests)}",
            fix="fill several banks and merge them",
        )  # fmt: skip
    if not manifests and is_web and "bank.json" not in names:
        warnings.warn(
            f"{shown(address)}: the server lists no files: rows of the writer 'main' are read, not of others there may be",
            stacklevel=5,
        )
        return ["manifest-main.json"], 1000
    return manifests, num_shards
