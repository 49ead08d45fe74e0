"""Every kind of sampling gives the same across a handoff as on one instance; bf16 is bounded."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import numpy as np

from tests.cluster import oracle
from tests.cluster.harness import Cluster, body, complete_all, metrics, serving

NUM_TOKENS = 24
KINDS: dict[str, dict[str, Any]] = {
    "top_p": {"temperature": 0.9, "top_p": 0.8, "seed": 1},
    "min_p": {"temperature": 1.2, "min_p": 0.1, "seed": 2},
    "top_k and top_p": {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "seed": 3},
    "repetition": {"repetition_penalty": 1.3},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.7},
    "all penalties, drawn": {
        "temperature": 0.8,
        "top_k": 30,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "seed": 4,
    },
    "logprobs": {"logprobs": 5},
    "choices": {"n": 3, "temperature": 0.8, "top_k": 20, "seed": 5},
}


def _ask(cluster: Cluster) -> dict[str, list[dict[str, Any]]]:
    """All kinds at once, without streaming: the choices of each."""
    prompts = oracle.prompts(len(KINDS), longest=400)

    async def run() -> list[dict[str, Any]]:
        async with httpx.AsyncClient(base_url=cluster.url, timeout=60.0) as client:
            replies = await asyncio.gather(
                *(
                    client.post(
                        "/v1/completions",
                        json=body(prompt, max_tokens=NUM_TOKENS, stream=False) | kind,
                    )
                    for prompt, kind in zip(prompts, KINDS.values(), strict=True)
                )
            )
        for reply in replies:
            assert reply.status_code == 200, reply.text
        return [reply.json() for reply in replies]

    return {
        kind: sorted(reply["choices"], key=lambda choice: int(choice["index"]))
        for kind, reply in zip(KINDS, asyncio.run(run()), strict=True)
    }


def test_a_handoff_changes_nothing(pair: Cluster) -> None:
    apart = _ask(pair)
    with serving("--prefill", "0", "--decode", "0", "--mixed", "1") as mixed:
        whole = _ask(mixed)
    for kind in KINDS:
        assert [c["token_ids"] for c in apart[kind]] == [c["token_ids"] for c in whole[kind]], kind
        assert all(len(c["token_ids"]) == NUM_TOKENS for c in apart[kind])
    assert len({tuple(choice["token_ids"]) for choice in apart["choices"]}) == 3
    [one], [other] = apart["logprobs"], whole["logprobs"]
    assert one["logprobs"]["tokens"] == other["logprobs"]["tokens"]
    np.testing.assert_allclose(
        one["logprobs"]["token_logprobs"], other["logprobs"]["token_logprobs"], atol=1e-4
    )
    assert all(len(top) >= 5 for top in one["logprobs"]["top_logprobs"])


def test_penalties_do_something(pair: Cluster) -> None:
    """Against the same request without them, so that the equality above is not of nothing."""
    prompts = oracle.prompts(len(KINDS), longest=400)
    plain = [body(prompt, max_tokens=NUM_TOKENS) for prompt in prompts[3:6]]
    replies = asyncio.run(complete_all(pair, plain, concurrency=3))
    apart = _ask(pair)
    kinds = ("repetition", "presence", "frequency")
    changed = [
        reply.token_ids != apart[kind][0]["token_ids"]
        for reply, kind in zip(replies, kinds, strict=True)
    ]
    assert any(changed)


MEAN_LOGPROB_ERROR, MAX_LOGPROB_ERROR = 0.05, 1.0
"""bf16 against the fp32 oracle, teacher-forced on what bf16 chose."""


def test_bf16_through_a_handoff() -> None:
    prompts = oracle.prompts(8, longest=600)
    requests = [body(prompt, max_tokens=NUM_TOKENS, stream=False, logprobs=0) for prompt in prompts]

    async def run(cluster: Cluster) -> list[dict[str, Any]]:
        async with httpx.AsyncClient(base_url=cluster.url, timeout=60.0) as client:
            replies = await asyncio.gather(
                *(client.post("/v1/completions", json=request) for request in requests)
            )
        return [reply.json()["choices"][0] for reply in replies]

    with serving("--prefill", "1", "--decode", "1", "--dtype", "bfloat16") as cluster:
        choices = asyncio.run(run(cluster))
        decode = next(item for item in cluster.live_instances() if item.role == "decode")
        values = metrics(decode.metrics_address)
        assert values["baton_handoffs_total{result=arrived,side=decode}"] == len(prompts)
        assert values["baton_handoffs_total{result=recomputed,side=decode}"] == 0
    errors: list[float] = []
    for prompt, choice in zip(prompts, choices, strict=True):
        logits = oracle.forced(prompt, choice["token_ids"]).logits
        shifted = logits - logits.max(-1, keepdims=True)
        logprobs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        expected = logprobs[np.arange(NUM_TOKENS), choice["token_ids"]]
        errors += np.abs(expected - choice["logprobs"]["token_logprobs"]).tolist()
    assert np.mean(errors) < MEAN_LOGPROB_ERROR, np.mean(errors)
    assert np.max(errors) < MAX_LOGPROB_ERROR, np.max(errors)
