"""What the bytes of a KV block mean, and whether two sides mean the same."""

from __future__ import annotations

import dataclasses
from typing import Literal

LAYOUT_VERSION = 2

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape of one block: ``[num_shards, num_layers, num_planes, block_size, num_kv_heads,
    head_dim]``, contiguous.

    All layers of a block lie together, so that a block travels as one copy and a run of
    neighbouring blocks too. Each rank reads and writes one shard; ranks that hold the same heads
    share one, and write the same bits. Planes: key and value, or with MLA the one latent that
    both are made of.
    """

    dtype: Literal["float32", "bfloat16"]
    block_size: int
    """Tokens per block."""
    num_layers: int
    num_kv_heads: int
    """Heads of one shard."""
    head_dim: int
    """With MLA: the latent's width, compressed KV before rotated key."""
    kind: Literal["gqa", "mla"] = "gqa"
    num_shards: int = 1
    version: int = LAYOUT_VERSION

    def __post_init__(self) -> None:
        for name in ("block_size", "num_layers", "num_kv_heads", "head_dim", "num_shards"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dtype not in _DTYPE_BYTES:
            raise ValueError(f"dtype must be one of {sorted(_DTYPE_BYTES)}, got {self.dtype!r}")

    @property
    def num_planes(self) -> int:
        """Numbers per head dim and token: key and value, or one latent."""
        return 1 if self.kind == "mla" else 2

    @property
    def num_pages(self) -> int:
        """Pages of one block: a page holds one plane of one layer of one shard."""
        return self.num_shards * self.num_layers * self.num_planes

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers and shards."""
        page = self.block_size * self.num_kv_heads * self.head_dim
        return self.num_pages * page * _DTYPE_BYTES[self.dtype]

    @property
    def text(self) -> str:
        """Canonical text; equal texts, compatible bytes."""
        return (
            f"v{self.version}:{self.kind}:{self.dtype}:block={self.block_size}"
            f":layers={self.num_layers}:heads={self.num_kv_heads}:dim={self.head_dim}"
            f":shards={self.num_shards}"
        )
