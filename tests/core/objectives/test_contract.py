"""The contract of every objective in tests/objectives.py: splits, processes and masks have no effect."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from difrl.core import (
    CentredRewardDistillation,
    Clipped,
    Coefficient,
    DivergenceMasked,
    Likelihoods,
    NegativeAware,
    Objective,
    Preference,
    RatioNormalised,
    advantages,
    anchor_penalty,
    get_statistics,
    reduce_over_decisions,
    to_unit_interval,
    weighted_mean,
)
from difrl.reporting.html.glossary import definition
from difrl.training.step_metrics import METRIC_NAMES
from tests.fakes import without
from tests.objectives import OBJECTIVES

Tensors = dict[str, Tensor]


def whole_batch(policy: Any, objective: Objective, rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensors]:
    """Return (loss, gradient, metrics) of one backward pass over the whole batch."""
    lik = reduce_over_decisions(policy.likelihoods(), objective.decisions)
    loss, metrics = objective(lik, rewards, groups)
    total = weighted_mean(loss + anchor_penalty(lik, {"base": 0.3}), lik.mask, lik.mask.sum())
    return total.detach(), policy.grad(total), metrics


def in_parts(
    policy: Any, objective: Objective, rewards: Tensor, groups: Tensor, parts: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return (loss, gradient) by a pass without gradient for the statistics and a backward pass for each part."""
    with torch.no_grad():
        every = [reduce_over_decisions(policy.likelihoods(rows), objective.decisions) for rows in parts]
    order = torch.cat(list(parts))
    statistics = get_statistics(objective, Likelihoods.cat(every), rewards[order], groups[order])
    count = sum(lik.mask.sum() for lik in every)
    total, grad, start = torch.tensor(0.0), torch.zeros_like(policy.weight), 0
    for rows in parts:
        lik = reduce_over_decisions(policy.likelihoods(rows), objective.decisions)
        mine = {name: value[start : start + len(rows)] for name, value in statistics.items()}
        loss, metrics = objective(lik, rewards[rows], groups[rows], mine)
        assert all(m.shape == loss.shape and not m.requires_grad for m in metrics.values())
        scalar = weighted_mean(loss + anchor_penalty(lik, {"base": 0.3}), lik.mask, count)
        total, grad, start = total + scalar.detach(), grad + policy.grad(scalar), start + len(rows)
    return total, grad


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("size", [1, 3, 8])
def test_parts_that_split_groups_equal_the_whole(fake_policy: Any, objective: Objective, size: int) -> None:
    policy = fake_policy.make(8, 4)
    groups = torch.tensor([7, 3, 7, 3, -1, 5, 5, -1])
    rewards = torch.tensor([1.0, 0.2, -1.0, -0.2, 0.4, 2.0, -2.0, -0.4])
    shuffled = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    loss, grad, _ = whole_batch(policy, objective, rewards, groups)
    again, parts = in_parts(policy, objective, rewards, groups, shuffled.split(size))
    # float64; only the order of sums differs, and group statistics are of order one
    torch.testing.assert_close(again, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts, grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_statistics_gathered_over_processes_equal_those_of_one(fake_policy: Any, objective: Objective) -> None:
    """Two processes hold half of the rows each and gather the results of `summarise`."""
    policy = fake_policy.make(8, 4)
    groups, rewards = torch.arange(8) % 4, torch.linspace(-1, 1, 8)
    lik = reduce_over_decisions(policy.likelihoods(), objective.decisions)
    halves = [lik.select(slice(0, 4)), lik.select(slice(4, 8))]
    rows = [objective.summarise(half) for half in halves]
    assert all(not value.requires_grad for part in rows for value in part.values())
    gathered = {name: torch.cat([part[name] for part in rows]) for name in rows[0]}
    mask = torch.cat([half.mask for half in halves])
    a = rewards.double()[:, None].expand_as(mask)
    found = objective.statistics(gathered, mask, a, groups)
    expected = get_statistics(objective, lik, rewards, groups)
    assert found.keys() == expected.keys()
    assert (objective.scope == "row") == (not found)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_masked_elements_have_no_part(fake_policy: Any, objective: Objective) -> None:
    """Values in padding and in unscored rows change neither loss nor gradient."""
    policy = fake_policy.make(8, 4)
    policy.mask[2] = False
    groups, rewards = torch.arange(8) % 4, torch.linspace(-1, 1, 8)
    loss, grad, _ = whole_batch(policy, objective, rewards, groups)
    policy.noise = torch.where(policy.mask[:, :, None], policy.noise, 1e3)
    rewards[2] = 77.0
    again, spoiled, _ = whole_batch(policy, objective, rewards, groups)
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(spoiled, grad)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_it_reads_only_what_it_needs(fake_policy: Any, objective: Objective) -> None:
    """`needs` is complete, because a policy evaluates nothing else."""
    every = reduce_over_decisions(fake_policy.make(4, 3).likelihoods(), objective.decisions)
    groups, rewards = torch.arange(4) % 2, torch.linspace(-1, 1, 4)
    known = replace(every, terms={name: every[name] for name in objective.needs})
    loss, _ = objective(known, rewards, groups)
    assert loss.isfinite().all()
    for name in objective.needs:
        with pytest.raises(ValueError, match=f"needs .*{name}"):
            objective(without(known, name), rewards, groups)


@pytest.mark.parametrize("objective", [Clipped(), CentredRewardDistillation(), NegativeAware(0.7)], ids=str)
def test_three_objectives_share_one_gradient_at_the_old_policy(fake_policy: Any, objective: Objective) -> None:
    """Centred, unclipped advantages at theta = old: the gradient of each is -A grad l."""
    policy = fake_policy.make(12, 1, shift=0.0)
    groups = torch.arange(12) % 3
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    a = advantages(rewards, groups, torch.ones(12, dtype=torch.bool))
    lik = without(policy.likelihoods(), "weight")
    loss, _ = objective(lik, a, groups)
    expected = policy.grad((-a[:, None] * lik.logp).sum())
    torch.testing.assert_close(policy.grad(loss.sum()), expected, rtol=1e-12, atol=1e-12)


def test_preference_equals_the_loss_over_pairs(fake_policy: Any) -> None:
    policy = fake_policy.make(6, 4)
    winners, losers = torch.tensor([1, 2, 4]), torch.tensor([5, 0, 3])
    groups, rewards = torch.empty(6, dtype=torch.int64), torch.empty(6)
    groups[winners], groups[losers] = torch.arange(3), torch.arange(3)
    rewards[winners], rewards[losers] = 1.0, -1.0
    lik = without(reduce_over_decisions(policy.likelihoods(), "sum"), "weight")
    delta = (lik.logp - lik["references/base"])[:, 0]
    direct = -F.logsigmoid(0.5 * (delta[winners] - delta[losers])).mean()
    loss, _ = Preference(beta=0.5, decisions="sum")(lik, rewards, groups)
    total = weighted_mean(loss, lik.mask, lik.mask.sum())
    torch.testing.assert_close(total, direct)
    torch.testing.assert_close(policy.grad(total), policy.grad(direct))


def test_normalisation_centres_the_ratio_and_makes_it_independent_of_the_noise(fake_policy: Any) -> None:
    """On samples of old, scale (log rho + bias) has mean 0 and spread ||delta mean|| / D for every std, while log rho has
    a mean below 0 and a spread that grows as the std shrinks (2510.22319)."""
    policy = fake_policy.make(40_000, 3, shift=0.1)
    policy.mask[:] = True
    policy.contexts = policy.contexts[:1, :1].expand(40_000, 3, 3)
    lik = policy.likelihoods()
    raw = lik.log_ratio("old").detach()
    _, metrics = RatioNormalised()(lik, torch.ones(40_000), torch.zeros(40_000, dtype=torch.int64))
    normalised = metrics["ratio/normalised"].log()
    shift = ((policy.weight - policy.old) @ policy.contexts[0, 0]).norm().detach() / 3
    error = normalised.std(0) / 40_000**0.5
    assert (raw.mean(0) < -4 * raw.std(0) / 40_000**0.5).all()
    assert (normalised.mean(0).abs() < 4 * error).all()
    # The relative error of a spread over n samples is 1 / sqrt(2n) = 0.0035.
    torch.testing.assert_close(normalised.std(0), shift.expand(3), rtol=0.02, atol=0.0)
    torch.testing.assert_close(raw.std(0), shift / policy.std, rtol=0.02, atol=0.0)
    estimating = RatioNormalised(bias="batch")
    bias = get_statistics(estimating, lik, torch.ones(40_000), torch.arange(40_000))["bias"]
    assert ((bias[0] - lik["bias"][0]).abs() < 4 * raw.std(0) / 40_000**0.5).all()


def test_divergence_masking_drops_only_decisions_that_lead_away(fake_policy: Any) -> None:
    policy = fake_policy.make(64, 2)
    a = torch.where(torch.arange(64) % 2 == 0, 1.0, -1.0)
    lik = policy.likelihoods()
    loss, metrics = DivergenceMasked(0.02)(lik, a, torch.arange(64))
    ratio, far = lik.log_ratio("old").exp(), lik["bias"] >= 0.02
    away = torch.where(a[:, None] > 0, ratio > 1, ratio < 1)
    assert 0 < metrics["trust/dropped"].sum() < 128
    assert torch.equal(metrics["trust/dropped"].bool(), far & away)
    assert torch.equal(loss == 0, far & away)


def sequences() -> tuple[Tensor, Tensor]:
    """Return all sequences over {0 = end, 1, 2} of length at most 3, padded with 0, and their masks, which include the end."""
    found = set()
    for word in itertools.product(range(3), repeat=3):
        end = word.index(0) + 1 if 0 in word else 3
        found.add((*word[:end], *(0,) * (3 - end), end))
    rows = torch.tensor(sorted(found))
    return rows[:, :3], torch.arange(3) < rows[:, 3:]


def tabular(logits: Tensor, y: Tensor) -> Tensor:
    """Return log pi(y_j | y_<j), [B, J]: a row of logits for each prefix, numbered in base 3 after a leading 1."""
    prefix, out = torch.ones(len(y), dtype=torch.int64), []
    for j in range(y.shape[1]):
        out.append(logits.log_softmax(-1)[prefix].gather(1, y[:, j : j + 1])[:, 0])
        prefix = 3 * prefix + y[:, j]
    return torch.stack(out, dim=1)


def test_distillation_of_whole_sequences_reaches_the_tilted_distribution() -> None:
    """A discrete autoregressive policy with decisions = "sum" and old fixed at base reaches base exp(r / beta)."""
    g = torch.Generator().manual_seed(0)
    y, mask = sequences()
    base = torch.randn(81, 3, generator=g, dtype=torch.float64)
    rewards = torch.randn(len(y), generator=g, dtype=torch.float64)
    beta, groups = 0.8, torch.zeros(len(y), dtype=torch.int64)
    old = tabular(base, y)
    torch.testing.assert_close((old * mask).sum(1).exp().sum(), torch.tensor(1.0, dtype=torch.float64))
    objective = CentredRewardDistillation(beta=beta, reward="raw", decisions="sum")
    logits = base.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def closure() -> Tensor:
        optimiser.zero_grad()
        lik = Likelihoods(tabular(logits, y), mask, {"references/old": old})
        lik = reduce_over_decisions(lik, objective.decisions)
        loss = weighted_mean(objective(lik, rewards, groups)[0], lik.mask, len(y))
        loss.backward()
        return loss

    optimiser.step(closure)
    found = (tabular(logits, y) * mask).sum(1).exp()
    tilted = torch.softmax((old * mask).sum(1) + rewards / beta, dim=0)
    torch.testing.assert_close(found, tilted, rtol=1e-3, atol=1e-5)


@dataclass(frozen=True)
class RewardAdaptive(Coefficient):
    """Coefficient of CRD by sample: beta (kappa + (1 - kappa) r), r the advantage mapped to [0, 1]."""

    beta: float
    kappa: float

    def value(self, step: int) -> float:
        return self.beta

    def per_sample(self, step: int, advantages: Tensor) -> Tensor:
        return self.beta * (self.kappa + (1 - self.kappa) * to_unit_interval(advantages, 5.0))


@dataclass(frozen=True)
class Targeted(Coefficient):
    """Coefficient that doubles or halves to keep a divergence near a target."""

    level: float
    target: float

    def value(self, step: int) -> float:
        return self.level

    def updated(self, divergence: float) -> Coefficient:
        return replace(self, level=self.level * (2.0 if divergence > self.target else 0.5))


def test_a_coefficient_may_differ_by_sample_or_react(fake_policy: Any) -> None:
    policy = fake_policy.make(4, 2)
    policy.mask[:] = True
    lik, a = policy.likelihoods(), torch.tensor([5.0, -5.0, 0.0, 9.0])
    rows = RewardAdaptive(0.1, 0.001).per_sample(3, a)
    torch.testing.assert_close(rows, torch.tensor([0.1, 0.0001, 0.05005, 0.1]))
    found = anchor_penalty(lik, {"base": rows, "old": Targeted(0.5, 1.0).updated(2.0).value(0)})
    expected = rows[:, None] * lik["divergence/base"] + 1.0 * lik["divergence/old"]
    torch.testing.assert_close(found, expected)
    assert torch.equal(anchor_penalty(lik, {}), torch.zeros_like(lik.logp))
    with pytest.raises(ValueError, match="divergence/ema"):
        anchor_penalty(lik, {"ema": 1.0})


@dataclass(frozen=True)
class ImportanceSampling(Objective):
    """The example of objectives/base.py."""

    def loss_and_metrics(
        self, lik: Likelihoods, advantages: Tensor, statistics: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensors]:
        ratio = lik.log_ratio("old").exp()
        return -advantages * ratio, {"ratio": ratio.detach()}


def test_an_objective_is_its_formula(fake_policy: Any) -> None:
    """The base class validates, broadcasts advantages and applies the weights of decisions."""
    lik, a, groups = fake_policy.make(4, 3).likelihoods(), torch.linspace(-1, 1, 4), torch.arange(4)
    loss, metrics = ImportanceSampling()(lik, a, groups)
    expected, of_clipped = Clipped(None, None)(lik, a, groups)
    assert torch.equal(loss, expected)
    assert torch.equal(metrics["ratio"], of_clipped["ratio"])
    with pytest.raises(ValueError, match="references/old"):
        ImportanceSampling()(without(lik, "references/old"), a, groups)
    with pytest.raises(TypeError, match="abstract class Objective"):
        Objective()


def test_refusals(fake_policy: Any) -> None:
    lik, groups, a = fake_policy.make(4, 3).likelihoods(), torch.arange(4), torch.ones(4)
    with pytest.raises(ValueError, match=r"needs \['mixed/minus', 'mixed/plus'\]"):
        NegativeAware(0.7)(without(lik, "mixed/plus", "mixed/minus"), a, groups)
    with pytest.raises(ValueError, match=r"function of the sum .* given 3 .* reduce_over_decisions"):
        Preference(decisions="sum")(lik, a, groups)
    with pytest.raises(ValueError, match=r"statistic 'delta' has shape \[2, 3\]"):
        CentredRewardDistillation()(lik, a, groups, {"delta": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=r"statistic 'delta' has shape \[4, 3\], requires_grad True"):
        CentredRewardDistillation()(lik, a, groups, {"delta": torch.zeros(4, 3, requires_grad=True)})
    with pytest.raises(ValueError, match="carry a gradient"):
        Clipped()(lik, torch.ones(4, requires_grad=True), groups)
    with pytest.raises(ValueError, match=r"advantages have shape \[3\]"):
        Clipped()(lik, torch.ones(3), groups)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_every_metric_is_defined(fake_policy: Any, objective: Objective) -> None:
    _, metrics = objective(
        reduce_over_decisions(fake_policy.make(4, 2).likelihoods(), objective.decisions), torch.ones(4), torch.arange(4)
    )
    assert metrics
    assert all(definition(METRIC_NAMES.get(name, name)) for name in metrics)
