"""Files of the bank: written whole or not at all, opened with suspicion, mapped without copies."""

from __future__ import annotations

import errno
import hashlib
import math
import mmap
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import torch
from torch import Tensor

from bnn.bank import disk
from bnn.bank import format as fmt
from bnn.beside import Threads
from bnn.errors import BankError, BankLimit, BankLocked, BankMismatch, BankWriteError

READ_STEP = 8 * 1024 * 1024
TEMPORARY_NAME = re.compile(r"\.tmp-(.+)-[0-9]+")  # of the file that it becomes, and of the process
WRITE_STEP = 8 * 1024 * 1024
BESIDE_BYTES = 1024 * 1024  # from which on a piece is worth a thread that sums it


class Written(NamedTuple):
    """What the manifest keeps of a file."""

    bytes: int
    sha256: str
    crc32: dict[str, int]


class Image(NamedTuple):
    """The bytes of a safetensors file in page-aligned memory, its tensors views of where they will lie in it."""

    raw: mmap.mmap
    start: int  # of the data: the length of the header, which is written in last
    tensors: dict[str, Tensor]


def blank_image(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> Image:
    """Memory for a sealed file of such tensors; a header longer than that of these metadata does not fit it."""
    longest = fmt.seal_tensors(metadata, dict.fromkeys(tensors, 2**32 - 1))
    header, places = fmt.encode_header(tensors, longest)
    raw = disk.blank_pages(max(len(header), *(place.end for place in places.values())))
    views = {}
    for name, (dtype, shape) in tensors.items():
        count, begin = math.prod(shape), places[name].begin
        flat = torch.frombuffer(raw, dtype=dtype, count=count, offset=begin) if count else torch.empty(0, dtype=dtype)
        views[name] = flat.view(shape)
    return Image(raw, len(header), views)


def write_atomic(path: Path, chunks: Iterable[memoryview | bytes], *, direct: bool = False) -> tuple[int, str]:
    """Write a file so that its name never shows anything but the whole: temporary name, fsync, rename, fsync.

    With `direct` whole pages go past the page cache where the system can: the chunks are page-aligned, each but the
    last a multiple of the page long.

    Returns:
        The number of bytes and their sha256.

    Raises:
        BankWriteError: the disk refused; the temporary file is gone.
    """
    total, size = _Sum(), 0
    with _replacing(path) as descriptor:
        past_cache = direct and disk.bypass_cache(descriptor, True)
        try:
            for chunk in chunks:
                for start in range(0, len(whole := memoryview(chunk)), WRITE_STEP):
                    view = whole[start : start + WRITE_STEP]
                    total.add(view)
                    size += len(view)
                    past_cache = _write_all(descriptor, view, past_cache)
                    if not direct:  # a chunk made as it is asked for is let go before the next
                        total.settle()
        finally:
            total.end()
    return size, total.digest.hexdigest()


class _Sum:
    """The sha256 of pieces in their order; of large ones it is taken by a thread, while the disk takes them."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()  # of all pieces, once they are settled
        self._threads: Threads | None = None
        self._summed: SimpleQueue[None] = SimpleQueue()
        self._waiting = 0

    def add(self, piece: memoryview) -> None:
        if len(piece) < BESIDE_BYTES:
            self.settle()
            self.digest.update(piece)
            return
        if self._threads is None:
            self._threads = Threads()
        self._waiting += 1
        self._threads.give(lambda: self._take(piece))

    def _take(self, piece: memoryview) -> None:
        self.digest.update(piece)
        self._summed.put(None)

    def settle(self) -> None:
        """Wait for the thread."""
        while self._waiting:
            self._summed.get()
            self._waiting -= 1

    def end(self) -> None:
        """After this all pieces are settled, and the thread is gone."""
        if self._threads is not None:
            self._threads.end()


def write_places(path: Path, pieces: Iterable[tuple[int, memoryview | bytes]]) -> None:
    """Write a file whose pieces come in any order, each with its place, as `write_atomic` does: whole or not at all.

    Bytes that no piece covers are zeros.

    Raises:
        BankWriteError: the disk refused; the temporary file is gone.
    """
    with _replacing(path) as descriptor:
        for offset, piece in pieces:
            view = memoryview(piece)
            while view:
                done = disk.write_at(descriptor, view, offset)
                view, offset = view[done:], offset + done


@contextmanager
def _replacing(path: Path) -> Iterator[int]:
    """A descriptor of a new file that takes the name `path`, durably, when all went well; else nothing is left of it."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        descriptor = disk.create(temporary)
        try:
            yield descriptor
            disk.fsync(descriptor)
        finally:
            disk.close(descriptor)
        disk.replace(temporary, path)
        disk.sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):  # gone already, or on a disk that takes nothing any more
            disk.unlink(temporary)
        if isinstance(error, OSError):
            raise refused(path, error) from error
        raise


