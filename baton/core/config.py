"""All settings of a cluster, as frozen values with their defaults.

One YAML file and the flags of ``baton serve`` use these names. The edge (``baton/cli/settings.py``)
parses and refuses; this file only says what exists and which combinations make sense.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Literal

from baton.core.policy_config import AdmissionConfig, RolesConfig, ServiceConfig

Dtype = Literal["float32", "bfloat16"]
TransportName = Literal["auto", "shm", "tcp", "collective", "mooncake"]
DeviceName = Literal["cpu", "cuda", "emulated"]
ExchangeName = Literal["auto", "all_gather", "all_to_all"]


@dataclasses.dataclass(frozen=True, slots=True)
class EngineConfig:
    """One instance's engine."""

    dtype: Dtype = "float32"
    block_size: int = 16
    num_blocks: int | None = 2048
    """KV blocks per instance; each holds ``block_size`` tokens of all layers. ``None``: what is
    left of ``memory_limit_gib`` when everything else is measured at the start."""
    memory_limit_gib: float | None = None
    """Memory of one rank's process on its device, all of it; default: what the machine has."""
    max_model_len: int | None = None
    """Longest sequence; default: the model's own limit, bounded by the cache."""
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    """Token budget of one step; longer prompts are prefilled in chunks of at most this."""
    enable_prefix_cache: bool = True
    async_scheduling: bool = True
    """Plan step n+1 while step n runs."""
    num_threads: int = 1
    """CPU threads of one instance's model."""
    device: DeviceName = "cpu"
    """``emulated``: no model is computed; steps take the time that ``profile`` says."""
    profile: str | None = None
    """Of an emulated device: a file of ``baton profile``, or a derived one."""
    time_dilation: float = 1.0
    """Everything that is emulated takes so many times as long as the profile says."""
    tp: int = 1
    """Ranks that share the heads and columns of every layer."""
    ep: int = 1
    """Ranks that share the experts: 1, or tp * dp, or any number where tp = dp = 1."""
    dp: int = 1
    """Groups of ranks with sequences and KV blocks (``num_blocks`` each) of their own."""
    exchange: ExchangeName = "auto"
    """How tokens reach experts on other dp groups."""

    def __post_init__(self) -> None:
        _positive(self, "block_size", "max_num_seqs", "num_threads")
        for name in ("num_blocks", "memory_limit_gib"):
            if getattr(self, name) is not None:
                _positive(self, name)
        if self.num_blocks is None and self.memory_limit_gib is None:
            raise ValueError(
                "num_blocks null takes what is left of memory_limit_gib, which is not set: "
                "give one of them"
            )
        _positive(self, "max_num_batched_tokens", "tp", "ep", "dp")
        if self.num_blocks is None and max(self.tp, self.ep, self.dp) > 1:
            raise ValueError("num_blocks null needs tp = ep = dp = 1: give num_blocks")
        if self.ep not in (1, self.tp * self.dp) and self.tp * self.dp != 1:
            raise ValueError(
                f"ep must be 1 or tp * dp = {self.tp * self.dp}, got {self.ep}: experts are split "
                "over all ranks of an instance or over none"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                "max_num_batched_tokens must be at least max_num_seqs "
                f"({self.max_num_batched_tokens} < {self.max_num_seqs})"
            )
        if self.max_model_len is not None and self.max_model_len < 1:
            raise ValueError(f"max_model_len must be at least 1, got {self.max_model_len}")
        self._check_emulated()

    def _check_emulated(self) -> None:
        _positive(self, "time_dilation")
        if self.device != "emulated":
            if self.profile is not None or self.time_dilation != 1.0:
                raise ValueError("profile and time_dilation are for device emulated")
            return
        if self.profile is None:
            raise ValueError("device emulated needs a profile: give the file of one")
        if max(self.tp, self.ep, self.dp) > 1:
            raise ValueError("device emulated needs tp = ep = dp = 1: a profile is of all ranks")
        if self.num_blocks is None:
            raise ValueError("device emulated needs num_blocks: nothing is there to be measured")

    @property
    def kv_blocks(self) -> int:
        """``num_blocks`` of settings in which it is a number, or has become one."""
        assert self.num_blocks is not None, "num_blocks must be measured first"
        return self.num_blocks


@dataclasses.dataclass(frozen=True, slots=True)
class RoleEngineConfig:
    """What instances started with one role have instead of the values in ``EngineConfig``.

    Only how the model is cut: blocks of differently cut instances can be turned into each other.
    """

    tp: int | None = None
    ep: int | None = None
    dp: int | None = None

    def over(self, engine: EngineConfig) -> EngineConfig:
        """``engine`` with what is set here. Raises ValueError for what makes no sense together."""
        given = {name: getattr(self, name) for name in ("tp", "ep", "dp")}
        return dataclasses.replace(
            engine, **{name: value for name, value in given.items() if value is not None}
        )


