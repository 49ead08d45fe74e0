"""How long a client may wait for places between two of its tokens."""

from __future__ import annotations

import pytest

from baton.core.config import ControllerConfig, ServeConfig
from baton.gateway.settings import GatewaySettings
from baton.gateway.submission import patience_s


@pytest.mark.parametrize(
    ("waited_s", "replay_s", "queue_s", "left_s"),
    [
        (0.0, 3.0, 3.0, 3.0),
        # It waited for its first place, and lost it: the sum is what is bounded.
        (2.0, 3.0, 3.0, 1.0),
        (3.5, 3.0, 3.0, 0.0),
        # Where the operator lets requests queue for long, a loss after that is not the end.
        (30.0, 3.0, 60.0, 3.0),
        (59.0, 3.0, 60.0, 1.0),
        (0.5, 3.0, 1.0, 2.5),
    ],
)
def test_waits_add_up(waited_s: float, replay_s: float, queue_s: float, left_s: float) -> None:
    left = patience_s(waited_s, replay_timeout_s=replay_s, queue_timeout_s=queue_s)
    assert left == pytest.approx(left_s)


def test_the_gateway_waits_as_long_as_the_controller_queues() -> None:
    config = ServeConfig(model="m", controller=ControllerConfig(queue_timeout_s=60.0))
    settings = GatewaySettings.from_config(
        config, controller_address="127.0.0.1:9", gateway_id="gw", node_id="node"
    )
    assert settings.queue_timeout_s == 60.0
    assert settings.place_timeout_s == 60.0
