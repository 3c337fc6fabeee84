"""Tests of rollouts: their content, and the selection and concatenation of rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from difrl.data.prompts import Prompt
from difrl.data.rollout import Rollout

PROMPTS = (Prompt("a", {}), Prompt("a", {}), Prompt("b", {"answer": 1}))
ROLLOUT = Rollout(PROMPTS, torch.tensor([0, 0, 1]), torch.arange(3), {"x": torch.arange(6.0).view(3, 2)})
IMAGES = torch.arange(3.0)[:, None, None, None].expand(3, 3, 2, 2)


def test_content_is_images_or_texts() -> None:
    assert torch.equal(torch.as_tensor(ROLLOUT.with_content(IMAGES).content), IMAGES)
    texts = ROLLOUT.with_content(["x", "y", "z"])
    assert (texts.content, texts.images) == (("x", "y", "z"), None)
    with pytest.raises(ValueError, match="no images, videos or texts"):
        _ = ROLLOUT.content


def test_selected_parts_concatenate_to_the_whole() -> None:
    whole = ROLLOUT.with_content(IMAGES)
    parts = [
        whole.select(slice(0, 1)),
        whole.select(torch.tensor([1])),
        whole.select(torch.tensor([False, False, True])),
    ]
    joined = Rollout.cat(parts)
    assert (joined.prompts, joined.prompt_texts) == (PROMPTS, ["a", "a", "b"])
    assert joined.metadata == [{}, {}, {"answer": 1}]
    assert (joined.groups.tolist(), joined.samples.tolist()) == ([0, 0, 1], [0, 1, 2])
    assert torch.equal(joined.replay_data["x"], ROLLOUT.replay_data["x"])
    assert torch.equal(torch.as_tensor(joined.content), IMAGES)


def test_metadata_has_the_path_of_the_input_image() -> None:
    image, mask = Path("/data/cat.png"), Path("/data/mask.png")
    prompts = (
        Prompt("a", {"answer": 1}, image=image, mask=mask),
        Prompt("a", {}, image=image),
        Prompt("b", {"answer": 2}),
    )
    rollout = Rollout(prompts, torch.arange(3), torch.arange(3), {})
    paths = {"image": "/data/cat.png", "mask": "/data/mask.png"}
    assert rollout.metadata == [{"answer": 1, **paths}, {"image": "/data/cat.png"}, {"answer": 2}]
