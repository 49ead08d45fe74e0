"""Grouped-query attention over the paged cache.

The query heads that share a key head are laid side by side, as extra queries (decode) or as heads
over a stride-0 key (chunks), so keys and values are never repeated in memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from baton.engine.kv_cache import KVCache
from baton.engine.step_inputs import Segment, StepInputs


def paged_attention(q_THD: Tensor, cache: KVCache, layer: int, inputs: StepInputs) -> Tensor:
    """Attend from every token of the step to its row's cached context, itself included.

    ``q_THD`` [tokens, query heads, head dim], rotated; the step's own keys and values must already
    be in ``cache``. Returns [tokens, query heads * head dim].
    """
    parts = [
        _chunk(q_THD, cache, layer, segment)
        if segment.tiles
        else _decode(q_THD, cache, layer, segment)
        for segment in inputs.segments
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _decode(q_THD: Tensor, cache: KVCache, layer: int, segment: Segment) -> Tensor:
    """Rows of one token: the heads of a group act as the queries of a tiny sequence."""
    num_rows = segment.end - segment.begin
    num_kv_heads, head_dim = cache.layout.num_kv_heads, cache.layout.head_dim
    kv = cache.read(segment.pages_LN[layer], num_rows)[:, :, : segment.context]
    k, v = kv.transpose(2, 3).unbind(0)
    q = q_THD[segment.begin : segment.end].view(num_rows, num_kv_heads, -1, head_dim)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=segment.mask_B11S)
    return out.reshape(num_rows, -1)


def _chunk(q_THD: Tensor, cache: KVCache, layer: int, segment: Segment) -> Tensor:
    """One sequence's chunk: key heads act as the batch, a group's query heads as the heads."""
    num_kv_heads, head_dim = cache.layout.num_kv_heads, cache.layout.head_dim
    group = q_THD.shape[1] // num_kv_heads
    kv = cache.read(segment.pages_LN[layer], 1)[:, 0]
    kv = kv.transpose(1, 2).unsqueeze(2).expand(-1, -1, group, -1, -1)
    out = q_THD.new_empty(segment.end - segment.begin, num_kv_heads, group, head_dim)
    for tile in segment.tiles:
        q = q_THD[tile.begin : tile.end].view(-1, num_kv_heads, group, head_dim)
        k, v = kv[:, :, :, : tile.context].unbind(0)
        attended = F.scaled_dot_product_attention(
            q.permute(1, 2, 0, 3), k, v, attn_mask=tile.mask_TS
        )
        begin, end = tile.begin - segment.begin, tile.end - segment.begin
        out[begin:end] = attended.permute(2, 0, 1, 3)
    return out.view(segment.end - segment.begin, -1)
