"""The generic family: every published pipeline, driven by its blocks, draws and trains as its own pipeline does."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ClassifierFreeGuidance,
    DDIMScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Krea2Pipeline,
    ModularPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    StableDiffusionXLPipeline,
    ZImagePipeline,
)
from PIL import Image
from torch import Tensor

from difrl.config import RunConfig
from difrl.config.yaml_source import ConfigError
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
from tests.tiny_pipelines import FAMILIES, IMAGE, Family, load, tiny_qwen_image_edit, tiny_qwen_image_edit_plus

TEXTS = ["a red circle", "two blue squares", "a green square and a yellow triangle"]
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


@pytest.fixture(
    params=[
        name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != "sd2-v"
    ]
)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture
def folder(family: Family, folders: Path) -> Path:
    place = folders / family.build.__name__
    return place if place.exists() else family.build(place)


@pytest.fixture
def prompts(family: Family, folders: Path) -> list[Prompt]:
    """Three prompts, with two different images for a family that changes an image."""
    if "image" not in family.inputs:
        return [Prompt(text, {}) for text in TEXTS]
    images = [folders / "one.png", folders / "two.png"]
    family.inputs["image"].save(images[0])
    family.inputs["image"].rotate(90).save(images[1])
    return [Prompt(text, {}, image=images[number // 2]) for number, text in enumerate(TEXTS)]


def run_of(folder: Path, family: Family, **sections: Any) -> RunConfig:
    keys = {"height": "height", "width": "width", "num_frames": "frames"}
    size = {key: family.inputs[name] for name, key in keys.items() if name in family.inputs}
    rollout = {**size, **sections.pop("rollout", {})}
    length = {name: value for name, value in family.inputs.items() if name == "max_sequence_length"}
    inputs = {name: value for name, value in family.inputs.items() if name in ("_auto_resize", "use_kv_cache")}
    if takes_number(family.pipeline) and family.inputs.get("guidance_scale"):
        inputs["guidance_scale"] = family.inputs["guidance_scale"]
    model = {**length, "inputs": inputs, **sections.pop("model", {})}
    return recipe(folder, rollout=rollout, model=model, **sections)


def takes_number(pipeline: type[Any]) -> bool:
    """Return whether `guidance_scale` of a pipeline is an input of its model, not the scale of classifier-free guidance."""
    parameters = inspect.signature(pipeline.__call__).parameters
    return "true_cfg_scale" in parameters or issubclass(pipeline, Flux2Pipeline)


def load_own(folder: Path, family: Family) -> Any:
    """Load the pipeline without difrl, with DDIM in the place of solvers that scale their input."""
    own: Any = load(family, folder)
    if hasattr(own.scheduler, "alphas_cumprod") and "solver_order" not in own.scheduler.config:
        own.scheduler = DDIMScheduler.from_config(own.scheduler.config, clip_sample=False)
    if isinstance(own, Flux2Pipeline):  # the blocks have a space where the classic pipeline has a line break
        own.system_message = own.system_message.replace("object\nattribution", "object attribution")
    return own


def solver_of(own: Any) -> dict[str, str]:
    """Return the part of a recipe for the pipeline's own solver, if it is of a higher order."""
    return {"solver": type(own.scheduler).__name__} if "solver_order" in own.scheduler.config else {}


def guidance_of(own: Any, guidance: float) -> dict[str, Any] | None:
    """Return the arguments for classifier-free guidance at a scale, None if the pipeline has none."""
    if guidance != 1 and (isinstance(own, Flux2Pipeline) or own.config.get("is_distilled", False)):
        return None
    if hasattr(own, "guider"):
        own.guider = ClassifierFreeGuidance(guidance_scale=guidance)
        return {"negative_prompt": ""}
    parameters = inspect.signature(type(own).__call__).parameters
    negative = {"negative_prompt": ""} if "negative_prompt" in parameters else {}
    if "true_cfg_scale" in parameters:
        return {"true_cfg_scale": guidance, **negative}
    if "guidance_scale" not in parameters or takes_number(type(own)):
        return negative
    from_conditional = isinstance(own, ZImagePipeline | Krea2Pipeline)  # conditional + scale (conditional - negative)
    return {"guidance_scale": guidance - 1 if from_conditional else guidance, **negative}


