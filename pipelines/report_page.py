"""One static page about a run: answers to look at and listen to, held-out figures, loss curves. No outside files."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from pipelines.report_curves import loss_curves


@dataclass(frozen=True, slots=True, kw_only=True)
class Medium:
    """Something to look at or listen to."""

    mime: str
    """For instance ``image/png``, ``audio/wav``, ``video/mp4``."""
    raw: bytes
    """Encoded bytes."""

    @property
    def uri(self) -> str:
        """As a data URI."""
        return f"data:{self.mime};base64,{base64.b64encode(self.raw).decode()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One question to the model and what it said."""

    title: str
    """Kind of question."""
    question: str
    """Its words."""
    expected: str
    """The right answer."""
    said: str
    """The model's words."""
    right: bool
    """Whether they are the right ones."""
    shown: tuple[Medium, ...] = ()
    """What the model saw and heard."""
    spoken: Medium | None = None
    """The model's voice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageFacts:
    """Everything the page tells."""

    title: str
    """Heading."""
    subtitle: str
    """A sentence under it."""
    tiles: Mapping[str, str]
    """Label -> large value."""
    answers: Sequence[Answer]
    """In order."""
    report: Mapping[str, Any]
    """The report document."""
    metrics: Sequence[Mapping[str, Any]]
    """Lines of metrics.jsonl."""
    parts: Mapping[str, str]
    """Part of the model -> where its weights come from."""
    commands: Sequence[str]
    """How to go on."""


def write_page(facts: PageFacts, path: Path) -> None:
    """Write the page; it appears whole or not at all."""
    aside = path.with_name(f"{path.name}.part")
    aside.write_text(page(facts), encoding="utf-8")
    aside.replace(path)


def page(facts: PageFacts) -> str:
    """The page's HTML."""
    template = Template(resources.files("pipelines").joinpath("report_page.html").read_text("utf-8"))
    shares = [figure for figure in facts.report["figures"] if "chance" in figure]
    environment = facts.report["environment"]
    packages = ", ".join(f"{name} {number}" for name, number in environment["packages"].items() if number)
    run = {
        "machine": f"{environment['cpu']}, {environment['cores']} cores, {environment['memory_gib']} GiB",
        "python": environment["python"],
        "packages": packages,
        "seed": environment.get("seed", ""),
    }
    return template.substitute(
        title=escape(facts.title),
        subtitle=escape(facts.subtitle),
        tiles="".join(f'<div class="tile"><b>{escape(v)}</b>{escape(k)}</div>' for k, v in facts.tiles.items()),
        answers="".join(_answer(answer) for answer in facts.answers),
        figures="".join(_figure(figure) for figure in shares),
        curves=loss_curves(facts.metrics) or '<p class="soft">No steps were recorded.</p>',
        parts=_pairs(facts.parts),
        commands="".join(f"<pre>{escape(command)}</pre>" for command in facts.commands),
        run=_pairs(run),
    )


def _pairs(pairs: Mapping[str, Any]) -> str:
    return "".join(f"<dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd>" for key, value in pairs.items())


def _answer(answer: Answer) -> str:
    shown = "".join(_medium(medium) for medium in answer.shown)
    spoken = _medium(answer.spoken) if answer.spoken is not None else ""
    word, style = ("right", "good") if answer.right else (f"expected: {answer.expected}", "bad")
    return (
        f'<div class="card"><h3>{escape(answer.title)}</h3>{shown}<p class="soft">{escape(answer.question)}</p>'
        f'{spoken}<p class="said">{escape(answer.said) or "(nothing)"}</p>'
        f'<p class="small {style}">{escape(word)}</p></div>'
    )


def _medium(medium: Medium) -> str:
    kind = medium.mime.partition("/")[0]
    if kind == "image":
        return f'<img alt="the picture asked about" src="{medium.uri}">'
    if kind == "video":
        return f'<video src="{medium.uri}" controls loop muted autoplay playsinline></video>'
    return f'<audio src="{medium.uri}" controls></audio>'


def _figure(figure: Mapping[str, Any]) -> str:
    value, goal, chance = figure["value"], figure["goal"], figure["chance"]
    told = figure["against"] + (f"; heard by {figure['judge']}" if figure.get("judge") else "")
    name = escape(figure["name"]).replace("_", "_<wbr>")
    name = f'<td class="name"><code>{name}</code><span>{escape(told)}</span></td>'
    if value is None:
        return f'<tr>{name}<td colspan="7" class="soft">left out: {escape(figure.get("not_run", ""))}</td></tr>'
    low, high = figure["interval_95"]
    word, style = {True: ("reached", "good"), False: ("missed", "bad"), None: ("", "")}[figure["reached"]]
    return (
        f'<tr>{name}<td class="n"><b>{value:.2f}</b></td><td>{_bar(value, low, high, goal, chance)}</td>'
        f'<td class="n wide">{low:.2f}–{high:.2f}</td><td class="n">{"–" if goal is None else f"≥ {goal:g}"}</td>'
        f'<td class="n wide">{chance:.2f}</td><td class="n wide">{figure["n"]}</td><td class="{style}">{word}</td></tr>'
    )


def _bar(value: float, low: float, high: float, goal: float | None, chance: float) -> str:
    def x(share: float) -> float:
        return round(100 * min(max(share, 0.0), 1.0), 1)

    goal_tick = "" if goal is None else f'<path d="M{x(goal)} 1V15" stroke="var(--ink)" stroke-width="1.5"/>'
    return (
        '<svg viewBox="0 0 100 16" preserveAspectRatio="none" role="img" aria-hidden="true">'
        '<rect y="4" width="100" height="8" fill="var(--band)"/>'
        f'<rect y="4" width="{x(value)}" height="8" fill="var(--bar)"/>'
        f'<path d="M{x(low)} 8H{x(high)}" stroke="var(--ink)" stroke-width="1"/>'
        f'<path d="M{x(chance)} 3V13" stroke="var(--soft)" stroke-width="1.5"/>{goal_tick}</svg>'
    )
