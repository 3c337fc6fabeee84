"""Does the picture show the text that the prompt quotes? Flow-GRPO's text-rendering reward (2505.05470).

    score = 1 − min(d, n)/n,   d = edit distance between what was read and the quoted text of length n

both in lower case and without spaces; d = 0 where the text was read somewhere among other text, so that a
sign's surroundings cost nothing. The text is what stands between the prompt's first two straight quotation
marks, or where there are none the first curly ones. The reader here is RapidOCR, whose models (PP-OCRv4) ship
in its package; lines below its confidence of 0.5 are dropped, as PaddleOCR, the published reader, does too.

What differs from the published code (flow_grpo/ocr.py): it knows no curly marks, takes the rest of the prompt
where a mark is not closed and stops at a prompt without any: here both are invalid rows. An error of the
reader is an error here and a 0 there. Its reader is given red for blue; here the channels are right.

What the reader reads, measured on words of a plain font: from 8 pixels in height to the whole picture; turned
clockwise up to 90°, counter-clockwise up to 60° (short words are lost before 75°, every word at 90°); several
lines, as one text from the top; letters that overlap by a tenth of their height. It does not read text that
is upside down, takes doubled letters that overlap for one, and knows no accents.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rewards.base import Metadata, Scores, check_images
from rewards.pictures import pictures

_QUOTED = (re.compile(r'"([^"]*)"'), re.compile(r"“([^”]*)”"))


class Ocr:
    """Share of the prompt's quoted text that can be read in the picture (RapidOCR).

    1 where all of it can be read, falling to 0 with the share of characters that are wrong. threads: of onnxruntime; −1
    leaves the choice to it.
    """

    name = "ocr"
    needs: tuple[str, ...] = ("images", "prompts")

    def __init__(self, *, threads: int = -1) -> None:
        self.threads = threads
        self._reader: Any = None
        self._lock = threading.Lock()  # RapidOCR keeps the picture's size on itself while it reads

    def to(self, device: torch.device | str) -> Ocr:
        """Nothing to move: reading runs on the CPU."""
        return self

    def __call__(self, samples: Tensor, prompts: Sequence[str], metadata: Metadata) -> Scores:
        """Score images [B,3,H,W] in [0,1]; only rows with a quoted text are read."""
        shown = pictures(check_images(samples, self.name))
        wanted = [normalise(quoted(prompt)) for prompt in prompts]
        values = [
            similarity(self.read(np.asarray(picture)), text) if text else 0.0
            for picture, text in zip(shown, wanted, strict=True)
        ]
        valid = torch.tensor([bool(text) for text in wanted], dtype=torch.bool)
        return Scores(torch.tensor(values, dtype=torch.float32).to(samples.device), valid.to(samples.device))

    def read(self, image: NDArray[np.uint8]) -> str:
        """Everything that can be read in an RGB image [H,W,3], line after line."""
        with self._lock:
            if self._reader is None:
                self._reader = _load_reader(self.threads)
            # RapidOCR takes OpenCV's channel order. Its classifier of upside-down lines stays off, as published.
            lines, _ = self._reader(np.ascontiguousarray(image[:, :, ::-1]), use_cls=False)
        return "".join(str(text) for _, text, _ in lines or ())


def quoted(prompt: str) -> str:
    """The first quoted text of a prompt, or an empty string."""
    found = (match for marks in _QUOTED if (match := marks.search(prompt)) is not None)
    match = next(found, None)
    return "" if match is None else match.group(1)


def normalise(text: str) -> str:
    """Lower case without white space."""
    return "".join(text.lower().split())


def similarity(read: str, text: str) -> float:
    """1 − min(d, n)/n between what was read and the normalised, non-empty ``text`` of length n."""
    read = normalise(read)
    distance = 0 if text in read else edit_distance(read, text)
    return 1.0 - min(distance, len(text)) / len(text)


def edit_distance(one: str, other: str) -> int:
    """Levenshtein distance: the least number of inserted, deleted or replaced characters."""
    previous = list(range(len(other) + 1))
    for row, left in enumerate(one, 1):
        current = [row]
        for column, right in enumerate(other, 1):
            current.append(min(previous[column] + 1, current[-1] + 1, previous[column - 1] + (left != right)))
        previous = current
    return previous[-1]


def _load_reader(threads: int) -> Any:
    try:
        from rapidocr_onnxruntime import RapidOCR
    except ImportError as error:
        raise ImportError(
            "the reward 'ocr' reads with RapidOCR, which cannot be imported here; "
            f"pip install rapidocr-onnxruntime (it needs Python below 3.13). The import said: {error}"
        ) from error
    return RapidOCR(intra_op_num_threads=threads)
