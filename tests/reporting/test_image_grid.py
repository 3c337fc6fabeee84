from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from difrl.reporting.image_grid import compare, grid
from difrl.reporting.image_grid.badges import colour_scale_ends, mean_score, pill, score_text
from difrl.reporting.image_grid.text_layout import font, wrap


def coloured(count: int, size: int = 4) -> torch.Tensor:
    """Return flat images [count,3,size,size] of distinct colours; image i has red level i / 255."""
    images = torch.full((count, 3, size, size), 0.5)
    images[:, 0] = (torch.arange(count) / 255).view(-1, 1, 1)
    return images


def pixels(sheet: Image.Image) -> np.ndarray:
    return np.asarray(sheet)


def area(sheet: Image.Image, red: int) -> int:
    """Return the number of pixels with the colour of image `red` of `coloured`."""
    return int((pixels(sheet) == (red, 128, 128)).all(-1).sum())


def test_every_image_appears_once_at_its_scale():
    sheet = grid(coloured(6), ["a", "b"], columns=3, scale=5)
    assert [area(sheet, red) for red in range(6)] == [20 * 20] * 6


def test_enlargement_is_nearest_neighbour():
    image = torch.zeros(1, 3, 2, 2)
    image[0, 1, 0, 1] = 1.0
    sheet = pixels(grid(image, [""], columns=1, scale=50))
    assert (sheet == (0, 255, 0)).all(-1).sum() == 50 * 50
    assert (sheet == (0, 0, 0)).all(-1).sum() == 3 * 50 * 50


def test_tiny_images_are_enlarged_and_huge_ones_shrunk():
    assert area(grid(coloured(1, 32), ["x"], columns=1), 0) == 128 * 128
    assert grid(coloured(2, 1024), ["x"], columns=2).width < 2 * 1024


def test_rows_run_in_order_of_the_images():
    sheet = pixels(grid(coloured(4), ["a", "b"], columns=2, scale=10))
    places = [np.argwhere((sheet == (red, 128, 128)).all(-1)).min(0) for red in range(4)]
    assert places[0][0] == places[1][0] < places[2][0] == places[3][0]
    assert places[0][1] == places[2][1] < places[1][1] == places[3][1]


def test_repeated_captions_are_drawn_once_at_the_left():
    repeated = grid(coloured(4), ["a", "a", "b", "b"], columns=2, scale=30)
    once = grid(coloured(4), ["a", "b"], columns=2, scale=30)
    assert (pixels(repeated) == pixels(once)).all()


def test_single_captions_are_below_and_wrap():
    short = grid(coloured(4), ["a", "b", "c", "d"], columns=2, scale=30)
    long = grid(coloured(4), ["a", "b", "c", "many words that have to wrap over lines"], columns=2, scale=30)
    assert long.width == short.width
    assert long.height > short.height
    assert [area(long, red) for red in range(4)] == [120 * 120] * 4


def test_last_row_may_be_short():
    sheet = grid(coloured(5), list("abcde"), columns=3, scores=[[1, 0, 1], [0, 1]], scale=30)
    assert [area(sheet, red) for red in range(5)] == [120 * 120] * 5


def test_scores_get_a_badge_below_each_image():
    bare = grid(coloured(2), ["a"], columns=2, scale=30)
    scored = grid(coloured(2), ["a"], columns=2, scores=[[1.0, None]], scale=30)
    assert scored.height > bare.height
    assert [area(scored, red) for red in range(2)] == [120 * 120] * 2


def test_compare_puts_one_column_a_label():
    before, after = coloured(4)[:2], coloured(4)[2:]
    sheet = pixels(compare({"before": before, "after": after}, ["a", "b"], scale=30))
    left = [np.argwhere((sheet == (red, 128, 128)).all(-1)).min(0)[1] for red in range(4)]
    assert left[0] == left[1] < left[2] == left[3]


