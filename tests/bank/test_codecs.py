"""Coded banks: the values that the format page defines, through the one interface; what is damaged is refused."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from bank import test_fuzz
from forging import edit_json
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bnn.bank import (
    Bank,
    BankWriter,
    codecs,
    files,
    mean,
    merge,
    moving,
    repair,
    thin,
    verify_files,
    writer,
    wrong_sizes,
)
from bnn.bank import format as fmt
from bnn.bank.codecs import CODECS, Codec, check_codable, codec_of, moments_of
from bnn.errors import BankCorrupt, BankError, BankMismatch
from bnn.layout import Entry, Layout, layout_of
from bnn.types import Block, Params, make_block

MODULE = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
LAYOUT = layout_of(MODULE, extra=[Entry("@likelihood.scale", (), torch.float32)])
BASE = {"buffer": torch.tensor([1.0, float("nan")])}
CONFIG = {"seed": 3, "method": {"name": "hmc", "options": {}}, "columns": ["energy"]}
S = 23
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten rows a shard and seven a block, so that small banks have several."""
    monkeypatch.setattr(writer, "rows_per_shard", lambda row_bytes: 10)
    monkeypatch.setattr(moving, "BLOCK_BYTES", 7 * LAYOUT.num_bytes)


def values(layout: Layout = LAYOUT, size: int = S, seed: int = 0) -> Params:
    source = torch.Generator().manual_seed(seed)
    params = {}
    for number, entry in enumerate(layout.entries):
        drawn = torch.randn(size, *entry.shape, generator=source, dtype=torch.float64) * 10.0 ** (number - 2) - number
        params[entry.name] = drawn.abs().to(entry.dtype) if entry.name.startswith("@") else drawn.to(entry.dtype)
    return params


def write(path: Path, params: Params, *, layout: Layout = LAYOUT) -> Bank:
    size = len(next(iter(params.values())))
    index = torch.arange(size)
    block = make_block(
        params,
        chain=index % 3,
        draw=index // 3,
        log_joint=-index.double() / 7,
        log_weight=index.double() / 5,
        columns={"energy": index.double().sqrt()},
    )
    bank_writer = BankWriter(path, layout=layout, config=CONFIG, base=BASE)
    bank_writer.append(block, {"step": 1, "num_steps": 1, "info": {}})
    bank_writer.close()
    return Bank.open(path)


def made(bank: Bank, name: str) -> Codec:
    return codec_of(name, bank.layout, moments_of(bank.layout, (block.params for _, block in bank.blocks(7))))


def code(bank: Bank, out: Path, name: str, **options: Any) -> Bank:
    return moving.recode(bank, out, made(bank, name), {"of": bank.digest}, **options)


def raw(folder: Path, name: str) -> Tensor:
    """All rows of a tensor as any tool reads it."""
    found = []
    for path in sorted(folder.glob("main-*.safetensors")):
        with safetensors.safe_open(path, "pt") as shard:
            found.append(shard.get_tensor(name))
    return torch.cat(found)


def check_equal(found: Block, bank: Block, wanted: Params, rows: list[int]) -> None:
    for name, tensor in wanted.items():
        assert found.params[name].dtype == tensor.dtype
        assert torch.equal(found.params[name], tensor[rows]), name
    for column in ("chain", "draw", "log_joint", "log_weight"):
        assert torch.equal(getattr(found, column), getattr(bank, column)[rows])
    assert torch.equal(found.columns["energy"], bank.columns["energy"][rows])


# Memory


