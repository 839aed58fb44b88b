"""The released layout both ways: bit for bit, prediction heads kept, everything else refused by name."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_networks import SMALL_LANGUAGE
from torch import Tensor

from omni_ray.config.model import AudioConfig, VisionConfig
from omni_ray.models import released, weights
from omni_ray.models.audio_encoder import AudioEncoder
from omni_ray.models.kaldi_stats import read_cmvn, write_cmvn
from omni_ray.models.llm import LanguageModel
from omni_ray.models.tensor_files import write_safetensors
from omni_ray.models.vision_encoder import VisionEncoder
from omni_ray.types.errors import CheckpointError
from pipelines.cli_checkpoint import inspect
from pipelines.released_folder import export_folder, import_folder

REPOSITORY = Path(__file__).parents[3]
LANGUAGE = SMALL_LANGUAGE.model_copy(update={"codec_vocab_size": 48})
VISION = VisionConfig(
    hidden_size=16, num_heads=2, num_layers=2, intermediate_size=24, adaptor_dim=12, output_size=32, max_patches=5832
)
AUDIO = AudioConfig(hidden_size=24, projection_size=8, num_layers=3, num_lookahead_layers=1, output_size=32)


def random_tensors(module: torch.nn.Module, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(t.shape, generator=generator).to(dtype) for n, t in module.state_dict().items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A released folder, written here by the published names, independently of the code under test."""
    root = tmp_path_factory.mktemp("released")
    (root / "vision").mkdir()
    (root / "audio").mkdir()
    (root / "audio_codec").mkdir()
    model = LanguageModel(LANGUAGE, seed=1).to(torch.bfloat16)
    tensors = {n: t.contiguous() for n, t in weights.published_tensors(model, LANGUAGE).items()}
    for kind, stem in (("audio_embeddings", "audio_embeddings"), ("audio_heads", "audio_output_layers")):
        table = {f"{stem}.{i}.weight": tensors.pop(f"{kind}.{i}.weight") for i in range(4)}
        torch.save(table, root / "audio" / f"{stem}.pt")
    tensors["model.mtp.norm.weight"] = torch.randn(32).bfloat16()
    tensors["model.mtp.layers.0.eh_proj.weight"] = torch.randn(32, 64).bfloat16()
    write_safetensors(root, tensors, 20_000)
    torch.save({"word_embeddings.weight": tensors["model.embed_tokens.weight"]}, root / "language_model_embedding.pt")
    raw = weights.published_config(LANGUAGE, "bfloat16")
    for ours in ("num_codebooks", "codec_vocab_size", "target_ffn_experts", "mtp_layers"):
        del raw[ours]
    (root / "config.json").write_text(json.dumps({**raw, "auto_map": {"kept": "yes"}}))
    (root / "tokenizer.json").write_text("{}")
    (root / "modeling.py").write_text("raise SystemExit('a program is not copied')")
    (root / "audio_codec" / "config.yaml").write_text("ckpt: elsewhere\n")
    write_encoders(root)
    return root


def write_encoders(root: Path) -> None:
    vision, audio = random_tensors(VisionEncoder(VISION)), random_tensors(AudioEncoder(AUDIO))
    for prefix, file in (("vit.", "vision_model.pt"), ("projector.", "vision_projector.pt")):
        torch.save(
            {n.removeprefix(prefix): t for n, t in vision.items() if n.startswith(prefix)}, root / "vision" / file
        )
    published = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24}
    limits = {"min_tokens": 576, "max_tokens": 5832, "resize_factor": 8, "adaptor_dim": 12, "spatial_merge_size": 1}
    (root / "vision" / "config.json").write_text(json.dumps({**published, **limits, "initializer_factor": 0.1}))
    projector = {n.removeprefix("projector."): t for n, t in audio.items() if n.startswith("projector.")}
    torch.save(projector, root / "audio" / "audio_projector.pt")
    names = {"pre_ffn.linear1": "ffn.0", "pre_ffn.linear2": "ffn.2", "ctc_head": "output"}
    names |= {"post_ffn.0": "dnn.0", "post_ffn.1": "dnn.2"}
    for layer in range(3):
        for ours, theirs in (("norm1", "memory_ln"), ("memory", "memory"), ("norm2", "ffn.0"), ("linear1", "ffn.1")):
            names[f"layers.{layer}.{ours}"] = f"fsmn_layers.{layer}.{theirs}"
        names[f"layers.{layer}.linear2"] = f"fsmn_layers.{layer}.ffn.3"
    inner = {n.removeprefix("encoder."): t for n, t in audio.items() if n.startswith("encoder.") and "cmvn" not in n}
    torch.save({f"{names[n.rpartition('.')[0]]}.{n.rpartition('.')[2]}": t for n, t in inner.items()},
               root / "audio" / "audio_encoder.pt")  # fmt: skip
    sizes = {"input_size": 1200, "hidden_size": 24, "proj_size": 8, "nlayer": 3, "num_right_layers": 1, "ndnn": 2}
    (root / "audio" / "config.json").write_text(json.dumps({**sizes, "vocab_size": 5252}))
    fbank = {"freq": 16000, "low_freq": 40, "high_freq": -200, "num_mel_bins": 80, "frame_length": 25}
    splice = {"left": 7, "right": 7, "stride": 8, "random_start": False, "seed": 1}
    front = {"fbank": {**fbank, "frame_shift": 10, "preemphasis": 0.97, "dither": 0}, "splice": splice}
    (root / "audio" / "preprocessor_config.json").write_text(json.dumps(front))
    sums = " ".join(["100"] * 80 + ["10"])
    squares = " ".join(["1090"] * 80 + ["0"])
    (root / "audio" / "global_cmvn").write_text(f" [\n  {sums}\n  {squares} ]\n")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(folder, tmp_path / "copy"))