def draw_own(own: Any, policy: DiffusionPolicy, family: Family, prompts: list[Prompt], guidance: float) -> Tensor:
    """Return what the pipeline draws by itself from the noise of an evaluation, one prompt after the other."""
    drawn = []
    noises = keyed(policy.sampling.shape, seed=3, step=0, samples=SAMPLES[: len(prompts)], use="eval/init")
    for prompt, noise in zip(prompts, noises, strict=True):
        latents = noise[None]
        if isinstance(
            own, Flux2Pipeline | Flux2KleinPipeline | ModularPipeline
        ):  # these take latents before they are packed
            side = math.isqrt(latents.shape[1])
            latents = latents.unflatten(1, (side, side)).movedim(-1, 1)
        inputs = {**family.inputs, **(guidance_of(own, guidance) or {}), "latents": latents, "output_type": "pt"}
        if prompt.image is not None:
            inputs["image"] = Image.open(prompt.image)
        if isinstance(own, ModularPipeline):
            drawn.append(own(prompt=prompt.text, num_inference_steps=STEPS, output="images", **inputs))
        else:
            drawn.append(own(prompt=prompt.text, num_inference_steps=STEPS, **inputs)[0])
    samples = torch.cat(drawn)
    colors, alpha = samples.split([3, samples.shape[-3] - 3], dim=-3)
    return colors * alpha + 1 - alpha if alpha.numel() else colors


def draw(policy: DiffusionPolicy, prompts: list[Prompt]) -> Tensor:
    """Return the samples of an evaluation."""
    drawn = policy.evaluation(prompts, SAMPLES, NoiseKey(3, 0, "eval"))
    if drawn.videos is not None:
        return torch.cat([frames for _, frames in drawn.videos.batches()])
    assert drawn.images is not None
    return drawn.images


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_evaluation_is_the_pipelines_own_sample(
    folder: Path, family: Family, prompts: list[Prompt], guidance: float
) -> None:
    """The same noise gives the same sample to 1e-4; rows of different prompts in a batch give what each gives alone."""
    own = load_own(folder, family)
    if guidance_of(own, guidance) is None:
        pytest.skip("distilled, without classifier-free guidance")
    policy = load_diffusion_policy(run_of(folder, family, rollout={"guidance": guidance, **solver_of(own)}))
    policy.validate_prompts(prompts)
    expected = draw_own(own, policy, family, prompts, guidance)
    assert expected.std() > 0.01
    torch.testing.assert_close(draw(policy, prompts), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["flux-dev", pytest.param("flux2-dev", marks=pytest.mark.slow)])
def test_guidance_as_an_input_is_that_of_the_pipeline(name: str, folders: Path) -> None:
    """`model.inputs: {guidance_scale: …}` is the argument of the pipeline's own call, and not its default."""
    family, prompts = FAMILIES[name], [Prompt(text, {}) for text in ("a red circle", "two blue squares", "a star")]
    folder = folders / f"{name}-guided"
    family.build(folder)
    own, samples = load_own(folder, family), []
    for inputs in ({}, {"guidance_scale": 1.5}):
        policy = load_diffusion_policy(run_of(folder, family, model={"inputs": inputs}))
        changed = replace(family, inputs={**family.inputs, **inputs})
        samples.append(draw(policy, prompts))
        expected = draw_own(own, policy, changed, prompts, 1.0)
        torch.testing.assert_close(samples[-1], expected, atol=1e-4, rtol=0)
    assert (samples[0] - samples[1]).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "pipeline"),
    [(tiny_qwen_image_edit, QwenImageEditPipeline), (tiny_qwen_image_edit_plus, QwenImageEditPlusPipeline)],
)
def test_an_edit_is_the_pipelines_own(build: Callable[[Path], Path], pipeline: type[Any], tmp_path: Path) -> None:
    """Qwen-Image-Edit enlarges its input to a million pixels, so one prompt is compared."""
    family = Family(build, pipeline, {"image": IMAGE, "height": 32, "width": 32})
    folder = build(tmp_path / "model")
    IMAGE.save(tmp_path / "in.png")
    policy = load_diffusion_policy(run_of(folder, family, rollout={"guidance": 3.5}))
    prompts = [Prompt(TEXTS[0], {}, image=tmp_path / "in.png")]
    policy.validate_prompts(prompts)
    found = policy.evaluation(prompts, SAMPLES[:1], NoiseKey(3, 0, "eval")).images
    assert found is not None
    expected = draw_own(load_own(folder, family), policy, family, prompts, 3.5)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    with pytest.raises(ModelError, match='changes an image; add "image" to the row'):
        policy.validate_prompts([Prompt(TEXTS[0], {})])


