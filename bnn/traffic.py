"""What ranks send: collective calls counted, and what one puts on the wire and takes of time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

from bnn.errors import ConfigError

Kind: TypeAlias = Literal["all_gather", "all_reduce", "broadcast"]

BANDWIDTH = 1.25e9  # bytes a second that a rank can send: 10 Gbit/s
LATENCY = 50e-6  # seconds of one message: Ethernet within a rack, TCP and gloo
DIRECT = 4  # ranks up to which each tells each other what it has, in place of passing on what others have


@dataclass
class Traffic:
    """What this process has handed to collective calls.

    A rank's payload is what it brings: its summand of an all-reduce, its own rows of an all-gather, padded to those
    of the rank with most, and what rank 0 tells in a broadcast. What goes over the wire follows from it: `Call`.
    """

    calls: dict[Kind, int] = field(default_factory=dict)
    payload: dict[Kind, int] = field(default_factory=dict)  # bytes

    def add(self, kind: Kind, num_bytes: int) -> None:
        """Count one call."""
        self.calls[kind] = self.calls.get(kind, 0) + 1
        self.payload[kind] = self.payload.get(kind, 0) + num_bytes


_traffic: Traffic | None = None


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count the collective calls of this process, of all its `Ranks`; without it nothing is counted.

    Signs of life, errors and warnings, a few bytes each in the store of torch.distributed, are no collective calls.

    Examples:
        >>> import torch
        >>> from bnn.distributed import Ranks
        >>> with counted() as traffic:
        ...     total = Ranks().total(torch.ones(3))
        >>> traffic.calls  # one rank asks nobody
        {}
    """
    global _traffic
    before, _traffic = _traffic, Traffic()
    try:
        yield _traffic
    finally:
        _traffic = before


def count(kind: Kind, num_bytes: int) -> None:
    """Take note of a collective call, where somebody counts."""
    if _traffic is not None:
        _traffic.add(kind, num_bytes)


class Network(NamedTuple):
    """What lies between ranks."""

    bandwidth: float = BANDWIDTH  # bytes a second that each can send
    latency: float = LATENCY  # seconds of one message


def network_of(bandwidth: float, latency: float) -> Network:
    """A network, if there can be such a one.

    Raises:
        ConfigError: a bandwidth that is not above 0, or a latency below it.
    """
    if not 0 < bandwidth < float("inf"):
        raise ConfigError("bandwidth", want="bytes a second above 0", got=str(bandwidth), fix="leave it out for 1.25GB")
    if not 0 <= latency < float("inf"):
        raise ConfigError("latency", want="0 seconds or more", got=str(latency), fix="leave it out for 0.00005")
    return Network(bandwidth, latency)


class Call(NamedTuple):
    """A collective call of R ranks, each with n bytes of payload, as `Ranks` and gloo carry it out on CPUs.

    | kind       | messages in a row | bytes that the busiest rank sends |
    | all_reduce | 2 (R - 1)         | 2 (R - 1) / R n, a ring           |
    |            | 1                 | n, two ranks                      |
    | all_gather | R - 1             | (R - 1) n, a ring                 |
    |            | 1                 | (R - 1) n, up to four ranks       |
    | broadcast  | ceil(log2 R)      | ceil(log2 R) n, a binomial tree   |

    seconds = messages * latency + bytes / bandwidth

    NCCL takes trees where messages are small, which need fewer messages in a row.

    Examples:
        >>> call = Call("all_reduce", 4_000_000)
        >>> call.sent(4), call.messages(4), call.seconds(4, Network(bandwidth=1e9, latency=1e-3))
        (6000000.0, 6, 0.012)

    Source: Patarasuk and Yuan (2009), Bandwidth optimal all-reduce algorithms, section 3; gloo's allreduce.cc,
    allgather.cc and broadcast.cc.
    """

    kind: Kind
    payload: int  # bytes

    def messages(self, num_ranks: int) -> int:
        """One after the other, until all ranks have what they asked for."""
        if self.kind == "broadcast":
            return (num_ranks - 1).bit_length()
        if self.kind == "all_reduce":
            return 1 if num_ranks == 2 else 2 * (num_ranks - 1)
        return 1 if num_ranks <= DIRECT else num_ranks - 1

    def sent(self, num_ranks: int) -> float:
        """Bytes that the busiest rank sends."""
        if self.kind == "broadcast":
            return self.messages(num_ranks) * self.payload
        return (num_ranks - 1) * self.payload * (2 / num_ranks if self.kind == "all_reduce" else 1)

    def seconds(self, num_ranks: int, network: Network) -> float:
        """How long it takes where all ranks come at once."""
        return self.messages(num_ranks) * network.latency + self.sent(num_ranks) / network.bandwidth


class Talk(NamedTuple):
    """Collective calls together."""

    calls: int = 0
    payload: int = 0  # bytes of one rank
    sent: float = 0.0  # bytes that the busiest rank sends
    seconds: float = 0.0

    def times(self, number: float) -> Talk:
        """So many of them."""
        return Talk(round(self.calls * number), round(self.payload * number), self.sent * number, self.seconds * number)

    def plus(self, other: Talk) -> Talk:
        """These, and others."""
        return Talk(
            self.calls + other.calls,
            self.payload + other.payload,
            self.sent + other.sent,
            self.seconds + other.seconds,
        )


def talk_of(calls: Iterable[Call], num_ranks: int, network: Network) -> Talk:
    """What collective calls of R ranks come to; nothing of one rank."""
    if num_ranks == 1:
        return Talk()
    made = list(calls)
    return Talk(
        len(made),
        sum(call.payload for call in made),
        sum(call.sent(num_ranks) for call in made),
        sum(call.seconds(num_ranks, network) for call in made),
    )
