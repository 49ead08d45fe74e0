"""Profiles as files: what ``baton profile`` writes, and emulation, simulation and predictors read.

::

    name: my-model-on-my-machine
    source: fitted ...            # or: derived ..., from data sheets
    prefill: {overhead_s: 0.01, item_s: 1.0e-4, context_s: 2.0e-9}
    decode: {overhead_s: 0.02, item_s: 0.0, context_s: 5.0e-8}
    handoff: {latency_s: 0.001, bytes_per_s: 2.0e+10}
    tiers: {host: {latency_s: 0.001, bytes_per_s: 2.0e+10}}   # may be left out
    kv_bytes_per_token: 57344
    kv_capacity_tokens: 700000
    max_model_len: 131072
    max_num_seqs: 512
    max_num_batched_tokens: 2048
    block_size: 128               # may be left out
"""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import yaml

from baton.core.cost_model import CostModel, LinkCosts, Profile, StepCosts
from baton.core.errors import ConfigError

_TIERS = ("host", "disk", "remote")
_SIZES = ("kv_capacity_tokens", "max_model_len", "max_num_seqs", "max_num_batched_tokens")
_REQUIRED = ("name", "source", "prefill", "decode", "handoff", "kv_bytes_per_token", *_SIZES)
_OPTIONAL = ("tiers", "block_size")


def load_profile(path: Path) -> Profile:
    """Read a profile. Raises ConfigError with the file, the value and what was expected."""
    return _Reader(path).profile()


def profile_text(profile: Profile, comments: tuple[str, ...] = ()) -> str:
    """The file of a profile; ``comments`` stand at its top, a line each."""
    cost = profile.cost
    values: dict[str, Any] = {
        "name": profile.name,
        "source": profile.source,
        "prefill": dataclasses.asdict(cost.prefill),
        "decode": dataclasses.asdict(cost.decode),
        "handoff": dataclasses.asdict(cost.handoff),
        "tiers": {name: dataclasses.asdict(link) for name, link in cost.tiers.items()},
        "kv_bytes_per_token": cost.kv_bytes_per_token,
        **{name: getattr(profile, name) for name in (*_SIZES, "block_size")},
    }
    head = "".join(f"# {line}".rstrip() + "\n" for line in comments)
    return head + yaml.safe_dump(values, sort_keys=False, width=100)


def save_profile(profile: Profile, path: Path, comments: tuple[str, ...] = ()) -> None:
    """Write a profile. Raises ConfigError where that is not possible."""
    try:
        path.write_text(profile_text(profile, comments))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {_reason(error)}", param="out") from error


class _Reader:
    """One file's values, each checked where it is taken."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            values = yaml.safe_load(path.read_text())
        except OSError as error:
            raise self._wrong(f"cannot be read: {_reason(error)}") from error
        except UnicodeDecodeError as error:
            raise self._wrong("is not a text file") from error
        except yaml.YAMLError as error:
            raise self._wrong(f"is not valid YAML: {error}") from error
        self._values = self._group(values, "the file", _REQUIRED, _OPTIONAL)

    def profile(self) -> Profile:
        """All of it, as a value."""
        tiers = self._values.get("tiers")
        given = {} if tiers is None else self._group(tiers, "tiers", (), _TIERS)
        try:
            cost = CostModel(
                prefill=StepCosts(**self._numbers("prefill", StepCosts)),
                decode=StepCosts(**self._numbers("decode", StepCosts)),
                handoff=LinkCosts(**self._numbers("handoff", LinkCosts)),
                kv_bytes_per_token=self._number("kv_bytes_per_token", self._values),
                tiers={
                    name: LinkCosts(**self._numbers(name, LinkCosts, given, "tiers."))
                    for name in given
                },
            )
            if not cost.kv_bytes_per_token > 0:
                raise ValueError(f"kv_bytes_per_token must be positive, got {cost}")
            sizes = {name: self._whole(name) for name in _SIZES}
            if "block_size" in self._values:
                sizes["block_size"] = self._whole("block_size")
            return Profile(self._text("name"), self._text("source"), cost, **sizes)
        except ValueError as error:
            raise self._wrong(f"makes no sense: {error}") from error

    def _numbers(
        self, name: str, of: type, owner: dict[str, Any] | None = None, prefix: str = ""
    ) -> dict[str, float]:
        names = tuple(field.name for field in dataclasses.fields(of))
        where = prefix + name
        values = self._group((owner or self._values)[name], where, names, ())
        return {field: self._number(field, values, f"{where}.") for field in names}

    def _number(self, name: str, values: dict[str, Any], prefix: str = "") -> float:
        value = values[name]
        # YAML 1.1 takes 1e-4, without a point, for a text.
        number = _as_number(value)
        if number is None or not math.isfinite(number):
            raise self._wrong(f"has {prefix}{name}: {value!r}; expected a number")
        return number

    def _whole(self, name: str) -> int:
        number = self._number(name, self._values)
        if number != int(number):
            raise self._wrong(f"has {name}: {self._values[name]!r}; expected a whole number")
        return int(number)

    def _text(self, name: str) -> str:
        value = self._values[name]
        if not isinstance(value, str) or not value:
            raise self._wrong(f"has {name}: {value!r}; expected a text")
        return value

    def _group(
        self, values: Any, where: str, required: tuple[str, ...], optional: tuple[str, ...]
    ) -> dict[str, Any]:
        known = ", ".join((*required, *optional))
        if not isinstance(values, dict):
            raise self._wrong(f"must hold in {where}: {known}")
        for name in required:
            if name not in values:
                raise self._wrong(f"lacks {name} in {where}; expected: {known}")
        for name in values:
            if name not in required and name not in optional:
                raise self._wrong(f"has an unknown {name!r} in {where}; expected: {known}")
        return values

    def _wrong(self, problem: str) -> ConfigError:
        return ConfigError(f"profile {self._path} {problem}", param="profile")


def _as_number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)
