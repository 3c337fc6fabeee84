"""Diversity by hand."""

from __future__ import annotations

import pytest
import torch

from difrl.diversity import Diversity, judge, thumbnails, within
from difrl.located import ConfigError


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


def colours(images: torch.Tensor) -> torch.Tensor:
    """A feature of a user's own: the mean colour, [B, 3]."""
    return images.mean((2, 3))


def test_features_by_name_and_by_import_path() -> None:
    """Two images of colours 0 and (0.6, 0.8, 0): 1 / √3 apart; a single one of another prompt counts nothing."""
    images = torch.zeros(3, 3, 4, 4)
    images[1, 0], images[1, 1] = 0.6, 0.8
    found = Diversity.build(["pixels", "judge", f"{__name__}:colours"])(images, torch.tensor([0, 0, 1]))
    assert list(found) == ["diversity/pixels", "diversity/judge", "diversity/colours"]
    torch.testing.assert_close(found["diversity/colours"], torch.tensor([3**-0.5]))
    torch.testing.assert_close(found["diversity/pixels"], torch.tensor([3**-0.5]))  # of flat images the same


def test_the_judge_sees_each_image_by_itself_at_its_own_size() -> None:
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert judge(images).shape == (4, 144)
    torch.testing.assert_close(judge(images)[2:3], judge(images[2:3]), rtol=1e-4, atol=1e-5)  # float32 convolutions
    assert judge(images.repeat_interleave(2, 2)).shape == (4, 144)


def test_texts_have_no_diversity_of_images() -> None:
    assert Diversity()(None, torch.zeros(3, dtype=torch.int64)) == {}


@pytest.mark.parametrize("name", ["pixel", "no_module:f", "math:nothing"])
def test_a_feature_that_does_not_exist_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"eval.diversity: .*'{name}'.*expected pixels, judge, or module:function"):
        Diversity.build([name])
