"""bnn demo: three posteriors of one module on handwritten digits, judged side by side."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bnn.cli import common

if TYPE_CHECKING:
    from bnn.bank import Bank
    from bnn.data import DataSet
    from bnn.types import Method

MODEL = "mlp:64,64"
PRIOR_SCALE = 3.0  # of the fan-in prior, fixed; docs/design.md says where it comes from
NUM_EPOCHS = 200  # of the plain module and of the student


def demo(
    out: Annotated[Path, typer.Option(help="Folder for banks, report.json, report.html and pictures.")] = Path(
        "bnn-demo"
    ),
    resume: common.Resume = False,
    overwrite: common.Overwrite = False,
    seed: common.Seed = 0,
    debug: common.Debug = False,
) -> None:
    """Fit three posteriors on handwritten digits, distil one, and judge them beside the module trained plainly."""
    del debug
    from bnn import evaluation, fitting, inference, likelihoods, modules, priors
    from bnn.bank import Bank
    from bnn.cli.show import show_reports
    from bnn.data import load_data, load_outside
    from bnn.errors import BankExists, ConfigError
    from bnn.functional import FunctionalModel
    from bnn.model import BayesianModel
    from bnn.training import distil

    if out.exists() and not overwrite and not resume and any(out.iterdir() if out.is_dir() else [out]):
        raise BankExists(
            str(out),
            want="a new folder",
            got="one with files, which are kept",
            fix="choose another with --out, go on with --resume, or say --overwrite",
        )
    if resume and overwrite:
        raise ConfigError(str(out), want="--resume or --overwrite", got="both", fix="say one of them")

    def begun(name: str) -> bool:
        """Whether a bank of an earlier run is there to go on with."""
        return resume and (out / name / "bank.json").exists()

    began = time.perf_counter()
    data, outside = load_data("digits"), load_outside("digits-shuffled", load_data("digits"))
    module = modules.build(MODEL, input_shape=data.input_shape, num_outputs=data.num_outputs, seed=seed)
    model = BayesianModel(
        module, prior=priors.FanIn(PRIOR_SCALE), likelihood=likelihoods.Categorical(), num_data=len(data.train.y)
    )
    record = {"model": common.model_record(MODEL, data, seed), "data": data.record}
    methods: dict[str, tuple[Method, int]] = {
        "prior": (inference.Prior(), 100),
        "mean-field": (inference.Guide("mean-field", num_steps=3000), 100),
        "hmc": (inference.HMC(num_chains=8, num_warmup=80, num_steps=25), 400),
    }
    _say(
        f"digits: {len(data.train.y)} training rows, {len(data.test.y)} test rows; {MODEL}, {model.layout.num_values:,} weights"
    )
    banks: dict[str, Bank] = {}
    for name, (method, num_samples) in methods.items():
        start = time.perf_counter()
        banks[name] = fitting.fit(
            model,
            data.train,
            method=method,
            num_samples=num_samples,
            out=out / name,
            seed=seed,
            resume=begun(name),
            overwrite=overwrite,
            record=record,
        )
        _say(f"{name}: {num_samples} samples in {time.perf_counter() - start:.1f} s")
    start = time.perf_counter()
    banks["student"] = distil(
        module,
        FunctionalModel(module, banks["hmc"]),
        data.train,
        held_out=data.test,
        out=out / "student",
        num_epochs=NUM_EPOCHS,
        seed=seed,
        resume=begun("student"),
        overwrite=overwrite,
        record=record,
    )
    _say(f"student of hmc: {NUM_EPOCHS} epochs in {time.perf_counter() - start:.1f} s")
    start = time.perf_counter()
    if begun("plain"):
        banks["plain"] = Bank.open(out / "plain")
    else:
        banks["plain"] = train_plainly(data, out / "plain", seed=seed, overwrite=overwrite)
    _say(f"plain: {NUM_EPOCHS} epochs in {time.perf_counter() - start:.1f} s")
    reports = {}
    for name, bank in banks.items():
        net = FunctionalModel(module, bank).settled()
        reports[name] = evaluation.evaluate(net, data.test, ood=outside)
        reports[name].about = {"bank": str(out / name), "data": "digits", "ood": "digits-shuffled"}
    shown = ("accuracy", "nll", "brier", "ece", "auroc")
    _say("")
    show_reports(reports, only=shown, speed=True)
    evaluation.save_reports(reports, out)
    _say(
        f"\n{out}{os.sep}: five banks, report.json, report.html and pictures; {time.perf_counter() - began:.0f} s in all"
    )


def train_plainly(data: DataSet, out: Path, *, seed: int, overwrite: bool) -> Bank:
    """The same module trained as people do, by Adam on the cross-entropy; a bank of one sample."""
    import torch

    from bnn import likelihoods, modules
    from bnn.bank import Bank
    from bnn.batches import minibatches, num_batches

    module = modules.build(MODEL, input_shape=data.input_shape, num_outputs=data.num_outputs, seed=seed)
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    batches = minibatches(data.train, 128, seed=seed)
    module.train()
    for _ in range(NUM_EPOCHS * num_batches(data.train, 128)):
        batch = next(batches)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(batch.x), batch.y).backward()
        optimizer.step()
    module.eval()
    info = {
        "likelihood": likelihoods.Categorical().to_config(),
        "model": common.model_record(MODEL, data, seed),
        "data": data.record,
    }
    return Bank.from_state_dicts([module.state_dict()], module=module, out=out, overwrite=overwrite, info=info)


def _say(message: str) -> None:
    typer.echo(message)
