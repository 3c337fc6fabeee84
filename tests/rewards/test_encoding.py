from __future__ import annotations

import io
import pickle
import zlib

import pytest
import torch
from PIL import Image

from rewards.encoding import BadImage, count_pixels, decode_images, encode_images
from rewards.image_files import TooManyPixels


def file(mode: str, size: tuple[int, int], kind: str, **named: object) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind, **named)
    return buffer.getvalue()


def test_png_returns_every_bit_of_eight() -> None:
    images = torch.rand(3, 3, 17, 40, generator=torch.Generator().manual_seed(0))
    files = encode_images(images, "png")
    assert all(one.startswith(b"\x89PNG") for one in files)
    back = decode_images(files)
    assert back.dtype == torch.uint8
    assert torch.equal(back, (images * 255).round().byte())


def test_jpeg_is_near_and_smaller() -> None:
    ramp = torch.linspace(0, 1, 64)
    images = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), torch.full((64, 64), 0.3)])[None]
    (small,), (exact,) = encode_images(images, "jpeg"), encode_images(images + 0.02 * torch.rand(images.shape), "png")
    assert small.startswith(b"\xff\xd8")
    assert len(small) < len(exact)
    assert (decode_images([small]) / 255 - images).abs().max() < 0.03


def test_jpeg_keeps_the_colour_of_every_pixel() -> None:
    """The columns are red and blue. At half the colour resolution they would have the same colour, with an error of 0.5."""
    columns = torch.zeros(1, 3, 16, 16)
    columns[:, 0, :, ::2], columns[:, 2, :, 1::2] = 1.0, 1.0
    assert (decode_images(encode_images(columns, "jpeg")) / 255 - columns).abs().max() < 0.1


def test_grey_is_colour_too() -> None:
    assert decode_images([file("L", (2, 3), "png")]).shape == (1, 3, 3, 2)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"", "an empty file"),
        (pickle.dumps([1, 2]), "expected a whole file in PNG or JPEG"),
        (file("RGB", (4, 4), "gif"), "expected a whole file in PNG or JPEG"),
        (file("RGB", (4, 4), "webp"), "expected a whole file in PNG or JPEG"),
        (file("RGB", (4, 4), "png")[:45], "damaged or truncated PNG"),
        (file("RGBA", (4, 4), "png"), "transparent pixels"),
        (file("RGB", (4, 5), "png"), "4×5 pixels, but the first image has 4×4"),
    ],
    ids=["empty", "pickle", "gif", "webp", "cut png", "alpha", "size"],
)
def test_a_bad_image_is_named_by_its_index(bad: bytes, message: str) -> None:
    with pytest.raises(BadImage, match=f"image 1: .*({message})") as caught:
        decode_images([file("RGB", (4, 4), "png"), bad])
    assert caught.value.index == 1


def bomb(width: int, height: int) -> bytes:
    """Return a PNG whose header has a size far above its number of bytes."""
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    data = b"IDAT" + zlib.compress(b"\0")
    chunks = [len(part) - 4 for part in (header, data)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        size.to_bytes(4, "big") + part + zlib.crc32(part).to_bytes(4, "big")
        for size, part in zip(chunks, (header, data), strict=True)
    )


def test_pixels_are_counted_in_the_headers_of_all_images() -> None:
    """Nothing is decoded: the files end after their headers."""
    assert count_pixels([bomb(1001, 1000), bomb(20, 10)]) == 1_001_200
    with pytest.raises(TooManyPixels, match="more pixels than"):
        count_pixels([bomb(40_000, 40_000)])


def test_a_cut_jpeg_is_damaged() -> None:
    whole = file("RGB", (64, 64), "jpeg")
    assert decode_images([whole]).shape == (1, 3, 64, 64)
    with pytest.raises(BadImage, match="image 0: a damaged or truncated JPEG file"):
        decode_images([whole[:-60]])
