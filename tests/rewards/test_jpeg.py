from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from rewards import make, score


def test_equals_the_size_of_a_file_on_disk(tmp_path: Path) -> None:
    images = torch.rand(2, 3, 24, 40, generator=torch.Generator().manual_seed(0))
    sizes = []
    for index, image in enumerate(images):
        path = tmp_path / f"{index}.jpg"
        Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(path, quality=95)
        sizes.append(path.stat().st_size / 1000)
    small = score(make("jpeg_compressibility"), images, ["", ""], [{}, {}])
    large = score(make("jpeg_incompressibility"), images, ["", ""], [{}, {}])
    assert large.values.tolist() == pytest.approx(sizes)
    assert small.values.tolist() == pytest.approx([-size for size in sizes])
    assert small.valid.all()


def test_plain_pictures_are_smaller_and_quality_counts() -> None:
    flat, busy = (
        torch.full((3, 64, 64), 0.5),
        torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)),
    )
    images = torch.stack([flat, busy])
    fine = make("jpeg_compressibility")(images, ["", ""], [{}, {}]).values
    coarse = make("jpeg_compressibility", quality=30)(images, ["", ""], [{}, {}]).values
    assert fine[0] > fine[1]
    assert coarse[1] > fine[1]


def test_a_quality_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="quality is 0"):
        make("jpeg_compressibility", quality=0)


def test_a_side_that_jpeg_does_not_have_makes_a_picture_invalid() -> None:
    reward = make("jpeg_compressibility")
    found = [score(reward, torch.zeros(1, 3, 1, side), ["a"], [{}]).valid.tolist() for side in (65_500, 65_501)]
    assert found == [[True], [False]]
