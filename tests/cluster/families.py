"""Tiny checkpoints of all families, served by a cluster and compared with ``transformers``."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from tests.cluster.harness import DEMO_MODEL, Cluster, body, complete_all, metrics, serving
from tests.engine.same_tokens import LOGIT_TIE, random_prompt
from tests.engine.tiny_models import VARIANTS, reference_logprobs, save

LENGTHS = (1, 15, 16, 17, 33, 130, 257, 431, 600)


def check_served(
    variant: str,
    folder: Path,
    *flags: str,
    num_tokens: int,
    engine: dict[str, int] | None = None,
) -> list[str]:
    """Serve ``variant`` with ``flags``; all greedy tokens are the reference's but for the ties
    that are returned. Every request of a pair must have been handed off, none recomputed."""
    reference = save(folder, VARIANTS[variant])
    for file in DEMO_MODEL.glob("tokenizer*"):
        shutil.copy(file, folder)
    settings = {"engine": {"num_blocks": 512, **(engine or {})}}
    prompts = [random_prompt(length) for length in LENGTHS]
    name = ("--served-model-name", DEMO_MODEL.name)
    with serving(*flags, *name, model=folder, settings=settings) as cluster:
        requests = [body(prompt, max_tokens=num_tokens) for prompt in prompts]
        replies = asyncio.run(complete_all(cluster, requests, concurrency=4))
        errors = [reply.error for reply in replies if reply.error is not None]
        assert not errors, errors
        if "--mixed" not in flags:
            arrived = _handoffs(cluster)
            assert arrived == len(prompts), f"{arrived} of {len(prompts)} handoffs arrived"
    ties = []
    for prompt, reply in zip(prompts, replies, strict=True):
        assert len(reply.token_ids) == num_tokens
        expected = reference_logprobs(reference, prompt + reply.token_ids)[len(prompt) - 1 : -1]
        for index, (token, row) in enumerate(zip(reply.token_ids, expected, strict=True)):
            gap = float(row.max() - row[token])
            assert gap < LOGIT_TIE, f"{variant}: wrong token {index} after {len(prompt)}: {gap}"
            if gap:
                ties.append(f"{variant}: prompt of {len(prompt)} tokens, token {index}: {gap:.1e}")
    return ties


def _handoffs(cluster: Cluster) -> float:
    """Requests whose KV arrived whole at a decode instance."""
    name = "baton_handoffs_total{result=arrived,side=decode}"
    return sum(metrics(item.metrics_address)[name] for item in cluster.live_instances())
