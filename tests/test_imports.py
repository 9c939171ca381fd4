"""The arrows between the packages: experiments → sim → allocator, experiments → kernels, and no others."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

PACKAGES = ("kernels", "allocator", "sim", "experiments")


def package_folder(package: str) -> Path:
    spec = find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


def modules(package: str) -> list[Path]:
    found = sorted(package_folder(package).rglob("*.py"))
    assert found, f"{package} has no modules"
    return found


def imported(source: str) -> Iterator[str]:
    """Yield the first part of every imported name, wherever in the module it is imported."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            assert node.module is not None
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "import_module"):
            argument = node.args[0]
            if isinstance(argument, ast.Constant):
                yield str(argument.value).partition(".")[0]


@cache
def imported_by(path: Path) -> frozenset[str]:
    return frozenset(imported(path.read_text()))


def breaches(package: str, allowed: set[str], except_in: dict[str, set[str]] | None = None) -> list[str]:
    """Return "module imports name" for all that is neither allowed nor of the standard library."""
    found = []
    for path in modules(package):
        name = path.relative_to(package_folder(package)).as_posix()
        extra = [more for place, more in (except_in or {}).items() if name.startswith(place)]
        fine = allowed.union({package}, *extra)
        found += [
            f"{package}/{name} imports {other}"
            for other in sorted(imported_by(path))
            if other not in fine and other not in sys.stdlib_module_names
        ]
    return found


def of_ours(package: str) -> set[str]:
    return {name for path in modules(package) for name in imported_by(path)} & set(PACKAGES)


def test_kernels_know_no_other_package() -> None:
    assert of_ours("kernels") <= {"kernels"}


def test_the_allocator_needs_numpy_only() -> None:
    assert breaches("allocator", {"numpy"}, {"fuzz.py": {"hypothesis"}, "rules/": {"hypothesis"}}) == []


def test_the_simulator_knows_the_allocator_and_no_kernel() -> None:
    assert of_ours("sim") <= {"sim", "allocator"}


def test_in_the_simulator_only_the_engine_knows_simpy() -> None:
    users = [path.name for path in modules("sim") if "simpy" in imported_by(path)]
    assert users == ["engine.py"]


@pytest.mark.parametrize("package", ["kernels", "allocator", "sim"])
def test_nothing_imports_experiments(package: str) -> None:
    assert "experiments" not in of_ours(package)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import simpy", "simpy"),
        ("import os, kernels.ops as ops", "kernels"),
        ("def f():\n    from experiments.bench import run", "experiments"),
        ("import importlib\nfrom importlib import import_module\nimport_module('cupy.cuda')", "cupy"),
    ],
)
def test_no_import_goes_unseen(source: str, name: str) -> None:
    assert name in set(imported(source))
