"""Write ``requirements/constraints.txt``: exact versions of all that the project needs but torch.

Called by ``scripts/lock``. The versions are those of the environment it runs in; packages that
nothing in ``pyproject.toml`` leads to are left out. torch stays open, because one file has to work
with every release that the project supports and with the builds for each accelerator.
"""

from __future__ import annotations

import importlib.metadata
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "requirements" / "constraints.txt"
UNPINNED = {"torch", "triton", "setuptools"}  # what torch asks for differs by release
HEADER = """\
# Exact versions of all that Baton and its tests need, but for torch (and setuptools, which torch
# may ask for): it works with every torch that pyproject.toml allows.
# Written by scripts/lock; do not edit.
#
#   scripts/lock             pin what .venv holds now
#   scripts/lock --upgrade   move .venv to the newest allowed versions first
"""


def main() -> int:
    """Write the file, or with ``--check`` only say whether it would change."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        pyproject = tomllib.load(file)
    project = pyproject["project"]
    wanted = [*pyproject["build-system"]["requires"], *project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        wanted.extend(extra)
    pins = closure(wanted)
    text = HEADER + "".join(f"{name}=={pins[name]}\n" for name in sorted(pins))
    if "--check" in sys.argv[1:]:
        if OUTPUT.read_text() != text:
            print("lock: the environment differs from requirements/constraints.txt")
            return 1
        return 0
    OUTPUT.write_text(text)
    print(f"lock: {len(pins)} versions in {OUTPUT.relative_to(ROOT)}")
    return 0


def closure(wanted: Iterable[str]) -> dict[str, str]:
    """Map the name of each package that ``wanted`` leads to here to its installed version."""
    pins: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    todo = [(Requirement(text), "") for text in wanted]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        found = importlib.metadata.distribution(name)
        if name not in UNPINNED:
            pins[name] = found.version
        for wanted_extra in ["", *sorted(requirement.extras)]:
            if (name, wanted_extra) in seen:
                continue
            seen.add((name, wanted_extra))
            todo.extend((Requirement(text), wanted_extra) for text in found.requires or [])
    return pins


if __name__ == "__main__":
    sys.exit(main())
