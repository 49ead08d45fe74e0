"""What an instance says at its metrics port: of transfers, and of its side of the pool."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
from prometheus_client import generate_latest

from baton.core.request import Part
from baton.instance.metrics import make_registry
from kvpool.transport import TransferFault
from kvpool.transports.faulty import Fault
from tests.instance.fetch_kit import LAYOUT, pool_of
from tests.instance.instance_kit import BLOCK_SIZE, WAIT_S, Node, pair, request, running

OPERATIONS = Path(__file__).resolve().parents[2] / "docs" / "operations.md"


def metrics(node: Node) -> dict[str, float]:
    """As a scrape sees them: series with their labels, and values."""
    registry = make_registry(node.parts, psutil.Process(), node.role)
    lines = generate_latest(registry).decode().splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {series: float(value) for series, value in pairs}


def moved(node: Node, before: dict[str, float], prefix: str) -> dict[str, float]:
    """Series of a family that are other than before."""
    now = metrics(node)
    return {k: v for k, v in now.items() if k.startswith(prefix) and v != before[k]}


async def test_each_fault_and_each_transport_has_its_series() -> None:
    prefill, decode = pair(script=[Fault.CORRUPT])
    async with running(prefill, decode) as client:
        before = metrics(decode)
        for name in ("none", "loopback"):
            for fault in TransferFault:
                series = f'baton_kv_transfer_faults_total{{fault="{fault}",transport="{name}"}}'
                assert before[series] == 0
        assert before['baton_kv_pulls_total{transport="loopback"}'] == 0
        for name in ("fails", "arrives"):
            await client.hand_over(request(name), prefill, decode)
            await client.check(request(name))
        assert moved(decode, before, "baton_kv_transfer_faults_total") == {
            'baton_kv_transfer_faults_total{fault="corrupt",transport="loopback"}': 1.0
        }
        pulls = moved(decode, before, "baton_kv_pulls_total")
        assert list(pulls) == ['baton_kv_pulls_total{transport="loopback"}']
        handoffs = moved(decode, before, "baton_handoffs_total")
        assert handoffs['baton_handoffs_total{result="recomputed",side="decode"}'] == 1.0
        # Without a pool there is nothing to say of it.
        assert not [name for name in before if name.startswith(("baton_kv_fetch", "baton_pool_"))]


async def test_the_side_of_the_pool(tmp_path: Path) -> None:
    one = request(num_prompt_tokens=41)
    num_full = 40 // BLOCK_SIZE
    async with pool_of(tmp_path, 64) as pool:
        a, b = (Node(name, layout=LAYOUT, pool=pool.side) for name in ("a", "b"))
        async with running(a, b) as client:
            before = metrics(b)
            await client.submit(one, Part.WHOLE, a)
            await client.check(one)
            assert a.parts.pool is not None
            assert a.parts.pool.write_back is not None
            await asyncio.wait_for(a.parts.pool.write_back.drained(), WAIT_S)
            wrote = metrics(a)
            written = wrote['baton_kv_write_back_blocks_total{outcome="written"}']
            assert written == pool.statistics().num_idle >= num_full
            assert wrote["baton_kv_write_back_queued"] == 0
            assert wrote['baton_kv_fetches_total{outcome="asked"}'] == 1
            assert wrote["baton_pool_link_misses_total"] == 1
            # Of what it will fetch, one block is damaged.
            keys = a.engine.prefix_keys(one)
            assert b.parts.pool is not None
            hold = await b.parts.pool.link.hold(keys, skip=0, timeout_s=1.0)
            assert hold is not None
            hold.arena.block(hold.slots[6].slot)[0] ^= 1
            b.parts.pool.link.release(hold.hold_id)
            await client.submit(request("r", attempt=1, num_prompt_tokens=41), Part.WHOLE, b)
            await client.check(request("r", attempt=1, num_prompt_tokens=41))
            assert moved(b, before, "baton_kv_fetch") == {
                'baton_kv_fetches_total{outcome="asked"}': 1,
                'baton_kv_fetches_total{outcome="cut_short"}': 1,
                'baton_kv_fetch_faults_total{fault="corrupt"}': 1,
                'baton_kv_fetched_blocks_total{tier="host"}': 6,
                "baton_kv_fetch_seconds_total": metrics(b)["baton_kv_fetch_seconds_total"],
            }
            assert moved(b, before, "baton_pool_link") == {"baton_pool_link_holds_total": 2}
            documented(b)
        await pool.idle()


def documented(node: Node) -> None:
    """Each series is in the operator's handbook."""
    text = OPERATIONS.read_text()
    names = {series.partition("{")[0] for series in metrics(node)}
    assert not [name for name in sorted(names) if f"`{name}`" not in text]
