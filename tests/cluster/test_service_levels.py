"""Service classes on a running cluster, with the clients that people use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from baton.client import BatonClient, generate_request
from baton.core.errors import InvalidRequest
from tests.cluster.harness import DEMO_MODEL, Cluster, metrics, serving, wait_until

SERVICE = {
    "default": "standard",
    "classes": {
        "interactive": {"ttft_s": 60.0, "tpot_s": 30.0, "priority": 1, "min_ttft_s": 0.001},
        "standard": {"ttft_s": 120.0},
        "batch": {"priority": -1, "deadline_s": 600.0},
    },
    "api_keys": {"key-of-the-chat-app": "interactive", "key-of-the-job": "batch"},
}
PROMPT = "import os\n\n\ndef main(argv):\n"
MODEL = DEMO_MODEL.name


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with serving("--prefill", "1", "--decode", "1", settings={"service": SERVICE}) as running:
        yield running


def counted(cluster: Cluster) -> dict[tuple[str, str], float]:
    """(class, outcome) → requests, those that there were none of left out."""
    values = metrics(cluster.http)
    found = {}
    for name in (*SERVICE["classes"], "none"):
        for outcome in ("met", "missed", "failed", "shed", "aborted"):
            labels = f"outcome={outcome},service_class={name}"
            found[name, outcome] = values[f"baton_requests_slo_total{{{labels}}}"]
    return {key: value for key, value in found.items() if value}


def ask(client: OpenAI, *, headers: dict[str, str] | None = None, **extra: Any) -> str:
    """The request's id."""
    answer = client.completions.with_raw_response.create(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=8,
        temperature=0,
        extra_headers=headers,
        extra_body={"ignore_eos": True, **extra},
    )
    return str(answer.headers["x-request-id"])


def explained(cluster: Cluster, request_id: str) -> dict[str, Any]:
    """What ``baton explain --json`` says once the request's end has been reported."""
    found: dict[str, Any] = {}

    def ended() -> bool:
        result = cluster.command("explain", request_id, "--json")
        found.update(json.loads(result.stdout) if result.returncode == 0 else {})
        return bool(found.get("outcome", "open") != "open")

    wait_until(ended, timeout_s=20.0, what="the outcome is known")
    return found


def test_classes_from_clients_to_metrics(cluster: Cluster) -> None:
    def openai(key: str) -> OpenAI:
        return OpenAI(base_url=f"{cluster.url}/v1", api_key=key, max_retries=0)

    nobody, app = openai("none"), openai("key-of-the-chat-app")
    expected: dict[tuple[str, str], float] = {}

    def one_more(name: str, outcome: str = "met") -> None:
        expected[name, outcome] = expected.get((name, outcome), 0) + 1
        wait_until(
            lambda: counted(cluster) == expected, timeout_s=10.0, what=f"{name} was {outcome}"
        )

    ask(nobody)
    one_more("standard")
    by_key = ask(app)
    one_more("interactive")
    ask(nobody, headers={"x-baton-class": "interactive"})
    one_more("interactive")
    ask(app, service_class="batch")
    one_more("batch")

    # Its own wish, within the limits: nobody computes a prompt in 1 ms.
    late = ask(nobody, headers={"x-baton-class": "interactive", "x-baton-ttft-ms": "1"})
    one_more("interactive", "missed")
    ask(app, tpot_s=40.0, priority=0)
    one_more("interactive")

    with pytest.raises(BadRequestError, match="no less than 120"):
        ask(nobody, headers={"x-baton-ttft-ms": "500"})
    with pytest.raises(BadRequestError, match="no more than 1"):
        ask(app, priority=2)
    with pytest.raises(BadRequestError, match="batch, interactive, standard"):
        ask(nobody, service_class="premium")

    with BatonClient(cluster.grpc, api_key="key-of-the-job") as client:
        request = generate_request(PROMPT, max_tokens=8, deadline_s=60.0)
        assert list(client.generate(request, timeout_s=60.0))
        one_more("batch")
        named = generate_request(PROMPT, max_tokens=8, service_class="interactive", tpot_s=30.0)
        assert list(client.generate(named, timeout_s=60.0))
        one_more("interactive")
        refused = generate_request(PROMPT, max_tokens=8, ttft_s=1.0)
        with pytest.raises(InvalidRequest, match="no such target"):
            list(client.generate(refused, timeout_s=60.0))

    values = metrics(cluster.http)
    assert values["baton_slo_attainment{service_class=batch}"] == 1.0
    assert 0.7 < values["baton_slo_attainment{service_class=interactive}"] < 0.9
    assert values["baton_slo_misses_total{service_class=interactive,target=ttft}"] == 1

    good, bad = explained(cluster, by_key), explained(cluster, late)
    assert (good["service_class"], good["met"]) == ("interactive", True)
    assert (bad["service_class"], bad["met"]) == ("interactive", False)
    shown = cluster.command("explain", late).stdout
    assert "class interactive" in shown
    assert "targets missed" in shown
