from __future__ import annotations

import socket

import pytest

from baton.cli.ports import answers, check_port, free_port
from baton.core.errors import ConfigError


def test_a_free_port_is_none_of_the_ephemeral_ones() -> None:
    with socket.socket() as outgoing:
        outgoing.bind(("127.0.0.1", 0))
        ephemeral = outgoing.getsockname()[1]
    ports = {free_port("127.0.0.1") for _ in range(20)}
    assert len(ports) > 1
    with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
        low = int(file.read().split()[0])
    assert low <= ephemeral
    assert all(1024 < port < low for port in ports)


def test_a_port_in_use() -> None:
    port = free_port("127.0.0.1")
    check_port("127.0.0.1", port, "http_port")
    assert not answers(f"127.0.0.1:{port}")
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))
        server.listen()
        assert answers(f"127.0.0.1:{port}")
        with pytest.raises(ConfigError, match=rf"http_port {port} .* --http-port"):
            check_port("127.0.0.1", port, "http_port")
