"""Detectors for photographs: any instance segmentation, object detection or zero-shot model of transformers.

Which of them a checkpoint is, its own config says. GenEval was published with Mask2Former (Swin-S, COCO) of
MMDetection; `facebook/mask2former-swin-small-coco-instance` is the same architecture and training set with
its authors' own weights, so scores are near the published ones and not equal to them.

* Instance segmentation (Mask2Former, MaskFormer): masks, with the boxes that enclose them. The score of a
  mask is the probability of its class times the mean probability of its pixels (2112.01527, as published).
* Object detection with a fixed set of classes (DETR, RT-DETR, YOLOS, …): boxes.
* Zero-shot (OWLv2, OWL-ViT, Grounding DINO, MM-Grounding-DINO): boxes of the classes that an image's metadata
  name, asked for by their names.

GenEval's thresholds were chosen for Mask2Former. Scores of other detectors are lower or on another scale
(OWLv2's users start at 0.1): 0.9 for counting finds next to nothing there, so set ``counting_threshold``.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from rewards.classes import ANY, UnknownClass, check_known, key
from rewards.detectors import Detection, Mask, Wanted
from rewards.pictures import to_pictures

_MASKS = ("mask2former", "maskformer")
_QUERIES = {"owlv2": "a photo of a {}", "owlvit": "a photo of a {}"}
_PHRASES = ("grounding-dino", "mm-grounding-dino")

Found = list[list[Detection]]
Names = Sequence[str]


class TransformersDetector:
    """Objects in photographs by a transformers model, from a hub id or a local folder.

    The model loads at the first call. Colours are not judged here.
    """

    def __init__(self, path: str, *, threshold: float = 0.3, batch_size: int = 8) -> None:
        self.path, self.threshold, self.batch_size = path, threshold, batch_size
        self._device = torch.device("cpu")
        self._lock = threading.Lock()
        self._find: _Finder | None = None

    def to(self, device: torch.device | str) -> TransformersDetector:
        """Move the model, now or when it is loaded."""
        self._device = torch.device(device)
        if self._find is not None:
            self._find.model.to(self._device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor, wanted: Wanted | None = None) -> Found:
        """Detect objects in images [B,3,H,W] in [0,1]; a zero-shot model finds nothing else than ``wanted``."""
        with self._lock:  # two threads may not load at once
            if self._find is None:
                self._find = _load(self.path, self._device)
        names = [list(dict.fromkeys(one)) for one in wanted] if wanted is not None else None
        self._find.check(names, self.path)
        asked = names if names is not None else [[] for _ in images]
        rows = [row for row in range(len(images)) if asked[row] or not self._find.needs_names]
        found: Found = [[] for _ in images]
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            results = self._find(to_pictures(images[batch]), [asked[row] for row in batch], self.threshold)
            for row, items in zip(batch, results, strict=True):
                found[row] = items
        return found


class _Finder:
    """A model with what prepares its inputs and reads its outputs."""

    needs_names = False

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor

    def __call__(self, images: Sequence[Image.Image], names: Sequence[Names], threshold: float) -> Found:
        """The objects in images of one size with a score of at least ``threshold``."""
        raise NotImplementedError

    def check(self, names: Sequence[Names] | None, path: str) -> None:
        """Raise if the metadata name a class that this model cannot know."""
        check_known(names or (), self.labels.values(), path)

    @property
    def labels(self) -> dict[int, str]:
        return {int(index): str(label) for index, label in self.model.config.id2label.items()}

    def run(self, inputs: Mapping[str, Any]) -> Any:
        return self.model(**{name: value.to(self.model.device) for name, value in inputs.items()})


class _Masks(_Finder):
    """Instance segmentation."""

    def __call__(self, images: Sequence[Image.Image], names: Sequence[Names], threshold: float) -> Found:
        inputs = self.processor(images=images, return_tensors="pt")
        outputs = self.run({name: inputs[name] for name in ("pixel_values", "pixel_mask")})
        # Images of one size are stretched to whole strides and not padded: the masks are of the whole picture.
        size = (images[0].height, images[0].width)
        each = zip(outputs.class_queries_logits, outputs.masks_queries_logits, names, strict=True)
        return [self._read(logits, masks, size, asked, threshold) for logits, masks, asked in each]

    def _read(
        self, logits: Tensor, masks: Tensor, size: tuple[int, int], asked: Names, threshold: float
    ) -> list[Detection]:
        """Objects of one image from its class logits [Q,C+1] and mask logits [Q,h,w]."""
        likely = logits.softmax(-1)[:, :-1]
        # A mask's own factor is below 1, so that no other pair of query and class can reach the threshold.
        queries, classes = (likely >= threshold).nonzero(as_tuple=True)
        if len(queries) == 0:
            return []
        grown = F.interpolate(masks[queries][None], size, mode="bilinear", align_corners=False)[0]
        inside = grown > 0
        sure = (grown.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
        scores = likely[queries, classes] * sure
        kept = ((scores >= threshold) & inside.flatten(1).any(1)).nonzero().flatten().tolist()
        label = _spelling(self.labels, asked)
        return [
            Detection(label[int(classes[n])], None, enclosing(mask := inside[n].cpu().numpy()), float(scores[n]), mask)
            for n in kept
        ]


class _Boxes(_Finder):
    """Object detection with the classes of the checkpoint."""

    def __call__(self, images: Sequence[Image.Image], names: Sequence[Names], threshold: float) -> Found:
        outputs = self.run(self.processor(images=images, return_tensors="pt"))
        sizes = [(image.height, image.width) for image in images]
        results = self.processor.post_process_object_detection(outputs, threshold=threshold, target_sizes=sizes)
        found = []
        for result, asked, size in zip(results, names, sizes, strict=True):
            label = _spelling(self.labels, asked)
            found.append(_boxed(result, [label[int(index)] for index in result["labels"]], size))
        return found


class _ZeroShot(_Finder):
    """Object detection of what the names ask for."""

    needs_names = True

    def check(self, names: Sequence[Names] | None, path: str) -> None:
        if names is None:
            raise ValueError(f"{path} is a zero-shot detector: it must be told the classes to look for (wanted)")
        image = next((image for image, asked in enumerate(names) if ANY in asked), None)
        if image is not None:
            raise UnknownClass(
                image,
                f"{path} is a zero-shot detector and finds only what it is asked for, so it cannot judge an exclude clause "
                f"of class {ANY!r} nor exact=true; choose one with a fixed set of classes, such as "
                "facebook/mask2former-swin-small-coco-instance",
            )


class _Queries(_ZeroShot):
    """OWL-ViT and OWLv2: one text query a class."""

    def __call__(self, images: Sequence[Image.Image], names: Sequence[Names], threshold: float) -> Found:
        template = _QUERIES[self.model.config.model_type]
        texts = [[template.format(name) for name in asked] for asked in names]
        outputs = self.run(self.processor(images=images, text=texts, return_tensors="pt"))
        for logits, asked in zip(outputs.logits, names, strict=True):
            logits[:, len(asked) :] = -torch.inf  # the processor fills up with blank queries, which are no class
        sizes = [(image.height, image.width) for image in images]
        results = self.processor.post_process_grounded_object_detection(
            outputs, threshold=threshold, target_sizes=sizes
        )
        return [
            _boxed(result, [asked[int(index)] for index in result["labels"]], size)
            for result, asked, size in zip(results, names, sizes, strict=True)
        ]


class _Phrases(_ZeroShot):
    """Grounding DINO: the classes are phrases of one text, each closed by a full stop."""

    def __call__(self, images: Sequence[Image.Image], names: Sequence[Names], threshold: float) -> Found:
        texts = [" ".join(f"{name.lower()}." for name in asked) for asked in names]
        inputs = self.processor(images=images, text=texts, return_tensors="pt", padding=True)
        outputs = self.run(inputs)
        sizes = [(image.height, image.width) for image in images]
        results = self.processor.post_process_grounded_object_detection(
            outputs, inputs["input_ids"], threshold=threshold, text_threshold=threshold, target_sizes=sizes
        )
        stop = self.processor.tokenizer.convert_tokens_to_ids(".")
        found = []
        for result, logits, ids, asked, size in zip(
            results, outputs.logits, inputs["input_ids"], names, sizes, strict=True
        ):
            # The library's own labels are the words above a threshold, which may be of no class or of two.
            kept = logits[logits.sigmoid().amax(-1) > threshold]
            indices = phrase_scores(kept, ids.to(kept.device), stop, len(asked)).argmax(-1)
            found.append(_boxed(result, [asked[index] for index in indices.tolist()], size))
        return found


def phrase_scores(logits: Tensor, ids: Tensor, stop: int, count: int) -> Tensor:
    """The best logit among each phrase's tokens, [Q,count], from token logits [Q,T] of a text with ``ids`` [L].

    The text is ``count`` phrases after one start token, each closed by the token ``stop``.
    """
    stops = (ids == stop).nonzero().flatten().tolist()
    if len(stops) != count:
        raise ValueError(f"a text of {count} classes has {len(stops)} full stops; a class name may hold none")
    starts = [1, *(place + 1 for place in stops[:-1])]
    return torch.stack([logits[:, a:b].amax(-1) for a, b in zip(starts, stops, strict=True)], dim=-1)


def enclosing(mask: Mask) -> tuple[float, float, float, float]:
    """The box x0, y0, x1, y1 around the true pixels of a mask [H,W]; x1 and y1 are past the last one."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _spelling(labels: Mapping[int, str], asked: Names) -> dict[int, str]:
    """The detector's classes by index, named as the metadata name them where they do."""
    names: Mapping[str, str] = {key(name): name for name in asked}
    return {index: names.get(key(label), label) for index, label in labels.items()}


