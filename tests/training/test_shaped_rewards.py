"""Shapes, ensembles, changing weights and reference samples through the real trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from difrl.config import RewardConfig
from difrl.core import gdpo_advantages
from difrl.data.prompt_order import PromptOrder
from difrl.data.prompts import Prompt, load_prompts
from difrl.policies.base import NoiseKey
from difrl.policies.load import load_policy
from difrl.runtime.distributed import DistributedContext, ProcessError
from difrl.scoring import Scorer
from difrl.scoring.reference_samples import ReferenceScores
from difrl.training import checkpoint
from difrl.training.checkpoint import CheckpointError
from difrl.training.evaluation import Evaluator
from difrl.training.step_metrics import Clock
from difrl.training.trainer import Trainer, TrainingError
from rewards import Failsafe, RewardError, Scores
from tests.fakes import PROMPTS, Brightness, LinearPolicy, in_threads, linear_trainer
from tests.helpers import forget_state, without_times
from tests.recipes import FLOW_GRPO, recipe, text_recipe
from tests.training.test_anchors import Chain

PAR = {"shape": {"kind": "par"}}
CENTRED = {"advantage": {"std": "none"}}


def bright(label: str = "bright", factor: float = 4.0, **more: Any) -> dict[str, Any]:
    return {"import": "tests.fakes:Brightness", "label": label, "options": {"factor": factor}, **more}


def trainer_of(
    rewards: Sequence[Mapping[str, Any]], processes: DistributedContext | None = None, **sections: Any
) -> Trainer:
    configs = [RewardConfig.model_validate(reward) for reward in rewards]
    scorer = Scorer.build(configs, [], torch.device("cpu"))
    return linear_trainer(rewards=list(rewards), scorer=scorer, processes=processes, **sections)


def run(trainer: Trainer, count: int) -> list[dict[str, float]]:
    return [without_times(trainer.step(number)) for number in range(count)]


def preferences(trainer: Trainer, step: int) -> tuple[Tensor, Tensor]:
    """Return brightness × 4 of a step's samples, and their preference over two samples of the base, written out as loops."""
    policy, seed, size = LinearPolicy(), trainer.config.seed, trainer.config.data.group_size
    policy.weight.data = trainer.policy.parameters["weight"].detach().clone()
    chosen = PromptOrder(PROMPTS, trainer.config.data.prompts_per_step, seed).step(step)
    numbers = [number for number in chosen for _ in range(size)]
    groups = torch.arange(len(chosen)).repeat_interleave(size)
    drawn = policy.rollout([PROMPTS[n] for n in numbers], groups, torch.arange(len(numbers)), NoiseKey(seed, step))
    own, shaped = 4 * drawn.images.mean((1, 2, 3)), []  # type: ignore[union-attr]
    for row, number in enumerate(numbers):
        samples = torch.tensor([2 * number, 2 * number + 1])
        theirs = policy.reference([PROMPTS[number]] * 2, samples, NoiseKey(seed, 0, "references"), "base")
        margins = own[row] - 4 * theirs.images.mean((1, 2, 3))  # type: ignore[union-attr]
        shaped.append(margins.sigmoid().mean())
    return own, torch.stack(shaped)


def test_preferences_over_the_base_are_what_is_optimised() -> None:
    trainer = trainer_of([bright(**PAR, weight=3.0)], references={"count": 2})
    for step in range(2):
        own, shaped = preferences(trainer, step)
        row = trainer.step(step)
        assert row["reward/bright"] == pytest.approx(own.mean().item(), rel=1e-5)
        assert row["shaped/bright"] == pytest.approx(shaped.mean().item(), rel=1e-5)
        assert row["reward/mean"] == pytest.approx(3 * shaped.mean().item(), rel=1e-5)
        assert row["time/references"] > 0


