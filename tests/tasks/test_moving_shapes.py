"""The task of moving shapes: its split, and drawings that satisfy their prompts."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from difrl.data.prompts import load_prompts
from difrl.tasks import moving_shapes
from rewards import make, score


def test_every_object_and_direction_is_on_both_sides_of_the_split() -> None:
    train, evaluation = moving_shapes.prompts("train"), moving_shapes.prompts("eval")
    assert (len(train), len(evaluation)) == (36, 12)
    assert {p.text for p in train} | {p.text for p in evaluation} == {p.text for p in moving_shapes.ALL_PROMPTS}
    assert Counter(p.metadata["motion"] for p in evaluation) == dict.fromkeys(("left", "right", "up", "down"), 3)
    assert len({p.combination[0] for p in evaluation}) == len({p.combination[0] for p in train}) == 12
    with pytest.raises(ValueError, match="unknown split 'test'"):
        moving_shapes.prompts("test")  # type: ignore[arg-type]
    assert [p.text for p in load_prompts("moving_shapes:eval")] == [p.text for p in evaluation]


def test_drawings_satisfy_their_prompts_and_played_backwards_none() -> None:
    rng = np.random.default_rng(0)
    prompts = moving_shapes.sample_prompts(24, rng)
    videos = moving_shapes.draw_videos([p.metadata for p in prompts], rng)
    texts, metadata = [p.text for p in prompts], [p.metadata for p in prompts]
    assert videos.shape == (24, 5, 3, 32, 32)
    assert score(make("motion"), videos, texts, metadata).values.tolist() == [1.0] * 24
    assert score(make("motion"), videos.flip(1), texts, metadata).values.tolist() == [0.0] * 24
    frames = score(
        make("geneval", exact=True), videos.flatten(0, 1), texts * 5, [m for m in metadata for _ in range(5)]
    )
    assert frames.values.tolist() == [1.0] * 120
    assert torch.equal(videos, videos.clamp(0, 1))
