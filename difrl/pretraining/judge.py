"""Training of the learned judge of the shapes task on true drawings, for which the right answer is known.

Every drawing occurs twice: with its own prompt, and with a prompt that differs in a word or two or has the same words in
another order. Drawings are blurred, tinted and overlaid with noise, because the judge will score images decoded by an
autoencoder. Training uses no generated images and no answers of the classical detector.
"""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from difrl.config.schema.base import FolderPath
from difrl.pretraining.stages import Stage, StageConfig
from difrl.tasks import shapes
from rewards import judge

log = logging.getLogger(__name__)


class JudgeStageConfig(StageConfig):
    """The judge: binary cross-entropy on pairs of a drawing and a prompt."""

    output: FolderPath = Field(description="folder of the finished judge")


def _neighbours() -> list[np.ndarray]:
    """Return for each prompt the indices of others whose bag of words differs in at most two words."""
    bags = [Counter(judge.split_words(p.text)) for p in shapes.ALL_PROMPTS]
    words = sorted(set().union(*bags))
    counts = np.array([[bag[w] for w in words] for bag in bags])
    distance = np.abs(counts[:, None] - counts[None]).sum(-1)
    np.fill_diagonal(distance, 99)
    return [np.flatnonzero(row <= 2) for row in distance]


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur, tint and add pixel noise to images [B, 3, H, W], with random strengths for each image."""
    n = len(images)
    blur = torch.rand((n, 1, 1, 1), generator=generator)
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    tint = 0.06 * (torch.rand((n, 3, 1, 1), generator=generator) - 0.5)
    noise = 0.04 * torch.rand((n, 1, 1, 1), generator=generator) * torch.randn(images.shape, generator=generator)
    return (torch.lerp(images, soft, blur) + tint + noise).clamp(0, 1)


class _Pairs:
    """Drawings paired with prompts, and labels. They depend only on seed and step."""

    def __init__(self, network: judge.JudgeNetwork, seed: int) -> None:
        self.network, self.seed, self.neighbours = network, seed, _neighbours()
        self.position = {p.text: i for i, p in enumerate(shapes.ALL_PROMPTS)}

    def batch(self, step: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return images [2 count, 3, 32, 32], word ids [2 count, L] and labels [2 count]."""
        rng = np.random.default_rng((self.seed, step))
        own = shapes.sample_prompts(count, rng)
        other = [shapes.ALL_PROMPTS[rng.choice(self.neighbours[self.position[p.text]])] for p in own]
        scenes = [shapes.draw_scene(p.metadata, rng) for p in own]
        drawn = torch.from_numpy(np.stack([shapes.render_figures(s) for s in scenes]))
        images = _augment(drawn, torch.Generator().manual_seed(self.seed * 1_000_003 + step))
        ids = self.network.encode([p.text for p in own + other])
        labels = [shapes.satisfies(p.metadata, s) for p, s in zip(own + other, scenes + scenes, strict=True)]
        return torch.cat([images, images]), ids, torch.tensor(labels, dtype=torch.float32)


def train_judge(config: JudgeStageConfig, seed: int, work: Path) -> judge.JudgeNetwork:
    """Train the judge and return its network."""
    words = sorted({w for p in shapes.ALL_PROMPTS for w in judge.split_words(p.text)})
    torch.manual_seed(seed)
    network = judge.JudgeNetwork(judge.JudgeConfig(vocabulary=tuple(words)))
    training, held_out = _Pairs(network, seed), _Pairs(network, seed + 1)

    def compute_loss(step: int) -> Tensor:
        images, ids, labels = training.batch(step, config.batch)
        return F.binary_cross_entropy_with_logits(network(images, ids), labels)

    @torch.no_grad()
    def evaluate() -> str:
        images, ids, labels = held_out.batch(0, 512)
        correct = ((network(images, ids) > 0) == labels.bool()).float().mean().item()
        return f"accuracy {correct:.3f} on unseen drawings, {labels.mean().item():.2f} of them matching"

    Stage("judge", config, [network], work).run(compute_loss, evaluate)
    return network
