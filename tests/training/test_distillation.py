"""On-policy distillation through the trainer: advantages are the negative penalties of anchors, token by token."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from difrl.data.prompts import Prompt
from difrl.policies.base import NoiseKey
from difrl.policies.language.policy import LanguagePolicy
from difrl.policies.load import load_policy
from difrl.reporting import number_format as formats
from difrl.reporting.metrics_file import read_metrics
from difrl.reporting.terminal import PlainDisplay
from difrl.runtime.distributed import DistributedContext
from difrl.scoring import Scorer
from difrl.training import run as running
from difrl.training.trainer import Trainer
from tests.fakes import Ones
from tests.recipes import text_recipe
from tests.texts import prompt_file
from tests.tiny_models import tiny_lm

PROMPTS = [Prompt(text, {}) for text in ("1+", "2+5", "7=", "4+4=", "5+")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"base": tiny_lm(folder / "lm"), "teacher": tiny_lm(folder / "teacher", layers=1, seed=1)}


def trainer_of(models: dict[str, Path], coefficients: dict[str, float], centred: bool = False, **train: Any) -> Trainer:
    k1 = {"divergence": "k1", "place": "decision", "centred": centred}
    config = text_recipe(
        models["base"],
        rewards=[{"import": "tests.fakes:Ones", "weight": 0.0}],
        teachers={"teacher": {"path": str(models["teacher"])}},
        anchors=[{"to": name, "coefficient": c, **k1} for name, c in coefficients.items()],
        train={"lr": 1e-2, "max_grad_norm": 1e9, "micro_batch": 20, **train},
    )
    policy = load_policy(config)
    generator = torch.Generator().manual_seed(0)
    for p in policy.parameters.values():
        p.data.add_(0.1 * torch.randn(p.shape, generator=generator))
    return Trainer(config, policy, Scorer.from_rewards({"ones": (Ones(), 0.0)}, {}), PROMPTS, DistributedContext())


def by_hand(
    trainer: Trainer, models: dict[str, Path], coefficients: dict[str, float]
) -> tuple[Tensor, dict[str, float]]:
    """Return (1/N) Σ_tokens (Σ_a c_a (ℓ − ℓ_a)) ∇ℓ over the texts of the first step and the mean of each Σ_j (ℓ − ℓ_a)."""
    policy = trainer.policy
    assert isinstance(policy, LanguagePolicy)
    rollout = trainer.source.draw(0, 0, range(4), lambda part: None).rollout
    decisions = policy.decisions(rollout, NoiseKey(0, 0))
    others = {name: AutoModelForCausalLM.from_pretrained(models[name]) for name in coefficients}
    loss, kl = torch.zeros(()), dict.fromkeys(coefficients, 0.0)
    for prompt, tokens, mask in zip(rollout.prompts, rollout.replay_data["tokens"], decisions.mask, strict=True):
        ids, own = policy.tokenizer.tokenize(prompt), tokens[mask]

        def logp(model: Any, ids: list[int] = ids, own: Tensor = own) -> Tensor:
            logits = model(torch.tensor([[*ids, *own.tolist()]])).logits[0, len(ids) - 1 : -1]
            return logits.log_softmax(dim=1).gather(1, own[:, None])[:, 0]

        theta = logp(policy.network.model)
        for name, model in others.items():
            ratio = (theta - logp(model)).detach()
            loss = loss + coefficients[name] * (ratio * theta).sum()
            kl[name] += float(ratio.sum()) / len(rollout)
    loss = loss / decisions.mask.sum()
    gradient = torch.autograd.grad(loss, list(trainer.parameters), materialize_grads=True)
    return torch.cat([g.flatten() for g in gradient]), kl


def gradient(trainer: Trainer) -> Tensor:
    return torch.cat([p.grad.flatten() for p in trainer.parameters if p.grad is not None])


@pytest.mark.parametrize("coefficients", [{"teacher": 1.0}, {"teacher": 1.25, "base": -0.25}])
def test_the_gradient_is_that_of_log_ratios_to_the_teacher(
    models: dict[str, Path], coefficients: dict[str, float]
) -> None:
    trainer = trainer_of(models, coefficients)
    expected, kl = by_hand(trainer, models, coefficients)
    row = trainer.step(0)
    # float32 in another batch shape, relative to the largest entry
    torch.testing.assert_close(gradient(trainer), expected, rtol=1e-3, atol=2e-5 * float(expected.abs().max()))
    assert {name: row[f"kl/{name}"] for name in coefficients} == pytest.approx(kl, rel=1e-4, abs=1e-5)
    assert (row["reward/mean"], row["groups/zero_std"]) == (0.0, 1.0)
    assert row["reward/ones"] > 0  # what is reported


@pytest.mark.slow
def test_distillation_comes_close_to_its_teacher(models: dict[str, Path]) -> None:
    """The divergence that centring reports is exact, so the comparison of two steps has no noise of k1."""
    trainer = trainer_of(models, {"teacher": 1.0}, centred=True, steps=60)
    rows = [trainer.step(number)["kl/teacher"] for number in range(60)]
    assert all(row > 0 for row in rows)
    assert sum(rows[-5:]) < 0.5 * sum(rows[:5])


def test_displays_show_what_is_reported_where_nothing_is_summed(models: dict[str, Path], tmp_path: Path) -> None:
    prompts, out = str(prompt_file(tmp_path)), io.StringIO()
    config = text_recipe(
        models["base"],
        tmp_path / "run",
        data={"train": prompts, "evaluation": prompts},
        rewards=[{"import": "tests.fakes:Ones", "label": "ones", "weight": 0.0}],
        teachers={"teacher": {"path": str(models["teacher"])}},
        anchors=[{"to": "teacher", "divergence": "k1", "place": "decision"}],
        train={"steps": 1},
        eval={"every": 1, "images": 64, "show": 0},
    )
    running.train(config, display=PlainDisplay(out))
    row = read_metrics(config.output_dir)[-1]
    assert row["reward/mean"] == row["eval/reward/mean"] == 0 < row["reward/ones"]
    assert f"reward ones {formats.number(row['reward/ones']):>7} " in out.getvalue()
    assert f"evaluation {formats.number(row['eval/reward/ones'])} ± " in out.getvalue()
