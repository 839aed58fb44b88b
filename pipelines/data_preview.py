"""One static page that shows samples of a data set: words to read, pictures to see, sounds and films to play."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omni_ray.types.errors import DataError
from omni_ray.types.sample import Sample

MIME = {
    "png": "image/png",
    "jpg": "image/jpeg",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "bmp": "image/bmp",
    "wav": "audio/wav",
    "flac": "audio/flac",
    "ogg": "audio/ogg",
    "mp3": "audio/mpeg",
    "mp4": "video/mp4",
    "mkv": "video/x-matroska",
    "webm": "video/webm",
}
STYLE = """body{font:15px/1.4 system-ui,sans-serif;margin:2em auto;max-width:60em;padding:0 1em}
.sample{border-top:1px solid #ccc;padding:.6em 0}.role{color:#666;display:inline-block;width:6em}
.key{color:#999;font-size:.8em}img{height:112px;image-rendering:pixelated}video{height:140px}audio{height:2em}
.bad{color:#a22}"""


def write_preview(folder: Path, page: Path, *, count: int = 8, split: str = "train") -> int:
    """Write the page; it appears whole or not at all.

    Args:
        folder: A built data set, or a folder of WebDataset tars.  count: Samples of each source, evenly spread.
    Returns:
        Samples shown; in the place of one that cannot be read stands why.
    Raises:
        DataError: no shards there.
    """
    from omni_ray.data.inspect import numbers_of, open_places

    blocks, shown = [], 0
    for source in open_places(folder, split):
        numbers = numbers_of(len(source), count)
        blocks.append(f"<h2>{html.escape(source.name)} <small>{len(source)} samples</small></h2>")
        for number in numbers:
            block, usable = _block(source, number)
            blocks.append(block)
            shown += usable
    write_page(page, f"{folder.name}, {split}", "".join(blocks), STYLE)
    return shown


def _block(source: Any, number: int) -> tuple[str, bool]:
    """A sample's block, or the reason why there is none."""
    try:
        return "".join(sample_html(source[number])), True
    except DataError as error:
        return f'<div class="sample bad">{html.escape(str(error))}</div>', False


def write_page(page: Path, title: str, body: str, style: str) -> None:
    """Write a page; it appears whole or not at all."""
    text = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
        f"<style>{style}</style><h1>{html.escape(title)}</h1>{body}</html>\n"
    )
    aside = page.with_name(f".{page.name}.{os.getpid()}.part")
    aside.write_text(text, encoding="utf-8")
    aside.replace(page)


def sample_html(sample: Sample) -> Iterator[str]:
    """A sample as a block: one line a turn, then its key and facts."""
    yield '<div class="sample">'
    for message in sample.messages:
        parts = " ".join(part_html(part, sample.media) for part in message["content"])
        yield f'<div><span class="role">{html.escape(str(message["role"]))}</span>{parts}</div>'
    facts = ", ".join(f"{name} {value}" for name, value in sample.facts.items())
    yield f'<div class="key">{html.escape(f"{sample.key} ({sample.kind}) {facts}")}</div></div>'


def part_html(part: Mapping[str, Any], media: Mapping[str, bytes]) -> str:
    """Words, or a player with the media inside the page."""
    words = html.escape(str(part.get("text", "")))
    if part["type"] == "text":
        return words
    name = str(part["media"])
    mime = MIME.get(name.rpartition(".")[2].lower(), "application/octet-stream")
    uri = f"data:{mime};base64,{base64.b64encode(media[name]).decode()}"
    if mime.startswith("image/"):
        return f'<img alt="{html.escape(name)}" src="{uri}">'
    kind = "video" if mime.startswith("video/") else "audio"
    return f'<{kind} controls src="{uri}"></{kind}> {words}'.rstrip()
