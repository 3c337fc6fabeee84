"""Anchors, their coefficients and their snapshots through the real trainer, by hand and against known fixed points."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from difrl.config.load import read_config
from difrl.config.yaml_source import ConfigError
from difrl.core import Likelihoods, PerRewardAdvantage, TotalRewardAdvantage
from difrl.data.prompts import Prompt
from difrl.data.rollout import Rollout, ScoredRollout
from difrl.policies.base import Decisions, NoiseKey, Part, Penalty
from difrl.policies.evaluation import StoredEvaluation
from difrl.policies.layout import Layout
from difrl.policies.snapshots import Snapshots
from difrl.runtime.distributed import DistributedContext
from difrl.training import checkpoint
from difrl.training.checkpoint import CheckpointError
from difrl.training.step_metrics import Clock
from difrl.training.trainer import Trainer
from samplers import keyed
from tests.fakes import Listed, Told, in_threads, linear_trainer
from tests.helpers import forget_state, without_times
from tests.recipes import FLOW_GRPO, recipe

DIMS = 2
NOTHING = NoiseKey(0, 0)


class Chain:
    """x_1 ~ N(θ_1, 1), x_2 ~ N(x_1 + θ_2, 1) per dimension: log N is summed over dimensions, and base is θ = 0.

    `drawn` and `compared` keep the weights of the sampler and of ℓ_old at every call.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.theta = nn.Parameter(torch.zeros(2, DIMS, dtype=torch.float64))
        decays = {name: s.build(config.train) for name, s in config.snapshots.items()}
        self.snapshots = Snapshots(Layout({"theta": self.theta}), decays, self._no_base)
        self.evaluations = 0
        self.drawn: list[Tensor] = []
        self.compared: list[Tensor] = []

    def _no_base(self) -> Any:
        raise AssertionError("the base is written out below")

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        return self.snapshots.parameters

    def weights(self, snapshot: str) -> Tensor:
        with self.snapshots.use(snapshot):
            return self.theta.detach().clone()

    def rollout(self, prompts: Sequence[Prompt], groups: Tensor, samples: Tensor, key: NoiseKey) -> Rollout:
        theta = self.weights(self.config.rollout.snapshot)
        self.drawn.append(theta)
        noise = keyed(
            (2, DIMS), seed=key.seed, step=key.step, samples=samples, use="noise", dtype=torch.float64, device="cpu"
        )
        x = (theta + noise).cumsum(dim=1)
        tape = {"x": x, "log_prob": log_normal(x, theta)}
        return Rollout(
            tuple(prompts), groups, samples, tape, x.mean(-1)[:, :1, None, None].sigmoid().expand(-1, 3, 2, 2)
        )

    def drawing(self, *snapshots: str, alike: bool = True) -> AbstractContextManager[None]:
        return self.snapshots.gathered(*snapshots)

    def decisions(self, rollout: Rollout, key: NoiseKey) -> Decisions:
        return Decisions(rollout.replay_data, torch.ones_like(rollout.replay_data["log_prob"], dtype=torch.bool))

    def evaluate_references(
        self, rollout: Rollout, decisions: Decisions, parts: Sequence[Part], needs: Any
    ) -> list[dict[str, StoredEvaluation]]:
        return [{} for _ in parts]

    def likelihoods(self, rollout: Rollout, decisions: Decisions, *rest: Any) -> Likelihoods:
        x = decisions.tensors["x"]
        x = x if x.ndim == 3 else x[:, None]
        old = decisions.tensors["log_prob"]
        if self.config.likelihood.old == "recompute":
            self.compared.append(self.weights("old"))
            old = log_normal(x, self.compared[-1])
        logp = log_normal(x, self.theta)
        divergence = (self.theta.square().sum(-1) / 2).expand_as(logp)
        terms = {f"divergence/{a.label}": divergence for a in self.config.anchors}
        return Likelihoods(logp, decisions.mask, {"references/old": old, **terms})

    def rollout_logprobs(self, rollout: Rollout, decisions: Decisions, unlike: int = 0) -> Tensor:
        return decisions.tensors["log_prob"]

    recompute_logprobs = rollout_logprobs

    def references_equal_to_policy(self) -> list[str]:
        return []

    def penalties(
        self, rollout: Rollout, decisions: Decisions, parts: Sequence[Part], names: Any
    ) -> Iterator[dict[str, Penalty]]:
        base = log_normal(decisions.tensors["x"], torch.zeros_like(self.theta))
        estimate = decisions.tensors["log_prob"] - base
        for rows, columns in parts:
            yield {"base": Penalty(estimate[rows, columns], estimate[rows, columns])}