def all_tensors(folder: Path) -> dict[str, Tensor]:
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found |= load_file(path)
    for path in sorted(folder.rglob("*.pt")):
        found |= {f"{path.name}:{n}": t for n, t in released.read_pt(path).items()}
    return found


def test_round_trip_is_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    report = import_folder(folder, tmp_path / "ckpt")
    assert report["absent"] == []
    assert report["language"]["prediction_tensors"] == 2
    export_folder(tmp_path / "ckpt", tmp_path / "back")
    before, after = all_tensors(folder), all_tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(before[n].dtype == after[n].dtype and torch.equal(before[n], after[n]) for n in before)
    for name in ("audio/global_cmvn", "audio_codec/config.yaml", "tokenizer.json"):
        assert (folder / name).read_bytes() == (tmp_path / "back" / name).read_bytes()
    for name in ("config.json", "vision/config.json", "audio/config.json"):
        want, got = (json.loads((root / name).read_text()) for root in (folder, tmp_path / "back"))
        assert want.items() <= got.items()
    assert not (tmp_path / "back" / "modeling.py").exists()


def test_an_imported_checkpoint_loads_network_by_network(folder: Path, tmp_path: Path) -> None:
    import_folder(folder, tmp_path / "ckpt")
    model = tmp_path / "ckpt" / "model"
    language = LanguageModel.from_pretrained(model / "language")
    assert language.config.num_codebooks == 4
    assert language.config.codec_vocab_size == 48
    assert torch.equal(language.audio_heads[2].weight, LanguageModel(LANGUAGE, seed=1).bfloat16().audio_heads[2].weight)
    vision, audio = VisionEncoder.from_pretrained(model / "vision"), AudioEncoder.from_pretrained(model / "audio")
    assert vision.config == VISION
    assert audio.config == AUDIO
    # 100 / 10 = 10, 1090 / 10 - 10^2 = 9
    assert audio.encoder.cmvn_mean_M.tolist() == [10.0] * 80
    assert audio.encoder.cmvn_std_M.tolist() == [3.0] * 80
    wanted = random_tensors(AudioEncoder(AUDIO))["encoder.layers.1.linear1.weight"].float()
    assert torch.equal(audio.encoder.layers[1].linear1.weight, wanted)


def test_inspect_knows_checkpoints_released_folders_and_sizes(folder: Path, tmp_path: Path) -> None:
    import_folder(folder, tmp_path / "ckpt")
    own = inspect(Namespace(checkpoint=tmp_path / "ckpt", size=None)).document
    theirs = inspect(Namespace(checkpoint=folder, size=None)).document
    assert own["networks"]["vision"]["dtypes"] == "BF16"
    vision = theirs["parts"]["vision/vision_model.pt"]["parameters"]
    assert (
        vision + theirs["parts"]["vision/vision_projector.pt"]["parameters"] == own["networks"]["vision"]["parameters"]
    )
    full = inspect(Namespace(checkpoint=None, size="flash-omni")).document["parameters"]
    assert round(full["language"] / 1e6) == 560_665
    assert [round(full[f"language activated, {k}"] / 1e6) for k in ("least", "mean", "most")] == [
        18_694,
        27_149,
        31_377,
    ]
    assert round(full["vision encoder"] / 1e6, 1) == 636.6
    assert round((full["audio encoder"] + full["audio projector"]) / 1e6, 1) == 587.7
    with pytest.raises(CheckpointError, match="takes one of two"):
        inspect(Namespace(checkpoint=None, size=None))


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch ran-from-a-pickle",)


