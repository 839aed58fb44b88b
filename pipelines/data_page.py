"""The page of ``data inspect``: counts, histograms as bars, and a few samples of each source to see and hear."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omni_ray.data.inspect import numbers_of, open_places
from omni_ray.types.errors import DataError
from pipelines.data_preview import STYLE, sample_html, write_page

SHOWN = 4
"""Samples of each source that the page plays."""
_MORE = """table{border-collapse:collapse}td,th{padding:.1em .7em;text-align:right}
td:first-child,th:first-child{text-align:left}
.hist{display:inline-block;vertical-align:top;margin:.3em 1.4em .3em 0}.hist div{font-size:.8em;white-space:pre}
.bar{display:inline-block;height:.75em;background:#4a7fb5;vertical-align:middle;margin-right:.4em}
.low{display:inline-block;width:4.5em;text-align:right;color:#666;margin-right:.5em}"""


def write_inspection(folder: Path, page: Path, document: Mapping[str, Any], split: str) -> None:
    """Write what :func:`omni_ray.data.inspect.inspect` counted; the page appears whole or not at all."""
    sources: Mapping[str, Mapping[str, Any]] = document["sources"]
    kinds = ("text", "vision", "audio", "speech")
    head = "".join(f"<th>{name}" for name in ("source", "samples", "looked at", "bad", *kinds, "longest"))
    rows = "".join(
        f"<tr><td>{html.escape(name)}<td>{facts['samples']}<td>{facts['looked_at']}<td>{len(facts['bad'])}"
        + "".join(f"<td>{facts['rows'][kind]}" for kind in kinds)
        + f"<td>{facts['longest']}</tr>"
        for name, facts in sources.items()
    )
    opened = {source.name: source for source in open_places(folder, split)}
    blocks = [_source(name, facts, opened.get(name)) for name, facts in sources.items()]
    body = f"<table><tr>{head}</tr>{rows}</table>{''.join(blocks)}"
    title = f"{folder.name}, {split}"
    write_page(page, title, body, STYLE + _MORE)


def _source(name: str, facts: Mapping[str, Any], source: Any) -> str:
    histograms = [_histogram(f"rows of {kind} a sample", bins) for kind, bins in facts["lengths"].items()]
    if facts["resolutions"]:
        histograms.append(
            _histogram("pictures and films (height x width)", dict(list(facts["resolutions"].items())[:12]))
        )
    if facts["durations"]:
        histograms.append(_histogram("sounds (seconds, from)", facts["durations"]))
    kinds = ", ".join(f"{kind} {count}" for kind, count in facts["kinds"].items())
    bad = "".join(f'<div class="bad">{html.escape(sentence)}</div>' for sentence in facts["bad"][:20])
    return (
        f"<h2>{html.escape(name)} <small>{html.escape(kinds)}</small></h2>{''.join(histograms)}{bad}{_samples(source)}"
    )


def _samples(source: Any) -> str:
    shown = []
    for number in numbers_of(len(source), SHOWN) if source is not None else ():
        try:
            shown.append("".join(sample_html(source[number])))
        except DataError:
            continue  # counted and listed above
    return "".join(shown)


def _histogram(title: str, bins: Mapping[Any, int]) -> str:
    most = max(bins.values(), default=1)
    bars = "".join(
        f'<div><span class="low">{html.escape(str(low))}</span>'
        f'<span class="bar" style="width:{max(1, round(120 * count / most))}px"></span>{count}</div>'
        for low, count in bins.items()
    )
    return f'<div class="hist"><b>{html.escape(title)}</b>{bars}</div>'
