"""Images as published preprocessing takes them: 8-bit pictures."""

from __future__ import annotations

from PIL import Image
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the pictures that OpenAI's CLIP was trained on, by channel
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def pictures(images: Tensor) -> list[Image.Image]:
    """RGB pictures of images [B,3,H,W] in [0,1], rounded to 8 bits as they would be saved."""
    pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in pixels]
