"""The rooms of the house: which may import which, what the wheel packs, and what loads no torch."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = SETUP["tool"]["setuptools"]["package-dir"]
CORE = {"torch", "transformers", "einops", "safetensors", "huggingface_hub", "numpy", "packaging", "tokenizers", "tqdm"}
"""What an installation without extras brings, as import names."""


def modules() -> dict[str, Path]:
    """Every module of the four rooms: import name to file."""
    found = {}
    for package, folder in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = file
    return found


def imports(name: str, file: Path, top_level: bool = False) -> set[str]:
    """Absolute names of everything that a module imports, inside functions too unless `top_level`."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    found = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            home = ".".join([*base, *([node.module] if node.module else [])])
            found.update([home] if node.module and not node.level else (f"{home}.{alias.name}" for alias in node.names))
        elif top_level and runs_later(node):
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(file.read_text(), str(file)))
    return found


def runs_later(node: ast.AST) -> bool:
    """Code that importing does not run, or whose failure it survives."""
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.dump(node.test)
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Try)


def room(name: str) -> str:
    """The room of an import name of ours, or an empty string for anybody else's."""
    parts = name.split(".")
    if parts[0] != "still":
        return ""
    return parts[1] if len(parts) > 1 and parts[1] in ("kernels", "harness", "eval") else "still"


def foreign(names: set[str]) -> set[str]:
    """Top-level names of third-party packages."""
    return {name.split(".")[0] for name in names if not room(name)} - set(sys.stdlib_module_names)


MODULES = modules()
ARROWS = {"kernels": set(), "eval": set(), "still": {"kernels"}, "harness": {"still", "eval", "kernels"}}


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way(name):
    here = room(name)
    reached = {room(target) for target in imports(name, MODULES[name])} - {"", here}
    assert reached <= ARROWS[here], f"{name} may not import {reached - ARROWS[here]}"


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) == "kernels"])
def test_kernels_need_torch_and_triton_alone(name):
    assert foreign(imports(name, MODULES[name])) <= {"torch", "triton"}


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) == "eval"])
def test_eval_knows_no_model_library(name):
    assert not foreign(imports(name, MODULES[name])) & {"torch", "transformers", "triton"}


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) != "kernels"])
def test_extras_are_imported_where_they_are_used(name):
    assert foreign(imports(name, MODULES[name], top_level=True)) <= CORE


def test_the_reader_of_imports_sees_through_every_form(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("import torch.nn\ndef f():\n    from ..eval import judge\n    from . import cells\n")
    found = imports("still.harness.x", file)
    assert {"torch.nn", "still.eval.judge", "still.harness.cells"} <= found
    assert {room(each) for each in found} >= {"eval", "harness", ""}
    assert imports("still.harness.x", file, top_level=True) == {"torch.nn"}


def test_package_list_equals_the_tree():
    tree = set()
    for package, folder in FOLDERS.items():
        for file in (ROOT / folder).rglob("*.py"):
            tree.add(".".join([package, *file.parent.relative_to(ROOT / folder).parts]))
    for package in tree:
        prefix = next(p for p in sorted(FOLDERS, key=len, reverse=True) if package == p or package.startswith(p + "."))
        folder = ROOT / FOLDERS[prefix] / package.removeprefix(prefix).strip(".").replace(".", "/")
        assert (folder / "__init__.py").exists(), f"{folder} holds modules and no __init__.py"
    assert sorted(SETUP["tool"]["setuptools"]["packages"]) == sorted(tree)


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports(name):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as problem:
        if problem.name == "triton" and room(name) == "kernels":
            pytest.skip("needs triton")
        raise


def loaded_by(code: str) -> set[str]:
    """Heavy packages that a fresh interpreter holds after running `code`."""
    report = "import json, sys; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})), file=sys.stderr)"
    script = f"import atexit\natexit.register(lambda: exec({report!r}))\n{code}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1])) & {"torch", "transformers", "numpy", "matplotlib", "datasets"}


@pytest.mark.parametrize(
    "code",
    [
        "import still; assert 'StillCache' in dir(still)",
        "import still.eval, still.eval.matters",
        "import still.provenance; still.provenance.provenance()",
        "import still.config, still.budgets, still.flags, still.models, still.prompts; still.models.names()",
    ],
)
def test_loads_no_torch(code):
    assert not loaded_by(code)


def test_still_help_loads_no_torch():
    assert not loaded_by("from still.cli import main\nmain(['--help'])")


def commands() -> list[str]:
    from still.cli import find_commands

    return sorted(find_commands())


@pytest.mark.parametrize("command", commands())
def test_help_of_every_command_loads_no_torch(command):
    assert not loaded_by(f"from still.cli import main\nmain([{command!r}, '--help'])")


def test_every_public_name_has_a_home():
    import still

    for name in still.__all__:
        assert getattr(still, name) is not None
    with pytest.raises(AttributeError, match="StillCompactor"):
        still.Compactor  # noqa: B018
