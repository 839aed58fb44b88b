"""Compiles the C files beside it once for each machine's processor and loads them; without a compiler there is none."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from omni_ray.config.places import cache_folder
from omni_ray.observability.events import emit

SWITCH = "OMNI_RAY_NATIVE"
"""Environment variable; ``0`` leaves the compiled form out."""
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC")
FOLDER = Path(__file__).parent
SOURCES = ("rows.c", "codec.c", "vision.c", "products.c", "attention.c", "layers.c", "half.c")
HEADERS = ("vectors.h", "elements.h")
SIZES = (
    "lanes",
    "panel_columns",
    "rows_scratch_floats",
    "codec_state_floats",
    "codec_scratch_floats",
    "window_scratch_floats",
    "product_scratch_bytes",
    "attend_scratch_bytes",
    "attend_back_scratch_bytes",
)
"""Functions that count; all others give nothing back."""
HALF = "half_"
"""Before the names of the forms in bf16, which are there where the processor has its dot instruction."""
PATIENCE_S = 120
VENDOR = "AuthenticAMD"
"""torch's libraries leave a sixth of the peak of these processors unused, in groups of few rows half; elsewhere not."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None where they are switched off, cannot be compiled or cannot be loaded."""
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        found = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        reason = str(getattr(error, "stderr", "") or error).strip().splitlines()
        emit("native_unavailable", reason=reason[0] if reason else type(error).__name__)
        return None
    for name in SIZES:
        for prefix in ("", HALF):
            if hasattr(found, prefix + name):
                getattr(found, prefix + name).restype = ctypes.c_int64
    return found


def compiled_takes(*operands: Tensor) -> bool:
    """Whether compiled functions may read these: plain tensors of one dtype on the CPU, and nobody looks on.

    A dispatch mode (a counter of FLOPs, fake tensors), autocast and subclasses of tensors must see torch's operations.
    """
    dtype = operands[0].dtype
    fits = all(x.dtype == dtype and x.device.type == "cpu" and type(x) in (Tensor, nn.Parameter) for x in operands)
    return fits and not (torch._C._len_torch_dispatch_stack() and _watched()) and not torch.is_autocast_enabled("cpu")


def _watched() -> bool:
    """Whether a dispatch mode looks on that must see operations; one that only sees memory taken says so."""
    return not all(getattr(mode, "only_memory", False) for mode in _get_current_dispatch_mode_stack())


def form_of(compiled: ctypes.CDLL, name: str, dtype: torch.dtype) -> Any:
    """The function for operands of ``dtype``, fp32 or bf16; None where there is none."""
    if dtype not in (torch.float32, torch.bfloat16):
        return None
    return getattr(compiled, name if dtype == torch.float32 else HALF + name, None)


def _compiled() -> Path:
    """The shared library, made on first use.

    Raises:
        OSError: no compiler, or no room.  SubprocessError: it refuses the source.
    """
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise FileNotFoundError(f"no C compiler ({', '.join(COMPILERS)}) on PATH")
    texts = [(FOLDER / name).read_bytes() for name in (*SOURCES, *HEADERS)]
    name = hashlib.sha256(b"\0".join([*texts, " ".join([compiler, *FLAGS]).encode(), _processor()])).hexdigest()[:16]
    out = cache_folder() / "native" / f"omni-{name}.so"
    if not out.is_file():
        out.parent.mkdir(parents=True, exist_ok=True)
        # Several processes may get here at once: each makes its own, and the last to finish stays.
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            made = Path(folder) / out.name
            command = [compiler, *FLAGS, "-o", str(made), *(str(FOLDER / source) for source in SOURCES), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE_S)
            made.replace(out)
    return out


def _processor() -> bytes:
    """What ``-march=native`` depends on; a home folder may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}".encode()
    told = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.split("\t")[0].strip(": ") in told})).encode()


def library_with(name: str, dtype: torch.dtype) -> ctypes.CDLL | None:
    """:func:`library` where it has the function ``name`` for operands of ``dtype``."""
    compiled = library()
    return compiled if compiled is not None and form_of(compiled, name, dtype) is not None else None


def must_fit(fits: bool, words: str, *operands: Tensor | None) -> None:
    """Compiled code trusts its sizes.

    Raises:
        RuntimeError: as torch's own operations do, where shapes do not belong together.
    """
    if not fits:
        shapes = " and ".join(f"{list(x.shape)} (steps {list(x.stride())})" for x in operands if x is not None)
        raise RuntimeError(f"{words}: {shapes}")


@functools.cache
def own_products_are_faster() -> bool:
    """Whether products compiled here beat torch's; from the processor's vendor, so all processes of a machine agree."""
    return _vendor() == VENDOR


def _vendor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")
