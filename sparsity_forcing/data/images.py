"""Image and video bytes: read whole, checked by decoding, kept as PNG or JPEG."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps

from sparsity_forcing.data.candidates import BadRow, Reason

KEPT_FORMATS = ("PNG", "JPEG")  # kept byte for byte; every other format becomes PNG
MAX_ASPECT_RATIO = 200  # the image processors of Qwen-VL refuse more
JPEG_QUALITY = 95  # of video frames


def decode(data: bytes) -> Image.Image:
    """Decodes an image to its last pixel, upright as its EXIF orientation says; a truncated one does not pass.

    Raises:
        BadRow: unreadable_image.
    """
    try:
        image = Image.open(io.BytesIO(data))
        with _no_truncated_images():
            image.load()
        ImageOps.exif_transpose(image, in_place=True)
    except Exception as error:  # decoders raise many kinds of errors on damaged bytes
        raise BadRow(Reason.UNREADABLE_IMAGE, f"{type(error).__name__}: {error}") from None
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        raise BadRow(Reason.UNREADABLE_IMAGE, f"{image.width}x{image.height} pixels is too thin to be processed")
    return image


@contextmanager
def _no_truncated_images() -> Iterator[None]:
    """Other libraries, lmms-eval for one, tell Pillow for the whole process to fill up truncated images."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def read_image(path: Path) -> bytes:
    """The bytes of an image file, as PNG or JPEG.

    Raises:
        BadRow: missing_image, unreadable_image.
    """
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL or a lone surrogate in the name
        raise BadRow(Reason.MISSING_IMAGE, f"{str(path)!r}: {getattr(error, 'strerror', None) or error}") from None
    image = decode(data)
    if image.format in KEPT_FORMATS:
        return data
    return encode(image if image.mode in ("RGB", "RGBA", "L") else image.convert("RGB"), "PNG")


def encode(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **({"quality": JPEG_QUALITY} if kind == "JPEG" else {}))
    return buffer.getvalue()


def read_video(path: Path, max_frames: int) -> tuple[list[bytes], float]:
    """At most ``max_frames`` evenly spaced frames of a video as JPEG, and how many of them make a second.

    Raises:
        BadRow: missing_image, unreadable_video.
    """
    try:
        is_there = path.is_file()
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise BadRow(Reason.MISSING_IMAGE, f"{str(path)!r}: {error.strerror}") from None
    if not is_there:
        raise BadRow(Reason.MISSING_IMAGE, f"{str(path)!r}: no such video file")
    try:
        import decord
    except ImportError:
        raise BadRow(Reason.UNREADABLE_VIDEO, "reading videos needs decord: pip install decord") from None
    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        count, rate = len(reader), float(reader.get_avg_fps())
        indices = np.unique(np.linspace(0, count - 1, min(count, max_frames)).round().astype(int))
        frames = reader.get_batch(indices.tolist()).asnumpy()
    except (decord.DECORDError, RuntimeError, OSError, ValueError, IndexError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise BadRow(Reason.UNREADABLE_VIDEO, f"{str(path)!r}: {reason}") from None
    if not (np.isfinite(rate) and rate > 0):
        raise BadRow(Reason.UNREADABLE_VIDEO, f"{str(path)!r}: says {rate} frames per second")
    return [encode(Image.fromarray(frame), "JPEG") for frame in frames], len(indices) * rate / count
