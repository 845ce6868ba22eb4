"""One epoch of training in which every batch meets a weight sample: with a bank, and as people do without one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from bnn.bank import Bank


class Job(NamedTuple):
    """A module whose last layer is trained while the rest is drawn from independent normals."""

    module: nn.Module
    free: list[str]  # names of the last layer's parameters
    mean: dict[str, Tensor]
    scale: float
    samples: list[dict[str, Tensor]]
    x: Tensor
    y: Tensor
    batch_size: int

    @property
    def num_batches(self) -> int:
        return -(-len(self.y) // self.batch_size)


def make_job(module: nn.Module, x: Tensor, y: Tensor, *, num_samples: int, batch_size: int, seed: int) -> Job:
    """A job with samples drawn around the module's values."""
    import torch

    from bnn.seeding import generator

    names = [name for name, _ in module.named_parameters()]
    last = names[-1].rpartition(".")[0]
    free = [name for name in names if name.startswith(f"{last}.")]
    mean = {name: p.detach().clone() for name, p in module.named_parameters() if name not in free}
    source = generator(seed, "job")
    samples = [
        {n: t + 0.1 * torch.randn(t.shape, generator=source) for n, t in mean.items()} for _ in range(num_samples)
    ]
    return Job(module, free, mean, 0.1, samples, x, y, batch_size)


def bank_of(job: Job, out: Path | None) -> Bank:
    """The samples of a job as a bank, in memory or on disk."""
    import torch

    from bnn.bank import Bank, BankWriter
    from bnn.layout import layout_of
    from bnn.types import make_block

    layout = layout_of(job.module, list(job.mean))
    params = {name: torch.stack([sample[name] for sample in job.samples]) for name in layout.names}
    size = len(job.samples)
    block = make_block(params, chain=torch.zeros(size), draw=torch.arange(size))
    if out is None:
        return Bank.from_blocks([block], layout=layout, info={})
    writer = BankWriter(out, layout=layout, config={})
    writer.append(block)
    writer.close()
    return Bank.open(out)


class Trainee(NamedTuple):
    """A copy of the module, of which the last layer is trained by Adam."""

    module: nn.Module
    free: Mapping[str, Tensor]
    optimizer: torch.optim.Optimizer
    device: str

    @staticmethod
    def of(job: Job, device: str) -> Trainee:
        import torch

        module = copy.deepcopy(job.module).to(device)
        named = dict(module.named_parameters())
        for name, parameter in named.items():
            parameter.requires_grad_(name in job.free)
        free = {name: named[name] for name in job.free}
        return Trainee(module, free, torch.optim.Adam(free.values(), lr=1e-3), device)

    def step(self, logits: Tensor, y: Tensor) -> None:
        import torch

        self.optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, y).backward()
        self.optimizer.step()


def arms(job: Job, device: str, *, folder: Path) -> dict[str, Callable[[], None]]:
    """Each way of training, as a function that runs one epoch."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    from bnn.samplers import PairedLoader, SampleIndexSampler

    dataset = TensorDataset(job.x, job.y)
    in_memory, on_disk = bank_of(job, None), bank_of(job, folder / "bank")

    def stock(**options: Any) -> DataLoader[Any]:
        source = torch.Generator().manual_seed(0)
        return DataLoader(dataset, batch_size=job.batch_size, shuffle=True, generator=source, **options)

    def paired(bank: Bank) -> PairedLoader:
        return PairedLoader(dataset, SampleIndexSampler(bank), batch_size=job.batch_size, shuffle=True)

    loader = paired(in_memory)
    return {
        FLOOR: _fixed(job, device, lambda: (data for data, _ in loader)),
        "the sample fixed, stock DataLoader": _fixed(job, device, stock),
        "bnn, bank in memory": _paired(job, device, in_memory, paired(in_memory)),
        "bnn, bank on disk": _paired(job, device, on_disk, paired(on_disk)),
        "sampled in collate_fn": _collated(job, device, stock(collate_fn=_sampling_collate(job))),
        "sampled in collate_fn, 2 workers": _collated(
            job, device, stock(collate_fn=_sampling_collate(job), num_workers=2, persistent_workers=True)
        ),
        "param.data of kept samples": _assigned(job, device, stock),
    }


FLOOR = "the sample fixed, our loader"


def _fixed(job: Job, device: str, batches: Callable[[], Iterable[Any]]) -> Callable[[], None]:
    trainee = Trainee.of(job, device)

    def epoch() -> None:
        for x, y in batches():
            trainee.step(trainee.module(x.to(device)), y.to(device))

    return epoch


def _paired(job: Job, device: str, bank: Bank, loader: Any) -> Callable[[], None]:
    from bnn.functional import FunctionalModel

    trainee = Trainee.of(job, device)
    net = FunctionalModel(trainee.module, bank, device=device)

    def epoch() -> None:
        for (x, y), index in loader:
            trainee.step(net(x, index), y.to(device))

    return epoch


def _sampling_collate(job: Job) -> Callable[[list[Any]], Any]:
    """Draws the weights of a batch where its rows are collated, as tutorials do."""
    import torch
    from torch.utils.data import default_collate

    def collate(rows: list[Any]) -> Any:
        weights = {name: mean + job.scale * torch.randn_like(mean) for name, mean in job.mean.items()}
        return (*default_collate(rows), weights)

    return collate


def _collated(job: Job, device: str, loader: Any) -> Callable[[], None]:
    import torch

    trainee = Trainee.of(job, device)

    def epoch() -> None:
        for x, y, weights in loader:
            weights = {name: tensor.to(device) for name, tensor in weights.items()}
            logits = torch.func.functional_call(trainee.module, {**weights, **trainee.free}, (x.to(device),))
            trainee.step(logits, y.to(device))

    return epoch


def _assigned(job: Job, device: str, batches: Callable[[], Iterable[Any]]) -> Callable[[], None]:
    trainee = Trainee.of(job, device)
    named = {name: p for name, p in trainee.module.named_parameters() if name not in job.free}
    samples = [{name: tensor.to(device) for name, tensor in sample.items()} for sample in job.samples]

    def epoch() -> None:
        for number, (x, y) in enumerate(batches()):
            for name, parameter in named.items():
                parameter.data = samples[number % len(samples)][name]
            trainee.step(trainee.module(x.to(device)), y.to(device))

    return epoch
