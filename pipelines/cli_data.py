"""Handlers of ``data build``, ``data inspect`` and ``data preview``."""

from __future__ import annotations

import dataclasses
import hashlib
from argparse import Namespace
from pathlib import Path
from typing import Any

from omni_ray.observability.progress import Progress
from omni_ray.types.errors import DataError
from pipelines.cli_outcome import Outcome, real_data_folder, writable_target


def build(args: Namespace) -> Outcome:
    """Build the tiny world; where it already lies whole, nothing is done."""
    real_data = real_data_folder()
    from omni_ray.data.tiny_world.build import SOURCES, build_tiny_world
    from pipelines.training.data_root import cache_folder

    out = (args.out or cache_folder() / ("tiny-world-real" if real_data else "tiny-world")).resolve()
    with Progress("tiny-world", len(SOURCES), unit="source") as line:
        manifest = build_tiny_world(
            out,
            real_data=real_data,
            seed=args.seed,
            hold_out=args.hold_out,
            scale=args.scale,
            progress=lambda source, done, total: line.advance(source=source),
        )
    document = dataclasses.asdict(manifest)
    text = f"{out}: {manifest.bytes / 1e6:.1f} MB\n{_counts(document['sources'])}"
    return Outcome(text=text, document={"path": str(out), **document})


def _counts(sources: dict[str, Any]) -> str:
    rows = [f"{'source':20}{'train':>8}{'held out':>10}"]
    for name, splits in sources.items():
        counts = [splits.get(split, {}).get("samples", 0) for split in ("train", "held_out")]
        rows.append(f"{name:20}{counts[0]:>8}{counts[1]:>10}")
    return "\n".join(rows)


def inspect(args: Namespace) -> Outcome:
    """Samples, rows by modality and seconds; of a built data set also damage and licences."""
    folder: Path = args.path
    if not folder.is_dir():
        raise DataError(f"{str(folder)!r} is no folder; name a built data set or a folder of WebDataset tars")
    from omni_ray.config.load import load_recipe
    from omni_ray.data.inspect import inspect as count

    networks = load_recipe(args.recipe).networks
    sources = count(folder, _tokenizer(folder), networks, split=args.split, limit=args.limit)
    document: dict[str, Any] = {"path": str(folder.resolve()), "split": args.split, "sources": sources}
    lines = [f"{'source':20}{'samples':>8}{'looked':>8}{'bad':>5}{'text':>9}{'vision':>9}{'audio':>9}{'speech':>9}"]
    for name, facts in sources.items():
        rows = "".join(f"{facts['rows'][kind]:>9}" for kind in ("text", "vision", "audio", "speech"))
        lines.append(f"{name:20}{facts['samples']:>8}{facts['looked_at']:>8}{len(facts['bad']):>5}{rows}")
        lines.extend(f"  bad: {sentence}" for sentence in facts["bad"])
    lines += _manifest_facts(folder, document)
    bad = bool(document.get("damaged")) or any(facts["bad"] for facts in sources.values())
    return Outcome(text="\n".join(lines), document=document, ok=not bad)


def _manifest_facts(folder: Path, document: dict[str, Any]) -> list[str]:
    """Lines about damage and licences, where the folder has a manifest of ours; the document gets them, too."""
    from omni_ray.data.tiny_world.manifest import MANIFEST_NAME, read_manifest

    if not (folder / MANIFEST_NAME).is_file():
        return []
    try:
        manifest = read_manifest(folder)
    except DataError as problem:  # somebody else's manifest says nothing about their tars
        document["manifest_problem"] = str(problem)
        return [f"{MANIFEST_NAME} is not read: {problem}"]
    document |= {"damaged": damaged_shards(folder, manifest.sources), "manifest": dataclasses.asdict(manifest)}
    lines = [f"damaged: {path}; build it again" for path in document["damaged"]]
    return lines + [f"licence of {origin}: {licence}" for origin, licence in manifest.licences.items()]


def _tokenizer(folder: Path) -> Any:
    from omni_ray.data.tokenizer import Tokenizer

    for place in (folder, folder.parent):
        if (place / "tokenizer.json").is_file():
            return Tokenizer.load(place / "tokenizer.json")
    from omni_ray.data.tiny_world.corpus import template_texts

    return Tokenizer.learn(template_texts())


def damaged_shards(folder: Path, sources: Any) -> list[str]:
    """Shards that are missing, or differ from the hash that the manifest records."""
    shards = [shard for splits in sources.values() for facts in splits.values() for shard in facts["shards"]]
    return [shard["path"] for shard in shards if not _is_as_recorded(folder / shard["path"], shard["sha256"])]


def _is_as_recorded(path: Path, sha256: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def preview(args: Namespace) -> Outcome:
    """The next samples of a recipe or run; or, of a data set, a page with samples of every source to look at."""
    from pipelines.data_steps import is_recipe_or_run, next_samples, sample_line

    if is_recipe_or_run(args.path):
        records = list(next_samples(args.path, args.count, args.step, args.set))
        return Outcome(text="\n".join(map(sample_line, records)), document={"samples": records})
    target = writable_target(args.out, "--out")
    assert target is not None
    from pipelines.data_preview import write_preview

    shown = write_preview(args.path, target, count=args.count, split=args.split)
    return Outcome(text=f"{target}: {shown} samples", document={"page": str(target), "samples": shown})
