"""A cluster for tests: a real controller, a real gateway, and toy instances."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx

from baton.client import AsyncBatonClient, GenerateChunk, generate_request
from baton.core.config import ControllerConfig, GatewayConfig
from baton.core.policy_config import AdmissionConfig, ServiceConfig
from baton.gateway.server import GatewayServer
from baton.gateway.settings import GatewaySettings
from controller.service import ControllerService
from controller.store_memory import MemoryStore
from tests.gateway.gateway_support import ToyInstance, tokens_of, until

PROMPT = [5, 6, 7, 8]


@dataclasses.dataclass
class Toy:
    controller: ControllerService
    gateway: GatewayServer
    instances: dict[str, ToyInstance]
    http: httpx.AsyncClient
    grpc: AsyncBatonClient
    settings: GatewaySettings

    @property
    def decode(self) -> list[ToyInstance]:
        return [item for name, item in self.instances.items() if name.startswith("decode")]

    async def generate(self, **fields: Any) -> list[GenerateChunk]:
        values = {"max_tokens": 20, "seed": 3, "ignore_eos": True, **fields}
        prompt = values.pop("prompt", PROMPT)
        return [chunk async for chunk in self.grpc.generate(generate_request(prompt, **values))]

    async def metric(self, line: str) -> float:
        text = (await self.http.get("/metrics")).text
        return next(float(x.rsplit(" ", 1)[1]) for x in text.splitlines() if x.startswith(line))

    async def idle(self) -> None:
        """Nothing runs anywhere."""
        await until(lambda: not any(item.open for item in self.instances.values()))
        async with asyncio.timeout(5):
            while await self.metric("baton_requests_open"):
                await asyncio.sleep(0.01)


def expected(count: int = 20, choice: int = 0, prompt: list[int] = PROMPT) -> list[int]:
    return tokens_of(tuple(prompt), 3, count, choice)


def joined(chunks: list[GenerateChunk], choice: int = 0) -> list[int]:
    mine = [chunk for chunk in chunks if chunk.choice == choice]
    indices = [chunk.index + i for chunk in mine for i in range(len(chunk.token_ids))]
    assert indices == list(range(len(indices)))
    return [token for chunk in mine for token in chunk.token_ids]


def controller_service(
    tmp_path: Path,
    port: int = 0,
    *,
    policy: str = "slo",
    max_open_per_instance: int | None = None,
) -> ControllerService:
    return ControllerService(
        cluster="toy",
        host="127.0.0.1",
        port=port,
        store_url="memory",
        config=ControllerConfig(
            heartbeat_s=0.5,
            dead_after_s=1.5,
            queue_timeout_s=1.0,
            policy=policy,
            admission=AdmissionConfig(max_open_per_instance=max_open_per_instance),
        ),
        model="tiny",
        store=MemoryStore("toy", directory=tmp_path),
    )


async def ready(http: httpx.AsyncClient) -> None:
    async with asyncio.timeout(5):
        while (await http.get("/ready")).status_code != 200:
            await asyncio.sleep(0.01)


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    blocks = [block for block in answer.text.split("\n\n") if block]
    assert blocks[-1] == "data: [DONE]"
    return [json.loads(block.split("data: ", 1)[1]) for block in blocks[:-1]]


@contextlib.asynccontextmanager
async def toy_cluster(
    tmp_path: Path,
    model_dir: Path,
    *,
    policy: str = "slo",
    service: ServiceConfig | None = None,
    max_open_per_instance: int | None = None,
) -> AsyncIterator[Toy]:
    async with contextlib.AsyncExitStack() as stack:
        controller = controller_service(
            tmp_path, policy=policy, max_open_per_instance=max_open_per_instance
        )
        await controller.start()
        instances = {name: ToyInstance(name) for name in ("prefill-0", "decode-0", "decode-1")}
        for name, instance in instances.items():
            await instance.start()
            await instance.join(controller.address, name.split("-")[0])
        settings = GatewaySettings(
            model=str(model_dir),
            served_model_name="tiny",
            host="127.0.0.1",
            http_port=0,
            grpc_port=0,
            controller_address=controller.address,
            gateway_id="gw-0",
            node_id="node",
            limits=GatewayConfig(gap_timeout_s=1.0, replay_timeout_s=2.0, max_replays=3),
            queue_timeout_s=1.0,
            place_timeout_s=5.0,
            service=service or ServiceConfig(),
        )
        gateway = GatewayServer(settings)
        addresses = await gateway.start()
        http = await stack.enter_async_context(
            httpx.AsyncClient(base_url=f"http://{addresses.http}", timeout=20)
        )
        client = await stack.enter_async_context(AsyncBatonClient(addresses.grpc))
        made = Toy(controller, gateway, instances, http, client, settings)
        await ready(http)
        try:
            yield made
        finally:
            await gateway.stop()
            for instance in instances.values():
                await instance.stop()
            await made.controller.stop()
