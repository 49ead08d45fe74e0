"""The largest steps run for every family and for odd shapes, and leave nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from baton.core.config import EngineConfig
from baton.engine.checkpoint import open_checkpoint
from baton.engine.devices import OutOfMemory
from baton.engine.models.config import kv_layout
from baton.engine.plan import SequenceStep, SlotBegin, StepPlan
from baton.engine.runner import InlineRunner
from tests.engine.tiny_models import DEEPSEEK_V3, DENSE, GREEDY, LLAMA, MOE, save

MODELS = {"dense": DENSE, "moe": MOE, "llama": LLAMA, "latent": DEEPSEEK_V3}
SMALL: dict[str, Any] = {"block_size": 4, "num_blocks": 64}


@pytest.mark.parametrize("name", MODELS)
def test_every_family(name: str, tmp_path: Path) -> None:
    save(tmp_path, MODELS[name])
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=64, **SMALL)
    runner = InlineRunner(open_checkpoint(tmp_path), config)
    needs = runner.profile()
    assert needs.block_bytes == kv_layout(open_checkpoint(tmp_path).config, config).block_bytes
    assert needs.held > 0
    assert 0 <= needs.transient < 256 * 2**20
    assert runner.fit() == config


@pytest.mark.parametrize(
    ("max_model_len", "seqs", "tokens"), [(1, 1, 1), (2, 3, 3), (3, 1, 8), (40, 8, 8), (250, 2, 7)]
)
def test_odd_shapes(tmp_path: Path, max_model_len: int, seqs: int, tokens: int) -> None:
    save(tmp_path, DENSE)
    config = EngineConfig(
        max_model_len=max_model_len, max_num_seqs=seqs, max_num_batched_tokens=tokens, **SMALL
    )
    InlineRunner(open_checkpoint(tmp_path), config).profile()


def test_longer_contexts_and_more_rows_need_more(tmp_path: Path) -> None:
    """By what attention gathers and masks: tens of MiB, far above the noise of a process."""
    save(tmp_path, DENSE | {"max_position_embeddings": 16384})
    checkpoint = open_checkpoint(tmp_path)

    def transient(max_model_len: int, seqs: int) -> int:
        config = EngineConfig(num_blocks=8192, max_model_len=max_model_len, max_num_seqs=seqs)
        return InlineRunner(checkpoint, config).profile().transient

    short, long = transient(256, 64), transient(16384, 64)
    # Masks alone: a float for each of 512 queries and 16384 keys.
    assert long - short >= 512 * 16384 * 4 * 0.9


def test_slots_and_blocks_are_untouched(tmp_path: Path) -> None:
    save(tmp_path, DENSE)
    prompt = (5, 6, 7, 8, 9)
    first = StepPlan(
        0,
        (SlotBegin(0, GREEDY, prompt, ()),),
        (SequenceStep(0, 0, prompt, (3, 1), sample=True),),
    )
    then = StepPlan(1, (), (SequenceStep(0, 5, None, (3, 1), sample=True),))
    tokens = []
    for disturbed in (False, True):
        config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=64, **SMALL)
        runner = InlineRunner(open_checkpoint(tmp_path), config)
        found = [runner.execute(first).rows[0].token_id]
        if disturbed:
            runner.profile()
        tokens.append([*found, runner.execute(then).rows[0].token_id])
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ],
)
def test_a_step_without_memory_tells_the_map(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, DENSE)
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=64, **SMALL)
    runner = InlineRunner(open_checkpoint(tmp_path), config)
    plan = StepPlan(
        0,
        (SlotBegin(0, GREEDY, (5, 6), ()),),
        (SequenceStep(0, 0, (5, 6), (0,), sample=True),),
    )

    def fail(*args: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(runner, "_inputs", fail)
        with pytest.raises(OutOfMemory, match=r"kv_cache") as caught:
            runner.execute(plan)
    assert caught.value.retryable
    assert "weights.projections" in caught.value.message
    assert runner.execute(plan).rows[0].token_id is not None
