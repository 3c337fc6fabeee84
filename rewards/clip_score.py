"""CLIP score: similarity of the picture and its prompt, by any CLIP model (2103.00020).

The option ``value`` is one of

    cosine       cos                     in [−1,1]; a good match is about 0.3
    logit        logit scale · cos       the logit of the model's own softmax, about 100 times as large
    clipscore    2.5 · max(cos, 0)       CLIPScore (2104.08718)

The cosine is the default: it needs no constant, and it still distinguishes bad pictures below zero. Values of
different models cannot be compared. CLIPScore was published with ViT-B/32 and with "A photo depicts " before the
caption; write that into the prompts to reproduce it. Flow-GRPO's clip score is `logit` divided by 30, with ViT-L/14
and pictures resized by torchvision instead of PIL.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rewards.clip import ClipReward, choose_backend
from rewards.options import check_choice

VALUES = ("cosine", "logit", "clipscore")


class ClipScore(ClipReward):
    """Similarity of the picture and its prompt by CLIP (transformers or open_clip).

    value: cosine, or a multiple of it: logit (times the model's logit scale), clipscore (2.5 · max(cosine, 0)).
    """

    name = "clip_score"

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        *,
        backend: str = "transformers",
        pretrained: str | None = None,
        value: str = "cosine",
        dtype: str = "float32",
        batch_size: int = 16,
    ) -> None:
        self.value = check_choice(self.name, "value", value, VALUES)
        super().__init__(choose_backend(self.name, model, backend, pretrained, dtype), batch_size)

    def values(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return values [B] of one batch."""
        cosines = super().values(images, prompts)
        if self.value == "logit":
            return cosines * self.encoder.logit_scale
        return 2.5 * cosines.clamp(min=0) if self.value == "clipscore" else cosines