def test_a_file_with_code_is_refused_and_not_run(copy: Path, tmp_path: Path) -> None:
    torch.save({"p0.0.weight": Evil()}, copy / "vision" / "vision_projector.pt")
    with pytest.raises(CheckpointError, match=r"vision_projector\.pt .* is no file of tensors: it asks to run code"):
        import_folder(copy, tmp_path / "out")
    assert not Path("ran-from-a-pickle").exists()
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_damage_is_refused_by_name(copy: Path, tmp_path: Path) -> None:
    def refused(match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            import_folder(copy, tmp_path / "out")

    path = copy / "audio" / "audio_encoder.pt"
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    refused(r"audio_encoder\.pt \(\d+ bytes\) is no file of tensors")
    path.write_bytes(good)
    tensors = {n: t.clone() for n, t in released.read_pt(path).items()}
    torch.save({**tensors, "dnn.0.weight": torch.zeros(24, 9)}, path)
    refused(r"dnn\.0\.weight has shape \[24, 9\], expected \[24, 8\]")
    torch.save({**tensors, "colour": torch.zeros(3)}, path)
    refused(r"holds colour of shape \[3\], which this network does not have")
    path.write_bytes(good)
    config = copy / "vision" / "config.json"
    before = config.read_text()
    config.write_text(json.dumps({**json.loads(before), "pe_type": "absolute"}))
    refused(r"pe_type is 'absolute'; networks with 'rope2d' are read")
    config.write_text(before)
    torch.save({"word_embeddings.weight": torch.zeros(40, 32)}, copy / "language_model_embedding.pt")
    refused(r"is not model\.embed_tokens\.weight \[40, 32\] of the safetensors")
    (copy / "model.safetensors.index.json").write_text("{}")
    refused(r"is no index of shards")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    refused("is there already")


def test_a_text_model_without_side_files_is_imported_alone(tmp_path: Path) -> None:
    config = LANGUAGE.model_copy(update={"num_codebooks": 0})
    LanguageModel(config, seed=2).save_pretrained(tmp_path / "text")
    report = import_folder(tmp_path / "text", tmp_path / "ckpt")
    assert report["absent"] == ["vision", "audio"]
    export_folder(tmp_path / "ckpt", tmp_path / "back")
    assert sorted(p.name for p in (tmp_path / "back").iterdir()) == ["config.json", "model.safetensors"]


def test_statistics_of_kaldi_survive_writing_and_are_checked(tmp_path: Path) -> None:
    mean, std = torch.linspace(5, 9, 80), torch.linspace(0.5, 4, 80)
    write_cmvn(tmp_path / "cmvn", mean, std)
    back = read_cmvn(tmp_path / "cmvn", 80)
    assert torch.equal(back[0], mean)
    torch.testing.assert_close(back[1], std, rtol=1e-6, atol=0)
    with pytest.raises(CheckpointError, match=r"holds a matrix \[2, 81\] .* expected \[2, 41\]"):
        read_cmvn(tmp_path / "cmvn", 40)
    (tmp_path / "cmvn").write_bytes((tmp_path / "cmvn").read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="has 1303 bytes, yet says 2 x 81 values"):
        read_cmvn(tmp_path / "cmvn", 80)
    (tmp_path / "cmvn").write_text("hello")
    with pytest.raises(CheckpointError, match="is no Kaldi matrix"):
        read_cmvn(tmp_path / "cmvn", 80)


def test_nothing_else_unpickles_files() -> None:
    """``torch.load`` stands once, weights-only; ``pickle.loads`` reads rows between own processes alone."""
    found = []
    for root in ("omni_ray", "actors", "pipelines"):
        for path in (REPOSITORY / root).rglob("*.py"):
            for line in path.read_text().splitlines():
                if re.search(r"torch\.load\(|pickle\.loads?\(|allow_pickle=True|joblib|dill", line):
                    found.append((str(path.relative_to(REPOSITORY)), line.strip()))
    loads = [line for file, line in found if "torch.load(" in line]
    assert len(loads) == 1
    assert "weights_only=True" in loads[0]
    assert {file for file, line in found if "pickle" in line} <= {"actors/feeder.py"}


LOADER = """
import resource, sys
from pathlib import Path
from omni_ray.models.llm import LanguageModel
from omni_ray.config.model import LanguageConfig
def peak(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
LanguageModel(LanguageConfig(vocab_size=8, hidden_size=8, num_layers=1, num_attention_heads=1, ffn_hidden_size=8,
    q_lora_rank=4, kv_lora_rank=4, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4, n_routed_experts=1,
    zero_expert_num=1, moe_topk=1, target_ffn_experts=1.0, expert_ffn_hidden_size=8)).save_pretrained(sys.argv[2])
LanguageModel.from_pretrained(sys.argv[2])
before = peak()
model = LanguageModel.from_pretrained(sys.argv[1])
print((peak() - before) / sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_loading_holds_the_weights_once(tmp_path: Path) -> None:
    """300 MB in one file: the peak while loading stays well below two copies."""
    config = LANGUAGE.model_copy(update={"vocab_size": 1_150_000, "num_codebooks": 0})
    with torch.device("meta"):
        shapes = weights.published_tensors(LanguageModel(config), config)
    tensors = {n: torch.ones(t.shape) for n, t in shapes.items()}
    folder = tmp_path / "big"
    write_safetensors(folder, tensors)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(weights.published_config(config)))
    run = [sys.executable, "-c", LOADER, str(folder), str(tmp_path / "small")]
    ratio = float(subprocess.run(run, check=True, capture_output=True, text=True, cwd=REPOSITORY).stdout)
    assert 0.9 < ratio < 1.6
