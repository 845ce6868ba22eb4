"""A bank in memory: a read-only sequence of samples, mapped from shards or held as tensors."""

from __future__ import annotations

import bisect
import copyreg
import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from bnn.bank import files, remote
from bnn.bank import format as fmt
from bnn.bank.address import is_address
from bnn.bank.codecs import Codec, Coding, Reused
from bnn.bank.manifests import Described, read_config
from bnn.bank.opening import find
from bnn.bank.residency import HeldShard, Placement, Residency, load, placed, placement
from bnn.bank.shards import LARGE_SAMPLE, MappedShard, MemoryShard, Shard, Verify
from bnn.bank.snapshot import Snapshot
from bnn.bank.streaming import Stream, StreamedShard
from bnn.bank.virtual import VirtualBank, is_virtual, open_virtual
from bnn.bank.writer import BankWriter
from bnn.errors import BankCorrupt, BankError, BankLimit, BankMismatch, ConfigError, choose
from bnn.layout import Layout, layout_of
from bnn.types import Block, Params, make_block

FOLIO_BYTES = 2 * 1024 * 1024  # a page fault may map so much at once: Linux 6.18 maps whole folios of the page cache
MOST_VIEWS = 20_000  # of single samples that a bank keeps: about 10 MB of Python's
RESIDENT_BYTES = 128 * 1024 * 1024  # mapped pages kept in the process by default before the oldest are given back


@runtime_checkable
class Order(Protocol):
    """Which indices come, as a function of positions, and where it stands: a `SampleIndexSampler`."""

    @property
    def position(self) -> int: ...

    def detached(self) -> Order:
        """The same without a hold on the bank."""
        ...

    def at(self, positions: range) -> Tensor: ...


