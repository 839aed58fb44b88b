"""The whole path, end to end: data, components, curriculum, held-out figures, answers, one report and one page."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omni_ray.checkpoint import store
from omni_ray.config.load import load_recipe
from omni_ray.config.recipe import Recipe
from omni_ray.observability.events import EventLog, event_log_to
from omni_ray.observability.progress import Progress
from omni_ray.types.errors import CheckpointError, ConfigError, OmniError, ResourceError
from pipelines.bench.writer import BenchReport, Figure, environment, not_run, total_memory_bytes, write_report
from pipelines.evaluation import table
from pipelines.peak_memory import PeakMemory

BENCH = "quickstart"
MINUTES_GOAL, MEMORY_GOAL_GIB = 12.0, 12.0
LEAST_MEMORY_GIB = 6.0
"""Memory below which the run is refused at once rather than killed in the middle."""
INSTALL_VARIABLE = "OMNI_RAY_INSTALL_SECONDS"
REPORT, PAGE, SPENT, LINK = "report.json", "index.html", "spent.json", "checkpoint"


@dataclass(kw_only=True)
class Spent:
    """Seconds and memory of all calls that worked on one run; an interrupted run goes on counting."""

    path: Path
    """Where it is kept."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By phase."""
    peak_gib: float = 0.0
    """Most memory of any call."""

    @staticmethod
    def read(path: Path) -> Spent:
        """What earlier calls left; a damaged or missing file counts as nothing."""
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            return Spent(path=path, seconds=dict(kept["seconds"]), peak_gib=float(kept["peak_gib"]))
        except (OSError, ValueError, KeyError, TypeError):
            return Spent(path=path)

    @property
    def minutes(self) -> float:
        """All phases."""
        return sum(self.seconds.values()) / 60

    @contextmanager
    def phase(self, name: str, memory: PeakMemory) -> Iterator[None]:
        """Count the block, however it ends."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started
            self.peak_gib = max(self.peak_gib, memory.peak_gib)
            record = {"seconds": self.seconds, "peak_gib": self.peak_gib}
            self.path.write_text(json.dumps(record), encoding="utf-8")


def quickstart(
    out: Path,
    *,
    recipe: str = "tiny",
    components: str = "shipped",
    components_scale: float = 1.0,
    real_data: Path | None = None,
    seed: int = 0,
    overrides: list[str] | None = None,
    open_judge: bool = True,
) -> dict[str, Any]:
    """Build data, train, evaluate, answer; continue what was interrupted, or say that it is done.

    Progress goes to standard error. The report document is returned (:func:`summary` shows it) and lies in
    ``out/report.json``, a page with curves and answers in ``out/index.html``, the checkpoint behind ``out/checkpoint``.

    Args:
        out: Folder of the run.  recipe: Preset or YAML file.  overrides: Words ``a.b=value`` for it.
        components: ``shipped``; ``train``: train vision, audio and codec first; or their folder.
        components_scale: With ``train``, the share of their steps, for a try-out.
        real_data: Folder of real recordings and pictures.  seed: Of weights and order.
        open_judge: Let the open-vocabulary recogniser hear some clips as well (half a minute), where it is installed.
    Raises:
        ResourceError: too little memory or shared memory.
        OmniError: a stop signal ended the training early; the same command goes on.
        ConfigError, DataError, CheckpointError: as their texts say.
    """
    if not 0.0 < components_scale <= 1.0:
        raise ConfigError(f"components_scale is {components_scale:g}; choose a share above 0, up to 1")
    words = [*(overrides or []), f"seed={seed}"]
    if components != "train":  # trained ones get their folder's name once they are there
        words.append(f"components={components}")
    plan = load_recipe(recipe, words)
    check_machine()
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with PeakMemory() as memory, event_log_to(EventLog(jsonl=out / "events.jsonl")):
        run = _Run(out=out, memory=memory, spent=Spent.read(out / SPENT))
        document = run.whole(plan, components, components_scale, real_data, open_judge)
    return document


def check_machine() -> None:
    """Refuse a machine on which the run would be killed in the middle.

    Raises:
        ResourceError: names what there is, what is needed, and the mend.
    """
    from actors.cluster import check_shared_memory, object_store_bytes

    have = total_memory_bytes() / 2**30
    if have < LEAST_MEMORY_GIB:
        raise ResourceError(
            f"this machine (or container) has {have:.1f} GiB of memory, yet the quickstart needs "
            f"{LEAST_MEMORY_GIB:g}; give it more"
        )
    check_shared_memory(object_store_bytes())


@dataclass(kw_only=True)
class _Run:
    """One call."""

    out: Path
    memory: PeakMemory
    spent: Spent

    def whole(
        self, plan: Recipe, components: str, scale: float, real_data: Path | None, open_judge: bool
    ) -> dict[str, Any]:
        """All phases in order."""
        with self.spent.phase("data", self.memory):
            root, plan = build_data(plan, real_data)
        if components == "train":
            with self.spent.phase("components", self.memory):
                made = train_components(self.out / "components", plan.seed, real_data, scale)
                plan = _with_components(plan, made)
        self._check_components(plan)
        done = self._finished(plan, root)
        if done is not None:
            say(f"{self.out} is done already; another --out, or an empty one, starts anew")
            return done
        checkpoint = self._train(plan)
        with self.spent.phase("evaluate", self.memory):
            say("evaluating on held-out samples")
            from pipelines.evaluation import evaluate_model

            figures = evaluate_model(checkpoint, root, open_judge=open_judge)
        with self.spent.phase("answers", self.memory):
            from pipelines.quickstart_answers import answer_all

            answers = answer_all(checkpoint, root, self.out / "answers")
        return self._report(plan, root, figures, answers)

    def _check_components(self, plan: Recipe) -> None:
        """Other components make another run, whose report would be taken for this one's."""
        begun = self.out / "recipe.yaml"
        before = load_recipe(str(begun)).components if begun.is_file() else plan.components
        if before != plan.components:
            raise CheckpointError(
                f"{self.out} was begun with components {before}, not {plan.components}; choose another --out"
            )

    def _finished(self, plan: Recipe, root: Path) -> dict[str, Any] | None:
        """The report of an earlier call that ended, if it is of this recipe and these data."""
        from pipelines.training.data_root import data_fingerprint

        try:
            document: dict[str, Any] = json.loads((self.out / REPORT).read_text(encoding="utf-8"))
            facts = document["environment"]
        except (OSError, ValueError, KeyError):
            return None
        same = facts.get("recipe") == plan.numbers_fingerprint() and facts.get("data") == data_fingerprint(root)
        return document if same and (self.out / LINK / store.COMPLETE).is_file() else None

    def _train(self, plan: Recipe) -> Path:
        from pipelines.training.loop import train

        say(f"training {plan.total_steps} steps: {', '.join(f'{s.name} {s.steps}' for s in plan.stages)}")
        with self.spent.phase("train", self.memory):
            result = train(plan, self.out, resume=True)
        if not result.finished or result.checkpoint is None:
            raise OmniError(
                f"stopped after step {result.step} of {plan.total_steps}; the same command goes on from there"
            )
        link_checkpoint(self.out, result.checkpoint)
        return result.checkpoint

    def _report(self, plan: Recipe, root: Path, figures: list[Figure], answers: list[Any]) -> dict[str, Any]:
        from pipelines.quickstart_page import write_quickstart_page
        from pipelines.training.data_root import data_fingerprint, real_data_folder

        self.memory.look()
        self.spent.peak_gib = max(self.spent.peak_gib, self.memory.peak_gib)
        parts = describe_parts(plan)
        facts = environment(
            seed=plan.seed,
            recipe=plan.numbers_fingerprint(),
            data=data_fingerprint(root),
            real_data=real_data_folder() is not None,
            parts=parts,
            answers=[answer.to_json() for answer in answers],
        )
        report = BenchReport(bench=BENCH, figures=(*run_figures(self.spent), *figures), environment=facts)
        document = report.to_json()
        write_quickstart_page(self.out / PAGE, document, answers, parts, commands(self.out), self.out)
        write_report(report, self.out / REPORT)
        return document


