"""Mutual TLS of the tcp transport: who is let in, who is not, and what they are told."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from baton.cli.settings import parse_settings
from baton.core.config import TlsConfig
from baton.core.errors import ConfigError
from kvpool.arena import BlockArena
from kvpool.transport import TransportBroken
from kvpool.transports import make_transports
from kvpool.transports.tcp import TcpTransport
from tests.kvpool.middle_man import MiddleMan
from tests.kvpool.tls_kit import Authority
from tests.kvpool.transport_kit import LAYOUT, copies_of, filled, resources

BLOCK = 100_000
COPIES = copies_of([(i, 7 - i) for i in range(8)])
Make = Callable[[TlsConfig | None], TcpTransport]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture(scope="module")
def ours(authority: Authority) -> TlsConfig:
    return authority.issue("ours")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> TlsConfig:
    return Authority(tmp_path_factory.mktemp("tls") / "theirs").issue("theirs")


@pytest.fixture
def make() -> Iterator[Make]:
    with contextlib.ExitStack() as stack:

        def one(tls: TlsConfig | None) -> TcpTransport:
            transport = TcpTransport("127.0.0.1", tls=tls)
            stack.callback(transport.close)
            return transport

        yield one


@pytest.fixture
def peer(tmp_path: Path) -> BlockArena:
    return filled(tmp_path, 8, BLOCK)


def target() -> BlockArena:
    return BlockArena.private(8, BLOCK, LAYOUT)


def test_no_block_passes_in_the_clear(make: Make, ours: TlsConfig, peer: BlockArena) -> None:
    seen = bytearray()

    def listen(offset: int, data: bytes) -> bytes:
        seen.extend(data)
        return data

    endpoint = make(ours).export(peer)
    with contextlib.closing(MiddleMan(endpoint.address, listen)) as middle:
        between = dataclasses.replace(endpoint, address=middle.address)
        cache = target()
        make(ours).pull(between, cache, COPIES, timeout_s=10)
    assert all(cache.block(7 - i) == peer.block(i) for i in range(8))
    assert len(seen) > 8 * BLOCK
    assert not any(bytes(peer.block(i)[:16]) in seen for i in range(8))


def test_two_certificates_of_one_authority(
    make: Make, authority: Authority, ours: TlsConfig, peer: BlockArena
) -> None:
    endpoint = make(ours).export(peer)
    reader, cache = make(authority.issue("another")), target()
    for _ in range(3):
        reader.pull(endpoint, cache, COPIES, timeout_s=10)
    assert all(cache.block(7 - i) == peer.block(i) for i in range(8))


def refused(exporter: TcpTransport, reader: TcpTransport, peer: BlockArena, message: str) -> None:
    endpoint = exporter.export(peer)
    before = resources()
    assert not reader.reachable(endpoint)
    cache = target()
    with pytest.raises(TransportBroken, match=message):
        reader.pull(endpoint, cache, COPIES, timeout_s=10)
    assert not any(cache.buffer)
    exporter.close()
    reader.close()
    after = resources()
    assert after[0] < before[0]
    assert after[1] < before[1]


def test_an_expired_exporter(
    make: Make, authority: Authority, ours: TlsConfig, peer: BlockArena
) -> None:
    expired = authority.issue("expired", expired=True)
    refused(make(expired), make(ours), peer, "certificate is refused: certificate has expired")


def test_an_expired_reader(
    make: Make, authority: Authority, ours: TlsConfig, peer: BlockArena
) -> None:
    expired = authority.issue("late", expired=True)
    refused(make(ours), make(expired), peer, "refuses this side's certificate: .*expired")


def test_an_exporter_of_another_authority(
    make: Make, ours: TlsConfig, theirs: TlsConfig, peer: BlockArena
) -> None:
    refused(make(theirs), make(ours), peer, "certificate is refused: self-signed")


def test_a_reader_of_another_authority(
    make: Make, ours: TlsConfig, theirs: TlsConfig, peer: BlockArena
) -> None:
    stranger = dataclasses.replace(theirs, ca=ours.ca)
    refused(make(ours), make(stranger), peer, "refuses this side's certificate: .*unknown ca")


def test_a_plain_reader(make: Make, ours: TlsConfig, peer: BlockArena) -> None:
    refused(make(ours), make(None), peer, "refused: it speaks TLS only: handoff.tls must be set")


def test_a_plain_exporter(make: Make, ours: TlsConfig, peer: BlockArena) -> None:
    refused(make(None), make(ours), peer, "does not speak TLS: handoff.tls must be set on both")


@pytest.mark.parametrize("at", [100, 5000, 300_000])
def test_a_wrong_bit(make: Make, ours: TlsConfig, peer: BlockArena, at: int) -> None:
    def flip(offset: int, data: bytes) -> bytes:
        if not offset <= at < offset + len(data):
            return data
        changed = bytearray(data)
        changed[at - offset] ^= 1
        return bytes(changed)

    endpoint = make(ours).export(peer)
    with contextlib.closing(MiddleMan(endpoint.address, flip)) as middle:
        between = dataclasses.replace(endpoint, address=middle.address)
        with pytest.raises(TransportBroken):
            make(ours).pull(between, target(), COPIES, timeout_s=5)


def test_who_says_nothing_holds_up_nobody(make: Make, ours: TlsConfig, peer: BlockArena) -> None:
    before = resources()
    exporter, reader = make(ours), make(ours)
    endpoint = exporter.export(peer)
    host, _, port = endpoint.address.rpartition(":")
    silent = [socket.create_connection((host, int(port))) for _ in range(5)]
    reader.pull(endpoint, target(), COPIES, timeout_s=10)
    exporter.close()
    reader.close()
    for sock in silent:
        sock.close()
    assert resources() == before


def broken_files(ours: TlsConfig, theirs: TlsConfig, folder: Path) -> dict[str, TlsConfig]:
    text = folder / "text"
    text.write_text("no certificate")
    return {
        "handoff.tls.ca": dataclasses.replace(ours, ca=str(text)),
        "handoff.tls.cert": dataclasses.replace(ours, key=theirs.key),
        "handoff.tls.key": dataclasses.replace(ours, key=str(folder / "none")),
    }


@pytest.mark.parametrize("setting", ["handoff.tls.ca", "handoff.tls.cert", "handoff.tls.key"])
def test_files_that_cannot_be_used(
    ours: TlsConfig, theirs: TlsConfig, tmp_path: Path, setting: str
) -> None:
    tls = broken_files(ours, theirs, tmp_path)[setting]
    with pytest.raises(ConfigError, match=setting) as caught:
        make_transports(["tcp"], "127.0.0.1", tls=tls)
    assert caught.value.param == setting


@pytest.mark.parametrize("name", ["ca", "cert", "key"])
def test_files_that_cannot_be_read(ours: TlsConfig, tmp_path: Path, name: str) -> None:
    for path, reason in ((tmp_path, "directory"), (tmp_path / "none", "No such file")):
        changed = TlsConfig(**{**dataclasses.asdict(ours), name: os.fspath(path)})
        with pytest.raises(ConfigError, match=rf"handoff\.tls\.{name} .*{reason}") as caught:
            TcpTransport(tls=changed)
        assert caught.value.param == f"handoff.tls.{name}"


def test_a_key_with_a_password(authority: Authority, ours: TlsConfig, tmp_path: Path) -> None:
    encrypted = tmp_path / "encrypted"
    assert ours.key is not None
    authority.encrypt(ours.key, encrypted)
    with pytest.raises(ConfigError, match="encrypted") as caught:
        TcpTransport(tls=dataclasses.replace(ours, key=str(encrypted)))
    assert caught.value.param == "handoff.tls.key"


def test_settings() -> None:
    files = {"ca": "a", "cert": "b", "key": "c"}
    settings = {"model": "m", "handoff": {"tls": files}}
    assert parse_settings(settings, source="test").handoff.tls == TlsConfig(**files)
    assert not parse_settings({"model": "m"}, source="test").handoff.tls.enabled
    for wrong, message in (
        ({"ca": "a"}, r"handoff\.tls: .*give cert and key too"),
        ({**files, "key": ""}, r"handoff\.tls: .*give key too"),
        ({**files, "psk": "d"}, r"handoff\.tls\.psk .*one of ca, cert, key"),
        ({**files, "ca": 1}, r"handoff\.tls\.ca is 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_settings({"model": "m", "handoff": {"tls": wrong}}, source="test")
