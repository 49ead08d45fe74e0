"""Two machines in one: network, mount and shared-memory namespaces, joined by a bridge."""

from __future__ import annotations

import contextlib
import os
import subprocess
import uuid
from collections.abc import Iterator, Sequence

SUBNET = "10.213.77"
OUTSIDE = f"{SUBNET}.254"


class Machine:
    """A namespace with its own network stack, /dev/shm and Ray folder."""

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address

    def command(self, args: Sequence[str]) -> list[str]:
        """``args`` as run on this machine."""
        inside = (
            "mount --make-rprivate / && mount -t tmpfs -o size=4g tmpfs /dev/shm && "
            "mkdir -p /tmp/ray && mount -t tmpfs tmpfs /tmp/ray && "
            'ip link set lo up && exec "$@"'
        )
        return [
            *("ip", "netns", "exec", self.name, "unshare", "--mount", "--ipc"),
            *("sh", "-c", inside, "sh", *args),
        ]


@contextlib.contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """Two machines that reach each other, and this one, over a bridge only."""
    suffix = uuid.uuid4().hex[:6]
    bridge = f"btbr{suffix}"
    machines = [
        Machine(f"bt{letter}{suffix}", f"{SUBNET}.{i}") for i, letter in ((1, "a"), (2, "b"))
    ]
    with contextlib.ExitStack() as stack:
        _ip("link", "add", bridge, "type", "bridge")
        stack.callback(_ip, "link", "del", bridge)
        _ip("addr", "add", f"{OUTSIDE}/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for machine in machines:
            _ip("netns", "add", machine.name)
            stack.callback(_ip, "netns", "del", machine.name)
            outer, inner = f"{machine.name}o", f"{machine.name}i"
            _ip("link", "add", outer, "type", "veth", "peer", "name", inner)
            _ip("link", "set", inner, "netns", machine.name)
            _ip("link", "set", outer, "master", bridge)
            _ip("link", "set", outer, "up")
            _ip("-n", machine.name, "addr", "add", f"{machine.address}/24", "dev", inner)
            _ip("-n", machine.name, "link", "set", inner, "up")
            _ip("-n", machine.name, "link", "set", "lo", "up")
        yield machines[0], machines[1]


def _ip(*args: str) -> None:
    result = subprocess.run(
        ["ip", *args], capture_output=True, text=True, timeout=20, check=False, env=os.environ
    )
    assert result.returncode == 0, f"ip {' '.join(args)}: {result.stderr}"
