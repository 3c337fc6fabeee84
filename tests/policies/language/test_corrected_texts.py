from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from difrl.core import Clipped
from difrl.data.prompts import Prompt
from difrl.data.rollout import Rollout
from difrl.policies.base import NoiseKey
from difrl.policies.errors import ModelError
from difrl.policies.importance_sampling import CORRECTION, MISMATCH, correct_rollout
from difrl.policies.language.engines import Engine, Engines
from difrl.policies.language.load import load_language_policy
from difrl.policies.language.policy import LanguagePolicy
from samplers import Completions, Processing
from tests.policies.language.threes import recipe
from tests.tiny_models import CHARACTERS

PROMPTS = [Prompt("1+1=", {}), Prompt("12+30=", {}), Prompt("7+8=", {})]


def drawn(engine: Tensor, mask: Tensor) -> Rollout:
    tape = {"log_prob": engine, "mask": mask, "tokens": torch.zeros_like(mask, dtype=torch.int64)}
    rows = torch.arange(len(mask))
    return Rollout(tuple(PROMPTS[: len(mask)]), rows, rows, tape)


def test_weights_and_measures_are_the_numbers_worked_by_hand() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False]])
    engine = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, 0.0, 0.0]])
    here = torch.tensor([[-1.0, -2.0 + math.log(1.5), -3.0 + math.log(4)], [-0.5 + math.log(0.5), 0.0, 0.0]])
    found = correct_rollout(drawn(engine, mask), mask, here, most=2.0)
    # 1, 1.5, and 4 cut to 2; 0.5; 1 where nothing was drawn.
    torch.testing.assert_close(found.replay_data["correction"], torch.tensor([[1.0, 1.5, 2.0], [0.5, 1.0, 1.0]]))
    torch.testing.assert_close(found.measures[CORRECTION], torch.tensor([1.5, 0.5]))
    apart = torch.tensor([(math.log(1.5) + math.log(4)) / 3, math.log(2)])
    torch.testing.assert_close(found.measures[MISMATCH], apart)
    assert found.replay_data["log_prob"] is here


def test_log_probabilities_that_are_not_finite_are_refused_with_the_prompt() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    engine = torch.tensor([[-1.0, math.nan], [-1.0, -math.inf]])
    with pytest.raises(ModelError, match=r"prompt 1 \(1 of 2\)"):
        correct_rollout(drawn(engine, mask), mask, torch.zeros(2, 2), most=2.0)


class Distorted:
    """An engine that draws from the network and returns an ℓ with a known error."""

    def __init__(self, engine: Engine, error: float) -> None:
        self.engine, self.error = engine, error

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        samples: Tensor,
        key: NoiseKey,
        temperature: float,
        processors: Sequence[Processing] = (),
    ) -> Completions:
        found = self.engine(prompts, samples, key, temperature, processors)
        return replace(found, logp=torch.where(found.mask, found.logp - self.error, 0.0))


def policy_of(model: Path, most: float, /, **sections: object) -> LanguagePolicy:
    policy = load_language_policy(recipe(model, **sections))
    own = policy.engines.evaluation
    policy.engines = Engines(Distorted(own, 0.3), own, most)
    return policy


@pytest.mark.parametrize(("most", "expected"), [(2.0, math.exp(0.3)), (1.2, 1.2)])
def test_what_an_engine_drew_is_scored_again_under_the_weights_that_drew(
    model: Path, most: float, expected: float
) -> None:
    own = load_language_policy(recipe(model))
    arguments = PROMPTS, torch.arange(3), torch.arange(3), NoiseKey(0, 0)
    there, here = policy_of(model, most).rollout(*arguments), own.rollout(*arguments)
    assert there.texts == here.texts
    mask = here.replay_data["mask"]
    # Float error of passes in other shapes, with a cache and without.
    torch.testing.assert_close(there.replay_data["log_prob"], here.replay_data["log_prob"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(there.measures[MISMATCH], torch.full((3,), 0.3), rtol=1e-4, atol=0)
    torch.testing.assert_close(there.measures[CORRECTION], torch.full((3,), expected), rtol=1e-4, atol=0)
    torch.testing.assert_close(there.replay_data["correction"][~mask], torch.ones(int((~mask).sum())))


def test_it_is_scored_in_batches_of_the_rollout(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, sizes = policy_of(model, 2.0, rollout={"batch": 2}), []
    hidden = policy.network.hidden
    network = type(policy.network)
    monkeypatch.setattr(network, "hidden", lambda self, t, a: (sizes.append(len(t)), hidden(t, a))[1])
    policy.rollout(PROMPTS, torch.arange(3), torch.arange(3), NoiseKey(0, 0))
    assert sizes == [2, 1]


def test_corrected_samples_of_another_distribution_have_the_networks_gradient(model: Path) -> None:
    """Over all completions y of one token, sum_y q(y) grad loss(y) is exactly the gradient on samples of pi."""
    policy = load_language_policy(recipe(model, generation={"max_new_tokens": 1}))
    count = len(CHARACTERS)
    tokens, mask = torch.arange(count)[:, None], torch.ones(count, 1, dtype=torch.bool)
    prompts, rows = tuple([PROMPTS[0]] * count), torch.arange(count)
    advantages = torch.randn(count, generator=torch.Generator().manual_seed(0))
    q = torch.rand(count, generator=torch.Generator().manual_seed(1)) + 0.1
    q = q / q.sum()

    def gradient(log_prob: Tensor, weigh: Tensor, most: float | None) -> Tensor:
        rollout = Rollout(prompts, rows, rows, {"tokens": tokens, "mask": mask, "log_prob": log_prob})
        here = policy.recompute_logprobs(rollout, policy.decisions(rollout, NoiseKey(0, 0)))
        rollout = rollout if most is None else correct_rollout(rollout, mask, here, most)
        lik = policy.likelihoods(rollout, policy.decisions(rollout, NoiseKey(0, 0)))
        loss, _ = Clipped()(lik, advantages, rows, None)
        grads = torch.autograd.grad((weigh[:, None] * loss).sum(), list(policy.parameters.values()))
        return torch.cat([g.flatten() for g in grads])

    ids = torch.tensor([policy.tokenizer.tokenize(PROMPTS[0])])
    with torch.no_grad():
        logp = policy.network.model(input_ids=ids).logits[0, -1].log_softmax(dim=0)
    expected = gradient(logp[:, None], logp.exp(), None)
    torch.testing.assert_close(gradient(q.log()[:, None], q, 1e9), expected, rtol=1e-4, atol=1e-6)
    # Uncorrected, and with factors that are cut off, it is another one.
    for wrong in (gradient(logp[:, None], q, None), gradient(q.log()[:, None], q, 0.5)):
        assert (wrong - expected).norm() > 0.1 * expected.norm()
