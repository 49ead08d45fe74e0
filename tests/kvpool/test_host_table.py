from __future__ import annotations

import pytest

from kvpool.host_values import Grant, Skip, SkipReason
from kvpool.tiers import BlockMeta, KVEvent, KVEventKind, Tier
from tests.kvpool.host_kit import Host, meta
from tests.kvpool.host_model import chain, key_of

KNOWN, FULL = Skip(SkipReason.KNOWN), Skip(SkipReason.FULL)
NO_PARENT, NOT_ADMITTED = Skip(SkipReason.NO_PARENT), Skip(SkipReason.NOT_ADMITTED)


def test_a_block_is_found_once_it_is_published_and_not_before() -> None:
    host = Host()
    grants = host.grants((1,), (1, 2))
    assert [grant.generation for grant in grants] == [1, 1]
    assert host.match((1, 2)) == 0
    assert host.hold((1, 2)) is None
    assert host.publish(grants) == [True, True]
    assert host.match((1, 2, 3)) == 2
    hold = host.hold((1, 2, 3))
    assert hold is not None
    assert hold.slots == tuple(grant.slot for grant in grants)
    assert hold.generations == (1, 1)
    assert hold.checksums == tuple(grant.slot + 7 for grant in grants)
    assert hold.num_tokens == (16, 16)
    assert host.publish(grants) == [False, False], "a ticket ends when it is used"
    assert host.table.snapshot_keys() == tuple(chain((1, 2)))
    assert (host.table.has(key_of((1,))), host.table.has(key_of((3,)))) == (True, False)


def test_a_child_counts_when_its_parent_does() -> None:
    host = Host()
    first, second, third = host.grants((1,), (1, 2), (1, 2, 3))
    assert host.publish([third, second]) == [True, True]
    assert host.match((1, 2, 3)) == 0
    assert host.events == []
    host.publish([first])
    assert host.match((1, 2, 3)) == 3
    assert host.events == [KVEvent(KVEventKind.STORED, Tier.HOST, tuple(chain((1, 2, 3))))]


def test_a_block_goes_with_its_parent() -> None:
    host = Host()
    [first] = host.grants((1,), owner="a")
    second, third = host.grants((1, 2), (1, 3), owner="b")
    host.publish([second])
    assert host.table.abandon(first.ticket, host.now)
    numbers = host.table.statistics()
    assert (numbers.num_free, numbers.num_quarantined) == (7, 1), "somebody still writes one"
    assert host.table.next_deadline() == host.now + 10 + 5, "may do so, and may be late"
    assert host.publish([third]) == [False], "what is written below nothing does not count"
    assert host.table.statistics().num_free == 8
    assert not host.table.abandon(first.ticket, host.now)
    assert host.events == []


def test_orphans_and_what_is_there_are_skipped() -> None:
    host = Host()
    assert host.reserve((1, 2)) == [NO_PARENT]
    answers = host.reserve((1,), (1,), (2, 1), (1, 5))
    assert answers[1:3] == [KNOWN, NO_PARENT]
    assert isinstance(answers[3], Grant), "its parent was granted before it"
    assert host.reserve((1,), owner="b") == [KNOWN]


def test_leaves_go_first_and_never_the_parent_of_the_new_one() -> None:
    host = Host(3, admit_all=True)
    host.store((1, 2, 3))
    host.store((1, 4))
    assert (host.match((1, 2, 3)), host.match((1, 4))) == (2, 2)
    host.store((1, 4, 5))
    assert (host.match((1, 2)), host.match((1, 4, 5))) == (1, 3)
    assert host.reserve((1, 4, 5, 6)) == [FULL]
    assert [e.keys for e in host.events if e.kind is KVEventKind.REMOVED] == [
        (key_of((1, 2, 3)),),
        (key_of((1, 2)),),
    ]


