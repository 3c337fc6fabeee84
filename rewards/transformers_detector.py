"""Detectors for photographs: any instance segmentation, object detection or zero-shot model of transformers.

The checkpoint's config determines the kind. GenEval was published with MMDetection's Mask2Former (Swin-S, COCO).
`facebook/mask2former-swin-small-coco-instance` has the same architecture and training set, and its authors' own weights,
so its scores are near the published ones but not equal to them.

* Instance segmentation (Mask2Former, MaskFormer): masks, and the boxes that enclose them. The score of a mask is the
  probability of its class times the mean probability of its pixels (2112.01527, as published).
* Object detection with a fixed set of classes (DETR, RT-DETR, YOLOS, …): boxes.
* Zero-shot detection (OWLv2, OWL-ViT, Grounding DINO, MM-Grounding-DINO): boxes of the classes in an image's metadata.
  The names of the classes are part of the model's input.

GenEval's thresholds were chosen for Mask2Former. Scores of other detectors are lower or on another scale (users of
OWLv2 start at 0.1), where the threshold of 0.9 for counting finds almost nothing. Set ``counting_threshold`` there.
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

from rewards.classes import ANY, UnknownClass, check_classes, key
from rewards.detectors import ClassNames, Detection, Mask
from rewards.pictures import MOST_ASPECT, to_pictures
from rewards.random_state import preserved_random_state
from rewards.sources import resolve_source

_SEGMENTATION = ("mask2former", "maskformer")
_OWL_TEMPLATES = {"owlv2": "a photo of a {}", "owlvit": "a photo of a {}"}
_GROUNDING = ("grounding-dino", "mm-grounding-dino")

Found = list[list[Detection]]
Names = Sequence[str]


class TransformersDetector:
    """Detector of objects in photographs: a transformers model from a hub id or a local folder.

    The model is loaded at the first call. Detections have no colours.
    """

    def __init__(self, path: str, *, threshold: float = 0.3, batch_size: int = 8) -> None:
        self.path, self.threshold, self.batch_size = path, threshold, batch_size
        self._device = torch.device("cpu")
        self._lock = threading.Lock()
        self._model: _DetectionModel | None = None

    def to(self, device: torch.device | str) -> TransformersDetector:
        """Move the model, now or once it is loaded."""
        self._device = torch.device(device)
        if self._model is not None:
            self._model.model.to(self._device)
        return self

    def preload(self) -> None:
        """Load the model now."""
        self._loaded()

    def _loaded(self) -> _DetectionModel:
        with self._lock:  # two threads must not load at once
            if self._model is None:
                self._model = _load(self.path, self._device)
            return self._model

    @torch.no_grad()
    def __call__(self, images: Tensor, wanted: ClassNames | None = None) -> Found:
        """Detect objects in images [B,3,H,W] in [0,1]. A zero-shot model finds the classes ``wanted`` alone."""
        model = self._loaded()
        names = [list(dict.fromkeys(classes)) for classes in wanted] if wanted is not None else None
        model.check(names, self.path)
        queries = names if names is not None else [[] for _ in images]
        rows = [row for row in range(len(images)) if queries[row] or not model.needs_names]
        found: Found = [[] for _ in images]
        if max(images.shape[2:]) > MOST_ASPECT * min(images.shape[2:]):
            return found  # a line of pixels shows no object, and processors scale its shorter side to nothing
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            results = model(to_pictures(images[batch]), [queries[row] for row in batch], self.threshold)
            for row, items in zip(batch, results, strict=True):
                found[row] = items
        return found


class _DetectionModel:
    """A model with its processor: it prepares the model's inputs and parses its outputs."""

    needs_names = False

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor

    def __call__(self, images: Sequence[Image.Image], names: Sequence[Names], threshold: float) -> Found:
        """Return the objects with a score of at least ``threshold`` in images of one size."""
        raise NotImplementedError

    def check(self, names: Sequence[Names] | None, path: str) -> None:
        """Raise UnknownClass if the metadata contain a class that this model cannot find."""
        check_classes(names or (), self.labels.values(), path)

    @property
    def labels(self) -> dict[int, str]:
        return {int(index): str(label) for index, label in self.model.config.id2label.items()}

    def run(self, inputs: Mapping[str, Any]) -> Any:
        return self.model(**{name: value.to(self.model.device) for name, value in inputs.items()})


