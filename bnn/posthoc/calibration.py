"""What held-out rows taught of a bank's predictive: made once, kept as JSON beside the bank, refused for any other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from bnn.bank import Bank, files
from bnn.bank import format as fmt
from bnn.errors import BankCorrupt, BankError, BankExists, BankMismatch, ConfigError
from bnn.posthoc import conformal
from bnn.posthoc.conformal import Interval, SetScore
from bnn.posthoc.temperature import Estimate, temper

if TYPE_CHECKING:
    from bnn.functional import SampleSource
    from bnn.likelihoods import Likelihood, Task
    from bnn.predictive import ClassPredictive, TargetPredictive

FORMAT, VERSION = "bnn-calibration", 1
FILE = "calibration.json"  # beside a bank


class ClassSets(NamedTuple):
    """What a calibration says of rows of classes, beside the tempered probabilities."""

    sets: Tensor  # bool [N, C], the classes that a set holds
    level: float  # share of new rows whose set holds the true class
    mixture_entropy: Tensor  # [N] before the temperature: expected entropy + mutual information


@dataclass(frozen=True)
class Calibration:
    """A temperature and conformal sets of classes, or conformal intervals of targets, of one bank's predictive.

    Made by `bnn.calibrate`, used by `bnn.predict(net, x, calibration=...)`. It belongs to the samples it was made with:
    `bank` is their digest, and any other bank, or this one after more samples came to it, is refused. What the
    predictive was made with besides (`likelihood`, `prior_shift`) must be the same too.

    Of classes: `temperature`, the NLL of the held-out rows `before` and `after` it (which is a little flattered: they
    chose it), the conformal `score`, and the `limit` of scores in a set. Of targets: `margins`, one an output, in units of the
    `scale` that predictions are made with, by which intervals are widened.

    Args:
        bank: digest of the bank.
        likelihood: its configuration.
        num_rows: n, held-out rows.
        level: share of new rows that sets or intervals are to hold.
        temperature: T, of classes.
        before: NLL at T = 1, in nats, and its standard error over the held-out rows.
        after: the same at T.
        score: `"lac"` or `"aps"`.
        limit: the largest score in a set.
        margins: of the intervals of each output.
        prior_shift: shares of the classes in training and where predictions are made.
        data: which rows were held out, where somebody wrote it down.
    """

    bank: str
    likelihood: dict[str, Any]
    num_rows: int
    level: float
    temperature: float | None = None
    before: Estimate | None = None
    after: Estimate | None = None
    score: SetScore | None = None
    limit: float | None = None
    margins: tuple[float, ...] | None = None
    prior_shift: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def task(self) -> Task:
        """`"classification"` or `"regression"`."""
        return "regression" if self.temperature is None else "classification"

    @property
    def quantiles(self) -> tuple[float, ...]:
        """Levels of the predictive's quantiles that the intervals begin from; none for classes."""
        return () if self.margins is None else quantiles_of(self.level)

    def to_config(self) -> dict[str, Any]:
        """Plain values, as `calibration.json` holds them."""
        config = asdict(self)
        for name in ("before", "after"):
            estimate = getattr(self, name)
            if estimate is not None:
                error = estimate.standard_error
                config[name] = {"value": estimate.value, "standard_error": error if math.isfinite(error) else None}
        for name in ("margins", "prior_shift"):
            if config[name] is not None:
                config[name] = [list(one) if isinstance(one, tuple) else one for one in config[name]]
        return config

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> Calibration:
        """The calibration that `to_config` wrote.

        Raises:
            ConfigError: a key is missing, unknown, or its value means nothing.
        """
        return _from_config(config)

    def save(self, bank: Bank, *, overwrite: bool = False) -> Path:
        """Write `calibration.json` beside the bank, whole or not at all.

        Raises:
            BankMismatch: a bank in memory, or another than it was made with.
            BankExists: there is a calibration already, and it is not to be overwritten.
        """
        if bank.path is None:
            raise BankMismatch(
                "calibration",
                want="a bank on disk to keep it beside",
                got="one in memory",
                fix="keep calibration.to_config() yourself",
            )
        self._check_bank(bank, str(bank.path))
        path = bank.path / FILE
        if path.exists() and not overwrite:
            raise BankExists(
                str(path), want="nothing there", got="a calibration, which is kept", fix="replace it with overwrite"
            )
        config = {"format": FORMAT, "version": VERSION, **self.to_config()}
        files.write_atomic(path, [fmt.dump_json(fmt.seal(config, FILE), FILE)])
        return path

    @staticmethod
    def open(bank: Bank) -> Calibration:
        """The calibration that is kept beside a bank.

        Raises:
            BankMismatch: there is none, or it was made with other samples than the bank has now.
            BankCorrupt: the file was altered.
            BankError: of a newer format.
        """
        path = None if bank.path is None else bank.path / FILE
        if path is None or not path.exists():
            raise BankMismatch(
                str(bank.path or "bank in memory"),
                want=f"{FILE} beside it",
                got="none",
                fix="make one with 'bnn calibrate', or bnn.calibrate(...).save(bank)",
            )
        config = files.read_json(path)
        if config.get("format") != FORMAT:
            raise fmt.corrupt(str(path), f"format {FORMAT!r}", repr(config.get("format"))[:100])
        if config.get("version") != VERSION:
            got = f"version {config.get('version')}"[:100]
            raise BankError(str(path), want=f"version {VERSION}", got=got, fix="install a newer bnn-toolkit")
        if config.get("checksum") != fmt.checksum(config):
            raise fmt.corrupt(str(path), "the checksum of its content", repr(config.get("checksum"))[:100])
        content = {key: value for key, value in config.items() if key not in ("format", "version", "checksum")}
        try:
            found = _from_config(content)
        except ConfigError as error:
            raise BankCorrupt(f"{path} {error.place}", want=error.want, got=error.got, fix="make it again") from error
        found._check_bank(bank, str(path))
        return found

    def check(self, bank: SampleSource, likelihood: Likelihood, prior_shift: tuple[Any, Any] | None) -> None:
        """Raise BankMismatch or ConfigError where a predictive is not the one that was calibrated."""
        self._check_bank(bank, "calibration")
        if likelihood.to_config() != self.likelihood:
            raise ConfigError(
                "calibration",
                want=f"the likelihood {self.likelihood}, which it was made with",
                got=str(likelihood.to_config()),
                fix="calibrate with that likelihood",
            )
        if as_shares(prior_shift) != self.prior_shift:
            raise ConfigError(
                "calibration",
                want=f"the prior shift {self.prior_shift}, which it was made with",
                got=str(as_shares(prior_shift)),
                fix="calibrate with that prior shift",
            )

    def of_classes(self, found: ClassPredictive) -> ClassPredictive:
        """Tempered probabilities, and a set a row."""
        assert self.temperature is not None
        assert self.limit is not None
        assert self.score is not None
        # Scores are of the probabilities before the temperature, which the same rows have chosen.
        sets = conformal.prediction_sets(found.probs, self.limit, score=self.score)
        more = ClassSets(sets, self.level, found.entropy)
        return found._replace(log_probs=temper(found.log_probs, self.temperature), calibrated=more)

    def of_targets(self, found: TargetPredictive, scale: Tensor) -> TargetPredictive:
        """An interval a row and output, in the units of the predictive."""
        assert self.margins is not None
        lower, upper = (found.quantiles[level] for level in self.quantiles)
        margins = torch.tensor(self.margins, dtype=torch.float64)
        if len(margins) != lower.shape[1]:
            raise ConfigError(
                "calibration", want=f"{len(margins)} outputs", got=str(lower.shape[1]), fix="calibrate this module"
            )
        interval = conformal.widened(lower, upper, margins * scale)
        if self.likelihood.get("name") == "Poisson":
            interval = Interval(interval.lower.clamp_min(0), interval.upper.clamp_min(0))
        return found._replace(calibrated=interval)

    def _check_bank(self, bank: SampleSource, place: str) -> None:
        if bank.digest != self.bank:
            raise BankMismatch(
                place,
                want=f"the samples {self.bank[:12]} that it was made with",
                got=f"{bank.digest[:12]}: another bank, or samples have come to it since",
                fix="calibrate this bank again: bnn calibrate --overwrite",
            )


