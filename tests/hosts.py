"""Two hosts on this machine: network namespaces with a cable between them, or two loopback addresses, and torchrun on each."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from ranked import paths

DROPPED = "6 0 0 2"  # return TC_ACT_SHOT
KEPT = "6 0 0 4294967295"  # and TC_ACT_UNSPEC, so that the packet goes on
RANDOM = "32 0 0 4294963256"  # load 32 random bits


class Agent(NamedTuple):
    """torchrun on one host, and where it writes what it says."""

    process: subprocess.Popen[bytes]
    log: Path

    def said(self) -> str:
        return self.log.read_text()

    def ended(self, seconds: float = 120.0) -> int:
        """The exit status; what was said where there is none in time."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"no end in {seconds:g} s:\n{self.said()}") from error


class Host(NamedTuple):
    """Where torchrun runs."""

    address: str
    link: str  # network device
    namespace: str = ""

    def ip(self, *arguments: str) -> None:
        checked("ip", "-n", self.namespace, *arguments)

    def start(self, log: Path, *arguments: str | Path, folder: Path | None = None, **environment: str) -> Agent:
        """torchrun with these arguments, in a session of its own, and in a folder."""
        inside = ["ip", "netns", "exec", self.namespace] if self.namespace else []
        clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": self.link, "TORCH_CPP_LOG_LEVEL": "ERROR"}
        command = [sys.executable, "-m", "torch.distributed.run", "--local-addr", self.address, *map(str, arguments)]
        with log.open("wb") as said:
            process = subprocess.Popen(
                [*inside, *command],
                env={**clean, **paths(), **own, **environment},
                stdout=said,
                stderr=subprocess.STDOUT,
                cwd=folder,
                start_new_session=True,
            )
        return Agent(process, log)


def checked(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout


def descendants(process: int) -> list[int]:
    """What a process has started, and what that has."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError, ValueError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found, added = {process}, True
    while added:
        more = {one for one, parent in parents.items() if parent in found} - found
        found, added = found | more, bool(more)
    return sorted(found - {process})


def ranks_of(agent: Agent) -> list[int]:
    """The processes of an agent that are ranks."""
    found = []
    for process in descendants(agent.process.pid):
        with suppress(OSError):
            if b"\0RANK=" in b"\0" + Path(f"/proc/{process}/environ").read_bytes():
                found.append(process)
    return found


def kill(*processes: int) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def kill_all(agent: Agent) -> None:
    """Everything of a host at once."""
    if agent.process.poll() is not None:
        return  # another process may have its number
    kill(agent.process.pid, *descendants(agent.process.pid))
    agent.process.wait(20)


def until(happened: Callable[[], Any], seconds: float = 120.0, *, what: str) -> float:
    """Wait for something; how long it took."""
    began = time.monotonic()
    while not happened():
        if time.monotonic() - began > seconds:
            raise AssertionError(f"{what}: not within {seconds:g} s")
        time.sleep(0.05)
    return time.monotonic() - began


def missing() -> str | None:
    """Why two network namespaces with a cable cannot be made here, if so."""
    if shutil.which("ip") is None:
        return "iproute2 is not installed"
    try:
        with namespaces("probe"):
            return None
    except (subprocess.SubprocessError, OSError) as error:
        return f"no network namespaces here: {getattr(error, 'stderr', None) or error}".strip()


@contextmanager
def namespaces(word: str = "host") -> Iterator[tuple[Host, Host]]:
    """Two hosts at the ends of a cable, with no other network; whatever happens, what runs on them at the end is killed."""
    name = f"bnn-{word}-{os.getpid()}"
    first, second = Host("10.77.0.1", "cable0", f"{name}-0"), Host("10.77.0.2", "cable1", f"{name}-1")
    with ExitStack() as made:
        for host in (first, second):
            checked("ip", "netns", "add", host.namespace)
            made.callback(remove, host)
        ends = ["type", "veth", "peer", "name", second.link, "netns", second.namespace]
        checked("ip", "link", "add", first.link, "netns", first.namespace, *ends)
        for host in (first, second):
            host.ip("addr", "add", f"{host.address}/24", "dev", host.link)
            host.ip("link", "set", host.link, "up")
            host.ip("link", "set", "lo", "up")
        yield first, second


def remove(host: Host) -> None:
    try:
        kill(*map(int, checked("ip", "netns", "pids", host.namespace).split()))
    finally:
        checked("ip", "netns", "del", host.namespace)


def lose(host: Host, share: float) -> str | None:
    """Drop this share of a host's packets at random; why that cannot be done here, if so.

    Those that it sends by netem, or where the kernel has none those that come, by four instructions of a classic filter.
    """
    if shutil.which("tc") is None:
        return "tc of iproute2 is not installed"
    place = ["tc", "-n", host.namespace, "qdisc", "add", "dev", host.link]
    with suppress(subprocess.CalledProcessError):
        checked(*place, "root", "netem", "loss", f"{100 * share:g}%")
        return None
    code = f"4,{RANDOM},53 1 0 {round(share * 2**32)},{DROPPED},{KEPT}"  # kept where the bits are at least so large
    what = ["ingress", "bpf", "da", "bytecode", code]
    try:
        checked(*place, "clsact")
        checked("tc", "-n", host.namespace, "filter", "add", "dev", host.link, *what)
    except subprocess.CalledProcessError as error:
        return f"this kernel drops no packets at random: {error.stderr.strip()}"
    return None


def lost(host: Host) -> int:
    """How many packets were dropped."""
    told = checked("tc", "-n", host.namespace, "-s", "qdisc", "show", "dev", host.link)
    return sum(int(rest.partition(",")[0]) for rest in told.split("(dropped ")[1:])
