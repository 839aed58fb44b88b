"""What things cost, in relative FLOPs; the units that balancing compares."""

from __future__ import annotations

from omni_ray.config.model import OmniConfig
from omni_ray.types.modality import Modality


def language_cost(length: int, hidden: int = 160) -> float:
    """Cost of one packed sequence of ``length`` rows: linear layers plus causal attention's square.

    Source: per row about 12 H^2 multiply-adds against L/2 x 2 H for attention; only the ratio matters.
    """
    return length * (1.0 + length / (12.0 * hidden))


def media_cost(modality: Modality, units: float, model: OmniConfig) -> float:
    """Cost of encoding one media item, in rows of the language model.

    Args:
        modality: Who encodes it.  units: Patches or frames.  model: Sizes.

    Source: multiply-adds of the linear layers per unit over those per language row (networks.md sections 1, 2 and 4);
    attention inside an encoder, and the codec (frozen, its codes are kept), are left out.
    """
    language = model.language
    hidden = language.hidden_size
    row = (
        language.num_layers
        * hidden
        * (
            6 * language.ffn_hidden_size
            + 3 * language.target_ffn_experts * language.expert_ffn_hidden_size
            + 8 * hidden
        )
    )
    if modality == Modality.VISION:
        vision = model.vision
        unit = vision.num_layers * vision.hidden_size * (4 * vision.hidden_size + 2 * vision.intermediate_size)
    elif modality == Modality.AUDIO:
        audio = model.audio
        unit = 2 * audio.num_layers * audio.hidden_size * audio.projection_size
    else:
        return 0.0
    return units * unit / row
