"""Imports go flows -> tasks -> {runtime, storage}; runtime needs nothing beyond torch and transformers."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "runtime": {"flows", "tasks", "storage", "prefect", "duckdb", "boto3", "pyarrow", "pydantic", "typer", "rich"},
    "storage": {"flows", "tasks", "runtime", "prefect", "torch", "transformers"},
    "tasks": {"flows", "typer", "rich"},
    "flows": {"runtime"},
}
ALLOWED_FOR_RUNTIME = ("torch", "transformers", "safetensors", "numpy")


def _imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_package_imports_across_its_border(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    crossings = {str(file): sorted(_imports(file) & FORBIDDEN[package]) for file in files}
    assert {file: names for file, names in crossings.items() if names} == {}


def test_runtime_never_reads_the_environment() -> None:
    readers = [
        file for file in (ROOT / "runtime").rglob("*.py") if re.search(r"\bos\.(environ|getenv)", file.read_text())
    ]
    assert readers == []


def _modules_of(distributions: set[str]) -> set[str]:
    owners = importlib.metadata.packages_distributions()
    normal = {re.sub(r"[-_.]+", "-", name).lower() for name in distributions}
    return {m for m, names in owners.items() if any(re.sub(r"[-_.]+", "-", n).lower() in normal for n in names)}


def _required(name: str, seen: set[str]) -> set[str]:
    """The distribution and all it requires without extras."""
    if name in seen:
        return seen
    seen.add(name)
    try:
        requirements = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return seen
    for requirement in requirements:
        if "extra ==" not in requirement:
            _required(re.match(r"[A-Za-z0-9._-]+", requirement)[0], seen)
    return seen


# The extra `native`: asked for by `runtime.edge.native` alone, which does without.
COMPILED = ("runtime.edge.native_kernels", "runtime.edge.native_scaled")


def test_runtime_imports_where_only_torch_and_transformers_are_installed() -> None:
    allowed: set[str] = set()
    for name in ALLOWED_FOR_RUNTIME:
        allowed |= _required(name, set())
    blocked = set(importlib.metadata.packages_distributions()) - _modules_of(allowed)
    blocked = (blocked | {"flows", "tasks", "storage"}) - {"runtime"}  # runtime itself is part of an installed Winnow
    assert {"prefect", "duckdb", "pyarrow", "boto3", "datasets"} <= blocked
    script = f"""
import importlib, importlib.util, pkgutil, sys
blocked = {sorted(blocked)!r}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
# Asking whether a package is there must answer no, as it does where the package is not installed.
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] in blocked else find_spec(name, *rest)
import runtime
for module in pkgutil.walk_packages(runtime.__path__, "runtime."):
    if module.name not in {COMPILED!r}:
        importlib.import_module(module.name)
import torch
from runtime.edge.native import kernels
assert kernels(torch.bfloat16) is None
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
