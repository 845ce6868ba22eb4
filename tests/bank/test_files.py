"""Files are written whole, past the page cache where that can be, and with the same bytes where it cannot."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from bank.test_bank import LAYOUT, check, rows

from bnn.bank import Bank, BankWriter, disk, files, verify_files

FACTS = {"a": (torch.float32, (3001, 5)), "b": (torch.float64, (7,))}


def filled() -> files.Image:
    image = files.blank_image(FACTS, {"rows": "3001"})
    for number, tensor in enumerate(image.tensors.values()):
        tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) + number)
    return image


def past_cache(descriptor: int, on: bool) -> bool:
    """What a file system answers that can write past the cache."""
    return on


def written(path: Path, image: files.Image | None) -> tuple[files.Written, bytes]:
    tensors = filled().tensors if image is None else image.tensors
    found = files.write_tensors(path, tensors, {"rows": "3001"}, sealed=True, image=image)
    raw = path.read_bytes()
    assert found.bytes == len(raw)
    assert found.sha256 == hashlib.sha256(raw).hexdigest()
    return found, raw


@pytest.mark.parametrize("how", ["as it is", "refused", "larger pages", "short writes"])
def test_an_image_is_written_with_the_bytes_of_its_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """However the disk takes it: past the cache, or not at all past it, not in such pages, or a part at a time."""
    plain = written(tmp_path / "plain", None)
    monkeypatch.setattr(files, "WRITE_STEP", 16384)
    real, calls = disk.write, list[tuple[int, bool]]()

    def write(descriptor: int, view: memoryview) -> int:
        calls.append((len(view), direct[0]))
        if direct[0] and how == "larger pages":
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if direct[0] and how == "short writes":
            if len(view) % 4096:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return real(descriptor, view[: len(view) - 1000])
        return real(descriptor, view)

    direct = [False]

    def bypass(descriptor: int, on: bool) -> bool:
        direct[0] = on and how != "refused"
        return direct[0]

    if how != "as it is":
        monkeypatch.setattr(disk, "write", write)
        monkeypatch.setattr(disk, "bypass_cache", bypass)
    assert written(tmp_path / "image", filled()) == plain
    if how in ("larger pages", "short writes"):
        assert calls[0] == (16384, True)
        assert not calls[-1][1]


def test_only_whole_pages_go_past_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, sizes, direct = disk.write, dict[bool, list[int]]({True: [], False: []}), [False]

    def write(descriptor: int, view: memoryview) -> int:
        sizes[direct[0]].append(len(view))
        return real(descriptor, view)

    def bypass(descriptor: int, on: bool) -> bool:
        direct[0] = on
        return on

    monkeypatch.setattr(disk, "write", write)
    monkeypatch.setattr(disk, "bypass_cache", bypass)
    _, raw = written(tmp_path / "image", filled())
    assert sizes == {True: [len(raw) // 4096 * 4096], False: [len(raw) % 4096]}


def test_a_disk_that_refuses_past_the_cache_is_told_apart_from_one_that_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EINVAL means another way; anything else is the disk's refusal, and its file is named."""

    def write(descriptor: int, view: memoryview) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(disk, "bypass_cache", past_cache)
    monkeypatch.setattr(disk, "write", write)
    with pytest.raises(files.BankWriteError, match="image: want to write it, got No space left"):
        files.write_tensors(tmp_path / "image", filled().tensors, {}, sealed=True, image=filled())
    assert list(tmp_path.iterdir()) == []


def test_a_header_that_does_not_fit_the_image_is_written_all_the_same(tmp_path: Path) -> None:
    image = filled()
    files.write_tensors(tmp_path / "longer", image.tensors, {"rows": "1" * 5000}, sealed=True, image=image)
    mapped = files.map_tensors(tmp_path / "longer")
    assert all(torch.equal(mapped.tensors[name], image.tensors[name]) for name in FACTS)


def test_full_shards_go_past_the_cache_and_others_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    real = disk.bypass_cache

    def bypass(descriptor: int, on: bool) -> bool:
        if on:
            asked.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        return real(descriptor, on)

    monkeypatch.setattr(disk, "bypass_cache", bypass)
    bank_writer = BankWriter(tmp_path / "bank", layout=LAYOUT, config={})
    bank_writer._capacity = 4
    bank_writer.append(rows(0, 9))
    bank_writer.close()
    assert [Path(path).name.split("-")[1:3] for path in asked] == [
        ["main", "000000.safetensors"],
        ["main", "000001.safetensors"],
    ]
    check(Bank.open(tmp_path / "bank", verify="full"), 9)
    assert verify_files(tmp_path / "bank") == []
