"""Motion of a drawn shape, by videos whose moves are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from difrl.tasks.shapes import Figure, render_figures
from rewards import RewardError, make, score

RED = {"include": [{"class": "circle", "color": "red", "count": 1}], "motion": "right"}


def film(*places: tuple[float, float] | None, shape: str = "circle", color: str = "red") -> Tensor:
    """Return a video [1, F, 3, 32, 32] of a shape at these places, or of an empty frame."""
    frames = [render_figures([] if at is None else [Figure(shape, color, *at, 5.0)]) for at in places]
    return torch.from_numpy(np.stack(frames))[None]


def value(video: Tensor, metadata: dict[str, Any] = RED, **options: Any) -> float:
    return score(make("motion", **options), video, ["a"], [metadata]).values.item()


@pytest.mark.parametrize(
    ("places", "share"),
    [
        ([(8, 16), (12, 16), (16, 16)], 1.0),
        ([(8, 16), (12, 16), (12, 16), (16, 16), (20, 16)], 0.75),  # once it stays
        ([(16, 16), (12, 16), (16, 16)], 0.5),  # back and forth
        ([(8, 8), (11, 12), (14, 16)], 0.0),  # more down than right
        ([(8, 16), None, (16, 16), (20, 16)], 1 / 3),  # an empty frame spoils two moves
    ],
)
def test_share_of_right_moves(places: list[tuple[float, float] | None], share: float) -> None:
    assert value(film(*places)) == pytest.approx(share)
    assert value(film(*places), partial=False) == (share == 1.0)


def test_the_object_is_that_of_the_prompt_and_alone() -> None:
    path = ((8, 16), (12, 16))
    assert value(film(*path, shape="square")) == 0
    assert value(film(*path, color="blue")) == 0
    assert value(film(*path, color="blue"), {"include": [{"class": "circle"}], "motion": "right"}) == 1
    assert value(torch.minimum(film(*path), film((8, 26), (8, 26), color="blue"))) == 0


def test_rows_without_a_motion_are_invalid_and_wrong_metadata_are_errors() -> None:
    path = film((8, 16), (12, 16))
    assert score(make("motion"), path, ["a"], [{}]).valid.tolist() == [False]
    with pytest.raises(
        RewardError, match="'motion' of the metadata is 'sideways', expected one of left, right, up, down"
    ):
        value(path, {**RED, "motion": "sideways"})
    with pytest.raises(RewardError, match=r"'include' of the metadata is \[\], expected one clause"):
        value(path, {**RED, "include": []})
    with pytest.raises(
        RewardError, match=r"expects float videos \[B,F,3,H,W\] in \[0,1\], found torch.float32 \(1, 3, 8, 8\)"
    ):
        value(torch.rand(1, 3, 8, 8))
    with pytest.raises(RewardError, match="two frames or more"):
        value(film((8, 16)))
    with pytest.raises(ValueError, match="least is -1"):
        make("motion", least=-1)
    with pytest.raises(ValueError, match="overlap 2; expected 0 or more, and 0 to 1"):
        make("motion", overlap=2)
