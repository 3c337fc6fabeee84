"""The trainer with a policy small enough to write down, for every objective of tests/objectives.py."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from difrl.core import Clipped, Likelihoods, Objective
from difrl.data.prompt_order import PromptOrder
from difrl.data.prompts import Prompt
from difrl.data.rollout import Rollout, ScoredRollout
from difrl.policies.base import Decisions, NoiseKey
from difrl.policies.logprob_check import FirstUpdateError
from difrl.runtime.distributed import DistributedContext, ProcessError
from difrl.runtime.memory import MemoryShortage
from difrl.scoring import Scorer
from difrl.training.trainer import Trainer, TrainingError
from rewards import RewardError
from tests.fakes import PROMPTS, Brightness, LinearPolicy, Listed, Told, in_threads, linear_trainer
from tests.objectives import OBJECTIVES

UNCLIPPED = 1e9
"""A max_grad_norm that leaves the gradient as it is."""
SMALL = {"prompts_per_step": 2, "group_size": 2}


def steps(trainer: Trainer, count: int = 2) -> list[dict[str, float]]:
    """Return the metrics of some steps, without the times and the evaluations of a process for its check."""
    rows = [trainer.step(number) for number in range(count)]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "nfe/check"))} for row in rows]


def learnt(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """Remove the number of evaluations: micro-batches that split groups take an extra pass for their statistics."""
    return [{k: v for k, v in row.items() if k != "nfe"} for row in rows]


def assert_same(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert one == pytest.approx(other, rel=1e-6, abs=1e-9, nan_ok=True)


def trained(
    objective: Objective, processes: DistributedContext | None = None, **sections: Any
) -> tuple[Tensor, list[Any]]:
    """Return weights and metrics after two steps of two updates, with some invalid rows."""
    train = {"updates_per_step": 2, "lr": 0.01, **sections.pop("train", {})}
    dark = Brightness(fails=lambda images: images.mean((1, 2, 3)) > 0.65)
    scorer = Scorer.from_rewards({"brightness": (dark, 1.0)}, {"watched": Brightness(2.0)})
    trainer = linear_trainer(scorer=scorer, processes=processes, train=train, **sections)
    trainer.objective = objective
    rows = steps(trainer)
    return trainer.policy.parameters["weight"].detach().clone(), rows


@pytest.fixture(scope="module")
def whole() -> dict[str, tuple[Tensor, list[Any]]]:
    """Results of every objective when a step is one micro-batch, on one process."""
    return {str(o): trained(o, train={"micro_batch": 1000}) for o in OBJECTIVES}


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("size", [1, 7])
def test_micro_batches_do_not_matter(objective: Objective, size: int, whole: Mapping[str, Any]) -> None:
    """In float64 only the order of sums differs, for statistics of rows, of groups and of the batch."""
    weight, rows = trained(objective, train={"micro_batch": size})
    torch.testing.assert_close(weight, whole[str(objective)][0], rtol=1e-9, atol=1e-9)
    assert_same(learnt(rows), learnt(whole[str(objective)][1]))
    assert rows[0]["samples/invalid"] > 0


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_processes_do_not_matter(objective: Objective, whole: Mapping[str, Any]) -> None:
    for weight, rows in in_threads(2, lambda processes: trained(objective, processes, train={"micro_batch": 1000})):
        torch.testing.assert_close(weight, whole[str(objective)][0], rtol=1e-9, atol=1e-9)
        assert_same(rows, whole[str(objective)][1])


def test_collected_groups_do_not_depend_on_processes() -> None:
    """Only groups with a multiple of 7 are informative: groups 1 and 3 of three samples are drawn again, 1 twice."""

    def work(processes: DistributedContext) -> tuple[Tensor, list[Any], list[list[int]]]:
        scorer = Listed({n: float(n % 7 == 0) for n in range(48)})
        trainer = linear_trainer(scorer=scorer, processes=processes, collect={"max_draws": 4})
        rows = steps(trainer, 1)
        return trainer.policy.parameters["weight"].detach(), rows, scorer.asked

    weight, rows, asked = work(DistributedContext())
    assert asked == [list(range(12)), [15, 16, 17, 21, 22, 23], [27, 28, 29]]
    for one in in_threads(2, work):
        torch.testing.assert_close(one[0], weight, rtol=1e-9, atol=1e-9)
        assert_same(one[1], rows)


def drawn_again(trainer: Trainer) -> Rollout:
    """Return the first rollout of a trainer, drawn by a policy in its initial state."""
    policy, size = LinearPolicy(), trainer.config.data.group_size
    groups = torch.arange(trainer.config.data.prompts_per_step).repeat_interleave(size)
    chosen = PromptOrder(PROMPTS, trainer.config.data.prompts_per_step, trainer.config.seed).step(0)
    prompts = [PROMPTS[chosen[int(g)]] for g in groups]
    return policy.rollout(prompts, groups, torch.arange(len(groups)), NoiseKey(trainer.config.seed, 0))


@pytest.mark.parametrize("decisions", ["each", "mean", "sum"])
def test_gradient_is_one_mean_over_what_counts(decisions: str) -> None:
    """∇ = Σ_valid (−A ∇ℓ + c ∇D) / count, with advantages and sums over a sample written out as loops."""
    scorer = Scorer.from_rewards({"b": (Brightness(3.0, fails=lambda images: images.mean((1, 2, 3)) > 0.6), 1.0)}, {})
    sections = {"train": {"max_grad_norm": UNCLIPPED, "micro_batch": 5}, "advantage": {"std": "none"}}
    trainer = linear_trainer(scorer=scorer, **sections)
    trainer.objective = Clipped(None, None, decisions=decisions)  # type: ignore[arg-type]
    rollout = drawn_again(trainer)
    row = trainer.step(0)

    policy = LinearPolicy()
    lik = policy.likelihoods(rollout, policy.decisions(rollout, NoiseKey(0, 0)))
    scored = scorer(rollout)
    assert 0 < scored.valid.sum() < len(scored)
    total, count = torch.zeros(()), 0
    for i in range(len(rollout)):
        mates = [k for k in range(len(rollout)) if rollout.groups[k] == rollout.groups[i] and scored.valid[k]]
        if not scored.valid[i]:
            continue
        advantage = scored.rewards[i] - scored.rewards[mates].mean() if len(mates) > 1 else 0.0
        js = [j for j in range(4) if rollout.replay_data["mask"][i, j]]
        weights = [float(lik["weight"][i, j]) for j in js] if "weight" in lik.terms else [1.0]
        terms = [(lik.logp[i, j], lik["divergence/base"][i, j]) for j in js]
        if decisions == "each":
            for (logp, divergence), weight in zip(terms, weights, strict=True):
                total = total - advantage * weight * logp + 0.3 * divergence
            count += len(js)
        else:
            share = len(js) if decisions == "mean" else 1
            logp, divergence = (sum(term[n] for term in terms) / share for n in (0, 1))
            total = total - advantage * sum(weights) / len(js) * logp + 0.3 * divergence
            count += 1
    (total / count).backward()
    expected = policy.weight.grad
    assert expected is not None
    found = trainer.policy.parameters["weight"].grad
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)  # rewards are float32
    assert row["grad_norm"] == pytest.approx(float(expected.norm()), rel=1e-5)


class Whole(LinearPolicy):
    """A policy that evaluates a sample's decisions together, as a language model does."""

    def decisions(self, rollout: Rollout, key: NoiseKey) -> Decisions:
        return replace(super().decisions(rollout, key), whole=True)


