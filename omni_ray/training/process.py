"""Settings of the process that computes: they hold for all of torch in it."""

from __future__ import annotations

import os

import torch


def settle_process(*, threads: int, deterministic: bool) -> None:
    """Before a process builds its networks.

    Args:
        threads: Of torch's kernels.
        deterministic: Only kernels that give the same bits at every run; where an operation has none, torch refuses it
            by name (``RuntimeError``). On CPUs the kernels used here are such; on CUDA sums of scattered rows are not.
    """
    torch.set_num_threads(threads)
    if not deterministic:
        return
    # Read when CUDA starts; cuBLAS chooses among workspaces otherwise.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Torch would also fill memory that is about to be written; nothing here reads what it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