def test_memory_is_used_again_only_where_nobody_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "FRESH", 4 * 5 * 3)
    memory = codecs.Reused()
    first = memory("a", (5, 3), torch.float32).fill_(1.0)
    second = memory("a", (5, 3), torch.float32).fill_(2.0)
    third, view = memory("a", (5, 3), torch.float32).fill_(3.0), second[1:, 2]
    starts = [tensor.data_ptr() for tensor in (first, second, third)]
    assert len(set(starts)) == 3
    del second
    assert memory("a", (5, 3), torch.float32).fill_(4.0).data_ptr() not in starts  # the view holds the second
    assert torch.equal(view, torch.full((4,), 2.0))
    assert torch.equal(first, torch.ones(5, 3))
    at = third.data_ptr()
    del third
    again = memory("a", (5, 3), torch.float32)
    few = memory("a", (5, 3), torch.float64).fill_(5.0)
    assert again.data_ptr() == at
    assert again.dtype == torch.float32
    assert few.dtype == torch.float64
    assert not torch.equal(again, few.float())
    small = memory("a", (2, 3), torch.float32)
    assert small.shape == (2, 3)


def test_entries_of_one_shape_have_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "FRESH", 4 * 5 * 3)
    memory, starts = codecs.Reused(), set()
    for _ in range(9):
        block = [memory(name, (5, 3), torch.float32) for name in ("a", "b", "c")]
        assert len({tensor.data_ptr() for tensor in block}) == 3
        starts |= {tensor.data_ptr() for tensor in block}
    assert len(starts) == 6  # of a block, and of the one that is still held meanwhile


def test_samples_are_decoded_where_they_are_whatever_the_default_device(tmp_path: Path) -> None:
    bank = code(write(tmp_path / "old", values(LAYOUT)), tmp_path / "new", "int8")
    wanted = bank.block(slice(0, 4)).params
    with torch.device("meta"):
        found = Bank.open(tmp_path / "new").block(slice(0, 4)).params
    for name, value in wanted.items():
        assert torch.equal(found[name], value)