@dataclasses.dataclass(frozen=True, slots=True)
class TlsConfig:
    """Files in PEM form for mutual TLS; all three, or none for plain connections."""

    ca: str | None = None
    """Certificates of the authority that peers' certificates must come from."""
    cert: str | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        files = {"ca": self.ca, "cert": self.cert, "key": self.key}
        missing = [name for name, path in files.items() if not path]
        if missing and any(path is not None for path in files.values()):
            raise ValueError(f"TLS needs ca, cert and key: give {' and '.join(missing)} too")

    @property
    def enabled(self) -> bool:
        """Whether connections use TLS."""
        return self.ca is not None


@dataclasses.dataclass(frozen=True, slots=True)
class HandoffConfig:
    """Prefill to decode."""

    transport: TransportName = "auto"
    """``auto``: shared memory where both sides see the same arena, TCP elsewhere."""
    lease_s: float = 30.0
    """How long prefill holds blocks for a decode side that says nothing."""
    pull_timeout_s: float = 10.0
    tls: TlsConfig = dataclasses.field(default_factory=TlsConfig)
    """Of the TCP transport."""

    def __post_init__(self) -> None:
        _positive(self, "lease_s", "pull_timeout_s")


WriteBackPolicy = Literal["off", "reuse", "all"]
FetchPolicy = Literal["auto", "always", "never"]


@dataclasses.dataclass(frozen=True, slots=True)
class ExternalConfig:
    """A Mooncake Store as the lowest tier of the KV pool."""

    master: str | None = None
    """host:port of its master; none by default."""
    metadata: str = "P2PHANDSHAKE"
    """URL of its metadata server, or P2PHANDSHAKE for none."""
    protocol: str = "tcp"
    """Of Mooncake; others than tcp are untested."""
    device: str = ""
    segment_bytes: int = 0
    """Memory of each machine's pool node that the store may fill; with 0 all of it is elsewhere."""
    batch_bytes: int = 16 * 1024 * 1024
    """Moved at a time, and the largest block."""
    timeout_s: float = 1.0
    """Of each call. One that is late is a miss."""

    def __post_init__(self) -> None:
        _positive(self, "batch_bytes", "timeout_s")
        if self.segment_bytes < 0:
            raise ValueError(f"segment_bytes must not be negative, got {self.segment_bytes}")

    @property
    def enabled(self) -> bool:
        """Whether there is a store."""
        return self.master is not None


@dataclasses.dataclass(frozen=True, slots=True)
class PoolConfig:
    """The tiers of the KV pool below the instances' own caches, of each machine."""

    host_bytes: int = 128 * 1024 * 1024
    """Shared memory of the host tier; 0 for none, and then none of the lower tiers either."""
    disk_path: str | None = None
    """Folder of the disk tier; none by default."""
    disk_bytes: int = 4 * 1024 * 1024 * 1024
    write_back: WriteBackPolicy = "reuse"
    """Which complete blocks are copied to the host tier: none, all, or, once it is full, those
    asked for at least as often as what would have to go."""
    fetch: FetchPolicy = "auto"
    """When a prefix is fetched from the pool instead of computed: where that is measured to be
    faster, always, or never."""
    lease_s: float = 30.0
    """How long blocks are kept for a reader or writer that says nothing."""
    spill_after_s: float = 1.0
    """A finished prefill whose decode side has not taken its blocks for so long moves them to the
    host tier, when others need the memory."""
    external: ExternalConfig = dataclasses.field(default_factory=ExternalConfig)

    def __post_init__(self) -> None:
        _positive(self, "disk_bytes", "lease_s", "spill_after_s")
        if self.host_bytes < 0:
            raise ValueError(f"host_bytes must not be negative, got {self.host_bytes}")
        if self.disk_path is not None and not self.host_bytes:
            raise ValueError("disk_path needs a host tier: host_bytes is 0")
        if self.external.enabled and not self.host_bytes:
            raise ValueError("external needs a host tier: host_bytes is 0")


@dataclasses.dataclass(frozen=True, slots=True)
class ControllerConfig:
    """Membership and placement."""

    heartbeat_s: float = 1.0
    dead_after_s: float = 4.0
    """An instance that says nothing for so long is fenced."""
    queue_timeout_s: float = 3.0
    """How long a placement may wait for a usable pair before it is refused as retryable."""
    max_queued_placements: int = 4096
    trace_capacity: int = 10000
    """How many finished requests ``baton explain`` remembers."""
    policy: str = "slo"
    """How requests are placed: slo, least-loaded, round-robin, prefix-affinity, colocated, or
    package.module:Class of your own."""
    profile: str | None = None
    """A file of ``baton profile``: what predictions start from, until steps have been measured."""
    event_log: str | None = None
    """A file to which every event and what was decided of it is appended; none by default."""
    admission: AdmissionConfig = dataclasses.field(default_factory=AdmissionConfig)
    roles: RolesConfig = dataclasses.field(default_factory=RolesConfig)

    def __post_init__(self) -> None:
        _positive(self, "heartbeat_s", "dead_after_s", "queue_timeout_s")
        _positive(self, "max_queued_placements", "trace_capacity")
        if self.dead_after_s <= self.heartbeat_s:
            raise ValueError("dead_after_s must be longer than heartbeat_s")


