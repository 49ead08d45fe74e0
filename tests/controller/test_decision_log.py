"""The log of decisions: it says all that was said, and a core told the same decides the same."""

from __future__ import annotations

import collections.abc
import dataclasses
import enum
import json
import os
import random
import subprocess
import sys
import types
import typing
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from baton.core.config import ControllerConfig
from baton.core.errors import ConfigError
from controller import events, role_events
from controller.event_log_file import (
    CoreStart,
    EventLog,
    LogEntry,
    LoggedCore,
    Tick,
    decode,
    encode,
    read_log,
    replay,
)
from tests.controller.controller_helpers import idle_load, make_info
from tests.house.files import ROOT

RECORDED = Path(__file__).parent / "recorded_decisions.jsonl"
"""Of a running cluster of emulated instances; made by ``python -m tests.cluster.decisions``."""
EXPECTED = (
    events.RegisterInstance,
    events.Heartbeat,
    events.PlaceRequests,
    events.OutcomesReported,
    events.SessionClosed,
    events.SetRole,
    events.Drain,
    role_events.PauseRoles,
    Tick,
    events.SendDirective,
    events.CallFailed,
    events.StorePut,
)
KINDS = [*typing.get_args(events.Event), *typing.get_args(events.Command)]


def some(kind: Any, draw: random.Random) -> Any:
    """Any value of a type; numbers and texts are often the usual ones."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return some(draw.choice(arguments), draw)
    if origin is tuple:
        return tuple(some(arguments[0], draw) for _ in range(draw.randrange(3)))
    if origin is collections.abc.Mapping:
        return {
            some(arguments[0], draw): some(arguments[1], draw) for _ in range(draw.randrange(3))
        }
    if dataclasses.is_dataclass(kind) or hasattr(kind, "_fields"):
        hints = typing.get_type_hints(kind)
        made: Any = kind
        return made(**{name: some(hint, draw) for name, hint in hints.items()})
    if issubclass(kind, enum.Enum):
        return draw.choice(list(kind))
    plain = {
        types.NoneType: (None,),
        bool: (False, True),
        int: (0, 1, -7, 2**63),
        float: (0.0, 1.0, 0.1, -1e300, float("inf"), float("nan")),
        str: ("", "is", "r-1", "ä \n \u2028"),
    }
    values: tuple[Any, ...] = plain[kind]
    return draw.choice(values)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_event_and_command_is_read_as_it_was_written(kind: type) -> None:
    draw = random.Random(kind.__name__)
    for _ in range(50):
        value = some(kind, draw)
        text = json.dumps(encode(value))
        # Not by ==, for which 1 is 1.0 and what is not a number is not itself.
        assert repr(decode(kind, json.loads(text))) == repr(value)


def start() -> CoreStart:
    return CoreStart(ControllerConfig(), 3, {"role/a": "mixed"}, weights={"is": 2.0}, run_id="r")


def some_life(path: Path, *, max_bytes: int = 10**6) -> None:
    core = LoggedCore(start(), EventLog(path, max_bytes=max_bytes))
    core.on_event(events.RegisterInstance(1, make_info("a")), 1.0)
    core.on_event(events.Heartbeat(1, "a", 3 << 32 | 1, idle_load()), 1.5)
    for index in range(20):
        query = events.PlaceQuery(f"r{index}", num_prompt_tokens=5, max_new_tokens=5)
        core.on_event(events.PlaceRequests(2 + index, "g", (query,)), 2.0 + index)
    core.on_tick(30.0)
    core.shut(31.0)


def test_a_log_holds_the_lives_of_all_controllers(tmp_path: Path) -> None:
    path = tmp_path / "log"
    some_life(path)
    some_life(path)
    first, second = read_log(path)
    assert first == second
    assert first.start == start()
    assert len(first.entries) == 24
    assert all(logged == now for run in (first, second) for logged, now in replay(run))


def test_a_line_that_was_cut_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log"
    some_life(path)
    [whole] = read_log(path)
    path.write_bytes(path.read_bytes()[:-7])
    [cut] = read_log(path)
    assert cut.entries == whole.entries[:-1]


def test_a_full_log_ends_and_the_controller_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "log"
    some_life(path)
    size = path.stat().st_size
    small = tmp_path / "small"
    some_life(small, max_bytes=size // 2)
    assert size // 4 < small.stat().st_size <= size // 2
    [run] = read_log(small)
    assert 0 < len(run.entries) < 24
    assert all(logged == now for logged, now in replay(run))


def test_a_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing/log") as caught:
        EventLog(tmp_path / "missing" / "log")
    assert caught.value.param == "controller.event_log"


def test_what_is_no_log_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(json.dumps(encode(LogEntry(1.0, Tick()))) + "\n")
    with pytest.raises(ValueError, match="does not begin"):
        read_log(path)
    path.write_text('{"is": "Path"}\n')
    with pytest.raises(ValueError, match="'Path'"):
        read_log(path)


def check_recorded() -> Counter[str]:
    """Kinds of events and commands in it. Every command must be the same again."""
    [run] = read_log(RECORDED)
    seen: Counter[str] = Counter()
    for logged, now in replay(run):
        # Where decisions changed on purpose: python -m tests.cluster.decisions <this file>
        assert now == logged
        seen[type(logged.cause).__name__] += 1
        for command in logged.commands:
            seen[type(command).__name__] += 1
            if isinstance(command, role_events.RoleSwitchEnded):
                seen[f"{command.result} by {command.who}"] += 1
            if isinstance(command, events.Placed):
                for result in command.results.values():
                    seen["late"] += getattr(result, "tentative", False)
    return seen


def test_a_recorded_cluster_is_decided_the_same_again() -> None:
    seen = check_recorded()
    for kind in EXPECTED:
        assert seen[kind.__name__] > 0, (kind, seen)
    assert min(seen["late"], seen["done by planner"], seen["done by operator"]) > 0, seen


@pytest.mark.parametrize("seed", ["1", "2"])
def test_decisions_do_not_hang_on_the_order_of_sets(seed: str) -> None:
    line = "from tests.controller.test_decision_log import check_recorded; check_recorded()"
    env = {**os.environ, "PYTHONHASHSEED": seed}
    subprocess.run([sys.executable, "-c", line], cwd=ROOT, env=env, check=True, timeout=120)
