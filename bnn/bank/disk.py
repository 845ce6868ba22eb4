"""Every call that the bank makes to the file system, one a function: tests put faults here, and replay what was lost.

Nothing else in `bnn.bank` touches a file, which a test holds. Errors are the operating system's own (OSError); those
who call say what they mean for a bank.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path


def create(path: Path) -> int:
    """A descriptor to write a new file through, its mode by the umask; links are not followed."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def write(descriptor: int, view: memoryview) -> int:
    """Write some of the bytes; how many is returned."""
    return os.write(descriptor, view)


def write_at(descriptor: int, view: memoryview, offset: int) -> int:
    """Write some of the bytes at a place of the file; how many is returned."""
    return os.pwrite(descriptor, view, offset)


def bypass_cache(descriptor: int, on: bool) -> bool:
    """Whether what is written or read from now on goes without a copy in the page cache, as asked.

    Whole pages only, from page-aligned memory; not every system and file system does it.
    """
    direct = getattr(os, "O_DIRECT", 0)
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | direct if on else flags & ~direct)
    except OSError:  # EINVAL: this file system has no such thing
        return False
    return bool(direct) and on


def fsync(descriptor: int) -> None:
    """Make the bytes of a file durable."""
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: its fsync leaves them in the cache of the drive
        with suppress(OSError):  # a file system without it has fsync alone
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def close(descriptor: int) -> None:
    """Give a descriptor back."""
    os.close(descriptor)


def replace(source: Path, target: Path) -> None:
    """Give a file its name, in place of what had it."""
    os.replace(source, target)


def unlink(path: Path) -> None:
    """Remove a file's name."""
    os.unlink(path)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folders(folder: Path) -> None:
    """Make a folder, and those above it; one that is there is left."""
    os.makedirs(folder, exist_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove an empty folder."""
    os.rmdir(folder)


def names(folder: Path) -> list[str]:
    """What stands in a folder, sorted."""
    return sorted(os.listdir(folder))


def open_read(path: Path) -> int:
    """A descriptor to read through: a link is not followed, and nothing waits for a pipe's other end."""
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def read(descriptor: int, size: int) -> bytes:
    """At most `size` bytes; none at the end."""
    return os.read(descriptor, size)


def read_at(descriptor: int, view: memoryview, offset: int) -> int:
    """Fill some of a view with the bytes from `offset` on; how many is returned, none at the end."""
    return os.preadv(descriptor, [view], offset)


def is_cached(descriptor: int, offset: int) -> bool:
    """Whether a byte of the file is in the page cache; True where that is not told.

    Linux begins to read its page where it is not, so the next answer for it may be another.
    """
    if not hasattr(os, "RWF_NOWAIT"):
        return True
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
    except OSError:  # EOPNOTSUPP: a file system that does not tell
        return True


def memory_bytes() -> int:
    """Memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def status(descriptor: int) -> os.stat_result:
    """Size, kind and times of what is open."""
    return os.fstat(descriptor)


def regular_size(path: Path) -> int | None:
    """The size of a regular file, links not followed; None for anything else and for nothing."""
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def is_folder(path: Path) -> bool:
    """Whether a folder stands there, also by way of a link."""
    return path.is_dir()


def identity(folder: Path) -> tuple[int, int]:
    """By which a folder is known again under whatever name: device and inode."""
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def exists(path: Path) -> bool:
    """Whether anything has that name, a link to nothing too."""
    return os.path.lexists(path)


def free_bytes(folder: Path) -> int:
    """Bytes that the file system of a folder has left for us."""
    return shutil.disk_usage(folder).free


def map_private(descriptor: int, size: int, *, huge: bool = False) -> mmap.mmap:
    """A map in which writes change neither the file nor another process.

    With `huge` what is not in the page cache yet is read into huge pages, where the system and the file system have
    them: one fault then maps 2 MiB.
    """
    mapped = mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY)
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system without them
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return mapped


def blank_pages(size: int) -> mmap.mmap:
    """Page-aligned memory of zeros, this process's own; none of it is taken before it is written to."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def open_lock(path: Path) -> int:
    """A descriptor to lock a file of that name, which is made if missing."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)


def open_folder(folder: Path) -> int:
    """A descriptor to lock a folder by."""
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def lock(descriptor: int, *, wait: bool, shared: bool = False) -> None:
    """Claim a file for this descriptor alone, or together with others that share it, until it is closed or its process ends.

    Raises:
        BlockingIOError: another has it, and `wait` is False.
    """
    fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
