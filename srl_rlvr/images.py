"""Encoded images, as files hold them: which are taken, and their pixels. Pillow only; knows no model.

A photograph is upright: where EXIF before its pixels says how it was held, its size and its pixels are those of the
turned image.
"""

from __future__ import annotations

import io
import struct
import time
from typing import Any

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow reads others, some by a program of another's
MAX_PIXELS = 50_000_000
MAX_SIDE = 65_535  # JPEG's; Pillow decodes row by row, so that an image of nothing but rows takes half a minute
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
_BROKEN = (OSError, SyntaxError, ValueError, TypeError, OverflowError, struct.error)  # Pillow's, of broken bytes
_BITS_PER_SAMPLE = 258  # TIFF's tag
_ORIENTATION = 0x0112  # EXIF's tag; from 5 on width and height change places
_TURNS = dict(enumerate(
    ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"), start=2
))  # fmt: skip


def size(data: bytes) -> tuple[int, int]:
    """(width, height), from the header alone. Raises ValueError saying why the image is not taken."""
    image = _opened(data)
    return image.size[::-1] if _orientation(image) >= 5 else image.size


def check(data: bytes) -> None:
    """Raises ValueError saying why the image is not taken: in one clause, to stand after its name."""
    _loaded(_opened(data))


def checked_size(data: bytes, header_s: float) -> tuple[int, int]:
    """(width, height) of an image whose pixels can be read.

    Raises ValueError as `check` does, and if its header takes this process more than `header_s` seconds: it has so many
    blocks, chunks or tiles that others, who will read it again, should not.
    """
    from PIL import Image

    Image.preinit()  # which an image is not to be blamed for
    began = time.process_time()
    found = size(data)
    if time.process_time() - began > header_s:
        raise ValueError("takes too long to read: save it anew as PNG or JPEG")
    check(data)
    return found


def pixels(data: bytes) -> Any:
    """The image in RGB, on white where it is transparent. Raises ValueError as `check` does."""
    from PIL import Image

    image = _opened(data)
    turn = _TURNS.get(_orientation(image))  # before loading, which may find EXIF that `size` does not
    image = _loaded(image)
    if turn:
        image = image.transpose(Image.Transpose[turn])
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _opened(data: bytes) -> Any:
    """The header is read, no pixel yet."""
    from PIL import Image, UnidentifiedImageError

    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # the limit here is ours, and an error
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        # `n_frames` would read all frames of a GIF, and the square of a TIFF's. MPO is a phone's JPEG with its preview.
        several = image.format != "MPO" and getattr(image, "is_animated", False)
    except UnidentifiedImageError:
        raise ValueError(f"is no image that can be read: {', '.join(FORMATS[:-1])} and {FORMATS[-1]} are") from None
    except _BROKEN as error:
        raise ValueError(f"cannot be read ({error})") from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"has {width:,} × {height:,} pixels; {MAX_PIXELS:,} in all are the most: scale it down before")
    if max(width, height) > MAX_SIDE:
        raise ValueError(
            f"has {width:,} × {height:,} pixels; {MAX_SIDE:,} on a side are the most: scale it down before"
        )
    if several:
        raise ValueError("has several frames or pages: give the one that is meant")
    if _is_deep(image):
        raise ValueError("has 16 or more bits a channel: save it in RGB, 8 bits a channel")
    if image.mode not in _MODES:
        raise ValueError(f"is in {image.mode}: save it in RGB, 8 bits a channel")
    return image


def _is_deep(image: Any) -> bool:
    """Whether a channel has more than 8 bits in the file: colours of 16 have Pillow's mode of 8, and would be cut."""
    if image.format == "TIFF":
        return max(image.tag_v2.get(_BITS_PER_SAMPLE, (1,))) > 8
    return image.format == "PNG" and image.tile[0].args.endswith(";16B")


def _loaded(image: Any) -> Any:
    try:
        image.load()
    except _BROKEN as error:
        raise ValueError(f"cannot be read to its end ({error})") from None
    return image


def _orientation(image: Any) -> int:
    """EXIF's, 1 to 8; 1 is upright, and what is broken or not there counts as that. Pillow turns TIFF itself."""
    if "exif" not in image.info or image.format == "TIFF":
        return 1
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except _BROKEN:
        return 1
    return found if found in range(1, 9) else 1
