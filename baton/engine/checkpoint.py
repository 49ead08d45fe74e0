"""A checkpoint folder, looked at but not loaded: configuration, tensor index, fingerprint.

Everything that can be wrong with a checkpoint is found here, before any process of a cluster
spends seconds on it, and is told in one sentence that names the file. Reads only headers and a
few samples: milliseconds for any size. No torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from baton.core.errors import ConfigError
from baton.engine.models.config import ModelConfig
from baton.engine.models.families import parse_config
from baton.engine.models.tensors import expected_tensors, ignored

_DTYPE_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
_MAX_HEADER_BYTES = 100 * 1024 * 1024
_NUM_SAMPLES = 16
_SAMPLE_BYTES = 4096
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor's bytes lie."""

    file: Path
    dtype: str
    """As safetensors names it: F32, BF16 or F16."""
    shape: tuple[int, ...]
    begin: int
    """First byte in the file."""
    end: int


@dataclasses.dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete, readable checkpoint. Picklable; holds no weights."""

    path: Path
    config: ModelConfig
    files: tuple[Path, ...]
    """The safetensors files, sorted by name."""
    tensors: dict[str, TensorInfo]
    eos_token_ids: tuple[int, ...]
    """Tokens that end a text, from config.json and generation_config.json; sorted."""
    fingerprint: str
    """32 hex digits; equal for equal models wherever they lie."""

    @property
    def max_position_embeddings(self) -> int:
        """The longest sequence that the model was made for, in tokens."""
        return self.config.max_position_embeddings


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Check and describe the checkpoint folder ``path``; every problem is a ``ConfigError``."""
    folder = Path(path)
    if not folder.is_dir():
        raise _error(folder, "there is no such folder", "give the folder of a checkpoint")
    config_file = folder / "config.json"
    raw = _read_json(config_file)
    config = parse_config(raw, config_file)
    eos = set(_token_ids(raw, config_file, config.vocab_size))
    generation_file = folder / "generation_config.json"
    if generation_file.exists():
        generation = _read_json(generation_file)
        eos.update(_token_ids(generation, generation_file, config.vocab_size))
    files, located = _find_files(folder)
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(dataclasses.asdict(config), sort_keys=True).encode())
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        tensors.update(_read_file(file, digest))
    _check_index(located, tensors)
    _check_tensors(config, tensors, files)
    return Checkpoint(
        path=folder,
        config=config,
        files=files,
        tensors=tensors,
        eos_token_ids=tuple(sorted(eos)),
        fingerprint=digest.hexdigest(),
    )


def _error(file: Path, problem: str, remedy: str) -> ConfigError:
    return ConfigError(f"{file}: {problem}; {remedy}", param="model")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise _error(file, "there is no such file", "use a complete checkpoint") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise _error(file, f"cannot be read ({reason})", "check its permissions") from None
    except ValueError as error:
        raise _error(file, f"is not valid JSON ({error})", "copy the file again") from None
    if not isinstance(value, dict):
        raise _error(file, "does not hold a JSON object", "copy the file again")
    return value


def _token_ids(raw: dict[str, Any], file: Path, vocab_size: int) -> tuple[int, ...]:
    value = raw.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise _error(
                file, f"eos_token_id {token!r} is not a token of the vocabulary", "repair the file"
            )
    return tuple(ids)


def _find_files(folder: Path) -> tuple[tuple[Path, ...], dict[str, Path]]:
    """The safetensors files, and what an index file says about which tensor lies where."""
    index_file = folder / _INDEX
    if not index_file.exists():
        single = folder / _SINGLE
        if not single.is_file():
            raise _error(
                folder,
                f"holds neither {_SINGLE} nor {_INDEX}",
                "convert or download the safetensors weights",
            )
        return (single,), {}
    weight_map = _read_json(index_file).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise _error(index_file, "has no weight_map of file names", "download it again")
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise _error(index_file, f"names {name!r}, which is not a file name", "repair it")
        if not (folder / name).is_file():
            raise _error(folder / name, f"is named by {_INDEX} but missing", "download it")
    located = {tensor: folder / name for tensor, name in weight_map.items()}
    return tuple(sorted(set(located.values()))), located


