"""Rules about files as such: size, words, what is tracked, what the README says of them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.house.files import ROOT, package_files, parse, python_files, repository_files

MAX_LINES = 420

# Longer files: how long, and why they are one file. A ratchet: entries shrink and go.
LONGER: dict[str, tuple[int, str]] = {}

TEXT_MAX_BYTES = 1_000_000
# Written down in pieces, so that this file does not hold what it looks for.
_HOSTS = [
    "py" + "pi.org",
    "files.python" + "hosted.org",
    "registry.npm" + "js.org",
    "deb." + "debian.org",
    "archive." + "ubuntu.com",
    "download." + "pytorch.org",
]
FORBIDDEN = {
    "the host of a package registry": re.compile("|".join(map(re.escape, _HOSTS))),
    "a path of somebody's machine": re.compile(
        r"(?<![\w.~$}-])/(?:"
        + "|".join(["wo" + "rk", "ro" + "ot", r"home/\w+", r"Users/\w+"])
        + ")/"
    ),
    "unfinished work": re.compile(r"\b(?:TO" + "DO|FIX" + "ME|XX" + r"X)\b"),
}
# Vocabularies hold whatever the training text held.
NOT_PROSE = {"tokenizer.json"}


def lines_of(path: Path) -> int:
    return len((ROOT / path).read_text(encoding="utf-8").splitlines())


def test_files_read_in_one_sitting() -> None:
    long = {str(path): lines_of(path) for path in python_files()}
    long = {name: count for name, count in long.items() if count > MAX_LINES}
    wrong = [
        f"{name}: {count} lines, at most {LONGER.get(name, (MAX_LINES, ''))[0]}"
        for name, count in long.items()
        if count > LONGER.get(name, (MAX_LINES, ""))[0]
    ]
    assert not wrong, "\n".join(wrong)
    over = sorted(set(LONGER) - set(long))
    assert not over, f"no longer exceptions; take them out of LONGER: {over}"


def test_exceptions_have_reasons() -> None:
    assert all(len(reason) > 20 for _, reason in LONGER.values())


def test_no_forbidden_words() -> None:
    found: list[str] = []
    for path in repository_files():
        if path.name in NOT_PROSE or (ROOT / path).stat().st_size > TEXT_MAX_BYTES:
            continue
        try:
            text = (ROOT / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for what, pattern in FORBIDDEN.items():
            for match in pattern.finditer(text):
                number = text.count("\n", 0, match.start()) + 1
                found.append(f"{path}:{number} names {what}: {match.group()}")
    assert not found, "\n".join(found)


def test_one_model_is_tracked() -> None:
    configs = [str(path) for path in repository_files() if path.name == "config.json"]
    assert configs == ["deploy/demo-model/config.json"]
    model = [p for p in repository_files() if p.parts[:2] == ("deploy", "demo-model")]
    assert sum((ROOT / path).stat().st_size for path in model) <= 25_000_000


def test_nothing_sleeps_for_a_fixed_time() -> None:
    """Packages wait for events, with a bound; ``time.sleep`` is neither."""
    found: list[str] = []
    for path in package_files():
        for node in ast.walk(parse(path)):
            named = isinstance(node, ast.ImportFrom) and node.module == "time"
            if named and any(alias.name == "sleep" for alias in node.names):  # type: ignore[attr-defined]
                found.append(f"{path}:{node.lineno}")  # type: ignore[attr-defined]
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "time.sleep":
                found.append(f"{path}:{node.lineno}")
    assert not found, "\n".join(found)


def test_skipped_tests_say_why() -> None:
    found: list[str] = []
    for path in python_files():
        if path.parts[0] != "tests":
            continue
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Attribute):
                name = ast.unparse(node)
                if name in {"pytest.importorskip", "pytest.mark.skip"}:
                    found.append(f"{path}:{node.lineno} {name}: the tests install what they need")
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                keywords = {keyword.arg for keyword in node.keywords}
                marks = {"pytest.mark.skipif", "pytest.mark.xfail", "pytest.xfail", "pytest.skip"}
                direct = name in {"pytest.skip", "pytest.xfail"} and bool(node.args)
                if name in marks and "reason" not in keywords and not direct:
                    found.append(f"{path}:{node.lineno} {name} without a reason")
    assert not found, "\n".join(found)


def test_licence_is_the_whole_text() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def layout_entries(readme: str) -> list[tuple[str, ...]]:
    """The paths, as parts, that the annotated tree under "## Layout" names.

    One entry per line: the name (or several, with ", " between them), two spaces or more, what it
    is. Depth is the indentation; the lines of a drawn tree count as indentation. Folders end
    with "/".
    """
    section = re.search(r"^## Layout$(.*?)(?=^## |\Z)", readme, re.MULTILINE | re.DOTALL)
    assert section, 'README.md has no section "## Layout"'
    block = re.search(r"^```\w*\n(.*?)^```", section.group(1), re.MULTILINE | re.DOTALL)
    assert block, "the section has no fenced block"
    entries: list[tuple[str, ...]] = []
    open_folders: list[tuple[int, tuple[str, ...]]] = []
    for line in block.group(1).splitlines():
        match = re.match(r"[\s│├└─]*", line)
        depth = match.end() if match else 0
        if not line[depth:]:
            continue
        names = re.split(r"\s{2,}", line[depth:])[0].split(", ")
        while open_folders and open_folders[-1][0] >= depth:
            open_folders.pop()
        parent = open_folders[-1][1] if open_folders else ()
        paths = [(*parent, *(part for part in name.split("/") if part)) for name in names]
        entries.extend(paths)
        if names[-1].endswith("/"):
            open_folders.append((depth, paths[-1]))
    return entries


def test_readme_tree_names_what_exists_and_all_folders() -> None:
    entries = layout_entries((ROOT / "README.md").read_text())
    missing = ["/".join(parts) for parts in entries if not ROOT.joinpath(*parts).exists()]
    assert not missing, f"README.md names what does not exist: {missing}"
    folders = {path.parts[0] for path in repository_files() if len(path.parts) > 1}
    folders = {name for name in folders if not name.startswith(".")}
    unnamed = sorted(folders - {parts[0] for parts in entries})
    assert not unnamed, f"README.md says nothing about {unnamed}"


def test_layout_parser() -> None:
    readme = (
        "# X\n\n## Layout\n\n```\na/      one\n  b/    two\n    c.py  three\nd/, e/  four\n```\n"
    )
    expected = [("a",), ("a", "b"), ("a", "b", "c.py"), ("d",), ("e",)]
    assert layout_entries(readme) == expected
    assert (
        layout_entries(readme.replace("  b/", "├── b/").replace("    c", "│   └── c")) == expected
    )


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "docs/design.md", "requirements/constraints.txt"]
)
def test_documents_exist(name: str) -> None:
    assert (ROOT / name).stat().st_size > 0


def test_links_between_documents_lead_somewhere() -> None:
    dead: list[str] = []
    for path in repository_files():
        if path.suffix != ".md":
            continue
        text = re.sub(r"```.*?```", "", (ROOT / path).read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", text):
            if "://" not in target and not (ROOT / path.parent / target).exists():
                dead.append(f"{path}: {target}")
    assert not dead, "\n".join(dead)
