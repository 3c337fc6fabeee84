from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewards import Detection, GenEval, RewardError, make, score
from rewards.boxes import overlap, relations
from rewards.detectors import ClassNames
from rewards.transformers_detector import TransformersDetector

Draw = Callable[..., torch.Tensor]


class Fixed:
    """A detector with the same result for every image."""

    def __init__(self, *found: Detection) -> None:
        self.found = list(found)

    def to(self, device: torch.device | str) -> Fixed:
        return self

    def __call__(self, images: torch.Tensor, wanted: ClassNames | None = None) -> list[list[Detection]]:
        return [self.found for _ in images]


def thing(label: str, color: str | None = None, x: float = 0, y: float = 0, confidence: float = 1.0) -> Detection:
    """Return an object of 10 by 10 pixels whose upper left corner is (x, y)."""
    return Detection(label, color, (x, y, x + 10, y + 10), confidence)


def judge(found: list[Detection], *include: dict[str, Any], **rest: Any) -> float:
    options = {key: rest.pop(key) for key in ("partial", "exact", "max_overlap") if key in rest}
    return GenEval(**options).judge(found, {"include": list(include), **rest})


CIRCLE = {"class": "circle", "count": 1}
SQUARE = {"class": "square", "count": 1}


def test_single_and_two_objects() -> None:
    assert judge([thing("circle")], CIRCLE) == 1
    assert judge([thing("square")], CIRCLE) == 0
    assert judge([], CIRCLE) == 0
    assert judge([thing("circle"), thing("square")], CIRCLE, SQUARE) == 1
    assert judge([thing("circle")], CIRCLE, SQUARE) == 0


def test_more_objects_are_only_wrong_if_excluded() -> None:
    two = [thing("circle"), thing("circle", x=20)]
    assert judge(two, CIRCLE) == 1
    assert judge(two, CIRCLE, exclude=[{"class": "circle", "count": 2}]) == 0
    assert judge([*two, thing("square")], CIRCLE, exclude=[{"class": "square", "count": 2}]) == 1


def test_counting_with_the_published_pair_of_clauses() -> None:
    three = {"class": "circle", "count": 3}
    exclude = [{"class": "circle", "count": 4}]
    scores = [judge([thing("circle", x=20 * n) for n in range(k)], three, exclude=exclude) for k in range(6)]
    assert scores == [0, 0, 0, 1, 0, 0]


def test_a_blob_may_be_the_third_circle() -> None:
    found = [thing("circle"), thing("circle", x=20), thing("unknown", "red", x=40)]
    exclude = [{"class": "circle", "count": 3}]
    assert judge(found, {"class": "circle", "count": 2}, exclude=exclude) == 0


def test_counting_asks_for_more_confidence() -> None:
    found = [thing("circle", confidence=0.5)]
    assert judge(found, CIRCLE, tag="single_object") == 1
    assert judge(found, CIRCLE, tag="counting") == 0
    assert judge([thing("circle", confidence=0.3)], CIRCLE) == 0


def test_the_colour_is_that_of_the_most_confident_object() -> None:
    red = {**CIRCLE, "color": "red"}
    assert judge([thing("circle", "red")], red) == 1
    assert judge([thing("circle", "blue")], red) == 0
    assert judge([thing("circle", "blue", confidence=0.9), thing("circle", "red", confidence=0.8)], red) == 0
    assert judge([thing("circle", "blue", confidence=0.8), thing("circle", "red", confidence=0.9)], red) == 1
    assert judge([thing("circle", "red"), thing("circle", "blue")], {**red, "count": 2}) == 0


def test_clauses_on_one_class_share_its_objects_out() -> None:
    red, blue = {**CIRCLE, "color": "red"}, {**CIRCLE, "color": "blue"}
    both = [thing("circle", "red"), thing("circle", "blue", x=20)]
    assert judge(both, red, blue) == judge(both, blue, red) == 1
    assert judge(both, CIRCLE, red) == judge(both, red, CIRCLE) == 1
    assert judge(both[:1], red, blue) == 0
    assert judge(both[:1], red, CIRCLE) == 0
    assert judge([both[0], thing("circle", "red", x=20)], red, blue) == 0


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (-30, 0, {"left of"}),
        (30, 0, {"right of"}),
        (0, -30, {"above"}),
        (0, 30, {"below"}),
        # The offset (20, 15) of length 25 loses 0.1·(10 + 10) = 2 on each axis: (18, 13)/25 = (0.72, 0.52).
        (20, 15, {"right of", "below"}),
        # (20, 12), length 23.32: (18, 10)/23.32 = (0.77, 0.43).
        (20, 12, {"right of"}),
        (2, 0, set()),
        (0, 0, set()),
        # (3, 0): 1/3 is left, less than a half.
        (3, 0, set()),
        (5, 0, {"right of"}),
    ],
)
def test_relations_by_hand(x: float, y: float, expected: set[str]) -> None:
    assert relations(thing("circle", x=x, y=y), thing("square")) == expected


