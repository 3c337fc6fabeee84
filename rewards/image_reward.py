"""ImageReward: how well people would like an image for its prompt (2304.05977), from the published checkpoint.

    score = (MLP(h) − mean) / std

h is the last hidden state of the first token in BLIP's text encoder, a BERT with cross-attention to the image in every
layer. The image enters as the output of BLIP's ViT-L/16 at 224 pixels. The MLP is five linear layers without activations
between them. Mean, std and the following details are those of the published code.

The image is resized to 224 on its shorter side (bicubic), cropped in the middle and normalised as for CLIP. The prompt
is tokenized by BERT's uncased tokenizer, and padded or cut to 35 tokens: the end of a long prompt has no effect. The
first token stays [CLS]; BLIP's own retrieval replaces it with [ENC], ImageReward does not.

The tensors are loaded into BLIP's modules of transformers, where they have other names; `published_name` translates.
Sizes follow from the shapes of the tensors. Heads are 64 wide in both encoders, so med_config.json of the checkpoint is
not needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from rewards.base import Metadata, OnDevice, Scores, all_valid, check_images
from rewards.options import check_at_least_one
from rewards.pictures import CLIP_MEAN, CLIP_STD, crop_middle, to_pictures
from rewards.random_state import preserved_random_state
from rewards.sources import check_sources, resolve_source
from rewards.weights import describe_differences, find_file, read_tensors

FILE = "ImageReward.pt"
MEAN, STD = 0.16717362830052426, 1.0333394966054072
TOKENS = 35
HEAD_WIDTH = 64

UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
"""Unused tensors of the checkpoint: BLIP's contrastive projections, and the position numbers from 0."""

# Names here and published names, replaced in this order.
_NAMES = (
    ("vision.embeddings.class_embedding", "vision.cls_token"),
    ("vision.embeddings.position_embedding", "vision.pos_embed"),
    ("vision.embeddings.patch_embedding.", "vision.patch_embed.proj."),
    ("vision.post_layernorm.", "vision.norm."),
    ("vision.encoder.layers.", "vision.blocks."),
    (".layer_norm", ".norm"),
    (".self_attn.projection.", ".attn.proj."),
    (".self_attn.qkv.", ".attn.qkv."),
    ("vision.", "blip.visual_encoder."),
    ("text.", "blip.text_encoder."),
    ("head.", "mlp.layers."),
)


class ImageRewardNetwork(nn.Module):
    """BLIP's two encoders and the MLP, with the sizes and values of the published ``tensors``."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        from transformers import BlipTextModel, BlipVisionModel

        super().__init__()
        vision, text = _build_configs(tensors)
        self.size: int = vision.image_size
        self.words: int = text.vocab_size
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        # The dropouts are there so that the layers have their published numbers.
        self.head = nn.Sequential(
            *(nn.Linear(text.hidden_size, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2)),
            *(nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1)),
        )
        used = {name: value for name, value in tensors.items() if not name.startswith(UNUSED)}
        own = {published_name(name): value for name, value in self.state_dict().items()}
        if problem := describe_differences(used, own):
            raise ValueError(f"its tensors are others: {problem}")
        self.load_state_dict({name: tensors[published_name(name)] for name in self.state_dict()})
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Return scores [B] of normalised pixels [B,3,S,S] and tokens [B,L] with their mask of 0 and 1."""
        patches = self.vision(pixels).last_hidden_state
        states = self.text(ids, attention_mask=mask, encoder_hidden_states=patches).last_hidden_state
        scores: Tensor = (self.head(states[:, 0])[:, 0] - MEAN) / STD
        return scores


