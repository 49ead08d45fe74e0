"""The store of one machine: values in memory, address and epoch in a file at a fixed path.

The file lets the ``baton`` command find the controller, and a controller that Ray restarted go on
above the epoch of the one that died. It is removed at close; one left behind by a controller that
was killed is recognised by its process being gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from baton.core.clock import Clock, SystemClock
from baton.core.errors import ConfigError, Stage, Unavailable
from controller.store import check_cluster_name


def address_directory() -> Path:
    """Where the address files of this user are."""
    return Path(f"/tmp/baton-{os.getuid()}")


class MemoryStore:
    """See the module docstring and :class:`controller.store.MetadataStore`."""

    def __init__(
        self, cluster: str, *, directory: Path | None = None, clock: Clock | None = None
    ) -> None:
        self._directory = directory or address_directory()
        self._path = self._directory / f"{check_cluster_name(cluster)}.json"
        self._cluster = cluster
        self._clock = clock or SystemClock()
        self._values: dict[str, tuple[str, float | None]] = {}
        self._epoch = 0
        self._address: str | None = None

    async def put(self, key: str, value: str, ttl_s: float | None = None) -> None:
        """See :class:`MetadataStore`."""
        self._values[key] = (value, None if ttl_s is None else self._clock.now() + ttl_s)

    async def get(self, key: str) -> str | None:
        """See :class:`MetadataStore`."""
        return (await self.scan(key)).get(key)

    async def delete(self, key: str) -> None:
        """See :class:`MetadataStore`."""
        self._values.pop(key, None)

    async def scan(self, prefix: str) -> dict[str, str]:
        """See :class:`MetadataStore`."""
        now = self._clock.now()
        self._values = {k: v for k, v in self._values.items() if v[1] is None or v[1] > now}
        return {k: value for k, (value, _) in self._values.items() if k.startswith(prefix)}

    async def next_epoch(self, at_least: int) -> int:
        """See :class:`MetadataStore`."""
        last = max(self._epoch, int(self._read().get("epoch", 0)))
        self._epoch = max(last + 1, at_least)
        if self._address is not None:
            self._write()
        return self._epoch

    async def keep_epoch(self, epoch: int) -> None:
        """See :class:`MetadataStore`."""
        if epoch > self._epoch:
            await self.next_epoch(epoch)

    async def announce(self, address: str) -> None:
        """See :class:`MetadataStore`."""
        found = self._read()
        if found and found.get("pid") != os.getpid() and _alive(found):
            raise ConfigError(
                f"a cluster named {self._cluster!r} is already running on this machine "
                f"(controller {found.get('address')}, process {found.get('pid')}); "
                "choose another cluster name or stop it",
                param="cluster",
            )
        self._address = address
        self._write()

    async def find_address(self) -> str | None:
        """See :class:`MetadataStore`. ``None`` also if the process that wrote it is gone."""
        found = self._read()
        address = found.get("address")
        return address if isinstance(address, str) and _alive(found) else None

    async def watch(self, connected: Callable[[], None]) -> None:
        """See :class:`MetadataStore`. Memory lasts as long as its process."""
        await asyncio.Event().wait()

    async def close(self) -> None:
        """See :class:`MetadataStore`."""
        if self._address is not None:
            self._address = None
            if self._read().get("pid") == os.getpid():
                self._path.unlink(missing_ok=True)
        self._values.clear()

    def _read(self) -> dict[str, Any]:
        """The file's content; empty if there is none, or none that can be trusted."""
        try:
            owner = self._path.stat().st_uid
            found = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) and owner == os.getuid() else {}

    def _write(self) -> None:
        self._check_directory()
        process = psutil.Process()
        content = {
            "address": self._address,
            "pid": process.pid,
            "started": process.create_time(),
            "epoch": self._epoch,
        }
        try:
            self._replace_file(json.dumps(content))
        except OSError as error:
            raise Unavailable(
                f"cannot write {self._path}: {error.strerror}; without it the baton command does "
                "not find the cluster",
                stage=Stage.CONTROL,
                retry_after_s=1.0,
            ) from error

    def _replace_file(self, text: str) -> None:
        handle, name = tempfile.mkstemp(dir=self._directory, prefix=f".{self._cluster}-")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text)
            os.replace(name, self._path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise

    def _check_directory(self) -> None:
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            info = self._directory.lstat()
        except OSError as error:
            raise ConfigError(f"cannot make {self._directory}: {error.strerror}") from error
        private = stat.S_ISDIR(info.st_mode) and not stat.S_IMODE(info.st_mode) & 0o077
        if info.st_uid != os.getuid() or not private:
            raise ConfigError(
                f"{self._directory} must be a directory that only you can use (mode 0700); "
                "remove it or correct its owner and mode"
            )


def _alive(found: dict[str, Any]) -> bool:
    """Whether the process that wrote this is still there, and not another with its number."""
    try:
        started = psutil.Process(int(found["pid"])).create_time()
        return abs(started - float(found["started"])) < 1.0
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False