def test_offline_goes_first_then_the_rarely_used_then_the_oldest() -> None:
    host = Host(4, admit_all=True)
    host.store((1,), priority=0)
    host.store((2,), priority=0)
    host.store((3,), priority=-1)
    host.store((4,), priority=0)
    for path in ((3,), (3,), (1,)):
        host.match(path, touch=True)
    gone = []
    for new in (5, 6, 7):
        host.store((new,), priority=1)
        gone.append(next(p for p in (1, 2, 3, 4) if not host.match((p,)) and p not in gone))
    assert gone == [3, 2, 4]


def test_a_wish_of_higher_priority_lifts_what_is_there() -> None:
    host = Host(2, admit_all=True)
    host.store((1,), priority=-1)
    host.store((2,), priority=0)
    assert host.reserve((1,), priority=3) == [KNOWN]
    host.store((3,), priority=3)
    assert (host.match((1,)), host.match((2,))) == (1, 0)
    assert host.rebuilt().match(chain((1,)), now=0.0) == 1
    host.table.check_integrity()


def test_a_scan_does_not_displace_what_is_used() -> None:
    for admit_all, left in ((False, 4), (True, 0)):
        host = Host(16, admit_all=admit_all)
        host.store((1, 2, 3, 4))
        for _ in range(3):
            host.match((1, 2, 3, 4), touch=True)
        host.store(tuple(range(100, 112)))
        for prompt in range(200, 240):
            host.store((prompt, 1, 2))
        assert host.match((1, 2, 3, 4)) == left
        assert (host.table.statistics().num_evictions > 0) is True


def test_what_is_asked_for_again_gets_in() -> None:
    host = Host(1)
    host.store((1,))
    host.match((1,), touch=True)
    host.match((1,), touch=True)
    assert host.reserve((2,)) == [NOT_ADMITTED]
    assert host.reserve((2,)) == [NOT_ADMITTED]
    assert isinstance(host.reserve((2,))[0], Grant)
    assert host.match((1,)) == 0
    assert host.table.statistics().num_not_admitted == 2


def test_what_somebody_waits_for_gets_in_but_for_priority() -> None:
    host = Host(1)
    host.store((1,))
    host.match((1,), touch=True)
    offline = [meta((2,), priority=-1)]
    assert host.table.reserve(offline, owner="a", now=0.0, lease_s=1.0, wanted=True) == [
        NOT_ADMITTED
    ]
    assert host.reserve((3,)) == [NOT_ADMITTED]
    [answer] = host.table.reserve([meta((3,))], owner="a", now=0.0, lease_s=1.0, wanted=True)
    assert isinstance(answer, Grant)


def test_priority_decides_before_frequency() -> None:
    host = Host(1)
    host.store((1,))
    assert host.reserve((2,), priority=-1) == [NOT_ADMITTED]
    host.match((1,), touch=True)
    assert host.reserve((3,)) == [NOT_ADMITTED]
    assert isinstance(host.reserve((4,), priority=1)[0], Grant)


def test_what_is_held_stays_and_its_leases_are_kept() -> None:
    host = Host(2, admit_all=True)
    host.store((1, 2))
    hold = host.hold((1, 2))
    assert hold is not None
    assert host.reserve((3,)) == [FULL]
    host.now += 9
    assert host.table.renew(hold.hold_id, host.now, 10.0)
    assert host.table.next_deadline() == host.now + 10
    host.now += 9
    assert host.table.expire(host.now) == 0
    assert host.reserve((3,)) == [FULL]
    host.now += 1
    assert host.table.expire(host.now) == 1
    assert host.table.statistics().num_expired == 1
    assert not host.table.release(hold.hold_id, host.now)
    assert not host.table.renew(hold.hold_id, host.now, 10.0)
    assert isinstance(host.reserve((3,))[0], Grant)


