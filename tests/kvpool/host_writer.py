"""A pool node that does nothing but fill its host tier, until it is killed.

``python -m tests.kvpool.host_writer DIRECTORY``: prints a line for each block that is ready.
"""

from __future__ import annotations

import hashlib
import itertools
import sys

import xxhash

from kvpool.host_arena import HostArena
from kvpool.host_table import HostTable
from kvpool.host_values import Grant, HostSettings
from kvpool.tiers import BlockMeta

CLUSTER = "killed"
SHAPE = {"num_slots": 12, "slot_bytes": 5000}
LAYOUT = "layout"


def payload(key: bytes) -> bytes:
    """What belongs in a block of that key."""
    return key * (SHAPE["slot_bytes"] // len(key)) + key[: SHAPE["slot_bytes"] % len(key)]


def main(directory: str) -> None:
    arena = HostArena.create(directory, CLUSTER, "", layout=LAYOUT, **SHAPE)
    table = HostTable(arena.table, arena.blocks.generations, settings=HostSettings(admit_all=True))
    for number in itertools.count():
        parent = None
        for depth in range(number % 4 + 1):
            text = f"{number % 7 if depth < 2 else number}/{depth}/{parent!r}"
            key = hashlib.blake2b(text.encode(), digest_size=16).digest()
            meta = BlockMeta(key, parent, depth, num_tokens=16)
            [answer] = table.reserve([meta], owner="writer", now=0.0, lease_s=1.0)
            if isinstance(answer, Grant):
                block = arena.blocks.block(answer.slot)
                block[:] = payload(key)
                table.publish(answer.ticket, xxhash.xxh3_64_intdigest(block), 0.0)
                print(key.hex(), flush=True)
            parent = key


if __name__ == "__main__":
    main(sys.argv[1])