def _write_all(descriptor: int, view: memoryview, past_cache: bool) -> bool:
    """Write all of a piece; whether the next may go past the page cache still."""
    if past_cache and len(view) % mmap.PAGESIZE:
        if whole := len(view) // mmap.PAGESIZE * mmap.PAGESIZE:
            past_cache = _write_all(descriptor, view[:whole], past_cache)
            view = view[whole:]
        past_cache = past_cache and disk.bypass_cache(descriptor, False)
    while view:
        try:
            view = view[disk.write(descriptor, view) :]
        except OSError as error:
            if not past_cache or error.errno != errno.EINVAL:
                raise
            past_cache = disk.bypass_cache(descriptor, False)  # a disk of larger pages, or a write that was cut short
    return past_cache


def refused(path: Path, error: OSError) -> BankWriteError:
    """The error for a disk that does not take a write."""
    return BankWriteError(
        str(path),
        want="to write it",
        got=os.strerror(error.errno or errno.EIO),
        fix="make room or get the permission, and run it again; a fit goes on with resume",
    )


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    sealed: bool = False,
    image: Image | None = None,
    crc32: Mapping[str, int] | None = None,
) -> Written:
    """Write a safetensors file with aligned tensors, atomically.

    With `sealed` its metadata hold the crc32 of every tensor, so that it can be checked without a manifest. Where
    `tensors` are all of an image, the file is written from that as it lies. `crc32` are theirs, where they are known.
    """
    crc32 = crc32_of(tensors) if crc32 is None else crc32
    if sealed:
        metadata = fmt.seal_tensors(metadata, crc32)
    header, places = fmt.encode_header({n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, metadata)
    if len(header) > fmt.MAX_HEADER_BYTES:
        raise BankLimit(
            str(path),
            want=f"a header of at most {fmt.MAX_HEADER_BYTES} bytes, as readers take",
            got=f"{len(header)}",
            fix="make fewer parameters Bayesian, or keep less beside tensors in a state",
        )
    if image is not None and len(header) == image.start:
        image.raw[: image.start] = header
        size, sha256 = write_atomic(path, [memoryview(image.raw)], direct=True)
    else:
        size, sha256 = write_atomic(path, fmt.chunks_of(header, places, tensors))
    return Written(size, sha256, {**crc32, fmt.HEADER: zlib.crc32(header)})


def crc32_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The checksum of the bytes of each tensor."""
    return {name: zlib.crc32(fmt.tensor_bytes(tensor)) for name, tensor in tensors.items()}


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str | None:
    """The sha256 that `write_tensors` would give for these tensors without metadata; None for no tensors."""
    if not tensors:
        return None
    header, places = fmt.encode_header({n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, {})
    digest = hashlib.sha256()
    for chunk in fmt.chunks_of(header, places, tensors):
        digest.update(chunk)
    return digest.hexdigest()


def open_regular(path: Path) -> tuple[int, int]:
    """A descriptor of a regular file and its size; links, devices and pipes are refused.

    Raises:
        BankCorrupt: the file is missing or no regular file.
        BankLimit: the process has no descriptor left.
    """
    try:
        descriptor = disk.open_read(path)
        try:
            status = disk.status(descriptor)
        except OSError:
            disk.close(descriptor)
            raise
    except OSError as error:
        raise unreadable(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        disk.close(descriptor)
        raise fmt.corrupt(str(path), "a regular file", "a folder, device or pipe")
    return descriptor, status.st_size


def unreadable(path: Path, error: OSError) -> BankError:
    """The error for a file that cannot be opened or read: its fault, or the process's."""
    told = os.strerror(error.errno or errno.EIO)
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return BankLimit(str(path), want="a file descriptor", got=told, fix="raise 'ulimit -n', or open fewer banks")
    if error.errno in (errno.EACCES, errno.EPERM):
        return BankError(str(path), want="to read it", got=told, fix="ask its owner for the permission")
    return fmt.corrupt(str(path), "a regular file that can be read", told)


def names(folder: Path) -> list[str]:
    """What stands in a folder, sorted.

    Raises:
        BankCorrupt: it cannot be read; or BankLimit, where the process has no descriptor left.
    """
    try:
        return disk.names(folder)
    except OSError as error:
        raise unreadable(folder, error) from error


def identity(folder: Path) -> tuple[int, int] | None:
    """By which a folder is known again under whatever name; None where there is none."""
    try:
        return disk.identity(folder)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unreadable(folder, error) from error


def check_same(folder: Path, known: tuple[int, int] | None) -> None:
    """Raise BankMismatch where another folder has the name now: half of one bank and half of another would be read."""
    if identity(folder) != known:
        raise BankMismatch(
            str(folder),
            want="the folder that was opened",
            got="another in its place",
            fix="open it anew with Bank.open",
        )


def regular_size(path: Path) -> int | None:
    """The size of a regular file; None for anything else and for nothing.

    Raises:
        BankCorrupt: the disk does not tell.
    """
    try:
        return disk.regular_size(path)
    except OSError as error:
        raise unreadable(path, error) from error


def _pieces(path: Path, descriptor: int) -> Iterable[bytes]:
    """The bytes of a file in steps."""
    try:
        while piece := disk.read(descriptor, READ_STEP):
            yield piece
    except OSError as error:
        raise unreadable(path, error) from error


def read_json(path: Path, limit: int = fmt.MAX_JSON_BYTES) -> dict[str, object]:
    """A JSON object from a file of bounded size.

    Raises:
        BankCorrupt: the file is no such object.
        BankLimit: it is larger than `limit` bytes; nothing of it is read.
    """
    descriptor, size = open_regular(path)
    try:
        if size > limit:
            raise fmt.too_large(str(path), f"at most {limit} bytes", f"{size}")
        return fmt.parse_json(b"".join(_pieces(path, descriptor)), str(path))
    finally:
        disk.close(descriptor)


def sha256_of(path: Path, told: Callable[[int], object] = lambda size: None) -> str:
    """The sha256 of a file, read in steps; `told` gets the bytes of each."""
    descriptor, _ = open_regular(path)
    digest = hashlib.sha256()
    try:
        for piece in _pieces(path, descriptor):
            digest.update(piece)
            told(len(piece))
    finally:
        disk.close(descriptor)
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
        """The checksum of a tensor's bytes, or of the header; in steps, so that a large one does not fill the memory."""
        if name == fmt.HEADER:
            return zlib.crc32(self.map[: 8 + int.from_bytes(self.map[:8], "little")])
        view, found = fmt.tensor_bytes(self.tensors[name]), 0
        for start in range(0, len(view), READ_STEP):
            found = zlib.crc32(view[start : start + READ_STEP], found)
            self.release()
        return found


def map_tensors(
    path: Path, expected_size: int | None = None, *, max_header: int = fmt.MAX_HEADER_BYTES, huge: bool = False
) -> MappedFile:
    """Map a safetensors file: tensors are views of it, nothing is copied.

    The map is private: a write into a view changes neither the file nor another process. With `huge` it is read from the
    disk in huge pages.

    Raises:
        BankCorrupt: the file is cut, altered or of another size than `expected_size`.
        BankLimit: its header is longer than `max_header` bytes, or the process has no descriptor left.
    """
    descriptor, size = open_regular(path)
    try:
        if size < 8 or (expected_size is not None and size != expected_size):
            raise fmt.corrupt(str(path), f"{expected_size or 'at least 8'} bytes", f"{size}")
        mapped = disk.map_private(descriptor, size, huge=huge)
    except OSError as error:
        raise unreadable(path, error) from error
    finally:
        disk.close(descriptor)
    with memoryview(mapped) as view:
        places, metadata = fmt.decode_header(view, size, str(path), max_header=max_header)
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
    """The claim of one writer name in one bank, held until closed or until the process ends.

    Raises:
        BankLocked: another has it.
        BankWriteError: the folder takes no lock.
    """

    def __init__(self, folder: Path, writer: str) -> None:
        self.path, self._process = folder / f"lock-{writer}", os.getpid()
        self._descriptor: int | None = None
        try:
            descriptor = disk.open_lock(self.path)
        except OSError as error:
            raise refused(self.path, error) from error
        try:
            disk.lock(descriptor, wait=False)
        except BlockingIOError as error:
            disk.close(descriptor)
            raise BankLocked(
                str(folder),
                want=f"the writer name '{writer}' to be free",
                got="another process writing",
                fix="wait for it to end, or write under another name",
            ) from error
        except OSError as error:
            disk.close(descriptor)
            raise refused(self.path, error) from error
        self._descriptor = descriptor

    @property
    def is_ours(self) -> bool:
        """Whether it was this process that claimed it, and not one that this is a fork of."""
        return self._process == os.getpid()

    def check(self) -> None:
        """Raise BankLocked after the claim was given up, and in a fork of the process that has it."""
        if self._descriptor is None:
            raise BankLocked(
                str(self.path.parent),
                want="a writer that has its name still",
                got="one that gave it free",
                fix="make another with resume=True",
            )
        if not self.is_ours:
            raise BankLocked(
                str(self.path.parent),
                want=f"the process {self._process}, which has the writer",
                got="a fork of it",
                fix="write from that process, or under another name",
            )

    def close(self) -> None:
        """Give the claim up; once more does nothing."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            disk.close(descriptor)