def _read_file(file: Path, digest: hashlib.blake2b) -> dict[str, TensorInfo]:
    """Index of one safetensors file; its header and data samples go into ``digest``."""
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            header = _read_header(file, stream, size)
            data_start = 8 + len(header)
            tensors = _parse_header(file, header, data_start)
            data_end = max((tensor.end for tensor in tensors.values()), default=data_start)
            if size < data_end:
                cut = min(
                    (tensor.end, name) for name, tensor in tensors.items() if tensor.end > size
                )
                raise _error(
                    file,
                    f"is truncated ({size} of {data_end} bytes): tensor {cut[1]} is not whole",
                    "copy or download it again",
                )
            digest.update(header)
            _sample(stream, data_start, data_end, digest)
    except OSError as error:
        reason = error.strerror or str(error)
        raise _error(file, f"cannot be read ({reason})", "check its permissions") from None
    return tensors


def _read_header(file: Path, stream: BinaryIO, size: int) -> bytes:
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or not 2 <= length <= _MAX_HEADER_BYTES:
        raise _error(file, "is not a safetensors file", "copy or download it again")
    header = stream.read(length)
    if len(header) < length:
        raise _error(file, "is truncated inside its header", "copy or download it again")
    return header


def _parse_header(file: Path, header: bytes, data_start: int) -> dict[str, TensorInfo]:
    try:
        entries = json.loads(header)
        if not isinstance(entries, dict):
            raise TypeError
        tensors = {
            str(name): TensorInfo(
                file=file,
                dtype=str(entry["dtype"]),
                shape=tuple(int(n) for n in entry["shape"]),
                begin=data_start + int(entry["data_offsets"][0]),
                end=data_start + int(entry["data_offsets"][1]),
            )
            for name, entry in entries.items()
            if name != "__metadata__"
        }
    except (ValueError, TypeError, KeyError, IndexError):
        raise _error(file, "has a broken safetensors header", "copy or download it again") from None
    for name, tensor in tensors.items():
        item_bytes = _DTYPE_BYTES.get(tensor.dtype)
        if item_bytes is None:
            raise _error(
                file,
                f"tensor {name} has dtype {tensor.dtype}, which is not supported",
                f"use weights in one of {', '.join(_DTYPE_BYTES)}",
            )
        if (
            tensor.begin < data_start
            or tensor.end - tensor.begin != math.prod(tensor.shape) * item_bytes
        ):
            raise _error(
                file,
                f"tensor {name} has offsets that do not match its shape",
                "copy or download it again",
            )
    return tensors


def _sample(stream: BinaryIO, begin: int, end: int, digest: hashlib.blake2b) -> None:
    """Hash evenly spread slices, first and last bytes included, so that fine-tunes differ."""
    last = max(begin, end - _SAMPLE_BYTES)
    for index in range(_NUM_SAMPLES):
        offset = begin + (last - begin) * index // (_NUM_SAMPLES - 1)
        stream.seek(offset)
        digest.update(stream.read(min(_SAMPLE_BYTES, end - offset)))


def _check_index(located: dict[str, Path], tensors: dict[str, TensorInfo]) -> None:
    for name, file in located.items():
        found = tensors.get(name)
        if found is None or found.file != file:
            raise _error(
                file, f"does not hold tensor {name} as {_INDEX} says", "download both again"
            )


def _check_tensors(
    config: ModelConfig, tensors: dict[str, TensorInfo], files: Iterable[Path]
) -> None:
    expected = expected_tensors(config)
    where = next(iter(files))
    where = where if where.name == _SINGLE else where.parent / _INDEX
    for name, shape in expected.items():
        found = tensors.get(name)
        if found is None:
            raise _error(where, f"tensor {name} is missing", "use a complete checkpoint")
        if found.shape != shape:
            raise _error(
                found.file,
                f"tensor {name} has shape {list(found.shape)} where config.json asks for "
                f"{list(shape)}",
                "use the config.json that belongs to these weights",
            )
    for name, tensor in tensors.items():
        if name not in expected and not ignored(name, tensor.shape, config):
            raise _error(
                tensor.file,
                f"tensor {name} is no part of {config.architecture} as config.json describes it",
                "use the config.json that belongs to these weights",
            )
