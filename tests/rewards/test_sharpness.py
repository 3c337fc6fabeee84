from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, uniform_filter1d
from torch import Tensor

from rewards import make, score


def sharpness(images: Tensor, **options: int) -> list[float | None]:
    found = score(make("sharpness", **options), images, [""] * len(images), [{}] * len(images))
    return [value if valid else None for value, valid in zip(found.values.tolist(), found.valid.tolist(), strict=True)]


def rows(line: list[float]) -> Tensor:
    """An image [3, 8, N] whose rows are all equal."""
    return torch.tensor(line).expand(3, 8, len(line))


def test_steps_and_ramps_by_hand() -> None:
    """A blur over w pixels leaves 1/w of a step at its place. It leaves a ramp as it is but for the two ends."""
    step = rows([0.0] * 12 + [1.0] * 12)
    ramp = rows([i / 23 for i in range(24)])
    steps = torch.stack([step, 0.3 * step + 0.5, step.flip(2)])
    for images in (steps, steps.mT):
        assert sharpness(images) == pytest.approx([8 / 9] * 3)
        assert sharpness(images, width=3) == pytest.approx([2 / 3] * 3)
    # Of the 23 equal differences the window of 3 meets the border at the first and the last, which it lowers by a third.
    assert sharpness(ramp[None], width=3) == pytest.approx([2 / 23 / 3], abs=1e-5)


def test_the_blurrier_axis_counts_and_one_without_contrast_does_not() -> None:
    edge, ramp = torch.tensor([0.0] * 12 + [1.0] * 12), torch.arange(24) / 23
    mixed = (0.5 * edge[None, :] + 0.5 * ramp[:, None]).expand(3, 24, 24)
    assert sharpness(mixed[None], width=3) == pytest.approx([2 / 23 / 3], abs=1e-5)
    assert sharpness(torch.full((1, 3, 8, 8), 0.3)) == [None]


def test_equals_the_formula_in_numpy_and_falls_with_blur() -> None:
    generator = np.random.default_rng(0)
    drawn = (generator.random((3, 4, 5)) > 0.5).astype(float).repeat(8, axis=1).repeat(8, axis=2)
    images = np.stack([gaussian_filter(drawn, (0, sigma, sigma)) for sigma in (0.01, 1.0, 2.0, 4.0)])
    expected = []
    for image in images:
        grey = np.tensordot([0.299, 0.587, 0.114], image, 1)
        shares = []
        for axis in (0, 1):
            sharp, blurred = (
                np.abs(np.diff(x, axis=axis)) for x in (grey, uniform_filter1d(grey, 9, axis, mode="nearest"))
            )
            shares.append(np.maximum(sharp - blurred, 0).sum() / sharp.sum())
        expected.append(min(shares))
    found = sharpness(torch.tensor(images).float())
    assert found == pytest.approx(expected, abs=1e-4)
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("width", [1, 4])
def test_a_width_that_has_no_middle_is_refused(width: int) -> None:
    with pytest.raises(ValueError, match=f"width is {width}, expected an odd number of at least 3"):
        make("sharpness", width=width)
