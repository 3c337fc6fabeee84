"""Files of videos that Pillow reads and writes: animated WebP, PNG and GIF. Each frame is read as a picture is.

Encoders merge equal neighbours into one frame of a longer duration. Files that are written here hold the number of frames in
their description, by which they are read as they were. Other formats (MP4, WebM) need a decoder of their own; ffmpeg converts
them:

    ffmpeg -i video.mp4 -c:v libwebp_anim -lossless 1 -loop 0 video.webp
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageSequence
from PIL.ExifTags import Base
from torch import Tensor

from rewards.image_files import ImageFileError, open_image, read_bytes, to_rgb
from rewards.pictures import to_pictures

FORMATS = ("WEBP", "PNG", "GIF")
MOST_PIXELS = 2**28
"""Pixels of all frames of a video."""
SLOWEST, FASTEST, SECONDS = 4, 16, 2.0
"""Rates in frames a second at which a written video plays, and the seconds that it takes if they allow it."""


def read_video_file(path: Path) -> list[Image.Image]:
    """Return the RGB frames of a file. Raise ImageFileError for one that is missing or refused. A picture is one frame."""
    video = open_image(read_bytes(path), FORMATS)
    try:
        described = _read_description(video)
    except (OSError, SyntaxError) as error:
        raise ImageFileError(f"a damaged or truncated {video.format} file: {error}; save it again") from error
    count = max(described or 0, getattr(video, "n_frames", 1))
    if count * video.width * video.height > MOST_PIXELS:
        raise ImageFileError(
            f"{count} frames of {video.width} × {video.height} pixels, expected at most {MOST_PIXELS} pixels in all"
        )
    frames, durations = list[Image.Image](), list[float]()
    try:
        for frame in ImageSequence.Iterator(video):
            frames.append(to_rgb(frame.copy()))
            durations.append(frame.info.get("duration") or 1.0)
    except (ImageFileError, MemoryError):
        raise
    except Exception as error:  # damaged bytes can raise anything
        raise ImageFileError(f"a damaged or truncated {video.format} file: {error}; save it again") from error
    each = sum(durations) / count
    repeats = [1 if described is None else round(duration / each) for duration in durations]
    return [frame for frame, times in zip(frames, repeats, strict=True) for _ in range(times)]


def is_video_file(path: Path) -> bool:
    """Whether a file that can be read is an animation, or was written as a video."""
    try:
        video = open_image(read_bytes(path), FORMATS)
        return getattr(video, "is_animated", False) or _read_description(video) is not None
    except (ImageFileError, OSError, SyntaxError):  # the last two: damaged files
        return False


def _read_description(video: Image.Image) -> int | None:
    """Return the number of frames that a file was written with; None for a file of others."""
    found = re.fullmatch(r"(\d{1,9}) frames", str(video.getexif().get(Base.ImageDescription)))
    return None if found is None else int(found[1])


def write_video_file(video: Tensor, path: Path) -> None:
    """Write a video [F,3,H,W] in [0,1] as an animated WebP without loss, rounded to 8 bits."""
    write_frames(to_pictures(video), path, lossless=True, exact=True)


def write_frames(frames: Sequence[Image.Image], path: Path, **options: Any) -> None:
    """Write frames of one size as an animated WebP that repeats, with options of Pillow.

    It plays in SECONDS, as far as the rates allow.
    """
    exif, rate = Image.Exif(), min(max(len(frames) / SECONDS, SLOWEST), FASTEST)
    exif[Base.ImageDescription] = f"{len(frames)} frames"
    first, *others = frames
    duration = round(1000 / rate)
    first.save(path, "WEBP", save_all=True, append_images=others, duration=duration, loop=0, exif=exif, **options)
