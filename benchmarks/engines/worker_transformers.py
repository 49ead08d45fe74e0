"""Runs batches in ``transformers``. The protocol is that of ``worker_vllm.py``.

SDPA attention, and the way to compute experts that is fastest here (see ``reference.py``).
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path

import torch
import transformers

from benchmarks.reference import Reference


def main() -> None:
    """Serve until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    folder, options = sys.argv[1], json.loads(sys.argv[2])
    reference = Reference(Path(folder), options["num_threads"], dtype=torch.bfloat16)
    draw = random.Random(0)
    reference.choose([[draw.randrange(1000) for _ in range(64)] for _ in range(4)], 8)
    ready = {"ready": True, "version": transformers.__version__, "experts": reference.experts}
    print(json.dumps(ready), file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        started = time.perf_counter()
        outcomes = reference.generate(job["prompts"], job["num_tokens"])
        seconds = time.perf_counter() - started
        token_ids = [list(outcome.token_ids) for outcome in outcomes]
        print(json.dumps({"seconds": seconds, "token_ids": token_ids}), file=answers, flush=True)


if __name__ == "__main__":
    main()
