"""The first-update check of a real pipeline: it passes without a fault, and the diagnosis finds every injected fault."""

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
from difrl.policies.diagnosis import evaluation_mode
from difrl.policies.diffusion.load import load_diffusion_policy
from difrl.policies.diffusion.policy import DiffusionPolicy
from difrl.policies.logprob_check import FirstUpdateError
from difrl.runtime.distributed import DistributedContext
from difrl.scoring import Scorer
from difrl.training.trainer import Trainer
from tests.fakes import Brightness
from tests.helpers import draw_from_snapshot
from tests.recipes import AWM, FLOW_GRPO, recipe

Fault = Callable[[DiffusionPolicy], None]
LORA = {"train": "lora", "lora": {"rank": 2}}
GUIDED = {**FLOW_GRPO, "rollout": {"kernel": "flow_sde", "noise_level": 0.7, "guidance": 3.0}}
OLD: dict[str, Any] = {"snapshots": {"old": {"decay": 0.0}}}
SAMPLER: dict[str, Any] = {"snapshots": {"old": {"decay": 0.0}, "sampler": {"decay": 0.5}}}
RECOMPUTED: dict[str, Any] = {"likelihood": {"kind": "forward", "decisions": 3, "old": "recompute"}}
REVERSE_RECOMPUTED = {**FLOW_GRPO, "likelihood": {"kind": "reverse", "old": "recompute"}, **OLD}


def drawn_by(snapshot: str, sections: dict[str, Any]) -> dict[str, Any]:
    return {**sections, "rollout": {**sections.get("rollout", {}), "snapshot": snapshot}}


# Every likelihood and where its ℓ_old comes from, with θ or another snapshot as the sampler.
SCHEMES: dict[str, dict[str, Any]] = {
    "forward, detach": AWM,
    "forward, recompute": {**RECOMPUTED, **OLD},
    "forward, old that lags": {**RECOMPUTED, "snapshots": {"old": {"decay": 0.5}}},
    "forward, three snapshots": drawn_by("sampler", {**RECOMPUTED, **SAMPLER}),
    "forward, guided reference": {**AWM, "rollout": {"guidance": 3.0}, "anchors": [{"to": "base", "guidance": 3.0}]},
    "reverse, recorded": FLOW_GRPO,
    "reverse, recompute": REVERSE_RECOMPUTED,
    "reverse, detach": {**FLOW_GRPO, "likelihood": {"kind": "reverse", "old": "detach"}},
    "reverse, sampler": drawn_by("sampler", {**FLOW_GRPO, **SAMPLER}),
    "reverse, guided": {**GUIDED, "anchors": [{"to": "base", "guidance": 1.0, "divergence": "gaussian"}]},
    "reverse, LoRA": {**FLOW_GRPO, "model": LORA},
    "forward, LoRA, three snapshots": drawn_by("sampler", {**RECOMPUTED, **SAMPLER, "model": LORA}),
}


def trainer_of(path: Path, sections: dict[str, Any]) -> tuple[Trainer, DiffusionPolicy]:
    config = recipe(path, **{**sections, "train": {"lr": 0.05, **sections.get("train", {})}})
    scorer = Scorer.from_rewards({"brightness": (Brightness(), 1.0)}, {})
    policy = load_diffusion_policy(config)
    return Trainer(config, policy, scorer, load_prompts(config.data.train), DistributedContext()), policy


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_passes_while_weights_move(sd3: Path, scheme: str) -> None:
    """The check passes in the second step too, when lagging snapshots differ from θ."""
    trainer, _ = trainer_of(sd3, SCHEMES[scheme])
    before = [p.detach().clone() for p in trainer.parameters]
    trainer.step(0)
    trainer.step(1)
    assert not all(torch.equal(p, old) for p, old in zip(trainer.parameters, before, strict=True))


def test_references_equal_to_the_policy_have_its_weights_and_guidance(sd3: Path) -> None:
    guided = [{"to": "old", "guidance": 2.0}, {"to": "ema"}]
    sections = {**RECOMPUTED, "snapshots": {"old": {"decay": 0.0}, "ema": {"decay": 0.5}}, "anchors": guided}
    trainer, policy = trainer_of(sd3, sections)
    assert set(policy.references_equal_to_policy()) == {"old", "ema"}
    trainer.step(0)
    assert policy.references_equal_to_policy() == ["old"]