def test_reference_samples_are_drawn_by_the_base_once_a_prompt_and_not_counted() -> None:
    asked: list[tuple[int, ...]] = []

    class Watched(LinearPolicy):
        def reference(self, prompts: Any, samples: Tensor, key: NoiseKey, snapshot: str) -> Any:
            assert (key, snapshot) == (NoiseKey(0, 0, "references"), "base")
            asked.append(tuple(samples.tolist()))
            return super().reference(prompts, samples, key, snapshot)

    sections = {"references": {"count": 3}, "data": {"prompts_per_step": 4, "group_size": 2}}
    scorer = Scorer.build([RewardConfig.model_validate(bright(**PAR))], [], torch.device("cpu"))
    shaped = linear_trainer(rewards=[bright(**PAR)], scorer=scorer, policy=Watched(), **sections)
    rows = run(shaped, 4)
    plain = run(trainer_of([bright()], data=sections["data"]), 4)
    assert [row["nfe"] for row in rows] == [row["nfe"] for row in plain]
    assert sorted(asked) == [(3 * n, 3 * n + 1, 3 * n + 2) for n in range(len(PROMPTS))]


def test_references_do_not_depend_on_who_asks_for_what_and_when() -> None:
    """The bits are equal for a prompt alone, among others, after training, and with other random states."""
    config = recipe("nowhere", rewards=[bright(**PAR)], references={"count": 3}).references
    assert config is not None

    def references(policy: Any) -> ReferenceScores:
        return ReferenceScores(config, 7, policy, {"bright": Brightness()}, PROMPTS, torch.device("cpu"))

    many = references(LinearPolicy())([4, 2, 2, 9])["bright"]
    assert many.values.shape == (4, 3)
    assert torch.equal(many.values[1], many.values[2])
    assert len({tuple(row) for row in many.values.tolist()}) == 3
    moved = LinearPolicy()
    moved.weight.data += 1.0
    later = references(moved)
    assert torch.equal(later([9])["bright"].values[0], many.values[3])
    assert torch.equal(later([2, 4])["bright"].values, many.values[[1, 0]])


def test_a_reference_that_cannot_be_scored_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """If no reference of a prompt can be scored, its samples cannot be shaped and are in no statistic."""
    config = recipe("nowhere", rewards=[bright(**PAR)], references={"count": 2}).references
    assert config is not None

    class Picky(Brightness):
        def __call__(self, samples: Tensor, prompts: Sequence[str], metadata: Any) -> Scores:
            values = super().__call__(samples, prompts, metadata).values
            return Scores(values, torch.tensor([[True, False], [False, False]][prompts[0] == "prompt 1"]))

    found = ReferenceScores(config, 0, LinearPolicy(), {"a": Picky()}, PROMPTS, torch.device("cpu"))([0, 1])["a"]
    assert found.valid.tolist() == [[True, False], [False, False]]
    trainer = trainer_of([bright(**PAR)], references={"count": 2}, data={"prompts_per_step": 2, "group_size": 2})
    four = {"bright": Scores(found.values[[0, 0, 1, 1]], found.valid[[0, 0, 1, 1]])}
    monkeypatch.setattr(ReferenceScores, "__call__", lambda self, asked: four)
    row = trainer.step(0)
    assert row["samples/invalid"] == 0.5
    assert math.isfinite(row["shaped/bright"])


class Down(Brightness):
    """A reward that fails on samples for which `down` is true."""

    down: Callable[[Tensor], bool] = staticmethod(lambda samples: False)

    def __call__(self, samples: Tensor, prompts: Sequence[str], metadata: Any) -> Scores:
        if self.down(samples):
            raise ConnectionError("no answer")
        return super().__call__(samples, prompts, metadata)


class Counting(LinearPolicy):
    drawn = 0

    def reference(self, prompts: Any, samples: Tensor, key: NoiseKey, snapshot: str) -> Any:
        self.drawn += 1
        return super().reference(prompts, samples, key, snapshot)


