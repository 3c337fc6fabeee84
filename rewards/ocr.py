"""Flow-GRPO's text-rendering reward (2505.05470): does the picture show the text that the prompt quotes?

    score = 1 − min(d, n)/n,   d = edit distance between the text read and the quoted text of length n

Both are in lower case and without spaces, with composed letters and straight quotes. d = 0 where the quoted text was
read somewhere among other text, so that a sign's surroundings cost nothing. The quoted text is the one between the
prompt's first two straight quotation marks or, without these, between the first curly ones. The reader is RapidOCR,
whose models (PP-OCRv4) are part of its package. It drops lines with a confidence below 0.5, as does PaddleOCR, the
published reader.

The published code (flow_grpo/ocr.py) differs in the following. It compares characters as they are coded. It does not
recognise curly marks. It takes the rest of the prompt where a mark is not closed, and fails at a prompt without marks;
here both are invalid rows. It scores 0 where the reader fails, which is an error here. It swaps red and blue in the
reader's input; here the channels are right.

The reader's limits, measured on words of a plain font. It reads text from 8 pixels in height to the whole picture;
turned clockwise up to 90°, counter-clockwise up to 60° (short words are lost before 75°, every word at 90°); several
lines, as one text from the top; and letters that overlap by a tenth of their height. It does not read text that is
upside down, reads doubled letters that overlap as one, and does not read accents.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rewards.base import Metadata, Scores, WithoutDevice, check_images
from rewards.pictures import to_pictures
from rewards.random_state import preserved_random_state
from rewards.typography import unify_typography

MOST_ASPECT = 16  # of a picture's sides
_QUOTED = (re.compile(r'"([^"]*)"'), re.compile(r"“([^”]*)”"))


class Ocr(WithoutDevice):
    """Share of the prompt's quoted text that can be read in the picture (RapidOCR).

    1 if all of it can be read, falling to 0 with the share of wrong characters. threads: number of threads of onnxruntime;
    −1 is its own default.
    """

    name = "ocr"
    needs: tuple[str, ...] = ("images", "prompts")

    def __init__(self, *, threads: int = -1) -> None:
        self.threads = threads
        self._reader: Any = None
        self._lock = threading.Lock()  # RapidOCR stores the picture's size in itself while it reads

    def __call__(self, samples: Tensor, prompts: Sequence[str], metadata: Metadata) -> Scores:
        """Score images [B,3,H,W] in [0,1]. Rows without a quoted text are invalid, and their pictures are not read."""
        pictures = to_pictures(check_images(samples, self.name))
        texts = [normalise(quoted_text(prompt)) for prompt in prompts]
        values = [
            similarity(self.read(np.asarray(picture)), text) if text else None
            for picture, text in zip(pictures, texts, strict=True)
        ]
        return Scores.from_list(values).to(samples.device)

    def preload(self) -> None:
        """Load the model now."""
        with self._lock:
            self._load()

    def _load(self) -> None:
        if self._reader is None:
            self._reader = _load_reader(self.threads)

    def read(self, image: NDArray[np.uint8]) -> str:
        """Return the text of an RGB image [H,W,3], line after line."""
        with self._lock:
            self._load()
            # RapidOCR expects OpenCV's channel order. Its classifier of upside-down lines is off, as published.
            lines, _ = self._reader(np.ascontiguousarray(limit_aspect(image)[:, :, ::-1]), use_cls=False)
        return "".join(str(text) for _, text, _ in lines or ())


def limit_aspect(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return an image [H,W,3], of which a side shorter than the other by more than MOST_ASPECT is padded by its edges.

    RapidOCR enlarges the shorter side, and would need gigabytes for a line of pixels.
    """
    least = -(-max(image.shape[:2]) // MOST_ASPECT)
    missing = [max(0, least - side) for side in image.shape[:2]]
    return np.pad(image, [*((more // 2, more - more // 2) for more in missing), (0, 0)], mode="edge")


def quoted_text(prompt: str) -> str:
    """Return the first quoted text of a prompt, or an empty string."""
    matches = (match.group(1) for marks in _QUOTED if (match := marks.search(prompt)) is not None)
    return next(matches, "")


def normalise(text: str) -> str:
    """Return a text in lower case and without white space, with composed letters and straight quotes."""
    return "".join(unify_typography(text).lower().split())


def similarity(read: str, text: str) -> float:
    """Return 1 − min(d, n)/n for the text that was read and the normalised, non-empty ``text`` of length n."""
    read = normalise(read)
    distance = 0 if text in read else edit_distance(read, text)
    return 1.0 - min(distance, len(text)) / len(text)


def edit_distance(one: str, other: str) -> int:
    """Return the Levenshtein distance: the least number of inserted, deleted or replaced characters."""
    previous = list(range(len(other) + 1))
    for row, left in enumerate(one, 1):
        current = [row]
        for column, right in enumerate(other, 1):
            current.append(min(previous[column] + 1, current[-1] + 1, previous[column - 1] + (left != right)))
        previous = current
    return previous[-1]


@preserved_random_state()
def _load_reader(threads: int) -> Any:
    try:
        from rapidocr_onnxruntime import RapidOCR
    except ImportError as error:
        raise ImportError(
            "the reward 'ocr' reads with RapidOCR, which cannot be imported here; "
            f"pip install rapidocr-onnxruntime (it needs Python below 3.13). The error was: {error}"
        ) from error
    return RapidOCR(intra_op_num_threads=threads)
