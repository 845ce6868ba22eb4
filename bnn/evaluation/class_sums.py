"""Sums over samples that class figures are made of, for one batch of rows, in memory that does not grow with S."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from bnn.errors import DataError
from bnn.evaluation.views import Views

VALUES = 2**16  # numbers handled at once: several arrays of them fit into a processor's own cache
LEAST_LOG = -640.0  # below, a probability is summed in logarithms: e^-640 is 1e-278, close to the least number there is
NONE = -1e300  # stands for the logarithm of nothing where it is multiplied by nothing


class ClassRows(NamedTuple):
    """What each view of a bank says of each row, float64; in nats where they are information."""

    probs: Tensor  # [C, V, B] mean predictive
    log_prob: Tensor | None  # [V, B] its logarithm at the target
    entropy: Tensor  # [V, B] of the mean predictive
    expected_entropy: Tensor  # [V, B]
    mutual_information: Tensor  # [V, B], no less than 0
    expected_log_prob: Tensor | None  # [V, B] of the samples at the target, for the Gibbs loss
    votes: Tensor | None  # [C, V, B] weights of the samples whose most probable class it is
    weight: Tensor  # [V] of the samples
    squares: Tensor  # [V] of the samples' squared weights


class ClassSums:
    """Probabilities, entropies and votes of samples, summed by the sets of `Views`; [C, R, B], classes first.

    Samples may come in any order and any blocks, and sums of some be merged with those of others.

    Args:
        views: the sets of samples to keep apart.
        y: targets int64 [B], or None of rows whose targets are not looked at.
        whole: also keep votes and the Gibbs loss.
    """

    def __init__(self, views: Views, y: Tensor | None, *, whole: bool = True) -> None:
        self.views, self.y, self.whole = views, y, whole
        self.weight = torch.zeros(views.num_sums, dtype=torch.float64)
        self.squares = torch.zeros(views.num_sums, dtype=torch.float64)
        self._probs: Tensor | None = None  # of those that a plain sum holds
        self._low: Tensor | None = None  # logarithms of sums of the others

    @property
    def started(self) -> bool:
        """Whether any sample has come."""
        return self._probs is not None

    def parts(self, values: int) -> Iterator[slice]:
        """The rows in slices of which all views hold so many numbers at most, or one row."""
        assert self._probs is not None
        classes, _, size = self._probs.shape
        step = max(1, values // (classes * self.views.num_views))
        for start in range(0, size, step):
            yield slice(start, start + step)

    def add(self, indices: Tensor, logits: Tensor) -> None:
        """What samples [K] say, as logits or log probabilities [K, B, C]; -Inf is a class without a chance.

        Raises:
            DataError: NaN or +Inf, of which sample.
        """
        _, rows, classes = logits.shape
        if self._probs is None:
            self._start(rows, classes, logits.device)
        if rows == 0:
            return
        step = max(1, VALUES // (rows * classes))
        for some, outputs in zip(indices.split(step), logits.split(step), strict=True):
            self._add(some, outputs)

    def _start(self, rows: int, classes: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        size = self.views.num_sums
        if self.y is not None:
            self.y = self.y.to(device)
        self._probs, self._entropy = zeros(classes, size, rows), zeros(size, rows)
        self._gibbs = zeros(size, rows) if self.whole and self.y is not None else None
        self._votes = zeros(classes, size, rows) if self.whole else None

    def _add(self, indices: Tensor, outputs: Tensor) -> None:
        present, weights = self.views.sets(indices)
        self.weight.index_add_(0, present, weights.sum(dim=1))
        self.squares.index_add_(0, present, weights.square().sum(dim=1))
        present, weights = present.to(outputs.device), weights.to(outputs.device)
        # Classes first, so that sums over them and exponentials run along whole batches.
        shifted = outputs.permute(2, 0, 1).to(torch.float64, memory_format=torch.contiguous_format)  # [C, K, B]
        if shifted.data_ptr() == outputs.data_ptr():
            shifted = shifted.clone()  # of one class or row there was nothing to move
        shifted -= shifted.amax(dim=0)
        least = float(shifted.amin())
        if least != least:
            _refuse(indices, outputs)
        if least < NONE:
            shifted.clamp_(min=NONE)
        probs = shifted.exp()
        norm = probs.sum(dim=0)  # [K, B]
        log_norm = norm.log()
        entropy = log_norm - (probs * shifted).sum(dim=0) / norm
        if self._votes is not None:
            self._votes.index_add_(1, present, weights @ _votes(shifted))
        if self._gibbs is not None:
            assert self.y is not None
            at_target = shifted.gather(0, self.y.expand(1, *norm.shape))[0] - log_norm  # [K, B]
            self._gibbs.index_add_(0, present, weights @ at_target)
        probs *= norm.reciprocal_()
        if least < LEAST_LOG:
            self._add_low(present, weights, shifted - log_norm, probs)
        assert self._probs is not None
        self._probs.index_add_(1, present, weights @ probs)  # [C, r, B]
        self._entropy.index_add_(0, present, weights @ entropy)

    def _add_low(self, present: Tensor, weights: Tensor, log_probs: Tensor, probs: Tensor) -> None:
        """Sum in logarithms what is too small for a plain sum, and take it out of that."""
        low = log_probs < LEAST_LOG
        if not low.any():
            return
        assert self._probs is not None
        if self._low is None:
            self._low = torch.full_like(self._probs, -torch.inf)
        probs.masked_fill_(low, 0.0)
        kept = log_probs.masked_fill(~low | (log_probs <= NONE), -torch.inf)
        for place, row in zip(present.tolist(), weights, strict=True):
            mine = row > 0
            if mine.any():
                block = torch.logsumexp(kept[:, mine] + row[mine].log()[:, None], dim=1)  # [C, B]
                self._low[:, place] = torch.logaddexp(self._low[:, place], block)

    def merge(self, other: ClassSums) -> None:
        """Add the sums of other samples of the same bank on the same rows."""
        if other._probs is None:
            return
        if self._probs is None:
            self._start(other._probs.shape[2], other._probs.shape[0], other._probs.device)
        assert self._probs is not None
        self.weight += other.weight
        self.squares += other.squares
        self._probs += other._probs
        self._entropy += other._entropy
        if self._gibbs is not None and other._gibbs is not None:
            self._gibbs += other._gibbs
        if self._votes is not None and other._votes is not None:
            self._votes += other._votes
        if other._low is not None:
            self._low = other._low.clone() if self._low is None else torch.logaddexp(self._low, other._low)

    def state(self) -> dict[str, Tensor]:
        """All sums by name, for `merge` on another rank; empty where no sample has come."""
        if self._probs is None:
            return {}
        sums = {
            "probs": self._probs,
            "entropy": self._entropy,
            "gibbs": self._gibbs,
            "votes": self._votes,
            "low": self._low,
        }
        kept = {name: values for name, values in sums.items() if values is not None}
        return {"weight": self.weight, "squares": self.squares, **kept}

    def of(self, state: Mapping[str, Tensor]) -> ClassSums:
        """Sums of the same rows from the `state` of others."""
        found = ClassSums(self.views, self.y, whole=self.whole)
        if state:
            found._start(state["probs"].shape[2], len(state["probs"]), state["probs"].device)
            found.weight, found.squares = state["weight"], state["squares"]
            found._probs, found._entropy = state["probs"], state["entropy"]
            found._gibbs, found._votes, found._low = (state.get(name) for name in ("gibbs", "votes", "low"))
        return found

    def rows(self, part: slice = slice(None)) -> ClassRows:
        """What each view says of each row, or of some; NaN of views whose samples have no weight."""
        assert self._probs is not None
        views = self.views
        matrix = views.matrix()
        weight, squares = (matrix @ torch.stack([self.weight, self.squares], dim=1)).unbind(dim=1)
        total = torch.where(weight > 0, weight, torch.nan)[:, None].to(self._probs.device)
        matrix = matrix.to(self._probs.device)
        probs = (matrix @ self._probs[..., part]).div_(total)  # [C, V, B]
        # torch.special.entr gives the same, seven times as slowly.
        entropy = (probs * probs.clamp_min(torch.finfo(torch.float64).tiny).log()).sum(dim=0)
        entropy = entropy.neg_().add_(0.0)  # 0 and not -0
        expected = (matrix @ self._entropy[:, part]).div_(total)
        mutual = entropy - expected
        # What the additions round off is no information: samples that agree have exactly none.
        rounding = torch.finfo(torch.float64).eps * (len(views.group) + len(probs)) * (1.0 + entropy)
        mutual = torch.where(mutual < rounding, torch.zeros_like(mutual), mutual)
        return ClassRows(
            probs,
            self._log_prob(probs, total, part),
            entropy,
            expected,
            torch.where(entropy.isnan(), entropy, mutual),
            None if self._gibbs is None else _or_none((matrix @ self._gibbs[:, part]).div_(total)),
            None if self._votes is None else (matrix @ self._votes[..., part]).div_(total),
            weight,
            squares,
        )

    def _log_prob(self, probs: Tensor, total: Tensor, part: slice) -> Tensor | None:
        if self.y is None:
            return None
        y = self.y[part]
        found = probs.gather(0, y.expand(1, *probs.shape[1:]))[0].log()  # [V, B]
        if self._low is None:
            return found
        low = self._low[..., part].gather(0, y.expand(1, self._low.shape[1], -1))[0]  # [R, B]
        return torch.logaddexp(found, self.views.of_logs(low) - total.log())


def _or_none(log_prob: Tensor) -> Tensor:
    """-Inf where some sample gives its class no chance."""
    return log_prob.masked_fill(log_prob < 1e-9 * NONE, -torch.inf)


def _votes(shifted: Tensor) -> Tensor:
    """One vote a sample and row for its most probable class, the first of several, [C, K, B]."""
    votes = (shifted == 0).double()  # logits less the largest of them
    if float(votes.sum()) > shifted[0].numel():
        return torch.zeros_like(votes).scatter_(0, shifted.argmax(dim=0, keepdim=True), 1.0)
    return votes


def _refuse(indices: Tensor, outputs: Tensor) -> None:
    bad = int(indices[int((outputs.isnan() | (outputs == torch.inf)).flatten(1).any(dim=1).nonzero()[0])])
    raise DataError(
        f"sample {bad}", want="finite outputs", got="NaN or Inf", fix="check the inputs, or drop the sample"
    )
