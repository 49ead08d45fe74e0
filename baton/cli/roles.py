"""``baton roles``: who switches roles, what is pinned, and what the switches did."""

from __future__ import annotations

from typing import Annotated

import typer

from baton.cli.common import (
    ClusterOption,
    ControllerOption,
    StoreOption,
    find,
    with_clear_errors,
)

app = typer.Typer(help="Show how roles are switched; pin them, pause the planner, see its log.")

JsonOption = Annotated[bool, typer.Option("--json", help="machine-readable")]
InstanceArgument = Annotated[str, typer.Argument(help="instance id, as in baton status")]


@app.callback(invoke_without_command=True)
def roles(
    context: typer.Context,
    json_output: JsonOption = False,
    store: StoreOption = "memory",
    cluster: ClusterOption = "default",
    controller: ControllerOption = None,
) -> None:
    """Show how roles are switched; pin them, pause the planner, see its log."""
    if context.invoked_subcommand is not None:
        if json_output or (store, cluster, controller) != ("memory", "default", None):
            # They would be those of another command, and pass unnoticed.
            raise typer.BadParameter(f"options go behind {context.invoked_subcommand!r}")
        return
    from baton.cli import roles_view

    with_clear_errors(
        lambda: roles_view.show(find(store, cluster, controller), as_json=json_output)
    )


@app.command()
def log(
    limit: Annotated[int, typer.Option(min=1, help="so many of the newest")] = 20,
    json_output: JsonOption = False,
    store: StoreOption = "memory",
    cluster: ClusterOption = "default",
    controller: ControllerOption = None,
) -> None:
    """Show switches: who, why, from which numbers, what was expected and what came of it."""
    from baton.cli import roles_view

    with_clear_errors(
        lambda: roles_view.log(find(store, cluster, controller), limit=limit, as_json=json_output)
    )


@app.command()
def pin(
    instance: InstanceArgument,
    store: StoreOption = "memory",
    cluster: ClusterOption = "default",
    controller: ControllerOption = None,
) -> None:
    """Keep an instance's role: the planner leaves it alone."""
    from baton.cli import roles_view

    with_clear_errors(
        lambda: roles_view.pin(find(store, cluster, controller), instance, pinned=True)
    )


@app.command()
def unpin(
    instance: InstanceArgument,
    store: StoreOption = "memory",
    cluster: ClusterOption = "default",
    controller: ControllerOption = None,
) -> None:
    """Give an instance back to the planner, also after baton role."""
    from baton.cli import roles_view

    with_clear_errors(
        lambda: roles_view.pin(find(store, cluster, controller), instance, pinned=False)
    )


@app.command()
def pause(
    seconds: Annotated[
        float | None, typer.Option("--for", help="seconds; default: until baton roles resume")
    ] = None,
    store: StoreOption = "memory",
    cluster: ClusterOption = "default",
    controller: ControllerOption = None,
) -> None:
    """Let the planner switch nothing; it goes on to say what it would do."""
    from baton.cli import roles_view

    with_clear_errors(
        lambda: roles_view.pause(find(store, cluster, controller), duration_s=seconds)
    )


@app.command()
def resume(
    store: StoreOption = "memory",
    cluster: ClusterOption = "default",
    controller: ControllerOption = None,
) -> None:
    """Let the planner switch roles again."""
    from baton.cli import roles_view

    with_clear_errors(lambda: roles_view.resume(find(store, cluster, controller)))
