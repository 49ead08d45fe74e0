"""The controller as a named Ray actor: the one file of this package that knows Ray."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray

from baton.core.config import ControllerConfig
from baton.core.cost_model import CostModel
from controller.collector import collect_rarely
from controller.service import ControllerService
from protos.serving import HostedServer

_START_TIMEOUT_S = 30.0
_CALL_TIMEOUT_S = 5.0
_STOP_TIMEOUT_S = 10.0


class ControllerActor:
    """Runs the controller in this process.

    The port is fixed (not 0 in a real cluster), so that a restart binds the same one and every
    member finds the controller where it was.
    """

    def __init__(
        self,
        cluster: str,
        host: str,
        port: int,
        store_url: str,
        config: ControllerConfig,
        model: str,
        run_id: str = "",
        costs: CostModel | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        collect_rarely()
        self._server = HostedServer(
            "controller",
            lambda: ControllerService(
                cluster=cluster,
                host=host,
                port=port,
                store_url=store_url,
                config=config,
                model=model,
                run_id=run_id,
                costs=costs,
                weights=weights,
            ),
            start_timeout_s=_START_TIMEOUT_S,
        )

    def address(self) -> str:
        """host:port of its gRPC services. Raises ConfigError if it never will serve."""

        async def ask(service: ControllerService) -> str:
            return service.address

        return self._server.call(ask, _CALL_TIMEOUT_S)

    def stop(self) -> None:
        """Stop serving and release everything; the actor itself stays until it is killed."""
        self._server.stop(_STOP_TIMEOUT_S)


def controller_actor_class() -> Any:
    """The actor class: restarted for ever, next to no CPU of its own."""
    return ray.remote(max_restarts=-1, num_cpus=0)(ControllerActor)
