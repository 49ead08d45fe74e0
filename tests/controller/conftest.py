"""A real Redis server per test module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.redis_kit import Redis, redis_server


@pytest.fixture(scope="module", name="redis_server")
def redis_of_the_module() -> Iterator[Redis]:
    with redis_server() as server:
        yield server
