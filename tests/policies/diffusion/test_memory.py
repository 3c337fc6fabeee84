"""Settings that take less memory: their results are those of the plain ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from difrl.config import ModelConfig
from difrl.data.prompts import Prompt
from difrl.data.videos import Videos
from difrl.policies.base import NoiseKey
from difrl.policies.diffusion import sampling
from difrl.policies.diffusion.load import load_family
from difrl.policies.errors import ModelError
from difrl.policies.load import load_policy
from tests.recipes import recipe
from tests.tiny_pipelines import tiny_wan21

PROMPTS = [Prompt("a red circle", {}), Prompt("two blue squares", {})]
SAMPLES, KEY = torch.arange(2), NoiseKey(0, 0)


@contextmanager
def cached_casts() -> Iterator[None]:
    """Let autocast keep its casts of weights, as it does by default."""
    autocast = torch.autocast
    with patch.object(torch, "autocast", lambda *args, **kwargs: autocast(*args, **{**kwargs, "cache_enabled": True})):
        yield


def update(policy: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return latents, likelihoods and gradients."""
    rollout = policy.rollout(PROMPTS, SAMPLES, SAMPLES, KEY)
    lik = policy.likelihoods(rollout, policy.decisions(rollout, KEY))
    lik.logp.sum().backward()
    gradients = {name: p.grad for name, p in policy.parameters.items() if p.grad is not None}
    return rollout.replay_data["latents"], lik.logp.detach(), gradients


@pytest.mark.parametrize(
    ("train", "checkpointing", "guidance"), [("lora", False, 3.0), ("lora", True, 1.0), ("full", True, 3.0)]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_casts_that_are_neither_kept_nor_repeated_change_no_bit(
    sd3: Path, train: str, checkpointing: bool, guidance: float, dtype: str
) -> None:
    """Of weights, which autocast would keep, and of inputs of adapted layers, which PEFT would cast to float32."""
    model = {"train": train, "dtype": dtype, "gradient_checkpointing": checkpointing}
    config = recipe(sd3, model=model, rollout={"guidance": guidance})
    found, plain = load_policy(config), load_policy(config)
    for policy in (found, plain):
        generator = torch.Generator().manual_seed(0)
        for p in policy.parameters.values():
            p.data += 0.05 * torch.randn(p.shape, generator=generator)
    adapted = [layer for layer in plain.module.modules() if isinstance(layer, BaseTunerLayer)]  # type: ignore[attr-defined]
    assert bool(adapted) == (train == "lora")
    for layer in adapted:
        assert not layer.cast_input_dtype_enabled
        layer.cast_input_dtype_enabled = True
    latents, logp, gradients = update(found)
    with cached_casts():
        expected = update(plain)
    assert torch.equal(latents, expected[0])
    assert torch.equal(logp, expected[1])
    assert gradients.keys() == expected[2].keys() == found.parameters.keys()
    assert all(torch.equal(gradients[name], value) for name, value in expected[2].items())
    assert any(value.abs().max() > 0 for value in gradients.values())


@pytest.mark.parametrize(("room", "sizes"), [(1, [1] * 5), (130, [2, 2, 1]), (64 * 4, [3, 2]), (2**18, [3, 2])])
def test_large_images_are_decoded_a_few_at_a_time(
    sd3: Path, monkeypatch: pytest.MonkeyPatch, room: int, sizes: list[int]
) -> None:
    """Images of 8 × 8 pixels, at most 3 at a time (rollout.batch)."""
    family = load_family(ModelConfig(path=str(sd3)))
    latents = torch.randn(5, *family.latent_shape(), generator=torch.Generator().manual_seed(0))
    assert family.pixels == 64
    expected, found, decode = family.decode(latents), list[int](), family.decode
    monkeypatch.setattr(family, "decode", lambda rows: found.append(len(rows)) or decode(rows))
    monkeypatch.setattr(sampling, "DECODED_PIXELS", room)
    images = sampling.decode(family, latents, 3)
    assert found == sizes
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


def test_the_pixels_of_a_video_are_those_of_its_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = load_family(ModelConfig(path=str(tiny_wan21(tmp_path))))
    family = family.with_inputs({"num_frames": 5, "height": 16, "width": 16})
    assert family.pixels == 5 * 16 * 16
    monkeypatch.setattr(sampling, "DECODED_PIXELS", 2 * family.pixels)
    videos = sampling.decode(family, torch.zeros(5, *family.latent_shape()), 4)
    assert isinstance(videos, Videos)
    assert [len(frames) for _, frames in videos.batches()] == [2, 2, 1]


def test_the_autoencoder_works_on_tiles_if_it_can(sd3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = load_family(ModelConfig(path=str(sd3), tiling=True))
    assert family.pipeline.vae.use_tiling
    assert not load_family(ModelConfig(path=str(sd3))).pipeline.vae.use_tiling
    for base in type(family.pipeline.vae).__mro__:
        if "enable_tiling" in vars(base):
            monkeypatch.delattr(base, "enable_tiling")
    with pytest.raises(ModelError, match=r"^model\.tiling: the autoencoder of StableDiffusion3Pipeline has no tiles"):
        load_family(ModelConfig(path=str(sd3), tiling=True))
