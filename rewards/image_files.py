"""The one reader of image files: of training data, of scored files and of requests to a server. Pictures have 8-bit RGB.

A file is converted where its pixels have one meaning, and refused otherwise. Nothing is lost or invented in silence.

* grey, 1-bit and palette pictures become RGB; 16 bits are scaled to 8 (of 16-bit colour Pillow reads the upper 8);
* the EXIF orientation is applied, so that a picture stands as viewers show it;
* a colour profile other than sRGB is converted to sRGB. CMYK without a profile is taken as R = (1 − C)(1 − K), as by
  browsers;
* an alpha channel is dropped if it is opaque everywhere. A picture with transparent pixels is refused: its colours depend
  on a background that the file does not have;
* refused are animations and files of several pictures, numbers without a defined white (32-bit and float TIFFs), formats
  that are not in FORMATS, truncated and damaged files, and more than MOST_PIXELS.
"""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM")
"""Names of the formats that are read. EPS is left out because it runs a program, JPEG 2000 because truncated files pass."""
MOST_PIXELS = 2**26
"""Pixels of a picture: more is taken for a decompression bomb."""
MOST_BYTES = 2**30
"""Bytes of a file."""
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
"""Modes of Pillow in which every pixel has one colour."""
_SIXTEEN_BITS = {("PNG", "I;16"), ("PPM", "I"), ("TIFF", "I;16"), ("TIFF", "I;16B")}
"""Formats and modes of grey pictures whose white is 65535."""
_PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt")


class ImageFileError(ValueError):
    """An image file that is refused. The message has the reason, without the file's name."""


class TooManyPixels(ImageFileError):
    """An image file whose picture is too large once decoded."""


def read_image_file(path: Path) -> Image.Image:
    """Return the RGB picture of a file. Raise ImageFileError for one that is missing or refused."""
    return read_picture(read_bytes(path))


def read_bytes(path: Path) -> bytes:
    """Return the bytes of a file. Raise ImageFileError for one that is missing or too large."""
    try:
        if not path.is_file():
            raise ImageFileError("there is no such file")
        if (size := path.stat().st_size) > MOST_BYTES:
            raise ImageFileError(f"{size} bytes, expected at most {MOST_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise ImageFileError(f"cannot be read: {error.strerror or error}") from error


def count_pixels(file: bytes, formats: tuple[str, ...] = FORMATS) -> int:
    """Return the number of pixels in the header of an image file. Nothing is decoded."""
    image = open_image(file, formats)
    return image.width * image.height


def read_picture(file: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Return the RGB picture of an image file. Raise ImageFileError for one that is refused; MemoryError passes."""
    image = open_image(file, formats)
    if getattr(image, "is_animated", False):
        raise ImageFileError(f"a {image.format} file of several pictures, expected one; save the one that you want")
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes can raise anything
        raise ImageFileError(f"a damaged or truncated {image.format} file: {error}; save it again") from error
    return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a decoded image as RGB, as the module's rules convert it. Raise ImageFileError for one that they refuse."""
    return _without_profile(ImageOps.exif_transpose(_to_eight_bits(image)))


def open_image(file: bytes, formats: tuple[str, ...]) -> Image.Image:
    """Return an image of which only the header has been read."""
    if not file:
        raise ImageFileError("an empty file")
    try:
        image = Image.open(io.BytesIO(_without_text(file)), formats=formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooManyPixels(f"more pixels than {MOST_PIXELS}; make it smaller") from error
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes can raise anything
        expected = ", ".join(formats[:-1]) + f" or {formats[-1]}"
        raise ImageFileError(f"it is not an image that can be read; expected a whole file in {expected}") from error
    if image.width * image.height > MOST_PIXELS:
        raise TooManyPixels(f"{image.width} × {image.height} pixels, expected at most {MOST_PIXELS}; make it smaller")
    return image


def _without_text(file: bytes) -> bytes:
    """Return a PNG without its text chunks, which Pillow would decompress: a kilobyte can hold a megabyte."""
    if not file.startswith(b"\x89PNG\r\n\x1a\n") or not any(kind in file for kind in _PNG_TEXT):
        return file
    kept, at = [file[:8]], 8
    while at < len(file):
        end = at + 12 + int.from_bytes(file[at : at + 4], "big")
        if file[at + 4 : at + 8] not in _PNG_TEXT:
            kept.append(file[at:end])
        at = end
    return b"".join(kept)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Return the image, or of 16-bit grey an image of mode L. Refuse modes in which a number has no defined colour."""
    if image.mode in _MODES:
        return image
    tags = getattr(image, "tag_v2", {258: (16,), 262: 1})  # TIFF: 16 bits, of which 0 is black
    if (image.format, image.mode) not in _SIXTEEN_BITS or (tags.get(258), tags.get(262)) != ((16,), 1):
        raise ImageFileError(f"a {image.format} file of mode {image.mode}, without a defined white; save it as RGB")
    values = np.asarray(image).astype(np.uint32)
    if "transparency" in image.info and (values == image.info["transparency"]).any():
        raise _transparent()
    grey = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    grey.info = {name: value for name, value in image.info.items() if name in ("exif", "icc_profile")}
    return grey


def _without_profile(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            raise _transparent()
    if not profile:
        return image.convert("RGB")
    if image.mode not in ("L", "CMYK"):
        image = image.convert("RGB")
    try:
        space = _color_space(profile)
        if space == "RGB" and image.mode == "L":
            image = image.convert("RGB")
        transform = _build_transform(profile, image.mode)
    except ImageCms.PyCMSError as error:
        problem = f"a colour profile that does not fit pixels of mode {image.mode}: {error}; save it without"
        raise ImageFileError(problem) from error
    if transform is None:
        return image
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # without in_place it is a new image
    return converted


def _color_space(profile: bytes) -> str:
    return str(ImageCms.getOpenProfile(io.BytesIO(profile)).profile.xcolor_space).strip()


@lru_cache(maxsize=8)
def _build_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform of a profile to sRGB; None if it moves no colour by more than rounding, as for sRGB itself."""
    source = ImageCms.getOpenProfile(io.BytesIO(profile))
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode != "RGB":
        return transform
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
    shown = np.asarray(ImageCms.applyTransform(Image.fromarray(colours), transform))
    return None if np.abs(shown.astype(int) - colours.astype(int)).max() <= 1 else transform


def _transparent() -> ImageFileError:
    return ImageFileError("transparent pixels, whose colour depends on a background; flatten it onto the one you want")
