"""PickScore v1: which of two pictures of a prompt people pick (Pick-a-Pic, 2305.01569).

    score = s · cos(picture, prompt),   s the model's logit scale

The model is a CLIP ViT-H/14 fine-tuned on people's choices: σ(score − other score) is the probability that the picture
is picked over the other. Real pictures score around 20. Flow-GRPO divides by 26 (`divisor`) to get near [0,1].
As published, the processor is that of the model it was fine-tuned from, and prompts are cut at 77 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from rewards.clip import DTYPES, ClipReward, TransformersClip
from rewards.options import check_choice
from rewards.sources import check_sources

MODEL = "yuvalkirstain/PickScore_v1"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class PickScore(ClipReward):
    """PickScore v1: how likely people are to pick the picture for its prompt.

    Logit scale × cosine, divided by `divisor`. model, processor: hub ids or folders.
    """

    name = "pickscore"

    def __init__(
        self,
        model: str = MODEL,
        processor: str = PROCESSOR,
        *,
        divisor: float = 1.0,
        dtype: str = "float32",
        batch_size: int = 16,
    ) -> None:
        if divisor <= 0:
            raise ValueError(f"reward 'pickscore': divisor is {divisor}, expected a positive number")
        check_sources(self.name, model=model, processor=processor)
        load = partial(TransformersClip, model, processor, dtype=check_choice(self.name, "dtype", dtype, DTYPES))
        super().__init__(load, batch_size)
        self.divisor = divisor

    def values(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return values [B] of one batch."""
        return super().values(images, prompts) * self.encoder.logit_scale / self.divisor