class _InstanceSegmentation(_DetectionModel):
    """Instance segmentation."""

    def __call__(self, images: Sequence[Image.Image], names: Sequence[Names], threshold: float) -> Found:
        inputs = self.processor(images=images, return_tensors="pt")
        outputs = self.run({name: inputs[name] for name in ("pixel_values", "pixel_mask")})
        # Images of one size are stretched to whole strides and not padded, so masks cover the whole picture.
        size = (images[0].height, images[0].width)
        each = zip(outputs.class_queries_logits, outputs.masks_queries_logits, names, strict=True)
        return [self._parse(logits, masks, size, classes, threshold) for logits, masks, classes in each]

    def _parse(
        self, logits: Tensor, masks: Tensor, size: tuple[int, int], classes: Names, threshold: float
    ) -> list[Detection]:
        """Return the objects of one image, given its class logits [Q,C+1] and mask logits [Q,h,w]."""
        likely = logits.softmax(-1)[:, :-1]
        # The factor of a mask is below 1, so no other pair of query and class can reach the threshold.
        queries, ids = (likely >= threshold).nonzero(as_tuple=True)
        if len(queries) == 0:
            return []
        grown = F.interpolate(masks[queries][None], size, mode="bilinear", align_corners=False)[0]
        inside = grown > 0
        sure = (grown.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
        scores = likely[queries, ids] * sure
        kept = ((scores >= threshold) & inside.flatten(1).any(1)).nonzero().flatten().tolist()
        label = _with_metadata_names(self.labels, classes)
        return [
            Detection(label[int(ids[n])], None, bounding_box(mask := inside[n].cpu().numpy()), float(scores[n]), mask)
            for n in kept
        ]


class _ObjectDetection(_DetectionModel):
    """Object detection with the classes of the checkpoint."""

    def __call__(self, images: Sequence[Image.Image], names: Sequence[Names], threshold: float) -> Found:
        outputs = self.run(self.processor(images=images, return_tensors="pt"))
        sizes = [(image.height, image.width) for image in images]
        results = self.processor.post_process_object_detection(outputs, threshold=threshold, target_sizes=sizes)
        found = []
        for result, classes, size in zip(results, names, sizes, strict=True):
            label = _with_metadata_names(self.labels, classes)
            found.append(_to_detections(result, [label[int(index)] for index in result["labels"]], size))
        return found


class _ZeroShot(_DetectionModel):
    """Object detection of classes that are given by name."""

    needs_names = True

    def check(self, names: Sequence[Names] | None, path: str) -> None:
        if names is None:
            raise ValueError(f"{path} is a zero-shot detector: give it the classes to look for (wanted)")
        image = next((image for image, classes in enumerate(names) if ANY in classes), None)
        if image is not None:
            raise UnknownClass(
                image,
                f"{path} is a zero-shot detector and finds only the classes that it is given, so it cannot evaluate an exclude "
                f"clause of class {ANY!r} nor exact=true; choose one with a fixed set of classes, such as "
                "facebook/mask2former-swin-small-coco-instance",
            )


class _OwlVit(_ZeroShot):
    """OWL-ViT and OWLv2: one text query a class."""

    def __call__(self, images: Sequence[Image.Image], names: Sequence[Names], threshold: float) -> Found:
        template = _OWL_TEMPLATES[self.model.config.model_type]
        texts = [[template.format(name) for name in classes] for classes in names]
        outputs = self.run(self.processor(images=images, text=texts, return_tensors="pt"))
        for logits, classes in zip(outputs.logits, names, strict=True):
            logits[:, len(classes) :] = -torch.inf  # the processor adds blank queries, which are not classes
        sizes = [(image.height, image.width) for image in images]
        results = self.processor.post_process_grounded_object_detection(
            outputs, threshold=threshold, target_sizes=sizes
        )
        return [
            _to_detections(result, [classes[int(index)] for index in result["labels"]], size)
            for result, classes, size in zip(results, names, sizes, strict=True)
        ]


class _GroundingDino(_ZeroShot):
    """Grounding DINO: the classes are phrases of one text, each closed by a full stop."""

    def __call__(self, images: Sequence[Image.Image], names: Sequence[Names], threshold: float) -> Found:
        texts = [" ".join(f"{name.lower()}." for name in classes) for classes in names]
        inputs = self.processor(images=images, text=texts, return_tensors="pt", padding=True)
        outputs = self.run(inputs)
        sizes = [(image.height, image.width) for image in images]
        results = self.processor.post_process_grounded_object_detection(
            outputs, inputs["input_ids"], threshold=threshold, text_threshold=threshold, target_sizes=sizes
        )
        stop = self.processor.tokenizer.convert_tokens_to_ids(".")
        found = []
        for result, logits, ids, classes, size in zip(
            results, outputs.logits, inputs["input_ids"], names, sizes, strict=True
        ):
            # The library's own labels are the words above a threshold, which may belong to no class or to two.
            kept = logits[logits.sigmoid().amax(-1) > threshold]
            indices = phrase_scores(kept, ids.to(kept.device), stop, len(classes)).argmax(-1)
            found.append(_to_detections(result, [classes[index] for index in indices.tolist()], size))
        return found


def phrase_scores(logits: Tensor, ids: Tensor, stop: int, count: int) -> Tensor:
    """Return the largest logit among each phrase's tokens, [Q,count], given token logits [Q,T] of a text with ``ids`` [L].

    The text is ``count`` phrases after one start token, each closed by the token ``stop``.
    """
    stops = (ids == stop).nonzero().flatten().tolist()
    if len(stops) != count:
        raise ValueError(f"a text of {count} classes has {len(stops)} full stops; a class name must contain none")
    starts = [1, *(place + 1 for place in stops[:-1])]
    return torch.stack([logits[:, a:b].amax(-1) for a, b in zip(starts, stops, strict=True)], dim=-1)


def bounding_box(mask: Mask) -> tuple[float, float, float, float]:
    """Return the box x0, y0, x1, y1 around the true pixels of a mask [H,W]; x1 and y1 are one past the last pixel."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _with_metadata_names(labels: Mapping[int, str], classes: Names) -> dict[int, str]:
    """Return the detector's classes by index, with the metadata's spelling for the classes that these contain."""
    names: Mapping[str, str] = {key(name): name for name in classes}
    return {index: names.get(key(label), label) for index, label in labels.items()}


def _to_detections(result: Mapping[str, Tensor], labels: Sequence[str], size: tuple[int, int]) -> list[Detection]:
    """Return detections from the library's boxes and scores. Boxes are cut at the image's border, as published."""
    limits = torch.tensor([size[1], size[0], size[1], size[0]], dtype=torch.float32)
    boxes = result["boxes"].float().cpu().clamp(min=torch.zeros(4), max=limits)
    scores = result["scores"].tolist()
    return [
        Detection(label, None, (x0, y0, x1, y1), score)
        for label, (x0, y0, x1, y1), score in zip(labels, boxes.tolist(), scores, strict=True)
    ]


@preserved_random_state()
def _load(path: str, device: torch.device) -> _DetectionModel:
    """Load a checkpoint as the kind of detector that the model type of its config has."""
    from transformers import (
        MODEL_FOR_OBJECT_DETECTION_MAPPING,
        MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING,
        MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING,
        AutoConfig,
        AutoImageProcessor,
        AutoProcessor,
    )

    path = resolve_source(path)
    config = AutoConfig.from_pretrained(path)
    kind: type[_DetectionModel]
    if config.model_type in _SEGMENTATION:
        kind, models, processor = _InstanceSegmentation, MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING, AutoImageProcessor
    elif config.model_type in _OWL_TEMPLATES:
        kind, models, processor = _OwlVit, MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING, AutoProcessor
    elif config.model_type in _GROUNDING:
        kind, models, processor = _GroundingDino, MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING, AutoProcessor
    else:
        kind, models, processor = _ObjectDetection, MODEL_FOR_OBJECT_DETECTION_MAPPING, AutoImageProcessor
    model = models.get(type(config), None)
    # Weights of another kind of model would load too: transformers fills missing layers with random weights.
    found = config.architectures or []
    if model is None or (found and model.__name__ not in found):
        raise ValueError(
            f"{path} is {' or '.join(found) or config.model_type}, expected a model for instance segmentation (Mask2Former, "
            "MaskFormer), object detection (DETR, RT-DETR, YOLOS, …) or zero-shot object detection (OWLv2, OWL-ViT, "
            "Grounding DINO)"
        )
    return kind(model.from_pretrained(path).to(device).eval(), processor.from_pretrained(path))
