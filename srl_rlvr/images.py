"""Encoded images, as files hold them: which are taken, and their pixels. Pillow only; knows no model."""

from __future__ import annotations

import io
from typing import Any

MAX_PIXELS = 50_000_000
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")


def size(data: bytes) -> tuple[int, int]:
    """(width, height), from the header alone. Raises ValueError saying why the image is not taken."""
    return _opened(data).size


def check(data: bytes) -> None:
    """Raises ValueError saying why the image is not taken: in one clause, to stand after its name."""
    _loaded(_opened(data))


def pixels(data: bytes) -> Any:
    """The image in RGB, on white where it is transparent. Raises ValueError as `check` does."""
    from PIL import Image

    image = _loaded(_opened(data))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _opened(data: bytes) -> Any:
    """The header is read, no pixel yet."""
    from PIL import Image, UnidentifiedImageError

    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # the limit here is ours, and an error
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise ValueError("is no image that can be read") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"cannot be read ({error})") from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"has {width:,} × {height:,} pixels; {MAX_PIXELS:,} in all are the most: scale it down before")
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        raise ValueError(f"is an animation of {frames} frames: give the one that is meant")
    if image.mode not in _MODES:
        kind = "has 16 or more bits a channel" if image.mode[0] in "IF" else f"is in {image.mode}"
        raise ValueError(f"{kind}: save it in RGB, 8 bits a channel")
    return image


def _loaded(image: Any) -> Any:
    try:
        image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"cannot be read to its end ({error})") from None
    return image
