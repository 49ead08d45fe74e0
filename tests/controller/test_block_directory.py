"""What holders of KV blocks report, and what the directory answers. Pure."""

from __future__ import annotations

from typing import Any

import pytest

from baton.core.errors import InvalidRequest
from controller.block_directory import BlockDirectory
from controller.events import PrefixMatch
from controller.wire import place_requests
from protos.baton.internal.v1 import controller_pb2 as pb
from tests.kvpool.tier_kit import chain, keys_of

KEYS = keys_of(chain("a", 4))


def snapshot(
    directory: BlockDirectory, holder: str, keys: list[bytes], seq: int = 0, **more: Any
) -> None:
    blocks = [pb.TierBlocks(tier=more.pop("tier", "host"), keys=keys)]
    values = {"life": 1, "first_seq": seq, **more}
    report = pb.BlockReport(holder=holder, snapshot=True, blocks=blocks, **values)
    assert not directory.report(report).need_snapshot


def tell(
    directory: BlockDirectory, holder: str, seq: int, *events: pb.BlockEvent, life: int = 1
) -> bool:
    """Whether a snapshot is asked for."""
    report = pb.BlockReport(holder=holder, life=life, first_seq=seq, events=events)
    return directory.report(report).need_snapshot


def event(kind: str, keys: list[bytes], tier: str = "host", to: str = "") -> pb.BlockEvent:
    return pb.BlockEvent(kind=kind, tier=tier, to=to, keys=keys)


def found(directory: BlockDirectory) -> list[tuple[str, str, int, str]]:
    reply = directory.locate(KEYS, lambda holder: f"at {holder}" if "pool" in holder else "", 2)
    assert reply.num_pool_nodes == 2
    return [(m.holder, m.tier, m.num_blocks, m.address) for m in reply.matches]


def test_longest_first_with_addresses() -> None:
    directory = BlockDirectory()
    snapshot(directory, "pool-a", KEYS[:2])
    snapshot(directory, "decode-0", KEYS[:3], tier="device")
    assert found(directory) == [
        ("decode-0", "device", 3, ""),
        ("pool-a", "host", 2, "at pool-a"),
    ]


def test_events_follow_a_snapshot() -> None:
    directory = BlockDirectory()
    assert tell(directory, "pool-a", 0, event("stored", KEYS)), "nothing is known of it"
    snapshot(directory, "pool-a", KEYS[:1], seq=5)
    assert not tell(directory, "pool-a", 5, event("stored", KEYS[1:]))
    assert found(directory) == [("pool-a", "host", 4, "at pool-a")]
    assert not tell(directory, "pool-a", 6, event("demoted", KEYS[3:], to="disk"))
    assert not tell(directory, "pool-a", 7, event("removed", KEYS[3:], tier="disk"))
    assert found(directory) == [("pool-a", "host", 3, "at pool-a")]
    # Said twice.
    assert not tell(directory, "pool-a", 7, event("removed", KEYS[3:], tier="disk"))
    assert not tell(directory, "pool-a", 8)


def test_a_gap_needs_a_snapshot() -> None:
    directory = BlockDirectory()
    snapshot(directory, "pool-a", KEYS[:2])
    assert tell(directory, "pool-a", 3, event("removed", KEYS[1:2]))
    assert found(directory) == [("pool-a", "host", 2, "at pool-a")]
    assert tell(directory, "pool-a", 0, event("removed", KEYS[1:2])), "until the snapshot comes"
    snapshot(directory, "pool-a", KEYS[:1], seq=4)
    assert not tell(directory, "pool-a", 4, event("stored", KEYS[1:3]))
    assert found(directory) == [("pool-a", "host", 3, "at pool-a")]


def test_without_news_it_still_says_whether_a_snapshot_is_needed() -> None:
    directory = BlockDirectory()
    assert tell(directory, "pool-a", 3)
    snapshot(directory, "pool-a", KEYS, seq=3)
    assert not tell(directory, "pool-a", 3)
    assert tell(directory, "pool-a", 4)


def test_a_new_life_begins_with_a_snapshot() -> None:
    directory = BlockDirectory()
    snapshot(directory, "pool-a", KEYS)
    assert tell(directory, "pool-a", 0, event("stored", KEYS[:1]), life=2)
    assert found(directory) == []
    snapshot(directory, "pool-a", KEYS[:1], life=2)
    # What the former one says late changes nothing.
    assert not tell(directory, "pool-a", 0, event("stored", KEYS), life=1)
    snapshot(directory, "pool-a", KEYS, life=1)
    assert found(directory) == [("pool-a", "host", 1, "at pool-a")]


def test_holders_that_are_gone_are_dropped() -> None:
    directory = BlockDirectory()
    snapshot(directory, "pool-a", KEYS)
    snapshot(directory, "pool-b", KEYS[:2])
    directory.keep_only(["pool-b", "pool-c"])
    assert found(directory) == [("pool-b", "host", 2, "at pool-b")]
    assert directory.index.holders() == ["pool-b"]
    assert tell(directory, "pool-a", 0), "it has to say everything again"
    directory.keep_only([])
    assert directory.index.num_blocks == 0


@pytest.mark.parametrize(
    "report",
    [
        pb.BlockReport(holder="p", life=1, events=[event("eaten", KEYS)]),
        pb.BlockReport(holder="p", life=1, events=[event("stored", KEYS, tier="attic")]),
        pb.BlockReport(holder="p", life=1, events=[event("demoted", KEYS, to="attic")]),
        pb.BlockReport(holder="p", snapshot=True, blocks=[pb.TierBlocks(tier="", keys=KEYS)]),
    ],
)
def test_words_that_are_none_of_ours(report: pb.BlockReport) -> None:
    directory = BlockDirectory()
    with pytest.raises(InvalidRequest):
        directory.report(report)
    assert found(directory) == []


def test_placements_are_told_who_has_the_beginning_of_the_prompt() -> None:
    directory = BlockDirectory()
    snapshot(directory, "decode-0", KEYS[:3], tier="device")
    snapshot(directory, "pool-a", KEYS[:2])
    other = keys_of(chain("b", 2))
    requests = [
        pb.PlaceRequest(request_id="r-0", block_keys=KEYS, num_prompt_tokens=70),
        pb.PlaceRequest(request_id="r-1", block_keys=KEYS, num_prompt_tokens=70),
        pb.PlaceRequest(request_id="shorter", block_keys=KEYS[:1]),
        pb.PlaceRequest(request_id="other", block_keys=other),
        pb.PlaceRequest(request_id="without"),
        pb.PlaceRequest(request_id="r-0", block_keys=KEYS, bind_to="prefill-0"),
    ]
    before = directory.index.num_lookups
    event = place_requests(1, pb.PlaceBatch(requests=requests), directory.prefix_lookup(16))
    assert directory.index.num_lookups == before + 3, "two choices have one prompt"
    whole = (PrefixMatch("decode-0", "device", 48), PrefixMatch("pool-a", "host", 32))
    short = {PrefixMatch("decode-0", "device", 16), PrefixMatch("pool-a", "host", 16)}
    found = [query.prefix for query in event.queries]
    assert found[:2] == [whole, whole]
    assert set(found[2]) == short
    assert found[3:] == [(), (), ()]
