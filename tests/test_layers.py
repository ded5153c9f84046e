"""The order of the layers: imports go down only, and what is built on deqkit uses its public names only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [
    {"arrays", "compiled", "held", "levels", "linalg", "lowered", "norms", "rows", "small_systems", "state"},
    {"errors", "solution", "termination"},
    {"solvers"},
    {"ledger", "loop", "shrinking", "stages"},
    {"adjoints"},
    {"api"},
    {"nn", "gradient_error", "spectral", "regularization", "monitor", "plots", "diagnosis", "diagnose"},
]
LEVEL = {f"deqkit.{name}": level for level, names in enumerate(LAYERS) for name in names}


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports; ``from a import b`` counts as a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def level(name: str) -> int | None:
    return LEVEL.get(".".join(name.split(".")[:2]))


def library_files() -> list[Path]:
    return [p for p in sorted((ROOT / "deqkit").rglob("*.py")) if p != ROOT / "deqkit" / "__init__.py"]


@pytest.mark.parametrize("path", library_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    own = level(name)
    assert own is not None, f"{name} has no place in the order of layers"
    for imported in imports(path):
        if imported.startswith("deqkit"):
            below = level(imported)
            assert below is not None and below <= own, f"{name} (L{own}) imports {imported} (L{below})"


def test_the_loop_knows_no_particular_solver() -> None:
    names = {n for n in imports(ROOT / "deqkit" / "loop.py") if n.startswith("deqkit.solvers")}
    assert all(n.startswith("deqkit.solvers.base") for n in names)


@pytest.mark.parametrize("folder", ["adapters", "benchmarks", "examples"])
def test_what_is_built_on_deqkit_uses_public_names(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        inner = {n for n in imports(path) if n.startswith("deqkit.")}
        assert not inner, f"{path.relative_to(ROOT)} imports {inner}; use `import deqkit`"


def test_the_core_needs_torch_alone() -> None:
    others = ("torchvision", "scipy", "matplotlib", "lightning")
    code = f"import sys, deqkit; print([m for m in {others} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
