"""Tests of the reader of image files, against the pixels that were written. tests/reliability has every mode and format."""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps

from rewards.image_files import MOST_PIXELS, ImageFileError, TooManyPixels, count_pixels, read_image_file, read_picture

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# The same profile with the names of its first two primaries exchanged: red means green.
SWAPPED = SRGB.replace(b"rXYZ", b"?XYZ").replace(b"gXYZ", b"rXYZ").replace(b"?XYZ", b"gXYZ")


def file(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def read(image: Image.Image, format: str = "PNG", **options: Any) -> NDArray[np.uint8]:
    return np.asarray(read_picture(file(image, format, **options)))


def test_sixteen_bits_of_grey_are_scaled() -> None:
    """65535 is white: 257 steps of 16 bits are one of 8, rounded."""
    values = np.array([[0, 128, 129, 257, 0x80FF, 65406, 65407, 65535]], dtype=np.uint16)
    for format in ("PNG", "TIFF", "PPM"):
        found = read(Image.fromarray(values), format)
        assert found[0, :, 0].tolist() == [0, 0, 1, 1, 128, 254, 255, 255]
        assert (found == found[..., :1]).all()


@pytest.mark.parametrize("mode", ["F", "I"])
def test_numbers_without_a_white_are_refused(mode: str) -> None:
    with pytest.raises(ImageFileError, match=f"a TIFF file of mode {mode}, without a defined white"):
        read(Image.new(mode, (4, 4)), "TIFF")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_the_orientation_is_applied(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(COLOURS)
    shown = ImageOps.exif_transpose(stored)
    turned = {
        1: COLOURS,
        2: COLOURS[:, ::-1],
        3: COLOURS[::-1, ::-1],
        4: COLOURS[::-1],
        5: COLOURS.transpose(1, 0, 2),
        6: COLOURS.transpose(1, 0, 2)[:, ::-1],
        7: COLOURS.transpose(1, 0, 2)[::-1, ::-1],
        8: COLOURS.transpose(1, 0, 2)[::-1],
    }
    assert shown is not None
    options = {"lossless": True} if format == "WEBP" else {}
    assert np.array_equal(read(stored, format, exif=exif, **options), turned[orientation])


def test_sixteen_bits_keep_their_orientation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    values = (COLOURS[..., 0].astype(np.uint16)) * 257
    assert np.array_equal(read(Image.fromarray(values), exif=exif)[..., 0], COLOURS[..., 0].T[:, ::-1])


def with_alpha(mode: str, alpha: int) -> Image.Image:
    colours = Image.fromarray(COLOURS)
    image = colours.convert("L" if mode == "LA" else "RGB").convert(mode)
    layer = Image.new("L", image.size, 255)
    layer.putpixel((2, 3), alpha)
    image.putalpha(layer)
    return image


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_dropped_if_it_is_opaque(mode: str, format: str) -> None:
    options: dict[str, Any] = {"lossless": True, "exact": True} if format == "WEBP" else {}
    opaque = with_alpha(mode, 255)
    assert np.array_equal(read(opaque, format, **options), np.asarray(opaque.convert("RGB")))
    for alpha in (0, 254):
        with pytest.raises(ImageFileError, match="transparent pixels, whose colour depends on a background"):
            read(with_alpha(mode, alpha), format, **options)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "I;16"])
def test_a_transparent_colour_is_refused_where_it_occurs(mode: str) -> None:
    image = Image.new("L", (2, 1), 255).convert("RGB").convert(mode) if mode != "I;16" else Image.new(mode, (2, 1), 9)
    key: Any = {"RGB": (255, 255, 255), "P": image.getpixel((0, 0)), "I;16": 9}.get(mode, 255)
    other: Any = {"RGB": (1, 2, 3), "I;16": 8}.get(mode, 0)
    with pytest.raises(ImageFileError, match="transparent pixels"):
        read(image, transparency=key)
    assert read(image, transparency=other).shape == (1, 2, 3)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF", "AVIF", "MPO"])
