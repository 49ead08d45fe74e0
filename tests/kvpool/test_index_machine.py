from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from baton.core.blocks import BlockKey
from kvpool.event_log import Gap
from kvpool.index import KVIndex, PrefixMatch
from kvpool.tiers import KVEventBatch, KVEventKind, KVSnapshot, Tier
from tests.kvpool.pool_model import (
    CHAINS,
    TIERS,
    UNKNOWN,
    Content,
    Holder,
    NaiveIndex,
    matches,
    prefix,
)

NODE_TIERS = (Tier.HOST, Tier.DISK)
NAMES = st.sampled_from(["instance-a", "instance-b", "node-a", "node-b"])
PREFIXES = st.sampled_from(CHAINS).flatmap(
    lambda chain: st.integers(1, len(chain)).map(lambda length: chain[:length])
)


def tiers_of(name: str) -> tuple[Tier, ...]:
    return NODE_TIERS if name.startswith("node") else (Tier.DEVICE,)


class IndexMachine(RuleBasedStateMachine):
    """Holders and an index, with messages that get lost, come twice, late and out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.index, self.model = KVIndex(sweep_min_blocks=3), NaiveIndex()
        self.lives = 0
        self.holders = {name: self.born(name) for name in ("instance-a", "node-a", "node-b")}
        self.sent: list[KVEventBatch | KVSnapshot] = []
        for holder in self.holders.values():
            self.sent.append(holder.snapshot())
            self.arrives(self.sent[-1])

    def born(self, name: str, content: Content | None = None) -> Holder:
        self.lives += 1
        return Holder(name, self.lives, tiers_of(name), content or {})

    def arrives(self, message: KVEventBatch | KVSnapshot) -> None:
        if isinstance(message, KVSnapshot):
            self.model.replace(message)
            self.index.replace(message)
        else:
            assert self.index.apply(message) is self.model.apply(message)

    @rule(name=NAMES, keys=PREFIXES)
    def store(self, name: str, keys: list[BlockKey]) -> None:
        self.holders.setdefault(name, self.born(name)).store(keys)

    @rule(
        name=NAMES,
        keys=PREFIXES,
        kind=st.sampled_from([KVEventKind.REMOVED, KVEventKind.DEMOTED]),
    )
    def give_up(self, name: str, keys: list[BlockKey], kind: KVEventKind) -> None:
        holder = self.holders.get(name)
        if holder is None:
            return
        if len(holder.tiers) == 1:
            kind = KVEventKind.REMOVED
        if kind is KVEventKind.REMOVED and len(holder.tiers) > 1:
            # What would be left below on disk had no parents: a node demotes instead, or has
            # a copy on disk already.
            holder.copy(keys, KVEventKind.STORED)
        holder.give_up(keys, kind)

    @rule(
        name=st.sampled_from(["node-a", "node-b"]),
        keys=PREFIXES,
        what=st.sampled_from(["promote", "write back", "clean"]),
    )
    def between_tiers(self, name: str, keys: list[BlockKey], what: str) -> None:
        holder = self.holders.setdefault(name, self.born(name))
        if what == "clean":
            holder.clean(keys)
        else:
            kinds = {"promote": KVEventKind.PROMOTED, "write back": KVEventKind.STORED}
            holder.copy(keys, kinds[what])

    @rule(name=NAMES, max_events=st.integers(1, 3), lost=st.booleans())
    def send(self, name: str, max_events: int, lost: bool) -> None:
        holder = self.holders.get(name)
        if holder is None:
            return
        batch = holder.log.batch_after(holder.sent, max_events)
        message = holder.snapshot() if isinstance(batch, Gap) else batch
        if message is not None:
            holder.sent = message.next_seq
            self.sent.append(message)
            if not lost:
                self.arrives(message)

    @rule(data=st.data())
    def an_earlier_message_arrives(self, data: st.DataObject) -> None:
        self.arrives(data.draw(st.sampled_from(self.sent)))

    @rule(name=NAMES)
    def catch_up(self, name: str) -> None:
        """The controller asks on from where it is; afterwards it knows the truth."""
        holder = self.holders.get(name)
        if holder is None:
            return
        for _ in range(20):
            position = self.index.position(name)
            if position is None or position[0] != holder.life:
                self.arrives(holder.snapshot())
                continue
            message = holder.log.batch_after(position[1], 2)
            if message is None:
                break
            self.arrives(holder.snapshot() if isinstance(message, Gap) else message)
        assert self.index.position(name) == (holder.life, holder.log.next_seq)
        assert self.model.holders[name].content == holder.content

    @rule(name=NAMES, adopts=st.booleans())
    def restart(self, name: str, adopts: bool) -> None:
        old = self.holders.get(name)
        content = old.content if old is not None and adopts and len(old.tiers) > 1 else {}
        self.holders[name] = self.born(name, {key: set(tiers) for key, tiers in content.items()})

    @rule(name=NAMES)
    def drop(self, name: str) -> None:
        self.index.drop(name)
        self.model.holders.pop(name, None)

    @rule(keys=PREFIXES, beyond=st.integers(0, 4))
    def lookup(self, keys: list[BlockKey], beyond: int) -> None:
        self.check([*keys, *UNKNOWN[:beyond]])

    def check(self, keys: list[BlockKey]) -> None:
        expected = {
            PrefixMatch(name, tier, count)
            for name, known in self.model.holders.items()
            for tier, count in matches(known.content, keys)
        }
        answer = self.index.lookup(keys)
        listed = list(answer)
        assert set(listed) == expected
        assert len(listed) == len(answer) == len(expected)
        lengths = [one.num_blocks for one in listed]
        assert lengths == sorted(lengths, reverse=True)
        longest = max(lengths, default=0)
        assert answer.longest == self.index.longest(keys) == longest
        assert bool(answer) is bool(expected)
        for count in (0, 1, 3):
            best = answer.best(count)
            assert set(best) <= expected
            assert [one.num_blocks for one in best] == lengths[:count]
        for name in [*self.model.holders, "nobody"]:
            known = self.model.holders.get(name)
            for number, tier in enumerate(TIERS):
                content = known.content if known is not None else {}
                count = prefix(content, keys, TIERS[: number + 1])
                assert answer.num_blocks(name, tier) == count

    @invariant()
    def knows_what_the_model_knows(self) -> None:
        contents = {name: known.content for name, known in self.model.holders.items()}
        assert self.index.num_holders == len(contents)
        assert set(self.index.holders()) == set(contents)
        assert self.index.num_blocks == len({key for one in contents.values() for key in one})
        for name, content in contents.items():
            for tier in TIERS:
                counted = sum(tier in tiers for tiers in content.values())
                assert self.index.counts(name).get(tier, 0) == counted
        self.index.check_integrity()

    def teardown(self) -> None:
        for keys in CHAINS:
            self.check(keys)
        for name in list(self.model.holders):
            self.index.drop(name)
        assert self.index.num_blocks == 0
        self.index.check_integrity()


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
