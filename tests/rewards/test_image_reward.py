"""Tests of ImageReward with a tiny checkpoint under the published names, against BLIP's forward pass written out here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from transformers import BertTokenizer

from rewards import RewardError, make, score
from rewards.image_reward import ImageRewardNetwork, preprocess, published_name

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "green", "circle", "square", "left", "of"]
WIDE, NARROW, LAYERS, PATCH, SIDE = 128, 64, 2, 8, 3  # widths of image and text, patches of 8, 3 × 3 of them
PROMPTS = ["a red circle", "a green square left of a red circle", "a", "a red square"]


def published(seed: int = 0) -> dict[str, Tensor]:
    """Return a state dict in the format of the published code, with small random values."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}

    def add(name: str, *shape: int, scale: float = 0.1) -> None:
        tensors[name] = scale * torch.randn(shape, generator=generator)

    def linear(name: str, inputs: int, outputs: int, scale: float = 0.15) -> None:
        add(f"{name}.weight", outputs, inputs, scale=scale)
        add(f"{name}.bias", outputs)

    def norm(name: str, width: int) -> None:
        tensors[f"{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=generator)
        add(f"{name}.bias", width)

    see = "blip.visual_encoder"
    # Tiny at the entrance, so that the variance under the first norms is of the size of their epsilon.
    add(f"{see}.cls_token", 1, 1, WIDE, scale=0.001)
    add(f"{see}.pos_embed", 1, SIDE**2 + 1, WIDE, scale=0.001)
    add(f"{see}.patch_embed.proj.weight", WIDE, 3, PATCH, PATCH, scale=0.0002)
    add(f"{see}.patch_embed.proj.bias", WIDE, scale=0.001)
    for layer in range(LAYERS):
        block = f"{see}.blocks.{layer}"
        norm(f"{block}.norm1", WIDE)
        linear(f"{block}.attn.qkv", WIDE, 3 * WIDE)
        linear(f"{block}.attn.proj", WIDE, WIDE, scale=0.005)
        norm(f"{block}.norm2", WIDE)
        linear(f"{block}.mlp.fc1", WIDE, 4 * WIDE)
        linear(f"{block}.mlp.fc2", 4 * WIDE, WIDE, scale=0.005)
    norm(f"{see}.norm", WIDE)

    read = "blip.text_encoder"
    add(f"{read}.embeddings.word_embeddings.weight", len(WORDS) + 2, NARROW)
    add(f"{read}.embeddings.position_embeddings.weight", 40, NARROW)
    tensors[f"{read}.embeddings.position_ids"] = torch.arange(40)[None]
    norm(f"{read}.embeddings.LayerNorm", NARROW)
    for layer in range(LAYERS):
        block = f"{read}.encoder.layer.{layer}"
        for attention, inputs in (("attention", NARROW), ("crossattention", WIDE)):
            linear(f"{block}.{attention}.self.query", NARROW, NARROW)
            linear(f"{block}.{attention}.self.key", inputs, NARROW)
            linear(f"{block}.{attention}.self.value", inputs, NARROW)
            linear(f"{block}.{attention}.output.dense", NARROW, NARROW)
            norm(f"{block}.{attention}.output.LayerNorm", NARROW)
        linear(f"{block}.intermediate.dense", NARROW, 3 * NARROW)
        linear(f"{block}.output.dense", 3 * NARROW, NARROW)
        norm(f"{block}.output.LayerNorm", NARROW)

    linear("blip.vision_proj", WIDE, 16)
    linear("blip.text_proj", NARROW, 16)
    sizes = (NARROW, 1024, 128, 64, 16, 1)
    for number, inputs, outputs in zip((0, 2, 4, 6, 7), sizes, sizes[1:], strict=False):
        linear(f"mlp.layers.{number}", inputs, outputs, scale=1 / math.sqrt(inputs))
    return tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small ImageReward.pt and a tokenizer, as on the hub."""
    path = tmp_path_factory.mktemp("image_reward")
    torch.save(published(), path / "ImageReward.pt")
    (path / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    BertTokenizer(vocab=str(path / "vocab.txt")).save_pretrained(path / "bert")
    return path


def reward(folder: Path, **options: object):  # type: ignore[no-untyped-def]
    return make("image_reward", weights=str(folder), tokenizer=str(folder / "bert"), **options)


def drawn(count: int = 4, height: int = 30, width: int = 41) -> Tensor:
    """Return random images with 8-bit values."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator) / 255


class Written:
    """The published forward pass over the published names, in float64 and without a library's modules."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = {name: value.double() for name, value in tensors.items()}

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]

    def norm(self, name: str, x: Tensor, epsilon: float) -> Tensor:
        deviation = x - x.mean(-1, keepdim=True)
        scaled = deviation / (deviation.square().mean(-1, keepdim=True) + epsilon).sqrt()
        return scaled * self.tensors[f"{name}.weight"] + self.tensors[f"{name}.bias"]

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the attention of one row in heads of 64. All arguments are [L, width]."""
        heads = []
        for start in range(0, query.shape[1], 64):
            part = slice(start, start + 64)
            heads.append((query[:, part] @ key[:, part].T / 8).softmax(-1) @ value[:, part])
        return torch.cat(heads, -1)

    def image(self, pixels: Tensor) -> Tensor:
        """Return the encoding [1 + patches, WIDE] of preprocessed pixels [3, S, S]."""
        see = "blip.visual_encoder"
        patches = pixels.double().unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)  # [3, rows, columns, PATCH, PATCH]
        patches = patches.permute(1, 2, 0, 3, 4).reshape(SIDE**2, -1)
        seen = patches @ self.tensors[f"{see}.patch_embed.proj.weight"].reshape(WIDE, -1).T
        seen = seen + self.tensors[f"{see}.patch_embed.proj.bias"]
        x = torch.cat([self.tensors[f"{see}.cls_token"][0], seen]) + self.tensors[f"{see}.pos_embed"][0]
        for layer in range(LAYERS):
            block = f"{see}.blocks.{layer}"
            q, k, v = self.linear(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
            x = x + self.linear(f"{block}.attn.proj", self.attend(q, k, v))
            hidden = F.gelu(self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, 1e-6)))
            x = x + self.linear(f"{block}.mlp.fc2", hidden)
        return self.norm(f"{see}.norm", x, 1e-6)

    def text(self, ids: list[int], seen: Tensor) -> Tensor:
        """Return the encoding [L, NARROW] of a prompt without padding, with attention to an image."""
        read = "blip.text_encoder"
        x = self.tensors[f"{read}.embeddings.word_embeddings.weight"][ids]
        x = x + self.tensors[f"{read}.embeddings.position_embeddings.weight"][: len(ids)]
        x = self.norm(f"{read}.embeddings.LayerNorm", x, 1e-12)
        for layer in range(LAYERS):
            block = f"{read}.encoder.layer.{layer}"
            for attention in ("attention", "crossattention"):
                source = x if attention == "attention" else seen
                q, k, v = (
                    self.linear(f"{block}.{attention}.self.{part}", inputs)
                    for part, inputs in (("query", x), ("key", source), ("value", source))
                )
                mixed = self.linear(f"{block}.{attention}.output.dense", self.attend(q, k, v))
                x = self.norm(f"{block}.{attention}.output.LayerNorm", x + mixed, 1e-12)
            hidden = F.gelu(self.linear(f"{block}.intermediate.dense", x))
            x = self.norm(f"{block}.output.LayerNorm", x + self.linear(f"{block}.output.dense", hidden), 1e-12)
        return x

    def score(self, pixels: Tensor, ids: list[int]) -> float:
        x = self.text(ids, self.image(pixels))[0]
        for number in (0, 2, 4, 6, 7):
            x = self.linear(f"mlp.layers.{number}", x)
        return (x.item() - 0.16717362830052426) / 1.0333394966054072