MIRROR = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
places = st.floats(-50, 50)


@given(x=places, y=places)
def test_relations_mirror_when_the_objects_change_places(x: float, y: float) -> None:
    one, other = thing("circle", x=x, y=y), thing("square")
    assert relations(other, one) == {MIRROR[relation] for relation in relations(one, other)}


def test_position() -> None:
    left = {**CIRCLE, "position": ["left of", 0]}
    circle = thing("circle", x=0)
    assert judge([circle, thing("square", x=20)], SQUARE, left) == 1
    assert judge([thing("circle", x=40), thing("square", x=20)], SQUARE, left) == 0
    assert judge([circle], SQUARE, left) == 0
    assert judge([circle, thing("square", x=20)], {**CIRCLE, "position": ["left of", 1]}, SQUARE) == 1


def test_position_between_objects_of_one_class() -> None:
    blue, red = {**CIRCLE, "color": "blue"}, {**CIRCLE, "color": "red", "position": ["above", 0]}
    found = [thing("circle", "red", y=0), thing("circle", "blue", y=20)]
    assert judge(found, blue, red) == 1
    assert judge([found[0]._replace(color="blue"), found[1]._replace(color="red")], blue, red) == 0


def test_partial_credit_by_hand() -> None:
    two_red = {"class": "circle", "count": 2, "color": "red"}
    found = [thing("circle", "red"), thing("circle", "blue", x=20)]
    # count 2/2, colour 1/2
    assert judge(found, two_red, partial=True) == pytest.approx(0.75)
    # count 1/2, colour 1/2
    assert judge(found[:1], two_red, partial=True) == pytest.approx(0.5)
    left = {**SQUARE, "color": "red", "position": ["left of", 0]}
    # circle 1; square: count 1, colour 0, and so position 0
    assert judge([thing("circle"), thing("square", "blue", x=-30)], CIRCLE, left, partial=True) == pytest.approx(0.5)
    # circle 0; square 1, and no position against what is not there
    near = {**SQUARE, "position": ["left of", 0]}
    assert judge([thing("square")], CIRCLE, near, partial=True) == pytest.approx(1 / 3)
    # count 1, exclusion 0
    assert judge(found, CIRCLE, exclude=[{"class": "circle", "count": 2}], partial=True) == pytest.approx(0.5)


things = st.builds(
    thing,
    label=st.sampled_from(["circle", "square", "unknown"]),
    color=st.sampled_from(["red", "blue"]),
    x=places,
    y=places,
)
clauses = st.fixed_dictionaries(
    {"class": st.sampled_from(["circle", "square"]), "count": st.integers(1, 3)},
    optional={"color": st.sampled_from(["red", "blue"]), "position": st.just(["left of", 0])},
)


@given(found=st.lists(things, max_size=5), include=st.lists(clauses, min_size=1, max_size=3), exact=st.booleans())
def test_partial_is_one_exactly_where_strict_is(
    found: list[Detection], include: list[dict[str, Any]], exact: bool
) -> None:
    partial = judge(found, *include, partial=True, exact=exact)
    assert 0 <= partial <= 1
    assert (partial == 1) == (judge(found, *include, exact=exact) == 1)


def test_exact_allows_nothing_else() -> None:
    assert judge([thing("circle")], CIRCLE, exact=True) == 1
    assert judge([thing("circle"), thing("square")], CIRCLE, exact=True) == 0
    assert judge([thing("circle"), thing("unknown")], CIRCLE, exact=True) == 0
    assert judge([thing("circle"), thing("square")], CIRCLE, exclude=[{"class": "*", "count": 2}]) == 0


def test_exact_asks_the_detector_for_every_class() -> None:
    """A zero-shot detector must be able to reject this."""
    asked: list[ClassNames | None] = []

    class Asked(Fixed):
        def __call__(self, images: torch.Tensor, wanted: ClassNames | None = None) -> list[list[Detection]]:
            asked.append(wanted)
            return super().__call__(images, wanted)

    for exact in (False, True):
        score(GenEval(Asked(thing("circle")), exact=exact), torch.zeros(1, 3, 8, 8), [""], [{"include": [CIRCLE]}])
    assert asked == [[["circle"]], [["circle", "*"]]]


