"""The wheel: what it packs, and that it works in an empty environment outside the checkout."""

from __future__ import annotations

import email
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

SETUP = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())
FOLDERS = SETUP["tool"]["setuptools"]["package-dir"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy so that the checkout stays clean."""
    root = Path(__file__).resolve().parent.parent
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in FOLDERS.values():
        shutil.copytree(root / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, copy / name)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), "."]
    done = subprocess.run(build, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("still_kv-*.whl"))


def test_wheel_packs_every_file_of_the_rooms_and_nothing_else(wheel, checkout):
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    expected = set()
    for package, folder in FOLDERS.items():
        for file in (checkout / folder).rglob("*"):
            inside = file.relative_to(checkout / folder)
            hidden = any(part.startswith(".") or part == "__pycache__" for part in inside.parts)
            if file.is_file() and not hidden:
                expected.add("/".join([*package.split("."), *inside.parts]))
    ours = {name for name in packed if ".dist-info/" not in name}
    assert ours == expected
    assert "still/py.typed" in packed
    assert any(name.endswith("licenses/LICENSE") for name in packed)


def test_wheel_declares_what_it_needs(wheel):
    with zipfile.ZipFile(wheel) as archive:
        info = next(name for name in archive.namelist() if name.endswith("METADATA"))
        metadata = email.message_from_bytes(archive.read(info))
        entries = archive.read(info.replace("METADATA", "entry_points.txt")).decode()
    assert metadata["Name"] == "still-kv"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    core = {line.split(">")[0] for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert core == {"torch", "transformers", "einops", "safetensors", "huggingface-hub"}
    extras = {"train", "eval", "documents", "plot", "serve", "gpu", "dev"}
    assert extras <= set(metadata.get_all("Provides-Extra"))
    assert "still = still.cli:main" in entries
    assert "pocket = still.harness.pocket:resolve" in entries


@pytest.mark.full
def test_wheel_runs_a_sweep_in_an_empty_environment(wheel, checkout, tmp_path):
    home = tmp_path / "empty"
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    python, program = home / "bin" / "python", home / "bin" / "still"
    install = [python, "-m", "pip", "install", "--quiet", "--constraint", checkout / ".constraints.txt"]
    done = subprocess.run([*install, f"{wheel}[plot]"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    outside = tmp_path / "elsewhere"
    outside.mkdir()

    def run(*command: object) -> str:
        done = subprocess.run([str(word) for word in command], cwd=outside, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    where = run(python, "-c", "import still, json; print(json.dumps(still.__file__))")
    assert Path(json.loads(where)).is_relative_to(home)
    assert run(python, "-c", "from still.provenance import git_state; print(git_state())").strip() == "None"
    sweep = ["sweep", "--model", "pocket", "--methods", "still,truncation", "--ratios", "8", "--count", "2"]
    table = run(program, *sweep, "--output", "results")
    assert "STILL" in table
    assert "truncation" in table.lower()
    rows = list((outside / "results").rglob("*.csv"))
    assert rows, "the sweep wrote no rows"


FAKE_PYTHON = """#!/bin/sh
case "$*" in
  *version_info*) exit {old} ;;
  *ensurepip*) exit {bare} ;;
  *-V*) echo "Python 3.9.1" ;;
  *) echo "reached $*"; exit 1 ;;
esac
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("old", "bare", "advice"),
    [
        (0, 1, "install the package python3-venv"),
        (1, 0, "Python 3.9.1; still needs 3.11 or newer"),
        (None, None, "is not installed; install Python 3.11 or newer"),
    ],
)
@pytest.mark.parametrize("target", ["lint", "test", "quickstart"])
def test_make_says_what_a_bare_machine_lacks(checkout, tmp_path, target, old, bare, advice):
    for name in ("Makefile", "pyproject.toml", ".constraints.txt"):
        shutil.copy(checkout / name, tmp_path / name)
    python = tmp_path / "fake-python"
    if old is not None:
        python.write_text(FAKE_PYTHON.format(old=old, bare=bare))
        python.chmod(0o755)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", target, f"PYTHON={python}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=clean)
    assert done.returncode != 0
    assert advice in done.stderr
    assert "reached" not in done.stdout + done.stderr
    assert not list(tmp_path.glob(".venv*"))


def test_torch_is_pinned_in_the_constraints_alone(checkout):
    assert "torch==" in (checkout / ".constraints.txt").read_text()
    assert not any("==" in need for need in SETUP["project"]["dependencies"])
    floor = next(need for need in SETUP["project"]["dependencies"] if need.startswith("transformers"))
    tested = (checkout / ".ci" / "run").read_text()
    assert f"FLOOR='{floor.split('>=')[1]}.*'" in tested
