"""The house stands: imports point down, one name has one home, and the core imports little."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import polyak

PACKAGE = Path(polyak.__file__).parent

# DESIGN section 2, from the ground up; a file may import what stands before it, nothing after.
FLOORS = [
    "_errors",
    "_interrupts",
    "_version",
    "_steps",
    "_schedules",
    "_checks",
    "_identities",
    "_profiles",
    "_history",
    "_coefficients",
    "_fit",
    "_sharding",
    "_places",
    "_roles",
    "_kernels",
    "_plans",
    "_engine",
    "_follow",
    "_applied",
    "_pairing",
    "_weights",
    "_module",
    "_norms",
    "_report",
    "_state",
    "_files",
    "_average",
    "_window",
    "_ranks",
    "_resume",
    "_save",
    "_slices",
    "_combine",
    "_inputs",
    "_merge",
    "_soup",
    "_diff",
    "_folder",
    "_picture",
    "_serving",
    "_snapshots",
    "_posthoc",
    "_sweep",
    "_bias",
    "__init__",
    "testing",
    "study",
    "compat",
    "cli",
]


def room(path: Path) -> str:
    """The room a file belongs to: its own name, or its folder's."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms of polyak that a file imports, at any depth of its code."""
    inside = path.relative_to(PACKAGE).parent.parts
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = list(inside[: len(inside) - (node.level - 1)])
            module = [*base, *(node.module.split(".") if node.module else [])]
            found |= {module[0]} if module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("polyak"):
            rest = (node.module or "").split(".")[1:]
            found.add(rest[0] if rest else "__init__")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "polyak":
                    found.add([*alias.name.split("."), "__init__"][1])
    return found


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    """A room imports only from rooms below it."""
    here = FLOORS.index(room(path))
    above = {other for other in imported_rooms(path) - {room(path)} if FLOORS.index(other) > here}
    assert not above, f"{room(path)} imports {above}, which stand above it"


def test_every_room_has_a_floor() -> None:
    """No file stands outside the plan."""
    assert {room(path) for path in files()} <= set(FLOORS)


@pytest.mark.parametrize("name", ["_steps", "_schedules", "_identities", "_profiles", "_history"])
def test_formulas_never_see_a_tensor(name: str) -> None:
    """The floor of floats does not import torch."""
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not any(module.split(".")[0] == "torch" for module in imported)


def test_public_names_are_listed_once_and_sorted() -> None:
    """`__all__` is sorted and holds exactly what `__init__` imports."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    imported = [a.asname for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names]
    assert polyak.__all__ == sorted(polyak.__all__)
    assert sorted(name for name in imported if name) == polyak.__all__


def test_importing_polyak_imports_torch_numpy_safetensors_and_nothing_else() -> None:
    """No framework, no plotting, no command line comes along with the core."""
    code = (
        "import sys, torch, numpy, safetensors.torch; before = set(sys.modules)\n"
        "import polyak\n"
        "names = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "print(*(names - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {"polyak", "torch", "numpy", "safetensors"}
