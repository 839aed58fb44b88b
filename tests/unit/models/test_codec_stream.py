"""Streaming decoding: chunked equals whole bit for bit, exactly three frames of look-ahead, state of fixed size."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from omni_ray.config.model import model_preset
from omni_ray.models.codec import Codec
from omni_ray.models.codec_stream import FrameDecoder, RowTables
from omni_ray.models.native.codec import NativeFrames, NativeState
from omni_ray.models.native.library import library
from omni_ray.types.errors import RequestError

FRAMES = 13
FRAME_SAMPLES = 1440


def made(form: str) -> Codec:
    """A codec that decodes with torch's operations, or with the compiled function."""
    torch.manual_seed(0)
    codec = Codec(model_preset("tiny").codec).eval()
    if form == "torch":
        codec._frames = FrameDecoder(codec.decoder, RowTables(codec.decoder, codec.quantizer))
    return codec


@pytest.fixture(scope="module", params=["torch", "native"])
def codec(request: pytest.FixtureRequest) -> Codec:
    if request.param == "native" and library() is None:
        pytest.skip("no C compiler")
    codec = made(request.param)
    kind = NativeFrames if request.param == "native" else FrameDecoder
    assert isinstance(codec.frame_decoder(), kind)
    return codec


@pytest.fixture(scope="module")
def codes_N4(codec: Codec) -> torch.Tensor:  # noqa: N802
    chance = torch.Generator().manual_seed(3)
    return torch.stack([torch.randint(0, size, (FRAMES,), generator=chance) for size in codec.code_sizes()], dim=1)


@pytest.mark.parametrize("sizes", [[1] * 13, [13], [2, 3, 1, 7], [0, 5, 0, 8], [4, 9]], ids=str)
def test_chunked_equals_whole(codec: Codec, codes_N4: torch.Tensor, sizes: list[int]) -> None:
    stream = codec.stream()
    pieces = [stream.push(chunk) for chunk in codes_N4.split(sizes)]
    assert torch.equal(torch.cat([*pieces, stream.flush()]), codec.decode(codes_N4))


def test_sound_of_a_frame_comes_with_the_third_frame_after_it(codec: Codec, codes_N4: torch.Tensor) -> None:
    stream = codec.stream()
    lengths = [stream.push(row.unsqueeze(0)).numel() for row in codes_N4]
    assert lengths == [0, 0, 0] + [FRAME_SAMPLES] * (FRAMES - 3)
    assert stream.pending_frames == 3
    assert stream.flush().numel() == 3 * FRAME_SAMPLES


@pytest.mark.parametrize("ahead", [3, 4])
def test_look_ahead_is_exactly_three_frames(codec: Codec, codes_N4: torch.Tensor, ahead: int) -> None:
    place = 5
    other_N4 = codes_N4.clone()
    other_N4[place + ahead :] = (other_N4[place + ahead :] + 1) % 64
    frame = slice(place * FRAME_SAMPLES, (place + 1) * FRAME_SAMPLES)
    same = torch.equal(codec.decode(codes_N4)[frame], codec.decode(other_N4)[frame])
    assert same == (ahead > 3)


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_a_short_stream_gives_all_its_sound_at_the_flush(codec: Codec, codes_N4: torch.Tensor, frames: int) -> None:
    stream, short_14 = codec.stream(), codes_N4[:frames].unsqueeze(0)
    assert stream.push(short_14[0]).numel() == 0
    sound_S = stream.flush()
    assert sound_S.numel() == frames * FRAME_SAMPLES
    with torch.inference_mode():
        whole_S = codec.decoder(short_14[..., 0], codec.quantizer.read(short_14[..., 1:]))[0, 0]
    torch.testing.assert_close(sound_S, whole_S, atol=1e-5, rtol=1e-4)  # another order of sums
    # After a flush the stream begins anew.
    assert torch.equal(torch.cat([stream.push(codes_N4), stream.flush()]), codec.decode(codes_N4))


def test_a_fork_goes_its_own_way(codec: Codec, codes_N4: torch.Tensor) -> None:
    stream = codec.stream()
    first = stream.push(codes_N4[:6])
    other = stream.fork()
    other.push((codes_N4[6:] + 1) % 64)
    assert torch.equal(torch.cat([first, stream.push(codes_N4[6:]), stream.flush()]), codec.decode(codes_N4))


def test_state_does_not_grow(codec: Codec, codes_N4: torch.Tensor) -> None:
    stream = codec.stream()
    stream.push(codes_N4[:4])
    size = stream.state_bytes
    stream.push(codes_N4.repeat(3, 1))
    assert stream.state_bytes == size < 200_000
    # Views into longer tensors would hold them all in memory.
    state = stream._state
    tensors = [state.values] if isinstance(state, NativeState) else [state.window_7D, *state.pasts]
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) < 2 * size


def test_a_stream_keeps_to_its_number_of_codebooks(codec: Codec, codes_N4: torch.Tensor) -> None:
    stream = codec.stream()
    stream.push(codes_N4[:2, :3])
    with pytest.raises(RequestError, match="4 codebooks after 3; one stream keeps to one number"):
        stream.push(codes_N4[2:4])


def test_a_refused_push_leaves_the_stream_as_it_was(codec: Codec, codes_N4: torch.Tensor) -> None:
    stream = codec.stream()
    first = stream.push(codes_N4[:5])
    with pytest.raises(RequestError, match="out of range"):
        stream.push(codes_N4[5:7] + 1000)
    assert torch.equal(torch.cat([first, stream.push(codes_N4[5:]), stream.flush()]), codec.decode(codes_N4))


@pytest.mark.skipif(library() is None, reason="no C compiler")
def test_both_forms_make_the_same_sound(codes_N4: torch.Tensor) -> None:
    plain_S, native_S = (made(form).decode(codes_N4) for form in ("torch", "native"))
    assert float(plain_S.abs().max()) > 1e-3
    torch.testing.assert_close(native_S, plain_S, rtol=0, atol=1e-6)


@pytest.mark.skipif(library() is None, reason="no C compiler")
def test_both_forms_agree_where_activations_are_large(codes_N4: torch.Tensor) -> None:
    """Sines of many periods, gates at both ends."""
    sounds = []
    for form in ("torch", "native"):
        codec = made("native")
        with torch.no_grad():
            for name, values in codec.decoder.named_parameters():
                if name.endswith("alpha"):
                    values.mul_(5.0)
                elif "glstm" in name or name.startswith("conv_in"):
                    values.mul_(8.0)
        if form == "torch":
            codec._frames = FrameDecoder(codec.decoder, RowTables(codec.decoder, codec.quantizer))
        sounds.append(codec.decode(codes_N4))
    assert float(sounds[0].std()) > 1e-2
    torch.testing.assert_close(sounds[1], sounds[0], rtol=0, atol=2e-4)


def test_streams_of_many_threads_do_not_disturb_each_other(codec: Codec) -> None:
    chance = torch.Generator().manual_seed(4)
    clips = [
        torch.stack([torch.randint(0, size, (40,), generator=chance) for size in codec.code_sizes()], dim=1)
        for _ in range(6)
    ]
    alone = [codec.decode(clip) for clip in clips]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(codec.decode, clips))
    assert all(torch.equal(*pair) for pair in zip(alone, together, strict=True))
