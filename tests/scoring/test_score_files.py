"""Tests of files as samples, of rewards on the command line, and of the table of their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from difrl.config import RewardConfig
from difrl.config.yaml_source import ConfigError
from difrl.data.jsonl import DataFileError
from difrl.scoring.parse_reward import parse_reward
from difrl.scoring.score_files import RewardColumn, Sample, read_samples, score_files
from rewards import make
from rewards.video_files import write_video_file


def values(
    rewards: Sequence[RewardConfig], samples: Sequence[Sample], metadata: Mapping[str, Any] | None = None
) -> dict[str, Sequence[float | None]]:
    """Return the scores of rewards without warnings."""
    found = score_files(rewards, samples, metadata or {}, lambda text: pytest.fail(text))
    return {name: column.values for name, column in found.items()}


def picture(folder: Path, name: str, size: int, level: int) -> Path:
    Image.new("RGB", (size, size), (level, level, level)).save(folder / name)
    return folder / name


def test_images_and_texts_are_distinguished_by_their_content(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("47+38=85", encoding="utf-8")
    picture(tmp_path, "b.png", 4, 255).rename(tmp_path / "b.txt")
    text, image = read_samples([tmp_path / "a.png", tmp_path / "b.txt"], ["one", "two"])
    assert (text.content, text.prompt, image.prompt) == ("47+38=85", "one", "two")
    assert torch.equal(torch.as_tensor(image.content), torch.ones(1, 3, 4, 4))


def test_one_prompt_is_for_all(tmp_path: Path) -> None:
    files = [picture(tmp_path, f"{n}.png", 4, n) for n in range(3)]
    assert [sample.prompt for sample in read_samples(files, ["red"])] == ["red"] * 3
    with pytest.raises(ConfigError, match="--prompt: found 2 for 3 files, expected one for all, or one a file"):
        read_samples(files, ["red", "blue"])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        read_samples([tmp_path / "none.png"], [""])
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(DataFileError, match="bytes: it is not an image that can be read"):
        read_samples([tmp_path / "bytes"], [""])
    whole = picture(tmp_path, "whole.png", 64, 3).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataFileError, match=r"half\.png: a damaged or truncated PNG file"):
        read_samples([tmp_path / "half.png"], [""])


def test_images_of_several_sizes_keep_their_order(tmp_path: Path) -> None:
    """The score of each is that of the image alone."""
    files = [picture(tmp_path, f"{n}.png", size, 40 * n) for n, size in enumerate((8, 32, 8, 16))]
    samples = read_samples(files, ["x"])
    found = values([RewardConfig(name="jpeg_compressibility")], samples)
    alone = [float(make("jpeg_compressibility")(s.content, ["x"], [{}]).values) for s in samples]  # type: ignore[union-attr]
    assert found == {"jpeg_compressibility": alone}
    assert len(set(alone)) > 1


def test_samples_that_cannot_be_scored_are_none(tmp_path: Path) -> None:
    samples = [Sample(tmp_path, "", text) for text in ("it is 85", "no")]
    math = [parse_reward("math"), parse_reward("{name: format, options: {pattern: '\\w+'}}")]
    assert values(math, samples) == {"math": [None, None], "format": [0.0, 1.0]}
    assert values(math[:1], samples, {"answer": 85}) == {"math": [1.0, 0.0]}


class Picky:
    """A reward that returns a letter's place in the alphabet. It fails for a digit, and a blank is an invalid row."""

    name = "picky"
    needs: tuple[str, ...] = ("texts",)

    def to(self, device: object) -> Picky:
        return self

    def __call__(self, samples: Sequence[str], prompts: object, metadata: object) -> list[float | None]:
        if any(text.isdigit() for text in samples):
            raise KeyError("a digit")
        return [None if text.isspace() else ord(text) - ord("a") + 1 for text in samples]


PICKY = {"import": f"{__name__}:Picky"}


def of_letters(*letters: str) -> list[Sample]:
    return [Sample(Path(letter), "", letter) for letter in letters]


