"""Which images are taken, and what is said of the others."""

from __future__ import annotations

import io
import struct
import time
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from srl_rlvr import images


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png(size: tuple[int, int], depth: int, colour: int, rows: bytes, *after: bytes) -> bytes:
    """`rows` as they lie in the file, and chunks that follow the pixels."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
    body = [header, _chunk(b"IDAT", zlib.compress(rows)), *after, _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def _deep_png(colour: int, channels: int) -> bytes:
    return _png((2, 2), 16, colour, (b"\0" + bytes(2 * 2 * channels)) * 2)


def _deep_tiff(planar: int) -> bytes:
    """The header of one in 16-bit RGB, its channels side by side (1) or in planes (2), which Pillow does not write."""
    whole = encoded(SMALL, "TIFF", tiffinfo={284: planar})
    return whole.replace(struct.pack("<3H", 8, 8, 8), struct.pack("<3H", 16, 16, 16))


HUGE = _png((20_000, 20_000), 8, 2, b"")  # with next to nothing behind its header


SMALL = Image.new("RGB", (8, 6), "red")
DEEP = Image.fromarray(np.full((4, 4), 40_000, np.uint16))
FRAMES = [
    encoded(SMALL, kind, save_all=True, append_images=[Image.new("RGB", (8, 6), "blue")])
    for kind in ("GIF", "TIFF", "WEBP", "PNG")
]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"no image at all", "is no image that can be read"),
        (b"", "is no image that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no image that can be read: PNG, JPEG, WEBP, GIF"),
        (HUGE, "has 20,000 × 20,000 pixels; 50,000,000 in all are the most: scale it down before"),
        (_png((1, 65_536), 8, 0, b""), "has 1 × 65,536 pixels; 65,535 on a side are the most: scale it down before"),
        (encoded(Image.new("CMYK", (4, 4)), "JPEG"), "is in CMYK: save it in RGB, 8 bits a channel"),
        *(
            (data, "has 16 or more bits a channel: save it in RGB, 8 bits a channel")
            for data in (
                encoded(DEEP),
                encoded(DEEP, "TIFF"),
                _deep_png(2, 3),
                _deep_png(4, 2),
                _deep_png(6, 4),
                _deep_tiff(1),
                _deep_tiff(2),
                encoded(Image.new("F", (2, 2)), "TIFF"),
            )
        ),
        *((data, "has several frames or pages: give the one that is meant") for data in FRAMES),
        (encoded(Image.effect_noise((64, 64), 50))[:900], "cannot be read to its end"),
    ],
)
def test_what_is_wrong_with_an_image_is_one_clause(data: bytes, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        images.check(data)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_common_images_are_rgb_and_their_size_is_known(mode: str) -> None:
    data = encoded(SMALL.convert(mode))
    assert images.size(data) == (8, 6)
    assert (images.pixels(data).mode, images.pixels(data).size) == ("RGB", (8, 6))


def test_what_is_transparent_is_white() -> None:
    data = encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 0)))
    assert images.pixels(data).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "MPO"])
@pytest.mark.parametrize("orientation", [*range(1, 9), 99])
def test_a_photograph_is_upright(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    taken = Image.new("RGB", (16, 8), "red")
    taken.paste("blue", (0, 0, 8, 8))
    more: dict[str, Any] = {"save_all": True, "append_images": [SMALL]} if kind == "MPO" else {}
    data = encoded(taken, kind, exif=exif, **more)
    found, right = images.pixels(data), ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert images.size(data) == found.size == right.size
    assert found.tobytes() == right.tobytes()


def test_exif_behind_the_pixels_turns_neither_the_size_nor_the_pixels() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = _png((4, 2), 8, 2, (b"\0" + bytes(4 * 3)) * 2, _chunk(b"eXIf", exif.tobytes()[6:]))
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size == (2, 4)  # it is there
    assert images.size(data) == images.pixels(data).size == (4, 2)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_8_bits_a_channel_are_not_taken_for_more(kind: str, mode: str) -> None:
    images.check(encoded(SMALL.convert(mode), kind))


@pytest.mark.filterwarnings("ignore")
def test_what_holds_no_image_whole_is_refused_and_never_more() -> None:
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in images.FORMATS:
        whole = encoded(Image.effect_noise((16, 16), 50).convert("RGB"), kind, exif=exif)
        for _ in range(200):
            broken = np.frombuffer(whole, np.uint8).copy()
            broken[rng.integers(0, min(len(broken), rng.choice((40, 200, len(broken)))), 3)] = rng.integers(0, 256, 3)
            data = broken[: rng.integers(1, len(broken) + 1)].tobytes() if rng.random() < 0.3 else broken.tobytes()
            try:
                assert images.size(data) == images.pixels(data).size
            except ValueError as error:
                assert "\n" not in str(error)


def _chained_tiff(directories: int) -> bytes:
    """Of one pixel each. Counting them takes the square of their number."""
    entries = [(256, 4, 1, 1), (257, 4, 1, 1), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 8)]
    size = 2 + 12 * len(entries) + 4
    chain = bytearray(b"II*\0" + struct.pack("<I", 16) + bytes(8))
    for number in range(1, directories + 1):
        chain += struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
        chain += struct.pack("<I", 16 + number * size if number < directories else 0)
    return bytes(chain)


def test_frames_are_never_counted() -> None:
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    gif = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff" + frame * 500_000 + b"\x3b"
    began = time.process_time()
    for data in (_chained_tiff(60_000), gif):
        for read in (images.check, images.size, images.pixels):
            with pytest.raises(ValueError, match="several frames"):
                read(data)
    assert time.process_time() - began < 1


def test_a_size_is_known_of_what_can_be_read_to_its_end_only() -> None:
    assert images.checked_size(encoded(SMALL), 0.5) == (8, 6)
    with pytest.raises(ValueError, match="to its end"):
        images.checked_size(encoded(Image.effect_noise((64, 64), 50))[:900], 0.5)


def test_an_image_of_too_many_parts_is_refused() -> None:
    many = _png((8, 8), 8, 0, bytes(9) * 8)
    many = many[:33] + _chunk(b"tEXt", b"k\0v") * 20_000 + many[33:]
    assert images.checked_size(many, 60) == (8, 8)
    with pytest.raises(ValueError, match="takes too long to read"):
        images.checked_size(many, 0.01)


def test_pillows_own_limit_is_left_as_it_was() -> None:
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(ValueError):
        images.check(b"")
    assert before == Image.MAX_IMAGE_PIXELS
