"""The words of the command ``omni-ray``: every command with its options and an example; imports nothing heavy."""

from __future__ import annotations

import argparse
from importlib import metadata
from pathlib import Path
from typing import Any

PROG = "omni-ray"


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keep the example's line, and say defaults, but not where the default is nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, [], argparse.SUPPRESS):
            return action.help
        return super()._get_help_string(action)


class _Commands:
    """Adds commands of one form to a parser."""

    def __init__(self, parser: argparse.ArgumentParser, dest: str) -> None:
        self._subparsers = parser.add_subparsers(dest=dest, metavar="COMMAND", required=True)

    def add(
        self, name: str, handler: str, summary: str, example: str, *, json: bool = False, **further: Any
    ) -> argparse.ArgumentParser:
        """Add one command.

        Args:
            handler: ``module:function`` that runs it.  example: A command line that works.
            json: Offer ``--json``.
        """
        parser: argparse.ArgumentParser = self._subparsers.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=f"example:\n  {example}",
            formatter_class=_Help,
            **further,
        )
        parser.set_defaults(handler=handler)
        parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
        if json:
            parser.add_argument("--json", action="store_true", help="print one JSON document on standard output")
        return parser

    def group(self, name: str, summary: str) -> _Commands:
        """Add a command that has commands of its own."""
        parser = self._subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        return _Commands(parser, f"{name}_command")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Train and serve omni-modal models on Ray, each modality in its own pool of actors.",
        epilog=f"example:\n  {PROG} quickstart",
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="version", version=f"{PROG} {_version()}")
    commands = _Commands(parser, "command")
    _add_training(commands)
    _add_use(commands)
    _add_data(commands)
    _add_codec(commands)
    _add_components(commands)
    _add_checkpoint(commands)
    _add_planning(commands)
    _add_measuring(commands)
    return parser


def _version() -> str:
    try:
        return metadata.version("omni-ray")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="preset name (tiny) or path of a YAML file")
    _add_set(parser)


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", metavar="A.B=C", action="append", default=[], help="change one key of the recipe; may be repeated"
    )


def _add_training(commands: _Commands) -> None:
    quickstart = commands.add(
        "quickstart",
        "pipelines.cli_train:quickstart",
        "build data, train a tiny omni model, evaluate it and let it answer",
        f"{PROG} quickstart --out runs/quickstart",
        json=True,
    )
    quickstart.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder of the run")
    _add_set(quickstart)
    quickstart.add_argument("--recipe", default="tiny", help="preset name or path of a YAML file")
    quickstart.add_argument("--components", default="shipped", help="shipped, train, or a folder of trained ones")
    quickstart.add_argument(
        "--components-scale", type=float, default=1.0, help="share of their steps with --components train (default 1)"
    )
    quickstart.add_argument("--seed", type=int, default=0, help="other initial weights and order")
    _add_train(commands)
    submit = commands.add(
        "submit",
        "pipelines.cli_train:submit",
        "send a recipe to a running cluster as a job",
        f"{PROG} submit tiny --address http://127.0.0.1:8265",
    )
    _add_recipe(submit)
    submit.add_argument("--address", help="the cluster's job endpoint")


def _add_train(commands: _Commands) -> None:
    train = commands.add(
        "train",
        "pipelines.cli_train:train",
        "train a recipe's curriculum in separate pools",
        f"{PROG} train tiny --set pools.vision.actors=2 --out runs/two",
        json=True,
    )
    _add_recipe(train)
    train.add_argument("--out", type=Path, help="folder of the run (default: runs/RECIPE)")
    train.add_argument("--resume", action="store_true", help="continue from the newest whole checkpoint of --out")
    train.add_argument("--timeline", metavar="OUT.json", type=Path, help="write spans of every actor for Perfetto")
    train.add_argument(
        "--live-port",
        metavar="PORT",
        type=int,
        help="serve the pools on 127.0.0.1 while they train: page and protocols of `serve`, answered between steps",
    )


