"""Moving KV blocks between two processes of this machine: shm and tcp, and what to compare with.

    python -m benchmarks.kv_transport [--mooncake-python PATH] [--json FILE] [--table FILE]

One process exports an arena in shared memory, the other pulls blocks into an arena of its own, with
all that a pull verifies. Blocks of 16 KiB to 16 MiB, once as one run (``contiguous``) and once in a
random order without two neighbours on either side (``scattered``). In turn, per repetition:

* ``copy``: numpy copies the same runs from the mapped file into the same arena; verifies nothing;
* ``shm``, ``tcp``, ``tcp_tls``: pulls;
* ``mooncake``: the same blocks with Mooncake's transfer engine over tcp, in processes of its own
  with registered memory and batched reads; it verifies nothing. ``--mooncake-python`` names a
  Python that has ``mooncake-transfer-engine-non-cuda`` and numpy.

Numbers are medians of bytes per second. Every target is written before the first measurement.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import random
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from baton.core.config import TlsConfig
from benchmarks import machine
from kvpool.arena import BlockArena
from kvpool.transport import BlockCopy, Endpoint, Transport
from kvpool.transports.shm import ShmTransport
from kvpool.transports.tcp import TcpTransport

SCHEMA = "baton.benchmark.kv_transport/1"
ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
TIMEOUT_S = 60.0
TOTAL_BYTES = 64 << 20
MAX_BLOCKS = 1024
SIZES = (16 << 10, 128 << 10, 1 << 20, 16 << 20)
PATTERNS = ("contiguous", "scattered")
WAYS = ("copy", "shm", "tcp", "tcp_tls", "mooncake")

Pairs = list[tuple[int, int]]


def pairs_of(pattern: str, num_blocks: int, of: int) -> Pairs:
    """(source, target) blocks out of ``of``."""
    if pattern == "contiguous":
        return [(i, i) for i in range(num_blocks)]
    # Even blocks only: no two of them are neighbours.
    chance = random.Random(num_blocks)
    sources, targets = (chance.sample(range(0, of, 2), num_blocks) for _ in range(2))
    return list(zip(sources, targets, strict=True))


class Worker:
    """A process that answers lines of JSON with lines of JSON."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )

    def tell(self, line: str) -> None:
        """Say one thing."""
        assert self._process.stdin is not None
        print(line, file=self._process.stdin, flush=True)

    def ask(self, **values: Any) -> dict[str, Any]:
        """Say one thing and wait for the answer."""
        assert self._process.stdout is not None
        self.tell(json.dumps(values))
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "the process ended"}
        if "error" in answer:
            raise SystemExit(f"{' '.join(self._command)}: {answer['error']}")
        return answer

    def close(self) -> None:
        """Its input ends, and so does it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def certificates(folder: Path) -> TlsConfig:
    """An authority and one certificate from it, for both sides."""
    ca, ca_key, cert, key = (str(folder / name) for name in ("ca", "ca.key", "cert", "key"))
    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    for arguments in (
        ["-subj", "/CN=authority", "-keyout", ca_key, "-out", ca],
        ["-subj", "/CN=peer", "-keyout", key, "-out", cert, "-CA", ca, "-CAkey", ca_key],
    ):
        subprocess.run(
            ["openssl", "req", "-x509", *new_key, *arguments], check=True, capture_output=True
        )
    return TlsConfig(ca=ca, cert=cert, key=key)


def transports(tls: TlsConfig) -> dict[str, Transport]:
    """By the names of the ways."""
    return {
        "shm": ShmTransport(),
        "tcp": TcpTransport(HOST),
        "tcp_tls": TcpTransport(HOST, tls=tls),
    }


def export() -> None:
    """Worker: export an arena of each block size that is asked for."""
    folder = Path(sys.stdin.readline().strip())
    tls = TlsConfig(ca=str(folder / "ca"), cert=str(folder / "cert"), key=str(folder / "key"))
    with contextlib.ExitStack() as stack:
        for line in sys.stdin:
            asked = json.loads(line)
            arena = BlockArena.create(
                "/dev/shm",
                "benchmark",
                f"kv-transport-{asked['size']}",
                secrets.randbits(64),
                os.getpid(),
                asked["blocks"],
                asked["size"],
                "benchmark",
            )
            stack.callback(arena.unlink)
            data = np.frombuffer(arena.buffer, dtype=np.uint8)
            data[:] = np.arange(len(data), dtype=np.uint32) % 251
            ways = transports(tls)
            endpoints = {}
            for name, transport in ways.items():
                stack.callback(transport.close)
                endpoint = transport.export(arena)
                endpoints[name] = [endpoint.transport, endpoint.address, endpoint.token]
            print(json.dumps(endpoints), flush=True)


def read() -> None:
    """Worker: pull, or copy, what is asked for, and tell the seconds."""
    folder = Path(sys.stdin.readline().strip())
    tls = TlsConfig(ca=str(folder / "ca"), cert=str(folder / "cert"), key=str(folder / "key"))
    ways = transports(tls)
    arena: BlockArena | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        if "blocks" in asked:
            arena = BlockArena.private(asked["blocks"], asked["size"], "benchmark")
            arena.buffer[:] = bytes(len(arena.buffer))
            endpoints = {
                name: Endpoint(transport, address, token, "benchmark")
                for name, (transport, address, token) in asked["endpoints"].items()
            }
            source = BlockArena.open(
                endpoints["shm"].address, endpoints["shm"].token, writable=False
            )
            print(json.dumps({"ready": True}), flush=True)
            continue
        assert arena is not None
        data = np.frombuffer(arena.buffer, dtype=np.uint8)
        data[:] = 0
        pairs, way = asked["pairs"], asked["way"]
        if way == "copy":
            seconds = _copy(source, arena, pairs)
        else:
            copies = [BlockCopy(src, 0, dst) for src, dst in pairs]
            started = time.perf_counter()
            ways[way].pull(endpoints[way], arena, copies, timeout_s=TIMEOUT_S)
            seconds = time.perf_counter() - started
        right = all(
            np.array_equal(
                np.frombuffer(arena.block(dst), dtype=np.uint8),
                np.frombuffer(source.block(src), dtype=np.uint8),
            )
            for src, dst in pairs
        )
        answer = {"seconds": seconds} if right else {"error": f"{way}: the bytes are wrong"}
        print(json.dumps(answer), flush=True)
    for transport in ways.values():
        transport.close()


def _copy(source: BlockArena, target: BlockArena, pairs: Pairs) -> float:
    runs: list[list[int]] = []
    for src, dst in pairs:
        if runs and (src, dst) == (runs[-1][0] + runs[-1][2], runs[-1][1] + runs[-1][2]):
            runs[-1][2] += 1
        else:
            runs.append([src, dst, 1])
    views = [
        (
            np.frombuffer(target.run(dst, count), dtype=np.uint8),
            np.frombuffer(source.run(src, count), dtype=np.uint8),
        )
        for src, dst, count in runs
    ]
    started = time.perf_counter()
    for to, came_from in views:
        np.copyto(to, came_from)
    return time.perf_counter() - started


@contextlib.contextmanager
def workers(folder: Path, mooncake_python: str | None) -> Iterator[dict[str, Worker]]:
    """Exporters and readers, started and ended."""
    commands = {name: [sys.executable, "-m", "benchmarks.kv_transport"] for name in ("out", "in")}
    commands["out"] += ["--worker", "export"]
    commands["in"] += ["--worker", "read"]
    if mooncake_python is not None:
        script = str(Path(__file__).with_name("kv_transport_mooncake.py"))
        commands["mooncake_out"] = [mooncake_python, script, "export"]
        commands["mooncake_in"] = [mooncake_python, script, "read"]
    with contextlib.ExitStack() as stack:
        found = {}
        for name, command in commands.items():
            found[name] = Worker(command)
            stack.callback(found[name].close)
        for name in ("out", "in"):
            found[name].tell(str(folder))
        yield found


def measure(
    folder: Path, mooncake_python: str | None, sizes: Sequence[int], repetitions: int
) -> list[dict[str, Any]]:
    """A line per block size and pattern."""
    lines = []
    with workers(folder, mooncake_python) as by_name:
        ways = [way for way in WAYS if way != "mooncake" or mooncake_python is not None]
        if mooncake_python is not None:
            # One memory for all sizes, as large as what scattered blocks lie in.
            memory = 2 * TOTAL_BYTES
            there = by_name["mooncake_out"].ask(bytes=memory)
            by_name["mooncake_in"].ask(bytes=memory, **there)
        for size in sizes:
            num_blocks = min(MAX_BLOCKS, TOTAL_BYTES // size)
            endpoints = by_name["out"].ask(size=size, blocks=2 * num_blocks)
            by_name["in"].ask(size=size, blocks=2 * num_blocks, endpoints=endpoints)
            times: dict[tuple[str, str], list[float]] = {}
            for repetition in range(repetitions + 1):
                for pattern in PATTERNS:
                    pairs = pairs_of(pattern, num_blocks, 2 * num_blocks)
                    for way in ways:
                        if way == "mooncake":
                            answer = by_name["mooncake_in"].ask(size=size, pairs=pairs)
                        else:
                            answer = by_name["in"].ask(way=way, pairs=pairs)
                        if repetition:  # the first one warms
                            times.setdefault((pattern, way), []).append(answer["seconds"])
            for pattern in PATTERNS:
                rates = {
                    way: num_blocks * size / statistics.median(times[pattern, way]) for way in ways
                }
                lines.append(
                    {
                        "block_bytes": size,
                        "num_blocks": num_blocks,
                        "pattern": pattern,
                        "bytes_per_s": rates,
                        "seconds": {way: times[pattern, way] for way in ways},
                        "shm_of_copy": rates["shm"] / rates["copy"],
                        "tcp_of_mooncake": rates["tcp"] / rates["mooncake"]
                        if "mooncake" in rates
                        else None,
                    }
                )
                print(row(lines[-1]), flush=True)
    return lines


def header() -> str:
    """The table's head."""
    names = [f"{way} GB/s" for way in WAYS]
    titles = ["block", "blocks", "pattern", *names, "shm / copy", "tcp / mooncake"]
    return f"| {' | '.join(titles)} |\n|{'---:|' * len(titles)}"


