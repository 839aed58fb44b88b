"""Language training: forward + backward over the LongcatFlash of transformers, and the share of the matmul peak.

Both sides hold the same weights (theirs, through ``save_pretrained``), see the same batch, take the loss over the whole
vocabulary, run on one thread, in turns, each in a process of its own as its users run it (freed memory of one side
would serve the other, by chance), and must agree on the loss before anything is timed.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omni_ray.config.model import LanguageConfig
from omni_ray.models.cross_entropy import linear_cross_entropy
from omni_ray.models.llm import LanguageModel
from omni_ray.models.recompute import RecomputeMode
from omni_ray.models.weights import published_config
from omni_ray.training.memory import keep_freed_memory
from omni_ray.types.errors import OmniError
from pipelines.bench.deterministic import deterministic_cost
from pipelines.bench.language_configs import LARGE, SMALL
from pipelines.bench.own_process import OwnProcess, Side
from pipelines.bench.writer import BenchReport, Figure, alternate, environment, measured
from pipelines.live_bytes import LiveBytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GOALS = {("small", "fp32"): 1.7, ("small", "bf16"): 1.8, ("large", "fp32"): 6.5, ("large", "bf16"): 6.0}
PEAK_GOALS = {"fp32": 0.6, "bf16": 0.5}
STARTS = {("large", "bf16"): 3}
"""Pairs of processes that a case is measured in, else one. Steps of theirs take 5 to 10 s here by the luck of the heap:
gradients of 16 MiB, at the C library's limit, go back to the system and come again page by page, or stay."""
PEAK_SIDE = 2048
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One configuration at one dtype."""

    size: str
    """small or large."""
    dtype: str
    """fp32 or bf16."""
    config: LanguageConfig
    shape: tuple[int, int]
    """Sequences and their length."""


CASES = [
    Case(size=size, dtype=dtype, config=config, shape=shape)
    for size, config, shape in (("small", SMALL, (2, 512)), ("large", LARGE, (1, 1024)))
    for dtype in DTYPES
]


def run(*, quick: bool = False, seed: int = 0) -> BenchReport:
    """All figures of the bench.

    Args:
        quick: 5 runs of each side instead of 7; speed-ups at the large configuration always take 5.
        seed: Draws weights and token ids.
    """
    torch.set_num_threads(1)
    repeats = 5 if quick else 7
    figures = [figure for case in CASES for figure in _speedup(case, 5 if case.size == "large" else repeats, seed)]
    figures += [figure for case in CASES[2:] for figure in _peak_share(case, repeats, seed, kept=False)]
    # From here on, for this process; those of the comparison above had the system's own behaviour.
    if keep_freed_memory():
        figures += [figure for case in CASES[2:] for figure in _peak_share(case, repeats, seed, kept=True)]
    figures += _recompute(seed)
    for case in CASES[::2]:
        ids, labels = draw_batch(case, seed)
        step = timed(our_step, LanguageModel(case.config, seed=seed), ids, labels)
        figures.append(deterministic_cost(step, f"deterministic_cost_{case.size}", repeats))
    return BenchReport(bench="language-train", environment=environment(seed=seed, threads=1), figures=tuple(figures))


# --- both sides ------------------------------------------------------------------------------------------------------


def draw_batch(case: Case, seed: int) -> tuple[Tensor, Tensor]:
    """Token ids and labels [B, T]; ids start above their pad id, whose embedding takes no gradient there."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels = torch.randint(4, case.config.vocab_size, (2, *case.shape), generator=generator)
    return ids, labels


