"""Every function is typed, and the places where the type checker is told to look away are few."""

from __future__ import annotations

import ast
import importlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house.files import PACKAGES, ROOT, package_files, parse, python_files

# "type: ignore" comments per package. A ratchet: these numbers only go down.
MAX_TYPE_IGNORES = {
    "baton": 5,
    "protos": 0,
    "kvpool": 0,
    "prefill_worker": 0,
    "decode_worker": 0,
    "controller": 2,
}


def unannotated(path: Path) -> Iterator[str]:
    """Functions of a file that lack the type of an argument or of what they return."""
    methods = {
        id(item)
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ClassDef)
        for item in node.body
    }
    for node in ast.walk(parse(path)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        positional = [*node.args.posonlyargs, *node.args.args]
        static = any(ast.unparse(mark) == "staticmethod" for mark in node.decorator_list)
        if id(node) in methods and not static:
            positional = positional[1:]
        named = [*positional, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        missing = [arg.arg for arg in named if arg is not None and arg.annotation is None]
        if node.returns is None:
            missing.append("what it returns")
        if missing:
            yield f"{path}:{node.lineno} {node.name}: no type for {', '.join(missing)}"


def test_every_function_is_annotated() -> None:
    found = [text for path in python_files() for text in unannotated(path)]
    assert not found, "\n".join(found)


def test_type_ignores_only_shrink() -> None:
    counts: Counter[str] = Counter()
    bare: list[str] = []
    for path in package_files():
        for number, line in enumerate((ROOT / path).read_text().splitlines(), start=1):
            if re.search(r"#\s*type:\s*ignore", line):
                counts[path.parts[0]] += 1
                if not re.search(r"#\s*type:\s*ignore\[[\w, -]+\]", line):
                    bare.append(f"{path}:{number} says not which error it ignores")
    assert not bare, "\n".join(bare)
    grown = {name: counts[name] for name in PACKAGES if counts[name] > MAX_TYPE_IGNORES[name]}
    assert not grown, f"more than {MAX_TYPE_IGNORES}: {grown}"


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_ours_and_typed(package: str) -> None:
    """Short names such as ``controller`` could be somebody else's: the path tells."""
    file = importlib.import_module(package).__file__
    assert file is not None
    assert Path(file).resolve() == ROOT / package / "__init__.py"
    assert (ROOT / package / "py.typed").is_file()
