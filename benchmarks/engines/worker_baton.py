"""Runs batches in Baton's offline engine. The protocol is that of ``worker_vllm.py``."""

from __future__ import annotations

import json
import os
import sys
import time

import baton
from baton.core.config import EngineConfig
from baton.core.request import SamplingParams
from baton.engine.checkpoint import open_checkpoint
from baton.engine.offline import OfflineEngine, OfflineRequest


def main() -> None:
    """Serve until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    folder, options = sys.argv[1], json.loads(sys.argv[2])
    seqs, length = options["max_num_seqs"], options["max_model_len"]
    config = EngineConfig(
        dtype="bfloat16",
        num_threads=options["num_threads"],
        max_num_seqs=seqs,
        max_model_len=length,
        max_num_batched_tokens=2048,
        num_blocks=seqs * -(-length // 16) + 64,
        enable_prefix_cache=False,
    )
    with OfflineEngine(open_checkpoint(folder), config) as engine:
        print(json.dumps({"ready": True, "version": baton.__version__}), file=answers, flush=True)
        for line in sys.stdin:
            job = json.loads(line)
            requests = [
                OfflineRequest(
                    tuple(ids),
                    SamplingParams(temperature=0.0, max_tokens=job["num_tokens"], ignore_eos=True),
                )
                for ids in job["prompts"]
            ]
            started = time.perf_counter()
            result = engine.generate(requests)
            seconds = time.perf_counter() - started
            token_ids = [output.token_ids for output in result.outputs]
            answer = {"seconds": seconds, "token_ids": token_ids}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
