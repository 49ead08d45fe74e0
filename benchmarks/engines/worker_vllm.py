"""Runs batches in vLLM. Executed by an interpreter that has it; imports nothing of Baton.

Reads one JSON object per line: {"prompts": [[...]], "num_tokens": N}; answers {"seconds": ...,
"token_ids": [[...]]}. See ``compare.py``.
"""

import importlib
import json
import os
import sys
import time


def main() -> None:
    """Serve until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    vllm = importlib.import_module("vllm")
    folder, options = sys.argv[1], json.loads(sys.argv[2])
    engine = vllm.LLM(
        model=folder,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=options["max_model_len"],
        max_num_seqs=options["max_num_seqs"],
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    print(json.dumps({"ready": True, "version": vllm.__version__}), file=answers)
    answers.flush()
    for line in sys.stdin:
        job = json.loads(line)
        prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
        sampling = vllm.SamplingParams(
            temperature=0, max_tokens=job["num_tokens"], ignore_eos=True, detokenize=False
        )
        started = time.perf_counter()
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - started
        token_ids = [list(output.outputs[0].token_ids) for output in outputs]
        print(json.dumps({"seconds": seconds, "token_ids": token_ids}), file=answers)
        answers.flush()


if __name__ == "__main__":
    main()
