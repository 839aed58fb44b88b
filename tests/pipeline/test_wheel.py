"""The wheel: what is in it, and that it works alone, from an empty folder and beside a user's own ``pipelines.py``."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("omni_ray", "actors", "pipelines", "clusters")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the files that git knows, built from a copy, so that the checkout stays clean."""
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(
        ["git", "ls-files", "-z", *PACKAGES, "pyproject.toml", "README.md", "LICENSE", "NOTICE", "tests", "notebooks"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)],
        check=True,
        capture_output=True,
        env=os.environ | {"PYTHONWARNINGS": "default"},
    )
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel alone."""
    target = tmp_path_factory.mktemp("installed")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            "--target",
            str(target),
            str(wheel),
        ],
        check=True,
        capture_output=True,
    )
    return target


def alone(installed: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Python with the installed wheel and the dependencies, but without the checkout.

    ``-S`` leaves out the editable install of the checkout (a ``.pth`` file of the environment); the environment's
    packages come back by path.
    """
    path = os.pathsep.join([str(installed), sysconfig.get_path("purelib")])
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, "-S", *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=180
    )


def test_wheel_holds_the_packages_and_their_files_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == set(PACKAGES)
    assert not [name for name in names if "test_" in name or name.endswith(".ipynb") or "conftest" in name]
    listed = subprocess.run(["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}
    assert tracked - names == set(), "files of the packages that the wheel lacks"
    assert "omni_ray/config/recipes/tiny.yaml" in names
    assert {Path(name).name for name in names if ".dist-info/licenses/" in name} == {"LICENSE", "NOTICE"}


def test_every_shipped_asset_is_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assets = [path.relative_to(ROOT).as_posix() for path in (ROOT / "omni_ray/assets").rglob("*") if path.is_file()]
    tracked = subprocess.run(
        ["git", "ls-files", "omni_ray/assets"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert set(tracked.stdout.splitlines()) & set(assets) <= names


def test_installed_wheel_works_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    shown = alone(installed, "-m", "pipelines.cli", "--help", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("usage: omni-ray")
    code = (
        "import omni_ray, actors, pipelines, clusters; from omni_ray.config.load import load_recipe\n"
        "homes = {m.__file__.rsplit('/', 2)[0] for m in (omni_ray, actors, pipelines, clusters)}\n"
        "print(load_recipe('tiny').size, *homes)\n"
    )
    loaded = alone(installed, "-c", code, cwd=tmp_path)
    assert loaded.stdout.split() == ["tiny", str(installed)], loaded.stderr
    assert list(tmp_path.iterdir()) == []


def test_every_module_of_the_installed_wheel_imports(installed: Path, tmp_path: Path) -> None:
    """A module that leans on tests, on the checkout's layout, or on an optional package at its top, fails here."""
    code = (
        "import importlib, pathlib, sys\n"
        f"root = pathlib.Path({str(installed)!r})\n"
        f"for top in {PACKAGES!r}:\n"
        "    for path in sorted((root / top).rglob('*.py')):\n"
        "        name = '.'.join(path.relative_to(root).with_suffix('').parts).removesuffix('.__init__')\n"
        "        if '__main__' not in name:\n"
        "            importlib.import_module(name)\n"
        "print('all')\n"
    )
    done = alone(installed, "-c", code, cwd=tmp_path)
    assert done.stdout == "all\n", done.stderr


def test_console_script_from_a_folder_with_its_own_modules(tmp_path: Path) -> None:
    script = Path(sysconfig.get_path("scripts")) / "omni-ray"
    if not script.is_file():
        pytest.fail(f"{script} is missing; run make install")
    for name in (*PACKAGES, "types", "torch"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('the wrong module')\n")
    done = subprocess.run([script, "plan", "no-such-recipe"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("omni-ray plan: recipe 'no-such-recipe' is neither a file nor a preset")
    listed = subprocess.run([script, "bench", "list"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert listed.returncode == 0, listed.stderr


def test_recipes_load_without_torch_and_ray(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'ray', 'numpy', 'transformers'):\n"
        "    sys.modules[name] = None\n"
        "from omni_ray.config.load import load_recipe, preset_names\n"
        "import omni_ray\n"
        "print([load_recipe(name).size for name in preset_names()])\n"
        "assert omni_ray.Recipe.load('tiny') == load_recipe('tiny')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "'tiny'" in done.stdout