def transform(size: int):  # type: ignore[no-untyped-def]
    """Return the published preprocessing."""
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return Compose(
        [
            Resize(size, interpolation=InterpolationMode.BICUBIC),
            CenterCrop(size),
            ToTensor(),
            Normalize(mean, deviation),
        ]
    )


def as_picture(image: Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def token_ids(prompt: str) -> list[int]:
    return [2, *(WORDS.index(word) for word in prompt.split()), 3]


def test_the_score_is_that_of_the_published_formula(folder: Path) -> None:
    images, pixels = drawn(), transform(PATCH * SIDE)
    found = score(reward(folder, batch_size=3), images, PROMPTS, [{}] * 4)
    written = Written(published())
    expected = [written.score(pixels(as_picture(i)), token_ids(p)) for i, p in zip(images, PROMPTS, strict=True)]
    assert found.valid.all()
    assert found.values.tolist() == pytest.approx(expected, abs=1e-5)
    assert found.values.std() > 0.1, "a score that hardly varies would show nothing"


def test_both_the_image_and_the_prompt_count(folder: Path) -> None:
    images = drawn(1).repeat(2, 1, 1, 1)
    one = reward(folder)
    other_prompt = score(one, images, ["a red circle", "a green circle"], [{}] * 2).values
    other_image = score(one, drawn(2), ["a red circle"] * 2, [{}] * 2).values
    assert (other_prompt[0] - other_prompt[1]).abs() > 1e-3
    assert (other_image[0] - other_image[1]).abs() > 1e-3


def test_the_size_of_a_batch_changes_nothing(folder: Path) -> None:
    whole = score(reward(folder, batch_size=4), drawn(), PROMPTS, [{}] * 4).values
    single = score(reward(folder, batch_size=1), drawn(), PROMPTS, [{}] * 4).values
    torch.testing.assert_close(whole, single, atol=1e-5, rtol=0)
    assert score(reward(folder), drawn(0), [], []).values.shape == (0,)


def test_a_prompt_is_cut_at_thirty_five_tokens(folder: Path) -> None:
    """The tokens are [CLS], 33 words and [SEP]. The 33rd word has an effect, the 34th has none."""
    words = ["red"] * 33
    prompts = [" ".join(words), " ".join([*words, "green"]), " ".join([*words[:-1], "green"])]
    found = score(reward(folder), drawn(1).repeat(3, 1, 1, 1), prompts, [{}] * 3).values
    assert found[0] == found[1]
    assert (found[0] - found[2]).abs() > 1e-4


def test_blips_own_tokens_are_read_as_such(folder: Path) -> None:
    written, pixels = Written(published()), transform(PATCH * SIDE)(as_picture(drawn()[0]))
    found = score(reward(folder), drawn(1), ["a [ENC] circle [DEC]"], [{}]).values
    ids = [2, WORDS.index("a"), len(WORDS) + 1, WORDS.index("circle"), len(WORDS), 3]
    assert found.item() == pytest.approx(written.score(pixels, ids), abs=1e-5)


@settings(max_examples=40)
@given(width=st.integers(1, 90), height=st.integers(1, 90), size=st.integers(1, 40), seed=st.integers(0, 2**16))
def test_pixels_are_those_of_torchvision(width: int, height: int, size: int, seed: int) -> None:
    array = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture = Image.fromarray(array)
    torch.testing.assert_close(preprocess(picture, size), transform(size)(picture), atol=1e-6, rtol=0)


def test_names_by_hand() -> None:
    pairs = {
        "vision.embeddings.class_embedding": "blip.visual_encoder.cls_token",
        "vision.embeddings.position_embedding": "blip.visual_encoder.pos_embed",
        "vision.embeddings.patch_embedding.bias": "blip.visual_encoder.patch_embed.proj.bias",
        "vision.encoder.layers.23.layer_norm1.weight": "blip.visual_encoder.blocks.23.norm1.weight",
        "vision.encoder.layers.0.self_attn.qkv.bias": "blip.visual_encoder.blocks.0.attn.qkv.bias",
        "vision.encoder.layers.0.self_attn.projection.bias": "blip.visual_encoder.blocks.0.attn.proj.bias",
        "vision.encoder.layers.0.mlp.fc2.weight": "blip.visual_encoder.blocks.0.mlp.fc2.weight",
        "vision.post_layernorm.weight": "blip.visual_encoder.norm.weight",
        "text.embeddings.LayerNorm.bias": "blip.text_encoder.embeddings.LayerNorm.bias",
        "text.encoder.layer.11.crossattention.self.key.weight": (
            "blip.text_encoder.encoder.layer.11.crossattention.self.key.weight"
        ),
        "head.7.weight": "mlp.layers.7.weight",
    }
    assert {name: published_name(name) for name in pairs} == pairs


def test_the_published_sizes_are_those_of_vit_large_and_bert_base() -> None:
    """The whole architecture on the meta device: sizes, heads and names, without values."""
    with torch.device("meta"):
        tensors = _large()
        network = ImageRewardNetwork(tensors)
    assert network.size == 224
    vision, text = network.vision.config, network.text.config
    assert (vision.num_hidden_layers, vision.num_attention_heads, vision.hidden_size) == (24, 16, 1024)
    assert (text.num_hidden_layers, text.num_attention_heads, text.encoder_hidden_size) == (12, 12, 1024)
    assert sum(value.numel() for value in network.parameters()) == pytest.approx(446e6, rel=0.01)


def _large() -> dict[str, Tensor]:
    """Return the tiny checkpoint's names with the published shapes."""
    sizes = {WIDE: 1024, 3 * WIDE: 3072, 4 * WIDE: 4096, NARROW: 768, 3 * NARROW: 3072, PATCH: 16, 40: 512}
    sizes |= {SIDE**2 + 1: 14**2 + 1, len(WORDS) + 2: 30524}
    tensors = {}
    for name, value in published().items():
        for layer in range(24 if "blocks." in name else 12 if "encoder.layer." in name else 1):
            copy = name.replace("blocks.0.", f"blocks.{layer}.").replace("layer.0.", f"layer.{layer}.")
            shape = value.shape if name.startswith("mlp") else tuple(sizes.get(n, n) for n in value.shape)
            tensors[copy] = torch.empty(shape)
    tensors["mlp.layers.0.weight"] = torch.empty(1024, 768)
    return tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"mlp.layers.6.bias": None},
            r"others: missing mlp\.layers\.6\.bias; unexpected none; of another shape none \(in a batch",
        ),
        ({"blip.visual_encoder.blocks.1.norm2.weight": None}, r"missing blip\.visual_encoder\.blocks\.1\.norm2\.w"),
        ({"blip.itm_head.weight": torch.zeros(1)}, r"unexpected blip\.itm_head\.weight"),
        ({"blip.visual_encoder.pos_embed": None}, r"has no tensor 'blip\.visual_encoder\.pos_embed', but blip\."),
        ({"mlp.layers.7.bias": torch.zeros(2)}, r"of another shape mlp\.layers\.7\.bias \[2\] instead of \[1\]"),
    ],
)
def test_other_tensors_are_refused_by_name(
    folder: Path, tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    tensors = {name: value for name, value in {**published(), **change}.items() if value is not None}
    torch.save(tensors, tmp_path / "ImageReward.pt")
    with pytest.raises(RewardError, match=r"ImageReward\.pt is not ImageReward\.pt as published: ") as caught:
        score(make("image_reward", weights=str(tmp_path), tokenizer=str(folder / "bert")), drawn(1), ["a"], [{}])
    assert caught.match(message)


def test_another_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS, "more"]), encoding="utf-8")
    BertTokenizer(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    with pytest.raises(RewardError, match=r"has 15 tokens and .* has 14; .* bert-base-uncased"):
        score(make("image_reward", weights=str(folder), tokenizer=str(tmp_path / "bert")), drawn(1), ["a"], [{}])


def test_bad_input_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        make("image_reward", batch_size=0)
    with pytest.raises(RewardError, match=r"expects float images \[B,3,H,W\]"):
        score(reward(folder), torch.zeros(1, 1, 8, 8), ["a"], [{}])
    with pytest.raises(RewardError, match=r"has no ImageReward\.pt"):
        score(make("image_reward", weights=str(folder / "bert")), drawn(1), ["a"], [{}])