def dropping(count: int, policy: LinearPolicy) -> tuple[Down, ReferenceScores]:
    config = recipe("nowhere", rewards=[bright(**PAR)], references={"count": count}).references
    assert config is not None
    broken = Down()
    rewards = {"down": Failsafe(broken, "drop"), "up": Brightness(2.0)}
    return broken, ReferenceScores(config, 7, policy, rewards, PROMPTS, torch.device("cpu"))


def test_references_that_a_failure_cost_are_scored_when_next_met() -> None:
    """They get the same bits and are then kept; the other reward is not called again."""
    policy = Counting()
    broken, references = dropping(3, policy)
    expected = references([2])
    broken, references = dropping(3, policy)
    broken.down = lambda samples: True
    first = references([2, 2])
    assert not first["down"].valid.any()
    assert torch.equal(first["up"].values[:1], expected["up"].values)
    broken.down = lambda samples: False
    references.rewards["up"] = None  # type: ignore[index]
    again = references([2])
    for name, scores in expected.items():
        assert torch.equal(again[name].values, scores.values)
        assert again[name].valid.all()
    drawn = policy.drawn
    for _ in range(6):
        references([2])
    assert policy.drawn == drawn


def test_what_was_known_of_references_is_not_lost_again() -> None:
    """The reward fails on the darkest of three samples at first, and later on the two others."""
    broken, references = dropping(3, LinearPolicy())
    one = references([2])["down"].values[0].tolist()
    broken, references = dropping(3, LinearPolicy())
    middle = sorted(one)[1]
    broken.down = lambda samples: bool((samples.mean((1, 2, 3)) < middle).any())
    assert references([2])["down"].valid.sum() == 2
    broken.down = lambda samples: bool((samples.mean((1, 2, 3)) >= middle).any())
    assert references([2])["down"].values[0].tolist() == one


def test_references_that_can_never_be_scored_are_tried_ever_more_rarely() -> None:
    policy = Counting()
    broken, references = dropping(2, policy)
    broken.down = lambda samples: True
    tried = []
    for _ in range(20):
        before = policy.drawn
        references([5])
        tried.append(policy.drawn - before)
    assert [time for time, drawn in enumerate(tried, 1) if drawn] == [1, 2, 4, 8, 16]


def test_samples_without_references_are_counted_and_told() -> None:
    """The reward is down for the references of the first prompt of two, then for those of both."""
    sections = {"references": {"count": 3}, "data": {"prompts_per_step": 2, "group_size": 2}}

    def trainer_where(down: Callable[[Tensor], bool]) -> Trainer:
        broken = Down()
        broken.down = down
        scorer = Scorer.build([RewardConfig.model_validate(bright(**PAR))], [], torch.device("cpu"))
        term, weight = scorer.optimised["bright"]
        member = replace(term.members["bright"], reward=Failsafe(broken, "drop"))
        return linear_trainer(
            rewards=[bright(**PAR)],
            scorer=Scorer({"bright": (replace(term, members={"bright": member}), weight)}, {}),
            **sections,
        )

    calls = iter(range(1000))
    row = trainer_where(lambda samples: next(calls) < 5).step(0)  # three, one and two, one and one
    assert (row["references/invalid/bright"], row["samples/invalid"], row["invalid/bright"]) == (0.5, 0.5, 0.0)
    with pytest.raises(TrainingError, match=r"scored \(references/invalid/bright 1\.00\), so there is nothing"):
        trainer_where(lambda samples: len(samples) < 4).step(0)


EVERYTHING = [
    bright(**PAR),
    {
        "ensemble": [bright("a", shape={"kind": "clip", "high": 2.4}), bright("b", 3.0)],
        "combine": "uncertainty",
        "penalty": 0.2,
        "label": "jury",
        "weight": {"kind": "threshold", "at_least": 2.5, "rate": 0.3},
    },
    bright("dark", -1.0, weight={"kind": "linear", "start": 0.5, "end": 0.0}),
    bright("range", shape={"kind": "min_max"}),
]
METRICS = {
    *(f"reward/{name}" for name in ("bright", "jury", "jury/a", "jury/b", "dark", "range", "mean")),
    *(f"shaped/{name}" for name in ("bright", "jury", "jury/a", "range")),
    "weight/jury",
    "weight/dark",
}