def _add_use(commands: _Commands) -> None:
    evaluate = commands.add(
        "evaluate",
        "pipelines.cli_use:evaluate",
        "measure a checkpoint on held-out samples",
        f"{PROG} evaluate runs/quickstart/checkpoint --limit 100",
        json=True,
    )
    evaluate.add_argument("checkpoint", metavar="CKPT", type=Path, help="folder of a checkpoint")
    evaluate.add_argument("--data", type=Path, help="built data (default: the data the checkpoint was trained on)")
    evaluate.add_argument("--limit", type=_positive, help="samples per task at most")
    evaluate.add_argument("--seed", type=int, default=0, help="which samples, where --limit leaves some out")
    _add_chat(commands)
    serve = commands.add(
        "serve",
        "pipelines.cli_use:serve",
        "serve a checkpoint over HTTP with Ray Serve; stays up until stopped",
        f"{PROG} serve runs/quickstart/checkpoint --port 8000",
    )
    serve.add_argument("checkpoint", metavar="CKPT", type=Path, help="folder of a checkpoint")
    serve.add_argument(
        "--host", default="127.0.0.1", help="address to bind; any but this machine's own needs a key file"
    )
    serve.add_argument("--port", type=_port, default=8000, help="port to bind; 0 takes a free one")
    serve.add_argument("--api-key-file", type=Path, help="file with one accepted key a line")
    serve.add_argument("--tls-cert", type=Path, help="certificate chain (PEM); browsers need it for their microphone")
    serve.add_argument("--tls-key", type=Path, help="its private key (PEM)")
    serve.add_argument(
        "--prefill-decode",
        choices=("together", "separate"),
        help="read prompts in a deployment of their own that hands its cache over; instead of the recipe's word",
    )


def _add_chat(commands: _Commands) -> None:
    chat = commands.add(
        "chat",
        "pipelines.cli_use:chat",
        "ask a checkpoint in text, picture, sound or film; at a terminal without a question: a conversation",
        f'{PROG} chat runs/quickstart/checkpoint --image digit.png --text "which digit is it" --speak answer.wav',
        json=True,
    )
    chat.add_argument("checkpoint", metavar="CKPT", type=Path, help="folder of a checkpoint")
    chat.add_argument("--text", help="the question in words")
    chat.add_argument("--image", type=Path, help="a picture (png, jpg)")
    chat.add_argument("--audio", type=Path, help="a sound or spoken question (wav, flac, mp3)")
    chat.add_argument("--video", type=Path, help="a film (mp4)")
    chat.add_argument("--speak", metavar="OUT.wav", type=Path, help="answer aloud, too, into this file")
    chat.add_argument("--max-tokens", type=_positive, default=64, help="length of the answer at most")
    chat.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest word, 1 samples")
    chat.add_argument("--seed", type=int, default=0, help="which sample, where --temperature is above 0")


def _add_data(commands: _Commands) -> None:
    data = commands.group("data", "build and look at training data")
    build = data.add(
        "build",
        "pipelines.cli_data:build",
        "build a data set: deterministic, cached, with licences in its manifest",
        f"{PROG} data build tiny-world --out data/tiny-world",
        json=True,
    )
    build.add_argument("name", metavar="NAME", choices=["tiny-world", "shards"], help="tiny-world, or shards")
    build.add_argument(
        "--from", dest="source", metavar="PATH", type=Path, help="shards: what to read, in any known form"
    )
    build.add_argument("--split", default="train", help="shards: part to read, and the name of what is written")
    build.add_argument("--out", type=Path, help="folder (default: the cache that training uses)")
    build.add_argument("--seed", type=int, default=0, help="other samples of the same world")
    build.add_argument("--hold-out", default="yweweler", help="human speaker that training must not hear")
    build.add_argument("--scale", type=float, default=1.0, help="share of every source, for a quick look")
    _add_inspect(data)
    _add_preview(data)
    _add_curate(data)


