"""A module with a prior and a likelihood: the one place where N and the temperature exist."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bnn import drawing, priors
from bnn.errors import ConfigError, DataError
from bnn.functional import Skeleton, device_of
from bnn.layout import Entry, Layout, as_patterns, layout_of
from bnn.likelihoods import Likelihood
from bnn.priors import PositivePrior, Prior
from bnn.seeding import generator
from bnn.space import Space
from bnn.types import Batch, Params


class BayesianModel:
    """module + prior + likelihood + N.

    log_joint(theta; batch) = (N / B sum_b w_b log p(y_b | x_b, theta) + log p(theta)) / T

    The weights w_b are 1, or the batch's own: importance weights 1 / (N pi_b) for rows drawn with chances
    pi_b, with which the target stays that of all rows alike. With this scaling the log joints of the batches
    of an epoch, weighted by B_i / N, average to the full-data one.

    Unknowns of likelihood and prior (a noise scale, the scale of the weights) are part of the sample, under
    names that begin with `@`.

    Args:
        module: any module; never changed. Layers that rewrite themselves or draw random numbers in
            train mode are refused there.
        prior: over the Bayesian parameters, such as `priors.Normal(0.0, 1.0)`.
        likelihood: what outputs mean, such as `likelihoods.Categorical()`.
        num_data: N, the rows of the whole training set, at least 1.
        bayesian: glob patterns of the Bayesian parameters, `!` negates; the others stay the module's own.
        temperature: T > 0; 1 is the Bayes posterior, less a cold one.

    Raises:
        ConfigError: an option out of range, a pattern that matches nothing.
        ModuleError: a module that cannot be run functionally.

    Examples:
        >>> import torch
        >>> from bnn import likelihoods
        >>> model = BayesianModel(torch.nn.Linear(2, 3), prior=priors.Normal(), likelihood=likelihoods.Categorical(),
        ...                       num_data=10)
        >>> model.layout.num_values
        9
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        prior: Prior,
        likelihood: Likelihood,
        num_data: int,
        bayesian: str | Sequence[str] = "*",
        temperature: float = 1.0,
    ) -> None:
        if not isinstance(num_data, int) or num_data < 1:
            raise ConfigError(
                "num_data",
                want="a whole number of at least 1",
                got=repr(num_data),
                fix="pass the number of rows of the training set",
            )
        priors.require_positive("temperature", temperature)
        self.module, self.prior, self.likelihood = module, prior, likelihood
        self.num_data, self.temperature = num_data, temperature
        self.bayesian = as_patterns(bayesian)
        own = layout_of(module, bayesian)
        self._entries = own.entries
        prior.check(self._entries)
        self.unknowns = (*likelihood.unknowns, *priors.unknowns(prior, self._entries))
        extra = (Entry(unknown.name, (), torch.float32) for unknown in self.unknowns)
        self.layout = Layout((*own.entries, *extra), own.aliases)
        self.space = Space(self.layout, self._entries, prior, self.unknowns, device_of(module))
        self._skeleton = Skeleton(module, self.layout, detach=True)

    @property
    def device(self) -> torch.device:
        """Where the module is now, and so where a fit computes."""
        return device_of(self.module)

    def forward(self, params: Params, x: Any) -> Any:
        """Outputs of the module for one sample."""
        return self._skeleton(params, x)

    def log_likelihood(self, params: Params, batch: Batch) -> Tensor:
        """sum_b w_b log p(y_b | x_b, theta), a scalar in float64; w_b are the batch's weights, 1 where it has none."""
        each = self.likelihood.log_prob(self.forward(params, batch.x), batch.y, params)  # [B]
        weighed = each if batch.weight is None else batch.weight.to(each) * each
        return weighed.sum(dtype=torch.float64)

    def log_prior(self, params: Params) -> Tensor:
        """log p(theta), unknowns included, a scalar."""
        return self.space.log_prior(params)

    def log_joint(self, params: Params, batch: Batch, *, weight: float = 1.0) -> Tensor:
        """(weight N / B sum_b w_b log p(y_b | x_b, theta) + log p(theta)) / T for one sample, a scalar.

        The weight is 1, or B_i / mean B where batches of unlike sizes are visited equally often.
        """
        return self._joined(params, batch, self.log_prior(params), weight)

    def log_density(self, flat: Tensor, batch: Batch, *, weight: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log joint in the unconstrained space of the samplers, and in the constrained one.

        log pi(u) = log_joint(theta(u)) + log |d theta / d u|, with theta = exp(u) for positive unknowns,
        theta = loc + scale s u for entries whose prior has an unknown scale s, and theta = u for the rest.

        Args:
            flat: u, one sample [P].
            batch: the rows that N / B scales up; all of them for the full-data density.
            weight: of the likelihood, as in `log_joint`.

        Returns:
            The density to sample from and the log joint that a bank keeps, both scalars.
        """
        params, log_jacobian = self.constrain(flat)
        if self._has_own_joint:
            log_joint = self.log_joint(params, batch, weight=weight)
        else:
            log_joint = self._joined(params, batch, self.space.log_prior_at(flat, params), weight)
        return log_joint + log_jacobian, log_joint

    @property
    def _has_own_joint(self) -> bool:
        """Whether this is of a class with a prior or joint written anew, which counts in u as elsewhere."""
        kind = type(self)
        return kind.log_prior is not BayesianModel.log_prior or kind.log_joint is not BayesianModel.log_joint

    def _joined(self, params: Params, batch: Batch, log_prior: Tensor, weight: float) -> Tensor:
        scale = weight * self.num_data / len(batch.y)
        return (scale * self.log_likelihood(params, batch) + log_prior) / self.temperature

    def constrain(self, flat: Tensor) -> tuple[Params, Tensor]:
        """u [P] or [K, P] -> params as banks keep them, and log |d theta / d u|, a scalar or [K]."""
        return self.space.constrain(flat)

    def unconstrain(self, params: Params) -> Tensor:
        """Params -> u, [P] or [K, P]."""
        return self.space.unconstrain(params)

    def sample_prior(self, seed: int, *keys: int | str) -> Params:
        """One draw of every entry from the prior; the same one for the same seed and keys."""
        return drawing.draw_prior(self.prior, self.layout, self.likelihood.unknowns, generator(seed, *keys))

    def prior_scale(self) -> Tensor:
        """Prior standard deviation of each number of u (the prior's scale where it has none), [P]; 1 for logarithms."""
        scales = {unknown.name: torch.ones(()) for unknown in self.unknowns}
        for entry in self._entries:
            place = self.prior.place(entry)
            scale = place.family.spread * (place.scale if place.unknown is None else 1.0)
            scales[entry.name] = torch.full(entry.shape, scale)
        return self.layout.flatten(scales)

    def prior_precision(self, flat: Tensor) -> Tensor:
        """Curvature of the log prior at u, -d^2 log p(u) / d u_i^2, [P]: 1 / scale^2 for normal entries.

        Raises:
            ConfigError: the prior of the parameters is not normal, or a scale of it is unknown: its curvature
                is then not positive everywhere.
        """
        for entry in self._entries:
            place = self.prior.place(entry)
            if not isinstance(place.family, priors.Normal) or place.unknown is not None:
                raise ConfigError(
                    "prior",
                    want="normal values with fixed scales, whose curvature is known",
                    got=f"{self.prior.to_config()['name']} for '{entry.name}'",
                    fix="use priors.Normal or FanIn with numbers as scales, or a method that needs no curvature",
                )
        curvature = {e.name: torch.full(e.shape, self.prior.place(e).scale ** -2) for e in self._entries}
        logs = {name: value.detach().cpu() for name, value in self.layout.unflatten(flat).items()}
        for unknown in self.unknowns:

            def density(log_value: Tensor, prior: PositivePrior = unknown.prior) -> Tensor:
                return prior.log_prob(log_value.exp()) + log_value

            curvature[unknown.name] = -torch.func.grad(torch.func.grad(density))(logs[unknown.name])
        return self.layout.flatten(curvature).to(flat)

    def require_mode(self, place: str) -> None:
        """Raise ConfigError if a scale of the prior is unknown: the maximum of the log joint then says little.

        Where the scale and all values under it shrink together the log joint grows, of a half-Cauchy scale without bound.
        """
        if self.space.scaled:
            raise ConfigError(
                place,
                want="a prior with fixed scales: under an unknown one the log joint grows as scale and values shrink",
                got=f"'{self.space.scaled[0][1].unknown.name}'",  # type: ignore[union-attr]
                fix="fix the scale, or choose a method that samples or fits a distribution",
            )

    def module_params(self) -> Params:
        """The module's present values as a sample; unknowns at the median of their prior."""
        named = dict(self.module.named_parameters(remove_duplicate=False))
        params = {e.name: named[e.name].detach().clone() for e in self._entries}
        medians = {unknown.name: unknown.prior.median for unknown in self.unknowns}
        return params | {name: torch.full((), median, device=self.device) for name, median in medians.items()}

    def base(self) -> Params:
        """Parameters outside the sample, and persistent buffers: what a bank keeps once."""
        kept = set(self.layout.names) | set(self.layout.aliases)
        tensors = {name: t for name, t in self.module.state_dict().items() if isinstance(t, Tensor)}
        return {name: tensor.detach() for name, tensor in tensors.items() if name not in kept}

    def check_rows(self, batch: Batch) -> None:
        """Raise DataError unless the module takes these rows and its outputs fit their targets."""
        first = Batch(
            pytree.tree_map(lambda leaf: leaf[:1] if isinstance(leaf, Tensor) else leaf, batch.x), batch.y[:1]
        )
        with torch.no_grad():
            params = self.module_params()
            try:
                outputs = self.forward(params, first.x)
            except (RuntimeError, TypeError, IndexError) as error:
                message = str(error).strip().splitlines()
                raise DataError(
                    "data",
                    want=f"rows that the module ({type(self.module).__name__}) takes",
                    got=f"{type(error).__name__}: {message[0] if message else ''}",
                    fix="check the shape and dtype of x",
                ) from error
            self.likelihood.check(outputs, batch.y)

    def to_config(self) -> dict[str, Any]:
        """What `bank.json` says of the model, apart from the module's own specification."""
        return {
            "bayesian": list(self.bayesian),
            "prior": self.prior.to_config(),
            "likelihood": self.likelihood.to_config(),
            "task": self.likelihood.task,
            "num_data": self.num_data,
            "temperature": self.temperature,
        }
