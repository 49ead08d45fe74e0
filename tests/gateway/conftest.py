from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from baton.gateway.tokenizer import GatewayTokenizer
from tests.gateway.gateway_support import write_model
from tests.gateway.toy_cluster import Toy, toy_cluster


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tokenizer(model_dir: Path) -> GatewayTokenizer:
    loaded = GatewayTokenizer.load(model_dir)
    assert loaded is not None
    return loaded


@pytest_asyncio.fixture
async def toy(tmp_path: Path, model_dir: Path) -> AsyncIterator[Toy]:
    async with toy_cluster(tmp_path, model_dir) as cluster:
        yield cluster
