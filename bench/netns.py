"""Hosts in network namespaces, each with its own address and its own shaped link to one switch, and links that can be cut.

In: root, iproute2, nsenter. Out: ``Network``, which makes ``Host``s. Always holds: nothing outside the namespaces made here is
touched; their names carry the pid of who made them, so that what a killed run left behind is removed by the next one.

A link is a veth pair; each end has a token bucket, so a rate holds in both directions. A cut drops packets at the switch without
a word to either side, as a broken switch does: to the host everything looks up. The kernel may lack a filter action that drops,
so packets that are cut go to a pair of devices that leads nowhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "hiss-net-"
_NAMESPACES = Path("/run/netns")
_CLONE_NEWNET = 0x40000000
_SUBNET = "10.83.0"
_PREFERENCE_ALL = 10
_PREFERENCE_PAIR = 100


class Refused(RuntimeError):
    """This machine does not let us make network namespaces."""


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


class Host:
    """A namespace with one interface. ``launcher`` starts programs in it, ``entered`` makes sockets in it."""

    def __init__(self, network: Network, name: str, number: int) -> None:
        self.name = name
        self.number = number
        self.address = f"{_SUBNET}.{number}"
        self.namespace = f"{network.prefix}{name}"
        self.port = f"port{number}"
        """The switch's end of the link."""
        self._network = network
        self.launcher = ["nsenter", f"--net={_NAMESPACES / self.namespace}", "--"]
        _run("ip", "netns", "add", self.namespace)
        self._ip("link", "set", "lo", "up")
        _run(
            "ip",
            "-n",
            network.switch,
            "link",
            "add",
            self.port,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            self.namespace,
        )
        _run("ip", "-n", network.switch, "link", "set", self.port, "master", "bridge", "up")
        _run("tc", "-n", network.switch, "qdisc", "add", "dev", self.port, "clsact")
        self._ip("addr", "add", f"{self.address}/24", "dev", "eth0")
        self._ip("link", "set", "eth0", "up")

    def _ip(self, *arguments: str) -> str:
        return _run("ip", "-n", self.namespace, *arguments)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """This thread is in the namespace; sockets that it makes stay there."""
        libc = ctypes.CDLL(None, use_errno=True)
        with (
            contextlib.closing(_Descriptor("/proc/thread-self/ns/net")) as home,
            contextlib.closing(_Descriptor(str(_NAMESPACES / self.namespace))) as there,
        ):
            if libc.setns(there.number, _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
            try:
                yield
            finally:
                if libc.setns(home.number, _CLONE_NEWNET):
                    os.abort()  # a test process in the wrong network would lie from here on

    def shape(self, rate_bytes_per_s: float | None) -> None:
        """At most that much in each direction of this host's link; None: as fast as the machine can."""
        ends = ((self.namespace, "eth0"), (self._network.switch, self.port))
        for namespace, device in ends:
            if rate_bytes_per_s is None:
                with contextlib.suppress(RuntimeError):
                    _run("tc", "-n", namespace, "qdisc", "del", "dev", device, "root")
                continue
            # A bucket of 4 ms (a timer tick), and of at least one super-packet; a queue of 20 ms.
            burst = max(128 << 10, int(rate_bytes_per_s * 0.004))
            _run(
                *("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", "tbf"),
                *("rate", f"{int(rate_bytes_per_s * 8)}bit", "burst", str(burst), "latency", "20ms"),
            )

    def cut(self, *, sends: bool = True, receives: bool = True) -> None:
        """Nothing this host sends arrives, nothing reaches it, or both; silently."""
        for happens, side in ((sends, "ingress"), (receives, "egress")):
            if happens:
                self._drop(side, _PREFERENCE_ALL, "all", "u32", "0", "0")

    def cut_from(self, other: Host) -> None:
        """Nothing that this host sends reaches that one; the way back works, and so does everything else."""
        self._drop("ingress", _PREFERENCE_PAIR + other.number, "ip", "ip", "dst", f"{other.address}/32")

    def _drop(self, side: str, preference: int, protocol: str, *match: str) -> None:
        _run(
            *("tc", "-n", self._network.switch, "filter", "replace", "dev", self.port, side),
            *("protocol", protocol, "pref", str(preference), "handle", "800::1", "u32", "match", *match),
            *("action", "mirred", "egress", "redirect", "dev", "sink"),
        )

    def mend(self) -> None:
        """Undo every cut of this host's link."""
        for side in ("ingress", "egress"):
            _run("tc", "-n", self._network.switch, "filter", "del", "dev", self.port, side)


class _Descriptor:
    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self.number)


class Network:
    """A switch. Raises Refused where the kernel does not let us. ``end`` removes every namespace of it."""

    def __init__(self) -> None:
        _sweep()
        taken = {path.name for path in _NAMESPACES.glob(f"{_PREFIX}*")}
        number = next(n for n in range(1000) if f"{_PREFIX}{os.getpid()}-{n}-switch" not in taken)
        self.prefix = f"{_PREFIX}{os.getpid()}-{number}-"
        self.switch = f"{self.prefix}switch"
        self.hosts: dict[str, Host] = {}
        try:
            _run("ip", "netns", "add", self.switch)
        except RuntimeError as error:
            raise Refused(str(error)) from error
        try:
            _run("ip", "-n", self.switch, "link", "add", "bridge", "type", "bridge")
            _run("ip", "-n", self.switch, "link", "set", "bridge", "up")
            _run("ip", "-n", self.switch, "link", "add", "sink", "type", "veth", "peer", "name", "nowhere")
            for device in ("sink", "nowhere"):
                _run("ip", "-n", self.switch, "link", "set", device, "up")
        except BaseException:
            self.end()
            raise

    def host(self, name: str, rate_bytes_per_s: float | None = None) -> Host:
        """A new host, or the one of that name."""
        if name not in self.hosts:
            self.hosts[name] = Host(self, name, len(self.hosts) + 1)
        if rate_bytes_per_s is not None:
            self.hosts[name].shape(rate_bytes_per_s)
        return self.hosts[name]

    def mend(self) -> None:
        for host in self.hosts.values():
            host.mend()

    def end(self) -> None:
        """Processes in it must have ended; the devices go with the namespaces."""
        _remove(self.prefix)


def _remove(prefix: str) -> None:
    for path in _NAMESPACES.glob(f"{prefix}*"):
        with contextlib.suppress(RuntimeError):
            _run("ip", "netns", "del", path.name)


def _sweep() -> None:
    """Remove what runs left behind that were killed."""
    for path in _NAMESPACES.glob(f"{_PREFIX}*"):
        maker = re.match(rf"{_PREFIX}(\d+)-", path.name)
        if maker and not Path(f"/proc/{maker[1]}").exists():
            _remove(maker[0])
