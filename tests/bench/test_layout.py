"""The folders of bench are floors: a file imports only from its own folder and the folders below."""

import ast
from pathlib import Path

FLOORS = ("measure", "report", "machine_code", "compare", "tune", "gpu", "cli", "__main__")  # from the lowest up
ROOT = Path(__file__).parents[2]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted((ROOT / "bench").rglob("*.py"))
}


def imported(path: Path) -> set[str]:
    """Modules of bench that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(MODULES)


def test_every_file_is_on_a_floor():
    assert {name.split(".")[1] for name in MODULES} == {*FLOORS, "__init__"}


def test_no_import_goes_up():
    for name, path in MODULES.items():
        for other in imported(path):
            floor, other_floor = (FLOORS.index(each.split(".")[1]) for each in (name, other))
            assert other_floor <= floor, f"{name} imports {other}, which is above it"


def test_no_imports_form_a_circle():
    above = {name: imported(path) for name, path in MODULES.items()}
    while free := [name for name, needs in above.items() if not needs & set(above)]:
        for name in free:
            del above[name]
    assert not above, f"these import one another: {', '.join(above)}"
