"""The engine: packed prefill, then one row at a time for all answers together, over the latent cache.

A request's answer depends on the request alone, bit for bit in fp32 on CPU: rows of every matrix product come in
multiples of 16, attention pads a sequence by its own length, and draws come from the request's seed.
"""

# T packed prompt rows, B answers in progress, h heads, C latent rank, R rotary dim

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from omni_ray.inference.cache import LatentCache
from omni_ray.inference.requests import Generation, GenerationRequest
from omni_ray.inference.rows import RowSampler, Vocabulary
from omni_ray.models.attention import LatentAttention
from omni_ray.models.grouped_experts import tiled_experts
from omni_ray.models.layers import ROW_TILE, row_padded
from omni_ray.models.llm import LanguageModel
from omni_ray.models.packed_attention import packed_layout
from omni_ray.models.rope import Turn, rope_tables
from omni_ray.types.errors import RequestError

PREFILL_ROWS = 2048
"""Prompt rows of one prefill forward; more fall out of the processor's cache."""
KEY_TILE = 64
"""Cached keys are read in multiples of this, so a sequence's sums depend on its own length only."""
COMPACT_BELOW = 0.7
"""When fewer than this share of the batch still runs, the finished ones are dropped from the cache."""


class Engine:
    """Batched generation with one language model."""

    def __init__(self, model: LanguageModel, vocabulary: Vocabulary) -> None:
        self.model, self.vocabulary = model, vocabulary
        self.config = model.config

    @torch.no_grad()
    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """Answer all requests, in their order.

        Raises:
            RequestError: an empty prompt, no room to answer, or features that do not fit their rows.
        """
        for request in requests:
            self._check(request)
        if not requests:
            return []
        # Sorted by length, sequences that read equally many keys stand side by side in the cache.
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].ids_T5))
        sorted_requests = [requests[i] for i in order]
        rows: list[list[Tensor]] = [[] for _ in requests]
        finished = [False] * len(requests)
        cache, hidden_BH = self.prefill(sorted_requests)
        sampler = RowSampler(self.model, self.vocabulary, sorted_requests)
        alive, owner = torch.ones(len(order), dtype=torch.bool), torch.tensor(order)
        while True:
            ids_B5, ended_B = sampler.next_rows(hidden_BH)
            for index in alive.nonzero().flatten().tolist():
                rows[int(owner[index])].append(ids_B5[index])
                finished[int(owner[index])] |= bool(ended_B[index])
            alive = alive & ~ended_B.cpu() & (sampler.limit_B.cpu() > sampler.row)
            if not bool(alive.any()):
                break
            if float(alive.float().mean()) < COMPACT_BELOW:
                kept = alive.nonzero().flatten()
                cache, ids_B5, owner, alive = cache.fork(kept.tolist()), ids_B5[kept], owner[kept], alive[kept]
                sampler.keep(kept)
            hidden_BH = self.decode(cache, ids_B5)
        return [
            Generation(ids_R5=torch.stack(answer).cpu(), finished=done)
            for answer, done in zip(rows, finished, strict=True)
        ]

    @torch.no_grad()
    def prefill(self, requests: Sequence[GenerationRequest]) -> tuple[LatentCache, Tensor]:
        """Run prompts through the model.

        Returns:
            A cache of one sequence per request, and [B, H]: the final-normed hidden state of each last row.
        """
        weight = self.model.model.embed_tokens.weight
        cache = LatentCache(self.config, len(requests), dtype=weight.dtype, device=str(weight.device))
        cache.reserve(max(len(r.ids_T5) for r in requests) + 1)
        last = []
        for start, end in _packs([len(r.ids_T5) for r in requests]):
            last.append(self._prefill_pack(cache, requests[start:end], start))
        cache.append([len(r.ids_T5) for r in requests])
        return cache, row_padded(self.model.model.norm, torch.cat(last))

    @torch.no_grad()
    def decode(self, cache: LatentCache, ids_B5: Tensor) -> Tensor:
        """Append one row to every sequence of the cache.

        Args:
            cache: Grown by one row per sequence.  ids_B5: The rows.
        Returns:
            [B, H] final-normed hidden states of these rows.
        """
        batch = len(cache.lengths)
        cache.reserve(max(cache.lengths) + 1)
        x_BH = self.model.embed_rows(ids_B5)
        tiled = batch + -batch % ROW_TILE
        x_BH = torch.cat([x_BH, x_BH.new_zeros(tiled - batch, x_BH.shape[1])])
        position_B = torch.tensor([*cache.lengths, *[0] * (tiled - batch)], device=x_BH.device)
        heads = self.config.num_attention_heads
        turn = Turn(*rope_tables(position_B, self.config.qk_rope_head_dim, self.model.rope_base))
        head_turn = turn.select(torch.arange(tiled, device=x_BH.device).repeat_interleave(heads))
        groups = list(_key_groups(cache.lengths))
        sequence_B = torch.arange(batch, device=x_BH.device)

        def attend(slot: int, attention: LatentAttention, x: Tensor) -> Tensor:
            q_Bhd, latent_BC, k_rope_BR = attention.project(x)
            head_turn.apply_(q_Bhd.flatten(0, 1)[:, attention.nope :])
            k_rope_BR = k_rope_BR.contiguous()
            turn.apply_(k_rope_BR)
            kept_BX = torch.cat([latent_BC, k_rope_BR], dim=1)
            cache.write(slot, sequence_B, position_B[:batch], kept_BX[:batch])
            absorbed_BhC = attention.absorb_query(q_Bhd[..., : attention.nope])
            query_BhX = torch.cat([absorbed_BhC, q_Bhd[..., attention.nope :]], dim=2)
            mixed_BhC = query_BhX.new_zeros(tiled, heads, cache.rank)
            for start, end, length in groups:
                mixed_BhC[start:end] = _read(cache, slot, start, end, length, query_BhX, position_B)
            return attention.absorb_value(mixed_BhC)

        hidden_BH, _ = self.model.run_layers(x_BH, attend, tiled_experts)
        cache.append([1] * batch)
        normed_BH: Tensor = self.model.model.norm(hidden_BH)
        return normed_BH[:batch]

    def _prefill_pack(self, cache: LatentCache, requests: Sequence[GenerationRequest], first: int) -> Tensor:
        lengths = [len(r.ids_T5) for r in requests]
        total = sum(lengths)
        # One more sequence of filler rows makes the row count a multiple of 16.
        filler = -total % ROW_TILE
        device = self.model.model.embed_tokens.weight.device
        ids_T5 = torch.cat([*[r.ids_T5.to(device) for r in requests], torch.full((filler, 5), 3, device=device)])
        x_TH = self.model.embed_rows(ids_T5)
        cu_seqlens, base = [0], 0
        for request, length in zip(requests, lengths, strict=True):
            for offset, features in request.features:
                x_TH[base + offset : base + offset + len(features)] = features.to(x_TH)
            base += length
            cu_seqlens.append(base)
        if filler:
            cu_seqlens.append(total + filler)
        packed = [*lengths, *([filler] if filler else [])]
        position_T = torch.cat([torch.arange(n, device=device) for n in packed])
        sequence_T = torch.repeat_interleave(torch.tensor(packed, device=device))[:total] + first
        turn = Turn(*rope_tables(position_T, self.config.qk_rope_head_dim, self.model.rope_base))
        layout = packed_layout(cu_seqlens, self.config.num_attention_heads, turn)

        def attend(slot: int, attention: LatentAttention, x: Tensor) -> Tensor:
            q_Thd, latent_TC, k_rope_TR = attention.project(x)
            turned_TR = k_rope_TR.clone(memory_format=torch.contiguous_format)
            turn.apply_(turned_TR)
            cache.write(slot, sequence_T, position_T[:total], torch.cat([latent_TC, turned_TR], dim=1)[:total])
            return attention.attend_packed(q_Thd, latent_TC, k_rope_TR, layout)

        hidden_TH, _ = self.model.run_layers(x_TH, attend, tiled_experts)
        ends = torch.tensor(cu_seqlens[1 : len(requests) + 1], device=device) - 1
        return hidden_TH.index_select(0, ends)

    def _check(self, request: GenerationRequest) -> None:
        rows = len(request.ids_T5)
        if rows == 0:
            raise RequestError("a prompt has no rows; it ends at least in the role that answers")
        room = self.config.max_position_embeddings - rows
        if request.max_tokens < 1 or request.max_tokens > room:
            raise RequestError(
                f"max_tokens is {request.max_tokens} after a prompt of {rows} rows, yet the model has "
                f"{self.config.max_position_embeddings} positions; choose 1..{max(room, 0)}"
            )
        if request.voice and not self.vocabulary.code_sizes:
            raise RequestError("this model has no codec heads, so it cannot answer in speech; ask with voice=False")
        for offset, features in request.features:
            if offset < 0 or offset + len(features) > rows or features.shape[1] != self.config.hidden_size:
                raise RequestError(
                    f"features of shape {list(features.shape)} at row {offset} do not fit a prompt of {rows} rows of "
                    f"width {self.config.hidden_size}"
                )


