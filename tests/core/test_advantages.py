"""Advantages and group statistics: by hand, against numpy, and as algebra."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from difrl.core import (
    Baseline,
    Std,
    advantages,
    gdpo_advantages,
    group_index,
    group_mean,
    group_mean_std,
    group_spread,
    group_sum,
    informative,
    scale_by_sign,
)

GROUPS = torch.tensor([9, -4, 9, -4, 9, 2])
REWARDS = torch.tensor([1.0, 5.0, 2.0, 5.0, 6.0, 3.0])
ALL = torch.ones(6, dtype=torch.bool)


def test_group_mean_by_hand() -> None:
    """Group 9 holds 1, 2, 6; group -4 holds 5, 5; group 2 holds 3."""
    assert group_mean(GROUPS, REWARDS).tolist() == [3.0, 5.0, 3.0, 5.0, 3.0, 3.0]
    mean, std = group_mean_std(GROUPS, REWARDS)
    assert mean.tolist() == [3.0, 5.0, 3.0, 5.0, 3.0, 3.0]
    assert std.tolist() == pytest.approx([np.std([1, 2, 6]), 0, np.std([1, 2, 6]), 0, np.std([1, 2, 6]), 0])
    assert group_spread(GROUPS, REWARDS, ALL).tolist() == [5.0, 0.0, 5.0, 0.0, 5.0, 0.0]
    assert group_sum(GROUPS, ALL).tolist() == [3.0, 2.0, 3.0, 2.0, 3.0, 1.0]


def test_weights_are_masks_or_numbers_and_values_without_weight_have_no_effect() -> None:
    x = torch.tensor([[1.0, torch.nan], [3.0, 8.0], [torch.inf, 2.0]])
    weights = torch.tensor([[1.0, 0.0], [3.0, 1.0], [0.0, 1.0]])
    groups = torch.tensor([0, 0, 1])
    assert group_mean(groups, x, weights).tolist() == [[2.5, 8.0], [2.5, 8.0], [0.0, 2.0]]
    mean, std = group_mean_std(groups, x, weights > 0)
    assert mean.tolist() == [[2.0, 8.0], [2.0, 8.0], [0.0, 2.0]]
    assert std.tolist() == [[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]


def test_integers_have_means_and_a_group_without_valid_values_has_no_spread() -> None:
    assert group_mean(torch.tensor([0, 0, 1]), torch.tensor([1, 2, 5])).tolist() == [1.5, 1.5, 5.0]
    valid = torch.tensor([True, True, False])
    assert group_spread(torch.tensor([0, 0, 1]), torch.tensor([1.0, 3.0, 5.0]), valid).tolist() == [2.0, 2.0, 0.0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"std": "none"}, [-2, 0, -1, 0, 3, 0]),
        ({"std": "none", "baseline": "leave_one_out"}, [-3, 0, -1.5, 0, 4.5, 0]),
        ({"std": "none", "baseline": "none"}, [1, 5, 2, 5, 6, 3]),
        ({"std": "none", "clip": 2.0}, [-2, 0, -1, 0, 2, 0]),
        ({"std": "none", "clip": 2.0, "scale": 0.5}, [-1, 0, -0.5, 0, 1, 0]),
        ({"eps": 0.0}, [-2 / 14**0.5 * 3**0.5, 0, -1 / 14**0.5 * 3**0.5, 0, 3 / 14**0.5 * 3**0.5, 0]),
        ({"std": "global", "eps": 0.0}, list(np.array([-2, 0, -1, 0, 3, 0]) / np.std([1, 5, 2, 5, 6, 3]))),
    ],
)
def test_advantages_by_hand(options: dict[str, Any], expected: Any) -> None:
    """The variance of 1, 2, 6 is 14/3."""
    found = advantages(REWARDS, GROUPS, ALL, **options)
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert found.dtype == torch.float32
    assert not found.requires_grad


def test_rewards_are_constants_of_any_size() -> None:
    """The mean of these rewards, 2^24 + 1, is not a float32."""
    rewards = torch.tensor([2.0**24, 2.0**24 + 2], requires_grad=True)
    found = advantages(rewards, torch.tensor([0, 0]), ALL[:2], std="none")
    assert found.tolist() == [-1.0, 1.0]
    assert not found.requires_grad


def test_unscored_rows_are_ignored() -> None:
    rewards = torch.cat([REWARDS, torch.tensor([torch.nan, 1e9])])
    groups = torch.cat([GROUPS, torch.tensor([9, 2])])
    valid = torch.cat([ALL, torch.tensor([False, False])])
    for baseline in ("mean", "leave_one_out", "none"):
        for std in ("group", "global", "none"):
            found = advantages(rewards, groups, valid, baseline=baseline, std=std)
            expected = advantages(REWARDS, GROUPS, ALL, baseline=baseline, std=std)
            assert found.tolist() == pytest.approx([*expected.tolist(), 0.0, 0.0])


def test_a_group_with_equal_rewards_gives_exactly_zero() -> None:
    """0.1 summed three times and divided by 3 is not 0.1 in float64; the difference must not count."""
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.0, 1.0], dtype=torch.float64)
    assert group_mean(torch.zeros(3, dtype=torch.int64), rewards[:3])[0] != rewards[0]
    groups = torch.tensor([0, 0, 0, 1, 1])
    valid = torch.ones(5, dtype=torch.bool)
    for baseline in ("mean", "leave_one_out"):
        for std in ("group", "global", "none"):
            found = advantages(rewards, groups, valid, baseline=baseline, std=std, eps=0.0)
            assert found[:3].tolist() == [0.0, 0.0, 0.0]
            assert found[3] < 0 < found[4]
    assert informative(rewards, groups, valid).tolist() == [False] * 3 + [True] * 2


def test_informative_compares_valid_rewards_and_marks_the_whole_group() -> None:
    rewards = torch.tensor([0.0, 1.0, 0.0, 1.0, torch.nan])
    groups = torch.tensor([0, 0, 1, 1, 1])
    valid = torch.tensor([True, False, True, True, False])
    assert informative(rewards, groups, valid).tolist() == [False, False, True, True, True]


batches = st.integers(1, 12).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(-3, 3), min_size=n, max_size=n),
        st.lists(st.floats(-10, 10, width=32), min_size=n, max_size=n),
        st.lists(st.booleans(), min_size=n, max_size=n),
        st.permutations(range(n)),
    )
)


@given(batches, st.sampled_from(["mean", "leave_one_out", "none"]), st.sampled_from(["group", "global", "none"]))
def test_the_order_of_rows_and_the_names_of_groups_do_not_matter(batch: Any, baseline: Baseline, std: Std) -> None:
    groups, rewards, valid, order = (torch.tensor(x) for x in batch)
    rewards, order = rewards.double(), order.long()
    found = advantages(rewards, groups, valid, baseline=baseline, std=std)
    moved = advantages(rewards[order], groups[order] * -7 + 100, valid[order], baseline=baseline, std=std)
    torch.testing.assert_close(moved, found[order], rtol=1e-9, atol=1e-9)
    assert torch.isfinite(found).all()


@given(batches)
def test_leave_one_out_is_the_definition_and_the_rescaled_mean(batch: Any) -> None:
    groups, rewards, valid, _ = (torch.tensor(x) for x in batch)
    found = advantages(rewards.double(), groups, valid, baseline="leave_one_out", std="none")
    centred = advantages(rewards.double(), groups, valid, baseline="mean", std="none")
    for i in range(len(groups)):
        others = [k for k in range(len(groups)) if k != i and groups[k] == groups[i] and valid[k]]
        if not valid[i] or not others:
            assert found[i] == 0
            continue
        n = len(others) + 1
        assert found[i].item() == pytest.approx(rewards[i].item() - rewards[others].double().mean().item(), abs=1e-9)
        assert found[i].item() == pytest.approx(centred[i].item() * n / (n - 1), abs=1e-9)


@given(batches)
def test_centred_advantages_sum_to_zero_in_every_group(batch: Any) -> None:
    groups, rewards, valid, _ = (torch.tensor(x) for x in batch)
    for baseline in ("mean", "leave_one_out"):
        found = advantages(rewards.double(), groups, valid, baseline=baseline)
        assert group_sum(groups, found).abs().max().item() == pytest.approx(0.0, abs=1e-6)


def test_agrees_with_numpy_group_by_group() -> None:
    g = torch.Generator().manual_seed(0)
    groups, rewards = torch.randint(0, 5, (64,), generator=g), torch.randn(64, generator=g)
    found = advantages(rewards, groups, torch.ones(64, dtype=torch.bool)).numpy()
    for k in range(5):
        r = rewards.numpy()[groups.numpy() == k]
        np.testing.assert_allclose(found[groups.numpy() == k], (r - r.mean()) / (r.std() + 1e-4), rtol=1e-5)


def test_errors() -> None:
    with pytest.raises(ValueError, match="row 1 is nan but marked valid"):
        advantages(torch.tensor([1.0, torch.nan]), torch.tensor([0, 0]), torch.tensor([True, True]))
    with pytest.raises(ValueError, match=r"shapes \[\[2\], \[1\], \[2\]\]"):
        advantages(torch.zeros(2), torch.tensor([0]), torch.tensor([True, True]))
    with pytest.raises(ValueError, match="expected floating point and torch"):
        informative(torch.zeros(2), torch.tensor([0, 0]), torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="baseline is 'median'"):
        advantages(REWARDS, GROUPS, ALL, baseline="median")
    with pytest.raises(ValueError, match="std is 'batch'"):
        advantages(REWARDS, GROUPS, ALL, std="batch")
    with pytest.raises(ValueError, match="expected int64"):
        group_index(torch.zeros(3))
    with pytest.raises(ValueError, match="expected 6 rows"):
        group_sum(GROUPS, torch.zeros(5))


def test_beta_normalised_against_scipy() -> None:
    """(R - p) / f(p), f the density of Beta(1 + a/3, 1 + b/3) with (a, b) by moments (2506.02864); a group of 1s gives 0."""
    rewards = torch.tensor([1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1], dtype=torch.float64)
    groups = torch.arange(4).repeat_interleave(4)
    found = advantages(rewards, groups, torch.ones(16, dtype=torch.bool), std="beta")
    p = np.array([0.25, 0.5, 0.75, 1.0])
    m, v = p.mean(), p.var(ddof=1)
    a, b = (m * (1 - m) / v - 1) * m, (m * (1 - m) / v - 1) * (1 - m)
    density = scipy.stats.beta(1 + a / 3, 1 + b / 3).pdf(p[:3]).repeat(4)
    expected = np.concatenate([(rewards.numpy()[:12] - p[:3].repeat(4)) / density, np.zeros(4)])
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-12)


def test_beta_normalised_without_variation_of_groups() -> None:
    """With one group, or equal groups, nothing is fitted: only the mean is subtracted. Unscored rows are ignored."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
    for groups in (torch.zeros(4, dtype=torch.int64), torch.tensor([0, 0, 1, 1])):
        assert advantages(rewards, groups, ALL[:4], std="beta").tolist() == [0.5, -0.5, -0.5, 0.5]
    mixed = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    groups = torch.tensor([0, 0, 1, 1, 1, 1])
    expected = advantages(mixed, groups, ALL, std="beta")
    more = advantages(
        torch.cat([mixed, torch.tensor([7.0, 7.0])]),
        torch.cat([groups, torch.tensor([0, 5])]),
        torch.cat([ALL, torch.tensor([False, False])]),
        std="beta",
    )
    assert more.tolist() == pytest.approx([*expected.tolist(), 0.0, 0.0])
    with pytest.raises(ValueError, match=r"rewards lie in \[1, 6\], but std 'beta' needs them in \[0, 1\]"):
        advantages(REWARDS, GROUPS, ALL, std="beta")


