"""Settings: one YAML file and the flags, parsed once into frozen values.

Unknown or wrong settings are refused with the setting's name, the value and what was expected.
"""

from __future__ import annotations

import dataclasses
import json
import os
import typing
from pathlib import Path
from typing import Any

import pydantic
import yaml

from baton.cli.emulation import fill_from_profile
from baton.core.config import ServeConfig
from baton.core.errors import ConfigError

SHORT_NAMES = {name: f"engine.{name}" for name in ("dtype", "device", "profile", "time_dilation")}
"""Settings of a group that may also stand at the top, as their flag does."""

_ADAPTER: pydantic.TypeAdapter[ServeConfig] | None = None


def load_settings(
    path: Path | None, flags: dict[str, Any], *, defaults: dict[str, Any] | None = None
) -> ServeConfig:
    """``defaults``, then the file's settings, then the flags that were given (not ``None``).

    Flags and file use the same names. Raises ConfigError.
    """
    values = dict(defaults or {})
    if path is not None:
        values |= _read(path)
    values |= {name: value for name, value in flags.items() if value is not None}
    for short, full in SHORT_NAMES.items():
        if short in values:
            _put(values, full, values.pop(short))
    if "model" not in values:
        raise ConfigError("model is missing: give --model DIR or set it in the file", param="model")
    fill_from_profile(values)
    return parse_settings(values, source=str(path) if path else "flags")


def parse_settings(values: dict[str, Any], *, source: str) -> ServeConfig:
    """Validate plain values. Raises ConfigError naming the first wrong setting."""
    try:
        # JSON mode: strict about types (no true for 1, no "3" for 3), yet takes maps for groups.
        return _adapter().validate_json(json.dumps(values, default=str), strict=True)
    except pydantic.ValidationError as error:
        raise ConfigError(_explain(error, source), param=_where(error)) from error


def _adapter() -> pydantic.TypeAdapter[ServeConfig]:
    global _ADAPTER
    if _ADAPTER is None:
        config = pydantic.ConfigDict(extra="forbid")
        for part in (ServeConfig, *_nested(ServeConfig)):
            part.__pydantic_config__ = config
        _ADAPTER = pydantic.TypeAdapter(ServeConfig)
    return _ADAPTER


def _nested(owner: Any) -> list[Any]:
    found: list[Any] = []
    for field in dataclasses.fields(owner):
        factory: Any = field.default_factory
        part = factory if dataclasses.is_dataclass(factory) else _of_map(owner, field.name)
        if part is not None:
            found += [part, *_nested(part)]
    return found


def _of_map(owner: Any, name: str) -> Any:
    """The group that each value of a map of groups is; ``None`` if the field is no such map."""
    hint = typing.get_type_hints(owner)[name]
    values = typing.get_args(hint)[1:] if typing.get_origin(hint) is dict else ()
    return next((value for value in values if dataclasses.is_dataclass(value)), None)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ConfigError(f"--config {path} cannot be read: {reason}", param="config") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path} is not a text file", param="config") from error
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is not valid YAML: {error}", param="config") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"--config {path} must hold settings (name: value), not a {type(values).__name__}",
            param="config",
        )
    return values


def _put(values: dict[str, Any], name: str, value: Any) -> None:
    *parents, leaf = name.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{parent} must hold settings (name: value)", param=parent)
    values[leaf] = value


def _names(name: str) -> list[str]:
    """The settings that exist in the group in which ``name`` does not."""
    owner: Any = ServeConfig
    groups = name.split(".")[:-1]
    while groups:
        group = groups.pop(0)
        for field in dataclasses.fields(owner):
            factory: Any = field.default_factory
            if field.name != group:
                continue
            if dataclasses.is_dataclass(factory):
                owner = factory
            elif (part := _of_map(owner, group)) is not None:
                owner = part
                del groups[:1]  # the key in the map
            break
    return [field.name for field in dataclasses.fields(owner)]


def _where(error: pydantic.ValidationError) -> str:
    return ".".join(str(part) for part in error.errors()[0]["loc"]) or "settings"


def _explain(error: pydantic.ValidationError, source: str) -> str:
    first = error.errors()[0]
    name, given = _where(error), first.get("input")
    kind = first["type"]
    if kind in {"unexpected_keyword_argument", "extra_forbidden"}:
        known = ", ".join(_names(name))
        return f"{source}: unknown setting {name} (value {given!r}); expected one of {known}"
    if kind == "value_error":
        # A rule over several settings; the message names them.
        place = "" if name == "settings" else f"{name}: "
        return f"{source}: {place}{first['ctx']['error']}"
    return f"{source}: {name} is {given!r}; expected: {first['msg']}"
