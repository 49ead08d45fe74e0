"""Tiny checkpoints of all families, served by a cluster and compared with ``transformers``."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
    roles: dict[str, dict[str, int]] | None = None,
    options: dict[str, Any] | None = None,
    look: Callable[[Cluster], None] = lambda cluster: None,
) -> list[str]:
    """Serve ``variant`` with ``flags``; all greedy tokens are the reference's but for the ties
    that are returned. Every request of a pair must have been handed off, none recomputed.

    ``roles``: engine settings by role. ``options``: changes of the variant. ``look``: called while
    the cluster is up, after the requests.
    """
    reference = save(folder, VARIANTS[variant] | (options or {}))
    for file in DEMO_MODEL.glob("tokenizer*"):
        shutil.copy(file, folder)
    settings = {"engine": {"num_blocks": 512, **(engine or {})}}
    settings |= {f"{role}_engine": own for role, own in (roles or {}).items()}
    prompts = [random_prompt(length) for length in LENGTHS]
    name = ("--served-model-name", DEMO_MODEL.name)
    with serving(*flags, *name, model=folder, settings=settings) as cluster:
        requests = [body(prompt, max_tokens=num_tokens) for prompt in prompts]
        replies = asyncio.run(complete_all(cluster, requests, concurrency=4))
        errors = [reply.error for reply in replies if reply.error is not None]
        assert not errors, errors
        if "--mixed" not in flags:
            arrived = _handoffs(cluster, "arrived")
            assert arrived == len(prompts), f"{arrived} of {len(prompts)} handoffs arrived"
            recomputed = _handoffs(cluster, "recomputed")
            assert not recomputed, f"{recomputed} of {len(prompts)} prompts were recomputed"
        look(cluster)
    ties = []
    for prompt, reply in zip(prompts, replies, strict=True):
        assert len(reply.token_ids) == num_tokens
        ties += [f"{variant}: {tie}" for tie in check_greedy(reference, prompt, reply.token_ids)]
    return ties


def check_greedy(reference: Any, prompt: Sequence[int], tokens: Sequence[int]) -> list[str]:
    """Every token is the reference's best, but for the ties that are returned."""
    ties = []
    rows = reference_logprobs(reference, [*prompt, *tokens])[len(prompt) - 1 : -1]
    for index, (token, row) in enumerate(zip(tokens, rows, strict=True)):
        gap = float(row.max() - row[token])
        assert gap < LOGIT_TIE, f"wrong token {index} after {len(prompt)}: {gap}"
        if gap:
            ties.append(f"prompt of {len(prompt)} tokens, token {index}: {gap:.1e}")
    return ties


def _handoffs(cluster: Cluster, result: str) -> float:
    """Requests that came to a decode instance, by what became of their KV."""
    name = f"baton_handoffs_total{{result={result},side=decode}}"
    return sum(metrics(item.metrics_address)[name] for item in cluster.live_instances())
