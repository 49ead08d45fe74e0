"""Ports of this machine: whether one can be had, and one that can be had again."""

from __future__ import annotations

import random
import socket
from pathlib import Path

from baton.core.errors import ConfigError

_RANGE_FILE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_DEFAULT_EPHEMERAL_FROM = 32768
_LOWEST = 10_000
_NUM_TRIES = 100


def check_port(host: str, port: int, name: str) -> None:
    """Raises ConfigError that names the setting if the port cannot be bound."""
    try:
        _bind(host, port)
    except OSError as error:
        raise ConfigError(
            f"{name} {port} on {host} cannot be used ({error.strerror}); "
            f"stop what uses it or choose another with --{name.replace('_', '-')}",
            param=name,
        ) from error


def free_port(host: str) -> int:
    """A port for a server that must get it again after a restart.

    None that the system gives to outgoing connections: while the server is away, the very
    connections that its clients try could take it (one to itself even succeeds).
    """
    below = _ephemeral_from()
    lowest = min(_LOWEST, below // 2)
    for _ in range(_NUM_TRIES):
        port = random.randrange(lowest, below)
        try:
            return _bind(host, port)
        except OSError:
            continue
    return _bind(host, 0)


def answers(address: str) -> bool:
    """Whether something listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1.0).close()
    except OSError:
        return False
    return True


def _bind(host: str, port: int) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        return int(probe.getsockname()[1])


def _ephemeral_from() -> int:
    try:
        return int(_RANGE_FILE.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return _DEFAULT_EPHEMERAL_FROM
