"""What colour is that object? GenEval's answer: a zero-shot classification of its crop by CLIP (2310.11513).

With T(c, k) = the three sentences "a photo of a c k", "a photo of a c-colored k", "a photo of a c object" for
colour c and class k, e the normalised embeddings of CLIP and x the object's crop, all else turned grey:

    colour = argmax_c  e(x) · w_c / ‖w_c‖,   w_c = mean over s ∈ T(c, k) of e(s)

(evaluate_images.py of djghosh13/geneval with CLIP ViT-L/14 of OpenAI, in whatever precision the GPU's autocast
chose; single precision here). A detector without masks gives the plain crop of the box, as published.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from rewards.clip import TransformersClip
from rewards.detectors import Detection
from rewards.pictures import pictures

COLOR_MODEL = "openai/clip-vit-large-patch14"
COLOR_NAMES = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")


class Colors(Protocol):
    """Names the colours of objects (image index, detection) in images [B,3,H,W] in [0,1]."""

    names: tuple[str, ...]  # all that it can answer

    def __call__(self, images: Tensor, objects: Sequence[tuple[int, Detection]]) -> list[str]: ...

    def to(self, device: torch.device | str) -> Colors: ...


class ClipColors:
    """The published classification, by a CLIP model of transformers from a hub id or a local folder.

    ``background`` fills what the mask leaves out ("#999" as published, None keeps the picture); ``crop=False``
    shows CLIP the whole picture. The model loads when first a colour is asked for.
    """

    names: tuple[str, ...] = COLOR_NAMES

    def __init__(
        self,
        path: str = COLOR_MODEL,
        *,
        crop: bool = True,
        background: str | None = "#999",
        batch_size: int = 16,
    ) -> None:
        self.path, self.crop, self.background, self.batch_size = path, crop, background, batch_size
        self._device = torch.device("cpu")
        self._lock = threading.Lock()
        self._encoder: TransformersClip | None = None
        self._classifiers: dict[str, Tensor] = {}  # by class, [10,D] on the CPU

    def to(self, device: torch.device | str) -> ClipColors:
        """Move the model, now or when it is loaded."""
        self._device = torch.device(device)
        if self._encoder is not None:
            self._encoder.to(self._device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor, objects: Sequence[tuple[int, Detection]]) -> list[str]:
        """The colour of each object."""
        if not objects:
            return []
        encoder = self._loaded()
        rows = sorted({row for row, _ in objects})
        shown = dict(zip(rows, pictures(images[rows]), strict=True))
        crops = [self.cut(shown[row], item) for row, item in objects]
        batches = [crops[start : start + self.batch_size] for start in range(0, len(crops), self.batch_size)]
        seen = torch.cat([encoder.pictures(batch).cpu() for batch in batches])
        classifiers = [self._classifier(encoder, item.label) for _, item in objects]
        return [self.names[int((w @ e).argmax())] for w, e in zip(classifiers, seen, strict=True)]

    def cut(self, picture: Image.Image, item: Detection) -> Image.Image:
        """The object as CLIP sees it: what is not of it is background, and cropped to its box."""
        if item.mask is not None and self.background is not None:
            blank = Image.new("RGB", picture.size, self.background)
            picture = Image.composite(picture, blank, Image.fromarray(item.mask.astype(np.uint8) * 255))
        if not self.crop:
            return picture
        # A sliver at the border rounds to nothing; it keeps one pixel.
        left, top = min(round(item.box[0]), picture.width - 1), min(round(item.box[1]), picture.height - 1)
        return picture.crop((left, top, max(round(item.box[2]), left + 1), max(round(item.box[3]), top + 1)))

    def _classifier(self, encoder: TransformersClip, label: str) -> Tensor:
        if label not in self._classifiers:
            texts = [template.format(color=color, label=label) for color in self.names for template in TEMPLATES]
            each = encoder.texts(texts).cpu().unflatten(0, (len(self.names), len(TEMPLATES)))
            self._classifiers[label] = F.normalize(each.mean(1), dim=-1)
        return self._classifiers[label]

    def _loaded(self) -> TransformersClip:
        with self._lock:  # two threads may not load at once
            if self._encoder is None:
                self._encoder = TransformersClip(self.path).to(self._device)
            return self._encoder
