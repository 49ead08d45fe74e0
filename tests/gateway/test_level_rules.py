"""Which service level a request gets, and what it may not ask for. Pure."""

from __future__ import annotations

import math
from typing import Any

import pytest

from baton.core.errors import InvalidRequest
from baton.core.policy_config import ServiceClassConfig, ServiceConfig
from baton.core.slo import ServiceLevel, Slo
from baton.gateway.service_levels import (
    AskedLevel,
    bearer_key,
    resolve_level,
    tenant_of,
    with_headers,
)

CLASSES = {
    "chat": ServiceClassConfig(ttft_s=1.0, tpot_s=0.05, priority=2),
    "fast": ServiceClassConfig(ttft_s=1.0, tpot_s=0.05, min_ttft_s=0.2, min_tpot_s=0.01),
    "night": ServiceClassConfig(priority=-1, deadline_s=3600.0, max_priority=1),
}
SERVICE = ServiceConfig(classes=CLASSES, default="chat", api_keys={"k-night": "night"})
NO_DEFAULT = ServiceConfig(classes=CLASSES)
CHAT = ServiceLevel("chat", Slo(1.0, 0.05), 2, None)
NIGHT = ServiceLevel("night", Slo(), -1, 3600.0)


def level(config: ServiceConfig = SERVICE, **asked: Any) -> ServiceLevel:
    return resolve_level(config, AskedLevel(**asked))


def test_named_before_key_before_default() -> None:
    assert level() == CHAT
    assert level(api_key="k-night") == NIGHT
    assert level(api_key="k-unknown") == CHAT
    assert level(api_key="k-night", service_class="chat") == CHAT
    assert level(NO_DEFAULT) == ServiceLevel()


def test_within_the_limits_a_request_may_ask() -> None:
    asked = level(service_class="fast", ttft_s=0.2, tpot_s=0.02, priority=-3)
    assert asked == ServiceLevel("fast", Slo(0.2, 0.02), -3)
    assert level(ttft_s=30.0).slo == Slo(30.0, 0.05), "less than the class promises is always free"
    assert level(service_class="night", deadline_s=60.0).deadline_s == 60.0
    online = level(service_class="night", priority=1)
    assert (online.priority, online.deadline_s, online.is_offline) == (1, None, False)


BEYOND: list[tuple[dict[str, Any], list[str], str]] = [
    ({"service_class": "chats"}, ["'chats'", "chat, fast, night"], "service_class"),
    ({"ttft_s": 0.9}, ["0.9", "service class chat", "no less than 1"], "ttft_s"),
    ({"tpot_s": 0.049}, ["0.049", "no less than 0.05"], "tpot_s"),
    ({"service_class": "fast", "ttft_s": 0.1}, ["no less than 0.2"], "ttft_s"),
    ({"service_class": "night", "ttft_s": 9.0}, ["night", "no such target"], "ttft_s"),
    ({"priority": 3}, ["3", "no more than 2"], "priority"),
    ({"service_class": "night", "priority": 2}, ["no more than 1"], "priority"),
    ({"deadline_s": 60.0}, ["offline", "priority 2"], "deadline_s"),
    ({"ttft_s": math.inf}, ["positive number of seconds"], "ttft_s"),
]


@pytest.mark.parametrize(("asked", "words", "param"), BEYOND, ids=[str(b[0]) for b in BEYOND])
def test_beyond_the_limits_it_is_told_the_limit(
    asked: dict[str, Any], words: list[str], param: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        level(**asked)
    assert caught.value.param == param
    for word in words:
        assert word in caught.value.message


def test_without_a_class_among_classes_nothing_may_be_asked_for() -> None:
    assert level(NO_DEFAULT, priority=-1).is_offline
    for asked in ({"ttft_s": 1.0}, {"tpot_s": 1.0}, {"priority": 1}):
        with pytest.raises(InvalidRequest, match="of no service class"):
            level(NO_DEFAULT, **asked)


def test_without_classes_everything_may_be_asked_for() -> None:
    free = ServiceConfig()
    assert level(free) == ServiceLevel()
    asked = level(free, ttft_s=0.001, tpot_s=0.001, priority=99, api_key="k")
    assert asked == ServiceLevel("", Slo(0.001, 0.001), 99)
    assert level(free, deadline_s=5.0, priority=-1).deadline_s == 5.0
    for asked_s in (0.0, -1.0, math.nan):
        with pytest.raises(InvalidRequest):
            level(free, ttft_s=asked_s)
    with pytest.raises(InvalidRequest, match="there are: none"):
        level(free, service_class="chat")


def test_headers_and_body_together() -> None:
    headers = {
        "x-baton-class": "chat",
        "x-baton-ttft-ms": "1500",
        "x-baton-tpot-ms": "60",
        "x-baton-deadline-s": "60",
        "authorization": "Bearer k-1",
    }
    assert with_headers(AskedLevel(priority=1), headers) == AskedLevel(
        "chat", "k-1", 1.5, 0.06, 60.0, 1
    )
    same = AskedLevel(service_class="chat", ttft_s=1.5)
    assert with_headers(same, headers).ttft_s == 1.5
    with pytest.raises(InvalidRequest) as caught:
        with_headers(AskedLevel(ttft_s=1.0), headers)
    assert caught.value.param == "ttft_s"
    for wrong in ("", "fast", "0", "-5", "inf", "nan"):
        with pytest.raises(InvalidRequest) as caught:
            with_headers(AskedLevel(), {"x-baton-ttft-ms": wrong})
        assert caught.value.param == "x-baton-ttft-ms"


def test_keys_and_tenants() -> None:
    assert bearer_key("Bearer k-1") == bearer_key("bearer  k-1 ") == "k-1"
    for nothing in (None, "", "Bearer", "Bearer ", "Basic dXNlcjpwdw=="):
        assert bearer_key(nothing) is None
    assert tenant_of(None, "") == ""
    assert tenant_of("k-1", "") == tenant_of("k-1", "salt") != tenant_of(None, "salt") != ""
    assert "k-1" not in tenant_of("k-1", "")
