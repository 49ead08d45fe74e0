"""What is stored of each instance's role: ``role/<instance>`` holds the role, and who chose it.

    decode              an operator chose it: pinned, and kept until an operator says otherwise
    decode auto <run>   the planner did: kept while that run of the cluster lasts

A new cluster of the same name begins with the split it was started with, and with what operators
chose. The roles that the planner found for another set of instances might leave it without a path.
"""

from __future__ import annotations

from collections.abc import Mapping

from baton.core.cluster import Role

ROLE_KEY_PREFIX = "role/"
_AUTO = "auto"


def stored_choice(role: Role, *, pinned: bool, run_id: str) -> str:
    """The value to store."""
    return str(role) if pinned else f"{role} {_AUTO} {run_id}"


def choices_from_store(stored: Mapping[str, str], run_id: str) -> tuple[dict[str, Role], set[str]]:
    """(role by instance, pinned instances), without what other runs' planners chose.

    What cannot be read is left out: it must not stop a controller.
    """
    roles: dict[str, Role] = {}
    pinned: set[str] = set()
    for key, value in stored.items():
        role, _, by = value.partition(" ")
        if not key.startswith(ROLE_KEY_PREFIX) or role not in Role._value2member_map_:
            continue
        if by and by != f"{_AUTO} {run_id}":
            continue
        name = key.removeprefix(ROLE_KEY_PREFIX)
        roles[name] = Role(role)
        if not by:
            pinned.add(name)
    return roles, pinned