@dataclasses.dataclass(frozen=True, slots=True)
class GatewayConfig:
    """The front door."""

    max_body_bytes: int = 4 * 1024 * 1024
    max_n: int = 16
    default_max_tokens: int = 128
    default_timeout_s: float = 600.0
    max_replays: int = 3
    gap_timeout_s: float = 20.0
    """Silence on a request that should be producing tokens for so long causes a replay."""
    replay_timeout_s: float = 3.0
    """After an instance died: how long a new placement may take before the client is told. Short
    of five seconds, within which it should be told: what comes after a late one is recomputed."""

    def __post_init__(self) -> None:
        _positive(self, "max_body_bytes", "max_n", "default_max_tokens", "default_timeout_s")
        _positive(self, "gap_timeout_s", "replay_timeout_s")
        if self.max_replays < 0:
            raise ValueError(f"max_replays must not be negative, got {self.max_replays}")


@dataclasses.dataclass(frozen=True, slots=True)
class ServeConfig:
    """Everything ``baton serve`` needs; the file's top level."""

    model: str
    served_model_name: str | None = None
    """What clients call the model; default: the folder's name."""
    prefill: int = 1
    decode: int = 1
    mixed: int = 0
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    store: str = "memory"
    """``memory`` (one machine) or ``redis://host:port/db``."""
    address: str | None = None
    """An existing Ray cluster; default: an embedded one."""
    cluster: str = "default"
    """Names the cluster in the store and in shared memory."""
    resources: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    """Ray resources per role (prefill, decode, mixed), to pin roles to nodes."""
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    prefill_engine: RoleEngineConfig = dataclasses.field(default_factory=RoleEngineConfig)
    decode_engine: RoleEngineConfig = dataclasses.field(default_factory=RoleEngineConfig)
    handoff: HandoffConfig = dataclasses.field(default_factory=HandoffConfig)
    pool: PoolConfig = dataclasses.field(default_factory=PoolConfig)
    controller: ControllerConfig = dataclasses.field(default_factory=ControllerConfig)
    service: ServiceConfig = dataclasses.field(default_factory=ServiceConfig)
    gateway: GatewayConfig = dataclasses.field(default_factory=GatewayConfig)

    def __post_init__(self) -> None:
        if min(self.prefill, self.decode, self.mixed) < 0:
            raise ValueError("prefill, decode and mixed must not be negative")
        has_prefill = self.prefill + self.mixed > 0
        has_decode = self.decode + self.mixed > 0
        if not (has_prefill and has_decode):
            raise ValueError(
                "at least one instance must take prefill and one must take decode: "
                f"prefill={self.prefill} decode={self.decode} mixed={self.mixed}"
            )
        if self.store != "memory" and not self.store.startswith(("redis://", "rediss://")):
            raise ValueError(f"store must be memory or redis://..., got {self.store!r}")
        if self.pool.host_bytes and self.pool.lease_s <= self.handoff.lease_s / 3:
            raise ValueError(
                "pool.lease_s must be longer than a third of handoff.lease_s, as often as which "
                f"leases are renewed: {self.pool.lease_s} and {self.handoff.lease_s}"
            )
        for name in ("http_port", "grpc_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise ValueError(f"{name} must be between 0 and 65535, got {getattr(self, name)}")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", self.cluster):
            raise ValueError(
                "cluster must be 1 to 63 letters, digits, '_', '.' or '-', and begin with a letter "
                f"or digit, got {self.cluster!r}"
            )
        for name in ("model", "host", "served_model_name", "address"):
            if getattr(self, name) == "":
                raise ValueError(f"{name} must not be empty")
        for role, needs in self.resources.items():
            for resource, amount in needs.items():
                if not (amount > 0 and math.isfinite(amount)):
                    raise ValueError(
                        f"resources.{role}.{resource} must be positive and finite, got {amount}"
                    )
        unknown = set(self.resources) - {"prefill", "decode", "mixed"}
        if unknown:
            raise ValueError(f"resources knows prefill, decode and mixed, not {sorted(unknown)}")
        for role in ("prefill", "decode"):
            try:
                self.engine_of(role)
            except ValueError as error:
                raise ValueError(f"{role}_engine: {error}") from None

    def engine_of(self, role: str) -> EngineConfig:
        """The engine of instances that are started with ``role``; they keep it in other roles."""
        own = {"prefill": self.prefill_engine, "decode": self.decode_engine}.get(role)
        return self.engine if own is None else own.over(self.engine)


def _positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be positive and finite, got {value}")
