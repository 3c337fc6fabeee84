"""Anchors and snapshots of a diffusion policy: KL in the reward, and the roles of sampler, old policy and θ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from difrl.data.prompts import Prompt
from difrl.policies.base import ALL, NoiseKey
from difrl.policies.diffusion.load import load_diffusion_policy
from difrl.policies.diffusion.policy import DiffusionPolicy
from difrl.policies.snapshots import Copy
from difrl.runtime.distributed import DistributedContext
from difrl.scoring import Scorer
from difrl.training.trainer import Trainer
from tests.fakes import Brightness
from tests.helpers import perturb, without_times
from tests.recipes import FLOW_GRPO, recipe

KEY = NoiseKey(seed=3, step=5)
PROMPTS = [Prompt(f"a {colour} square", {}) for colour in ("red", "green", "blue", "white")]
LORA = {"train": "lora", "lora": {"rank": 4}}
GUIDED = {"kernel": "flow_sde", "noise_level": 0.7, "guidance": 2.0}


def drawn(policy: DiffusionPolicy) -> Any:
    return policy.rollout(PROMPTS[:3], torch.arange(3), torch.arange(3), KEY)


@pytest.mark.parametrize("model", [{"train": "full"}, LORA])
def test_penalties_are_log_ratios_of_the_sampler_to_the_anchor(sd3: Path, model: dict[str, Any]) -> None:
    """The expected ℓ comes from a second policy that was never trained, under the guidance of the anchor."""
    k1 = {"divergence": "k1", "place": "reward"}
    sections = {
        **FLOW_GRPO,
        "model": model,
        "rollout": GUIDED,
        "anchors": [{"to": "base", **k1}, {"to": "base", "guidance": 1.0, **k1}],
    }
    policy, pretrained = (load_diffusion_policy(recipe(sd3, **sections)) for _ in range(2))
    perturb(policy.parameters)
    rollout = drawn(policy)
    decisions = policy.decisions(rollout, KEY)
    before = {name: p.detach().clone() for name, p in policy.parameters.items()}
    (found,) = policy.penalties(rollout, decisions, [ALL])
    assert all(torch.equal(p, before[name]) for name, p in policy.parameters.items())
    assert list(found) == ["base", "base-cfg1"]
    assert policy.likelihoods(rollout, decisions).terms.keys() <= {"references/old"}
    flat = decisions.flat()
    condition = policy.prompts(PROMPTS[:3], True).repeat_interleave(decisions.mask.shape[1])
    for name, scale in (("base", 2.0), ("base-cfg1", 1.0)):
        with torch.no_grad():
            output = pretrained.denoiser(guidance=scale)(flat["x_t"], flat["t"], condition)
        expected = rollout.replay_data["log_prob"] - policy.kind.evaluate(output, flat).logp.unflatten(
            0, decisions.mask.shape
        )
        torch.testing.assert_close(found[name].amount, expected, atol=1e-5, rtol=1e-4)
        assert torch.equal(found[name].divergence, found[name].amount)
        assert not found[name].amount.requires_grad
    assert found["base"].amount.abs().max() > 1e-3


ANCHORED = {
    "snapshots": {"old": {"decay": 0.5}, "ema": {"decay": 0.9}},
    "likelihood": {"kind": "forward", "decisions": 3, "old": "recompute", "mix": 1.0},
    "objective": {"kind": "negative_aware"},
    "anchors": [{"to": "ema", "coefficient": 0.5}, {"to": "base", "coefficient": 0.5}],
}
GAUSSIAN = {**FLOW_GRPO, "rollout": GUIDED, "anchors": [{"to": "base", "divergence": "gaussian", "guidance": 1.0}]}


@pytest.mark.parametrize("copies", ["device", "cpu"])
@pytest.mark.parametrize("sections", [ANCHORED, GAUSSIAN], ids=["forward", "reverse"])
def test_references_of_an_update_are_those_of_each_micro_batch(sd3: Path, sections: Any, copies: str) -> None:
    """Outputs that were held have the bits of those that each micro-batch makes for itself."""
    policy = load_diffusion_policy(recipe(sd3, **{**sections, "model": {"train": "full", "copies": copies}}))
    perturb(policy.parameters)
    rollout = drawn(policy)
    decisions = policy.decisions(rollout, KEY)
    parts = [(slice(0, 2), slice(0, 2)), (slice(0, 2), slice(2, 3)), (slice(2, 3), slice(0, 3))]
    held = list(policy.evaluate_references(rollout, decisions, parts))
    compared = policy.reference_set.compared_outputs(policy.reference_set.needs)
    for (rows, columns), references in zip(parts, held, strict=True):
        assert {name for name, one in references.items() if one.output is not None} == compared
        alone = rollout.select(rows), decisions.select(rows, columns)
        found, expected = policy.likelihoods(*alone, references=references), policy.likelihoods(*alone)
        assert torch.equal(found.logp, expected.logp)
        assert found.terms.keys() == expected.terms.keys()
        assert all(torch.equal(term, expected[name]) for name, term in found.terms.items())


@pytest.mark.parametrize("micro_batch", [2, 6, 1000])
def test_weights_are_exchanged_once_for_each_snapshot_and_update(
    sd3: Path, micro_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once to enter a snapshot and once to leave it: old, ema and the pretrained weights."""
    config = recipe(sd3, **ANCHORED, train={"micro_batch": micro_batch})
    scorer = Scorer.from_rewards({"brightness": (Brightness(), 1.0)}, {})
    trainer = Trainer(config, load_diffusion_policy(config), scorer, PROMPTS, DistributedContext())
    exchanged, exchange = list[Copy](), Copy._exchange
    monkeypatch.setattr(Copy, "_exchange", lambda copy: (exchanged.append(copy), exchange(copy)))
    trainer.step(0)
    snapshots = trainer.policy.snapshots
    assert exchanged == [
        one for one in (snapshots.copies["ema"], snapshots.pretrained, snapshots.copies["old"]) for _ in "12"
    ]


