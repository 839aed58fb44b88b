"""Handlers of ``checkpoint inspect`` and ``reshard``, and of ``import`` and ``export``, which come later."""

from __future__ import annotations

import json
import math
import struct
from argparse import Namespace
from pathlib import Path
from typing import Any

from omni_ray.types.errors import CheckpointError, NotYetError
from pipelines.cli_outcome import Outcome


def inspect(args: Namespace) -> Outcome:
    """Step, stage, parameters by network and versions, read without loading a weight."""
    from omni_ray.checkpoint.store import check_whole, read_state

    folder: Path = args.checkpoint
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
    lines += [
        f"  {name}: {facts['parameters'] / 1e6:.3f} M parameters in {facts['tensors']} tensors ({facts['dtypes']})"
        for name, facts in networks.items()
    ]
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
    """Refused by name."""
    raise NotYetError("checkpoint import", "LanguageModel.from_pretrained reads released language weights in Python")


def export_(args: Namespace) -> Outcome:
    """Refused by name."""
    raise NotYetError("checkpoint export", f"{args.source}/model already holds each network as safetensors")


def reshard_(args: Namespace) -> Outcome:
    """The same state in as many shards as the changed pools have ranks."""
    from pipelines.training.reshard import reshard

    document = reshard(args.source, args.target, args.set)
    sizes = ", ".join(f"{name} {count}" for name, count in document["shards"].items())
    return Outcome(text=f"{args.target}: step {document['step']}, shards {sizes}", document=document)
