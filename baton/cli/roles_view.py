"""What ``baton roles`` and its commands print."""

from __future__ import annotations

import time

from google.protobuf.json_format import MessageToJson
from rich.markup import escape
from rich.table import Table

from baton.cli.admin import make_console
from baton.client.admin import AdminClient
from baton.core.cluster import Role
from protos.baton.v1 import cluster_pb2


def show(address: str, *, as_json: bool) -> None:
    """Print mode, pause, instances with their pins, and what the planner would like."""
    with AdminClient(address) as admin:
        reply = admin.roles(log_limit=0)
    if as_json:
        _print_json(reply)
        return
    console = make_console()
    console.print(f"mode [bold]{reply.mode}[/bold]{_pause(reply)}  {_attainment(reply)}")
    console.print(_wishes(reply))
    table = Table(box=None, padding=(0, 1, 0, 0))
    for title in ("instance", "role", "state", "group", "for", "pinned", "switching to"):
        table.add_column(title, no_wrap=True)
    for item in reply.instances:
        table.add_row(
            item.instance_id,
            item.role,
            item.state,
            str(item.flip_group),
            f"{item.since_s:.0f} s",
            "yes" if item.pinned else "",
            item.switching_to,
        )
    console.print(table)


def log(address: str, *, limit: int, as_json: bool) -> None:
    """Print the newest switches, oldest first."""
    with AdminClient(address) as admin:
        reply = admin.roles(log_limit=limit)
    if as_json:
        _print_json(reply)
        return
    console = make_console()
    if not reply.log:
        console.print("no role was switched")
    for flip in reply.log:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(flip.wall_s))
        took = f" in {flip.seconds * 1000:.0f} ms" if flip.HasField("seconds") else ""
        urgent = ", urgent" if flip.urgent else ""
        console.print(
            f"[bold]{flip.number}[/bold]  {at}  {flip.instance_id}: {flip.from_role} -> "
            f"{flip.to_role}  [bold]{flip.state}[/bold]{took}  ({flip.who}{urgent})"
        )
        for line in _why(flip):
            console.print(f"    {escape(line)}")


def pin(address: str, instance_id: str, *, pinned: bool) -> None:
    """Pin or unpin, and say what role it has."""
    with AdminClient(address) as admin:
        role = admin.pin_role(instance_id, pinned=pinned)
    if pinned:
        print(f"{instance_id}: pinned to {role}")
    else:
        print(f"{instance_id}: the planner may switch it" + (f"; now {role}" if role else ""))


def pause(address: str, *, duration_s: float | None) -> None:
    """Pause the planner."""
    with AdminClient(address) as admin:
        admin.pause_roles(duration_s=duration_s)
    until = "until baton roles resume" if duration_s is None else f"for {duration_s:g} s"
    print(f"the planner is paused {until}")


def resume(address: str) -> None:
    """End the pause."""
    with AdminClient(address) as admin:
        admin.pause_roles(paused=False)
    print("the planner may switch roles")


def _pause(reply: cluster_pb2.RolesStatus) -> str:
    if not reply.paused:
        return ""
    left = f" for {reply.paused_for_s:.0f} s" if reply.HasField("paused_for_s") else ""
    return f"  [yellow]paused{left}[/yellow]"


def _attainment(reply: cluster_pb2.RolesStatus) -> str:
    if not reply.HasField("attainment"):
        return "no request with targets ended lately"
    return f"lately {reply.attainment:.0%} of {reply.num_ended} requests were within their targets"


def _wishes(reply: cluster_pb2.RolesStatus) -> str:
    if not reply.desired and not reply.HasField("desired_instances"):
        return "the planner has no opinion"
    split = ", ".join(f"{reply.desired[role]} {role}" for role in Role if role in reply.desired)
    number = f"{reply.desired_instances} instances" if reply.HasField("desired_instances") else ""
    return "the planner would like " + "; ".join(part for part in (split, number) if part)


def _why(flip: cluster_pb2.RoleFlip) -> list[str]:
    lines = [flip.reason]
    if flip.detail:
        lines.append(flip.detail)
    if flip.inputs:
        lines.append(
            ", ".join(f"{name} {value:.4g}" for name, value in sorted(flip.inputs.items()))
        )
    if flip.HasField("predicted_before") and flip.HasField("predicted_after"):
        lines.append(f"expected: {flip.predicted_before:.1%} -> {flip.predicted_after:.1%}")
    if flip.state == "done":
        before = _share(flip.HasField("attainment_before"), flip.attainment_before, flip.num_before)
        after = _share(flip.HasField("attainment_after"), flip.attainment_after, flip.num_after)
        so_far = "" if flip.settled else ", so far"
        lines.append(f"attainment: {before} -> {after}{so_far}")
    return lines


def _share(known: bool, value: float, count: int) -> str:
    return f"{value:.1%} of {count}" if known else "none ended"


def _print_json(message: cluster_pb2.RolesStatus) -> None:
    print(
        MessageToJson(
            message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
    )