@pytest.mark.parametrize("sections", [{}, FLOW_GRPO], ids=["loss", "reward"])
def test_an_anchor_without_effect_is_evaluated_only_to_be_measured(sd3: Path, sections: dict[str, Any]) -> None:
    """A coefficient that rises from 0: in its first step nothing depends on whether the anchor is measured."""
    place = {"place": "reward", "divergence": "k1"} if sections else {}
    rising = {"to": "base", "coefficient": {"kind": "linear", "start": 0.0, "end": 1.0}, **place}
    scorer = Scorer.from_rewards({"brightness": (Brightness(), 1.0)}, {})
    rows = []
    for measure in (False, True):
        config = recipe(sd3, **sections, anchors=[{**rising, "measure": measure}])
        trainer = Trainer(config, load_diffusion_policy(config), scorer, PROMPTS, DistributedContext())
        rows.append([without_times(trainer.step(number)) for number in range(2)])
    (first, second), measured = rows
    assert measured[0].keys() - first.keys() == {"kl/base"}
    assert {**measured[0], **first, "nfe": measured[0]["nfe"]} == measured[0]
    assert measured[0]["nfe"] > first["nfe"]
    assert first["coefficient/base"] == 0
    assert {**measured[1], "nfe": second["nfe"]} == second


@pytest.mark.parametrize("branch", [None, {"count": 1}])
def test_reference_samples_are_what_the_weights_of_then_draw(sd3: Path, branch: dict[str, int] | None) -> None:
    """A second policy that was never trained draws the same, under the rollout's guidance and without branches."""
    sampling = {**GUIDED, "steps": 5, "window": {"kind": "fixed", "start": 1, "size": 2}}
    sections = {**FLOW_GRPO, "data": {"prompts_per_step": 2, "group_size": 4}}
    policy = load_diffusion_policy(
        recipe(sd3, **{**sections, "rollout": {**sampling, "branch": branch}}), keep_base=True
    )
    pretrained = load_diffusion_policy(recipe(sd3, **{**sections, "rollout": sampling}))
    perturb(policy.parameters)
    found = policy.reference(PROMPTS[:3], torch.arange(3), KEY, "base")
    expected, own = drawn(pretrained).images, drawn(policy).images
    torch.testing.assert_close(found.images, expected, atol=1e-5, rtol=0)
    assert found.replay_data == {}
    assert (expected - own).abs().max() > 1e-3


@pytest.mark.parametrize("model", [{"train": "full"}, LORA])
def test_sampler_draws_and_old_is_the_denominator(sd3: Path, model: dict[str, Any]) -> None:
    """After two steps of the trainer old, sampler and θ differ, and each has its own role."""
    config = recipe(
        sd3,
        model=model,
        snapshots={"old": {"decay": 0.5}, "sampler": {"decay": 0.9}},
        rollout={"snapshot": "sampler"},
        likelihood={"kind": "forward", "decisions": 2, "old": "recompute"},
        data={"prompts_per_step": 2, "group_size": 2},
        train={"lr": 0.02, "micro_batch": 8},
    )
    policy = load_diffusion_policy(config)
    trainer = Trainer(
        config, policy, Scorer.from_rewards({"b": (Brightness(), 1.0)}, {}), PROMPTS, DistributedContext()
    )
    for number in range(2):
        trainer.step(number)
    rollout = drawn(policy)
    decisions = policy.decisions(rollout, KEY)
    found = policy.likelihoods(rollout, decisions)
    flat, condition = decisions.flat(), policy.prompts(PROMPTS[:3], False).repeat_interleave(2)

    def logp(snapshot: str) -> torch.Tensor:
        with torch.no_grad():
            output = policy.denoiser(snapshot)(flat["x_t"], flat["t"], condition)
        return policy.kind.evaluate(output, flat).logp.unflatten(0, decisions.mask.shape)

    values = [logp(name) for name in ("current", "old", "sampler")]
    torch.testing.assert_close(found.logp.detach(), values[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found["references/old"], values[1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(policy.recompute_logprobs(rollout, decisions), values[2], atol=1e-5, rtol=1e-4)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (values[one] - values[other]).abs().max() > 1e-4
    alone = load_diffusion_policy(recipe(sd3, model=model))
    with policy.snapshots.use("sampler"):
        for name, p in alone.parameters.items():
            p.data.copy_(policy.parameters[name])
    assert torch.equal(drawn(alone).images, rollout.images)


def test_base_that_cannot_be_reached_leaves_the_model(sd3: Path) -> None:
    """After an exception in a pass under the base, in full training, θ is restored."""
    policy = load_diffusion_policy(recipe(sd3, model={"train": "full", "copies": "cpu"}), keep_base=True)
    perturb(policy.parameters)
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in policy.parameters.items()}
    with policy.snapshots.use("base"):
        assert not any(torch.equal(p, before[name][1]) for name, p in policy.parameters.items())
    with pytest.raises(KeyError), policy.snapshots.use("base"):
        raise KeyError
    for name, p in policy.parameters.items():
        assert p.data_ptr() == before[name][0]
        assert torch.equal(p, before[name][1])
