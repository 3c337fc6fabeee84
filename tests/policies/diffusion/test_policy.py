"""DiffusionPolicy against the pipelines of diffusers and against gradients computed here, on random SD3 and SD3.5 models."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from difrl.core import weighted_mean
from difrl.data.prompts import Prompt
from difrl.policies.base import GuidanceSettings, NoiseKey
from difrl.policies.diffusion.families.modular import ModularFamily
from difrl.policies.diffusion.load import load_diffusion_policy
from difrl.policies.diffusion.policy import DiffusionPolicy
from difrl.policies.errors import ModelError
from samplers import keyed
from tests.helpers import perturb
from tests.recipes import FLOW_GRPO, recipe

TEXTS = ["a red circle", "two blue squares", "a green square and a yellow triangle"]
PROMPTS = [Prompt(text, {}, negative, 1.0) for text, negative in zip(TEXTS, (None, "a circle", None), strict=True)]
SAMPLES = torch.arange(3)
KEY = NoiseKey(seed=3, step=5)
LORA = {"train": "lora", "lora": {"rank": 4, "alpha": 8.0}}
ANCHORED = {
    "anchors": [{"to": "base", "coefficient": 0.5}, {"to": "ema", "coefficient": 0.3, "guidance": 2.0}],
    "snapshots": {"ema": {"decay": 0.5}},
}


def policy_of(path: Path, /, **sections: Any) -> DiffusionPolicy:
    return load_diffusion_policy(recipe(path, **sections), keep_base=True)


def rollout(policy: DiffusionPolicy, key: NoiseKey = KEY) -> Any:
    return policy.rollout(PROMPTS, torch.arange(3), SAMPLES, key)


def gradient(policy: DiffusionPolicy, weights: Tensor, penalised: bool = False) -> dict[str, Tensor]:
    """The gradient of mean_ij(−A_i ℓ_ij), with or without the anchors' divergences."""
    drawn = rollout(policy)
    lik = policy.likelihoods(drawn, policy.decisions(drawn, KEY))
    loss = -weights[:, None] * lik.logp
    if penalised:
        loss = loss + sum(value for name, value in lik.terms.items() if name.startswith("divergence/"))
    for p in policy.parameters.values():
        p.grad = None
    weighted_mean(loss, lik.mask, lik.mask.sum()).backward()
    return {name: p.grad.clone() for name, p in policy.parameters.items() if p.grad is not None}


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_evaluation_is_the_pipelines_own_image(sd35: Path, guidance: float) -> None:
    """With T5, dual attention, QK norm, shift 3 and negative prompts the same noise gives the image of diffusers to 1e-4."""
    policy = policy_of(sd35, rollout={"guidance": guidance}, model={"max_sequence_length": 16})
    images = policy.evaluation(PROMPTS, SAMPLES, NoiseKey(3, 0, "eval")).images
    noise = keyed((4, 4, 4), seed=3, step=0, samples=SAMPLES, use="eval/init")
    pipeline = StableDiffusion3Pipeline.from_pretrained(sd35)
    expected = pipeline(
        TEXTS,
        negative_prompt=[p.negative or "" for p in PROMPTS],
        num_inference_steps=4,
        guidance_scale=guidance,
        max_sequence_length=16,
        latents=noise,
        output_type="pt",
    ).images
    assert images is not None
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.01  # a blank image would agree with anything