class Bank(Sequence[Params]):
    """A fixed, ordered set of samples; open one with `Bank.open`, make one with `Bank.from_state_dicts`.

    `len(bank)` is S, `bank[i]` the params of sample i (views, no copy, unless they are coded), `bank.block(indices)` K of
    them stacked. `bank.layout` and `bank.info` say what they are samples of; `chain`, `draw`,
    `log_joint` and `log_weight` are columns [S], `columns` those of the method beside. Chains of different
    writers are different chains: those of each further writer are numbered on from the last one's, unless they
    are the ranks of one run, which number theirs together.

    What it hands out stays as it is, whatever is asked for next. Of a bank that is streamed a view keeps the buffer that
    it looks into, and where too many buffers are kept, copies are handed out.

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
        coding: Coding | None = None,
        stream: Stream | None = None,
    ) -> None:
        self.layout, self.info, self.path = layout, dict(info), path
        self.stored = layout if coding is None else coding.stored  # the layout of the shards
        self._coding = coding
        self._shards, self._verify, self._digest, self._base = list(shards), verify, digest, base
        self._snapshot: Snapshot | None = None  # of a bank on disk, by which it knows itself again
        self._source: remote.Source | None = None  # of a bank at an address
        self._placement, self._stream = Placement(), stream
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
        residency: Residency = "mapped",
        device: str | torch.device | None = None,
        host_budget: int | str | None = None,
        device_budget: int | str | None = None,
        allow_other_device: bool = False,
        cache: str | Path | None = None,
        prefetch: bool = False,
        offline: bool = False,
    ) -> Bank:
        """Open a bank for reading: no lock is taken, nothing written, and later commits are not seen.

        Args:
            path: the folder; or an address, such as `https://...` or `s3://...`, that fsspec knows.
            verify: `"first-use"` compares the crc32 of a tensor when it is first touched or read, `"full"`
                the sha256 of every file now, `"never"` nothing but sizes and headers. Of a virtual bank the guide's
                file and sample 0 are compared now, but for `"never"`.
            residency: `"mapped"` maps the shards; `"host"` reads the whole bank into memory now, `"device"` onto a device;
                `"streamed"` keeps some shards in buffers and lets threads read those ahead that are wanted next.
            device: for `"device"`, CUDA by default, and for `"streamed"`, the memory of this process by default.
            host_budget: bytes of this process that samples may take, a number or a text such as `"2GB"`: of all buffers of
                a bank that is streamed, or of the pinned ones on the way to a device; of the pages of a bank that is
                mapped, 128 MiB without it.
            device_budget: bytes of a CUDA device that samples may take.
            allow_other_device: open a virtual bank also on a CPU or with a torch on which its samples were not made;
                warns (`OtherDevice`) where sample 0 has other bits here.
            cache: of an address, the folder that keeps copies of its files: shards come when they are first touched, and
                whatever comes has the sha256 that its manifest says.
            prefetch: have all shards now.
            offline: ask nothing of the address: all copies are here.

        Raises:
            BankNotFound: no such folder, or no bank in it.
            BankCorrupt: a file is missing, cut or altered.
            BankMismatch: a file of another bank stands among its own; a virtual bank was made on another device.
            BankLimit: it would take more memory than its shards account for, or than a budget allows.
            BankError: a newer format, a virtual bank whose fit is not finished, or an address that cannot be read.
            BankWriteError: the cache folder cannot be written to.
            ConfigError: options that contradict each other, a device that is not there, or an address without a cache folder.
        """
        choose("verify", verify, ("first-use", "never", "full"))
        wanted = placement(residency, device, host_budget, device_budget)
        source = remote.prepare(str(path), cache=cache, offline=offline) if is_address(path) else None
        if source is None and (cache is not None or prefetch or offline):
            raise ConfigError(
                str(path), want="an address, with cache=, prefetch= or offline=", got="a folder", fix="leave them out"
            )
        folder = Path(path) if source is None else source.folder
        bank = Bank._open(folder, verify, None, wanted, allow_other_device, source, prefetch=prefetch)
        if not isinstance(bank, VirtualBank):
            load(bank._shards)
        return bank

    @staticmethod
    def _open(
        folder: Path,
        verify: Verify,
        snapshot: Snapshot | None,
        wanted: Placement = Placement(),  # noqa: B008
        allow_other_device: bool = False,
        source: remote.Source | None = None,
        *,
        prefetch: bool = False,
    ) -> Bank:
        """The bank as it is now, or as far as a snapshot of it reached; what is to be held is read when touched."""
        known = files.identity(folder)
        described = read_config(folder)
        if snapshot is None and is_virtual(described.config):
            if wanted != Placement():
                raise ConfigError(
                    f"{folder}: residency={wanted.residency!r}",
                    want="'mapped' for a virtual bank, whose samples are made when they are asked for, and no budget",
                    got="another" if wanted.residency != "mapped" else f"host_budget={wanted.host_budget}",
                    fix="leave it out, or write the samples with 'bnn bank materialise' first",
                )
            made = open_virtual(folder, described, verify=verify != "never", allow_other_device=allow_other_device)
            return cast(Bank, made)  # the same interface, and registered below as one
        found = find(folder, known, described, verify=verify, snapshot=snapshot, source=source, prefetch=prefetch)
        there, stream = placed(found.shards, described.names, wanted, str(folder))
        bank = Bank(
            there,
            described.layout,
            found.info,
            path=folder,
            verify=verify,
            digest=found.snapshot.digest,
            coding=described.coding,
            stream=stream,
        )
        bank._placement, bank._snapshot, bank._source = wanted, found.snapshot, source
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
        if self._stream is not None:
            params = {name: tensor[row] for name, tensor in self._take(place, self.layout.names).items()}
            params = self._handed(place, params, [index])
            return params if self._coding is None else self._codec.decode(params)
        opened = self._opened.get(place)
        if opened is None:
            opened = self._opened[place] = self._rows(place)
        params = dict(opened[row]) if isinstance(opened, list) else {name: t[row] for name, t in opened.items()}
        self._count(place, self.stored.num_bytes)
        return params if self._coding is None else self._codec.decode(params)

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
            tensors = {name: tensor[pick] for name, tensor in self._take(int(places[0]), names).items()}
            tensors = self._handed(int(places[0]), tensors, rows, are_views=even)
            self._count(int(places[0]), self.stored.num_bytes * len(rows))
        else:
            tensors = self._gather(rows, places, names)
        chain = tensors["@chain"]
        if self._num_writers > 1 and rows.size:
            chain = chain + self._first_chains[torch.from_numpy(places)]
        return self._block_of(tensors, chain)

    def _rows(self, place: int) -> Params | list[Params]:
        """The entries of a shard, to be indexed by row; where those are few, a sample a row, with views made once."""
        tensors = self._take(place, self.layout.names)
        if len(self) * len(tensors) > MOST_VIEWS:
            return tensors
        # Made row by row, so that those of one sample lie beside each other: they are read together.
        return [{name: tensor[row] for name, tensor in tensors.items()} for row in range(self._shards[place].rows)]

    def _sliced(self, start: int, stop: int, step: int, memory: Reused | None = None) -> Block | None:
        """Every step-th row from start on, as views; None unless they are rows of one shard, forwards."""
        count = len(range(start, stop, step))
        if step < 1 or not count:
            return None
        place = bisect.bisect_right(self._starts, start) - 1
        first, last = start - self._starts[place], start + (count - 1) * step - self._starts[place]
        if last >= self._shards[place].rows:
            return None
        names = (*self.layout.names, *self._columns)
        tensors = {name: tensor[first : last + 1 : step] for name, tensor in self._take(place, names).items()}
        if self._stream is not None:
            tensors = self._handed(place, tensors, range(start, stop, step))
        self._count(place, self.stored.num_bytes * count)
        chain = tensors["@chain"]
        return self._block_of(tensors, chain if self._num_writers == 1 else chain + self._first_chains[place], memory)

    def _block_of(self, tensors: dict[str, Tensor], chain: Tensor, memory: Reused | None = None) -> Block:
        params = {name: tensors[name] for name in self.layout.names}
        if self._coding is not None:
            params = self._codec.decode(params, memory)
        more = {name: tensors[f"@{name}"] for name in self._more}
        return Block(params, chain, tensors["@draw"], tensors["@log_joint"], tensors["@log_weight"], more)

    def blocks(self, size: int) -> Iterator[tuple[int, Block]]:
        """The bank from first to last in blocks of at most `size`, with their first index.

        A copy only where they are coded: into memory of blocks before, once nobody holds these or a view of them.
        """
        memory = Reused()
        for place, shard in enumerate(self._shards):
            first = int(self._firsts[place])
            for start in range(first, first + shard.rows, size):
                # Neighbours in one shard; without a name, by which this frame would hold the block while the next is made.
                yield start, cast(Block, self._sliced(start, min(start + size, first + shard.rows), 1, memory))

    @cached_property
    def _codec(self) -> Codec:
        assert self._coding is not None
        assert self.path is not None
        return self._coding.read(self.path)

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
        """Writers whose chains are counted apart: the ranks of one run number theirs together."""
        if self.info.get("ranks"):
            return 1
        return len({shard.writer for shard in self._shards if shard.writer is not None})

    @cached_property
    def _first_chains(self) -> Tensor:
        """What each shard's chains are counted from, int64 [shards]: no two writers share a chain."""
        firsts, first, last, writer = [], 0, -1, None
        for place, shard in enumerate(self._shards):
            if shard.writer is not None and shard.writer != writer:
                first, writer = last + 1, shard.writer
            last = max(last, first + int(self._column_of(place, "@chain").max()))
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
        if self.path is None:
            return {}
        return Described(self.info, self.layout, self._more, self._coding).base(self.path)

    def check_headers(self) -> list[str]:
        """Compare the header of every shard with manifest and layout; one line a shard that differs."""
        problems = []
        for shard in self._shards:
            mapped = shard.file.shard if isinstance(shard, (HeldShard, StreamedShard)) else shard
            if isinstance(mapped, MappedShard):
                try:
                    mapped.check_header()
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

    @property
    def residency(self) -> Residency:
        """Where its samples are: `"mapped"`, `"host"`, `"device"` or `"streamed"`; in memory it is `"host"`."""
        return "host" if self.path is None else self._placement.residency

    @property
    def shard_rows(self) -> tuple[int, ...]:
        """Samples of each shard, in their order: what a reader has to read at once."""
        return tuple(shard.rows for shard in self._shards)

    def follow(
        self, order: Order | Iterable[int] | Tensor | None, *, start: int | None = None, window: int = 4096
    ) -> None:
        """Say which samples will be asked for, in order: a streamed bank reads them ahead, and keeps what is wanted soonest.

        Nothing else changes: any sample may be asked for, also off the order, which is dropped where the reader leaves it
        for good. Banks that are not streamed need no foresight, and ignore it. `PairedLoader` says it at every epoch, and
        `FunctionalModel.stream`, which `predict` and `evaluate` use, at every batch.

        Args:
            order: a `SampleIndexSampler`, from its present position on, or bank indices; None for from first to last.
            start: position of the sampler to begin at, in place of its present one.
            window: positions to look ahead, at least 1; those behind them count as never.

        Raises:
            IndexError: an index outside [-S, S).
            BankError: at a later row, from an order whose `at` reads this bank.
        """
        if self._stream is None:
            return
        if window < 1:
            raise ConfigError("window", want="at least 1", got=str(window), fix="leave it out")
        self._stream.ring.follow(None if order is None else self._pieces(order, start, window), window)

    def _pieces(self, order: Order | Iterable[int] | Tensor, start: int | None, window: int) -> Iterator[np.ndarray]:
        """What will be asked for, a window at a time, int64 from 0 on."""
        size = len(self)
        if not isinstance(order, Order):
            listed = np.asarray(order if isinstance(order, (Tensor, np.ndarray)) else list(order), dtype=np.int64)
            if listed.size and not (-size <= listed.min() and listed.max() < size):
                raise IndexError(f"bank indices {listed.min()} to {listed.max()}: want 0 <= index < {size}")
            listed = np.where(listed < 0, listed + size, listed)
            return (listed[first : first + window] for first in range(0, len(listed), window))
        ahead = order.detached()
        begin = order.position if start is None else start
        return (ahead.at(range(first, first + window)).numpy() for first in itertools.count(begin, window))

    def refresh(self) -> Bank:
        """The bank as it is on disk now, with the rows committed since this one was opened.

        Raises:
            BankMismatch: another bank stands there now, or an older commit of this one.
        """
        if self.path is None or self._snapshot is None:
            return self
        source = None if self._source is None else self._source.update()
        folder = self.path if source is None else source.folder
        newer = Bank._open(folder, self._verify, None, self._placement, source=source)
        Bank._open(folder, "never", self._snapshot, source=source)  # whose rows must all be there still
        return newer

    def release(self) -> None:
        """Give maps and file descriptors back, end the threads of a stream and free its buffers.

        All are made again when rows are asked for. Views that were handed out stay.
        """
        for shard in self._shards:
            if isinstance(shard, MappedShard):
                shard.close()
        if self._stream is not None:
            self._stream.release()
        self._touched.clear()
        self._opened.clear()

    def __reduce__(self) -> tuple[object, ...]:
        # A process that gets the bank opens the same commit of it: maps do not travel.
        if self.path is not None:
            return Bank._open, (self.path, self._verify, self._snapshot, self._placement, False, self._source)
        return copyreg.__newobj__, (type(self),), {**self.__dict__, "_opened": {}}  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        where = "in memory" if self.path is None else str(self.path)
        return f"Bank({where}: {len(self)} samples of {self.layout.num_values:,} values)"

    def _column(self, name: str) -> Tensor:
        column = torch.empty(len(self), dtype=self._columns[name])
        for place, first in enumerate(self._firsts[:-1].tolist()):
            rows = self._column_of(place, name)
            column[first : first + len(rows)] = rows
        return column

    def _column_of(self, place: int, name: str) -> Tensor:
        """A column of a shard [R]; where no descriptor is left, the other shards give theirs."""
        try:
            return self._shards[place].column(name)
        except BankLimit:
            self.release()
            return self._shards[place].column(name)

    def _take(self, place: int, names: Sequence[str]) -> dict[str, Tensor]:
        """All rows of entries and columns of a shard; where no descriptor is left, the other shards give theirs."""
        try:
            return self._shards[place].take(names)
        except BankLimit:
            self.release()
            return self._shards[place].take(names)

    def _handed(
        self, place: int, tensors: dict[str, Tensor], indices: Sequence[int] | np.ndarray, *, are_views: bool = True
    ) -> dict[str, Tensor]:
        """Rows of a shard as a caller may keep them; a stream is told which they were."""
        shard = self._shards[place]
        if isinstance(shard, StreamedShard):
            tensors = shard.handed(tensors) if are_views else tensors
            shard.note(np.asarray(indices).tolist())
        return tensors

    def _gather(self, rows: np.ndarray, places: np.ndarray, names: Sequence[str]) -> dict[str, Tensor]:
        """Rows from several shards: one indexed copy a shard and entry."""
        shapes = {e.name: (e.dtype, e.shape) for e in self.stored.entries}
        shapes |= {name: (dtype, ()) for name, dtype in self._columns.items()}
        device = torch.device(self._placement.device or "cpu")
        tensors = {
            name: torch.empty(
                len(rows),
                *shapes[name][1],
                dtype=shapes[name][0],
                device=device if name in self.layout.names else "cpu",
            )
            for name in names
        }
        for place in np.unique(places).tolist():
            here = np.flatnonzero(places == place)
            local = torch.from_numpy(rows[here] - self._firsts[place])
            self._copy_rows(place, local, torch.from_numpy(here), tensors)
            self._count(place, self.stored.num_bytes * len(here))
        if len(rows):
            self._handed(int(places[-1]), {}, rows)
        return tensors

    def _copy_rows(self, place: int, local: Tensor, here: Tensor, tensors: dict[str, Tensor]) -> None:
        """Rows of a shard to their places; no view of the shard is left when the next one is asked for."""
        for name, tensor in self._take(place, list(tensors)).items():
            tensors[name][here] = tensor[local]

    def _count(self, place: int, num_bytes: int) -> None:
        """Keep the mapped pages of the process bounded: the shards longest untouched give theirs back."""
        shard = self._shards[place]
        budget = self._placement.host_budget or RESIDENT_BYTES
        if not isinstance(shard, MappedShard) or len(self) * self.stored.num_bytes <= budget:
            return
        most = shard.rows * self.stored.num_bytes
        folios = len(self.stored.entries) if self.stored.num_bytes >= LARGE_SAMPLE else 1
        self._touched[place] = min(self._touched.pop(place, 0) + num_bytes + folios * FOLIO_BYTES, most)
        while len(self._touched) > 1 and sum(self._touched.values()) > budget:
            oldest, _ = self._touched.popitem(last=False)
            self._shards[oldest].release()  # type: ignore[attr-defined]  # none but those that are mapped are counted


Bank.register(VirtualBank)  # which shares no code with it, only the interface
