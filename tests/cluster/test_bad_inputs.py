"""Bad input to a running cluster: refused as in the gateway tables; the next request works."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import pytest
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from baton.client import BatonClient, generate_request
from baton.core.errors import BatonError
from tests.cluster.harness import Cluster, assert_nothing_held, serving
from tests.gateway import test_bad_grpc, test_bad_http
from tests.gateway.gateway_support import CONTEXT, EOS, VOCAB, build_tokenizer

GOOD = {"model": "tiny", "prompt": "def", "max_tokens": 1, "ignore_eos": True}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster with the limits that the gateway's tables are written for."""
    folder = tmp_path_factory.mktemp("tiny")
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        max_position_embeddings=CONTEXT,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        eos_token_id=EOS,
        tie_word_embeddings=True,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    build_tokenizer().save_pretrained(str(folder))
    settings = {
        "served_model_name": "tiny",
        "gateway": {"max_body_bytes": test_bad_http.MAX_BODY, "max_n": 4},
    }
    with serving(model=folder, settings=settings) as cluster:
        yield cluster


def test_http_table(tiny: Cluster) -> None:
    assert len(test_bad_http.TABLE) >= 40

    async def run() -> None:
        async with httpx.AsyncClient(base_url=tiny.url, timeout=30.0) as client:
            for path, body, status, param, code in test_bad_http.TABLE:
                answer = await client.post(
                    path,
                    content=test_bad_http.body_of(path, body),
                    headers={"content-type": "application/json"},
                )
                error = answer.json()["error"]
                assert (answer.status_code, error["param"], error["code"]) == (status, param, code)
                after = await client.post("/v1/completions", json=GOOD)
                assert after.status_code == 200, after.text
                assert after.json()["usage"]["completion_tokens"] == 1

    asyncio.run(run())
    assert_nothing_held(tiny, within_s=5.0)


def test_grpc_table(tiny: Cluster) -> None:
    with BatonClient(tiny.grpc) as client:
        for prompt, fields, code, param in test_bad_grpc.TABLE:
            with pytest.raises(BatonError) as caught:
                list(client.generate(generate_request(prompt, **fields), timeout_s=30.0))
            assert (caught.value.code, caught.value.param) == (code, param)
            good = generate_request("def", max_tokens=1, ignore_eos=True)
            [chunk] = client.generate(good, timeout_s=30.0)
            assert chunk.completion_tokens == 1
    assert_nothing_held(tiny, within_s=5.0)
