"""What follows from the profiles that a cluster's settings name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from baton.core.config import PoolConfig, ServeConfig
from baton.core.cost_model import CostModel
from baton.engine.profile_file import load_profile


def fill_from_profile(values: dict[str, Any]) -> None:
    """Give the engine of an emulated device the sizes of its profile, where the user gives none.

    ``values`` are settings as they were written, groups as maps. Wrong ones are left for the
    validation. Raises ConfigError for a profile that cannot be read.
    """
    engine = values.get("engine")
    if not isinstance(engine, dict) or engine.get("device") != "emulated":
        return
    path = engine.get("profile")
    if not isinstance(path, str | Path):
        return
    # Each instance reads it, from another working folder.
    path = Path(path).expanduser().resolve()
    engine["profile"] = str(path)
    profile = load_profile(path)
    block_size = engine.setdefault("block_size", profile.block_size)
    if isinstance(block_size, int) and block_size > 0:
        engine.setdefault("num_blocks", max(1, profile.kv_capacity_tokens // block_size))
    for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens"):
        engine.setdefault(name, getattr(profile, name))


def predicted_costs(config: ServeConfig) -> CostModel | None:
    """What the controller's predictions start from; ``None``: what it measures.

    Emulated instances are known: their own profile, unless another is named, with its time dilated
    as theirs is. Raises ConfigError for a profile that cannot be read.
    """
    path = config.controller.profile or config.engine.profile
    if path is None:
        return None
    cost = load_profile(Path(path).expanduser()).cost
    return cost.dilated(config.engine.time_dilation)


def real_pool(config: ServeConfig, slot_bytes: int) -> PoolConfig:
    """The pool's settings in bytes that are really there.

    Tiers of an emulated cluster are given in the bytes of the profile's model; its blocks have only
    ``slot_bytes``. As they are where nothing is emulated.
    """
    engine, pool = config.engine, config.pool
    if engine.profile is None:
        return pool
    cost = load_profile(Path(engine.profile)).cost
    share = slot_bytes / (cost.kv_bytes_per_token * engine.block_size)
    return dataclasses.replace(
        pool,
        host_bytes=max(slot_bytes, int(pool.host_bytes * share)),
        disk_bytes=max(slot_bytes, int(pool.disk_bytes * share)),
    )
