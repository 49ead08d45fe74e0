"""Typed reading of JSON objects, with errors that name file, key and value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from baton.core.errors import ConfigError

_REPAIR = "repair the file"

ChoiceT = TypeVar("ChoiceT", bound=str)


class Fields:
    """One JSON object of the file ``source``; ``section`` is its key where it is not the whole.

    A key whose value is ``null`` counts as absent. Every error is a ``ConfigError`` in one
    sentence with its remedy.
    """

    def __init__(self, raw: Mapping[str, Any], source: Path, section: str = "") -> None:
        self._raw = raw
        self._source = source
        self._prefix = f"{section}." if section else ""

    def error(self, problem: str, remedy: str) -> ConfigError:
        """What to raise for ``problem``."""
        return ConfigError(f"{self._source}: {problem}; {remedy}", param="model")

    def unsupported(self, name: str, value: object, remedy: str) -> ConfigError:
        """What to raise for a feature that the forward pass does not have."""
        return self.error(f"{self._prefix}{name} {value!r} is not supported", remedy)

    def has(self, name: str) -> bool:
        """Whether the key is there at all, be it as ``null``."""
        return name in self._raw

    def get(self, name: str) -> Any:
        """The value as it is; ``None`` where there is none."""
        return self._raw.get(name)

    def section(self, name: str) -> Fields | None:
        """An object within this one; ``None`` where there is none or it is empty."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._bad(name, "an object", value)
        return Fields(value, self._source, self._prefix + name) if value else None

    def empty(self, name: str) -> Fields:
        """An object without keys, in the place of one that is not there."""
        return Fields({}, self._source, self._prefix + name)

    def objects(self) -> list[str]:
        """The keys whose values are objects themselves."""
        return [name for name, value in self._raw.items() if isinstance(value, dict)]

    def integer(self, name: str, default: int | None = None, *, minimum: int = 1) -> int:
        """An integer from ``minimum`` on; without a default it must be there."""
        value = self.get(name)
        if value is None:
            if default is None:
                raise self._missing(name)
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            what = "a positive integer" if minimum == 1 else f"an integer from {minimum} on"
            raise self._bad(name, what, value)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number; without a default it must be there."""
        value = self.optional_number(name)
        if value is None and default is None:
            raise self._missing(name)
        if value == 0:
            raise self._bad(name, "a positive number", self.get(name))
        return default if value is None and default is not None else float(value or 0)

    def optional_number(self, name: str) -> float | None:
        """A number from 0 on, or ``None``."""
        value = self.get(name)
        if value is None:
            return None
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not 0 <= value < math.inf
        ):
            raise self._bad(name, "a positive number", value)
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._bad(name, "true or false", value)
        return value

    def only(self, name: str, allowed: tuple[ChoiceT, ...], default: ChoiceT) -> ChoiceT:
        """One of the values that are supported; others are refused by name."""
        value = self.get(name)
        if value is None:
            return default
        for choice in allowed:
            if value == choice:
                return choice
        verb = "are" if len(allowed) > 1 else "is"
        raise self.unsupported(name, value, f"only {', '.join(allowed)} {verb}")

    def _missing(self, name: str) -> ConfigError:
        return self.error(f"{self._prefix}{name} is missing", "use a complete checkpoint")

    def _bad(self, name: str, what: str, value: object) -> ConfigError:
        return self.error(f"{self._prefix}{name} must be {what}, not {value!r}", _REPAIR)
