"""Which service level a request gets: of its class, its key, and what it asks for itself. Pure."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from typing import Any

from baton.core.errors import InvalidRequest
from baton.core.policy_config import ServiceClassConfig, ServiceConfig
from baton.core.slo import ServiceLevel, Slo

_FREE = ServiceClassConfig(priority=0)
_TENANT_BYTES = 8
_HEADERS = {
    "x-baton-ttft-ms": ("ttft_s", 1000.0),
    "x-baton-tpot-ms": ("tpot_s", 1000.0),
    "x-baton-deadline-s": ("deadline_s", 1.0),
}
"""HTTP header to field, and how many of the header's unit a second has."""


@dataclasses.dataclass(frozen=True, slots=True)
class AskedLevel:
    """What a request says of its service level; ``None`` where it says nothing."""

    service_class: str | None = None
    api_key: str | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    deadline_s: float | None = None
    priority: int | None = None


def resolve_level(config: ServiceConfig, asked: AskedLevel) -> ServiceLevel:
    """The class that is named, else the API key's, else the default; and what it asks instead.

    Where no class is configured, a request may ask for anything. Where there are classes and a
    request is of none, it has no targets and may ask for none. Raises InvalidRequest that names
    the limit, or the classes that there are.
    """
    name = _class_of(config, asked)
    known = _FREE if name is None else config.classes[name]
    if config.classes:
        _check_limits(name, known, asked)
    for field in ("ttft_s", "tpot_s", "deadline_s"):
        value = getattr(asked, field)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise InvalidRequest(
                f"{field} must be a positive number of seconds, got {value:g}", param=field
            )
    priority = known.priority if asked.priority is None else asked.priority
    if asked.deadline_s is not None and priority >= 0:
        raise InvalidRequest(
            f"deadline_s is for offline work (priority below 0); this has priority {priority}",
            param="deadline_s",
        )
    return ServiceLevel(
        service_class=name or "",
        slo=Slo(
            known.ttft_s if asked.ttft_s is None else asked.ttft_s,
            known.tpot_s if asked.tpot_s is None else asked.tpot_s,
        ),
        priority=priority,
        deadline_s=_first(asked.deadline_s, known.deadline_s) if priority < 0 else None,
    )


def with_headers(body: AskedLevel, headers: Mapping[str, str]) -> AskedLevel:
    """What an HTTP request asks for in its body and in its headers together.

    Raises InvalidRequest for a header that is no number, or that differs from the body.
    """
    found: dict[str, Any] = {}
    if "x-baton-class" in headers:
        found["service_class"] = headers["x-baton-class"]
    for header, (field, num_units) in _HEADERS.items():
        if header in headers:
            found[field] = _positive(headers[header], header) / num_units
    for field, value in found.items():
        if getattr(body, field) not in (None, value):
            raise InvalidRequest(f"{field} differs from the header of that meaning", param=field)
    return dataclasses.replace(body, api_key=bearer_key(headers.get("authorization")), **found)


def tenant_of(api_key: str | None, cache_salt: str) -> str:
    """Who shares the cluster with whom: by the API key, else by the cache salt; empty for nobody.

    A digest: keys and salts are secrets, and this goes into logs and traces.
    """
    named = api_key or cache_salt
    return hashlib.blake2b(named.encode(), digest_size=_TENANT_BYTES).hexdigest() if named else ""


def bearer_key(authorization: str | None) -> str | None:
    """The key of ``Bearer KEY``; ``None`` without one."""
    scheme, _, key = (authorization or "").strip().partition(" ")
    return (key.strip() or None) if scheme.lower() == "bearer" else None


def _class_of(config: ServiceConfig, asked: AskedLevel) -> str | None:
    if asked.service_class:
        if asked.service_class not in config.classes:
            known = ", ".join(sorted(config.classes)) or "none"
            raise InvalidRequest(
                f"there is no service class {asked.service_class!r}; there are: {known}",
                param="service_class",
            )
        return asked.service_class
    return config.api_keys.get(asked.api_key or "", config.default)


def _check_limits(name: str | None, known: ServiceClassConfig, asked: AskedLevel) -> None:
    where = f"service class {name}" if name is not None else "a request of no service class"
    lows = (
        ("ttft_s", asked.ttft_s, _first(known.min_ttft_s, known.ttft_s)),
        ("tpot_s", asked.tpot_s, _first(known.min_tpot_s, known.tpot_s)),
    )
    for field, value, low in lows:
        if value is None:
            continue
        if low is None:
            raise InvalidRequest(
                f"{field} is {value:g}, but {where} has no such target and may ask for none",
                param=field,
            )
        if value < low:
            raise InvalidRequest(
                f"{field} is {value:g}, but {where} may ask for no less than {low:g}", param=field
            )
    high = known.priority if known.max_priority is None else known.max_priority
    if asked.priority is not None and asked.priority > high:
        raise InvalidRequest(
            f"priority is {asked.priority}, but {where} may ask for no more than {high}",
            param="priority",
        )


def _positive(text: str, header: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not (value > 0 and math.isfinite(value)):
        raise InvalidRequest(f"must be a positive number, got {text!r}", param=header)
    return value


def _first(asked: float | None, known: float | None) -> float | None:
    return known if asked is None else asked
