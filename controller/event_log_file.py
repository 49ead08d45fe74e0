"""The log of a controller's decisions: what its core was told, when, and what it commanded.

``controller.event_log`` names the file. It has one JSON object a line: for each start of a
controller a :class:`CoreStart`, and after it a :class:`LogEntry` for each call of the core. As the
core depends on nothing else, a core made anew from the start and told the same gives the same
commands: :func:`replay` does that. A decision of a running cluster can so be looked at later, line
by line, and a change of the code be tried on what a real cluster went through.

Values are written by their types. A dataclass is an object with its name in ``is`` and the fields
that are not at their defaults.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import enum
import functools
import json
import logging
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from baton.core import cluster, cost_model, policy_config, slo
from baton.core import config as core_config
from baton.core.config import ControllerConfig
from baton.core.cost_model import CostModel
from baton.core.errors import ConfigError
from controller import events, role_events
from controller.core import ControllerCore
from controller.events import Command, Event
from controller.planner import RolePlanner

log = logging.getLogger(__name__)

MAX_BYTES = 256 * 1024 * 1024
"""Of a log; what comes after is not written."""

_TAG = "is"


@dataclasses.dataclass(frozen=True, slots=True)
class CoreStart:
    """What a core is made of; see :class:`ControllerCore`. Its planner is the default one."""

    config: ControllerConfig
    epoch: int
    stored: Mapping[str, str] = dataclasses.field(default_factory=dict)
    costs: CostModel | None = None
    weights: Mapping[str, float] | None = None
    run_id: str = ""
    wall_offset_s: float = 0.0

    def make(self, planner: RolePlanner | None = None) -> ControllerCore:
        """A core as it was at the start. ``planner``: instead of the default one."""
        return ControllerCore(self.config, planner=planner, **self.arguments())

    def arguments(self) -> dict[str, Any]:
        """For the core, beside ``config``."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["config"]
        return values


@dataclasses.dataclass(frozen=True, slots=True)
class Tick:
    """``on_tick`` was called."""


@dataclasses.dataclass(frozen=True, slots=True)
class Shut:
    """``shut`` was called: the controller stops."""


Cause = Event | Tick | Shut


@dataclasses.dataclass(frozen=True, slots=True)
class LogEntry:
    """One call of the core."""

    now: float
    cause: Cause
    commands: tuple[Command, ...] = ()
    raised: str = ""
    """A bug: the call ended so, and not with commands."""


@dataclasses.dataclass(frozen=True, slots=True)
class LoggedRun:
    """One controller's life."""

    start: CoreStart
    entries: tuple[LogEntry, ...]


# Writing --------------------------------------------------------------------------------------


class EventLog:
    """Appends to a log. Trouble with the file ends the log, never the controller."""

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES) -> None:
        """Raises ConfigError for a file that cannot be written."""
        self._path = path
        self._max_bytes = max_bytes
        self._file: TextIO | None = None
        try:
            # A line at a time: of a controller that is killed, nothing is missing.
            self._file = path.open("a", buffering=1, encoding="utf-8")
            self._num_bytes = self._file.tell()
        except OSError as error:
            raise ConfigError(
                f"the event log {path} cannot be written: {error}", param="controller.event_log"
            ) from error

    def write(self, value: CoreStart | LogEntry) -> None:
        """One line more."""
        if self._file is None:
            return
        line = json.dumps(encode(value), separators=(",", ":")) + "\n"
        self._num_bytes += len(line)
        try:
            if self._num_bytes <= self._max_bytes:
                self._file.write(line)
                return
            log.warning("the event log %s is full: nothing more is written to it", self._path)
            self.close()
        except OSError as error:
            log.warning("the event log %s ends here: %s", self._path, error)
            self._file = None

    def close(self) -> None:
        """Idempotent."""
        if self._file is not None:
            self._file.close()
            self._file = None


