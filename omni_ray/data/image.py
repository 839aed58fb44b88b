"""Picture bytes to normalised patch rows at native resolution (networks.md section 1)."""

from __future__ import annotations

import functools
import io
import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from omni_ray.config.model import VisionConfig
from omni_ray.data.last_read import LastRead
from omni_ray.types.errors import MediaError

MAX_PIXELS = 64_000_000
"""Pictures above this many pixels are refused before they are decoded."""
MEAN = np.array((0.485, 0.456, 0.406), dtype=np.float32)
STD = np.array((0.229, 0.224, 0.225), dtype=np.float32)
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_TURNED = (5, 6, 7, 8)
_ORIENTATION = 0x0112
_AS_RGB = 3
_JPEG_END = b"\xff\xd9"


@dataclass(frozen=True, slots=True, kw_only=True)
class Patches:
    """One picture or clip as the vision encoder takes it."""

    values_PC: NDArray[np.float32]
    """[pairs * rows * columns, 3 * 2 * p * p]; channel-major (channel, time, row, column), raster order in a pair."""
    grid: tuple[int, int, int]
    """(frame pairs, patch rows, patch columns)."""


def image_patches(raw: bytes, name: str, config: VisionConfig) -> Patches:
    """Decode, size, normalise and cut a picture; the picture stands twice along time.

    Raises:
        MediaError: the bytes are no picture or it is too large; names the item.
    """
    pixels_HW3 = resize(decode_image(raw, name), fit_size(*image_size(raw, name), config))
    frames = np.broadcast_to(pixels_HW3, (config.temporal_patch_size, *pixels_HW3.shape))
    return patchify(frames, config)


def image_grid(raw: bytes, name: str, config: VisionConfig) -> tuple[int, int, int]:
    """The grid that :func:`image_patches` will give; reads the header only."""
    height, width = fit_size(*image_size(raw, name), config)
    return 1, height // config.patch_size, width // config.patch_size


