"""The next samples of a recipe exactly as the model will see them: rows with what stands in each, and the media."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from omni_ray.config.recipe import Recipe
from omni_ray.data.image import encode_png
from omni_ray.data.tokenizer import Tokenizer
from omni_ray.training.prepare import PreparedStep, StepBuilder
from omni_ray.types.batch import IGNORE, ItemRoute, OmniBatch
from omni_ray.types.modality import Modality
from pipelines.data_preview import STYLE, write_page
from pipelines.training.data_root import data_root

_MORE = """.rows{font:13px/1.9 ui-monospace,monospace;word-break:break-word}
.rows span{background:#eee;padding:.1em .15em;
margin:0 1px;border-radius:2px;white-space:pre-wrap}.rows .learn{background:#bfe3bf}.rows .media{background:#cfdcf2}
.rows .heads{background:#f2dcb8}.key b{color:#555}"""
_LEGEND = (
    '<p class="rows"><span>context</span> <span class="learn">its next row is learned</span> '
    '<span class="media">rows that a pool fills</span> '
    '<span class="heads">codec rows that the audio heads learn</span></p>'
)


def write_recipe_preview(recipe: Recipe, page: Path, *, step: int, count: int) -> int:
    """Write the next ``count`` samples from ``step`` on, in the order in which they are packed.

    Returns:
        Samples shown.
    Raises:
        DataError, ConfigError: the data are not there, or the step lies beyond the recipe.
    """
    builder = StepBuilder(recipe, data_root(recipe))
    blocks: list[str] = []
    shown = 0
    while shown < count and step < recipe.total_steps:
        prepared = builder.build(step)
        for place, batch in enumerate(prepared.plan.micro_batches):
            for block in _samples(prepared, place, batch.samples, builder.tokenizer, prepared.batches[place]):
                if shown < count:
                    blocks.append(
                        f"<h3>step {step}, {html.escape(prepared.plan.stage)}, micro-batch {place}</h3>{block}"
                    )
                    shown += 1
        blocks += [f'<div class="key">left out: {html.escape(sentence)}</div>' for sentence in prepared.bad]
        step += 1
    write_page(page, "the next samples of the recipe", _LEGEND + "".join(blocks), STYLE + _MORE)
    return shown


def _samples(
    prepared: PreparedStep, place: int, names: tuple[str, ...], tokenizer: Tokenizer, batch: OmniBatch
) -> Iterator[str]:
    items = [item for item in prepared.plan.items if item.micro_batch == place]
    for number, name in enumerate(names):
        first, after = batch.cu_seqlens[number], batch.cu_seqlens[number + 1]
        own = [item for item in items if first <= item.offset < after]
        rows = "".join(_rows(batch, first, after, own, prepared.targets, tokenizer))
        media = " ".join(media_html(item, prepared.media[item.id]) for item in own)
        learned = int((batch.labels_T5[first:after, 0] != IGNORE).sum())
        counts = f"{after - first} rows, {learned} learned"
        yield (
            f'<div class="sample"><div class="key"><b>{html.escape(name)}</b> {counts}</div>'
            f'<div class="rows">{rows}</div>{media}</div>'
        )


def _rows(
    batch: OmniBatch, first: int, after: int, items: list[ItemRoute], targets: frozenset[int], tokenizer: Tokenizer
) -> Iterator[str]:
    """One mark a token; the rows of a medium are one mark."""
    starts = {item.offset: item for item in items}
    special = {tokenizer.bos_id: "⟨begin⟩", tokenizer.eos_id: "⟨end⟩", tokenizer.pad_id: "⟨pad⟩"}
    special |= {tokenizer.audio_begin_id: "⟨audio⟩", tokenizer.audio_end_id: "⟨/audio⟩"}
    row = first
    while row < after:
        item = starts.get(row)
        if item is not None:
            kind = "heads" if item.id in targets else "media"
            words = tokenizer.decode(batch.ids_T5[row : row + item.length, 0].tolist()) if kind == "heads" else ""
            yield f'<span class="{kind}">{item.modality.value} × {item.length} {html.escape(words)}</span>'
            row += item.length
            continue
        token = int(batch.ids_T5[row, 0])
        kind = "learn" if int(batch.labels_T5[row, 0]) != IGNORE else ""
        text = special.get(token) or tokenizer.decode([token]).replace("\n", "⏎") or f"⟨{token}⟩"
        yield f'<span class="{kind}">{html.escape(text)}</span>'
        row += 1


def media_html(item: ItemRoute, media: Any) -> str:
    """The decoded medium as the pool gets it: pixels at their final size, sound at the encoder's rate."""
    if item.modality == Modality.VISION:
        uri = base64.b64encode(encode_png(np.ascontiguousarray(media[0]))).decode()
        return f'<img alt="item {item.id}" title="{media.shape}" src="data:image/png;base64,{uri}">'
    wave = np.asarray(getattr(media, "wave", media))
    out = io.BytesIO()
    soundfile.write(out, wave, 16000, format="WAV", subtype="PCM_16")
    return f'<audio controls src="data:audio/wav;base64,{base64.b64encode(out.getvalue()).decode()}"></audio>'
