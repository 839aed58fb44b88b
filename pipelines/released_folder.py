"""Between the released folder of LongCat-Flash(-Omni) and a checkpoint of ours, tensor by tensor and bit for bit.

A checkpoint holds ``model/{language,vision,audio}`` as safetensors under our names, and under ``released`` the small
files of the folder it came from (settings, tokenizer, statistics), which an export writes back.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omni_ray.checkpoint import store
from omni_ray.config.model import AudioConfig, LanguageConfig, VisionConfig
from omni_ray.models import pretrained, released, tensor_files, weights
from omni_ray.models.audio_encoder import MODEL_TYPE as AUDIO_TYPE
from omni_ray.models.audio_encoder import AudioEncoder
from omni_ray.models.kaldi_stats import read_cmvn, write_cmvn
from omni_ray.models.llm import LanguageModel
from omni_ray.models.vision_encoder import MODEL_TYPE as VISION_TYPE
from omni_ray.models.vision_encoder import VisionEncoder
from omni_ray.types.errors import CheckpointError

KEPT = "released"
SHARD_BYTES = 2 * 2**30
_WEIGHTS = (".safetensors", ".pt", ".bin", ".pth", ".index.json")
_LARGEST_KEPT = 64 * 2**20
_TABLE_NAME = re.compile(r"(?:^|\.)(\d+)\.weight$")


def import_folder(source: Path, target: Path) -> dict[str, Any]:
    """Make a checkpoint of a released folder; it appears whole or not at all.

    Args:
        source: ``config.json`` and safetensors, perhaps with the omni side files.
        target: Folder that is not there yet.
    Returns:
        What was taken: tensors and bytes by network, and the parts that the folder does not have.
    Raises:
        CheckpointError: a file is missing, cut short, foreign or holds code; a tensor has another name or shape.
    """
    config = weights.read_config(source)
    tables = _read_tables(source, config)
    if tables:
        first = next(iter(tables.values()))
        config = config.model_copy(update={"num_codebooks": 4, "codec_vocab_size": int(first.shape[0])})
    with _appearing(target) as side:
        report: dict[str, Any] = {"language": _import_language(source, side, config, tables)}
        if (source / "vision").is_dir():
            report["vision"] = _import_vision(source, side, config.hidden_size)
        if (source / "audio" / "config.json").is_file():
            report["audio"] = _import_audio(source, side, config.hidden_size)
        kept = _keep_small_files(source, side / KEPT)
        if (side / KEPT / "tokenizer.json").is_file():
            shutil.copyfile(side / KEPT / "tokenizer.json", side / "tokenizer.json")
        store.write_state(side, {"step": 0, "stage": "", "source": "released folder"})
        report["kept_files"] = kept
        report["absent"] = [part for part in ("vision", "audio") if part not in report]
    return report


def export_folder(source: Path, target: Path) -> dict[str, Any]:
    """Write a checkpoint in the released layout; the folder appears whole or not at all.

    Args:
        source: A whole checkpoint.  target: Folder that is not there yet.
    Returns:
        What was written, as :func:`import_folder`.
    Raises:
        CheckpointError: no whole checkpoint, or a network in it is damaged.
    """
    store.check_whole(source)
    with _appearing(target, checkpoint=False) as side:
        if (source / KEPT).is_dir():
            shutil.copytree(source / KEPT, side, dirs_exist_ok=True)
        if (source / "tokenizer.json").is_file():
            shutil.copyfile(source / "tokenizer.json", side / "tokenizer.json")
        report: dict[str, Any] = {"language": _export_language(source / "model" / "language", side)}
        if (source / "model" / "vision").is_dir():
            report["vision"] = _export_vision(source / "model" / "vision", side)
        if (source / "model" / "audio").is_dir():
            report["audio"] = _export_audio(source / "model" / "audio", side)
        names = {network.name for network in (source / "model").iterdir()}
        report["left_out"] = sorted(names - {"language", "vision", "audio"})
    return report


@contextlib.contextmanager
def _appearing(target: Path, *, checkpoint: bool = True) -> Iterator[Path]:
    """A side folder that takes the name ``target`` when the block ends well."""
    target = target.absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} is there already; name a folder that does not exist")
    side = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        side.mkdir(parents=True)
        yield side
        if checkpoint:
            (side / "versions.json").write_text(json.dumps(store.versions(), indent=1), encoding="utf-8")
            (side / store.COMPLETE).write_text(f"{store.FORMAT}\n", encoding="utf-8")
        if target.is_dir():
            target.rmdir()
        side.replace(target)
    except OSError as error:
        raise CheckpointError(
            f"{target} could not be written ({error.strerror}); free space or name another"
        ) from error
    finally:
        shutil.rmtree(side, ignore_errors=True)


def _keep_small_files(source: Path, folder: Path) -> list[str]:
    """Copy settings, tokenizer and statistics as they are; weights are written anew, programs are left."""
    kept = []
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        name = path.relative_to(source)
        hidden = any(part.startswith(".") for part in name.parts)
        if hidden or path.name.endswith((*_WEIGHTS, ".py")) or path.stat().st_size > _LARGEST_KEPT:
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
        kept.append(str(name))
    return kept


def _facts(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {
        "tensors": len(tensors),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
    }


# --- language --------------------------------------------------------------------------------------------------------


def _read_tables(source: Path, config: LanguageConfig) -> dict[str, Tensor]:
    """Codec embeddings and heads under our names; none where the folder has no such files.

    Raises:
        CheckpointError: one file without the other, or not four tables of one shape and the model's width.
    """
    files = {kind: source / file for kind, file in released.TABLE_FILES.items()}
    there = [path for path in files.values() if path.is_file()]
    if not there:
        return {}
    found: dict[str, Tensor] = {}
    for kind, path in files.items():
        for name, tensor in released.read_pt(path).items():
            number = _TABLE_NAME.search(name)
            if number is None:
                raise CheckpointError(f"{path} holds tensor {name}, expected names that end in N.weight")
            found[f"{kind}.{number[1]}.weight"] = tensor
    want = {f"{kind}.{i}.weight" for kind in files for i in range(4)}
    rows = next(iter(found.values())).shape[0]
    if set(found) != want:
        odd = sorted(want ^ set(found))[0]
        raise CheckpointError(f"{there[0].parent}: {odd} is missing or one too many; four tables of each kind are read")
    for name, tensor in found.items():
        if tuple(tensor.shape) != (rows, config.hidden_size):
            raise CheckpointError(
                f"{files[name.split('.')[0]]}: {name} has shape {list(tensor.shape)}, expected "
                f"{[rows, config.hidden_size]}; is config.json of another model?"
            )
    return found


def _import_language(source: Path, side: Path, config: LanguageConfig, tables: Mapping[str, Tensor]) -> dict[str, Any]:
    folder = tensor_files.SafetensorsFolder(source)
    with torch.device("meta"):
        expected = weights.published_tensors(LanguageModel(config), config)
    beside = {name: tensor for name, tensor in tables.items() if name not in folder.names()}
    tensor_files.check_names(
        folder, {n: t for n, t in expected.items() if n not in beside}, weights.passed_over_by(config)
    )
    _check_embedding(source, folder)
    for_it = weights.passed_over_by(config)
    names = [*expected, *sorted(n for n in folder.names() - set(expected) if n.startswith(weights.MTP_PREFIX))]
    dropped = sorted(n for n in folder.names() - set(names) if for_it(n))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in names:
            yield name, beside[name] if name in beside else folder[name]

    tensor_files.write_safetensors(side / "model" / "language", tensors(), SHARD_BYTES)
    raw = released.read_json(source / "config.json")
    written = {**raw, **weights.published_config(config, str(weights.read_dtype(source)).removeprefix("torch."))}
    (side / "model" / "language" / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    mtp = [name for name in names if name.startswith(weights.MTP_PREFIX)]
    return {"tensors": len(names), "prediction_tensors": len(mtp), "rows_of_zero_experts_dropped": len(dropped)}


def _check_embedding(source: Path, folder: tensor_files.SafetensorsFolder) -> None:
    """The embedding that lies beside the weights once more must be the same."""
    path = source / released.EMBEDDING_FILE
    if not path.is_file():
        return
    found = released.read_pt(path)
    if set(found) != {released.EMBEDDING_NAME}:
        raise CheckpointError(f"{path} holds {sorted(found)}, expected {released.EMBEDDING_NAME} alone")
    mine = folder["model.embed_tokens.weight"]
    copy = found[released.EMBEDDING_NAME]
    if copy.shape != mine.shape or not torch.equal(copy.to(mine.dtype), mine):
        raise CheckpointError(
            f"{path}: {released.EMBEDDING_NAME} {list(copy.shape)} is not model.embed_tokens.weight "
            f"{list(mine.shape)} of the safetensors; the files are from different models"
        )


def _export_language(source: Path, side: Path) -> dict[str, Any]:
    config = weights.read_config(source)
    folder = tensor_files.SafetensorsFolder(source)
    with torch.device("meta"):
        expected = weights.published_tensors(LanguageModel(config), config)
    tensor_files.check_names(folder, expected, weights.passed_over_by(config))
    tables = {kind: [n for n in expected if n.startswith(f"{kind}.")] for kind in released.TABLE_FILES}
    beside = {name for names in tables.values() for name in names}
    mtp = sorted(n for n in folder.names() - set(expected) if n.startswith(weights.MTP_PREFIX))
    names = [name for name in expected if name not in beside] + mtp
    tensor_files.write_safetensors(side, ((name, folder[name]) for name in names), SHARD_BYTES)
    for kind, members in tables.items():
        if members:
            # The file of the heads is named after what it holds, as that of the embeddings is.
            stem = "audio_embeddings" if kind == "audio_embeddings" else "audio_output_layers"
            numbered = {f"{stem}.{name.split('.')[1]}.weight": folder[name] for name in members}
            released.write_pt(side / released.TABLE_FILES[kind], numbered)
    if beside:
        embedding = {released.EMBEDDING_NAME: folder["model.embed_tokens.weight"]}
        released.write_pt(side / released.EMBEDDING_FILE, embedding)
    written = released.read_json(source / "config.json")
    (side / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    return {"tensors": len(names) + len(beside), "prediction_tensors": len(mtp)}


# --- encoders --------------------------------------------------------------------------------------------------------


def _gather(
    source: Path, expected: Mapping[str, Tensor], files: Mapping[str, str], given: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """An encoder's tensors under our names from its side files.

    Raises:
        CheckpointError: names file, tensor, expected and found shape.
    """
    held = {file: released.read_pt(source / file) for file in files.values()}
    out = dict(given)
    for name, tensor in expected.items():
        if name in given:
            continue
        place = released.published_place(name, files)
        assert place is not None
        file, published = place
        if published not in held[file]:
            raise CheckpointError(f"{source / file} lacks {published} of shape {list(tensor.shape)}; fetch it again")
        found = held[file].pop(published)
        if found.shape != tensor.shape:
            raise CheckpointError(
                f"{source / file}: {published} has shape {list(found.shape)}, expected {list(tensor.shape)} by its "
                "config.json; the two files are from different models"
            )
        out[name] = found
    for file, rest in held.items():
        if rest:
            name, tensor = next(iter(rest.items()))
            raise CheckpointError(
                f"{source / file} holds {name} of shape {list(tensor.shape)}, which this network does not have "
                f"({len(rest)} such); is its config.json of another model?"
            )
    return out


def _import_vision(source: Path, side: Path, width: int) -> dict[str, Any]:
    config = released.read_vision_config(source / "vision" / "config.json", width)
    with torch.device("meta"):
        expected = VisionEncoder(config).state_dict()
    tensors = _gather(source, expected, released.VISION_FILES, {})
    pretrained.write_folder(side / "model" / "vision", tensors, config, model_type=VISION_TYPE)
    return _facts(tensors)


def _import_audio(source: Path, side: Path, width: int) -> dict[str, Any]:
    config = released.read_audio_config(source / "audio", width)
    mean_M, std_M = read_cmvn(source / "audio" / "global_cmvn", config.num_mels)
    with torch.device("meta"):
        expected = AudioEncoder(config).state_dict()
    given = {"encoder.cmvn_mean_M": mean_M, "encoder.cmvn_std_M": std_M}
    tensors = _gather(source, expected, released.AUDIO_FILES, given)
    pretrained.write_folder(side / "model" / "audio", tensors, config, model_type=AUDIO_TYPE)
    return _facts(tensors)


def _spread(tensors: Mapping[str, Tensor], side: Path, files: Mapping[str, str]) -> None:
    """Write an encoder's tensors into its side files."""
    held: dict[str, dict[str, Tensor]] = {file: {} for file in files.values()}
    for name, tensor in tensors.items():
        place = released.published_place(name, files)
        if place is not None:
            held[place[0]][place[1]] = tensor
    for file, members in held.items():
        released.write_pt(side / file, members)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _before(path: Path) -> dict[str, Any]:
    return released.read_json(path) if path.is_file() else {}


