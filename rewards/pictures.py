"""Images as 8-bit pictures, the input of published preprocessing."""

from __future__ import annotations

from PIL import Image
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of each channel, over the pictures that trained OpenAI's CLIP
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def to_pictures(images: Tensor) -> list[Image.Image]:
    """Return RGB pictures of images [B,3,H,W] in [0,1], rounded to 8 bits as in a saved file."""
    pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in pixels]
