"""Files that a script writes are what the script would write now."""

from __future__ import annotations

import subprocess
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.house.files import ROOT


def test_stubs_match_the_protos() -> None:
    done = subprocess.run(
        ["scripts/protos", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_dependency_is_pinned() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    pins: dict[str, str] = {}
    for line in (ROOT / "requirements" / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            assert version, f"not an exact version: {line}"
            pins[name] = version
    assert "torch" not in pins
    for text in wanted:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        if name != "torch":
            assert name in pins, f"run scripts/lock: {name} is not pinned"
            assert pins[name] in requirement.specifier, f"{name}: {pins[name]} is not {text}"