@pytest.mark.parametrize("name", list(CODECS))
def test_blocks_that_are_kept_are_not_written_over(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a pass, kept, dropped, or of which a view is kept, with memory that is used again for all of them."""
    monkeypatch.setattr(codecs, "FRESH", 1)
    monkeypatch.setattr(codecs, "TILE", 3)
    layout = Layout((Entry("a", (4, 3), torch.float32), Entry("b", (5,), torch.float32), Entry("c", (), torch.float32)))
    found = code(write(tmp_path / "old", values(layout), layout=layout), tmp_path / "new", name)
    whole = {entry.name: torch.stack([found[i][entry.name] for i in range(S)]) for entry in layout.entries}
    kept = list(found.blocks(4))
    assert [first for first, _ in kept] == [0, 4, 8, 10, 14, 18, 20]
    for each, wanted in whole.items():
        assert torch.equal(torch.cat([block.params[each] for _, block in kept]), wanted), each
    rows, pointers = [], set()
    for first, block in found.blocks(4):
        assert all(torch.equal(block.params[n], whole[n][first : first + block.num_samples]) for n in whole)
        pointers.add(block.params["a"].data_ptr())
        if first in (4, 14):
            rows.append((first, block.params["a"][1]))
    assert len(pointers) < len(kept)
    assert all(torch.equal(row, whole["a"][first + 1]) for first, row in rows)


# Values


def by_hand(original: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Coded and decoded values of one entry [S, *shape], by the words of the format page, one number at a time."""
    wide = original.astype(np.float64)
    about = wide.mean(axis=0).astype(np.float32)
    about = np.where(wide.min(axis=0) == wide.max(axis=0), original[0], about)
    apart = np.abs(wide - about).max(axis=0)
    if name == "int8":
        scale = np.zeros(apart.shape, dtype=np.float64)
        for place, value in np.ndenumerate(apart):
            if value:
                exponent = int(np.floor(np.log2(value / 127))) - 7  # eight significant bits
                scale[place] = np.ceil(value / 127 / 2.0**exponent) * 2.0**exponent
    elif name == "fp16":
        scale = np.array(2.0 ** (np.floor(np.log2(apart.max())) + 1 - 15))
    else:
        scale = np.array(1.0)
    delta = np.divide(wide - about, scale, out=np.zeros_like(wide), where=scale > 0)
    if name == "int8":
        delta = np.rint(delta)
    elif name == "fp16":
        delta = delta.astype(np.float16).astype(np.float64)
    else:
        delta = torch.from_numpy(delta).float().bfloat16().double().numpy()
    return delta, (about + scale * delta).astype(np.float32)


@pytest.mark.parametrize("name", list(CODECS))
def test_values_are_those_of_the_format_page(tmp_path: Path, name: str) -> None:
    params = values()
    bank = write(tmp_path / "old", params)
    found = code(bank, tmp_path / "new", name)
    tensors = safetensors.torch.load_file(tmp_path / "new" / "codec.safetensors")
    for entry in LAYOUT.entries:
        stored = raw(tmp_path / "new", entry.name)
        if entry.name.startswith("@"):
            assert torch.equal(stored, params[entry.name])
            continue
        delta, decoded = by_hand(params[entry.name].numpy(), name)
        assert stored.dtype == CODECS[name]
        assert np.array_equal(stored.double().numpy(), delta), entry.name
        assert np.array_equal(found.block(slice(0, S)).params[entry.name].numpy(), decoded), entry.name
        scale = tensors.get(f"scale.{entry.name}", torch.tensor(1.0)).float()
        plain = tensors[f"mean.{entry.name}"] + scale * stored.float()  # what another tool would write
        assert torch.equal(plain, torch.from_numpy(decoded))


@pytest.mark.parametrize("name", list(CODECS))
def test_the_one_interface(tmp_path: Path, name: str) -> None:
    """Equal to a bank in memory of the decoded values, whichever way samples are asked for."""
    bank = write(tmp_path / "old", values())
    found = code(bank, tmp_path / "new", name)
    codec = made(bank, name)
    whole = bank.block(range(S))
    wanted = codec.decode(codec.encode(whole.params))
    assert found.layout == bank.layout
    assert len(found) == S
    for index in (0, 9, 10, S - 1, -1, -S):
        sample = found[index]
        assert list(sample) == list(LAYOUT.names)
        assert all(torch.equal(sample[n], wanted[n][index]) and sample[n].dtype == wanted[n].dtype for n in sample)
    picks: list[Any] = [slice(0, S), slice(2, 9), slice(8, 13), slice(1, 10, 3), slice(S, None, -1), [11, 2, -1, 3, 2]]
    for pick in (*picks, torch.tensor([5, 4]), []):
        rows = list(range(*pick.indices(S))) if isinstance(pick, slice) else [int(i) % S for i in pick]
        check_equal(found.block(pick), whole, wanted, rows)
    at = 0
    for first, block in found.blocks(7):
        check_equal(block, whole, wanted, list(range(first, first + block.num_samples)))
        assert first == at
        at += block.num_samples
    for column in ("chain", "draw", "log_joint", "log_weight"):
        assert torch.equal(getattr(found, column), getattr(bank, column))
    assert torch.equal(found.columns["energy"], bank.columns["energy"])
    assert torch.equal(found.base()["buffer"].view(torch.uint8), BASE["buffer"].view(torch.uint8))
    assert found.info["requires"] == ["codec", "columns"]
    assert found.info["codec"]["of"] == bank.digest
    assert not found.info["resumable"]
    assert found.digest != bank.digest
    again = pickle.loads(pickle.dumps(found))
    assert again.digest == found.digest
    assert torch.equal(again[3]["1.bias"], wanted["1.bias"][3])
    assert found.check_headers() == found.check_values() == verify_files(found.path) == wrong_sizes(found.path) == []
    assert len(Bank.open(found.path, verify="full").refresh()) == S
    found.release()
    assert torch.equal(found[4]["0.weight"], wanted["0.weight"][4])
    found[4]["0.weight"].zero_()  # samples of a coded bank are the caller's own
    assert torch.equal(found[4]["0.weight"], wanted["0.weight"][4])


@pytest.mark.parametrize("name", list(CODECS))
def test_large_entries_are_decoded_piece_by_piece_to_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout((Entry("wide", (70, 11), torch.float32), Entry("one", (), torch.float32)))
    params = values(layout, size=9)
    codec = codec_of(name, layout, moments_of(layout, [params]))
    coded = codec.encode(params)
    whole = codec.decode(coded)
    for tile in (1, 64, 800, 2000):
        monkeypatch.setattr(codecs, "TILE", tile)
        found = codec.decode({n: t[::2] for n, t in coded.items()})
        assert all(torch.equal(found[n], whole[n][::2]) for n in found)
        alone = codec.decode({n: t[5] for n, t in coded.items()})
        assert all(torch.equal(alone[n], whole[n][5]) for n in alone)


def test_spreads_that_bf16_of_the_weights_would_erase_are_kept(tmp_path: Path) -> None:
    """Weights near 1000 that spread by 0.5: bfloat16 has steps of 4 there."""
    layout = Layout((Entry("w", (6, 5), torch.float32),))
    source = torch.Generator().manual_seed(0)
    params = {"w": 1000.5 + 0.3 * torch.randn(40, 6, 5, generator=source)}
    rounded = params["w"].bfloat16().float()
    assert float(rounded.std(dim=0).max()) == 0.0
    bank = write(tmp_path / "old", params, layout=layout)
    for name in CODECS:
        found = code(bank, tmp_path / name, name).block(slice(0, 40)).params["w"] if name == "bf16" else None
        codec = made(bank, name)
        decoded = codec.decode(codec.encode(params))["w"]
        ratio = decoded.double().std(dim=0) / params["w"].double().std(dim=0)
        assert float((ratio - 1).abs().max()) < 0.01, name
        assert found is None or torch.equal(found, decoded)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(CODECS)), st.integers(0, 10**6), st.integers(-30, 30), st.floats(0, 1e6), st.booleans())
