"""Fits that end as a virtual bank: what `bank.json` says of one, and the state that is all it keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from bnn.bank.virtual import finished_state, is_finished
from bnn.drawing import VIRTUAL_DRAWS, VIRTUAL_FAMILIES, Draws, draws_of, frozen
from bnn.errors import ConfigError
from bnn.inference import Guide, Prior
from bnn.likelihoods import likelihood_from_config
from bnn.model import BayesianModel
from bnn.priors import prior_from_config
from bnn.types import Block, Data, Method, Params, State


def virtual_record(model: BayesianModel, method: Method) -> dict[str, Any]:
    """What `bank.json` says of a virtual bank beyond what it says of others.

    Raises:
        ConfigError: of this method, prior or likelihood no virtual bank can be made.
    """
    family = method.family if isinstance(method, Guide) else method.name
    if not isinstance(method, (Guide, Prior)) or family not in VIRTUAL_FAMILIES:
        raise ConfigError(
            "virtual",
            want=f"one of the methods {', '.join(VIRTUAL_FAMILIES)}",
            got=getattr(method, "title", method.name),
            fix="leave virtual out: other methods have no samples but those they have made",
        )
    draws = getattr(method, "draws", "random")
    if draws not in VIRTUAL_DRAWS:
        raise ConfigError(
            "virtual",
            want=f"draws that are {' or '.join(VIRTUAL_DRAWS)}",
            got=draws,
            fix="choose one of them, or leave virtual out",
        )
    for what, own, known in (
        ("prior", model.prior, prior_from_config(model.prior.to_config())),
        ("likelihood", model.likelihood, likelihood_from_config(model.likelihood.to_config())),
    ):
        if own != known:
            raise ConfigError(
                f"virtual {what}", want="one of bnn, which the bank can name", got=repr(own), fix="leave virtual out"
            )
    said = {"family": family, "draws": draws}
    if family == "prior":
        _drawn(model, said, 0, {})  # one that cannot be drawn by number is refused before anything is made
    return {"requires": ["virtual"], "virtual": said}


def until_fitted(
    model: BayesianModel, data: Data, method: Method, *, num_samples: int, seed: int, state: State | None
) -> Iterator[tuple[Block, State]]:
    """The run of a method as far as its fit, and then the state of a virtual bank of so many samples.

    From a state that is finished it is the same bank of another length.
    """
    none = model.layout.no_rows()
    if state is not None and is_finished(state):
        yield none, {**state, "length": num_samples}
        return
    if isinstance(method, Prior):
        yield none, _finished(model, method, {}, num_samples, seed, {})
        return
    assert isinstance(method, Guide)
    for block, found in method.run(model, data, num_samples=1, seed=seed, state=state):
        if found["step"] < method.num_steps:
            yield block, found
            continue
        prefix = "value."
        values = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
        yield none, _finished(model, method, frozen(values), num_samples, seed, found["info"])
        return


def _finished(
    model: BayesianModel, method: Method, tensors: Params, num_samples: int, seed: int, info: Mapping[str, Any]
) -> State:
    said = virtual_record(model, method)["virtual"]
    draws = _drawn(model, said, seed, tensors)
    return finished_state(tensors, draws, model.layout, num_samples=num_samples, info=info)


def _drawn(model: BayesianModel, said: Mapping[str, str], seed: int, tensors: Mapping[str, Tensor]) -> Draws:
    return draws_of(
        model.layout,
        family=said["family"],
        draws=said["draws"],
        seed=seed,
        prior=model.prior.to_config(),
        likelihood=model.likelihood.to_config(),
        tensors=tensors,
    )
