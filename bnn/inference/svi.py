"""Guides of Pyro, its automatic ones and a user's own, fitted by its SVI and drawn from site by site."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeAlias

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, autoguide
from pyro.infer.autoguide.initialization import init_to_sample, init_to_value
from pyro.nn import PyroModule
from torch import Tensor, nn

from bnn.errors import ConfigError
from bnn.model import BayesianModel
from bnn.seeding import GLOBAL_STATE, isolated
from bnn.types import Batch, Params

Sites: TypeAlias = Literal["flat", "parameter"]
SITES: tuple[str, ...] = ("flat", "parameter")

Program: TypeAlias = Callable[..., Any]
"""A Pyro program of inputs and targets: `model(x, y)` or `guide(x, y)`."""

AUTOGUIDES: dict[str, Any] = {
    name: kind
    for name, kind in vars(autoguide).items()
    if inspect.isclass(kind)
    and issubclass(kind, autoguide.AutoGuide)
    and kind.__init__ is not autoguide.AutoCallable.__init__
    and name
    not in (
        "AutoGuide",
        "AutoGuideList",
        "AutoContinuous",
        "AutoDiscreteParallel",
        "AutoLaplaceApproximation",
        "AutoNormalizingFlow",
    )
}
"""Guides that Pyro makes of a model of continuous sites alone."""

FLAT = "theta"  # the site of all weights, u [P]


class Fit(NamedTuple):
    """A guide under SVI: the program, what it keeps outside itself, and the model that it approximates."""

    guide: Program
    store: dict[str, Any]  # Pyro's parameter store, for guides that are functions
    model: BayesianModel
    sites: Sites
    own_model: Program | None


def autoguide_named(name: str) -> Any:
    """The class of `pyro.infer.autoguide` of this name.

    Raises:
        ConfigError: there is none, or it is the Laplace approximation by a bare Hessian.
    """
    if name == "AutoLaplaceApproximation":
        raise _bare_hessian()
    if name not in AUTOGUIDES:
        raise ConfigError(
            "Guide", want=f"a guide of Pyro: {', '.join(sorted(AUTOGUIDES))}", got=repr(name), fix="choose one of them"
        )
    return AUTOGUIDES[name]


def num_bytes(family: Any, size: int, itemsize: int) -> int:
    """Bytes of a fit of those guides of Pyro whose parameters grow with P^2: values, gradients, two moments; else 0."""
    kind, keywords = (family.func, family.keywords) if isinstance(family, functools.partial) else (family, {})
    if kind is autoguide.AutoMultivariateNormal:
        return 4 * size * size * itemsize
    if kind is autoguide.AutoIAFNormal:
        hidden = keywords.get("hidden_dim") or 3 * size + 1
        width = int(sum(hidden) if isinstance(hidden, (list, tuple)) else hidden)
        return 12 * size * width * int(keywords.get("num_transforms", 1)) * itemsize
    return 0


@contextmanager
def apart(store: dict[str, Any]) -> Iterator[None]:
    """Run Pyro code with a parameter store of its own, kept in `store`, and local parameters of modules.

    The user's store and settings are as before afterwards.
    """
    with GLOBAL_STATE, pyro.settings.context(module_local_params=True):
        with pyro.get_param_store().scope(store or None) as kept:
            yield
        store.update(kept)


def build(family: Any, sites: Sites, own_model: Program | None, model: BayesianModel, batch: Batch, seed: int) -> Fit:
    """The guide that `family` says, at its start, checked site by site against the model.

    A class, or a `functools.partial` of one, is called with the Pyro model and gives a guide; a function or
    a module is one: of modules a copy is fitted.

    Raises:
        ConfigError: a site without a guide, one that the model has not, or one of another shape.
    """
    if own_model is not None and (model.temperature != 1.0 or batch.weight is not None):
        raise ConfigError(
            "Guide(pyro_model=)",
            want="temperature 1 and rows that weigh alike: its density is its own",
            got=f"temperature {model.temperature:g}" if batch.weight is None else "importance weights",
            fix="scale the sites in the Pyro model with pyro.poutine.scale, or leave pyro_model out",
        )
    if isinstance(own_model, nn.Module):
        own_model = _copied(own_model)
    place = own_model or _place(model, sites)
    store: dict[str, Any] = {}
    with apart(store), isolated(seed, "guide"):
        if isinstance(family, (type, functools.partial)):
            guide = _made(family, place, model, sites, own_model)
        else:
            guide = _copied(family) if isinstance(family, nn.Module) else family
        traced = _traced(guide, batch)
        if isinstance(guide, nn.Module):
            guide.to(model.device)
        wanted = _shapes(model, sites)
        if own_model is not None:
            found = _latent(poutine.trace(own_model).get_trace(batch.x, batch.y))
            wanted = {name: tuple(value.shape) for name, value in found.items()}
    fit = Fit(guide, store, model, sites, own_model)
    _check_sites(fit, wanted, _latent(traced))
    if not parameters(fit):
        raise ConfigError("Guide", want="a guide with parameters", got="none", fix="add pyro.param(...) to the guide")
    _try(fit, batch, seed)
    return fit


def _traced(guide: Program, batch: Batch) -> Any:
    """A run of the guide; what cannot be called with (x, y) is refused in words."""
    if not isinstance(guide, nn.Module):
        try:
            inspect.signature(guide).bind(batch.x, batch.y)
        except TypeError as error:
            raise ConfigError(
                "Guide",
                want="a guide of inputs and targets, guide(x, y)",
                got=str(error),
                fix="give it these arguments",
            ) from error
    return poutine.trace(guide).get_trace(batch.x, batch.y)


def _try(fit: Fit, batch: Batch, seed: int) -> None:
    """Raise ConfigError, before the first step, where Pyro cannot bring model and guide together."""
    with apart(fit.store), isolated(seed, "try"):
        try:
            found = loss(fit, batch, 1.0)
        except ValueError as error:
            if is_improper(error):
                return  # the first step says so
            raise ConfigError(
                "Guide",
                want="sites whose tensors are one event each, as the model's",
                got=str(error).strip().splitlines()[0],
                fix="add .to_event(...) to the guide's distributions",
            ) from error
    if not found.requires_grad:
        raise ConfigError(
            "Guide",
            want="a loss that depends on the guide's parameters",
            got="one that does not",
            fix="leave .detach() out",
        )


def _copied(program: nn.Module) -> nn.Module:
    """A copy that keeps its own parameters, as `apart` says, also if it was made under the user's settings."""
    automatic = [part for part in program.modules() if isinstance(part, autoguide.AutoGuide)]
    kept = [(part._model, part.master) for part in automatic]
    copied = copy.deepcopy(program)
    # Pyro takes the model away from an automatic guide that is copied, and from the copy.
    for part, (model, master) in zip(automatic, kept, strict=True):
        part._model, part.master = model, master
    twins = (part for part in copied.modules() if isinstance(part, autoguide.AutoGuide))
    for part, (model, _) in zip(twins, kept, strict=True):
        part._model = model
    for part in copied.modules():
        if isinstance(part, PyroModule) and not hasattr(part._pyro_context, "param_state"):
            part._pyro_context.param_state = {"params": {}, "constraints": {}}
    return copied


