"""What the next pool node makes of the records that the last one left."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import numpy as np
import pytest

from kvpool.host_records import RECORD, RecordFlag, RecordState
from kvpool.host_table import HostTable
from kvpool.host_values import Grant, HostSettings
from tests.kvpool.host_kit import Host, meta
from tests.kvpool.host_model import chain, key_of


def test_the_next_life_keeps_what_is_ready_and_the_order() -> None:
    host = Host(6, admit_all=True)
    host.store((1, 2))
    host.store((3,))
    host.hold((3,))
    [writing] = host.grants((4,))
    next_life = HostSettings(life=2, quarantine_s=5.0, admit_all=True)
    table = HostTable.rebuild(host.records, host.generations, now=0.0, settings=next_life)
    table.check_integrity()
    assert table.snapshot_keys() in (
        tuple(key_of(p) for p in ((1,), (1, 2), (3,))),
        tuple(key_of(p) for p in ((3,), (1,), (1, 2))),
    )
    numbers = table.statistics()
    assert (numbers.num_held, numbers.num_quarantined, numbers.num_free) == (0, 1, 2)
    assert not table.publish(writing.ticket, 1, 0.0)
    assert table.expire(5.0) == 0
    assert table.statistics().num_free == 3
    assert host.generations[writing.slot] == writing.generation + 1
    new = [meta((n,)) for n in (5, 6, 7, 8)]
    answers = table.reserve(new, owner="a", now=6.0, lease_s=1.0)
    assert {a.ticket for a in answers if isinstance(a, Grant)}.isdisjoint({writing.ticket})
    assert len([a for a in answers if isinstance(a, Grant)]) == 4
    assert table.match(chain((1, 2)), now=6.0) == 1, "stored first, evicted first"


def test_whatever_is_cut_off_is_not_believed() -> None:
    host = Host(6)
    host.store((1, 2, 3))
    host.store((4,))
    slot = [bytes(key) for key in host.records["key"]].index(key_of((1, 2)))
    host.records["state"][slot] = 77
    table = host.rebuilt()
    table.check_integrity()
    assert set(table.snapshot_keys()) == {key_of((1,)), key_of((4,))}
    assert table.statistics().num_quarantined == 1


def test_killed_at_any_line_what_is_left_is_true() -> None:
    """Each line of the accounts is a point at which the pool node may be killed."""
    host = Host(4, admit_all=True)
    left: dict[bytes, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = {}
    true: dict[tuple[int, int], tuple[bytes, int]] = {}

    def watch(frame: FrameType, what: str, _: object) -> Any:
        if not frame.f_globals.get("__name__", "").startswith("kvpool.host_"):
            return None
        image = host.records.tobytes() + host.generations.tobytes()
        if image not in left:
            left[image] = (host.records.copy(), host.generations.copy())
        return watch

    tracer = sys.gettrace()
    sys.settrace(watch)
    try:
        for path in ((1, 2), (1, 3), (4,), (1, 5, 6), (7, 8), (1, 2)):
            paths = [path[: depth + 1] for depth in range(len(path))]
            answers = host.reserve(*paths)
            for one, answer in zip(paths, answers, strict=True):
                if isinstance(answer, Grant):
                    true[answer.slot, answer.generation] = (key_of(one), answer.slot + 7)
                    assert host.publish([answer]) == [True]
        host.table.drop(key_of((1,)), host.now)
    finally:
        sys.settrace(tracer)
    assert len(left) > 50, "too few points to say anything"
    for records, generations in left.values():
        table = HostTable.rebuild(records, generations, now=0.0)
        table.check_integrity()
        for key in table.snapshot_keys():
            hold = None
            for path in ((1, 2), (1, 3), (4,), (1, 5, 6), (7, 8)):
                if key in chain(path):
                    keys = chain(path)[: chain(path).index(key) + 1]
                    hold = table.hold(keys, owner="r", now=0.0, lease_s=1.0)
                    break
            assert hold is not None
            assert len(hold.slots) == len(keys), "ready without its prefix"
            found = true[hold.slots[-1], hold.generations[-1]]
            assert found == (key, hold.checksums[-1])


@pytest.mark.parametrize("column", ["state", "key", "checksum", "generation"])
def test_damage_is_noticed(column: str) -> None:
    host = Host(2)
    host.store((1, 2))
    host.table.check_integrity()
    if column == "generation":
        host.generations[0] += np.uint64(1)
    elif column == "key":
        host.records["key"][0] = np.void(bytes(16))
    else:
        host.records[column][0] = RecordState.FILLING
    with pytest.raises(AssertionError, match=r"slot 0|record 0"):
        host.table.check_integrity()


def test_foreign_arrays_are_refused() -> None:
    records, generations = np.zeros(3, dtype=RECORD), np.zeros(3, dtype=np.uint64)
    with pytest.raises(ValueError, match="records of 64 bytes"):
        HostTable(np.zeros(3, dtype="V64"), generations)
    with pytest.raises(ValueError, match="generations must be uint64"):
        HostTable(records, generations[:2])
    records["state"][1] = RecordState.READY
    with pytest.raises(ValueError, match=r"HostTable\.rebuild"):
        HostTable(records, generations)


def test_the_file_says_what_the_documented_fields_mean() -> None:
    host = Host(3)
    host.store((1, 2), priority=-7)
    [grant] = host.grants((9,), transient=True)
    item = host.table.demotable(1)[0]
    host.table.mark_on_disk(item.slot, item.generation)
    row = host.records[item.slot]
    assert (row["key"].tobytes(), row["parent"].tobytes()) == (key_of((1, 2)), key_of((1,)))
    assert (row["checksum"], row["order"]) == (item.slot + 7, 2)
    assert (row["depth"], row["num_tokens"], row["priority"]) == (1, 16, -7)
    assert row["state"] == RecordState.READY
    assert RecordFlag(int(row["flags"])) == RecordFlag.HAS_PARENT | RecordFlag.ON_DISK
    other = host.records[grant.slot]
    assert (other["state"], other["flags"]) == (RecordState.FILLING, RecordFlag.TRANSIENT)
