"""Mooncake Store as an external tier.

What was found out about version 0.3.13, and is why this file is as it is:

* A key that is not there reads as empty, over capacity it evicts and says nothing, and for some
  11 s after the death of a process its values are said to exist. The second value for a key is
  dropped, with success. The header of each value (``external_values``) and the check at each read
  make up for it.
* A call takes 4 s when the master is dead, up to 30 s when it is frozen. So nobody waits for one
  beyond a deadline, and all bytes go through staging memory, to which a call may still write when
  nobody waits any more.
* Setting up without a master takes 90 s, during which no Python thread runs. So it is asked first
  whether somebody listens there. Closing takes a second of the same kind, and 15 to
  60 s if the master does not answer; then it is left as it is.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from baton.core.errors import ConfigError
from kvpool.bounded import BoundedCalls, Overloaded, Staging, StagingPool
from kvpool.breaker import Breaker
from kvpool.external import CheckedStore
from kvpool.external_values import StoreFailed, Value
from kvpool.transports.mooncake_engine import library

log = logging.getLogger(__name__)

_MIN_BUFFER_BYTES = 16 << 20
_MAX_CALLS = 4
_CONNECT_S = 2.0
_END_S = 5.0

# Mooncake's codes for a value: there is none, not complete yet; longer than the buffer; no room;
# the master does not answer.
_ABSENT = (-704, -703)
_TOO_LONG = (-600, -10)
_FULL = -200
_NO_MASTER = (-900, -901)
_REST_S = 20.0

_left: list[MooncakeValues] = []
"""Those that could not be closed: their memory must stay."""


class MooncakeValues:
    """``kvpool.external_values.Values`` in a Mooncake Store, as a client and, with
    ``segment_bytes``, as one of those that hold its values."""

    def __init__(
        self,
        master: str,
        *,
        host: str,
        metadata: str,
        protocol: str,
        device: str,
        segment_bytes: int,
        batch_bytes: int,
    ) -> None:
        self.batch_bytes = batch_bytes
        loaded = library("store", "pool.external.master")
        _check_listening(master)
        self._store = loaded.MooncakeDistributedStore()
        code = self._store.setup(
            host, metadata, segment_bytes, _MIN_BUFFER_BYTES, protocol, device, master
        )
        if code != 0:
            self._store.close()
            raise ConfigError(
                f"Mooncake Store cannot be set up with its master at {master}, metadata"
                f" {metadata!r} and protocol {protocol!r} (code {code}): its messages are on this"
                " process's standard error",
                param="pool.external",
            )
        self._calls = BoundedCalls("kv-mooncake-store", _MAX_CALLS)
        self._pool = StagingPool(batch_bytes, _MAX_CALLS, self._register, rest_s=_REST_S)
        self._lock = threading.Lock()
        self._closed = False

    def exist(self, names: Sequence[str], timeout_s: float) -> list[bool]:
        """See ``Values``."""
        codes = self._call(lambda: self._store.batch_is_exist(list(names)), timeout_s)
        if min(codes) < 0:
            raise _failed("is_exist", min(codes))
        return [code == 1 for code in codes]

    @contextlib.contextmanager
    def load(
        self, names: Sequence[str], num_bytes: Sequence[int], timeout_s: float
    ) -> Iterator[Sequence[Value]]:
        """See ``Values``."""
        codes: list[int] = []
        offsets = _offsets(num_bytes)

        def read(staging: Staging) -> bool:
            targets = (offsets + staging.address).tolist()
            codes.extend(self._store.batch_get_into(list(names), targets, list(num_bytes)))
            return _at_rest(codes)

        with self._staged(num_bytes, read, timeout_s) as staging:
            yield [
                _value(staging, offset, code)
                for offset, code in zip(offsets.tolist(), codes, strict=True)
            ]

    def save(
        self, names: Sequence[str], values: Sequence[Sequence[bytes | memoryview]], timeout_s: float
    ) -> int:
        """See ``Values``."""
        sizes = [sum(len(part) for part in parts) for parts in values]
        offsets = _offsets(sizes)
        codes: list[int] = []

        def fill(staging: Staging) -> None:
            for offset, parts in zip(offsets.tolist(), values, strict=True):
                for part in parts:
                    end = offset + len(part)
                    np.copyto(staging.data[offset:end], np.frombuffer(part, dtype=np.uint8))
                    offset = end

        def write(staging: Staging) -> bool:
            sources = (offsets + staging.address).tolist()
            codes.extend(self._store.batch_put_from(list(names), sources, sizes))
            return _at_rest(codes)

        with self._staged(sizes, write, timeout_s, fill):
            stored = next((at for at, code in enumerate(codes) if code != 0), len(codes))
        if not stored and codes[0] != _FULL:
            raise _failed("put", codes[0])
        return stored

    def drop(self, name: str, timeout_s: float) -> None:
        """See ``Values``."""
        code = self._call(lambda: self._store.remove(name, True), timeout_s)
        if code != 0 and code not in _ABSENT:
            raise _failed("remove", code)

    def close(self) -> None:
        """Unregister and leave the store; a segment's values go with it. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        answers = self._answers()
        if not self._calls.close(_END_S if answers else 0.0) or not answers:
            log.warning("Mooncake Store is left as it is: its master or a call does not answer")
            _left.append(self)
            return
        for address in self._pool.addresses():
            self._store.unregister_buffer(address)
        self._store.close()
        self._store = None

    def _answers(self) -> bool:
        try:
            codes = self._call(lambda: self._store.batch_is_exist(["baton"]), _CONNECT_S)
        except (StoreFailed, TimeoutError):
            return False
        return bool(min(codes) >= 0)

    def _register(self, address: int, num_bytes: int) -> None:
        code = self._store.register_buffer(address, num_bytes)
        if code != 0:
            raise _failed("register_buffer", code)

    def _call(self, function: Callable[[], Any], timeout_s: float) -> Any:
        try:
            return self._calls.call(function, timeout_s)
        except Overloaded as error:
            raise StoreFailed(str(error)) from error

    @contextlib.contextmanager
    def _staged(
        self,
        num_bytes: Sequence[int],
        use: Callable[[Staging], bool],
        timeout_s: float,
        prepare: Callable[[Staging], None] | None = None,
    ) -> Iterator[Staging]:
        """Staging memory after ``use``, which may have failed: its codes tell."""
        if sum(num_bytes) > self.batch_bytes:
            raise StoreFailed(
                f"{sum(num_bytes)} bytes are more than the staging memory has:"
                f" {self.batch_bytes}; raise pool.external.batch_bytes"
            )
        give_up = time.monotonic() + timeout_s
        kept: list[Staging] = []

        def remembered(staging: Staging) -> bool:
            kept.append(staging)
            return use(staging)

        def left() -> float:
            return max(0.0, give_up - time.monotonic())

        try:
            with self._pool.filled(self._calls, remembered, left, prepare):
                yield kept[0]
        except Overloaded as error:
            raise StoreFailed(str(error)) from error


