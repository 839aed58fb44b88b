"""Handlers of ``data build``, ``data inspect`` and ``data preview``."""

from __future__ import annotations

import dataclasses
import hashlib
from argparse import Namespace
from pathlib import Path
from typing import Any

from omni_ray.observability.progress import Progress
from omni_ray.types.errors import ConfigError, DataError
from pipelines.cli_outcome import Outcome, real_data_folder, writable_target


def build(args: Namespace) -> Outcome:
    """Build the tiny world (where it already lies whole, nothing is done), or shards of samples of any form."""
    if args.name == "shards":
        return _build_shards(args)
    real_data = real_data_folder()
    from omni_ray.config.places import cache_folder
    from omni_ray.data.tiny_world.build import SOURCES, build_tiny_world

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


def _build_shards(args: Namespace) -> Outcome:
    if args.source is None or args.out is None:
        raise ConfigError("data build shards needs --from PATH (what to read) and --out FOLDER (where to write)")
    from omni_ray.data.inspect import open_places

    document: dict[str, Any] = {"path": str(args.out.resolve()), "sources": {}}
    lines = []
    sources = open_places(args.source, args.split)
    for source in sources:
        folder = args.out / source.name if len(sources) > 1 else args.out
        written = _written(source, folder, args.split)
        document["sources"][source.name] = dataclasses.asdict(written)
        lines.append(
            f"{folder}: {written.samples} samples in {len(written.shards)} shards, {len(written.bad)} left out"
        )
        lines += [f"  bad: {sentence}" for sentence in written.bad[:20]]
    return Outcome(text="\n".join(lines), document=document)


def _written(source: Any, folder: Path, split: str) -> Any:
    from omni_ray.data.shard_writer import write_source

    with Progress(source.name, len(source), unit="sample") as line:
        return write_source(source, folder, split=split, progress=lambda done: line.advance())


def _counts(sources: dict[str, Any]) -> str:
    rows = [f"{'source':20}{'train':>8}{'held out':>10}"]
    for name, splits in sources.items():
        counts = [splits.get(split, {}).get("samples", 0) for split in ("train", "held_out")]
        rows.append(f"{name:20}{counts[0]:>8}{counts[1]:>10}")
    return "\n".join(rows)


def inspect(args: Namespace) -> Outcome:
    """Samples, rows by modality and seconds; of a built data set also damage and licences."""
    folder: Path = args.path
    if not folder.exists():
        raise DataError(f"{str(folder)!r} is no folder; name a built data set or a folder of shards")
    page = writable_target(args.html, "--html")
    from omni_ray.config.load import load_recipe
    from omni_ray.data.inspect import histogram_lines
    from omni_ray.data.inspect import inspect as count

    networks = load_recipe(args.recipe).networks
    left_out: dict[str, str] = {}
    tokenizer = _tokenizer(folder)
    looks: dict[str, Any] = {"split": args.split, "limit": args.limit, "decode": args.decode}
    sources = count(folder, tokenizer, networks, **looks, left_out=left_out)
    document: dict[str, Any] = {"path": str(folder.resolve()), "split": args.split, "sources": sources}
    document["left_out"] = left_out
    lines = [f"{'source':20}{'samples':>8}{'looked':>8}{'bad':>5}{'text':>9}{'vision':>9}{'audio':>9}{'speech':>9}"]
    for name, facts in sources.items():
        rows = "".join(f"{facts['rows'][kind]:>9}" for kind in ("text", "vision", "audio", "speech"))
        lines.append(f"{name:20}{facts['samples']:>8}{facts['looked_at']:>8}{len(facts['bad']):>5}{rows}")
        lines.extend(f"  bad: {sentence}" for sentence in facts["bad"])
        lines.extend(f"  empty shard: {path}" for path in facts["empty_shards"])
        for kind, bins in facts["lengths"].items():
            lines += [f"  rows of {kind} a sample, from", *histogram_lines(bins, "rows")]
        if facts["durations"]:
            lines += ["  sounds, from", *histogram_lines(facts["durations"], "s")]
        if facts["resolutions"]:
            shown = ", ".join(f"{size} ({number})" for size, number in list(facts["resolutions"].items())[:8])
            lines.append(f"  pictures and films, height x width: {shown}")
    lines += [f"left out: {name}: {problem}" for name, problem in left_out.items()]
    lines += _manifest_facts(folder, document)
    if page is not None:
        from pipelines.data_page import write_inspection

        write_inspection(folder, page, document, args.split)
        lines.append(f"page: {page}")
    bad = bool(document.get("damaged") or left_out) or any(facts["bad"] for facts in sources.values())
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
    """The next samples of a recipe or run, on a page, too; or a page with samples of every source of a data set."""
    from pipelines.data_steps import is_recipe_or_run, next_samples, sample_line

    if not is_recipe_or_run(args.path):
        target = writable_target(args.out or Path("preview.html"), "--out")
        assert target is not None
        from pipelines.data_preview import write_preview

        shown = write_preview(args.path, target, count=args.count, split=args.split)
        return Outcome(text=f"{target}: {shown} samples", document={"page": str(target), "samples": shown})
    page = writable_target(args.out, "--out")
    records = list(next_samples(args.path, args.count, args.step, args.set))
    document: dict[str, Any] = {"samples": records}
    if page is not None and not args.path.is_dir():
        from omni_ray.config.load import load_recipe
        from pipelines.recipe_preview import write_recipe_preview

        recipe = load_recipe(str(args.path), args.set)
        document |= {
            "page": str(page),
            "shown": write_recipe_preview(recipe, page, step=args.step or 0, count=args.count),
        }
    return Outcome(text="\n".join(map(sample_line, records)), document=document)


def curate(args: Namespace) -> Outcome:
    """Speech in which two recognisers agree, or scenes of films with their clusters, as lines that a source reads."""
    from contextlib import nullcontext

    from pipelines.curate import curate as run

    if args.workers:
        from actors.cluster import local_or_joined

        session: Any = local_or_joined()
    else:
        session = nullcontext()
    with session:
        facts = run(args.kind, args.path, args.out, split=args.split, limit=args.limit, workers=args.workers)
    lines = [f"{args.out}: {facts['kept']} of {facts['found']} stretches kept, from {facts['samples']} samples"]
    lines += [f"  left out: {row['recording']}: {row['why']}" for row in facts["left_out"][:20]]
    return Outcome(text="\n".join(lines), document={"path": str(args.out.resolve()), **facts})