def test_errors_stay_within_their_bound(name: str, seed: int, exponent: int, offset: float, heavy: bool) -> None:
    """In proportion to the difference from the mean, or to the largest one; and a last bit of the value itself."""
    layout = Layout((Entry("w", (5, 2), torch.float32),))
    source = torch.Generator().manual_seed(seed)
    drawn = torch.randn(13, 5, 2, generator=source, dtype=torch.float64)
    drawn = (drawn**5 if heavy else drawn) * 10.0 ** torch.arange(-4, 6).view(5, 2)
    params = {"w": (-offset + drawn * 2.0**exponent).float()}
    codec = codec_of(name, layout, moments_of(layout, [params]))
    error = (codec.decode(codec.encode(params))["w"].double() - params["w"].double()).abs()
    apart = (params["w"].double() - params["w"].double().mean(dim=0)).abs()
    last = 2.0**-23 * params["w"].abs().amax(dim=0).double()
    bound = {"bf16": apart * 2.0**-8, "fp16": apart * 2.0**-11 + apart.max() * 2.0**-39}.get(name)
    bound = apart.amax(dim=0) / 127 * (1 + 2.0**-7) / 2 if bound is None else bound
    assert bool((error <= bound * 1.001 + 2 * last).all())


@pytest.mark.parametrize("name", list(CODECS))
def test_constant_values_come_back_exactly(tmp_path: Path, name: str) -> None:
    params = values()
    params["0.bias"] = torch.tensor([0.1, -1e-42, 3e38]).expand(S, 3).clone()
    params["0.weight"][:, 1, 2] = 1 / 3
    found = code(write(tmp_path / "old", params), tmp_path / "new", name).block(slice(0, S)).params
    assert torch.equal(found["0.bias"], params["0.bias"])
    assert torch.equal(found["0.weight"][:, 1, 2], params["0.weight"][:, 1, 2])
    single = {n: t[:1] for n, t in params.items()}
    alone = code(write(tmp_path / "single", single), tmp_path / "coded", name)
    assert all(torch.equal(alone[0][n], single[n][0]) for n in single)


