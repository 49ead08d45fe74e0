"""What a model is, read from its ``config.json``. No torch here: drivers and the CLI need this.

Only features that the forward pass implements are accepted; anything else is refused by name, so
that a checkpoint either runs as its authors meant it or does not run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from baton.core.config import EngineConfig
from baton.core.errors import ConfigError
from kvpool.layout import KVLayout

DENSE, MOE = "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"
ARCHITECTURES = (DENSE, MOE)


@dataclasses.dataclass(frozen=True, slots=True)
class MoeConfig:
    """The expert layers of a mixture-of-experts model."""

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    norm_topk_prob: bool
    """Whether the chosen experts' weights are scaled to sum to 1."""
    layers: tuple[int, ...]
    """Which layers are expert layers; the others have a dense MLP."""


@dataclasses.dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shapes and constants of a decoder-only transformer."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    moe: MoeConfig | None = None

    @property
    def q_size(self) -> int:
        """Width of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads."""
        return self.num_kv_heads * self.head_dim

    def is_moe_layer(self, layer: int) -> bool:
        """Whether ``layer`` has experts."""
        return self.moe is not None and layer in self.moe.layers


def kv_layout(model: ModelConfig, engine: EngineConfig) -> KVLayout:
    """The KV blocks that an engine with these settings reads and writes."""
    return KVLayout(
        dtype=engine.dtype,
        block_size=engine.block_size,
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
    )


def resolve_max_model_len(model: ModelConfig, engine: EngineConfig) -> int:
    """Longest sequence in tokens: the model's limit, the user's, and what the cache can hold.

    Raises ``ConfigError`` where the user asks for more than the model was made for.
    """
    wanted = engine.max_model_len
    if wanted is not None and wanted > model.max_position_embeddings:
        raise ConfigError(
            f"max_model_len {wanted} is more than the model's max_position_embeddings "
            f"{model.max_position_embeddings}: lower max_model_len",
            param="max_model_len",
        )
    limit = model.max_position_embeddings if wanted is None else wanted
    return min(limit, engine.num_blocks * engine.block_size)


def parse_config(raw: Mapping[str, Any], source: Path) -> ModelConfig:
    """Read a parsed ``config.json``; each refusal is a ``ConfigError`` that names ``source``."""
    fields = _Fields(raw, source)
    architecture = fields.architecture()
    fields.refuse_unsupported()
    num_heads = fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise fields.error(
            f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads "
            f"{num_kv_heads}",
            "repair the file",
        )
    hidden_size = fields.integer("hidden_size")
    # The two families disagree about what an absent head_dim means.
    implied = 128 if architecture == DENSE else hidden_size // num_heads
    head_dim = fields.integer("head_dim", implied)
    if head_dim % 2:
        raise fields.error(f"head_dim {head_dim} is odd, which RoPE cannot halve", "repair it")
    num_layers = fields.integer("num_hidden_layers")
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=fields.rope_theta(),
        max_position_embeddings=fields.integer("max_position_embeddings"),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        attention_bias=fields.flag("attention_bias"),
        moe=fields.moe(num_layers) if architecture == MOE else None,
    )


class _Fields:
    """Typed reading of one ``config.json``."""

    def __init__(self, raw: Mapping[str, Any], source: Path) -> None:
        self._raw = raw
        self._source = source

    def error(self, problem: str, remedy: str) -> ConfigError:
        return ConfigError(f"{self._source}: {problem}; {remedy}", param="model")

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._raw.get(name)
        if value is None:
            if default is None:
                raise self.error(f"{name} is missing", "use a complete checkpoint")
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(f"{name} must be a positive integer, not {value!r}", "repair the file")
        return value

    def number(self, name: str, default: float) -> float:
        return self._positive(name, self._raw.get(name), default)

    def flag(self, name: str) -> bool:
        value = self._raw.get(name)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self.error(f"{name} must be true or false, not {value!r}", "repair the file")
        return value

    def architecture(self) -> str:
        named = self._raw.get("architectures")
        supported = " and ".join(ARCHITECTURES)
        if not isinstance(named, list) or not named:
            raise self.error("architectures is missing", f"supported are {supported}")
        if named[0] not in ARCHITECTURES:
            raise self.error(f"architecture {named[0]!r} is not supported", f"only {supported} are")
        return str(named[0])

    def refuse_unsupported(self) -> None:
        raw = self._raw
        if raw.get("quantization_config") is not None:
            raise self.error("quantization_config is not supported", "use unquantized weights")
        if raw.get("use_sliding_window") and raw.get("sliding_window") is not None:
            raise self.error("use_sliding_window is not supported", "use a full-attention model")
        kinds = set(raw.get("layer_types") or ()) - {"full_attention"}
        if kinds:
            raise self.error(
                f"layer_types {sorted(map(str, kinds))} is not supported",
                "only full_attention is",
            )
        if raw.get("hidden_act", "silu") != "silu":
            raise self.error(f"hidden_act {raw['hidden_act']!r} is not supported", "only silu is")

    def rope_theta(self) -> float:
        """The base of RoPE, from today's ``rope_parameters`` or yesterday's separate keys."""
        theta = self._raw.get("rope_theta")
        for name in ("rope_parameters", "rope_scaling"):
            section = self._raw.get(name)
            if section is None:
                continue
            if not isinstance(section, dict):
                raise self.error(f"{name} must be an object, not {section!r}", "repair the file")
            kind = section.get("rope_type", section.get("type", "default"))
            if kind != "default":
                raise self.error(
                    f"{name} of type {kind!r} is not supported", "only the default type is"
                )
            if section.get("partial_rotary_factor", 1.0) != 1.0:
                raise self.error(
                    f"{name} has a partial_rotary_factor, which is not supported",
                    "use a model that rotates whole heads",
                )
            theta = section.get("rope_theta", theta)
        return self._positive("rope_theta", theta, 10000.0)

    def moe(self, num_layers: int) -> MoeConfig:
        name = "num_experts" if self._raw.get("num_experts") is not None else "num_local_experts"
        num_experts = self.integer(name)
        top_k = self.integer("num_experts_per_tok")
        if top_k > num_experts:
            raise self.error(
                f"num_experts_per_tok {top_k} is more than {name} {num_experts}", "repair the file"
            )
        step = self.integer("decoder_sparse_step", 1)
        dense = self._raw.get("mlp_only_layers") or []
        if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
            raise self.error(
                f"mlp_only_layers must be a list of integers, not {dense!r}", "repair it"
            )
        return MoeConfig(
            num_experts=num_experts,
            num_experts_per_tok=top_k,
            intermediate_size=self.integer("moe_intermediate_size"),
            norm_topk_prob=self.flag("norm_topk_prob"),
            layers=tuple(
                layer
                for layer in range(num_layers)
                if layer not in dense and (layer + 1) % step == 0
            ),
        )

    def _positive(self, name: str, value: object, default: float) -> float:
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise self.error(f"{name} must be a positive number, not {value!r}", "repair the file")
        return float(value)
