"""The gateway as a Ray actor: a plain server in a thread of its own."""

from __future__ import annotations

from typing import Any

import ray

from baton.gateway.server import GatewayAddresses, GatewayServer
from baton.gateway.settings import GatewaySettings
from protos.serving import HostedServer

_START_TIMEOUT_S = 60.0
_CALL_TIMEOUT_S = 5.0
_STOP_TIMEOUT_S = 20.0


class GatewayActor:
    """Runs one gateway in this process. Its ports must be fixed for it to survive a restart."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._server = HostedServer(
            settings.gateway_id,
            lambda: GatewayServer(settings),
            start_timeout_s=_START_TIMEOUT_S,
        )

    def addresses(self) -> GatewayAddresses:
        """Where it listens, once it does. Raises ConfigError if it never will."""

        async def ask(server: GatewayServer) -> GatewayAddresses:
            return server.addresses

        return self._server.call(ask, _CALL_TIMEOUT_S)

    def stop(self) -> None:
        """Release everything; the actor can then be killed."""
        self._server.stop(_STOP_TIMEOUT_S)


def gateway_actor_class() -> Any:
    """The actor class; a function, so that importing this file does not need a running Ray."""
    return ray.remote(max_restarts=-1, num_cpus=0)(GatewayActor)