class ImageReward(OnDevice):
    """Human preference for the image, given its prompt, by ImageReward-v1.0: about −2 to 2.

    The score is unbounded; the published examples lie between −2 and 1. weights: hub id, folder or file of ImageReward.pt.
    tokenizer: hub id or folder of bert-base-uncased. revision: revision of the weights.
    """

    name = "image_reward"
    needs: tuple[str, ...] = ("images", "prompts")

    def __init__(
        self,
        *,
        weights: str = "zai-org/ImageReward",
        tokenizer: str = "google-bert/bert-base-uncased",
        batch_size: int = 16,
        revision: str | None = None,
    ) -> None:
        check_at_least_one(self.name, batch_size=batch_size)
        check_sources(self.name, weights=weights, tokenizer=tokenizer)
        self.weights, self.vocabulary, self.batch_size, self.revision = weights, tokenizer, batch_size, revision

    @property
    def network(self) -> ImageRewardNetwork:
        """The network, loaded at the first access."""
        return self._loaded[0].to(self._device)

    def preload(self) -> None:
        """Load the model now."""
        _ = self._loaded

    @torch.no_grad()
    def __call__(self, samples: Tensor, prompts: Sequence[str], metadata: Metadata) -> Scores:
        """Score images [B,3,H,W] in [0,1]; metadata are not used."""
        pictures = to_pictures(check_images(samples, self.name))
        network, tokenizer = self.network, self._loaded[1]
        scores = []
        for start in range(0, len(pictures), self.batch_size):
            rows = slice(start, start + self.batch_size)
            pixels = torch.stack([preprocess(picture, network.size) for picture in pictures[rows]])
            words = tokenizer(
                list(prompts[rows]), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
            )
            inputs = (pixels, words["input_ids"], words["attention_mask"])
            scores.append(network(*(tensor.to(self._device) for tensor in inputs)))
        return all_valid(torch.cat(scores).to(samples.device) if scores else torch.zeros(0))

    @cached_property
    @preserved_random_state()
    def _loaded(self) -> tuple[ImageRewardNetwork, Any]:
        """The network and its tokenizer."""
        path = find_file(self.weights, FILE, self.revision)
        network = load_network(path)
        tokenizer = load_blip_tokenizer(self.vocabulary)
        if len(tokenizer) > network.words:
            raise ValueError(
                f"the tokenizer {self.vocabulary} has {len(tokenizer)} tokens and {path} has {network.words}; "
                "ImageReward uses bert-base-uncased: give its hub id or folder"
            )
        return network, tokenizer


def published_name(name: str) -> str:
    """Return the name that a tensor of `ImageRewardNetwork` has in the published checkpoint."""
    for ours, published in _NAMES:
        name = name.replace(ours, published)
    return name


def load_blip_tokenizer(source: str) -> Any:
    """Load BERT's tokenizer and append BLIP's two additional tokens, [DEC] and [ENC]."""
    from transformers import BertTokenizer

    tokenizer = BertTokenizer.from_pretrained(resolve_source(source))
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    return tokenizer


def preprocess(picture: Image.Image, size: int) -> Tensor:
    """Return pixels [3,size,size] of an RGB picture: shorter side to ``size`` (bicubic), middle square, (p/255 − mean)/std.

    Lengths are rounded as in torchvision's Resize and CenterCrop.
    """
    picture = crop_middle(picture)
    short, long = sorted(picture.size)
    to = [size if length == short else int(size * long / short) for length in picture.size]
    left, top = (round((length - size) / 2) for length in to)
    square = picture.resize((to[0], to[1]), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


def load_network(path: Path) -> ImageRewardNetwork:
    """Load the network from the published checkpoint. Raise ValueError if its tensors are others."""
    tensors = read_tensors(path)
    try:
        return ImageRewardNetwork(tensors)
    except KeyError as error:
        problem = f"it has no tensor {error}, but {', '.join([*tensors][:4])}, …"
    except ValueError as error:
        problem = str(error)
    raise ValueError(f"{path} is not {FILE} as published: {problem}")


def _build_configs(tensors: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """Return the configurations of the image encoder and the text encoder, given the shapes of their tensors."""
    from transformers import BlipTextConfig, BlipVisionConfig

    images, texts = "blip.visual_encoder.", "blip.text_encoder."
    patches = tensors[f"{images}patch_embed.proj.weight"]  # [width, 3, patch, patch]
    positions = tensors[f"{images}pos_embed"]  # [1, 1 + patches, width]
    words = tensors[f"{texts}embeddings.word_embeddings.weight"]  # [vocabulary, width]
    vision = BlipVisionConfig(
        hidden_size=len(patches),
        intermediate_size=len(tensors[f"{images}blocks.0.mlp.fc1.weight"]),
        num_hidden_layers=_count_layers(tensors, f"{images}blocks."),
        num_attention_heads=_count_heads(len(patches)),
        image_size=patches.shape[-1] * isqrt(positions.shape[1] - 1),
        patch_size=patches.shape[-1],
        layer_norm_eps=1e-6,  # Salesforce's, ten times smaller than the default of transformers
    )
    text = BlipTextConfig(
        vocab_size=len(words),
        hidden_size=words.shape[1],
        encoder_hidden_size=len(patches),
        intermediate_size=len(tensors[f"{texts}encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=_count_layers(tensors, f"{texts}encoder.layer."),
        num_attention_heads=_count_heads(words.shape[1]),
        max_position_embeddings=len(tensors[f"{texts}embeddings.position_embeddings.weight"]),
        layer_norm_eps=1e-12,
    )
    return vision, text


def _count_heads(width: int) -> int:
    if width % HEAD_WIDTH:
        raise ValueError(f"an encoder is {width} wide, expected a multiple of {HEAD_WIDTH}, the width of a head")
    return width // HEAD_WIDTH


def _count_layers(tensors: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(name.removeprefix(prefix).partition(".")[0]) for name in tensors if name.startswith(prefix))
