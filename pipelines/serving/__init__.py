"""Serving: Ray Serve deployments of the workers behind an HTTP gateway.

Ray Serve's command line and its replicas look for modules in the user's working directory first.  What is imported
here first, from beside this package, a user's own ``actors.py`` there cannot hide.  (A user's ``pipelines.py`` hides
this very package; ``omni-ray serve`` connects from elsewhere, and ``serve run`` must be called elsewhere.)
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def _import_from_beside(*names: str) -> None:
    root = str(Path(__file__).resolve().parents[2])
    sys.path.insert(0, root)
    try:
        for name in names:
            importlib.import_module(name)
    finally:
        sys.path.remove(root)


_import_from_beside("omni_ray", "actors")
