"""Tests of every kind of detector, with random checkpoints in the real format, against the library's own outputs."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    DetrForObjectDetection,
    GroundingDinoForObjectDetection,
    GroundingDinoProcessor,
    Mask2FormerForUniversalSegmentation,
    Owlv2ForObjectDetection,
    Owlv2Processor,
    RTDetrForObjectDetection,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessor,
)

from rewards import Detection, GenEval, RewardError, TransformersDetector, make, score, transformers_detector
from rewards.pictures import to_pictures
from rewards.transformers_detector import bounding_box, phrase_scores
from tests.rewards import tiny_detectors
from tests.tiny_clip import tiny_clip

Saved = Callable[[str], str]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A function that returns the folder of a tiny checkpoint, given its architecture. It is written at the first call."""
    folders: dict[str, str] = {}

    def make_once(name: str) -> str:
        if name not in folders:
            kind = tiny_clip if name == "clip" else getattr(tiny_detectors, name)
            folders[name] = str(kind(tmp_path_factory.mktemp(name)))
        return folders[name]

    return make_once


def picture(height: int, width: int, seed: int = 0, count: int = 1) -> Tensor:
    """Return smooth random images, in which masks and boxes vary with the position."""
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)


def plain(found: Sequence[Detection]) -> list[tuple[Any, ...]]:
    """Return comparable values in an order that does not depend on the detector."""
    return sorted((round(item.score, 4), item.label, *(round(x, 2) for x in item.box)) for item in found)


def test_masks_agree_with_the_library(saved: Saved) -> None:
    folder = saved("mask2former")
    image = picture(384, 384)  # the size at which the library thresholds masks, so that nothing is resampled
    model = Mask2FormerForUniversalSegmentation.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        outputs = model(**processor(images=to_pictures(image), return_tensors="pt"))
    (theirs,) = processor.post_process_instance_segmentation(
        outputs, threshold=0.3, target_sizes=[(384, 384)], return_binary_maps=True
    )
    expected = {
        (round(segment["score"], 4), tiny_detectors.LABELS[segment["label_id"]], mask.numpy().astype(bool).tobytes())
        for segment, mask in zip(theirs["segments_info"], theirs["segmentation"], strict=True)
    }
    (found,) = TransformersDetector(folder)(image)
    assert 2 <= len(expected) < model.config.num_queries
    assert {
        (round(item.score, 4), item.label, item.mask.tobytes()) for item in found if item.mask is not None
    } == expected
    assert all(item.box == bounding_box(item.mask) for item in found if item.mask is not None)


def test_masks_of_a_picture_that_the_processor_stretches(saved: Saved) -> None:
    folder = saved("mask2former")
    image = picture(64, 80)  # stretched to 96 columns, whose masks have 24
    model = Mask2FormerForUniversalSegmentation.from_pretrained(folder).eval()
    inputs = AutoImageProcessor.from_pretrained(folder)(images=to_pictures(image), return_tensors="pt")
    assert inputs["pixel_values"].shape[-2:] == (64, 96)
    with torch.no_grad():
        logits = model(**inputs).masks_queries_logits
    expected = torch.nn.functional.interpolate(logits, (64, 80), mode="bilinear", align_corners=False)[0] > 0
    (found,) = TransformersDetector(folder, threshold=0.1)(image)
    masks = {item.mask.tobytes() for item in found if item.mask is not None}
    assert len(masks) > 2
    assert masks <= {mask.numpy().tobytes() for mask in expected}


def test_the_box_around_a_mask() -> None:
    mask = np.zeros((5, 8), dtype=bool)
    mask[1:3, 2:7] = True
    mask[4, 3] = True
    assert bounding_box(mask) == (2, 1, 7, 5)


@pytest.mark.parametrize(("name", "kind"), [("detr", DetrForObjectDetection), ("rt_detr", RTDetrForObjectDetection)])
def test_boxes_agree_with_the_library(saved: Saved, name: str, kind: Any) -> None:
    folder, images = saved(name), picture(48, 80, count=3)
    model, processor = kind.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        outputs = model(**processor(images=to_pictures(images), return_tensors="pt"))
    theirs = processor.post_process_object_detection(outputs, threshold=0.15, target_sizes=[(48, 80)] * 3)
    detector = TransformersDetector(folder, threshold=0.15, batch_size=2)
    for result, found in zip(theirs, detector(images), strict=True):
        boxes = [(x0.clip(0), y0.clip(0), x1.clip(max=80), y1.clip(max=48)) for x0, y0, x1, y1 in result["boxes"]]
        expected = [
            Detection(tiny_detectors.LABELS[int(label)], None, tuple(map(float, box)), float(value))
            for value, label, box in zip(result["scores"], result["labels"], boxes, strict=True)
        ]
        assert plain(found) == plain(expected)
        assert found


