"""Checkpoints as a bank: one sample a file, in the order that people count them in."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnn.arrays import chosen_tensors, tensor_facts
from bnn.bank import Bank
from bnn.errors import BankError, BankMismatch, DataError
from bnn.importing.names import Names, check_entry, check_no_others, check_real, places_of, recorded, renamed, shape_in
from bnn.importing.target import Progress, Target, casts, pour, sample_block, target_of
from bnn.model import BayesianModel
from bnn.types import Block, make_block

REAL = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # as safetensors says them
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".tar")
READ_STEP = 8 * 1024 * 1024


def from_checkpoints(
    source: str | Path | Sequence[str | Path],
    model: nn.Module | BayesianModel,
    *,
    names: Names | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    record: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Bank:
    """A bank with one sample a checkpoint: safetensors files of state dicts, read one at a time.

    Sample i is the i-th file, its chain i, its draw 0, as `Bank.from_state_dicts` has them; buffers are dealt with as
    there. Files of a folder stand in natural order, `epoch2` before `epoch10`. All are checked before one row is written.

    Args:
        source: a folder, of which every `.safetensors` file is a checkpoint; or the files in their order.
        model: the module that they are of, or a BayesianModel of it. Tensors that are outside the sample must equal
            those of the module, for a bank keeps them once.
        names: the files' names -> those of the module, where they differ.
        out: a folder to write the bank to; in memory without it.
        overwrite: replace a bank that is there.
        record: more for `bank.json`, such as `{"likelihood": likelihood.to_config()}`.
        progress: told after each file how many are read, and how many readings there are: each file is read twice.

    Raises:
        DataError: no such folder, no checkpoint in it, or one that is a pickle: nothing is run to read it.
        BankMismatch: a name is missing, unknown or of another shape or kind; or a tensor outside the sample differs.
        BankError: a value is NaN or Inf.
        ConfigError: a map of names that does not fit.

    Examples:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from safetensors.torch import save_file
        >>> folder, module = Path(tempfile.mkdtemp()), torch.nn.Linear(3, 2)
        >>> for epoch in (8, 9, 10):
        ...     save_file({"weight": torch.full((2, 3), float(epoch)), "bias": torch.zeros(2)}, folder / f"{epoch}.safetensors")
        >>> bank = from_checkpoints(folder, module)
        >>> [float(sample["weight"][0, 0]) for sample in bank], bank.chain.tolist()
        ([8.0, 9.0, 10.0], [0, 1, 2])
    """
    paths = _files_of(source)
    module = model.module if isinstance(model, BayesianModel) else model
    state = {name: tensor.detach().cpu() for name, tensor in module.state_dict().items() if isinstance(tensor, Tensor)}
    facts = [_Facts(path, names) for path in paths]
    buffers = {name for name, _ in module.named_buffers() if name in state}
    differing = {name for one in facts for name in one.differing(buffers, state)}
    sampled = [name for name in differing if state[name].is_floating_point()]
    target = target_of(model, buffers=sampled)
    digest, total = hashlib.sha256(), 2 * len(paths)
    for done, one in enumerate(facts, 1):
        one.check(target, state)
        digest.update(one.sha256())
        if progress is not None:
            progress(done, total)

    def blocks() -> Iterator[Block]:
        for number, one in enumerate(facts):
            values = {name: tensor[None] for name, tensor in one.values(target).items()}  # [1, *shape]
            params = sample_block(values, target.layout, str(one.path), number)
            yield make_block(params, chain=torch.tensor([number]), draw=torch.tensor([0]))
            if progress is not None:
                progress(len(facts) + number + 1, total)

    dtypes = {name: REAL.get(facts[0].facts[one].dtype, "") for name, one in facts[0].sources.items()}
    options = {
        "from": "checkpoints",
        "source": _named(source),
        "files": len(paths),
        **recorded(names),
        "sha256": digest.hexdigest(),
        "cast": casts(dtypes, target.layout),
    }
    return pour(blocks(), target, options, out=out, overwrite=overwrite, record=record)


def _named(source: str | Path | Sequence[str | Path]) -> str:
    return str(source) if isinstance(source, (str, Path)) else str(Path(source[0]).parent)


def natural_key(name: str) -> list[tuple[bool, int, str]]:
    """By which `epoch2` stands before `epoch10`."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", name) if part]


