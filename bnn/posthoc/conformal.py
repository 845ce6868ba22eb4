"""Sets of classes and intervals of targets that hold the truth as often as they say, by split conformal prediction.

Rows that were held out get a score each, larger where the truth fits the predictive worse. Of n rows, the score
at place ceil((n + 1) level) in order is the threshold. Where those rows and a new one are **exchangeable**, as rows
drawn alike are, the new one's score is at most the threshold with probability level at least, and less than level +
1 / (n + 1) where scores are never equal. That is on average over held-out sets and new rows: for one held-out set the
coverage is itself random, Beta(k, n + 1 - k) with k that place. It is marginal: it says nothing of any one class, or region of inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from bnn.errors import ConfigError, DataError, choose
from bnn.posthoc.temperature import check_rows

SetScore: TypeAlias = Literal["lac", "aps"]


class Interval(NamedTuple):
    """Lower and upper end a row and output, [N, C] each."""

    lower: Tensor
    upper: Tensor


def check_level(level: float) -> float:
    """The level, if it lies between 0 and 1; else a ConfigError."""
    if not 0.0 < level < 1.0:
        raise ConfigError("level", want="a number between 0 and 1", got=str(level), fix="such as 0.9")
    return float(level)


def rank(num_rows: int, level: float) -> int:
    """k = ceil((n + 1) level), the place of the threshold among n scores in order.

    The level is taken as the decimal that it is written as: 0.55 of 100 is 55, and not the 56 that rounding makes of it.

    Args:
        num_rows: n.
        level: 1 - alpha, in (0, 1).

    Raises:
        DataError: k > n: so few rows cannot promise so much.
        ConfigError: another level.

    Examples:
        >>> rank(99, 0.9), rank(100, 0.9)
        (90, 91)

    Source: Vovk et al. (2005), Algorithmic Learning in a Random World; Angelopoulos and Bates (2021), arXiv:2107.07511, section 1.
    """
    exact = Fraction(repr(check_level(level)))
    found = math.ceil((num_rows + 1) * exact)
    if found > num_rows:
        raise DataError(
            "held-out rows",
            want=f"at least {math.ceil(exact / (1 - exact))} for a level of {level:g}",
            got=str(num_rows),
            fix="hold out more, or ask for a lower level",
        )
    return found


def threshold(scores: Tensor, level: float) -> Tensor:
    """The score at place ceil((n + 1) level) in order, of scores [n] or [n, C]; scalar or [C].

    Raises:
        DataError: too few rows for the level, or NaN.
    """
    if torch.isnan(scores).any():
        raise DataError("held-out rows", want="scores that are numbers", got="NaN", fix="check data and predictions")
    return scores.sort(dim=0).values[rank(len(scores), level) - 1]


def lac_scores(probs: Tensor) -> Tensor:
    """s(c) = 1 - p(c), [N, C]: the smallest sets on average, none where no class is probable.

    Args:
        probs: the mean predictive [N, C].

    Source: Sadinle, Lei and Wasserman (2019), arXiv:1609.00451.
    """
    return 1.0 - probs.double()


def aps_scores(probs: Tensor) -> Tensor:
    """s(c) = sum_k p(k) 1[p(k) >= p(c)], [N, C]: the mass of classes at least as probable as c, and c itself.

    Sets grow where the predictive is unsure, so that coverage differs less between easy and hard rows than by
    `lac_scores`. Without the paper's random number: a row always gets the same set, and marginal coverage is kept, since
    scores of held-out and new rows are of one kind; sets are a little larger.

    Args:
        probs: the mean predictive [N, C].

    Examples:
        >>> aps_scores(torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75]]))
        tensor([[0.5000, 1.0000, 1.0000],
                [1.0000, 1.0000, 0.7500]], dtype=torch.float64)

    Source: Romano, Sesia and Candes (2020), arXiv:2006.02544, eq. 3-5, with u = 1.
    """
    ordered = probs.double().sort(dim=-1).values  # [N, C], the least first
    mass = ordered.flip(-1).cumsum(dim=-1).flip(-1)  # of each and all after it
    first = torch.searchsorted(ordered, probs.double().contiguous(), right=False)  # equals of c count too
    return mass.gather(-1, first)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {"lac": lac_scores, "aps": aps_scores}


def set_threshold(probs: Tensor, y: Tensor, *, level: float, score: SetScore = "lac") -> float:
    """The largest score that a class of a set may have.

    Args:
        probs: the mean predictive of held-out rows [N, C].
        y: their true classes, int64 [N].
        level: share of new rows whose set is to hold the true class, in (0, 1).
        score: `"lac"` or `"aps"`, see `lac_scores` and `aps_scores`.

    Raises:
        DataError: too few rows for the level.
    """
    probs = check_rows(probs, y)
    scores = SCORES[choose("score", score, tuple(SCORES))](probs)
    return float(threshold(scores.gather(1, y.unsqueeze(1)).squeeze(1), level))


def prediction_sets(probs: Tensor, limit: float, *, score: SetScore = "lac") -> Tensor:
    """Which classes a set holds, s(c) <= limit: bool [N, C]; a set may be empty, or hold every class.

    Args:
        probs: the mean predictive [N, C].
        limit: of `set_threshold`.
        score: as there.
    """
    return SCORES[choose("score", score, tuple(SCORES))](probs) <= limit


def interval_margins(lower: Tensor, upper: Tensor, y: Tensor, *, level: float) -> Tensor:
    """By how much intervals are to be widened, or narrowed where it is negative; one number an output, [C].

    m = the score at place ceil((n + 1) level) of max(lower - y, y - upper), in each output for itself

    Args:
        lower: quantiles of the predictive at (1 - level) / 2 of held-out rows, [N, C].
        upper: those at (1 + level) / 2.
        y: their targets [N, C].
        level: share of new targets that an interval is to hold, in (0, 1).

    Raises:
        DataError: shapes, or too few rows for the level.

    Source: Romano, Patterson and Candes (2019), arXiv:1905.03222, eq. 6-8.
    """
    if not (lower.shape == upper.shape == y.shape and y.dim() == 2):
        raise DataError(
            "held-out rows",
            want="lower, upper and y of one shape [N, C]",
            got=f"{list(lower.shape)}, {list(upper.shape)} and {list(y.shape)}",
            fix="give the module one output a target",
        )
    return threshold(torch.maximum(lower - y, y - upper).double(), level)


def widened(lower: Tensor, upper: Tensor, margins: Tensor) -> Interval:
    """[lower - m, upper + m], both [N, C]; one that m makes less than nothing is its middle."""
    low, high = lower - margins, upper + margins
    middle = 0.5 * (lower + upper)
    crossed = low > high
    return Interval(torch.where(crossed, middle, low), torch.where(crossed, middle, high))
