"""Image files of every mode and format that Pillow writes are read as they were written, or refused with their name."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from difrl.data.jsonl import DataFileError
from difrl.data.modality import IMAGES
from rewards.image_files import FORMATS
from tests.reliability.tally import Tally

pytestmark = [
    pytest.mark.filterwarnings("ignore:IM image format:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning"),
    pytest.mark.filterwarnings("ignore:Truncated File Read:UserWarning"),
]
Image.init()
SMOOTH = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8))
PICTURE = SMOOTH.resize((48, 32), Image.Resampling.BICUBIC)
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F", "I;16", "I;16B", "I;16L")
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "JPEG": [{"quality": 100, "subsampling": 0}, {"quality": 100, "subsampling": 0, "progressive": True}],
    "MPO": [{"quality": 100, "subsampling": 0}],
    "WEBP": [{"lossless": True, "exact": True}],
    "AVIF": [{"quality": 100, "subsampling": "4:4:4"}],
    "TIFF": [{}, *({"compression": kind} for kind in ("tiff_lzw", "tiff_adobe_deflate", "packbits"))],
    "PNG": [{}, {"compress_level": 0}],
}
LOSSY = ("JPEG", "MPO", "AVIF")  # within 6 of 255
CLIPPED = ("GIF", "WEBP", "AVIF")  # Pillow itself writes 16-bit and 32-bit pixels as 8-bit ones, clipped at 255


def build(mode: str) -> Image.Image:
    """Return the picture in a mode. Sixteen bits have the whole range, and alpha is opaque."""
    if mode.startswith("I;16"):
        values = np.asarray(PICTURE.convert("L")).astype(">u2" if mode == "I;16B" else "<u2") * 257
        return Image.frombytes(mode, PICTURE.size, values.astype(values.dtype).tobytes())
    if mode in ("I", "F"):
        return PICTURE.convert("L").convert(mode)
    return PICTURE.convert("P").convert("PA") if mode == "PA" else PICTURE.convert(mode)


def written(image: Image.Image, format: str, data: bytes) -> NDArray[np.uint8]:
    """Return the colours [H, W, 3] that a file of the format holds after the image was saved."""
    if format == "GIF" and image.mode in ("RGB", "RGBA"):  # 256 colours, which Pillow chooses
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    if image.mode.startswith("I;16") and format not in CLIPPED:
        return np.asarray(PICTURE.convert("L").convert("RGB"))
    if image.mode == "I" and format == "PPM":  # 16 bits, so 255 of 65535
        return np.rint(np.asarray(image) / 257).astype(np.uint8)[..., None].repeat(3, 2)
    return np.asarray(image.convert("RGB"))


def saved(image: Image.Image, format: str, options: dict[str, Any]) -> bytes | None:
    """Return the file; None if Pillow does not write this mode in this format."""
    buffer = io.BytesIO()
    try:
        image.save(buffer, format, **options)
    except Exception:  # whatever a writer raises: then there is no file to read
        return None
    return buffer.getvalue()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what libtiff and libjpeg print about damaged files."""
    descriptor, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(descriptor, 2)
        os.close(descriptor)
        os.close(nothing)


@pytest.fixture
def read(tmp_path: Path) -> Callable[[bytes], NDArray[np.uint8] | None]:
    """Return a function from a file's bytes to the pixels [H, W, 3] that training gets; None if it is refused by name."""
    path = tmp_path / "picture.file"

    def read_bytes(data: bytes) -> NDArray[np.uint8] | None:
        path.write_bytes(data)
        try:
            with quiet():
                images = IMAGES.read([path])
        except DataFileError as error:
            refusal = str(error)
        else:
            return (images[0] * 255).round().byte().permute(1, 2, 0).numpy()
        assert refusal.startswith(f"{path}: ")
        return None

    return read_bytes


Read = Callable[[bytes], NDArray[np.uint8] | None]


