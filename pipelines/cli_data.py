"""Handlers of ``data build``, ``data inspect`` and ``data preview``."""

from __future__ import annotations

import dataclasses
from argparse import Namespace

from omni_ray.observability.progress import Progress
from pipelines.cli_outcome import Outcome, real_data_folder


def build(args: Namespace) -> Outcome:
    """Build the tiny world; where it already lies whole, nothing is done."""
    real_data = real_data_folder()
    from omni_ray.data.tiny_world.build import SOURCES, build_tiny_world
    from pipelines.training.data_root import cache_folder

    name = "tiny-world-real" if real_data else "tiny-world"
    out = (args.out or cache_folder() / name).resolve()
    with Progress("tiny-world", len(SOURCES), unit="source") as line:
        manifest = build_tiny_world(
            out,
            real_data=real_data,
            seed=args.seed,
            hold_out=args.hold_out,
            scale=args.scale,
            progress=lambda source, done, total: line.advance(source=source),
        )
    return Outcome(
        text=f"{out}: {manifest.bytes / 1e6:.1f} MB\n" + table(dataclasses.asdict(manifest)),
        document={"path": str(out), **dataclasses.asdict(manifest)},
    )


def inspect(args: Namespace) -> Outcome:
    """What the manifest says, and whether every shard is still what it was."""
    from omni_ray.data.tiny_world.manifest import read_manifest

    manifest = dataclasses.asdict(read_manifest(args.path))
    damaged = damaged_shards(args)
    lines = [table(manifest), *(f"damaged: {path}" for path in damaged)]
    lines += [f"licence: {origin}: {licence}" for origin, licence in manifest["licences"].items()]
    document = {"path": str(args.path.resolve()), **manifest, "damaged": damaged}
    return Outcome(text="\n".join(lines), document=document, ok=not damaged)


def damaged_shards(args: Namespace) -> list[str]:
    """Shards that are missing or differ from their recorded hash."""
    import hashlib

    from omni_ray.data.tiny_world.manifest import read_manifest

    damaged = []
    for splits in read_manifest(args.path).sources.values():
        for facts in splits.values():
            for shard in facts["shards"]:
                path = args.path / shard["path"]
                if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != shard["sha256"]:
                    damaged.append(shard["path"])
    return damaged


def table(manifest: dict[str, object]) -> str:
    """Samples by source and split."""
    sources = manifest["sources"]
    assert isinstance(sources, dict)
    rows = [f"{'source':20}{'train':>8}{'held out':>10}"]
    for name, splits in sources.items():
        counts = [splits.get(split, {}).get("samples", 0) for split in ("train", "held_out")]
        rows.append(f"{name:20}{counts[0]:>8}{counts[1]:>10}")
    return "\n".join(rows)


def preview(args: Namespace) -> Outcome:
    """A page with samples of every source to look at and listen to."""
    from omni_ray.data.tiny_world.inspect import write_preview

    shown = write_preview(args.path, args.out.resolve(), count=args.count)
    return Outcome(text=f"{args.out}: {shown} samples", document={"page": str(args.out.resolve()), "samples": shown})
