"""Settings of service levels, placement and roles; part of ``ServeConfig``."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Literal

RoleMode = Literal["auto", "advise", "off"]


@dataclasses.dataclass(frozen=True, slots=True)
class ServiceClassConfig:
    """What requests of one class are promised."""

    ttft_s: float | None = None
    """Time to first token; none by default."""
    tpot_s: float | None = None
    """Time per output token after the first; none by default."""
    priority: int = 0
    """Higher goes first. Below 0: offline work, which yields to all others at once."""
    deadline_s: float | None = None
    """Offline work is to be finished so long after it arrived."""
    min_ttft_s: float | None = None
    """The smallest target that a request may ask for itself; default: the class's own."""
    min_tpot_s: float | None = None
    max_priority: int | None = None
    """The highest priority that a request may ask for itself; default: the class's own, or any
    where no class is configured."""
    weight: float = 1.0
    """Share of a tenant of this class when tenants compete in the queue."""

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s", "deadline_s", "min_ttft_s", "min_tpot_s", "weight"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {value}")


@dataclasses.dataclass(frozen=True, slots=True)
class ServiceConfig:
    """Classes of service, and who gets which."""

    classes: dict[str, ServiceClassConfig] = dataclasses.field(default_factory=dict)
    default: str | None = None
    """The class of requests that name none; none by default: no targets."""
    api_keys: dict[str, str] = dataclasses.field(default_factory=dict)
    """API key to class. A request that names a class itself wins. Not authentication."""

    def __post_init__(self) -> None:
        for name in self.classes:
            # It stands in headers and is a label of metrics, where "none" is no class.
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", name) or name == "none":
                raise ValueError(
                    "classes: a name must be 1 to 63 letters, digits, '_', '.' or '-', begin with "
                    f"a letter or digit, and not be 'none', got {name!r}"
                )
        named = {"default": self.default, **{f"api_keys.{k}": v for k, v in self.api_keys.items()}}
        for name, value in named.items():
            if value is not None and value not in self.classes:
                known = ", ".join(sorted(self.classes)) or "none"
                raise ValueError(f"{name} is {value!r}, which is no class; there are: {known}")


@dataclasses.dataclass(frozen=True, slots=True)
class AdmissionConfig:
    """What is done with more requests than the cluster can serve within their targets."""

    max_ttft_factor: float | None = None
    """A request whose predicted TTFT is above so many times its target is shed (429). ``None``: it
    is placed all the same."""
    max_open_per_instance: int | None = None
    """Open requests that an instance may have as prefill side, and as decode side; what comes
    beyond waits in the controller, tenants in turn. ``None``: it waits in the instances."""
    online_attainment: float = 0.95
    """With less of the online requests within their targets, offline work goes one at a time."""
    offline_wait_s: float = 3600.0
    """How long offline work may wait for its place, if the request's own time allows it."""

    def __post_init__(self) -> None:
        for name in ("max_ttft_factor", "max_open_per_instance", "offline_wait_s"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if not 0 <= self.online_attainment <= 1:
            raise ValueError(f"online_attainment must be 0 to 1, got {self.online_attainment}")


@dataclasses.dataclass(frozen=True, slots=True)
class RolesConfig:
    """When the cluster switches roles by itself."""

    mode: RoleMode = "auto"
    """``auto`` switches, ``advise`` only says what it would do (log and metrics), ``off``."""
    interval_s: float = 1.0
    """How often the planner looks, while requests are open."""
    cooldown_s: float = 10.0
    """Between two switches in a flip group, unless targets are being missed by far."""
    min_prefill: int = 1
    """Instances that always take prefill, in each flip group."""
    min_decode: int = 1
    """Instances that always take decode, in each flip group."""
    allow_mixed: bool = True
    """Whether an instance may be made mixed."""
    gain: float = 0.05
    """A switch must promise at least so much more attainment, so that noise moves nothing."""

    def __post_init__(self) -> None:
        for name in ("interval_s", "cooldown_s"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        for name in ("min_prefill", "min_decode"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.gain < 1:
            raise ValueError(f"gain must be from 0 to below 1, got {self.gain}")