def everything(processes: DistributedContext | None = None, micro_batch: int = 7) -> Trainer:
    return trainer_of(
        EVERYTHING,
        processes,
        references={"count": 2},
        train={"steps": 5, "lr": 0.02, "micro_batch": micro_batch, "updates_per_step": 2},
    )


def test_metrics_are_those_of_the_parts() -> None:
    rows = run(everything(), 5)
    assert {name for name in rows[0] if name.startswith(("reward/", "shaped/", "weight/"))} == METRICS
    assert [row["weight/dark"] for row in rows] == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1])
    weight = 1.0
    for row in rows:
        assert row["weight/jury"] == pytest.approx(weight)
        parts = {"shaped/bright": 1.0, "shaped/jury": weight, "reward/dark": row["weight/dark"], "shaped/range": 1.0}
        assert row["reward/mean"] == pytest.approx(sum(w * row[name] for name, w in parts.items()), rel=1e-5)
        weight = min(10.0, max(0.0, weight + 0.3 * (2.5 - row["shaped/jury"])))
    assert weight != 1.0


@pytest.mark.parametrize("micro_batch", [1, 1000])
def test_micro_batches_do_not_matter(micro_batch: int) -> None:
    one, other = everything(), everything(micro_batch=micro_batch)
    for row, again in zip(run(one, 2), run(other, 2), strict=True):
        del row["nfe/check"], again["nfe/check"]  # of the first micro-batch
        assert row == pytest.approx(again, rel=1e-6, abs=1e-9)
    torch.testing.assert_close(one.parameters[0], other.parameters[0], rtol=1e-9, atol=1e-9)


def test_processes_do_not_matter() -> None:
    alone = everything()
    rows = run(alone, 3)
    for trainer, found in in_threads(2, lambda processes: (t := everything(processes), run(t, 3))):
        torch.testing.assert_close(trainer.parameters[0], alone.parameters[0], rtol=1e-9, atol=1e-9)
        for row, expected in zip(found, rows, strict=True):
            assert row == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_a_resumed_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    """Multiplier and references are restored after 1 or 3 steps of 5, in a trainer that has met no prompt."""
    whole = everything()
    expected = run(whole, 5)
    for pause in (1, 3):
        first, second = everything(), everything()
        run(first, pause)
        checkpoint.save(first, tmp_path, pause, 9, DistributedContext())
        assert checkpoint.load(second, checkpoint.checkpoint_folder(tmp_path, pause), DistributedContext()) == pause
        assert [without_times(second.step(number)) for number in range(pause, 5)] == expected[pause:]
        assert torch.equal(second.parameters[0], whole.parameters[0])


def test_a_checkpoint_without_the_multiplier_is_refused(tmp_path: Path) -> None:
    plain = trainer_of([bright()])
    checkpoint.save(plain, tmp_path, 1, 1, DistributedContext())
    place = checkpoint.checkpoint_folder(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"coefficients none and this run adapts \['jury'\].*under other rewards"):
        checkpoint.load(everything(), place, DistributedContext())
    forget_state(place, "weights")  # as written before there were any
    assert checkpoint.load(plain, place, DistributedContext()) == 1


def chained(steps: int, *rewards: dict[str, Any]) -> list[dict[str, float]]:
    """Return a run of the policy that learns a mean, whose images it can make brighter or darker than the base's of 1/2."""
    sizes = {"data": {"prompts_per_step": 4, "group_size": 8}, "train": {"lr": 0.1, "micro_batch": 1000}}
    held = {"anchors": [{"to": "base", "divergence": "gaussian", "coefficient": 0.1}]}
    config = recipe("nowhere", rewards=list(rewards), **{**FLOW_GRPO, **CENTRED, **sizes, **held})
    scorer = Scorer.build(config.rewards, [], torch.device("cpu"))
    policy: Any = Chain(config)
    return run(Trainer(config, policy, scorer, PROMPTS, DistributedContext()), steps)


