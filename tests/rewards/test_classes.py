from __future__ import annotations

import pytest

from rewards.classes import ANY, UnknownClass, check_classes, key

# COCO's classes, in the words that GenEval's prompts use.
GENEVAL = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie,
suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket,
bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut,
cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, computer mouse, tv remote, computer keyboard,
cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush"""
NAMES = [name.strip() for name in GENEVAL.replace("\n", " ").split(",")]
COCO = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}
# RT-DETR's and YOLO's.
VOC = {
    **COCO,
    "motorcycle": "motorbike",
    "airplane": "aeroplane",
    "couch": "sofa",
    "potted plant": "pottedplant",
    "dining table": "diningtable",
    "tv": "tvmonitor",
}


@pytest.mark.parametrize("renamed", [{}, COCO, VOC], ids=["geneval", "coco", "voc"])
def test_all_of_geneval_is_found_in_each_spelling(renamed: dict[str, str]) -> None:
    known = [renamed.get(name, name) for name in NAMES]
    assert len({key(name) for name in NAMES}) == 80
    assert [key(name) for name in known] == [key(name) for name in NAMES]
    check_classes([NAMES, [ANY]], known, "a detector")


def test_case_blanks_and_punctuation_do_not_matter() -> None:
    assert key("Wine_Glass") == key("wine glass") == key("wine-glass") == key("WineGlass")
    assert key("hair dryer") == key("hair drier")
    assert key("cup") != key("wine glass")
    assert key("tv") != key("tv remote")


def test_an_unknown_class_is_named_with_its_nearest() -> None:
    with pytest.raises(ValueError, match=r"'zebras'.*none of the 2 classes of x; its nearest: 'zebra'"):
        check_classes([["bear", "zebras"]], ["zebra", "bear"], "x")
    with pytest.raises(ValueError, match=r"'qqq', which is none of the 1 classes of x\. Choose"):
        check_classes([["qqq"]], ["zebra"], "x")


def test_an_unknown_class_is_that_of_an_image() -> None:
    with pytest.raises(UnknownClass, match="'lion'") as caught:
        check_classes([["bear"], [], ["bear", "lion"], ["ape"]], ["zebra", "bear"], "x")
    assert caught.value.image == 2
