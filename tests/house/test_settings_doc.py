"""The tables of docs/ are those of the code: settings, error codes, states; examples load."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import yaml

from baton.cli.settings import load_settings
from baton.core.config import ServeConfig
from baton.core.errors import ERRORS_BY_CODE, Code
from baton.engine.states import TRANSITIONS, SequenceEvent, SequenceState
from baton.gateway.errors import HTTP_STATUS
from baton.gateway.request_states import TABLE
from controller.membership import transitions
from protos.status import STATUS_BY_CODE
from tests.house.files import ROOT

EXAMPLES = sorted((ROOT / "deploy" / "examples").glob("*.yaml"))


def settings(owner: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, default) of every leaf; MISSING where there is no default."""
    for field in dataclasses.fields(owner):
        name = f"{prefix}{field.name}"
        factory: Any = field.default_factory
        if dataclasses.is_dataclass(factory):
            yield from settings(factory, f"{name}.")
        elif factory is not dataclasses.MISSING:
            yield name, factory()
        else:
            yield name, field.default


def rows(document: str) -> list[list[str]]:
    """The cells of all table rows whose first cell is one name in backticks."""
    text = (ROOT / "docs" / document).read_text()
    found = re.findall(r"^\| `[^`]+` \|.*\|$", text, re.MULTILINE)
    return [re.split(r" *\| *", line[1:-1].strip()) for line in found]


def test_every_setting_is_described_with_its_default() -> None:
    described = {cells[0].strip("`"): cells[1] for cells in rows("settings.md")}
    assert len(described) == len(rows("settings.md")), "a setting is described twice"
    expected = dict(settings(ServeConfig))
    assert set(described) == set(expected)
    for name, default in expected.items():
        if default is dataclasses.MISSING:
            assert described[name] == "required", name
        else:
            assert yaml.safe_load(described[name].strip("`")) == default, name


def test_every_setting_has_a_meaning_and_units_agree_with_names() -> None:
    units = {"_s": "s", "_bytes": "bytes", "_blocks": "blocks", "_threads": "threads"}
    for name, _, unit, meaning in rows("settings.md"):
        assert len(meaning) > 10, name
        for suffix, expected in units.items():
            if name.strip("`").endswith(suffix):
                assert unit == expected, name


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_load(path: Any) -> None:
    assert load_settings(path, {}).model


def test_there_are_examples() -> None:
    assert EXAMPLES


def test_error_codes_are_listed_with_their_statuses() -> None:
    codes = set(Code)
    listed = {cells[0].strip("`"): cells[1:4] for cells in rows("operations.md")}
    listed = {name: cells for name, cells in listed.items() if name in codes}
    assert listed == {
        code: [
            str(HTTP_STATUS[code]),
            STATUS_BY_CODE[code].name,
            "yes" if ERRORS_BY_CODE[code].retryable else "no",
        ]
        for code in Code
    }


def table(entries: Sequence[tuple[str, str, str]]) -> str:
    """One line per state: what leads where."""
    lines = ["| state | event → next state |", "|---|---|"]
    for state in dict.fromkeys(entry[0] for entry in entries):
        moves: dict[str, list[str]] = {}
        for source, event, target in entries:
            if source == state:
                moves.setdefault(target, []).append(event)
        cells = [f"{', '.join(events)} → **{target}**" for target, events in moves.items()]
        lines.append(f"| {state} | {'; '.join(cells)} |")
    return "\n".join(lines)


STATE_TABLES = {
    "instances": [(str(a), str(e), str(b)) for a, e, b in transitions()],
    "sequences": [
        (str(state), str(event), str(TRANSITIONS[state, event]))
        for state in SequenceState
        for event in SequenceEvent
        if (state, event) in TRANSITIONS
    ],
    "submissions": [(str(a), str(e), str(b)) for a, row in TABLE.items() for e, b in row.items()],
}


@pytest.mark.parametrize("name", STATE_TABLES)
def test_state_tables_are_those_of_the_code(name: str) -> None:
    expected = table(STATE_TABLES[name])
    text = (ROOT / "docs" / "design.md").read_text()
    match = re.search(rf"<!-- states: {name} -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    assert match, f"docs/design.md has no table of the states of {name}"
    assert match.group(1) == expected, f"it should read:\n{expected}"
