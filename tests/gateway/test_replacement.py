"""Who is refused by an instance goes to the fallback, then where the controller says next."""

from __future__ import annotations

import asyncio
from pathlib import Path

from baton.core.policy_config import ServiceClassConfig, ServiceConfig
from baton.core.slo import Slo
from tests.gateway.gateway_support import ToyInstance, until
from tests.gateway.late_policies import InOrder
from tests.gateway.toy_cluster import expected, joined, toy_cluster

SERVICE = ServiceConfig(classes={"chat": ServiceClassConfig(ttft_s=9.0)}, default="chat")


async def test_refused_twice_placed_a_third_time(tmp_path: Path, model_dir: Path) -> None:
    InOrder.seen.clear()
    policy = "tests.gateway.late_policies:InOrder"
    async with toy_cluster(tmp_path, model_dir, policy=policy, service=SERVICE) as toy:
        toy.instances["decode-2"] = last = ToyInstance("decode-2")
        await last.start()
        await last.join(toy.controller.address, "decode")
        instances = toy.controller.shell.core.state.instances
        await until(lambda: instances["decode-2"].state.placeable)
        for name in ("decode-0", "decode-1"):
            toy.instances[name].refuse = True
        assert joined(await toy.generate()) == expected()
        assert [len(item.submitted) for item in toy.decode] == [0, 0, 1]
        first, again = InOrder.seen
        assert (first.attempt, first.exclude) == (0, ())
        # Attempt 1 went to the fallback that came with the first answer.
        assert (again.attempt, set(again.exclude)) == (2, {"decode-0", "decode-1"})
        assert first.slo == again.slo == Slo(ttft_s=9.0)
        assert again.waited_s > first.waited_s, "what has passed of the target counts"
        await toy.idle()
        await until(lambda: not toy.controller.shell.core.state.open)


async def test_beyond_its_limit_the_controller_lets_tenants_take_turns(
    tmp_path: Path, model_dir: Path
) -> None:
    """Over the wire: batches of one gateway wait, and are answered one by one."""
    async with toy_cluster(tmp_path, model_dir, max_open_per_instance=1) as toy:
        for instance in toy.instances.values():
            instance.step_s = 0.002
        desk = toy.controller.shell.core.placements
        order: list[str] = []

        async def ask(name: str, salt: str) -> None:
            assert joined(await toy.generate(max_tokens=6, cache_salt=salt)) == expected(6)
            order.append(name)

        calls = [asyncio.create_task(ask(f"flood{i}", "flood")) for i in range(12)]
        await until(lambda: desk.num_queued == 11)
        calls += [asyncio.create_task(ask(f"small{i}", "small")) for i in range(2)]
        await asyncio.gather(*calls)
        assert len(order) == 14
        # One runs, then they take turns.
        assert order.index("small0") <= 3
        assert max(order.index(f"small{i}") for i in range(2)) <= 5
        await toy.idle()


async def test_offline_work_waits_without_holding_up_others(
    tmp_path: Path, model_dir: Path
) -> None:
    async with toy_cluster(tmp_path, model_dir, max_open_per_instance=1) as toy:
        for instance in toy.instances.values():
            instance.step_s = 0.02
        desk = toy.controller.shell.core.placements
        order: list[str] = []

        async def ask(name: str, priority: int) -> None:
            chunks = await toy.generate(max_tokens=6, priority=priority)
            assert joined(chunks) == expected(6)
            order.append(name)

        # Each takes some 0.15 s, so that the last waits for longer than queue_timeout_s.
        calls = [asyncio.create_task(ask("offline", -1)) for _ in range(12)]
        await until(lambda: desk.num_queued == 11)
        calls.append(asyncio.create_task(ask("online", 0)))
        await asyncio.gather(*calls)
        assert order.index("online") <= 2, "one that ran, and one that ended meanwhile, at most"
        assert await toy.metric("baton_requests_open") == 0