def image_tokens(grid: tuple[int, int, int], config: VisionConfig) -> int:
    """Rows in the language sequence after patches are merged."""
    return grid[0] * (grid[1] // config.merge[0]) * (grid[2] // config.merge[1])


def image_size(raw: bytes, name: str) -> tuple[int, int]:
    """(height, width) as the picture is looked at, from its header.

    Raises:
        MediaError: no picture, or more than MAX_PIXELS.
    """
    header = _header(raw, name)
    return header.height, header.width


def decode_image(raw: bytes, name: str) -> NDArray[np.uint8]:
    """[H, W, 3] uint8, turned upright, transparency over white.

    Raises:
        MediaError: the bytes cannot be decoded.
    """
    pixels_HW3 = _decode_plain(raw) if _header(raw, name).plain else None
    if pixels_HW3 is not None:
        return pixels_HW3
    with _open(raw, name) as image:
        try:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16") or upright.mode == "I":
                deep = np.asarray(upright, dtype=np.float64) / 257.0
                upright = Image.fromarray(np.clip(deep, 0, 255).astype(np.uint8))
            if "A" in upright.getbands() or "transparency" in upright.info:
                white = Image.new("RGBA", upright.size, (255, 255, 255, 255))
                upright = Image.alpha_composite(white, upright.convert("RGBA"))
            return np.array(upright.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise MediaError(f"{name} cannot be decoded as a picture ({error}); export it again") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    """What a picture's first bytes tell."""

    height: int
    width: int
    plain: bool
    """An ordinary whole RGB JPEG that stands upright: decoded without PIL."""


_last = LastRead[_Header]()


def _header(raw: bytes, name: str) -> _Header:
    return _last.get(raw, lambda: _read_header(raw, name))


def _read_header(raw: bytes, name: str) -> _Header:
    with _open(raw, name) as image:
        width, height = image.size
        try:
            turn = image.getexif().get(_ORIENTATION, 1) if image.format in ("JPEG", "PNG", "WEBP") else 1
        except (OSError, ValueError, SyntaxError) as error:  # of a png it lies behind the pixels
            raise MediaError(f"{name} cannot be decoded as a picture ({error}); export it again") from error
        plain = image.format == "JPEG" and image.mode == "RGB" and turn == 1
        whole = plain and raw.rstrip(b"\0").endswith(_JPEG_END)
    height, width = (width, height) if turn in _TURNED else (height, width)
    return _Header(height=height, width=width, plain=whole)


def _decode_plain(raw: bytes) -> NDArray[np.uint8] | None:
    """The pixels that PIL gives, in two thirds of the time; None where PIL will find better words for what is wrong."""
    decode = _jpeg_decoder()
    if decode is None:
        return None
    try:
        pixels_3HW = decode(torch.frombuffer(bytearray(raw), dtype=torch.uint8), _AS_RGB, False)
    except RuntimeError:
        return None
    upright: NDArray[np.uint8] = pixels_3HW.permute(1, 2, 0).numpy()
    return upright


@functools.cache
def _jpeg_decoder() -> Any:
    """torchvision's own operator; its Python face only adds a warning that it will move to another package one day."""
    try:
        import torchvision.io  # noqa: F401  # registers the operator

        return torch.ops.image.decode_jpeg
    except (ImportError, AttributeError):
        return None


def fit_size(height: int, width: int, config: VisionConfig, max_patches: int | None = None) -> tuple[int, int]:
    """(height, width) after native-resolution rounding; patches within [min, max], sides multiples of side_multiple.

    Inside the limits each side is rounded on its own; outside, the picture is scaled to fit and then floored (too
    big) or raised (too small). Sides below the multiple are enlarged first. A picture so slender that one side would
    vanish keeps the multiple there and is shortened instead.

    Raises:
        MediaError: a side of no pixels.
    Source: networks.md section 1, native resolution.
    """
    if height < 1 or width < 1:
        raise MediaError(f"a picture of {width} x {height} pixels has nothing to see; both sides need a pixel at least")
    unit, patch = config.side_multiple, config.patch_size
    most, least = min(config.max_patches, max_patches or config.max_patches), config.min_patches
    most_units, least_units = (n * patch * patch / (unit * unit) for n in (most, least))
    enlarge = max(1.0, unit / min(height, width))
    h, w = height * enlarge / unit, width * enlarge / unit
    grow = max(1.0, math.sqrt(least_units / (h * w)))
    if least_units <= h * w <= most_units:
        rows, columns = max(1, math.floor(h + 0.5)), max(1, math.floor(w + 0.5))
        if least_units <= rows * columns <= most_units:
            return rows * unit, columns * unit
        too_small = rows * columns < least_units
    else:
        too_small = h * w < least_units
    if too_small:
        rows, columns = math.ceil(h * grow - 1e-9), math.ceil(w * grow - 1e-9)
    else:
        scale = min(1.0, math.sqrt(most_units / (h * w)))
        rows, columns = max(1, math.floor(h * scale + 1e-9)), max(1, math.floor(w * scale + 1e-9))
        rows = max(1, min(rows, math.floor(most_units / columns)))
        columns = max(1, min(columns, math.floor(most_units / rows)))
    return rows * unit, columns * unit


def resize(pixels_HW3: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Bicubic with antialiasing to (height, width); within 1 of PIL's values, in a quarter of its time."""
    if pixels_HW3.shape[:2] == size:
        return pixels_HW3
    writable = pixels_HW3 if pixels_HW3.flags.c_contiguous and pixels_HW3.flags.writeable else pixels_HW3.copy("C")
    height, width, channels = writable.shape
    # Only with the stride of a real batch does torch see that channels stand last; else it resizes plane by plane.
    whole = torch.from_numpy(writable).as_strided(
        (1, channels, height, width), (writable.size, 1, width * channels, channels)
    )
    sized = torch.nn.functional.interpolate(whole, size, mode="bicubic", antialias=True)
    out_HW3: NDArray[np.uint8] = sized[0].permute(1, 2, 0).numpy()
    return np.ascontiguousarray(out_HW3)


def patchify(frames_FHW3: NDArray[np.uint8], config: VisionConfig) -> Patches:
    """Cut frames into normalised patch rows; sides must be multiples of the patch, F of the temporal patch."""
    p, t = config.patch_size, config.temporal_patch_size
    frames, height, width, _ = frames_FHW3.shape
    grid = (frames // t, height // p, width // p)
    values = (frames_FHW3.astype(np.float32) / np.float32(255) - MEAN) / STD
    cut = values.reshape(grid[0], t, grid[1], p, grid[2], p, 3)
    # (pair, row, column) stays outside; inside a patch: channel, time, row, column.
    rows = cut.transpose(0, 2, 4, 6, 1, 3, 5).reshape(math.prod(grid), 3 * t * p * p)
    return Patches(values_PC=np.ascontiguousarray(rows), grid=grid)


def encode_png(pixels_HW3: NDArray[np.uint8]) -> bytes:
    """PNG bytes; equal pixels give equal bytes."""
    out = io.BytesIO()
    Image.fromarray(pixels_HW3).save(out, format="PNG", compress_level=6)
    return out.getvalue()


def _open(raw: bytes, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # The limit below is this project's own; PIL's guess would only warn.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(raw), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise MediaError(f"{name} is too large a picture ({error}); scale it below {MAX_PIXELS} pixels") from error
    except UnidentifiedImageError as error:  # its text holds an address in memory
        raise MediaError(f"{name} is not a picture that can be read; send png, jpeg or webp") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise MediaError(f"{name} is not a picture that can be read ({error}); send png, jpeg or webp") from error
    if image.width * image.height > MAX_PIXELS:
        raise MediaError(f"{name} has {image.width} x {image.height} pixels, more than {MAX_PIXELS}; scale it down")
    if min(image.size) < 1:
        raise MediaError(f"{name} has {image.width} x {image.height} pixels; nothing can be seen on it")
    return image