@pytest.fixture(scope="module")
def without_t5(sd35: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a pipeline that was pretrained with T5 as it is when T5 was not loaded."""
    folder = tmp_path_factory.mktemp("models") / "without_t5"
    absent = {"text_encoder_3": None, "tokenizer_3": None}
    StableDiffusion3Pipeline.from_pretrained(sd35, **absent).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_without_t5_the_image_is_the_pipelines_own(without_t5: Path, guidance: float) -> None:
    """The pipeline appends 256 zeros in the place of T5's tokens, which change the image."""
    policy = policy_of(without_t5, rollout={"guidance": guidance})
    found = policy.evaluation(PROMPTS, SAMPLES, NoiseKey(3, 0, "eval")).images
    assert found is not None
    pipeline = StableDiffusion3Pipeline.from_pretrained(without_t5, text_encoder_3=None, tokenizer_3=None)

    def drawn(**lengths: int) -> Tensor:
        noise = keyed((4, 4, 4), seed=3, step=0, samples=SAMPLES, use="eval/init")
        negative = [p.negative or "" for p in PROMPTS]
        steps = {"num_inference_steps": 4, "guidance_scale": guidance, "output_type": "pt"}
        return torch.as_tensor(pipeline(TEXTS, negative_prompt=negative, latents=noise, **steps, **lengths).images)

    torch.testing.assert_close(found, drawn(), atol=1e-4, rtol=0)
    assert (found - drawn(max_sequence_length=0)).abs().max() > 1e-2
    skeleton = ModularFamily.build_skeleton(str(without_t5), None)
    shapes = [family.encode(TEXTS[0], None, None)["prompt_embeds"].shape for family in (skeleton, policy.family)]
    assert shapes[0] == shapes[1]


def test_a_model_without_t5_from_the_start_says_so_and_keeps_it(sd3: Path, tmp_path: Path) -> None:
    """A pipeline that training saves is one of the same kind."""
    policy = policy_of(sd3)
    policy.save(tmp_path / "model")
    again = policy_of(tmp_path / "model")
    clip = policy.family.pipeline.text_encoder.config.max_position_embeddings
    for one in (policy, again):
        assert one.family.encode(TEXTS[0], None, None)["prompt_embeds"].shape[1] == clip
        assert one.family.encode(TEXTS[0], None, 3)["prompt_embeds"].shape[1] == clip + 3


def test_samples_do_not_depend_on_the_batch(sd3: Path) -> None:
    policy = policy_of(sd3)
    together = rollout(policy).replay_data["latents"]
    alone = policy.rollout(PROMPTS[1:2], torch.tensor([1]), torch.tensor([1]), KEY).replay_data["latents"]
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "kernel", [("flow_sde", 0.7), ("dance_sde", 0.3), ("cps", 0.5), ("precise", 0.7), ("ddim", 0.5)]
)
def test_reverse_likelihood_repeats_what_the_rollout_recorded(sd35: Path, kernel: tuple[str, float]) -> None:
    sampling = {"kernel": kernel[0], "noise_level": kernel[1], "guidance": 2.0, "steps": 5}
    policy = policy_of(sd35, **{**FLOW_GRPO, "rollout": sampling}, model={"max_sequence_length": 8})
    drawn = rollout(policy)
    decisions = policy.decisions(drawn, KEY)
    lik = policy.likelihoods(drawn, decisions)
    assert lik.logp.shape[1] >= 2
    torch.testing.assert_close(lik.logp.detach(), drawn.replay_data["log_prob"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lik.log_ratio("old").detach(), torch.zeros_like(lik.logp), atol=1e-4, rtol=0)
    perturb(policy.parameters)
    assert policy.likelihoods(drawn, decisions).log_ratio("old").abs().max() > 1e-3


@pytest.mark.parametrize("train", [{"train": "full"}, LORA])
def test_forward_gradient_is_minus_advantage_times_the_pretraining_gradient(sd3: Path, train: dict[str, Any]) -> None:
    """∇ mean(−A ℓ) = mean(A ∇ ‖out − (ε − x0)‖²), the second written out without difrl's likelihoods."""
    policy = policy_of(sd3, model=train)
    perturb(policy.parameters)
    advantage = torch.tensor([1.0, -2.0, 0.5])
    found = gradient(policy, advantage)
    drawn = rollout(policy)
    d = policy.decisions(drawn, KEY).tensors
    condition = policy.prompts(PROMPTS, False).tensors
    losses = []
    for j in range(3):
        x0, noise, t = d["x0"][:, j], d["noise"][:, j], d["t"][:, j].float()
        x_t = (1 - t)[:, None, None, None] * x0 + t[:, None, None, None] * noise
        out = policy.family.pipeline.transformer(
            x_t, condition["prompt_embeds"], condition["pooled_prompt_embeds"], 1000 * t
        ).sample
        losses.append(F.mse_loss(out, noise - x0, reduction="none").mean((1, 2, 3)))
    for p in policy.parameters.values():
        p.grad = None
    (advantage[:, None] * torch.stack(losses, 1)).mean().backward()
    for name, p in policy.parameters.items():
        assert p.grad is not None
        torch.testing.assert_close(found[name], p.grad, atol=1e-6, rtol=1e-3, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("train", [{"train": "full"}, LORA])
@pytest.mark.parametrize("method", ["forward", "reverse"])
def test_passes_under_other_weights_leave_the_gradient_alone(
    sd3: Path, train: dict[str, Any], checkpointing: bool, method: str
) -> None:
    """Weights are exchanged for anchors inside likelihoods(); the gradient must be that of a policy without anchors."""
    kind = FLOW_GRPO if method == "reverse" else {}
    model = {**train, "gradient_checkpointing": checkpointing}
    plain, anchored = policy_of(sd3, model=train, **kind), policy_of(sd3, model=model, **kind, **ANCHORED)
    for policy in (plain, anchored):
        perturb(policy.parameters)
    anchored.snapshots.update(0)
    perturb(anchored.parameters, seed=1)
    perturb(plain.parameters, seed=1)
    advantage = torch.tensor([1.0, -2.0, 0.5])
    expected, found = gradient(plain, advantage), gradient(anchored, advantage)
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-3, msg=name)
    assert any((gradient(anchored, advantage, penalised=True)[n] - expected[n]).abs().max() > 1e-4 for n in expected)


@pytest.mark.parametrize("train", [{"train": "full"}, LORA])
def test_anchor_divergences_are_squared_differences_of_outputs(sd3: Path, train: dict[str, Any]) -> None:
    policy = policy_of(sd3, model=train, **ANCHORED)
    base = policy_of(sd3)
    perturb(policy.parameters)
    drawn = rollout(policy)
    decisions = policy.decisions(drawn, KEY)
    lik = policy.likelihoods(drawn, decisions)
    flat, condition = decisions.flat(), policy.prompts(PROMPTS, False).repeat_interleave(3)
    outputs = [p.denoiser()(flat["x_t"], flat["t"], condition) for p in (policy, base)]
    expected = (outputs[0] - outputs[1]).square().mean((1, 2, 3)).unflatten(0, (3, 3))
    torch.testing.assert_close(lik["divergence/base"], expected, atol=1e-6, rtol=1e-4)
    assert {name for name in lik.terms if name.startswith("divergence/")} == {"divergence/base", "divergence/ema-cfg2"}
    assert lik["divergence/ema-cfg2"].min() > 0  # under guidance 2 even equal weights differ


def test_gaussian_anchor_is_the_kl_of_torch(sd3: Path) -> None:
    policy = policy_of(sd3, **FLOW_GRPO, anchors=[{"to": "base", "divergence": "gaussian"}])
    perturb(policy.parameters)
    drawn = rollout(policy)
    decisions = policy.decisions(drawn, KEY)
    found = policy.likelihoods(drawn, decisions)["divergence/base"]
    flat = decisions.flat()
    condition = policy.prompts(PROMPTS, False).repeat_interleave(found.shape[1])
    transitions = [
        policy.kind.evaluate(policy.denoiser(name)(flat["x_t"], flat["t"], condition), flat).transition
        for name in ("current", "base")
    ]
    normal = [torch.distributions.Normal(g.mean, g.std.expand_as(g.mean)) for g in transitions]
    expected = torch.distributions.kl_divergence(*normal).mean((1, 2, 3)).unflatten(0, found.shape)
    torch.testing.assert_close(found, expected.to(found.dtype), atol=1e-6, rtol=1e-4)


def test_lora_loads_in_plain_diffusers_and_gives_the_same_images(sd35: Path, tmp_path: Path) -> None:
    policy = policy_of(sd35, model={**LORA, "max_sequence_length": 8})
    perturb(policy.parameters, 0.3)
    policy.save(tmp_path / "lora")
    images = policy.evaluation(PROMPTS, SAMPLES, NoiseKey(0, 0, "eval")).images
    untouched = policy.evaluation(PROMPTS, SAMPLES, NoiseKey(0, 0, "eval"), GuidanceSettings(0.0)).images
    pipeline = StableDiffusion3Pipeline.from_pretrained(sd35)
    pipeline.load_lora_weights(tmp_path / "lora")
    noise = keyed((4, 4, 4), seed=0, step=0, samples=SAMPLES, use="eval/init")
    plain = pipeline(
        TEXTS, num_inference_steps=4, guidance_scale=1.0, max_sequence_length=8, latents=noise, output_type="pt"
    ).images
    assert images is not None
    assert untouched is not None
    torch.testing.assert_close(images, plain, atol=1e-4, rtol=0)
    assert (images - untouched).abs().max() > 1e-2
    warm = policy_of(
        sd35, model={"train": "lora", "lora": {"warm_start": str(tmp_path / "lora")}, "max_sequence_length": 8}
    )
    again = warm.evaluation(PROMPTS, SAMPLES, NoiseKey(0, 0, "eval")).images
    torch.testing.assert_close(images, again, atol=1e-4, rtol=0)
    assert warm.parameters.keys() == policy.parameters.keys()


def test_full_fine_tune_loads_with_from_pretrained(sd3: Path, tmp_path: Path) -> None:
    policy = policy_of(sd3)
    perturb(policy.parameters)
    policy.save(tmp_path / "full")
    images = policy.evaluation(PROMPTS, SAMPLES, NoiseKey(0, 0, "eval")).images
    again = policy_of(tmp_path / "full").evaluation(PROMPTS, SAMPLES, NoiseKey(0, 0, "eval")).images
    assert images is not None
    assert again is not None
    torch.testing.assert_close(images, again, atol=1e-4, rtol=0)


def test_rlg_blends_outputs_of_base_and_tuned(sd3: Path) -> None:
    policy = policy_of(sd3, rollout={"guidance": 2.0})
    perturb(policy.parameters)
    seen = {
        w: policy.evaluation(PROMPTS, SAMPLES, NoiseKey(0, 0, "eval"), GuidanceSettings(w)).images
        for w in (0.0, 1.0, 2.0)
    }
    base = policy_of(sd3, rollout={"guidance": 2.0}).evaluation(PROMPTS, SAMPLES, NoiseKey(0, 0, "eval")).images
    torch.testing.assert_close(seen[0.0], base, atol=1e-5, rtol=0)
    assert base is not None
    assert seen[1.0] is not None
    assert seen[2.0] is not None
    assert (seen[1.0] - base).abs().max() > 1e-3
    assert (seen[2.0] - seen[1.0]).abs().max() > 1e-3


@pytest.mark.parametrize("train", [{"train": "full"}, LORA])
@pytest.mark.parametrize("method", ["forward", "reverse"])
def test_bfloat16_keeps_transitions_and_trained_weights_in_float32(
    sd35: Path, train: dict[str, Any], method: str
) -> None:
    kind = FLOW_GRPO if method == "reverse" else {}
    policy = policy_of(sd35, model={**train, "dtype": "bfloat16", "max_sequence_length": 8}, **kind)
    assert {p.dtype for p in policy.parameters.values()} == {torch.float32}
    drawn = rollout(policy)
    assert drawn.replay_data["latents"].dtype == torch.float32
    decisions = policy.decisions(drawn, KEY)
    lik = policy.likelihoods(drawn, decisions)
    assert lik.logp.dtype == torch.float32
    recorded = policy.rollout_logprobs(drawn, decisions)
    torch.testing.assert_close(lik.logp.detach(), recorded, atol=5e-2, rtol=5e-2)
    weighted_mean(-lik.logp, lik.mask, lik.mask.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters.values() if p.grad is not None)


def test_solver_in_place_of_a_kernel(sd3: Path) -> None:
    """DPM-Solver++ drives rollouts of a forward likelihood; at many steps it ends where the ODE ends."""
    fine = policy_of(sd3, rollout={"steps": 60})
    solved = policy_of(sd3, rollout={"steps": 60, "solver": "DPMSolverMultistepScheduler"})
    images = [p.evaluation(PROMPTS, SAMPLES, NoiseKey(0, 0, "eval")).images for p in (fine, solved)]
    assert images[0] is not None
    assert images[1] is not None
    torch.testing.assert_close(images[0], images[1], atol=0.05, rtol=0)


def test_missing_folder_names_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no folder './nowhere'.*hub id"):
        load_diffusion_policy(recipe("./nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no readable model_index\.json"):
        policy_of(tmp_path / "empty")


def test_folder_of_another_family_is_named(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "PixArtSigmaPipeline", "_diffusers_version": "0.42.0"}')
    with pytest.raises(ModelError, match=r"PixArtSigmaPipeline.*which diffusers does not cut into blocks"):
        policy_of(tmp_path)


@pytest.mark.parametrize("backend", ["xformers", "flash", "nonsense"])
def test_attention_backend_that_cannot_run_says_so(sd3: Path, backend: str) -> None:
    with pytest.raises(ModelError, match=rf"model\.attention: {backend} cannot run here.*sdpa"):
        policy_of(sd3, model={"attention": backend})


def test_unknown_lora_target_is_named(sd3: Path) -> None:
    with pytest.raises(ModelError, match="no module is called 'to_nothing'; similar names: to_out"):
        policy_of(sd3, model={"train": "lora", "lora": {"targets": ["to_nothing"]}})


def test_steps_that_are_not_adjacent_are_recorded_and_evaluated_again(sd3: Path) -> None:
    """Each recorded step starts where the trajectory is at its time; the steps between follow the ODE."""
    window = {"kind": "random", "size": 3, "end": 5, "adjacent": False}
    sections = {**FLOW_GRPO, "rollout": {"kernel": "flow_sde", "noise_level": 0.7, "steps": 8, "window": window}}
    policy = policy_of(sd3, **sections)
    times, seen = policy.sampling.grid.times, set[tuple[int, ...]]()
    for step in range(6):
        key = NoiseKey(seed=3, step=step)
        drawn = rollout(policy, key)
        decisions = policy.decisions(drawn, key)
        chosen = policy.sampling.window(key).indices
        seen.add(tuple(chosen))
        assert torch.equal(decisions.tensors["t"], times[chosen].repeat(3, 1))
        assert torch.equal(decisions.tensors["s"], times[[i + 1 for i in chosen]].repeat(3, 1))
        found = policy.recompute_logprobs(drawn, decisions)
        torch.testing.assert_close(found, drawn.replay_data["log_prob"], atol=1e-5, rtol=1e-5)
    assert any(b - a > 1 for one in seen for a, b in itertools.pairwise(one))


def test_window_that_reaches_into_silent_steps_is_refused(sd3: Path) -> None:
    """At this noise level the later steps have a std below 0.01, so three decisions are impossible."""
    sampling = {"kernel": "flow_sde", "noise_level": 0.012, "window": {"kind": "fixed", "size": 3}}
    with pytest.raises(ModelError, match=r"rollout\.window: 3 steps.*do not fit the noisy steps 0 to"):
        policy_of(sd3, **{**FLOW_GRPO, "rollout": sampling})


def test_anchor_to_old_under_its_own_guidance_leaves_the_ratio_alone(sd3: Path) -> None:
    """ℓ_old is evaluated under the guidance of θ, whatever guidance an anchor to the same snapshot has."""
    policy = policy_of(
        sd3,
        likelihood={"kind": "forward", "decisions": 2, "old": "recompute"},
        snapshots={"old": {"decay": 0.0}},
        anchors=[{"to": "old", "guidance": 4.5}],
    )
    drawn = rollout(policy)
    lik = policy.likelihoods(drawn, policy.decisions(drawn, KEY))
    torch.testing.assert_close(lik.log_ratio("old").detach(), torch.zeros_like(lik.logp), atol=1e-5, rtol=0)
    assert lik["divergence/old-cfg4.5"].min() > 0


def test_stochastic_solver_is_refused(sd3: Path) -> None:
    with pytest.raises(ModelError, match=r"SASolverScheduler draws noise of its own.*UniPC"):
        policy_of(sd3, rollout={"solver": "SASolverScheduler"})


def test_picture_size_the_model_cannot_draw_is_a_model_error(sd3: Path) -> None:
    with pytest.raises(ModelError, match=r"rollout\.width: found 33 pixels, expected a multiple of"):
        policy_of(sd3, rollout={"width": 33})
