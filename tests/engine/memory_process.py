"""What the memory tests do in processes of their own, whose memory nobody else has touched.

Called as ``python -m tests.engine.memory_process WHAT FOLDER SETTINGS``, with settings as JSON;
prints one JSON object.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from baton.core.config import EngineConfig
from baton.core.errors import BatonError
from baton.core.request import Part, SamplingParams, Submission
from baton.engine.checkpoint import open_checkpoint
from baton.engine.devices import OutOfMemory
from baton.engine.engine import Engine
from baton.engine.events import TokensReady
from baton.engine.holdings import extent, tensors_of
from baton.engine.kv_cache import TORCH_DTYPES
from baton.engine.loader import load_model
from baton.engine.memory import MIB, MemoryMap
from baton.engine.models.config import resolve_max_model_len
from baton.engine.ops.registry import Ops
from baton.engine.parallel.mesh import Axes, Mesh, SingleComm
from baton.engine.resident import process_memory, reset_peak
from baton.engine.runner import InlineRunner

UNTOUCHED_BYTES = 128 * MIB
EVERYTHING: dict[str, Any] = {
    "temperature": 1.7,
    "top_p": 0.999,
    "min_p": 1e-9,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.3,
    "frequency_penalty": 0.2,
    "ignore_eos": True,
    "logprobs": 20,
}


def ready(folder: str, settings: dict[str, Any]) -> tuple[InlineRunner, EngineConfig]:
    """A runner as an instance has it when it reports for work."""
    runner = InlineRunner(open_checkpoint(folder), EngineConfig(**settings))
    config = runner.fit()
    if settings.get("num_blocks", 0) is None:
        runner.attach(config.kv_blocks)
    return runner, config


def account(folder: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The map, ready and after some work."""
    runner, config = ready(folder, settings)
    before = runner.memory()[0]
    assert before.needs is not None
    serve(runner, folder, config, rounds=1)
    return {
        "maps": [_as_json(before), _as_json(runner.memory()[0])],
        "needs": dataclasses.asdict(before.needs) | {"beside": before.needs.beside_blocks},
    }


def _as_json(found: MemoryMap) -> dict[str, Any]:
    return dataclasses.asdict(found) | {"unaccounted": found.unaccounted, "text": found.text}


def tight(folder: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The worst load under a limit of the kernel, and then under one that is too low."""
    runner, config = ready(folder, settings)
    found = runner.memory()[0]
    needs = found.needs
    assert needs is not None
    cache = next(entry for entry in found.entries if entry.tag == "kv_cache")
    with_blocks = process_memory().unreclaimable - cache.in_use + cache.size
    left = needs.limit - with_blocks
    unlimited = resource.getrlimit(resource.RLIMIT_DATA)
    # The kernel's limit also counts pages that nobody touches; the peak must keep to the real one.
    _limit_data(left + UNTOUCHED_BYTES)
    # Files' pages are part of the peak that the kernel keeps: they should be here by then.
    serve(runner, folder, config, rounds=1)
    reset_peak()
    file = process_memory().file
    num_tokens = serve(runner, folder, config, rounds=2)
    peak = process_memory().peak - file
    resource.setrlimit(resource.RLIMIT_DATA, unlimited)
    _limit_data(MIB)
    error = ""
    try:
        serve(runner, folder, config, rounds=1)
    except OutOfMemory as caught:
        error = caught.message
    resource.setrlimit(resource.RLIMIT_DATA, unlimited)
    again = 0
    try:
        again = serve(runner, folder, config, rounds=1)
    except OutOfMemory as caught:
        # A kernel that oneDNN once had no memory for may stay broken: then only a new process
        # helps, and the engine loop asks for one after a few failed steps.
        if "primitive" not in caught.message:
            raise
    return {
        "num_blocks": config.num_blocks,
        "left": left,
        "needs": needs.text,
        "limit": needs.limit,
        "transient": needs.transient,
        "peak": peak,
        "num_tokens": num_tokens,
        "error": error,
        "again": again,
    }


def _limit_data(more: int) -> None:
    """Let private writable memory grow by so many bytes from now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            now = int(line.split()[1]) * 1024
            resource.setrlimit(resource.RLIMIT_DATA, (now + more, resource.RLIM_INFINITY))


def serve(runner: InlineRunner, folder: str, config: EngineConfig, *, rounds: int) -> int:
    """All slots full of the longest sequences, with everything that can be asked for.

    Most share their prompt's blocks, so that many of them fit; some ask for their prompt's
    logprobs, share nothing, and push others out.
    """
    model = open_checkpoint(folder).config
    max_len = min(
        resolve_max_model_len(model, config),
        (config.kv_blocks - 4) * config.block_size,
    )
    engine = Engine(config, max_model_len=max_len, salt=b"memory")
    num_tokens = 0
    for number in range(rounds):
        prompt = tuple((7 * i + number) % model.vocab_size for i in range(max_len - 24))
        for i in range(config.max_num_seqs + 4):
            sampling = SamplingParams(
                seed=i,
                max_tokens=24,
                prompt_logprobs=20 if i % 8 == 5 else None,
                **EVERYTHING,
            )
            name = f"{number}-{i}"
            engine.submit(Submission(name, 0, prompt, sampling), Part.WHOLE, 0.0)
        while engine.request_ids():
            engine.admit(0.0)
            plan = engine.schedule(0.0)
            assert plan is not None
            for event in engine.commit(plan, runner.execute(plan), 0.0):
                if isinstance(event, TokensReady):
                    num_tokens += len(event.token_ids)
    return num_tokens


class _Comm(SingleComm):
    """One of several ranks, without the others."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def load(folder: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Load a rank's weights: anonymous memory at the peak, and what the tensors take."""
    tp, rank = settings.pop("tp", 1), settings.pop("rank", 0)
    dtype = TORCH_DTYPES[settings["dtype"]]
    checkpoint = open_checkpoint(folder)
    torch.set_num_threads(1)
    ops = Ops(torch.device("cpu"), dtype)
    # Kernels that are made once are not the checkpoint's; a first product makes them.
    torch.nn.functional.linear(torch.ones(32, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype))
    mesh = Mesh(Axes(tp=tp), rank, _Comm(rank, tp), SingleComm(), SingleComm())
    before = process_memory().anonymous
    with _Highest() as highest:
        model = load_model(checkpoint, ops=ops, max_len=64, mesh=mesh)
    after = process_memory()
    own, seen = 0, set()
    for path, tensor in tensors_of(model):
        address, size = extent(tensor)
        if "embedding" not in path and address not in seen:
            seen.add(address)
            own += size
    return {
        "own": own,
        "whole": sum(info.end - info.begin for info in checkpoint.tensors.values()),
        "peak": highest.anonymous - before,
        "kept": after.anonymous - before,
        "samples": highest.num_samples,
    }


class _Highest:
    """Watches anonymous memory: the kernel keeps no peak of it apart from files' pages."""

    def __init__(self) -> None:
        self.anonymous = 0
        self.num_samples = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> _Highest:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self.anonymous = max(self.anonymous, process_memory().anonymous)
            self.num_samples += 1
            if self._end.wait(0.001):
                return


def main() -> None:
    what, folder, settings = sys.argv[1:]
    actions = {"account": account, "tight": tight, "load": load}
    try:
        answer = actions[what](folder, json.loads(settings))
    except BatonError as error:
        answer = {"refused": error.message, "param": error.param, "code": error.code}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