def row(line: dict[str, Any]) -> str:
    """One line of the table."""
    rates = line["bytes_per_s"]
    cells = [
        f"{line['block_bytes'] >> 10} KiB",
        str(line["num_blocks"]),
        line["pattern"],
        *(f"{rates[way] / 1e9:.2f}" if way in rates else "" for way in WAYS),
        f"{line['shm_of_copy']:.0%}",
        "" if line["tcp_of_mooncake"] is None else f"{line['tcp_of_mooncake']:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> None:
    """See the file's head."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mooncake-python", help="a Python that has Mooncake's transfer engine")
    parser.add_argument("--sizes-kib", type=int, nargs="+", default=[size >> 10 for size in SIZES])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--json", "--output", type=Path, help="write the result here")
    parser.add_argument("--table", type=Path, help="write the table here")
    parser.add_argument("--worker", choices=["export", "read"], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker is not None:
        (export if args.worker == "export" else read)()
        return
    limits = machine.measure()
    print(machine.in_words(limits))
    print(header(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        certificates(Path(folder))
        sizes = [size << 10 for size in args.sizes_kib]
        lines = measure(Path(folder), args.mooncake_python, sizes, args.repetitions)
    now = datetime.datetime.now(datetime.UTC)
    if args.json is not None:
        document = {
            "schema": SCHEMA,
            "date": now.date().isoformat(),
            "repetitions": args.repetitions,
            "machine": limits,
            "results": lines,
        }
        args.json.write_text(json.dumps(document, indent=2) + "\n")
    if args.table is not None:
        mooncake = " --mooncake-python PATH" if args.mooncake_python else ""
        text = (
            f"{header()}\n" + "\n".join(row(line) for line in lines) + "\n\n"
            f"`python -m benchmarks.kv_transport{mooncake}`, {now.date()}: medians of"
            f" {args.repetitions} interleaved repetitions.\n\nMachine: {machine.in_words(limits)}\n"
        )
        args.table.write_text(text)


if __name__ == "__main__":
    main()
