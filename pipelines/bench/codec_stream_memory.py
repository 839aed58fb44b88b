"""Memory of a process that does nothing but stream the codec's sound, at the end over after its first minutes.

    python -m pipelines.bench.codec_stream_memory --seconds 3600

A process of its own: where other work ran before, a leak would first fill what that work gave back to the allocator.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence

from omni_ray.types.errors import OmniError

WARM_S = 120.0
"""Streamed before memory is first looked at."""


def growth_elsewhere(seconds: float, seed: int, *, leak: bool) -> float:
    """:func:`stream_growth` of the shipped codec, in a process of its own.

    Raises:
        OmniError: that process failed; its last line is told.
    """
    command = [sys.executable, "-P", "-m", "pipelines.bench.codec_stream_memory", "--seconds", str(seconds)]
    command += ["--seed", str(seed), *(["--leak"] if leak else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise OmniError(f"streaming {seconds:g} s for its memory failed: {last}")
    return float(json.loads(done.stdout)["growth"])


def stream_growth(seconds: float, seed: int, *, leak: bool) -> float:
    """Memory held at the end of a stream of random codes over after ``WARM_S`` of it; ``leak`` keeps all its sound."""
    import torch

    from pipelines.codec_files import load_codec

    torch.set_num_threads(1)
    codec, _ = load_codec(None)
    chance, stream = torch.Generator().manual_seed(seed), codec.stream()
    kept, before = [], 0
    for second in range(round(seconds)):
        frames = round(codec.frame_rate_hz * (second + 1)) - round(codec.frame_rate_hz * second)
        codes_NK = [torch.randint(0, size, (frames,), generator=chance) for size in codec.code_sizes()]
        sound_S = stream.push(torch.stack(codes_NK, dim=1))
        if leak:
            kept.append(sound_S)
        if second == round(WARM_S):
            before = own_bytes()
    return own_bytes() / before


def own_bytes() -> int:
    """Pages that this process alone holds: its share of common ones would grow whenever a neighbour ends."""
    import psutil

    return int(psutil.Process().memory_full_info().uss)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; one JSON document."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.bench.codec_stream_memory")
    parser.add_argument("--seconds", type=float, required=True, help=f"length of the stream, more than {WARM_S:g}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--leak", action="store_true", help="keep all sound: the fault that must be seen")
    options = parser.parse_args(arguments)
    if options.seconds <= WARM_S + 1:
        parser.error(f"--seconds is {options.seconds:g}; stream longer than the {WARM_S:g} s of warm-up")
    print(json.dumps({"growth": stream_growth(options.seconds, options.seed, leak=options.leak)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
