"""Image and text encoders of the CLIP family (2103.00020) behind one interface, and what rewards on them share.

An encoder gives embeddings of length one, so that the cosine of a picture and a prompt is the dot product. Two
libraries hold the weights: transformers (a folder that `save_pretrained` wrote) and open_clip (an architecture by
name and a tag or a checkpoint).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from rewards.base import Metadata, Scores, all_valid, check_images
from rewards.pictures import pictures
from rewards.weights import a_few, fill, read_tensors

_OPEN_CLIP_PRECISION = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _OPEN_CLIP_PRECISION}

Pixels = Callable[[Tensor, int], Tensor]
"""(images [B,3,H,W] in [0,1], size of the model's input) -> what the model takes [B,3,size,size]."""


class Encoder(Protocol):
    """Embeds pictures and texts in one space. Weights may be of a lower precision; embeddings are float32."""

    logit_scale: float  # what the model multiplies cosines by, 100 in most CLIP models

    def images(self, images: Tensor) -> Tensor:
        """Embeddings [B,D], of length one, of images [B,3,H,W] in [0,1]."""
        ...

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings [B,D], of length one; a text longer than the context (77 tokens) is cut."""
        ...

    def to(self, device: torch.device) -> Encoder:
        """Move the model; returns the encoder."""
        ...


class TransformersClip:
    """A CLIPModel of transformers with its processor, each a hub id or a local folder."""

    def __init__(self, model: str, processor: str | None = None, *, dtype: str = "float32") -> None:
        from transformers import CLIPModel, CLIPProcessor

        with _explained(f"the CLIP model {model}"):
            self.model, found = CLIPModel.from_pretrained(
                model, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
            )
        missing, unexpected = found["missing_keys"], found["unexpected_keys"]
        shapes = [f"{name} {list(file)} instead of {list(own)}" for name, file, own in found["mismatched_keys"]]
        # transformers makes up what is missing and warns; scores of random weights look like scores.
        if missing or unexpected or shapes:
            raise ValueError(
                f"the weights in {model} are not those of a CLIPModel: missing {a_few(missing)}; "
                f"unexpected {a_few(unexpected)}; of another shape {a_few(shapes)}"
            )
        with _explained(f"the CLIP processor {processor or model}"):
            # PIL's resizing is the published one; transformers' default, torchvision's, differs a little.
            self.processor = CLIPProcessor.from_pretrained(processor or model, backend="pil")
        self.context: int = self.model.config.text_config.max_position_embeddings
        # Read in float32: bfloat16 would round ln 100 so that the scale becomes 99.
        self.logit_scale = self.model.logit_scale.exp().item()
        self.model.eval().to(DTYPES[dtype])

    def images(self, images: Tensor) -> Tensor:
        """Embeddings [B,D], of length one, of images [B,3,H,W] in [0,1]."""
        return self.pictures(pictures(images))

    def pictures(self, shown: Sequence[Image.Image]) -> Tensor:
        """Embeddings [B,D], of length one, of B pictures, each of its own size."""
        inputs = self.processor(images=list(shown), return_tensors="pt")
        pixels = inputs["pixel_values"].to(self.model.device, self.model.dtype)
        return _unit(self.model.get_image_features(pixel_values=pixels).pooler_output)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings [B,D], of length one; a text longer than the context is cut."""
        inputs = self.processor(
            text=list(texts), padding=True, truncation=True, max_length=self.context, return_tensors="pt"
        ).to(self.model.device)
        features = self.model.get_text_features(inputs["input_ids"], attention_mask=inputs["attention_mask"])
        return _unit(features.pooler_output)

    def to(self, device: torch.device) -> TransformersClip:
        """Move the model; returns the encoder."""
        self.model.to(device)
        return self


class OpenClip:
    """A model of open_clip: an architecture by name with a tag or a checkpoint file, or `hf-hub:owner/name`, or
    `local-dir:folder`. ``pixels`` stands in for the model's own preprocessing where a reward publishes another."""

    def __init__(
        self, model: str, pretrained: str | None = None, *, dtype: str = "float32", pixels: Pixels | None = None
    ) -> None:
        import open_clip

        if ":" in model and pretrained is not None:
            raise ValueError(f"{model} names its weights: leave out pretrained={pretrained!r}")
        precision = _OPEN_CLIP_PRECISION[dtype]
        self._dtype = DTYPES[dtype]
        path = Path(pretrained or "").expanduser()
        tensors = _read(path) if path.is_file() else None  # first, for a damaged file is told before a model is made
        with _explained(f"open_clip's model {model} with the weights {pretrained}"):
            if tensors is not None:
                with _no_warning_of_random_weights():
                    self.model, _, self._transform = open_clip.create_model_and_transforms(model, precision=precision)
            else:
                self.model, self._transform = open_clip.create_model_from_pretrained(
                    model, pretrained, precision=precision, weights_only=True
                )
            self.tokenizer = open_clip.get_tokenizer(model)
        if tensors is not None:
            fill(self.model, tensors, path)
        size: int | Sequence[int] = self.model.visual.image_size
        self._size = size if isinstance(size, int) else size[0]
        self._pixels = pixels
        self.logit_scale = self.model.logit_scale.float().exp().item()
        self.model.eval()

    @property
    def _device(self) -> torch.device:
        return self.model.logit_scale.device

    def images(self, images: Tensor) -> Tensor:
        """Embeddings [B,D], of length one, of images [B,3,H,W] in [0,1]."""
        if self._pixels is None:
            pixels = torch.stack([self._transform(picture) for picture in pictures(images)])
        else:
            pixels = self._pixels(images.to(self._device), self._size)
        return _unit(self.model.encode_image(pixels.to(self._device, self._dtype)))

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings [B,D], of length one; a text longer than the context is cut."""
        return _unit(self.model.encode_text(self.tokenizer(list(texts)).to(self._device)))

    def to(self, device: torch.device) -> OpenClip:
        """Move the model; returns the encoder."""
        self.model.to(device)
        return self


class ClipReward:
    """A reward on CLIP embeddings, by default the cosine of picture and prompt; others override `values`.

    The encoder is loaded at the first call. Images are scored ``batch_size`` at a time.
    """

    name: str
    needs: tuple[str, ...] = ("images", "prompts")

    def __init__(self, load: Callable[[], Encoder], batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"reward '{self.name}': batch_size is {batch_size}, expected 1 or more")
        self.batch_size = batch_size
        self._load, self._device = load, torch.device("cpu")
        self._encoder: Encoder | None = None

    @property
    def encoder(self) -> Encoder:
        """The encoder, loaded when first asked for."""
        if self._encoder is None:
            self._encoder = self._load().to(self._device)
        return self._encoder

    def to(self, device: torch.device | str) -> ClipReward:
        """Move the encoder."""
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
        """Values [B] of one batch: images [B,3,H,W] in [0,1] and their prompts."""
        return cosines(self.encoder, images, prompts)


def cosines(encoder: Encoder, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """cos(picture, prompt) [B] in [−1,1]. A prompt that occurs several times, as in a group, is encoded once."""
    rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    texts = encoder.texts(list(rows))[[rows[prompt] for prompt in prompts]]
    return (encoder.images(images) * texts).sum(1)


def check_dtype(dtype: str, name: str) -> str:
    """Return ``dtype`` if it is one that encoders run in, else raise."""
    if dtype not in DTYPES:
        raise ValueError(f"reward '{name}': dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    return dtype


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=-1)


def _read(path: Path) -> dict[str, Tensor]:
    # Training in several processes leaves each name with the prefix of its wrapper.
    return {name.removeprefix("module."): value for name, value in read_tensors(path).items()}


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """The libraries' many errors of loading, as one that names what was being loaded."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"cannot load {what}: {error}") from error


@contextmanager
def _no_warning_of_random_weights() -> Iterator[None]:
    """open_clip warns that a model made without weights is random; here they come from a file right afterwards."""
    root = logging.getLogger()

    def other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("No pretrained weights loaded")

    root.addFilter(other)
    try:
        yield
    finally:
        root.removeFilter(other)
