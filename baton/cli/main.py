"""The ``baton`` command."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from baton import __version__
from baton.cli.common import (
    ClusterOption,
    ControllerOption,
    StoreOption,
    find,
    with_clear_errors,
)
from baton.cli.profile import profile as profile_command
from baton.cli.roles import app as roles_app
from baton.cli.simulate import simulate

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Serve large language models with prefill and decode on different instances.",
)

app.add_typer(roles_app, name="roles")
app.command()(simulate)
app.command(name="profile")(profile_command)


@app.command()
def serve(
    model: Annotated[str | None, typer.Option(help="folder of the checkpoint")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with settings")] = None,
    prefill: Annotated[int | None, typer.Option(help="prefill instances")] = None,
    decode: Annotated[int | None, typer.Option(help="decode instances")] = None,
    mixed: Annotated[int | None, typer.Option(help="instances that do both")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or emulated")] = None,
    profile: Annotated[Path | None, typer.Option(help="of an emulated device: its costs")] = None,
    time_dilation: Annotated[
        float | None, typer.Option(help="emulated time takes so many times as long")
    ] = None,
    host: Annotated[str | None, typer.Option(help="address to listen at")] = None,
    http_port: Annotated[int | None, typer.Option(help="OpenAI-compatible HTTP; 0: any")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="gRPC; 0: any")] = None,
    store: Annotated[str | None, typer.Option(help="memory or redis://host:port/db")] = None,
    address: Annotated[str | None, typer.Option(help="an existing Ray cluster")] = None,
    cluster: Annotated[str | None, typer.Option(help="name of the cluster")] = None,
    served_model_name: Annotated[str | None, typer.Option(help="what clients call it")] = None,
    ready_file: Annotated[
        Path | None, typer.Option(help="write the addresses here (JSON) when ready")
    ] = None,
) -> None:
    """Run a cluster until Ctrl-C."""
    from baton.cli.serve import run_cluster
    from baton.cli.settings import load_settings

    flags = {
        "model": model,
        "prefill": prefill,
        "decode": decode,
        "mixed": mixed,
        "dtype": dtype,
        "device": device,
        "profile": None if profile is None else str(profile),
        "time_dilation": time_dilation,
        "host": host,
        "http_port": http_port,
        "grpc_port": grpc_port,
        "store": store,
        "address": address,
        "cluster": cluster,
        "served_model_name": served_model_name,
    }
    console = Console(stderr=True)
    with_clear_errors(
        lambda: run_cluster(load_settings(config, flags), console=console, ready_file=ready_file)
    )


@app.command()
def generate(
    model: Annotated[str | None, typer.Option(help="folder of the checkpoint")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="text to go on with; again for a batch")
    ] = None,
    prompt_token_ids: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="JSON list of token ids, or of such lists for a batch; -: stdin"
        ),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="output tokens at most; 128")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="the prompt is a user's message")] = False,
    tp: Annotated[int | None, typer.Option(help="ranks that share heads and columns")] = None,
    ep: Annotated[int | None, typer.Option(help="ranks that share the experts")] = None,
    dp: Annotated[int | None, typer.Option(help="groups of ranks with their own prompts")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda")] = None,
    num_threads: Annotated[int | None, typer.Option(help="CPU threads of a rank")] = None,
    temperature: Annotated[float | None, typer.Option(help="0: greedy; default 1")] = None,
    top_k: Annotated[int | None, typer.Option(help="the best so many; 0 or -1: all")] = None,
    top_p: Annotated[float | None, typer.Option(help="nucleus; default 1")] = None,
    min_p: Annotated[float | None, typer.Option(help="share of the best; default 0")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="default 1")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="default 0")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="default 0")] = None,
    seed: Annotated[int | None, typer.Option(help="default: drawn, told with --json")] = None,
    stop_token_id: Annotated[
        list[int] | None, typer.Option(help="ends the text beside the model's own; repeatable")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="the model's own end tokens end nothing")
    ] = False,
    logprobs: Annotated[int | None, typer.Option(help="with so many alternatives")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="of one step")] = None,
    block_size: Annotated[int | None, typer.Option(help="tokens of a KV block")] = None,
    num_blocks: Annotated[int | None, typer.Option(help="KV blocks at most")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Run prompts through one engine, without a cluster; for benchmarks and bug reports."""

    def run() -> None:
        from baton.cli.generate import GenerateFlags
        from baton.cli.generate import generate as run_generate

        flags = GenerateFlags(
            model=model,
            prompts=prompt or (),
            prompt_token_ids=prompt_token_ids,
            max_tokens=max_tokens,
            chat=chat,
            sampling={
                "temperature": temperature,
                "top_k": top_k,
                "top_p": top_p,
                "min_p": min_p,
                "repetition_penalty": repetition_penalty,
                "presence_penalty": presence_penalty,
                "frequency_penalty": frequency_penalty,
                "stop_token_ids": tuple(stop_token_id or ()),
                "ignore_eos": ignore_eos,
                "logprobs": logprobs,
            },
            seed=seed,
            engine={
                "tp": tp,
                "ep": ep,
                "dp": dp,
                "dtype": dtype,
                "device": device,
                "num_threads": num_threads,
                "max_num_batched_tokens": max_num_batched_tokens,
                "block_size": block_size,
                "num_blocks": num_blocks,
            },
            as_json=json_output,
        )
        run_generate(flags)

    # Not KeyboardInterrupt: Python may end by the signal after all where that is raised in exec().
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _exit_as_shells_say)
    with_clear_errors(run)


