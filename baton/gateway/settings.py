"""What one gateway process needs to know, derived once from the cluster's configuration."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from baton.core.config import GatewayConfig, ServeConfig
from baton.core.policy_config import ServiceConfig

_PLACE_TIMEOUT_S = 10.0


@dataclasses.dataclass(frozen=True, slots=True)
class GatewaySettings:
    """One gateway. Ports may be 0: the system picks one, ``GatewayServer.addresses`` tells it."""

    model: str
    """Folder with config.json and, for text, tokenizer.json."""
    served_model_name: str
    host: str
    http_port: int
    grpc_port: int
    controller_address: str
    gateway_id: str
    node_id: str
    queue_timeout_s: float
    """How long the controller lets a request wait for its place."""
    max_model_len: int | None = None
    """Bound set by the operator or the cache; the model's own limit and what the instances
    report bound it further."""
    model_bounds_len: bool = True
    """Whether ``max_position_embeddings`` counts too: not where another model is emulated."""
    dtype: str = "float32"
    limits: GatewayConfig = dataclasses.field(default_factory=GatewayConfig)
    service: ServiceConfig = dataclasses.field(default_factory=ServiceConfig)
    place_timeout_s: float = _PLACE_TIMEOUT_S
    """How long a new request waits for its first placement while the controller is away."""

    def __post_init__(self) -> None:
        if not self.gateway_id:
            raise ValueError("gateway_id must not be empty")
        if self.place_timeout_s <= 0:
            raise ValueError(f"place_timeout_s must be positive, got {self.place_timeout_s}")

    @classmethod
    def from_config(
        cls, config: ServeConfig, *, controller_address: str, gateway_id: str, node_id: str
    ) -> GatewaySettings:
        """The gateway of ``baton serve``."""
        engine = config.engine
        # Where the instances measure the size of their caches, they report it.
        measured = engine.num_blocks is None
        bounds = (engine.max_model_len, None if measured else engine.kv_blocks * engine.block_size)
        return cls(
            model=config.model,
            served_model_name=config.served_model_name or Path(config.model).resolve().name,
            host=config.host,
            http_port=config.http_port,
            grpc_port=config.grpc_port,
            controller_address=controller_address,
            gateway_id=gateway_id,
            node_id=node_id,
            max_model_len=min((bound for bound in bounds if bound is not None), default=None),
            model_bounds_len=engine.device != "emulated",
            dtype=config.engine.dtype,
            limits=config.gateway,
            service=config.service,
            queue_timeout_s=config.controller.queue_timeout_s,
            place_timeout_s=max(_PLACE_TIMEOUT_S, config.controller.queue_timeout_s),
        )
