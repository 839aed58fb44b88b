"""The next samples of a recipe or a run, in order, as the model will see them: rows, media and what is learnt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omni_ray.checkpoint import store
from omni_ray.config.load import load_recipe, preset_names
from omni_ray.config.recipe import Recipe
from omni_ray.data.tokenizer import Tokenizer
from omni_ray.training.data_position import resumed_state
from omni_ray.training.prepare import PreparedStep, StepBuilder, tokens_by_modality
from omni_ray.types.batch import IGNORE, ItemRoute
from omni_ray.types.errors import DataError

LEARNT = ("«", "»")
"""Marks around rows whose text is learnt."""


def is_recipe_or_run(path: Path) -> bool:
    """Whether a path names a preset, a recipe file, or the folder of a run."""
    return str(path) in preset_names() or path.suffix in (".yaml", ".yml") or (path / "checkpoints").is_dir()


def next_samples(path: Path, count: int, step: int | None, overrides: list[str]) -> Iterator[dict[str, Any]]:
    """Samples in the order in which steps take them.

    Args:
        path: Preset, recipe file, or folder of a run, which goes on from its newest checkpoint.
        count: How many.  step: First step; None = 0, or where the run stands.  overrides: ``a.b=value`` words.
    Returns:
        One mapping a sample: step, stage, micro_batch, sample, rows, media, text; the first of a step holds the rows
        of the whole step by modality.
    Raises:
        ConfigError, DataError, CheckpointError: as training does.
    """
    recipe, state = _opened(path, overrides)
    from pipelines.training.data_root import data_root

    root = data_root(recipe)
    if state is not None:
        resumed = resumed_state(StepBuilder(recipe, root), state, recipe.checkpoint.accept_changed)
        builder = StepBuilder(recipe, root, state=resumed)
        first = resumed.step if step is None else step
    else:
        builder, first = StepBuilder(recipe, root), step or 0
    if not 0 <= first < recipe.total_steps:
        raise DataError(f"step {first} does not exist: the recipe has steps 0..{recipe.total_steps - 1}")
    for number in range(first, recipe.total_steps):
        stage, _ = recipe.stage_at(number)
        budget = stage.sequence_rows if stage.packing.kind != "balance" else 0
        for record in _samples(builder.build(number), builder.tokenizer, budget):
            yield record
            count -= 1
            if count == 0:
                return


def sample_line(record: dict[str, Any]) -> str:
    """A sample as a line or two for people."""
    head = f"step {record['step']} {record['stage']}, micro-batch {record['micro_batch']}: {record['sample']}"
    lines = [f"{head}, {record['rows']} rows", f"  {record['text']}"]
    if "step_rows" in record:
        shares = ", ".join(f"{name} {rows}" for name, rows in record["step_rows"].items() if rows)
        filled = f"; {record['step_fill']:.3f} of the sequences filled" if "step_fill" in record else ""
        lines.insert(0, f"-- step {record['step']}: rows {shares}{filled}")
    return "\n".join(lines)


def _opened(path: Path, overrides: list[str]) -> tuple[Recipe, dict[str, Any] | None]:
    if not (path / "checkpoints").is_dir():
        return load_recipe(str(path), overrides), None
    newest = store.newest(path / "checkpoints")
    recipe = load_recipe(str(path / "recipe.yaml"), overrides)
    return recipe, store.read_state(newest)["order"] if newest is not None else None


def _samples(prepared: PreparedStep, tokenizer: Tokenizer, budget: int) -> Iterator[dict[str, Any]]:
    plan = prepared.plan
    whole: dict[str, Any] = {"step_rows": tokens_by_modality(prepared)}
    if budget:
        whole["step_fill"] = plan.counts["rows"] / (len(plan.micro_batches) * budget)
    for index in plan.order:
        batch = plan.micro_batches[index]
        items = [item for item in plan.items if item.micro_batch == index]
        start = 0
        for name, rows in zip(batch.samples, batch.lengths, strict=True):
            inside = [item for item in items if start <= item.offset < start + rows]
            text = "".join(_pieces(prepared, index, inside, start, start + rows, tokenizer))
            media = [{"modality": item.modality.value, "rows": item.length} for item in inside]
            yield {
                "step": plan.step,
                "stage": plan.stage,
                "micro_batch": index,
                "sample": name,
                "rows": rows,
                "media": media,
                "text": text,
                **whole,
            }
            whole, start = {}, start + rows


def _pieces(
    prepared: PreparedStep, index: int, items: list[ItemRoute], start: int, stop: int, tokenizer: Tokenizer
) -> Iterator[str]:
    """Words and media in row order; a row is learnt where the row before it has its id as a label."""
    ids = prepared.batches[index].ids_T5[:, 0].tolist()
    labels = prepared.batches[index].labels_T5[:, 0].tolist()
    names = {
        tokenizer.eos_id: "</longcat_s>",
        tokenizer.bos_id: "<longcat_s>",
        tokenizer.pause_id: "</pause>",
        tokenizer.audio_begin_id: "<|audio|>",
        tokenizer.audio_end_id: "<|/audio|>",
    }
    held = {row for item in items for row in range(item.offset, item.offset + item.length)}
    first = {item.offset: item for item in items}
    row = start
    while row < stop:
        if row in first:
            item = first[row]
            beside = [token for token in ids[row : row + item.length] if token != tokenizer.pad_id]
            words = _words(beside, names, tokenizer) if item.id in prepared.targets else ""
            yield f"[{item.modality.value} {item.length}{f': {LEARNT[0]}{words}{LEARNT[1]}' if words else ''}]"
            row += item.length
            continue
        learnt = row > start and labels[row - 1] != IGNORE
        end = row
        while end < stop and end not in held and (end > start and labels[end - 1] != IGNORE) == learnt:
            end += 1
        words = _words(ids[row:end], names, tokenizer)
        yield f"{LEARNT[0]}{words}{LEARNT[1]}" if learnt else words
        row = end


def _words(ids: list[int], names: dict[int, str], tokenizer: Tokenizer) -> str:
    out, plain = "", []
    for token in [*ids, None]:
        if token is not None and token not in names:
            plain.append(token)
            continue
        out += tokenizer.decode(plain)
        plain = []
        out += names.get(token, "") if token is not None else ""
    return out.replace("\n", "⏎")
