"""Writes to the metadata store behind the controller's back: nothing waits for the store.

What should be stored is kept here; keys that still have to be written wait in order, each once,
so the backlog is bounded by the number of keys. While the store is away writes are tried again;
when it comes back, possibly empty, everything is written again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from baton.core.errors import BatonError, Unavailable
from controller.store import MetadataStore

log = logging.getLogger(__name__)

_FIRST_DELAY_S = 0.1
_MAX_DELAY_S = 2.0

# Not values but methods of the store; no value's key has a leading colon.
_EPOCH, _ADDRESS = ":epoch", ":address"


class StoreWriter:
    """Lives on one event loop. ``values`` is what the store holds at the start."""

    def __init__(
        self, store: MetadataStore, *, address: str, epoch: int, values: dict[str, str]
    ) -> None:
        self._store = store
        self._address = address
        self._epoch = epoch
        self._values = dict(values)
        self._waiting: dict[str, None] = {}
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to write."""
        self._tasks = [
            asyncio.create_task(self._write_forever(), name="store-writer"),
            asyncio.create_task(self._watch(), name="store-watch"),
        ]

    def put(self, key: str, value: str) -> None:
        """Have a value stored."""
        self._values[key] = value
        self._enqueue(key)

    def delete(self, key: str) -> None:
        """Have a key deleted."""
        self._values.pop(key, None)
        self._enqueue(key)

    def raise_epoch(self, epoch: int) -> None:
        """Have the store's epoch raised to at least ``epoch``."""
        self._epoch = max(self._epoch, epoch)
        self._enqueue(_EPOCH)

    async def stop(self, timeout_s: float) -> None:
        """Write what waits for at most ``timeout_s``, then give up on the rest."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _enqueue(self, key: str) -> None:
        self._waiting.pop(key, None)
        self._waiting[key] = None
        self._idle.clear()
        self._wake.set()

    async def _write_forever(self) -> None:
        delay_s = _FIRST_DELAY_S
        while True:
            if not self._waiting:
                self._idle.set()
                self._wake.clear()
                await self._wake.wait()
            key = next(iter(self._waiting))
            del self._waiting[key]
            try:
                await self._write(key)
            except Unavailable as error:
                if delay_s == _FIRST_DELAY_S:
                    log.warning("%s; writing again until it does", error)
                # First again, unless it changed meanwhile and waits already.
                self._waiting = {key: None, **self._waiting}
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, _MAX_DELAY_S)
            except BatonError as error:
                log.error("cannot store %s: %s", key, error)
            else:
                delay_s = _FIRST_DELAY_S

    async def _write(self, key: str) -> None:
        if key == _EPOCH:
            await self._store.keep_epoch(self._epoch)
        elif key == _ADDRESS:
            await self._store.announce(self._address)
        elif (value := self._values.get(key)) is not None:
            await self._store.put(key, value)
        else:
            await self._store.delete(key)

    async def _watch(self) -> None:
        """Write everything again each time the store is there (again): it may have forgotten."""
        delay_s = _FIRST_DELAY_S
        while True:
            try:
                await self._store.watch(self._enqueue_all)
                delay_s = _FIRST_DELAY_S
            except Unavailable:
                delay_s = min(2 * delay_s, _MAX_DELAY_S)
            await asyncio.sleep(delay_s)

    def _enqueue_all(self) -> None:
        for key in (_ADDRESS, _EPOCH, *self._values):
            self._enqueue(key)