def _add_inspect(data: _Commands) -> None:
    inspect = data.add(
        "inspect",
        "pipelines.cli_data:inspect",
        "count what lies in a folder of samples: rows, sizes, durations, lengths, damage, licences",
        f"{PROG} data inspect data/tiny-world --split held_out --html page.html",
        json=True,
    )
    inspect.add_argument("path", metavar="PATH", type=Path, help="built data set, or any folder of samples")
    inspect.add_argument("--html", type=Path, help="write a page, too: histograms, and samples to see and hear")
    inspect.add_argument("--split", default="train", help="part to count rows of")
    inspect.add_argument("--limit", type=_positive, default=200, help="samples of each source to look into")
    inspect.add_argument("--recipe", default="tiny", help="recipe whose networks count the rows")
    inspect.add_argument("--decode", action="store_true", help="decode the media, too; else only headers are read")


def _add_preview(data: _Commands) -> None:
    preview = data.add(
        "preview",
        "pipelines.cli_data:preview",
        "show the next samples of a recipe or run as the model sees them, or write a page of a built data set",
        f"{PROG} data preview tiny --step 300 --count 4",
        json=True,
    )
    preview.add_argument(
        "path", metavar="PATH", type=Path, help="preset, recipe, folder of a run, or folder of a built data set"
    )
    preview.add_argument("--step", type=int, help="first step (default: 0, or where the run stands)")
    _add_set(preview)
    preview.add_argument("--out", type=Path, help="page to write, too (of a data set: default preview.html)")
    preview.add_argument("--count", type=_positive, default=8, help="samples to show (of each source, in a page)")
    preview.add_argument("--split", default="train", help="part to show")


def _add_curate(data: _Commands) -> None:
    curate = data.add(
        "curate",
        "pipelines.cli_data:curate",
        "keep good speech (two recognisers agree, words aligned) or cut films into clustered scenes, with Ray Data",
        f"{PROG} data curate speech data/tiny-world/audio_repeat --out data/curated --limit 20",
        json=True,
    )
    curate.add_argument("kind", metavar="KIND", choices=["speech", "video"], help="speech or video")
    curate.add_argument("path", metavar="PATH", type=Path, help="samples of any form")
    curate.add_argument("--out", type=Path, required=True, help="folder for KIND.jsonl and the cut sounds")
    curate.add_argument("--split", default="train", help="part to read")
    curate.add_argument("--limit", type=_positive, help="samples of each source at most")
    curate.add_argument("--workers", type=int, default=1, help="Ray Data tasks at a time; 0 runs in this process")


def _add_codec(commands: _Commands) -> None:
    codec = commands.group("codec", "turn sound into codec ids and back")
    for name, summary, example in (
        ("encode", "encode a sound file into codec ids", "encode speech.wav codes.npz"),
        ("decode", "decode codec ids into a sound file", "decode codes.npz speech.wav"),
        ("reconstruct", "encode and decode a sound file, to hear what the codec keeps", "reconstruct in.wav out.wav"),
    ):
        parser = codec.add(name, f"pipelines.cli_codec:{name}", summary, f"{PROG} codec {example}", json=True)
        parser.add_argument("source", metavar="IN", type=Path, help="file to read")
        parser.add_argument("target", metavar="OUT", type=Path, help="file to write")
        parser.add_argument("--codec", type=Path, help="folder of a codec (default: the shipped one)")
        if name != "encode":
            parser.add_argument("--codebooks", type=int, choices=(2, 3, 4), help="use the first of them only")


