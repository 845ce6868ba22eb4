"""Smaller banks that need predictions to be judged: samples coded with a certificate, or the few that say it best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bnn.bank import Bank
from bnn.bank.codecs import CODECS, Codec, CodecName, check_codable, codec_of, moments_of
from bnn.bank.moving import Progress, check_apart, keep, recode, rows_at_once
from bnn.errors import BankError, ConfigError, choose
from bnn.functional import FunctionalModel
from bnn.likelihoods import Likelihood
from bnn.predictive import ClassPredictive, Predictive, TargetPredictive, by_sample, predict
from bnn.seeding import generator
from bnn.types import Block, Params

VIEW_BYTES = 2**30  # of what each sample says of the probe rows, and of the features made of it
HELD_EVERY = 4  # of the probe rows each so many-th judges a choice that it had no part in
RANDOM_CHOICES = 20
MOST_SWEEPS = 20  # in which every chosen sample may be exchanged for a better one


def cast(
    bank: Bank,
    out: str | Path,
    *,
    codec: CodecName,
    net: FunctionalModel | None = None,
    x: Any = None,
    likelihood: Likelihood | None = None,
    max_kl: float | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bank:
    """A new bank with the samples of another in fewer bytes, and a certificate of what that does.

    theta_s = mean + scale * delta_s

    Means are kept once in float32, the differences of each sample in the codec: rounding is in proportion to the
    posterior spread, where rounding the weights themselves would erase spreads below |w| / 512. Entries of likelihood and
    prior, and those that vary and are nowhere negative, stay as they are. `Bank.open` gives float32 samples again.

    `bank.json` says under `codec` what was measured on the very values that will be read: `errors`, for each entry the largest
    |cast - original| over the standard deviation of that number over the samples; and with `net` and `x` `predictive`,
    mean and largest over the probe rows (and outputs), in nats and probability:

    - of classes `kl`, sum_c p_c log(p_c / q_c) of the original p and the cast q, and `total_variation`, sum_c |p_c - q_c| / 2;
    - of targets `kl`, between normals with the mean and total variance of each predictive, and `shift`, the
      difference of the means in standard deviations of the original predictive.

    Args:
        bank: S samples; read block by block, three times, and by twice more predictions.
        out: folder of the new bank.
        codec: `"bf16"` and `"fp16"` take two bytes a value and keep differences to 2^-8 and 2^-11 of themselves; `"int8"`
            takes one, and keeps them to 1/254 of the largest difference of each number.
        net: the module under this bank, with `x`: the probe set.
        x: inputs of N rows as the module takes them, or a data set or loader.
        likelihood: what outputs mean; the one that the bank was made with by default.
        max_kl: largest KL that any probe row may have, in nats; nothing is written where one has more.
        overwrite: replace a bank at `out`.
        progress: told how many samples were gone through, and how many that will be in all passes.

    Returns:
        The new bank; its columns are those of the old one, which is left alone.

    Raises:
        ConfigError: an unknown codec, one of `net` and `x` without the other, `net` under another bank, a bound without a
            probe set, or a bank without samples.
        BankError: an entry of whole numbers, values that are not finite or too far apart, or a KL above `max_kl`.
        BankExists: something is at `out`.

    Examples:
        >>> import tempfile, bnn
        >>> module = torch.nn.Linear(30, 20)
        >>> dicts = [{name: p + torch.randn_like(p) for name, p in module.state_dict().items()} for _ in range(40)]
        >>> bank = Bank.from_state_dicts(dicts, module=module)
        >>> net, likelihood = FunctionalModel(module, bank), bnn.likelihoods.Categorical()
        >>> small = cast(bank, tempfile.mkdtemp(), codec="int8", net=net, x=torch.ones(5, 30), likelihood=likelihood)
        >>> small[7]["weight"].dtype, small.info["codec"]["errors"]["weight"] < 0.02
        (torch.float32, True)
        >>> small.info["codec"]["predictive"]["kl"]["largest"] < 1e-4
        True

    Source: differences from a common mean, Liu et al. (2024), arXiv:2402.10193.
    """
    choose("codec", codec, tuple(CODECS))
    _check_probe(bank, net, x, max_kl)
    check_codable(bank.layout)
    if bank.path is not None:
        check_apart(Path(out), bank.path)
    done = _Done(progress, len(bank) * (3 if net is None else 5))
    blocks = (done.after(block).params for _, block in bank.blocks(rows_at_once(bank.layout)))
    moments = moments_of(bank.layout, blocks)
    made = codec_of(codec, bank.layout, moments)
    record: dict[str, Any] = {"of": bank.digest, "errors": _errors(bank, made, moments.deviation, done)}
    if net is not None:
        record["predictive"] = _certificate(bank, made, net, x, likelihood, done)
        largest = record["predictive"]["kl"]["largest"]
        if max_kl is not None and not largest <= max_kl:
            raise BankError(
                str(out),
                want=f"a KL of at most {max_kl:g} nats in every probe row",
                got=f"{largest:.3g} with {codec}",
                fix="choose a codec of more bits, or raise the bound; nothing was written",
            )
    written = done.count
    return recode(bank, out, made, record, overwrite=overwrite, progress=lambda each, total: done.at(written + each))


def thin(
    bank: Bank,
    out: str | Path,
    *,
    best: int,
    net: FunctionalModel,
    x: Any,
    likelihood: Likelihood | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bank:
    """A new bank with the K samples of another whose predictive is nearest that of all, on a probe set.

    KL(all || chosen) ~ 1/2 sum_c (p_c - q_c)^2 / p_c, so that a sample s counts by its features (p_sc - p_c) / sqrt(p_c), and
    those chosen are to have a mean near 0. They are taken one by one, each time the best; then each
    is exchanged for a better one, as long as there is any. Of a regression, features are those of the mean and
    variance of the predictive: (m_s - m) / sd, and (v_s + (m_s - m)^2 - sd^2) / (sqrt(2) sd^2).

    Every fourth probe row has no part in the choice and judges it. `bank.json` says under `thinned`: `best`, `of`, and
    for `best`, `plain` (K samples spread evenly over the chains) and `random` (the mean of 20 choices) the mean and
    largest `kl`, and `total_variation` or `shift` as `cast` defines them, on those rows.

    Args:
        bank: S samples. What they say of all probe rows is held at once: 8 S N C bytes, at most 1 GiB.
        out: folder of the new bank.
        best: K, from 1 to S.
        net: the module under this bank.
        x: the probe set: inputs of N rows, at least 8, as the module takes them.
        likelihood: what outputs mean; the one that the bank was made with by default.
        seed: of the random choices that the best one is compared with.
        overwrite: replace a bank at `out`.
        progress: told after each block how many samples are read, and S.

    Returns:
        The new bank, in the order of the old one; its samples count alike, also where those of the old one did not.

    Raises:
        ConfigError: `best` is outside 1 to S, `net` is under another bank, or the probe set is too small or too large.
        BankExists: something is at `out`.

    Examples:
        >>> import tempfile, bnn
        >>> module = torch.nn.Linear(3, 2)
        >>> dicts = [{name: p + torch.randn_like(p) for name, p in module.state_dict().items()} for _ in range(50)]
        >>> bank = Bank.from_state_dicts(dicts, module=module)
        >>> net, likelihood = FunctionalModel(module, bank), bnn.likelihoods.Categorical()
        >>> few = thin(bank, tempfile.mkdtemp(), best=5, net=net, x=torch.randn(40, 3), likelihood=likelihood)
        >>> len(few), few.info["thinned"]["kl"]["best"]["mean"] < few.info["thinned"]["kl"]["random"]["mean"]
        (5, True)

    Source: Chen, Welling and Smola (2010), arXiv:1203.3472, for the greedy mean; exchanges are Fedorov's (1972).
    """
    _check_probe(bank, net, x, None)
    if not 1 <= best <= len(bank):
        raise ConfigError("best", want=f"1 to {len(bank)} samples", got=str(best), fix="choose fewer than there are")
    if bank.path is not None:
        check_apart(Path(out), bank.path)
    net = net.settled()
    views = _views(net, x, likelihood)
    rows = torch.arange(views.means.shape[1])
    held = rows % HELD_EVERY == HELD_EVERY - 1
    chosen = chosen_of(_features(views.of_rows(~held)), best)
    judged = views.of_rows(held)
    plain, size = _spread(bank, best), len(bank)
    random = [torch.randperm(size, generator=generator(seed, "thin", n))[:best] for n in range(RANDOM_CHOICES)]
    found = {"best": judged.error(chosen), "plain": judged.error(plain)}
    each = [judged.error(choice) for choice in random]
    found["random"] = {
        name: {word: float(np.mean([one[name][word] for one in each])) for word in each[0][name]} for name in each[0]
    }
    record = {"best": best, "of": bank.digest, "rows": len(rows), "held_out": int(held.sum())}
    record |= {name: {way: error[name] for way, error in found.items()} for name in found["best"]}
    kept = torch.zeros(size, dtype=torch.bool)
    kept[chosen] = True
    return keep(bank, out, kept, record, alike=True, overwrite=overwrite, progress=progress)


class _Done:
    """How many samples were gone through, told as it grows."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self.count = progress, total, 0

    def at(self, count: int) -> None:
        self.count = count
        if self._progress is not None:
            self._progress(count, self._total)

    def after(self, block: Block) -> Block:
        self.at(self.count + block.num_samples)
        return block


