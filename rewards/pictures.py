"""Images as published preprocessing takes them: 8-bit pictures."""

from __future__ import annotations

from PIL import Image
from torch import Tensor


def pictures(images: Tensor) -> list[Image.Image]:
    """RGB pictures of images [B,3,H,W] in [0,1], rounded to 8 bits as they would be saved."""
    pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in pixels]
