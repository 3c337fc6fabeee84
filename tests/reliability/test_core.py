"""Random calls of the core: finite numbers in give finite numbers and gradients out, whatever the order and the batch."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from difrl.core import (
    F_DIVERGENCES,
    LOSS_ESTIMATORS,
    Likelihoods,
    Objective,
    advantages,
    aggregation_weights,
    anchor_penalty,
    gdpo_advantages,
    group_mean_std,
    group_softmax,
    reduce_over_decisions,
    scale_by_sign,
    weighted_mean,
)
from tests.objectives import OBJECTIVES
from tests.reliability.tally import Tally

FLOATS = (torch.float32, torch.float64)
SPREADS = (0.0, 1e-6, 1e-2, 1.0, 10.0)
"""Standard deviations of log-ratios; at 10 some ratios are about e³⁰."""


@dataclass
class Draws:
    """Tensors of one trial, drawn by their own generators."""

    index: int

    def __post_init__(self) -> None:
        self.pick = random.Random(self.index)
        self.generator = torch.Generator().manual_seed(self.index)

    def normal(self, *shape: int, spread: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
        return (torch.randn(*shape, generator=self.generator, dtype=torch.float64) * spread).to(dtype)

    def chance(self, *shape: int, share: float) -> Tensor:
        return torch.rand(*shape, generator=self.generator) < share

    def groups(self) -> Tensor:
        """Return the ids of up to five groups of up to six samples, in any order."""
        ids = self.pick.sample([-7, 0, 1, 5, 2**40], self.pick.randint(1, 5))
        rows = [group for group in ids for _ in range(self.pick.randint(1, 6))]
        self.pick.shuffle(rows)
        return torch.tensor(rows)

    def rewards(self, count: int, dtype: torch.dtype) -> Tensor:
        match self.pick.randrange(4):
            case 0:
                return torch.full((count,), self.pick.choice([0.0, 1.0, -3.5]), dtype=dtype)
            case 1:
                return self.chance(count, share=0.5).to(dtype)
            case 2:
                return self.normal(count, spread=self.pick.choice([1e-12, 1e-3, 1e6]), dtype=dtype) + 1e3
            case _:
                return self.normal(count, dtype=dtype)


def likelihoods(draws: Draws, objective: Objective, rows: int, dtype: torch.dtype) -> Likelihoods:
    """Return the terms that an objective needs, with NaN in the masked elements of the references."""
    columns, spread = draws.pick.randint(1, 5), draws.pick.choice(SPREADS)
    logp = draws.normal(rows, columns, spread=10.0, dtype=dtype)
    mask = draws.chance(rows, columns, share=draws.pick.choice([1.0, 0.7, 0.1]))
    terms: dict[str, Tensor] = {}
    for name in sorted(objective.needs):
        term = draws.normal(rows, columns, spread=spread, dtype=dtype)
        if name.startswith(("references/", "mixed/")):
            term = logp + term
        elif name == "bias":
            term = term.abs()
        elif name == "scale":
            term = draws.normal(rows, columns, dtype=dtype).abs().clamp(max=1.0)  # so that ρ̃ is a number of float32
        terms[name] = torch.where(mask, term, torch.nan) if name.startswith("references/") else term
    terms["divergence/base"] = draws.normal(rows, columns, dtype=dtype).abs()
    if draws.pick.random() < 0.3:
        terms["weight"] = draws.normal(rows, columns, dtype=dtype).abs()
    return Likelihoods(logp, mask, terms)


def loss_of(objective: Objective, lik: Likelihoods, given: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss [B, J], its reduction and the gradient of that in logp; masked elements are 0."""
    leaf = lik.logp.detach().clone().requires_grad_()
    # Mixed likelihoods are functions of θ too.
    mixed = {name: leaf + (term - lik.logp) for name, term in lik.terms.items() if name.startswith("mixed/")}
    reduced = reduce_over_decisions(Likelihoods(leaf, lik.mask, {**lik.terms, **mixed}), objective.decisions)
    loss, metrics = objective(reduced, given, groups)
    weights, count = aggregation_weights(reduced.mask)
    total = weighted_mean(loss + anchor_penalty(reduced, {"base": 0.1}), weights, count.clamp(min=1))
    (grad,) = torch.autograd.grad(total, leaf)
    for name, metric in metrics.items():
        assert metric[reduced.mask].isfinite().all(), f"metric {name}"
    assert loss[reduced.mask].isfinite().all(), "loss"
    assert total.isfinite(), "total"
    assert grad.isfinite().all(), "gradient"
    assert not grad[~lik.mask].any(), "gradient of masked elements"
    return torch.where(reduced.mask, loss, 0.0).detach(), total.detach(), grad


