"""The command line of ``baton profile``."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from baton.cli.common import with_clear_errors


def profile(
    model: Annotated[str | None, typer.Option(help="folder of the checkpoint")] = None,
    out: Annotated[Path | None, typer.Option(help="the file to write, YAML")] = None,
    config: Annotated[Path | None, typer.Option(help="settings, as for baton serve")] = None,
    name: Annotated[str | None, typer.Option(help="of the profile; default: the model's")] = None,
    tp: Annotated[int | None, typer.Option(help="ranks that share heads and columns")] = None,
    ep: Annotated[int | None, typer.Option(help="ranks that share the experts")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda")] = None,
    num_threads: Annotated[int | None, typer.Option(help="CPU threads of a rank")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="largest batch of decodes")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="largest step")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="longest sequence")] = None,
    block_size: Annotated[int | None, typer.Option(help="tokens of a KV block")] = None,
    num_blocks: Annotated[int | None, typer.Option(help="KV blocks")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="times each step is measured")] = 5,
) -> None:
    """Measure how long this machine's engine takes, for predictors, emulation and simulation."""
    engine = {
        "tp": tp,
        "ep": ep,
        "dtype": dtype,
        "device": device,
        "num_threads": num_threads,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "max_model_len": max_model_len,
        "block_size": block_size,
        "num_blocks": num_blocks,
    }
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _exit_as_shells_say)

    def run() -> None:
        from baton.cli.profiling import run_profile

        run_profile(model, out, config, name, engine, rounds)

    with_clear_errors(run)


def _exit_as_shells_say(number: int, frame: object) -> None:
    raise SystemExit(128 + number)
