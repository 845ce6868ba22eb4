"""The bytes of a bank file: alignment, equal content in equal bytes, and refusal of what the format forbids."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bnn.bank import files
from bnn.bank import format as fmt
from bnn.errors import BankCorrupt, BankError, ConfigError

DTYPES = list(fmt.DTYPE_CODES)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 7), max_size=4)), min_size=1, max_size=8))
def test_round_trip_is_aligned_and_read_by_plain_safetensors(
    tmp_path_factory: pytest.TempPathFactory, facts: list[tuple[torch.dtype, list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("format") / "x.safetensors"
    source = torch.Generator().manual_seed(len(facts))
    tensors = {
        f"t{i}.ü": torch.randint(0, 2, shape, generator=source).to(dtype) for i, (dtype, shape) in enumerate(facts)
    }
    written = files.write_tensors(path, tensors, {"b": "2", "a": "1"})
    assert written.bytes == path.stat().st_size
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    assert (8 + length) % 4096 == 0
    header = json.loads(raw[8 : 8 + length])
    for name in tensors:
        assert (8 + length + header[name]["data_offsets"][0]) % 256 == 0
    plain = safetensors.torch.load_file(path)
    mapped = files.map_tensors(path).tensors
    for name, tensor in tensors.items():
        assert torch.equal(plain[name], tensor)
        assert torch.equal(mapped[name], tensor)
        assert mapped[name].dtype == tensor.dtype


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    tensors = {"w": torch.arange(12.0).view(3, 4), "b": torch.ones(3, dtype=torch.float16)}
    first = files.write_tensors(tmp_path / "1", tensors, {"b": "2", "a": "1", "c": "3"})
    second = files.write_tensors(tmp_path / "2", tensors, {"c": "3", "a": "1", "b": "2"})
    assert first == second
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def chunks():
        yield b"half"
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        files.write_atomic(tmp_path / "x", chunks())
    assert list(tmp_path.iterdir()) == []


def test_files_have_the_mode_of_the_umask(tmp_path: Path) -> None:
    files.write_atomic(tmp_path / "x", [b"1"])
    (tmp_path / "plain").touch()
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "plain").stat().st_mode


def encode(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligned, so that a file is refused for its own defect and not for odd bytes
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BAD_FILES = {
    "empty": b"",
    "shorter than its length field": b"\x01\x00",
    "header longer than the file": struct.pack("<Q", 2**40) + b"{}",
    "header length overflows": struct.pack("<Q", 2**64 - 1) + b"{}",
    "not UTF-8": encode(b'{"\xff": 1}'),
    "not JSON": encode(b"{not json"),
    "a list": encode(b"[1, 2]"),
    "nested without end": encode(b"[" * 100_000 + b"]" * 100_000),
    "a key twice": encode(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "NaN in JSON": encode(b'{"a": NaN}'),
    "unknown dtype": encode({"a": entry([1], 0, 4, "F5")}, bytes(4)),
    "bytes missing": encode({"a": entry([2], 0, 8)}, bytes(7)),
    "bytes extra": encode({"a": entry([2], 0, 8)}, bytes(9)),
    "a hole": encode({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)),
    "overlap": encode({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),
    "two on one range": encode({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, bytes(8)),
    "size against shape": encode({"a": entry([3], 0, 8)}, bytes(8)),
    "negative offset": encode({"a": entry([1], -4, 0)}, bytes(4)),
    "shape overflow": encode({"a": entry([2, 2**63], 0, 8)}, bytes(8)),
    "float in a shape": encode({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, bytes(4)),
    "bool in a shape": encode({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, bytes(4)),
    "metadata of numbers": encode({"__metadata__": {"a": 1}}),
    "a tensor at an odd byte": encode({"p": entry([1], 0, 1, "U8"), "a": entry([1], 1, 5)}, bytes(5)),
}  # fmt: skip


REASONS = {
    "bytes missing": r"want \d+ bytes", "bytes extra": r"want \d+ bytes",
    "a hole": "without holes or overlap", "overlap": "without holes or overlap",
    "two on one range": "without holes or overlap", "a tensor at an odd byte": "a multiple of its width",
    "size against shape": "that agree", "negative offset": "that agree", "shape overflow": "that agree",
    "float in a shape": "that agree", "bool in a shape": "that agree", "unknown dtype": "that agree",
    "metadata of numbers": "string metadata", "a key twice": "a key stands twice", "NaN in JSON": "no JSON number",
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_what_the_format_forbids_is_refused_by_name(case: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(BAD_FILES[case])
    with pytest.raises(BankCorrupt, match=rf"bad\.safetensors.*{REASONS.get(case, '')}"):
        files.map_tensors(path)


def test_the_same_bytes_without_a_defect_are_read(tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    path.write_bytes(encode({"a": entry([1], 0, 4), "b": entry([1], 4, 8)}, bytes(8)))
    assert set(files.map_tensors(path).tensors) == {"a", "b"}


def test_links_pipes_and_folders_are_refused(tmp_path: Path) -> None:
    import os

    files.write_tensors(tmp_path / "real", {"w": torch.zeros(2)}, {})
    (tmp_path / "link").symlink_to(tmp_path / "real")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("link", "pipe", "folder", "missing"):
        with pytest.raises(BankCorrupt, match="a regular file"):
            files.map_tensors(tmp_path / name)


def test_a_write_into_a_view_does_not_reach_the_file(tmp_path: Path) -> None:
    files.write_tensors(tmp_path / "x", {"w": torch.zeros(4)}, {})
    files.map_tensors(tmp_path / "x").tensors["w"].fill_(7.0)
    assert float(files.map_tensors(tmp_path / "x").tensors["w"].sum()) == 0.0


@pytest.mark.parametrize(
    "config", [{"version": 3}, {"version": 2, "requires": ["delta-codec"]}, {"version": "1"}, {"version": True}]
)
def test_newer_versions_and_unknown_features_are_refused(config: dict) -> None:
    with pytest.raises(BankError, match="install a newer bnn-toolkit"):
        fmt.check_version({"format": "bnn-bank", **config}, "bank.json")


def test_states_survive_the_round_trip_bit_for_bit(tmp_path: Path) -> None:
    state = {
        "flat": torch.randn(3, 4), "count": torch.tensor(7), "flag": torch.tensor([True, False]),
        "step": 12, "log_step": 0.1 + 0.2, "info": {"a": 1e-300}, "curve": [{"x": 1}], "name": "ü", "none": None,
    }  # fmt: skip
    tensors, metadata = fmt.encode_state(state, "state")
    files.write_tensors(tmp_path / "s", tensors, metadata)
    mapped = files.map_tensors(tmp_path / "s")
    back = fmt.decode_state(mapped.tensors, mapped.metadata, "state")
    assert back.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(back[key], value) if isinstance(value, torch.Tensor) else back[key] == value


def test_states_with_nan_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match="plain finite values"):
        fmt.encode_state({"x": float("nan")}, "state")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_seen_wherever_it_stands(dtype: torch.dtype, value: float) -> None:
    for size in (1, 7, 4097):
        tensor = torch.linspace(-3, 3, size).to(dtype)
        assert fmt.is_finite(tensor)
        for place in {0, size // 2, size - 1}:
            changed = tensor.clone()
            changed[place] = value
            assert not fmt.is_finite(changed)
    assert fmt.is_finite(torch.empty(0, 3, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_finite_values_whose_sum_no_float_holds_are_finite(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    assert fmt.is_finite(torch.full((9, 5), most, dtype=dtype)[:, ::2])
    assert not fmt.is_finite(torch.tensor([most, most, float("nan")], dtype=dtype))
    assert not fmt.is_finite(torch.tensor([float("inf"), -float("inf")], dtype=dtype))
