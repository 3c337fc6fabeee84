"""HPSv2.1: which of several pictures of a prompt people prefer (Human Preference Score v2, 2306.09341).

    score = cos(picture, prompt)

The model is an open_clip ViT-H/14 fine-tuned on people's rankings. The published tables show 100 times the score: 23 to
28 on average over the pictures of a generator (v2.0). The weights exist only as a pickle, of which only the tensors are
read.

The published preprocessing is not open_clip's. The whole picture is kept: its longer side is resized to 224 with a
bicubic filter that may overshoot [0,1], and the rest is filled with black. The resized input is a float tensor.
torchvision antialiases these since version 0.17; ``antialias=False`` is the older behaviour, from the time of the v2.0
weights and of the paper's tables.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from rewards.clip import DTYPES, ClipReward, OpenClip
from rewards.options import check_choice
from rewards.pictures import CLIP_MEAN, CLIP_STD
from rewards.sources import check_sources
from rewards.weights import find_file

WEIGHTS = "xswu/HPSv2"
FILE = "HPS_v2.1_compressed.pt"


class HPSv2(ClipReward):
    """HPSv2.1: how much people prefer the picture to others of its prompt.

    The value is the cosine of picture and prompt. weights: a checkpoint, a folder that contains `filename`, or a hub id.
    """

    name = "hpsv2"

    def __init__(
        self,
        weights: str = WEIGHTS,
        filename: str = FILE,
        *,
        architecture: str = "ViT-H-14",
        antialias: bool = True,
        dtype: str = "float32",
        batch_size: int = 16,
    ) -> None:
        check_sources(self.name, weights=weights)
        self.weights, self.filename, self.architecture = weights, filename, architecture
        self.antialias, self.dtype = antialias, check_choice(self.name, "dtype", dtype, DTYPES)
        super().__init__(self._load_model, batch_size)

    def _load_model(self) -> OpenClip:
        checkpoint = str(find_file(self.weights, self.filename))
        pixels = partial(letterbox, antialias=self.antialias)
        return OpenClip(self.architecture, checkpoint, dtype=self.dtype, pixels=pixels)


def letterbox(images: Tensor, size: int, antialias: bool = True) -> Tensor:
    """Return images [B,3,H,W] in [0,1] as HPSv2's input [B,3,size,size].

    They are rounded to 8 bits, resized as a whole, centred on black and normalised. A side is at least one pixel.
    """
    images = images.mul(255).round_().div_(255)
    scale = size / max(images.shape[-2:])
    height, width = (max(1, round(side * scale)) for side in images.shape[-2:])
    if (height, width) != images.shape[-2:]:
        images = F.interpolate(images, (height, width), mode="bicubic", align_corners=False, antialias=antialias)
    above, left = (size - height) // 2, (size - width) // 2
    images = F.pad(images, (left, size - width - left, above, size - height - above))
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (images - mean) / std
