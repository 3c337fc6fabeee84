"""Tests of the published rules on published metadata, tag by tag, and of Flow-GRPO's credit, worked by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rewards import Detection, GenEval, score
from rewards.detectors import ClassNames

Found = list[Detection]


def seen(label: str, color: str | None = None, x: float = 0, y: float = 0, score: float = 0.99) -> Detection:
    """Return an object of 10 by 10 pixels whose upper left corner is (x, y)."""
    return Detection(label, color, (x, y, x + 10, y + 10), score)


def many(count: int, label: str = "bowl", score: float = 0.99) -> Found:
    return [seen(label, x=20 * n, score=score) for n in range(count)]


SINGLE = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
TWO = {
    "tag": "two_object",
    "include": [{"class": "tv", "count": 1}, {"class": "cat", "count": 1}],
    "prompt": "a photo of a tv and a cat",
}
COUNTING = {
    "tag": "counting",
    "include": [{"class": "bowl", "count": 3}],
    "exclude": [{"class": "bowl", "count": 4}],
    "prompt": "a photo of three bowls",
}
COLORS = {
    "tag": "colors",
    "include": [{"class": "car", "count": 1, "color": "pink"}],
    "prompt": "a photo of a pink car",
}
# The clause with the position comes second and points at the first.
POSITION = {
    "tag": "position",
    "include": [{"class": "cow", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}],
    "prompt": "a photo of a dog right of a cow",
}
COLOR_ATTR = {
    "tag": "color_attr",
    "include": [{"class": "cup", "count": 1, "color": "red"}, {"class": "vase", "count": 1, "color": "white"}],
    "prompt": "a photo of a red cup and a white vase",
}

# What was asked, what was seen, the published score, Flow-GRPO's credit.
CASES: list[tuple[str, dict[str, Any], Found, float, float]] = [
    ("single: there", SINGLE, [seen("bench")], 1, 1),
    ("single: nothing", SINGLE, [], 0, 0),
    ("single: another class", SINGLE, [seen("chair")], 0, 0),
    ("single: two are right as well, and cost all credit", SINGLE, many(2, "bench"), 1, 0),
    ("single: three, credit 1 - 2/1", SINGLE, many(3, "bench"), 1, -1),
    ("single: at the threshold of 0.3 is not above it", SINGLE, [seen("bench", score=0.3)], 0, 0),
    ("single: just above", SINGLE, [seen("bench", score=0.31)], 1, 1),
    ("two: both", TWO, [seen("tv"), seen("cat")], 1, 1),
    ("two: one of them", TWO, [seen("tv")], 0, 0.5),
    ("two: one of them twice", TWO, many(2, "cat"), 0, 0),
    ("two: other things do not matter", TWO, [seen("tv"), seen("cat"), seen("dog")], 1, 1),
    ("counting: right", COUNTING, many(3), 1, 1),
    ("counting: two of three", COUNTING, many(2), 0, 2 / 3),
    ("counting: four", COUNTING, many(4), 0, 2 / 3),
    ("counting: six", COUNTING, many(6), 0, 0),
    ("counting: none", COUNTING, [], 0, 0),
    ("counting: 0.9 is not above 0.9", COUNTING, [*many(2), seen("bowl", x=90, score=0.9)], 0, 2 / 3),
    ("counting: an unsure fourth is not seen", COUNTING, [*many(3), seen("bowl", x=90, score=0.8)], 1, 1),
    ("colours: right", COLORS, [seen("car", "pink")], 1, 1),
    ("colours: wrong; count 1, colour 0", COLORS, [seen("car", "red")], 0, 0.5),
    ("colours: no car; count 0 and a 0", COLORS, [seen("bus", "pink")], 0, 0),
    (
        "colours: the most confident car decides; two cars, count 0 and a 0",
        COLORS,
        [seen("car", "red", score=0.9), seen("car", "pink", x=20, score=0.8)],
        0,
        0,
    ),
    (
        "colours: and here it is pink",
        COLORS,
        [seen("car", "red", score=0.8), seen("car", "pink", x=20, score=0.9)],
        1,
        0,
    ),
    ("position: right", POSITION, [seen("cow"), seen("dog", x=30)], 1, 1),
    ("position: wrong side; counts 1 1, position 0 and 1", POSITION, [seen("cow", x=30), seen("dog")], 0, 0.75),
    ("position: above as well as right of", POSITION, [seen("cow", y=25), seen("dog", x=30)], 1, 1),
    ("position: too near, nothing left of 1.5 - 2", POSITION, [seen("cow"), seen("dog", x=1.5)], 0, 0.75),
    ("position: no cow; counts 0 1, position 0", POSITION, [seen("dog", x=30)], 0, 1 / 3),
    ("position: no dog; counts 1 0 and a 0", POSITION, [seen("cow")], 0, 1 / 3),
    (
        "position: the most confident dog is right of the cow; two dogs, counts 1 0 and a 0",
        POSITION,
        [seen("cow", x=40), seen("dog", x=80, score=0.9), seen("dog", score=0.8)],
        1,
        1 / 3,
    ),
    ("attribution: right", COLOR_ATTR, [seen("cup", "red"), seen("vase", "white", x=20)], 1, 1),
    ("attribution: exchanged", COLOR_ATTR, [seen("cup", "white"), seen("vase", "red", x=20)], 0, 0.5),
    ("attribution: one colour wrong", COLOR_ATTR, [seen("cup", "red"), seen("vase", "red", x=20)], 0, 0.75),
    ("attribution: one missing; 1 1 0 0", COLOR_ATTR, [seen("cup", "red")], 0, 0.5),
]


class Fixed:
    """A detector with a given result for each image."""

    def __init__(self, found: list[Found]) -> None:
        self.found = found

    def to(self, device: torch.device | str) -> Fixed:
        return self

    def __call__(self, images: torch.Tensor, wanted: ClassNames | None = None) -> list[Found]:
        return self.found


@pytest.mark.parametrize(
    ("metadata", "found", "strict", "credit"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_a_case(metadata: dict[str, Any], found: Found, strict: float, credit: float) -> None:
    assert GenEval().judge(found, metadata) == strict
    assert GenEval(partial="flow_grpo").judge(found, metadata) == pytest.approx(credit)


def test_all_cases_in_one_batch() -> None:
    images, prompts = torch.zeros(len(CASES), 3, 8, 8), [case[1]["prompt"] for case in CASES]
    reward = GenEval(Fixed([case[2] for case in CASES]))
    assert score(reward, images, prompts, [case[1] for case in CASES]).values.tolist() == [case[3] for case in CASES]


def test_at_most_sixteen_objects_of_a_class_are_looked_at() -> None:
    crowd = {
        "include": [{"class": "bowl", "count": 16}],
        "exclude": [{"class": "bowl", "count": 17}],
        "tag": "counting",
    }
    assert GenEval().judge(many(15), crowd) == 0
    assert GenEval().judge(many(16), crowd) == GenEval().judge(many(20), crowd) == 1
    assert GenEval(max_objects=20).judge(many(17), crowd) == 0


def test_a_position_must_hold_for_all_pairs() -> None:
    row = {"include": [{"class": "cow", "count": 2}, {"class": "dog", "count": 2, "position": ["above", 0]}]}
    cows = [seen("cow", y=60), seen("cow", x=5, y=80)]
    assert GenEval().judge([*cows, seen("dog"), seen("dog", x=4, y=20)], row) == 1
    assert GenEval().judge([*cows, seen("dog"), seen("dog", y=70)], row) == 0


def test_flow_grpo_gives_no_credit_for_a_position_against_a_wrong_target() -> None:
    row = {
        "include": [
            {"class": "cow", "count": 1, "color": "red"},
            {"class": "dog", "count": 1, "position": ["above", 0]},
        ]
    }
    found = [seen("cow", "blue", y=40), seen("dog")]
    # counts 1 1, colour 0, position 0; here a requirement of its own is met whatever the target's colour
    assert GenEval(partial="flow_grpo").judge(found, row) == pytest.approx(0.5)
    assert GenEval(partial=True).judge(found, row) == pytest.approx(0.75)


def test_flow_grpo_does_not_read_exclude() -> None:
    reward = GenEval(Fixed([many(1), many(1)]), partial="flow_grpo")
    exclude = [{"class": "bowl", "count": 1}]
    rows = [{"include": [{"class": "bowl", "count": 1}], "exclude": exclude}, {"exclude": exclude}]
    result = score(reward, torch.zeros(2, 3, 8, 8), ["", ""], rows)
    assert result.values.tolist() == [1, 0]
    assert result.valid.tolist() == [True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"partial": "half"}, "found 'half'"), ({"partial": "flow_grpo", "exact": True}, "leave exact out")],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenEval(**options)


def test_flow_grpo_needs_colours_and_earlier_targets() -> None:
    reward = GenEval(partial="flow_grpo")
    with pytest.raises(ValueError, match="reports no colours"):
        reward.judge([seen("car")], COLORS)
    later = {"include": [{"class": "cow", "count": 1, "position": ["above", 1]}, {"class": "dog", "count": 1}]}
    with pytest.raises(ValueError, match="points at clause 1; flow_grpo has 0 before it"):
        reward.judge([seen("cow"), seen("dog")], later)
