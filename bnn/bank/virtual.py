"""A virtual bank: no rows, but what a guide or a prior keeps and a seed, from which sample i is made when asked for."""

from __future__ import annotations

import hashlib
import json
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bnn.bank import files
from bnn.bank import format as fmt
from bnn.bank.manifests import Described, is_sha256, read_config, read_manifests
from bnn.drawing import Draws, draws_of, witness
from bnn.errors import BankError, BankMismatch, ConfigError, OtherDevice
from bnn.layout import Layout
from bnn.machine import makes_bits
from bnn.types import Block, Params, State, make_block

MOST_SAMPLES = 2**48  # as many rows as a shard may say


class VirtualBank(Sequence[Params]):
    """A bank of any length that costs what its guide costs: the same interface as `Bank`, each sample made when asked for.

    Sample i comes from a generator keyed by (seed, i), by the same calls alone or in a block, so that its bits depend
    neither on order nor on blocks, threads, processes or ranks. They do depend on the CPU and on the build of torch, which
    `info["virtual"]["made"]` names.

    Make one with `bnn.fit(..., virtual=True)`, open it with `Bank.open`.

    Args:
        draws: where samples come from.
        layout: of a sample.
        info: as of `Bank`.
        num_samples: S, at least 1.
        content: a name for what all samples follow from but their number.
        path: the folder, if there is one.
        base: parameters outside the sample and buffers, where there is no folder to read them from.
        reopening: by which another process opens the same bank.

    Examples:
        >>> import bnn, torch
        >>> model = bnn.BayesianModel(torch.nn.Linear(3, 2), prior=bnn.priors.Normal(),
        ...                           likelihood=bnn.likelihoods.Categorical(), num_data=4)
        >>> data = torch.zeros(4, 3), torch.tensor([0, 1, 1, 0])
        >>> bank = bnn.fit(model, data, method=bnn.inference.Prior(), num_samples=1_000_000, virtual=True)
        >>> bank
        VirtualBank(in memory: 1,000,000 samples of 8 values)
        >>> torch.equal(bank[999_999]["bias"], bank.block([3, 999_999]).params["bias"][1])
        True
    """

    def __init__(
        self,
        draws: Draws,
        layout: Layout,
        info: Mapping[str, Any],
        *,
        num_samples: int,
        content: str,
        path: Path | None = None,
        base: Params | None = None,
        reopening: Reopening | None = None,
    ) -> None:
        self.layout, self.path = layout, path
        self._draws, self._size = draws, checked_length(num_samples)
        self.content = content
        self._base, self._reopening = base, reopening
        self.info: dict[str, Any] = {**info, "virtual": {**info["virtual"], "length": self._size}}

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Params:  # type: ignore[override]
        return self._draws.one(self._place(index))

    def block(self, indices: Sequence[int] | slice | Tensor) -> Block:
        """K samples stacked, in the order of `indices`, in memory of their own.

        Raises:
            IndexError: an index outside [-S, S).
        """
        if isinstance(indices, slice):
            places: Sequence[int] = range(*indices.indices(self._size))
        else:
            rows = np.asarray(indices, dtype=np.int64)  # [K]
            if rows.size and not (-self._size <= rows.min() and rows.max() < self._size):
                raise IndexError(f"bank indices {rows.min()} to {rows.max()}: want 0 <= index < {self._size}")
            places = np.where(rows < 0, rows + self._size, rows).tolist()
        return make_block(
            self._draws.several(places),
            chain=torch.zeros(len(places), dtype=torch.int64),
            draw=torch.tensor(places, dtype=torch.int64),
        )

    def blocks(self, size: int) -> Iterator[tuple[int, Block]]:
        """The bank from first to last in blocks of at most `size`, with their first index."""
        for start in range(0, self._size, size):
            yield start, self.block(slice(start, start + size))

    def with_length(self, num_samples: int) -> VirtualBank:
        """The same bank with another number of samples: those that both have are the same. Nothing is written.

        Raises:
            ConfigError: a number below 1.
        """
        return VirtualBank(
            self._draws,
            self.layout,
            self.info,
            num_samples=num_samples,
            content=self.content,
            path=self.path,
            base=self._base,
            reopening=self._reopening,
        )

    @property
    def chain(self) -> Tensor:
        """Chain of each sample, int64 [S]: all of chain 0."""
        return torch.zeros(1, dtype=torch.int64).expand(self._size)

    @cached_property
    def draw(self) -> Tensor:
        """Step of each sample in its chain, int64 [S]: its index."""
        return torch.arange(self._size)

    @property
    def log_joint(self) -> Tensor:
        """NaN, float64 [S]: a sample that is not made has none."""
        return torch.full((1,), torch.nan, dtype=torch.float64).expand(self._size)

    @property
    def log_weight(self) -> Tensor:
        """0, float64 [S]."""
        return torch.zeros(1, dtype=torch.float64).expand(self._size)

    @property
    def columns(self) -> dict[str, Tensor]:
        """None."""
        return {}

    @property
    def residency(self) -> Literal["host"]:
        """In memory, as far as samples are there at all."""
        return "host"

    @property
    def shard_rows(self) -> tuple[int, ...]:
        """All samples as of one shard: any of them is as far away as any other."""
        return (len(self),)

    def follow(self, order: Any, *, start: int | None = None, window: int = 4096) -> None:
        """Nothing: samples are made when they are asked for."""

    @property
    def stored(self) -> Layout:
        """The layout that its samples have where they are kept: their own, for nothing codes them."""
        return self.layout

    @cached_property
    def digest(self) -> str:
        """A name for exactly these samples, by which samplers know their bank again."""
        return hashlib.sha256(f"{self.content}/{self._size}".encode()).hexdigest()

    def base(self) -> Params:
        """Parameters outside the sample and buffers, as they were when the bank was made.

        Raises:
            BankCorrupt: their file is altered.
        """
        if self._base is not None:
            return dict(self._base)
        return {} if self.path is None else Described(self.info, self.layout, (), None).base(self.path)

    def check_headers(self) -> list[str]:
        """Nothing to compare: there is no shard. The guide's file was read when the bank was opened."""
        return []

    def check_values(self, progress: Callable[[int, int], object] | None = None) -> list[str]:
        """One line if sample 0 comes out with other bits than it had on this very machine; on another it says nothing."""
        differs = witness(self._draws, self.layout) != self.info["virtual"]["witness"]
        if progress is not None:
            progress(1, 1)
        if not differs or self.info["virtual"]["made"] != makes_bits():
            return []
        return [f"{self.path or 'bank'}: sample 0 comes out with other bits than it had"]

    def refresh(self) -> VirtualBank:
        """The bank as it is on disk now, of the length it has there.

        Raises:
            BankMismatch: another bank stands there now.
        """
        return self if self._reopening is None else reopen(self._reopening, self.content, None)

    def release(self) -> None:
        """Nothing to give back: a virtual bank holds its guide alone."""

    def __reduce__(self) -> tuple[object, ...]:
        # A process that gets the bank reads the guide itself, which all of them then share in the page cache.
        if self._reopening is not None:
            return reopen, (self._reopening, self.content, self._size)
        return _rebuilt, (self._draws, self.layout, self.info, self._size, self.content, self._base)

    def __repr__(self) -> str:
        where = "in memory" if self.path is None else str(self.path)
        return f"VirtualBank({where}: {self._size:,} samples of {self.layout.num_values:,} values)"

    def _place(self, index: int) -> int:
        index = operator.index(index)
        if not -self._size <= index < self._size:
            raise IndexError(f"bank index {index}: want 0 <= index < {self._size}")
        return index + self._size if index < 0 else index


