"""What the rules of the house look at: the files of the repository and what they import."""

from __future__ import annotations

import ast
import dataclasses
import functools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("baton", "protos", "kvpool", "prefill_worker", "decode_worker", "controller")
GENERATED = ("_pb2.py", "_pb2_grpc.py")


@dataclasses.dataclass(frozen=True)
class Import:
    """One ``import``: the module it is in, the dotted name it asks for, its line."""

    importer: str
    name: str
    line: int

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.name}"


@functools.cache
def repository_files() -> tuple[Path, ...]:
    """All files that are tracked, or would be if added now; relative to the root."""
    if (ROOT / ".git").exists():
        listing = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split("\0")
        paths = [Path(name) for name in listing if name]
    else:  # an unpacked source archive
        paths = []
        for folder, folders, names in os.walk(ROOT):
            folders[:] = [f for f in folders if f != "__pycache__" and not f.startswith(".")]
            paths.extend((Path(folder) / name).relative_to(ROOT) for name in names)
    return tuple(sorted(path for path in set(paths) if (ROOT / path).is_file()))


@functools.cache
def python_files() -> tuple[Path, ...]:
    """All Python files that people wrote."""
    return tuple(
        path
        for path in repository_files()
        if path.suffix == ".py" and not path.name.endswith(GENERATED)
    )


@functools.cache
def package_files() -> tuple[Path, ...]:
    """The Python files of the packages that the wheel holds."""
    return tuple(path for path in python_files() if path.parts[0] in PACKAGES)


@functools.cache
def parse(path: Path) -> ast.Module:
    """The syntax tree of a file, given relative to the root."""
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=str(path))


def module_name(path: Path) -> str:
    """``baton/core/slo.py`` is ``baton.core.slo``; a package is its folder."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def within(module: str, *parents: str) -> bool:
    """Whether ``module`` is one of ``parents`` or below one."""
    return any(module == parent or module.startswith(f"{parent}.") for parent in parents)


@functools.cache
def imports(path: Path) -> tuple[Import, ...]:
    """What a file imports at run time, wherever in the file; imports for types only excluded."""
    return tuple(_imports(parse(path), path))


def _imports(tree: ast.AST, path: Path) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from _imports(other, path)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module_name(path), alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = _base(node, path)
            for alias in node.names:
                yield Import(module_name(path), f"{base}.{alias.name}", node.lineno)
        else:
            yield from _imports(node, path)


def _base(node: ast.ImportFrom, path: Path) -> str:
    if node.level == 0:
        return node.module or ""
    package = list(path.with_suffix("").parts[: -node.level])
    return ".".join([*package, *([node.module] if node.module else [])])
