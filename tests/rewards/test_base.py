from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rewards import RewardError, Scores, make, score
from rewards.base import all_valid, check_images

PROMPTS = ["one", "two", "three"]
METADATA: list[dict[str, Any]] = [{}, {}, {}]


class Fake:
    name = "fake"
    needs: tuple[str, ...] = ("texts",)

    def __init__(self, answer: Callable[[Sequence[str]], Any]) -> None:
        self.answer = answer

    def to(self, device: torch.device | str) -> Fake:
        return self

    def __call__(self, samples: Any, prompts: Sequence[str], metadata: Any) -> Scores:
        return self.answer(samples)


def run(values: Tensor, valid: Tensor) -> Scores:
    return score(Fake(lambda _: Scores(values, valid)), PROMPTS, PROMPTS, METADATA)


def test_none_in_a_list_is_an_invalid_row() -> None:
    scores = Scores.from_list([0.5, None, True]).to("cpu")
    assert (scores.values.dtype, scores.values.tolist()) == (torch.float32, [0.5, 0.0, 1.0])
    assert (scores.valid.dtype, scores.valid.tolist()) == (torch.bool, [True, False, True])
    assert [part.shape for part in Scores.from_list([])] == [(0,), (0,)]


def test_values_come_back_as_float32_and_invalid_rows_as_zero() -> None:
    values = torch.tensor([1.0, float("nan"), 3.0], dtype=torch.float64)
    result = run(values, torch.tensor([True, False, True]))
    assert result.values.dtype is torch.float32
    assert result.values.tolist() == [1.0, 0.0, 3.0]
    assert result.valid.tolist() == [True, False, True]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_names_reward_row_and_prompt(bad: float) -> None:
    with pytest.raises(RewardError, match=r"'fake' failed at row 1 \(prompt 'two'\).*not finite") as caught:
        run(torch.tensor([1.0, bad, 3.0]), torch.ones(3, dtype=torch.bool))
    assert (caught.value.name, caught.value.row, caught.value.prompt) == ("fake", 1, "two")


@pytest.mark.parametrize(("values", "valid"), [(2, 3), (3, 2), (4, 4)])
def test_a_wrong_length_is_an_error(values: int, valid: int) -> None:
    with pytest.raises(RewardError, match="for 3 samples"):
        run(torch.zeros(values), torch.ones(valid, dtype=torch.bool))


def test_a_list_holds_none_for_rows_that_could_not_be_scored() -> None:
    result = score(Fake(lambda _: [1.0, None, 3]), PROMPTS, PROMPTS, METADATA)
    assert result.values.tolist() == [1.0, 0.0, 3.0]
    assert result.valid.tolist() == [True, False, True]


def test_a_list_of_the_wrong_length_or_with_a_nan_names_the_reward() -> None:
    with pytest.raises(RewardError, match=r"'fake' failed: .* for 3 samples"):
        score(Fake(lambda _: [1.0, None]), PROMPTS, PROMPTS, METADATA)
    with pytest.raises(RewardError, match=r"'fake' failed at row 2 \(prompt 'three'\).*not finite"):
        score(Fake(lambda _: [1.0, None, float("nan")]), PROMPTS, PROMPTS, METADATA)


@pytest.mark.parametrize("answer", [None, ["one", 2.0, 3.0], 1.0])
def test_an_answer_that_is_no_scores_is_an_error(answer: Any) -> None:
    with pytest.raises(RewardError, match=r"expected a list of numbers .* or rewards\.Scores"):
        score(Fake(lambda _: answer), PROMPTS, PROMPTS, METADATA)


def test_a_tensor_is_a_value_for_each_sample() -> None:
    found = score(Fake(lambda _: torch.tensor([1, 2, 3])), PROMPTS, PROMPTS, METADATA)
    assert found.values.tolist() == [1.0, 2.0, 3.0]
    assert found.valid.all()
    with pytest.raises(RewardError, match=r"at row 1 .*not finite"):
        score(Fake(lambda _: torch.tensor([1.0, torch.nan, 0.0])), PROMPTS, PROMPTS, METADATA)
    with pytest.raises(RewardError, match="for 3 samples"):
        score(Fake(lambda _: torch.zeros(2)), PROMPTS, PROMPTS, METADATA)


def test_missing_metadata_is_an_error() -> None:
    with pytest.raises(RewardError, match="3 samples, 3 prompts, 1 metadata"):
        score(Fake(lambda _: all_valid(torch.zeros(3))), PROMPTS, PROMPTS, METADATA[:1])


