"""Text from Python's standard library: the corpus and the questions of the demo.

Nothing is downloaded or imported: the sources that come with the running interpreter are parsed with `ast`. Whole
modules are held out, chosen by a hash of their name, so that neither the pretraining of the demo model nor its
fine-tuning sees what the evaluation asks.
"""

import ast
import functools
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Not the library itself (tests), or tables instead of text (codecs, generated topics).
SKIPPED_FOLDERS = frozenset(
    [
        "test",
        "tests",
        "idle_test",
        "idlelib",
        "lib2to3",
        "turtledemo",
        "ensurepip",
        "encodings",
        "pydoc_data",
        "site-packages",
        "dist-packages",
        "__pycache__",
    ]
)
HELD_OUT_SHARE = 8  # one module in eight
MIN_ANSWER_CHARS, MAX_ANSWER_CHARS = 12, 160
MAX_SIGNATURE_CHARS = 160


@dataclass(frozen=True)
class Pair:
    """One question and its answer: a function's signature, and the first line of its docstring."""

    module: str
    prompt: str
    completion: str


def modules() -> list[tuple[str, Path]]:
    """(dotted name, path) of every module of the standard library written in Python, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts[:-1]):
            name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
            found.append((name, path))
    return sorted(found)


def is_held_out(module: str) -> bool:
    """Whether `module` belongs to the evaluation. A private twin (`_pyio`) is treated as its public module."""
    public = ".".join(part.removeprefix("_py").lstrip("_") for part in module.split("."))
    return zlib.crc32(public.encode()) % HELD_OUT_SHARE == 0


def read_source(path: Path) -> str:
    """The text of one source file; bytes that cannot be decoded are replaced, as a tokenizer needs text."""
    return path.read_text(encoding="utf-8", errors="replace")


def plain_sources(held_out: bool) -> list[str]:
    """The sources of the modules that are (not) held out, one string each."""
    return [read_source(path) for name, path in modules() if is_held_out(name) == held_out]


def _functions(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from _functions(node.body, f"{prefix}.{node.name}")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}.{node.name}", node


def _first_line(docstring: str | None) -> str:
    lines = (docstring or "").strip().splitlines()
    return lines[0].strip() if lines else ""


def pairs_of(module: str, source: str) -> list[Pair]:
    """The questions and answers of one module; none if this Python cannot parse it."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    found = []
    for name, node in _functions(tree.body, module):
        answer = _first_line(ast.get_docstring(node))
        signature = f"{name}({ast.unparse(node.args)})"
        if not MIN_ANSWER_CHARS <= len(answer) <= MAX_ANSWER_CHARS or len(signature) > MAX_SIGNATURE_CHARS:
            continue
        if not answer.endswith("."):  # the sentence continues on the next line
            continue
        found.append(Pair(module, f"Question: What does `{signature}` do?\nAnswer:", f" {answer}"))
    return found


def instruction_pairs(held_out: bool) -> list[Pair]:
    """All questions of the modules that are (not) held out, each answer once.

    An answer that occurs in both halves is kept only for training, so that evaluation asks nothing already seen.
    """
    return list(_halves()[held_out])


@functools.cache
def _halves() -> dict[bool, list[Pair]]:
    """Both halves, from one pass over the library, which takes seconds."""
    halves: dict[bool, dict[str, Pair]] = {False: {}, True: {}}
    for name, path in modules():
        half = halves[is_held_out(name)]
        for pair in pairs_of(name, read_source(path)):
            half.setdefault(pair.completion, pair)
    seen = halves[False]
    return {False: list(seen.values()), True: [pair for answer, pair in halves[True].items() if answer not in seen]}