def test_an_excluded_colour() -> None:
    found = [thing("circle", "red"), thing("circle", "blue", x=20)]
    assert judge(found, CIRCLE, exclude=[{"class": "circle", "color": "green", "count": 1}]) == 1
    assert judge(found, CIRCLE, exclude=[{"class": "circle", "color": "blue", "count": 1}]) == 0


def test_overlapping_boxes_are_one_object_on_request() -> None:
    exclude = [{"class": "circle", "count": 2}]
    # Shifted by one pixel. By the published count of pixels a box from 0 to 10 has 11: 110 of 132 are shared, 5/6.
    found = [thing("circle"), thing("circle", x=1, confidence=0.9)]
    assert overlap(*found) == pytest.approx(5 / 6)
    assert judge(found, CIRCLE, exclude=exclude) == 0
    assert judge(found, CIRCLE, exclude=exclude, max_overlap=0.83) == 1
    assert judge(found, CIRCLE, exclude=exclude, max_overlap=0.84) == 0


def test_overlap_by_hand() -> None:
    assert overlap(thing("circle"), thing("circle")) == 1
    assert overlap(thing("circle"), thing("circle", x=20)) == 0
    # 1 pixel of 121 + 121 - 1
    assert overlap(thing("circle"), thing("circle", x=10, y=10)) == pytest.approx(1 / 241)


def test_suppression_comes_after_the_limit_on_objects() -> None:
    # The two most confident are one object seen twice; the third, apart, is beyond the limit.
    found = [thing("circle"), thing("circle", x=1, confidence=0.9), thing("circle", x=40, confidence=0.8)]
    two = {"include": [{**CIRCLE, "count": 2}]}
    assert GenEval(max_overlap=0.8).judge(found, two) == 1
    assert GenEval(max_overlap=0.8, max_objects=2).judge(found, two) == 0


