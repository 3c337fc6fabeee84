from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageDraw
from torch import Tensor

from rewards import BACKGROUND, PALETTE, ShapesDetector

RED = PALETTE["red"]
CLASSES = ("circle", "square", "triangle")
Draw = Callable[..., Tensor]
Paint = Callable[..., Tensor]
Painter = Callable[[ImageDraw.ImageDraw], object]


def seen(image: Tensor) -> list[tuple[str, str | None]]:
    return sorted((item.label, item.color) for item in ShapesDetector()(image[None])[0])


@pytest.mark.parametrize("label", CLASSES)
@pytest.mark.parametrize("color", list(PALETTE))
@pytest.mark.parametrize("width", [8, 10.3, 14])
def test_every_shape_in_every_colour_and_size(draw: Draw, label: str, color: str, width: float) -> None:
    (found,) = ShapesDetector()(draw([(label, color, 9.4, 7.7, width)])[None])[0]
    assert (found.label, found.color) == (label, color)
    assert 0.97 < found.score <= 1.0
    assert found.box == pytest.approx((9.4, 7.7, 9.4 + width, 7.7 + width), abs=1.6)


@settings(max_examples=60)
@given(
    label=st.sampled_from(CLASSES),
    color=st.sampled_from(list(PALETTE)),
    width=st.floats(8, 14),
    x=st.floats(0, 1),
    y=st.floats(0, 1),
)
def test_wherever_it_lies(draw: Draw, label: str, color: str, width: float, x: float, y: float) -> None:
    image = draw([(label, color, x * (32 - width), y * (32 - width), width)])
    assert seen(image) == [(label, color)]


@pytest.mark.parametrize("first", CLASSES)
@pytest.mark.parametrize("second", CLASSES)
@pytest.mark.parametrize("colors", [("red", "blue"), ("yellow", "green"), ("red", "red")])
def test_neighbours_one_pixel_apart(draw: Draw, first: str, second: str, colors: tuple[str, str]) -> None:
    image = draw([(first, colors[0], 3, 10, 10), (second, colors[1], 14, 10, 10)])
    assert seen(image) == sorted([(first, colors[0]), (second, colors[1])])


def test_touching_shapes_of_different_colours_are_two(draw: Draw) -> None:
    image = draw([("square", "red", 6, 10, 10), ("square", "blue", 16, 10, 10)])
    assert seen(image) == [("square", "blue"), ("square", "red")]


def test_touching_shapes_of_one_colour_are_no_object(draw: Draw) -> None:
    image = draw([("square", "red", 6, 10, 10), ("square", "red", 16, 10, 10)])
    assert seen(image) == [("unknown", "red")]


def polygon(sides: int, radius: float, turn: float) -> Painter:
    angles = [turn + 2 * math.pi * side / sides for side in range(sides)]
    points = [(128 + radius * math.cos(angle), 128 + radius * math.sin(angle)) for angle in angles]
    return lambda canvas: canvas.polygon(points, fill=RED)


STRANGE: dict[str, Painter] = {
    "diamond": polygon(4, 60, 0),
    "square turned by 20 degrees": polygon(4, 60, math.radians(45 + 20)),
    "triangle upside down": polygon(3, 60, math.pi / 2),
    "triangle on its side": polygon(3, 60, 0),
    "ring": lambda canvas: canvas.ellipse((80, 80, 176, 176), outline=RED, width=24),
    "half disc": lambda canvas: canvas.pieslice((72, 72, 184, 184), 180, 360, fill=RED),
    "disc without a slice": lambda canvas: canvas.pieslice((72, 72, 184, 184), 45, 315, fill=RED),
    "ellipse": lambda canvas: canvas.ellipse((60, 84, 196, 172), fill=RED),
    "bar": lambda canvas: canvas.rectangle((60, 100, 196, 156), fill=RED),
    "pale": lambda canvas: canvas.ellipse((80, 80, 176, 176), fill=(228, 110, 108)),
    "orange": lambda canvas: canvas.ellipse((80, 80, 176, 176), fill=(228, 120, 44)),
    "black": lambda canvas: canvas.ellipse((80, 80, 176, 176), fill=(0, 0, 0)),
    "purple": lambda canvas: canvas.ellipse((80, 80, 176, 176), fill=(135, 70, 133)),
    "too small": lambda canvas: canvas.ellipse((112, 112, 144, 144), fill=RED),
}


@pytest.mark.parametrize("name", STRANGE)
def test_other_objects_are_unknown(paint: Paint, name: str) -> None:
    found = seen(paint(STRANGE[name]))
    assert len(found) == 1
    assert found[0][0] == "unknown"


def test_halves_of_two_colours_are_no_object(paint: Paint) -> None:
    def halves(canvas: ImageDraw.ImageDraw) -> None:
        canvas.ellipse((80, 80, 176, 176), fill=RED)
        canvas.pieslice((80, 80, 176, 176), 0, 180, fill=PALETTE["blue"])

    assert {label for label, _ in seen(paint(halves))} == {"unknown"}


def test_a_speck_is_nothing(paint: Paint) -> None:
    assert seen(paint(lambda canvas: canvas.rectangle((100, 100, 123, 123), fill=RED))) == []


