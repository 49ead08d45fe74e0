"""What the gateway reads from a checkpoint's folder: limits and end tokens, no weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from baton.core.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True)
class ModelInfo:
    """Facts of a checkpoint that requests are checked against."""

    path: Path
    architecture: str
    vocab_size: int
    """Valid token ids are [0, vocab_size)."""
    max_model_len: int
    """Tokens, prompt and output together."""
    eos_token_ids: tuple[int, ...]


def load_model_info(
    path: str | Path, *, max_model_len: int | None = None, own_limit: bool = True
) -> ModelInfo:
    """Read config.json and generation_config.json. Raises ConfigError that names the file.

    ``own_limit``: whether the model's own limit bounds ``max_model_len``.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"model folder {folder} does not exist", param="model")
    config = _read_json(folder / "config.json")
    generation_path = folder / "generation_config.json"
    generation = _read_json(generation_path) if generation_path.exists() else {}
    length = _positive_int(config, "max_position_embeddings", folder)
    if max_model_len is not None:
        length = min(length, max_model_len) if own_limit else max_model_len
    architectures = config.get("architectures") or [str(config.get("model_type", ""))]
    eos = (*_token_ids(generation.get("eos_token_id")), *_token_ids(config.get("eos_token_id")))
    vocab_size = _positive_int(config, "vocab_size", folder)
    return ModelInfo(
        path=folder,
        architecture=str(architectures[0]),
        vocab_size=vocab_size,
        max_model_len=length,
        eos_token_ids=tuple(token for token in dict.fromkeys(eos) if 0 <= token < vocab_size),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: is this a model folder?", param="model") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", param="model") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object", param="model")
    return value


def _positive_int(config: dict[str, Any], name: str, folder: Path) -> int:
    value = config.get(name)
    if type(value) is not int or value < 1:
        raise ConfigError(
            f"{folder / 'config.json'}: {name} must be a positive integer, got {value!r}",
            param="model",
        )
    return value


def _token_ids(value: Any) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,)
    if isinstance(value, list):
        return tuple(item for item in value if isinstance(item, int))
    return ()
