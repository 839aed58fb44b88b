"""Sessions over the language model: rows appended, cut back and generated, many sessions in one step."""

# T new rows, B sessions in a step, A attention slots, L cached rows, h heads, C latent rank, R rotary dim, X = C + R

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from omni_ray.inference.requests import GenerationRequest
from omni_ray.inference.rows import RowSampler, Vocabulary
from omni_ray.models.attention import LatentAttention
from omni_ray.models.grouped_experts import tiled_experts
from omni_ray.models.layers import ROW_TILE, row_padded
from omni_ray.models.llm import LanguageModel
from omni_ray.models.rope import Turn, rope_tables
from pipelines.serving.errors import bad_request
from pipelines.serving.sampler_group import SamplerGroup
from pipelines.serving.stages import AnswerOptions, Rows, SessionLostError

KEY_TILE = 64
PREFILL_ROWS = 512
"""Rows of one prefill forward; between two of them waiting answers take a step."""


@dataclass(eq=False, slots=True)
class Running:
    """An answer in progress."""

    sampler: RowSampler
    request: GenerationRequest
    options: AnswerOptions
    hidden_1H: Tensor
    made: int = 0


@dataclass(frozen=True, slots=True)
class Stepped:
    """What one step made for one session."""

    row_5: Tensor
    """Generated ids."""
    ended: bool
    """The answer ended with this row."""
    full: bool
    """The answer has reached its limit."""
    logprob: tuple[float, tuple[tuple[int, float], ...]] | None = None
    """Of the text id, and the likeliest alternatives with theirs."""


