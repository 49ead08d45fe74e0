"""What several test modules need that costs a moment to make."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from baton.core.config import TlsConfig
from tests.kvpool.mooncake_kit import held_engine
from tests.kvpool.tls_kit import Authority


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> TlsConfig:
    return Authority(tmp_path_factory.mktemp("tls") / "authority").issue("peer")


@pytest.fixture(scope="module")
def mooncake() -> Iterator[None]:
    with held_engine():
        yield
