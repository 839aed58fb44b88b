"""Many answers in progress chosen for in one call: their samplers' states are joined while the same ones run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from omni_ray.inference.requests import GenerationRequest
from omni_ray.inference.rows import RowSampler, Vocabulary
from omni_ray.models.llm import LanguageModel

STATE = ("in_segment_B", "words_ended_B", "paused_B", "recent_B4W")
"""What a sampler remembers of an answer besides its request."""


class SamplerGroup:
    """One sampler for all answers of temperature 0; a sampler's choice for a row does not depend on the other rows."""

    def __init__(self, model: LanguageModel, vocabulary: Vocabulary) -> None:
        self._model, self._vocabulary = model, vocabulary
        self._members: list[RowSampler] = []
        self._joined: RowSampler | None = None

    def next_rows(
        self, samplers: Sequence[RowSampler], requests: Sequence[GenerationRequest], hidden_BH: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`omni_ray.inference.rows.RowSampler.next_rows`; row i belongs to sampler i."""
        if len(samplers) == 1:
            self._part()
            return samplers[0].next_rows(hidden_BH)
        same = len(samplers) == len(self._members) and all(a is b for a, b in zip(samplers, self._members, strict=True))
        if not same or self._joined is None:
            self._part()
            self._join(samplers, requests)
        assert self._joined is not None
        return self._joined.next_rows(hidden_BH)

    def _join(self, samplers: Sequence[RowSampler], requests: Sequence[GenerationRequest]) -> None:
        joined = RowSampler(self._model, self._vocabulary, list(requests))
        for name in STATE:
            setattr(joined, name, torch.cat([getattr(sampler, name) for sampler in samplers]))
        self._members, self._joined = list(samplers), joined

    def _part(self) -> None:
        """Give every member its state back."""
        if self._joined is not None:
            for index, sampler in enumerate(self._members):
                for name in STATE:
                    setattr(sampler, name, getattr(self._joined, name)[index : index + 1])
                sampler.row += self._joined.row
        self._members, self._joined = [], None
