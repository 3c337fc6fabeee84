"""Tests of GenEval with the classical detector against the known content of drawings of the shapes task."""

from __future__ import annotations

import numpy as np
import torch

from difrl.tasks import shapes
from rewards import GenEval, score

COUNT = 400


def drawings() -> tuple[list[shapes.ShapesPrompt], list[list[shapes.Figure]], torch.Tensor]:
    rng = np.random.default_rng(11)
    prompts = shapes.sample_prompts(COUNT, rng)
    scenes = [shapes.draw_scene(prompt.metadata, rng) for prompt in prompts]
    return prompts, scenes, torch.from_numpy(np.stack([shapes.render_figures(scene) for scene in scenes]))


def scored(images: torch.Tensor, prompts: list[shapes.ShapesPrompt]) -> torch.Tensor:
    texts, metadata = [prompt.text for prompt in prompts], [prompt.metadata for prompt in prompts]
    result = score(GenEval(), images, texts, metadata)
    assert result.valid.all()
    return result.values


def test_true_drawings_are_right() -> None:
    prompts, _, images = drawings()
    assert scored(images, prompts).mean() >= 0.98


def test_true_drawings_survive_a_little_noise() -> None:
    prompts, _, images = drawings()
    noise = 0.04 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert scored((images + noise).clamp(0, 1), prompts).mean() >= 0.98


def test_other_prompts_are_right_only_if_they_hold() -> None:
    _, scenes, images = drawings()
    rng = np.random.default_rng(12)
    others = [shapes.ALL_PROMPTS[index] for index in rng.integers(len(shapes.ALL_PROMPTS), size=COUNT)]
    values = scored(images, others)
    truth = torch.tensor([shapes.satisfies(o.metadata, s) for o, s in zip(others, scenes, strict=True)])
    assert values[~truth].mean() <= 0.005
    # Nearly all of them are wrong, and a few are right: "a circle" on a drawing of a circle and a square.
    assert values.mean() <= 0.03