def test_an_ensemble_is_one_column() -> None:
    """Its score is the mean less twice the variance: 0.5 - 2 · 0.25 for 1 and 0, and 1.5 - 2 · 2.25 for 3 and 0."""
    members = [PICKY, {"name": "format", "options": {"pattern": "[^a-z]"}}]
    whole = {"ensemble": members, "label": "both", "combine": "uncertainty", "penalty": 2}
    found = values([RewardConfig.model_validate(whole)], of_letters("a", "c", " "))
    assert found == {"both": [0.0, -3.0, None]}


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"shape": {"kind": "clip", "low": 0}}, "'Picky' has a shape, .* leave it out"),
        ({"weight": 2}, "'Picky' has a weight, .* leave it out"),
        (
            {"weight": {"kind": "linear", "start": 1, "end": 0}, "shape": {"kind": "par"}},
            "a shape and a weight, .* leave them out",
        ),
    ],
)
def test_keys_that_only_apply_to_training_are_refused(reward: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        values([RewardConfig.model_validate({**PICKY, **reward})], of_letters("a"))


def test_two_rewards_of_one_name_are_refused() -> None:
    twice = [RewardConfig.model_validate(PICKY)] * 2
    with pytest.raises(ConfigError, match="two rewards are called 'Picky'; give one another label"):
        values(twice, of_letters("a"))
    other = RewardConfig.model_validate({**PICKY, "label": "other"})
    assert values([twice[0], other], of_letters("b")) == {"Picky": [2.0], "other": [2.0]}


def test_failures_that_exclude_samples_are_reported() -> None:
    dropping, told = RewardConfig.model_validate({**PICKY, "on_error": "drop"}), list[str]()
    found = score_files([dropping], of_letters("a", "3", "c"), {}, told.append)
    assert found == {"Picky": RewardColumn([1.0, None, 3.0], warned=True)}
    assert not found["Picky"].unexplained
    assert len(told) == 1
    assert "scored 2 of 3 samples: " in told[0]
    assert "KeyError: 'a digit'" in told[0]
    found = score_files([dropping], of_letters("a", " "), {}, told.append)
    assert found["Picky"].unexplained
    assert len(told) == 1


def test_a_reward_of_texts_refuses_images(tmp_path: Path) -> None:
    message = r"a.png: not for the reward 'math': it reads texts, and the samples here are images"
    with pytest.raises(ConfigError, match=message):
        score_files([RewardConfig(name="math")], read_samples([picture(tmp_path, "a.png", 4, 0)], [""]), {}, print)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ocr", {"name": "ocr"}),
        ("my_rewards.mine", {"import": "my_rewards.mine"}),
        ("my_rewards:Mine", {"import": "my_rewards:Mine"}),
        ("{name: ocr, options: {threads: 2}, weight: 3}", {"name": "ocr", "options": {"threads": 2}, "weight": 3}),
    ],
)
def test_rewards_as_arguments(text: str, expected: dict[str, Any]) -> None:
    assert parse_reward(text) == RewardConfig.model_validate(expected)


def test_the_label_of_a_known_reward_is_that_reward() -> None:
    known = RewardConfig(name="ocr", options={"threads": 3})
    assert parse_reward("ocr", [known]) is known


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{name: ocr, optoins: {}}", "reward:1: optoins: unknown key; did you mean options"),
        ("{name: ocr", "reward:1: not valid YAML"),
        ("{}", "give a reward either a name, an import or an ensemble"),
    ],
)
def test_arguments_that_are_no_reward(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_reward(text)


def test_input_images_are_in_the_metadata_of_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Levels 0.2 apart from an input for all, and from one each, named relative to the folder of the command."""
    files = [picture(tmp_path, f"{n}.png", 4, level) for n, level in enumerate((51, 102))]
    monkeypatch.chdir(tmp_path)
    reward = [parse_reward("{name: consistency, options: {metric: l2}}")]
    for_all = read_samples(files, ["edit"], [Path("0.png")])
    assert values(reward, for_all)["consistency"] == pytest.approx([1, 0.8])
    each = read_samples(files, ["edit"], [Path("1.png"), Path("1.png")])
    assert values(reward, each)["consistency"] == pytest.approx([0.8, 1])
    with pytest.raises(ConfigError, match="--image: found 2 for 1 files, expected one for all, or one a file"):
        read_samples(files[:1], ["edit"], files)


def test_videos_are_scored_by_their_frames(tmp_path: Path) -> None:
    write_video_file(torch.zeros(3, 3, 8, 8), tmp_path / "still.webp")  # equal frames make a file of a single one
    picture(tmp_path, "a.png", 8, 0)
    samples = read_samples([tmp_path / "still.webp", tmp_path / "a.png"], [""])
    assert [tuple(sample.content.shape) for sample in samples if isinstance(sample.content, torch.Tensor)] == [
        (1, 3, 3, 8, 8),
        (1, 3, 8, 8),
    ]
    column = score_files([RewardConfig(name="jpeg_compressibility", frames="worst")], samples, {}, print)
    first, second = column["jpeg_compressibility"].values
    assert first == second
    with pytest.raises(ConfigError, match="it reads videos, and the samples here are images"):
        score_files([RewardConfig(name="motion")], samples[1:], {}, print)
