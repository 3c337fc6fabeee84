"""The generic family: every published pipeline, driven by its blocks, draws and trains as the classic pipeline does."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Krea2Pipeline,
    StableDiffusionXLPipeline,
    ZImagePipeline,
)
from torch import Tensor

from difrl.config import RunConfig
from difrl.data.prompts import Prompt, load_prompts
from difrl.policies.base import NoiseKey
from difrl.policies.diffusion.families.modular import ModularFamily
from difrl.policies.diffusion.load import load_diffusion_policy
from difrl.policies.diffusion.policy import DiffusionPolicy
from difrl.policies.errors import ModelError
from difrl.runtime.distributed import DistributedContext
from difrl.scoring import Scorer
from difrl.training.cost.estimate import estimate
from difrl.training.trainer import Trainer
from samplers import keyed
from tests.fakes import Brightness
from tests.recipes import FLOW_GRPO, recipe
from tests.tiny_pipelines import FAMILIES, Family, tiny_qwen_image_edit

TEXTS = ["a red circle", "two blue squares", "a green square and a yellow triangle"]
PROMPTS = [Prompt(text, {}) for text in TEXTS]
SAMPLES = torch.arange(3)
STEPS = 4
LORA = {"train": "lora", "lora": {"rank": 2}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(autouse=True)
def _layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of Krea 2 read the layers of the published text encoder, and the tiny one has four."""
    monkeypatch.setattr("diffusers.modular_pipelines.krea2.encoders.KREA2_TEXT_ENCODER_SELECT_LAYERS", (1, 2, 3))


FAST = ("flux-dev", "qwen-image")
"""Families of the fast suite: packed latents with distilled guidance, and prompts of different lengths."""
SLOW = ("sdxl", "flux-schnell", "z-image", "flux2-dev", "flux2-klein", "flux2-klein-base", "ernie-image", "krea2")


