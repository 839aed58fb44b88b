"""What rows of a prompt must be, before an engine takes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from omni_ray.config.model import LanguageConfig
from omni_ray.types.batch import AUDIO_PAD
from omni_ray.types.errors import RequestError

# T prompt rows, H model dim


def check_rows(config: LanguageConfig, ids_T5: Tensor, features: Sequence[tuple[int, Tensor]], before: int) -> None:
    """Refuse prompt rows that do not fit the model; ``before`` rows stand before them.

    Raises:
        RequestError: no rows, too many, ids beyond their table, or features of another size or not finite.
    """
    rows = len(ids_T5)
    if rows == 0:
        raise RequestError("a prompt has no rows; it ends at least in the role that answers")
    if before + rows > config.max_position_embeddings:
        raise RequestError(
            f"{rows} rows after {before} do not fit the model's {config.max_position_embeddings} positions; send less"
        )
    sizes = [config.vocab_size, *[max(config.codec_vocab_size, AUDIO_PAD + 1)] * (ids_T5.shape[1] - 1)]
    low, high = ids_T5.amin(dim=0).tolist(), ids_T5.amax(dim=0).tolist()
    for column, size in enumerate(sizes):
        if low[column] < 0 or high[column] >= size:
            raise RequestError(
                f"ids of column {column} run from {low[column]} to {high[column]}, yet its table has {size}; "
                "use the checkpoint's own tokenizer and codec"
            )
    for offset, values_NH in features:
        if offset < 0 or offset + len(values_NH) > rows or values_NH.shape[1] != config.hidden_size:
            raise RequestError(
                f"features of shape {list(values_NH.shape)} at row {offset} do not fit a prompt of {rows} rows of "
                f"width {config.hidden_size}"
            )
        if not bool(torch.isfinite(values_NH).all()):
            raise RequestError(f"features at row {offset} hold values that are not finite; check the media")
