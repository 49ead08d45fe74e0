"""What the host tier's accounts should be, written as plainly as possible: no index, only scans."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools

import numpy as np
import numpy.typing as npt

from kvpool.host_values import Grant, Skip, SkipReason
from kvpool.tiers import BlockMeta

QUARANTINE_S = 3.0
Path = tuple[int, ...]


LISTED = ("filling", "written", "ready")


def every_path() -> list[Path]:
    """All prompts there are."""
    return [path for length in range(5) for path in itertools.product((0, 1), repeat=length)]


def key_of(path: Path) -> bytes:
    return hashlib.blake2b(repr(path).encode(), digest_size=16).digest()


def chain(path: Path) -> list[bytes]:
    return [key_of(path[: depth + 1]) for depth in range(len(path))]


@dataclasses.dataclass(eq=False)
class Block:
    """A slot in use. ``state``: filling, written, ready, quarantined, detached."""

    meta: BlockMeta
    slot: int
    generation: int
    owner: str
    deadline: float
    ticket: int | None
    transient: bool
    state: str = "filling"
    on_disk: bool = False
    checksum: int = 0
    uses: int = 0
    value: int = 0
    touched: int = 0
    order: int = 0


class HostModel:
    """Blocks in slots, and holds on them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.life = 0
        self.num_slots = 0
        self.admit_all = False
        self.generations: npt.NDArray[np.uint64] = np.zeros(0, dtype=np.uint64)
        self.blocks: list[Block] = []
        self.holds: dict[int, tuple[str, list[Block], float]] = {}
        self.numbers: list[int] = []
        """Of all tickets and holds that ever were."""
        self.floor = self.sequence = self.orders = 0

    def listed(self) -> list[Block]:
        return [b for b in self.blocks if b.state in LISTED]

    def at(self, key: bytes | None) -> Block | None:
        return next((b for b in self.listed() if b.meta.key == key), None)

    def children(self, block: Block) -> list[Block]:
        return [b for b in self.listed() if not b.transient and b.meta.parent == block.meta.key] * (
            not block.transient
        )

    def references(self, block: Block) -> int:
        return sum(held.count(block) for _, held, _ in self.holds.values())

    def touch(self, block: Block) -> None:
        self.sequence += 1
        block.uses = min(15, block.uses + 1)
        block.value, block.touched = self.floor + block.uses, self.sequence

    def prefix(self, keys: list[bytes]) -> list[Block]:
        found: list[Block] = []
        for key in keys:
            block = self.at(key)
            if block is None or block.state != "ready":
                break
            found.append(block)
        return found

    def remove(self, block: Block, *, busy: bool) -> None:
        """With all below it; ``busy``: somebody may still write to it."""
        for child in self.children(block):
            self.remove(child, busy=True)
        if block.state == "filling" and busy:
            block.state = "quarantined"
            block.deadline = max(block.deadline, self.now) + QUARANTINE_S
        elif self.references(block):
            block.state, block.ticket = "detached", None
        else:
            self.blocks.remove(block)

    def give_up(self, block: Block) -> None:
        """Its ticket ends at its owner's will."""
        if block.state == "ready":
            block.ticket = None
            if not self.references(block):
                self.remove(block, busy=False)
        else:
            self.remove(block, busy=False)

    def let_go(self, hold: int) -> None:
        _, held, _ = self.holds.pop(hold)
        for block in dict.fromkeys(held):
            if self.references(block):
                continue
            if block.state == "detached":
                self.blocks.remove(block)
            elif block.transient:
                self.remove(block, busy=False)

    def victim(self, parent: Block | None) -> Block | None:
        able = [
            b
            for b in self.blocks
            if b.state == "ready"
            and not b.transient
            and b is not parent
            and not self.children(b)
            and not self.references(b)
        ]
        return min(able, key=lambda b: (b.meta.priority, b.value, b.touched), default=None)

    def expect(
        self, meta: BlockMeta, answer: Grant | Skip, owner: str, lease_s: int, transient: bool
    ) -> None:
        """The model's own decision about one block; but for frequencies, it is the table's."""
        known = self.at(meta.key)
        if known is not None:
            assert answer == Skip(SkipReason.KNOWN)
            priority = max(known.meta.priority, meta.priority)
            known.meta = dataclasses.replace(known.meta, priority=priority)
            if known.state == "ready":
                self.touch(known)
            return
        parent = None if transient else self.at(meta.parent)
        if meta.parent is not None and not transient and parent is None:
            assert answer == Skip(SkipReason.NO_PARENT)
            return
        if len(self.blocks) == self.num_slots:
            victim = self.victim(parent)
            if victim is None:
                assert answer == Skip(SkipReason.FULL)
                return
            if answer == Skip(SkipReason.NOT_ADMITTED):
                assert not self.admit_all
                assert meta.priority <= victim.meta.priority
                assert not transient or meta.priority < victim.meta.priority
                return
            self.floor = max(self.floor, victim.value)
            self.remove(victim, busy=False)
        assert isinstance(answer, Grant)
        assert answer.ticket not in self.numbers
        assert answer.slot not in {b.slot for b in self.blocks}, "a slot in two places"
        assert answer.generation == self.generations[answer.slot]
        self.numbers.append(answer.ticket)
        self.blocks.append(
            Block(
                meta=meta,
                slot=answer.slot,
                generation=answer.generation,
                owner=owner,
                deadline=self.now + lease_s,
                ticket=answer.ticket,
                transient=transient,
            )
        )

    def become_ready(self, block: Block) -> None:
        block.state = "ready"
        self.orders += 1
        block.order = self.orders
        self.touch(block)
        # The last first: that is the order in which the table uses them, which ranks them.
        for child in sorted(self.children(block), key=self.blocks.index, reverse=True):
            if child.state == "written":
                self.become_ready(child)

    def due(self) -> list[tuple[float, int, Block | None]]:
        return [lease for lease in self.leases() if lease[0] <= self.now]

    def leases(self) -> list[tuple[float, int, Block | None]]:
        tickets = [(b.deadline, b.ticket, b) for b in self.blocks if b.ticket is not None]
        return [*tickets, *((deadline, n, None) for n, (_, _, deadline) in self.holds.items())]