def test_an_exception_is_wrapped_and_kept_as_the_cause() -> None:
    def broken(samples: Sequence[str]) -> Scores:
        raise KeyError("weights")

    line = broken.__code__.co_firstlineno + 1
    with pytest.raises(
        RewardError, match=rf"'fake' failed: KeyError: 'weights' in test_base.py, line {line} \(in"
    ) as caught:
        score(Fake(broken), PROMPTS, PROMPTS, METADATA)
    assert isinstance(caught.value.__cause__, KeyError)


def test_the_line_of_an_exception_is_the_users_own() -> None:
    """It is not the line of the library that they call. For rewards of this package there is none."""

    def broken(samples: Sequence[str]) -> Scores:
        return all_valid(torch.stack([]))

    line = broken.__code__.co_firstlineno + 1
    with pytest.raises(RewardError, match=rf"non-empty TensorList in test_base.py, line {line} \("):
        score(Fake(broken), PROMPTS, PROMPTS, METADATA)
    with pytest.raises(RewardError, match=r"found texts \(in a batch"):
        score(make("jpeg_compressibility"), PROMPTS, PROMPTS, METADATA)


def test_a_reward_error_passes_as_it_is() -> None:
    error = RewardError("fake", "no such file", 2, "three")

    def broken(samples: Sequence[str]) -> Scores:
        raise error

    with pytest.raises(RewardError) as caught:
        score(Fake(broken), PROMPTS, PROMPTS, METADATA)
    assert caught.value is error


def test_images_are_checked() -> None:
    for wrong in (
        torch.zeros(3, 2, 2),
        torch.zeros(1, 2, 2, 3),
        torch.zeros(1, 3, 2, 2, dtype=torch.uint8),
        torch.zeros(1, 4, 2, 2),
        torch.zeros(1, 1, 2, 2),
        torch.zeros(1, 3, 0, 2),
    ):
        with pytest.raises(ValueError, match=r"'fake' expects float images \[B,3,H,W\]"):
            check_images(wrong, "fake")
    assert check_images(torch.zeros(0, 3, 2, 2), "fake").shape == (0, 3, 2, 2)


def with_pixel(value: float) -> torch.Tensor:
    images = torch.full((2, 3, 2, 2), 0.5)
    images[1, 2, 0, 1] = value
    return images


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (with_pixel(torch.nan), "found NaN or infinite values in image 1 of 2"),
        (with_pixel(torch.inf), "found NaN or infinite values in image 1 of 2"),
        (with_pixel(255.0), r"found values from 0\.5 to 255; divide images in 0 to 255 by 255"),
        (with_pixel(-1.0), r"found values from -1 to 0\.5; images in \[-1, 1\] are mapped by images / 2 \+ 0\.5"),
        (with_pixel(1.05), r"found values from 0\.5 to 1\.05; .*clamp\(0, 1\)"),
        (torch.zeros(1, 3, 2, 2, dtype=torch.uint8), r"found torch\.uint8 .*divide them by 255"),
        (torch.zeros(1, 2, 2, 3), r"images\.permute\(0, 3, 1, 2\)"),
    ],
)
def test_images_in_another_range_are_refused_with_what_was_found(images: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"'fake' expects float images .*{message}"):
        check_images(images, "fake")


def test_an_overshoot_that_changes_no_8_bit_picture_is_clamped() -> None:
    images = torch.tensor([-1e-6, 1 + 1e-6, 0.5, 0.5 / 255 - 1e-6])[None, None, None].expand(1, 3, 1, 4)
    checked = check_images(images, "fake")
    assert (checked.min(), checked.max()) == (0, 1)
    assert torch.equal(checked[..., 2:], images[..., 2:])


def test_a_sample_that_is_not_finite_is_named_whatever_the_reward() -> None:
    with pytest.raises(RewardError, match=r"'fake' failed at row 1 \(prompt 'two'\): the sample has NaN"):
        score(Fake(lambda samples: [0.0] * 2), with_pixel(torch.nan), ["one", "two"], [{}] * 2)


def test_texts_and_other_things_are_no_images() -> None:
    for wrong, found in ((["a", "b"], "texts"), (torch.zeros(1, 3, 2, 2).numpy(), "ndarray")):
        with pytest.raises(ValueError, match=rf"'fake' expects float images \[B,3,H,W\] in \[0,1\], found {found}$"):
            check_images(wrong, "fake")  # type: ignore[arg-type]
