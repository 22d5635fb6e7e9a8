"""Images are read as a viewer shows them: upright, over white where they are transparent, the first of several frames.

It needs Pillow (the extra `images`).
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.plan.errors import DataError, OutputError

# Pillow reads more, but some formats start other programs (EPS runs Ghostscript), and none of them holds photos.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "TGA", "TIFF", "WEBP")
_GREY, _COLOUR = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
# A larger picture has at least a byte for so many pixels (a PNG of one colour, with one bit each, for 8,000).
_LARGE, _MOST_PIXELS = 1 << 23, 10_000
_ORIENTATION = 0x0112  # of EXIF: 1 upright, 2 to 4 mirrored or upside down, 5 to 8 on its side


class _Picture(io.BufferedReader):
    """A file of which no more can be asked than it has: formats tell the length of what follows, up to gigabytes."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path))
        self._size = path.stat().st_size

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(size if size is None else min(size, self._size))


class ImageFacts(NamedTuple):
    """The facts of an image that its header tells: its size as it is shown, and what a plain reading would miss."""

    height: int
    width: int
    grey: bool
    turned: bool  # stored otherwise than it is shown
    frames: int


class ImageReader:
    """An ImageReader reads image files. Making one raises OutputError where Pillow is missing."""

    def __init__(self) -> None:
        try:
            from PIL import Image, ImageOps
        except ImportError as error:
            text = "reading images needs Pillow; install it with the extra `images`: "
            raise OutputError(text + "pip install 'nettorrent_mpi[images]'") from error
        self._image, self._ops = Image, ImageOps

    def facts(self, path: Path) -> ImageFacts:
        """Read the header. Raises DataError for what is no image, or not one of 8 bits per channel."""
        with self._opened(path) as image:
            (width, height), mode, frames = image.size, image.mode, getattr(image, "n_frames", 1)
            orientation = image.getexif().get(_ORIENTATION, 1)
            if image.format == "MPO":  # a photo of a phone: further frames are its preview or its depth
                frames = 1
        if mode not in _GREY + _COLOUR:
            text = f"has pixels of kind {mode}, not 8 bits per channel; convert or remove it"
            raise DataError(text, file=str(path))
        if orientation in (5, 6, 7, 8):
            width, height = height, width
        return ImageFacts(height, width, mode in _GREY, orientation in range(2, 9), frames)

    def pixels(self, path: Path, shape: tuple[int, int, int]) -> tuple[Array, bool]:
        """Return the pixels (height, width, channels) uint8, scaled to `shape` if need be, and whether some of them
        are transparent."""
        height, width, channels = shape
        with self._opened(path) as image:
            upright, seen = self._ops.exif_transpose(image), False
            if upright.mode in ("LA", "PA", "RGBA") or "transparency" in upright.info:
                layer = upright.convert("RGBA")
                seen = layer.getchannel("A").getextrema() != (255, 255)
                upright = self._image.new("RGBA", layer.size, "white")
                upright.alpha_composite(layer)
            converted = upright.convert("L" if channels == 1 else "RGB")
            if converted.size != (width, height):
                converted = converted.resize((width, height), self._image.Resampling.BILINEAR)
            return np.asarray(converted, np.uint8).reshape(shape), seen

    @contextmanager
    def _opened(self, path: Path) -> Iterator[Any]:
        """Open the image; whatever Pillow raises for a broken one becomes a DataError that names it."""
        try:
            with _Picture(path) as file, self._image.open(file, formats=_FORMATS) as image:
                pixels, size = math.prod(image.size), path.stat().st_size
                if pixels > _LARGE and pixels > _MOST_PIXELS * size:
                    raise ValueError(f"{pixels:,} pixels in {size:,} bytes")
                yield image
        except Exception as error:
            unknown = type(error).__name__ == "UnidentifiedImageError"  # whose text has the name once more
            told = f"it is whole in none of the formats {', '.join(_FORMATS)}" if unknown else error
            told = (isinstance(error, OSError) and error.strerror) or told
            raise DataError(f"cannot be read as an image ({told}); remove or replace it", file=str(path)) from error
