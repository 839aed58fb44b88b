"""Write the pages that follow from the code: every module with its first sentence, every command with its help.

Run by ``make docs``: ``python docs/build.py OUT``. Nothing of the work is imported; modules are read as text.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("omni_ray", "actors", "pipelines", "clusters")


def first_sentence(text: str | None) -> str:
    """The first line of a docstring."""
    return (text or "").strip().split("\n")[0]


def module_entries(path: Path) -> Iterator[str]:
    """A module as Markdown: its sentence, then its public classes and functions with theirs."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    name = path.relative_to(ROOT).as_posix()
    yield f"\n### `{name}`\n\n{first_sentence(ast.get_docstring(tree))}\n"
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield f"- `{node.name}` {first_sentence(ast.get_docstring(node))}"


def modules_page() -> str:
    """All modules, by package."""
    lines = ["# Modules"]
    for package in PACKAGES:
        lines.append(f"\n## {package}")
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.name != "__init__.py" or path.parent.name == package:
                lines.extend(module_entries(path))
    return "\n".join(lines) + "\n"


def commands_page() -> str:
    """The help of every command."""
    from pipelines.cli_parser import PROG, build_parser, leaf_parsers

    lines = ["# Commands\n", f"```text\n{build_parser().format_help()}```"]
    for words, parser in leaf_parsers(build_parser()):
        lines.append(f"\n## `{PROG} {words}`\n\n```text\n{parser.format_help()}```")
    return "\n".join(lines) + "\n"


def dead_links() -> list[str]:
    """Relative links of the written pages that lead nowhere."""
    dead = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            if not (page.parent / link).exists():
                dead.append(f"{page.relative_to(ROOT)}: {link}")
    return dead


def main(words: list[str]) -> int:
    """Write ``OUT/modules.md`` and ``OUT/commands.md``; exit code 1 if a link is dead."""
    out = Path(words[0] if words else "build/docs")
    out.mkdir(parents=True, exist_ok=True)
    (out / "modules.md").write_text(modules_page(), encoding="utf-8")
    (out / "commands.md").write_text(commands_page(), encoding="utf-8")
    dead = dead_links()
    print("\n".join(dead) if dead else f"wrote {out}/modules.md and {out}/commands.md; no dead link")
    return 1 if dead else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
