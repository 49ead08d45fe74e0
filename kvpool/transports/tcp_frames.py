"""Moving the frames of a tcp exchange, and their checksums.

Frames are gathered from the blocks where they lie, and scattered to where they shall lie. They are
moved in pieces: large ones, because a call that moves much wakes the other side less often, yet
small enough that what was just moved is still in a processor's cache when it is summed up.
Considered: sending the arena file's pages instead of copying them (``sendfile``). On one machine
the reader then wakes for every few pages, which costs more than the copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
import xxhash

from kvpool.transport import KVCache
from kvpool.transports import tcp_wire as wire
from kvpool.transports.blocks import Budget
from kvpool.transports.tcp_channel import Channel

PIECE_BYTES = 4 << 20

Indices = npt.NDArray[np.int64]


def send_frames(channel: Channel, cache: KVCache, blocks: Indices, budget: Budget) -> None:
    """Send ``blocks`` in frames. Raises ConnectionError, TimeoutError."""
    for frame in _frames(blocks, cache.block_bytes):
        digest = xxhash.xxh3_64()
        for piece in _pieces(_runs(cache, frame)):
            for view in piece:
                digest.update(view)
            channel.send(piece, budget)
        channel.send([wire.CHECKSUM.pack(digest.intdigest())], budget)


def receive_frames(channel: Channel, cache: KVCache, blocks: Indices, budget: Budget) -> None:
    """Receive into ``blocks``. Raises BadFrame, ConnectionError, TimeoutError."""
    done = 0
    for frame in _frames(blocks, cache.block_bytes):
        digest = xxhash.xxh3_64()
        for piece in _pieces(_runs(cache, frame)):
            channel.receive(piece, budget)
            for view in piece:
                digest.update(view)
        trailer = bytearray(wire.CHECKSUM.size)
        channel.receive([memoryview(trailer)], budget)
        if wire.CHECKSUM.unpack(trailer)[0] != digest.intdigest():
            raise wire.BadFrame(
                f"blocks {done} to {done + len(frame) - 1} of the pull arrived with a wrong"
                " checksum"
            )
        done += len(frame)


def _frames(blocks: Indices, block_bytes: int) -> Iterator[Indices]:
    step = wire.frame_blocks(block_bytes)
    for at in range(0, len(blocks), step):
        yield blocks[at : at + step]


def _runs(cache: KVCache, blocks: Indices) -> Iterator[memoryview]:
    """The bytes of ``blocks`` in order, neighbours as one."""
    firsts = np.concatenate(([0], np.flatnonzero(np.diff(blocks) != 1) + 1))
    counts = np.diff(firsts, append=len(blocks))
    for first, count in zip(blocks[firsts].tolist(), counts.tolist(), strict=True):
        yield cache.run(first, count)


def _pieces(runs: Iterable[memoryview]) -> Iterator[list[memoryview]]:
    """The runs' bytes in order, ``PIECE_BYTES`` or fewer at a time."""
    piece: list[memoryview] = []
    room = PIECE_BYTES
    for run in runs:
        rest = run
        while len(rest) >= room:
            yield [*piece, rest[:room]]
            rest = rest[room:]
            piece, room = [], PIECE_BYTES
        if len(rest):
            piece.append(rest)
            room -= len(rest)
    if piece:
        yield piece
