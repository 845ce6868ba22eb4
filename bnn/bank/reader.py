"""A bank in memory: a read-only sequence of samples, mapped from shards or held as tensors."""

from __future__ import annotations

import bisect
import copyreg
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnn.bank import files, remote
from bnn.bank import format as fmt
from bnn.bank.address import is_address
from bnn.bank.shards import (
    Described,
    MappedShard,
    MemoryShard,
    Shard,
    Verify,
    read_config,
    read_manifests,
    verify_files,
)
from bnn.bank.snapshot import Snapshot, as_of
from bnn.bank.writer import BankWriter
from bnn.errors import BankCorrupt, BankError, BankLimit, BankMismatch, ConfigError, choose
from bnn.layout import Layout, layout_of
from bnn.types import Block, Params, make_block

FOLIO_BYTES = 2 * 1024 * 1024  # a page fault may map so much at once: Linux 6.18 maps whole folios of the page cache
MOST_VIEWS = 20_000  # of single samples that a bank keeps: about 10 MB of Python's
RESIDENT_BYTES = 128 * 1024 * 1024  # mapped pages kept in the process before the oldest are given back


class Bank(Sequence[Params]):
    """A fixed, ordered set of samples; open one with `Bank.open`, make one with `Bank.from_state_dicts`.

    `len(bank)` is S, `bank[i]` the params of sample i (views, no copy), `bank.block(indices)` K of
    them stacked. `bank.layout` and `bank.info` say what they are samples of; `chain`, `draw`,
    `log_joint` and `log_weight` are columns [S], `columns` those of the method beside. Chains of different
    writers are different chains: those of each further writer are numbered on from the last one's.

    Examples:
        >>> import bnn, torch
        >>> module = torch.nn.Linear(3, 2)
        >>> bank = bnn.Bank.from_state_dicts([module.state_dict()] * 4, module=module)
        >>> len(bank), bank[0]["weight"].shape, bank.block([0, 2]).params["bias"].shape
        (4, torch.Size([2, 3]), torch.Size([2, 2]))
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        layout: Layout,
        info: Mapping[str, Any],
        *,
        path: Path | None = None,
        verify: Verify = "first-use",
        digest: str | None = None,
        base: Params | None = None,
    ) -> None:
        self.layout, self.info, self.path = layout, dict(info), path
        self._shards, self._verify, self._digest, self._base = list(shards), verify, digest, base
        self._snapshot: Snapshot | None = None  # of a bank on disk, by which it knows itself again
        self._source: remote.Source | None = None  # of a bank at an address
        self._more = fmt.more_columns(self.info, "bank.json")
        self._columns = fmt.column_dtypes(self._more)
        self._firsts = np.cumsum([0, *(shard.rows for shard in shards)])
        self._starts: list[int] = self._firsts.tolist()
        self._opened: dict[int, Params | list[Params]] = {}  # shards that single samples were asked of
        self._touched: OrderedDict[int, int] = OrderedDict()  # shard -> bytes seen since it was released

    # Ways to make one

    @staticmethod
    def open(
        path: str | Path,
        *,
        verify: Verify = "first-use",
        cache: str | Path | None = None,
        prefetch: bool = False,
        offline: bool = False,
    ) -> Bank:
        """Open a bank for reading: no lock is taken, nothing written, and later commits are not seen.

        Args:
            path: the folder; or an address, such as `https://...` or `s3://...`, that fsspec knows.
            verify: `"first-use"` compares the crc32 of a tensor when it is first touched, `"full"`
                the sha256 of every file now, `"never"` nothing but sizes and headers.
            cache: of an address, the folder that keeps copies of its files: shards come when they are first touched, and
                whatever comes has the sha256 that its manifest says.
            prefetch: have all shards now.
            offline: ask nothing of the address: all copies are here.

        Raises:
            BankNotFound: no such folder, or no bank in it.
            BankCorrupt: a file is missing, cut or altered.
            BankMismatch: a file of another bank stands among its own.
            BankLimit: it would take more memory than its shards account for.
            BankError: a newer format, or an address that cannot be read.
            BankWriteError: the cache folder cannot be written to.
            ConfigError: an address without a cache folder, or a folder with one.
        """
        choose("verify", verify, ("first-use", "never", "full"))
        if is_address(path):
            source = remote.prepare(str(path), cache=cache, offline=offline)
            return Bank._open(source.folder, verify, None, source, prefetch=prefetch)
        if cache is not None or prefetch or offline:
            raise ConfigError(
                str(path), want="an address, with cache=, prefetch= or offline=", got="a folder", fix="leave them out"
            )
        return Bank._open(Path(path), verify, None)

    @staticmethod
    def _open(
        folder: Path,
        verify: Verify,
        snapshot: Snapshot | None,
        source: remote.Source | None = None,
        *,
        prefetch: bool = False,
    ) -> Bank:
        """The bank as it is now, or as far as a snapshot of it reached."""
        known = files.identity(folder)
        described = read_config(folder)
        config, layout, identity = described.config, described.layout, described.identity
        manifests = read_manifests(folder, described, elsewhere=source.num_shards if source else 0)
        if snapshot is not None:
            manifests = as_of(snapshot, manifests, identity, folder)
        if source is not None:
            remote.have(source, config, manifests, states=verify == "full", prefetch=prefetch)
        row_bytes = layout.num_bytes + 8 * len(fmt.column_dtypes(described.columns))
        base = config.get("base")
        if base is not None and files.regular_size(folder / base["file"]) != base["bytes"]:
            raise fmt.corrupt(str(folder / base["file"]), f"{base['bytes']} bytes", "another size, or no regular file")
        shards = []
        for manifest in manifests:
            origin = described.origin(manifest["writer"])
            shards += [MappedShard(folder / fact["file"], fact, origin, verify, known) for fact in manifest["shards"]]
        if source is not None:
            for shard, fact in zip(shards, (fact for m in manifests for fact in m["shards"]), strict=True):
                shard.fetch = partial(source.fetch, fact)
        for shard in shards:
            size = files.regular_size(shard.path)
            if shard.fetch is not None and size != shard.bytes:
                size = shard.bytes  # it comes when it is touched
            if size != shard.bytes or size < shard.rows * row_bytes:
                got = f"{size} bytes" if size is not None else "no regular file"
                raise fmt.corrupt(str(shard.path), f"{shard.bytes} bytes for {shard.rows} rows", got)
        files.check_same(folder, known)
        if verify == "full":
            problems = verify_files(folder)
            if problems:
                raise BankCorrupt(
                    str(folder),
                    want="the bytes of its manifests",
                    got=problems[0],
                    fix="restore the file from a copy, or make the bank again",
                )
        facts = [layout.fingerprint, *(f["sha256"] for m in manifests for f in m["shards"])]
        info = {
            **config,
            "complete": bool(manifests) and all(m["complete"] for m in manifests),
            "resumable": _is_resumable(config, manifests),
            "diagnostics": {m["writer"]: m["info"] for m in manifests},
        }
        digest = hashlib.sha256("".join(facts).encode()).hexdigest()
        if snapshot is not None and digest != snapshot.digest:
            raise BankMismatch(
                str(folder), want="the rows that were opened", got="others", fix="open it anew with Bank.open"
            )
        bank = Bank(shards, layout, info, path=folder, verify=verify, digest=digest)
        marks = {m["writer"]: (m["generation"], len(m["shards"])) for m in manifests}
        bank._snapshot, bank._source = Snapshot(identity, marks, digest), source
        if verify == "full":
            problems = bank.check_values()
            if problems:
                raise BankCorrupt(
                    str(folder), want="finite samples", got=problems[0], fix="drop such shards with 'bnn bank repair'"
                )
        return bank

    @staticmethod
    def from_blocks(
        blocks: Sequence[Block], *, layout: Layout, info: Mapping[str, Any], base: Params | None = None
    ) -> Bank:
        """A bank held in memory."""
        kept = [block for block in blocks if block.num_samples]
        for block in kept:
            fmt.check_rows(block.params, "block", 0)
        if not kept:
            return Bank([], layout, info, base=base)
        tensors = {name: torch.cat([block.params[name] for block in kept]) for name in layout.names}
        columns = [fmt.columns_of(block) for block in kept]
        tensors |= {name: torch.cat([each[name] for each in columns]) for name in columns[0]}
        info = {**info, "columns": list(kept[0].columns)} if kept[0].columns else info
        return Bank([MemoryShard(len(tensors["@chain"]), tensors)], layout, info, base=base)

    @staticmethod
    def from_state_dicts(
        state_dicts: Sequence[Mapping[str, Tensor]],
        *,
        module: nn.Module,
        out: str | Path | None = None,
        overwrite: bool = False,
        info: Mapping[str, Any] | None = None,
    ) -> Bank:
        """A bank with one sample a state dict, such as the checkpoints of an ensemble.

        Args:
            state_dicts: at least one, each with every parameter of `module`. Buffers of real numbers that are not
                the module's in all of them, such as the statistics of batch norm, become part of the samples; others
                must equal the module's, for a bank keeps them once.
            module: whose parameters they are.
            out: a folder to write the bank to; in memory without it.
            overwrite: replace a bank that is there.
            info: more for `bank.json`, such as `{"likelihood": likelihood.to_config()}`.

        Raises:
            BankMismatch: an entry is missing, has another shape, or a buffer of whole numbers differs.
            BankError: a value is NaN or Inf.
        """
        state_dicts = list(state_dicts)
        sampled = [
            name
            for name, buffer in module.named_buffers()
            if buffer.is_floating_point()
            and any(not torch.equal(one[name].cpu(), buffer.cpu()) for one in state_dicts if name in one)
        ]
        layout = layout_of(module, buffers=sampled)
        params: dict[str, list[Tensor]] = {name: [] for name in layout.names}
        buffers = {name: buffer for name, buffer in module.state_dict().items() if name not in params}
        for place, state_dict in enumerate(state_dicts):
            for entry in layout.entries:
                tensor = state_dict.get(entry.name)
                if tensor is None or tuple(tensor.shape) != entry.shape:
                    got = "nothing" if tensor is None else f"{list(tensor.shape)}"
                    raise BankMismatch(
                        f"state dict {place}", want=str(entry), got=got, fix="pass the module they are of"
                    )
                params[entry.name].append(tensor.detach().to("cpu", entry.dtype))
            for name, buffer in buffers.items():
                if (
                    name in layout.aliases or name.split(".")[-1] == "num_batches_tracked"
                ):  # which no forward in eval mode reads
                    continue
                if not torch.equal(state_dict.get(name, buffer).cpu(), buffer.cpu()):
                    raise BankMismatch(
                        f"state dict {place}",
                        want=f"buffer '{name}' of the module",
                        got="other values",
                        fix="a bank keeps buffers of whole numbers once: load them into the module, or use layers without them",
                    )
        count = len(params[layout.names[0]])
        if not count:
            raise BankError("state_dicts", want="at least one", got="none", fix="pass a list of state dicts")
        block = make_block(
            {name: torch.stack(tensors) for name, tensors in params.items()},
            chain=torch.arange(count),
            draw=torch.zeros(count, dtype=torch.int64),
        )
        content = hashlib.sha256(b"".join(fmt.tensor_bytes(block.params[name]) for name in layout.names)).hexdigest()
        config = {"method": {"name": "state-dicts", "options": {}}, "content": content, **(info or {})}
        base = {n: b.detach() for n, b in buffers.items() if n not in layout.aliases}
        if out is None:
            return Bank.from_blocks([block], layout=layout, info=config, base=base)
        fmt.check_rows(block.params, str(out), 0)
        writer = BankWriter(out, layout=layout, config=config, base=base, overwrite=overwrite)
        writer.append(block)
        writer.close()
        return Bank.open(out)

    # Reading

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, index: int) -> Params:  # type: ignore[override]
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"bank index {index}: want 0 <= index < {size}")
        index = index + size if index < 0 else index
        place = bisect.bisect_right(self._starts, index) - 1
        row = index - self._starts[place]
        opened = self._opened.get(place)
        if opened is None:
            opened = self._opened[place] = self._rows(place)
        params = dict(opened[row]) if isinstance(opened, list) else {name: t[row] for name, t in opened.items()}
        self._count(place, self.layout.num_bytes)
        return params

    def block(self, indices: Sequence[int] | slice | Tensor) -> Block:
        """K samples stacked, in the order of `indices`: views where they are neighbours in one shard, or every n-th of it.

        Raises:
            IndexError: an index outside [-S, S).
        """
        size = len(self)
        if isinstance(indices, slice):
            found = self._sliced(*indices.indices(size))
            if found is not None:
                return found
        rows = np.arange(*indices.indices(size)) if isinstance(indices, slice) else np.asarray(indices, dtype=np.int64)
        if rows.size and not (-size <= rows.min() and rows.max() < size):
            raise IndexError(f"bank indices {rows.min()} to {rows.max()}: want 0 <= index < {size}")
        rows = np.where(rows < 0, rows + size, rows)
        places = np.searchsorted(self._firsts, rows, side="right") - 1
        names = (*self.layout.names, *self._columns)
        if rows.size and (places == places[0]).all():
            local = rows - self._firsts[places[0]]
            step = int(local[1] - local[0]) if len(local) > 1 else 1
            even = step > 0 and bool((np.diff(local) == step).all())
            pick = slice(int(local[0]), int(local[-1]) + 1, step) if even else torch.from_numpy(local)
            tensors = {name: self._tensor(int(places[0]), name)[pick] for name in names}
            self._count(int(places[0]), self.layout.num_bytes * len(rows))
        else:
            tensors = self._gather(rows, places, names)
        chain = tensors["@chain"]
        if self._num_writers > 1 and rows.size:
            chain = chain + self._first_chains[torch.from_numpy(places)]
        return self._block_of(tensors, chain)

    def _rows(self, place: int) -> Params | list[Params]:
        """The entries of a shard, to be indexed by row; where those are few, a sample a row, with views made once."""
        tensors = {name: self._tensor(place, name) for name in self.layout.names}
        if len(self) * len(tensors) > MOST_VIEWS:
            return tensors
        columns = [tensor.unbind(0) for tensor in tensors.values()]
        return [dict(zip(tensors, row, strict=True)) for row in zip(*columns, strict=True)]

    def _sliced(self, start: int, stop: int, step: int) -> Block | None:
        """Every step-th row from start on, as views; None unless they are rows of one shard, forwards."""
        count = len(range(start, stop, step))
        if step < 1 or not count:
            return None
        place = bisect.bisect_right(self._starts, start) - 1
        first, last = start - self._starts[place], start + (count - 1) * step - self._starts[place]
        if last >= self._shards[place].rows:
            return None
        names = (*self.layout.names, *self._columns)
        tensors = {name: self._tensor(place, name)[first : last + 1 : step] for name in names}
        self._count(place, self.layout.num_bytes * count)
        chain = tensors["@chain"]
        return self._block_of(tensors, chain if self._num_writers == 1 else chain + self._first_chains[place])

    def _block_of(self, tensors: dict[str, Tensor], chain: Tensor) -> Block:
        params = {name: tensors[name] for name in self.layout.names}
        more = {name: tensors[f"@{name}"] for name in self._more}
        return Block(params, chain, tensors["@draw"], tensors["@log_joint"], tensors["@log_weight"], more)

    def blocks(self, size: int) -> Iterator[tuple[int, Block]]:
        """The bank from first to last in blocks of at most `size`, with their first index; never a copy."""
        for place, shard in enumerate(self._shards):
            first = int(self._firsts[place])
            for start in range(0, shard.rows, size):
                yield first + start, self.block(slice(first + start, first + min(start + size, shard.rows)))

    @cached_property
    def chain(self) -> Tensor:
        """Chain of each sample, int64 [S]."""
        chain = self._column("@chain")
        if self._num_writers > 1:
            places = torch.arange(len(self._shards)).repeat_interleave(torch.from_numpy(np.diff(self._firsts)))
            chain += self._first_chains[places]
        return chain

    @cached_property
    def _num_writers(self) -> int:
        return len({shard.writer for shard in self._shards if isinstance(shard, MappedShard)})

    @cached_property
    def _first_chains(self) -> Tensor:
        """What each shard's chains are counted from, int64 [shards]: no two writers share a chain."""
        firsts, first, last, writer = [], 0, -1, None
        for place, shard in enumerate(self._shards):
            if isinstance(shard, MappedShard) and shard.writer != writer:
                first, writer = last + 1, shard.writer
            last = max(last, first + int(self._tensor(place, "@chain").max()))
            firsts.append(first)
        return torch.tensor(firsts)

    @cached_property
    def draw(self) -> Tensor:
        """Step of each sample in its chain, int64 [S]."""
        return self._column("@draw")

    @cached_property
    def log_joint(self) -> Tensor:
        """Full-data log joint of each sample, float64 [S]; NaN where it was not computed."""
        return self._column("@log_joint")

    @cached_property
    def log_weight(self) -> Tensor:
        """Log weight of each sample, float64 [S]; 0 unless samples are truly weighted."""
        return self._column("@log_weight")

    @cached_property
    def columns(self) -> dict[str, Tensor]:
        """What the method says of each sample beside, float64 [S] each: HMC has acceptance, divergent and more."""
        return {name: self._column(f"@{name}") for name in self._more}

    @cached_property
    def digest(self) -> str:
        """A name for exactly these samples, by which samplers know their bank again."""
        if self._digest is not None:
            return self._digest
        digest = hashlib.sha256(self.layout.fingerprint.encode())
        for shard in self._shards:
            for name in self.layout.names:
                digest.update(fmt.tensor_bytes(shard.tensor(name).contiguous()))
        return digest.hexdigest()

    def base(self) -> Params:
        """Parameters outside the sample and buffers, as they were when the bank was made.

        Raises:
            BankCorrupt: they were lost, or their file is altered.
        """
        if self._base is not None:
            return dict(self._base)
        if self.info.get("lost"):
            raise BankCorrupt(
                str(self.path),
                want="parameters outside the sample and buffers",
                got="none: base.safetensors was lost before this bank was repaired",
                fix="give them again: --base, or bnn.FunctionalModel with a module that has them",
            )
        return {} if self.path is None else Described(self.info, self.layout, self._more).base(self.path)

    def check_headers(self) -> list[str]:
        """Compare the header of every shard with manifest and layout; one line a shard that differs."""
        problems = []
        for shard in self._shards:
            if isinstance(shard, MappedShard):
                try:
                    shard.check_header()
                except BankError as error:
                    problems.append(str(error))
        return problems

    def check_values(self, progress: Callable[[int, int], object] | None = None) -> list[str]:
        """One line for each 64 rows of which some hold NaN or Inf, with the entry and the first such row.

        `progress` is told after each of them how many samples are read, and S.
        """
        problems = []
        for first, block in self.blocks(64):
            try:
                place = "bank" if self.path is None else str(self.path)
                fmt.check_rows(block.params, place, first)
                fmt.check_weights(block.log_weight, place)
            except BankError as error:
                problems.append(f"{error.place}: {error.got}")
            if progress is not None:
                progress(first + block.num_samples, len(self))
        self.release()
        return problems

    def refresh(self) -> Bank:
        """The bank as it is on disk now, with the rows committed since this one was opened.

        Raises:
            BankMismatch: another bank stands there now, or an older commit of this one.
        """
        if self.path is None or self._snapshot is None:
            return self
        source = None if self._source is None else self._source.update()
        newer = Bank._open(self.path if source is None else source.folder, self._verify, None, source)
        Bank._open(newer.path or self.path, "never", self._snapshot, source)  # whose rows must all be there still
        return newer

    def release(self) -> None:
        """Give the maps of the shards and their file descriptors back; they are made again when rows are asked for."""
        for shard in self._shards:
            if isinstance(shard, MappedShard):
                shard.close()
        self._touched.clear()
        self._opened.clear()

    def __reduce__(self) -> tuple[object, ...]:
        # A process that gets the bank opens the same commit of it: maps do not travel.
        if self.path is not None:
            return Bank._open, (self.path, self._verify, self._snapshot, self._source)
        return copyreg.__newobj__, (type(self),), {**self.__dict__, "_opened": {}}  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        where = "in memory" if self.path is None else str(self.path)
        return f"Bank({where}: {len(self)} samples of {self.layout.num_values:,} values)"

    def _column(self, name: str) -> Tensor:
        column = torch.empty(len(self), dtype=self._columns[name])
        for place, first in enumerate(self._firsts[:-1].tolist()):
            rows = self._tensor(place, name)
            column[first : first + len(rows)] = rows
        return column

    def _tensor(self, place: int, name: str) -> Tensor:
        """All rows of one entry or column of a shard; where no descriptor is left, the other shards give theirs."""
        try:
            return self._shards[place].tensor(name)
        except BankLimit:
            self.release()
            return self._shards[place].tensor(name)

    def _gather(self, rows: np.ndarray, places: np.ndarray, names: Sequence[str]) -> dict[str, Tensor]:
        """Rows from several shards: one indexed copy a shard and entry."""
        shapes = {e.name: (e.dtype, e.shape) for e in self.layout.entries}
        shapes |= {name: (dtype, ()) for name, dtype in self._columns.items()}
        tensors = {name: torch.empty(len(rows), *shapes[name][1], dtype=shapes[name][0]) for name in names}
        for place in np.unique(places).tolist():
            here = np.flatnonzero(places == place)
            local = torch.from_numpy(rows[here] - self._firsts[place])
            for name in names:
                tensors[name][torch.from_numpy(here)] = self._tensor(place, name)[local]
            self._count(place, self.layout.num_bytes * len(here))
        return tensors

    def _count(self, place: int, num_bytes: int) -> None:
        """Keep the mapped pages of the process bounded: the shards longest untouched give theirs back."""
        shard = self._shards[place]
        if isinstance(shard, MemoryShard):
            return
        most = shard.rows * self.layout.num_bytes
        self._touched[place] = min(self._touched.pop(place, 0) + num_bytes + FOLIO_BYTES, most)
        while len(self._touched) > 1 and sum(self._touched.values()) > RESIDENT_BYTES:
            oldest, _ = self._touched.popitem(last=False)
            self._shards[oldest].release()  # type: ignore[attr-defined]


def _is_resumable(config: Mapping[str, Any], manifests: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a fit can go on behind the rows of every writer: a state follows them, or there are none yet."""
    is_copy = any(key in config for key in ("thinned", "merged", "lost"))
    return not is_copy and all(m["state"] is not None or not m["rows"] for m in manifests)