@app.command()
def ops(
    model: Annotated[str | None, typer.Option(help="folder of the checkpoint")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16")] = None,
    tp: Annotated[int | None, typer.Option(help="ranks that share heads and columns")] = None,
    ep: Annotated[int | None, typer.Option(help="ranks that share the experts")] = None,
    dp: Annotated[int | None, typer.Option(help="groups of ranks with their own prompts")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """Show which implementation of each operation would run where, and why."""
    engine = {"device": device, "dtype": dtype, "tp": tp, "ep": ep, "dp": dp}

    def run() -> None:
        from baton.cli.ops import show_ops

        show_ops(model, engine, as_json=json_output)

    with_clear_errors(run)


@app.command()
def status(
    json_output: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
    store: StoreOption = "memory",
    cluster: ClusterOption = "default",
    controller: ControllerOption = None,
) -> None:
    """Show instances, roles, load and members."""
    from baton.cli import admin

    with_clear_errors(lambda: admin.status(find(store, cluster, controller), as_json=json_output))


@app.command()
def role(
    instance: Annotated[str, typer.Argument(help="instance id, as in baton status")],
    new_role: Annotated[str, typer.Argument(metavar="ROLE", help="prefill, decode or mixed")],
    force: Annotated[
        bool, typer.Option(help="even if it leaves no prefill or no decode path")
    ] = False,
    store: StoreOption = "memory",
    cluster: ClusterOption = "default",
    controller: ControllerOption = None,
) -> None:
    """Switch an instance's role while it runs."""
    from baton.cli import admin

    with_clear_errors(
        lambda: admin.set_role(find(store, cluster, controller), instance, new_role, force=force)
    )


@app.command()
def drain(
    instance: Annotated[str, typer.Argument(help="instance id, as in baton status")],
    wait: Annotated[bool, typer.Option(help="return once its last request has ended")] = True,
    timeout: Annotated[float, typer.Option(help="seconds to wait at most")] = 60.0,
    undo: Annotated[bool, typer.Option(help="take it back into service")] = False,
    store: StoreOption = "memory",
    cluster: ClusterOption = "default",
    controller: ControllerOption = None,
) -> None:
    """Stop placing requests on an instance; what runs there ends normally."""
    from baton.cli import admin

    with_clear_errors(
        lambda: admin.drain(
            find(store, cluster, controller), instance, wait=wait, timeout_s=timeout, undo=undo
        )
    )


@app.command()
def kv(
    json_output: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
    dump: Annotated[bool, typer.Option(help="what each slot of the host tiers holds")] = False,
    store: StoreOption = "memory",
    cluster: ClusterOption = "default",
    controller: ControllerOption = None,
) -> None:
    """Show the KV pool: tiers, occupancy, hit rates, top prefixes, leases."""
    from baton.cli import kv as kv_command

    with_clear_errors(
        lambda: kv_command.show(find(store, cluster, controller), as_json=json_output, dump=dump)
    )


@app.command()
def explain(
    request_id: Annotated[str, typer.Argument(help="as returned in x-request-id")],
    json_output: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
    store: StoreOption = "memory",
    cluster: ClusterOption = "default",
    controller: ControllerOption = None,
) -> None:
    """Show where a request was placed and when each stage happened."""
    from baton.cli import admin

    with_clear_errors(
        lambda: admin.explain(find(store, cluster, controller), request_id, as_json=json_output)
    )


@app.command()
def memory(
    instance: Annotated[str, typer.Argument(help="instance id, as in baton status")],
    json_output: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
    store: StoreOption = "memory",
    cluster: ClusterOption = "default",
    controller: ControllerOption = None,
) -> None:
    """Show what an instance's memory is used for."""
    from baton.cli import admin

    with_clear_errors(
        lambda: admin.memory(find(store, cluster, controller), instance, as_json=json_output)
    )


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def _exit_as_shells_say(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