def _check_probe(bank: Bank, net: FunctionalModel | None, x: Any, max_kl: float | None) -> None:
    if (net is None) != (x is None):
        raise ConfigError(
            "probe set", want="net= and x= together", got="one of them", fix="pass the module under the bank and inputs"
        )
    if max_kl is not None and net is None:
        raise ConfigError("max_kl", want="a probe set", got="none", fix="pass net= and x=, or --probe")
    if max_kl is not None and not max_kl >= 0:
        raise ConfigError("max_kl", want="a number of nats, 0 at least", got=str(max_kl), fix="try 1e-3")
    if not len(bank):
        raise ConfigError("bank", want="at least one sample", got="none", fix="go on with its fit first")
    if net is not None and net.bank is not bank and (len(net.bank) != len(bank) or net.bank.digest != bank.digest):
        raise ConfigError("net", want="the module under this bank", got="under another", fix="make it of this bank")


# The certificate of a codec


class _Preview:
    """The samples of a bank as they will be read from the coded one: coded and decoded as they are asked for."""

    def __init__(self, bank: Bank, codec: Codec) -> None:
        self._bank, self._codec = bank, codec
        self.layout, self.info = bank.layout, bank.info
        self.chain, self.draw, self.log_weight = bank.chain, bank.draw, bank.log_weight
        self.digest = f"{bank.digest} {codec.name}"

    def __len__(self) -> int:
        return len(self._bank)

    def _read(self, params: Params) -> Params:
        return self._codec.decode(self._codec.encode(params))

    def __getitem__(self, index: int) -> Params:
        return self._read(self._bank[index])

    def block(self, indices: Sequence[int] | slice | Tensor) -> Block:
        block = self._bank.block(indices)
        return block._replace(params=self._read(block.params))