def during(policy: DiffusionPolicy, method: str, change: Callable[[], Any], undo: Callable[[], Any]) -> None:
    """Call `change` before a method of the policy and `undo` after it."""
    inner = getattr(policy, method)

    def call(*args: Any, **named: Any) -> Any:
        change()
        try:
            return inner(*args, **named)
        finally:
            undo()

    setattr(policy, method, call)


def hook(policy: DiffusionPolicy, change: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
    """Change the output of the denoiser."""
    policy.family.denoiser.register_forward_hook(lambda module, inputs, output: (change(module, output[0]),))


def dropout(policy: DiffusionPolicy) -> None:
    hook(policy, lambda module, output: F.dropout(output, 0.1))


def dropout_layer(policy: DiffusionPolicy) -> None:
    """A dropout layer that a stray train() activates."""
    hook(policy, lambda module, output: F.dropout(output, 0.1, training=module.training))
    policy.family.denoiser.training = True


def train_mode(policy: DiffusionPolicy) -> None:
    """A layer with another result in training mode, without randomness, active only after the rollout."""
    denoiser = policy.family.denoiser
    hook(policy, lambda module, output: output * (1.05 if module.training else 1.0))
    during(policy, "rollout", lambda: None, lambda: denoiser.train())


def batch_statistics(policy: DiffusionPolicy) -> None:
    """The effect of a batch-norm layer in training mode."""
    hook(policy, lambda module, output: output - 0.5 * output.mean(0) if module.training else output)
    policy.family.denoiser.training = True


def guidance(policy: DiffusionPolicy) -> None:
    policy.kind = replace(policy.kind, guided=False)  # type: ignore[type-var]


def changed_guidance(policy: DiffusionPolicy) -> None:
    """The scale is lowered between rollout and update, but not for evaluations."""
    lower = replace(policy.sampling, guidance=1.5)
    during(policy, "rollout", lambda: None, lambda: setattr(policy, "sampling", lower))


def weights(policy: DiffusionPolicy) -> None:
    def move() -> None:
        with torch.no_grad():
            for p in policy.parameters.values():
                p.mul_(1.02)

    during(policy, "rollout", lambda: None, move)


def set_dtype(policy: DiffusionPolicy, dtype: torch.dtype) -> Callable[[], None]:
    def change() -> None:
        policy.dtype = policy.prompts.dtype = dtype

    return change


def half_rollout(policy: DiffusionPolicy) -> None:
    during(policy, "rollout", set_dtype(policy, torch.bfloat16), set_dtype(policy, torch.float32))


def half_update(policy: DiffusionPolicy) -> None:
    during(policy, "rollout", lambda: None, set_dtype(policy, torch.bfloat16))


def attention(policy: DiffusionPolicy) -> None:
    """An attention whose result depends on the number of samples in the batch."""
    hook(policy, lambda module, output: output * (1 + 0.01 * len(output)))


def update_alone(policy: DiffusionPolicy) -> None:
    hook(policy, lambda module, output: output * (1.05 if torch.is_grad_enabled() else 1.0))


def other_sampler(policy: DiffusionPolicy) -> None:
    """A snapshot draws the samples, although θ is the configured sampler."""
    draw_from_snapshot(policy, "sampling", "sampler")


FAULTS: list[tuple[dict[str, Any], Fault, str]] = [
    (AWM, dropout, "Found: dropout"),
    (FLOW_GRPO, dropout, "Found: dropout"),
    (FLOW_GRPO, dropout_layer, r"Found: dropout.*denoiser\.eval\(\)"),
    (FLOW_GRPO, train_mode, r"Found: layers in training mode \(SD3Transformer2DModel"),
    (AWM, batch_statistics, "Found: layers in training mode"),
    (GUIDED, guidance, "Found: guidance differs .* drawn at 3 and are evaluated at 1"),
    (GUIDED, changed_guidance, "Found: guidance differs .* drawn at 3 and are evaluated at 1.5"),
    (FLOW_GRPO, weights, "Found: the weights changed between rollout and update"),
    (FLOW_GRPO, half_rollout, r"Found: precision: evaluated in torch\.bfloat16 the deviation vanishes"),
    (FLOW_GRPO, half_update, r"Found: precision: evaluated in torch\.float32 the deviation vanishes"),
    (FLOW_GRPO, attention, "Found: the denoiser's result depends on the batch shape"),
    (AWM, attention, "Found: the denoiser's result depends on the batch shape"),
    (AWM, update_alone, "Found: .* only the differentiable pass differs"),
    ({**RECOMPUTED, **OLD}, update_alone, "Found: .* only the differentiable pass differs"),
    ({**FLOW_GRPO, **SAMPLER}, other_sampler, "Found: the samples were drawn by the weights of 'sampler'"),
    (drawn_by("sampler", {**FLOW_GRPO, **SAMPLER}), dropout, "Found: dropout"),
    (drawn_by("sampler", {**RECOMPUTED, **SAMPLER}), attention, "Found: the denoiser's result depends on the batch"),
]


@pytest.mark.parametrize(
    ("sections", "fault", "cause"), FAULTS, ids=[f"{n}, {f.__name__}" for n, (_, f, _) in enumerate(FAULTS)]
)
def test_the_fault_is_named(sd3: Path, sections: dict[str, Any], fault: Fault, cause: str) -> None:
    trainer, policy = trainer_of(sd3, {**sections, "train": {"micro_batch": 12}})
    trainer.step(0)  # in order, the check passes
    fault(policy)
    with pytest.raises(FirstUpdateError, match=rf"differs from the sampler's by .*{cause}"):
        trainer.step(1)


def test_old_weights_that_do_not_give_ratio_one(sd3: Path) -> None:
    """θ agrees with the sampler, and ℓ_old, which is evaluated without gradient, does not agree with θ."""
    trainer, policy = trainer_of(sd3, REVERSE_RECOMPUTED)
    hook(policy, lambda module, output: output)
    inner = policy.denoiser

    def denoiser(snapshot: str = "current", guidance: float = 1.0) -> Any:
        found = inner(snapshot, guidance)
        return (lambda *args: found(*args) * 1.05) if snapshot == "old" else found

    policy.denoiser = denoiser  # type: ignore[method-assign]
    with pytest.raises(FirstUpdateError, match="ℓ_θ differs from that of 'old', whose weights are the same, by"):
        trainer.step(0)


def test_rounding_that_depends_on_the_batch_is_precision(sd3: Path) -> None:
    """In bfloat16 a layer rounds by batch size; widened to float32 both shapes agree."""
    trainer, policy = trainer_of(sd3, {**AWM, "model": {**LORA, "dtype": "bfloat16"}, "train": {"micro_batch": 12}})
    trainer.step(0)
    hook(policy, lambda module, out: out if out.dtype == torch.float32 else out * (1 + 0.02 * len(out)))
    with pytest.raises(FirstUpdateError, match=r"Found: precision: evaluated in torch\.float32"):
        trainer.step(1)


def test_a_diagnosis_leaves_modes_and_weights_as_they_were(sd3: Path) -> None:
    _, policy = trainer_of(sd3, {"model": {**LORA, "dtype": "bfloat16"}})
    denoiser = policy.family.denoiser
    denoiser.train()
    kinds = [p.dtype for p in denoiser.parameters()]
    assert {torch.bfloat16, torch.float32} == set(kinds)
    values = [p.detach().clone() for p in denoiser.parameters()]
    with evaluation_mode(denoiser), policy.in_precision(torch.float32):
        assert not any(m.training for m in denoiser.modules())
        assert {p.dtype for p in denoiser.parameters()} == {torch.float32}
    assert all(m.training for m in denoiser.modules())
    assert [p.dtype for p in denoiser.parameters()] == kinds
    assert all(torch.equal(p, old) for p, old in zip(denoiser.parameters(), values, strict=True))
    assert policy.dtype == torch.bfloat16


def test_shortage_of_memory_does_not_hide_the_finding(sd3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, policy = trainer_of(sd3, FLOW_GRPO)
    weights(policy)
    policy.sampler_fingerprint = lambda: torch.zeros(1)  # type: ignore[method-assign]

    def short(*args: Any, **named: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(DiffusionPolicy, "recompute_logprobs", short)
    with pytest.raises(FirstUpdateError, match=r"differs .* search for the cause failed: out of memory"):
        trainer.step(0)