def quantiles_of(level: float) -> tuple[float, float]:
    """Levels of the two quantiles around the central interval of a level.

    Examples:
        >>> quantiles_of(0.5)
        (0.25, 0.75)
    """
    return 0.5 - 0.5 * level, 0.5 + 0.5 * level


def as_shares(prior_shift: tuple[Any, Any] | None) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """A prior shift as plain numbers."""
    if prior_shift is None:
        return None
    train, natural = (tuple(torch.as_tensor(part, dtype=torch.float64).tolist()) for part in prior_shift)
    return train, natural


def _from_config(config: Mapping[str, Any]) -> Calibration:
    _check(config)
    shift, margins = config["prior_shift"], config["margins"]
    plain = ("bank", "likelihood", "num_rows", "level", "temperature", "score", "limit", "data")
    return Calibration(
        **{key: config[key] for key in plain},
        before=_estimate(config["before"]),
        after=_estimate(config["after"]),
        margins=None if margins is None else tuple(float(margin) for margin in margins),
        prior_shift=as_shares(None if shift is None else (shift[0], shift[1])),
    )


def _estimate(config: Mapping[str, Any] | None) -> Estimate | None:
    if config is None:
        return None
    error = config["standard_error"]
    return Estimate(config["value"], math.nan if error is None else error)