def files(tally: Tally) -> Iterator[tuple[str, str, Image.Image, bytes]]:
    """Yield every case, its format, the image and the file that Pillow wrote. The short form has fewer refused formats."""
    for format in sorted(Image.SAVE):
        for mode in MODES if tally.full or format in FORMATS else ("RGB",):
            for options in VARIANTS.get(format, [{}]):
                image = build(mode)
                data = saved(image, format, options)
                if data is not None:
                    yield f"{format} {mode} {options}", format, image, data


def check(found: NDArray[np.uint8] | None, expected: NDArray[np.uint8], format: str, mode: str) -> None:
    if found is None:
        return
    assert found.shape == expected.shape
    difference = np.abs(found.astype(int) - expected.astype(int)).max()
    # libtiff and Pillow round the conversion of YCbCr differently.
    assert difference <= (6 if format in LOSSY else 1 if mode == "YCbCr" else 0), f"differs by {difference}"


def test_modes_and_formats(tally: Tally, read: Read) -> None:
    """Every mode in every format, and in the long form under each of the orientations that EXIF knows."""
    accepted, cases = set[str](), list(files(tally))
    for case, format, image, data in cases:
        with tally.trial(case):
            found = read(data)
            check(found, written(image, format, data), format, image.mode)
            accepted |= set() if found is None else {format}
    assert accepted == {*FORMATS, "MPO"}
    for case, format, image, _ in cases:
        for index in tally.trials(short=1, long=8) if format in FORMATS else ():
            exif = Image.Exif()
            exif[0x0112] = orientation = 8 - index
            data = saved(image, format, {**VARIANTS.get(format, [{}])[0], "exif": exif}) or b""
            if not data or (Image.open(io.BytesIO(data)).getexif().get(0x0112) != orientation and format != "AVIF"):
                continue  # a format without EXIF
            with tally.trial(f"{case} orientation {orientation}"):
                turned = Image.fromarray(written(image, format, data))
                turned.getexif()[0x0112] = orientation
                check(read(data), np.asarray(ImageOps.exif_transpose(turned)), format, image.mode)


def test_transparency(tally: Tally, read: Read) -> None:
    """A pixel that is not opaque makes the file refused, or is not in the file."""
    for format in sorted(Image.SAVE):
        for mode in ("RGBA", "LA", "PA") if tally.full or format in FORMATS else ("RGBA",):
            for level in (0, 1, 128, 254) if tally.full else (254,):
                image = build(mode)
                layer = Image.new("L", image.size, 255)
                layer.putpixel((5, 5), level)
                image.putalpha(layer)
                data = saved(image, format, VARIANTS.get(format, [{}])[0])
                if data is None:
                    continue
                with tally.trial(f"{format} {mode} alpha {level}"):
                    found = read(data)
                    if found is not None:
                        stored = Image.open(io.BytesIO(data)).convert("RGBA")
                        assert stored.getchannel("A").getextrema() == (255, 255)


def test_animations(tally: Tally, read: Read) -> None:
    for format in sorted(Image.SAVE_ALL):
        for count in (1, 2, 5):
            frames = [PICTURE.rotate(10 * n) for n in range(count)]
            data = saved(frames[0], format, {"save_all": True, "append_images": frames[1:]})
            if data is None:
                continue
            with tally.trial(f"{format} {count} frames"):
                assert (read(data) is not None) == (count == 1 and format in (*FORMATS, "MPO"))


def test_truncation(tally: Tally, read: Read) -> None:
    """Every format, cut after each of many of its bytes, is refused or whole: what is cut off is no pixel."""
    for case, _, image, data in files(tally):
        if image.mode not in ("L", "RGB", "I;16") or (whole := read(data)) is None:
            continue
        for index in tally.trials(short=4, long=200):
            end = len(data) * (index + 1) // (len(tally.trials(short=4, long=200)) + 1)
            with tally.trial(f"{case} cut to {end} of {len(data)}"):
                found = read(data[:end])
                assert found is None or np.array_equal(found, whole)
