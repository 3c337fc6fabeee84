from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rewards import Judge, JudgeConfig, JudgeNetwork, make, score

Draw = Callable[..., torch.Tensor]
WORDS = ("a", "red", "blue", "circle", "square", "left", "right", "of", "and")


@pytest.fixture
def network() -> JudgeNetwork:
    torch.manual_seed(0)
    return JudgeNetwork(JudgeConfig(WORDS)).eval()


def test_fits_into_a_megabyte(network: JudgeNetwork, tmp_path: Path) -> None:
    assert sum(parameter.numel() for parameter in network.parameters()) < 200_000
    network.save(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1_000_000


def test_comes_back_from_disk_as_it_was(network: JudgeNetwork, tmp_path: Path) -> None:
    network.save(tmp_path / "judge")
    images, prompts = torch.rand(3, 3, 32, 32), ["a red circle", "a circle", "a blue square and a circle"]
    values = score(make("judge", path=str(tmp_path / "judge")), images, prompts, [{}] * 3).values
    with torch.no_grad():
        expected = network(images, network.encode(prompts)).sigmoid()
    torch.testing.assert_close(values, expected, rtol=0, atol=0)


def test_the_probability_is_the_sigmoid_of_the_logit(network: JudgeNetwork, tmp_path: Path) -> None:
    network.save(tmp_path)
    images, prompts = torch.rand(3, 3, 32, 32), ["a red circle", "a circle", "a blue square and a circle"]
    probability = score(make("judge", path=str(tmp_path)), images, prompts, [{}] * 3).values
    logit = score(make("judge", path=str(tmp_path), output="logit"), images, prompts, [{}] * 3).values
    torch.testing.assert_close((probability / (1 - probability)).log(), logit, rtol=1e-4, atol=1e-5)
    assert score(make("judge", path=str(tmp_path), output="logit"), images, ["mauve"] * 3, [{}] * 3).valid.sum() == 0


def test_a_prompt_with_an_unknown_word_is_invalid(network: JudgeNetwork) -> None:
    prompts = ["a red circle", "a purple circle", "", "A red circle."]
    result = score(Judge(network=network), torch.rand(1, 3, 32, 32).expand(4, -1, -1, -1), prompts, [{}] * 4)
    assert result.valid.tolist() == [True, False, False, True]
    torch.testing.assert_close(result.values[0], result.values[3])


def test_padding_and_company_do_not_matter(network: JudgeNetwork) -> None:
    images, prompts = torch.rand(2, 3, 32, 32), ["a circle", "a red circle left of a blue square"]
    together = network(images, network.encode(prompts))
    alone = [network(images[row : row + 1], network.encode(prompts[row : row + 1])) for row in (0, 1)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_any_size_of_image(network: JudgeNetwork) -> None:
    large = torch.rand(2, 3, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert score(Judge(network=network), large, ["a circle"] * 2, [{}] * 2).valid.all()


def test_it_learns_colours_order_and_positions(draw: Draw) -> None:
    """The four pictures and four sentences differ in the order of words and in left and right."""
    torch.manual_seed(0)
    network = JudgeNetwork(JudgeConfig(WORDS, channels=8))
    prompts = [f"a {one} circle {side} of a {two} circle" for one, two in (("red", "blue"), ("blue", "red"))
               for side in ("left", "right")]  # fmt: skip
    sides = [("red", "blue"), ("blue", "red"), ("blue", "red"), ("red", "blue")]
    images = torch.stack([draw([("circle", a, 3, 11, 10), ("circle", b, 19, 11, 10)]) for a, b in sides])
    truth = torch.tensor([[float(a == b) for b in sides] for a in sides]).flatten()
    ids, all_images = network.encode([p for p in prompts for _ in sides]), images.repeat(4, 1, 1, 1)
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for _ in range(60):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(network(all_images, ids), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    result = score(Judge(network=network), all_images, [p for p in prompts for _ in sides], [{}] * 16)
    assert ((result.values > 0.5) == truth.bool()).all()


def test_errors_name_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="path=FOLDER"):
        make("judge")
    with pytest.raises(ValueError, match="reward 'judge': output is 'odds', expected one of probability, logit"):
        make("judge", path=str(tmp_path), output="odds")
    with pytest.raises(FileNotFoundError, match=r"config.json and model.safetensors not found"):
        JudgeNetwork.load(tmp_path)
