"""The cache of embeddings: the latest ones, as many as fit, and always the right one."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL.Image import Image
from torch import Tensor

from difrl.config import ModelConfig
from difrl.data.prompts import Prompt
from difrl.policies.diffusion.load import load_family
from difrl.policies.diffusion.prompt_encoder import PromptEncoder


class Letters:
    """A family whose embedding of a text is its length, 100 times in float32. It counts the texts that it encodes."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, text: str, image: Image | None, length: int | None) -> dict[str, Tensor]:
        self.asked.append(text)
        return {"embeds": torch.tensor([[float(len(text))] * 100])}


def encoder(room: int) -> tuple[PromptEncoder, Letters]:
    family: Any = Letters()
    return PromptEncoder(family, "", None, torch.float32, room), family


def encode(prompts: PromptEncoder, *texts: str) -> list[float]:
    return prompts([Prompt(text, {}) for text in texts], False).tensors["embeds"][:, 0].tolist()


def test_each_text_is_encoded_once_while_there_is_room() -> None:
    prompts, family = encoder(room=10_000)
    assert encode(prompts, "a", "bb", "a", "ccc") == [1, 2, 1, 3]
    assert encode(prompts, "ccc", "a") == [3, 1]
    assert family.asked == ["a", "bb", "ccc"]


def test_what_was_not_used_for_longest_makes_room() -> None:
    """The cache has room for two of 400 bytes: after a, bb, a again and ccc, bb is gone."""
    prompts, family = encoder(room=800)
    for text in ("a", "bb", "a", "ccc"):
        encode(prompts, text)
    assert [text for text, _ in prompts._in_memory._embeddings] == ["a", "ccc"]
    family.asked.clear()
    assert encode(prompts, "a", "ccc", "bb") == [1, 3, 2]  # more at once than there is room for
    assert family.asked == ["bb"]
    assert (
        prompts._in_memory.size
        == sum(v["embeds"].untyped_storage().nbytes() for v in prompts._in_memory._embeddings.values())
        == 800
    )


def test_without_room_every_text_is_encoded_anew() -> None:
    prompts, family = encoder(room=0)
    assert encode(prompts, "a", "bb") == [1, 2]
    assert encode(prompts, "a") == [1]
    assert family.asked == ["a", "bb", "a"]
    assert prompts._in_memory.size == 0


class Words:
    """A tokenizer of words, with a token at each end."""

    def __call__(self, texts: list[str]) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[[0, *range(len(text.split())), 0] for text in texts])


class Cutting:
    """A family with two encoders that read 6 tokens, and one that reads 10."""

    def tokenizers(self, max_sequence_length: int | None) -> dict[str, tuple[Any, int]]:
        return {"tokenizer": (Words(), 6), "tokenizer_2": (Words(), 6), "tokenizer_3": (Words(), 10)}


def test_cut_prompts_are_counted_once_for_each_length(caplog: pytest.LogCaptureFixture) -> None:
    family: Any = Cutting()
    encoder = PromptEncoder(family, "", None, torch.float32)
    prompts = [Prompt(" ".join(["word"] * count), {}) for count in (1, 4, 5, 6, 6, 9)]
    encoder.warn_of_cut(prompts)
    assert [record.getMessage() for record in caplog.records] == [
        "3 prompts were cut at 6 tokens (tokenizer, tokenizer_2); the longest has 11",
        "1 prompt was cut at 10 tokens (tokenizer_3); the longest has 11",
    ]
    encoder.warn_of_cut(prompts)
    assert len(caplog.records) == 2
    encoder.warn_of_cut([Prompt("1 2 3 4 5 6 7", {})])
    assert [record.getMessage() for record in caplog.records[2:]] == [
        "1 prompt was cut at 6 tokens (tokenizer, tokenizer_2); the longest has 9"
    ]


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-sd3"])
def test_the_limits_are_those_at_which_the_pipelines_cut(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Diffusers' own warnings, one for each prompt and encoder, name the same limit and are not shown."""
    family = load_family(ModelConfig(path=name))
    encoder = PromptEncoder(family, "", None, torch.float32)
    tokenizers = ", ".join(family.tokenizers(None))
    fits, cut = (Prompt(" ".join(["red"] * count), {}) for count in (10, 11))
    logging.getLogger("diffusers").addHandler(caplog.handler)
    try:
        encoder([fits, cut], False)
        encoder.warn_of_cut([fits, cut])
        found = [record.getMessage() for record in caplog.records]
        family.encode(fits.text, None, None)
        assert len(caplog.records) == 1
        family.encode(cut.text, None, None)
    finally:
        logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert found == [f"1 prompt was cut at 12 tokens ({tokenizers}); the longest has 13"]
    assert {"up to 12 tokens" in record.getMessage() for record in caplog.records[1:]} == {True}
    assert len(caplog.records) > 1
