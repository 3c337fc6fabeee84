"""Parts without weights take any tensors and return zeros of the shapes that parts with weights return."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from difrl.policies.diffusion.families.meta_parts import build_meta_parts
from tests.tiny_pipelines import tiny_flux, tiny_qwen_image_edit


@torch.no_grad()
def test_an_autoencoder_encodes_and_decodes(tmp_path: Path) -> None:
    folder = tiny_flux(tmp_path / "model")
    vae = DiffusionPipeline.from_pretrained(folder).vae
    skeleton = build_meta_parts(str(folder), None, DiffusionPipeline.load_config(folder), {})["vae"]
    images = torch.rand(2, 3, 16, 16)
    latents = skeleton.encode(images).latent_dist.mode()
    torch.testing.assert_close(latents, torch.zeros_like(vae.encode(images).latent_dist.mode()))
    torch.testing.assert_close(skeleton.decode(latents).sample, torch.zeros_like(images))


@torch.no_grad()
def test_a_text_encoder_reads_a_prompt_with_an_image(tmp_path: Path) -> None:
    """Its tokens stand for the image, so it takes the image and returns as many states as with weights."""
    folder = tiny_qwen_image_edit(tmp_path / "model")
    pipeline = DiffusionPipeline.from_pretrained(folder)
    skeleton = build_meta_parts(str(folder), None, DiffusionPipeline.load_config(folder), {})["text_encoder"]
    text = "<|vision_start|><|image_pad|><|vision_end|>a red circle"
    inputs = dict(
        pipeline.processor(text=[text], images=[torch.rand(3, 16, 16)], return_tensors="pt", do_rescale=False)
    )
    states = [
        encoder(**inputs, output_hidden_states=True).hidden_states for encoder in (pipeline.text_encoder, skeleton)
    ]
    assert [state.shape for state in states[0]] == [state.shape for state in states[1]]
    assert not states[1][-1].any()
