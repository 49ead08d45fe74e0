"""Placement policies by name. To add one: a file with a class that scores, and its name.

``controller.policy: my_package.my_module:MyPolicy`` uses a class from anywhere on the path; see
docs/operations.md, "A placement policy of your own".
"""

from __future__ import annotations

import importlib

from baton.core.errors import ConfigError
from controller.policies.base import PlacementPolicy
from controller.policies.colocated import Colocated
from controller.policies.least_loaded import LeastLoaded
from controller.policies.prefix_affinity import PrefixAffinity
from controller.policies.round_robin import RoundRobin
from controller.policies.slo import SloAware

_POLICIES: tuple[type[PlacementPolicy], ...] = (
    SloAware,
    LeastLoaded,
    RoundRobin,
    PrefixAffinity,
    Colocated,
)
POLICIES: dict[str, type[PlacementPolicy]] = {kind.name: kind for kind in _POLICIES}


def make_policy(name: str) -> PlacementPolicy:
    """One of ``POLICIES``, or ``package.module:Class``. Raises ConfigError."""
    if name in POLICIES:
        return POLICIES[name]()
    module, colon, attribute = name.partition(":")
    if not colon:
        known = ", ".join(POLICIES)
        raise ConfigError(
            f"controller.policy is {name!r}; expected one of {known}, or package.module:Class",
            param="controller.policy",
        )
    try:
        kind = getattr(importlib.import_module(module), attribute)
        policy: PlacementPolicy = kind()
    except (ImportError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"controller.policy {name!r} cannot be loaded: {error}", param="controller.policy"
        ) from error
    for needed in ("name", "colocates", "score"):
        if not hasattr(policy, needed):
            raise ConfigError(
                f"controller.policy {name!r} has no {needed!r}: see PlacementPolicy in "
                "controller/policies/base.py",
                param="controller.policy",
            )
    return policy
