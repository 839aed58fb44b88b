"""The command line as a user meets it: help, one JSON document, exit codes 0, 1 and 2, one clear sentence."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from omni_ray.types.errors import DataError
from pipelines import cli
from pipelines.cli_outcome import Outcome
from pipelines.cli_parser import build_parser

COMMANDS = [
    "quickstart",
    "train",
    "evaluate",
    "chat",
    "serve",
    "data build",
    "data inspect",
    "data preview",
    "codec encode",
    "codec decode",
    "codec reconstruct",
    "components train",
    "checkpoint import",
    "checkpoint export",
    "checkpoint inspect",
    "checkpoint reshard",
    "plan",
    "simulate",
    "bench",
    "submit",
    "doctor",
]
"""The public surface of architecture section 7."""
REPORTS_FIGURES = ["quickstart", "train", "evaluate", "data inspect", "checkpoint inspect", "plan", "bench", "doctor"]


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as left:
        build_parser().parse_args([*command.split(), "--help"])
    assert left.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_parses(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(command, capsys)
    example = text.split("example:\n")[1].strip()
    assert example.startswith(f"omni-ray {command} ")
    args = build_parser().parse_args(shlex.split(example)[1:])
    module, _, function = args.handler.partition(":")
    assert callable(getattr(__import__(module, fromlist=[function]), function))


@pytest.mark.parametrize("command", REPORTS_FIGURES)
def test_commands_that_report_figures_offer_json(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--json" in help_of(command, capsys)


def test_help_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from pipelines.cli_parser import build_parser; build_parser(); "
        "heavy = {'torch', 'ray', 'numpy', 'pydantic', 'yaml'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["train"], "the following arguments are required: RECIPE"),
        (["train", "tiny", "--fast"], "unrecognized arguments: --fast"),
        (["serve", "x", "--port", "70000"], "'70000' is not a port; choose 1..65535, or 0 for a free one"),
        (["evaluate", "x", "--limit", "0"], "'0' is not a whole number above 0"),
    ],
)
def test_wrong_usage_is_exit_2(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(words)
    assert left.value.code == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "tinny"], "recipe 'tinny' is neither a file nor a preset (tiny); did you mean the preset 'tiny'?"),
        (
            ["train", "tiny", "--set", "schedule.windw=3"],
            "recipe 'tiny': unknown key 'schedule.windw'; the nearest known key is 'window'",
        ),
        (["evaluate", "nowhere"], "checkpoint nowhere does not exist"),
        (["chat", "nowhere"], "nothing was asked; give --text, --image, --audio or --video"),
        (["serve", "nowhere"], "checkpoint nowhere does not exist"),
        (["checkpoint", "inspect", "nowhere"], "checkpoint nowhere does not exist"),
        (["checkpoint", "import", "nowhere", "b"], "nowhere/config.json is missing"),
        (["checkpoint", "export", "nowhere", "b"], "checkpoint nowhere does not exist"),
        (["checkpoint", "reshard", "a", "b"], "checkpoint a does not exist"),
        (
            ["simulate", "tiny"],
            "simulate (predicted step time and memory) is not built yet in this version; omni-ray plan shows the "
            "plan of a real step",
        ),
        (["data", "inspect", "nowhere"], "nowhere"),
    ],
)
def test_failure_is_exit_1_and_one_sentence(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith(f"omni-ray {words[0]}: ")
    assert says in line
    assert list(tmp_path.iterdir()) == [], "a refused command leaves nothing behind"


def test_submit_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["submit", "tiny", "--address", "http://127.0.0.1:8265"]) == 1
    assert "submit (sending a recipe to http://127.0.0.1:8265 as a job) is not built yet" in capsys.readouterr().err


def test_real_data_folder_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMNI_RAY_REAL_DATA", "/no/such/folder")
    assert cli.main(["quickstart"]) == 1
    assert capsys.readouterr().err == (
        "omni-ray quickstart: OMNI_RAY_REAL_DATA names '/no/such/folder', which is no folder; correct it or unset it\n"
    )


def test_traceback_only_with_debug(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "nowhere"]) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert cli.main(["evaluate", "nowhere", "--debug"]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.splitlines()[-1].startswith("omni-ray evaluate: checkpoint nowhere does not exist")


def test_sentences_for_errors_that_are_not_ours() -> None:
    class WrappedError(Exception):
        """As Ray hands a worker's error over: our error inside, a traceback as the text."""

        cause = DataError("shard a.tar is cut short")

    assert cli.sentence(WrappedError("long\ntraceback")) == "shard a.tar is cut short"
    assert (
        cli.sentence(FileNotFoundError(2, "No such file or directory", "x.wav")) == "x.wav: No such file or directory"
    )
    assert cli.sentence(ValueError("two\n lines")) == "ValueError: two lines (--debug shows where)"
    assert cli.sentence(KeyError(), debug=True) == "KeyError: no further text"


def test_json_is_the_only_thing_on_standard_output() -> None:
    """Prints of libraries, in Python or at descriptor 1, go to standard error while a command runs."""
    code = (
        "import os, sys; from pipelines import cli; from pipelines.cli_outcome import Outcome\n"
        "def noisy(handler, args):\n"
        "    print('python noise'); sys.stdout.flush(); os.write(1, b'descriptor noise\\n')\n"
        "    return Outcome(text='words', document={'a': 1})\n"
        "cli.run_handler = noisy\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    for words, out in ((["doctor", "--json"], '{"a": 1}\n'), (["doctor"], "words\n")):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, out)
        assert sorted(done.stderr.splitlines()) == ["descriptor noise", "python noise"]


def test_a_reader_that_leaves_is_no_failure_to_report() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", "bench", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    killer = threading.Timer(60, process.kill)
    killer.start()
    stderr = process.stderr.read()
    process.stderr.close()
    process.wait()
    killer.cancel()
    assert stderr == b""


def test_outcome_that_is_not_ok_is_exit_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "run_handler", lambda handler, args: Outcome(text="stopped after step 3", ok=False))
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().out == "stopped after step 3\n"


def test_doctor_reports_every_check(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMNI_RAY_REAL_DATA", raising=False)
    monkeypatch.setenv("OMNI_RAY_OBJECT_STORE_MB", "12")
    assert cli.main(["doctor", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    verdicts = {check["name"]: check["verdict"] for check in document["checks"]}
    assert document["ok"] is False
    assert verdicts["shared memory"] == "missing"
    assert verdicts["packages"] == "ok"
    monkeypatch.setenv("OMNI_RAY_OBJECT_STORE_MB", "100")
    assert cli.main(["doctor"]) == 0


def test_bench_list_knows_every_name(capsys: pytest.CaptureFixture[str]) -> None:
    from pipelines.bench import BENCHES

    assert cli.main(["bench", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["bench"] for entry in listed] == list(BENCHES)
    assert {entry["bench"] for entry in listed if entry["built"]} >= {"overlap"}
