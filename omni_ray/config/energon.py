"""Energon metadatasets as mixtures: ``mixture: {energon: metadataset.yaml}`` in a recipe.

Read as Megatron-Energon documents them (MetadatasetV2 with ``blend``, ``blend_epochized``, ``concat``, ``path``; the
first version's ``datasets``; metadatasets inside metadatasets; ``split_part``; ``subset`` in percent; the split file of
a dataset's ``.nv-meta``). Weights count samples, as there. What has no equal here is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from omni_ray.types.errors import ConfigError

_LISTS = {"blend": "weight", "blend_epochized": "repetitions", "concat": "", "datasets": "weight"}
_WITHOUT_EFFECT = frozenset({"subflavor", "subflavors", "shuffle_over_epochs_multiplier", "dataset_config"})
"""Words of a dataset that say how Energon decodes or labels it; samples here are read by their members."""
_KNOWN = frozenset({"path", "split_part", "split_config", "subset", "weight", "repetitions", *_LISTS})
_MOST_SHARDS = 1000
_Parents = tuple[tuple[Path, str], ...]
"""Files and splits that led here."""


def expand_energon(raw: dict[str, Any], folder: Path) -> None:
    """Replace ``energon`` in the stages' mixtures by the blend it stands for, and add its sources; in place.

    Args:
        raw: A recipe as read.  folder: What a metadataset's relative path starts from.
    Raises:
        ConfigError: names the file and what in it cannot be used.
    """
    stages = raw.get("stages")
    for stage in stages if isinstance(stages, list) else ():
        mixture = stage.get("mixture") if isinstance(stage, dict) else None
        if not isinstance(mixture, dict) or "energon" not in mixture:
            continue
        clash = sorted({"blend", "modalities", "counts"} & mixture.keys())
        if clash:
            raise ConfigError(f"stage {stage.get('name')} mixes from energon and {clash[0]}; keep one of them")
        rest = {word: value for word, value in mixture.items() if word not in ("energon", "energon_split")}
        branches, sources = read_metadataset(
            folder / str(mixture["energon"]), str(mixture.get("energon_split", "train"))
        )
        stage["mixture"] = {"per": "samples", **rest, "blend": branches}
        known = raw.setdefault("data", {}).setdefault("sources", {})
        for name, config in sources.items():
            if known.setdefault(name, config) != config:
                raise ConfigError(f"data.sources.{name} differs from what {mixture['energon']} calls {name}; rename it")


def read_metadataset(path: Path, split: str = "train") -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """(branches of a blend, sources by name) of one split of a metadataset.

    Raises:
        ConfigError: as :func:`expand_energon`.
    """
    reader = _Reader()
    node = reader.metadataset(path, split, ())
    return node.get("blend", [node]), reader.sources


@dataclass(slots=True)
class _Reader:
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)

    def metadataset(self, path: Path, split: str, parents: _Parents) -> dict[str, Any]:
        here = (path.resolve(), split)
        if here in parents:
            raise ConfigError(f"{path} contains itself; break the circle")
        content = _read(path)
        splits = content.get("splits")
        if not isinstance(splits, dict):
            raise ConfigError(f"{path} has no splits; a metadataset names splits.train")
        if split not in splits:
            raise ConfigError(f"{path} has no split {split!r}; it has {', '.join(map(str, splits))}")
        return self.node(splits[split], path, split, (*parents, here))

    def node(self, raw: Any, path: Path, split: str, parents: _Parents) -> dict[str, Any]:
        if not isinstance(raw, dict):
            raise ConfigError(f"{path}: {split} holds {raw!r}; it must be a mapping with path or blend")
        unknown = sorted(map(str, raw.keys() - _KNOWN - _WITHOUT_EFFECT))
        if unknown:
            raise ConfigError(f"{path}: {split} uses {unknown[0]!r}, which has no equal here; leave it out")
        kinds = [word for word in ("path", *_LISTS) if word in raw]
        if len(kinds) != 1:
            raise ConfigError(
                f"{path}: {split} has {' and '.join(kinds) or 'nothing'}; one of path, {', '.join(_LISTS)}"
            )
        kind = kinds[0]
        if kind == "path":
            return self.dataset(raw, path, split, parents)
        branches = []
        for entry in raw[kind]:
            branch = self.node(entry, path, split, parents)
            word = _LISTS[kind]
            if word == "weight":
                branch["weight"] = entry.get("weight", 1)
            else:
                branch["repeat"] = entry.get("repetitions", 1) if word else 1
            branches.append(branch)
        return {"blend": branches}

    def dataset(self, raw: Mapping[str, Any], path: Path, split: str, parents: _Parents) -> dict[str, Any]:
        target = path.parent / str(raw["path"])
        split = str(raw.get("split_part", split))
        if target.suffix in (".yaml", ".yml"):
            return self.metadataset(target, split, parents)
        names = [self.source(place, split if place == target else "") for place in _shards(target, split, raw)]
        part = {} if raw.get("subset") is None else {"part": _part(raw["subset"], path)}
        if len(names) == 1:
            return {"source": names[0], **part}
        if part:
            raise ConfigError(f"{path}: a subset of {target}, whose split file names single shards; list them yourself")
        return {"blend": [{"source": name, "repeat": 1} for name in names]}

    def source(self, place: Path, split: str) -> str:
        config = {"path": str(place), "split": split}
        stem = re.sub(r"[^\w.-]", "_", place.stem if place.suffix == ".tar" else place.name) or "source"
        name, number = stem, 1
        while self.sources.setdefault(name, config) != config:
            number += 1
            name = f"{stem}-{number}"
        return name


def _shards(folder: Path, split: str, raw: Mapping[str, Any]) -> list[Path]:
    """The folder, where its shards carry the split in their names; else the shards that its split file lists."""
    split_file = folder / ".nv-meta" / str(raw.get("split_config", "split.yaml"))
    if not split_file.is_file():
        return [folder]
    listed = (_read(split_file).get("split_parts") or {}).get(split)
    if not listed:
        raise ConfigError(f"{split_file} has no shards for {split!r}")
    shards = [folder / name for pattern in listed for name in _braces(str(pattern))]
    if len(shards) > _MOST_SHARDS:
        raise ConfigError(
            f"{split_file} lists {len(shards)} shards; above {_MOST_SHARDS}, put each split into a folder"
        )
    return shards


def _braces(pattern: str) -> list[str]:
    """``a_{000..002}.tar`` written out."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if found is None:
        return [pattern]
    first, last = found.groups()
    numbers = range(int(first), int(last) + 1)
    return [
        name
        for number in numbers
        for name in _braces(f"{pattern[: found.start()]}{number:0{len(first)}d}{pattern[found.end() :]}")
    ]


def _part(subset: Any, path: Path) -> list[float]:
    edges = subset.get("range") if isinstance(subset, dict) else None
    if not isinstance(edges, list) or len(edges) != 2 or not all(re.fullmatch(r"[\d.]+%", str(e)) for e in edges):
        raise ConfigError(f"{path}: subset {subset!r}; write it as {{range: [0%, 50%]}}, in percent")
    return [float(str(edge)[:-1]) / 100 for edge in edges]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__}; a mapping is needed")
    return content