def parameters(fit: Fit) -> dict[str, Tensor]:
    """Unconstrained parameters of a guide, by name."""
    own = dict(fit.guide.named_parameters()) if isinstance(fit.guide, nn.Module) else {}
    if isinstance(fit.own_model, nn.Module):
        own |= {f"model.{name}": value for name, value in fit.own_model.named_parameters()}
    return own | {f"store.{name}": value for name, value in fit.store.get("params", {}).items()}


def loss(fit: Fit, batch: Batch, weight: float) -> Tensor:
    """-ELBO of one draw of the guide, in nats: reparameterised where its distributions are, else by the score.

    grad E_q[f(u)] = E[grad f(T(z))] where u = T(z) (`has_rsample`), else E[f(u) grad log q(u)] + E[grad f(u)]
    """
    program = fit.own_model or (lambda x, y: density(fit.model, fit.sites, batch, weight))
    found: Tensor = Trace_ELBO().differentiable_loss(program, fit.guide, batch.x, batch.y)
    return found


def density(model: BayesianModel, sites: Sites, batch: Batch, weight: float) -> None:
    """The Pyro model of a BayesianModel: its sites are only places, their density is in the factor."""
    if sites == "flat":
        log_density, _ = model.log_density(_sample_flat(model), batch, weight=weight)
        pyro.factor("log_density", log_density)
        return
    params = _sample_parameters(model)
    # Pyro's guides count the change of variables of positive sites themselves.
    pyro.factor("log_joint", model.log_joint(params, batch, weight=weight))


def draw(fit: Fit, batch: Batch, seed: int, index: int) -> Params:
    """One sample of the guide, as banks keep it; the same for the same seed and index."""
    with isolated(seed, "draw", index), torch.no_grad():
        sites = _latent(poutine.trace(fit.guide).get_trace(batch.x, batch.y))
    if fit.sites == "flat" and fit.own_model is None:
        params, _ = fit.model.constrain(sites[FLAT].detach().cpu())
        return params
    return {e.name: sites[e.name].detach().to("cpu", e.dtype) for e in fit.model.layout.entries}


def _place(model: BayesianModel, sites: Sites) -> Program:
    """A Pyro program of the model's sites alone."""

    def place(x: Any = None, y: Any = None) -> None:
        del x, y
        _sample_flat(model) if sites == "flat" else _sample_parameters(model)

    return place


