"""The README and the docs say what is: snippets run, commands parse, named files exist."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from pipelines.cli_parser import build_parser

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def fenced(language: str, page: Path) -> list[str]:
    """Code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """Lines after a prompt in console blocks, without their remarks."""
    lines = "\n".join(fenced("console", page)).splitlines()
    return [re.sub(r"\s+#.*", "", line[2:]) for line in lines if line.startswith("$ ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_snippets_run(page: Path) -> None:
    for snippet in fenced("python", page):
        exec(compile(snippet, str(page), "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_commands(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for command in commands(page):
        words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=.*", word)]
        if words[0] == "make":
            assert words[1] in targets, command
        elif words[0].endswith("omni-ray"):
            build_parser().parse_args(words[1:])


def test_readme_shows_both_commands() -> None:
    shown = commands(ROOT / "README.md")
    assert "make quickstart" in shown
    assert "make test" in shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    """Paths in code marks that begin with a folder of the house, and relative links."""
    text = page.read_text(encoding="utf-8")
    tops = "omni_ray|actors|pipelines|clusters|docs|tests|notebooks"
    named = re.findall(rf"`((?:{tops})/[\w./-]+)`", text)
    missing = [name for name in named if not (ROOT / name).exists()]
    links = [link for link in re.findall(r"\]\(([^)#:]+)\)", text) if not (page.parent / link).exists()]
    assert missing + links == []


def test_nothing_tracked_names_a_machine_path() -> None:
    listed = subprocess.run(
        ["git", "grep", "-lIE", r"/root/|/home/[a-z]+/"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert [name for name in listed.stdout.splitlines() if not name.endswith("test_readme.py")] == []
