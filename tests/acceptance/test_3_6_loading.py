"""Issue 3, line 6: loading checkpoints of 1.5 GB and more, whole and as one rank of two."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.big_checkpoints import LARGE, save_big
from tests.engine.test_memory import in_process

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(1200)]

LIMIT = 1.15
EMBEDDING_BYTES = LARGE["vocab_size"] * LARGE["hidden_size"] * 2


@pytest.mark.parametrize("tied", [False, True])
def test_loading(tmp_path: Path, tied: bool) -> None:
    assert save_big(tmp_path, LARGE | {"tie_word_embeddings": tied}, "bfloat16") > 1.4e9
    for tp, rank in ((1, 0), (2, 0), (2, 1)):
        answer = in_process("load", tmp_path, timeout_s=600.0, dtype="bfloat16", tp=tp, rank=rank)
        # Tied, the one table is both looked up where it lies and laid out anew for products.
        products = answer["whole"] - (0 if tied else EMBEDDING_BYTES)
        assert answer["own"] == pytest.approx(products / tp, rel=0.01)
        assert answer["samples"] > 50
        ratio = answer["peak"] / answer["own"]
        print(
            f"tied={tied} tp={tp} rank={rank}: file {answer['whole'] / 1e6:.0f} MB, own "
            f"{answer['own'] / 1e6:.0f} MB, peak {answer['peak'] / 1e6:.0f} MB, {ratio:.3f}"
        )
        assert ratio <= LIMIT