def test_beta_normalised_at_the_bounds_of_its_parameters() -> None:
    """Means 0, 1 and 1/4: their variance 0.271 is above m (1 - m) = 0.243, so c < 0, both parameters are 1 and f is 1."""
    rewards = torch.tensor([0.0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0], dtype=torch.float64)
    groups, valid = torch.arange(3).repeat_interleave(4), torch.ones(12, dtype=torch.bool)
    found = advantages(rewards, groups, valid, std="beta")
    assert found.tolist() == pytest.approx([0.0] * 8 + [0.75, -0.25, -0.25, -0.25], rel=1e-12)
    # Forty groups of mean 1/2 and one of 1/64, at which the density is below 1e-6.
    rewards = torch.tensor([0.0, 1.0] * 40 + [1.0] + [0.0] * 63, dtype=torch.float64)
    groups = torch.cat([torch.arange(40).repeat_interleave(2), torch.full((64,), 40)])
    found = advantages(rewards, groups, torch.ones(144, dtype=torch.bool), std="beta")[80:]
    assert found.tolist() == pytest.approx([63 / 64 * 1e6] + [-1 / 64 * 1e6] * 63, rel=1e-9)


def test_without_a_baseline_every_reward_counts() -> None:
    """A group with equal rewards is not compared with anything: its rewards count, with std "none" and "global"."""
    rewards, groups = torch.tensor([1.0, 1.0, 0.0, 2.0]), torch.tensor([0, 0, 1, 1])
    for std, scale in (("none", 1.0), ("global", 2**0.5)):  # of 1, 1, 0, 2 the variance is 1/2
        found = advantages(rewards, groups, ALL[:4], baseline="none", std=std, eps=0.0)
        assert found.tolist() == pytest.approx([scale, scale, 0.0, 2 * scale])
    found = advantages(rewards, groups, ALL[:4], baseline="none", std="group", eps=0.0)
    assert found.tolist() == [0.0, 0.0, 0.0, 2.0]


