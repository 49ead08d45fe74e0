"""What commands share: options that name a cluster, and errors as one sentence with a status."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Annotated, NoReturn

import typer

from baton.core.errors import BatonError, ConfigError

StoreOption = Annotated[str, typer.Option(help="memory or redis://host:port/db")]
ClusterOption = Annotated[str, typer.Option(help="name of the cluster")]
ControllerOption = Annotated[
    str | None, typer.Option(help="host:port of the controller; default: found in the store")
]


def with_clear_errors(action: Callable[[], None]) -> None:
    """Run; on an error that a user can meet print one sentence and exit: 2 for settings, else 1."""
    try:
        action()
    except ConfigError as error:
        _exit(error.message, 2)
    except BatonError as error:
        _exit(error.message, 1)


def find(store: str, cluster: str, controller: str | None) -> str:
    """Where the controller is: as given, or as the store says. Raises NotFound."""
    if controller is not None:
        return controller
    from controller.discovery import find_controller

    return asyncio.run(find_controller(store, cluster))


def _exit(message: str, code: int) -> NoReturn:
    print(f"baton: {message}", file=sys.stderr)
    raise typer.Exit(code)
