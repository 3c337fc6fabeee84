"""Image and text encoders of the CLIP family (2103.00020) behind one interface, and the base class of rewards on them.

Encoders return embeddings of length one, so that the cosine of a picture and a prompt is the dot product. Two
libraries provide the weights: transformers (a folder written by `save_pretrained`) and open_clip (the name of an
architecture, with a tag or a checkpoint).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from rewards.base import Metadata, Scores, all_valid, check_images
from rewards.options import check_at_least_one, check_choice
from rewards.pictures import crop_middle, to_pictures
from rewards.random_state import preserved_random_state
from rewards.sources import check_sources, resolve_source
from rewards.weights import join_differences, load_weights, read_tensors

_OPEN_CLIP_PRECISION = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _OPEN_CLIP_PRECISION}
BACKENDS = ("transformers", "open_clip")

Pixels = Callable[[Tensor, int], Tensor]
"""(images [B,3,H,W] in [0,1], size of the model's input) -> the model's input [B,3,size,size]."""


class Encoder(Protocol):
    """A model that embeds pictures and texts in one space. Weights may have a lower precision; embeddings are float32."""

    logit_scale: float  # factor that the model applies to cosines, 100 in most CLIP models

    def images(self, images: Tensor) -> Tensor:
        """Return unit embeddings [B,D] of images [B,3,H,W] in [0,1]."""
        ...

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Return unit embeddings [B,D]. Texts are cut at the length of the context (77 tokens)."""
        ...

    def to(self, device: torch.device) -> Encoder:
        """Move the model, and return the encoder."""
        ...


class TransformersClip:
    """A CLIPModel of transformers and its processor, each from a hub id or a local folder."""

    @preserved_random_state()
    def __init__(self, model: str, processor: str | None = None, *, dtype: str = "float32") -> None:
        from transformers import CLIPModel, CLIPProcessor

        processor = processor or model
        with _explain_errors(f"the CLIP model {model}"):
            self.model, found = CLIPModel.from_pretrained(
                resolve_source(model), dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
            )
        # transformers only warns, and fills missing weights with random ones, whose scores look like real scores.
        if problem := join_differences(found["missing_keys"], found["unexpected_keys"], found["mismatched_keys"]):
            raise ValueError(f"the weights in {model} are not those of a CLIPModel: {problem}")
        with _explain_errors(f"the CLIP processor {processor}"):
            # Published scores use PIL's resizing; torchvision's, the default of transformers, differs slightly.
            self.processor = CLIPProcessor.from_pretrained(resolve_source(processor), backend="pil")
        self.context: int = self.model.config.text_config.max_position_embeddings
        # In float32: bfloat16 would round ln 100, and the scale would become 99.
        self.logit_scale = self.model.logit_scale.exp().item()
        self.model.eval().to(DTYPES[dtype])

    def images(self, images: Tensor) -> Tensor:
        """Return unit embeddings [B,D] of images [B,3,H,W] in [0,1]."""
        return self.pictures(to_pictures(images))

    def pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return unit embeddings [B,D] of B pictures, which may differ in size."""
        if self.processor.image_processor.do_center_crop:
            pictures = [crop_middle(picture) for picture in pictures]
        inputs = self.processor(images=list(pictures), return_tensors="pt")
        pixels = inputs["pixel_values"].to(self.model.device, self.model.dtype)
        return _unit(self.model.get_image_features(pixel_values=pixels).pooler_output)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Return unit embeddings [B,D]. Texts are cut at the length of the context."""
        inputs = self.processor(
            text=list(texts), padding=True, truncation=True, max_length=self.context, return_tensors="pt"
        ).to(self.model.device)
        features = self.model.get_text_features(inputs["input_ids"], attention_mask=inputs["attention_mask"])
        return _unit(features.pooler_output)

    def to(self, device: torch.device) -> TransformersClip:
        """Move the model, and return the encoder."""
        self.model.to(device)
        return self


class OpenClip:
    """A model of open_clip: the name of an architecture with a tag or a checkpoint file, `hf-hub:owner/name`, or
    `local-dir:folder`. ``pixels`` replaces the model's own preprocessing, for rewards that were published with another."""

    @preserved_random_state()
    def __init__(
        self, model: str, pretrained: str | None = None, *, dtype: str = "float32", pixels: Pixels | None = None
    ) -> None:
        import open_clip

        if ":" in model and pretrained is not None:
            raise ValueError(f"{model} names its weights: leave out pretrained={pretrained!r}")
        precision = _OPEN_CLIP_PRECISION[dtype]
        self._dtype = DTYPES[dtype]
        path = Path(pretrained or "").expanduser()
        tensors: dict[str, Tensor] | None = None
        if path.is_file():  # read first, so that a damaged file is reported before the model is built
            # Training in several processes puts the prefix of its wrapper before each name.
            tensors = {name.removeprefix("module."): value for name, value in read_tensors(path).items()}
        with _explain_errors(f"open_clip's model {model} with the weights {pretrained}"):
            if tensors is not None:
                with _without_random_weights_warning():
                    self.model, _, self._transform = open_clip.create_model_and_transforms(model, precision=precision)
            else:
                self.model, self._transform = open_clip.create_model_from_pretrained(
                    model, pretrained, precision=precision, weights_only=True
                )
            self.tokenizer = open_clip.get_tokenizer(model)
        if tensors is not None:
            load_weights(self.model, tensors, path)
        size: int | Sequence[int] = self.model.visual.image_size
        self._size = size if isinstance(size, int) else size[0]
        self._pixels = pixels
        self.logit_scale = self.model.logit_scale.float().exp().item()
        self.model.eval()

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.model.logit_scale.device
        return device

    def images(self, images: Tensor) -> Tensor:
        """Return unit embeddings [B,D] of images [B,3,H,W] in [0,1]."""
        if self._pixels is None:
            pictures = to_pictures(images)
            if self.model.visual.preprocess_cfg["resize_mode"] == "shortest":
                pictures = [crop_middle(picture) for picture in pictures]
            pixels = torch.stack([self._transform(picture) for picture in pictures])
        else:
            pixels = self._pixels(images.to(self._device), self._size)
        return _unit(self.model.encode_image(pixels.to(self._device, self._dtype)))

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Return unit embeddings [B,D]. Texts are cut at the length of the context."""
        return _unit(self.model.encode_text(self.tokenizer(list(texts)).to(self._device)))

    def to(self, device: torch.device) -> OpenClip:
        """Move the model, and return the encoder."""
        self.model.to(device)
        return self


class ClipReward:
    """Base class of rewards on CLIP embeddings: by default the cosine of picture and prompt. Others override `values`.

    The encoder is loaded at the first call. Images are scored ``batch_size`` at a time.
    """

    name: str
    needs: tuple[str, ...] = ("images", "prompts")

    def __init__(self, load: Callable[[], Encoder], batch_size: int) -> None:
        check_at_least_one(self.name, batch_size=batch_size)
        self.batch_size = batch_size
        self._load, self._device = load, torch.device("cpu")
        self._encoder: Encoder | None = None

    @property
    def encoder(self) -> Encoder:
        """The encoder, loaded at the first access."""
        if self._encoder is None:
            self._encoder = self._load().to(self._device)
        return self._encoder

    def preload(self) -> None:
        """Load the model now."""
        _ = self.encoder

    def to(self, device: torch.device | str) -> ClipReward:
        """Move the encoder, and return the reward."""
        self._device = torch.device(device)
        if self._encoder is not None:
            self._encoder.to(self._device)
        return self

    @torch.no_grad()
    def __call__(self, samples: Tensor, prompts: Sequence[str], metadata: Metadata) -> Scores:
        """Score images [B,3,H,W] in [0,1]."""
        images = check_images(samples, self.name)
        if len(images) != len(prompts):
            raise ValueError(f"reward '{self.name}' got {len(images)} images and {len(prompts)} prompts")
        size = self.batch_size
        parts = [self.values(images[at : at + size], prompts[at : at + size]) for at in range(0, len(images), size)]
        return all_valid(torch.cat([torch.zeros(0), *(part.cpu() for part in parts)]).to(samples.device))

    def values(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return values [B] of one batch: images [B,3,H,W] in [0,1] and their prompts."""
        return cosines(self.encoder, images, prompts)


def choose_backend(
    reward: str, model: str, backend: str, pretrained: str | None, dtype: str
) -> Callable[[], TransformersClip | OpenClip]:
    """Return a function that loads the encoder of a reward's options. ValueError if they do not fit."""
    check_choice(reward, "backend", backend, BACKENDS)
    check_choice(reward, "dtype", dtype, DTYPES)
    if backend == "open_clip":
        return partial(OpenClip, model, pretrained, dtype=dtype)
    if pretrained is not None:
        raise ValueError(
            f"reward '{reward}': pretrained={pretrained!r} is for backend=open_clip; "
            "with transformers the weights are those of the model's hub id or folder"
        )
    check_sources(reward, model=model)
    return partial(TransformersClip, model, dtype=dtype)


def cosines(encoder: Encoder, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return cos(picture, prompt) [B] in [−1,1]. A prompt that occurs several times, as in a group, is encoded once."""
    rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    texts = encoder.texts(list(rows))[[rows[prompt] for prompt in prompts]]
    return (encoder.images(images) * texts).sum(1)


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=-1)


@contextmanager
def _explain_errors(what: str) -> Iterator[None]:
    """Turn any error of the libraries while loading into a ValueError that names the model."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"cannot load {what}: {error}") from error


@contextmanager
def _without_random_weights_warning() -> Iterator[None]:
    """Suppress open_clip's warning that a model without weights is random: they are loaded from a file afterwards."""
    root = logging.getLogger()

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("No pretrained weights loaded")

    root.addFilter(keep)
    try:
        yield
    finally:
        root.removeFilter(keep)