def test_yolos_is_an_object_detector_as_well(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    shape = {"image_size": [32, 32], "patch_size": 8, "num_detection_tokens": 5}
    YolosForObjectDetection(YolosConfig(**sizes, **shape, id2label={0: "cat", 1: "dog"})).save_pretrained(tmp_path)
    YolosImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    found = TransformersDetector(str(tmp_path), threshold=0.0).to("cpu")(torch.rand(2, 3, 32, 32))
    assert [len(items) for items in found] == [5, 5]
    assert all(item.label in ("cat", "dog") and 0 <= item.score <= 1 for items in found for item in items)


def test_queries_agree_with_the_library(saved: Saved) -> None:
    folder, images = saved("owlv2"), picture(48, 80, count=3)
    wanted = [["cat", "tv remote", "bird"], ["tv remote"], ["bird", "cat"]]
    model, processor = Owlv2ForObjectDetection.from_pretrained(folder).eval(), Owlv2Processor.from_pretrained(folder)
    # Together in one batch, where the processor fills up the shorter lists, and each image by itself in the library.
    for row, found in enumerate(TransformersDetector(folder)(images, wanted)):
        texts = [[f"a photo of a {name}" for name in wanted[row]]]
        with torch.no_grad():
            outputs = model(**processor(images=to_pictures(images[row : row + 1]), text=texts, return_tensors="pt"))
        (result,) = processor.post_process_grounded_object_detection(
            outputs, threshold=0.3, target_sizes=[(48, 80)], text_labels=[wanted[row]]
        )
        limits = torch.tensor([80.0, 48.0, 80.0, 48.0])
        boxes = torch.minimum(result["boxes"].clamp(min=0), limits).tolist()
        expected = [
            Detection(label, None, tuple(box), value)
            for label, box, value in zip(result["text_labels"], boxes, result["scores"].tolist(), strict=True)
        ]
        assert plain(found) == plain(expected)
        assert found
    assert len({item.label for item in TransformersDetector(folder)(images, wanted)[0]}) > 1


def test_phrases_agree_with_the_library(saved: Saved) -> None:
    folder, images = saved("grounding_dino"), picture(64, 64, count=2)
    wanted = [["cat", "TV remote"], ["dog"]]
    model = GroundingDinoForObjectDetection.from_pretrained(folder).eval()
    processor = GroundingDinoProcessor.from_pretrained(folder)
    found = TransformersDetector(folder, threshold=0.2)(images, wanted)
    for row in range(2):
        inputs = processor(images=to_pictures(images[row : row + 1]), text=[wanted[row]], return_tensors="pt")
        with torch.no_grad():
            outputs = model(**inputs)
        (result,) = processor.post_process_grounded_object_detection(
            outputs, inputs["input_ids"], threshold=0.2, text_threshold=0.2, target_sizes=[(64, 64)]
        )
        boxes = result["boxes"].clamp(0, 64).tolist()
        assert [item.score for item in found[row]] == pytest.approx(result["scores"].tolist(), abs=1e-4)
        assert [x for item in found[row] for x in item.box] == pytest.approx(
            [x for box in boxes for x in box], abs=1e-2
        )
        # Where the library's words are all of one class, it is ours.
        for item, words in zip(found[row], result["text_labels"], strict=True):
            names = {name for name in wanted[row] if set(re.findall(r"\w+", words)) & set(name.lower().split())}
            assert item.label in names
        assert found[row]


def test_the_class_of_a_phrase_by_hand() -> None:
    # [CLS] cat . tv remote . [SEP], stop = 9
    ids = torch.tensor([7, 1, 9, 2, 3, 9, 8])
    logits = torch.tensor([[5.0, 1, 6, 0, 2, 7, 4], [0.0, 3, 0, 1, -1, 0, 0]])
    assert phrase_scores(logits, ids, 9, 2).tolist() == [[1, 2], [3, 1]]
    with pytest.raises(ValueError, match="2 full stops"):
        phrase_scores(logits, ids, 9, 3)


def test_labels_have_the_spelling_of_the_metadata(saved: Saved) -> None:
    image = picture(64, 64)
    detector = TransformersDetector(saved("detr"), threshold=0.0)
    own = [item.label for item in detector(image)[0]]
    assert "tvmonitor" in own
    asked = [item.label for item in detector(image, [["tv", "motorcycle"]])[0]]
    assert asked == [{"tvmonitor": "tv", "motorbike": "motorcycle"}.get(label, label) for label in own]


def test_a_class_that_the_detector_cannot_know_is_an_error(saved: Saved) -> None:
    detector = TransformersDetector(saved("detr"))
    with pytest.raises(ValueError, match=r"'bat', which is none of the 3 classes of .*nearest: 'cat'.*zero-shot"):
        detector(picture(64, 64), [["cat", "bat", "*"]])
    with pytest.raises(ValueError, match="give it the classes"):
        TransformersDetector(saved("owlv2"))(picture(64, 64))
    with pytest.raises(ValueError, match=r"finds only the classes that it is given.*exact=true"):
        TransformersDetector(saved("owlv2"))(picture(64, 64), [["cat", "*"]])


def test_a_checkpoint_of_another_kind_is_refused(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is CLIPModel, expected a model for instance segmentation"):
        TransformersDetector(saved("clip"))(picture(64, 64))
    for file in Path(saved("detr")).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["DetrForSegmentation"]}))
    with pytest.raises(ValueError, match="is DetrForSegmentation, expected"):
        TransformersDetector(str(tmp_path))(picture(64, 64))