class LoggedCore(ControllerCore):
    """A core that writes down what it is told and what it says."""

    def __init__(self, start: CoreStart, event_log: EventLog) -> None:
        super().__init__(start.config, **start.arguments())
        self._log = event_log
        event_log.write(start)

    def on_event(self, event: Event, now: float) -> list[Command]:
        """See :class:`ControllerCore`."""
        return self._logged(event, now)

    def on_tick(self, now: float) -> list[Command]:
        """See :class:`ControllerCore`."""
        return self._logged(Tick(), now)

    def shut(self, now: float) -> list[Command]:
        """See :class:`ControllerCore`."""
        commands = self._logged(Shut(), now)
        self._log.close()
        return commands

    def _logged(self, cause: Cause, now: float) -> list[Command]:
        try:
            match cause:
                case Tick():
                    commands = super().on_tick(now)
                case Shut():
                    commands = super().shut(now)
                case _:
                    commands = super().on_event(cause, now)
        except Exception as error:
            self._log.write(LogEntry(now, cause, (), repr(error)))
            raise
        self._log.write(LogEntry(now, cause, tuple(commands)))
        return commands


# Reading --------------------------------------------------------------------------------------


def read_log(path: Path) -> list[LoggedRun]:
    """All lives in a log. A last line that was cut is left out. Raises ValueError."""
    runs: list[tuple[CoreStart, list[LogEntry]]] = []
    for text in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not text.endswith("\n"):
            break
        value = decode(CoreStart | LogEntry, json.loads(text))
        if isinstance(value, CoreStart):
            runs.append((value, []))
        elif runs:
            runs[-1][1].append(value)
        else:
            raise ValueError(f"{path} does not begin with the start of a controller")
    return [LoggedRun(start, tuple(entries)) for start, entries in runs]


def replay(run: LoggedRun) -> Iterator[tuple[LogEntry, LogEntry]]:
    """Tell a new core the same; each entry as it was logged, and as it is now."""
    core = run.start.make()
    for entry in run.entries:
        try:
            match entry.cause:
                case Tick():
                    commands = core.on_tick(entry.now)
                case Shut():
                    commands = core.shut(entry.now)
                case _:
                    commands = core.on_event(entry.cause, entry.now)
        except Exception as error:
            yield entry, LogEntry(entry.now, entry.cause, (), repr(error))
        else:
            yield entry, LogEntry(entry.now, entry.cause, tuple(commands))


# Values ---------------------------------------------------------------------------------------


def encode(value: Any) -> Any:
    """A value of the kinds that events and commands are made of, for JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found = {_TAG: type(value).__name__}
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            if not _is_default(field, item):
                found[field.name] = encode(item)
        return found
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    return value


def decode(kind: Any, value: Any) -> Any:
    """The value of type ``kind`` that :func:`encode` made ``value`` of. Raises ValueError."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(arguments, value)
    if origin is typing.Literal:
        return value
    if origin is tuple:
        return tuple(decode(arguments[0], item) for item in value)
    if origin in (collections.abc.Mapping, dict):
        # JSON has no other keys than texts.
        return {arguments[0](key): decode(arguments[1], item) for key, item in value.items()}
    if isinstance(value, dict):
        return _decode_dataclass(value)
    if hasattr(kind, "_fields"):
        hints = typing.get_type_hints(kind).values()
        return kind(*(decode(hint, item) for hint, item in zip(hints, value, strict=True)))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return kind(value)
    return value


def _decode_union(kinds: tuple[Any, ...], value: Any) -> Any:
    if value is None:
        return None
    others = [kind for kind in kinds if kind is not types.NoneType]
    if len(others) == 1:
        return decode(others[0], value)
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} may be any of {others}")
    return _decode_dataclass(value)


def _decode_dataclass(value: dict[str, Any]) -> Any:
    kind = _kinds().get(value[_TAG])
    if kind is None:
        raise ValueError(f"nothing that may be in an event log is called {value[_TAG]!r}")
    hints = _hints(kind)
    return kind(**{name: decode(hints[name], v) for name, v in value.items() if name != _TAG})


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    if field.default_factory is not dataclasses.MISSING:
        return bool(value == field.default_factory())
    # True is 1, and 1.0 is 1: what is read back must be of the same type.
    return type(value) is type(field.default) and bool(value == field.default)


@functools.cache
def _kinds() -> Mapping[str, type]:
    modules = (cluster, cost_model, core_config, policy_config, slo, events, role_events)
    found = [item for module in modules for item in vars(module).values()]
    found += [CoreStart, LogEntry, Tick, Shut]
    kinds = [item for item in found if isinstance(item, type)]
    return {kind.__name__: kind for kind in kinds if dataclasses.is_dataclass(kind)}


@functools.cache
def _hints(kind: type) -> Mapping[str, Any]:
    return typing.get_type_hints(kind)