@pytest.fixture(params=[*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture
def folder(family: Family, folders: Path) -> Path:
    place = folders / family.build.__name__
    return place if place.exists() else family.build(place)


def run_of(folder: Path, family: Family, **sections: Any) -> RunConfig:
    size = {name: family.inputs[name] for name in ("height", "width") if name in family.inputs}
    rollout = {**size, **sections.pop("rollout", {})}
    longest = (
        {"max_sequence_length": family.inputs["max_sequence_length"]} if "max_sequence_length" in family.inputs else {}
    )
    model = {**longest, **sections.pop("model", {})}
    return recipe(folder, rollout=rollout, model=model, **sections)


def load_classic(folder: Path) -> DiffusionPipeline:
    classic = DiffusionPipeline.from_pretrained(folder)
    classic.set_progress_bar_config(disable=True)
    if hasattr(classic.scheduler, "alphas_cumprod"):
        classic.scheduler = DDIMScheduler.from_config(classic.scheduler.config, clip_sample=False)
    if isinstance(classic, Flux2Pipeline):  # the blocks have a space where the classic pipeline has a line break
        classic.system_message = classic.system_message.replace("object\nattribution", "object attribution")
    return classic


def guidance_of(classic: DiffusionPipeline, guidance: float) -> dict[str, Any] | None:
    """Return the arguments for classifier-free guidance at a scale, None if the pipeline has none."""
    if guidance != 1 and (isinstance(classic, Flux2Pipeline) or classic.config.get("is_distilled", False)):
        return None
    parameters = inspect.signature(type(classic).__call__).parameters
    negative = {"negative_prompt": [""] * 3} if "negative_prompt" in parameters else {}
    if "true_cfg_scale" in parameters:
        return {"true_cfg_scale": guidance, **negative}
    if isinstance(classic, Flux2Pipeline):
        return {}
    from_conditional = isinstance(
        classic, ZImagePipeline | Krea2Pipeline
    )  # conditional + scale (conditional - negative)
    return {"guidance_scale": guidance - 1 if from_conditional else guidance, **negative}


def draw_classic(classic: DiffusionPipeline, policy: DiffusionPolicy, family: Family, guidance: float) -> Tensor:
    """Return the classic pipeline's images of the noise of an evaluation."""
    inputs = {**family.inputs, **(guidance_of(classic, guidance) or {})}
    latents = keyed(policy.sampling.shape, seed=3, step=0, samples=SAMPLES, use="eval/init")
    if isinstance(classic, Flux2Pipeline | Flux2KleinPipeline):  # these take latents before they are packed
        side = math.isqrt(latents.shape[1])
        latents = latents.unflatten(1, (side, side)).movedim(-1, 1)
    images: Tensor = classic(
        prompt=list(TEXTS), num_inference_steps=STEPS, latents=latents, output_type="pt", **inputs
    ).images
    return images


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_evaluation_is_the_classic_pipelines_own_image(folder: Path, family: Family, guidance: float) -> None:
    """The same noise gives the same image to 1e-4; rows of different prompts give what each gives alone."""
    classic = load_classic(folder)
    if guidance_of(classic, guidance) is None:
        pytest.skip("distilled, without classifier-free guidance")
    policy = load_diffusion_policy(run_of(folder, family, rollout={"guidance": guidance}))
    images = policy.evaluation(PROMPTS, SAMPLES, NoiseKey(3, 0, "eval")).images
    assert images is not None
    expected = draw_classic(classic, policy, family, guidance)
    assert expected.std() > 0.01
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("sections", [{}, FLOW_GRPO], ids=["forward", "reverse"])
def test_a_step_starts_from_ratio_one_and_moves_the_adapter(
    folder: Path, family: Family, sections: dict[str, Any]
) -> None:
    """Prompts of different lengths are in one batch: the first-update check compares them with the rollout's own."""
    rollout = {**sections.get("rollout", {}), "guidance": 2.0}
    if "kernel" in rollout and family.pipeline is StableDiffusionXLPipeline:
        rollout |= {"kernel": "ddim", "noise_level": 1.0}  # the others are SDEs of flow matching
    config = run_of(folder, family, **{**sections, "rollout": rollout, "model": LORA, "train": {"micro_batch": 4}})
    policy = load_diffusion_policy(config)
    before = {name: p.detach().clone() for name, p in policy.parameters.items()}
    scorer = Scorer.from_rewards({"bright": (Brightness(), 1.0)}, {})
    metrics = Trainer(config, policy, scorer, load_prompts(config.data.train), DistributedContext()).step(0)
    assert metrics["grad_norm"] > 0
    assert any(not torch.equal(p, before[name]) for name, p in policy.parameters.items())
    assert metrics["nfe"] == estimate(config).evaluations.step


def test_a_saved_adapter_gives_the_classic_pipeline_the_same_image(
    folder: Path, family: Family, tmp_path: Path
) -> None:
    policy = load_diffusion_policy(run_of(folder, family, model=LORA))
    with torch.no_grad():
        for number, p in enumerate(policy.parameters.values()):
            p += 0.2 * keyed(p.shape, seed=number, step=0, samples=[0], use="adapter")[0]
    policy.save(tmp_path / "model")
    drawn = policy.evaluation(PROMPTS, SAMPLES, NoiseKey(3, 0, "eval")).images
    assert drawn is not None
    classic = load_classic(folder)
    without = draw_classic(classic, policy, family, 1.0)
    classic.load_lora_weights(tmp_path / "model")
    torch.testing.assert_close(drawn, draw_classic(classic, policy, family, 1.0), atol=1e-4, rtol=0)
    assert (drawn - without).abs().max() > 1e-3


def test_a_full_fine_tune_in_bfloat16_is_saved_for_the_classic_pipeline(
    folder: Path, family: Family, tmp_path: Path
) -> None:
    """The loop's state keeps nothing of a call, and the saved pipeline has the trained weights."""
    config = run_of(folder, family, model={"dtype": "bfloat16"}, train={"micro_batch": 4})
    policy = load_diffusion_policy(config)
    scorer = Scorer.from_rewards({"bright": (Brightness(), 1.0)}, {})
    assert (
        Trainer(config, policy, scorer, load_prompts(config.data.train), DistributedContext()).step(0)["grad_norm"] > 0
    )
    assert isinstance(policy.family, ModularFamily)
    assert policy.family._prepared is not None
    assert policy.family._prepared[1].noise_pred is None
    policy.save(tmp_path / "model")
    saved = getattr(DiffusionPipeline.from_pretrained(tmp_path / "model"), policy.family.denoiser_name)
    trained = policy.family.denoiser.state_dict()
    assert all(torch.equal(value.float(), trained[name].float()) for name, value in saved.state_dict().items())


def test_images_are_encoded_as_they_are_decoded(folder: Path, family: Family) -> None:
    """Decoding the latents of images is what the autoencoder makes of these images."""
    policy = load_diffusion_policy(run_of(folder, family))
    images = policy.evaluation(PROMPTS, SAMPLES, NoiseKey(3, 0, "eval")).images
    assert images is not None
    if "image2image" not in policy.family.modular.blocks.available_workflows:
        with pytest.raises(ModelError, match="has no blocks that encode images"):
            policy.family.encode_images(images)
        return
    latents = policy.family.encode_images(images)
    assert latents.shape[1:] == policy.sampling.shape
    vae = policy.family.pipeline.vae
    x = images * 2 - 1
    frames = x[:, :, None] if vae.config.get("temperal_downsample") is not None else x
    expected = vae.decode(vae.encode(frames).latent_dist.mode()).sample.reshape(x.shape) / 2 + 0.5
    torch.testing.assert_close(policy.family.decode(latents), expected.clamp(0, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (FAMILIES["wan2.1-t2v"].build, "makes videos"),
        (FAMILIES["ltx"].build, "makes latents and videos"),
        (tiny_qwen_image_edit, "needs an image"),
    ],
)
def test_a_pipeline_that_does_not_draw_images_of_prompts_is_refused(
    build: Callable[[Path], Path], reason: str, tmp_path: Path
) -> None:
    folder = build(tmp_path / "model")
    for attempt in (load_diffusion_policy, estimate):
        with pytest.raises(ModelError, match=f"^model.path: .*{reason}"):
            attempt(recipe(folder))