def test_a_late_writer_gets_nothing_and_its_slot_rests() -> None:
    host = Host(1)
    [grant] = host.grants((1,))
    assert host.table.renew(grant.ticket, host.now, 10.0)
    host.now += 10
    assert host.table.expire(host.now) == 1
    assert not host.table.renew(grant.ticket, host.now, 10.0)
    assert host.reserve((1,), owner="b") == [FULL]
    assert host.table.next_deadline() == host.now + 5
    host.now += 5
    assert host.table.expire(host.now) == 0
    assert host.table.next_deadline() is None
    [again] = host.grants((1,), owner="b")
    assert (again.slot, again.generation) == (grant.slot, grant.generation + 1)
    assert host.publish([grant]) == [False]
    assert host.publish([again]) == [True]


def test_a_late_publication_ends_the_rest() -> None:
    host = Host(1)
    [grant] = host.grants((1,))
    host.now += 10
    host.table.expire(host.now)
    assert host.publish([grant]) == [False]
    assert host.table.statistics().num_free == 1


def test_the_end_of_a_process_ends_what_it_had() -> None:
    host = Host(4, admit_all=True)
    host.store((1, 2))
    host.grants((3,), owner="b")
    host.hold((1, 2), owner="b")
    assert host.table.statistics().num_held == 2
    assert host.table.release_owner("b", host.now) == 2
    numbers = host.table.statistics()
    assert (numbers.num_held, numbers.num_holds, numbers.num_tickets) == (0, 0, 0)
    assert (numbers.num_free, numbers.num_idle) == (2, 2), "the dead do not write"
    assert host.table.release_owner("b", host.now) == 0


def test_a_spilled_block_is_there_for_its_holders_only() -> None:
    host = Host()
    [grant] = host.grants((9,), transient=True)
    host.publish([grant])
    assert host.match((9,)) == 0
    assert host.reserve((9, 1)) == [NO_PARENT]
    hold, other = host.hold((9,)), host.hold((9,), owner="c")
    assert hold is not None
    assert other is not None
    host.table.release(hold.hold_id, host.now)
    assert host.table.statistics().num_transient == 1
    host.table.release(other.hold_id, host.now)
    numbers = host.table.statistics()
    assert (numbers.num_transient, numbers.num_free, numbers.num_tickets) == (0, 8, 0)
    assert host.events == []


def test_a_spilled_block_that_nobody_fetches_ends_with_its_ticket() -> None:
    host = Host()
    kept, lost = host.grants((8,), (9,), transient=True)
    host.publish([kept, lost])
    hold = host.hold((8,))
    assert hold is not None
    host.table.renew(hold.hold_id, host.now, 30.0)
    assert host.table.renew(lost.ticket, host.now, 15.0)
    host.now += 14
    assert host.table.expire(host.now) == 1
    assert host.table.statistics().num_transient == 2, "one is held, one was renewed"
    host.now += 1
    assert host.table.expire(host.now) == 1
    assert host.table.statistics().num_transient == 1
    host.table.release(hold.hold_id, host.now)
    assert host.table.statistics().num_free == 8


def test_spilled_blocks_displace_what_nobody_needs_however_often_used() -> None:
    host = Host(2)
    host.store((1,))
    host.store((2,), priority=1)
    for _ in range(5):
        host.match((1,), touch=True)
        host.match((2,), touch=True)
    assert isinstance(host.reserve((9,), transient=True)[0], Grant)
    assert host.reserve((8,), transient=True) == [NOT_ADMITTED], "that has a higher priority"


def test_a_dropped_block_is_found_no_more_but_stays_for_its_holders() -> None:
    host = Host(2, admit_all=True)
    host.store((1, 2))
    hold = host.hold((1, 2))
    assert hold is not None
    assert host.table.drop(key_of((1,)), host.now) == 2
    assert host.match((1, 2)) == 0
    assert [e.keys for e in host.events[2:]] == [(key_of((1, 2)),), (key_of((1,)),)]
    assert host.reserve((1,)) == [FULL]
    assert host.table.statistics().num_held == 2
    host.table.release(hold.hold_id, host.now)
    assert host.table.statistics().num_free == 2
    assert host.table.drop(key_of((1,)), host.now) == 0


