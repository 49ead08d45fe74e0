from __future__ import annotations

from pathlib import Path

import pytest

from baton.gateway.tokenizer import GatewayTokenizer
from tests.gateway.gateway_support import write_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tokenizer(model_dir: Path) -> GatewayTokenizer:
    loaded = GatewayTokenizer.load(model_dir)
    assert loaded is not None
    return loaded