def _errors(bank: Bank, codec: Codec, deviation: Mapping[str, Tensor], done: _Done) -> dict[str, float]:
    """The largest error of each entry, in standard deviations of the number that has it."""
    largest = {name: torch.zeros_like(spread) for name, spread in deviation.items()}
    for _, block in bank.blocks(rows_at_once(bank.layout)):
        decoded = codec.decode(codec.encode(block.params))
        for name, values in decoded.items():
            for value, original in zip(values, block.params[name], strict=True):  # in place, so that no hole is left
                error = (value.double() - original.double()).abs_()
                torch.maximum(largest[name], error, out=largest[name])
        done.after(block)
    bank.release()
    found = {}
    for name, error in largest.items():
        relative = torch.where(error > 0, error / deviation[name], 0.0)  # a constant number has neither
        found[name] = float(relative.max()) if relative.numel() else 0.0
    return found


def _certificate(
    bank: Bank, codec: Codec, net: FunctionalModel, x: Any, likelihood: Likelihood | None, done: _Done
) -> dict[str, Any]:
    """How far predictions of the coded samples are from those of the original ones."""
    net = net.settled()
    previewed = FunctionalModel(
        net.module,
        _Preview(bank, codec),
        device=net.device,
        strategy=net.strategy,
        compile=net.compile,
        memory=net.memory,
        seed=net.seed,
    )
    original = predict(net, x, likelihood=likelihood, progress=False)
    done.at(done.count + len(bank))
    coded = predict(previewed, x, likelihood=likelihood, progress=False)
    done.at(done.count + len(bank))
    return {"rows": len(original.mean), **compare(original, coded)}


