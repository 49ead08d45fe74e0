"""What a running controller decided is decided again by a core that is told the same."""

from __future__ import annotations

from pathlib import Path

from controller import events, role_events
from controller.event_log_file import replay
from tests.cluster.decisions import record


def test_decisions_are_reproduced_from_the_log(tmp_path: Path) -> None:
    run = record(tmp_path)
    assert len(run.entries) > 100
    for logged, now in replay(run):
        assert now == logged
    commands = [command for entry in run.entries for command in entry.commands]
    kinds = {type(command) for command in commands}
    assert {events.Placed, events.SendDirective, role_events.RoleSwitchEnded} <= kinds
