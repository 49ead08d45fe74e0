"""What would run where: the choices of a real load, made by the same code, without weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from baton.core.config import EngineConfig
from baton.engine.checkpoint import Checkpoint
from baton.engine.kv_cache import TORCH_DTYPES
from baton.engine.loader import load_model
from baton.engine.ops.catalog import CATALOG
from baton.engine.ops.devices import find_device
from baton.engine.ops.registry import Choice, Implementation, Ops
from baton.engine.parallel.mesh import Axes, Mesh


@dataclasses.dataclass(slots=True)
class OutlineComm:
    """A place in a group whose other members are not there: enough to load, not to compute."""

    rank: int
    size: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """Nobody is there."""
        raise AssertionError("an outlined mesh cannot compute")

    def all_gather(self, x: Tensor) -> Tensor:
        """Nobody is there."""
        raise AssertionError("an outlined mesh cannot compute")

    def all_to_all(
        self, x: Tensor, send_rows: list[int] | None, receive_rows: list[int] | None
    ) -> Tensor:
        """Nobody is there."""
        raise AssertionError("an outlined mesh cannot compute")


def outline_mesh(axes: Axes, rank: int) -> Mesh:
    """The mesh that ``rank`` would see, without the other ranks."""
    return Mesh(
        axes,
        rank,
        tp=OutlineComm(rank % axes.tp, axes.tp),
        ep=OutlineComm(rank, axes.world_size) if axes.ep > 1 else OutlineComm(0, 1),
        dp=OutlineComm(rank // axes.group_size, axes.dp),
    )


def dry_choices(
    checkpoint: Checkpoint,
    config: EngineConfig,
    *,
    rank: int = 0,
    implementations: Sequence[Implementation] | None = None,
) -> tuple[Choice, ...]:
    """What an ``InlineRunner`` of this rank would bind, in the same order; takes milliseconds.

    ``ConfigError`` for a device that is not there or ranks that the model cannot be cut for.
    """
    ops = Ops(find_device(config.device), TORCH_DTYPES[config.dtype], implementations, dry=True)
    mesh = outline_mesh(Axes(config.tp, config.ep, config.dp), rank)
    load_model(checkpoint, ops=ops, max_len=1, mesh=mesh, exchange=config.exchange)
    ops.bind("sample", "*")
    return ops.choices


def unused_ops(choices: Sequence[Choice]) -> tuple[str, ...]:
    """Operations of the catalog that a model asks for nowhere, in the catalog's order."""
    used = {choice.site.op for choice in choices}
    return tuple(dict.fromkeys(item.op for item in CATALOG if item.op not in used))