def compare(original: Predictive, other: Predictive) -> dict[str, dict[str, float]]:
    """Mean and largest distance of two predictives over rows, of a regression over outputs too; see `cast`.

    Raises:
        ConfigError: a predictive without a variance.
    """
    if isinstance(original, ClassPredictive) and isinstance(other, ClassPredictive):
        return _class_distances(original.log_probs, other.log_probs)
    assert isinstance(original, TargetPredictive)
    assert isinstance(other, TargetPredictive)
    return _target_distances(original.mean, original.variance, other.mean, other.variance)


def _class_distances(log_p: Tensor, log_q: Tensor) -> dict[str, dict[str, float]]:
    """Of log probabilities [N, C]."""
    p, q = log_p.exp(), log_q.exp()
    kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(dim=-1).clamp_min(0)  # [N]; rounding can leave -1e-17
    return {"kl": _summary(kl), "total_variation": _summary((p - q).abs().sum(dim=-1) / 2)}


def _target_distances(mean: Tensor, variance: Tensor, other: Tensor, its: Tensor) -> dict[str, dict[str, float]]:
    """Of means and total variances [N, C]."""
    if not bool(torch.isfinite(variance).all() & torch.isfinite(its).all() & (variance > 0).all() & (its > 0).all()):
        raise ConfigError(
            "likelihood",
            want="predictives with a variance",
            got="none, or 0",
            fix="leave the probe set out: distances are in standard deviations",
        )
    shift = (mean - other).square()
    kl = (variance / its - 1 - (variance / its).log() + shift / its) / 2
    return {"kl": _summary(kl.clamp_min(0)), "shift": _summary((shift / variance).sqrt())}


def _summary(values: Tensor) -> dict[str, float]:
    return {"mean": float(values.mean()), "largest": float(values.max())}


# The best few samples