def test_a_batch_with_equal_rewards_gives_exactly_zero() -> None:
    """0.1 / (0 + eps) would be an advantage of a thousand."""
    rewards, groups = torch.full((4,), 0.1), torch.tensor([0, 0, 1, 1])
    assert advantages(rewards, groups, ALL[:4], baseline="none", std="global").tolist() == [0.0] * 4
    assert advantages(rewards, groups, ALL[:4], baseline="none", std="none").tolist() == rewards.tolist()


def test_gdpo_separates_groups_with_equal_advantages_of_the_sum() -> None:
    """The example of 2601.05242 with two rewards and two samples: totals (0, 1) and totals (0, 2) give different advantages.

    By hand: group 0 differs in one reward, +-1; group 1 in both, +-1 twice, so +-2. S = -1, 1, -2, 2 has std sqrt(2.5).
    """
    one, two = torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.tensor([0.0, 0.0, 0.0, 1.0])
    groups, valid = torch.tensor([0, 0, 1, 1]), ALL[:4]
    columns, weights = {"one": one, "two": two}, {"one": 1.0, "two": 1.0}
    found = gdpo_advantages(columns, weights, groups, valid, eps=0.0)
    assert found.tolist() == pytest.approx([x / 2.5**0.5 for x in (-1, 1, -2, 2)])
    assert advantages(one + two, groups, valid, eps=0.0).tolist() == pytest.approx([-1, 1, -1, 1])
    # The weight counts, not the spread: a second reward that is 100 times larger is still +-1 before its weight of 3.
    found = gdpo_advantages({"one": one, "two": 100 * two}, {"one": 1.0, "two": 3.0}, groups, valid, eps=0.0)
    assert found.tolist() == pytest.approx([x / 8.5**0.5 for x in (-1, 1, -4, 4)])
    assert gdpo_advantages(columns, weights, groups, valid, eps=0.0, clip=1.0, scale=0.5).tolist() == pytest.approx(
        [-0.5 / 2.5**0.5, 0.5 / 2.5**0.5, -0.5, 0.5]
    )


