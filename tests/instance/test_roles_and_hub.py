"""What an instance admits in each role, and how outputs reach gateways."""

from __future__ import annotations

import asyncio

import pytest

from baton.core.cluster import Role
from baton.core.errors import Refused
from baton.core.request import Part, TokenOutput
from baton.instance.hub import TokenHub, TokenStream
from baton.instance.roles import Duty, RoleSwitch
from tests.instance.instance_kit import Node, request, running, until

ADMITS = {
    Role.PREFILL: {Part.PREFILL, Part.WHOLE},
    Role.DECODE: {Part.DECODE},
    Role.MIXED: set(Part),
}


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("part", Part)
def test_what_a_role_admits(role: Role, part: Part) -> None:
    duty = Duty(role)
    if part in ADMITS[role]:
        duty.check(part, "i")
    else:
        with pytest.raises(Refused, match=f"i has role {role}"):
            duty.check(part, "i")
    with pytest.raises(Refused, match="draining"):
        Duty(role, draining=True).check(part, "i")


def test_a_preparation_changes_nothing_and_a_commit_swaps() -> None:
    switch = RoleSwitch(Role.PREFILL)
    switch.prepare(Role.DECODE)
    switch.prepare(Role.DECODE)  # the message came twice
    assert switch.duty == Duty(Role.PREFILL)
    with pytest.raises(Refused, match="a switch to decode is under way"):
        switch.prepare(Role.MIXED)
    switch.commit(Role.DECODE)
    assert switch.duty == Duty(Role.DECODE)
    switch.commit(Role.DECODE)
    switch.prepare(Role.MIXED)


def test_committing_the_role_it_has_forgets_the_preparation() -> None:
    switch = RoleSwitch(Role.PREFILL)
    switch.prepare(Role.DECODE)
    switch.commit(Role.PREFILL)
    assert switch.duty == Duty(Role.PREFILL)
    switch.prepare(Role.MIXED)


def test_a_drain_outlives_a_switch() -> None:
    switch = RoleSwitch(Role.PREFILL)
    switch.drain(True)
    switch.prepare(Role.DECODE)
    switch.commit(Role.DECODE)
    assert switch.duty == Duty(Role.DECODE, draining=True)
    switch.drain(False)
    assert switch.duty == Duty(Role.DECODE)


async def test_a_switch_and_a_drain_leave_what_is_there_alone() -> None:
    prefill, decode = Node("p", Role.PREFILL), Node("d", Role.DECODE)
    async with running(prefill, decode) as client:
        prefill.runner.gate.clear()
        before = request("before", num_prompt_tokens=40)
        await client.hand_over(before, prefill, decode)
        cached = prefill.engine
        prefill.role.prepare(Role.DECODE)
        prefill.role.commit(Role.DECODE)
        decode.role.prepare(Role.PREFILL)
        decode.role.commit(Role.PREFILL)
        decode.role.drain(True)
        prefill.runner.gate.set()
        await client.check(before)
        assert prefill.engine is cached
        assert (await client.submit(request("x"), Part.PREFILL, prefill)).error.code == "refused"
        assert (await client.submit(request("x"), Part.PREFILL, decode)).error.code == "refused"
        decode.role.drain(False)
        after = request("after")
        await client.hand_over(after, decode, prefill)  # the other way round now
        await client.check(after)


def output(name: str, index: int = 0) -> TokenOutput:
    return TokenOutput(name, 0, index=index, token_ids=(1,))


async def read(stream: TokenStream) -> list[list[tuple[str, int]]]:
    return [[(o.request_id, o.index) for o in message] async for message in stream]


async def test_a_flush_sends_each_gateway_one_message() -> None:
    lost: list[str] = []
    hub = TokenHub(lost.append)
    streams = [hub.open(name) for name in ("g", "h")]
    hub.flush()
    for index in range(3):
        hub.put("g", output("a", index))
        hub.put("nobody", output("x"))
    hub.put("h", output("b"))
    hub.flush()
    hub.flush()
    hub.put("g", output("a", 3))
    hub.flush()
    hub.end_all()
    messages = [await asyncio.wait_for(read(stream), 5) for stream in streams]
    assert messages == [[[("a", 0), ("a", 1), ("a", 2)], [("a", 3)]], [[("b", 0)]]]
    assert not hub._pending
    assert not lost


async def test_connected_from_open_to_close() -> None:
    lost: list[str] = []
    hub = TokenHub(lost.append)
    assert not hub.connected("g")
    stream = hub.open("g")
    assert hub.connected("g")
    hub.close(stream)
    assert not hub.connected("g")
    hub.close(stream)
    assert lost == ["g"]


async def test_a_newer_stream_takes_over_without_a_loss() -> None:
    lost: list[str] = []
    hub = TokenHub(lost.append)
    older = hub.open("g")
    hub.put("g", output("a"))
    newer = hub.open("g")
    hub.flush()
    assert await asyncio.wait_for(read(older), 5) == []
    hub.close(older)
    assert hub.connected("g")
    hub.end_all()
    assert await asyncio.wait_for(read(newer), 5) == [[("a", 0)]]
    assert not lost


async def test_the_wire_says_that_a_stream_is_open_and_notices_its_end() -> None:
    node = Node("m")
    async with running(node, connect=False) as client:
        assert not node.instance.hub.connected("g")
        await client.connect(node)  # returns with the initial metadata, before any token
        assert node.instance.hub.connected("g")
        await client.drop(node)
        await until(lambda: not node.instance.hub.connected("g"))
