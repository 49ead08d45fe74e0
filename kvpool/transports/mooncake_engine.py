"""Mooncake's transfer engine as this project uses it: one per process, with bounded calls.

What was found out about version 0.3.13, and is why this file is as it is:

* A read that failed or timed out may still be going on: its bytes arrive later. So reads go to
  staging buffers, never to blocks.
* A read takes as long as the engine likes: ``MC_TRANSFER_TIMEOUT`` seconds (30; at least 5), and a
  minute while it meets a peer that is frozen, during which no other read of the engine begins. So
  nobody waits for one beyond a deadline.
* It refuses more than 2048 outstanding slices.
* What it has learnt of a peer it keeps by the peer's address for ever, and ports are drawn from two
  thousand: it does not find a new process at the port of an old one. So an address at which a read
  failed is spelt in another way from then on, and the engine takes it for a new one.
* Ending an engine takes a second, during which no Python thread runs.
* Whoever reaches its port may read *and write* registered memory: it knows no tokens.
"""

from __future__ import annotations

import functools
import importlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from baton.core.errors import ConfigError
from kvpool.bounded import BoundedCalls, Overloaded, Staging, StagingPool
from kvpool.transport import KVCache, TransferFault
from kvpool.transports.blocks import Budget, broken

log = logging.getLogger(__name__)

INSTALL = (
    "install mooncake-transfer-engine-non-cuda (or the variant for your accelerator; they exclude"
    " each other) and, on Debian, libibverbs1, libcurl4 and libnuma1"
)
MAX_SLICES = 256
"""Of one read."""
MAX_READS = 8
"""At the same time."""
STAGING_BYTES = 8 << 20
_END_S = 5.0
_SPELLINGS = 64
"""Of one address, before the first one is taken again."""