def _files_of(source: str | Path | Sequence[str | Path]) -> list[Path]:
    """The checkpoints, in their order."""
    if not isinstance(source, (str, Path)):
        paths = [Path(path) for path in source]
        if not paths:
            raise DataError("checkpoints", want="at least one", got="none", fix="pass a folder or files")
        for path in paths:
            _check_kind(path)
        return paths
    folder = Path(source)
    if not folder.is_dir():
        got = "a file" if folder.exists() else "nothing there"
        raise DataError(str(folder), want="a folder of checkpoints", got=got, fix="name the folder that holds them")
    if (folder / "bank.json").exists():
        raise DataError(
            str(folder), want="a folder of checkpoints", got="a bank", fix="open it with bnn.Bank.open, or merge banks"
        )
    entries = sorted(folder.iterdir(), key=lambda path: natural_key(path.name))
    for path in entries:
        if path.suffix in PICKLES:
            _check_kind(path)
    found = [path for path in entries if path.suffix == ".safetensors"]
    if not found:
        raise DataError(str(folder), want=".safetensors files", got="none", fix="save each state dict with save_file")
    return found


def _check_kind(path: Path) -> None:
    """Raise DataError for what is no safetensors file by its name."""
    if path.suffix != ".safetensors":
        raise DataError(
            str(path),
            want="a .safetensors file: pickles can run code when they are read",
            got=path.suffix or "no suffix",
            fix="convert it where you trust it: safetensors.torch.save_file(torch.load("
            f"'{path.name}', weights_only=True), '{path.stem}.safetensors')",
        )


class _Fact:
    """Of one tensor of a file, under the module's name for it."""

    def __init__(self, source: str, dtype: str, shape: tuple[int, ...], axes: tuple[int, ...] | None) -> None:
        self.source, self.dtype, self.axes = source, dtype, axes
        self.shape = shape_in(source, shape, axes)


class _Facts:
    """What a checkpoint holds: names, dtypes and shapes now, values when they are asked for."""

    def __init__(self, path: Path, names: Names | None) -> None:
        self.path = path
        there = tensor_facts(path)
        places_of(there, names, str(path))
        self.facts: dict[str, _Fact] = {}
        for name, (dtype, shape) in there.items():
            found = renamed(name, names)
            if found is not None:
                self.facts[found.name] = _Fact(name, dtype, shape, found.axes(len(shape)))
        self.sources: dict[str, str] = {}  # entry -> the name of the module that it is found under, maybe a tied one

    def read(self, wanted: Sequence[str]) -> dict[str, Tensor]:
        """Tensors by the module's names, their axes in its order."""
        found = chosen_tensors(self.path, [self.facts[name].source for name in wanted])
        ordered = {}
        for name in wanted:
            fact = self.facts[name]
            tensor = found[fact.source]
            ordered[name] = tensor if fact.axes is None else tensor.permute(fact.axes)
        return ordered

    def differing(self, names: set[str], state: Mapping[str, Tensor]) -> list[str]:
        """Which of these tensors are not those of the module; counts of batches, which no forward reads, left out."""
        wanted = [name for name in sorted(names) if name in self.facts and not name.endswith("num_batches_tracked")]
        return [name for name, tensor in self.read(wanted).items() if not torch.equal(tensor, state[name])]

    def check(self, target: Target, state: Mapping[str, Tensor]) -> None:
        """Raise unless the file has every entry in its shape, nothing unknown, and the module's own values outside."""
        place, layout = str(self.path), target.layout
        tied = {name: [name, *(a for a, kept in layout.aliases.items() if kept == name)] for name in layout.names}
        for entry in layout.entries:
            there = [name for name in tied[entry.name] if name in self.facts]
            check_entry(entry, self.facts[there[0]].shape if there else None, place)
            fact = self.facts[there[0]]
            check_real(fact.source, fact.dtype, fact.dtype in REAL, place)
            self.sources[entry.name] = there[0]
            for other, tensor in self.read(there[1:]).items():
                if not torch.equal(tensor, self.read(there[:1])[there[0]]):
                    raise BankMismatch(
                        place, want=f"'{other}' equal to '{there[0]}', to which it is tied", got="other values",
                        fix="pass the module that these values are of",
                    )  # fmt: skip
        check_no_others(self.facts, {*state, *layout.names, *layout.aliases}, layout, place)
        outside = set(state) - set(layout.names) - set(layout.aliases)
        differing = self.differing(outside, state)
        if differing:
            raise BankMismatch(
                place,
                want=f"'{differing[0]}' as the module has it: a bank keeps once what is outside its samples",
                got="other values",
                fix="load it into the module before, or make it part of the sample with bayesian=",
            )

    def values(self, target: Target) -> dict[str, Tensor]:
        """One sample [*shape]."""
        found = self.read(list(self.sources.values()))
        return {entry.name: found[self.sources[entry.name]] for entry in target.layout.entries}

    def sha256(self) -> bytes:
        """Of the file."""
        digest = hashlib.sha256()
        try:
            with self.path.open("rb") as file:
                while piece := file.read(READ_STEP):
                    digest.update(piece)
        except OSError as error:
            raise BankError(
                str(self.path), want="to read it", got=error.strerror or str(error), fix="check the disk"
            ) from error
        return digest.digest()
