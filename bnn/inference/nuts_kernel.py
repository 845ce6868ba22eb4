"""Pyro's NUTS kernel with its state on the outside, so that a chain can be put down and taken up after any draw."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro
import pyro.infer.mcmc
import torch
from torch import Tensor

from bnn.model import BayesianModel
from bnn.seeding import isolated
from bnn.types import Batch

SITE = "u"  # Pyro's name for the one vector that it samples


class Chain(NamedTuple):
    """All that the next draw of a chain needs."""

    position: Tensor  # z [P], float64
    potential: Tensor  # -log pi(s z), a scalar
    gradient: Tensor  # of the potential [P]
    inverse_mass: Tensor  # [P]
    mean: Tensor  # [P], of the draws of this window of the warm-up
    squares: Tensor  # [P], sums of their squared deviations
    num_draws: int  # in the window
    window: int  # its number
    step_size: float  # of the next trajectory
    log_step_mean: float  # dual averaging: its average, used after warm-up,
    error_mean: float  # the running mean of (target - acceptance),
    num_updates: int  # how many those are,
    centre: float  # and what the logarithm of the step size is drawn towards
    still: int = 0  # trajectories in a row that left it where it was


class Info(NamedTuple):
    """Diagnostics of one trajectory."""

    acceptance: float  # mean over its points
    divergent: bool
    step_size: float
    energy: float  # H at its start, with the momentum drawn there
    num_steps: int  # leapfrog steps
    pole: bool  # whether the density was infinite at a point of it


class Potential:
    """-log pi(s z) as Pyro asks for it, with a note of how often it did, and whether it met a pole.

    The model computes in its own dtype; positions, momenta and energies stay in float64.
    """

    def __init__(self, model: BayesianModel, batch: Batch) -> None:
        self.model, self.batch = model, batch
        self.num_calls, self.pole = 0, False
        self.scale = model.prior_scale().to(model.device, torch.float64)  # s [P]

    def __call__(self, sites: dict[str, Tensor]) -> Tensor:
        self.num_calls += 1
        potential = -self.model.log_density(self.flat(sites[SITE]), self.batch)[0].double()
        pole = potential == -math.inf
        self.pole |= bool(pole)
        return potential.where(
            ~pole, math.nan
        )  # which Pyro takes for a divergence; -inf would end in an error of its own

    def flat(self, position: Tensor) -> Tensor:
        """z [..., P] -> u, in the dtype of the layout."""
        return (self.scale * position).to(self.model.layout.dtype)


class Kernel:
    """The sampler of Pyro with its state on the outside: the one place that knows Pyro's private attributes.

    Pyro keeps the state of a chain across its kernel, adapter, dual averaging and mass matrix, and has no way of
    taking it out and putting it back, which a run that can be resumed needs. Of a draw it tells neither the energy
    nor, in warm-up, the acceptance.
    """

    def __init__(self, potential: Potential, *, num_warmup: int, target_accept: float, max_tree_depth: int) -> None:
        self.num_warmup, self.potential = num_warmup, potential
        self.pyro: Any = pyro.infer.mcmc.NUTS(
            potential_fn=potential, target_accept_prob=target_accept, max_tree_depth=max_tree_depth
        )
        self.kinetic: list[float] = []  # energies of the momenta that Pyro asked for since a draw began
        kinetic_energy = self.pyro._kinetic_energy

        def noted(momentum: dict[tuple[str, ...], Tensor]) -> Tensor:
            energy: Tensor = kinetic_energy(momentum)
            if not self.kinetic:
                self.kinetic.append(float(energy))
            return energy

        self.pyro._kinetic_energy = noted

    def begin(self, position: Tensor) -> Chain:
        """A chain at z [P] that has learnt nothing but a first step size, found by doubling or halving."""
        self.pyro.initial_params = {SITE: position}
        self.pyro.setup(self.num_warmup)
        return self.save()

    def draw(self, chain: Chain, step: int) -> tuple[Chain, Info]:
        """Trajectory number `step` of a chain, warm-up included, and what is learnt from it."""
        self.load(chain, step)
        self.potential.num_calls, self.potential.pole = 0, False
        self.kinetic, self.pyro._divergences, self.pyro._mean_accept_prob = [], [], 0.0
        self.pyro.sample({SITE: chain.position})
        # Pyro has moved its running mean by 1 / count of the way from 0 to this acceptance.
        count = step + 1 if step < self.num_warmup else step + 1 - self.num_warmup
        info = Info(
            acceptance=min(self.pyro._mean_accept_prob * count, 1.0),
            divergent=bool(self.pyro._divergences),
            step_size=chain.step_size,
            energy=float(chain.potential) + self.kinetic[0],
            num_steps=self.potential.num_calls,  # in warm-up with those of searches for a step size
            pole=self.potential.pole,
        )
        reached = self.save()
        stayed = torch.equal(reached.position, chain.position)
        return reached._replace(still=chain.still + 1 if stayed else 0), info

    def load(self, chain: Chain, step: int) -> None:
        """Put a chain into Pyro's kernel."""
        kernel, adapter = self.pyro, self.pyro._adapter
        kernel._t = step
        kernel._cache({SITE: chain.position}, chain.potential, {SITE: chain.gradient})
        adapter.step_size, adapter._current_window = chain.step_size, chain.window
        averaging = adapter._step_size_adapt_scheme
        averaging.prox_center, averaging._t = chain.centre, chain.num_updates
        averaging._x_avg, averaging._g_avg = chain.log_step_mean, chain.error_mean
        adapter.mass_matrix_adapter.inverse_mass_matrix = {(SITE,): chain.inverse_mass}  # forgets the moments
        moments = adapter.mass_matrix_adapter._adapt_scheme[(SITE,)]
        moments._mean, moments.n_samples = chain.mean, chain.num_draws
        moments._m2 = chain.squares.clone()  # Pyro adds to it in place

    def save(self) -> Chain:
        """The chain that stands in Pyro's kernel."""
        adapter = self.pyro._adapter
        sites, potential, gradients = self.pyro._fetch_from_cache()
        averaging, masses = adapter._step_size_adapt_scheme, adapter.mass_matrix_adapter
        moments, zeros = masses._adapt_scheme[(SITE,)], torch.zeros_like(sites[SITE])
        return Chain(
            position=sites[SITE].detach(),
            potential=potential.detach(),
            gradient=gradients[SITE].detach(),
            inverse_mass=masses.inverse_mass_matrix[(SITE,)],
            mean=zeros + moments._mean,  # Pyro begins with plain zeros
            squares=zeros + moments._m2,
            num_draws=moments.n_samples,
            window=adapter._current_window,
            step_size=float(adapter.step_size),
            log_step_mean=float(averaging._x_avg),
            error_mean=float(averaging._g_avg),
            num_updates=averaging._t,
            centre=float(averaging.prox_center),
        )


@contextmanager
def alone(device: torch.device, seed: int, *keys: int | str) -> Iterator[None]:
    """Run Pyro from random streams keyed by place, with gradients and without its checks, all as before afterwards.

    Without checks, since a density that checks its arguments would end the run at a point of a trajectory where they
    are NaN, which is a divergence; in warm-up Pyro turns them off itself.
    """
    with isolated(seed, "nuts", *keys, cuda=device.type == "cuda"):
        checks = torch.distributions.Distribution._validate_args  # Pyro restores its own setting in its place
        try:
            with pyro.validation_enabled(False), torch.enable_grad():
                yield
        finally:
            torch.distributions.Distribution.set_default_validate_args(checks)