def test_objectives(tally: Tally) -> None:
    """A permutation of the rows permutes losses and gradients; whole further groups do not change those of a group."""
    for index in tally.trials(short=150, long=6_000):
        draws = Draws(index)
        objective, dtype = OBJECTIVES[index % len(OBJECTIVES)], draws.pick.choice(FLOATS)
        groups = draws.groups()
        rows = len(groups)
        lik = likelihoods(draws, objective, rows, dtype)
        given = draws.normal(rows, spread=draws.pick.choice([0.0, 1e-3, 1.0, 5.0]), dtype=dtype)
        with tally.trial(f"{index}: {objective}, {rows} rows, {dtype}"):
            loss, total, grad = loss_of(objective, lik, given, groups)
            tolerance = {
                "rtol": 1e-9 if dtype == torch.float64 else 1e-3,
                "atol": 1e-9 if dtype == torch.float64 else 1e-4,
            }
            tolerance["atol"] *= max(1.0, float(loss.abs().max()), float(grad.abs().max()))
            if given.unique().numel() == rows:  # among equal advantages the first row counts as the best
                order = torch.tensor(draws.pick.sample(range(rows), rows))
                again, total_again, grad_again = loss_of(objective, lik.select(order), given[order], groups[order])
                torch.testing.assert_close(again, loss[order], **tolerance)
                torch.testing.assert_close(total_again, total, **tolerance)
                torch.testing.assert_close(grad_again, grad[order], **tolerance)
            if objective.scope != "batch":
                part = groups == groups[0]
                alone, _, _ = loss_of(objective, lik.select(part), given[part], groups[part])
                torch.testing.assert_close(alone, loss[part], **tolerance)


def test_advantages(tally: Tally) -> None:
    """Rows that are not valid have no part, groups without a difference get 0, and the order of rows does not matter."""
    for index in tally.trials(short=100, long=3_000):
        draws = Draws(index)
        groups, dtype = draws.groups(), draws.pick.choice(FLOATS)
        rows = len(groups)
        valid = draws.chance(rows, share=draws.pick.choice([1.0, 0.6, 0.0]))
        rewards = torch.where(valid, draws.rewards(rows, dtype), torch.nan)
        baseline, std = (
            draws.pick.choice(["mean", "leave_one_out", "none"]),
            draws.pick.choice(["group", "global", "none", "beta"]),
        )
        clip, order = draws.pick.choice([None, 5.0]), torch.tensor(draws.pick.sample(range(rows), rows))
        with tally.trial(f"{index}: {baseline}, {std}, {rows} rows, {dtype}"):
            if std == "beta":
                rewards = rewards.clamp(0, 1)
            found = advantages(rewards, groups, valid, baseline=baseline, std=std, clip=clip)
            again = advantages(rewards[order], groups[order], valid[order], baseline=baseline, std=std, clip=clip)
            assert found.dtype == dtype
            assert found.isfinite().all()
            assert not found[~valid].any()
            scale = max(1.0, float(rewards.nan_to_num().abs().max()) if std == "none" else 1.0)
            torch.testing.assert_close(again, found[order], rtol=1e-6, atol=1e-6 * scale)
            if baseline != "none" or std != "none":
                for group in groups.unique() if baseline != "none" or std == "group" else []:
                    members = (groups == group) & valid
                    if rewards[members].unique().numel() < 2:
                        assert not found[members].any(), "a group without a difference"
            signed = scale_by_sign(found, 0.0, 2.0)
            assert signed.isfinite().all()
            assert not signed[found > 0].any()
            columns = {"one": rewards, "two": torch.where(valid, draws.rewards(rows, dtype), torch.nan)}
            both = gdpo_advantages(columns, {"one": 1.0, "two": -0.5}, groups, valid, clip=clip)
            assert both.isfinite().all()
            assert not both[~valid].any()


def test_divergences_and_statistics_of_groups(tally: Tally) -> None:
    """Estimates and exact divergences are finite; exact ones are not negative, and 0 for equal distributions."""
    for index in tally.trials(short=50, long=1_000):
        draws = Draws(index)
        dtype, spread = draws.pick.choice(FLOATS), draws.pick.choice(SPREADS[:4])
        p = draws.normal(3, 7, spread=spread, dtype=dtype).log_softmax(-1).requires_grad_()
        q = draws.normal(3, 7, spread=spread, dtype=dtype).log_softmax(-1)
        name = sorted(F_DIVERGENCES)[index % len(F_DIVERGENCES)]
        with tally.trial(f"{index}: {name}, {spread}, {dtype}"):
            divergence = F_DIVERGENCES[name](draws.pick.choice([0.3, 0.5, 0.9]))
            exact = divergence.full(p, q)
            assert exact.isfinite().all()
            assert (exact >= -1e-6).all(), "negative"
            assert divergence.full(q, q).abs().max() < 1e-6, "of equal distributions"
            parts = [exact.sum(), divergence.estimate_from_policy_samples(p - q).sum()]
            parts += [divergence.estimate_from_reference_samples(p - q).sum()]
            parts += [estimator(p, q).sum() for estimator in LOSS_ESTIMATORS.values()]
            for part in parts:
                assert part.isfinite()
                (grad,) = torch.autograd.grad(part, p, retain_graph=True)
                assert grad.isfinite().all()
            groups = draws.groups()
            x, mask = draws.normal(len(groups), 2, spread=100.0, dtype=dtype), draws.chance(len(groups), 2, share=0.7)
            shares = group_softmax(groups, x, mask)
            assert shares.isfinite().all()
            assert not shares[~mask].any()
            mean, std = group_mean_std(groups, x)
            for group in groups.unique():
                rows = x[groups == group].double()
                torch.testing.assert_close(mean[groups == group][0].double(), rows.mean(0), rtol=1e-5, atol=1e-4)
                torch.testing.assert_close(
                    std[groups == group][0].double(), rows.std(0, correction=0), rtol=1e-5, atol=1e-4
                )
                held = mask[groups == group].any(0)
                torch.testing.assert_close(shares[groups == group].sum(0), held.double())
