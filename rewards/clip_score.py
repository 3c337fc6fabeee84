"""Does the picture show the prompt, by a CLIP model (2103.00020) of your choice.

The value is the cosine of the two embeddings unless another is asked for:

    cosine       cos                     in [−1,1]; a good match is about 0.3
    logit        logit scale · cos       what the model itself compares in a softmax, about 100 times as large
    clipscore    2.5 · max(cos, 0)       CLIPScore (2104.08718)

The cosine is the default because it needs no constant and tells bad pictures apart also below zero. Numbers of
different models cannot be compared. CLIPScore as published takes ViT-B/32 and puts "A photo depicts " before the
caption; write that into the prompts to reproduce it. Flow-GRPO's clip score is `logit` divided by 30, with ViT-L/14
resized by torchvision instead of PIL.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from rewards.clip import ClipReward, OpenClip, TransformersClip, check_dtype

BACKENDS = ("transformers", "open_clip")
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
        if backend not in BACKENDS:
            raise ValueError(f"reward 'clip_score': backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
        if value not in VALUES:
            raise ValueError(f"reward 'clip_score': value is {value!r}, expected one of {', '.join(VALUES)}")
        if backend == "transformers" and pretrained is not None:
            raise ValueError(
                f"reward 'clip_score': pretrained={pretrained!r} is for backend=open_clip; "
                "in transformers the model's hub id or folder holds the weights"
            )
        dtype = check_dtype(dtype, self.name)
        load = partial(OpenClip, model, pretrained) if backend == "open_clip" else partial(TransformersClip, model)
        super().__init__(partial(load, dtype=dtype), batch_size)
        self.value = value

    def values(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Values [B] of one batch."""
        cosines = super().values(images, prompts)
        if self.value == "logit":
            return cosines * self.encoder.logit_scale
        return 2.5 * cosines.clamp(min=0) if self.value == "clipscore" else cosines
