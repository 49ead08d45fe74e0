"""Who may import whom: the contracts of pyproject.toml, and what those cannot express."""

from __future__ import annotations

import fnmatch
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.house.files import ROOT, Import, imports, module_name, package_files, within

STANDARD = frozenset(sys.stdlib_module_names)

# Part of the house: the other parts it may import (itself always). The longest match counts.
ALLOWED: dict[str, tuple[str, ...]] = {
    "baton": ("baton.client", "baton.core"),
    "baton.core": (),
    "protos": ("baton.core",),
    "kvpool": ("baton.core", "protos"),
    "baton.engine": ("baton.core", "protos", "kvpool"),
    "prefill_worker": ("baton.core", "protos", "kvpool", "baton.engine"),
    "decode_worker": ("baton.core", "protos", "kvpool", "baton.engine"),
    "baton.instance": (
        "baton.core",
        "protos",
        "kvpool",
        "baton.engine",
        "prefill_worker",
        "decode_worker",
    ),
    "controller": ("baton.core", "protos", "kvpool.index", "kvpool.layout", "kvpool.tiers"),
    "baton.gateway": ("baton.core", "protos", "kvpool.layout"),
    "baton.client": ("baton.core", "protos"),
    "baton.simulator": ("baton.core", "kvpool", "baton.engine", "controller"),
    "baton.cli": (
        "baton.core",
        "protos",
        "kvpool",
        "baton.engine",
        "baton.instance",
        "prefill_worker",
        "decode_worker",
        "controller",
        "baton.gateway",
        "baton.client",
        "baton.simulator",
    ),
}
VERSION = ("baton", "baton.__version__")  # anyone may tell the version
OURS = ("baton", "protos", "kvpool", "prefill_worker", "decode_worker", "controller")

# Library: the files that may import it, as patterns of module names.
ONLY_IN: dict[str, tuple[str, ...]] = {
    "ray": ("*.*actor*", "*.launcher*", "baton.cli.*"),
    "torch": (
        "baton.engine.*",
        "prefill_worker.*",
        "decode_worker.*",
        "baton.instance.*",
        "kvpool.transports.collective_group",
    ),
    "torch_npu": ("baton.engine.*npu*",),
    "transformers": ("baton.gateway.tokenizer",),
    "safetensors": ("baton.engine.*",),
    "redis": ("controller.*", "baton.cli.*"),
    "fastapi": ("baton.gateway.*",),
    "uvicorn": ("baton.gateway.*", "protos.http"),
    "typer": ("baton.cli.*",),
    "rich": ("baton.cli.*",),
    "matplotlib": ("baton.cli.*",),
}


def part_of(module: str) -> str:
    """The entry of ALLOWED that a module belongs to."""
    return max((part for part in ALLOWED if within(module, part)), key=len)


def test_import_linter_contracts() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports"), "--no-cache", "--no-logo"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_parts_import_only_what_the_table_allows() -> None:
    wrong: list[Import] = []
    for path in package_files():
        part = part_of(module_name(path))
        for found in imports(path):
            if not within(found.name, *OURS) or found.name in VERSION:
                continue
            if part_of(found.name) != part and not within(found.name, *ALLOWED[part]):
                wrong.append(found)
    assert not wrong, "\n".join(map(str, wrong))


def test_libraries_are_imported_only_where_they_belong() -> None:
    wrong: list[Import] = []
    for path in package_files():
        for found in imports(path):
            patterns = ONLY_IN.get(found.name.partition(".")[0])
            if patterns is None:
                continue
            if not any(fnmatch.fnmatch(found.importer, pattern) for pattern in patterns):
                wrong.append(found)
    assert not wrong, "\n".join(map(str, wrong))


def test_core_needs_only_the_standard_library_and_numpy() -> None:
    wrong = [
        found
        for path in package_files()
        if within(module_name(path), "baton.core")
        for found in imports(path)
        if found.name.partition(".")[0] not in STANDARD
        and not within(found.name, "numpy", "baton.core")
    ]
    assert not wrong, "\n".join(map(str, wrong))


def test_the_roles_do_not_know_each_other() -> None:
    wrong = [
        found
        for path in package_files()
        for found in imports(path)
        if (within(found.importer, "prefill_worker") and within(found.name, "decode_worker"))
        or (within(found.importer, "decode_worker") and within(found.name, "prefill_worker"))
    ]
    assert not wrong, "\n".join(map(str, wrong))


def pure_modules() -> list[str]:
    """The modules that the contract of deciding code names, read from pyproject.toml."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    (contract,) = (c for c in contracts if c["name"].startswith("Deciding code"))
    return list(contract["source_modules"])


@pytest.mark.parametrize("library", ["ray", "torch", "grpc"])
def test_deciding_code_runs_without_the_heavy_libraries(library: str) -> None:
    """The contract sees import statements; this one sees what really happens."""
    script = (
        f"import sys; sys.modules[{library!r}] = None\n"
        "import importlib\n"
        f"for name in {pure_modules()!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
