"""The log likelihood of every row under every sample, [S, N], in memory or as a file that is read mapped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnn.bank import files
from bnn.bank import format as fmt
from bnn.bank.exporting import check_target
from bnn.batches import num_rows
from bnn.errors import BankCorrupt, ConfigError, DataError
from bnn.evaluation.batches import batches
from bnn.functional import FunctionalModel
from bnn.likelihoods import Likelihood, Poisson, as_columns, likelihood_from_config, one_tensor
from bnn.types import Batch, Data

KIND, VERSION = "bnn-pointwise", 1
SLAB_VALUES = 2**22  # numbers of all samples on some rows, held at once: 32 MiB


class Pointwise(NamedTuple):
    """log p(y_n | x_n, theta_s) of a bank's samples on rows of data, in units of the target."""

    log_likelihood: Tensor  # float64 [S, N]; a view of the file, where it was read from one
    chain: Tensor  # int64 [S]
    draw: Tensor  # int64 [S]
    log_weight: Tensor  # float64 [S], as the bank has them
    about: dict[str, Any]  # digest of the bank, its method and temperature, likelihood, units, rows
    file: files.MappedFile | None = None

    @staticmethod
    def open(path: str | Path) -> Pointwise:
        """The file that `log_likelihoods` wrote, mapped: values are read when they are used.

        Raises:
            BankCorrupt: it is no such file, or was cut.
        """
        file = files.map_tensors(Path(path))
        wanted = {"log_likelihood", "chain", "draw", "log_weight"}
        if file.metadata.get("kind") != KIND or not wanted <= file.tensors.keys():
            got = file.metadata.get("kind", "another safetensors file")
            raise BankCorrupt(
                str(path), want=f"a file of kind {KIND}", got=got, fix="make it with 'bnn bank loo --out'"
            )
        if file.metadata.get("version") != str(VERSION):
            raise BankCorrupt(
                str(path), want=f"version {VERSION}", got=str(file.metadata.get("version")), fix="make the file again"
            )
        values, columns = (
            file.tensors["log_likelihood"],
            [file.tensors[name] for name in ("chain", "draw", "log_weight")],
        )
        if values.dim() != 2 or any(column.shape != values.shape[:1] for column in columns):
            raise BankCorrupt(
                str(path), want="values [S, N] and columns [S]", got=str(list(values.shape)), fix="make the file again"
            )
        about = fmt.parse_json(file.metadata.get("about", "").encode(), str(path))
        return Pointwise(values, columns[0], columns[1], columns[2], about, file)

    @property
    def num_samples(self) -> int:
        return self.log_likelihood.shape[0]

    @property
    def num_rows(self) -> int:
        return self.log_likelihood.shape[1]

    def slabs(self) -> Iterator[tuple[int, Tensor]]:
        """All samples on some rows at once: first row and values [S, n], as many as fit a bounded memory."""
        size = max(1, SLAB_VALUES // max(self.num_samples, 1))
        for start in range(0, self.num_rows, size):
            yield start, self.log_likelihood[:, start : start + size]
            if self.file is not None:
                self.file.release()  # else all that was read would count as this process's memory

    def log_predictive(self) -> Tensor:
        """Log density of each row under the predictive, log sum_s w_s p(y_n | x_n, theta_s), [N]."""
        log_weight = self.log_weight.log_softmax(dim=0).unsqueeze(1)
        return torch.cat([(slab + log_weight).logsumexp(dim=0) for _, slab in self.slabs()])


def log_likelihoods(
    net: FunctionalModel,
    data: Data,
    *,
    out: str | Path | None = None,
    likelihood: Likelihood | None = None,
    loc: float | Tensor = 0.0,
    scale: float | Tensor = 1.0,
    batch_size: int = 512,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Pointwise:
    """Log likelihood of every row of data under every sample of a bank.

    log p(y_n | x_n, theta_s), of a density in the target's own units: log p of the standardised target, less
    sum_c log |scale_c|.

    Rows come batch after batch, and each batch under all samples, [S, B] numbers at once. With `out` they go to a
    safetensors file, which may be larger than memory, and are read back mapped: `log_likelihood` [S, N], the columns
    `chain`, `draw`, `log_weight` [S], and metadata that say of which bank and rows they are. The file takes its name when
    all of it is there.

    Args:
        net: a module under a bank.
        data: a pair of tensors, a data set, or a loader; taken once, in its order.
        out: a file; in memory without it.
        likelihood: what outputs mean; the one that the bank was made with by default.
        loc: the mean that regression targets were standardised with, or one a target [C].
        scale: their standard deviation.
        batch_size: rows at once, where `data` is no loader.
        overwrite: replace a file at `out`.
        progress: show a bar on stderr; by default where stderr is a terminal.

    Raises:
        DataError: targets that do not fit the task, NaN or Inf of a sample, whose index is named, or fewer rows than the
            data have.
        ConfigError: the bank has no sample, or it names no likelihood and none is given.
        BankExists: something is at `out`.
        BankWriteError: the disk refused.

    Examples:
        >>> import bnn
        >>> module = torch.nn.Linear(3, 2)
        >>> bank = bnn.Bank.from_state_dicts([module.state_dict()] * 4, module=module)
        >>> data = torch.zeros(5, 3), torch.tensor([0, 1, 0, 1, 0])
        >>> found = log_likelihoods(bnn.FunctionalModel(module, bank), data, likelihood=bnn.likelihoods.Categorical())
        >>> found.log_likelihood.shape, found.log_predictive().shape
        (torch.Size([4, 5]), torch.Size([5]))
    """
    likelihood = likelihood or likelihood_from_config(net.bank.info.get("likelihood"))
    if not len(net.bank):
        raise ConfigError("bank", want="at least one sample", got="none", fix="go on with its fit first")
    loc, scale = torch.as_tensor(loc, dtype=torch.float64), torch.as_tensor(scale, dtype=torch.float64)
    if not bool((torch.isfinite(scale) & (scale != 0)).all()):
        raise ConfigError(
            "log_likelihoods(scale=)",
            want="numbers other than 0",
            got=str(scale.tolist()),
            fix="pass the target's spread",
        )
    if isinstance(likelihood, Poisson) and not (bool((loc == 0).all()) and bool((scale == 1).all())):
        raise ConfigError(
            "log_likelihoods(loc=, scale=)", want="0 and 1 for counts", got="others", fix="fit counts as they are"
        )
    size, rows = len(net.bank), num_rows(data)
    counted = _Counted(rows)
    slabs = counted.watched(batches(data, batch_size, "log likelihood", progress))
    found = ((first, _slab(net, batch, likelihood, scale)) for first, batch in slabs)
    if out is None:
        values = torch.empty(size, rows, dtype=torch.float64)
        for first, slab in found:
            values[:, first : first + slab.shape[1]] = slab
        return Pointwise(
            values, net.bank.chain, net.bank.draw, net.bank.log_weight, _about(net, likelihood, loc, scale, counted)
        )
    check_target(Path(out), overwrite=overwrite)
    columns = {"chain": net.bank.chain, "draw": net.bank.draw, "log_weight": net.bank.log_weight}
    facts: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"log_likelihood": (torch.float64, (size, rows))}
    facts |= {name: (column.dtype, (size,)) for name, column in columns.items()}

    def header() -> tuple[bytes, dict[str, fmt.Place]]:
        about = json.dumps(_about(net, likelihood, loc, scale, counted), sort_keys=True)
        return fmt.encode_header(facts, {"kind": KIND, "version": str(VERSION), "about": about}, alignment=1)

    def pieces() -> Iterator[tuple[int, memoryview | bytes]]:
        places = header()[1]  # of the same length as the last: the rows' checksum is as long before it is known
        begin = places["log_likelihood"].begin
        for first, slab in found:
            for sample, part in enumerate(slab.contiguous()):
                yield begin + 8 * (sample * rows + first), fmt.tensor_bytes(part)
        for name, column in columns.items():
            yield places[name].begin, fmt.tensor_bytes(column.contiguous())
        yield 0, header()[0]

    files.write_places(Path(out), pieces())
    return Pointwise.open(out)


class _Counted:
    """Rows that went by: how many, and a checksum of their targets."""

    def __init__(self, wanted: int) -> None:
        self.wanted, self.seen, self._digest = wanted, 0, hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def watched(self, batches: Iterator[Batch]) -> Iterator[tuple[int, Batch]]:
        """Each batch with the number of its first row.

        Raises:
            DataError: they are not as many as the data have.
        """
        for batch in batches:
            first, self.seen = self.seen, self.seen + len(batch.y)
            if self.seen > self.wanted:
                break
            self._digest.update(fmt.tensor_bytes(batch.y.detach().cpu().double().contiguous()))
            yield first, batch
        if self.seen != self.wanted:
            raise DataError(
                "data",
                want=f"all {self.wanted} rows, each once",
                got=f"{self.seen}",
                fix="leave out drop_last, or pass the data set",
            )


def _about(net: FunctionalModel, likelihood: Likelihood, loc: Tensor, scale: Tensor, rows: _Counted) -> dict[str, Any]:
    info = net.bank.info
    return {
        "bank": net.bank.digest,
        "method": str((info.get("method") or {}).get("name") or ""),
        "temperature": float(info.get("temperature") or 1.0),
        "likelihood": likelihood.to_config(),
        "loc": loc.flatten().tolist(),
        "scale": scale.flatten().tolist(),
        "data": {"num_rows": rows.wanted, "targets_sha256": rows.sha256},
    }


@torch.no_grad()
def _slab(net: FunctionalModel, batch: Batch, likelihood: Likelihood, scale: Tensor) -> Tensor:
    """Log likelihood of a batch under all samples, float64 [S, B]."""
    y = batch.y.cpu()
    shift = torch.zeros((), dtype=torch.float64)
    if likelihood.task == "regression":
        y = y.double()
        shift = scale.abs().log().expand(as_columns(y).shape[1:]).sum()
    found = []
    for indices, block, outputs in net.stream(batch.x):
        values = one_tensor(outputs).cpu().double()
        likelihood.check(values[0, :1], y)
        unknowns = {name: tensor.cpu().double() for name, tensor in block.params.items() if name.startswith("@")}
        for place in range(block.num_samples):
            params = {name: tensor[place] for name, tensor in unknowns.items()}
            each = likelihood.log_prob(values[place], y, params) - shift  # [B]
            if not bool(torch.isfinite(each).all()):
                raise DataError(
                    f"sample {int(indices[place])}",
                    want="a finite log likelihood of every row",
                    got="NaN or Inf",
                    fix="check the inputs and targets, or drop the sample",
                )
            found.append(each)
    return torch.stack(found)