@pytest.mark.parametrize("per", ["decision", "sample", "length"])
@pytest.mark.parametrize("count", [1, 2])
def test_aggregation_by_loops(per: str, count: int) -> None:
    """∇ = Σ_i Σ_j (−A_i ∇ℓ_ij + c ∇D_ij) / n_i over valid samples, where n_i is the divisor of the aggregation; J = 4."""

    def gradient(processes: DistributedContext) -> tuple[Tensor | None, Rollout, ScoredRollout]:
        scorer = Scorer.from_rewards(
            {"b": (Brightness(3.0, fails=lambda images: images.mean((1, 2, 3)) > 0.6), 1.0)}, {}
        )
        sections = {"train": {"max_grad_norm": UNCLIPPED, "micro_batch": 5}, "advantage": {"std": "none"}}
        trainer = linear_trainer(scorer=scorer, processes=processes, policy=Whole(), **sections)
        # A recipe of this policy would be one of images, for which the choice is not offered.
        trainer.config = trainer.config.model_copy(
            update={"train": trainer.config.train.model_copy(update={"aggregation": per})}
        )
        trainer.objective = Clipped(None, None)
        rollout = drawn_again(trainer)
        trainer.step(0)
        return trainer.policy.parameters["weight"].grad, rollout, scorer(rollout)

    (found, rollout, scored), *others = [gradient(DistributedContext())] if count == 1 else in_threads(count, gradient)
    policy = LinearPolicy()
    lik = policy.likelihoods(rollout, policy.decisions(rollout, NoiseKey(0, 0)))
    valid = scored.valid.nonzero().flatten().tolist()
    decisions = int(rollout.replay_data["mask"][valid].sum())
    total = torch.zeros(())
    for i in valid:
        mates = [k for k in valid if rollout.groups[k] == rollout.groups[i]]
        advantage = scored.rewards[i] - scored.rewards[mates].mean()
        length = int(rollout.replay_data["mask"][i].sum())
        divisor = {"decision": decisions, "sample": len(valid) * length, "length": len(valid) * 4}[per]
        for j in range(length):
            weight = float(lik["weight"][i, j]) if "weight" in lik.terms else 1.0
            total = total + (-advantage * weight * lik.logp[i, j] + 0.3 * lik["divergence/base"][i, j]) / divisor
    total.backward()
    assert 0 < len(valid) < len(rollout)
    for one in (found, *(other[0] for other in others)):
        torch.testing.assert_close(one, policy.weight.grad, rtol=1e-5, atol=1e-8)  # rewards are float32


