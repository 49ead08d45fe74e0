"""The built wheel, installed where the checkout cannot be seen, works."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import baton
from baton.client import BatonClient
from tests.cluster import oracle, tokens
from tests.cluster.harness import serving
from tests.house.files import PACKAGES, ROOT, package_files


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], ROOT)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` folder of an environment that holds the wheel and sees our dependencies.

    The dependencies come by a ``.pth`` file: the ``.pth`` files in the folder it names, an editable
    install of this checkout among them, are then not read.
    """
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    install = ["install", "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel)]
    run([sys.executable, "-m", "pip", "--python", str(python), *install], folder)
    purelib = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (purelib / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def run(command: list[str], cwd: Path) -> str:
    """Run a command far from the checkout's environment; its output."""
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=180, env=CLEAN, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


CLEAN = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "NO_COLOR": "1"}


def test_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    metadata = f"baton_serve-{baton.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {*PACKAGES, metadata}
    assert {str(path) for path in package_files()} <= names
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert "protos/baton/v1/inference.proto" in names
    assert f"{metadata}/licenses/LICENSE" in names


def test_modules_come_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    script = (
        "import importlib, json\n"
        f"names = {PACKAGES!r}\n"
        "print(json.dumps({n: importlib.import_module(n).__file__ for n in names}))"
    )
    files = json.loads(run([str(installed / "python"), "-c", script], tmp_path))
    for name, file in files.items():
        assert Path(file).is_relative_to(installed.parent), f"{name} is {file}"


def test_command_of_the_wheel_runs(installed: Path, tmp_path: Path) -> None:
    assert "serve" in run([str(installed / "baton"), "--help"], tmp_path)


def test_the_wheel_serves(installed: Path, tmp_path: Path) -> None:
    """A cluster out of the wheel, started elsewhere; its processes run the wheel's code."""
    where = run([str(installed / "python"), "-c", "import baton; print(baton.__file__)"], tmp_path)
    mark = f"{baton.__version__}+wheel"
    init = Path(where.strip())
    init.write_text(init.read_text().replace(baton.__version__, mark))
    prompt = oracle.corpus()[:40]
    command = [str(installed / "baton")]
    with serving("--prefill", "1", "--decode", "1", command=command, cwd=tmp_path) as cluster:
        [output] = tokens.run_greedy(cluster, [prompt], num_tokens=16, concurrency=1)
        tokens.check_greedy([prompt], [output])
        with BatonClient(cluster.grpc) as client:
            assert client.model_info().version == mark
        found = run([*command, "status", "--cluster", cluster.name], tmp_path)
        assert "decode-0" in found
