"""What the bytes of a KV block mean, and whether two sides mean the same."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal, cast

LAYOUT_VERSION = 2

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
_NUMBER = "([1-9][0-9]{0,8})"
_TEXT = re.compile(
    f"v{_NUMBER}:(gqa|mla):(float32|bfloat16)"
    f":block={_NUMBER}:layers={_NUMBER}:heads={_NUMBER}:dim={_NUMBER}:shards={_NUMBER}"
)
_WORDS = {
    "version": "version",
    "kind": "kind",
    "dtype": "dtype",
    "block_size": "block size",
    "num_layers": "number of layers",
    "num_kv_heads": "number of KV heads",
    "head_dim": "head dim",
}
"""What has to be equal for blocks to be converted, as people call it."""


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

    @classmethod
    def parse(cls, text: str) -> KVLayout:
        """The layout that has this text. Raises ValueError for any other, or another version."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} describes no KV layout")
        version, kind, dtype, *numbers = match.groups()
        if int(version) != LAYOUT_VERSION:
            raise ValueError(
                f"{text!r} is a KV layout of version {version}, this code knows {LAYOUT_VERSION}: "
                "run the same release on both sides"
            )
        block_size, num_layers, num_kv_heads, head_dim, num_shards = map(int, numbers)
        return cls(
            dtype=cast(Literal["float32", "bfloat16"], dtype),
            block_size=block_size,
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            kind=cast(Literal["gqa", "mla"], kind),
            num_shards=num_shards,
        )

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
    def total_kv_heads(self) -> int:
        """Heads of all shards."""
        return self.num_shards * self.num_kv_heads

    @property
    def canonical(self) -> KVLayout:
        """The same content in one shard. Layouts with equal ones can be turned into each other,
        and keys of blocks are salted with its text: they do not depend on the number of ranks."""
        return dataclasses.replace(self, num_shards=1, num_kv_heads=self.total_kv_heads)

    def convertible_to(self, other: KVLayout) -> str | None:
        """``None`` if blocks can be resharded into ``other``, else what differs, in words."""
        mine, theirs = self.canonical, other.canonical
        differences = [
            f"{word} {getattr(mine, name)} is not {getattr(theirs, name)}"
            for name, word in _WORDS.items()
            if getattr(mine, name) != getattr(theirs, name)
        ]
        return ", ".join(differences) or None

    @property
    def text(self) -> str:
        """In one line, as ``parse`` takes it; equal texts, compatible bytes."""
        return (
            f"v{self.version}:{self.kind}:{self.dtype}:block={self.block_size}"
            f":layers={self.num_layers}:heads={self.num_kv_heads}:dim={self.head_dim}"
            f":shards={self.num_shards}"
        )


def canonical_text(text: str) -> str:
    """Equal for texts of layouts that can be turned into each other; pure.

    A text that describes no layout of this version stands for itself alone.
    """
    try:
        return KVLayout.parse(text).canonical.text
    except ValueError:
        return text