class Reopening(NamedTuple):
    """How a bank was opened."""

    folder: Path
    verify: bool
    allow_other_device: bool


def checked_length(num_samples: int) -> int:
    """The number of samples as a plain int.

    Raises:
        ConfigError: it is below 1, or no bank index could count so far.
    """
    if not 1 <= num_samples < MOST_SAMPLES:
        raise ConfigError("num_samples", want="at least 1 and below 2^48", got=str(num_samples), fix="choose another")
    return int(num_samples)


def finished_state(
    tensors: Params, draws: Draws, layout: Layout, *, num_samples: int, info: Mapping[str, Any]
) -> State:
    """The state that makes the bank of a finished fit virtual: the guide, the length, and what bits hang on."""
    plain = {"length": checked_length(num_samples), "made": makes_bits(), "witness": witness(draws, layout)}
    return {**tensors, **plain, "step": 1, "num_steps": 1, "info": dict(info)}


def is_finished(state: State | None) -> bool:
    """Whether a state is that of a finished virtual bank, and no longer one to go on from."""
    return state is not None and "length" in state


def in_memory(config: Mapping[str, Any], layout: Layout, state: State, base: Params) -> VirtualBank:
    """The virtual bank of a finished state, without a folder."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    facts = layout.fingerprint, files.tensors_sha256(tensors), json.dumps(dict(config), sort_keys=True)
    return VirtualBank(
        _draws(config, layout, state, "bank in memory"),
        layout,
        _info(config, state, {"main": state["info"]}),
        num_samples=state["length"],
        content=hashlib.sha256("/".join(map(str, facts)).encode()).hexdigest(),
        base=base,
    )


def open_virtual(folder: Path, described: Described, *, verify: bool, allow_other_device: bool) -> VirtualBank:
    """The virtual bank in a folder; see `Bank.open`."""
    known = files.identity(folder)
    kept = _kept(folder, described, verify=verify)
    draws = _draws(described.config, described.layout, kept.state, str(folder))
    made, here = kept.state["made"], makes_bits()
    if made != here and not allow_other_device:
        raise BankMismatch(
            str(folder),
            want=f"{_told(made)}, where its samples were made",
            got=_told(here),
            fix="their bits may differ here: say allow_other_device=True or --allow-other-device, or make an ordinary "
            "bank of it there with 'bnn bank materialise'",
        )
    content = f"{described.identity}/{kept.crc32}/{kept.state['witness']}"
    differs = witness(draws, described.layout) != kept.state["witness"] if verify else made != here
    if differs and made == here:
        raise BankMismatch(
            str(folder),
            want="sample 0 with the bits that it had",
            got=f"others on the same {_told(here)}",
            fix="look for what changes arithmetic, such as MKL's settings, or materialise it where it was made",
        )
    if differs:
        content += f"/{here}"  # perhaps other samples: the state of a sampler of these must not pass for one of those
    if differs and verify:
        warnings.warn(
            f"{folder}: samples come out with other bits on {_told(here)} than on {_told(made)}, where they were made",
            OtherDevice,
            stacklevel=4,
        )
    files.check_same(folder, known)
    return VirtualBank(
        draws,
        described.layout,
        _info(described.config, kept.state, {"main": kept.info}),
        num_samples=kept.state["length"],
        content=hashlib.sha256(content.encode()).hexdigest(),
        path=folder,
        reopening=Reopening(folder, verify, allow_other_device),
    )


def reopen(reopening: Reopening, content: str, num_samples: int | None) -> VirtualBank:
    """The bank that was opened, in another process or anew, with so many samples, or as many as it has now.

    Raises:
        BankMismatch: another bank stands there now.
    """
    folder, verify, allowed = reopening
    described, found = read_config(folder), None
    if is_virtual(described.config):
        found = open_virtual(folder, described, verify=verify, allow_other_device=allowed)
    if found is None or found.content != content:
        raise BankMismatch(
            str(folder),
            want="the virtual bank that was opened",
            got="another in its place",
            fix="open it anew with Bank.open",
        )
    return found if num_samples is None else found.with_length(num_samples)


def is_virtual(config: Mapping[str, Any]) -> bool:
    """Whether what `bank.json` says is said of a virtual bank."""
    return "virtual" in config.get("requires", [])


class _Kept(NamedTuple):
    """What a folder keeps of a finished guide."""

    state: State
    crc32: str  # of its tensors, as its file says
    info: dict[str, Any]


def _kept(folder: Path, described: Described, *, verify: bool) -> _Kept:
    """The state of a finished virtual bank.

    Raises:
        BankError: its fit is not finished.
        BankCorrupt, BankMismatch: a file is missing, altered or another bank's.
    """
    manifests = read_manifests(folder, described)
    if len(manifests) != 1 or manifests[0]["shards"] or not manifests[0]["complete"]:
        rows = sum(manifest["rows"] for manifest in manifests)
        if len(manifests) > 1 or rows:
            raise fmt.corrupt(str(folder), "one manifest without rows", f"{len(manifests)} with {rows} rows")
        raise BankError(
            str(folder), want="a virtual bank whose fit is finished", got="one that is not", fix="go on with resume"
        )
    fact = manifests[0]["state"]
    if fact is None:
        raise fmt.corrupt(str(folder), "a state, which is all that a virtual bank keeps", "none")
    path = folder / fact["file"]
    if files.regular_size(path) != fact["bytes"] or (verify and files.sha256_of(path) != fact["sha256"]):
        now = read_manifests(folder, described)[0]
        if now["generation"] != manifests[0]["generation"]:  # its length was changed meanwhile
            return _kept(folder, described, verify=verify)
        raise fmt.corrupt(str(path), "the state that the manifest names", "another one, or none")
    mapped = files.map_tensors(path, fact["bytes"])
    if mapped.metadata.get("bank") != described.identity:
        got = f"{mapped.metadata.get('bank')}"[:100]
        raise BankMismatch(str(path), want=f"the bank {described.identity}", got=got, fix="put its own file back")
    state = fmt.decode_state(mapped.tensors, mapped.metadata, str(path))
    made = state.get("made")
    legal = isinstance(made, dict) and sorted(made) == sorted(makes_bits())
    legal = legal and all(isinstance(value, str) for value in made.values())  # type: ignore[union-attr]
    legal = legal and type(state.get("length")) is int and 1 <= state["length"] < MOST_SAMPLES
    if not legal or not is_sha256(state.get("witness")):
        raise fmt.corrupt(str(path), "length, made and witness of a virtual bank", repr(sorted(state))[:200])
    return _Kept(state, mapped.metadata.get("crc32", ""), manifests[0]["info"])


def _draws(config: Mapping[str, Any], layout: Layout, state: State, place: str) -> Draws:
    """Where the samples of a bank come from.

    Raises:
        BankCorrupt: what it says does not make samples; the first thing that is wrong is named.
    """
    said, seed = config.get("virtual"), config.get("seed")
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not isinstance(said, dict) or type(seed) is not int:
        raise fmt.corrupt(place, "an object as 'virtual', and a seed", repr([said, seed])[:100])
    try:
        return draws_of(
            layout,
            family=str(said.get("family")),
            draws=str(said.get("draws")),
            seed=seed,
            prior=config.get("prior"),
            likelihood=config.get("likelihood"),
            tensors=tensors,
        )
    except ConfigError as error:
        raise fmt.corrupt(f"{place} {error.place}", error.want, error.got) from error
    except (
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        OverflowError,
    ) as error:  # options of a prior, from anybody
        raise fmt.corrupt(place, "a prior and a likelihood", f"{type(error).__name__}: {error}"[:200]) from error


def _info(config: Mapping[str, Any], state: State, diagnostics: Mapping[str, Any]) -> dict[str, Any]:
    """What the bank says of itself."""
    virtual = {**config["virtual"], "made": state["made"], "witness": state["witness"]}
    return {**config, "virtual": virtual, "complete": True, "resumable": True, "diagnostics": dict(diagnostics)}


def _told(made: Mapping[str, str]) -> str:
    """A machine in words."""
    return f"{made['cpu']} ({made['capability']}) with torch {made['torch']}"


def _rebuilt(draws: Draws, layout: Layout, info: dict[str, Any], size: int, content: str, base: Params) -> VirtualBank:
    return VirtualBank(draws, layout, info, num_samples=size, content=content, base=base)
