"""The operator's commands: print what the controller says."""

from __future__ import annotations

import sys
import time
from typing import Any

from google.protobuf.json_format import MessageToJson
from rich.console import Console
from rich.table import Table

from baton.client.admin import AdminClient
from baton.core.cluster import Role
from baton.core.errors import InvalidRequest, Stage
from kvpool.tiers import Tier
from protos.baton.internal.v1 import instance_pb2
from protos.baton.v1 import cluster_pb2


def status(address: str, *, as_json: bool) -> None:
    """Print the cluster's state."""
    with AdminClient(address) as admin:
        reply = admin.status()
    if as_json:
        _print_json(reply)
        return
    console = make_console()
    ready = "[green]ready[/green]" if reply.ready else "[red]not ready[/red]"
    console.print(
        f"cluster [bold]{reply.cluster}[/bold]  model {reply.model}  epoch {reply.epoch}  {ready}  "
        f"placements {reply.num_placements}  queued {reply.num_queued_placements}"
    )
    console.print(instance_table(reply))
    members = Table("member", "id", "address", "pid", "memory", box=None, padding=(0, 1, 0, 0))
    members.add_row(
        "controller",
        "controller",
        reply.controller_address,
        str(reply.controller_pid),
        _mib(reply.controller_rss_bytes),
    )
    for member in reply.members:
        where = member.http_address or member.address
        members.add_row(
            member.kind, member.member_id, where, str(member.pid), _mib(member.rss_bytes)
        )
    console.print(members)


def make_console(**options: Any) -> Console:
    """As wide as the terminal; wide where there is none, so that no table is cut in a file."""
    console = Console(**options)
    return console if console.is_terminal else Console(width=160, **options)


def life(incarnation: int) -> str:
    """An incarnation as people read it: the controller's epoch, and the count within it."""
    return f"{incarnation >> 20}.{incarnation & 0xFFFFF}"


def instance_table(reply: cluster_pb2.ClusterStatus) -> Table:
    """One row per instance."""
    # Without lines it fits the 80 columns of a plain terminal.
    table = Table(box=None, padding=(0, 1, 0, 0))
    for title in ("instance", "life", "role", "state"):
        table.add_column(title, no_wrap=True)
    for title in ("wait", "run", "kv", "held", "used+cached", "memory", "pid"):
        table.add_column(title, no_wrap=True, justify="right")
    for item in reply.instances:
        used = item.num_blocks - item.num_free_blocks - item.num_cached_blocks
        table.add_row(
            item.instance_id,
            life(item.incarnation),
            item.role,
            item.state,
            str(item.num_waiting),
            str(item.num_running),
            str(item.num_pending_kv),
            str(item.num_held),
            f"{used}+{item.num_cached_blocks}/{item.num_blocks}",
            _mib(item.rss_bytes),
            str(item.pid),
        )
    return table


def set_role(address: str, instance_id: str, role: str, *, force: bool) -> None:
    """Switch a role and say what it was."""
    if role not in set(Role):
        raise InvalidRequest(
            f"role must be one of {', '.join(Role)}, got {role!r}",
            param="role",
            stage=Stage.CONTROL,
        )
    with AdminClient(address) as admin:
        previous = admin.set_role(instance_id, Role(role), force=force)
    print(f"{instance_id}: {previous} -> {role}")


def drain(address: str, instance_id: str, *, wait: bool, timeout_s: float, undo: bool) -> None:
    """Drain an instance, or take it back; exit 1 if requests were still open at the end."""
    with AdminClient(address) as admin:
        reply = admin.drain(instance_id, wait=wait, timeout_s=timeout_s, undo=undo)
    if undo:
        print(f"{instance_id}: back in service")
    elif reply.drained:
        print(f"{instance_id}: drained")
    else:
        print(f"{instance_id}: draining, {reply.num_open} requests still open")
        if wait:
            sys.exit(1)


def _cached(reply: cluster_pb2.ExplainResponse) -> str:
    """How much of the prompt was not computed, and which tiers it came from."""
    found = reply.cached_by_tier
    tiers = ", ".join(f"{tier} {found[tier]}" for tier in Tier if found.get(tier))
    return f"{reply.cached_tokens} cached" + (f": {tiers}" if tiers else "")