def test_blocks_go_to_disk_children_first() -> None:
    host = Host(3, admit_all=True)
    host.store((1, 2, 3))
    [leaf] = host.table.demotable(5)
    assert leaf.meta == meta((1, 2, 3))
    assert host.table.demotable(5) == [leaf]
    assert host.table.mark_on_disk(leaf.slot, leaf.generation)
    [parent] = host.table.demotable(5)
    assert parent.meta.key == key_of((1, 2))
    assert not host.table.mark_on_disk(parent.slot, parent.generation + 1)
    assert not host.table.mark_on_disk(17, 1)
    host.store((4,))
    assert host.events[-2] == KVEvent(
        KVEventKind.DEMOTED, Tier.HOST, (key_of((1, 2, 3)),), Tier.DISK
    )
    numbers = host.table.statistics()
    assert (numbers.num_evictions, numbers.num_demotions, numbers.num_on_disk) == (1, 1, 0)


def test_what_the_disk_lost_is_written_again() -> None:
    host = Host()
    host.store((1, 2))
    for _ in range(2):
        [item] = host.table.demotable(1)
        host.table.mark_on_disk(item.slot, item.generation)
    assert host.table.demotable(9) == []
    assert host.rebuilt().statistics().num_on_disk == 2
    host.table.clear_on_disk([*chain((1, 2)), key_of((7,))])
    assert [item.meta.key for item in host.table.demotable(9)] == [key_of((1, 2))]
    assert host.rebuilt().statistics().num_on_disk == 0


def test_numbers_add_up_and_lookups_count() -> None:
    host = Host(4)
    host.store((1, 2))
    host.match((1, 2, 3), touch=True)
    host.match((7,), touch=False)
    host.grants((5,))
    host.hold((1,))
    numbers = host.table.statistics()
    assert (numbers.num_hits, numbers.num_misses, numbers.num_published) == (3, 1, 2)
    places = (numbers.num_free, numbers.num_filling, numbers.num_quarantined)
    assert (*places, numbers.num_idle, numbers.num_held) == (1, 1, 0, 1, 1)


def test_a_person_can_read_it() -> None:
    host = Host(6)
    host.store((1, 2))
    host.grants((5,))
    host.hold((1, 2))
    host.now += 2
    text = host.table.dump(2, now=host.now)
    assert "free 3" in text
    assert "hold" in text
    assert "of b: 2 blocks" in text
    assert "8.0 s left" in text
    assert "and 1 more" in text
    assert key_of((1,)).hex()[:12] in text
    assert "filling" in host.table.dump(9, now=host.now)


def test_bad_arguments_change_nothing() -> None:
    host = Host(2)
    before = host.table.statistics()
    good = meta((1,))
    for bad in (
        BlockMeta(b"short", None),
        BlockMeta(key_of((2,)), b"short"),
        BlockMeta(key_of((2,)), None, num_tokens=-1),
        BlockMeta(key_of((2,)), None, priority=1 << 40),
    ):
        with pytest.raises(ValueError, match=r"a key has|tokens|priority"):
            host.table.reserve([good, bad], owner="a", now=0.0, lease_s=1.0)
    with pytest.raises(ValueError, match="must last"):
        host.table.reserve([good], owner="a", now=0.0, lease_s=0.0)
    with pytest.raises(ValueError, match="must last"):
        host.table.hold([good.key], owner="a", now=0.0, lease_s=-1.0)
    assert host.table.statistics() == before
    [grant] = host.grants((1,))
    with pytest.raises(ValueError, match="64 bits"):
        host.table.publish(grant.ticket, 1 << 64, 0.0)
    assert host.publish([grant]) == [True]
