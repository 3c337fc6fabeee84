"""The first-update check of a language model: the diagnosis finds every injected fault, as for images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from difrl.data.prompts import load_prompts
from difrl.policies.language.load import load_language_policy
from difrl.policies.language.policy import LanguagePolicy
from difrl.policies.logprob_check import FirstUpdateError
from difrl.runtime.distributed import DistributedContext
from difrl.scoring import Scorer
from difrl.training.trainer import Trainer
from tests.helpers import draw_from_snapshot
from tests.texts import Ones, prompt_file, shown_recipe

Fault = Callable[[LanguagePolicy], None]
SAMPLER: dict[str, Any] = {"snapshots": {"sampler": {"decay": 0.5}}}
COLD: dict[str, Any] = {"generation": {"temperature": 0.5}}


def trainer_of(lm: Path, folder: Path, sections: dict[str, Any]) -> tuple[Trainer, LanguagePolicy]:
    config = shown_recipe(lm, folder / "run", prompt_file(folder), **sections)
    policy = load_language_policy(config)
    return Trainer(
        config,
        policy,
        Scorer.from_rewards({"ones": (Ones(), 1.0)}, {}),
        load_prompts(config.data.train),
        DistributedContext(),
    ), policy


def after_rollout(policy: LanguagePolicy, change: Callable[[], Any]) -> None:
    """Call `change` once samples are drawn."""
    inner = policy.rollout

    def drawn(*args: Any) -> Any:
        found = inner(*args)
        change()
        return found

    policy.rollout = drawn  # type: ignore[method-assign]


def hook(policy: LanguagePolicy, change: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
    """Change the last hidden states."""
    norm = policy.network.model.model.norm
    norm.register_forward_hook(lambda module, inputs, output: change(module, output))


def dropout(policy: LanguagePolicy) -> None:
    hook(policy, lambda module, output: F.dropout(output, 0.2))


def train_mode(policy: LanguagePolicy) -> None:
    hook(policy, lambda module, output: output * (1.3 if module.training else 1.0))
    after_rollout(policy, lambda: policy.network.model.train())


def weights(policy: LanguagePolicy) -> None:
    def move() -> None:
        with torch.no_grad():
            for p in policy.parameters.values():
                p.mul_(1.1)

    after_rollout(policy, move)


def temperature(policy: LanguagePolicy) -> None:
    """Samples are drawn at 0.5 and evaluated at 0.7; evaluations keep 0.5."""
    changed = replace(policy.generation, temperature=0.7)
    after_rollout(policy, lambda: setattr(policy, "generation", changed))


def half_update(policy: LanguagePolicy) -> None:
    after_rollout(policy, lambda: setattr(policy, "network", replace(policy.network, dtype=torch.bfloat16)))


def batch_shape(policy: LanguagePolicy) -> None:
    """Six samples are drawn together, and three are trained on together."""
    hook(policy, lambda module, output: output * (1 + 0.05 * len(output)))


def update_alone(policy: LanguagePolicy) -> None:
    hook(policy, lambda module, output: output * (1.3 if torch.is_grad_enabled() else 1.0))


def other_sampler(policy: LanguagePolicy) -> None:
    """A snapshot draws the samples, although θ is the configured sampler."""
    draw_from_snapshot(policy, "generation", "sampler")


FAULTS: list[tuple[dict[str, Any], Fault, str]] = [
    ({}, dropout, r"Found: dropout.*model\.eval\(\)"),
    ({}, train_mode, r"Found: layers in training mode \(Qwen2ForCausalLM, model"),
    ({}, weights, "Found: the weights changed between rollout and update"),
    (COLD, temperature, "Found: the temperature differs .* drawn at 0.5 and are evaluated at 0.7"),
    ({}, half_update, r"Found: precision: evaluated in torch\.float32 the deviation vanishes"),
    ({"train": {"micro_batch": 15}}, batch_shape, "Found: the model's result depends on the batch shape"),
    ({}, update_alone, "Found: .* only the differentiable pass differs"),
    (SAMPLER, other_sampler, "Found: the samples were drawn by the weights of 'sampler'"),
]


@pytest.mark.parametrize(("sections", "fault", "cause"), FAULTS, ids=[f.__name__ for _, f, _ in FAULTS])
def test_the_fault_is_named(lm: Path, tmp_path: Path, sections: dict[str, Any], fault: Fault, cause: str) -> None:
    trainer, policy = trainer_of(lm, tmp_path, sections)
    trainer.step(0)  # in order, the check passes
    fault(policy)
    with pytest.raises(FirstUpdateError, match=rf"differs from the sampler's by .*{cause}"):
        trainer.step(1)


def test_another_precision_ends_with_the_block(lm: Path, tmp_path: Path) -> None:
    _, policy = trainer_of(lm, tmp_path, {"model": {"train": "lora", "dtype": "bfloat16", "lora": {"rank": 2}}})
    model = policy.network.model
    kinds = [p.dtype for p in model.parameters()]
    assert {torch.bfloat16, torch.float32} == set(kinds)
    with policy.in_precision(torch.float32):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert policy.network.dtype == torch.float32
    assert [p.dtype for p in model.parameters()] == kinds
    assert policy.network.dtype == torch.bfloat16