def _export_vision(source: Path, side: Path) -> dict[str, Any]:
    config = pretrained.read_config(source, VisionConfig, model_type=VISION_TYPE)
    with torch.device("meta"):
        expected = VisionEncoder(config).state_dict()
    tensors = pretrained.read_tensors(source, expected, what="a vision encoder")
    _spread(tensors, side, released.VISION_FILES)
    path = side / "vision" / "config.json"
    _write_json(path, released.write_vision_config(config, _before(path)))
    return _facts(tensors)


def _export_audio(source: Path, side: Path) -> dict[str, Any]:
    config = pretrained.read_config(source, AudioConfig, model_type=AUDIO_TYPE)
    with torch.device("meta"):
        expected = AudioEncoder(config).state_dict()
    tensors = pretrained.read_tensors(source, expected, what="an audio encoder")
    _spread(tensors, side, released.AUDIO_FILES)
    mean_M, std_M = tensors["encoder.cmvn_mean_M"].float(), tensors["encoder.cmvn_std_M"].float()
    stats = side / "audio" / "global_cmvn"
    if not stats.is_file() or not all(map(torch.equal, read_cmvn(stats, config.num_mels), (mean_M, std_M))):
        write_cmvn(stats, mean_M, std_M)
    for name, written in (("config.json", released.write_audio_config), ("preprocessor_config.json", _front)):
        path = side / "audio" / name
        _write_json(path, written(config, _before(path)))
    return _facts(tensors)


_front = released.write_front_config