def test_input_images_of_any_size_are_the_first_column():
    """They are as large as a tile of 120 × 120 allows, in the middle of it, whole and in their proportions."""
    inputs = [Image.new("RGB", size, (red, 128, 128)) for red, size in ((10, (30, 15)), (11, (200, 800)), (12, (4, 4)))]
    sheet = compare({"": coloured(6).view(3, 2, 3, 4, 4)}, ["a", "b", "c"], scale=30, inputs=inputs)
    places = [np.argwhere((pixels(sheet) == (red, 128, 128)).all(-1)) for red in (10, 11, 12)]
    assert [tuple(one.max(0) - one.min(0) + 1) for one in places] == [(60, 120), (120, 30), (120, 120)]
    outputs = [np.argwhere((pixels(sheet) == (red, 128, 128)).all(-1)) for red in (0, 2, 4)]
    for one, output in zip(places, outputs, strict=True):
        assert one.max(0)[1] < output.min(0)[1]
        middle, beside = (box.min(0)[0] + box.max(0)[0] for box in (one, output))
        assert middle == beside
    assert len({one.min(0)[1] + one.max(0)[1] for one in places}) == 1
    with pytest.raises(ValueError, match="2 input images for 3 prompts"):
        compare({"": coloured(3)}, ["a", "b", "c"], inputs=inputs[:2])


def test_compare_takes_several_samples_a_prompt_and_scores():
    nested = coloured(6).view(2, 3, 3, 4, 4)
    scores = {"w = 1": [[1, 0, float("nan")], [0.5, 0.5, 1]]}
    sheet = compare({"w = 0": nested, "w = 1": nested}, ["a", "b"], scores, scale=30)
    assert [area(sheet, red) for red in range(6)] == [2 * 120 * 120] * 6


@pytest.mark.parametrize(
    ("images", "captions", "columns", "scores", "message"),
    [
        (coloured(4), ["a", "b", "c"], 2, None, "3 captions for 4 images in 2 columns"),
        (coloured(4), ["a"], 0, None, "at least one column"),
        (coloured(4), ["a", "b"], 2, [[1, 0]], "1 lists of scores for 2 rows"),
        (torch.zeros(4, 1, 8, 8), ["a", "b"], 2, None, r"shape \(4, 1, 8, 8\)"),
        (torch.zeros(0, 3, 8, 8), [], 2, None, "no empty dimension"),
        (torch.full((1, 3, 8, 8), torch.nan), ["a"], 1, None, "NaN"),
    ],
)
def test_arguments_that_do_not_fit_are_an_error(images, captions, columns, scores, message):
    with pytest.raises(ValueError, match=message):
        grid(images, captions, columns, scores)


def test_compare_checks_rows_and_labels():
    with pytest.raises(ValueError, match="column 'x' has 2 rows for 1 prompts"):
        compare({"x": coloured(2)}, ["a"])
    with pytest.raises(ValueError, match="no columns"):
        compare({}, ["a"])


def test_wrapped_text_fits_and_marks_what_is_cut():
    face = font(14)
    lines = wrap("a red circle left of a blue square under a green triangle", face, 110, 3)
    assert len(lines) == 3
    assert lines[-1].endswith("…")
    assert all(face.getlength(line) <= 110 for line in lines)
    assert wrap("short", face, 110, 3) == ["short"]
    assert wrap("", face, 110, 3) == [""]
    assert face.getlength(wrap("unbreakable" * 9, face, 110, 3)[0]) <= 110


def test_colour_scale_is_the_unit_interval_for_rewards_inside_it():
    assert colour_scale_ends([[[0.2, 0.4, None]]]) == (0.0, 1.0)
    assert colour_scale_ends([[[-3.0, 5.0]], [[float("nan"), 7.0]]]) == (-3.0, 7.0)
    assert colour_scale_ends([]) == (0.0, 1.0)


def test_scores_as_text_and_mean():
    assert [score_text(value) for value in (1.0, 0.0, 0.5, 21.313, -0.25, 12345.6)] == [
        "1",
        "0",
        "0.50",
        "21.31",
        "-0.25",
        "1.23e+04",
    ]
    assert mean_score([[1.0, None], [float("nan"), 0.0]]) == 0.5
    assert mean_score([[None]]) is None


def test_pill_is_transparent_at_its_corners():
    label = pill("0.50", 13, 0.5)
    assert label.getpixel((0, 0))[3] == 0
    assert label.getpixel((label.width // 4, label.height // 2))[3] == 255