def log_normal(x: Tensor, theta: Tensor) -> Tensor:
    """ℓ [B, 2] of chains [B, 2, DIMS]."""
    mean = theta + torch.cat([torch.zeros_like(x[:, :1]), x[:, :1]], dim=1)
    return torch.distributions.Normal(mean, 1.0).log_prob(x).sum(-1)


def first_dimension(rollout: Rollout) -> ScoredRollout:
    """Return the end of each chain in its first dimension, as the reward."""
    reward = rollout.replay_data["x"][:, 1, 0].float()
    return ScoredRollout(rollout, reward, torch.ones_like(reward, dtype=torch.bool), {"reward/end": reward})


def chain_trainer(**sections: Any) -> tuple[Trainer, Chain]:
    config = recipe("nowhere", **{**FLOW_GRPO, **sections})
    policy = Chain(config)
    scorer: Any = Told(first_dimension)
    return Trainer(config, policy, scorer, [Prompt(f"{i}", {}) for i in range(8)], DistributedContext()), policy  # type: ignore[arg-type]


IN_REWARD = {"to": "base", "divergence": "k1", "place": "reward", "coefficient": 2.0}
PLAIN = {"kind": "clipped", "clip_low": None, "clip_high": None}


def test_k1_in_the_reward_ends_at_the_tilted_base() -> None:
    """π* ∝ N(0, 1) N(x_1, 1) exp(x_2 / β): every step of the rewarded dimension is shifted by 1/β, the other by 0."""
    trainer, policy = chain_trainer(
        anchors=[IN_REWARD],
        objective=PLAIN,
        advantage={"std": "none"},
        data={"prompts_per_step": 2, "group_size": 16},
        train={"steps": 150, "lr": {"kind": "linear", "start": 0.05, "end": 0.0}, "micro_batch": 1000},
    )
    for number in range(150):
        trainer.step(number)
    # At the optimum r − β log(π/π_ref) is constant, so that every advantage is 0 and no sampling noise is left.
    expected = torch.tensor([[0.5, 0.0], [0.5, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(policy.theta.detach(), expected, atol=0.003, rtol=0)


def test_rewards_are_charged_before_advantages() -> None:
    """θ off base: with one update, the gradient is that of Σ A ℓ with A made of r − β Σ_j (ℓ − ℓ_base), centred."""
    trainer, policy = chain_trainer(
        anchors=[{**IN_REWARD, "coefficient": {"kind": "linear", "start": 0.0, "end": 4.0, "steps": 2}}],
        objective=PLAIN,
        advantage={"std": "none"},
        data={"prompts_per_step": 2, "group_size": 4},
        train={"max_grad_norm": 1e9, "micro_batch": 3, "lr": 0.1},
    )
    policy.theta.data.add_(0.3)
    row = trainer.step(1)  # coefficient 2
    found = policy.theta.grad
    groups = torch.arange(2).repeat_interleave(4)
    fresh = Chain(policy.config)
    fresh.theta.data.add_(0.3)
    rollout = fresh.rollout([Prompt("", {})] * 8, groups, torch.arange(8), NoiseKey(0, 1))
    logp = log_normal(rollout.replay_data["x"], fresh.theta)
    kl = (logp.detach() - log_normal(rollout.replay_data["x"], torch.zeros(2, DIMS, dtype=torch.float64))).sum(1)
    rewards = rollout.replay_data["x"][:, 1, 0] - 2.0 * kl
    advantages = rewards - rewards.view(2, 4).mean(1, keepdim=True).expand(2, 4).flatten()
    (-(advantages[:, None] * logp).mean()).backward()
    assert found is not None
    torch.testing.assert_close(found, fresh.theta.grad, rtol=1e-5, atol=1e-7)  # rewards are float32
    assert row["kl/base"] == pytest.approx(float(kl.mean()), rel=1e-5)
    assert row["reward/mean"] == pytest.approx(
        float(rollout.replay_data["x"][:, 1, 0].mean()), rel=1e-5
    )  # as it was scored


def test_processes_and_micro_batches_do_not_matter_to_charged_rewards() -> None:
    """One process, two, and the smallest micro-batches give the same weights and metrics in float64."""

    def work(processes: DistributedContext, size: int = 1000) -> tuple[Tensor, list[float]]:
        trainer = linear_trainer(anchors=[IN_REWARD], processes=processes, train={"lr": 0.01, "micro_batch": size})
        rows = [trainer.step(number)["kl/base"] for number in range(2)]
        return trainer.policy.parameters["weight"].detach(), rows

    weight, rows = work(DistributedContext())
    assert rows[0] > 0
    for other, found in [*in_threads(2, work), work(DistributedContext(), 1)]:
        torch.testing.assert_close(other, weight, rtol=1e-6, atol=1e-7)  # rewards are float32
        assert found == pytest.approx(rows, rel=1e-6)


def crd_old(n: int) -> float:
    return min(0.25 + 0.005 * n, 0.999)


def crd_sampler(n: int) -> float:
    return 0.0 if n < 75 else min(0.0075 * (n - 75), 0.999)


CRD = {
    "old": {"decay": {"kind": "linear", "start": 0.25, "end": 0.999, "steps": 149.8}},
    "sampler": {"decay": {"kind": "linear", "start": 0.0, "end": 0.999, "steps": 133.2, "hold": 75}},
}


@pytest.mark.parametrize("updates", [1, 2])
def test_three_snapshots_of_crd(updates: int) -> None:
    """The table of arXiv:2603.14128: rollouts from sampler, ratios from old, both following θ by their own decays.

    n counts optimizer updates: those made when the snapshots move.
    """
    trainer, policy = chain_trainer(
        objective=PLAIN,
        snapshots=CRD,
        likelihood={"kind": "reverse", "old": "recompute"},
        rollout={"kernel": "flow_sde", "noise_level": 0.7, "snapshot": "sampler"},
        data={"prompts_per_step": 2, "group_size": 2},
        train={"updates_per_step": updates, "lr": 0.05, "micro_batch": 100, "steps": 1},
    )
    old = sampler = policy.theta.detach().clone()
    for number in range(120):
        trainer.step(number)
        assert torch.equal(policy.drawn[-1], sampler)
        assert all(torch.equal(weights, old) for weights in policy.compared[-updates:])
        theta, n = policy.theta.detach(), updates * (number + 1)
        old = crd_old(n) * old + (1 - crd_old(n)) * theta
        sampler = crd_sampler(n) * sampler + (1 - crd_sampler(n)) * theta
        # Two ways to write one convex combination in float64.
        torch.testing.assert_close(policy.weights("old"), old, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(policy.weights("sampler"), sampler, rtol=1e-12, atol=1e-13)
        old, sampler = policy.weights("old"), policy.weights("sampler")
        if n < 75:
            assert torch.equal(sampler, theta)
    assert not torch.equal(old, sampler)
    assert not torch.equal(sampler, policy.theta.detach())
    assert len(policy.drawn) == 120
    assert len(policy.compared) == 120 * updates


TO_TARGET = {"to": "base", "coefficient": {"kind": "target_kl", "start": 0.3, "target": 0.001}}


def test_controller_sees_the_mean_divergence_of_the_step() -> None:
    """Far above its target the level rises by 2 % a step, alike on every process."""

    def work(processes: DistributedContext) -> list[float]:
        trainer = linear_trainer(anchors=[TO_TARGET], processes=processes)
        return [trainer.step(number)["coefficient/base"] for number in range(3)]

    expected = [0.3, 0.3 * 1.02, 0.3 * 1.02**2]
    for found in [work(DistributedContext()), *in_threads(2, work)]:
        assert found == pytest.approx(expected, rel=1e-6)
    trainer = linear_trainer(
        anchors=[{"to": "base", "coefficient": {"kind": "target_kl", "start": 0.3, "target": 0.1}}]
    )
    row = trainer.step(0)
    error = min(0.2, max(-0.2, row["kl/base"] / 0.1 - 1))
    assert trainer.coefficients["base"].value(1) == pytest.approx(0.3 * (1 + 0.1 * error), rel=1e-12)


def test_reward_adaptive_anchor_weighs_each_sample() -> None:
    """Two pairs, advantages ±1: the mean coefficient is that of r̃ = ½ ± 1/(2 limit), and the penalty uses each."""
    coefficient = {"kind": "reward_adaptive", "value": 0.4, "floor": 0.1, "limit": 2.0}
    trainer = linear_trainer(
        anchors=[{"to": "base", "coefficient": coefficient}],
        scorer=Listed({0: 2.0, 1: 0.0, 2: 1.0, 3: 3.0}),
        data={"prompts_per_step": 2, "group_size": 2},
        advantage={"std": "none"},
        objective=PLAIN,
        train={"micro_batch": 3, "max_grad_norm": 1e9},
    )
    lik_policy = type(trainer.policy)()
    rollout = lik_policy.rollout(
        trainer.prompts[:4],  # which this policy does not read
        torch.tensor([0, 0, 1, 1]),
        torch.arange(4),
        NoiseKey(trainer.config.seed, 0),
    )
    lik = lik_policy.likelihoods(rollout, lik_policy.decisions(rollout, NOTHING))
    levels = [0.1 + 0.3 * r for r in (0.75, 0.25, 0.25, 0.75)]
    cost = torch.tensor(levels)[:, None] * lik["divergence/base"].detach()
    row = trainer.step(0)
    mask = lik.mask
    mean = float(torch.tensor(levels)[:, None].expand_as(cost)[mask].mean())
    assert row["coefficient/base"] == pytest.approx(mean, rel=1e-6)
    assert row["loss"] - row["loss/objective"] == pytest.approx(float(cost[mask].mean()), rel=1e-6)


@pytest.mark.parametrize("every", [1, 2])
def test_restart_makes_adam_forget(every: int) -> None:
    """Adam's first step moves every weight by the learning rate, whatever came before."""
    trainer = linear_trainer(train={"restart_every": every, "lr": 0.01})
    weight = trainer.policy.parameters["weight"]
    moves = []
    for number in range(4):
        before = weight.detach().clone()
        trainer.step(number)
        moves.append((weight.detach() - before).abs())
    first = [
        number for number, move in enumerate(moves) if torch.allclose(move, torch.full_like(move, 0.01), rtol=1e-3)
    ]
    assert first == list(range(0, 4, every))


def adaptive_trainer() -> Trainer:
    anchors = [TO_TARGET, {"to": "soup", "coefficient": 0.1}, {"to": "ref", "coefficient": 0.1}]
    snapshots = {"soup": {"kind": "soup", "every": 2}, "ref": {"kind": "reset", "every": 3}, "old": {}}
    return chain_trainer(
        anchors=anchors, snapshots=snapshots, train={"restart_every": 3, "lr": 0.02, "micro_batch": 9}
    )[0]


def test_a_resumed_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    """Controller, soup, reset and restart: after 1, 2, 3 or 4 steps of 6."""
    whole = adaptive_trainer()
    expected = [without_times(whole.step(number)) for number in range(6)]
    for pause in range(1, 5):
        first, second = adaptive_trainer(), adaptive_trainer()
        for number in range(pause):
            first.step(number)
        checkpoint.save(first, tmp_path, pause, 9, DistributedContext())
        assert checkpoint.load(second, checkpoint.checkpoint_folder(tmp_path, pause), DistributedContext()) == pause
        assert [without_times(second.step(number)) for number in range(pause, 6)] == expected[pause:]
        states = [{**t.policy.parameters, **t.policy.snapshots.state()} for t in (whole, second)]
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_checkpoint_without_the_controller_is_refused(tmp_path: Path) -> None:
    fixed = chain_trainer(anchors=[{"to": "base", "coefficient": 0.3}])[0]
    checkpoint.save(fixed, tmp_path, 1, 1, DistributedContext())
    adaptive = chain_trainer(anchors=[TO_TARGET])[0]
    place = checkpoint.checkpoint_folder(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"coefficients none and this run adapts \['base'\].*earlier version"):
        checkpoint.load(adaptive, place, DistributedContext())
    forget_state(place, "coefficients")  # as written before there were any
    assert checkpoint.load(fixed, place, DistributedContext()) == 1
    with pytest.raises(CheckpointError, match="earlier version"):
        checkpoint.load(adaptive, place, DistributedContext())


REVERSE = {"likelihood": {"kind": "reverse"}, "rollout": {"kernel": "flow_sde", "noise_level": 0.7}}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"anchors": [{"divergence": "k1"}], **REVERSE}, "the expected gradient of k1 as a loss is zero"),
        (
            {"anchors": [{"divergence": "gaussian", "place": "reward"}], **REVERSE},
            "only k1 in the reward has the gradient",
        ),
        ({"anchors": [IN_REWARD]}, "a forward likelihood is a surrogate at random times"),
        ({"anchors": [{"divergence": "weighted"}], **REVERSE}, "a reverse likelihood has no weighted divergence"),
        (
            {"anchors": [{**IN_REWARD, "coefficient": {"kind": "reward_adaptive", "value": 0.1}}], **REVERSE},
            "needs advantages, which are computed from the rewards",
        ),
        (
            {"anchors": [IN_REWARD], "advantage": {"normalise": "each"}, **REVERSE},
            "no total to subtract a divergence from",
        ),
        ({"advantage": {"std": "beta", "baseline": "none"}}, "the density of the group's mean"),
        ({"advantage": {"normalise": "each", "std": "none"}}, "set std: group"),
        ({"advantage": {"normalise": "each", "baseline": "none"}}, "set baseline: mean"),
        ({"advantage": {"positive": 0.0, "negative": 0.0}}, "nothing would be learnt"),
        ({"anchors": [IN_REWARD], "advantage": {"std": "beta"}, **REVERSE}, "subtracting an anchor leaves this range"),
        ({"snapshots": {"ema": {"decay": 1.5}}}, r"snapshots.ema.decay: found 1.5, expected a number from 0 to 1"),
        ({"snapshots": {"ema": {"decay": -0.5}}}, r"snapshots.ema.decay: found -0.5"),
        ({"anchors": [{"coefficient": {"kind": "linear", "start": 1.0, "end": -1.0}}]}, "found -1, expected 0 or more"),
        ({"train": {"lr": -1.0}}, "train.lr: found -1, expected 0 or more"),
        (
            {"anchors": [{"coefficient": {"kind": "reward_adaptive", "value": 0.1, "floor": 0.2}}]},
            "floor is 0.2, expected at most the value, 0.1",
        ),
        ({"anchors": [{"coefficient": {"kind": "target_kl", "start": 1.0, "target": 0.0}}]}, "greater than 0"),
    ],
)
def test_what_makes_no_sense_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe("nowhere", **sections)


