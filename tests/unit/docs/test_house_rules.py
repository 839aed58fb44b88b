"""The house rules find what they are for, and nothing else."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def rules() -> ModuleType:
    spec = importlib.util.spec_from_file_location("house_rules", ROOT / "docs/house_rules.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def found(rules: ModuleType, tmp_path: Path, text: str, name: str = "omni_ray/x.py") -> list[str]:
    path = tmp_path / "x.py"
    path.write_text(text)
    return list(rules.violations(path, name))


def test_a_long_file_is_found_at_400_lines(rules: ModuleType, tmp_path: Path) -> None:
    assert found(rules, tmp_path, "x = 1\n" * 399) == []
    (line,) = found(rules, tmp_path, "x = 1\n" * 400)
    assert line.startswith("omni_ray/x.py:1: 400 lines;")


def test_a_long_function_is_found_without_its_docstring(rules: ModuleType, tmp_path: Path) -> None:
    text = 'def f():\n    """A.\n\n    Long story.\n    """\n' + "    x = 1\n" * 38
    assert found(rules, tmp_path, text) == []
    (line,) = found(rules, tmp_path, text + "    x = 2\n")
    assert line.startswith("omni_ray/x.py:1: f has 40 lines;")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("import sklearn.datasets\n", ["sklearn"]),
        ("from transformers import X\n", ["transformers"]),
        ("try:\n    import deepspeed\nexcept ImportError:\n    pass\n", ["deepspeed"]),
        ("def f():\n    import sklearn\n", []),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import sklearn\n", []),
        ("from omni_ray.data import sklearn_digits\n", []),
    ],
)
def test_optional_packages_are_imported_where_they_are_used(
    rules: ModuleType, tmp_path: Path, text: str, named: list[str]
) -> None:
    lines = found(rules, tmp_path, text)
    assert [line.split()[1] for line in lines] == named
    assert found(rules, tmp_path, text, name="tests/x.py") == []
