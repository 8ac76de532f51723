"""The floors of the house: which folders there are, what each holds, and which lower ones it imports.

    python tools/floors.py            print the table
    python tools/floors.py --write    put it into docs/architecture.md, between its markers

A folder imports only from folders below it. `tests/test_layout.py` holds that, and that the table is up to date.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- floors -->", "<!-- /floors -->"

# Bottom first. A name without a folder is a file of the package.
FLOORS = (
    "distribution",
    "kernels",
    "reference",
    "native",
    "ops",
    "layers",
    "peft_layers",
    "files",
    "memory",
    "model",
    "adapters",
    "methods",
    "training",
    "demo",
    "planner",
    "commands",
    "cli",
    "__main__",
)
BENCH_FLOORS = ("measure", "report", "machine_code", "compare", "tune", "gpu", "cli", "__main__")


def modules(package: str) -> dict[str, Path]:
    """The package's files by dotted name; `kernels/` counts as fastlora.kernels."""
    found = {}
    folders = {package: ROOT / package, **({"fastlora.kernels": ROOT / "kernels"} if package == "fastlora" else {})}
    for name, folder in folders.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((name, *(part for part in parts if part != "__init__")))] = path
    return found


def floor(module: str) -> str:
    """The folder, or the file, of the package that a module belongs to; empty for the package itself."""
    return [*module.split("."), ""][1]


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The known modules that a file imports, lazily or not; of a name, the module that it is or comes from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
    return found & known.keys()


def graph(package: str) -> dict[str, set[str]]:
    """What every module of a package imports of it."""
    known = modules(package)
    return {name: imports(path, known) for name, path in known.items()}


def upward(package: str, floors: tuple[str, ...]) -> list[str]:
    """The imports that go up, "importer -> imported". The package's own `__init__`, its facade, is not asked."""
    rank = {name: place for place, name in enumerate(floors)}
    return [
        f"{name} -> {other}"
        for name, others in graph(package).items()
        for other in others
        if floor(name) and floor(other) and rank[floor(other)] > rank[floor(name)]
    ]


def circles(package: str) -> list[str]:
    """Modules that import one another in a circle, each circle as the modules on it."""
    links, done, found = graph(package), set(), []

    def visit(name: str, trail: list[str]) -> None:
        if name in trail:
            found.append(" -> ".join([*trail[trail.index(name) :], name]))
        elif name not in done:
            for other in sorted(links[name]):
                if floor(other):  # the facade imports lazily from everywhere
                    visit(other, [*trail, name])
            done.add(name)

    for name in links:
        if floor(name):
            visit(name, [])
    return found


def table() -> str:
    """A row for a floor, top first: what it holds, its files, and the floors below that it uses."""
    links, known = graph("fastlora"), modules("fastlora")
    lines = ["| floor | holds | files | uses |", "|---|---|---|---|"]
    for name in reversed(FLOORS):
        own = [module for module in known if floor(module) == name]
        used = {floor(other) for module in own for other in links[module]} - {name, ""}
        head = next(iter(_heads(known, name)), "")
        files = [module.split(".")[-1] for module in own if module.count(".") == 2]
        below = ", ".join(each for each in reversed(FLOORS) if each in used)
        place = f"`{name}/`" if files else f"`{name}.py`"
        lines.append(f"| {place} | {head} | {' '.join(files)} | {below} |")
    return "\n".join(lines)


def _heads(known: dict[str, Path], name: str) -> Iterator[str]:
    """The first sentence of a floor's docstring; kernels/ has no `__init__` to hold one."""
    if name == "kernels":
        yield "Triton kernels and their launchers, which know nothing of autograd and modules"
    elif (path := known.get(f"fastlora.{name}")) is not None:
        said = ast.get_docstring(ast.parse(path.read_text())) or ""
        yield " ".join(said.split("\n\n")[0].split()).rstrip(".")


def page() -> str:
    """docs/architecture.md with the table as it should be."""
    text = PAGE.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page())
    else:
        print(table())