def run_figures(spent: Spent) -> list[Figure]:
    """Minutes and memory of the run, and the minutes of its phases."""
    text = os.environ.get(INSTALL_VARIABLE, "")
    against = "the install step of make"
    figures = [_figure("minutes", spent.minutes, "min", MINUTES_GOAL, "after the install step, all calls of this run")]
    if text.isdigit():
        figures.append(_figure("install_minutes", int(text) / 60, "min", None, against))
    else:
        why = f"{INSTALL_VARIABLE} is not set; make quickstart sets it"
        figures.append(not_run("install_minutes", why, unit="min", better="lower", against=against))
    figures.append(
        _figure("peak_memory_gib", spent.peak_gib, "GiB", MEMORY_GOAL_GIB, "whole process tree, shared pages once")
    )
    return figures + [
        _figure(f"{name}_minutes", seconds / 60, "min", None, "part of minutes")
        for name, seconds in spent.seconds.items()
    ]


def _figure(name: str, value: float, unit: str, goal: float | None, against: str) -> Figure:
    value = round(value, 3)
    return Figure(name=name, value=value, unit=unit, better="lower", goal=goal, against=against, runs=(value,))


def build_data(plan: Recipe, real_data: Path | None) -> tuple[Path, Recipe]:
    """The data root, built where the cache lacks it, and the recipe that reads it."""
    from omni_ray.config.places import cache_folder
    from pipelines.training.data_root import data_root, real_data_folder

    if plan.data.root is not None:
        return data_root(plan), plan
    from omni_ray.data.tiny_world.build import build_tiny_world

    root = cache_folder() / ("tiny-world-real" if real_data else "tiny-world")
    say(f"data: the tiny world {f'with real data from {real_data}' if real_data else 'from packages alone'} in {root}")
    with _source_progress() as progress:
        build_tiny_world(root, real_data=real_data, progress=progress)
    if real_data == real_data_folder():
        return root, plan  # training finds the same root by itself, on this machine and the next
    return root, plan.model_copy(update={"data": plan.data.model_copy(update={"root": root})})


