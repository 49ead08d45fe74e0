"""Grouped-query attention over the paged cache.

The query heads that share a key head are laid side by side, as extra queries (decode) or as heads
over a stride-0 key (chunks), so keys and values are never repeated in memory.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from baton.engine.kv_cache import KVCache
from baton.engine.step_inputs import QUERY_QUANTUM, Segment, StepInputs


def paged_attention(q_THD: Tensor, cache: KVCache, layer: int, inputs: StepInputs) -> Tensor:
    """Attend from every token of the step to its row's cached context, itself included.

    ``q_THD`` [tokens, query heads, head dim], rotated; the step's own keys and values must already
    be in ``cache``. Returns [tokens, query heads * head dim].
    """
    out_TW = q_THD.new_zeros(len(q_THD), q_THD.shape[1] * q_THD.shape[2])
    for segment in inputs.segments:
        attend = _chunk if segment.tiles else _decode
        attend(q_THD, cache, layer, segment, out_TW)
    return out_TW


def _decode(q_THD: Tensor, cache: KVCache, layer: int, segment: Segment, out_TW: Tensor) -> None:
    """Rows of one token: the heads of a group act as the queries of a tiny sequence."""
    num_rows = segment.end - segment.begin
    num_kv_heads, head_dim = cache.layout.num_kv_heads, cache.layout.head_dim
    group = q_THD.shape[1] // num_kv_heads
    kv = cache.read(segment.pages_LN[layer], num_rows)[:, :, : segment.context]
    k, v = kv.transpose(2, 3).unbind(0)
    q = q_THD[segment.begin : segment.end].view(num_rows, num_kv_heads, group, head_dim)
    if group % QUERY_QUANTUM:
        q = F.pad(q, (0, 0, 0, -group % QUERY_QUANTUM))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=segment.mask_B11S)
    rows = out_TW[segment.begin : segment.end].view(num_rows, num_kv_heads, group, head_dim)
    rows.copy_(out[:, :, :group])


def _chunk(q_THD: Tensor, cache: KVCache, layer: int, segment: Segment, out_TW: Tensor) -> None:
    """One sequence's chunk: key heads act as the batch, a group's query heads as the heads."""
    num_kv_heads, head_dim = cache.layout.num_kv_heads, cache.layout.head_dim
    group = q_THD.shape[1] // num_kv_heads
    kv = cache.read(segment.pages_LN[layer], 1)[:, 0]
    kv = kv.transpose(1, 2).unsqueeze(2).expand(-1, -1, group, -1, -1)
    for tile in segment.tiles:
        count = tile.end - tile.begin
        q = q_THD[tile.begin : tile.end].view(count, num_kv_heads, group, head_dim)
        q = F.pad(q.permute(1, 2, 0, 3), (0, 0, 0, len(tile.mask_TS) - count))
        k, v = kv[:, :, :, : tile.context].unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=tile.mask_TS)[:, :, :count]
        out = out_TW[tile.begin : tile.end].view(count, num_kv_heads, group, head_dim)
        out.copy_(attended.permute(2, 0, 1, 3))