def test_sections_read_and_print(tmp_path: Path) -> None:
    """Anchors and snapshots of a recipe survive YAML, and the error for a misspelt kind lists the known ones."""
    path = tmp_path / "run.yaml"
    text = """
model: {path: tiny-sd3}
data: {train: shapes:train}
rewards: [{name: jpeg_compressibility}]
algorithm: awm
snapshots:
  old: {decay: {kind: linear, start: 0.25, end: 0.999, steps: 149.8}}
  ema: {}
  soup: {kind: soup, every: 10}
  ref: {kind: KIND, every: 50}
anchors:
  - {to: ref, coefficient: {kind: target_kl, start: 0.1, target: 0.01}}
  - {to: base, guidance: 4.5, coefficient: {kind: reward_adaptive, value: 0.1}}
"""
    path.write_text(text.replace("KIND", "reset"))
    config = read_config(path)
    assert type(config).model_validate(config.model_dump(by_alias=True)) == config
    path.write_text(text.replace("KIND", "rest"))
    with pytest.raises(ConfigError, match="reset"):
        read_config(path)


def test_rounding_of_published_decays() -> None:
    config = recipe("nowhere", snapshots=CRD)
    for n in range(1, 400):
        assert config.snapshots["old"].build(config.train).value(n - 1) == pytest.approx(crd_old(n), abs=1e-12)
        assert config.snapshots["sampler"].build(config.train).value(n - 1) == pytest.approx(crd_sampler(n), abs=1e-12)
    assert math.isclose(149.8 * 0.005 + 0.25, 0.999)


