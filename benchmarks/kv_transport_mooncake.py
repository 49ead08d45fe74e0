"""Mooncake's transfer engine over tcp, as a worker of ``benchmarks.kv_transport``.

Runs in a Python of its own, with ``mooncake-transfer-engine-non-cuda`` and numpy and without
Baton: ``python kv_transport_mooncake.py export|read``. Lines of JSON on stdin and stdout. Memory
of both sides is registered, reads are batched, at most ``MAX_SLICES`` per batch: the engine
refuses more than 2048 outstanding ones, and cuts large ones.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import mmap
import os
import sys
import time
from typing import Any, TextIO

import numpy as np

MAX_SLICES = 1024


def engine_of(host: str) -> Any:
    """An engine that waits for peers at ``host``, at a port that it chooses."""
    engine = importlib.import_module("mooncake.engine").TransferEngine()
    if engine.initialize(host, "P2PHANDSHAKE", "tcp", "") != 0:
        raise SystemExit("the transfer engine did not start")
    return engine


def memory(engine: Any, num_bytes: int) -> tuple[mmap.mmap, int]:
    """Registered memory with all its pages, and where it lies."""
    block = mmap.mmap(-1, num_bytes)
    np.frombuffer(block, dtype=np.uint8)[:] = np.arange(num_bytes, dtype=np.uint32) % 251
    address = ctypes.addressof(ctypes.c_char.from_buffer(block))
    if engine.register_memory(address, num_bytes) != 0:
        raise SystemExit("the transfer engine did not register the memory")
    return block, address


def main() -> None:
    """Export memory until stdin ends, or read from an exporter as told."""
    # The engine logs to stdout: answers get a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    (export if sys.argv[1] == "export" else read)(answers)


def say(answers: TextIO, **values: Any) -> None:
    """One line."""
    print(json.dumps(values), file=answers, flush=True)


def export(answers: TextIO) -> None:
    """``{"bytes"}``: tell where the memory is, and keep it."""
    engine = engine_of("127.0.0.1")
    told = json.loads(sys.stdin.readline())
    _block, address = memory(engine, told["bytes"])
    say(answers, target=f"127.0.0.1:{engine.get_rpc_port()}", address=address)
    sys.stdin.read()
    os._exit(0)  # its threads do not end on their own


def read(answers: TextIO) -> None:
    """``{"bytes", "target", "address"}``, then ``{"size", "pairs"}``: one transfer, timed."""
    engine = engine_of("127.0.0.1")
    told = json.loads(sys.stdin.readline())
    block, address = memory(engine, told["bytes"])
    view = np.frombuffer(block, dtype=np.uint8)
    say(answers, ready=True)
    for line in sys.stdin:
        asked = json.loads(line)
        size, pairs = asked["size"], asked["pairs"]
        view[:] = 0
        started = time.perf_counter()
        for at in range(0, len(pairs), MAX_SLICES):
            part = pairs[at : at + MAX_SLICES]
            status = engine.batch_transfer_sync_read(
                told["target"],
                [address + dst * size for _, dst in part],
                [told["address"] + src * size for src, _ in part],
                [size] * len(part),
            )
            if status != 0:
                say(answers, error=f"a batch of {len(part)} x {size} bytes ended with {status}")
                break
        else:
            seconds = time.perf_counter() - started
            src, dst = pairs[-1]
            wanted = np.arange(src * size, (src + 1) * size, dtype=np.uint32) % 251
            if not np.array_equal(view[dst * size : (dst + 1) * size], wanted):
                say(answers, error="the bytes are wrong")
            else:
                say(answers, seconds=seconds)
    os._exit(0)


if __name__ == "__main__":
    main()