class _Views(NamedTuple):
    """What each sample says of each row."""

    means: Tensor  # float32 [S, N, C]: class probabilities, or means of targets
    variances: Tensor | None  # float32 [S, N, C] of the noise
    weight: Tensor  # float64 [S], of sum 1

    def of_rows(self, chosen: Tensor) -> _Views:
        variances = None if self.variances is None else self.variances[:, chosen]
        return _Views(self.means[:, chosen], variances, self.weight)

    def average(self, values: Tensor) -> Tensor:
        """sum_s w_s v_s [N, C], float64."""
        return torch.einsum("s,snc->nc", self.weight, values.double())

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and total variance of the predictive of a regression, [N, C] both."""
        assert self.variances is not None
        mean = self.average(self.means)
        return mean, self.average((self.means.double() - mean).square() + self.variances)

    def error(self, chosen: Tensor) -> dict[str, dict[str, float]]:
        """How far the predictive of some samples, counted alike, is from that of all."""
        weight = torch.full((len(chosen),), 1 / len(chosen), dtype=torch.float64)
        variances = None if self.variances is None else self.variances[chosen]
        few = _Views(self.means[chosen], variances, weight)
        if self.variances is None:
            return _class_distances(self.average(self.means).log(), few.average(few.means).log())
        return _target_distances(*self.moments(), *few.moments())


def _views(net: FunctionalModel, x: Any, likelihood: Likelihood | None) -> _Views:
    """What every sample says of the probe rows, within the memory that is given for it."""
    with torch.no_grad():
        first = net(x, 0)
    num_rows, size = len(first) if isinstance(first, Tensor) else 0, len(net.bank)
    if num_rows < 2 * HELD_EVERY:
        raise ConfigError("x", want=f"at least {2 * HELD_EVERY} probe rows", got=str(num_rows), fix="pass more rows")
    row_bytes = 8 * size * max(first.numel() // num_rows, 1)
    if num_rows * row_bytes > VIEW_BYTES:
        most = VIEW_BYTES // row_bytes
        raise ConfigError(
            "x",
            want=f"at most {most} probe rows, of which {size} samples take a GiB",
            got=str(num_rows),
            fix="pass fewer rows, or thin the bank with every= first",
        )
    means, variances = by_sample(net, x, likelihood=likelihood)
    return _Views(means, variances, net.bank.log_weight.double().softmax(dim=0))


def _features(views: _Views) -> Tensor:
    """What a sample adds to the squared distance of a mixture from that of all, [S, M] float32, of weighted mean 0."""
    if views.variances is None:
        mean = views.average(views.means).float()  # [N, C]
        root = mean.sqrt()
        return torch.where(mean > 0, (views.means - mean) / root, 0.0).flatten(1)
    mean, variance = (value.float() for value in views.moments())
    apart = (views.means - mean) / variance.sqrt()  # [S, N, C]
    spread = (views.variances / variance + apart.square() - 1) / 2**0.5
    return torch.cat([apart, spread], dim=1).flatten(1)


def chosen_of(features: Tensor, size: int) -> Tensor:
    """The places of `size` rows of features [S, M] whose mean is near 0: greedily, then by exchanges, int64, in order.

    |sum_k f_k|^2 falls with a row s added to a sum A by |f_s|^2 + 2 f_s . A, which is smallest for the best.
    """
    norms = features.square().sum(dim=1)  # [S]
    with_sum = torch.zeros_like(norms)  # f_s . A
    free = torch.ones(len(features), dtype=torch.bool)
    chosen: list[int] = []

    def best() -> int:
        return int(torch.where(free, norms + 2 * with_sum, torch.inf).argmin())

    for _ in range(size):
        chosen.append(best())
        free[chosen[-1]] = False
        with_sum += features @ features[chosen[-1]]
    for _ in range(MOST_SWEEPS):
        exchanged = False
        for place, old in enumerate(chosen):
            shared = features @ features[old]
            with_sum -= shared
            free[old] = True
            new = best()
            better = float(norms[new] + 2 * with_sum[new]) < float(norms[old] + 2 * with_sum[old])
            new = new if better else old
            chosen[place], free[new], exchanged = new, False, exchanged or better
            with_sum += features @ features[new] if better else shared
        if not exchanged:
            break
    return torch.tensor(sorted(chosen))


def _spread(bank: Bank, size: int) -> Tensor:
    """Places of `size` samples spread evenly over chains and their draws, int64 [K]."""
    order = np.lexsort((bank.draw.numpy(), bank.chain.numpy()))
    places = (np.arange(size) * len(order) + len(order) // 2) // size  # the middle of each of K equal runs
    return torch.from_numpy(np.sort(order[places]))
