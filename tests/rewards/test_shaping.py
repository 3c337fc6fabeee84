"""Tests of shapes of rewards by hand, against scipy and numpy, and by algebra."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import scipy.special
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rewards import Scores
from rewards.shaping import clip, denoised, log_sigmoid, min_max, min_max_of_groups, par
from tests.helpers import scores


def listed(found: Scores) -> list[float | None]:
    return [value if valid else None for value, valid in zip(found.values.tolist(), found.valid.tolist(), strict=True)]


REFERENCES = scores([[0.0, 1.0], [3.0, 3.0], [-1.0, 5.0]])
SHAPES: dict[str, Callable[[Scores], Scores]] = {
    "clip": partial(clip, low=-1.0, high=2.0),
    "min_max": partial(min_max, low=-1.0, high=3.0),
    "min_max_of_groups": partial(min_max_of_groups, groups=torch.tensor([4, 4, 4])),
    "par": partial(par, references=REFERENCES),
    "log_sigmoid": partial(log_sigmoid, references=REFERENCES),
}


def test_clip_and_min_max_by_hand() -> None:
    r = scores([-3.0, 0.5, 9.0])
    assert listed(clip(r, low=-1.0, high=2.0)) == [-1.0, 0.5, 2.0]
    assert listed(clip(r, low=-1.0)) == [-1.0, 0.5, 9.0]
    assert listed(clip(r, high=2.0)) == [-3.0, 0.5, 2.0]
    assert listed(min_max(r, low=-1.0, high=2.0)) == pytest.approx([-2 / 3, 0.5, 10 / 3])


def test_min_max_of_groups_by_hand() -> None:
    """Group 7 has the rewards 1, 3, 2; group -1 has 5 and an invalid row; the rewards of group 0 are equal."""
    r = scores([1.0, 5.0, 3.0, 0.0, 2.0, 4.0, 4.0], invalid=[3])
    found = min_max_of_groups(r, torch.tensor([7, -1, 7, -1, 7, 0, 0]))
    assert listed(found) == [0.0, 0.0, 1.0, None, 0.5, 0.0, 0.0]


def test_min_max_of_a_group_without_a_valid_row_is_not_valid() -> None:
    assert listed(min_max_of_groups(scores([1.0, 2.0], invalid=[0]), torch.tensor([0, 1]))) == [None, 0.0]


def test_par_by_hand() -> None:
    """The values are sigmoid(0) = 1/2 and sigmoid(log 3) = 3/4. An invalid reference is ignored."""
    log3 = float(np.log(3.0))
    references = scores([[0.0, -log3], [0.0, 5.0], [0.0, 0.0]], invalid=[(1, 1), (2, 0), (2, 1)])
    assert listed(par(scores([0.0, log3, 1.0]), references)) == pytest.approx([5 / 8, 3 / 4, None])


def test_log_sigmoid_by_hand() -> None:
    """The 0.85 quantile of 0, 1, …, 20 is 17, and the mean is 10."""
    references = scores([[float(n) for n in range(21)]])
    assert listed(log_sigmoid(scores([17.0]), references)) == pytest.approx([-np.log(2)])
    assert listed(log_sigmoid(scores([10.0]), references, quantile=None)) == pytest.approx([-np.log(2)])
    assert listed(log_sigmoid(scores([0.0]), references, quantile=0.0)) == pytest.approx([-np.log(2)])
    half = scores([[1.0, 50.0, 3.0]], invalid=[(0, 1)])
    assert listed(log_sigmoid(scores([2.0]), half, quantile=None)) == pytest.approx([-np.log(2)])


def test_log_sigmoid_without_anything_to_compare_with_is_not_valid() -> None:
    references = scores([[0.0, 0.0], [1.0, 1.0]], invalid=[(0, 0), (0, 1)])
    for quantile in (0.5, None):
        found = log_sigmoid(scores([1.0, 1.0]), references, quantile=quantile)
        assert listed(found) == [None, pytest.approx(-np.log(2))]
        assert found.values[0] == 0.0


def test_comparisons_with_references_are_in_float64() -> None:
    """The mean of 2^24 and 2^24 + 2 cannot be represented in float32."""
    found = log_sigmoid(single([2.0**24 + 2]), single([[2.0**24, 2.0**24 + 2]]), quantile=None)
    assert listed(found) == pytest.approx([-np.log1p(np.exp(-1))])


def test_denoised_by_hand() -> None:
    """With rho_0 = 0.1 and rho_1 = 0.2, 0 becomes -1/7 and 1 becomes 9/7."""
    found = denoised(scores([0.0, 1.0, 0.0], invalid=[2]), false_positive=0.1, false_negative=0.2)
    assert listed(found) == pytest.approx([-1 / 7, 9 / 7, None])


def test_agrees_with_scipy() -> None:
    g = np.random.default_rng(0)
    r, references = g.normal(size=16) * 3, g.normal(size=(16, 9))
    expected = scipy.special.expit(r[:, None] - references).mean(1)
    np.testing.assert_allclose(par(scores(r), scores(references)).values, expected, rtol=1e-12)
    expected = scipy.special.log_expit(r - np.quantile(references, 0.85, axis=1))
    np.testing.assert_allclose(log_sigmoid(scores(r), scores(references)).values, expected, rtol=1e-12)


def single(values: object) -> Scores:
    """Return scores in float32, the precision of rewards."""
    return Scores(torch.tensor(values, dtype=torch.float32), torch.ones_like(torch.tensor(values), dtype=torch.bool))


rewards = st.lists(st.floats(-20, 20), min_size=2, max_size=8)


@given(rewards, st.lists(st.floats(-10, 10), min_size=1, max_size=4))
def test_par_is_a_probability_that_grows_with_the_reward(r: list[float], references: list[float]) -> None:
    found = par(single(sorted(r)), single([references] * len(r))).values
    assert ((found > 0) & (found <= 1)).all()
    assert (found.diff() >= 0).all()


@given(st.floats(-20, 20), st.lists(st.floats(-10, 10), min_size=1, max_size=4), st.integers(2, 40))
def test_equal_rewards_stay_equal_to_the_last_bit(r: float, references: list[float], count: int) -> None:
    """Otherwise a group of equal rewards would seem to have a spread."""
    for shape in (par, log_sigmoid):
        found = shape(single([r] * count), single([references] * count)).values
        assert len(found.unique()) == 1


@given(st.lists(st.tuples(st.floats(-20, 20), st.floats(-20, 20)), min_size=1, max_size=6))
def test_sum_of_log_sigmoids_is_the_probability_that_all_are_good(pairs: list[tuple[float, float]]) -> None:
    parts = [log_sigmoid(scores([r]), scores([[c]])).values for r, c in pairs]
    product = np.prod([1 / (1 + np.exp(c - r)) for r, c in pairs])
    assert float(sum(parts)) == pytest.approx(np.log(product), rel=1e-9)
    assert float(sum(parts)) <= min(float(part) for part in parts)


@given(st.floats(0, 0.49), st.floats(0, 0.49), st.lists(st.integers(0, 1), min_size=1, max_size=5))
def test_denoised_is_unbiased_over_all_errors(rho_0: float, rho_1: float, truth: list[int]) -> None:
    """The expectation over all patterns of errors, weighted by their probabilities, is the truth."""
    flips = {1: rho_1, 0: rho_0}
    total = torch.zeros(len(truth), dtype=torch.float64)
    for wrong in itertools.product([False, True], repeat=len(truth)):
        chances = [flips[t] if w else 1 - flips[t] for t, w in zip(truth, wrong, strict=True)]
        said = scores([float(t != w) for t, w in zip(truth, wrong, strict=True)])
        total += np.prod(chances) * denoised(said, false_positive=rho_0, false_negative=rho_1).values
    assert total.tolist() == pytest.approx(truth, abs=1e-9)


def standardised(values: Tensor) -> Tensor:
    return (values - values.mean()) / values.std()


def test_affine_shapes_leave_nothing_after_a_standard_deviation() -> None:
    r = scores([0.0, 1.0, 1.0, 0.0, 1.0])
    for found in (
        denoised(r, false_positive=0.3, false_negative=0.2),
        min_max(r, low=-5.0, high=3.0),
    ):
        assert not torch.allclose(found.values, r.values)
        torch.testing.assert_close(standardised(found.values), standardised(r.values))


@given(st.lists(st.floats(-10, 10), min_size=3, max_size=3), st.integers(0, 2), st.sampled_from(sorted(SHAPES)))
def test_invalid_rows_stay_invalid_and_change_no_other(r: list[float], hole: int, shape: str) -> None:
    found = SHAPES[shape](scores(r, invalid=[hole]))
    assert found.valid.tolist() == [n != hole for n in range(3)]
    assert found.values[hole] == 0
    if shape != "min_max_of_groups":
        kept = torch.arange(3) != hole
        torch.testing.assert_close(found.values[kept], SHAPES[shape](scores(r)).values[kept])


@pytest.mark.parametrize("shape", [*SHAPES.values(), partial(denoised, false_positive=0.1, false_negative=0.1)])
def test_nan_in_a_valid_row_is_refused(shape: Callable[[Scores], Scores]) -> None:
    broken = Scores(torch.tensor([0.0, torch.nan, 1.0]), torch.tensor([True, True, True]))
    with pytest.raises(ValueError, match=r"the score at \[1\] is nan but marked valid"):
        shape(broken)


def test_errors() -> None:
    r = scores([0.0, 1.0])
    with pytest.raises(ValueError, match="neither low nor high"):
        clip(r)
    with pytest.raises(ValueError, match="low 2 and high 1; low must be below"):
        clip(r, low=2.0, high=1.0)
    with pytest.raises(ValueError, match="low 1 and high 1; low must be below"):
        clip(r, low=1.0, high=1.0)
    with pytest.raises(ValueError, match="low must be below high"):
        min_max(r, low=1.0, high=1.0)
    with pytest.raises(ValueError, match=r"references are \[3, 2\], expected at least one for each of 2"):
        par(r, REFERENCES)
    with pytest.raises(ValueError, match=r"references are \[2, 0\]"):
        par(r, scores([[], []]))
    with pytest.raises(ValueError, match=r"the score at \[0, 1\] is inf"):
        par(r, scores([[0.0, np.inf], [0.0, 0.0]]))
    for quantile in (85.0, -0.5):
        with pytest.raises(ValueError, match=f"quantile is {quantile:g}"):
            log_sigmoid(r, scores([[0.0], [0.0]]), quantile=quantile)
    with pytest.raises(ValueError, match="their sum below 1"):
        denoised(r, false_positive=0.5, false_negative=0.5)
    for wrong in ({"false_positive": -0.1, "false_negative": 0.2}, {"false_positive": 0.2, "false_negative": -0.1}):
        with pytest.raises(ValueError, match="expected both at least 0"):
            denoised(r, **wrong)
    with pytest.raises(ValueError, match=r"a verifier returns 0 or 1, found 0\.5"):
        denoised(scores([0.0, 0.5]), false_positive=0.1, false_negative=0.1)
    with pytest.raises(ValueError, match=r"expected one shape and torch\.bool"):
        clip(Scores(torch.zeros(2), torch.ones(3).bool()), low=0.0)
    with pytest.raises(ValueError, match=r"expected one shape and torch\.bool"):
        clip(Scores(torch.zeros(2), torch.ones(2)), low=0.0)