def _boxed(result: Mapping[str, Tensor], labels: Sequence[str], size: tuple[int, int]) -> list[Detection]:
    """Detections from the library's boxes and scores; boxes end at the image's border, as published."""
    limits = torch.tensor([size[1], size[0], size[1], size[0]], dtype=torch.float32)
    boxes = result["boxes"].float().cpu().clamp(min=torch.zeros(4), max=limits)
    scores = result["scores"].tolist()
    return [
        Detection(label, None, (x0, y0, x1, y1), score)
        for label, (x0, y0, x1, y1), score in zip(labels, boxes.tolist(), scores, strict=True)
    ]


def _load(path: str, device: torch.device) -> _Finder:
    """The finder for a checkpoint, by the model type of its config."""
    from transformers import (
        MODEL_FOR_OBJECT_DETECTION_MAPPING,
        MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING,
        MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING,
        AutoConfig,
        AutoImageProcessor,
        AutoProcessor,
    )

    config = AutoConfig.from_pretrained(path)
    finder: type[_Finder]
    if config.model_type in _MASKS:
        finder, models, preparation = _Masks, MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING, AutoImageProcessor
    elif config.model_type in _QUERIES:
        finder, models, preparation = _Queries, MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING, AutoProcessor
    elif config.model_type in _PHRASES:
        finder, models, preparation = _Phrases, MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING, AutoProcessor
    else:
        finder, models, preparation = _Boxes, MODEL_FOR_OBJECT_DETECTION_MAPPING, AutoImageProcessor
    model = models.get(type(config), None)
    # Weights of another kind of model would load as well: transformers makes up the layers that are missing.
    found = config.architectures or []
    if model is None or (found and model.__name__ not in found):
        raise ValueError(
            f"{path} is {' or '.join(found) or config.model_type}, expected a model for instance segmentation (Mask2Former, "
            "MaskFormer), object detection (DETR, RT-DETR, YOLOS, …) or zero-shot object detection (OWLv2, OWL-ViT, "
            "Grounding DINO)"
        )
    return finder(model.from_pretrained(path).to(device).eval(), preparation.from_pretrained(path))
