from __future__ import annotations

from typing import Any

from difrl.config import GenerationConfig
from difrl.data.prompts import Prompt
from difrl.policies.language.tokenization import build_texts
from tests.tiny_models import characters_tokenizer


class Counting:
    """A tokenizer that records the texts that it encodes."""

    def __init__(self) -> None:
        self.own, self.asked = characters_tokenizer(), list[str]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    def __call__(self, text: str, **options: Any) -> Any:
        self.asked.append(text)
        return self.own(text, **options)


def test_a_prompt_is_encoded_once_and_handed_out_afresh() -> None:
    counting = Counting()
    texts = build_texts(counting, GenerationConfig())
    counting.asked.clear()  # the tokenizer was asked whether it appends tokens
    first, again = (texts.tokenize(Prompt("1+2=", {"sample": i})) for i in range(2))
    assert first == again == [3, 12, 4, 13]
    first.append(0)  # what a caller does to its list is its own business
    assert texts.tokenize(Prompt("1+2=", {})) == again
    texts.tokenize(Prompt("1+3=", {}))
    assert counting.asked == ["1+2=", "1+3="]