def test_rows_without_requirements_are_invalid() -> None:
    reward = GenEval(Fixed(thing("circle")))
    result = score(reward, torch.zeros(3, 3, 8, 8), ["a", "b", "c"], [{"include": [CIRCLE]}, {}, {"include": []}])
    assert result.valid.tolist() == [True, False, False]
    assert result.values.tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("clause", "message"),
    [
        ({"class": "circle"}, "count"),
        ({"count": 1}, "class"),
        ({"class": "circle", "count": 0}, "count >= 1"),
        ({"class": 3, "count": 1}, "needs clauses with a class"),
        ("circle", "needs clauses with a class"),
        ({"class": "circle", "count": 1, "position": 3}, "k the index of a clause, found 3"),
        ({"class": "circle", "count": 1, "position": ["left of"]}, "k the index of a clause"),
        ({"class": "circle", "count": 1, "position": ["left of", 3]}, "points at clause 3"),
        ({"class": "circle", "count": 1, "position": ["beside", 0]}, "'beside'"),
        ({"class": "circle", "count": 1, "color": "red"}, "reports no colours"),
    ],
)
def test_metadata_that_cannot_be_judged_is_an_error(clause: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge([thing("circle")], clause)


def test_an_error_names_the_row_and_the_prompt() -> None:
    rows = [{"include": [CIRCLE]}, {"include": [{"class": "circle"}]}]
    with pytest.raises(RewardError, match=r"'geneval' failed at row 1 \(prompt 'b'\).*count >= 1"):
        score(GenEval(Fixed(thing("circle"))), torch.zeros(2, 3, 8, 8), ["a", "b"], rows)


@pytest.mark.parametrize("key", ["include", "exclude"])
@pytest.mark.parametrize("clauses", [3, "circle", CIRCLE])
def test_malformed_clauses_are_an_error_with_its_row(key: str, clauses: Any) -> None:
    rows = [{"include": [CIRCLE]}, {key: clauses}]
    with pytest.raises(
        RewardError, match=rf"row 1 \(prompt 'b'\): '{key}' of GenEval .*list of clauses, found"
    ) as caught:
        score(GenEval(Fixed(thing("circle"))), torch.zeros(2, 3, 8, 8), ["a", "b"], rows)
    assert caught.value.row == 1


def test_an_unknown_class_is_blamed_on_its_row() -> None:
    rows: list[dict[str, Any]] = [
        {},
        {"include": [CIRCLE]},
        {"include": [CIRCLE], "exclude": [{"class": "dog", "count": 1}]},
    ]
    with pytest.raises(RewardError, match=r"at row 2 \(prompt 'c'\): .*'dog', which is none of") as caught:
        score(make("geneval"), torch.ones(3, 3, 32, 32), ["a", "b", "c"], rows)
    assert (caught.value.row, caught.value.prompt) == (2, "c")


def test_two_colours_of_one_class_need_a_detector_of_colours() -> None:
    red, blue = {**CIRCLE, "color": "red"}, {**CIRCLE, "color": "blue"}
    with pytest.raises(ValueError, match="reports no colours"):
        judge([thing("circle"), thing("circle", x=20)], red, blue)


def test_through_the_registry_on_drawings(draw: Draw) -> None:
    red = {"class": "circle", "count": 1, "color": "red"}
    blue = {"class": "square", "count": 1, "color": "blue", "position": ["right of", 0]}
    two = {"include": [{**red, "count": 2}], "exclude": [{"class": "circle", "count": 3}], "tag": "counting"}
    pair = draw([("circle", "red", 2, 10, 10), ("square", "blue", 20, 10, 10)])
    swapped = draw([("circle", "red", 20, 10, 10), ("square", "blue", 2, 10, 10)])
    twice = draw([("circle", "red", 2, 2, 10), ("circle", "red", 18, 18, 9)])
    thrice = draw([("circle", "red", 2, 2, 9), ("circle", "red", 21, 21, 9), ("circle", "red", 20, 3, 9)])
    relation = {"include": [red, blue], "tag": "position"}
    images = torch.stack([pair, swapped, twice, thrice])
    result = score(make("geneval"), images, [""] * 4, [relation, relation, two, two])
    assert result.values.tolist() == [1, 0, 1, 0]


def test_through_the_registry_on_drawings_that_are_hard(draw: Draw) -> None:
    blue, red = {"class": "square", "count": 1, "color": "blue"}, {"class": "circle", "count": 1, "color": "red"}
    two = {
        "include": [{"class": "square", "count": 2}],
        "exclude": [{"class": "square", "count": 3}],
        "tag": "counting",
    }
    both, left = {"include": [red, blue]}, {"include": [blue, {**red, "position": ["left of", 0]}]}
    cases = [
        ([], both, 0),
        ([], {"exclude": [{"class": "square", "count": 1}]}, 1),  # nothing there, as asked
        ([("circle", "red", 4, 8, 12), ("square", "blue", 16, 8, 12)], left, 1),  # touching
        ([("circle", "red", 4, 8, 12), ("square", "blue", 14, 8, 12)], both, 1),  # the circle a little covered
        ([("circle", "red", 4, 8, 12), ("square", "blue", 9, 8, 12)], both, 0),  # half of it covered
        ([("square", "blue", -2, 8, 12), ("square", "red", 14, 8, 12)], two, 1),  # cut at the border
        ([("square", "blue", -6, 8, 12), ("square", "red", 14, 8, 12)], two, 0),  # half of it outside
        ([("square", "red", 3, 8, 12), ("square", "red", 15, 8, 12)], two, 0),  # two that have become one blob
        # Three squares, two of them one blob, are not two squares.
        ([("square", "red", 2, 2, 9), ("square", "red", 11, 2, 9), ("square", "blue", 2, 20, 9)], two, 0),
    ]
    images = torch.stack([draw(shapes) for shapes, _, _ in cases])
    result = score(make("geneval"), images, [""] * len(cases), [row for _, row, _ in cases])
    assert result.values.tolist() == [value for _, _, value in cases]


def test_a_detector_of_photographs_has_the_lower_of_two_thresholds() -> None:
    for one, other in ((0.2, 0.7), (0.7, 0.2)):
        reward = make("geneval", detector="somewhere/a-model", threshold=one, counting_threshold=other)
        assert isinstance(reward, GenEval)
        assert isinstance(reward.detector, TransformersDetector)
        assert reward.detector.threshold == 0.2


def test_metadata_of_photographs_for_the_shapes_task_are_an_error() -> None:
    rows = [{"include": [{"class": "dog", "count": 1}]}]
    with pytest.raises(RewardError, match="'dog', which is none of"):
        score(make("geneval"), torch.ones(1, 3, 32, 32), ["a dog"], rows)