class MooncakeEngine:
    """An engine, made by ``acquire`` and given back by ``release``. Any thread may call anything.

    ``session``: by which peers' engines find this one.
    """

    def __init__(self, library: Any, host: str, protocol: str, device: str) -> None:
        self._engine = library.TransferEngine()
        code = self._engine.initialize(host, "P2PHANDSHAKE", protocol, device)
        if code != 0:
            raise ConfigError(
                f"Mooncake's transfer engine cannot start on {host} with protocol {protocol!r}"
                f" (code {code}): its messages are on this process's standard error",
                param="handoff.transport",
            )
        self.session = f"{host}:{self._engine.get_rpc_port()}"
        self.calls = BoundedCalls("kv-mooncake-read")
        self._lock = threading.Lock()
        self._exports: dict[int, int] = {}
        # Peers may be reading until the engine has ended: the memory has to be there so long.
        self._kept: list[memoryview] = []
        self._pools: dict[int, StagingPool] = {}
        self._zeros: dict[str, int] = {}
        """Sessions met -> how many zeros their port begins with."""

    def export(self, cache: KVCache) -> int:
        """Let peers read ``cache``; returns the address of its first block. Undone by ``withdraw``.

        Raises ConfigError.
        """
        memory = cache.run(0, cache.num_blocks)
        address = int(np.frombuffer(memory, dtype=np.uint8).ctypes.data)
        with self._lock:
            if address not in self._exports:
                self._register(address, len(memory))
                self._exports[address] = 0
                self._kept.append(memory)
            self._exports[address] += 1
        return address

    def withdraw(self, address: int) -> None:
        """Undo one ``export``."""
        with self._lock:
            self._exports[address] -= 1
            if not self._exports[address]:
                del self._exports[address]
                self._engine.unregister_memory(address)

    def read(
        self,
        session: str,
        addresses: Sequence[int],
        lengths: Sequence[int],
        use: Callable[[Staging], None],
        budget: Budget,
    ) -> None:
        """Read pieces of a peer's memory one behind the other, and call ``use`` with the result.

        What ``use`` gets may be wrong: copy first, then check the copy. At most ``MAX_SLICES``
        pieces. Raises TransportBroken, TimeoutError.
        """
        total = sum(lengths)
        offsets = np.cumsum([0, *lengths[:-1]])

        def fill(name: str, staging: Staging) -> bool:
            targets = (offsets + staging.address).tolist()
            code = self._engine.batch_transfer_sync_read(
                name, targets, list(addresses), list(lengths)
            )
            return bool(code == 0)

        try:
            for name in self._spellings(session):
                call = functools.partial(fill, name)
                with self._pool(total).filled(self.calls, call, budget) as staging:
                    if staging is not None:
                        use(staging)
                        return
            raise broken(
                f"Mooncake could not read from {session}: it is gone or busy", TransferFault.GONE
            )
        except Overloaded as error:
            raise broken(f"Mooncake takes no more reads: {error}", TransferFault.OTHER) from error
        except ConfigError as error:
            raise broken(error.message, TransferFault.OTHER) from error

    def end(self) -> bool:
        """Take the engine down; False if a read is still under way and it had to be left."""
        if not self.calls.close(_END_S):
            return False
        self._engine = None
        self._kept.clear()
        self._pools.clear()
        return True

    def _spellings(self, session: str) -> Iterator[str]:
        """How to write a peer's address: as the last time, and, if that fails, once in a new way.

        The latter for peers that were met before: what the engine knows of another tells nothing.
        """
        host, port = session.rsplit(":", 1)
        with self._lock:
            is_new = session not in self._zeros
            zeros = self._zeros.setdefault(session, 0)
        yield f"{host}:{'0' * zeros}{port}"
        with self._lock:
            if self._zeros[session] == zeros:  # else another reader has been here
                self._zeros[session] = (zeros + 1) % _SPELLINGS
            zeros = self._zeros[session]
        if not is_new:
            yield f"{host}:{'0' * zeros}{port}"

    def _pool(self, num_bytes: int) -> StagingPool:
        """Buffers of the smallest size that is enough: the usual one, or twice it, or ..."""
        size = STAGING_BYTES
        while size < num_bytes:
            size *= 2
        with self._lock:
            if size not in self._pools:
                self._pools[size] = StagingPool(size, MAX_READS, self._register)
            return self._pools[size]

    def _register(self, address: int, num_bytes: int) -> None:
        code = self._engine.register_memory(address, num_bytes)
        if code != 0:
            raise ConfigError(
                f"Mooncake's transfer engine cannot register {num_bytes} bytes (code {code})",
                param="handoff.transport",
            )


_Key = tuple[str, str, str]
_lock = threading.Lock()
_engines: dict[_Key, tuple[MooncakeEngine, int]] = {}
_left: list[MooncakeEngine] = []
"""Engines that could not be ended: their memory must stay."""


def library(module: str, param: str) -> Any:
    """Import a module of Mooncake's package. Raises ConfigError that names setting ``param``."""
    try:
        return importlib.import_module(f"mooncake.{module}")
    except ImportError as error:
        raise ConfigError(f"Mooncake cannot be used ({error}): {INSTALL}", param=param) from error


def acquire(host: str, protocol: str, device: str) -> MooncakeEngine:
    """The process's engine for these. Raises ConfigError if it cannot be made."""
    loaded = library("engine", "handoff.transport")
    key = (host, protocol, device)
    with _lock:
        engine, users = _engines.get(key) or (MooncakeEngine(loaded, *key), 0)
        _engines[key] = (engine, users + 1)
        return engine


def release(engine: MooncakeEngine) -> None:
    """Undo one ``acquire``; the last one ends the engine."""
    with _lock:
        key = next(key for key, (known, _) in _engines.items() if known is engine)
        users = _engines[key][1] - 1
        if users:
            _engines[key] = (engine, users)
            return
        del _engines[key]
    if not engine.end():
        log.warning("Mooncake's transfer engine has not returned from a read and is left running")
        with _lock:
            _left.append(engine)