def _add_components(commands: _Commands) -> None:
    components = commands.group("components", "train components by themselves")
    train = components.add(
        "train",
        "pipelines.cli_components:train",
        "train the speech codec's stages on Ray Train, data parallel and resumable",
        f"{PROG} components train codec --stage 2 --workers 2 --out runs/codec --from my-codec",
        json=True,
    )
    train.add_argument("name", metavar="NAME", choices=["codec"], help="codec")
    train.add_argument("--stage", default="all", help="all, semantic-pretrain, semantic-ctc, kmeans, 1, 2 or 3")
    train.add_argument("--workers", type=_positive, default=1, help="data-parallel workers; they change no number")
    train.add_argument("--recipe", default="codec-tiny", help="preset name or path of a YAML file")
    _add_set(train)
    train.add_argument("--out", type=Path, default=Path("runs/codec"), help="folder of the run")
    train.add_argument("--from", dest="start", metavar="CODEC", type=Path, help="codec to begin with")
    train.add_argument("--resume", action="store_true", help="go on with what lies in --out")


def _add_checkpoint(commands: _Commands) -> None:
    checkpoint = commands.group("checkpoint", "look at checkpoints, and move them in and out")
    inspect = checkpoint.add(
        "inspect",
        "pipelines.cli_checkpoint:inspect",
        "say what a checkpoint holds: step, networks, parameters, versions",
        f"{PROG} checkpoint inspect runs/quickstart/checkpoint",
        json=True,
    )
    inspect.add_argument("checkpoint", metavar="CKPT", type=Path, nargs="?", help="checkpoint, or released folder")
    inspect.add_argument("--size", choices=("tiny", "small", "flash-omni"), help="count a size's parameters instead")
    for name, summary in (
        ("import", "make a checkpoint from released weights"),
        ("export", "write a checkpoint in the released layout"),
        ("reshard", "rewrite a checkpoint for other pool sizes"),
    ):
        more = " --set pools.language.actors=4" if name == "reshard" else ""
        parser = checkpoint.add(
            name, f"pipelines.cli_checkpoint:{name}_", summary, f"{PROG} checkpoint {name} CKPT out{more}", json=True
        )
        if more:
            _add_set(parser)
        parser.add_argument("source", metavar="IN", type=Path, help="folder to read")
        parser.add_argument("target", metavar="OUT", type=Path, help="folder to write")


def _add_planning(commands: _Commands) -> None:
    plan = commands.add(
        "plan",
        "pipelines.cli_train:plan",
        "show the step plans of a recipe: who computes what, before anything runs",
        f"{PROG} plan tiny --steps 3",
        json=True,
    )
    _add_recipe(plan)
    plan.add_argument("--steps", type=_positive, default=1, help="steps to plan from the first")
    simulate = commands.add(
        "simulate",
        "pipelines.cli_train:simulate",
        "predict a recipe's step time and memory at other sizes",
        f"{PROG} simulate tiny",
        json=True,
    )
    _add_recipe(simulate)


def _add_measuring(commands: _Commands) -> None:
    bench = commands.add(
        "bench",
        "pipelines.cli_measure:bench",
        "run a bench and print its figures against their goals",
        f"{PROG} bench overlap --json",
        json=True,
    )
    bench.add_argument("name", metavar="NAME", help="name of a bench; `list` says which there are")
    bench.add_argument("--quick", action="store_true", help="fewer repeats; same load, sizes and figures")
    bench.add_argument("--seed", type=int, default=0, help="other inputs")
    bench.add_argument("--checkpoint", type=Path, help="codec: whose speech is judged (default: the quickstart's)")
    doctor = commands.add(
        "doctor",
        "pipelines.cli_measure:doctor",
        "check that this machine has what omni_ray needs",
        f"{PROG} doctor --deep",
        json=True,
    )
    doctor.add_argument("--deep", action="store_true", help="also import torch and start Ray (half a minute)")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port; choose 1..65535, or 0 for a free one")
    return int(text)


def leaf_parsers(parser: argparse.ArgumentParser, words: str = "") -> list[tuple[str, argparse.ArgumentParser]]:
    """Every command with its words after ``omni-ray``, in the order of the help."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        return [(words, parser)]
    return [
        leaf
        for group in groups
        for name, inner in group.choices.items()
        for leaf in leaf_parsers(inner, f"{words} {name}".strip())
    ]
