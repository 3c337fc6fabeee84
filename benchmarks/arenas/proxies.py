"""Learned reward models of the shapes task, small and fitted to noisy labels: proxies of a gold reward that is held out.

The gold reward labels drawings of a pretrained model as right or wrong. A share of the labels is flipped, and each member of an
ensemble is fitted to all of them, with its own initial weights and order. The members differ where the labels leave them free,
and optimisation exploits these differences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rewards
from difrl.data.prompts import Prompt
from difrl.data.rollout import Rollout
from difrl.tasks import shapes
from rewards.judge import JudgeConfig, JudgeNetwork, split_words


@dataclass(frozen=True)
class ProxyConfig:
    """Settings of an ensemble of proxies."""

    flipped: float
    """Share of the gold labels that are flipped."""
    members: int = 4
    channels: int = 8
    """Number of channels of a network's first convolution; the shipped judge has 24."""
    steps: int = 600
    batch: int = 64
    lr: float = 3e-3


@dataclass(frozen=True, eq=False)
class Labelled:
    """Drawings with their prompts and gold labels."""

    images: Tensor
    """[N, 3, 32, 32] in [0, 1]."""
    prompts: Sequence[str]
    gold: Tensor
    """[N], 1 or 0."""

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, rows: Tensor) -> Labelled:
        """Return the drawings in these rows [M]."""
        return Labelled(self.images[rows], [self.prompts[i] for i in rows.tolist()], self.gold[rows])


class Sampler(Protocol):
    """A model that draws, such as the result of `difrl.open_run`."""

    def sample(self, prompts: Sequence[Prompt], *, seed: int) -> Rollout:
        """Return one drawing of each prompt."""


def draw(sampler: Sampler, prompts: Sequence[Prompt], per_prompt: int, seed: int, chunk: int = 480) -> Labelled:
    """Return `per_prompt` drawings of every prompt with their gold labels, in rounds over all prompts."""
    gold = rewards.make("geneval", exact=True)
    asked = [p for _ in range(per_prompt) for p in prompts]
    images, labels = [], []
    for start in range(0, len(asked), chunk):
        rollout = sampler.sample(asked[start : start + chunk], seed=seed + start)
        labels.append(rewards.score(gold, rollout.content, rollout.prompt_texts, rollout.metadata).values)
        images.append(rollout.content)
    return Labelled(torch.cat(images), [p.text for p in asked], torch.cat(labels))


def flip(labels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Return labels [N] of 0 and 1, each flipped with probability `share`."""
    return torch.where(torch.rand(labels.shape, generator=generator) < share, 1 - labels, labels)


def auc(scores: Tensor, truth: Tensor, groups: Sequence[object] | None = None) -> float:
    """Return the share of pairs of a right and a wrong sample in which the right one has the higher score; ties count half.

    `scores` and `truth` (0 or 1) are [N]. With groups [N] only pairs within a group count, because training compares the
    samples of a prompt with each other.
    """
    apart = scores[:, None] - scores[None]
    pairs = truth.bool()[:, None] & ~truth.bool()[None]
    if groups is not None:
        numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
        of = torch.tensor([numbers[group] for group in groups])
        pairs &= of[:, None] == of[None]
    return ((apart > 0).float() + (apart == 0).float() / 2)[pairs].mean().item()


def standardise(network: JudgeNetwork, data: Labelled) -> None:
    """Scale and shift the last layer so that the scores of these drawings have mean 0 and standard deviation 1."""
    scores = score_drawings(network, data)
    last = network.head[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight /= scores.std()
        last.bias.copy_((last.bias - scores.mean()) / scores.std())


@torch.no_grad()
def score_drawings(network: JudgeNetwork, data: Labelled) -> Tensor:
    """Return logits [N]."""
    ids = network.encode(data.prompts)
    return torch.cat([network(data.images[rows], ids[rows]) for rows in torch.arange(len(data)).split(512)])


def fit(data: Labelled, config: ProxyConfig, seed: int) -> JudgeNetwork:
    """Fit one member to the labels and standardise it."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    words = sorted({word for prompt in shapes.ALL_PROMPTS for word in split_words(prompt.text)})
    network = JudgeNetwork(JudgeConfig(tuple(words), channels=config.channels))
    ids = network.encode(data.prompts)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, config.steps)
    for _ in range(config.steps):
        rows = torch.randint(len(data), (config.batch,), generator=generator)
        loss = F.binary_cross_entropy_with_logits(network(data.images[rows], ids[rows]), data.gold[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    standardise(network.eval(), data)
    return network


def quality(scores: Tensor, data: Labelled) -> Mapping[str, float]:
    """Return the AUC of scores [N], the AUC within prompts, and the accuracy of a threshold at their median."""
    above = (scores > scores.median()).float()
    return {
        "auc": auc(scores, data.gold),
        "auc_of_a_prompt": auc(scores, data.gold, data.prompts),
        "accuracy": (above == data.gold).float().mean().item(),
    }


def fit_ensemble(
    folder: Path, learnt: Labelled, held_out: Labelled, config: ProxyConfig, seed: int
) -> list[Mapping[str, float]]:
    """Fit the members, save them as `folder`/0, `folder`/1, …, and return the quality of each and of their mean.

    The flipped labels are the same for all members.
    """
    generator = torch.Generator().manual_seed(seed)
    noisy = Labelled(learnt.images, learnt.prompts, flip(learnt.gold, config.flipped, generator))
    scores = []
    for member in range(config.members):
        network = fit(noisy, config, 1000 * seed + member)
        network.save(folder / str(member))
        scores.append(score_drawings(network, held_out))
    return [quality(one, held_out) for one in (*scores, torch.stack(scores).mean(0))]
