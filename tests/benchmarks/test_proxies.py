"""Learned proxies: their AUC by hand and compared with scipy, their labels and their scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from benchmarks.arenas import proxies
from benchmarks.arenas.proxies import Labelled, ProxyConfig
from difrl.data.prompts import Prompt, load_prompts
from difrl.data.rollout import Rollout
from difrl.tasks import shapes

PROMPTS = ["a red circle", "a blue circle"]
CONFIG = ProxyConfig(flipped=0.25, members=2, steps=30, batch=16)


@pytest.fixture(scope="module")
def drawings() -> Labelled:
    """Flat pictures, red or blue, each with both prompts; a picture is right if it has the colour of the prompt."""
    red, blue = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])
    images = torch.stack([red, blue, red, blue] * 16)[:, :, None, None].expand(-1, -1, 32, 32).contiguous()
    prompts = ([PROMPTS[0]] * 2 + [PROMPTS[1]] * 2) * 16
    return Labelled(images, prompts, torch.tensor([1.0, 0.0, 0.0, 1.0] * 16))


def test_auc_by_hand() -> None:
    scores, truth = torch.tensor([0.9, 0.5, 0.5, 0.1]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert proxies.auc(scores, truth) == pytest.approx(3.5 / 4)  # one pair of four is a tie
    assert proxies.auc(-scores, truth) == pytest.approx(0.5 / 4)


def test_auc_within_prompts_does_not_compare_prompts() -> None:
    """Every right drawing of the easy prompt beats every wrong one of the hard prompt, and none of its own."""
    scores, truth = torch.tensor([5.0, 6.0, 1.0, 2.0]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert proxies.auc(scores, truth) == pytest.approx(1 / 4)
    assert proxies.auc(scores, truth, ["easy", "easy", "hard", "hard"]) == 0
    assert math.isnan(proxies.auc(scores, truth, ["a", "b", "c", "d"]))


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=30))
def test_auc_is_the_statistic_of_mann_and_whitney(rows: list[tuple[int, bool]]) -> None:
    right, wrong = ([s for s, t in rows if t == side] for side in (True, False))
    found = proxies.auc(torch.tensor([float(s) for s, _ in rows]), torch.tensor([float(t) for _, t in rows]))
    if right and wrong:
        assert found == pytest.approx(mannwhitneyu(right, wrong).statistic / (len(right) * len(wrong)), abs=1e-6)
    else:
        assert math.isnan(found)


def test_flipped_labels() -> None:
    labels = (torch.arange(20_000) % 3 == 0).float()

    def flip(share: float, seed: int = 0) -> torch.Tensor:
        return proxies.flip(labels, share, torch.Generator().manual_seed(seed))

    assert torch.equal(flip(0.0), labels)
    assert torch.equal(flip(1.0), 1 - labels)
    assert torch.equal(flip(0.25), flip(0.25))
    assert not torch.equal(flip(0.25), flip(0.25, seed=1))
    for side in (0, 1):  # 4 standard errors of the smaller side
        share = (flip(0.25) != labels)[labels == side].float().mean().item()
        assert share == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 6_667))


def test_a_fitted_member_is_standardised_and_repeats_itself(drawings: Labelled) -> None:
    first, again, other = (proxies.fit(drawings, CONFIG, seed) for seed in (0, 0, 1))
    scores = proxies.score_drawings(first, drawings)
    assert scores.mean().item() == pytest.approx(0, abs=1e-4)
    assert scores.std().item() == pytest.approx(1, abs=1e-4)
    assert torch.equal(scores, proxies.score_drawings(again, drawings))
    assert not torch.allclose(scores, proxies.score_drawings(other, drawings))


def test_standardising_keeps_the_order(drawings: Labelled) -> None:
    network = proxies.fit(drawings, CONFIG, 0)
    with torch.no_grad():
        network.head[-1].weight *= 7
        network.head[-1].bias += 3
    before = proxies.score_drawings(network, drawings)
    proxies.standardise(network, drawings)
    after = proxies.score_drawings(network, drawings)
    torch.testing.assert_close(after, (before - before.mean()) / before.std(), rtol=1e-4, atol=1e-4)


def test_an_ensemble_learns_what_can_be_seen(drawings: Labelled, tmp_path: Path) -> None:
    found = proxies.fit_ensemble(tmp_path, drawings, drawings, ProxyConfig(0.0, members=2, steps=60, batch=16), seed=0)
    assert len(found) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1"]
    assert found[-1]["auc_of_a_prompt"] > 0.95


def test_quality_of_perfect_and_of_inverted_scores(drawings: Labelled) -> None:
    assert set(proxies.quality(drawings.gold, drawings).values()) == {1.0}
    assert set(proxies.quality(-drawings.gold, drawings).values()) == {0.0}


class Painter:
    """In place of a model: draws what is asked where its number is even, and nothing where it is odd."""

    def sample(self, prompts: Sequence[Prompt], *, seed: int) -> Rollout:
        images = shapes.draw_images([p.metadata for p in prompts], np.random.default_rng(seed))
        images[1::2] = images[0, :, :1, :1]
        return Rollout(tuple(prompts), torch.arange(len(images)), torch.arange(len(images)), {}, images)


def test_drawings_are_labelled_by_the_gold_reward() -> None:
    prompts = load_prompts("shapes:train")[:6]
    found = proxies.draw(Painter(), prompts, per_prompt=2, seed=0, chunk=4)
    assert found.prompts == [p.text for p in prompts] * 2
    assert found.gold.tolist() == [1.0, 0.0] * 6
    assert found.images.shape == (12, 3, 32, 32)