def test_a_multiplier_holds_a_reward_where_training_alone_would_lose_it() -> None:
    """The total is (λ − 1) brightness: dark pulls down, the anchor to 1/2, and at least 0.45 of bright holds against dark."""
    dark = bright("dark", 1.0, weight=-1.0)
    weight = {"kind": "threshold", "at_least": 0.45, "start": 0.0, "rate": 0.2}
    runs = [chained(40, dark), chained(100, dark, bright(factor=1.0, weight=weight))]
    free, held = ([row["reward/dark"] for row in rows[len(rows) // 2 :]] for rows in runs)
    assert sum(free) / len(free) < 0.38
    assert sum(held) / len(held) == pytest.approx(0.45, abs=0.03)
    weights = [row["weight/bright"] for row in runs[1]]
    assert weights[0] == 0
    assert 0 < weights[-1] < 1


def test_rewards_are_normalised_one_by_one_as_shaped() -> None:
    """The result is GDPO of the shaped rewards, with the weights of the step."""
    clipped = bright("clipped", shape={"kind": "clip", "low": 1.9, "high": 2.1})
    trainer = trainer_of([bright(), clipped], advantage={"normalise": "each"})
    weights = {"bright": 1.0, "clipped": -0.5}
    scored, _ = trainer._rollout_and_score(0, dict.fromkeys(weights, 1.0), Clock())
    found = trainer._estimate_advantages(scored, weights)
    summed = {"bright": scored.parts["reward/bright"], "clipped": scored.parts["shaped/clipped"]}
    torch.testing.assert_close(found, gdpo_advantages(summed, weights, scored.groups, scored.valid))
    raw = {name: scored.parts[f"reward/{name}"] for name in weights}
    assert (found - gdpo_advantages(raw, weights, scored.groups, scored.valid)).abs().max() > 0.1


class Partly(Brightness):
    """A reward that cannot score samples darker than the mean of their batch."""

    def __call__(self, samples: Tensor, prompts: Sequence[str], metadata: Any) -> Scores:
        values = super().__call__(samples, prompts, metadata).values
        return Scores(values, values > values.mean())


RISING = {"kind": "linear", "start": 0.0, "end": 1.0}


def partly(weight: Any) -> dict[str, Any]:
    return {**bright("partly", weight=weight), "import": "tests.training.test_shaped_rewards:Partly"}


@pytest.mark.parametrize("weight", [0.0, RISING])
def test_rewards_normalised_one_by_one_do_without_one_of_weight_0(weight: Any) -> None:
    """Samples that it cannot score are trained on as if the reward were absent; with a weight they are left out."""
    each = {"advantage": {"normalise": "each"}}
    found = run(trainer_of([bright(), partly(weight)], **each), 2)
    plain = run(trainer_of([bright()], **each), 2)
    assert [row["invalid/partly"] > 0 for row in found] == [True, True]
    assert [row["samples/invalid"] > 0 for row in found] == [False, weight == RISING]
    assert {name: found[0][name] for name in plain[0]} == plain[0]


def test_groups_may_be_drawn_until_a_reward_differs_whose_weight_is_still_0() -> None:
    collect = {"collect": {"max_draws": 3, "by": "partly"}, "train": {"steps": 4}}
    rows = run(trainer_of([bright(), partly(RISING)], **collect), 2)
    assert [row["weight/partly"] for row in rows] == [0.0, 0.25]
    assert [row["samples/invalid"] > 0 for row in rows] == [False, True]


def test_evaluations_report_rewards_as_they_are() -> None:
    """There are no shapes and no references. The sum has the weights at which schedules end and multipliers start."""
    configs = [RewardConfig.model_validate(reward) for reward in EVERYTHING]
    scorer = Scorer.build(configs, [], torch.device("cpu"))
    found = Evaluator(LinearPolicy(), scorer, PROMPTS, DistributedContext(), 5)(12)
    parts = {"bright": 1.0, "jury": 1.0, "dark": 0.0, "range": 1.0}
    expected = sum(weight * found[f"eval/reward/{name}"] for name, weight in parts.items())
    assert found["eval/reward/mean"] == pytest.approx(expected, rel=1e-5)
    assert not any(name.startswith("eval/shaped") for name in found)
    assert found["eval/reward/jury/b"] == pytest.approx(0.75 * found["eval/reward/jury/a"], rel=1e-5)


def test_a_shape_that_fails_stops_all_processes() -> None:
    """A verifier returns neither 0 nor 1 on one of two processes."""

    def work(processes: DistributedContext) -> str:
        noise = {"kind": "noise", "false_positive": 0.1, "false_negative": 0.1}
        factor = 0.0 if processes.rank == 0 else 0.5
        trainer = trainer_of([bright(factor=factor, shape=noise)], processes, **CENTRED)
        with pytest.raises((RewardError, ProcessError)) as caught:
            trainer.step(0)
        return str(caught.value)

    one, two = in_threads(2, work)
    assert one.startswith("a reward failed on another process")
    assert two.startswith("reward 'bright' failed: cannot be shaped: a verifier returns 0 or 1")


def test_reference_images_are_what_a_rollout_of_the_base_draws(sd3: Path) -> None:
    """Before training θ is the base, and afterwards references stay the same. They share no steps, although training branches."""
    rollout = {"kernel": "flow_sde", "noise_level": 0.7, "branch": {"count": 1}}
    data = {"prompts_per_step": 2, "group_size": 2}
    reward = bright(factor=30.0, **PAR)
    config = recipe(sd3, rewards=[reward], references={"count": 2}, **{**FLOW_GRPO, "rollout": rollout, "data": data})
    policy, prompts = load_policy(config), load_prompts("shapes:train")
    numbers = torch.arange(2)
    alone = load_policy(recipe(sd3, **{**FLOW_GRPO, "rollout": {**rollout, "branch": None}, "data": data}))
    expected = alone.rollout([prompts[0]] * 2, numbers, numbers, NoiseKey(0, 0, "references")).images
    drawn = policy.reference([prompts[0]] * 2, numbers, NoiseKey(0, 0, "references"), "base")
    assert drawn.images is not None
    torch.testing.assert_close(drawn.images, expected)
    assert (drawn.images[0] - drawn.images[1]).abs().max() > 1e-2
    trainer = Trainer(
        config, policy, Scorer.build(config.rewards, [], torch.device("cpu")), prompts, DistributedContext()
    )
    row = trainer.step(0)
    assert 0 < row["shaped/bright"] < 1
    again = policy.reference([prompts[0]] * 2, numbers, NoiseKey(0, 0, "references"), "base").images
    assert again is not None
    assert torch.equal(drawn.images, again)


def test_reference_texts_are_of_the_base(lm: Path) -> None:
    prompts = [Prompt(text, {}) for text in ("1+", "2+5", "7=", "4+4=")]
    config = text_recipe(
        lm,
        rewards=[{"import": "tests.fakes:Ones", "shape": {"kind": "log_sigmoid", "quantile": None}}],
        references={"count": 3},
        data={"prompts_per_step": 2},
        train={"lr": 0.1},
    )
    policy = load_policy(config)
    trainer = Trainer(
        config, policy, Scorer.build(config.rewards, [], torch.device("cpu")), prompts, DistributedContext()
    )
    before = policy.reference(prompts, torch.arange(4), NoiseKey(0, 0, "references"), "base").texts
    spent = policy.evaluations
    row = trainer.step(0)
    assert row["shaped/Ones"] < 0 <= row["reward/Ones"]
    assert row["nfe"] == trainer.policy.evaluations - spent
    assert policy.reference(prompts, torch.arange(4), NoiseKey(0, 0, "references"), "base").texts == before
