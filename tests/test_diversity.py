"""Diversity by hand."""

from __future__ import annotations

import torch

from difrl.diversity import thumbnails, within


def test_distances_are_averaged_over_the_pairs_of_a_group() -> None:
    """Group 7: distances 3, 4, 5 over √2; group 2: none; group 4: 2 over √2. Ids in any order."""
    features = torch.tensor([[0.0, 0.0], [9.0, 9.0], [3.0, 0.0], [1.0, 1.0], [0.0, 4.0], [3.0, 1.0]])
    groups = torch.tensor([7, 2, 7, 4, 7, 4])
    expected = torch.tensor([2.0, 4.0]) / 2**0.5  # in the order of the ids; alone in its group, 2 has no distance
    torch.testing.assert_close(within(features, groups), expected)


def test_equal_samples_have_no_distance() -> None:
    """Not even the rounding of a large batch's distances by way of matrix products."""
    features = torch.rand(1, 768, generator=torch.Generator().manual_seed(0)).expand(64, -1)
    assert within(features, torch.zeros(64, dtype=torch.int64)).tolist() == [0.0]


def test_no_pairs_no_diversity() -> None:
    assert within(torch.rand(3, 2), torch.arange(3)).shape == (0,)


def test_thumbnails_average() -> None:
    images = torch.zeros(2, 3, 32, 32)
    images[1, 0, :2, :2] = 1.0  # one pixel of the thumbnail
    found = thumbnails(images)
    assert found.shape == (2, 3 * 16 * 16)
    assert found[1, 0] == 1.0
    assert found.sum() == 1.0
