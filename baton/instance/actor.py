"""An instance as a Ray actor: a thin shell around :class:`InstanceServer`.

Ray restarts the actor when its process dies and runs the constructor again, which loads the
checkpoint, takes a new arena and registers as a new incarnation.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import ray

from baton.instance.spec import InstanceSpec
from protos.serving import HostedServer

if TYPE_CHECKING:
    from baton.instance.server import InstanceServer

_START_TIMEOUT_S = 600.0
_CALL_TIMEOUT_S = 5.0
_STOP_TIMEOUT_S = 15.0


class InstanceActor:
    """Runs one instance in this process."""

    def __init__(self, spec: InstanceSpec) -> None:
        # Only here: the launcher's process names this class, and must not pay for torch.
        from baton.instance.rank_actor import RayRankLauncher
        from baton.instance.server import InstanceServer

        self._server = HostedServer(
            spec.instance_id,
            lambda: InstanceServer(spec, RayRankLauncher),
            start_timeout_s=_START_TIMEOUT_S,
        )

    def ready(self) -> int:
        """Returns once the instance serves: its pid. Raises ConfigError if it never will."""

        async def ask(_: InstanceServer) -> int:
            return os.getpid()

        return self._server.call(ask, _CALL_TIMEOUT_S)

    def stop(self) -> None:
        """Release everything; the actor can then be killed."""
        self._server.stop(_STOP_TIMEOUT_S)


def instance_actor_class() -> Any:
    """The actor class; a function, so that importing this file does not need a running Ray."""
    return ray.remote(max_restarts=-1, num_cpus=0)(InstanceActor)
