"""What the bytes of a KV block mean, and whether two sides mean the same."""

from __future__ import annotations

import dataclasses
from typing import Literal

LAYOUT_VERSION = 1

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape of one block: ``[num_layers, 2, block_size, num_kv_heads, head_dim]``, contiguous.

    All layers of a block lie together, so that a block travels as one copy and a run of
    neighbouring blocks too. Axis 1 is key, value.
    """

    dtype: Literal["float32", "bfloat16"]
    block_size: int
    """Tokens per block."""
    num_layers: int
    num_kv_heads: int
    """Heads of this rank."""
    head_dim: int
    kind: Literal["gqa"] = "gqa"
    tp_rank: int = 0
    tp_size: int = 1
    version: int = LAYOUT_VERSION

    def __post_init__(self) -> None:
        for name in ("block_size", "num_layers", "num_kv_heads", "head_dim", "tp_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dtype not in _DTYPE_BYTES:
            raise ValueError(f"dtype must be one of {sorted(_DTYPE_BYTES)}, got {self.dtype!r}")

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        per_token = self.num_layers * 2 * self.num_kv_heads * self.head_dim
        return per_token * self.block_size * _DTYPE_BYTES[self.dtype]

    @property
    def text(self) -> str:
        """Canonical text; equal texts, compatible bytes."""
        return (
            f"v{self.version}:{self.kind}:{self.dtype}:block={self.block_size}"
            f":layers={self.num_layers}:heads={self.num_kv_heads}:dim={self.head_dim}"
            f":tp={self.tp_rank}/{self.tp_size}"
        )