class Table(LinearPolicy):
    """A policy with one decision a sample, whose ratio and divergence are listed; dℓ/dW = 1."""

    RATIO = torch.tensor([1.5, 0.5, 1.0, 1.2, 1.0, 1.0, 100.0, 1.0], dtype=torch.float64)
    DIVERGENCE = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0, 0.0, 9.0, 0.0], dtype=torch.float64)

    def __init__(self) -> None:
        super().__init__(dims=1, columns=1)

    def likelihoods(self, rollout: Rollout, decisions: Decisions, *rest: Any) -> Likelihoods:
        self.evaluations += len(rollout)
        logp = self.RATIO.log()[rollout.samples][:, None] + (self.weight - self.weight.detach())
        divergence = self.DIVERGENCE[rollout.samples][:, None]
        return Likelihoods(
            logp, decisions.mask, {"references/old": torch.zeros_like(divergence), "divergence/base": divergence}
        )

    def rollout_logprobs(self, rollout: Rollout, decisions: Decisions, unlike: int = 0) -> Tensor:
        return self.RATIO.log()[rollout.samples][:, None]


@pytest.mark.parametrize("size", [1, 100])
def test_metrics_by_hand(size: int) -> None:
    """Four pairs with rewards (1, 0), (3, 1), (2, 2) and (unscored, 5): advantages ±1/2, ±1, 0, 0; bounds 0.9, 1.1.

    loss: −0.55 (clipped above), 0.45 (clipped below), −1, 1.2 and three zeros; its gradient: 0, 0, −1, 1.2, 0, 0, 0.
    """
    rewards = dict(enumerate([1.0, 0.0, 3.0, 1.0, 2.0, 2.0, None, 5.0]))
    sections = {"data": {"prompts_per_step": 4, "group_size": 2}, "advantage": {"std": "none"}}
    trainer = linear_trainer(
        policy=Table(), scorer=Listed(rewards), train={"micro_batch": size, "max_grad_norm": UNCLIPPED}, **sections
    )
    row = trainer.step(0)
    expected = {
        "reward/mean": 14 / 7,
        "reward/listed": 14 / 8,
        "groups/zero_std": 2 / 4,
        "samples/invalid": 1 / 8,
        "loss/objective": 0.1 / 7,
        "kl/base": 1.0 / 7,
        "coefficient/base": 0.3,
        "loss": 0.1 / 7 + 0.3 * 1.0 / 7,
        "ratio/mean": 7.2 / 7,
        "ratio/std": math.sqrt(0.54 / 7 - (0.2 / 7) ** 2),
        "clip/high": 1 / 7,
        "clip/low": 1 / 7,
        "approx_kl": (0.5 - math.log(1.5) - 0.5 - math.log(0.5) + 0.2 - math.log(1.2)) / 7,
        "grad_norm": 0.2 / 7,
        "lr": 1e-3,
        "nfe": 16,
        "nfe/check": 0,
        "updates/skipped": 0,
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert row.keys() - expected.keys() == {"diversity/pixels", "time/rollout", "time/score", "time/update"}
    assert trainer.step(1)["nfe"] == 32


def test_spread_of_ratios_is_seen_below_float32() -> None:
    """Published clip ranges are as small as 1e-5, so the spread must not be lost in the rounding of squares near 1."""

    class Near(Table):
        RATIO = 1 + 1e-5 * torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
        DIVERGENCE = torch.zeros(4, dtype=torch.float64)

        def likelihoods(self, rollout: Rollout, decisions: Decisions, *rest: Any) -> Likelihoods:
            lik = super().likelihoods(rollout, decisions)
            return lik.map(lambda x: x if x.dtype == torch.bool else x.float())

    row = linear_trainer(policy=Near(), scorer=Listed(dict.fromkeys(range(4), 0.0)), data=SMALL).step(0)
    assert row["ratio/std"] == pytest.approx(1e-5, rel=0.01)


def test_updates_take_whole_groups_in_turn() -> None:
    trainer = linear_trainer(data={"prompts_per_step": 6, "group_size": 2}, train={"updates_per_step": 3})
    trainer.step(0)
    policy = trainer.policy
    assert isinstance(policy, LinearPolicy)
    assert [(key.purpose, samples) for key, samples in policy.seen] == [
        ("train/0", [0, 1, 2, 3]),
        ("train/1", [4, 5, 6, 7]),
        ("train/2", [8, 9, 10, 11]),
    ]


@dataclass(frozen=True)
class Recording(Clipped):
    """The objective Clipped, which records the ratios of every call."""

    ratios: list[Tensor] = field(default_factory=list)

    def __call__(
        self, lik: Any, advantages: Any, groups: Any, statistics: Any = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().__call__(lik, advantages, groups, statistics)
        self.ratios.append(torch.where(lik.mask, metrics["ratio"], 1.0))
        return loss, metrics


def test_later_updates_are_measured_against_the_weights_that_drew() -> None:
    trainer = linear_trainer(train={"updates_per_step": 2, "micro_batch": 1000, "lr": 0.01})
    trainer.objective = objective = Recording()
    trainer.step(0)
    first, second = objective.ratios
    torch.testing.assert_close(first, torch.ones_like(first))
    assert (second - 1).abs().max() > 1e-3
    trainer.step(1)
    torch.testing.assert_close(objective.ratios[2], torch.ones_like(first))  # old is what drew this step


def test_prompts_and_sample_numbers_of_a_step() -> None:
    scorer = Listed(dict.fromkeys(range(4), 1.0))
    seen: list[Rollout] = []

    def recording(rollout: Rollout) -> ScoredRollout:
        seen.append(rollout)
        return scorer(rollout)

    trainer = linear_trainer(scorer=Told(recording), data=SMALL)
    steps(trainer, 3)
    order = PromptOrder(PROMPTS, 2, trainer.config.seed)
    for number, rollout in enumerate(seen):
        assert [p.text for p in rollout.prompts] == [PROMPTS[i].text for i in order.step(number) for _ in range(2)]
        assert rollout.groups.tolist() == [0, 0, 1, 1]
        assert rollout.samples.tolist() == [0, 1, 2, 3]


def test_idle_groups_are_drawn_again_with_other_prompts_and_noise() -> None:
    rewards = {0: 0.0, 1: 1.0, 2: 1.0, 3: 1.0, 6: 0.0, 7: 2.0}
    scorer = Listed(rewards)
    trainer = linear_trainer(scorer=scorer, data=SMALL, collect={"max_draws": 3})
    row = trainer.step(0)
    assert scorer.asked == [[0, 1, 2, 3], [6, 7]]
    assert isinstance(trainer.policy, LinearPolicy)
    assert trainer.policy.seen[0][1] == [0, 1, 6, 7]
    assert row["reward/mean"] == pytest.approx(5 / 6)  # of everything drawn, not of what was kept
    assert row["groups/zero_std"] == pytest.approx(1 / 3)
    assert row["nfe"] == 6 * 4 + 4 * 4


@pytest.mark.parametrize("draws", [1, 2, 10])
def test_an_epoch_meets_every_prompt_once_however_often_groups_are_drawn_again(draws: int) -> None:
    """1,000 prompts in 40 steps. Every third sample is rewarded, so groups of two often have equal rewards."""
    seen: list[list[str]] = []

    def recording(rollout: Rollout) -> ScoredRollout:
        seen.append([prompt.text for prompt in rollout.prompts[::2]])
        return Listed({n: float(n % 3 == 0) for n in rollout.samples.tolist()})(rollout)

    prompts = [Prompt(str(n), {}) for n in range(1000)]
    data = {"prompts_per_step": 25, "group_size": 2}
    trainer = linear_trainer(scorer=Told(recording), data=data, collect={"max_draws": draws}, prompts=prompts)
    first, again = list[str](), 0
    for number in range(40):
        trainer.step(number)
        first += seen[0]
        again += len(seen) - 1
        assert not {text for later in seen[1:] for text in later} & set(seen[0])
        seen.clear()
    assert sorted(first, key=int) == [prompt.text for prompt in prompts]
    assert (again > 0) == (draws > 1)


def test_groups_may_have_to_differ_in_one_of_the_rewards() -> None:
    """Both groups differ by length. All answers of group 0 are correct, so it is drawn again."""
    right = Listed({0: 1.0, 1: 1.0, 2: 0.0, 3: 1.0, 4: 1.0, 5: 0.0})
    length = {0: 0.0, 1: -0.5, 2: 0.0, 3: -0.5, 4: 0.0, 5: -0.5}

    class Both(Listed):
        def __call__(self, rollout: Rollout) -> ScoredRollout:
            scored = right(rollout)
            long = torch.tensor([length[n] for n in rollout.samples.tolist()])
            parts = {"reward/Right": scored.rewards, "reward/Long": long}
            return replace(scored, rewards=scored.rewards + long, parts=parts)

    rewards = [{"import": "nowhere:Right"}, {"import": "nowhere:Long"}]
    trainer = linear_trainer(scorer=Both({}), data=SMALL, rewards=rewards, collect={"max_draws": 2, "by": "Right"})
    row = trainer.step(0)
    assert right.asked == [[0, 1, 2, 3], [4, 5]]
    assert row["groups/zero_std"] == 0.0  # of the sums


def test_a_sample_may_stand_alone_where_nothing_is_compared() -> None:
    """Plain REINFORCE, whose advantage is the reward itself."""
    alone = {"data": {"prompts_per_step": 4, "group_size": 1}, "advantage": {"baseline": "none", "std": "none"}}
    trainer = linear_trainer(scorer=Listed({0: 1.0, 1: 0.0, 2: 2.0, 3: 1.0}), eval={"diversity": ["pixels"]}, **alone)
    row = steps(trainer, 1)[0]
    assert row["reward/mean"] == pytest.approx(1.0)
    assert row["groups/zero_std"] == 1.0
    assert row["grad_norm"] > 0


def test_learning_rate_schedule_reaches_the_optimizer() -> None:
    """Adam's first step moves every weight by the learning rate; a rate of 0 moves nothing."""
    schedule = {"kind": "linear", "start": 0.02, "end": 0.0, "steps": 2}
    trainer = linear_trainer(train={"lr": schedule})
    weight = trainer.policy.parameters["weight"]
    places, rates = [weight.detach().clone()], []
    for number in range(3):
        rates.append(trainer.step(number)["lr"])
        places.append(weight.detach().clone())
    assert rates == pytest.approx([0.02, 0.01, 0.0])
    torch.testing.assert_close((places[1] - places[0]).abs(), torch.full_like(weight, 0.02), rtol=1e-4, atol=0)
    assert not torch.equal(places[2], places[1])
    assert torch.equal(places[3], places[2])


def test_coefficient_schedule_reaches_the_anchor() -> None:
    """With equal rewards only the anchor pulls: the gradient is coefficient(step) · ∇D."""
    norms = []
    for coefficient in (1.0, {"kind": "linear", "start": 0.0, "end": 1.0, "steps": 4}):
        trainer = linear_trainer(
            scorer=Listed(dict.fromkeys(range(12), 1.0)),
            anchors=[{"to": "base", "coefficient": coefficient}],
            train={"max_grad_norm": UNCLIPPED},
        )
        norms.append(trainer.step(2)["grad_norm"])
    assert norms[0] > 0
    assert norms[1] == pytest.approx(0.5 * norms[0])


def test_gradient_is_clipped_by_its_global_norm() -> None:
    trainer = linear_trainer(train={"max_grad_norm": 1e-3})
    assert trainer.step(0)["grad_norm"] > 1e-3  # as it was before
    grad = trainer.policy.parameters["weight"].grad
    assert grad is not None
    assert float(grad.norm()) == pytest.approx(1e-3, rel=1e-3)


def test_gradient_that_is_not_finite_leaves_the_weights() -> None:
    class Broken(LinearPolicy):
        def likelihoods(self, rollout: Rollout, decisions: Decisions, *rest: Any) -> Likelihoods:
            lik = super().likelihoods(rollout, decisions)
            steep = lik.logp + math.inf * (self.weight - self.weight.detach()).sum()
            return Likelihoods(torch.where(steep.isnan(), lik.logp, steep), lik.mask, lik.terms)

    trainer = linear_trainer(policy=Broken())
    before = trainer.policy.parameters["weight"].detach().clone()
    with pytest.raises(TrainingError, match=r"step 0, update 0: the gradient is .* weights were left as they are"):
        trainer.step(0)
    assert torch.equal(trainer.policy.parameters["weight"], before)
    assert not trainer.optimizer.state


def test_step_without_any_score_says_so() -> None:
    trainer = linear_trainer(scorer=Listed(dict.fromkeys(range(12), None)))
    with pytest.raises(TrainingError, match="step 0: no sample could be scored"):
        trainer.step(0)


@pytest.mark.parametrize("unscored", [0, 1])
def test_an_update_without_any_score_is_left_out_and_counted(unscored: int) -> None:
    """Of two updates of two groups each, the other one has the effect that it would have alone, but for the anchor."""
    scores = {n: None if n // 6 == unscored else float(n % 3) for n in range(12)}
    trainer = linear_trainer(scorer=Listed(scores), train={"updates_per_step": 2})
    before = trainer.policy.parameters["weight"].detach().clone()
    row = trainer.step(0)
    assert row["updates/skipped"] == 1
    assert row["samples/invalid"] == 0.5
    assert math.isfinite(row["loss"])
    assert row["grad_norm"] > 0
    states = list(trainer.optimizer.state.values())
    assert [float(state["step"]) for state in states] == [1.0]
    assert not torch.equal(trainer.policy.parameters["weight"], before)


def test_the_check_is_made_at_the_first_update_that_there_is() -> None:
    scores = {n: None if n < 6 else float(n % 3) for n in range(12)}
    with pytest.raises(FirstUpdateError):
        linear_trainer(policy=Misled(trained=0.01), scorer=Listed(scores), train={"updates_per_step": 2}).step(0)


def test_a_step_in_which_a_reward_fails_changes_nothing() -> None:
    """The reward fails on the only process, or on one of two: all stop, so none waits forever."""

    def work(processes: DistributedContext) -> tuple[bool, str]:
        def score(rollout: Rollout) -> ScoredRollout:
            if processes.rank == processes.count - 1:
                raise RewardError("mine", "the server is gone")
            return Listed(dict.fromkeys(range(12), 1.0))(rollout)

        trainer = linear_trainer(scorer=Told(score), processes=processes)
        with pytest.raises((RewardError, ProcessError)) as caught:
            trainer.step(0)
        return trainer.intact, str(caught.value)

    assert work(DistributedContext()) == (True, "reward 'mine' failed: the server is gone")
    one, two = in_threads(2, work)
    assert one == (True, "a reward failed on another process; its message is among the output above")
    assert two == (True, "reward 'mine' failed: the server is gone")


def test_a_failure_after_an_update_says_that_the_state_is_of_no_whole_step() -> None:
    class Failing(LinearPolicy):
        def decisions(self, rollout: Rollout, key: NoiseKey) -> Decisions:
            if key.purpose == "train/1":
                raise KeyError(key.purpose)
            return super().decisions(rollout, key)

    trainer = linear_trainer(policy=Failing(), train={"updates_per_step": 2})
    with pytest.raises(KeyError):
        trainer.step(0)
    assert not trainer.intact


@pytest.mark.parametrize(
    ("method", "stage", "advice"),
    [("rollout", "rollout", r"rollout\.batch \(now 5"), ("likelihoods", "update", r"train\.micro_batch \(now 7")],
)
def test_a_shortage_of_memory_names_what_needs_less(method: str, stage: str, advice: str) -> None:
    policy = LinearPolicy()

    def short(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nOf the allocated memory …")

    setattr(policy, method, short)
    with pytest.raises(MemoryShortage, match=rf"memory ran out in the {stage}: .*{advice}.*20\.00 GiB\.\)$"):
        linear_trainer(policy=policy).step(0)


def test_micro_batches_are_views() -> None:
    """Micro-batches copy no replay data, and images are freed before the updates."""
    seen: list[Rollout] = []

    class Looking(LinearPolicy):
        def likelihoods(self, rollout: Rollout, decisions: Decisions, *rest: Any) -> Likelihoods:
            seen.append(rollout)
            return super().likelihoods(rollout, decisions)

    linear_trainer(policy=Looking()).step(0)
    assert len({r.replay_data["noise"].untyped_storage().data_ptr() for r in seen}) == 1
    assert all(r.images is None for r in seen)


class Misled(LinearPolicy):
    """A policy whose likelihoods, or those of the sampler's weights, differ from the recorded ones."""

    def __init__(self, *, trained: float = 0.0, drew: float = 0.0) -> None:
        super().__init__()
        self.trained, self.drew = trained, drew
        self.calls: list[str] = []

    def likelihoods(self, rollout: Rollout, decisions: Decisions, *rest: Any) -> Likelihoods:
        self.calls.append("likelihoods")
        lik = super().likelihoods(rollout, decisions)
        return replace(lik, logp=lik.logp + self.trained)

    def recompute_logprobs(self, rollout: Rollout, decisions: Decisions) -> Tensor:
        self.calls.append("replayed")
        return super().recompute_logprobs(rollout, decisions) + self.drew


ELSEWHERE = {"rollout": {"kernel": "flow_sde", "noise_level": 0.7, "snapshot": "old"}, "snapshots": {"old": {}}}


def test_likelihood_that_differs_from_the_samplers_stops_the_run() -> None:
    linear_trainer(policy=Misled()).step(0)
    with pytest.raises(FirstUpdateError, match="guidance differs"):
        linear_trainer(policy=Misled(trained=0.01)).step(0)


def test_samples_of_other_weights_are_checked_with_those_weights() -> None:
    """θ itself need not agree. The other weights are evaluated before the differentiable pass, not after it."""
    policy = Misled(trained=0.01)
    linear_trainer(policy=policy, train={"micro_batch": 1000}, **ELSEWHERE).step(0)
    assert policy.calls == ["replayed", "likelihoods"]
    with pytest.raises(FirstUpdateError):
        linear_trainer(policy=Misled(drew=0.01), **ELSEWHERE).step(0)


def test_check_looks_at_rows_that_count() -> None:
    """The first four samples could not be scored, so others are compared."""
    scores = {n: None if n < 4 else float(n) for n in range(12)}
    sections = {"train": {"micro_batch": 1000}}
    with pytest.raises(FirstUpdateError):
        linear_trainer(policy=Misled(trained=0.01), scorer=Listed(scores), **sections).step(0)


@pytest.mark.parametrize(("groups", "updates"), [(3, 1), (4, 4)])
def test_groups_that_cannot_be_shared_out_are_refused(groups: int, updates: int) -> None:
    sections = {"data": {"prompts_per_step": groups}, "train": {"updates_per_step": updates}}
    message = rf"data.prompts_per_step: found {groups}, expected a multiple .* of processes \(2\) times .*\({updates}\)"
    with pytest.raises(TrainingError, match=message):
        in_threads(2, lambda processes: linear_trainer(processes=processes, **sections))