def test_several_pictures_in_one_file_are_refused(format: str) -> None:
    frames = [Image.new("RGB", (16, 16), (level, 0, 0)) for level in (0, 120, 240)]
    with pytest.raises(ImageFileError, match=r"file of several pictures, expected one"):
        read(frames[0], format, save_all=True, append_images=frames[1:])
    assert read(frames[2], format, save_all=True).shape == (16, 16, 3)


def test_a_profile_is_converted_to_srgb() -> None:
    image = Image.fromarray(COLOURS)
    assert np.array_equal(read(image, icc_profile=SRGB), COLOURS)
    found = read(image, icc_profile=SWAPPED).astype(int)
    assert np.abs(found - COLOURS[..., [1, 0, 2]]).max() <= 1
    grey = image.convert("L")
    for profile in (SRGB, SWAPPED):
        assert np.abs(read(grey, icc_profile=profile).astype(int) - np.asarray(grey)[..., None]).max() <= 1


def test_a_profile_of_grey_pixels_is_converted() -> None:
    """The profile is that of sRGB with its curve as that of grey, so it moves no level."""
    grey = Image.fromarray(COLOURS).convert("L")
    profile = SRGB[:16] + b"GRAY" + SRGB[20:].replace(b"rTRC", b"kTRC")
    assert np.abs(read(grey, icc_profile=profile).astype(int) - np.asarray(grey)[..., None]).max() <= 1
    with pytest.raises(ImageFileError, match="does not fit pixels of mode RGB"):
        read(Image.fromarray(COLOURS), icc_profile=profile)


def test_a_profile_that_does_not_fit_is_refused() -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for profile in (lab, b"no profile", SRGB[:200]):
        with pytest.raises(ImageFileError, match="a colour profile that does not fit pixels of mode RGB"):
            read(Image.fromarray(COLOURS), icc_profile=profile)


def test_cmyk_without_a_profile_is_the_product_of_what_the_inks_leave() -> None:
    """R = (1 − C)(1 − K): of 100 in 255 with black 51, (155/255)(204/255) are left."""
    image = Image.new("CMYK", (2, 2), (100, 0, 255, 51))
    assert read(image, "TIFF")[0, 0].tolist() == [124, 204, 0]


def test_text_is_dropped_before_it_is_decompressed() -> None:
    """The file holds 200 MB of text in as many kilobytes. Pillow by itself refuses more than 64 MB."""
    whole = file(Image.fromarray(COLOURS))
    text = b"zTXtkey\0\0" + zlib.compress(bytes(1_000_000))
    chunk = (len(text) - 4).to_bytes(4, "big") + text + zlib.crc32(text).to_bytes(4, "big")
    bomb = whole[:33] + 200 * chunk + whole[33:]
    with pytest.raises(ValueError, match="text"):
        Image.open(io.BytesIO(bomb))
    assert count_pixels(bomb) == 35
    assert np.array_equal(np.asarray(read_picture(bomb)), COLOURS)


def test_many_pixels_are_refused_before_they_are_decoded() -> None:
    most = file(Image.new("1", (2**13, 2**13)))
    assert count_pixels(most) == MOST_PIXELS
    wide = file(Image.new("1", (2**13 + 1, 2**13)))
    with pytest.raises(TooManyPixels, match=r"8193 × 8192 pixels, expected at most 67108864"):
        read_picture(wide)


def test_files_without_a_picture(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    for name, message in (("none.png", "there is no such file"), (".", "no such file"), ("empty.png", "an empty file")):
        with pytest.raises(ImageFileError, match=message):
            read_image_file(tmp_path / name)
    with pytest.raises(
        ImageFileError, match="it is not an image that can be read; expected a whole file in PNG, JPEG,"
    ):
        read_picture(b"version https://git-lfs.github.com/spec/v1")
    eps = file(Image.fromarray(COLOURS), "EPS")
    with pytest.raises(ImageFileError, match="it is not an image that can be read"):
        read_picture(eps)
