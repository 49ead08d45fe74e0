"""Paged attention by torch's fused attention, over gathered pages.

The query heads that share a key head are laid side by side, as extra queries (decode) or as heads
over a stride-0 key (chunks), so keys and values are never repeated in memory. MLA is the same with
one key head whose value is the key itself: queries are taken into the latent space first, and
what comes out is taken out of it (the absorbed form), so that what is read per token is what the
cache holds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from baton.engine.kv_cache import KVCache
from baton.engine.step_inputs import QUERY_QUANTUM, Segment, StepInputs


def paged_attention(
    q_TGD: Tensor, cache: KVCache, layer: int, inputs: StepInputs, scale: float
) -> Tensor:
    """See ``reference.paged_attention``."""
    out_TW = q_TGD.new_zeros(len(q_TGD), q_TGD.shape[1] * q_TGD.shape[2])
    for segment in inputs.segments:
        attend = _chunk if segment.tiles else _decode
        attend(q_TGD, cache, layer, segment, scale, out_TW)
    return out_TW


def mla_attention(
    q_nope_TGN: Tensor,
    q_rope_TGR: Tensor,
    cache: KVCache,
    layer: int,
    inputs: StepInputs,
    scale: float,
    w_uk_GNC: Tensor,
    w_uv_GCV: Tensor,
) -> Tensor:
    """See ``reference.mla_attention``."""
    rank = w_uk_GNC.shape[2]
    q_latent = torch.bmm(q_nope_TGN.transpose(0, 1), w_uk_GNC).transpose(0, 1)
    q = torch.cat((q_latent, q_rope_TGR), -1)
    attended = paged_attention(q, cache, layer, inputs, scale).view_as(q)[..., :rank]
    return torch.bmm(attended.transpose(0, 1), w_uv_GCV).transpose(0, 1).flatten(1)


def _decode(
    q_TGD: Tensor, cache: KVCache, layer: int, segment: Segment, scale: float, out_TW: Tensor
) -> None:
    """Rows of one token: the heads of a group act as the queries of a tiny sequence."""
    num_rows = segment.end - segment.begin
    num_kv_heads, head_dim = cache.layout.num_kv_heads, cache.layout.head_dim
    group = q_TGD.shape[1] // num_kv_heads
    planes = cache.read(segment.pages_LN[layer], num_rows)[:, :, : segment.context]
    planes = planes.transpose(2, 3)
    q = q_TGD[segment.begin : segment.end].view(num_rows, num_kv_heads, group, head_dim)
    if group % QUERY_QUANTUM:
        q = F.pad(q, (0, 0, 0, -group % QUERY_QUANTUM))
    out = F.scaled_dot_product_attention(
        q, planes[0], planes[-1], attn_mask=segment.mask_B11S, scale=scale
    )
    rows = out_TW[segment.begin : segment.end].view(num_rows, num_kv_heads, group, head_dim)
    rows.copy_(out[:, :, :group])


def _chunk(
    q_TGD: Tensor, cache: KVCache, layer: int, segment: Segment, scale: float, out_TW: Tensor
) -> None:
    """One sequence's chunk: key heads act as the batch, a group's query heads as the heads."""
    num_kv_heads, head_dim = cache.layout.num_kv_heads, cache.layout.head_dim
    group = q_TGD.shape[1] // num_kv_heads
    planes = cache.read(segment.pages_LN[layer], 1)[:, 0]
    planes = planes.transpose(1, 2).unsqueeze(2).expand(-1, -1, group, -1, -1)
    for tile in segment.tiles:
        count = tile.end - tile.begin
        q = q_TGD[tile.begin : tile.end].view(count, num_kv_heads, group, head_dim)
        q = F.pad(q.permute(1, 2, 0, 3), (0, 0, 0, len(tile.mask_TS) - count))
        context = planes[:, :, :, : tile.context]
        attended = F.scaled_dot_product_attention(
            q, context[0], context[-1], attn_mask=tile.mask_TS, scale=scale
        )
        out = out_TW[tile.begin : tile.end].view(count, num_kv_heads, group, head_dim)
        out.copy_(attended[:, :, :count].permute(2, 0, 1, 3))