@pytest.mark.parametrize("sections", [{}, FLOW_GRPO], ids=["forward", "reverse"])
def test_a_step_starts_from_ratio_one_and_moves_the_adapter(
    folder: Path, family: Family, prompts: list[Prompt], tmp_path: Path, sections: dict[str, Any]
) -> None:
    """Prompts of different lengths are in one batch: the first-update check compares them with the rollout's own."""
    rollout = {**sections.get("rollout", {}), "guidance": 2.0}
    if "kernel" in rollout and family.pipeline is StableDiffusionXLPipeline:
        rollout |= {"kernel": "ddim", "noise_level": 1.0}  # the others are SDEs of flow matching
    data = write_rows(tmp_path / "prompts.jsonl", prompts)
    given = {
        "rollout": rollout,
        "model": LORA,
        "train": {"micro_batch": 4},
        "data": {"train": data, "evaluation": data},
    }
    config = run_of(folder, family, **{**sections, **given})
    policy = load_diffusion_policy(config)
    before = {name: p.detach().clone() for name, p in policy.parameters.items()}
    scorer = Scorer.from_rewards({"bright": (Brightness(), 1.0)}, {})
    metrics = Trainer(config, policy, scorer, load_prompts(config.data.train), DistributedContext()).step(0)
    assert metrics["grad_norm"] > 0
    moved = [name for name, p in policy.parameters.items() if not torch.equal(p, before[name])]
    assert all(any(denoiser in name for name in moved) for denoiser in policy.family.denoiser_names[1:])
    assert moved
    assert metrics["nfe"] == estimate(config).evaluations.step


def write_rows(file: Path, prompts: list[Prompt]) -> str:
    rows = [{"prompt": p.text, **({} if p.image is None else {"image": str(p.image)})} for p in prompts]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_a_saved_adapter_gives_the_pipeline_the_same_sample(
    folder: Path, family: Family, prompts: list[Prompt], tmp_path: Path
) -> None:
    own = load_own(folder, family)
    policy = load_diffusion_policy(run_of(folder, family, model=LORA, rollout=solver_of(own)))
    with torch.no_grad():
        for number, p in enumerate(policy.parameters.values()):
            p += 0.2 * keyed(p.shape, seed=number, step=0, samples=[0], use="adapter")[0]
    policy.save(tmp_path / "model")
    drawn = draw(policy, prompts)
    without = draw_own(own, policy, family, prompts, 1.0)
    if hasattr(own, "load_lora_weights"):
        own.load_lora_weights(tmp_path / "model")
    else:
        own.transformer.load_lora_adapter(
            tmp_path / "model", prefix="transformer", weight_name="pytorch_lora_weights.safetensors"
        )
    for name in policy.family.denoiser_names[1:]:
        own.load_lora_weights(
            tmp_path / "model", weight_name=f"{name}_lora_weights.safetensors", **{f"load_into_{name}": True}
        )
    torch.testing.assert_close(drawn, draw_own(own, policy, family, prompts, 1.0), atol=1e-4, rtol=0)
    assert (drawn - without).abs().max() > 1e-3
    again = load_diffusion_policy(
        run_of(folder, family, model={"train": "lora", "lora": {"warm_start": str(tmp_path / "model")}})
    )
    assert all(torch.equal(p, policy.parameters[name]) for name, p in again.parameters.items())