def _targets(reply: cluster_pb2.ExplainResponse) -> str:
    """Its class, and whether it was served as that promises; empty where it had neither."""
    text = f", class {reply.service_class}" if reply.service_class else ""
    if reply.HasField("met"):
        text += f", targets {'met' if reply.met else 'missed'}"
    return text


def predicted_text(attempt: cluster_pb2.AttemptTrace) -> str:
    """What the placement counted on, to read beside what came; empty where it predicted nothing."""
    found = []
    if attempt.HasField("predicted_ttft_s"):
        found.append(f"TTFT {attempt.predicted_ttft_s * 1000:.1f} ms")
    if attempt.HasField("predicted_tpot_s"):
        found.append(f"TPOT {attempt.predicted_tpot_s * 1000:.2f} ms")
    return f"; predicted {', '.join(found)}" if found else ""


def explain(address: str, request_id: str, *, as_json: bool) -> None:
    """Print where a request ran and when each stage happened."""
    with AdminClient(address) as admin:
        reply = admin.explain(request_id)
    if as_json:
        _print_json(reply)
        return
    console = make_console()
    console.print(
        f"request [bold]{reply.request_id}[/bold]  outcome {reply.outcome} {reply.error}\n"
        f"prompt {reply.prompt_tokens} tokens ({_cached(reply)}), "
        f"output {reply.completion_tokens} tokens, "
        f"TTFT {reply.ttft_s * 1000:.1f} ms, TPOT {reply.tpot_s * 1000:.2f} ms{_targets(reply)}"
    )
    for attempt in reply.attempts:
        prefill = f"{attempt.prefill_instance} (life {life(attempt.prefill_incarnation)})"
        decode = f"{attempt.decode_instance} (life {life(attempt.decode_incarnation)})"
        console.print(
            f"choice {attempt.choice} attempt {attempt.attempt}: prefill {prefill}, "
            f"decode {decode}; {attempt.reason} (of {attempt.num_candidates}); "
            f"fallback {attempt.fallback or 'none'}{predicted_text(attempt)}"
        )
        _print_stages(console, attempt)


def memory(address: str, instance_id: str, *, as_json: bool) -> None:
    """Print what an instance's memory is used for, and what was measured at its start."""
    with AdminClient(address) as admin:
        reply = admin.memory(instance_id)
    if as_json:
        _print_json(reply)
        return
    console = make_console()
    for item in reply.maps:
        console.print(
            f"[bold]{reply.instance_id}[/bold] {item.rank} on {item.device}: "
            f"{_mib(item.in_use)} beyond imports ({_mib(item.imports)}), peak {_mib(item.peak)}"
        )
        console.print(_memory_table(item))
        if item.HasField("needs"):
            needs = item.needs
            console.print(
                f"limit {_mib(needs.limit)}: held {_mib(needs.held)}, largest prefill "
                f"{_mib(needs.prefill)}, decode {_mib(needs.decode)}, both {_mib(needs.mixed)}, "
                f"reserve {_mib(needs.reserve)}, margin {_mib(needs.margin)}; "
                f"measured in {needs.seconds:.1f} s"
            )


def _memory_table(item: instance_pb2.MemoryMapRecord) -> Table:
    """Largest first, what no entry explains last."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("what", no_wrap=True)
    for title in ("in use", "share", "set aside"):
        table.add_column(title, no_wrap=True, justify="right")
    whole = max(1, item.in_use)
    for entry in sorted(item.entries, key=lambda entry: -entry.in_use):
        if entry.size:
            share = f"{entry.in_use / whole:.1%}"
            table.add_row(entry.tag, _mib(entry.in_use), share, _mib(entry.size))
    rest = item.unaccounted
    table.add_row("unaccounted", _mib(rest), f"{rest / whole:.1%}", "")
    return table


def _print_stages(console: Console, attempt: cluster_pb2.AttemptTrace) -> None:
    stages = sorted(attempt.stages, key=lambda item: item.wall_s)
    if not stages:
        return
    table = Table("ms", "where", "stage", box=None)
    start_s = stages[0].wall_s
    for item in stages:
        table.add_row(f"{(item.wall_s - start_s) * 1000:9.2f}", item.where, item.stage)
    console.print(f"  from {time.strftime('%H:%M:%S', time.localtime(start_s))}")
    console.print(table)


def _print_json(
    message: cluster_pb2.ClusterStatus | cluster_pb2.ExplainResponse | instance_pb2.MemoryReply,
) -> None:
    print(
        MessageToJson(
            message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
    )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.0f} MiB"