def test_gdpo_with_leave_one_out() -> None:
    """0, 1 about the other one: -1, 1 over 1/2. 0, 0, 3 about the others: -3/2, -3/2, 3 over sqrt(2). S^2 sums to 14.75."""
    groups = torch.tensor([0, 0, 1, 1, 1])
    columns = {"one": torch.tensor([0.0, 1.0, 0.0, 0.0, 3.0])}
    found = gdpo_advantages(columns, {"one": 1.0}, groups, ALL[:5], baseline="leave_one_out", eps=0.0)
    expected = [-2.0, 2.0, -1.5 / 2**0.5, -1.5 / 2**0.5, 3 / 2**0.5]
    assert found.tolist() == pytest.approx([x / (14.75 / 5) ** 0.5 for x in expected])


@given(st.integers(0, 10_000))
def test_gdpo_does_not_depend_on_units_or_unscored_rows(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    groups = torch.randint(0, 4, (20,), generator=g)
    columns = {name: torch.randint(0, 4, (20,), generator=g).double() for name in "ab"}
    valid = torch.rand(20, generator=g) < 0.8
    weights = {"a": 0.3, "b": 2.0}
    expected = gdpo_advantages(columns, weights, groups, valid, eps=0.0).nan_to_num()
    changed = {"a": torch.where(valid, 7 * columns["a"] + 3, torch.nan), "b": columns["b"]}
    found = gdpo_advantages(changed, weights, groups, valid, eps=0.0).nan_to_num()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert (found[~valid] == 0).all()
    uninformative = ~(informative(columns["a"], groups, valid) | informative(columns["b"], groups, valid))
    assert (found[uninformative] == 0).all()


def test_a_reward_of_weight_0_has_no_part() -> None:
    """It may be NaN in valid rows, and a group that differs in it alone gets exactly 0."""
    one, zero = torch.tensor([0.0, 1.0, 0.0, 1.0, 2.0, 2.0]), torch.tensor([torch.nan, 1.0, 0.0, 1.0, 0.0, 1.0])
    groups, valid = torch.tensor([0, 0, 1, 1, 2, 2]), ALL[:1].expand(6)
    found = gdpo_advantages({"one": one, "zero": zero}, {"one": 2.0, "zero": 0.0}, groups, valid)
    assert torch.equal(found, gdpo_advantages({"one": one}, {"one": 2.0}, groups, valid))
    assert found[4:].tolist() == [0.0, 0.0]
    assert gdpo_advantages({"zero": zero}, {"zero": 0.0}, groups, valid).tolist() == [0.0] * 6


def test_gdpo_needs_a_weight_for_each_reward() -> None:
    with pytest.raises(ValueError, match=r"columns are \['a'\] and weights \['b'\]"):
        gdpo_advantages({"a": REWARDS}, {"b": 1.0}, GROUPS, ALL)


def test_scale_by_sign() -> None:
    """Rewards of +-1 without baseline: NSR, PSR and weighted REINFORCE of 2506.01347."""
    rewards = torch.tensor([1.0, -1.0, 1.0, -1.0])
    plain = advantages(rewards, torch.zeros(4, dtype=torch.int64), ALL[:4], baseline="none", std="none")
    assert scale_by_sign(plain, 0.0, 1.0).tolist() == [0, -1, 0, -1]
    assert scale_by_sign(plain, 1.0, 0.0).tolist() == [1, 0, 1, 0]
    assert scale_by_sign(plain, 0.1, 1.0).tolist() == pytest.approx([0.1, -1, 0.1, -1])


@pytest.mark.parametrize(("rho_0", "rho_1"), [(0.0, 0.3), (0.2, 0.3), (0.4, 0.1)])
def test_forward_correction_of_a_noisy_verifier_scales_by_sign(rho_0: float, rho_1: float) -> None:
    """E[w | truth] = (1 - rho_0 - rho_1) (truth - 1) over the verifier's errors: the error-free direction, up to a constant."""
    verdict = torch.tensor([1.0, -1.0], dtype=torch.float64)
    valid, groups = torch.tensor([True, True]), torch.tensor([0, 0])
    plain = advantages(verdict, groups, valid, baseline="none", std="none")
    weights = scale_by_sign(plain, positive=rho_1, negative=1 - rho_1)
    assert weights.tolist() == pytest.approx([rho_1, rho_1 - 1])
    right, wrong = torch.tensor([1 - rho_1, rho_1]).double(), torch.tensor([rho_0, 1 - rho_0]).double()
    assert float(right @ weights) == pytest.approx(0.0, abs=1e-7)
    assert float(wrong @ weights) == pytest.approx(rho_0 + rho_1 - 1, abs=1e-7)
