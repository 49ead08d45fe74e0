"""Random lives of requests on two prefill and two decode instances.

Whatever is submitted, aborted, tried again, cut off, killed or corrupted, in whatever order: each
token that comes is the right one, an attempt that nobody disturbed ends, and nothing stays held.
"""

from __future__ import annotations

import asyncio
import dataclasses

import hypothesis.strategies as st
from hypothesis import HealthCheck, given, settings

from baton.core.config import HandoffConfig
from baton.core.request import FinishReason, Part, Submission
from kvpool.transports.faulty import Fault
from tests.instance.instance_kit import (
    CONFIG,
    MAX_MODEL_LEN,
    Client,
    Node,
    plain,
    request,
    running,
    until,
)

SMALL = dataclasses.replace(CONFIG, num_blocks=30, max_num_seqs=3)
HANDOFF = HandoffConfig(lease_s=1.0, pull_timeout_s=0.05)

actions = st.lists(
    st.tuples(
        st.sampled_from(
            ["submit"] * 6
            + ["whole", "abort", "abort", "again", "again", "drop"]
            + ["kill", "fail", "wait", "wait"]
        ),
        st.integers(0, 7),
        st.integers(0, 3),
    ),
    min_size=4,
    max_size=24,
)
faults = st.lists(st.sampled_from([*Fault, Fault.NONE, Fault.NONE]), max_size=6)


class World:
    def __init__(self, nodes: list[Node], client: Client) -> None:
        self.nodes = nodes
        self.client = client
        self.submissions: dict[str, Submission] = {}
        """The newest attempt of each request."""
        self.placed: dict[str, tuple[Node, Node]] = {}
        self.all: list[Submission] = []
        self.disturbed: set[tuple[str, int]] = set()
        self.dropped: set[int] = set()
        self.killed: set[int] = set()
        self.failing = False

    async def act(self, kind: str, which: int, where: int) -> None:
        name = f"r{which}"
        known = self.submissions.get(name)
        prefill, decode = self.nodes[where % 2], self.nodes[2 + where // 2]
        if kind in ("submit", "whole") and known is None:
            whole = kind == "whole"
            await self.begin(self.fresh(name, which), decode if whole else prefill, decode)
        elif kind == "again" and known is not None:
            have = self.client.tokens(name, known.attempt, len(known.output_ids))
            outputs = (*known.output_ids, *have)
            if self.over(known) or len(outputs) >= known.sampling.max_tokens:
                return
            self.disturb(known)
            await self.abort(known)
            newer = dataclasses.replace(known, attempt=known.attempt + 1, output_ids=outputs)
            await self.begin(newer, prefill, decode)
        elif kind == "abort" and known is not None:
            self.disturb(known)
            await self.abort(known)
        elif kind == "drop" and which < 2 and where not in self.dropped:
            self.dropped.add(where)
            self.disturb_those_on(where)
            await self.client.drop(self.nodes[where])
        elif kind == "kill" and which == 0 and where < 2 and where not in self.killed:
            self.killed.add(where)
            self.disturb_those_on(where)
            await self.nodes[where].kill()
        elif kind == "fail":
            node = self.nodes[where]
            step = node.runner.next_step + which
            node.runner.fails = lambda plan: plan.step == step
            self.failing = True
        else:
            await asyncio.sleep(0.002 * which)

    def fresh(self, name: str, which: int) -> Submission:
        stop = {"stop_token_ids": (which,)} if which % 3 == 0 else {}
        return request(
            name,
            num_prompt_tokens=3 + 11 * which % 50,
            sampling={"max_tokens": 2 + 5 * which, **stop},
            priority=which % 2,
        )

    def over(self, one: Submission) -> bool:
        end = self.client.end(one.request_id, one.attempt)
        return end is not None and end.finish_reason is not FinishReason.ERROR

    async def begin(self, one: Submission, prefill: Node, decode: Node) -> None:
        self.submissions[one.request_id] = one
        self.all.append(one)
        self.placed[one.request_id] = (prefill, decode)
        parts = [(Part.DECODE, decode, prefill), (Part.PREFILL, prefill, None)]
        if prefill is decode or len(one.output_ids) + 1 == one.sampling.max_tokens:
            self.placed[one.request_id] = (decode, decode)
            parts = [(Part.WHOLE, decode, None)]
        for part, node, source in parts:
            if self.nodes.index(node) in self.killed:
                self.disturb(one)
                continue
            reply = await self.client.submit(one, part, node, source)
            if reply.HasField("error"):
                self.disturb(one)
                await self.abort(one)  # as a gateway does when one side refuses

    async def abort(self, one: Submission) -> None:
        for node in set(self.placed[one.request_id]):
            if self.nodes.index(node) not in self.killed:
                await self.client.abort(one.request_id, one.attempt, node)

    def disturb(self, one: Submission) -> None:
        self.disturbed.add((one.request_id, one.attempt))

    def disturb_those_on(self, where: int) -> None:
        for name, placed in self.placed.items():
            if self.nodes[where] in placed:
                self.disturb(self.submissions[name])

    def settled(self, one: Submission) -> bool:
        if (one.request_id, one.attempt) in self.disturbed:
            return True
        return self.client.end(one.request_id, one.attempt) is not None

    async def check(self) -> None:
        await until(
            lambda: all(self.settled(one) for one in self.all),
            lambda: f"no end of {[o.request_id for o in self.all if not self.settled(o)]}",
        )
        for node in self.nodes:
            await node.idle()
        for one in self.all:
            expected, reason = plain(one)
            first = len(one.output_ids)
            tokens = self.client.tokens(one.request_id, one.attempt, first)
            assert tokens == expected[first : first + len(tokens)]
            end = self.client.end(one.request_id, one.attempt)
            if end is not None and end.finish_reason is not FinishReason.ERROR:
                assert end.finish_reason is reason
                assert first + len(tokens) == len(expected)
            if (one.request_id, one.attempt) not in self.disturbed and not self.failing:
                assert end is not None
                assert end.finish_reason is reason, end


async def live(plan: list[tuple[str, int, int]], script: list[Fault]) -> None:
    nodes = [
        Node(name, config=SMALL, handoff=HANDOFF, script=script if name == "d0" else ())
        for name in ("p0", "p1", "d0", "d1")
    ]
    async with running(*nodes) as client:
        world = World(nodes, client)
        for kind, which, where in plan:
            await world.act(kind, which, where)
        await world.check()


@settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(actions, faults)
def test_random_lives(plan: list[tuple[str, int, int]], script: list[Fault]) -> None:
    assert MAX_MODEL_LEN >= 3 + 50 + 2 + 35
    asyncio.run(live(plan, script))
