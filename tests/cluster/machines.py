"""Two machines in one: network, mount and shared-memory namespaces, joined by a bridge."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import uuid
from collections.abc import Iterator, Sequence

SUBNET = "10.213.77"
OUTSIDE = f"{SUBNET}.254"


_INSIDE = (
    "mount --make-rprivate / && mount -t tmpfs -o size=4g tmpfs /dev/shm && mkdir -p /tmp/ray && "
    "mount -t tmpfs tmpfs /tmp/ray && echo up && exec sleep infinity"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
    """A network stack, a /dev/shm and a Ray folder of its own, held open by a process."""

    name: str
    address: str
    holder: int
    """Pid of the process whose namespaces these are."""
    link: str
    """The host's end of its only cable."""

    def command(self, args: Sequence[str]) -> list[str]:
        """``args`` as run on this machine."""
        # Entering a mount namespace leaves the working folder behind.
        folder = f"--wd={os.getcwd()}"
        target = f"--target={self.holder}"
        return ["nsenter", target, folder, "--mount", "--net", "--ipc", *args]


@contextlib.contextmanager
def _machine(name: str, address: str, link: str) -> Iterator[Machine]:
    holder = subprocess.Popen(
        ["ip", "netns", "exec", name, "unshare", "--mount", "--ipc", "sh", "-c", _INSIDE],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "up\n"
        yield Machine(name, address, holder.pid, link)
    finally:
        holder.terminate()
        holder.wait(10)


@contextlib.contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """Two machines that reach each other, and this one, over a bridge only."""
    suffix = uuid.uuid4().hex[:6]
    bridge = f"btbr{suffix}"
    with contextlib.ExitStack() as stack:
        _ip("link", "add", bridge, "type", "bridge")
        stack.callback(_ip, "link", "del", bridge)
        _ip("addr", "add", f"{OUTSIDE}/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        machines = []
        for number, letter in ((1, "a"), (2, "b")):
            name, address = f"bt{letter}{suffix}", f"{SUBNET}.{number}"
            outer, inner = f"{name}o", f"{name}i"
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "del", name)
            _ip("link", "add", outer, "type", "veth", "peer", "name", inner)
            _ip("link", "set", inner, "netns", name)
            _ip("link", "set", outer, "master", bridge)
            _ip("link", "set", outer, "up")
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", inner)
            _ip("-n", name, "link", "set", inner, "up")
            _ip("-n", name, "link", "set", "lo", "up")
            machines.append(stack.enter_context(_machine(name, address, outer)))
        yield machines[0], machines[1]


def _ip(*args: str) -> None:
    result = subprocess.run(
        ["ip", *args], capture_output=True, text=True, timeout=20, check=False, env=os.environ
    )
    assert result.returncode == 0, f"ip {' '.join(args)}: {result.stderr}"