def test_an_empty_picture_and_an_empty_batch() -> None:
    background = torch.tensor(BACKGROUND)[:, None, None].expand(3, 32, 32) / 255
    assert seen(background) == []
    assert seen(torch.ones(3, 32, 32)) == []
    assert ShapesDetector()(torch.zeros(0, 3, 32, 32)) == []


def test_noise_is_no_object() -> None:
    noise = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(noise[..., :6, :6], size=32, mode="bicubic").clamp(0, 1)
    for batch in (noise, smooth):
        labels = [item.label for items in ShapesDetector()(batch) for item in items]
        # Among hundreds of random blobs of random colours one or the other is a shape.
        assert len(labels) > 64
        assert sum(label != "unknown" for label in labels) <= 0.02 * len(labels)


def test_a_blur_of_half_a_pixel_and_noise_are_forgiven_and_a_smear_is_not(draw: Draw) -> None:
    image = draw([("circle", "red", 4, 4, 12), ("triangle", "blue", 18, 16, 12)])
    blurred = 0.5 * image + 0.5 * torch.nn.functional.avg_pool2d(image[None], 3, 1, 1, count_include_pad=False)[0]
    noisy = blurred + 0.05 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    assert seen(noisy.clamp(0, 1)) == [("circle", "red"), ("triangle", "blue")]
    smeared = torch.nn.functional.avg_pool2d(image[None], 11, 1, 5, count_include_pad=False)[0]
    assert {label for label, _ in seen(smeared)} <= {"unknown"}


def test_an_image_is_judged_alike_in_any_batch(draw: Draw) -> None:
    images = [draw([(label, "green", 5, 9, 11)]) for label in CLASSES]
    together = ShapesDetector()(torch.stack(images))
    assert together == [ShapesDetector()(image[None])[0] for image in images]


def test_lengths_scale_with_the_image(draw_large: Draw) -> None:
    found = seen(draw_large([("circle", "red", 2, 2, 9), ("triangle", "yellow", 18, 16, 12)]))
    assert found == [("circle", "red"), ("triangle", "yellow")]


def test_masks_on_request(draw: Draw) -> None:
    image = draw([("square", "blue", 4, 6, 10)])[None]
    assert ShapesDetector()(image)[0][0].mask is None
    mask = ShapesDetector(keep_masks=True)(image)[0][0].mask
    assert mask is not None
    assert mask.shape == (32, 32)
    assert mask.sum() == 100
    assert mask[6:16, 4:14].all()


def turned(sides: int, degrees: float) -> Painter:
    """Return an image of a rotated square or triangle."""
    return polygon(sides, 60, math.radians(degrees) + (math.pi / 4 if sides == 4 else -math.pi / 2))


@pytest.mark.parametrize(("label", "sides", "limit"), [("square", 4, 10), ("triangle", 3, 8)])
def test_turned_shapes(paint: Paint, label: str, sides: int, limit: float) -> None:
    for angle in (0, limit / 2, limit):
        assert seen(paint(turned(sides, angle))) == [(label, "red")]
        assert seen(paint(turned(sides, -angle))) == [(label, "red")]
    for angle in (limit + 4, 20, 30):
        assert seen(paint(turned(sides, angle))) == [("unknown", "red")]


@pytest.mark.parametrize("label", CLASSES)
def test_a_shape_cut_at_the_border(draw: Draw, label: str) -> None:
    for hidden in (1, 2):
        assert seen(draw([(label, "blue", -hidden, 10, 12)])) == [(label, "blue")]
        assert seen(draw([(label, "blue", 20 + hidden, 10, 12)])) == [(label, "blue")]
    for hidden in (4, 6, 8):
        assert seen(draw([(label, "blue", -hidden, 10, 12)])) == [("unknown", "blue")]


@pytest.mark.parametrize("behind", CLASSES)
@pytest.mark.parametrize("before", CLASSES)
def test_overlapping_shapes_of_two_colours(draw: Draw, behind: str, before: str) -> None:
    for covered in (1, 2):
        image = draw([(behind, "red", 4, 8, 12), (before, "blue", 16 - covered, 8, 12)])
        assert seen(image) == sorted([(behind, "red"), (before, "blue")])
    image = draw([(behind, "red", 4, 8, 12), (before, "blue", 10, 8, 12)])
    assert seen(image) == sorted([("unknown", "red"), (before, "blue")])


@pytest.mark.parametrize("label", CLASSES)
def test_shapes_of_one_colour_part_at_half_a_pixel(draw: Draw, label: str) -> None:
    assert seen(draw([(label, "red", 3, 8, 12), (label, "red", 15, 8, 12)])) == [("unknown", "red")]
    assert seen(draw([(label, "red", 3, 8, 12), (label, "red", 15.5, 8, 12)])) == [(label, "red")] * 2


def test_classes_of_photographs_are_an_error() -> None:
    blank = torch.ones(2, 3, 32, 32)
    assert ShapesDetector()(blank, [["circle", "*"], []]) == [[], []]
    with pytest.raises(ValueError, match=r"'dog', which is none of .* the detector of the shapes task"):
        ShapesDetector()(blank, [["circle"], ["dog"]])