def _sample_flat(model: BayesianModel) -> Tensor:
    size = (model.layout.num_values,)
    flat: Tensor = pyro.sample(FLAT, _anywhere(size, positive=False).to_event(1).mask(False))
    return flat


def _anywhere(shape: tuple[int, ...], *, positive: bool) -> Any:
    """A distribution that Pyro can draw a start from; masked, its density is 1 everywhere."""
    kind = dist.LogNormal if positive else dist.Normal
    return kind(torch.zeros(()), torch.ones(())).expand(shape)


def _sample_parameters(model: BayesianModel) -> Params:
    positive = {unknown.name for unknown in model.unknowns}
    found = {}
    for entry in model.layout.entries:
        place = _anywhere(entry.shape, positive=entry.name in positive)
        found[entry.name] = pyro.sample(entry.name, place.to_event(len(entry.shape)).mask(False))
    return {entry.name: found[entry.name].to(entry.dtype) for entry in model.layout.entries}


def _made(family: Any, place: Program, model: BayesianModel, sites: Sites, own_model: Program | None) -> Program:
    """An automatic guide, started at the module's present values where it can be told so."""
    kind = family.func if isinstance(family, functools.partial) else family
    if inspect.isclass(kind) and issubclass(kind, autoguide.AutoLaplaceApproximation):
        raise _bare_hessian()
    options: dict[str, Any] = {}
    is_flow = inspect.isclass(kind) and issubclass(kind, autoguide.AutoNormalizingFlow)  # starts as its transform does
    if inspect.isclass(kind) and not is_flow and "init_loc_fn" in inspect.signature(kind).parameters:
        start = {name: value.to(model.device) for name, value in model.module_params().items()}
        if own_model is None and sites == "flat":
            start = {FLAT: model.unconstrain(start)}
        wide = {name: value.to(model.layout.dtype) for name, value in start.items()}
        options["init_loc_fn"] = init_to_value(values=wide, fallback=init_to_sample)
    try:
        guide: Program = family(place, **(options | getattr(family, "keywords", {})))
    except TypeError as error:
        raise ConfigError(
            "Guide",
            want="a class or functools.partial that makes a guide from a Pyro model alone",
            got=str(error),
            fix="give the rest with functools.partial, or pass the guide itself",
        ) from error
    return guide


def _shapes(model: BayesianModel, sites: Sites) -> dict[str, tuple[int, ...]]:
    """The sites of a BayesianModel and their shapes."""
    if sites == "flat":
        return {FLAT: (model.layout.num_values,)}
    return {entry.name: entry.shape for entry in model.layout.entries}


def _bare_hessian() -> ConfigError:
    return ConfigError(
        "Guide",
        want="a guide whose covariance is positive",
        got="AutoLaplaceApproximation, which inverts the bare Hessian of the log joint",
        fix="use the method Laplace, whose curvature is a generalised Gauss-Newton matrix",
    )


def _latent(trace: Any) -> dict[str, Tensor]:
    """Values of the sites of a trace that are neither observed nor helpers of Pyro's own."""
    return {
        name: site["value"]
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not site["is_observed"]
        and not site["infer"].get("is_auxiliary", False)
        and type(site["fn"]).__name__ != "_Subsample"
    }


def _check_sites(fit: Fit, wanted: dict[str, tuple[int, ...]], found: dict[str, Tensor]) -> None:
    """Raise ConfigError unless the guide has the model's sites, and the model the sample's entries."""
    if fit.own_model is not None:
        for entry in fit.model.layout.entries:
            if entry.name not in wanted:
                raise ConfigError(
                    "Guide(pyro_model=)",
                    want=f"a site named '{entry.name}', as the parameter",
                    got=f"sites {', '.join(wanted) or 'none'}",
                    fix="sample it there, or make fewer parameters Bayesian",
                )
            _check_shape("Guide(pyro_model=)", entry.name, entry.shape, wanted[entry.name])
    for name, shape in wanted.items():
        if name not in found:
            raise ConfigError(
                "Guide",
                want=f"a guide of the site '{name}'",
                got=f"one of {', '.join(found) or 'none'}",
                fix=f"add pyro.sample('{name}', ...) to the guide",
            )
        _check_shape("Guide", name, shape, tuple(found[name].shape))
    for name in found:
        if name not in wanted:
            raise ConfigError(
                "Guide",
                want=f"sites of the model: {', '.join(wanted)}",
                got=f"'{name}', which it has not",
                fix="rename it, or mark it with infer={'is_auxiliary': True}",
            )


def _check_shape(place: str, name: str, want: tuple[int, ...], got: tuple[int, ...]) -> None:
    if got != want:
        raise ConfigError(
            f"{place} site '{name}'", want=f"a value of shape {list(want)}", got=str(list(got)), fix="reshape it"
        )


def is_improper(error: ValueError) -> bool:
    """Whether this is Pyro's refusal of a distribution whose parameters are no numbers."""
    return "Expected" in str(error)