class MooncakeStore(CheckedStore):
    """A :class:`kvpool.external.ExternalStore` in a Mooncake Store.

    ``master``: host:port of its master. ``layout``: text of the blocks' layout; blocks of others
    are not seen. ``host``: own address, as the store's other clients reach it. ``metadata``: URL
    of the metadata server, or P2PHANDSHAKE for none. ``protocol``, ``device``: of Mooncake;
    run over ``tcp``, the others are untested. ``segment_bytes``: memory of this process that the
    store may fill; with 0 all of it is elsewhere. ``batch_bytes``: staging memory, four times at
    most, and the largest block with its header. ``timeout_s``: bound of each call.

    Raises ConfigError if Mooncake is not installed, or the master not reached.
    """

    def __init__(
        self,
        master: str,
        *,
        layout: str,
        host: str = "127.0.0.1",
        metadata: str = "P2PHANDSHAKE",
        protocol: str = "tcp",
        device: str = "",
        segment_bytes: int = 0,
        batch_bytes: int = 16 << 20,
        timeout_s: float = 5.0,
        breaker: Breaker | None = None,
    ) -> None:
        values = MooncakeValues(
            master,
            host=host,
            metadata=metadata,
            protocol=protocol,
            device=device,
            segment_bytes=segment_bytes,
            batch_bytes=batch_bytes,
        )
        super().__init__(
            values,
            name=f"Mooncake Store at {master}",
            layout=layout,
            timeout_s=timeout_s,
            breaker=breaker,
        )


def _check_listening(master: str) -> None:
    try:
        _connect(master)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"Mooncake's master cannot be reached at {master!r}: {error}. Start mooncake_master,"
            " or correct the address",
            param="pool.external.master",
        ) from error


def _connect(master: str) -> None:
    host, _, port = master.rpartition(":")
    if not port.isdecimal():
        raise ValueError("it is not host:port")
    socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()


def _offsets(num_bytes: Sequence[int]) -> Any:
    """Where each of the values begins, one behind the other, ``[num_values]``."""
    return np.cumsum([0, *num_bytes[:-1]], dtype=np.int64)


def _at_rest(codes: Sequence[int]) -> bool:
    """Whether nothing can be under way any more to or from a call's staging memory."""
    quiet = (*_ABSENT, *_TOO_LONG, *_NO_MASTER, _FULL)
    return all(code >= 0 or code in quiet for code in codes)


def _value(staging: Staging, offset: int, code: int) -> Value:
    if code in _ABSENT or code == 0:
        return None
    if code in _TOO_LONG:
        return staging.view(offset, 0)
    return staging.view(offset, code) if code > 0 else _failed("get", code)


def _failed(what: str, code: int) -> StoreFailed:
    return StoreFailed(f"Mooncake's {what} failed with code {code}")