@pytest.mark.parametrize("name", list(CODECS))
def test_what_must_not_fall_below_zero_stays_as_it_is(tmp_path: Path, name: str) -> None:
    """A noise scale or a variance near 0 beside large ones would be rounded to a negative number."""
    params = values()
    params["@likelihood.scale"][:] = torch.linspace(1e-4, 10, S)
    params["1.bias"] = torch.linspace(0, 10, S).unsqueeze(1).expand(S, 2).clone()
    found = code(write(tmp_path / "old", params), tmp_path / "new", name)
    assert found.info["codec"]["exact"] == ["1.bias", "@likelihood.scale"]
    for entry in ("1.bias", "@likelihood.scale"):
        assert torch.equal(found.block(slice(0, S)).params[entry], params[entry])
        assert torch.equal(raw(tmp_path / "new", entry), params[entry])


@pytest.mark.parametrize("name", list(CODECS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_entries_of_other_dtypes(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    layout = Layout(tuple(entry._replace(dtype=dtype) for entry in LAYOUT.entries[:2]))
    params = values(layout)
    bank = write(tmp_path / "old", params, layout=layout)
    found = code(bank, tmp_path / "new", name)
    assert found.layout == layout
    for entry, tensor in found.block(slice(0, S)).params.items():
        assert tensor.dtype == dtype
        apart = (params[entry].double() - params[entry].double().mean(dim=0)).abs().amax(dim=0)
        error = (tensor.double() - params[entry].double()).abs()
        own = params[entry].abs().amax(dim=0).double() * torch.finfo(dtype).eps
        assert bool((error <= apart / 250 + own).all())


@pytest.mark.parametrize("name", list(CODECS))
def test_denormal_spreads_are_no_fault(tmp_path: Path, name: str) -> None:
    layout = Layout((Entry("w", (4,), torch.float32),))
    params = {"w": torch.randint(-9, 9, (S, 4), generator=torch.Generator().manual_seed(0)) * 1e-44}
    found = code(write(tmp_path / "old", params, layout=layout), tmp_path / "new", name).block(slice(0, S)).params["w"]
    assert torch.isfinite(found).all()
    assert float((found - params["w"]).abs().max()) <= 2.0**-133


def test_moments_are_those_of_all_samples_at_once() -> None:
    params = values()
    found = moments_of(LAYOUT, [{n: t[:9] for n, t in params.items()}, {n: t[9:] for n, t in params.items()}])
    for name, tensor in params.items():
        wide = tensor.double()
        torch.testing.assert_close(found.mean[name], wide.mean(dim=0), rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(found.deviation[name], wide.std(dim=0, correction=0), rtol=1e-9, atol=1e-15)
        assert torch.equal(found.least[name], wide.amin(dim=0))
        assert torch.equal(found.greatest[name], wide.amax(dim=0))


# Refused input


def test_whole_numbers_are_refused() -> None:
    layout = Layout((Entry("w", (2,), torch.float32), Entry("steps", (3,), torch.int64)))
    with pytest.raises(BankError, match=r"entry 'steps': want real numbers to be coded, got torch\.int64"):
        check_codable(layout)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    params = values()
    params["0.weight"][17, 1, 2] = value
    blocks = [{n: t[:9] for n, t in params.items()}, {n: t[9:] for n, t in params.items()}]
    with pytest.raises(BankError, match=r"NaN or Inf in '0\.weight' of row 17"):
        moments_of(LAYOUT, blocks)


@pytest.mark.parametrize("name", list(CODECS))
def test_values_too_far_apart_are_refused(name: str) -> None:
    params = values()
    params["0.weight"][0, 0, 0], params["0.weight"][1, 0, 0] = 3e38, -3e38
    with pytest.raises(BankError, match=r"entry '0\.weight': want samples within 1e\+38 of their mean"):
        codec_of(name, LAYOUT, moments_of(LAYOUT, [params]))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_half_a_bank_is_not_left_behind(tmp_path: Path, error: type[BaseException]) -> None:
    bank = write(tmp_path / "old", values())

    def stop(done: int, total: int) -> None:
        if done > 15:  # a shard of ten rows is there by then
            assert (tmp_path / "folder" / "new" / "main-000000.safetensors").exists()
            raise error

    with pytest.raises(error):
        code(bank, tmp_path / "folder" / "new", "int8", progress=stop)
    assert not (tmp_path / "folder").exists()


def test_a_coded_bank_is_replaced_only_where_that_was_said(tmp_path: Path) -> None:
    bank = write(tmp_path / "old", values())
    code(bank, tmp_path / "new", "int8")
    with pytest.raises(BankError, match="got a bank, which is kept"):
        code(bank, tmp_path / "new", "fp16")
    assert code(bank, tmp_path / "new", "fp16", overwrite=True).info["codec"]["name"] == "fp16"
    (tmp_path / "new" / "bank.json").unlink()
    with pytest.raises(BankError, match="one with other files, which are kept"):
        code(bank, tmp_path / "new", "bf16")


def test_no_fit_goes_on_from_a_coded_bank(tmp_path: Path) -> None:
    code(write(tmp_path / "old", values()), tmp_path / "new", "int8")
    with pytest.raises(BankMismatch, match="codec"):
        BankWriter(tmp_path / "new", layout=LAYOUT, config=CONFIG, base=BASE, resume=True)


def test_an_old_reader_refuses_by_the_name_of_the_feature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code(write(tmp_path / "old", values()), tmp_path / "new", "int8")
    monkeypatch.setattr(fmt, "FEATURES", frozenset({"columns"}))
    with pytest.raises(BankError, match="got version 2 with codec; install a newer bnn-toolkit"):
        Bank.open(tmp_path / "new")


# Other tools


def test_moved_repaired_and_exported_banks_hold_the_decoded_samples(tmp_path: Path) -> None:
    bank = write(tmp_path / "old", values())
    coded = code(bank, tmp_path / "coded", "int8")
    every = coded.block(slice(0, S)).params
    few = thin(coded, tmp_path / "few", every=2)
    kept = [i for i in range(S) if (i // 3) % 2 == 0]
    assert all(torch.equal(few.block(slice(0, len(few))).params[n], t[kept]) for n, t in every.items())
    assert "codec" not in few.info
    assert few.info["requires"] == ["columns"]
    assert few.info["decoded"] == {"codec": "int8", "of": bank.digest}
    both = merge([coded, bank], tmp_path / "both")
    assert torch.equal(both.block(slice(0, S)).params["0.weight"], every["0.weight"])
    weight = coded.log_weight.softmax(dim=0)
    torch.testing.assert_close(mean(coded)["1.bias"].double(), weight @ every["1.bias"].double(), rtol=1e-6, atol=1e-7)
    again = code(coded, tmp_path / "again", "fp16")  # of what was decoded
    assert again.info["decoded"]["codec"] == "int8"

    (tmp_path / "coded" / "manifest-main.json").unlink()
    found = repair(tmp_path / "coded", tmp_path / "mended")
    assert all(torch.equal(found.bank.block(slice(0, S)).params[n], t) for n, t in every.items())
    (tmp_path / "coded" / "codec.safetensors").unlink()
    with pytest.raises(BankCorrupt, match=r"codec\.safetensors"):
        repair(tmp_path / "coded", tmp_path / "none")
    assert not (tmp_path / "none").exists()


# Damage


@pytest.fixture
def coded(tmp_path: Path) -> Path:
    code(write(tmp_path / "old", values()), tmp_path / "new", "int8")
    return tmp_path / "new"


def read_all(folder: Path) -> Block:
    bank = Bank.open(folder)
    return bank.block(range(len(bank)))


def test_a_damaged_file_of_means_is_found(coded: Path, tmp_path: Path) -> None:
    path = coded / "codec.safetensors"
    whole = path.read_bytes()
    other = values(seed=1)
    code(write(tmp_path / "other", other), tmp_path / "another", "int8")
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    for change, words in (
        (bytes(flipped), "the sha256 that bank.json names"),
        ((tmp_path / "another" / "codec.safetensors").read_bytes(), "the sha256 that bank.json names"),
        (whole[:-1], "bytes, got another size"),
        (b"", "bytes, got another size"),
    ):
        path.write_bytes(change)
        with pytest.raises(BankCorrupt, match=words):
            read_all(coded)
        assert verify_files(coded)
    for link in (False, True):
        path.unlink(missing_ok=True)
        if link:
            path.symlink_to(tmp_path / "another" / "codec.safetensors")
        with pytest.raises(BankCorrupt, match="no regular file"):
            Bank.open(coded)
        assert wrong_sizes(coded)
    path.unlink()
    path.write_bytes(whole)
    assert read_all(coded).num_samples == S
    opened = Bank.open(coded, verify="never")
    path.write_bytes(bytes(flipped))
    with pytest.raises(BankCorrupt):
        opened.block([0])  # a bank that is opened without checks still needs the right means


def forge(folder: Path, tensors: Params) -> None:
    """Put a file of these tensors in place, with sums in bank.json and everywhere else that fit it."""
    path = folder / "codec.safetensors"
    written = files.write_tensors(path, tensors, {}, sealed=True)
    said = json.loads((folder / "bank.json").read_text())["codec"]
    identity = edit_json(folder / "bank.json", codec={**said, "bytes": written.bytes, "sha256": written.sha256})
    refit(folder, identity["checksum"])


def refit(folder: Path, identity: str) -> None:
    """Name another bank.json in manifest and shards."""
    facts = json.loads((folder / "manifest-main.json").read_text())["shards"]
    for fact in facts:
        mapped = files.map_tensors(folder / fact["file"])
        tensors = {n: t.clone() for n, t in mapped.tensors.items() if not n.startswith("@pad.")}
        metadata = {k: v for k, v in mapped.metadata.items() if k not in ("crc32", "format")} | {"bank": identity}
        fact |= files.write_tensors(folder / fact["file"], tensors, metadata, sealed=True)._asdict()
    edit_json(folder / "manifest-main.json", bank=identity, shards=facts)


def test_a_forged_file_of_means_is_refused(coded: Path) -> None:
    whole = {n: t.clone() for n, t in files.map_tensors(coded / "codec.safetensors").tensors.items()}
    whole = {name: tensor for name, tensor in whole.items() if not name.startswith("@pad.")}
    forge(coded, whole)
    assert read_all(coded).num_samples == S
    mean_, scale = whole["mean.0.weight"], whole["scale.0.weight"]
    for change, words in (
        ({"mean.0.weight": mean_[:2]}, r"tensor 'mean\.0\.weight' as .*\(3, 4\)"),
        ({"mean.0.weight": mean_.double()}, r"tensor 'mean\.0\.weight' as"),
        ({"scale.0.weight": scale.float()}, r"tensor 'scale\.0\.weight' as"),
        ({"mean.more": mean_}, r"tensor 'mean\.more' as no tensor"),
        ({"mean.0.weight": None}, r"tensor 'mean\.0\.weight' as .*got no tensor"),
        ({"mean.0.weight": mean_ * torch.nan}, r"finite numbers in 'mean\.0\.weight'"),
        ({"scale.0.weight": scale * torch.nan}, r"finite numbers in 'scale\.0\.weight'"),
        ({"scale.0.weight": scale * torch.inf}, r"finite numbers in 'scale\.0\.weight'"),
        ({"scale.0.weight": -scale}, r"no negative scale"),
    ):
        forge(coded, {name: tensor for name, tensor in {**whole, **change}.items() if tensor is not None})
        with pytest.raises(BankCorrupt, match=words):
            read_all(coded)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "int4"}, {"name": []}, {"name": "fp16"}, {"exact": ["none"]}, {"exact": "0.bias"}, {"exact": [[]]}, {"exact": []},
        {"exact": ["0.bias", "@likelihood.scale"]}, {"exact": None}, {"file": "../codec.safetensors"},
        {"file": "base.safetensors"}, {"bytes": "1"}, {"bytes": True}, {"sha256": None}, {"errors": 3}, {"predictive": []},
    ],
    ids=str,
)  # fmt: skip
def test_what_bank_json_says_of_a_codec_is_checked(coded: Path, change: dict[str, Any]) -> None:
    said = json.loads((coded / "bank.json").read_text())["codec"]
    identity = edit_json(coded / "bank.json", codec={**said, **change})
    refit(coded, identity["checksum"])
    with pytest.raises(BankCorrupt):
        read_all(coded)


def test_codec_and_feature_stand_together(coded: Path) -> None:
    config = json.loads((coded / "bank.json").read_text())
    for changes in ({"requires": ["columns"]}, {"codec": None}):
        edit_json(coded / "bank.json", **{"requires": config["requires"], "codec": config["codec"], **changes})
        with pytest.raises(BankCorrupt, match="'codec' and the feature of that name"):
            Bank.open(coded)


def test_altered_banks(coded: Path, tmp_path: Path, tell: Any) -> None:
    """Whatever is altered, what opens has the right samples, and anything else is a BankError."""
    wanted = read_all(coded)
    ends = dict.fromkeys(("rows", "error"), 0)
    for seed in range(400):
        folder = tmp_path / "altered"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(coded, folder)
        what = test_fuzz.mutate(folder, random.Random(seed))
        try:
            found = read_all(folder)
        except BankError:
            ends["error"] += 1
            continue
        ends["rows"] += 1
        for name, tensor in wanted.params.items():
            assert torch.equal(found.params[name], tensor[: found.num_samples]), f"seed {seed}: {what}"
    tell(str(ends))
    assert min(ends.values()) > 10


# Golden bytes


def write_golden(folder: Path, name: str) -> None:
    """Values whose means and differences have few bits, so that no order of sums changes a byte."""
    index = torch.arange(8)
    params = {
        e.name: (index.float().view(-1, *[1] * len(e.shape)) - 3.5) * (1 + torch.arange(e.numel).view(e.shape)) / 8
        for e in LAYOUT.entries
    }
    params["@likelihood.scale"] = 1.0 + index / 16
    block = make_block(params, chain=index % 2, draw=index // 2, columns={"energy": index.double()})
    bank = Bank.from_blocks([block], layout=LAYOUT, info={"seed": 7}, base={"buffer": torch.arange(4.0)})
    moving.recode(bank, folder, made(bank, name), {"of": bank.digest})


@pytest.mark.parametrize("name", list(CODECS))
def test_golden_banks(tmp_path: Path, name: str) -> None:
    golden = GOLDEN / f"codec-{name}"
    found = Bank.open(golden, verify="full").block(slice(0, 8))
    index = torch.arange(8)
    wanted = (index.float().view(-1, 1, 1) - 3.5) * (1 + torch.arange(12).view(3, 4)) / 8
    if name == "int8":
        apart = 3.5 * (1 + torch.arange(12).view(3, 4)) / 8
        assert bool(((found.params["0.weight"] - wanted).abs() <= apart / 250).all())
    else:
        assert torch.equal(found.params["0.weight"], wanted)
    assert torch.equal(found.params["@likelihood.scale"], 1.0 + index / 16)
    write_golden(tmp_path / "bank", name)
    written = {p.name for p in (tmp_path / "bank").iterdir()} - {"lock-main"}
    assert written == {p.name for p in golden.iterdir()}
    for file in sorted(written):
        assert (tmp_path / "bank" / file).read_bytes() == (golden / file).read_bytes(), file