class RowStore:
    """Latents and turned rotary keys of one session, contiguous per attention slot; a cut costs nothing."""

    def __init__(self, slots: int, width: int, like: Tensor) -> None:
        self.length = 0
        self.rows_ALX = like.new_zeros(slots, 0, width)

    def reserve(self, capacity: int) -> None:
        """Make room; zeros, because a masked key is multiplied by 0, and 0 * NaN is NaN."""
        have = self.rows_ALX.shape[1]
        if capacity > have:
            wanted = max(capacity, have + have // 2)
            grown = self.rows_ALX.new_zeros(self.rows_ALX.shape[0], wanted + -wanted % KEY_TILE, self.rows_ALX.shape[2])
            grown[:, :have] = self.rows_ALX
            self.rows_ALX = grown


@dataclass(eq=False, slots=True)
class Held:
    """One session's cache."""

    cache: RowStore
    last_1H: Tensor | None = None
    """Final-normed hidden state of the last row."""
    running: Running | None = None
    waiting: list[Tensor] = field(default_factory=list)


class SessionEngine:
    """Continuous batching over sessions of their own lengths; not thread-safe, one loop calls it."""

    def __init__(self, model: LanguageModel, vocabulary: Vocabulary) -> None:
        self.model, self.vocabulary, self.config = model, vocabulary, model.config
        self._held: dict[str, Held] = {}
        self._group = SamplerGroup(model, vocabulary)

    def __len__(self) -> int:
        return len(self._held)

    @property
    def rows(self) -> int:
        """Rows in all caches."""
        return sum(held.cache.length for held in self._held.values())

    @property
    def running(self) -> list[str]:
        """Sessions that have an answer in progress."""
        return [name for name, held in self._held.items() if held.running is not None]

    def length(self, session: str) -> int:
        """Rows of a session, 0 for an unknown one."""
        return self._held[session].cache.length if session in self._held else 0

    @torch.no_grad()
    def extend(self, session: str, at: int, rows: Rows) -> None:
        """Cut a session back to ``at`` rows and append.

        Raises:
            SessionLostError: the session has fewer rows here.  ApiError: more rows than the model has positions.
        """
        held = self.cut(session, at)
        if at + len(rows) > self.config.max_position_embeddings:
            raise bad_request(
                f"the conversation takes {at + len(rows)} rows, yet the model has "
                f"{self.config.max_position_embeddings} positions; send less",
                code="context_length_exceeded",
            )
        ids_T5 = torch.from_numpy(np.array(rows.ids_T5))
        x_TH = self.model.embed_rows(ids_T5)
        for offset, values_ND in rows.features:
            x_TH[offset : offset + len(values_ND)] = torch.from_numpy(np.array(values_ND)).to(x_TH)
        for start in range(0, len(x_TH), PREFILL_ROWS):
            self._prefill(held, x_TH[start : start + PREFILL_ROWS])

    def cut(self, session: str, at: int) -> Held:
        """Forget the rows of a session from ``at`` on, and its answer in progress; a new session has none.

        Raises:
            SessionLostError: the session has fewer rows here.
        """
        have = self.length(session)
        if at > have:
            raise SessionLostError(f"session has {have} rows here, not {at}")
        held = self._held.get(session)
        if held is None:
            weight = self.model.model.embed_tokens.weight
            width = self.config.kv_lora_rank + self.config.qk_rope_head_dim
            held = Held(RowStore(2 * self.config.num_layers, width, weight.detach()))
            self._held[session] = held
        held.running = None
        held.cache.length = at
        return held

    def start(self, session: str, at: int, rows: Rows, options: AnswerOptions) -> None:
        """:meth:`extend`, then begin to answer; :meth:`step` makes the rows."""
        self.extend(session, at, rows)
        held = self._held[session]
        room = self.config.max_position_embeddings - held.cache.length
        if held.last_1H is None or room < 1:
            raise bad_request("the conversation leaves no room for an answer", code="context_length_exceeded")
        if options.voice and not self.vocabulary.code_sizes:
            raise bad_request("this model has no codec heads; ask for text", param="modalities")
        request = GenerationRequest(
            ids_T5=torch.zeros(1, 5, dtype=torch.int64),
            voice=options.voice,
            max_tokens=min(options.max_tokens, room),
            temperature=options.temperature,
            seed=options.seed,
        )
        sampler = RowSampler(self.model, self.vocabulary, [request])
        held.running = Running(sampler, request, options, held.last_1H)

    @torch.no_grad()
    def step(self, sessions: list[str]) -> dict[str, Stepped]:
        """One row for each of these running sessions."""
        out, going, rows = {}, [], []
        for name, (row_5, ended) in self._choose(sessions).items():
            held = self._held[name]
            assert held.running is not None
            run = held.running
            run.made += 1
            full = run.made >= run.request.max_tokens
            logprob = self._logprob(run, int(row_5[0])) if run.options.logprobs >= 0 else None
            out[name] = Stepped(row_5, ended, full, logprob)
            if ended or full:
                held.running = None
            else:
                going.append(held)
                rows.append(row_5[None])
        if going:
            hidden_BH = self._decode(going, torch.cat(rows))
            for held, hidden_1H in zip(going, hidden_BH.split(1), strict=True):
                assert held.running is not None
                held.running.hidden_1H = hidden_1H
        return out

    def stop(self, session: str) -> None:
        """End an answer in progress; its rows stay."""
        if session in self._held:
            self._held[session].running = None

    def forget(self, session: str) -> None:
        """Free a session."""
        self._held.pop(session, None)

    def _choose(self, sessions: list[str]) -> dict[str, tuple[Tensor, bool]]:
        """The next row of each session, and whether it ends the answer."""
        runs = {name: run for name in sessions if (run := self._held[name].running) is not None}
        greedy = [name for name, run in runs.items() if run.request.temperature == 0]
        out = {}
        if greedy:
            chosen = [runs[name] for name in greedy]
            hidden_BH = torch.cat([run.hidden_1H for run in chosen])
            samplers, requests = [run.sampler for run in chosen], [run.request for run in chosen]
            ids_B5, ended_B = self._group.next_rows(samplers, requests, hidden_BH)
            out = dict(zip(greedy, zip(ids_B5, ended_B.tolist(), strict=True), strict=True))
        for name in runs.keys() - set(greedy):
            ids_15, ended_1 = runs[name].sampler.next_rows(runs[name].hidden_1H)
            out[name] = ids_15[0], bool(ended_1[0])
        return out

    def _logprob(self, run: Running, chosen: int) -> tuple[float, tuple[tuple[int, float], ...]]:
        """Log-probabilities under the model's own distribution over its whole vocabulary, temperature 1."""
        logits_V = row_padded(self.model.text_logits, run.hidden_1H)[0].float()
        logprobs_V = logits_V.log_softmax(dim=-1)
        best = logprobs_V.topk(run.options.logprobs) if run.options.logprobs else None
        pairs = () if best is None else tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return float(logprobs_V[chosen]), pairs

    def _prefill(self, held: Held, x_TH: Tensor) -> None:
        cache, count, rank = held.cache, len(x_TH), self.config.kv_lora_rank
        begin = cache.length
        tiled = count + -count % ROW_TILE
        x_TH = torch.cat([x_TH, x_TH.new_zeros(tiled - count, x_TH.shape[1])])
        position_T = torch.arange(begin, begin + tiled, device=x_TH.device)
        turn, head_turn = self._turns(position_T)
        length = begin + tiled + -(begin + tiled) % KEY_TILE
        cache.reserve(length)
        unseen_TL = torch.arange(length, device=x_TH.device) > position_T[:, None]

        def attend(slot: int, attention: LatentAttention, x: Tensor) -> Tensor:
            query_ThX, kept_TX = self._project(attention, x, turn, head_turn)
            cache.rows_ALX[slot, begin : begin + tiled] = kept_TX
            keys_LX = cache.rows_ALX[slot, :length]
            scores_hTL = torch.matmul(query_ThX.transpose(0, 1), keys_LX.t())
            probs = scores_hTL.masked_fill_(unseen_TL, float("-inf")).softmax(dim=-1)
            return attention.absorb_value(torch.matmul(probs, keys_LX[:, :rank]).transpose(0, 1))

        hidden_TH, _ = self.model.run_layers(x_TH, attend, tiled_experts)
        cache.length += count
        held.last_1H = self.model.model.norm(hidden_TH)[count - 1 : count]

    def _decode(self, going: list[Held], ids_B5: Tensor) -> Tensor:
        batch = len(going)
        x_BH = self.model.embed_rows(ids_B5)
        tiled = batch + -batch % ROW_TILE
        x_BH = torch.cat([x_BH, x_BH.new_zeros(tiled - batch, x_BH.shape[1])])
        lengths = [held.cache.length for held in going]
        for held, length in zip(going, lengths, strict=True):
            held.cache.reserve((length // KEY_TILE + 1) * KEY_TILE)
        turn, head_turn = self._turns(torch.tensor([*lengths, *[0] * (tiled - batch)], device=x_BH.device))
        heads, rank = self.config.num_attention_heads, self.config.kv_lora_rank
        spans = [(length // KEY_TILE + 1) * KEY_TILE for length in lengths]
        masks = [torch.arange(s, device=x_BH.device) > n for s, n in zip(spans, lengths, strict=True)]

        def attend(slot: int, attention: LatentAttention, x: Tensor) -> Tensor:
            query_BhX, kept_BX = self._project(attention, x, turn, head_turn)
            mixed_BhC = query_BhX.new_zeros(tiled, heads, rank)
            for i, held in enumerate(going):
                held.cache.rows_ALX[slot, lengths[i]] = kept_BX[i]
                keys_LX = held.cache.rows_ALX[slot, : spans[i]]
                scores_hL = torch.mm(query_BhX[i], keys_LX.t()).masked_fill_(masks[i], float("-inf"))
                mixed_BhC[i] = torch.mm(scores_hL.softmax(dim=-1), keys_LX[:, :rank])
            return attention.absorb_value(mixed_BhC)

        hidden_BH, _ = self.model.run_layers(x_BH, attend, tiled_experts)
        for held in going:
            held.cache.length += 1
        normed_BH: Tensor = self.model.model.norm(hidden_BH)
        return normed_BH[:batch]

    def _turns(self, position_T: Tensor) -> tuple[Turn, Turn]:
        heads = self.config.num_attention_heads
        turn = Turn(*rope_tables(position_T, self.config.qk_rope_head_dim, self.model.rope_base))
        rows = torch.arange(len(position_T), device=position_T.device)
        return turn, turn.select(rows.repeat_interleave(heads))

    def _project(self, attention: LatentAttention, x: Tensor, turn: Turn, head_turn: Turn) -> tuple[Tensor, Tensor]:
        """Queries in latent space [T, h, X], and rows to keep [T, X]."""
        q_Thd, latent_TC, k_rope_TR = attention.project(x)
        head_turn.apply_(q_Thd.flatten(0, 1)[:, attention.nope :])
        k_rope_TR = k_rope_TR.contiguous()
        turn.apply_(k_rope_TR)
        absorbed_ThC = attention.absorb_query(q_Thd[..., : attention.nope])
        return torch.cat([absorbed_ThC, q_Thd[..., attention.nope :]], dim=2), torch.cat([latent_TC, k_rope_TR], dim=1)