def reference_models(case: Case, seed: int, folder: Path) -> dict[str, Any]:
    """transformers' model with each of its attentions, equal weights, written to ``folder``."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.LongcatFlashConfig(**published_config(case.config))
    made: dict[str, Any] = {}
    for attention in ("sdpa", "eager"):
        model = transformers.LongcatFlashForCausalLM._from_config(config, attn_implementation=attention)
        if made:
            model.load_state_dict(next(iter(made.values())).state_dict())
        else:
            model.save_pretrained(folder)
        made[attention] = model
    # Their cast rounds the router's weights too, ours leaves them: losses in bf16 agree to its precision only.
    return {name: model.to(DTYPES[case.dtype]).train() for name, model in made.items()}


def our_step(model: LanguageModel, ids: Tensor, labels: Tensor) -> Tensor:
    """Forward and backward; the mean cross-entropy."""
    batch, length = ids.shape
    cu_seqlens = [i * length for i in range(batch + 1)]
    rows = model.model.embed_tokens(ids.flatten())
    hidden = model(rows, cu_seqlens, torch.arange(length).repeat(batch), auxiliary=False).hidden_TD
    weight_R = torch.full((ids.numel(),), 1.0 / ids.numel())
    loss, _ = linear_cross_entropy(hidden, model.text_head, labels.flatten(), weight_R)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def their_step(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """The same with transformers' model."""
    logits = model(input_ids=ids, use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def timed(step: Callable[..., Tensor], model: Any, ids: Tensor, labels: Tensor) -> Callable[[], float]:
    """Seconds of one step with gradients made anew."""

    def once() -> float:
        model.zero_grad(set_to_none=True)
        started = time.perf_counter()
        step(model, ids, labels)
        return time.perf_counter() - started

    return once


def checked_step(model: Any, ids: Tensor, labels: Tensor, *, again: bool) -> tuple[float, float]:
    """Loss and seconds of their first step, or of a second one where a step is short enough to feel the warm-up.

    At the large configuration a step of theirs takes several seconds, nearly all of it products and gradients of expert
    weights: it is made once, for the loss and to choose the attention, before the runs that count.
    """
    loss, seconds = 0.0, 0.0
    for _ in range(2 if again else 1):
        model.zero_grad(set_to_none=True)
        started = time.perf_counter()
        loss = float(their_step(model, ids, labels))
        seconds = time.perf_counter() - started
    model.zero_grad(set_to_none=True)
    return loss, seconds


def theirs(case: Case, seed: int, folder: Path) -> Side:
    """Their side, with the faster of its attentions: its name and the losses of all; the weights lie in ``folder``."""
    torch.set_num_threads(1)
    ids, labels = draw_batch(case, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = reference_models(case, seed, folder)
    checked = {name: checked_step(model, ids, labels, again=case.size == "small") for name, model in models.items()}
    fastest = min(checked, key=lambda name: checked[name][1])
    return (fastest, {name: loss for name, (loss, _) in checked.items()}), timed(
        their_step, models.pop(fastest), ids, labels
    )


def ours(case: Case, seed: int, folder: Path) -> Side:
    """Our side over the weights in ``folder``: the loss."""
    torch.set_num_threads(1)
    ids, labels = draw_batch(case, seed)
    model = LanguageModel.from_pretrained(folder).to(DTYPES[case.dtype])
    return float(our_step(model, ids, labels)), timed(our_step, model, ids, labels)


def _turns(case: Case, repeats: int, seed: int) -> tuple[str, dict[str, tuple[float, ...]]]:
    """Seconds of each run of both sides, made anew, and the attention of theirs."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as sides:
        their_side = sides.enter_context(OwnProcess(theirs, case, seed, Path(folder)))
        our_side = sides.enter_context(OwnProcess(ours, case, seed, Path(folder)))
        fastest, their_losses = their_side.told
        losses = {"ours": our_side.told, **their_losses}
        if not max(losses.values()) - min(losses.values()) <= LOSS_TOLERANCE[case.dtype] * abs(losses["ours"]):
            raise OmniError(f"the sides of {case.size} {case.dtype} do not compute the same: losses {losses}")
        return fastest, alternate({"theirs": their_side, "ours": our_side}, repeats, lambda: (their_side(), our_side()))


def _speedup(case: Case, repeats: int, seed: int) -> list[Figure]:
    fastest, times = set[str](), dict[str, list[float]](theirs=[], ours=[])
    for _ in range(STARTS.get((case.size, case.dtype), 1)):
        attention, seconds = _turns(case, repeats, seed)
        fastest.add(attention)
        for side, runs in seconds.items():
            times[side] += runs
    tokens = case.shape[0] * case.shape[1]
    name = f"{case.size}_{{}}_{case.dtype}"
    chosen = " or ".join(sorted(fastest))
    against = f"transformers LongcatFlash, {chosen} (the faster of its attentions), same weights and batch"
    ratios = [theirs_s / ours_s for theirs_s, ours_s in zip(times["theirs"], times["ours"], strict=True)]
    goal = GOALS[case.size, case.dtype]
    return [
        measured(name.format("speedup"), ratios, unit="ratio", better="higher", goal=goal, against=against),
        measured(name.format("tokens_per_s"), [tokens / s for s in times["ours"]], unit="tokens/s", better="higher"),
    ]


# --- share of the matmul peak ----------------------------------------------------------------------------------------


def useful_flops(config: LanguageConfig, shape: tuple[int, int], ffn_assignments: int) -> float:
    """Forward + backward FLOPs of one step: products only, causal halves, no zero experts, nothing made again.

    Args:
        config: Sizes.  shape: Sequences and their length.
        ffn_assignments: (token, FFN expert) pairs, all layers together.
    """
    sequences, length = shape
    tokens, hidden, heads = sequences * length, config.hidden_size, config.num_attention_heads
    query = config.qk_nope_head_dim + config.qk_rope_head_dim
    attention = hidden * (config.q_lora_rank + config.kv_lora_rank + config.qk_rope_head_dim)
    attention += heads * (config.q_lora_rank * query + config.v_head_dim * hidden)
    attention += heads * config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)
    mlp = 3 * hidden * config.ffn_hidden_size
    router = hidden * (config.n_routed_experts + config.zero_expert_num)
    dense = config.num_layers * (2 * attention + 2 * mlp + router) + hidden * config.vocab_size
    pairs = sequences * length * (length + 1) // 2
    scores = config.num_layers * 2 * heads * pairs * (query + config.v_head_dim)
    experts = ffn_assignments * 3 * hidden * config.expert_ffn_hidden_size
    return 6.0 * (tokens * dense + scores + experts)  # 2 FLOPs each, forward once, backward twice


def matmul_rate(dtype: torch.dtype) -> Callable[[], float]:
    """FLOP/s of a square product with warm operands: the best of three, for a peak is what can be reached."""
    a, b = torch.randn(2, PEAK_SIDE, PEAK_SIDE).to(dtype)
    out = torch.empty_like(a)

    def once() -> float:
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            torch.mm(a, b, out=out)
            seconds.append(time.perf_counter() - started)
        return 2.0 * PEAK_SIDE**3 / min(seconds)

    return once


def _peak_share(case: Case, repeats: int, seed: int, kept: bool) -> list[Figure]:
    ids, labels = draw_batch(case, seed)
    model = LanguageModel(case.config, seed=seed).to(DTYPES[case.dtype])
    length = case.shape[1]
    with torch.no_grad():
        rows = model.model.embed_tokens(ids.flatten())
        cu_seqlens = [i * length for i in range(case.shape[0] + 1)]
        counts = model(rows, cu_seqlens, torch.arange(length).repeat(case.shape[0])).expert_counts_LE
    flops = useful_flops(case.config, case.shape, int(counts[:, : case.config.n_routed_experts].sum()))
    step = timed(our_step, model, ids, labels)

    def warm_up() -> None:
        for _ in range(3):
            step()

    turns = alternate({"step": step, "matmul": matmul_rate(DTYPES[case.dtype])}, repeats, warm_up)
    shares = [flops / s / peak for s, peak in zip(turns["step"], turns["matmul"], strict=True)]
    name = "matmul_peak_fraction" if case.dtype == "fp32" else "matmul_peak_fraction_bf16"
    peak = statistics.median(turns["matmul"]) / 1e9
    against = f"{peak:.0f} GFLOP/s, a {PEAK_SIDE} cubed product in turns with the step; "
    if kept:
        goal = PEAK_GOALS[case.dtype]
        against += "pools.language.keep_freed_memory on"
        return [measured(name, shares, unit="fraction", better="higher", goal=goal, against=against)]
    name += "_system_memory"
    against += "freed memory given back to the system"
    return [measured(name, shares, unit="fraction", better="higher", against=against)]


# --- recomputation ---------------------------------------------------------------------------------------------------


def activation_peak(config: LanguageConfig, length: int, mode: RecomputeMode, seed: int) -> int:
    """Most bytes of tensors alive at one time in a step beyond weights; gradients of weights are dropped as made."""
    model = LanguageModel(config, seed=seed)
    model.recompute = mode
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    case = Case(size="large", dtype="fp32", config=config, shape=(1, length))
    with LiveBytes(model.parameters()) as live:
        our_step(model, *draw_batch(case, seed))
    return live.peak


def _recompute(seed: int) -> list[Figure]:
    config, length = LARGE.model_copy(update={"num_layers": 8}), 1024
    modes: tuple[RecomputeMode, ...] = ("none", "full", "selective")
    none, full, selective = (activation_peak(config, length, mode, seed) for mode in modes)
    against = f"{none / 2**20:.0f} MiB without; 8 layers of the large configuration, T {length}, counted, so exact"
    ratio = full / none
    return [
        measured("recompute_memory_ratio", [ratio], unit="ratio", better="lower", goal=0.45, against=against),
        measured("selective_memory_ratio", [selective / none], unit="ratio", better="lower", against=against),
    ]