def _check(config: Mapping[str, Any]) -> None:
    """Raise ConfigError for the first key whose value means nothing."""
    known = {each.name for each in fields(Calibration)}
    strange = sorted(known ^ config.keys())
    if strange:
        got = f"'{strange[0]}' " + ("missing" if strange[0] in known else "beside them")
        raise ConfigError("calibration", want=f"the keys {', '.join(sorted(known))}", got=got, fix="make it again")

    def require(key: str, fine: bool, want: str) -> None:
        if not fine:
            raise ConfigError(f"calibration '{key}'", want=want, got=repr(config[key])[:100], fix="make it again")

    classes, shift = config["temperature"] is not None, config["prior_shift"]
    require("bank", isinstance(config["bank"], str), "a digest")
    for key in ("likelihood", "data"):
        require(key, isinstance(config[key], dict), "an object")
    require("num_rows", type(config["num_rows"]) is int and config["num_rows"] > 0, "a number of rows")
    require("level", _is_number(config["level"]) and 0 < config["level"] < 1, "a number between 0 and 1")
    if classes:
        require("temperature", _is_number(config["temperature"]) and config["temperature"] > 0, "a positive number")
        require("score", config["score"] in tuple(conformal.SCORES), f"one of {', '.join(conformal.SCORES)}")
        require("limit", _is_number(config["limit"]), "a number")
        require("margins", config["margins"] is None, "null for classes")
        for key in ("before", "after"):
            require(key, _is_estimate(config[key]), "an object of value and standard_error")
        two = isinstance(shift, list) and len(shift) == 2 and all(map(_is_numbers, shift))
        require("prior_shift", shift is None or two, "null, or shares of the classes in training and where predicted")
    else:
        for key in ("before", "after", "score", "limit", "prior_shift"):
            require(key, config[key] is None, "null for a regression")
        require("margins", _is_numbers(config["margins"]), "a number for each output")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_numbers(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(map(_is_number, values))


def _is_estimate(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != {"value", "standard_error"}:
        return False
    error = value["standard_error"]
    return _is_number(value["value"]) and (error is None or _is_number(error))
