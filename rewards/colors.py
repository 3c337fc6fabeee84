"""GenEval's colours of objects: a zero-shot classification of the object's crop by CLIP (2310.11513).

Let T(c, k) be the three sentences "a photo of a c k", "a photo of a c-colored k" and "a photo of a c object" for
colour c and class k, e CLIP's normalised embeddings, and x the object's crop with everything else turned grey:

    colour = argmax_c  e(x) · w_c / ‖w_c‖,   w_c = mean over s ∈ T(c, k) of e(s)

This is evaluate_images.py of djghosh13/geneval with OpenAI's CLIP ViT-L/14, which used the precision of the GPU's
autocast; here it is single precision. Without masks from the detector, x is the plain crop of the box, as published.
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
from rewards.pictures import to_pictures

COLOR_MODEL = "openai/clip-vit-large-patch14"
COLOR_NAMES = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")


class Colors(Protocol):
    """A classifier of the colours of objects (image index, detection) in images [B,3,H,W] in [0,1]."""

    names: tuple[str, ...]  # all colours that it can return

    def __call__(self, images: Tensor, objects: Sequence[tuple[int, Detection]]) -> list[str]: ...

    def to(self, device: torch.device | str) -> Colors: ...


class ClipColors:
    """The published classification, by a CLIP model of transformers from a hub id or a local folder.

    ``background`` is the colour of pixels outside the mask ("#999" as published; None keeps the picture).
    ``crop=False`` gives CLIP the whole picture. The model is loaded at the first call with an object.
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
        """Move the model, now or once it is loaded."""
        self._device = torch.device(device)
        if self._encoder is not None:
            self._encoder.to(self._device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor, objects: Sequence[tuple[int, Detection]]) -> list[str]:
        """Return the colour of each object."""
        if not objects:
            return []
        encoder = self._load()
        rows = sorted({row for row, _ in objects})
        pictures = dict(zip(rows, to_pictures(images[rows]), strict=True))
        crops = [self.cut_out(pictures[row], item) for row, item in objects]
        batches = [crops[start : start + self.batch_size] for start in range(0, len(crops), self.batch_size)]
        embeddings = torch.cat([encoder.pictures(batch).cpu() for batch in batches])
        classifiers = [self._classifier(encoder, item.label) for _, item in objects]
        return [self.names[int((w @ e).argmax())] for w, e in zip(classifiers, embeddings, strict=True)]

    def cut_out(self, picture: Image.Image, item: Detection) -> Image.Image:
        """Return CLIP's view of the object: background outside its mask, cropped to its box."""
        if item.mask is not None and self.background is not None:
            blank = Image.new("RGB", picture.size, self.background)
            picture = Image.composite(picture, blank, Image.fromarray(item.mask.astype(np.uint8) * 255))
        if not self.crop:
            return picture
        # A thin object at the border would round to an empty crop; it keeps one pixel.
        left, top = min(round(item.box[0]), picture.width - 1), min(round(item.box[1]), picture.height - 1)
        return picture.crop((left, top, max(round(item.box[2]), left + 1), max(round(item.box[3]), top + 1)))

    def _classifier(self, encoder: TransformersClip, label: str) -> Tensor:
        """Return the vectors w_c / ‖w_c‖ of a class, [10,D]."""
        if label not in self._classifiers:
            texts = [template.format(color=color, label=label) for color in self.names for template in TEMPLATES]
            each = encoder.texts(texts).cpu().unflatten(0, (len(self.names), len(TEMPLATES)))
            self._classifiers[label] = F.normalize(each.mean(1), dim=-1)
        return self._classifiers[label]

    def preload(self) -> None:
        """Load the model now."""
        self._load()

    def _load(self) -> TransformersClip:
        with self._lock:  # two threads must not load at once
            if self._encoder is None:
                self._encoder = TransformersClip(self.path).to(self._device)
            return self._encoder
