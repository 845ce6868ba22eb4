"""File work of the bank: atomic writes, safe opening, mapping, locks."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import stat
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bnn.bank import format as fmt
from bnn.errors import BankLocked, BankWriteError

READ_STEP = 8 * 1024 * 1024


class Written(NamedTuple):
    """What the manifest keeps of a file."""

    bytes: int
    sha256: str
    crc32: dict[str, int]


def write_atomic(path: Path, chunks: Iterable[memoryview | bytes]) -> tuple[int, str]:
    """Write a file so that its name never shows anything but the whole: temporary name, fsync, rename, fsync.

    Returns:
        The number of bytes and their sha256.

    Raises:
        BankWriteError: the disk refused; the temporary file is gone.
    """
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    digest, size = hashlib.sha256(), 0
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            for chunk in chunks:
                view = memoryview(chunk)
                digest.update(view)
                size += len(view)
                while view:
                    view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise BankWriteError(
                str(path),
                want="to write it",
                got=os.strerror(error.errno or errno.EIO),
                fix="free space or permissions, then go on with resume",
            ) from error
        raise
    return size, digest.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Written:
    """Write a safetensors file with aligned tensors, atomically."""
    header, places = fmt.encode_header({n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, metadata)
    size, sha256 = write_atomic(path, fmt.chunks_of(header, places, tensors))
    return Written(size, sha256, {name: zlib.crc32(fmt.tensor_bytes(tensor)) for name, tensor in tensors.items()})


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str | None:
    """The sha256 that `write_tensors` would give for these tensors without metadata; None for no tensors."""
    if not tensors:
        return None
    header, places = fmt.encode_header({n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, {})
    digest = hashlib.sha256()
    for chunk in fmt.chunks_of(header, places, tensors):
        digest.update(chunk)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: Path) -> tuple[int, int]:
    """A descriptor of a regular file and its size; links, devices and pipes are refused.

    Raises:
        BankCorrupt: the file is missing or no regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise fmt.corrupt(str(path), "a regular file", os.strerror(error.errno or errno.EIO)) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise fmt.corrupt(str(path), "a regular file", "a folder, device or pipe")
    return descriptor, status.st_size


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file of bounded size."""
    descriptor, size = open_regular(path)
    with os.fdopen(descriptor, "rb") as file:
        if size > fmt.MAX_JSON_BYTES:
            raise fmt.corrupt(str(path), f"at most {fmt.MAX_JSON_BYTES} bytes", f"{size}")
        return fmt.parse_json(file.read(), str(path))


def sha256_of(path: Path) -> str:
    """The sha256 of a file, read in steps."""
    descriptor, _ = open_regular(path)
    digest = hashlib.sha256()
    with os.fdopen(descriptor, "rb") as file:
        while piece := file.read(READ_STEP):
            digest.update(piece)
    return digest.hexdigest()


class MappedFile(NamedTuple):
    """A mapped safetensors file: views of its tensors, and the map they look into."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    map: mmap.mmap

    def release(self) -> None:
        """Give the pages back to the page cache: views stay valid and are read again when touched."""
        if hasattr(self.map, "madvise"):
            self.map.madvise(mmap.MADV_DONTNEED)

    def crc32(self, name: str) -> int:
        """The checksum of a tensor's bytes; read in steps, so that a large one does not fill the memory."""
        view, found = fmt.tensor_bytes(self.tensors[name]), 0
        for start in range(0, len(view), READ_STEP):
            found = zlib.crc32(view[start : start + READ_STEP], found)
            self.release()
        return found


def map_tensors(path: Path, expected_size: int | None = None) -> MappedFile:
    """Map a safetensors file: tensors are views of it, nothing is copied.

    The map is private: a write into a view changes neither the file nor another process.

    Raises:
        BankCorrupt: the file is cut, altered or of another size than `expected_size`.
    """
    descriptor, size = open_regular(path)
    try:
        if size < 8 or (expected_size is not None and size != expected_size):
            raise fmt.corrupt(str(path), f"{expected_size or 'at least 8'} bytes", f"{size}")
        mapped = mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY)
    finally:
        os.close(descriptor)
    with memoryview(mapped) as view:
        places, metadata = fmt.decode_header(view, size, str(path))
    tensors = {}
    for name, place in places.items():
        count = (place.end - place.begin) // place.dtype.itemsize
        if count == 0 or place.begin % place.dtype.itemsize:
            if count:
                raise fmt.corrupt(str(path), f"tensor '{name}' at a multiple of its width", f"byte {place.begin}")
            tensors[name] = torch.empty(place.shape, dtype=place.dtype)
        else:
            flat = torch.frombuffer(mapped, dtype=place.dtype, count=count, offset=place.begin)
            tensors[name] = flat.view(place.shape)
    return MappedFile(tensors, metadata, mapped)


class Lock:
    """The claim of one writer name in one bank, held until closed or until the process ends."""

    def __init__(self, folder: Path, writer: str) -> None:
        self.path = folder / f"lock-{writer}"
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._descriptor)
            raise BankLocked(
                str(folder),
                want=f"the writer name '{writer}' to be free",
                got="another process writing",
                fix="wait for it to end, or write under another name",
            ) from error

    def close(self) -> None:
        os.close(self._descriptor)
