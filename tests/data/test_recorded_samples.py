"""Tests of files of recorded samples: pairs and samples with rewards, of images and of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from difrl.config import DataConfig
from difrl.data.jsonl import DataFileError
from difrl.data.modality import IMAGES, TEXTS, VIDEOS, Modality
from difrl.data.recorded_samples import RecordedGroup, load_recorded_samples
from difrl.data.videos import Videos
from tests.helpers import write_rows


def save_image(folder: Path, name: str, size: tuple[int, int] = (8, 8)) -> str:
    """Save an image of one colour, another one for each first letter of the name."""
    Image.new("RGB", size, (ord(name[0]), 0, 0)).save(folder / name)
    return name


def load(path: Path, rows: str, modality: Modality) -> list[RecordedGroup]:
    data = DataConfig.model_validate({"train": str(path), "rows": rows, "group_size": 2})
    return load_recorded_samples(data, modality)


IMAGE_PROBLEMS = [
    ({"prompt": "x", "chosen": "a.png"}, '"rejected" must be the path of an image, found null'),
    ({"prompt": "x", "chosen": "a.png", "rejected": "none.png"}, '"rejected": there is no image'),
    ({"prompt": "x", "chosen": "a.png", "rejected": "text.png"}, "is not an image that can be read"),
    ({"prompt": "x", "chosen": "a.png", "rejected": "wide.png"}, "wide.png has 16 × 8 pixels, and a.png 8 × 8"),
    ({"chosen": "a.png", "rejected": "b.png"}, '"prompt" is missing'),
    ({"prompt": "x", "chosen": "a.png", "rejected": "a.png"}, '"chosen" and "rejected" are the same'),
]
TEXT_PROBLEMS = [
    ({"prompt": "1", "chosen": "2"}, '"rejected" is missing, found "prompt"'),
    ({"prompt": "1", "chosen": "2", "rejected": ""}, '"rejected" is empty, expected a completion'),
    ({"prompt": "1", "chosen": 2, "rejected": "3"}, '"chosen" must be the text of a completion, found 2'),
    ({"chosen": "2", "rejected": "3"}, '"prompt" is missing'),
    ({"prompt": "1", "chosen": "2", "rejected": "2"}, '"chosen" and "rejected" are the same'),
]


@pytest.mark.parametrize(
    ("modality", "row", "problem"),
    [*((IMAGES, *each) for each in IMAGE_PROBLEMS), *((TEXTS, *each) for each in TEXT_PROBLEMS)],
)
def test_errors_of_pairs_have_their_line(tmp_path: Path, modality: Modality, row: dict[str, Any], problem: str) -> None:
    save_image(tmp_path, "a.png")
    save_image(tmp_path, "b.png")
    save_image(tmp_path, "wide.png", (16, 8))
    (tmp_path / "text.png").write_text("no image")
    path = write_rows(tmp_path, [{"prompt": "fine", "chosen": "a.png", "rejected": "b.png"}, row])
    with pytest.raises(DataFileError) as error:
        load(path, "pairs", modality)
    assert f"{path}:2: " in str(error.value)
    assert problem in str(error.value)


def test_every_image_that_is_refused_has_its_line_and_name(tmp_path: Path) -> None:
    """Images are decoded before anything is trained: a truncated file has a whole header."""
    whole = Image.effect_noise((64, 64), 90).convert("RGB")
    whole.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    whole.save(tmp_path / "moving.gif", save_all=True, append_images=[whole.rotate(90)])
    Image.new("RGBA", (64, 64), (255, 0, 0, 9)).save(tmp_path / "clear.png")
    (tmp_path / "empty.png").touch()
    names = ["whole.png", "cut.png", "moving.gif", "clear.png", "empty.png"]
    path = write_rows(tmp_path, [{"prompt": "x", "image": name, "reward": 1.0} for name in names])
    with pytest.raises(DataFileError) as error:
        load(path, "samples", IMAGES)
    messages = str(error.value).splitlines()
    problems = ["a damaged or truncated PNG", "a GIF file of several pictures", "transparent pixels", "an empty file"]
    assert len(messages) == len(problems)
    for line, (name, problem) in enumerate(zip(names[1:], problems, strict=True), 2):
        assert messages[line - 2].startswith(f"{path}:{line}: {tmp_path / name}: {problem}")


def test_the_size_of_an_image_is_that_in_which_it_is_shown(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (16, 8), (255, 0, 0)).save(tmp_path / "turned.jpg", exif=exif)
    save_image(tmp_path, "tall.png", (8, 16))
    path = write_rows(tmp_path, [{"prompt": "x", "chosen": "turned.jpg", "rejected": "tall.png"}])
    (pair,) = load(path, "pairs", IMAGES)
    assert IMAGES.read(pair.items).shape == (2, 3, 16, 8)


@pytest.mark.parametrize("reward", ["1", None, True])
def test_a_sample_needs_a_number_as_reward(tmp_path: Path, reward: Any) -> None:
    path = write_rows(tmp_path, [{"prompt": "x", "image": save_image(tmp_path, "a.png"), "reward": reward}])
    with pytest.raises(DataFileError, match=r'rows.jsonl:1: "reward" must be a number'):
        load(path, "samples", IMAGES)


def test_a_text_needs_a_reward(tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match=r'rows.jsonl:1: "reward" must be a number'):
        load(write_rows(tmp_path, [{"prompt": "1+1=", "text": "2"}]), "samples", TEXTS)


def test_a_pair_has_the_place_of_its_line(tmp_path: Path) -> None:
    row = {"chosen": save_image(tmp_path, "a.png"), "rejected": save_image(tmp_path, "b.png")}
    path = write_rows(tmp_path, [{"prompt": "x", **row}, {"prompt": "y", **row}])
    groups = load(path, "pairs", IMAGES)
    assert [group.prompt.place for group in groups] == [f"{path}:1", f"{path}:2"]
    assert [group.items for group in groups] == [(tmp_path / "a.png", tmp_path / "b.png")] * 2
    assert [group.rewards for group in groups] == [(1.0, 0.0)] * 2


def test_samples_of_a_prompt_are_one_group_with_the_place_of_its_first_line(tmp_path: Path) -> None:
    image = save_image(tmp_path, "a.png")
    lines = [("a", 0.5), ("b", 1.0), ("a", 1.0), ("b", 0.0)]
    path = write_rows(tmp_path, [{"prompt": prompt, "image": image, "reward": reward} for prompt, reward in lines])
    first, second = load(path, "samples", IMAGES)
    assert (first.prompt.text, first.prompt.place, first.rewards) == ("a", f"{path}:1", (0.5, 1.0))
    assert (second.prompt.text, second.prompt.place, second.rewards) == ("b", f"{path}:2", (1.0, 0.0))
    assert first.places == (f"{path}:1", f"{path}:3")


def test_samples_have_a_text_and_a_reward(tmp_path: Path) -> None:
    rows = [{"prompt": "1+1=", "text": text, "reward": reward} for text, reward in (("2", 1.0), ("3", 0.0))]
    (group,) = load(write_rows(tmp_path, rows), "samples", TEXTS)
    assert (group.items, group.rewards) == (("2", "3"), (1.0, 0.0))


def test_too_few_samples_of_a_prompt(tmp_path: Path) -> None:
    image = save_image(tmp_path, "a.png")
    images = [{"prompt": prompt, "image": image, "reward": 1.0} for prompt in ("a", "b", "a")]
    with pytest.raises(DataFileError, match=r"'b' has 1 images, and group_size is 2"):
        load(write_rows(tmp_path, images), "samples", IMAGES)
    texts = [{"prompt": "1+1=", "text": "2", "reward": 1.0}]
    with pytest.raises(DataFileError, match="'1\\+1=' has 1 texts, and group_size is 2; lower it, or add texts"):
        load(write_rows(tmp_path, texts), "samples", TEXTS)


def test_input_images_of_pairs_and_samples(tmp_path: Path) -> None:
    """They may have any size. Samples of one instruction and different input images are different groups."""
    one, two = save_image(tmp_path, "1.png", (30, 20)), save_image(tmp_path, "2.png", (5, 7))
    a, b = save_image(tmp_path, "a.png"), save_image(tmp_path, "b.png")
    rows = [{"prompt": "red", "image": image, "chosen": a, "rejected": b} for image in (one, two)]
    pairs = load(write_rows(tmp_path, rows), "pairs", IMAGES)
    assert [pair.prompt.image for pair in pairs] == [tmp_path / one, tmp_path / two]
    samples = [
        {"prompt": "red", "input_image": image, "image": sample, "reward": 1.0}
        for image, sample in ((one, a), (two, a), (one, b), (two, b))
    ]
    groups = load(write_rows(tmp_path, samples), "samples", IMAGES)
    assert [group.prompt.image for group in groups] == [tmp_path / one, tmp_path / two]
    assert [group.items for group in groups] == [(tmp_path / a, tmp_path / b)] * 2


@pytest.mark.parametrize("rows", ["pairs", "samples"])
def test_input_images_of_recorded_samples_are_checked(tmp_path: Path, rows: str) -> None:
    a, b = save_image(tmp_path, "a.png"), save_image(tmp_path, "b.png")
    (tmp_path / "text.png").write_text("no image")
    key = "image" if rows == "pairs" else "input_image"
    samples = {"chosen": a, "rejected": b} if rows == "pairs" else {"image": a, "reward": 1.0}
    path = write_rows(tmp_path, [{"prompt": "x", key: a, **samples}, {"prompt": "x", key: "none.png", **samples}])
    with pytest.raises(DataFileError, match=f'{path}:2: "{key}": there is no image'):
        load(path, rows, IMAGES)
    path = write_rows(tmp_path, [{"prompt": "x", key: a, **samples}, {"prompt": "x", **samples}])
    with pytest.raises(DataFileError, match="1 of 2 rows have an input image, expected all or none"):
        load(path, rows, IMAGES)
    path = write_rows(tmp_path, [{"prompt": "x", key: a, **samples}, {"prompt": "x", key: "text.png", **samples}])
    with pytest.raises(DataFileError, match=f"{path}:2: .*text.png: it is not an image that can be read"):
        load(path, rows, IMAGES)


def test_image_in_rows_of_texts_is_metadata(tmp_path: Path) -> None:
    row = {"prompt": "1+1=", "chosen": "2", "rejected": "3", "image": "plot.svg"}
    (pair,) = load(write_rows(tmp_path, [row]), "pairs", TEXTS)
    assert (pair.prompt.image, pair.prompt.metadata["image"]) == (None, "plot.svg")


def test_rows_of_videos(tmp_path: Path) -> None:
    """A video is written by the modality, read without loss, and compared with the others in size and number of frames."""
    videos = torch.randint(0, 256, (2, 4, 3, 6, 8), generator=torch.Generator().manual_seed(0)) / 255
    content = Videos(tuple(videos), lambda rows: torch.stack(list(rows)), 1)
    names = [VIDEOS.write(content[i : i + 1], tmp_path, f"{i}") for i in range(2)]
    rows = [{"prompt": "x", "video": name, "reward": i} for i, name in enumerate(names)]
    (group,) = load(write_rows(tmp_path, rows), "samples", VIDEOS)
    assert group.rewards == (0.0, 1.0)
    read = VIDEOS.read(group.items)
    assert isinstance(read, Videos)
    torch.testing.assert_close(torch.cat([frames for _, frames in read.batches()]), videos)
    short = VIDEOS.write(Videos((videos[0, :3],), lambda rows: torch.stack(list(rows)), 1), tmp_path, "short")
    with pytest.raises(
        DataFileError, match=r"short\.webp has 8 × 6 pixels and 3 frames, and 0\.webp 8 × 6 pixels and 4"
    ):
        load(write_rows(tmp_path, [*rows, {"prompt": "x", "video": short, "reward": 1}]), "samples", VIDEOS)
    with pytest.raises(DataFileError, match='"video": there is no video'):
        load(write_rows(tmp_path, [{"prompt": "x", "video": "none.webp", "reward": 1}]), "samples", VIDEOS)
