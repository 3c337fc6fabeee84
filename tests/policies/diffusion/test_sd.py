"""The Stable Diffusion 1.x family against diffusers' own pipeline with DDIMScheduler, on random UNets."""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler, StableDiffusionPipeline
from torch import Tensor

from difrl.core import weighted_mean
from difrl.data.prompts import Prompt, load_prompts
from difrl.policies.base import GuidanceSettings, NoiseKey
from difrl.policies.diffusion.families import StableDiffusion
from difrl.policies.diffusion.load import load_diffusion_policy
from difrl.policies.diffusion.policy import DiffusionPolicy
from difrl.policies.diffusion.prompt_encoder import encode
from difrl.policies.errors import ModelError
from difrl.runtime.distributed import DistributedContext
from difrl.runtime.paths import asset
from difrl.scoring import Scorer
from difrl.training.cost.images import count_denoiser_cost
from difrl.training.trainer import Trainer
from samplers import keyed
from tests.fakes import Brightness
from tests.helpers import perturb
from tests.recipes import recipe
from tests.tiny_models import SD_TABLE, tiny_sd

TEXTS = ["a red circle", "two blue squares", "a green square and a yellow triangle"]
PROMPTS = [Prompt(text, {}, negative, 1.0) for text, negative in zip(TEXTS, (None, "a circle", None), strict=True)]
SAMPLES = torch.arange(3)
KEY = NoiseKey(seed=3, step=5)
DDPO = {
    "likelihood": {"kind": "reverse"},
    "objective": {"kind": "clipped", "clip_low": 0.1, "clip_high": 0.1},
    "rollout": {"kernel": "ddim", "noise_level": 1.0},
}
LORA = {"train": "lora", "lora": {"rank": 4, "alpha": 8.0}}
ANCHORED = {"anchors": [{"to": "base", "coefficient": 0.5}, {"to": "ema", "coefficient": 0.3, "guidance": 2.0}]}

# As published; the spacing and the end that arXiv:2305.08891 recommends, with its zero terminal SNR where the model allows.
SCHEDULES = {
    "epsilon, leading": {},
    "epsilon, trailing": {"timestep_spacing": "trailing", "set_alpha_to_one": True},
    "v_prediction, leading": {"prediction_type": "v_prediction"},
    "v_prediction, zero SNR": {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
    },
    "sample, trailing": {"prediction_type": "sample", "timestep_spacing": "trailing"},
}


@pytest.fixture(scope="module", params=SCHEDULES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    scheduler = DDIMScheduler(**{**SD_TABLE, **SCHEDULES[request.param]})
    return tiny_sd(tmp_path_factory.mktemp("models") / "sd", scheduler)


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("models") / "sd")


def policy_of(path: Path, /, **sections: Any) -> DiffusionPolicy:
    return load_diffusion_policy(recipe(path, **sections), keep_base=True)


def images_of(policy: DiffusionPolicy, rlg: float = 1.0) -> Tensor:
    images = policy.evaluation(PROMPTS, SAMPLES, NoiseKey(3, 0, "eval"), GuidanceSettings(rlg)).images
    assert images is not None
    return images