@contextmanager
def _source_progress() -> Iterator[Callable[[str, int, int], None]]:
    shown: list[Progress] = []

    def note(source: str, done: int, total: int) -> None:
        if not shown:
            shown.append(Progress("data", total, unit="source"))
        shown[0].advance(source=source)

    try:
        yield note
    finally:
        for progress in shown:
            progress.close()


def train_components(folder: Path, seed: int, real_data: Path | None, scale: float = 1.0) -> Path:
    """Train vision encoder, audio encoder and codec by their documented commands; those already whole are kept."""
    from pipelines.quickstart_components import train_all

    return train_all(folder, seed, real_data, say, scale=scale)


def _with_components(plan: Recipe, folder: Path) -> Recipe:
    return plan.model_copy(update={"components": str(folder)})


def link_checkpoint(out: Path, checkpoint: Path) -> None:
    """Make ``out/checkpoint`` lead to a checkpoint, so that one name serves, however many steps there were."""
    aside = out / f".{LINK}.part"
    aside.unlink(missing_ok=True)
    aside.symlink_to(os.path.relpath(checkpoint, out))
    os.replace(aside, out / LINK)


def describe_parts(plan: Recipe) -> dict[str, str]:
    """Which parts were shipped and which were trained, in words."""
    trained: dict[str, list[str]] = {}
    for stage in plan.stages:
        for part in stage.trainable:
            trained.setdefault(part, []).append(stage.name)
    start = {"shipped": "shipped", "train": "trained here"}.get(plan.components, f"from {plan.components}")
    parts = {"language model": f"trained here from nothing, {_in(trained.get('language', []))}"}
    for name, title in (("vision", "vision encoder"), ("audio", "audio encoder")):
        more = trained.get(name, [])
        parts[title] = f"{start}; {f'trained further {_in(more)}' if more else 'not changed'}"
        parts[f"{name} projector"] = f"trained here {_in(trained.get(f'{name}_projector', []))}"
    return parts | {"codec": f"{start}; not changed"}


def _in(stages: list[str]) -> str:
    return f"in {', '.join(stages)}" if stages else "in no stage"


def summary(document: Mapping[str, Any], out: Path) -> str:
    """The report for people: figures, answers, parts, where everything is, and how to go on."""
    facts = document["environment"]
    answers = [
        f"{one['title']}: {one['question']} -> {one['said'] or '(nothing)'}"
        + ("" if one["right"] else f" (expected: {one['expected']})")
        for one in facts["answers"]
    ]
    parts = [f"{part}: {source}" for part, source in facts["parts"].items()]
    return "\n".join([table(document), "", *answers, "", *parts, "", closing_words(out)])


def closing_words(out: Path) -> str:
    """Where everything is, and how to go on."""
    return "\n".join(
        [f"page: {out / PAGE}", f"report: {out / REPORT}", "talk to it:", *(f"  {line}" for line in commands(out))]
    )


def commands(out: Path) -> list[str]:
    """How to serve and to ask."""
    try:
        shown = (out / LINK).relative_to(Path.cwd())
    except ValueError:
        shown = out / LINK
    return [
        f"omni-ray serve {shown}",
        f'omni-ray chat {shown} --text "say red seven" --speak answer.wav',
        f"omni-ray evaluate {shown}",
    ]


def say(words: str) -> None:
    """For people: standard error, so that standard output stays one document."""
    print(words, file=sys.stderr, flush=True)
