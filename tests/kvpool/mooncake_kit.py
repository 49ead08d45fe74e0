"""What the tests of Mooncake share: an engine that outlives a test, a master, peers to kill.

Run as a program it is such a peer: ``export PATH TOKEN`` exports an arena file and prints the
endpoint; ``hold MASTER BYTES`` gives memory to a store. Both end with their standard input.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvpool.arena import BlockArena
from kvpool.mooncake_store import MooncakeStore
from kvpool.transport import BlockCopy, Endpoint
from kvpool.transports import mooncake_engine as engines
from kvpool.transports.mooncake import MooncakeTransport

HOST = "127.0.0.1"
ROOT = Path(__file__).resolve().parents[2]
START_S = 30.0


@contextlib.contextmanager
def held_engine() -> Iterator[None]:
    """Hold the process's engine, warmed up: ending one takes a second, and each test would."""
    engine = engines.acquire(HOST, "tcp", "")
    cache = BlockArena.private(2, 64, "warm")
    transport = MooncakeTransport(HOST)
    try:
        transport.pull(transport.export(cache), cache, [BlockCopy(0, 0, 1)], timeout_s=5)
        yield
    finally:
        transport.close()
        engines.release(engine)


class Peer:
    """Another process; ``said`` is its first line."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.kvpool.mooncake_kit", *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        self.said = self._process.stdout.readline()
        assert self.said, "the peer ended before it said anything"

    def freeze(self) -> None:
        _freeze(self._process.pid)

    def thaw(self) -> None:
        os.kill(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(START_S)

    def end(self) -> None:
        if self._process.poll() is None:
            self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


@contextlib.contextmanager
def exporter(arena: BlockArena) -> Iterator[tuple[Peer, Endpoint]]:
    """A process that exports ``arena``."""
    peer = Peer(["export", arena.path or "", arena.token])
    try:
        yield peer, Endpoint(**json.loads(peer.said))
    finally:
        peer.end()


@contextlib.contextmanager
def holder(master: str, num_bytes: int) -> Iterator[Peer]:
    """A process whose memory a store may fill."""
    peer = Peer(["hold", master, str(num_bytes)])
    try:
        yield peer
    finally:
        peer.end()


class Master:
    """A real master of Mooncake Store on free ports."""

    def __init__(self, directory: Path) -> None:
        self._log = directory / "mooncake_master.log"
        self.port, self._admin_port = _free_port(), _free_port()
        self.address = f"{HOST}:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    str(Path(sys.executable).parent / "mooncake_master"),
                    f"--rpc_port={self.port}",
                    f"--metrics_port={self._admin_port}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        give_up = time.monotonic() + START_S
        while time.monotonic() < give_up:
            with contextlib.suppress(OSError):
                socket.create_connection((HOST, self.port), timeout=1).close()
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.05)
                break
        raise AssertionError(self._log.read_text()[-2000:])

    def freeze(self) -> None:
        assert self._process is not None
        _freeze(self._process.pid)

    def thaw(self) -> None:
        if self._process is not None:
            os.kill(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(START_S)
            self._process = None


def _freeze(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    # The signal's way to all threads takes its time; without this they may answer once more.
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def main(command: str, *arguments: str) -> None:
    """Be a peer until standard input ends."""
    if command == "export":
        path, token = arguments
        transport = MooncakeTransport(HOST)
        endpoint = transport.export(BlockArena.open(path, token, writable=False))
        fields = ("transport", "address", "token", "layout")
        print(json.dumps({name: getattr(endpoint, name) for name in fields}), flush=True)
    else:
        master, num_bytes = arguments
        store = MooncakeStore(master, layout="", segment_bytes=int(num_bytes))
        print("ready", store.statistics().hits, flush=True)
    sys.stdin.read()
    # Nothing to tidy up: whoever started this has what it wanted.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
