"""Files of videos: without loss, with equal neighbours, and refused ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rewards.image_files import ImageFileError
from rewards.video_files import read_video_file, write_video_file

PICTURES = torch.randint(0, 256, (3, 3, 6, 8), generator=torch.Generator().manual_seed(0)) / 255


def read(path: Path) -> Tensor:
    return torch.stack([torch.from_numpy(np.array(f)) for f in read_video_file(path)]).permute(0, 3, 1, 2) / 255


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 0, 1, 1], [2] * 81, [0, 1, 1, 1, 2, 2, 0], [0]])
def test_a_written_video_is_read_without_loss_however_its_frames_repeat(order: list[int], tmp_path: Path) -> None:
    write_video_file(PICTURES[order], tmp_path / "v.webp")
    torch.testing.assert_close(read(tmp_path / "v.webp"), PICTURES[order])


@pytest.mark.parametrize("kind", ["png", "gif"])
def test_animations_of_others_are_read(kind: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("#ff0000", "#00ff00", "#0000ff")]
    frames[0].save(tmp_path / f"v.{kind}", save_all=True, append_images=frames[1:], duration=100)
    assert read(tmp_path / f"v.{kind}")[:, :, 0, 0].tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_what_is_refused(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    with pytest.raises(ImageFileError, match="expected a whole file in WEBP, PNG or GIF"):
        read_video_file(tmp_path / "v.mp4")
    write_video_file(PICTURES, tmp_path / "v.webp")
    (tmp_path / "half.webp").write_bytes((tmp_path / "v.webp").read_bytes()[:-200])
    with pytest.raises(ImageFileError):
        read_video_file(tmp_path / "half.webp")
    with pytest.raises(ImageFileError, match="no such file"):
        read_video_file(tmp_path / "none.webp")
    exif = Image.Exif()
    exif[270] = "999999999 frames"
    Image.new("RGB", (100, 100)).save(tmp_path / "bomb.webp", exif=exif)
    with pytest.raises(ImageFileError, match="999999999 frames of 100 × 100 pixels, expected at most"):
        read_video_file(tmp_path / "bomb.webp")