def test_a_full_fine_tune_in_bfloat16_is_saved_for_the_pipeline(
    folder: Path, family: Family, prompts: list[Prompt], tmp_path: Path
) -> None:
    """The loop's state keeps nothing of a call, and the saved pipeline has the trained weights."""
    data = write_rows(tmp_path / "prompts.jsonl", prompts)
    config = run_of(folder, family, model={"dtype": "bfloat16"}, train={"micro_batch": 4}, data={"train": data})
    policy = load_diffusion_policy(config)
    scorer = Scorer.from_rewards({"bright": (Brightness(), 1.0)}, {})
    assert (
        Trainer(config, policy, scorer, load_prompts(config.data.train), DistributedContext()).step(0)["grad_norm"] > 0
    )
    assert isinstance(policy.family, ModularFamily)
    assert policy.family._states
    assert all(state.noise_pred is None for state in policy.family._states.values())
    policy.merge(tmp_path / "model")
    saved = load(family, tmp_path / "model")
    for name, denoiser in policy.family.denoisers.items():
        trained = denoiser.state_dict()
        assert all(
            torch.equal(value.float(), trained[key].float()) for key, value in getattr(saved, name).state_dict().items()
        )


def test_images_are_encoded_as_they_are_decoded(folder: Path, family: Family, prompts: list[Prompt]) -> None:
    """Decoding the latents of samples is what the autoencoder makes of these samples."""
    policy = load_diffusion_policy(run_of(folder, family))
    samples = draw(policy, prompts)
    latents = policy.family.encode_images(samples)
    assert latents.shape[1:] == policy.sampling.shape
    vae = policy.family.pipeline.vae
    x = samples * 2 - 1
    if vae.config.get("in_channels") == 4:
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    still = x[:, :, None] if vae.config.get("temperal_downsample") is not None else x
    frames = x.transpose(1, 2) if x.ndim == 5 else still
    own = torch.cat([vae.decode(vae.encode(one[None]).latent_dist.mode()).sample for one in frames])
    own = own.transpose(1, 2) if x.ndim == 5 else own.reshape(x.shape)
    expected = (own / 2 + 0.5).clamp(0, 1)
    colors, alpha = expected.split([3, expected.shape[-3] - 3], dim=-3)
    expected = colors * alpha + 1 - alpha if alpha.numel() else colors
    torch.testing.assert_close(policy.family.decode(latents), expected, atol=1e-4, rtol=0)


def test_a_modular_repository_may_be_moved_and_names_what_comes_from_elsewhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    family = FAMILIES["flux3"]
    folder = family.build(tmp_path / "built").rename(tmp_path / "moved")
    load_diffusion_policy(run_of(folder, family))
    assert "is loaded from" not in caplog.text
    vae = (folder / "vae").rename(tmp_path / "vae")
    index = json.loads((folder / "modular_model_index.json").read_text())
    index["vae"][2] |= {"pretrained_model_name_or_path": str(tmp_path), "subfolder": vae.name}
    (folder / "modular_model_index.json").write_text(json.dumps(index))
    load_diffusion_policy(run_of(folder, family))
    estimate(run_of(folder, family))
    assert f"the vae of {folder} is loaded from {tmp_path}, as its index says" in caplog.text
    index["vae"][2]["pretrained_model_name_or_path"] = None
    (folder / "modular_model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="names no place of its vae"):
        load_diffusion_policy(run_of(folder, family))


@pytest.mark.parametrize(
    ("name", "rollout", "reason"),
    [
        ("wan2.1-t2v", {}, "rollout.frames: WanPipeline makes videos; set the number of frames"),
        ("flux-dev", {"frames": 5}, "rollout.frames: FluxPipeline makes images; remove it"),
    ],
)
def test_the_number_of_frames_is_that_of_the_medium(
    name: str, rollout: dict[str, int], reason: str, tmp_path: Path
) -> None:
    folder = FAMILIES[name].build(tmp_path / "model")
    attempts: list[Callable[[RunConfig], object]] = [load_diffusion_policy, estimate]
    for attempt in attempts:
        with pytest.raises((ModelError, ConfigError), match=reason):
            attempt(recipe(folder, rollout=rollout))
