"""Tests of the encoders behind rewards on CLIP, and of the properties that these rewards share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rewards import Reward, available, make, score
from rewards.aesthetic import AestheticHead
from rewards.clip import OpenClip, TransformersClip
from tests.tiny_clip import ARCHITECTURE, random_images, tiny_clip, tiny_open_clip

IMAGES = random_images(5)
PROMPTS = ["a red cat", "a blue dog", "a red cat", "", "two CATS"]
NAMES = ["clip_score", "clip_score of open_clip", "pickscore", "hpsv2", "aesthetic"]
Build = Callable[..., Reward]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    tiny_clip(folder / "clip")
    tiny_open_clip(folder)
    torch.save(AestheticHead(16).state_dict(), folder / "sac+logos+ava1-l14-linearMSE.pth")
    return folder


@pytest.fixture(params=NAMES)
def build(request: pytest.FixtureRequest, folder: Path) -> Build:
    """A function that builds one of the rewards with shared options."""
    clip, checkpoint = str(folder / "clip"), str(folder / "HPS_v2.1_compressed.pt")
    options: dict[str, dict[str, str]] = {
        "clip_score": {"model": clip},
        "clip_score of open_clip": {"model": ARCHITECTURE, "backend": "open_clip", "pretrained": checkpoint},
        "pickscore": {"model": clip, "processor": clip},
        "hpsv2": {"weights": str(folder), "architecture": ARCHITECTURE},
        "aesthetic": {"model": clip, "head": str(folder)},
    }
    return lambda **more: make(request.param.split()[0], **options[request.param], **more)


def values(reward: Reward, images: Tensor = IMAGES, prompts: list[str] = PROMPTS) -> Tensor:
    result = score(reward, images, prompts, [{}] * len(prompts))
    assert result.valid.all()
    return result.values


def test_batches_and_order_do_not_matter(build: Build) -> None:
    whole = values(build())
    assert len(whole.unique()) == len(whole)
    order = [3, 0, 4, 2, 1]
    turned = values(build(batch_size=2), IMAGES[order], [PROMPTS[row] for row in order])
    # A matrix product of another height may round differently in the last digits; logit scales are 50.
    torch.testing.assert_close(turned, whole[order], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(values(build(batch_size=1)), whole, atol=2e-5, rtol=1e-5)


def test_an_empty_batch_has_no_values(build: Build) -> None:
    assert values(build(), torch.zeros(0, 3, 8, 8), []).shape == (0,)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near(build: Build, dtype: str) -> None:
    reward = build(dtype=dtype)
    close = values(reward)
    exact = values(build())
    assert not torch.equal(close, exact)
    # bfloat16 has eight bits; differences are relative to the scale of the values, 50 where logits are the value.
    assert (close - exact).abs().max() < 0.03 * max(1.0, float(exact.abs().max()))
    assert reward.encoder.logit_scale == pytest.approx(50, rel=1e-3)


def test_colours_outside_the_range_and_wrong_shapes_are_refused(build: Build) -> None:
    with pytest.raises(ValueError, match=r"in \[0,1\], found values from -0\.95.* to 2"):
        build()(IMAGES * 3 - 1, PROMPTS, [{}] * 5)
    with pytest.raises(ValueError, match=r"expects float images \[B,3,H,W\]"):
        build()(IMAGES[:, :1], PROMPTS, [{}] * 5)
    with pytest.raises(ValueError, match="got 5 images and 1 prompts"):
        build()(IMAGES, PROMPTS[:1], [{}])


def test_wrong_options_are_refused(build: Build) -> None:
    with pytest.raises(ValueError, match="dtype is 'int8', expected one of float32, bfloat16, float16"):
        build(dtype="int8")
    with pytest.raises(ValueError, match="batch_size is 0"):
        build(batch_size=0)


@pytest.mark.gpu
def test_an_accelerator_gives_the_same(build: Build) -> None:
    reward = build().to("cuda")
    result = reward(IMAGES.cuda(), PROMPTS, [{}] * 5)
    assert result.values.is_cuda
    torch.testing.assert_close(result.values.cpu(), values(build()), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(values(reward.to("cpu")), values(build()))


@pytest.mark.parametrize("backend", ["transformers", "open_clip"])
def test_texts_beyond_the_context_are_cut(folder: Path, backend: str) -> None:
    checkpoint = str(folder / "HPS_v2.1_compressed.pt")
    encoder = OpenClip(ARCHITECTURE, checkpoint) if backend == "open_clip" else TransformersClip(str(folder / "clip"))
    letters = ["abcdefghijklmnopqrstuvwxyz"[at % 26] for at in range(100)]  # each is one token; two more are the ends
    with torch.no_grad():
        whole, kept, less = encoder.texts([" ".join(letters[:count]) for count in (100, 75, 74)])
    assert torch.equal(whole, kept)
    assert (kept - less).abs().max() > 1e-3


def test_embeddings_have_length_one_and_the_scale_is_read_exactly(folder: Path) -> None:
    encoder = TransformersClip(str(folder / "clip"), dtype="bfloat16")
    assert encoder.logit_scale == pytest.approx(50, rel=1e-6)
    with torch.no_grad():
        norms = torch.cat([encoder.images(IMAGES), encoder.texts(PROMPTS)]).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(10))


def test_descriptions_in_the_registry() -> None:
    entries = {entry.name: entry for entry in available()}
    assert entries["aesthetic"].needs == ("images",)
    assert all(entries[name].needs == ("images", "prompts") for name in ("clip_score", "pickscore", "hpsv2"))


# Broken weights of transformers


def copied(folder: Path, to: Path, change: Callable[[dict[str, Tensor]], object]) -> str:
    """Write a copy of the tiny model with changed tensors."""
    tiny_clip(to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return str(to)


def test_missing_and_unexpected_weights_are_named(folder: Path, tmp_path: Path) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        tensors["another.weight"] = tensors.pop("visual_projection.weight")

    source = copied(folder, tmp_path, rename)
    with pytest.raises(ValueError, match=r"missing visual_projection\.weight; unexpected another\.weight") as error:
        TransformersClip(source)
    assert source in str(error.value)


def test_weights_of_another_shape_are_named(folder: Path, tmp_path: Path) -> None:
    def widen(tensors: dict[str, Tensor]) -> None:
        tensors["visual_projection.weight"] = torch.zeros(8, 32)

    source = copied(folder, tmp_path, widen)
    with pytest.raises(ValueError, match=r"of another shape visual_projection\.weight \[8, 32\] instead of \[16, 32\]"):
        TransformersClip(source)


def test_position_ids_of_older_checkpoints_do_no_harm(folder: Path, tmp_path: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]

    encoder = TransformersClip(copied(folder, tmp_path, add))
    with torch.no_grad():
        assert torch.equal(encoder.texts(PROMPTS), TransformersClip(str(folder / "clip")).texts(PROMPTS))


def test_errors_of_truncated_weights_and_missing_parts_have_the_folder(tmp_path: Path) -> None:
    whole = tiny_clip(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"cannot load the CLIP model .*nowhere"):
        TransformersClip(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"cannot load the CLIP processor .*nowhere"):
        TransformersClip(str(whole), str(tmp_path / "nowhere"))
    content = (whole / "model.safetensors").read_bytes()
    (whole / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cannot load the CLIP model .*/clip"):
        TransformersClip(str(whole))


# Sources of open_clip


def test_a_local_folder_of_open_clip(folder: Path, tmp_path: Path) -> None:
    import open_clip

    config = {"model_cfg": open_clip.get_model_config(ARCHITECTURE), "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    name = f"local-dir:{tmp_path}"
    with pytest.raises(ValueError, match=r"cannot load open_clip's model local-dir:.*Required pretrained weights"):
        OpenClip(name)
    state = torch.load(folder / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
    save_file(state, tmp_path / "open_clip_model.safetensors")
    with torch.no_grad():
        same = OpenClip(ARCHITECTURE, str(folder / "HPS_v2.1_compressed.pt")).images(IMAGES)
        assert torch.equal(OpenClip(name).images(IMAGES), same)
    with pytest.raises(ValueError, match="names its weights: leave out pretrained='openai'"):
        OpenClip(name, "openai")


def test_weights_of_several_processes_have_a_prefix(folder: Path, tmp_path: Path) -> None:
    checkpoint = folder / "HPS_v2.1_compressed.pt"
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "epoch_1.pt")
    with torch.no_grad():
        same = OpenClip(ARCHITECTURE, str(checkpoint)).texts(PROMPTS)
        assert torch.equal(OpenClip(ARCHITECTURE, str(tmp_path / "epoch_1.pt")).texts(PROMPTS), same)


def test_open_clip_is_never_left_with_random_weights(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="Required pretrained weights"):
        OpenClip(ARCHITECTURE)
    with pytest.raises(ValueError, match=r"'/nowhere\.pt' is not a known tag or valid file path"):
        OpenClip(ARCHITECTURE, "/nowhere.pt")
    with pytest.raises(ValueError, match="Model config for 'tinier' not found"):
        OpenClip("tinier", str(folder / "HPS_v2.1_compressed.pt"))
    caplog.clear()
    OpenClip(ARCHITECTURE, str(folder / "HPS_v2.1_compressed.pt"))
    assert caplog.messages == []
