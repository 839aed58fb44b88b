"""Where things lie that are made once for a user."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``OMNI_RAY_CACHE``, else ``~/.cache/omni_ray``."""
    return Path(os.environ.get("OMNI_RAY_CACHE") or Path.home() / ".cache" / "omni_ray")
