"""Puts a model together: which tensors, which slices of them on this rank, and bound to which ops.

Everything that depends on ranks or devices is decided here, once. The model that comes out is
plain calls.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from baton.core.config import ExchangeName
from baton.core.errors import ConfigError
from baton.engine.checkpoint import Checkpoint
from baton.engine.layers import LocalExperts, Mlp, Moe, RotaryTable, embed
from baton.engine.models.attention import AttentionOps, GroupedQueryAttention, LatentAttention
from baton.engine.models.config import MlaConfig, ModelConfig, MoeConfig
from baton.engine.models.decoder import Decoder, Layer
from baton.engine.models.tensors import EMBED, FINAL_NORM, LM_HEAD, expert_prefix, layer_prefix
from baton.engine.ops.linear import Linear
from baton.engine.ops.registry import Ops
from baton.engine.parallel.exchange import Exchange, make_exchange
from baton.engine.parallel.layers import (
    GatheredLinear,
    SplitEmbedding,
    SummedLinear,
)
from baton.engine.parallel.mesh import Mesh, single_mesh
from baton.engine.resident import large_pieces_apart
from baton.engine.weights import ALL, Progress, WeightSource


def load_model(
    checkpoint: Checkpoint,
    *,
    ops: Ops,
    max_len: int,
    mesh: Mesh | None = None,
    exchange: ExchangeName = "auto",
    progress: Progress | None = None,
) -> Decoder:
    """Load this rank's weights and bind its operations, on the device and in the dtype of ``ops``.

    With dry ``ops`` the same choices are made, and nothing is read or allocated.

    ``max_len``: how many positions will ever be asked for. ``ConfigError`` for a model that cannot
    be cut as ``mesh`` wants.
    """
    source = WeightSource(checkpoint, ops.dtype, ops.weight_device, progress)
    try:
        with large_pieces_apart():
            return _Builder(source, ops, mesh or single_mesh(), exchange, max_len).model()
    except ValueError as error:
        raise ConfigError(
            f"{checkpoint.path}: {error}; use another number of ranks", param="engine"
        ) from error


def attention_scale(config: ModelConfig) -> float:
    """What scores are multiplied with before the softmax."""
    scale: float = config.head_dim**-0.5
    return scale * config.rope.softmax_factor


class _Builder:
    def __init__(
        self, source: WeightSource, ops: Ops, mesh: Mesh, exchange: ExchangeName, max_len: int
    ) -> None:
        self.config: ModelConfig = source.config
        self.source = source
        self.ops = ops
        self.mesh = mesh
        self.max_len = max_len
        hidden = self.config.hidden_size
        self.rms_norm = ops.bind("rms_norm", "*", width=hidden)
        self.add_rms_norm = ops.bind("add_rms_norm", "*", width=hidden)
        self.swiglu = ops.bind("swiglu", "*")
        self.attention_ops = self._attention_ops()
        self.exchange: Exchange | None = None
        if self.config.moe is not None:
            experts = self.config.moe.num_experts
            self.exchange = make_exchange(mesh, exchange, experts, ops.device)

    def model(self) -> Decoder:
        config, source = self.config, self.source
        rotary_dim = config.head_dim if config.mla is None else config.mla.qk_rope_head_dim
        return Decoder(
            config=config,
            embedding=self._embedding(),
            layers=tuple(self._layer(number) for number in range(config.num_layers)),
            final_norm=source.load(FINAL_NORM),
            lm_head=self._lm_head(),
            rotary=RotaryTable(
                config.rope, rotary_dim, self.max_len, source.device, self.ops.dtype
            ),
            rms_norm=self.rms_norm,
            add_rms_norm=self.add_rms_norm,
        )

    def _attention_ops(self) -> AttentionOps:
        config, ops = self.config, self.ops
        heads = len(range(*self._heads().indices(config.num_heads)))
        rotary_dim = config.head_dim if config.mla is None else config.mla.qk_rope_head_dim
        if config.mla is None:
            attention = ops.bind(
                "paged_attention",
                "layers.*.attention",
                heads=heads,
                kv_heads=max(1, config.num_kv_heads // self.mesh.tp.size),
                head_dim=config.head_dim,
            )
        else:
            attention = ops.bind(
                "mla_attention",
                "layers.*.attention",
                heads=heads,
                latent_dim=config.mla.latent_dim,
                v_head_dim=config.mla.v_head_dim,
            )
        return AttentionOps(
            rms_norm=ops.bind("rms_norm", "layers.*.attention"),
            rotary=ops.bind("rotary", "layers.*.attention", dim=rotary_dim),
            cache_write=ops.bind("cache_write", "layers.*.attention"),
            attention=attention,
        )

    # The ends.

    def _embedding(self) -> Any:
        weight = self.source.mapped(EMBED)
        dtype = self.ops.dtype
        if self.ops.device.type == "cpu":
            # Looked up where it lies: rows of the file's pages, on every rank.
            return functools.partial(embed, weight=weight, dtype=dtype)
        first, rows = self._vocabulary()
        part = self.source.join([weight[first : first + rows]])
        if self.mesh.tp.size == 1:
            return functools.partial(embed, weight=part, dtype=dtype)
        return SplitEmbedding(part, first, self.mesh.tp, dtype)

    def _lm_head(self) -> Linear:
        name = EMBED if self.config.tie_word_embeddings else LM_HEAD
        weight = self.source.mapped(name)
        if self.mesh.tp.size == 1:
            return self._linear("lm_head", [weight])
        first, rows = self._vocabulary()
        parts = [weight[first : first + rows]]
        if len(parts[0]) < rows:
            parts.append(weight.new_zeros(rows - len(parts[0]), weight.shape[1]))
        return GatheredLinear(self._linear("lm_head", parts), self.mesh.tp, self.config.vocab_size)

    def _vocabulary(self) -> tuple[int, int]:
        """This rank's first token id, and how many each rank has, the last one's padding too."""
        rows = -(-self.config.vocab_size // self.mesh.tp.size)
        return self.mesh.tp.rank * rows, rows

    # Layers.

    def _layer(self, number: int) -> Layer:
        prefix = layer_prefix(number)
        config, source = self.config, self.source
        if config.moe is not None and config.is_moe_layer(number):
            mlp: Mlp | Moe = self._moe(number, config.moe)
        else:
            mlp = self._mlp(prefix + "mlp.", "layers.*.mlp", config.intermediate_size)
        attention = self._gqa if config.mla is None else functools.partial(self._mla, config.mla)
        return Layer(
            input_norm=source.load(prefix + "input_layernorm.weight"),
            attention=attention(prefix + "self_attn."),
            mlp_norm=source.load(prefix + "post_attention_layernorm.weight"),
            mlp=mlp,
        )

    def _gqa(self, prefix: str) -> GroupedQueryAttention:
        config, source = self.config, self.source
        heads, kv_heads = self._heads(), self._kv_heads()
        dim = config.head_dim
        cuts = {"q": _scaled(heads, dim), "k": _scaled(kv_heads, dim), "v": _scaled(kv_heads, dim)}
        weights = [source.mapped(f"{prefix}{part}_proj.weight")[cut] for part, cut in cuts.items()]
        biases = None
        if config.qkv_bias:
            biases = [source.mapped(f"{prefix}{part}_proj.bias")[cut] for part, cut in cuts.items()]
        num_heads, num_kv_heads = heads.stop - heads.start, kv_heads.stop - kv_heads.start
        qk_norm = None
        if config.qk_norm:
            norms = (
                source.load(prefix + "q_norm.weight").expand(num_heads, -1),
                source.load(prefix + "k_norm.weight").expand(num_kv_heads, -1),
            )
            qk_norm = torch.cat(norms)
        return GroupedQueryAttention(
            ops=self.attention_ops,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=dim,
            scale=attention_scale(config),
            eps=config.rms_norm_eps,
            qkv=self._linear("layers.*.attention.qkv", weights, biases),
            qk_norm=qk_norm,
            output=self._output(prefix, _scaled(heads, dim)),
        )

    def _mla(self, mla: MlaConfig, prefix: str) -> LatentAttention:
        config, source = self.config, self.source
        heads = self._heads()
        num_heads = heads.stop - heads.start
        rows = _scaled(heads, mla.qk_head_dim)
        kv_down = source.mapped(prefix + "kv_a_proj_with_mqa.weight")
        kv_down = self._uninterleaved(kv_down, 1, mla.latent_dim)
        q_norm = q_up = None
        biases = None
        if mla.q_lora_rank is None:
            q = source.mapped(prefix + "q_proj.weight")[rows]
            weights = [self._uninterleaved(q, num_heads, mla.qk_head_dim), kv_down]
        else:
            weights = [source.mapped(prefix + "q_a_proj.weight"), kv_down]
            q_norm = source.load(prefix + "q_a_layernorm.weight")
            up = source.mapped(prefix + "q_b_proj.weight")[rows]
            up = self._uninterleaved(up, num_heads, mla.qk_head_dim)
            q_up = self._linear("layers.*.attention.q_up", [up])
        if config.qkv_bias:
            kv_bias = source.mapped(prefix + "kv_a_proj_with_mqa.bias").unsqueeze(1)
            kv_bias = self._uninterleaved(kv_bias, 1, mla.latent_dim).squeeze(1)
            # Direct query projections have none.
            no_bias = kv_bias.new_zeros(len(weights[0]))
            q_bias = no_bias if q_up is None else source.mapped(prefix + "q_a_proj.bias")
            biases = [q_bias, kv_bias]
        unfold = source.mapped(prefix + "kv_b_proj.weight")
        width = mla.qk_nope_head_dim + mla.v_head_dim
        unfold = source.join([unfold[_scaled(heads, width)]]).view(num_heads, width, -1)
        return LatentAttention(
            ops=self.attention_ops,
            num_heads=num_heads,
            config=mla,
            scale=attention_scale(config),
            eps=_LATENT_EPS,
            down=self._linear("layers.*.attention.down", weights, biases),
            q_norm=q_norm,
            q_up=q_up,
            kv_norm=source.load(prefix + "kv_a_layernorm.weight"),
            w_uk_GNC=unfold[:, : mla.qk_nope_head_dim].contiguous(),
            w_uv_GCV=unfold[:, mla.qk_nope_head_dim :].transpose(1, 2).contiguous(),
            output=self._output(prefix, _scaled(heads, mla.v_head_dim)),
        )

    def _uninterleaved(self, weight: Tensor, num_heads: int, width: int) -> Tensor:
        """Reorder each head's last, rotated rows from neighbouring pairs to halves."""
        mla = self.config.mla
        if mla is None or not self.config.rope.interleaved:
            return weight
        rotated = torch.arange(mla.qk_rope_head_dim).view(-1, 2).t().flatten()
        order = torch.arange(width)
        order[-mla.qk_rope_head_dim :] = rotated + (width - mla.qk_rope_head_dim)
        return weight.view(num_heads, width, -1)[:, order].flatten(0, 1)

    def _output(self, prefix: str, columns: slice) -> Linear:
        return self._summed(
            "layers.*.attention.output", prefix + "o_proj", columns, self.config.output_bias
        )

    def _mlp(self, prefix: str, where: str, width: int) -> Mlp:
        cut = self.mesh.split(width, "intermediate_size")
        gate_up = [self.source.mapped(f"{prefix}{part}_proj.weight")[cut] for part in _GATE_UP]
        biases = None
        if self.config.mlp_bias:
            biases = [self.source.mapped(f"{prefix}{part}_proj.bias")[cut] for part in _GATE_UP]
        return Mlp(
            gate_up=self._linear(where + ".gate_up", gate_up, biases),
            down=self._summed(where + ".down", prefix + "down_proj", cut, self.config.mlp_bias),
            swiglu=self.swiglu,
        )

    def _moe(self, number: int, moe: MoeConfig) -> Moe:
        prefix = layer_prefix(number) + "mlp."
        where = "layers.*.experts"
        # DeepSeek's own code routes in float32, whatever the model's dtype.
        router_dtype = torch.float32 if self.config.mla is not None else self.ops.dtype
        correction = None
        if moe.correction_bias:
            correction = self.source.join(
                [self.source.mapped(prefix + "gate.e_score_correction_bias")], torch.float32
            )
        shared = None
        if moe.shared_intermediate_size is not None:
            shared = self._mlp(
                prefix + "shared_experts.", "layers.*.shared", moe.shared_intermediate_size
            )
        assert self.exchange is not None
        return Moe(
            config=moe,
            router=self._linear(
                where + ".router", [self.source.mapped(prefix + "gate.weight")], None, router_dtype
            ),
            router_dtype=router_dtype,
            correction_E=correction,
            routing=self.ops.bind(
                "moe_routing", where, experts=moe.num_experts, top_k=moe.num_experts_per_tok
            ),
            experts=self._local_experts(number, moe, where),
            exchange=self.exchange,
            shared=shared,
        )

    def _local_experts(self, number: int, moe: MoeConfig, where: str) -> LocalExperts:
        # Experts are cut as wholes over ep; without ep their inner dim over tp.
        here = self.mesh.split_experts(moe.num_experts)
        cut = ALL
        width = moe.intermediate_size
        if self.mesh.ep.size == 1:
            cut = self.mesh.split(width, "moe_intermediate_size")
            width = cut.stop - cut.start
        names = [expert_prefix(number, expert) for expert in range(here.start, here.stop)]
        # One at a time: what is laid out anew need not stay.
        gate_up = (
            self.source.join(
                [self.source.mapped(f"{name}{part}_proj.weight")[cut] for part in _GATE_UP]
            )
            for name in names
        )
        down = (
            self.source.join([self.source.mapped(name + "down_proj.weight")[:, cut]])
            for name in names
        )
        hidden = self.config.hidden_size
        return LocalExperts(
            first=here.start,
            count=len(names),
            total=moe.num_experts,
            gate_up=self._grouped(where + ".gate_up", gate_up, hidden, 2 * width),
            down=self._grouped(where + ".down", down, width, hidden),
            swiglu=self.swiglu,
        )

    # Products.

    def _grouped(self, where: str, weights: Iterable[Tensor], inner: int, outer: int) -> Any:
        make = self.ops.bind("grouped_matmul", where, in_features=inner, out_features=outer)
        return make(weights)

    def _linear(
        self,
        where: str,
        weights: list[Tensor],
        biases: list[Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Linear:
        dtype = dtype or self.ops.dtype
        out_features = sum(map(len, weights))
        make = self.ops.bind(
            "linear", where, dtype, in_features=weights[0].shape[1], out_features=out_features
        )
        if len(weights) == 1 and weights[0].dtype == dtype and getattr(make, "repacks", False):
            weight = weights[0]  # the new layout is the copy
        else:
            weight = self.source.join(weights, dtype)
        linear: Linear = make(weight, None if biases is None else self.source.join(biases, dtype))
        return linear

    def _summed(self, where: str, name: str, columns: slice, with_bias: bool) -> Linear:
        """A product of which each tp rank has some columns."""
        tp = self.mesh.tp
        weight = self.source.mapped(name + ".weight")[:, columns]
        biases = [self.source.mapped(name + ".bias")] if with_bias and tp.rank == 0 else None
        linear = self._linear(where, [weight], biases)
        return linear if tp.size == 1 else SummedLinear(linear, tp)

    def _heads(self) -> slice:
        return self.mesh.split(self.config.num_heads, "num_attention_heads")

    def _kv_heads(self) -> slice:
        """Where there are fewer heads than ranks, neighbours hold the same one."""
        count, tp = self.config.num_kv_heads, self.mesh.tp
        if count >= tp.size:
            return self.mesh.split(count, "num_key_value_heads")
        if tp.size % count:
            raise ValueError(f"num_key_value_heads {count} cannot be shared by tp={tp.size}")
        head = tp.rank * count // tp.size
        return slice(head, head + 1)


_GATE_UP = ("gate", "up")
_LATENT_EPS = 1e-6
"""Of the norms inside MLA, whatever the config says of the others (the authors' own code)."""


def _scaled(heads: slice, width: int) -> slice:
    """Rows of whole heads."""
    return slice(heads.start * width, heads.stop * width)