def drawn_by_diffusers(
    pipeline: StableDiffusionPipeline, noise: Tensor, guidance: float = 1.0, steps: int = 4
) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    images: Tensor = pipeline(
        TEXTS,
        negative_prompt=[p.negative or "" for p in PROMPTS],
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=noise,
        output_type="pt",
    ).images
    assert images.std() > 0.01  # blank images would agree with anything
    return images


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_shipped_model_draws_what_diffusers_draws(guidance: float) -> None:
    """Ten DDIM steps of tiny-sd, whose images have contrast."""
    policy = policy_of(Path("tiny-sd"), rollout={"guidance": guidance, "steps": 10})
    pipeline = StableDiffusionPipeline.from_pretrained(asset("tiny-sd"), dtype=torch.float32)
    noise = keyed((8, 8, 8), seed=3, step=0, samples=SAMPLES, use="eval/init")
    expected = drawn_by_diffusers(pipeline, noise, guidance, steps=10)
    torch.testing.assert_close(images_of(policy), expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.1


def initial(seed: int, step: int, use: str) -> Tensor:
    return keyed((4, 4, 4), seed=seed, step=step, samples=SAMPLES, use=f"{use}/init")


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_evaluation_is_the_pipelines_own_image(model: Path, guidance: float) -> None:
    """The same noise gives the image of DDIM at eta = 0 to 1e-4: 4 steps in float32 leave a few 1e-6."""
    images = images_of(policy_of(model, rollout={"guidance": guidance}))
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    expected = drawn_by_diffusers(pipeline, initial(3, 0, "eval"), guidance)
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_stochastic_rollout_is_the_pipelines_own_image(
    model: Path, guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pipeline runs DDIM at eta = 1 with the noise that the rollout draws on the steps of its window."""
    policy = policy_of(model, **{**DDPO, "rollout": {**DDPO["rollout"], "guidance": guidance}})
    drawn = policy.rollout(PROMPTS, SAMPLES, SAMPLES, KEY)
    window = policy.sampling.window(KEY)
    assert window.size >= 2

    def noise_of(step: int) -> Tensor:
        if step not in window:
            return torch.zeros(3, 4, 4, 4)
        return keyed((4, 4, 4), seed=KEY.seed, step=KEY.step, samples=SAMPLES, use="train/sde", index=step)

    noises = iter([noise_of(step) for step in range(4)])
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    original = pipeline.scheduler.step
    eta = iter([float(step in window) for step in range(4)])  # outside its window a rollout takes the ODE

    def step(output: Tensor, timestep: Tensor, x: Tensor, **options: Any) -> Any:
        return original(output, timestep, x, return_dict=False, eta=next(eta), variance_noise=next(noises))

    monkeypatch.setattr(pipeline.scheduler, "step", step)
    expected = drawn_by_diffusers(pipeline, initial(KEY.seed, KEY.step, "train"), guidance)
    assert drawn.images is not None
    torch.testing.assert_close(drawn.images, expected, atol=1e-4, rtol=0)


def test_reverse_likelihood_repeats_what_the_rollout_recorded(model: Path) -> None:
    policy = policy_of(model, **{**DDPO, "rollout": {**DDPO["rollout"], "guidance": 2.0}})
    drawn = policy.rollout(PROMPTS, SAMPLES, SAMPLES, KEY)
    decisions = policy.decisions(drawn, KEY)
    lik = policy.likelihoods(drawn, decisions)
    torch.testing.assert_close(lik.logp.detach(), drawn.replay_data["log_prob"], atol=1e-4, rtol=1e-4)
    perturb(policy.parameters)
    assert policy.likelihoods(drawn, decisions).log_ratio("old").abs().max() > 1e-3


def test_forward_gradient_is_minus_advantage_times_the_pretraining_gradient(model: Path) -> None:
    """∇ mean(−A ℓ) = mean(A ∇ ‖out − target‖²), written with diffusers' add_noise and get_velocity at whole timesteps."""
    policy = policy_of(model, likelihood={"kind": "forward", "decisions": 3, "times": {"kind": "grid"}})
    perturb(policy.parameters)
    advantage = torch.tensor([1.0, -2.0, 0.5])
    drawn = policy.rollout(PROMPTS, SAMPLES, SAMPLES, KEY)
    decisions = policy.decisions(drawn, KEY)
    lik = policy.likelihoods(drawn, decisions)
    weighted_mean(-advantage[:, None] * lik.logp, lik.mask, lik.mask.sum()).backward()
    found = {name: p.grad.clone() for name, p in policy.parameters.items() if p.grad is not None}
    pipeline, d = policy.family.pipeline, decisions.tensors
    with policy.family.encoders.at_hand("cpu"):
        embeds = pipeline.encode_prompt(TEXTS, torch.device("cpu"), 1, False)[0]
    scheduler = pipeline.scheduler
    losses = []
    for j in range(3):
        x0, noise = d["x0"][:, j], d["noise"][:, j]
        timestep = (1000 * d["t"][:, j]).round().long() - 1
        out = pipeline.unet(scheduler.add_noise(x0, noise, timestep), timestep, embeds).sample
        targets = {"epsilon": noise, "v_prediction": scheduler.get_velocity(x0, noise, timestep), "sample": x0}
        target = targets[scheduler.config.prediction_type]
        losses.append(F.mse_loss(out, target, reduction="none").mean((1, 2, 3)))
    for p in policy.parameters.values():
        p.grad = None
    (advantage[:, None] * torch.stack(losses, 1)).mean().backward()
    for name, p in policy.parameters.items():
        assert p.grad is not None
        torch.testing.assert_close(found[name], p.grad, atol=1e-6, rtol=1e-3, msg=name)


@pytest.mark.parametrize("train", [{"train": "full"}, LORA])
def test_anchors_rlg_and_guidance_need_nothing_of_the_family(sd: Path, train: dict[str, Any]) -> None:
    policy = policy_of(sd, model=train, **ANCHORED, snapshots={"ema": {"decay": 0.5}}, rollout={"guidance": 2.0})
    base = images_of(policy)
    perturb(policy.parameters, 0.2)
    drawn = policy.rollout(PROMPTS, SAMPLES, SAMPLES, KEY)
    lik = policy.likelihoods(drawn, policy.decisions(drawn, KEY))
    divergences = {name: term for name, term in lik.terms.items() if name.startswith("divergence/")}
    assert min(term.min().item() for term in divergences.values()) > 0
    assert divergences.keys() == {"divergence/base", "divergence/ema-cfg2"}
    torch.testing.assert_close(images_of(policy, rlg=0.0), base, atol=1e-5, rtol=0)
    assert (images_of(policy, rlg=1.0) - base).abs().max() > 1e-3
    assert (images_of(policy, rlg=2.0) - images_of(policy, rlg=1.0)).abs().max() > 1e-3


def test_lora_loads_in_plain_diffusers_and_gives_the_same_images(sd: Path, tmp_path: Path) -> None:
    """Alpha is twice the rank, which reveals an adapter that is loaded at another strength."""
    policy = policy_of(sd, model=LORA)
    perturb(policy.parameters, 0.3)
    policy.save(tmp_path / "lora")
    images = images_of(policy)
    pipeline = StableDiffusionPipeline.from_pretrained(sd)
    untouched = drawn_by_diffusers(pipeline, initial(3, 0, "eval"))
    pipeline.load_lora_weights(tmp_path / "lora")
    torch.testing.assert_close(images, drawn_by_diffusers(pipeline, initial(3, 0, "eval")), atol=1e-4, rtol=0)
    assert (images - untouched).abs().max() > 1e-2
    warm = policy_of(sd, model={"train": "lora", "lora": {"warm_start": str(tmp_path / "lora")}})
    torch.testing.assert_close(images, images_of(warm), atol=1e-4, rtol=0)
    assert warm.parameters.keys() == policy.parameters.keys()


def test_full_fine_tune_loads_with_from_pretrained(sd: Path, tmp_path: Path) -> None:
    policy = policy_of(sd)
    perturb(policy.parameters)
    policy.save(tmp_path / "full")
    torch.testing.assert_close(images_of(policy), images_of(policy_of(tmp_path / "full")), atol=1e-4, rtol=0)


def test_a_published_pndm_scheduler_gives_ddims_times(sd: Path, tmp_path: Path) -> None:
    """SD 1.5 comes with PNDM, whose repeated times are not a grid; DDPO samples with the same table under DDIM."""
    table = {k: v for k, v in SD_TABLE.items() if k != "clip_sample"}
    path = tiny_sd(tmp_path / "pndm", PNDMScheduler(**table, skip_prk_steps=True))
    torch.testing.assert_close(images_of(policy_of(path)), images_of(policy_of(sd)), atol=0, rtol=0)


def test_a_solver_of_higher_order_draws_what_the_pipeline_draws_with_it(sd: Path) -> None:
    policy = policy_of(sd, rollout={"solver": "DPMSolverMultistepScheduler"})
    pipeline = StableDiffusionPipeline.from_pretrained(sd)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    expected = drawn_by_diffusers(pipeline, initial(3, 0, "eval"))
    torch.testing.assert_close(images_of(policy), expected, atol=1e-4, rtol=0)


def test_flow_kernels_are_refused_with_advice(sd: Path) -> None:
    with pytest.raises(ModelError, match=r"'epsilon' outputs; use ddim, cps or precise"):
        policy_of(sd, **{**DDPO, "rollout": {"kernel": "flow_sde", "noise_level": 0.7}})


def test_picture_sizes_are_what_the_unet_can_halve(sd: Path) -> None:
    family = policy_of(sd).family
    assert family.latent_shape() == (4, 4, 4)
    assert family.with_inputs({"height": 16, "width": 8}).latent_shape() == (4, 8, 4)
    with pytest.raises(ValueError, match=r"rollout\.width: found 10 pixels, expected a multiple of 4"):
        family.with_inputs({"height": 8, "width": 10}).latent_shape()


def test_skeleton_has_the_shapes_of_the_model(sd: Path) -> None:
    family, skeleton = policy_of(sd).family, StableDiffusion.build_skeleton(str(sd), None)
    assert {p.device.type for p in skeleton.denoiser.parameters()} == {"meta"}
    encoded = {name: tuple(value.shape[1:]) for name, value in family.encode(TEXTS[0], None, None).items()}
    without_weights = skeleton.encode(TEXTS[0], None, None)
    assert {name: tuple(value.shape[1:]) for name, value in without_weights.items()} == encoded
    assert skeleton.latent_shape() == family.latent_shape()
    assert skeleton.sequence_length((4, 4, 4)) == 16
    assert [p.shape for p in skeleton.denoiser.parameters()] == [p.shape for p in family.denoiser.parameters()]


@pytest.mark.parametrize("train", [{"train": "full"}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("sections", [DDPO, {}], ids=["ddpo", "awm"])
def test_trainer_takes_steps_and_its_first_update_check_passes(
    sd: Path, sections: dict[str, Any], train: dict[str, Any]
) -> None:
    """The check of every step raises an error if ℓ of the update differs from the recorded one."""
    config = recipe(sd, model=train, **sections)
    scorer = Scorer.from_rewards({"brightness": (Brightness(), 1.0)}, {})
    policy = load_diffusion_policy(config)
    before = {name: p.detach().clone() for name, p in policy.parameters.items()}
    trainer = Trainer(config, policy, scorer, load_prompts(config.data.train), DistributedContext())
    rows = [trainer.step(0), trainer.step(1)]
    assert all(isfinite(value) for row in rows for value in row.values())
    assert any((p - before[name]).abs().max() > 1e-4 for name, p in policy.parameters.items())


def test_cost_is_counted_without_weights(sd: Path) -> None:
    """All products of one evaluation count, and twice as many in the backward pass, except for the first layer."""
    family = StableDiffusion.build_skeleton(str(sd), None)
    cost, _ = count_denoiser_cost(family, encode(family, "a red circle", None, None), (4, 4, 4), torch.float32)
    first_layer = 2 * 9 * 4 * 8 * 16  # multiplications of a 3x3 convolution of 4 to 8 channels at 16 pixels
    assert cost.forward > 10 * first_layer
    assert 2.5 * cost.forward < cost.training <= 3 * cost.forward