def _packs(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Runs of requests whose rows fit one prefill forward; a longer prompt stands alone."""
    start, filled = 0, 0
    for index, length in enumerate(lengths):
        if filled and filled + length > PREFILL_ROWS:
            yield start, index
            start, filled = index, 0
        filled += length
    yield start, len(lengths)


def _key_groups(lengths: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Consecutive sequences that read equally many cached keys: (first, last + 1, keys), the new row included."""
    start = 0
    tiles = [(length + KEY_TILE) // KEY_TILE * KEY_TILE for length in lengths]
    for index in range(1, len(tiles) + 1):
        if index == len(tiles) or tiles[index] != tiles[start]:
            yield start, index, tiles[start]
            start = index


def _read(
    cache: LatentCache, slot: int, start: int, end: int, length: int, query_BhX: Tensor, position_B: Tensor
) -> Tensor:
    """Attention of one new row over its sequence's cache: [end - start, h, C]."""
    keys_GLX = cache.keys(slot, start, end, length)
    scores = torch.bmm(query_BhX[start:end], keys_GLX.transpose(1, 2))
    unseen_GL = torch.arange(length, device=scores.device) > position_B[start:end, None]
    probs = scores.masked_fill_(unseen_GL.unsqueeze(1), float("-inf")).softmax(dim=-1)
    return torch.bmm(probs, keys_GLX[..., : cache.rank])
