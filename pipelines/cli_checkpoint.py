"""Handlers of ``checkpoint inspect``, ``import``, ``export`` and ``reshard``."""

from __future__ import annotations

import json
import math
import struct
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omni_ray.types.errors import CheckpointError
from pipelines.cli_outcome import Outcome


def inspect(args: Namespace) -> Outcome:
    """Step, stage, parameters by network and versions, read without loading a weight; or a size's parameters."""
    if (args.checkpoint is None) == (args.size is None):
        raise CheckpointError("checkpoint inspect takes one of two: the folder of a checkpoint, or --size NAME")
    if args.size is not None:
        return inspect_size(args.size)
    folder: Path = args.checkpoint
    if (folder / "config.json").is_file() and not (folder / "COMPLETE").is_file():
        return inspect_released(folder)
    return inspect_checkpoint(folder)


def inspect_size(size: Any) -> Outcome:
    """Parameters of a size from its settings alone, on the meta device."""
    from omni_ray.config.model import model_preset
    from omni_ray.models.counting import count_parameters

    counts = count_parameters(model_preset(size))
    width = max(map(len, counts))
    lines = [f"{size}: parameters in millions"]
    lines += [f"  {name:{width}}  {count / 1e6:14,.3f}" for name, count in counts.items()]
    return Outcome(text="\n".join(lines), document={"size": size, "parameters": counts})


def inspect_released(folder: Path) -> Outcome:
    """What a folder in the released layout holds, values unread."""
    from omni_ray.models import released
    from omni_ray.models.tensor_files import SafetensorsFolder

    SafetensorsFolder(folder)  # refuses a folder whose shards are not all there
    parts = {"language": count_network(folder)}
    files = (*released.VISION_FILES.values(), *released.AUDIO_FILES.values(), *released.TABLE_FILES.values())
    for file in files:
        if (folder / file).is_file():
            tensors = released.read_pt(folder / file)
            parts[file] = {
                "parameters": sum(tensor.numel() for tensor in tensors.values()),
                "tensors": len(tensors),
                "dtypes": ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})),
            }
    absent = [file for file in files if file not in parts]
    lines = [f"{folder}: released layout; omni-ray checkpoint import makes a checkpoint of it"]
    lines += [_network_line(name, facts) for name, facts in parts.items()]
    lines += [f"  not here: {', '.join(absent)}"] if absent else []
    document = {"released": str(folder.resolve()), "parts": parts, "absent": absent}
    return Outcome(text="\n".join(lines), document=document)


def _network_line(name: str, facts: Mapping[str, Any]) -> str:
    return f"  {name}: {facts['parameters'] / 1e6:.3f} M parameters in {facts['tensors']} tensors ({facts['dtypes']})"


def inspect_checkpoint(folder: Path) -> Outcome:
    """A checkpoint of ours."""
    from omni_ray.checkpoint.store import check_whole, read_state

    check_whole(folder)
    state = read_state(folder)
    networks = {network.name: count_network(network) for network in sorted((folder / "model").iterdir())}
    versions = json.loads((folder / "versions.json").read_text(encoding="utf-8"))
    document = {
        "checkpoint": str(folder.resolve()),
        "state": state,
        "networks": networks,
        "versions": versions,
        "has_optimizer": (folder / "optimizer").is_dir(),
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
    }
    lines = [f"{folder}: step {state.get('step')}, stage {state.get('stage')}, {document['bytes'] / 1e6:.1f} MB"]
    lines += [_network_line(name, facts) for name, facts in networks.items()]
    lines.append("  " + ", ".join(f"{package} {version}" for package, version in versions.items()))
    return Outcome(text="\n".join(lines), document=document)


def count_network(folder: Path) -> dict[str, Any]:
    """Parameters, tensors and number types of a network's safetensors shards."""
    shapes: dict[str, list[int]] = {}
    dtypes: set[str] = set()
    for shard in sorted(folder.glob("*.safetensors")):
        for name, facts in read_safetensors_header(shard).items():
            shapes[name] = facts["shape"]
            dtypes.add(facts["dtype"])
    parameters = sum(math.prod(shape) for shape in shapes.values())
    return {"parameters": parameters, "tensors": len(shapes), "dtypes": ", ".join(sorted(dtypes))}


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """Name -> ``{"dtype", "shape", "data_offsets"}`` of a safetensors file (8 bytes of length, then JSON).

    Raises:
        CheckpointError: the file is cut short or of another kind.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > size - 8:
            raise CheckpointError(f"{path} is cut short or is no safetensors file; use another checkpoint")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
        except ValueError as problem:
            raise CheckpointError(f"{path} is no safetensors file ({problem}); use another checkpoint") from problem
    header.pop("__metadata__", None)
    last = max((facts["data_offsets"][1] for facts in header.values()), default=0)
    if 8 + length + last != size:
        raise CheckpointError(
            f"{path} has {size} bytes, its header promises {8 + length + last}; use another checkpoint"
        )
    return header


def import_(args: Namespace) -> Outcome:
    """Make a checkpoint of a folder in the released layout."""
    from pipelines.released_folder import import_folder

    report = import_folder(args.source, args.target)
    lines = [f"{args.target}: made from {args.source}", *_report_lines(report)]
    if report["absent"]:
        lines.append(f"  not in the folder: {', '.join(report['absent'])}")
    return Outcome(text="\n".join(lines), document={"checkpoint": str(args.target.resolve()), **report})


def export_(args: Namespace) -> Outcome:
    """Write a checkpoint in the released layout."""
    from pipelines.released_folder import export_folder

    report = export_folder(args.source, args.target)
    lines = [f"{args.target}: released layout of {args.source}", *_report_lines(report)]
    if report["left_out"]:
        lines.append(f"  left out, the released layout has no place for it: {', '.join(report['left_out'])}")
    return Outcome(text="\n".join(lines), document={"released": str(args.target.resolve()), **report})


def _words(key: str, value: int) -> str:
    return f"{value} {key.replace('_', ' ')}"


def _report_lines(report: Mapping[str, Any]) -> list[str]:
    return [
        f"  {name}: {', '.join(_words(key, value) for key, value in facts.items())}"
        for name, facts in report.items()
        if isinstance(facts, dict)
    ]


def reshard_(args: Namespace) -> Outcome:
    """The same state in as many shards as the changed pools have ranks."""
    from pipelines.training.reshard import reshard

    document = reshard(args.source, args.target, args.set)
    sizes = ", ".join(f"{name} {count}" for name, count in document["shards"].items())
    return Outcome(text=f"{args.target}: step {document['step']}, shards {sizes}", document=document)
