"""``baton kv``: what the tiers of the KV pool hold, and how often that helps."""

from __future__ import annotations

import json
from typing import Any

from rich.table import Table

from baton.cli.admin import make_console
from baton.client.admin import AdminClient
from baton.core.errors import BatonError
from protos.baton.internal.v1 import pool_pb2
from protos.baton.v1 import cluster_pb2

_MIB = 1 << 20


def show(address: str, *, as_json: bool, dump: bool) -> None:
    """Print the pool of the cluster whose controller is at ``address``."""
    with AdminClient(address) as admin:
        status = admin.status()
        pools = {
            member.member_id: _ask(admin, member.address, dump)
            for member in status.members
            if member.kind == "pool"
        }
    if as_json:
        print(json.dumps(_plain(status, pools), indent=2))
        return
    console = make_console()
    console.print(_devices(status))
    console.print(_machines(pools))
    top = _prefixes(pools)
    if top.row_count:
        console.print(top)
    for member_id, pool in pools.items():
        if dump and pool is not None:
            console.print(f"[bold]{member_id}[/bold]")
            # Plain: keys and brackets are no markup.
            print(pool.dump)


def _ask(admin: AdminClient, address: str, dump: bool) -> pool_pb2.PoolStatus | None:
    """``None`` for a pool node that does not answer: the others are worth showing."""
    try:
        return admin.pool_status(address, dump=dump)
    except BatonError:
        return None


def _devices(status: cluster_pb2.ClusterStatus) -> Table:
    table = Table("instance", "role", title="device tier, in blocks")
    for title in ("used", "cached", "free", "held", "leases", "in flight"):
        table.add_column(title, justify="right")
    for item in status.instances:
        if item.state == "dead":
            continue
        used = item.num_blocks - item.num_free_blocks - item.num_cached_blocks
        numbers = [used, item.num_cached_blocks, item.num_free_blocks, item.num_held]
        # Whose KV is on its way here: from a prefill side, or from lower tiers.
        numbers += [item.num_leases, item.num_pending_kv]
        table.add_row(item.instance_id, item.role, *map(str, numbers))
    return table


def _machines(pools: dict[str, pool_pb2.PoolStatus | None]) -> Table:
    table = Table("pool node", "tier", title="lower tiers")
    for title in ("blocks", "MiB", "hit rate", "in", "out", "declined", "leases"):
        table.add_column(title, justify="right")
    for member_id, pool in pools.items():
        if pool is None:
            table.add_row(member_id, "[red]does not answer[/red]")
            continue
        numbers = pool.numbers
        if "baton_pool_host_slots" not in numbers:
            table.add_row(member_id, "none")
            continue
        table.add_row(member_id, "host", *_host_row(numbers))
        if "baton_pool_disk_blocks" in numbers:
            table.add_row(member_id, "disk", *_disk_row(numbers))
        if "baton_pool_external_connected" in numbers:
            table.add_row(member_id, "external", *_external_row(numbers))
        if numbers["baton_pool_promoted_remote"] or numbers["baton_pool_failed_remote"]:
            fetched = f"{numbers['baton_pool_promoted_remote']:g}"
            table.add_row(member_id, "remote", "", "", "", fetched)
    return table


def _host_row(numbers: Any) -> list[str]:
    asked = numbers["baton_pool_host_hits"] + numbers["baton_pool_host_misses"]
    leases = numbers["baton_pool_host_holds"] + numbers["baton_pool_host_tickets"]
    return [
        f"{numbers['baton_pool_host_used']:g}/{numbers['baton_pool_host_slots']:g}",
        f"{numbers['baton_pool_host_bytes'] / _MIB:.0f}",
        f"{numbers['baton_pool_host_hits'] / asked:.0%}" if asked else "-",
        f"{numbers['baton_pool_host_published']:g}",
        f"{numbers['baton_pool_host_evictions']:g}",
        f"{numbers['baton_pool_host_declined']:g}",
        f"{leases:g}",
    ]


def _disk_row(numbers: Any) -> list[str]:
    read = numbers["baton_pool_disk_hits"] + numbers["baton_pool_disk_misses"]
    suspended = " (suspended)" if numbers["baton_pool_disk_suspended"] else ""
    return [
        f"{numbers['baton_pool_disk_blocks']:g}",
        f"{numbers['baton_pool_disk_bytes'] / _MIB:.0f}"
        f"/{numbers['baton_pool_disk_max_bytes'] / _MIB:.0f}{suspended}",
        f"{numbers['baton_pool_disk_hits'] / read:.0%}" if read else "-",
        f"{numbers['baton_pool_demoted']:g}",
        f"{numbers['baton_pool_promoted_disk']:g}",
        "",
        "",
    ]


def _external_row(numbers: Any) -> list[str]:
    asked = numbers["baton_pool_promoted_external"] + numbers["baton_pool_failed_external"]
    return [
        "" if numbers["baton_pool_external_connected"] else "[red]not reached[/red]",
        "",
        f"{numbers['baton_pool_promoted_external'] / asked:.0%}" if asked else "-",
        f"{numbers['baton_pool_external_stored']:g}",
        f"{numbers['baton_pool_promoted_external']:g}",
        f"{numbers['baton_pool_external_refused']:g}",
        "",
    ]


def _prefixes(pools: dict[str, pool_pb2.PoolStatus | None]) -> Table:
    table = Table("pool node", "prefix (last block's key)", title="most asked for")
    for title in ("blocks", "lookups"):
        table.add_column(title, justify="right")
    for member_id, pool in pools.items():
        for use in pool.top_prefixes if pool is not None else ():
            table.add_row(member_id, use.key.hex(), str(use.num_blocks), str(use.num_lookups))
    return table


def _plain(
    status: cluster_pb2.ClusterStatus, pools: dict[str, pool_pb2.PoolStatus | None]
) -> dict[str, Any]:
    return {
        "instances": [
            {
                "instance_id": item.instance_id,
                "role": item.role,
                "num_blocks": item.num_blocks,
                "num_cached_blocks": item.num_cached_blocks,
                "num_free_blocks": item.num_free_blocks,
                "num_held": item.num_held,
                "num_leases": item.num_leases,
                "num_pending_kv": item.num_pending_kv,
            }
            for item in status.instances
            if item.state != "dead"
        ],
        "pool_nodes": {
            member_id: None
            if pool is None
            else {
                "numbers": dict(pool.numbers),
                "top_prefixes": [
                    {
                        "key": use.key.hex(),
                        "num_blocks": use.num_blocks,
                        "num_lookups": use.num_lookups,
                    }
                    for use in pool.top_prefixes
                ],
                **({"dump": pool.dump} if pool.dump else {}),
            }
            for member_id, pool in pools.items()
        },
    }
