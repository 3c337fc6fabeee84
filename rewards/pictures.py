"""Images as 8-bit pictures, the input of published preprocessing."""

from __future__ import annotations

from PIL import Image
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of each channel, over the pictures that trained OpenAI's CLIP
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
LARGEST_SIDE = 65_500  # pixels, of a JPEG that libjpeg writes
MOST_ASPECT = 128  # of a picture's sides, for preprocessing that scales to the shorter or the longer one


def to_pictures(images: Tensor) -> list[Image.Image]:
    """Return RGB pictures of images [B,3,H,W] in [0,1], rounded to 8 bits as in a saved file."""
    return [_to_picture(image) for image in images.detach()]  # one at a time, for the memory of the float copies


def _to_picture(image: Tensor) -> Image.Image:
    pixels = image.float().clamp(0, 1).mul_(255).round_().byte().permute(1, 2, 0)
    return Image.fromarray(pixels.contiguous().cpu().numpy())


def crop_middle(picture: Image.Image) -> Image.Image:
    """Return a picture without the ends of its longer side beyond MOST_ASPECT times the shorter one.

    It is for preprocessing that enlarges the shorter side and crops the middle square: there the ends have no effect, and a
    line of pixels would need gigabytes.
    """
    most = MOST_ASPECT * min(picture.size)
    left, top = (max(0, (side - most) // 2) for side in picture.size)
    return picture.crop((left, top, picture.width - left, picture.height - top)) if left or top else picture