def test_threads_load_one_model(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    loads, load = [], transformers_detector._load

    def slowly(path: str, device: torch.device) -> Any:
        loads.append(path)
        time.sleep(0.05)
        return load(path, device)

    monkeypatch.setattr(transformers_detector, "_load", slowly)
    detector, found = TransformersDetector(saved("detr"), threshold=0.1), {}
    image = picture(64, 64)
    threads = [threading.Thread(target=lambda n=n: found.update({n: plain(detector(image)[0])})) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1
    assert found[0] == found[1] == found[2] != []


@pytest.mark.parametrize("name", ["mask2former", "rt_detr", "owlv2"])
def test_geneval_from_folders(saved: Saved, name: str) -> None:
    images, tags = picture(64, 64, count=3), ["single_object", "colors", "two_object"]
    cat, red, tv = (
        {"class": "cat", "count": 1},
        {"class": "cat", "count": 1, "color": "red"},
        {"class": "tv", "count": 1},
    )
    rows = [{"tag": tag, "include": include} for tag, include in zip(tags, ([cat], [red], [cat, tv]), strict=True)]
    reward = make("geneval", detector=saved(name), color_model=saved("clip"), threshold=0.1, counting_threshold=0.2)
    values = score(reward, images, [""] * 3, rows).values.tolist()
    # The same by the rules, on what the detector and the colour model say.
    assert isinstance(reward, GenEval)
    assert reward.colors is not None
    found = TransformersDetector(saved(name), threshold=0.1)(images, [["cat"], ["cat"], ["cat", "tv"]])
    seen = [{item.label for item in items if item.score > 0.1} for items in found]
    first = max((item for item in found[1] if item.label == "cat"), key=lambda item: item.score, default=None)
    is_red = first is not None and first.score > 0.1 and reward.colors(images, [(1, first)]) == ["red"]
    assert values == [float("cat" in seen[0]), float(is_red), float({"cat", "tv"} <= seen[2])]


def test_the_colour_model_is_loaded_only_for_prompts_with_a_colour(saved: Saved, tmp_path: Path) -> None:
    reward = make("geneval", detector=saved("detr"), color_model=str(tmp_path / "absent"), threshold=0.0)
    cat = {"class": "tv", "count": 1}
    score(reward, picture(64, 64), [""], [{"include": [cat]}])
    with pytest.raises(RewardError, match="absent"):
        score(reward, picture(64, 64), [""], [{"include": [{**cat, "color": "red"}]}])


def test_exact_sees_every_class_of_the_detector(saved: Saved) -> None:
    rows = [{"include": [{"class": "tv", "count": 1}]}]
    options = {"detector": saved("detr"), "threshold": 0.0, "counting_threshold": 0.0}
    assert score(make("geneval", **options), picture(64, 64), [""], rows).values.tolist() == [1]
    assert score(make("geneval", exact=True, **options), picture(64, 64), [""], rows).values.tolist() == [0]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mask2former", "detr", "rt_detr", "owlv2", "grounding_dino"])
def test_on_a_gpu_as_on_the_cpu(saved: Saved, name: str) -> None:
    images, wanted = picture(64, 64, count=2), [["cat", "tv"], ["cat"]]
    detector = TransformersDetector(saved(name), threshold=0.2)
    here = detector(images, wanted)
    there = detector.to("cuda")(images.cuda(), wanted)
    for ours, theirs in zip(here, there, strict=True):
        assert [item.label for item in ours] == [item.label for item in theirs]
        assert [item.score for item in ours] == pytest.approx([item.score for item in theirs], abs=2e-3)
