"""What one rank does; run as a script, once a rank, by `ranked.launch` or by torchrun."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import ranked
import torch
from torch.utils.data import TensorDataset

import bnn
from bnn import distributed, pacing, together
from bnn.bank import writer
from bnn.errors import BnnError
from bnn.fitting import digest_of
from bnn.inference import HMC, SWAG, Guide, Prior, chains


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def fits(out: str, names: str) -> None:
    """Methods that can be split, into folders of their names; then some again, with more samples, and one replaced.

    One has its rows from a data set, of which each rank reads its own.
    """
    warnings.simplefilter("ignore")
    model, data, every = ranked.model(), ranked.rows(), ranked.CHAINS | ranked.ROWS | ranked.GUIDES
    with distributed.joined():
        for name in names.split(","):
            method, num_samples = every[name]
            source: Any = TensorDataset(*data) if name == "map" else data
            bnn.fit(model, source, method=method, num_samples=num_samples, out=Path(out) / name, seed=3)
        for name in ("hmc", "prior", "mean-field"):
            method, num_samples = every[name]
            folder = Path(out) / name
            bnn.fit(model, data, method=method, num_samples=2 * num_samples, out=folder, seed=3, resume=True)
        method, num_samples = ranked.CHAINS["hmc"]
        over = Path(out) / "over"
        bnn.fit(model, data, method=Prior(), num_samples=9, out=over, seed=3)
        bnn.fit(model, data, method=method, num_samples=num_samples, out=over, seed=5, overwrite=True)
        (Path(out) / f"rounded-{distributed.ranks().rank}.json").write_text(json.dumps(rounded_apart(model, data)))


def rounded_apart(model: bnn.BayesianModel, data: Any) -> list[list[str]]:
    """Digests of parameters and moments in the states of a guide, of which rank 1 rounds each step otherwise, as another processor might."""
    step = torch.optim.Adam.step

    def apart(self: Any) -> None:
        step(self)
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter *= 1.0 + 1e-12 * distributed.ranks().rank

    torch.optim.Adam.step = apart  # type: ignore[assignment, method-assign]
    try:
        run = Guide(num_steps=120, batch_size=10).run(model, data, num_samples=1, seed=3)
        states = [state for _, state in run if state["step"] <= 120]
    finally:
        torch.optim.Adam.step = step  # type: ignore[method-assign]
    return [
        [str(digest_of([state[name]], rows=None)) for name in sorted(state) if name.startswith(("value.", "adam."))]
        for state in states
    ]


def over(out: str, overwriting: str, killed: str) -> None:
    """A guide into a folder that has a bank, which ranks with a 1 say to replace; from which step it went on.

    There is a commit at every chance, and rank 0 is killed after so many.
    """
    warnings.simplefilter("ignore")
    run, take, taken = Guide.run, together.Checkpoints.take, 0
    method, num_samples = ranked.GUIDES["mean-field"]

    def told(self: Any, *data: Any, state: Any, **options: Any) -> Any:
        say(str(None if state is None else state["step"]))
        die(taken)
        return run(self, *data, state=state, **options)

    def counted(self: Any, block: Any, state: Any) -> None:
        nonlocal taken
        take(self, block, state)
        self._part.commit()
        taken += 1
        die(taken)

    def die(after: int) -> None:
        if killed == str(after) and distributed.ranks().rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    Guide.run, together.Checkpoints.take = told, counted  # type: ignore[method-assign]
    with distributed.joined() as joined:
        try:
            bnn.fit(
                ranked.model(), ranked.rows(), method=method, num_samples=num_samples, out=out, seed=3,
                overwrite=overwriting[joined.rank] == "1",
            )  # fmt: skip
        except BnnError as error:
            say(f"{type(error).__name__}: {error}")
            raise


def refusals(out: str) -> None:
    """What `fit` says where ranks differ, or a method cannot be split: one line a case, on every rank."""
    told: list[str] = []
    with distributed.joined() as together:
        odd = together.rank == 1
        x, y = ranked.rows()
        wide = ranked.model()
        other = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).double()
        moved = ranked.model()
        with torch.no_grad():
            next(moved.module.parameters())[0, 0] += 1e-9 * odd
        swapped = bnn.BayesianModel(
            other if odd else wide.module, prior=wide.prior, likelihood=wide.likelihood, num_data=ranked.N
        )
        prior: dict[str, Any] = {"method": Prior(), "num_samples": 4}
        cases: list[tuple[bnn.BayesianModel, Any, dict[str, Any]]] = [
            (wide, (x, y), {**prior, "seed": int(odd)}),
            (wide, (x, y), {**prior, "method": Prior(block_size=8 + odd)}),
            (wide, (x, y), {**prior, "num_samples": 4 + odd}),
            (wide, (x + 1e-12 * odd * (torch.arange(ranked.N) == 36)[:, None], y), prior),
            (swapped, (x, y), prior),
            (moved, (x, y), prior),
            (wide, (x, y), {**prior, "resume": odd}),
            (wide, (x, y), {"method": SWAG(), "num_samples": 4}),
            (wide, (x, y), {"method": Guide("AutoNormal"), "num_samples": 4}),
            (wide, (x, y), {"method": Guide(variance_reduction="flipout"), "num_samples": 4}),
            (wide, (x, y), {"method": HMC(num_chains=1), "num_samples": 4}),
            (wide, (x, y), {"method": HMC(num_chains=2, num_warmup=0), "num_samples": 4}),
            (wide, (x, y), {**prior, "out": None}),
            (wide, (x, y), {**prior, "writer": "mine"}),
        ]

        def tell(model: bnn.BayesianModel, data: Any, options: dict[str, Any]) -> None:
            try:
                bnn.fit(model, data, **{"out": out, **options})
                told.append("nothing")
            except BnnError as error:
                told.append(f"{type(error).__name__}: {error}")

        for case in cases:
            tell(*case)
        told_of = Path(out).with_name(f"site-{together.rank}") / "bnn_toolkit-9.8.7.dist-info"
        told_of.mkdir(parents=True)
        (told_of / "METADATA").write_text("Metadata-Version: 2.1\nName: bnn-toolkit\nVersion: 9.8.7\n")
        sys.path[:0] = [str(told_of.parent)] * odd  # as installed there
        tell(wide, (x, y), prior)
        del sys.path[: int(odd)]
        torch.__version__ = torch.torch_version.TorchVersion("2.10.1" if odd else torch.__version__)
        tell(wide, (x, y), prior)
    say(json.dumps(told))


def useless(out: str) -> None:
    """What ranks say of chains of which one comes to an infinite density in warm-up, all stand still, or those of rank 1 alone do."""
    warnings.simplefilter("ignore")
    still = HMC(num_chains=5, num_warmup=60, num_steps=2, step_size=0.1, init="prior", compile=False)
    chains.STUCK, moved = 20, chains.transition
    with distributed.joined() as together:

        def tell(name: str, model: bnn.BayesianModel, data: Any, method: HMC) -> None:
            try:
                bnn.fit(model, data, method=method, num_samples=10, out=Path(out) / name, seed=3)
                say("nothing")
            except BnnError as error:
                say(f"{type(error).__name__}: {error}")

        tell("infinite", *ranked.bottomless(), ranked.WARM)
        for name, refusing in (("all", (0, 1)), ("one", (1,))):
            calls = 0

            def refused(density: Any, at: Any, noise: Any, uniform: Any, *rest: Any) -> Any:
                nonlocal calls
                calls += 1
                refuses = calls > 5 and together.rank in refusing  # noqa: B023
                return moved(density, at, noise, uniform + 1.0 if refuses else uniform, *rest)

            chains.transition = refused  # type: ignore[assignment]
            tell(name, ranked.model(), ranked.rows(), still)


def command_line(kills: str, *arguments: str) -> None:
    """`python -m bnn`, with a commit at every chance, and rank 1 killed before it takes the given block of each attempt."""
    together.STATE_SECONDS = pacing.SECONDS = 0.0
    writer.ROW_SECONDS = 0.0
    attempts = [int(number) for number in kills.split(",") if number]
    take, calls = together.Checkpoints.take, 0

    def counted(self: Any, block: Any, state: Any) -> None:
        nonlocal calls
        calls += 1
        if os.environ["RANK"] == "1" and attempts[distributed.restarts() :][:1] == [calls]:
            os.kill(os.getpid(), signal.SIGKILL)
        take(self, block, state)

    together.Checkpoints.take = counted  # type: ignore[method-assign]
    from bnn.cli import main

    main(list(arguments))


def paced(seconds: str, *lines: str) -> None:
    """`python -m bnn` with each line, with a commit at every chance and a rest before each block, in which something can happen."""
    together.STATE_SECONDS = pacing.SECONDS = 0.0
    writer.ROW_SECONDS = 0.0
    take = together.Checkpoints.take

    def rested(self: Any, block: Any, state: Any) -> None:
        time.sleep(float(seconds))
        take(self, block, state)

    together.Checkpoints.take = rested  # type: ignore[method-assign]
    from bnn import cli

    for line in lines[:-1]:
        if code := cli.run(line.split()):
            sys.exit(code)
    cli.main(lines[-1].split())


def odd_command(*arguments: str) -> None:
    """The command line, with data that rank 1 has not."""
    from bnn.cli import main

    rank = os.environ["RANK"]
    main(["missing.csv:y" if word.endswith("rows.csv:y") and rank == "1" else word for word in arguments])


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
