"""The file of a shard read into memory, piece by piece and by any thread, instead of mapped."""

from __future__ import annotations

import errno
import random
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bnn.bank import disk, files
from bnn.bank import format as fmt
from bnn.bank.shards import MappedShard, check_shard
from bnn.errors import BankError

PIECE_BYTES = 4 * 1024 * 1024  # read at once: below a MiB the disk waits for calls, above 8 the threads for each other
PROBES = 4  # places of a shard by which it is judged to be in the page cache
ANYWHERE = random.SystemRandom()  # on which nothing but the way of reading depends


class Known(NamedTuple):
    """What is known of the file that was read last: one that took its place is checked anew."""

    file: tuple[int, int, int]  # device, inode, time of its last change
    places: Mapping[str, fmt.Place]
    checked: frozenset[str]  # tensors whose crc32 was compared


class ShardFile:
    """The bytes of one shard: where its tensors lie in them, and whether they are those of the manifest.

    Offsets in memory are those in the file, so that what is aligned there is aligned here.
    """

    def __init__(self, shard: MappedShard) -> None:
        self.shard, self.rows, self.size = shard, shard.rows, shard.bytes
        # Replaced as a whole and without a lock, which a fork could find taken for good: at worst a sum is made twice.
        self._known: Known | None = None
        self._was_read = False

    def descriptor(self) -> int:
        """A descriptor of the file, which has the size of the manifest.

        Raises:
            BankCorrupt: it is missing, cut, or no regular file.
            BankMismatch: another folder has its name now.
            BankLimit: no descriptor is left.
        """
        if self.shard.fetch is not None:
            self.shard.fetch()
        path = self.shard.path
        descriptor, size = files.open_regular(path)
        try:
            if size != self.size:
                raise fmt.corrupt(str(path), f"{self.size} bytes", f"{size}")
            files.check_same(path.parent, self.shard.folder)
            status = disk.status(descriptor)
            file = status.st_dev, status.st_ino, status.st_mtime_ns
            if self._known is None or self._known.file != file:
                self._learn(descriptor, file)
        except BaseException as error:
            disk.close(descriptor)
            if isinstance(error, OSError):
                raise files.unreadable(path, error) from error
            raise
        return descriptor

    def spare_cache(self, descriptor: int, *, always: bool) -> None:
        """Let whole pages that are not in the page cache be read past it: now, or `always`, also when it is read again.

        That saves a copy, and drives nobody's files out of memory for a bank that is read once. What is read a second
        time goes through the cache, in which it then is where there is room.
        """
        if self._was_read and not always:
            return
        self._was_read = True
        places = (ANYWHERE.randrange(self.size) for _ in range(PROBES))  # others each time: asking leaves pages there
        if not all(disk.is_cached(descriptor, place) for place in places):
            disk.bypass_cache(descriptor, True)

    def read(self, descriptor: int, view: memoryview, offset: int) -> None:
        """Fill a view with the bytes from `offset` on; those of the page behind the end of the file are left.

        Raises:
            BankCorrupt: the file ends before, or the disk cannot read it.
        """
        done, size, is_told = 0, min(len(view), self.size - offset), False
        while done < size:
            try:
                count = disk.read_at(descriptor, view[done:], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or is_told:
                    raise files.unreadable(self.shard.path, error) from error
                is_told = True  # past the cache it must be other pieces, here or after a short read
                disk.bypass_cache(descriptor, False)
                continue
            if not count:
                raise fmt.corrupt(str(self.shard.path), f"{self.size} bytes", f"{offset + done}")
            done += count

    @property
    def places(self) -> Mapping[str, fmt.Place]:
        """Where each tensor lies, from the start of the file; known once it was opened."""
        assert self._known is not None
        return self._known.places

    def check(self, view: memoryview) -> None:
        """Compare all tensors of a file in memory with their crc32, unless that was done before.

        Raises:
            BankCorrupt: other bytes than the manifest says.
        """
        known = self._known
        assert known is not None
        if not self.shard.verify:
            return
        names = [name for name in known.places if not name.startswith("@pad.") and name not in known.checked]
        for name in names:
            place = known.places[name]
            self.shard.check_crc32(name, zlib.crc32(view[place.begin : place.end]))
        if self._known is known:
            self._known = known._replace(checked=known.checked | set(names))

    def column(self, name: str) -> Tensor:
        """One tensor [R, *shape] in memory of its own, read alone."""
        descriptor = self.descriptor()
        try:
            known = self._known
            assert known is not None
            place = known.places[name]
            tensor = torch.empty(place.shape, dtype=place.dtype)
            view = memoryview(fmt.tensor_bytes(tensor)) if tensor.numel() else memoryview(b"")
            self.read(descriptor, view, place.begin)
        finally:
            disk.close(descriptor)
        if self.shard.verify and name not in known.checked:
            self.shard.check_crc32(name, zlib.crc32(view))
        return tensor

    def _learn(self, descriptor: int, file: tuple[int, int, int]) -> None:
        """Read the header and check it as that of a shard that is mapped."""
        shard, place = self.shard, str(self.shard.path)
        expected = shard.origin.tensors(shard.rows)
        most, head = fmt.header_limit(expected), bytearray(8)
        self.read(descriptor, memoryview(head), 0)
        length = int.from_bytes(head, "little")
        if length <= most:  # a longer one is refused below, by what it says of itself
            head = bytearray(min(8 + length, self.size))
            self.read(descriptor, memoryview(head), 0)
        places, metadata = fmt.decode_header(memoryview(head), self.size, place, max_header=most)
        for name, where in places.items():
            if where.end > where.begin and where.begin % where.dtype.itemsize:
                raise fmt.corrupt(place, f"tensor '{name}' at a multiple of its width", f"byte {where.begin}")
        found = {name: (where.dtype, where.shape) for name, where in places.items()}
        check_shard(shard.path, shard.origin, found, metadata, rows=shard.rows, first_row=shard.first_row)
        if shard.verify and shard.origin.bank is not None:
            shard.check_crc32(fmt.HEADER, zlib.crc32(head))
        self._known = Known(file, places, frozenset())


def tensors_of(flat: Tensor, places: Mapping[str, fmt.Place], names: Iterable[str]) -> dict[str, Tensor]:
    """Views [R, *shape] of tensors in the bytes of a file, uint8 on any device."""
    found = {}
    for name in names:
        place = places[name]
        here = flat[place.begin : place.end] if place.end > place.begin else flat.new_empty(0)
        found[name] = here.view(place.dtype).view(place.shape)
    return found


def read_whole(file: ShardFile, view: memoryview) -> None:
    """Fill memory with a whole file, checked.

    Raises:
        BankError: the file is not what the manifest says.
    """
    descriptor = file.descriptor()
    try:
        for start in range(0, file.size, PIECE_BYTES):
            file.read(descriptor, view[start : min(start + PIECE_BYTES, file.size)], start)
    finally:
        disk.close(descriptor)
    file.check(view)


def streamable(shards: Sequence[object], place: str) -> list[ShardFile]:
    """The files of shards whose bytes are their values.

    Raises:
        BankError: a shard is of another kind.
    """
    found = []
    for shard in shards:
        if not isinstance(shard, MappedShard):
            raise BankError(
                place,
                want="shards that hold their values as they are",
                got=type(shard).__name__,
                fix="open it with residency='mapped' or 'host'",
            )
        found.append(ShardFile(shard))
    return found