class TwoRewards:
    """Two listed rewards, of which the second is a hundred times as large."""

    def score_for_training(
        self, rollout: Rollout, weights: Mapping[str, float], reference_scores: Any
    ) -> ScoredRollout:
        one = torch.tensor([0.0, 1.0, 0.0, 1.0])[rollout.samples % 4]
        two = 100 * torch.tensor([0.0, 0.0, 0.0, 1.0])[rollout.samples % 4]
        return ScoredRollout(
            rollout, one + 3 * two, torch.ones(len(one), dtype=torch.bool), {"reward/a": one, "reward/b": two}
        )


@pytest.mark.parametrize("processes", [1, 2])
def test_each_reward_is_normalised_over_all_processes(processes: int) -> None:
    """±1 in the first, ±1 in the second reward of weight 3: S = ∓1, ∓4, of standard deviation √8.5 over the batch."""

    def work(own: DistributedContext) -> list[float]:
        trainer = linear_trainer(
            rewards=[{"name": "jpeg_compressibility"}, {"import": "m:b", "weight": 3.0}],
            scorer=TwoRewards(),
            processes=own,
            data={"prompts_per_step": 2, "group_size": 2},
            advantage={"normalise": "each", "positive": 0.5},
        )
        trainer.advantage_estimator = PerRewardAdvantage({"a": "reward/a", "b": "reward/b"}, positive=0.5)
        scored = trainer._rollout_and_score(0, {"a": 1.0, "b": 3.0}, Clock())[0]
        return trainer._estimate_advantages(scored, {"a": 1.0, "b": 3.0}).tolist()

    found = [a for part in in_threads(processes, work) for a in part]
    expected = [x / 8.5**0.5 for x in (-1.0, 0.5, -4.0, 2.0)]
    assert found == pytest.approx(expected, rel=1e-3)  # eps of 1e-4 beside standard deviations of 1/2 and of 3


def test_a_recipe_names_its_estimate() -> None:
    rewards = [{"name": "jpeg_compressibility", "weight": 2.0}, {"import": "m:Other"}]
    config = recipe("nowhere", rewards=rewards, advantage={"normalise": "each", "negative": 0.5})
    found = config.advantage.build(config.rewards)
    columns = {"jpeg_compressibility": "reward/jpeg_compressibility", "Other": "reward/Other"}
    assert found == PerRewardAdvantage(columns, config.advantage.baseline, config.advantage.clip, negative=0.5)
    assert tuple(found.reads) == ("reward/jpeg_compressibility", "reward/Other")
    plain = recipe("nowhere").advantage
    assert plain.build(config.rewards) == TotalRewardAdvantage(plain.baseline, plain.std, plain.clip, plain.scale)
