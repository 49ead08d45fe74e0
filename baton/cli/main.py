"""The ``baton`` command."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from baton import __version__
from baton.core.errors import BatonError, ConfigError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Serve large language models with prefill and decode on different instances.",
)

StoreOption = Annotated[str, typer.Option(help="memory or redis://host:port/db")]
ClusterOption = Annotated[str, typer.Option(help="name of the cluster")]
ControllerOption = Annotated[
    str | None, typer.Option(help="host:port of the controller; default: found in the store")
]


@app.command()
def serve(
    model: Annotated[str | None, typer.Option(help="folder of the checkpoint")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with settings")] = None,
    prefill: Annotated[int | None, typer.Option(help="prefill instances")] = None,
    decode: Annotated[int | None, typer.Option(help="decode instances")] = None,
    mixed: Annotated[int | None, typer.Option(help="instances that do both")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16")] = None,
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
def status(
    json_output: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
    store: StoreOption = "memory",
    cluster: ClusterOption = "default",
    controller: ControllerOption = None,
) -> None:
    """Show instances, roles, load and members."""
    from baton.cli import admin

    with_clear_errors(lambda: admin.status(_find(store, cluster, controller), as_json=json_output))


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
        lambda: admin.set_role(_find(store, cluster, controller), instance, new_role, force=force)
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
            _find(store, cluster, controller), instance, wait=wait, timeout_s=timeout, undo=undo
        )
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
        lambda: admin.explain(_find(store, cluster, controller), request_id, as_json=json_output)
    )


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def with_clear_errors(action: Callable[[], None]) -> None:
    """Run; on an error that a user can meet print one sentence and exit: 2 for settings, else 1."""
    try:
        action()
    except ConfigError as error:
        _exit(error.message, 2)
    except BatonError as error:
        _exit(error.message, 1)


def _exit(message: str, code: int) -> NoReturn:
    print(f"baton: {message}", file=sys.stderr)
    raise typer.Exit(code)


def _find(store: str, cluster: str, controller: str | None) -> str:
    if controller is not None:
        return controller
    from controller.discovery import find_controller

    return asyncio.run(find_controller(store, cluster))


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
