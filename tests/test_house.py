"""What the house has to look like: who imports whom, what is shipped, and that what is written down is so."""

from __future__ import annotations

import ast
import graphlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

import graphprune

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for package in ("graphprune", "speedup") for path in (ROOT / package).rglob("*.py"))

# Where a library that is slow to import, or likely to change, may be known.
HOMES = {
    "networkx": {"graphprune/dependency.py"},
    "onnx": {"speedup/export.py", "speedup/probe.py", "speedup/session.py"},
    "onnxruntime": {"speedup/export.py", "speedup/probe.py", "speedup/session.py"},
    "onnxscript": {"speedup/export.py"},
    "torch.onnx": {"speedup/export.py"},
    "torch.export": {"graphprune/archive.py", "speedup/capture.py", "speedup/export.py", "speedup/program.py"},
    "rich": {"graphprune/cli/app.py", "graphprune/progress.py", "graphprune/tables.py"},
    "typer": {f"graphprune/cli/{name}.py" for name in ("app", "check", "compress", "look")},
    "safetensors": {"graphprune/checkpoints/checkpoint.py", "graphprune/weights.py"},
    "matplotlib": {"graphprune/drawing.py"},
    "pytorch_lightning": {"graphprune/training/callbacks.py"},
    "lightning": {"graphprune/training/callbacks.py"},
    "transformers": {"graphprune/training/callbacks.py"},
    "ray": {"graphprune/search/pool.py"},
    "torchvision": {"graphprune/lpot/recipe.py"},
    "yaml": {"graphprune/config_file.py"},
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[str]:
    """What a file imports, and the attributes of `torch` that it uses without importing them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name_of(path)}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            yield f"torch.{node.attr}"


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_file_imports_what_it_may(path: Path) -> None:
    for name in imports(path):
        assert not (name_of(path).startswith("speedup/") and inside(name, "graphprune")), name
        for package, homes in HOMES.items():
            assert not inside(name, package) or name_of(path) in homes, f"{name}: only in {', '.join(sorted(homes))}"


def test_imports_go_one_way() -> None:
    modules = {name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in SOURCES}
    order: graphlib.TopologicalSorter[str] = graphlib.TopologicalSorter()
    for module, path in modules.items():
        if module in ("graphprune", "speedup"):
            continue  # they gather public names
        for name in imports(path):
            parts = name.split(".")
            found = next(
                (".".join(parts[:n]) for n in range(len(parts), 1, -1) if ".".join(parts[:n]) in modules), None
            )
            if found not in (None, module):
                order.add(module, found)
    order.prepare()  # raises CycleError


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_file_holds_one_idea(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, "split it"


def test_imports_are_light() -> None:
    code = "import graphprune, speedup, sys; print([m for m in ('onnx', 'onnxruntime', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_public_names_of_speedup() -> None:
    import speedup

    assert all(getattr(speedup, name) is not None for name in speedup.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = speedup.nothing


def test_one_version() -> None:
    assert graphprune.__version__ == version("graphprune")
    assert f'\nversion = "{graphprune.__version__}"\n' in (ROOT / "pyproject.toml").read_text()


def test_the_wheel_holds_both_packages(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("graphprune", "speedup"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    words = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        shipped = set(archive.namelist())
        metadata = next(archive.read(name).decode() for name in shipped if name.endswith("/METADATA"))
    assert {name_of(path) for path in SOURCES} | {"graphprune/py.typed", "speedup/py.typed"} <= shipped
    assert not any(name.startswith(("tests/", "models/")) for name in shipped)
    assert any(name.endswith("/licenses/LICENSE") for name in shipped) and "License-Expression: Apache-2.0" in metadata


def test_ci_runs_what_the_readme_says() -> None:
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"## Set-up\n.*?```sh\n(.*?)```", readme, re.DOTALL)
    assert block is not None
    lines = block[1].strip().splitlines()
    assert len(lines) == 2 and all(line in script for line in lines)


def test_every_network_of_the_readme_exists() -> None:
    for name in re.findall(r"\bmodels/\w+\.py\b", (ROOT / "README.md").read_text()):
        assert (ROOT / name).is_file(), name
