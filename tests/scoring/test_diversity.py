"""Tests of diversity by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difrl.config.yaml_source import ConfigError
from difrl.data.prompts import Prompt
from difrl.data.rollout import Rollout
from difrl.scoring.diversity import Diversity, _bucket, judge_features, mean_distances, ngrams, thumbnails


def test_distances_are_averaged_over_the_pairs_of_a_group() -> None:
    """Group 7 has the distances 3, 4, 5 over √2, group 2 none, group 4 the distance 2 over √2. Ids may be in any order."""
    features = torch.tensor([[0.0, 0.0], [9.0, 9.0], [3.0, 0.0], [1.0, 1.0], [0.0, 4.0], [3.0, 1.0]])
    groups = torch.tensor([7, 2, 7, 4, 7, 4])
    expected = torch.tensor([2.0, 4.0]) / 2**0.5  # in the order of the ids; alone in its group, 2 has no distance
    torch.testing.assert_close(mean_distances(features, groups), expected)


def test_equal_samples_have_no_distance() -> None:
    """The result has no rounding errors, as it would by matrix products."""
    features = torch.rand(1, 768, generator=torch.Generator().manual_seed(0)).expand(64, -1)
    assert mean_distances(features, torch.zeros(64, dtype=torch.int64)).tolist() == [0.0]


def test_no_pairs_no_diversity() -> None:
    assert mean_distances(torch.rand(3, 2), torch.arange(3)).shape == (0,)


def test_thumbnails_average() -> None:
    images = torch.zeros(2, 3, 32, 32)
    images[1, 0, :2, :2] = 1.0  # one pixel of the thumbnail
    found = thumbnails(images)
    assert found.shape == (2, 3 * 16 * 16)
    assert found[1, 0] == 1.0
    assert found.sum() == 1.0


def rollout(groups: list[int], **content: Any) -> Rollout:
    count = len(groups)
    return Rollout((Prompt("?", {}),) * count, torch.tensor(groups), torch.arange(count), {}, **content)


def colours(images: torch.Tensor) -> torch.Tensor:
    """Return a user-defined feature: the mean colour, [B, 3]."""
    return images.mean((2, 3))


def test_features_by_name_and_by_import_path() -> None:
    """Two images have the colours 0 and (0.6, 0.8, 0), with distance 1 / √3. A single image of another prompt does not count."""
    images = torch.zeros(3, 3, 4, 4)
    images[1, 0], images[1, 1] = 0.6, 0.8
    found = Diversity.build(["pixels", "judge", f"{__name__}:colours"])(rollout([0, 0, 1], images=images))
    assert list(found) == ["diversity/pixels", "diversity/judge", "diversity/colours"]
    torch.testing.assert_close(found["diversity/colours"], torch.tensor([3**-0.5]))
    torch.testing.assert_close(found["diversity/pixels"], torch.tensor([3**-0.5]))  # of flat images the same


def test_the_judge_sees_each_image_by_itself_at_its_own_size() -> None:
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert judge_features(images).shape == (4, 144)
    torch.testing.assert_close(
        judge_features(images)[2:3], judge_features(images[2:3]), rtol=1e-4, atol=1e-5
    )  # float32 convolutions
    assert judge_features(images.repeat_interleave(2, 2)).shape == (4, 144)


def test_ngrams_by_hand() -> None:
    """The texts `ab` and `abc` become ^^ab$ and ^^abc$, with 3-grams ^^a, ^ab, ab$ and ^^a, ^ab, abc, bc$: cos = 2 / √(3 · 4)."""
    found = Diversity.build(["ngrams"])(rollout([0, 0, 1, 1, 2, 2], texts=("ab", "abc", "85", "85", "", "xyz")))
    expected = torch.tensor([(1 - 2 / 12**0.5) ** 0.5, 0.0, 1.0])
    torch.testing.assert_close(found["diversity/ngrams"], expected)


@settings(max_examples=50)
@given(st.text(max_size=12), st.text(max_size=12))
def test_distance_of_texts_is_the_root_of_one_minus_the_cosine_of_their_ngrams(first: str, second: str) -> None:
    def grams(text: str) -> dict[str, int]:
        marked = f"\x02\x02{text}\x03"
        parts = [marked[i : i + 3] for i in range(len(marked) - 2)]
        return {part: parts.count(part) for part in parts}

    a, b = grams(first), grams(second)
    dot = sum(a[part] * b.get(part, 0) for part in a)
    cosine = dot / np.sqrt(sum(n * n for n in a.values()) * sum(n * n for n in b.values()))
    distance = mean_distances(ngrams([first, second]), torch.zeros(2, dtype=torch.int64)).item()
    shared = len({_bucket(part) for part in a | b}) < len(a | b)  # of two 3-grams in one bucket nothing is known here
    assert shared or abs(distance - np.sqrt(max(0.0, 1 - cosine))) < 1e-3
    assert 0 <= distance <= 1 + 1e-6


def test_a_feature_is_measured_if_it_matches_the_modality() -> None:
    both = Diversity.build(["pixels", "ngrams"])
    assert list(both(rollout([0, 0], images=torch.zeros(2, 3, 16, 16)))) == ["diversity/pixels"]
    assert list(both(rollout([0, 0], texts=("a", "b")))) == ["diversity/ngrams"]
    assert Diversity()(rollout([0, 0], texts=("a", "b"))) == {}
    own = Diversity.build([f"{__name__}:lengths"])(rollout([0, 0], texts=("a", "bcd")))
    assert own["diversity/lengths"].tolist() == [2.0]


def lengths(texts: tuple[str, ...]) -> torch.Tensor:
    """Return a user-defined feature of texts."""
    return torch.tensor([[float(len(text))] for text in texts])


@pytest.mark.parametrize("name", ["pixel", "no_module:f", "math:nothing"])
def test_a_feature_that_does_not_exist_is_named(name: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"eval.diversity: .*'{name}'.*expected pixels, judge, ngrams, or module:function"
    ):
        Diversity.build([name])
