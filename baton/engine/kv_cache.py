"""The KV cache of one rank, as tensors over memory that someone else may own.

The bytes are those of ``KVLayout``, block after block. Two flat views make paging cheap on any
device: *rows*, one per (block, shard, layer, plane, token), for writing single tokens, and *pages*,
one per (block, shard, layer, plane), for reading whole blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvpool.layout import KVLayout

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class KVCache:
    """Keys and values of all layers.

    ``buffer`` (CPU only) must be writable, at least ``num_blocks * layout.block_bytes`` long, and
    hold finite numbers: zeros, or what a cache of the same layout left there. Attention multiplies
    the masked tail of a block by zero, which is no defence against NaN. It must stay mapped until
    ``close``: torch keeps an address, not the mapping. Without ``buffer`` the cache allocates its
    own memory. ``ValueError`` for a buffer that does not fit.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: int,
        device: torch.device,
        buffer: memoryview | None = None,
        *,
        shard: int = 0,
    ) -> None:
        self.layout = layout
        self.shard = shard
        """Which shard of every block this rank reads and writes."""
        self.num_blocks = num_blocks
        dtype = TORCH_DTYPES[layout.dtype]
        shape = (
            num_blocks,
            layout.num_shards,
            layout.num_layers,
            layout.num_planes,
            layout.block_size,
            layout.num_kv_heads,
            layout.head_dim,
        )
        if buffer is None:
            self.tensor = torch.zeros(shape, dtype=dtype, device=device)
        else:
            needed = num_blocks * layout.block_bytes
            if device.type != "cpu":
                raise ValueError(f"a KV buffer in host memory cannot serve device {device}")
            if buffer.readonly or buffer.nbytes < needed:
                raise ValueError(
                    f"the KV buffer must be writable and hold {needed} bytes; it has "
                    f"{buffer.nbytes} and readonly={buffer.readonly}"
                )
            count = needed // dtype.itemsize
            self.tensor = torch.frombuffer(buffer, dtype=dtype, count=count).view(shape)
        width = layout.num_kv_heads * layout.head_dim
        self.rows = self.tensor.view(-1, width)
        """[num_blocks * num_pages * block_size, num_kv_heads * head_dim]"""
        self.pages = self.tensor.view(-1, layout.block_size * width)
        """[num_blocks * num_pages, block_size * num_kv_heads * head_dim]"""

    def read(self, pages_N: Tensor, num_rows: int) -> Tensor:
        """Gather pages, plane by plane: [planes, num_rows, S, kv_heads, dim]."""
        layout = self.layout
        gathered = self.pages.index_select(0, pages_N)
        return gathered.view(layout.num_planes, num_rows, -1, layout.num_kv_heads, layout.head_dim)

    def close(self) -> None:
        """Forget the buffer: its owner may unmap it, and later use fails. Idempotent."""
        self.tensor = self.rows = self.pages = torch.empty(0)
