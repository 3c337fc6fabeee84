"""Model families of other packages: found by the pipeline's class, and used as the built-in ones are."""

from __future__ import annotations

from math import isfinite
from pathlib import Path

import pytest
import torch
from diffusers import AuraFlowPipeline

from difrl.data.prompts import Prompt, load_prompts
from difrl.policies.base import NoiseKey
from difrl.policies.diffusion.families import FAMILIES, StableDiffusion, register_family
from difrl.policies.diffusion.load import load_diffusion_policy
from difrl.runtime.distributed import DistributedContext
from difrl.scoring import Scorer
from difrl.training.trainer import Trainer
from samplers import keyed
from tests.documented_packages import install
from tests.fakes import Brightness
from tests.recipes import FLOW_GRPO, recipe
from tests.tiny_models import tiny_auraflow

TEXTS = ["a red circle", "two blue squares", "a green square and a yellow triangle"]
PROMPTS = [Prompt(text, {}, None, 1.0) for text in TEXTS]
SAMPLES = torch.arange(3)


@pytest.fixture(scope="module")
def auraflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_auraflow(tmp_path_factory.mktemp("models") / "auraflow")


@pytest.fixture(autouse=True)
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install("my_models", FAMILIES, tmp_path / "site", monkeypatch)


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_evaluation_is_the_pipelines_own_image(auraflow: Path, guidance: float) -> None:
    """The same noise gives the same image to 1e-4: 4 steps in float32 leave a few 1e-6."""
    policy = load_diffusion_policy(recipe(auraflow, rollout={"guidance": guidance}))
    images = policy.evaluation(PROMPTS, SAMPLES, NoiseKey(3, 0, "eval")).images
    pipeline = AuraFlowPipeline.from_pretrained(auraflow)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        TEXTS,
        negative_prompt=[""] * 3,
        num_inference_steps=4,
        guidance_scale=guidance,
        latents=keyed((4, 4, 4), seed=3, step=0, samples=SAMPLES, use="eval/init"),
        output_type="pt",
    ).images
    assert expected.std() > 0.01  # blank images would agree with anything
    assert images is not None
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("sections", [{}, FLOW_GRPO], ids=["awm", "flow_grpo"])
def test_it_trains_an_adapter_that_diffusers_loads(auraflow: Path, tmp_path: Path, sections: dict[str, object]) -> None:
    config = recipe(auraflow, model={"train": "lora", "lora": {"rank": 2}}, **sections)
    policy = load_diffusion_policy(config)
    scorer = Scorer.from_rewards({"brightness": (Brightness(), 1.0)}, {})
    metrics = Trainer(config, policy, scorer, load_prompts(config.data.train), DistributedContext()).step(0)
    assert all(isfinite(value) for value in metrics.values())
    policy.save(tmp_path / "lora")
    pipeline = AuraFlowPipeline.from_pretrained(auraflow)
    pipeline.load_lora_weights(tmp_path / "lora")
    loaded = {name: p for name, p in pipeline.transformer.named_parameters() if ".lora_" in name}
    assert sum(p.numel() for p in loaded.values()) == sum(p.numel() for p in policy.parameters.values())
    assert any(p.abs().max() > 0 for name, p in loaded.items() if "lora_B" in name), "a step has moved the adapter"


def test_a_skeleton_has_the_shapes_of_the_model(auraflow: Path) -> None:
    cls = FAMILIES["AuraFlowPipeline"]
    family, skeleton = cls.load(str(auraflow), torch.float32, None), cls.build_skeleton(str(auraflow), None)
    assert {p.device.type for p in skeleton.denoiser.parameters()} == {"meta"}
    assert [p.shape for p in skeleton.denoiser.parameters()] == [p.shape for p in family.denoiser.parameters()]
    encoded = {name: tuple(value.shape[1:]) for name, value in family.encode(TEXTS[0], None, None).items()}
    without_weights = skeleton.encode_prompt(TEXTS[0], None, None)
    assert {name: tuple(value.shape[1:]) for name, value in without_weights.items()} == encoded
    wide = [one.with_inputs({"width": 16}).latent_shape() for one in (skeleton, family)]
    assert wide == [(4, 4, 8)] * 2
    assert skeleton.sequence_length((4, 4, 8)) == 2 * 4


def test_a_class_name_is_taken_once() -> None:
    assert register_family("StableDiffusionPipeline", StableDiffusion) is StableDiffusion
    with pytest.raises(ValueError, match="two model family extensions are called 'StableDiffusionPipeline'"):
        register_family("StableDiffusionPipeline", FAMILIES["AuraFlowPipeline"])
