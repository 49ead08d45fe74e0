"""A real redis-server of a test's own, that can be frozen, killed, and come back empty."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from controller.store_redis import RedisStore
from tests.cluster.harness import wait_until

_START_TIMEOUT_S = 10.0


class Redis:
    """On one port from start to end, without persistence: who kills it loses what it knew."""

    def __init__(self, host: str, folder: Path) -> None:
        self.host = host
        self._folder = folder
        with socket.socket() as probe:
            probe.bind((host, 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"redis://{host}:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Until it answers; empty."""
        command = ["redis-server", "--bind", self.host, "--port", str(self.port), "--save", ""]
        command += ["--appendonly", "no", "--protected-mode", "no", "--dir", str(self._folder)]
        log = self._folder / "redis.log"
        with log.open("ab") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
        self._process = process

        def answers() -> bool:
            assert process.poll() is None, log.read_text()
            with socket.socket() as probe:
                return probe.connect_ex((self.host, self.port)) == 0

        wait_until(answers, timeout_s=_START_TIMEOUT_S, what="redis-server", every_s=0.02)

    def kill(self) -> None:
        """``kill -9``, frozen or not."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None

    def freeze(self) -> None:
        """Its connections stay, and nobody answers on them."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """It goes on, with everything that was sent to it meanwhile."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def values(self, cluster: str, prefix: str = "") -> dict[str, str]:
        """What it has of a cluster. Raises Unavailable while it does not answer."""

        async def scan() -> dict[str, str]:
            store = RedisStore(self.url, cluster)
            try:
                return await store.scan(prefix)
            finally:
                await store.close()

        return asyncio.run(scan())


@contextlib.contextmanager
def redis_server(host: str = "127.0.0.1") -> Iterator[Redis]:
    """Started, and gone with the block."""
    with tempfile.TemporaryDirectory(prefix="baton-redis-") as folder:
        server = Redis(host, Path(folder))
        try:
            server.start()
            yield server
        finally:
            server.kill()
