"""Tests of format and length by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rewards import make, score


def values(name: str, texts: list[str], **options: object) -> list[float]:
    found = score(make(name, **options), texts, [""] * len(texts), [{}] * len(texts))
    assert found.valid.all()
    return found.values.tolist()


def test_the_whole_text_must_match() -> None:
    texts = ["15;8;=85", "15;8;=85 ", "=85", "85", "15;8;=", "", "1;\n;=85"]
    assert values("format", texts, pattern=r"\d+;\d+;=\d+") == [1, 0, 0, 0, 0, 0, 0]
    assert values("format", ["<think>\na\n</think>b"], pattern="<think>.*</think>.+") == [1]  # . is any character


def test_a_broken_pattern_is_named() -> None:
    with pytest.raises(ValueError, match=r"reward 'format': pattern is not a regular expression: .*found '\['"):
        make("format", pattern="[")


def test_soft_overlong_punishment() -> None:
    """With L_max = 10 and L_cache = 4 it is 0 up to 6, falls by a quarter a character, and is −1 from 10 on."""
    texts = ["x" * n for n in (0, 6, 7, 8, 10, 11, 100)]
    assert values("length", texts, longest=10, margin=4) == [0, 0, -0.25, -0.5, -1, -1, -1]


def test_length_in_tokens(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path)
    texts = ["one two", "one two three", "1 2 3 4 5"]
    assert values("length", texts, longest=4, margin=2, tokenizer=str(tmp_path)) == [0, -0.5, -1]


@pytest.mark.parametrize(("longest", "margin"), [(4, 0), (4, 5), (0, 0)])
def test_a_margin_that_is_none_is_refused(longest: int, margin: int) -> None:
    with pytest.raises(ValueError, match=f"margin is {margin}, expected 1 to longest, which is {longest}"):
        make("length", longest=longest, margin=margin)


@pytest.mark.parametrize(("name", "options"), [("format", {"pattern": "a"}), ("length", {"longest": 2, "margin": 1})])
def test_texts_are_expected(name: str, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"'{name}' expects a sequence of texts, found Tensor"):
        make(name, **options)(torch.zeros(1, 3, 2, 2), [""], [{}])
    with pytest.raises(ValueError, match=f"'{name}' expects a sequence of texts, found str"):
        make(name, **options)("abc", [""], [{}])
